"""Sets of radiographs: from Parquet shards or a folder of pictures to decoded images in memory, and their order.

A set is small beside a machine's memory once its images are grey and 256 pixels wide (65 kB each), so it is decoded
once and kept as one uint8 tensor; augmentation and corruption then work on whole batches, on the device.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.files import atomic_file, worker_count
from spcxr_hf.images.reader import DICOM_PREFIX, read_radiograph, read_with_quality_warnings

OnError = Literal["stop", "skip"]  # what a broken file does
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".webp"}


@dataclass
class RadiographTable:
    """Rows of a set: encoded images and their labels, nothing decoded yet.

    Attributes:
        rows: One row per radiograph. `image` is a struct of `bytes` and `path` (the form that `datasets` writes), other
            columns are labels, splits, patients, ...
        name: What to call the set in messages.
    """

    rows: pa.Table
    name: str

    def __len__(self) -> int:
        return self.rows.num_rows

    def where(self, column: str, value: Any) -> RadiographTable:
        """The rows that hold `value` in `column`.

        Raises:
            SpcxrError: there is no such column, or no such row, or its values are of another kind.
        """
        if column not in self.rows.column_names:
            raise SpcxrError(f"{self.name}: no column {column!r}; there are {', '.join(self.rows.column_names)}")
        try:
            kept = self.rows.filter(pc.equal(self.rows[column], pa.scalar(value)))
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            kind = self.rows[column].type
            raise SpcxrError(f"{self.name}: column {column!r} holds {kind}, and {value!r} is none") from error
        if not kept.num_rows:
            raise SpcxrError(f"{self.name}: no row has {column} = {value!r}")
        return RadiographTable(kept, f"{self.name}[{column}={value}]")

    def without(self, ids: Collection[str]) -> RadiographTable:
        """The rows whose id is none of these.

        Raises:
            SpcxrError: no row is left, or none had such an id (the list is of another set then).
        """
        kept = np.array([name not in ids for name in self.ids])
        if kept.all() and ids:
            raise SpcxrError(f"{self.name}: none of the {len(ids)} ids to leave out is in it ({min(ids)}, ...)")
        if not kept.any():
            raise SpcxrError(f"{self.name}: every row is left out")
        return RadiographTable(self.rows.filter(pa.array(kept)), f"{self.name}, {int((~kept).sum())} rows left out")

    @property
    def ids(self) -> list[str]:
        """What to call each row: the column `id`, or its number."""
        if "id" in self.rows.column_names:
            return [str(name) for name in self.column("id")]
        return [f"row {row}" for row in range(len(self))]

    def column(self, name: str) -> list:
        """The values of one column.

        Raises:
            SpcxrError: there is no such column.
        """
        if name not in self.rows.column_names:
            raise SpcxrError(f"{self.name}: no column {name!r}; there are {', '.join(self.rows.column_names)}")
        return self.rows[name].to_pylist()


def read_table(source: str | os.PathLike) -> RadiographTable:
    """Read a set: one Parquet file, a folder of Parquet shards, or a folder of pictures (DICOM too, subfolders too).

    Raises:
        SpcxrError: nothing is there, or a shard is damaged, or holds no images; the message names the file.
    """
    path = Path(source)
    if path.is_file():
        return RadiographTable(_read_shard(path), path.name)
    if not path.is_dir():
        raise SpcxrError(f"{path}: no such file or folder")
    shards = sorted(path.glob("*.parquet"))
    if shards:
        return join_tables([RadiographTable(_read_shard(shard), shard.name) for shard in shards], path.name)
    pictures = pictures_below(path)
    if not pictures:
        raise SpcxrError(
            f"{path}: no Parquet shards and no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) in this folder"
        )
    images = [{"bytes": None, "path": str(picture)} for picture in pictures]
    names = [str(picture.relative_to(path)) for picture in pictures]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return RadiographTable(pa.table({"image": pa.array(images, struct), "id": names}), path.name)


def pictures_below(folder: Path) -> list[Path]:
    """The pictures and DICOM files of a folder and its subfolders, sorted.

    A file counts by its suffix, or without one where it begins like a DICOM. Hidden files do not, nor what lies in
    hidden folders: they are an archive tool's own (`._picture.png`).
    """
    return [file for file in sorted(folder.rglob("*")) if not is_hidden(file, folder) and _is_picture(file)]


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether a part of the file's path below the folder begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_picture(file: Path) -> bool:
    if not file.is_file():
        return False
    if file.suffix and not file.suffix[1:].isdigit():  # names that are a DICOM's UID end in a number
        return file.suffix.lower() in PICTURE_SUFFIXES
    try:
        with file.open("rb") as stream:
            return stream.read(DICOM_PREFIX.stop)[DICOM_PREFIX] == b"DICM"
    except OSError:
        return False


def join_tables(tables: Sequence[RadiographTable], name: str | None = None) -> RadiographTable:
    """The rows of all, one after the other; a column that one lacks is null there.

    Raises:
        SpcxrError: a column has one type here and another there.
    """
    name = name or (tables[0].name if len(tables) == 1 else f"{len(tables)} files")
    try:
        return RadiographTable(pa.concat_tables([table.rows for table in tables], promote_options="default"), name)
    except pa.ArrowException as error:
        raise SpcxrError(f"{name}: the files do not fit together ({one_line(error)})") from error


def _read_shard(path: Path) -> pa.Table:
    table = read_parquet(path)
    if "image" not in table.column_names or not _holds_pictures(table.schema.field("image").type):
        raise SpcxrError(f"{path}: no column `image` with the bytes of a picture")
    return table


def read_parquet(path: Path) -> pa.Table:
    """A Parquet file of any columns, checked.

    Raises:
        SpcxrError: it is no Parquet file, or is damaged.
    """
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # text that is no UTF-8, offsets that point outside
        _names(table.schema)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SpcxrError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
    return table.replace_schema_metadata(None)


def _names(fields: Iterable[pa.Field]) -> list[str]:
    """The names of columns and of what they consist of; one that is no UTF-8 raises here and not somewhere later."""
    return [
        name
        for field in fields
        for name in (field.name, *(_names(field.type) if pa.types.is_struct(field.type) else []))
    ]


def _holds_pictures(kind: pa.DataType) -> bool:
    """Whether this is the struct of `bytes` and `path`; a column without any value may have the type null."""
    if not pa.types.is_struct(kind) or not {"bytes", "path"} <= set(_names(kind)):
        return False
    content, path = kind.field("bytes").type, kind.field("path").type
    is_content = pa.types.is_binary(content) or pa.types.is_large_binary(content) or pa.types.is_null(content)
    return is_content and (pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path))


def open_image(cell: dict, name: str) -> Image.Image:
    """The radiograph in one cell of the column `image`, mode L, as `read_radiograph` reads it, whatever it shows.

    Raises:
        SpcxrError: it cannot be read; the message holds `name` and the cause.
    """
    return read_radiograph(_source_of(cell, name), strict=None)


def open_with_warnings(cell: dict, name: str) -> tuple[Image.Image, list[str]]:
    """As `open_image`, with the texts of `spcxr_hf.images.plausibility.quality_warnings`."""
    return read_with_quality_warnings(_source_of(cell, name))


def _source_of(cell: dict, name: str) -> str | io.BytesIO:
    if cell["bytes"] is None:
        return cell["path"]
    stream = io.BytesIO(cell["bytes"])
    stream.name = name  # what messages call it
    return stream


def open_mask(cell: dict | None, name: str) -> Image.Image:
    """The lung mask in one cell of the column `lung_mask`, mode L: 255 on the lungs, 0 elsewhere.

    Raises:
        SpcxrError: there is none, or it cannot be read; the message holds `name`.
    """
    if cell is None or cell["bytes"] is None:
        raise SpcxrError(f"{name}: no lung mask in this row")
    try:
        with Image.open(io.BytesIO(cell["bytes"])) as mask:
            inside = mask_pixels(mask)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SpcxrError(f"{name}: the lung mask cannot be read ({error})") from error
    return Image.fromarray((255 * inside).astype(np.uint8))


def mask_pixels(picture: Image.Image) -> np.ndarray:
    """A picture of a mask -> (height, width) booleans: brighter than half of the range, or 1 where all are 0 or 1.

    Raises:
        ValueError: neither; so pale a picture holds numbers of classes, which would all count as outside.
    """
    grey = np.asarray(picture.convert("L"))
    brightest = int(grey.max(initial=0))
    if 1 < brightest <= 127:
        raise ValueError(f"its greatest value is {brightest}; inside is 255 (or 1), outside 0")
    return grey > (127 if brightest > 1 else 0)


class Decoded(NamedTuple):
    """What `decode_set` could read.

    `table` its rows, `rows` their numbers (n,) in the set that was given, `images` (n, 1, S, S) uint8, `masks`
    (n, S, S) booleans or None, `skipped` id -> cause of the rows that are not among them.
    """

    table: RadiographTable
    rows: torch.Tensor
    images: torch.Tensor
    masks: torch.Tensor | None
    skipped: dict[str, str]


def decode_set(
    table: RadiographTable,
    size: int,
    cache: str | os.PathLike | None = None,
    *,
    masks: bool = False,
    on_error: OnError = "stop",
) -> Decoded:
    """Decode a set's images, and lung masks, as `decode_images` and `decode_masks` do; a broken file ends it or not.

    Args:
        cache: As for `decode_images`; broken files are tried again at the next start.
        masks: Decode the column `lung_mask` too; a row without a mask counts as broken.
        on_error: "stop": the first broken file is an error; "skip": its row is left out, and told in `skipped`.

    Raises:
        SpcxrError: a file cannot be read (with "stop"), or more than half of them cannot; the message names one.
    """
    images, broken = _decode(table, "image", _decode_image, size, cache)
    lungs = None
    if masks:
        lungs, without = _decode(table, "lung_mask", _decode_mask, size, None)
        lungs, broken = lungs.squeeze(1) > 127, without | broken
    check_broken(table.name, [broken[row] for row in sorted(broken)], len(table), on_error)
    if not broken:
        return Decoded(table, torch.arange(len(table)), images, lungs, {})
    kept = np.array([row not in broken for row in range(len(table))])
    names, rows = table.ids, torch.from_numpy(np.flatnonzero(kept))
    return Decoded(
        RadiographTable(table.rows.filter(pa.array(kept)), table.name),
        rows,
        images[rows],
        None if lungs is None else lungs[rows],
        {names[row]: cause for row, cause in sorted(broken.items())},
    )


def check_broken(name: str, causes: Sequence[str], count: int, on_error: OnError) -> None:
    """The one rule for broken files: none with "stop", at most half of them with "skip".

    Args:
        name: What to call the set.
        causes: Of each broken file; the first is told.
        count: Files of the set, or of the part of it that was looked at.

    Raises:
        SpcxrError: there are more.
    """
    if on_error not in get_args(OnError):
        raise SpcxrError(f"on_error must be {' or '.join(get_args(OnError))}; got {on_error!r}")
    if causes and on_error == "stop":
        raise SpcxrError(causes[0])
    if 2 * len(causes) > count:
        raise SpcxrError(f"{name}: {len(causes)} of {count} files are broken, more than half; the first: {causes[0]}")


def decode_images(table: RadiographTable, size: int, cache: str | os.PathLike | None = None) -> torch.Tensor:
    """Decode every image to grey, the whole picture at size x size: (n, 1, size, size) uint8.

    Args:
        cache: A folder to keep the result in, for the next start: one `.npy` file per set and size, mapped, not read.

    Raises:
        SpcxrError: an image cannot be read; the message names its row.
    """
    return decode_set(table, size, cache).images


def decode_masks(table: RadiographTable, size: int) -> torch.Tensor:
    """Decode every lung mask (column `lung_mask`), nearest neighbour: (n, size, size) booleans, true on the lungs.

    Raises:
        SpcxrError: a row has no mask, or one that cannot be read.
    """
    pixels, broken = _decode(table, "lung_mask", _decode_mask, size, None)
    check_broken(table.name, [broken[row] for row in sorted(broken)], len(table), "stop")
    return pixels.squeeze(1) > 127


def _decode_image(cell: dict | None, name: str, size: int) -> np.ndarray:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise SpcxrError(f"{name}: no image in this row")
    return np.asarray(open_image(cell, name).resize((size, size), Image.Resampling.BILINEAR))


def _decode_mask(cell: dict | None, name: str, size: int) -> np.ndarray:
    return np.asarray(open_mask(cell, name).resize((size, size), Image.Resampling.NEAREST))


def _decode(
    table: RadiographTable,
    column: str,
    decode: Callable[[Any, str, int], np.ndarray],
    size: int,
    cache: str | os.PathLike | None,
) -> tuple[torch.Tensor, dict[int, str]]:
    """Pixels (n, 1, S, S) uint8 of a column, and row -> cause of what cannot be read, which is black."""
    if column not in table.rows.column_names:
        raise SpcxrError(f"{table.name}: no column {column!r}; there are {', '.join(table.rows.column_names)}")
    names = table.ids
    file = None if cache is None else Path(cache) / f"{cache_key(table)}-{column}-{size}.npy"
    kept = None if file is None else _read_cache(file)
    pixels, rows = (np.zeros((len(table), 1, size, size), np.uint8), range(len(table))) if kept is None else kept
    broken: dict[int, str] = {}

    def fill(row: int) -> None:
        try:
            pixels[row, 0] = decode(table.rows[column][row].as_py(), f"{table.name}: {names[row]}", size)
        except SpcxrError as error:
            broken[row] = str(error)

    # Threads, not processes: Pillow decodes and resizes outside the interpreter's lock.
    with ThreadPoolExecutor(worker_count()) as pool:
        for _ in tqdm(pool.map(fill, rows), total=len(rows), desc=f"decoding {table.name}", unit="image"):
            pass
    if file is not None and kept is None:
        _write_cache(file, pixels, sorted(broken))
    return torch.from_numpy(pixels), broken


def _read_cache(file: Path) -> tuple[np.ndarray, Sequence[int]] | None:
    """Pixels, mapped, and the rows that were broken: they are tried again, since a file may have been mended."""
    if not file.is_file():
        return None
    beside = file.with_suffix(".broken.json")
    return np.load(file, mmap_mode="c"), json.loads(beside.read_bytes()) if beside.is_file() else []


def _write_cache(file: Path, pixels: np.ndarray, broken: list[int]) -> None:
    if broken:  # first, so that pixels never stand there without it
        with atomic_file(file.with_suffix(".broken.json")) as partial:
            partial.write_text(json.dumps(broken), encoding="utf-8")
    with atomic_file(file) as partial, partial.open("wb") as stream:
        np.save(stream, pixels)


def cache_key(table: RadiographTable) -> str:
    """Identifies the rows, their encoded content or files (place, size, time): 16 hex digits."""
    images = table.rows["image"]
    digest = hashlib.sha256(json.dumps([table.name, table.ids]).encode())
    paths = pc.struct_field(images, "path").to_pylist()
    for content, path in zip(pc.struct_field(images, "bytes"), paths, strict=True):
        if content.is_valid:
            digest.update(hashlib.sha256(content.as_buffer()).digest())
        else:
            digest.update(json.dumps(None if path is None else _stamp(Path(path))).encode())
    return digest.hexdigest()[:16]


def fingerprint_rows(table: RadiographTable, columns: Sequence[str] = ()) -> str:
    """Identifies what is learned from a set, wherever it lies: 16 hex digits. No pixel is read.

    Args:
        table: The set. The order of its rows counts, each row's id, and the size of its encoded image.
        columns: Labels and whatever else counts; of a column of pictures (masks) the sizes count.

    Raises:
        SpcxrError: there is no such column.
    """
    parts: list[list] = [table.ids]
    for name in ("image", *columns):
        is_picture = name in table.rows.column_names and _holds_pictures(table.rows.schema.field(name).type)
        parts.append(_encoded_sizes(table, name) if is_picture else table.column(name))
    digest = hashlib.sha256()
    for row in zip(*parts, strict=True):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _encoded_sizes(table: RadiographTable, column: str) -> list[int | None]:
    """Bytes of each picture, None where it is missing."""
    cells = table.rows[column]
    inline = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
    paths = pc.struct_field(cells, "path").to_pylist()
    return [
        size if size is not None or path is None else (_stamp(Path(path))[1:2] or [None])[0]
        for size, path in zip(inline, paths, strict=True)
    ]


def _stamp(path: Path) -> list:
    """A file's place, size and time; a missing one has neither, and is reported when it is opened."""
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]
