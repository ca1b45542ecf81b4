"""Sets of radiographs: from Parquet shards or a folder of pictures to decoded images in memory, and their order.

A set is small beside a machine's memory once its images are grey and 256 pixels wide (65 kB each), so it is decoded
once and kept as one uint8 tensor; augmentation and corruption then work on whole batches, on the device.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from spcxr_hf.errors import SpcxrError, one_line, printable
from spcxr_hf.files import as_text, atomic_file, check_regular_file, in_threads, note, read_json, write_json
from spcxr_hf.images.limits import MAX_FILE_BYTES, check_size
from spcxr_hf.images.plausibility import SIDE, count_doubtful, set_warning
from spcxr_hf.images.reader import DICOM_PREFIX, read_radiograph, read_with_quality_warnings

MAX_TABLE_BYTES = 2**33  # of encoded images in memory
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None  # bytes
OnError = Literal["stop", "skip"]  # choices of `on_error`
# What else may hold images, none of which is read here.
OTHER_IMAGES = {
    ".gif", ".jp2", ".j2k", ".jpf", ".jxl", ".heic", ".heif", ".avif", ".pgm", ".ppm", ".pnm", ".tga", ".jfif", ".ico",
    ".svg", ".img", ".raw", ".nii", ".gz", ".mha", ".mhd", ".nrrd", ".npy", ".npz", ".mat", ".zip", ".rar", ".7z",
}  # fmt: skip
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # the form that `datasets` writes
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
        """The rows that hold `value` in `column`."""
        values = self.cells(column)
        try:
            kept = self.rows.filter(pc.equal(values, pa.scalar(value)))
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise SpcxrError(f"{self.name}: column {column!r} holds {values.type}, and {value!r} is none") from error
        if not kept.num_rows:
            raise SpcxrError(f"{self.name}: no row has {column} = {value!r}")
        return RadiographTable(kept, f"{self.name}[{column}={value}]")

    def where_any(self, column: str, values: Sequence[Any]) -> RadiographTable:
        """The rows that hold one of `values`, in the order of these; errors as `where` has them."""
        parts = [self.where(column, value) for value in dict.fromkeys(values)]
        if not parts:
            raise SpcxrError(f"{self.name}: no value of {column} was given")
        return RadiographTable(pa.concat_tables(part.rows for part in parts), f"{self.name}[{'+'.join(values)}]")

    def without(self, ids: Collection[str]) -> RadiographTable:
        """The rows whose id is none of these."""
        kept = np.array([name not in ids for name in self.ids])
        if kept.all() and ids:
            raise SpcxrError(f"{self.name}: none of the {len(ids)} ids to leave out is in it ({min(ids)}, ...)")
        if not kept.any():
            raise SpcxrError(f"{self.name}: every row is left out")
        return RadiographTable(self.rows.filter(pa.array(kept)), f"{self.name}, {int((~kept).sum())} rows left out")

    @property
    def ids(self) -> list[str]:
        """Names of the rows: the column `id`, or the row number."""
        if "id" in self.rows.column_names:
            return [str(name) for name in self.column("id")]
        return [f"row {row}" for row in range(len(self))]

    def column(self, name: str) -> list:
        """The values of one column."""
        return self.cells(name).to_pylist()

    def cells(self, name: str) -> pa.ChunkedArray:
        """One column as Arrow holds it."""
        if name not in self.rows.column_names:
            raise SpcxrError(f"{self.name}: no column {name!r}; there are {', '.join(self.rows.column_names)}")
        return self.rows[name]


def read_table(source: str | os.PathLike, image_root: str | os.PathLike | None = None) -> RadiographTable:
    """Read a set: one Parquet file, a folder of Parquet shards, or a folder of pictures (DICOM too, subfolders too).

    Args:
        source: The file or folder.
        image_root: Where files may lie that Parquet rows name in place of holding their bytes, as `check_paths` has it.

    Raises:
        SpcxrError: nothing is there, or a shard is damaged, or holds no images; the message names the file.
    """
    path = Path(source)
    if path.is_file():
        return RadiographTable(_read_shard(path, image_root), path.name)
    if not path.is_dir():
        raise SpcxrError(f"{path}: no such file or folder")
    shards = sorted(path.glob("*.parquet"))
    if shards:
        return join_tables([RadiographTable(_read_shard(shard, image_root), shard.name) for shard in shards], path.name)
    pictures = pictures_below(path)
    if not pictures:
        raise SpcxrError(
            f"{path}: no Parquet shards and no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) in this folder"
        )
    images = [{"bytes": None, "path": as_text(picture)} for picture in pictures]
    names = [as_text(picture.relative_to(path)) for picture in pictures]
    return RadiographTable(pa.table({"image": pa.array(images, IMAGE), "id": names}), path.name)


def pictures_below(folder: Path, left_out: list[Path] | None = None) -> list[Path]:
    """The pictures and DICOM files of a folder and its subfolders, sorted.

    A file counts by its suffix, or without one where it begins like a DICOM. Hidden files do not, nor what lies in
    hidden folders: they are made by archive tools (`._picture.png`). Other entries that are left out are reported in
    one line for each kind, and added to `left_out`: folders that cannot be read, linked folders, files of other kinds
    that may be images.
    """
    pictures, found = scan_pictures(folder)
    for what, files in found.items():
        note(f"{printable(str(folder))}: {len(files)} {what} left out, the first: {printable(str(files[0]))}")
        if left_out is not None:
            left_out += files
    return pictures


def scan_pictures(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """What `pictures_below` finds, and what it leaves out: kind, such as "linked folder(s)", -> files or folders."""
    pictures: list[Path] = []
    left_out: dict[str, list[Path]] = {}

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise SpcxrError(f"{folder}: {error.strerror}") from error
        left_out.setdefault("folder(s) that cannot be read", []).append(Path(error.filename))

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [Path(place) / name for name in folders if (Path(place) / name).is_symlink()]
        if linked:
            left_out.setdefault("linked folder(s)", []).extend(linked)
        for name in names:
            file = Path(place) / name
            if name.startswith("."):
                continue
            if _is_picture(file):
                pictures.append(file)
            elif file.suffix.lower() in OTHER_IMAGES:
                left_out.setdefault(f"{file.suffix.lower()} file(s)", []).append(file)
            elif file.suffix.lower() in PICTURE_SUFFIXES:
                left_out.setdefault("link(s) to nowhere or special file(s)", []).append(file)
    return sorted(pictures), left_out


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether a part of the file's path below the folder begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_picture(file: Path) -> bool:
    if not file.is_file() or file.name.upper() == "DICOMDIR":  # a medium's table of contents, PS3.10 section 8.6
        return False
    if file.suffix and not file.suffix[1:].isdigit():  # names that are a DICOM's UID end in a number
        return file.suffix.lower() in PICTURE_SUFFIXES
    try:
        with file.open("rb") as stream:
            return stream.read(DICOM_PREFIX.stop)[DICOM_PREFIX] == b"DICM"
    except OSError:
        return False


def join_tables(tables: Sequence[RadiographTable], name: str | None = None) -> RadiographTable:
    """The rows of all, one after the other; a column that one lacks is null there."""
    name = name or (tables[0].name if len(tables) == 1 else f"{len(tables)} files")
    try:
        return RadiographTable(pa.concat_tables([table.rows for table in tables], promote_options="default"), name)
    except pa.ArrowException as error:
        raise SpcxrError(f"{name}: the files do not fit together ({one_line(error)})") from error


def _read_shard(path: Path, image_root: str | os.PathLike | None) -> pa.Table:
    table = read_parquet(path)
    if "image" not in table.column_names or not _holds_pictures(table.schema.field("image").type):
        raise SpcxrError(f"{path}: no column `image` with the bytes of a picture")
    check_paths(table["image"], path.parent, str(path), image_root)
    return table


def read_parquet(path: Path) -> pa.Table:
    """A Parquet file of any columns, checked.

    It is read a few rows at a time: a file of 0.2 MB can hold zeros that take 9 GB.

    Raises:
        SpcxrError: it is no Parquet file, is damaged, or takes more memory than a table of images of its size does.
    """
    stored = check_regular_file(path, MAX_TABLE_BYTES)
    most = min(MAX_TABLE_BYTES, max(2**30, 20 * stored))
    batches, size = [], 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _names(schema)
            at_once = 16 if any(_has_binary(field.type) for field in schema) else 4096
            if (rows := file.metadata.num_rows) > max(2**20, stored):  # they cannot all differ
                raise SpcxrError(f"{path}: {rows:,} rows in {stored:,} bytes are no table of images")
            for number in range(file.metadata.num_row_groups):
                if file.metadata.row_group(number).total_byte_size > most:
                    raise SpcxrError(f"{path}: row group {number} is too large: more than {most / 2**30:.0f} GiB")
            for batch in file.iter_batches(at_once):
                size += batch.nbytes
                if size > most:
                    raise SpcxrError(f"{path}: takes more than {most / 2**30:.0f} GiB, which is too much for a table")
                batches.append(batch)
        table = pa.Table.from_batches(batches, schema)
        table.validate(full=True)  # text that is no UTF-8, offsets that point outside
    except SpcxrError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SpcxrError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
    return table.replace_schema_metadata(None)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_binary(kind: pa.DataType) -> bool:
    return _is_binary(kind) or (pa.types.is_struct(kind) and any(_has_binary(field.type) for field in kind))


def check_paths(
    images: pa.ChunkedArray | pa.Array, folder: Path, name: str, image_root: str | os.PathLike | None = None
) -> None:
    """Refuse a table whose rows name files elsewhere: a table of unknown origin could name any picture of this machine.

    Args:
        images: Structs of `bytes` and `path`; a row with bytes may have any path.
        folder: Of the table.
        name: Of the table, in messages.
        image_root: Where the files may lie, with all that is below it; None: in the table's folder.
    """
    root = os.path.abspath(image_root if image_root is not None else folder)  # noqa: PTH100 (links are not followed)
    inside = root.rstrip(os.sep) + os.sep
    contents, paths = (pc.struct_field(images, part) for part in ("bytes", "path"))
    for row, (has_bytes, path) in enumerate(zip(contents.is_valid().to_pylist(), paths.to_pylist(), strict=True)):
        if path is not None and not has_bytes and not os.path.abspath(path).startswith(inside):  # noqa: PTH100
            raise SpcxrError(
                f"{name}: row {row}: {printable(path)} is outside {root}; image_root (--image-root) names the folder "
                "whose files a table may name"
            )


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
    is_content = _is_binary(content) or pa.types.is_null(content)
    return is_content and (pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path))


def open_image(cell: dict | None, name: str) -> Image.Image:
    """The radiograph in one cell of the column `image`, mode L, as `read_radiograph` reads it, whatever it shows."""
    return read_radiograph(_source_of(cell, name), strict=None)


def open_with_warnings(cell: dict | None, name: str) -> tuple[Image.Image, list[str]]:
    """As `open_image`, with the texts of `spcxr_hf.images.plausibility.quality_warnings`."""
    return read_with_quality_warnings(_source_of(cell, name))


def _source_of(cell: dict | None, name: str) -> str | io.BytesIO:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise SpcxrError(f"{name}: no image in this row")
    if cell["bytes"] is None:
        check_name(cell["path"])
        return cell["path"]
    stream = io.BytesIO(cell["bytes"])
    stream.name = name  # what messages call it
    return stream


def check_name(path: str) -> None:
    r"""Refuse the name of a file as `as_text` writes it, with `\xe9` for a byte that is no UTF-8."""
    if "\\x" in path and not Path(path).exists():
        raise SpcxrError(f"{printable(path)}: a name that is no UTF-8 cannot be kept in a table; rename the file")


def open_mask(cell: dict | None, name: str, structures: int = 0) -> Image.Image:
    """The mask in one cell of a column such as `lung_mask`, mode L: 255 inside, 0 elsewhere.

    Args:
        name: What to call it in messages.
        structures: Where above 0, the mask has a bit for each of so many structures, which may overlap, and comes back
            as it is; at most 8.

    Raises:
        SpcxrError: there is none, or it cannot be read; the message holds `name`.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise SpcxrError(f"{name}: no mask in this row")
    if cell["bytes"] is None:
        check_name(cell["path"])
        check_regular_file(cell["path"], MAX_FILE_BYTES)
    try:
        with Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as mask:
            if structures:
                check_size(*mask.size)
                if mask.mode != "L" or mask.getextrema()[1] >= 2**structures:
                    raise ValueError(f"it must be 8 bit grey with a bit for each of {structures} structures")
                return mask.copy()
            inside = mask_pixels(mask)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SpcxrError(f"{name}: the mask cannot be read ({error})") from error
    return Image.fromarray((255 * inside).astype(np.uint8))


