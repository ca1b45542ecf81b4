"""Batch inference: find sources, read images ahead in threads, run batches, write records.

find_sources              files, folders, patterns -> the images, in order
load_model                an id or a folder -> model and image processor on a device (`models.loading`)
read_batches -> prepare   files -> batches, a bounded number of images ahead of the model
answers                   batches -> records, by one of the functions of `tasks`
Job.run                   all of it into a file, with progress, `--resume` and an exit status

A file that cannot be read becomes a `Failed`; the others are processed.
"""

from __future__ import annotations

import difflib
import glob
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from huggingface_hub import constants
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from spcxr_hf.data.sets import is_set, read_set
from spcxr_hf.data.table import (
    IMAGE,
    PICTURE_SUFFIXES,
    RadiographTable,
    is_hidden,
    join_tables,
    pictures_below,
    read_table,
    scan_pictures,
)
from spcxr_hf.errors import SpcxrError, printable
from spcxr_hf.files import RESEARCH_NOTICE, locked, read_json, worker_count
from spcxr_hf.hub.folder import BUNDLED
from spcxr_hf.hub.install import install_checkpoints
from spcxr_hf.images.reader import read_with_quality_warnings
from spcxr_hf.inference.intended_use import read_age_and_view, use_warnings
from spcxr_hf.inference.writers import check_output, choose_format, finished, open_writer
from spcxr_hf.models.loading import Loaded, is_local, load_checkpoint

NAMESPACE = "spcxr/"
AHEAD = 2  # batches that are read while the model works on one
ALL_DONE, NOTHING_DONE, SOME_FAILED, INTERRUPTED = 0, 1, 3, 130  # exit statuses


# ---- files -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A file, and the name of what is made of it: its path inside the folder or the pattern that it was found by."""

    path: Path
    name: str


def find_sources(words: Sequence[str | os.PathLike], left_out: list[Path] | None = None) -> list[Source]:
    """The images behind files, folders (with their subfolders) and patterns such as `scans/**/*.dcm`, each one once.

    In a folder, a file counts as `pictures_below` says. A file that is given itself counts whatever its name, and
    whether it exists is found out when it is read.

    Args:
        words: Files, folders and patterns.
        left_out: Extended by the entries of folders that are left out, as in `pictures_below`.
    """
    found: dict[Path, Source] = {}
    for word in [os.fspath(one) for one in words]:
        path = Path(word)
        base, files = path.parent, [path]
        if path.is_dir():
            base, files = path, pictures_below(path, left_out)
            if not files:
                raise SpcxrError(f"{path}: no images in this folder ({', '.join(sorted(PICTURE_SUFFIXES))})")
        elif not path.exists() and glob.has_magic(word):
            first = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
            base = Path(*path.parts[:first])
            matches = sorted(base.glob("/".join(path.parts[first:])))
            files = [file for file in matches if file.is_file() and not is_hidden(file, base)]
            if not files:
                raise SpcxrError(f"{word}: no file has such a name")
        for file in files:
            found.setdefault(file, Source(file, file.relative_to(base).as_posix()))
    return list(found.values())


def table_of(
    words: Sequence[str | os.PathLike],
    read_as: str | None = None,
    image_root: str | os.PathLike | None = None,
    left_out: list[Path] | None = None,
) -> RadiographTable:
    """A set: what one word names for `read_set`, Parquet files, or what `find_sources` takes; ids are paths then."""
    if len(words) == 1 and is_set(words[0]):
        if left_out is not None and Path(words[0]).is_dir():
            left_out += [file for files in scan_pictures(Path(words[0]))[1].values() for file in files]
        return read_set(words[0], read_as=read_as, image_root=image_root)
    sources = find_sources(words, left_out)
    if all(source.path.suffix == ".parquet" for source in sources):
        return join_tables([read_table(source.path, image_root) for source in sources])
    cells = [{"bytes": None, "path": str(source.path)} for source in sources]
    rows = {"image": pa.array(cells, IMAGE), "id": [str(source.path) for source in sources]}
    return RadiographTable(pa.table(rows), f"{len(sources)} files")


# ---- the model ---------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """A bundled or cached classifier: its id, its labels, and its intended population ("" where unknown)."""

    repo_id: str
    labels: list[str]
    population: str


