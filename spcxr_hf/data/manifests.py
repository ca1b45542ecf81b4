"""User data sets: manifests (CSV, TSV, Parquet), folders of images, WebDataset shards.

    read_manifest   -> read_rows -> the columns of SCHEMA, labels, files that must exist -> radiographs
    read_folder, read_shards                                                             -> radiographs

All give a `RadiographTable` in the schema of `spcxr_hf.data.archives.registry` (see the table there).
Nothing is decoded: an image is looked for, not read.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from spcxr_hf.data.labels import (
    LABELS_COLUMN,
    Uncertain,
    canonical_name,
    label_matrix,
    label_struct,
    labels_of,
)
from spcxr_hf.data.shards import ShardIndex, read_index
from spcxr_hf.data.table import (
    IMAGE,
    PICTURE_SUFFIXES,
    RadiographTable,
    check_paths,
    join_tables,
    pictures_below,
    read_parquet,
)
from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.files import as_text, note

Missing = Literal["error", "skip"]

MASKS = pa.list_(pa.struct([("name", pa.string()), ("path", pa.string()), ("rle", pa.string())]))
BOXES = pa.list_(pa.struct([("name", pa.string()), *((side, pa.float32()) for side in ("x", "y", "width", "height"))]))
SCHEMA = {
    "image": IMAGE,
    "id": pa.string(),
    "patient": pa.string(),
    "study": pa.string(),
    "view": pa.string(),
    "sex": pa.string(),
    "age": pa.float32(),
    "split": pa.string(),
    "label": pa.string(),
    "terms": pa.list_(pa.string()),
    "masks": MASKS,
    "boxes": BOXES,
    "report": pa.string(),
    "report_path": pa.string(),
    "source": pa.string(),
    "licence": pa.string(),
}
OWN_COLUMNS = ("path", "id", "patient", "study", "view", "sex", "age", "split", "label", "mask", "report", "source")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
LARGEST_TABLE = 2**33  # bytes of encoded images that `read_shards` takes into memory
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
OVERRIDE = "read_as (--read-as) overrides it"
OLDEST = 120  # years; NIH has patients of 411
VIEWS = {
    "PA": ("pa",),
    "AP": ("ap", "ap supine", "ap erect", "ap horizontal", "ap semi erect"),
    "lateral": ("l", "ll", "rl", "lat", "lateral", "left lateral", "right lateral"),
}
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation", "dev"),
    "test": ("test", "testing"),
}
_VIEW_OF = {spelling: view for view, spellings in VIEWS.items() for spelling in spellings}
_SPLIT_OF = {spelling: split for split, spellings in SPLITS.items() for spelling in spellings}
_logger = logging.getLogger(__name__)


# ---- values in one spelling ------------------------------------------------------------------------------------


def view_of(text: str | None) -> str | None:
    """PA, AP, lateral, or None: unknown, or neither (oblique, decubitus, ribs)."""
    return _VIEW_OF.get(" ".join((text or "").replace("_", " ").replace("-", " ").casefold().split()))


def split_of(text: str | None) -> str | None:
    """train, val or test in any of their spellings; another name as it is; None where there is none."""
    text = (text or "").strip()
    return _SPLIT_OF.get(text.casefold(), text) or None


def sex_of(text: str | None) -> str | None:
    """F, M or None."""
    letter = (text or "").strip()[:1].upper()
    return {"F": "F", "W": "F", "M": "M"}.get(letter)


def age_of(text: str | None) -> float | None:
    """Years: of a number, or of one with a unit (`058Y`, `11M`, `45yrs`, `6 months`); None if unknown or above 120."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]?)[a-z]*\s*", (text or "").casefold())
    if not match or match[2] not in ("", "y", "m", "w", "d"):
        return None
    years = float(match[1]) / {"m": 12, "w": 52.18, "d": 365.25}.get(match[2], 1)
    return years if years <= OLDEST else None


SPELL: dict[str, Callable] = {"view": view_of, "split": split_of, "sex": sex_of, "age": age_of}


# ---- tables of text ----------------------------------------------------------------------------------------------


