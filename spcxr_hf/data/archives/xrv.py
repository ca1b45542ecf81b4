"""Data set objects of torchxrayvision as tables. Archives on disk are read by `spcxr_hf.data.archives.registry`."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from spcxr_hf.data.labels import LABELS_COLUMN, label_struct
from spcxr_hf.data.manifests import IMAGE, OLDEST, in_schema, view_of
from spcxr_hf.data.table import RadiographTable
from spcxr_hf.errors import SpcxrError, one_line


def is_torchxrayvision(source: Any) -> bool:
    """Whether it has what every data set of torchxrayvision has."""
    return all(hasattr(source, name) for name in ("pathologies", "labels", "csv", "__getitem__", "__len__"))


def read_torchxrayvision(dataset: Any) -> RadiographTable:
    """Read a data set object of torchxrayvision (the extra `xrv`): any of its archives, merged, filtered or a subset.

    Its objects say what a picture is and not where its file lies, so every picture is kept as a PNG in memory: grey, 8
    bits, or 16 where 8 would lose something. For sets that do not fit, give the archive's folder to `read_set`.

    Args:
        dataset: `labels` (n, p) of 1, 0 and NaN, `pathologies` p names, `csv` n rows of which `patientid`, `view`,
            `sex_male` and `age_years` are read, and `dataset[row]["img"]` (1, H, W) in -1024..1024.

    Raises:
        SpcxrError: it is empty, a picture cannot be read, or its values lie outside -1024..1024.
    """
    name, count = type(dataset).__name__, len(dataset)
    if not count:
        raise SpcxrError(f"{name}: no rows")
    table = dataset.csv.reset_index(drop=True)
    cells = [{"bytes": _png(dataset, row, f"{name}: row {row}"), "path": None} for row in range(count)]
    labels = np.asarray(dataset.labels, dtype=np.float64)
    columns = {
        "id": [f"{name}/{row}" for row in range(count)],
        "patient": [value and f"{name}/{value}" for value in _words(table, "patientid", count)],
        "view": [view_of(value) for value in _words(table, "view", count)],
        "sex": [{1: "M", 0: "F"}.get(value) for value in _column(table, "sex_male", count)],
        "age": [age if 0 <= age <= OLDEST else None for age in _column(table, "age_years", count)],
        "source": name,
        LABELS_COLUMN: label_struct({word: labels[:, at] for at, word in enumerate(dataset.pathologies)}),
    }
    return RadiographTable(in_schema(pa.array(cells, IMAGE), columns), name)


def _column(table: Any, name: str, count: int) -> list[Any]:
    """A column of its metadata, NaN where a value or the column is missing."""
    return table[name].tolist() if name in table.columns else [float("nan")] * count


def _words(table: Any, name: str, count: int) -> list[str | None]:
    """A column as text; whole numbers that pandas made floats, for want of another null, are whole again."""
    values = [None if value is None or value != value else value for value in _column(table, name, count)]
    whole = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    return [None if value is None else str(value) for value in whole]


def _png(dataset: Any, row: int, name: str) -> bytes:
    try:
        pixels = np.asarray(dataset[row]["img"], dtype=np.float64)
    except Exception as error:  # many types, by archive and decoder
        raise SpcxrError(
            f"{name}: torchxrayvision cannot read it ({type(error).__name__}: {one_line(error)})"
        ) from error
    unit = (pixels.reshape(pixels.shape[-2:]) / 1024 + 1) / 2
    if not (unit.min() > -1e-3 and unit.max() < 1 + 1e-3):
        raise SpcxrError(f"{name}: values from {pixels.min():.6g} to {pixels.max():.6g}, not within -1024..1024")
    eight = unit.clip(0, 1) * 255
    is_eight = np.abs(eight - np.rint(eight)).max() < 1e-3
    values = np.rint(eight).astype(np.uint8) if is_eight else np.rint(unit.clip(0, 1) * 65535).astype(np.uint16)
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
