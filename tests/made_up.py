"""Made-up radiographs for the tests: two dark ellipses on a bright body, brighter where there is pneumonia."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = ("normal", "bacterial", "viral")
# In place of the preset "tiny", where a test trains: a step takes a tenth of the time.
SMALL_PRESET = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def picture(seed: int, size: int = 48, opacity: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A grey image and its lung mask, (size, size) uint8 each; the mask is 255 on the lungs."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    left, right = generator.uniform(0.18, 0.26, 2)
    lungs = (((x + left) / 0.15) ** 2 + (y / 0.33) ** 2 < 1) | (((x - right) / 0.15) ** 2 + (y / 0.33) ** 2 < 1)
    grey = np.where(lungs, 60 + opacity, 170) + generator.normal(0, 8, (size, size))
    return grey.clip(0, 255).astype(np.uint8), (255 * lungs).astype(np.uint8)


def encoded(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_set(path: Path, splits: Sequence[str], unreadable: Sequence[str] = ()) -> Path:
    """Write a Parquet shard with one row per entry of `splits`; rows whose split is `unreadable` hold no image."""
    rows: dict[str, list] = {
        name: [] for name in ("image", "lung_mask", "id", "patient", "lung_split", "pneumonia_label")
    }
    for row, split in enumerate(splits):
        label = row % len(CLASSES)
        grey, mask = picture(row, size=48 if row % 2 else 40, opacity=30 * label)
        damaged = {"bytes": b"no picture", "path": None}
        rows["image"].append(damaged if split in unreadable else encoded(grey))
        rows["lung_mask"].append(damaged if split in unreadable else encoded(mask))
        rows["id"].append(f"row-{row}")
        rows["patient"].append(f"patient-{row // 2}" if row % 3 else None)
        rows["lung_split"].append(split)
        rows["pneumonia_label"].append(CLASSES[label])
    columns: dict = {**rows, "pneumonia_split": rows["lung_split"], "pretrain": [split == "train" for split in splits]}
    columns |= {name: pa.array(rows[name], STRUCT) for name in ("image", "lung_mask")}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def break_rows(path: Path, rows: set[int]) -> str:
    """Cut the images of these rows of a set short; its path."""
    table = pq.read_table(path)
    place = table.column_names.index("image")
    cells = table["image"].to_pylist()
    for row in rows:
        cells[row] = {"bytes": cells[row]["bytes"][:200], "path": None}
    pq.write_table(table.set_column(place, "image", pa.array(cells, STRUCT)), path)
    return str(path)
