"""Masks of a set, as files or run-length codes, and the raw files of JSRT.

with_masks   -> read_mask -> rle_mask, or a file    the column `masks` of an archive as images, for segmentation
convert_jsrt -> read_jsrt_image                     raw .IMG as PNG
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from spcxr_hf.data.manifests import IMAGE, age_of, sex_of
from spcxr_hf.data.table import RadiographTable, mask_pixels
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_file, check_regular_file
from spcxr_hf.images.limits import MAX_FILE_BYTES

LUNGS = ("lungs", "left lung", "right lung")  # names of masks that make up the lungs
SIIM_SIZE = 1024  # pixels; every image of the challenge
JSRT_SIZE, JSRT_WHITE = 2048, 4095  # pixels; 12 bits
JSRT_PIXEL = 0.175  # mm


def index_files(*folders: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """File name -> path, of the files below these folders with such a suffix."""
    found: dict[str, str] = {}
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                if name.lower().endswith(tuple(suffixes)) and not name.startswith("."):
                    found.setdefault(name, f"{place}{os.sep}{name}")
    return found


# ---- masks -------------------------------------------------------------------------------------------------------


def rle_mask(rle: str, size: int = SIIM_SIZE) -> np.ndarray:
    """The mask of SIIM-ACR's run-length code: (size, size) booleans.

    The code is pairs of numbers: pixels to pass over since the end of the last run, and pixels of the run; it goes down
    the columns, from the left. An empty code is an empty mask.
    """
    words = rle.split()
    if len(words) % 2 or not all(word.isdecimal() for word in words):
        raise SpcxrError("a run-length code must be pairs of numbers of pixels")
    ends = np.cumsum(np.array(words, dtype=np.int64)).reshape(-1, 2)  # where each run begins and ends
    if ends.size and ends[-1, 1] > size * size:
        raise SpcxrError(f"a run-length code leaves the image of {size} x {size} pixels")
    edges = np.zeros(size * size + 1, dtype=np.int64)
    np.add.at(edges, ends[:, 0], 1)
    np.add.at(edges, ends[:, 1], -1)
    return edges.cumsum()[:-1].astype(bool).reshape(size, size).T


def read_mask(masks: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Image.Image | None:
    """The union of the masks in one cell of the column `masks`, mode L: 255 inside, 0 outside.

    Only those of these names; None: all. None is returned where the cell has none of them.
    """
    union: np.ndarray | None = None
    for cell in masks:
        if names is not None and cell["name"] not in names:
            continue
        mask = rle_mask(cell["rle"]) if cell["path"] is None else _read_mask_file(cell["path"])
        if union is not None and union.shape != mask.shape:
            raise SpcxrError(f"{cell['path']}: its size differs from that of the image's other masks")
        union = mask if union is None else union | mask
    return None if union is None else Image.fromarray((255 * union).astype(np.uint8))


def _read_mask_file(path: str) -> np.ndarray:
    """(height, width) booleans, as `mask_pixels` takes them."""
    try:
        check_regular_file(path, MAX_FILE_BYTES)
        with Image.open(path) as picture:
            return mask_pixels(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SpcxrError(f"{path}: the mask cannot be read ({error})") from error


def with_masks(
    table: RadiographTable, names: Sequence[str] | None = LUNGS, column: str = "lung_mask"
) -> RadiographTable:
    """Read the masks of a set into a column of PNG files, which `spcxr_hf.data.table.decode_masks` takes.

    Args:
        table: A set with the column `masks`; small: the masks are held in memory, encoded.
        names: Which masks make up the union of an image; None: all.
        column: What to call the new column.

    Returns:
        Only the rows that have such a mask.
    """
    cells: list[dict | None] = []
    for masks in table.column("masks"):
        mask = read_mask(masks or [], names)
        buffer = BytesIO()
        if mask is not None:
            mask.save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None} if mask is not None else None)
    kept = pa.array([cell is not None for cell in cells])
    if not any(cells):
        raise SpcxrError(f"{table.name}: no image has a mask called {' or '.join(names) if names else 'anything'}")
    rows = table.rows.append_column(column, pa.array(cells, IMAGE)).filter(kept)
    return RadiographTable(rows, table.name)


def read_jsrt_image(path: str | os.PathLike) -> Image.Image:
    """A raw .IMG of JSRT: 2048 x 2048 values of 12 bits, big endian, no header, 0 for white film.

    Returns:
        Mode `I;16`, 0 .. 65535, lungs dark and bones bright.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SpcxrError(f"{path}: {error.strerror or type(error).__name__}") from error
    if len(data) != 2 * JSRT_SIZE**2:
        raise SpcxrError(f"{path}: a raw JSRT image has {2 * JSRT_SIZE**2} bytes; this has {len(data)}")
    stored = np.frombuffer(data, dtype=">u2").reshape(JSRT_SIZE, JSRT_SIZE).astype(np.uint32)
    if stored.max() > JSRT_WHITE:
        raise SpcxrError(f"{path}: a raw JSRT image has values to {JSRT_WHITE}; this has {stored.max()}")
    return Image.fromarray(((JSRT_WHITE - stored) * 65535 // JSRT_WHITE).astype(np.uint16))


def convert_jsrt(folder: str | os.PathLike, output: str | os.PathLike) -> list[Path]:
    """Write every raw .IMG of JSRT below a folder as a 16-bit PNG into another; those that are there stay."""
    raw = index_files(Path(folder), suffixes=[".img"])
    if not raw:
        raise SpcxrError(f"{folder}: no .IMG files")
    written = []
    for name in sorted(raw):
        target = Path(output) / f"{Path(name).stem}.png"
        if not target.is_file():
            with atomic_file(target) as partial:
                read_jsrt_image(raw[name]).save(partial, "PNG")
        written.append(target)
    return written


# ---- what comes with JSRT ----------------------------------------------------------------------------------------


def jsrt_clinical(root: Path) -> dict[str, dict]:
    """Image -> sex, age and boxes, from `CLNDAT_EN.txt` and `CNNDAT_EN.TXT` below a folder of JSRT."""
    found: dict[str, dict] = {}
    for name, path in index_files(root, suffixes=["_en.txt"]).items():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            if name.upper() == "CLNDAT_EN.TXT" and len(cells := line.split("\t")) > 6:
                own = {
                    "age": age_of(cells[3]),
                    "sex": sex_of(cells[4]),
                    "boxes": _jsrt_box(cells[2], cells[5], cells[6]),
                }
            elif name.upper() == "CNNDAT_EN.TXT" and len(cells := line.split()) > 2:
                own = {"age": age_of(cells[1]), "sex": sex_of(cells[2])}
            else:
                continue
            found[Path(cells[0].strip()).stem.upper()] = own
    return found


def _jsrt_box(size: str, x: str, y: str) -> list[dict] | None:
    """Diameter in mm and centre in pixels -> the square around the nodule."""
    try:
        width = float(size) / JSRT_PIXEL
        left, top = float(x) - width / 2, float(y) - width / 2
    except ValueError:
        return None
    return [{"name": "Nodule", "x": left, "y": top, "width": width, "height": width}]


def jsrt_masks(root: Path) -> dict[str, list[dict]]:
    """Image -> its masks of SCR below a folder: the folder of a mask (`fold1/masks/left lung`) names it."""
    found: dict[str, list[dict]] = {}
    for place, _, names in sorted(os.walk(root)):
        kind = Path(place).name.replace("_", " ")
        if kind in ("left lung", "right lung", "heart", "left clavicle", "right clavicle"):
            for name in names:
                if name.lower().endswith((".gif", ".png")):
                    mask = {"name": kind, "path": f"{place}{os.sep}{name}", "rle": None}
                    found.setdefault(Path(name).stem.upper(), []).append(mask)
    return found