def read_rows(path: str | os.PathLike, required: Sequence[str] = (), delimiter: str | None = None) -> pa.Table:
    """A CSV, TSV (also .gz), JSON Lines or Parquet file. A cell of a CSV or TSV is a string; an empty one is null.

    Args:
        required: Columns that must be there.
        delimiter: Between cells; None: by the name, a tab for .tsv and .tab, else a comma.

    Raises:
        SpcxrError: no such file, not UTF-8, a row of another length, a line that is no JSON object, two columns of one
            name, or a column that is not there; the message names the file, and the row (the header is row 1).
    """
    path = Path(path)
    if not path.is_file():
        raise SpcxrError(f"{path}: no such file")
    readers: dict[str, Callable[[Path], pa.Table]] = {".parquet": read_parquet, ".jsonl": _read_json_lines}
    reader = readers.get(path.suffix.lower())
    table = reader(path) if reader else _read_text(path, delimiter)
    absent = [name for name in required if name not in table.column_names]
    if absent:
        raise SpcxrError(f"{path}: no column {', '.join(map(repr, absent))}; there are {', '.join(table.column_names)}")
    return table


def _read_json_lines(path: Path) -> pa.Table:
    number, rows = 0, []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise SpcxrError(f"{path}: row {number}: no JSON object with a value per column")
        columns = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in columns})
    except (OSError, ValueError, RecursionError, TypeError, pa.ArrowException) as error:
        raise SpcxrError(f"{path}: not readable as JSON Lines in UTF-8: row {number}: {one_line(error)}") from error


def _read_text(path: Path, delimiter: str | None) -> pa.Table:
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    wrong_rows: list[str] = []

    def refuse(row: Any) -> str:
        found = f"row {row.number} has {row.actual_columns} cells, the header {row.expected_columns}"
        wrong_rows.append(found)
        return "error"

    parse = pacsv.ParseOptions(
        delimiter=delimiter or DELIMITERS.get(suffix.lower(), ","),
        newlines_in_values=True,  # long cells, such as clinical notes
        invalid_row_handler=refuse,
    )
    read = pacsv.ReadOptions(use_threads=False)  # in order, so that a wrong row has its number
    try:
        # the header alone: without types, a cell that looks like a number would lose its leading zeros
        names = pacsv.open_csv(path, read_options=read, parse_options=parse).schema.names
        convert = pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
        )
        table = pacsv.read_csv(path, read_options=read, parse_options=parse, convert_options=convert)
    except (OSError, ValueError, pa.ArrowException) as error:  # UnicodeDecodeError is a ValueError
        cause = wrong_rows[0] if wrong_rows else str(error).replace("\n", " ")
        raise SpcxrError(f"{path}: not readable as a table in UTF-8: {cause}") from error
    stripped = [name.strip() for name in table.column_names]
    twice = sorted({name for name in stripped if name and stripped.count(name) > 1})
    if twice:
        raise SpcxrError(f"{path}: two columns are called {twice[0]!r}")
    named = [number for number, name in enumerate(stripped) if name]  # some headers end in a comma
    return table.select(named).rename_columns([stripped[number] for number in named])


def texts(table: pa.Table, column: str) -> list[str | None]:
    """A column as text without spaces around it; None where there is none, or no such column."""
    if column not in table.column_names:
        return [None] * table.num_rows
    values = table[column]
    if not pa.types.is_string(values.type):
        values = values.cast(pa.string())
    return [(text and text.strip()) or None for text in values.to_pylist()]


def in_one_spelling(table: pa.Table, **columns: str) -> dict[str, list]:
    """Columns of the schema -> their values, of columns of text that are called as given; None where there is none."""
    return {
        own: [SPELL[own](text) for text in texts(table, name)] if own in SPELL else texts(table, name)
        for own, name in columns.items()
    }


def numbers(table: pa.Table, column: str, path: str | os.PathLike) -> np.ndarray:
    """A column as (n,) float64, NaN where there is none."""
    values = table[column]
    if pa.types.is_nested(values.type):
        raise SpcxrError(f"{path}: {column} must be a column of numbers; it holds {values.type}")
    try:
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if pa.types.is_large_string(values.type):  # as polars and pandas write it
            values = values.cast(pa.string())
        if pa.types.is_string(values.type):
            values = pc.utf8_trim_whitespace(values)
            values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        return values.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    except (pa.ArrowException, ValueError) as error:
        wrong = ((row, text) for row, text in enumerate(texts(table, column)) if not _is_number(text))
        row, text = next(wrong, (0, str(values.type)))
        raise SpcxrError(f"{path}: row {row_number(path, row)}: {column} is {text!r}, no number") from error


def _is_number(text: str | None) -> bool:
    try:
        return text is None or float(text) is not None
    except ValueError:
        return False


def row_number(path: str | os.PathLike, row: int) -> int:
    """Line number of a row in an editor: from 1, after the header of a text file."""
    return row + (1 if Path(path).suffix.lower() in (".parquet", ".jsonl") else 2)


