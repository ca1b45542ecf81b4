"""From files to answers: sources found, a model loaded, images read ahead by threads, batches through the model.

find_sources              files, folders, patterns -> what there is to do, in order
load_model                an id or a folder -> model and image processor on a device (`models.loading`)
read_batches -> prepare   files -> batches, a bounded number of images ahead of the model
answers                   batches -> records, by one of the functions of `tasks`

A file that cannot be read is a `Failed`, and the others go on.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from PIL import Image

from spcxr_hf.data.table import (
    PICTURE_SUFFIXES,
    RadiographTable,
    is_hidden,
    join_tables,
    pictures_below,
    read_table,
)
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import worker_count
from spcxr_hf.hub.install import BUNDLED, install_checkpoints
from spcxr_hf.images.reader import read_with_quality_warnings
from spcxr_hf.models.loading import Loaded, is_local, load_checkpoint

NAMESPACE = "spcxr/"
AHEAD = 2  # batches that are read while the model works on one


# ---- files -------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A file, and the name of what is made of it: its path inside the folder or the pattern that it was found by."""

    path: Path
    name: str


def find_sources(words: Sequence[str | os.PathLike]) -> list[Source]:
    """The images behind files, folders (with their subfolders) and patterns such as `scans/**/*.dcm`, each one once.

    In a folder, a file counts as `pictures_below` says. A file that is named itself counts whatever its
    name.

    Raises:
        SpcxrError: a word names nothing, or there are no images behind it.
    """
    found: dict[Path, Source] = {}
    for word in words:
        for source in _behind(os.fspath(word)):
            found.setdefault(source.path, source)
    return list(found.values())


def _behind(word: str) -> list[Source]:
    path = Path(word)
    if path.is_dir():
        files = pictures_below(path)
        if not files:
            raise SpcxrError(f"{path}: no images in this folder ({', '.join(sorted(PICTURE_SUFFIXES))})")
        return [Source(file, file.relative_to(path).as_posix()) for file in files]
    if not path.exists() and glob.has_magic(word):
        first = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
        fixed, pattern = Path(*path.parts[:first]), "/".join(path.parts[first:])
        files = [file for file in sorted(fixed.glob(pattern)) if file.is_file() and not is_hidden(file, fixed)]
        if not files:
            raise SpcxrError(f"{word}: no file has such a name")
        return [Source(file, file.relative_to(fixed).as_posix()) for file in files]
    return [Source(path, path.name)]  # a missing one is told when its turn comes, and the others go on


def table_of(words: Sequence[str | os.PathLike]) -> RadiographTable:
    """A set out of Parquet files, one folder, or whatever `find_sources` takes; ids are paths then.

    Raises:
        SpcxrError: there are no images.
    """
    if len(words) == 1 and Path(words[0]).is_dir():
        return read_table(words[0])
    sources = find_sources(words)
    shards = [source.path for source in sources if source.path.suffix == ".parquet"]
    if shards and len(shards) == len(sources):
        return join_tables([read_table(shard) for shard in shards])
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": None, "path": str(source.path)} for source in sources]
    rows = {"image": pa.array(cells, struct), "id": [str(source.path) for source in sources]}
    return RadiographTable(pa.table(rows), f"{len(sources)} files")


# ---- the model ---------------------------------------------------------------------------------------------------


def load_model(task: str, model: str | os.PathLike, device: str = "auto") -> Loaded:
    """`models.loading.load_checkpoint` for the commands: of the ids `spcxr/...`, the bundled checkpoint is installed
    into the local Hub cache first where it is missing, if the source tree is there.

    Raises:
        SpcxrError: as `load_checkpoint`.
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
    """`pixel_values` (C, H, W) of an image, `size` (height, width) that it had, and what speaks against its being an
    upright frontal chest radiograph."""

    source: Source
    pixel_values: torch.Tensor
    size: tuple[int, int]
    warnings: list[str]


class Failed(NamedTuple):
    """A file that could not be used, and why: one line that names it."""

    source: Source
    cause: str


def prepare(source: Source, processor: Any) -> Prepared | Failed:
    """Read one file and make `pixel_values` of it; never raises for what is wrong with the file."""
    if not _is_text(str(source.path)):  # no format of the records could hold it
        return Failed(source, f"{source.path}: the name is not valid UTF-8; rename the file")
    try:
        image, found = read_with_quality_warnings(source.path, full_depth=True)
        pixel_values = processor(image, return_tensors="pt").pixel_values[0]
    except SpcxrError as error:
        return Failed(source, str(error))
    except Exception as error:  # whatever a damaged file does to a library, the others go on
        return Failed(source, f"{source.path}: cannot be used ({type(error).__name__})")
    return Prepared(source, pixel_values, (image.height, image.width), found)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class Batch(NamedTuple):
    """Images for one forward pass, and the files since the batch before that could not be used."""

    images: list[Prepared]
    failed: list[Failed]

    def pixel_values(self) -> torch.Tensor:
        """(B, C, H, W)."""
        return torch.stack([image.pixel_values for image in self.images])


def read_batches(
    sources: Sequence[Source], processor: Any, batch_size: int, workers: int | None = None
) -> Iterator[Batch]:
    """Batches in the order of the files, full ones but for the last, read by threads a bounded number of images ahead.

    Threads, not processes: Pillow, pydicom's decoders and torch work outside the interpreter's lock.
    """
    images: list[Prepared] = []
    failed: list[Failed] = []
    for one in _ahead(lambda source: prepare(source, processor), sources, AHEAD * batch_size, worker_count(workers)):
        if isinstance(one, Failed):
            failed.append(one)
        else:
            images.append(one)
        if len(images) == batch_size:
            yield Batch(images, failed)
            images, failed = [], []
    if images or failed:
        yield Batch(images, failed)


def _ahead(function: Callable[[Source], Any], sources: Sequence[Source], ahead: int, workers: int) -> Iterator[Any]:
    """`map`, in order, with at most `ahead` results made or being made that nobody has taken yet."""
    _import_decoders()
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


def _import_decoders() -> None:
    """Before there are threads: a library that one thread is importing looks half made to the others."""
    Image.init()
    with suppress(ImportError):
        import pydicom  # noqa: F401


# ---- answers -----------------------------------------------------------------------------------------------------

Answer = Callable[[Loaded, Batch], Sequence[Mapping[str, Any] | Failed]]


class Step(NamedTuple):
    """What a batch came to: a record for each of its images that could be used, and the files that could not."""

    records: list[Mapping[str, Any]]
    failed: list[Failed]


def answers(
    loaded: Loaded, sources: Sequence[Source], answer: Answer, batch_size: int = 16, workers: int | None = None
) -> Iterator[Step]:
    """Records of all sources, a batch at a time and in order; memory does not grow with their number.

    Args:
        loaded: What `load_model` returns.
        sources: What `find_sources` returns.
        answer: One of the functions of `tasks`: takes the model and a batch, returns a record or `Failed` per image.
        batch_size: Images per forward pass.
        workers: Threads that read.

    Raises:
        SpcxrError: the model cannot work on the images, or the device has too little memory for a batch.
    """
    for batch in read_batches(sources, loaded.processor, batch_size, workers):
        try:
            found = list(answer(loaded, batch)) if batch.images else []
        except torch.OutOfMemoryError as error:
            raise SpcxrError(
                f"{loaded.device} has too little memory for a batch of {batch_size} images; give a smaller --batch-size"
            ) from error
        records = [one for one in found if not isinstance(one, Failed)]
        yield Step(records, [*batch.failed, *(one for one in found if isinstance(one, Failed))])
