"""From files to answers: sources found, a model loaded, images read ahead by threads, batches through the model.

find_sources              files, folders, patterns -> what there is to do, in order
load_model                an id or a folder -> model and image processor on a device
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
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
)
from transformers.utils import logging

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
from spcxr_hf.models.auto import register

AUTO_CLASSES: dict[str, Any] = {
    "embedding": AutoModel,
    "reconstruction": AutoModelForPreTraining,
    "classification": AutoModelForImageClassification,
    "segmentation": AutoModelForSemanticSegmentation,
}
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


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, its image processor, and what records call it: id@revision, folder."""

    name: str
    model: PreTrainedModel
    processor: Any
    device: torch.device


def load_model(task: str, model: str | os.PathLike, device: str = "auto") -> Loaded:
    """Load a checkpoint for "embedding", "reconstruction", "classification" or "segmentation".

    An id that the local Hub cache has is loaded from there. Of the ids `spcxr/...` the bundled checkpoint is installed
    first where it is missing, if the source tree is there. Any other id is downloaded.

    Args:
        task: What it is for.
        model: A Hub id or a folder.
        device: "auto" (a GPU where there is one), or as `torch.device` has it: "cpu", "cuda:1", "mps".

    Raises:
        SpcxrError: it is not there, is damaged, is no SPCXR model, or was not trained for this task; or there is no
            such device.
    """
    register()
    place, chosen = _find_checkpoint(os.fspath(model)), choose_device(device)
    where = {"local_files_only": True} if place.is_local else {}
    try:
        with _no_progress_bar():
            config = AutoConfig.from_pretrained(place.name, **where)
            if config.model_type != "spcxr":
                raise SpcxrError(f"{model}: a model of the type {config.model_type}, not an SPCXR checkpoint")
            loaded, loading = AUTO_CLASSES[task].from_pretrained(place.name, output_loading_info=True, **where)
            processor = AutoImageProcessor.from_pretrained(place.name, **where)
    except SpcxrError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise SpcxrError(f"{model}: {_cause(error, place)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise SpcxrError(f"{model}: no checkpoint for {task}; it lacks {len(missing)} weights, {missing[0]} among them")
    return Loaded(_name_with_revision(place.name), loaded.eval().to(chosen), processor, chosen)


class _Place(NamedTuple):
    name: str
    is_local: bool


def _find_checkpoint(model: str) -> _Place:
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise SpcxrError(f"{model}: no checkpoint, config.json is missing in this folder")
        return _Place(model, True)
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise SpcxrError(f"{model}: neither a folder nor a Hub id") from error
    if not _is_cached(model) and model.startswith(NAMESPACE) and (BUNDLED / model.removeprefix(NAMESPACE)).is_dir():
        install_checkpoints()
    return _Place(model, _is_cached(model))


def _is_cached(repo_id: str) -> bool:
    return all(_cached_file(repo_id, file) for file in ("config.json", "model.safetensors"))


def _cached_file(repo_id: str, file: str) -> Path | None:
    found = try_to_load_from_cache(repo_id, file, cache_dir=constants.HF_HUB_CACHE)
    return Path(found) if isinstance(found, str) else None


def _name_with_revision(name: str) -> str:
    """A folder as it is; an id with the start of the revision that the cache holds it at."""
    file = None if Path(name).is_dir() else _cached_file(name, "config.json")
    return f"{name}@{file.parent.name[:12]}" if file else name


def _cause(error: Exception, place: _Place) -> str:
    """One line. transformers begins its own with what was asked for, and tells of the network at length."""
    if place.is_local:
        return f"cannot be loaded: {str(error).strip().partition(chr(10))[0]}"
    bundled = [NAMESPACE + folder.name for folder in BUNDLED.glob("*") if (folder / "config.json").is_file()]
    near = difflib.get_close_matches(place.name, bundled, n=1, cutoff=0.85)
    return (
        "is not in the local Hub cache, and the Hub could not be asked for it or does not have it. `spcxr install` "
        f"puts the bundled checkpoints there; --model takes a folder, too{f'. Did you mean {near[0]}?' if near else ''}"
    )


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        SpcxrError: there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SpcxrError(f"no device {name!r} on this machine: {str(error).strip().partition(chr(10))[0]}") from error
    return device


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A bar over a hundred weights that are there in an instant says nothing."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


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

    def pixel_values(self, device: torch.device) -> torch.Tensor:
        """(B, C, H, W) on the device."""
        return torch.stack([image.pixel_values for image in self.images]).to(device)


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
