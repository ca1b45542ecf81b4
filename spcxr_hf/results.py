"""Results files: JSON that is written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import SpcxrError


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
