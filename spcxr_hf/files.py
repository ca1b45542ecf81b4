"""Files: atomic writes, JSON, PNG, hashes, and metadata of results (research notice, software versions)."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from spcxr_hf.errors import SpcxrError, printable

if TYPE_CHECKING:
    from PIL import Image

RESEARCH_NOTICE = "research use only, not for clinical use"
MAX_WORKERS = 8  # threads of a pool by default: more of them only wait for the memory of what they decode


def check_regular_file(path: str | os.PathLike, max_bytes: int) -> int:
    """The size in bytes of a file that can be read: reading a FIFO or a device may block or never end.

    Links are followed. Read no more than this size: files of `/proc` report 0.

    Raises:
        SpcxrError: there is no such file; it is a folder, a FIFO, a device or a socket; or it has more than `max_bytes`
            bytes, holes of a sparse file included. The message begins with the path.
    """
    name = printable(os.fsdecode(path))
    try:
        found = Path(os.fsdecode(path)).stat()
    except OSError as error:
        raise SpcxrError(f"{name}: {error.strerror or type(error).__name__}") from error
    except ValueError as error:  # a null character in the path
        raise SpcxrError(f"{name}: cannot be read: {error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise SpcxrError(f"{name}: {os.strerror(errno.EISDIR)}")
    if not stat.S_ISREG(found.st_mode):
        raise SpcxrError(f"{name}: not a regular file")
    if found.st_size > max_bytes:
        raise SpcxrError(f"{name}: the file is too large: {found.st_size:,} bytes; at most {max_bytes:,}")
    return found.st_size


@contextmanager
def os_errors(path: Path | str | None) -> Iterator[None]:
    """Raise the system's errors as `SpcxrError` with the name of the file (None: standard output).

    A closed pipe is left as it is: the reader, `head` for instance, has enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SpcxrError(f"{path or 'standard output'}: cannot be written ({error.strerror or error})") from error


@contextmanager
def atomic_file(target: str | os.PathLike) -> Iterator[Path]:
    """A path beside `target` to write to, renamed to it at the end: other processes see the whole file or the old one.

    The folders of `target` are made. After an error nothing is left of the partial file.

    Raises:
        SpcxrError: it cannot be written, as on a full disk.
    """
    target = Path(target)
    name = target.name if len(os.fsencode(target.name)) <= 200 else hashlib.sha256(os.fsencode(target.name)).hexdigest()
    partial = target.with_name(f".{name}.{os.getpid()}.partial")  # names have at most 255 bytes
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to write to, which replaces `target` once everything in it is written.

    Raises:
        SpcxrError: the disk is full or not writable; what was at `target`, and beside it, stays as it was.
    """
    from safetensors import SafetensorError

    partial, previous = (target.parent / f".{target.name}.{part}" for part in ("partial", "previous"))
    try:
        if previous.exists() and not target.exists():  # killed between the two renames below
            previous.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _exchange(target, partial, previous)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        what = "the checkpoint" if target.name.startswith("checkpoint-") else "the model"
        raise SpcxrError(f"{target}: {what} could not be written ({error}); earlier ones are untouched") from error


def _exchange(target: Path, new: Path, previous: Path) -> None:
    """Put the folder `new` at `target`; what stood there is deleted when that is done, and put back if it fails."""
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    try:
        new.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def locked(folder: Path, name: str = "") -> Iterator[None]:
    """Lock an output folder, which is made, or one file in it: two runs would overwrite each other's results.

    The system releases the lock when the process ends, however it ends.

    Args:
        folder: The folder.
        name: The file, where it is not the whole folder that is locked.

    Raises:
        SpcxrError: another process holds the lock (the message says which), or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    target, prefix = folder / name, f".{name}" if name else ""
    holder = folder / f"{prefix}.lock-holder"
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{prefix}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            with suppress(OSError):
                raise SpcxrError(f"{target}: in use by {holder.read_text(encoding='utf-8')}") from None
            raise SpcxrError(f"{target}: in use by another process") from None
    try:
        with os_errors(folder):
            holder.write_text(f"process {os.getpid()} on {platform.node()}, since {time.ctime()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
            if name:  # beside other files of the user's
                (folder / f"{prefix}.lock").unlink(missing_ok=True)
        lock.release()


def write_json(path: str | os.PathLike, content: dict) -> None:
    """Write JSON, atomically.

    NumPy arrays and tensors become lists; non-finite numbers become null.

    Raises:
        SpcxrError: a value has no form in JSON, or the file cannot be written; one that was there stays as it is.
    """
    try:
        text = json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpcxrError(f"{path}: the results cannot be written as JSON ({error})") from error
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpcxrError(f"{path}: not a results file ({error})") from error
    if not isinstance(content, dict):
        raise SpcxrError(f"{path}: not a results file (found {type(content).__name__})")
    return content


def _plain(value: Any) -> Any:
    """The same in the types of JSON."""
    if isinstance(value, dict):
        return {key.item() if isinstance(key, np.generic) else key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a NumPy array or number, a tensor
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, atomically, with the research notice among its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("Comment", RESEARCH_NOTICE)
    with atomic_file(path) as partial:
        picture.save(partial, format="PNG", pnginfo=note)


def as_text(name: str | os.PathLike) -> str:
    r"""A file's name in Unicode: bytes that are no UTF-8 become `\xe9`, since tables and JSON cannot hold them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def note(text: str) -> None:
    """One line on standard error, of the first process of a run that has several."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def recipe_folder() -> Path:
    """The folder `training_scripts/recipes` of the tree or, where a wheel is installed, of the package."""
    return Path(str(files("spcxr_hf.training_scripts"))) / "recipes"


def installed_recipe(name: str | os.PathLike, folder: str = "") -> Path:
    """The path of a recipe or list of ids.

    Args:
        name: A path. A bare name, or `training_scripts/recipes/...` as recipes have it, that is not there is
            looked for among the package's own recipes.
        folder: A folder below these.
    """
    path, place = Path(name), Path("training_scripts/recipes") / folder
    if not path.exists() and path.parent in (Path(), place):
        return recipe_folder() / folder / path.name
    return path


def software_versions() -> str:
    """The versions that a result depends on."""
    return f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"


def in_threads(function: Callable[[Any], Any], items: Sequence, what: str, workers: int | None = None) -> None:
    """Call a function for each item, with a progress bar; Pillow decodes outside the interpreter's lock."""
    with ThreadPoolExecutor(worker_count(workers)) as pool:
        for _ in tqdm(pool.map(function, items), total=len(items), desc=what, unit="image", disable=not items):
            pass


def render_page(package: str, template: str, **values: Any) -> str:
    """A page of `templates/` of a package, with everything in it escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(package)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    return environment.get_template(template).render(values)


def worker_count(workers: int | None = None) -> int:
    """The size of a pool of threads: what was asked for, else the cores this process may use, at most `MAX_WORKERS`."""
    if workers is not None and workers < 1:
        raise SpcxrError(f"workers must be at least 1; got {workers}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers or min(usable, MAX_WORKERS)