def check_unique(values: Sequence[str], path: str | os.PathLike, what: str) -> None:
    """Refuse duplicate values."""
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if value in first:
            rows = f"rows {row_number(path, first[value])} and {row_number(path, row)}"
            raise SpcxrError(f"{path}: {rows} are the same {what}, {value}")
        first[value] = row


# ---- the schema --------------------------------------------------------------------------------------------------


def radiographs(name: str, paths: Sequence[str], columns: Mapping[str, Any]) -> RadiographTable:
    """A table in the schema, of image files.

    `columns` has (n,) values per column; those of SCHEMA that are left out are null, a string counts for every row.
    """
    image = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], fields=list(IMAGE)
    )
    return RadiographTable(in_schema(image, columns), name)


def in_schema(image: pa.Array | pa.ChunkedArray, columns: Mapping[str, Any]) -> pa.Table:
    """The columns of SCHEMA in their types and order, then all others."""
    built: dict[str, Any] = {"image": image}
    for column, kind in SCHEMA.items():
        if column != "image":
            values = columns.get(column)
            values = [values] * len(image) if isinstance(values, str) else values
            built[column] = pa.nulls(len(image), kind) if values is None else _as_type(values, kind)
    built |= {column: values for column, values in columns.items() if column not in SCHEMA}
    return pa.table(built)


def _as_type(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values.cast(kind) if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)


def find_files(paths: Sequence[str], where: Callable[[int], str], missing: Missing) -> np.ndarray:
    """Which of these files exist, (n,) booleans: all of them, or those that `skip` leaves.

    Args:
        paths: (n,) files; one that is nowhere is "".
        where: row -> how messages name what asks for its file.
        missing: As for `read_manifest`.
    """
    if missing not in get_args(Missing):
        raise SpcxrError(f"missing must be {' or '.join(get_args(Missing))}; got {missing!r}")
    found = np.fromiter((os.path.isfile(path) for path in paths), dtype=bool, count=len(paths))  # noqa: PTH113 (three times as fast)
    if found.all():
        return found
    absent = np.flatnonzero(~found)
    said = f"{where(int(absent[0]))}: no such file ({len(absent)} of {len(found)} are missing)"
    if missing == "error" or not found.any():
        raise SpcxrError(said)
    _logger.warning("%s; they are left out", said)
    return found


# ---- manifests ---------------------------------------------------------------------------------------------------


def read_manifest(
    path: str | os.PathLike,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    *,
    folder: str | os.PathLike | None = None,
    image_root: str | os.PathLike | None = None,
    uncertain: Uncertain = "ignore",
    missing: Missing = "error",
    delimiter: str | None = None,
) -> RadiographTable:
    """Read a CSV, TSV or Parquet file with a row per image file.

    Args:
        path: The manifest. Its column `path` holds the image files; `id`, `patient`, `study`, `view`, `sex`, `age`,
            `split`, `label` (one class), `mask` (a file), `report` and `source` are taken where they are there; other
            columns stay as they are.
        columns: Name in that list -> its name in the manifest, where it is another.
        labels: Columns of 1, 0, -1 (uncertain) and empty cells (missing). None: the column `labels`, where there is
            one, as lists (`Mass|Nodule` in text): a list is complete, so what it does not name is absent; an empty
            cell is not labelled.
        folder: Where relative paths begin; None: in the manifest's folder.
        image_root: Where all files must lie, in it or below; None: in that folder.
        uncertain: What becomes of -1: `ignore`, `zero` or `one` (see `spcxr_hf.data.labels`).
        missing: `error`: every image and mask must exist; `skip`: rows whose files do not are left out with a warning.
        delimiter: As for `read_rows`.

    Returns:
        The rows in the schema of `data.archives.registry`; `id` is the path in the manifest where it gives none.

    Raises:
        SpcxrError: the manifest cannot be read, lacks a column, names a file twice or one that does not exist, or
            holds a label that is none; the message names the manifest and the row.
    """
    path = Path(path)
    rows = read_rows(path, delimiter=delimiter)
    if not rows.num_rows:
        raise SpcxrError(f"{path}: there are no rows")
    names = _find_columns(rows, columns or {}, path)
    given = texts(rows, names["path"])
    empty = next((row for row, text in enumerate(given) if text is None), None)
    if empty is not None:
        raise SpcxrError(f"{path}: row {row_number(path, empty)}: no path")
    written = [str(text) for text in given]
    check_unique(written, path, "image")
    base = Path(folder) if folder is not None else path.parent
    built = _own_columns(rows, names, base) | _label_columns(rows, labels, uncertain, path)
    used = {*names.values(), *(labels or ()), LABELS_COLUMN, *SCHEMA}
    built |= {name: rows[name] for name in rows.column_names if name not in used}
    built.setdefault("id", written)
    table = radiographs(path.name, [str(base / text) for text in written], built)
    check_paths(table.rows["image"], base, str(path), image_root)
    masks = [cell["path"] for cells in table.column("masks") for cell in cells or ()]
    check_paths(pa.array([{"bytes": None, "path": mask} for mask in masks], IMAGE), base, f"{path}: masks", image_root)
    return _with_files(table, path, missing)


