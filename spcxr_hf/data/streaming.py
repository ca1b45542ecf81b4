"""Sets larger than memory: shuffled, resumable micro-batches from Parquet or WebDataset shards, for several processes.

read_index -> ShardIndex          one small record per unit (row group, or run of tar members), no images
deal_streams -> MicroBatchStream  each row is in one stream; `start_at` gives its endless order from any sample on
StreamingRadiographs              -> StreamedBatch, decoded, in worker processes or in this one; and `steps`, for a Run

An optimiser step has one micro-batch from each stream, and process p of P works on the streams s with s % P == p
(`data.batches.StepPlan`). What a stream holds and its order follow from the seed alone, so a step sees the same images
whatever the number of processes and workers, and a run is resumed by the number of the steps done.

Memory: a stream holds the encoded bytes of at most `window` units, and of them only the rows that it has not given out
yet, whatever the size of the set. The index takes 44 bytes per unit. Row
groups of 100 to 1000 images are what `datasets` writes; a tar is cut into units of at most 256 samples or 64 MiB.

`spcxr_hf.data.shards` says what the start takes. A filter (`where`) costs more: its column is read once (in a tar,
every .json), and 4 bytes are kept per kept row.

Shards are local files. From a dataset on the Hub they come once, and stay in its cache:

    folder = huggingface_hub.snapshot_download("owner/name", repo_type="dataset", allow_patterns="data/train-*")
    stream = StreamingRadiographs(folder + "/data", stored_size=256, workers=4)
    for micro_batches in stream.steps(StepPlan(batch_size=256, micro_batch_size=64), first_step=0, last_step=1000):
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from spcxr_hf.data.batches import MicroBatch, StepPlan, step_seed
from spcxr_hf.data.shards import Row, ShardIndex, Source, read_index
from spcxr_hf.data.table import OnError, open_image
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import note
from spcxr_hf.images.plausibility import SIDE, count_doubtful, set_warning

DEALING, UNIT_ORDER, ROW_ORDER = -1, -2, -3  # keep the three permutations apart, and from the seeds of the steps
LOOK_EVERY = 5.0  # seconds between a worker's checks that its parent is alive
LEAST_SEEN = 1000  # minimum number of images before the failure ratio applies


# ---- order of the rows -----------------------------------------------------------------------------------------


class Position(NamedTuple):
    """A place in a stream's order."""

    epoch: int  # how often the stream has been through its rows
    block: int  # the window within the epoch
    unit: int
    row: int  # number of the kept row within the unit


@dataclass(frozen=True, eq=False)
class MicroBatchStream:
    """A fixed share of the rows, and an endless order of them: each row once per epoch of the stream.

    In every epoch the stream's units are shuffled and cut into blocks of at most `window`, and the rows of a block are
    shuffled together. `units` (n,) are numbers of units in the index; of each of them the stream has the rows `starts`
    (n,) up to `stops` (n,), excluded.
    """

    number: int
    seed: int
    window: int
    units: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        """The rows of the stream."""
        return int((self.stops - self.starts).sum())

    def start_at(self, samples: int) -> Iterator[Position]:
        """The order from the sample of this number on (from 0), without end; found by counting, nothing is read."""
        epoch, skipped = divmod(samples, len(self))
        while True:
            for block, pieces in enumerate(self._blocks(epoch)):
                rows = int((self.stops[pieces] - self.starts[pieces]).sum())
                if skipped < rows:
                    yield from self._shuffled(epoch, block, pieces, skipped)
                skipped = max(0, skipped - rows)
            epoch += 1

    def _blocks(self, epoch: int) -> list[np.ndarray]:
        """The shuffled pieces of the stream in blocks of near-equal length: a short last block would hardly shuffle."""
        order = _permutation(len(self.units), self.seed, UNIT_ORDER, self.number, epoch)
        return np.array_split(order, math.ceil(len(order) / self.window))

    def _shuffled(self, epoch: int, block: int, pieces: np.ndarray, skipped: int) -> Iterator[Position]:
        units, starts = self.units[pieces], self.starts[pieces]
        sizes = self.stops[pieces] - starts
        ends = np.cumsum(sizes)
        order = _permutation(int(ends[-1]), self.seed, ROW_ORDER, self.number, epoch, block)[skipped:]
        piece = np.searchsorted(ends, order, side="right")
        rows = order - (ends - sizes)[piece] + starts[piece]
        for unit, row in zip(units[piece].tolist(), rows.tolist(), strict=True):
            yield Position(epoch, block, unit, row)