def structure_masks(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Masks with a bit for each structure, (..., H, W) uint8 -> (..., count, H, W) booleans."""
    return (bits.unsqueeze(-3) >> torch.arange(count, device=bits.device).reshape(-1, 1, 1)) % 2 == 1


def structure_bits(masks: torch.Tensor) -> torch.Tensor:
    """What `structure_masks` takes apart: (count, H, W) booleans -> (H, W) uint8."""
    bits = torch.arange(len(masks), dtype=torch.uint8).reshape(-1, 1, 1)
    return (masks.to(torch.uint8) << bits).sum(dim=0).to(torch.uint8)


def mask_pixels(picture: Image.Image) -> np.ndarray:
    """A picture of a mask -> (height, width) booleans.

    Two values are outside (0, black) and inside (255, 1, or any other value or colour). More values are those of a
    compressed or resized mask, near black and near white, and cut at half of the range.

    Raises:
        ValueError: it has several classes, or two values of which neither is black.
    """
    check_size(*picture.size)
    if len(picture.getbands()) == 1 and picture.mode != "P":
        values = np.asarray(picture)
        values = values // 257 if values.max(initial=0) > 255 else values  # 16 bits
    else:  # the opaque colour of each pixel as one number
        red, green, blue, alpha = np.moveaxis(np.asarray(picture.convert("RGBA")).astype(np.uint32), -1, 0)
        if alpha.min() < 255:
            raise ValueError("it is transparent in places; inside is 255 (or 1), outside 0")
        is_grey = np.array_equal(red, green) and np.array_equal(red, blue)
        values = red.astype(np.uint8) if is_grey else red << 16 | green << 8 | blue
    found = np.unique(values)
    if len(found) == 2 and found[0] == 0:
        return values != 0
    if len(found) == 1:
        return values > 0
    if len(found) == 2 and len(picture.getbands()) > 1 and values.dtype != np.uint8:
        raise ValueError("it has two colours of which none is black, and it is not known which is inside")
    grey = values if len(picture.getbands()) == 1 and picture.mode != "P" else np.asarray(picture.convert("L"))
    between = grey[(grey > 31) & (grey < 224)]
    is_flat = len(np.unique(between)) < 9 and len(between) > 0.02 * grey.size  # no soft edge has so few values
    if set(found.tolist()) == {0, 1, 255} or grey.min() > 31 or grey.max() < 224 or is_flat:
        raise ValueError(
            f"its {len(found)} values up to {grey.max():g} are no two classes; inside is 255 (or 1), outside 0"
        )
    return grey > 127


class Decoded(NamedTuple):
    """What `decode_set` could read.

    `table` its rows, `rows` their numbers (n,) in the set that was given, `images` (n, 1, S, S) uint8, `masks`
    (n, S, S) booleans, or uint8 with a bit for each structure, or None, `skipped` id -> cause of the rows that are not
    among them.
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
    mask_column: str = "lung_mask",
    structures: int = 0,
    on_error: OnError = "stop",
) -> Decoded:
    """Decode a set's images, and masks, as `decode_images` and `decode_masks` do; a broken file is an error or is
    skipped.

    One line on standard error has the numbers of images that are nearly black, constant or probably negatives.

    Args:
        cache: As for `decode_images`; broken files are tried again at the next start.
        masks: Decode the masks too; a row without a mask counts as broken.
        mask_column: Their column.
        structures: As for `open_mask`.
        on_error: "stop": the first broken file is an error; "skip": its row is left out, and listed in `skipped`.

    Raises:
        SpcxrError: a file cannot be read (with "stop"), or more than half of them cannot; the message names one.
    """
    images, broken = _decode(table, "image", _decode_image, size, cache)
    unreadable = len(broken)
    lungs = None
    if masks:
        decode = partial(_decode_mask, structures=structures)
        lungs, without = _decode(table, mask_column, decode, size, None)
        lungs, broken = lungs.squeeze(1), without | broken
        lungs = lungs if structures else lungs > 127
    check_broken(table.name, [broken[row] for row in sorted(broken)], len(table), on_error)
    doubtful = count_doubtful(images.squeeze(1).numpy()) if size >= SIDE else Counter()
    doubtful["constant"] -= unreadable  # they are black
    if text := set_warning(doubtful, len(table) - unreadable):
        note(f"{table.name}: {text}")
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
    """The one rule for broken files, out of `count` that were looked at: none with "stop", at most half with "skip"."""
    if on_error not in get_args(OnError):
        raise SpcxrError(f"on_error must be {' or '.join(get_args(OnError))}; got {on_error!r}")
    if causes and on_error == "stop":
        raise SpcxrError(causes[0])
    if 2 * len(causes) > count:
        raise SpcxrError(f"{name}: {len(causes)} of {count} files are broken, more than half; the first: {causes[0]}")