def list_heads() -> list[Head]:
    """The classifiers of the source tree, or where there is none, those of `spcxr/` in the local Hub cache."""
    cache = Path(constants.HF_HUB_CACHE)
    folders = {NAMESPACE + folder.name: folder for folder in sorted(BUNDLED.glob("*"))} or {
        NAMESPACE + folder.name.rpartition("--")[2]: snapshot
        for folder in sorted(cache.glob(f"models--{NAMESPACE.strip('/')}--*"))
        for snapshot in sorted((folder / "snapshots").glob("*"))[-1:]
    }
    heads = []
    for repo_id, folder in folders.items():
        config = read_json(folder / "config.json")
        if (config.get("architectures") or [""])[0].endswith("ForImageClassification"):
            labels = list(map(str, (config.get("id2label") or {}).values()))
            heads.append(Head(repo_id, labels, str((config.get("intended_use") or {}).get("population", ""))))
    return heads


def load_model(task: str, model: str | os.PathLike, device: str = "auto") -> Loaded:
    """`models.loading.load_checkpoint` for the commands: of the ids `spcxr/...`, the bundled checkpoint is installed
    into the local Hub cache first where it is missing, if the source tree is there.
    """
    name = os.fspath(model)
    if name.startswith(NAMESPACE) and not is_local(name) and (BUNDLED / name.removeprefix(NAMESPACE)).is_dir():
        install_checkpoints()
    try:
        return load_checkpoint(task, name, device)
    except SpcxrError as error:
        if is_local(name):
            raise
        bundled = [NAMESPACE + folder.name for folder in BUNDLED.glob("*") if (folder / "config.json").is_file()]
        near = difflib.get_close_matches(name, bundled, n=1, cutoff=0.85)
        raise SpcxrError(
            f"{error}. `spcxr install` puts the bundled checkpoints there; --model takes a folder, too"
            f"{f'. Did you mean {near[0]}?' if near else ''}"
        ) from error


# ---- images ------------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """`pixel_values` (C, H, W) of an image, `size` (height, width) that it had, and reasons why it may not be an
    upright frontal chest radiograph."""

    source: Source
    pixel_values: torch.Tensor
    size: tuple[int, int]
    warnings: list[str]


class Failed(NamedTuple):
    """A file that could not be used, and why: one line that names it."""

    source: Source
    cause: str


class Batch(NamedTuple):
    """Images for one forward pass, and the files since the batch before that could not be used."""

    images: list[Prepared]
    failed: list[Failed]

    def pixel_values(self) -> torch.Tensor:
        """(B, C, H, W)."""
        return torch.stack([image.pixel_values for image in self.images])


def prepare(source: Source, processor: Any, intended_use: Mapping[str, Any] | None = None) -> Prepared | Failed:
    """Read one file and make `pixel_values` of it; never raises for what is wrong with the file.

    With the model's `intended_use`, a warning says where a DICOM's header differs.
    """
    try:
        str(source.path).encode()
    except UnicodeEncodeError:  # no format of the records could hold it
        return Failed(source, f"{source.path}: the name is not valid UTF-8; rename the file")
    try:
        image, found = read_with_quality_warnings(source.path, full_depth=True)
        if intended_use:
            found += use_warnings(intended_use, read_age_and_view(source.path))
        pixel_values = processor(image, return_tensors="pt").pixel_values[0]
    except SpcxrError as error:
        return Failed(source, str(error))
    except Exception as error:  # libraries raise any type on damaged files; the others are processed
        return Failed(source, f"{source.path}: cannot be used ({type(error).__name__})")
    return Prepared(source, pixel_values, (image.height, image.width), found)


def read_batches(
    sources: Sequence[Source],
    processor: Any,
    batch_size: int,
    workers: int | None = None,
    intended_use: Mapping[str, Any] | None = None,
) -> Iterator[Batch]:
    """Batches in the order of the files, full ones but for the last, read by threads a bounded number of images ahead.

    Threads, not processes: Pillow, pydicom's decoders and torch work outside the interpreter's lock.
    """
    images: list[Prepared] = []
    failed: list[Failed] = []
    read = partial(prepare, processor=processor, intended_use=intended_use)
    for one in map_ahead(read, sources, AHEAD * batch_size, worker_count(workers)):
        if isinstance(one, Failed):
            failed.append(one)
        else:
            images.append(one)
        if len(images) == batch_size:
            yield Batch(images, failed)
            images, failed = [], []
    if images or failed:
        yield Batch(images, failed)


def map_ahead(function: Callable[[Source], Any], sources: Sequence[Source], ahead: int, workers: int) -> Iterator[Any]:
    """`map` by threads, in order, with at most `ahead` results that are not yet taken."""
    Image.init()  # before there are threads, which could see a partially imported library
    with suppress(ImportError):
        import pydicom  # noqa: F401
    waiting: deque[Future] = deque()
    rest = iter(sources)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="spcxr-reader")
    try:
        waiting.extend(pool.submit(function, source) for source in islice(rest, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, source) for source in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---- answers -----------------------------------------------------------------------------------------------------

Answer = Callable[[Loaded, Batch], Sequence[Mapping[str, Any] | Failed]]


class Step(NamedTuple):
    """A batch's records, and its files that could not be used."""

    records: list[Mapping[str, Any]]
    failed: list[Failed]


