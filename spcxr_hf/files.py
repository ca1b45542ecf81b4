"""Results files: JSON that is written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

from spcxr_hf.errors import SpcxrError


def write_results(path: str | os.PathLike, result: dict) -> None:
    """Write results as JSON, whole or not at all: under another name first, which is then renamed.

    NumPy arrays and tensors become lists; numbers that are not finite, which JSON does not know, become null.

    Args:
        path: The file; its folders are made, and a file of that name is replaced.
        result: What to write.

    Raises:
        SpcxrError: a value has no form in JSON, or the file cannot be written; one that was there stays as it is.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        text = json.dumps(_plain(result), indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpcxrError(f"{target}: the results cannot be written as JSON ({error})") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise SpcxrError(f"{target}: the results could not be written ({error})") from error


def read_results(path: Path) -> dict[str, Any]:
    """A results file; empty where there is none.

    Raises:
        SpcxrError: it is no JSON object; the message names it.
    """
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpcxrError(f"{path}: not a results file ({error})") from error
    if not isinstance(results, dict):
        raise SpcxrError(f"{path}: not a results file (found {type(results).__name__})")
    return results


def _plain(value: Any) -> Any:
    """The same in the types that JSON knows."""
    if isinstance(value, dict):
        return {key.item() if isinstance(key, np.generic) else key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def software() -> str:
    """The versions that a result depends on."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def write_aside(file: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside the file's place and put it there when it is whole: another process sees all of it or nothing.

    Raises:
        SpcxrError: it cannot be written, as on a full disk; nothing is left of it.
    """
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            write(stream)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SpcxrError(f"{file}: cannot be written ({error.strerror or error})") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `target` once everything in it is written.

    Raises:
        SpcxrError: the disk is full or not writable; what was at `target`, and beside it, stays as it was.
    """
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


NOTE = "research use only, not for clinical use"


@contextmanager
def _told(output: Path | None) -> Iterator[None]:
    """Errors of the system as ours. A closed pipe is none: the reader, `head` for instance, has enough."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SpcxrError(f"{output or 'standard output'}: {error.strerror or type(error).__name__}") from error


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path beside `target`, which takes its place once everything is written; on an error nothing is left of it."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


# ---- pictures ----------------------------------------------------------------------------------------------------


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all, the note on its use among its texts.

    Raises:
        SpcxrError: it cannot be written.
    """
    note = PngInfo()
    note.add_text("Comment", NOTE)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as partial:
            picture.save(partial, format="PNG", pnginfo=note)