def decode_images(table: RadiographTable, size: int, cache: str | os.PathLike | None = None) -> torch.Tensor:
    """Decode every image to grey, the whole picture at size x size: (n, 1, size, size) uint8.

    `cache` is a folder to keep the result in, for the next start: one `.npy` file per set and size, mapped, and a
    `.json` with its checksum; a damaged one is made anew.
    """
    return decode_set(table, size, cache).images


def decode_masks(table: RadiographTable, size: int, column: str = "lung_mask", structures: int = 0) -> torch.Tensor:
    """Decode every mask, nearest neighbour: (n, size, size) booleans, or uint8 bits of `structures` (`open_mask`)."""
    pixels, broken = _decode(table, column, partial(_decode_mask, structures=structures), size, None)
    check_broken(table.name, [broken[row] for row in sorted(broken)], len(table), "stop")
    return pixels.squeeze(1) if structures else pixels.squeeze(1) > 127


def _decode_image(cell: dict | None, name: str, size: int) -> np.ndarray:
    return np.asarray(open_image(cell, name).resize((size, size), Image.Resampling.BILINEAR))


def _decode_mask(cell: dict | None, name: str, size: int, structures: int = 0) -> np.ndarray:
    return np.asarray(open_mask(cell, name, structures).resize((size, size), Image.Resampling.NEAREST))