def answers(
    loaded: Loaded, sources: Sequence[Source], answer: Answer, batch_size: int = 16, workers: int | None = None
) -> Iterator[Step]:
    """Records of all sources, a batch at a time and in order; memory does not grow with their number.

    `answer` is one of the functions of `tasks`: it takes the model and a batch, and returns a record or `Failed` per
    image.

    Raises:
        SpcxrError: the model cannot work on the images, or the device has too little memory for a batch.
    """
    intended_use = getattr(loaded.model.config, "intended_use", None)
    for batch in read_batches(sources, loaded.processor, batch_size, workers, intended_use):
        try:
            found = list(answer(loaded, batch)) if batch.images else []
        except torch.OutOfMemoryError as error:
            raise SpcxrError(
                f"{loaded.device} has too little memory for a batch of {batch_size} images; give a smaller --batch-size"
            ) from error
        records = [one for one in found if not isinstance(one, Failed)]
        yield Step(records, [*batch.failed, *(one for one in found if isinstance(one, Failed))])


# ---- jobs --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How many files were answered, failed, skipped (done before) or left out (of folders, as of `pictures_below`)."""

    done: int = 0
    failed: int = 0
    skipped: int = 0
    left_out: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 all done, 1 nothing could be done, 3 some files failed or were left out, 130 interrupted."""
        if self.interrupted:
            return INTERRUPTED
        if not self.failed:
            return SOME_FAILED if self.left_out else ALL_DONE
        return SOME_FAILED if self.done or self.skipped else NOTHING_DONE

    def __str__(self) -> str:
        rate = f" ({self.done / self.seconds:.1f} images/s)" if self.seconds and self.done else ""
        images = "1 image" if self.done == 1 else f"{self.done} images"
        parts = [f"{images} in {self.seconds:.1f} s{rate}"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.left_out} left out"] if self.left_out else []
        parts += [f"{self.skipped} {'was' if self.skipped == 1 else 'were'} done before"] if self.skipped else []
        parts += ["interrupted; what is written is whole"] if self.interrupted else []
        return "; ".join(parts)


@dataclass
class Job:
    """Files to process, and where the records go.

    Attributes:
        output: File of the records; None is standard output.
        stated: Its format, where its suffix does not say it.
        resume: Leave out files whose records are in `output`.
        overwrite: Replace `output`.
        left_out: What was left out of the folders, as of `find_sources`.
        place: Path of the picture made of a file, for tasks that make one: with `resume`, a file whose picture is
            missing is not finished.

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
    place: Callable[[Source], Path] | None = None
    left_out: Sequence[Path] = ()
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        self.kind = choose_format(self.output, self.stated, sys.stdout.isatty())
        by_picture = self.resume and self.place is not None and self.output is None
        check_output(self.output, self.resume and not by_picture, self.overwrite)
        places = [] if self.place is None or self.resume or self.overwrite else map(self.place, self.sources)
        if there := next((picture for picture in places if picture.exists()), None):
            raise SpcxrError(f"{there}: already exists; --resume leaves it, --overwrite makes all anew")

    def run(self, loaded: Loaded, answer: Answer) -> Outcome:
        """Process every file, report broken ones on standard error, and end with a line of counts."""
        with nullcontext() if self.output is None else locked(self.output.absolute().parent, self.output.name):
            return self._run(loaded, answer)

    def _run(self, loaded: Loaded, answer: Answer) -> Outcome:
        known = finished(self.output, self.kind, loaded.name) if self.resume else set()
        sources = [source for source in self.sources if not self._is_finished(source, known)]
        outcome = Outcome(skipped=len(self.sources) - len(sources), left_out=len(self.left_out))
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
        notice = "" if self.kind == "table" else f" {RESEARCH_NOTICE.capitalize()}."  # a table's caption has it
        print(f"{outcome}.{notice}", file=sys.stderr)
        return outcome

    def _is_finished(self, source: Source, known: set[str]) -> bool:
        has_record = self.output is None or str(source.path) in known
        return self.resume and has_record and (self.place is None or self.place(source).is_file())


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


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM set the event, so that the current batch is finished; a second one interrupts at once."""
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
