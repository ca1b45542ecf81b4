"""Rows of a public archive's tables, one per image, and helpers that the readers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spcxr_hf.data.labels import canonical_name
from spcxr_hf.data.manifests import row_number, texts
from spcxr_hf.errors import SpcxrError


@dataclass
class Rows:
    """Rows of an archive's tables, one per image.

    Attributes:
        file: The table, or the folder, that names the images; for messages.
        paths: (n,) image files; "" where none is found by that name.
        columns: Columns of the schema, (n,) each; `id` is required; without the archive's name.
        labels: (n,) each: 1, 0, -1 uncertain, NaN missing.
    """

    file: Path
    paths: list[str]
    columns: dict[str, Any]
    labels: dict[str, np.ndarray] = field(default_factory=dict)


def stacked(parts: Sequence[Rows]) -> Rows:
    """Rows of several tables, one after another; what one does not have is missing there."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns = {
        name: [value for part in parts for value in part.columns.get(name, [None] * len(part.paths))] for name in names
    }
    keys = dict.fromkeys(name for part in parts for name in part.labels)
    labels = {
        key: np.concatenate([part.labels.get(key, np.full(len(part.paths), np.nan, np.float32)) for part in parts])
        for key in keys
    }
    return Rows(parts[0].file, [path for part in parts for path in part.paths], columns, labels)


def filled(table: pa.Table, column: str, path: Path) -> list[str]:
    """A column as text that has no empty cell."""
    values = texts(table, column)
    if None in values:
        raise SpcxrError(f"{path}: row {row_number(path, values.index(None))}: no {column}")
    return [str(value) for value in values]


def present(members: Sequence[Iterable[str] | None], name: str) -> np.ndarray:
    """(n,) whether a row's members have this name; NaN where they are None."""
    return np.array([np.nan if row is None else name in row for row in members], np.float32)


def grouped_boxes(
    names: Sequence[str], labels: Sequence[str | None], corners: np.ndarray, sizes: np.ndarray
) -> dict[str, list[dict]]:
    """Image -> its boxes; rows without a corner are passed over. `corners` and `sizes` are (n, 2)."""
    found: dict[str, list[dict]] = {}
    for row in np.flatnonzero(~np.isnan(np.concatenate([corners, sizes], axis=1)).any(axis=1)).tolist():
        (x, y), (width, height) = corners[row], sizes[row]
        name = canonical_name(labels[row] or "")
        found.setdefault(names[row], []).append({"name": name, "x": x, "y": y, "width": width, "height": height})
    return found


def either(rows: pa.Table, *names: str) -> str:
    """The first of these columns that is there."""
    return next((name for name in names if name in rows.column_names), names[0])