def _decode(
    table: RadiographTable,
    column: str,
    decode: Callable[[Any, str, int], np.ndarray],
    size: int,
    cache: str | os.PathLike | None,
) -> tuple[torch.Tensor, dict[int, str]]:
    """Pixels (n, 1, S, S) uint8 of a column, and row -> cause of what cannot be read, which is black."""
    cells, names = table.cells(column), table.ids
    file = None if cache is None else Path(cache) / f"{cache_key(table)}-{column}-{size}.npy"
    shape = (len(table), 1, size, size)
    if column == "image":
        nothing = (pc.is_null(pc.struct_field(cells, part)) for part in ("bytes", "path"))
        if 2 * (empty := pc.sum(pc.and_(*nothing)).as_py() or 0) > len(table):
            raise SpcxrError(f"{table.name}: {empty} of {len(table)} rows hold no image")
    kept = None if file is None else read_cache(file, shape)
    if kept is None and MEMORY is not None and math.prod(shape) > MEMORY:
        raise SpcxrError(
            f"{table.name}: {len(table):,} images of {size} px take {math.prod(shape) / 2**30:,.0f} GiB; "
            f"this machine has {MEMORY / 2**30:,.0f}"
        )
    # rows that were broken are tried again, since a file may have been mended
    pixels, rows = (np.zeros(shape, np.uint8), range(len(table))) if kept is None else (kept[0], kept[1]["broken"])
    broken: dict[int, str] = {}

    def fill(row: int) -> None:
        try:
            pixels[row, 0] = decode(cells[row].as_py(), f"{table.name}: {names[row]}", size)
        except SpcxrError as error:
            broken[row] = str(error)

    in_threads(fill, rows, f"decoding {table.name}")
    if file is not None and kept is None:
        write_cache(file, pixels, broken=sorted(broken))
    return torch.from_numpy(pixels), broken


