"""What the commands on many files share: what is left to do, a progress bar, broken files told, an orderly end.

Job.run -> inference.answers -> writers    until all is done or somebody asks to stop
        -> Outcome                         which says how the process ends
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .errors import SpcxrError, printable
from .inference import Answer, Loaded, Source, answers
from .writers import NOTE, check_output, choose_format, finished, open_writer

ALL_DONE, NOTHING_DONE, SOME_FAILED, INTERRUPTED = 0, 1, 3, 130


@dataclass
class Outcome:
    """How many files came to what."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 1 nothing could be done, 3 some files failed, 130 interrupted."""
        if self.interrupted:
            return INTERRUPTED
        if not self.failed:
            return ALL_DONE
        return SOME_FAILED if self.done or self.skipped else NOTHING_DONE

    def __str__(self) -> str:
        rate = f" ({self.done / self.seconds:.1f} images/s)" if self.seconds and self.done else ""
        images = "1 image" if self.done == 1 else f"{self.done} images"
        parts = [f"{images} in {self.seconds:.1f} s{rate}"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.skipped} {'was' if self.skipped == 1 else 'were'} done before"] if self.skipped else []
        parts += ["interrupted; what is written is whole"] if self.interrupted else []
        return "; ".join(parts)


@dataclass
class Job:
    """Files to be answered for, and where the records go.

    Attributes:
        sources: The files.
        output: File of the records; None is standard output.
        stated: Its format, where its suffix does not say it.
        resume: Leave out files whose records are in `output`.
        overwrite: Replace `output`.
        batch_size: Images per forward pass.
        workers: Threads that read.
        picture_of: Where the picture made of a file lies, for tasks that make one: with `resume`, a file whose picture
            is missing is not finished.

    Raises:
        SpcxrError: the output cannot be used, or would destroy what is there.
    """

    sources: Sequence[Source]
    output: Path | None = None
    stated: str | None = None
    resume: bool = False
    overwrite: bool = False
    batch_size: int = 16
    workers: int | None = None
    picture_of: Callable[[Source], Path] | None = None
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.kind = choose_format(self.output, self.stated, sys.stdout.isatty())
        by_picture = self.resume and self.picture_of is not None and self.output is None
        check_output(self.output, self.resume and not by_picture, self.overwrite)
        if self.picture_of is not None and not (self.resume or self.overwrite):
            self._refuse_pictures(self.picture_of)

    def _refuse_pictures(self, picture_of: Callable[[Source], Path]) -> None:
        there = next((picture for source in self.sources if (picture := picture_of(source)).exists()), None)
        if there:
            raise SpcxrError(f"{there}: is there already; --resume leaves it, --overwrite makes all anew")

    def run(self, loaded: Loaded, answer: Answer) -> Outcome:
        """Answer for every file, tell of broken ones on standard error, and end with a line on how it went."""
        known = finished(self.output, self.kind, loaded.name) if self.resume else set()
        sources = [source for source in self.sources if not self._is_finished(source, known)]
        outcome = Outcome(skipped=len(self.sources) - len(sources))
        started = time.perf_counter()
        with (
            _stop_on_signal() as stop,
            open_writer(self.output, self.kind, self.resume) as writer,
            _progress(len(sources)) as advance,
        ):
            for step in answers(loaded, sources, answer, self.batch_size, self.workers):
                # a file whose picture alone was missing has its record already
                writer.write([record for record in step.records if record["path"] not in known])
                for failed in step.failed:
                    print(f"error: {printable(failed.cause)}", file=sys.stderr)
                outcome.done += len(step.records)
                outcome.failed += len(step.failed)
                advance(len(step.records) + len(step.failed))
                if stop.is_set():
                    outcome.interrupted = True
                    break
        outcome.seconds = time.perf_counter() - started
        print(f"{outcome}. {NOTE.capitalize()}.", file=sys.stderr)
        return outcome

    def _is_finished(self, source: Source, known: set[str]) -> bool:
        has_record = self.output is None or str(source.path) in known
        return self.resume and has_record and (self.picture_of is None or self.picture_of(source).is_file())


# ---- pictures ----------------------------------------------------------------------------------------------------


def picture_names(sources: Sequence[Source], folder: Path, suffix: str = ".png") -> Callable[[Source], Path]:
    """Where the picture made of each file goes: its own name, and the suffix behind it where it has another.

    Raises:
        SpcxrError: two files would have the same picture, or a picture would replace a file that it is made of.
    """

    def name(source: Source) -> Path:
        own = source.name if source.name.lower().endswith(suffix) else source.name + suffix
        return folder / own

    taken: dict[Path, Source] = {}
    inputs = {source.path.resolve() for source in sources}
    for source in sources:
        picture = name(source)
        if picture in taken:
            raise SpcxrError(
                f"{picture}: would be made of {taken[picture].path} and of {source.path}; give the folder above them"
            )
        if picture.resolve() in inputs:
            raise SpcxrError(f"{picture}: would be written over an input; give another folder")
        taken[picture] = source
    return name


# ---- while it runs -----------------------------------------------------------------------------------------------


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM set the event, so that the batch at hand is finished; a second one breaks off at once."""
    stop = threading.Event()

    def ask(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # where signals cannot be listened to
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Rate(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal, with images per second and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    # What goes to standard output must not be redirected to the bar's console, which is standard error.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
    ) as bar:
        task = bar.add_task("images", total=total)
        yield lambda count: bar.advance(task, count)