def _find_columns(rows: pa.Table, columns: Mapping[str, str], path: Path) -> dict[str, str]:
    """Name in OWN_COLUMNS -> name in the manifest, of those that it has."""
    unknown = sorted(set(columns) - set(OWN_COLUMNS))
    if unknown:
        raise SpcxrError(f"{path}: columns cannot map {', '.join(unknown)}; it maps {', '.join(OWN_COLUMNS)}")
    there = ", ".join(rows.column_names)
    for own, name in columns.items():
        if name not in rows.column_names:
            raise SpcxrError(f"{path}: no column {name!r} for {own}; there are {there}")
    names = {own: columns.get(own, own) for own in OWN_COLUMNS}
    if names["path"] not in rows.column_names:
        raise SpcxrError(f"{path}: no column 'path'; there are {there}; columns={{'path': NAME}} says which it is")
    for name in names.values():
        if name in rows.column_names and pa.types.is_nested(kind := rows.schema.field(name).type):
            raise SpcxrError(f"{path}: {name} must be a column of text or numbers; it holds {kind}")
    return {own: name for own, name in names.items() if name in rows.column_names}


def _own_columns(rows: pa.Table, names: Mapping[str, str], base: Path) -> dict[str, Any]:
    """The columns of SCHEMA that a manifest gives."""
    built: dict[str, Any] = in_one_spelling(rows, **{own: name for own, name in names.items() if own != "path"})
    if "mask" in built:
        masks = built.pop("mask")
        built["masks"] = [mask and [{"name": "mask", "path": str(base / mask), "rle": None}] for mask in masks]
    return built


def _label_columns(
    rows: pa.Table, labels: Sequence[str] | None, uncertain: Uncertain, path: Path
) -> dict[str, pa.StructArray]:
    if labels is not None:
        absent = [name for name in labels if name not in rows.column_names]
        if absent:
            raise SpcxrError(f"{path}: no column {absent[0]!r} of labels; there are {', '.join(rows.column_names)}")
        values = {name: numbers(rows, name, path) for name in labels}
    elif LABELS_COLUMN not in rows.column_names:
        return {}
    elif pa.types.is_struct(rows.schema.field(LABELS_COLUMN).type):
        values = dict(zip(labels_of(rows), label_matrix(rows).T, strict=True))
    else:
        cells = rows[LABELS_COLUMN].to_pylist()
        if not all(cell is None or isinstance(cell, str | list) for cell in cells):
            kind = rows.schema.field(LABELS_COLUMN).type
            raise SpcxrError(f"{path}: labels must hold lists, or text as Mass|Nodule; it holds {kind}")
        split = [cell.split("|") if isinstance(cell, str) and cell.strip() else cell or None for cell in cells]
        values = listed_labels(split)
    try:
        return {LABELS_COLUMN: label_struct(values, uncertain)} if values else {}
    except SpcxrError as error:
        raise SpcxrError(f"{path}: {error}") from error


def listed_labels(lists: Sequence[Sequence[str] | None]) -> dict[str, np.ndarray]:
    """Lists of the labels that are present -> name -> (n,) 1 or 0, NaN where a row has no list."""
    sets = [None if names is None else {canonical_name(name) for name in names if name.strip()} for names in lists]
    known = sorted(set().union(*(names for names in sets if names)))
    return {
        name: np.array([np.nan if names is None else name in names for names in sets], np.float32) for name in known
    }


