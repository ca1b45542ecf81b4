"""A resumable grid of trainings: cells in folders, processes, logs, time and energy.

A cell is one or more commands, run one behind the other, and a result that is read from what they leave. Its folder is
held by a lock that its processes inherit, so that a second runner (or a new one, where the first was killed and its
process lives on) leaves the cell alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import write_json

RESULT, SETTINGS, LOG, LOCK = "result.json", "settings.json", "log.txt", "lock"
PREDICTIONS = "predictions.parquet"
KEPT = (SETTINGS, PREDICTIONS, RESULT)  # of a finished cell; the last makes it one
NOT_THERE = "not there"  # in place of a weights_digest
# Fields of a config that do not describe the network: provenance, and values that trainings overwrite.
NO_NETWORK = {"transformers_version", "dtype", "architectures", "auto_map"}
NO_NETWORK |= {"images_seen", "drop_path_rate", "norm_pix_loss"}
RAPL = Path("/sys/class/powercap")
POWER_EVERY = 5.0  # seconds between readings of a card's power


@dataclass(frozen=True)
class Cell:
    """One cell: commands and their result.

    Attributes:
        name: Its place in the grid, words divided by "/"; its folder too.
        commands: Run in turn.
        settings: What the result depends on, as JSON, without paths: a cell that was run with others is refused.
        cost: By which cells are ordered.
        needs: Checkpoints without which it cannot run yet.
        about: Further values for the reader of its result.
    """

    name: str
    commands: Sequence[Sequence[str]]
    settings: Mapping[str, Any]
    cost: tuple = ()
    needs: Sequence[Path] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Summary:
    """Outcome of the cells: names, and causes of failures."""

    finished: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Grid:
    """Runs cells, the cheapest first.

    Args:
        output: A folder for the cells'.
        read: Given a finished cell and its folder, its result as JSON.
        prepare: Called with a cell and its folder before its first command.
        jobs: Cells at a time.
        keep_models: Keep the weights of finished cells.
        kept: A folder that gets the small files of finished cells (`KEPT`), so that they outlive `output`; a cell that
            is in it is finished.
    """

    def __init__(
        self,
        output: Path,
        read: Callable[[Cell, Path], dict],
        prepare: Callable[[Cell, Path], None] = lambda cell, folder: None,
        jobs: int = 1,
        keep_models: bool = False,
        kept: Path | None = None,
    ):
        self.output, self.read, self.prepare, self.kept = output, read, prepare, kept
        self.jobs, self.keep_models = jobs, keep_models
        self.summary = Summary()
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def home(self, cell: Cell) -> Path:
        """The folder of a cell's result."""
        if self.kept is not None and (self.kept / cell.name / RESULT).is_file():
            return self.kept / cell.name
        return self.output / cell.name

    def result(self, cell: Cell) -> dict | None:
        """The result of a cell, None where it is not finished.

        Raises:
            SpcxrError: it is damaged, or was run with other settings.
        """
        home = self.home(cell)
        if not (home / RESULT).is_file():
            return None
        self._check(cell, home)
        return _read_json(home / RESULT)

    def run(
        self, cells: Sequence[Cell], deadline: float | None = None, after: Callable[[Cell], None] = lambda cell: None
    ) -> Summary:
        """Run the cells that have no result yet.

        Args:
            cells: In any order.
            deadline: Of `time.monotonic`; no cell begins behind it.
            after: Called behind each cell that finished, never twice at once.
        """
        queue = iter(sorted(cells, key=lambda cell: cell.cost))

        def work() -> None:
            while not self._stopped.is_set() and (deadline is None or time.monotonic() < deadline):
                with self._lock:
                    cell = next(queue, None)
                if cell is None:
                    return
                if self._attempt(cell):
                    with self._lock:
                        after(cell)

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work) for _ in range(self.jobs)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop()
                raise
        return self.summary

    def stop(self) -> None:
        """Start no further cell and terminate running processes, which save a checkpoint."""
        self._stopped.set()
        for child in list(self._children):
            child.terminate()

    def _attempt(self, cell: Cell) -> bool:
        """Run one cell; whether it is newly finished."""
        absent = [path for path in cell.needs if not path.exists()]
        try:
            if self.result(cell) is not None:
                self._keep(cell)  # finished before `kept` was given
                return False
            if absent:
                self.summary.waiting.append(cell.name)
                return False
            with _held(self.output / cell.name) as lock:
                if lock is None:
                    self.summary.waiting.append(cell.name)
                    return False
                self._run(cell, self.output / cell.name, lock)
        except SpcxrError as error:
            self.summary.failed[cell.name] = str(error)
            print(f"{cell.name}: {error}", flush=True)
            return False
        self.summary.finished.append(cell.name)
        return True

    def _run(self, cell: Cell, folder: Path, lock: int) -> None:
        if (folder / SETTINGS).is_file():
            self._check(cell, folder)
        write_json(folder / SETTINGS, dict(cell.settings))
        started = time.perf_counter()
        self.prepare(cell, folder)
        for command in cell.commands:
            self._call(command, folder / LOG, lock)
        result = self.read(cell, folder)
        result["minutes"] = round((time.perf_counter() - started) / 60, 2)  # of this attempt
        write_json(folder / RESULT, result)
        if not self.keep_models:
            drop_models(folder)
        self._keep(cell)
        print(f"{cell.name}: finished in {result['minutes']:.1f} minutes", flush=True)

    def _keep(self, cell: Cell) -> None:
        if self.kept is not None and not (self.kept / cell.name / RESULT).is_file():
            keep(self.output / cell.name, self.kept / cell.name)

    def _call(self, command: Sequence[str], log: Path, lock: int) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        with log.open("a", encoding="utf-8") as stream:
            child = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock] if lock >= 0 else []
            )
            self._children.add(child)
            try:
                status = child.wait()
            finally:
                self._children.discard(child)
        if self._stopped.is_set():
            raise SpcxrError("stopped; run the same command to resume")
        if status:
            raise SpcxrError(f"{Path(command[1]).name} ended with status {status}: {_last_words(log)}")

    def _check(self, cell: Cell, folder: Path) -> None:
        before, now = _read_json(folder / SETTINGS), json.loads(json.dumps(dict(cell.settings)))
        names = sorted(name for name in {*before, *now} if not _agree(before.get(name), now.get(name)))
        if names:
            said = ", ".join(f"{name}: {before.get(name)}, now {now.get(name)}" for name in names[:3])
            raise SpcxrError(f"{folder}: was run with other settings ({said}); delete it or choose another --output")