def deal_streams(
    index: ShardIndex, streams: int, micro_batch_size: int, seed: int, window: int
) -> list[MicroBatchStream]:
    """Deal the rows to streams of equal length, to within one row: the shuffled units in a line, cut into `streams`.

    A unit that a cut goes through is read by both its streams, each keeping its own rows.
    """
    rows = len(index)
    if rows < streams * micro_batch_size:
        raise SpcxrError(
            f"{index.name}: {rows} rows are fewer than the {streams * micro_batch_size} of one step "
            f"({streams} micro-batches of {micro_batch_size})"
        )
    order = _permutation(len(index.units), seed, DEALING)
    sizes = index.units["rows"][order]
    ends = np.cumsum(sizes)
    dealt = []
    for stream in range(streams):
        first, last = rows * stream // streams, rows * (stream + 1) // streams
        share = slice(np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left") + 1)
        begins = ends[share] - sizes[share]
        starts, stops = np.maximum(first - begins, 0), np.minimum(last - begins, sizes[share])
        dealt.append(MicroBatchStream(stream, seed, window, order[share], starts, stops))
    return dealt


def _permutation(count: int, seed: int, *numbers: int) -> np.ndarray:
    """A permutation of 0 .. count - 1, (count,) int64, that follows from the numbers."""
    for number in numbers:
        seed = step_seed(seed, number)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


# ---- micro-batches ---------------------------------------------------------------------------------------------


class StreamedBatch(NamedTuple):
    """What one process works on at a time: a stream's part of a step, both counted from 0.

    Attributes:
        images: (micro_batch_size, 1, stored_size, stored_size) uint8; fewer where some were skipped.
        ids: The column `id`, or shard and row number; the key in a tar.
        columns: The columns asked for, a list of one value per image each; None where a row has none.
        skipped: Id -> cause, for the images that could not be read (only with `on_error="skip"`).
    """

    step: int
    stream: int
    images: torch.Tensor
    ids: list[str]
    columns: dict[str, list]
    skipped: dict[str, str]


def decode_image(row: Row, size: int) -> np.ndarray:
    """The whole picture at size x size, (size, size) uint8 grey, by the rule of `spcxr_hf.data.table.decode_images`."""
    if row.problem is not None:
        raise SpcxrError(row.problem)
    cell = {"bytes": None, "path": None, **(row.image or {})}
    try:
        image = open_image(cell, row.name)
    except SpcxrError as error:
        message = str(error)
        raise SpcxrError(message if message.startswith(row.name) else f"{row.name}: {message}") from error
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


class StreamingRadiographs:
    """Micro-batches from shards of any size: what `RadiographSet` is to a set that fits in memory.

    What a step sees depends on the batch's size, its cut into micro-batches, the seed and `window`, not on the number
    of processes or workers; a run resumed at step n gets the same images as an uninterrupted one.

    With `on_error="skip"` a broken image is left out and named in `StreamedBatch.skipped`, and `skipped` here. Where
    more than half are broken, of the first 1,000 images or of all there are, it ends in any case.

    Workers take the micro-batches in turn. Where their number does not divide the process's streams, several workers
    read the same units (each decodes its own images only): choose a divisor where reading is slow or memory scarce.

    Args:
        source: What `read_index` takes, or its result.
        stored_size: Side of the images in pixels.
        where: Only rows in which this column is true; or that hold this value, as (column, value).
        workers: Processes that read and decode; 0 does it in this one.
        columns: Columns to pass along.
        window: Units that are shuffled together, and held in memory per stream.
        on_error: "stop" raises on a broken image, "skip" leaves it out.
        image_root: As for `read_index`.

    Raises:
        SpcxrError: a setting is out of range, or what `read_index` raises.
    """

    def __init__(
        self,
        source: Source | ShardIndex,
        stored_size: int,
        where: str | tuple[str, Any] | None = None,
        workers: int = 0,
        *,
        columns: Sequence[str] = (),
        window: int = 8,
        on_error: OnError = "stop",
        image_root: str | os.PathLike | None = None,
    ):
        _check_least(1, stored_size=stored_size, window=window)
        _check_least(0, workers=workers)
        if on_error not in ("stop", "skip"):
            raise SpcxrError(f'on_error must be "stop" or "skip"; got {on_error!r}')
        if isinstance(source, ShardIndex) and where is not None:
            raise SpcxrError("where: the index is read already; give the filter to read_index")
        condition = (where, True) if isinstance(where, str) else where
        self.index = source if isinstance(source, ShardIndex) else read_index(source, condition, image_root)
        _check_columns(self.index, columns)
        self.stored_size, self.workers, self.window = stored_size, workers, window
        self.columns, self.on_error = tuple(columns), on_error
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """The rows of the set."""
        return len(self.index)

    def streams(self, plan: StepPlan) -> list[MicroBatchStream]:
        """This process's streams."""
        return deal_streams(self.index, plan.micro_batches, plan.micro_batch_size, plan.seed, self.window)[
            plan.process :: plan.processes
        ]

    def micro_batches(
        self, plan: StepPlan, first_step: int = 0, last_step: int | None = None
    ) -> Iterator[StreamedBatch]:
        """This process's micro-batches, step by step and stream by stream, up to `last_step` (excluded) or without end.

        Raises:
            SpcxrError: there are too few rows; an image or a shard cannot be read, or (with "skip") none of a
                micro-batch, or more than half of them; a worker died. The message names it.
        """
        _check_least(0, first_step=first_step)
        steps = range(first_step, sys.maxsize if last_step is None else last_step)
        streams = self.streams(plan)
        seen, lost, enough = 0, 0, min(LEAST_SEEN, sum(map(len, streams)))
        doubtful: Counter[str] | None = Counter() if self.stored_size >= SIDE and first_step == 0 else None
        loader = DataLoader(
            _MicroBatches(self.index, streams, steps, plan.micro_batch_size, self),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_sigterm_to_the_run,
            generator=torch.Generator(),  # or else the loader draws from the global one
        )
        try:
            for made in loader:
                if isinstance(made, SpcxrError):
                    raise made
                self.skipped |= made.skipped
                seen, lost = seen + len(made.ids) + len(made.skipped), lost + len(made.skipped)
                if 2 * lost > seen >= enough:
                    example = next(reversed(self.skipped.values()))
                    raise SpcxrError(
                        f"{self.index.name}: {lost} of {seen} files are broken, more than half; one of them: {example}"
                    )
                if doubtful is not None:
                    doubtful += count_doubtful(made.images.squeeze(1).numpy())
                    if seen >= enough:
                        if text := set_warning(doubtful, seen - lost):
                            note(f"{self.index.name}: {text}")
                        doubtful = None
                yield made
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise SpcxrError(f"{self.index.name}: a worker process died, often for want of memory ({error})") from error

    def steps(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of every step from `first_step` up to `last_step` (excluded).

        Raises:
            SpcxrError: as `micro_batches`; or a column holds something else than numbers.
        """
        stream = self.micro_batches(plan, first_step, last_step)
        while made := list(itertools.islice(stream, len(plan.own_micro_batches))):
            yield [
                MicroBatch(one.images, one.ids, _as_tensors(one), step_seed(plan.seed, one.step, one.stream))
                for one in made
            ]


def _leave_sigterm_to_the_run(worker: int) -> None:
    """Launchers send SIGTERM to every process of a run: a worker that died of it would keep the run from saving.

    From the run's own process it still ends the worker, and so does the end of that process, however it came: torch
    asks for the parent in the system's sense, which is another where workers come from a server, as they do by default
    from Python 3.14. (macOS does not say who sent a signal; there SIGTERM always ends the worker.)
    """
    run = multiprocessing.parent_process()
    if run is None or not hasattr(signal, "sigtimedwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before the thread, which inherits it

    def listen() -> None:
        while run.is_alive():
            info = signal.sigtimedwait({signal.SIGTERM}, LOOK_EVERY)
            if info is not None and info.si_pid == run.pid:
                break
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def _as_tensors(batch: StreamedBatch) -> dict[str, torch.Tensor]:
    tensors = {}
    for column, values in batch.columns.items():
        try:
            tensors[column] = torch.tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SpcxrError(
                f"column {column!r}: not a number in every row ({', '.join(batch.ids[:3])}, ...)"
            ) from error
    return tensors


def _check_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise SpcxrError(f"{name} must be at least {least}; got {value}")


def _check_columns(index: ShardIndex, columns: Sequence[str]) -> None:
    for column in columns:
        if index.columns is not None and column not in index.columns:
            raise SpcxrError(f"{index.name}: no column {column!r}; there are {', '.join(sorted(index.columns))}")


def _as_it_is(made: Any) -> Any:
    return made


class _MicroBatches(IterableDataset):
    """Worker w of W makes the micro-batches number n with n % W == w, the order in which the loader asks for them.

    What goes wrong is handed over as a value, since the loader wraps what a worker raises in the worker's traceback.
    """

    def __init__(
        self,
        index: ShardIndex,
        streams: Sequence[MicroBatchStream],
        steps: range,
        micro_batch_size: int,
        how: StreamingRadiographs,
    ):
        self.index, self.streams, self.steps, self.micro_batch_size = index, streams, steps, micro_batch_size
        self.stored_size, self.columns, self.skip_broken = how.stored_size, how.columns, how.on_error == "skip"

    def __iter__(self) -> Iterator[StreamedBatch | SpcxrError]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        readers: dict[int, _StreamReader] = {}
        turns = ((step, stream) for step in self.steps for stream in self.streams)
        for step, stream in itertools.islice(turns, first, None, every):
            start = step * self.micro_batch_size
            if stream.number not in readers:
                readers[stream.number] = _StreamReader(self.index, stream, self.columns, start)
            try:
                made = self._make(step, stream.number, readers[stream.number].take(start, self.micro_batch_size))
            except SpcxrError as error:
                yield SpcxrError(str(error))  # without the cause, which may not travel between processes
                return
            yield made

    def _make(self, step: int, stream: int, rows: list[Row]) -> StreamedBatch:
        images, good, skipped = [], [], {}
        for row in rows:
            try:
                images.append(decode_image(row, self.stored_size))
                good.append(row)
            except SpcxrError as error:
                if not self.skip_broken:
                    raise
                skipped[row.id] = str(error)
        if not good:
            raise SpcxrError(
                f"step {step}, stream {stream}: none of {len(rows)} images can be read; "
                f"the last: {skipped[rows[-1].id]}"
            )
        columns = {column: [row.columns[column] for row in good] for column in self.columns}
        pixels = torch.from_numpy(np.stack(images)[:, None])
        return StreamedBatch(step, stream, pixels, [row.id for row in good], columns, skipped)


class _StreamReader:
    """Reads a stream in order and holds the remaining encoded rows of one block."""

    def __init__(self, index: ShardIndex, stream: MicroBatchStream, columns: Sequence[str], first: int):
        self._index, self._columns, self._position = index, columns, first
        self._order = stream.start_at(first)
        shares = zip(stream.units.tolist(), stream.starts.tolist(), stream.stops.tolist(), strict=True)
        self._shares = {unit: (start, stop) for unit, start, stop in shares}
        self._block: tuple[int, int] | None = None
        self._held: dict[int, dict[int, Row]] = {}

    def take(self, start: int, count: int) -> list[Row]:
        """The rows of the samples number `start` to `start + count`; those before `start` are passed over."""
        for position in itertools.islice(self._order, start - self._position):  # another worker's
            self._enter(position)
            self._held.get(position.unit, {}).pop(position.row, None)
        self._position = start + count
        return [self._take(position) for position in itertools.islice(self._order, count)]

    def _enter(self, position: Position) -> None:
        """Release the last block's rows."""
        if self._block != (position.epoch, position.block):
            self._block = (position.epoch, position.block)
            self._held.clear()

    def _take(self, position: Position) -> Row:
        self._enter(position)
        unit = position.unit
        if unit not in self._held:
            start, stop = self._shares[unit]
            self._held[unit] = dict(enumerate(self._index.read(unit, start, stop, self._columns), start))
        return self._held[unit].pop(position.row)