def _with_files(table: RadiographTable, path: Path, missing: Missing) -> RadiographTable:
    """The rows whose image and masks exist."""
    kept = np.ones(len(table), dtype=bool)
    images = [cell["path"] for cell in table.column("image")]
    masks = [(cell or [{}])[0].get("path") for cell in table.column("masks")]
    for what, files in (("image", images), ("mask", masks)):
        rows = [row for row, file in enumerate(files) if file is not None]
        if rows or what == "image":

            def where(place: int, rows: list[int] = rows, files: list = files) -> str:
                return f"{path}: row {row_number(path, rows[place])}: {files[rows[place]]}"

            kept[rows] &= find_files([files[row] for row in rows], where, missing)
    return table if kept.all() else RadiographTable(table.rows.filter(pa.array(kept)), table.name)


# ---- folders and shards --------------------------------------------------------------------------------------------


def read_folder(folder: str | os.PathLike, classes: bool | None = None) -> RadiographTable:
    """Read a folder of pictures: `[train|val|test/][class/]...picture`, `images/` beside `masks/`, or an ImageFolder.

    * An ImageFolder (as `datasets` has it): `metadata.csv`, `.jsonl` or `.parquet`, in the folder or in those of the
      splits, with the column `file_name`. Its other columns are taken as those of a manifest.
    * `[split/]images/` and `[split/]masks/`: a picture and its mask have the same path and name, up to the suffix. The
      masks become the column `lung_mask`.

    The rows are in the schema of `data.archives.registry`, in the order of their paths; `id` is the path in the folder.

    Args:
        folder: Its pictures, and those of its subfolders.
        classes: True: the first subfolder (below that of the split) is the class; False: it is not, and nothing else is
            recognised either; None: it is, if every picture has one and there are at least two of them.

    Raises:
        SpcxrError: no such folder, no pictures, a picture without a class where `classes` asks for one, or a mask
            without its picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SpcxrError(f"{root}: no such folder")
    if classes is None and (metadata := _metadata_files(root)):
        return _read_image_folder(root, metadata)
    files = sorted((file.relative_to(root).as_posix(), file) for file in pictures_below(root))
    if not files:
        raise SpcxrError(f"{root}: no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) in this folder")
    folders = [name.split("/")[:-1] for name, _ in files]
    splits = [_SPLIT_OF.get(parts[0].casefold()) if parts else None for parts in folders]
    below = [parts[1:] if split else parts for parts, split in zip(folders, splits, strict=True)]
    found = [parts[0] if parts else None for parts in below]
    if classes is None and set(found) == {"images", "masks"}:
        return _with_mask_folders(root, files, splits)
    if classes and None in found:
        raise SpcxrError(f"{root}: {as_text(files[found.index(None)][0])} is not in a class folder")
    if classes is None:
        classes = None not in found and len(set(found)) > 1
    built = {
        "id": [as_text(name) for name, _ in files],
        "split": splits,
        "label": [as_text(name or "") for name in found] if classes else None,
    }
    names = sorted({as_text(name or "") for name in found}) if classes else []
    shown = ", ".join(names[:8]) + (", ..." if names[8:] else "")
    what = f"{len(names)} classes ({shown})" if classes else "no classes"
    note(f"{root}: read as a folder of {len(files)} pictures in {what}; {OVERRIDE}")
    return radiographs(root.name, [as_text(file) for _, file in files], built)


def _with_mask_folders(root: Path, files: Sequence[tuple[str, Path]], splits: Sequence[str | None]) -> RadiographTable:
    """Pictures of `images/` with the masks of the same name in `masks/`."""
    parts: dict[str, dict[str, tuple[str, Path, str | None]]] = {"images": {}, "masks": {}}
    for (name, file), split in zip(files, splits, strict=True):
        above, kind, rest = name.partition("images/" if "images" in name.split("/")[:2] else "masks/")
        key = as_text(above + str(Path(rest).with_suffix("")))
        first, _, later = rest.partition("/")
        inner = _SPLIT_OF.get(first.casefold()) if later else None
        if key in parts[kind[:-1]]:
            raise SpcxrError(f"{root}: two files are called {key} in {kind}")
        parts[kind[:-1]][key] = (name, file, split or inner)
    alone = sorted(parts["masks"].keys() - parts["images"].keys())
    if alone or not parts["images"].keys() & parts["masks"].keys():
        raise SpcxrError(f"{root}: the mask {alone[0] if alone else ''} has no picture of its name in images/")
    masks = [parts["masks"].get(key) for key in parts["images"]]
    cells = [None if mask is None else {"bytes": None, "path": as_text(mask[1])} for mask in masks]
    pictures = list(parts["images"].values())
    note(
        f"{root}: read as {len(pictures)} pictures of images/, {len(parts['masks'])} of them with a mask of masks/; "
        f"{OVERRIDE}"
    )
    built = {
        "id": [as_text(name) for name, _, _ in pictures],
        "split": [split for _, _, split in pictures],
        "lung_mask": pa.array(cells, IMAGE),
    }
    return radiographs(root.name, [as_text(file) for _, file, _ in pictures], built)


def _metadata_files(root: Path) -> list[Path]:
    """The `metadata.csv`, `.jsonl` or `.parquet` with a column `file_name`, of the folder or else of its subfolders."""
    for places in ([root], sorted(place for place in root.iterdir() if place.is_dir())):
        found = [place / name for place in places for name in METADATA_FILES]
        named = [file for file in found if file.is_file() and "file_name" in read_rows(file).column_names]
        if named:
            return named
    return []


def _read_image_folder(root: Path, metadata: Sequence[Path]) -> RadiographTable:
    """The rows of each metadata file; ids are paths in the folder, and a subfolder may name the split."""
    tables = []
    for file in metadata:
        table = read_manifest(file, {"path": "file_name"})
        above = "" if file.parent == root else f"{file.parent.name}/"
        rows = table.rows
        ids = [f"{above}{name}" for name in texts(rows, "id")]
        split = _SPLIT_OF.get((above or "/").split("/")[0].casefold())
        inner = [split or _SPLIT_OF.get(name.split("/")[0].casefold()) for name in ids]
        splits = [given or found for given, found in zip(texts(rows, "split"), inner, strict=True)]
        for column, values in (("id", ids), ("split", splits)):
            rows = rows.set_column(rows.column_names.index(column), column, pa.array(values, pa.string()))
        tables.append(RadiographTable(rows, root.name))
    there, named = len(pictures_below(root)), sum(map(len, tables))
    left = f"; {there - named} pictures that it does not name are left out" if there > named else ""
    note(f"{root}: read as an ImageFolder of {named} pictures ({metadata[0].name}, file_name){left}; {OVERRIDE}")
    return join_tables(tables, root.name)


def read_shards(source: Any, columns: Sequence[str] | None = None) -> RadiographTable:
    """Read a small set of WebDataset shards into memory, its images encoded; larger ones are for `streaming`.

    Args:
        source: As for `spcxr_hf.data.shards.read_index`: a .tar, a folder of them, or several of either.
        columns: Entries of the samples' .json, and `cls`; None: all that any sample has.

    Returns:
        A column per entry, after those of the schema; entries called as these are taken for them.

    Raises:
        SpcxrError: a shard is damaged, or holds no images; the images take more than 8 GiB; two samples have one key;
            or an entry has values of different kinds. The message names the shard or the entry.
    """
    index = read_index(source)
    size = int(index.units["bytes"].sum())
    if size > LARGEST_TABLE:
        raise SpcxrError(f"{index.name}: {size / 2**30:.1f} GiB of images are too many for a table; stream the set")
    wanted = _shard_columns(index) if columns is None else list(columns)
    rows = [
        row for unit in range(len(index.units)) for row in index.read(unit, 0, int(index.units[unit]["rows"]), wanted)
    ]
    problem = next((row.problem for row in rows if row.problem), None)
    if problem:
        raise SpcxrError(problem)
    check_unique([row.id for row in rows], index.name, "sample")
    built: dict[str, Any] = {"id": [row.id for row in rows]}
    for column in wanted:
        try:
            values = [row.columns[column] for row in rows]
            built[column] = _as_type(values, SCHEMA[column]) if column in SCHEMA else pa.array(values)
        except (pa.ArrowException, TypeError) as error:
            raise SpcxrError(f"{index.name}: entry {column!r} has values of different kinds ({error})") from error
    return RadiographTable(in_schema(pa.array([row.image for row in rows], IMAGE), built), index.name)


def _shard_columns(index: ShardIndex) -> list[str]:
    """What a sample's .json can hold: in a tar no header says it. The key is the `id`, the picture the `image`."""
    if index.columns is not None:
        return sorted(index.columns - {"id", "image"})
    found: dict[str, None] = {}
    for path in index.files:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".cls"):
                    found["cls"] = None
                elif member.name.endswith(".json") and (file := archive.extractfile(member)) is not None:
                    try:
                        found |= dict.fromkeys(json.load(file))
                    except (ValueError, TypeError) as error:
                        raise SpcxrError(f"{path}: {member.name} cannot be read ({error})") from error
    return [name for name in found if name not in ("id", "image")]