def _agree(before: Any, now: Any) -> bool:
    """Whether a setting is as it was; of a checkpoint that is not here, its name is all that there is to compare."""
    if isinstance(before, str) and isinstance(now, str) and now.endswith(NOT_THERE):
        return before.startswith(now.removesuffix(NOT_THERE))
    return before == now


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[int | None]:
    """The descriptor of the folder's lock; None where another process holds it, -1 where the system has none."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield -1
        return
    stream: IO
    with (folder / LOCK).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield stream.fileno()


def drop_models(folder: Path) -> None:
    """Delete the weights, the checkpoints and the optimiser's state of a cell; figures, logs and recipes stay."""
    for checkpoint in folder.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()


def keep(folder: Path, place: Path) -> None:
    """Copy what counts of a finished cell, its result last."""
    place.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, place / name)


def weights_digest(folder: Path) -> str:
    """Eight digits that name the weights of a checkpoint, or that there are none yet."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return NOT_THERE
    status = weights.stat()
    return _digest(weights, status.st_size, status.st_mtime_ns)


def network_fingerprint(folder: Path) -> str:
    """Eight digits that name the network of a checkpoint, all that random weights take of it; or that there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return NOT_THERE
    network = {name: value for name, value in _read_json(file).items() if name not in NO_NETWORK}
    return hashlib.sha256(json.dumps(network, sort_keys=True).encode()).hexdigest()[:8]


@functools.lru_cache
def _digest(path: Path, size: int, time_ns: int) -> str:
    """Of a file's contents; size and time tell it from what it was before."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:8]


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpcxrError(f"{path}: cannot be read ({error}); delete it to run the cell again") from error


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-240:] if lines else "nothing said"


# ---- time and energy ---------------------------------------------------------------------------------------------


class EnergyMeter:
    """Watt-hours of the machine between `with` and its end, as far as they can be read.

    Of processors the counters of RAPL (Linux, mostly for root alone), of a GPU the mean of what nvidia-smi says of its
    power times the time. `watt_hours` is None where neither can be read: nothing is guessed.
    """

    def __init__(self) -> None:
        self.watt_hours: float | None = None

    def __enter__(self) -> EnergyMeter:
        self._started, self._before = time.monotonic(), _rapl()
        self._watts: list[float] = []
        self._done = threading.Event()
        self._reader = threading.Thread(target=self._read_power, daemon=True)
        if shutil.which("nvidia-smi"):
            self._reader.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._reader.is_alive():
            self._reader.join()
        joules = [_difference(now, before) for now, before in zip(_rapl(), self._before, strict=True)]
        hours = (time.monotonic() - self._started) / 3600
        parts = [sum(joules) / 3600] if joules else []
        parts += [hours * sum(self._watts) / len(self._watts)] if self._watts else []
        self.watt_hours = round(sum(parts), 2) if parts else None

    def _read_power(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        while not self._done.is_set():
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
                self._watts.append(sum(float(line) for line in said.split()))
            self._done.wait(POWER_EVERY)


def _rapl() -> list[tuple[int, int]]:
    """Each package's counter and where it begins anew, in microjoules; empty where they cannot be read."""
    found = []
    for domain in sorted(RAPL.glob("intel-rapl:?")):
        try:
            counts = [int((domain / name).read_text()) for name in ("energy_uj", "max_energy_range_uj")]
        except (OSError, ValueError):
            return []
        found.append((counts[0], counts[1]))
    return found


def _difference(now: tuple[int, int], before: tuple[int, int]) -> float:
    """Joules between two readings of a counter that may have begun anew once."""
    return ((now[0] - before[0]) % max(now[1], 1)) / 1e6