def read_cache(file: Path, shape: Sequence[int]) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Pixels (uint8) that `write_cache` kept, mapped, and what was kept with them; None where there are none.

    A damaged file counts as none: it is reported in one line and should be rewritten.
    """
    try:
        kept = read_json(file.with_suffix(".json"))
        if not file.is_file():
            return None
        pixels = np.load(file, mmap_mode="c", allow_pickle=False)
        if (pixels.shape, pixels.dtype) != (tuple(shape), np.uint8):
            raise ValueError(f"it holds {pixels.shape} {pixels.dtype}")
        if zlib.crc32(pixels) != kept.get("crc32"):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, EOFError) as error:
        note(f"{file}: the cache is damaged ({one_line(error)}) and is made anew")
        return None
    return pixels, kept


def write_cache(file: Path, pixels: np.ndarray, **kept: Any) -> None:
    """Keep pixels (uint8) and, as JSON, their checksum and other metadata."""
    with atomic_file(file) as partial, partial.open("wb") as stream:
        np.save(stream, pixels)
    write_json(file.with_suffix(".json"), {"crc32": zlib.crc32(np.ascontiguousarray(pixels).data), **kept})


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
    """Hash of the rows and labels of a set, independent of its path: 16 hex digits. No pixel is read.

    The order of the rows counts, each row's id, the size of its encoded image, and the columns that are named; of a
    column of pictures (masks) the sizes count.
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
