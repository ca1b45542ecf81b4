"""Any set of radiographs as one table.

read_set -> read_manifest, read_folder, read_shards (`manifests`), read_archive (`archives.registry`), read_table
            (`table`), read_dataset or read_torchxrayvision, by what is given
unite    -> several sets as one
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spcxr_hf.data.archives.registry import ARCHIVES, read_archive, recognised
from spcxr_hf.data.labels import LABELS_COLUMN, label_matrix, label_struct, labels_of
from spcxr_hf.data.manifests import (
    DELIMITERS,
    IMAGE,
    OLDEST,
    OVERRIDE,
    SCHEMA,
    in_schema,
    read_folder,
    read_manifest,
    read_shards,
    split_of,
    view_of,
)
from spcxr_hf.data.table import RadiographTable, check_paths, read_table
from spcxr_hf.errors import SpcxrError, needs, one_line
from spcxr_hf.files import installed_recipe, note


def read_set(
    source: Any,
    exclude: str | os.PathLike | None = None,
    read_as: str | None = None,
    image_root: str | os.PathLike | None = None,
    **options: Any,
) -> RadiographTable:
    """Read a set of any supported kind, in the schema of `spcxr_hf.data.archives.registry` where it does not bring
    another.

    The detected kind of folder is printed on standard error.

    Args:
        source: A manifest (.csv, .tsv, .parquet with a column `path`); a Parquet shard or a folder of them; a .tar or
            a folder of them; a public archive; a folder that `datasets` saved; a folder of pictures (of classes, of
            `images/` and `masks/`, or an ImageFolder); a `datasets.Dataset` or `DatasetDict`; a data set of
            torchxrayvision; the id of a set of the Hub (`owner/name`).
        exclude: A text file with the ids of rows to leave out, one a line; None or "": none.
        read_as: What a folder is, where it is not recognised: "folder", "classes" (their folders name them), "pictures"
            (without classes), or the name of an archive in `ARCHIVES`.
        image_root: Where the files may lie that a table names; None: in the table's folder, and below.
        **options: For the reader that it comes to: `read_manifest`, `read_archive`, `read_folder`, `read_shards` or
            `read_dataset`.
    """
    if read_as is not None:
        known = {"folder": None, "classes": True, "pictures": False}
        if read_as not in (*known, *ARCHIVES):
            raise SpcxrError(f"read_as must be {', '.join((*known, *ARCHIVES))}; got {read_as!r}")
        if read_as in ARCHIVES:
            table = read_archive(source, read_as, **options)
        else:
            table = read_folder(source, known[read_as], **options)
    else:
        reader = _reader_of(source)
        if image_root is not None and reader in (read_manifest, read_table, read_dataset):
            options["image_root"] = image_root
        table = reader(source, **options)
    return table.without(read_ids(exclude)) if exclude else table


def is_set(source: str | os.PathLike) -> bool:
    """Whether this is a set and not an image: a folder, a table, a shard, or an id of the Hub."""
    path = Path(source)
    if path.exists():
        return path.is_dir() or path.suffix == ".parquet" or _reader_of_file(path) is not read_table
    return _is_hub_id(source)


def _is_hub_id(source: Any) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not Path(source).suffix


def _reader_of(source: Any) -> Callable[..., RadiographTable]:
    if not isinstance(source, str | os.PathLike):
        is_xrv = all(hasattr(source, name) for name in ("pathologies", "labels", "csv", "__getitem__", "__len__"))
        return read_torchxrayvision if is_xrv else read_dataset
    path = Path(source)
    if not path.exists() and _is_hub_id(source):
        return read_dataset  # the id of a set of the Hub
    return _reader_of_folder(path) if path.is_dir() else _reader_of_file(path)


def _reader_of_file(path: Path) -> Callable[..., RadiographTable]:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in DELIMITERS:
        return read_manifest
    if suffix == ".tar":
        return read_shards
    if suffix == ".parquet" and path.is_file() and "path" in _parquet_columns(path):
        return read_manifest
    return read_table


def _parquet_columns(path: Path) -> list[str]:
    """The columns of a manifest; none for a shard, which has `image`, or a damaged file, for `read_table` to refuse."""
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return []
    return [] if "image" in names else names


def _reader_of_folder(path: Path) -> Callable[..., RadiographTable]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return read_dataset
    if any(path.glob("*.tar")):
        return read_shards
    if any(path.glob("*.parquet")):
        return read_table
    if (found := recognised(path)) is None:
        return read_folder
    archive = ARCHIVES[found[0]]
    note(f"{path}: read as the archive {archive.title} ({archive.licence}); {OVERRIDE}, with folder for instance")
    return read_archive


# ---- lists of ids ----------------------------------------------------------------------------------------------------


def read_ids(path: str | os.PathLike) -> set[str]:
    """The ids in a text file, one a line; a line that begins with `#` is a comment."""
    try:
        lines = installed_recipe(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpcxrError(f"{path}: no list of ids ({getattr(error, 'strerror', None) or error})") from error
    ids = {name for line in lines if (name := line.strip()) and not name.startswith("#")}
    if not ids:
        raise SpcxrError(f"{path}: holds no ids")
    return ids


def write_ids(path: str | os.PathLike, ids: Sequence[str], comment: str) -> None:
    """Write a file for `read_ids`: a comment, then the ids, sorted."""
    odd = [name for name in ids if name.startswith("#") or name.splitlines() != [name.strip()]]
    if odd:
        raise SpcxrError(f"{path}: cannot hold the id {odd[0]!r}: it begins with #, is empty or has blanks around it")
    try:
        Path(path).write_text("\n".join([f"# {comment}", *sorted(ids)]) + "\n", encoding="utf-8")
    except OSError as error:
        raise SpcxrError(f"{path}: cannot be written ({error.strerror})") from error


# ---- datasets ----------------------------------------------------------------------------------------------------


def read_dataset(
    source: Any,
    split: str | None = None,
    image_column: str = "image",
    image_root: str | os.PathLike | None = None,
) -> RadiographTable:
    """Read a `datasets.Dataset` or `DatasetDict`, a folder that `save_to_disk` wrote, or a set of the Hub by its id.

    Features called as a column of the schema are taken for it, others stay; a `ClassLabel` becomes its name.

    Args:
        source: The object, the folder, or the id (`owner/name`).
        split: Only this split; None: all, named in the column `split` where there are several.
        image_column: The feature of type `Image`; it is not decoded.
        image_root: Where files may lie that a saved set names in place of holding their bytes; None: in its folder.
    """
    with needs("train", "datasets"):
        import datasets
    is_loaded = isinstance(source, datasets.Dataset | datasets.DatasetDict)
    name = "the dataset" if is_loaded else str(source)
    loaded = source if is_loaded else _load_dataset(name)
    if not isinstance(loaded, datasets.Dataset | datasets.DatasetDict):
        raise SpcxrError(f"{name}: a {type(loaded).__name__}, no Dataset or DatasetDict")
    parts = {None: loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    if split is not None:
        if split not in parts:
            raise SpcxrError(f"{name}: no split {split!r}; there are {', '.join(map(str, parts))}")
        parts = {split: parts[split]}
    tables = [_dataset_part(part, key, image_column, name) for key, part in parts.items()]
    if not is_loaded and Path(name).exists():
        for table in tables:
            check_paths(table.rows["image"], Path(name), name, image_root)
    return unite(tables, name)


def _load_dataset(name: str) -> Any:
    import datasets

    if Path(name).exists():
        try:
            return datasets.load_from_disk(name)
        except Exception as error:  # many types, by what is damaged
            raise SpcxrError(
                f"{name}: not a set that save_to_disk wrote ({type(error).__name__}: {one_line(error)})"
            ) from error
    try:
        return datasets.load_dataset(name)
    except Exception as error:  # no network, offline mode, no such set, no access: each its own type, by version
        raise SpcxrError(
            f"{name}: no such folder, and as a set of the Hub it cannot be loaded: not reachable (offline?), not "
            f"there, or access must be asked for ({type(error).__name__}: {one_line(error)})"
        ) from error


def _dataset_part(part: Any, split: str | None, image_column: str, name: str) -> RadiographTable:
    """One `datasets.Dataset` as a table in the schema."""
    import datasets

    if image_column not in part.features or not isinstance(part.features[image_column], datasets.Image):
        raise SpcxrError(f"{name}: no feature {image_column!r} of type Image; there are {', '.join(part.features)}")
    rows = part.cast_column(image_column, datasets.Image(decode=False)).with_format("arrow")[:]
    rows = rows.replace_schema_metadata(None)
    built: dict[str, Any] = {column: rows[column] for column in rows.column_names if column != image_column}
    for column, feature in part.features.items():
        if isinstance(feature, datasets.ClassLabel):
            built[column] = [
                None if number is None or number < 0 else feature.int2str(number) for number in rows[column].to_pylist()
            ]
    if split is not None:
        built["split"] = split_of(split)
    try:
        return RadiographTable(in_schema(rows[image_column].cast(IMAGE), _unlike_left_out(built)), name)
    except pa.ArrowException as error:
        raise SpcxrError(f"{name}: a feature has another type than the schema's ({error})") from error


def _unlike_left_out(columns: dict[str, Any]) -> dict[str, Any]:
    """Without a column that has a name of the schema and a list or struct where that has none, or the reverse."""

    def fits(name: str, values: Any) -> bool:
        if name not in SCHEMA or not isinstance(values, pa.ChunkedArray):
            return True
        return pa.types.is_nested(values.type) == pa.types.is_nested(SCHEMA[name])

    return {name if fits(name, values) else f"{name}_": values for name, values in columns.items()}


# ---- torchxrayvision -----------------------------------------------------------------------------------------------


def read_torchxrayvision(dataset: Any) -> RadiographTable:
    """Read a data set object of torchxrayvision (the extra `xrv`): any of its archives, merged, filtered or a subset.

    Its objects hold pixels and no file paths, so every picture is kept as a PNG in memory: grey, 8
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


# ---- several sets ------------------------------------------------------------------------------------------------


def unite(tables: Sequence[RadiographTable], name: str | None = None) -> RadiographTable:
    """Several sets as one: what a set did not label, or has no column for, is missing (null) in its rows.

    Patients and ids stay as they are (readers of archives put the set's name before them). `name` is what to call the
    union in messages; None: their names.
    """
    if not tables:
        raise SpcxrError("there are no sets to unite")
    names = labels_of(list(tables))
    parts = []
    for table in tables:
        rows = table.rows
        if names:
            matrix = np.full((len(table), len(names)), np.nan, np.float32)
            own = labels_of(table)
            matrix[:, [names.index(label) for label in own]] = label_matrix(table)
            struct = label_struct(dict(zip(names, matrix.T, strict=True)))
            if LABELS_COLUMN in rows.column_names:
                if not pa.types.is_struct(rows.schema.field(LABELS_COLUMN).type):
                    raise SpcxrError(f"{table.name}: the column labels is no struct with a field per label")
                rows = rows.drop_columns([LABELS_COLUMN])
            rows = rows.append_column(LABELS_COLUMN, struct)
        parts.append(rows)
    try:
        united = pa.concat_tables(parts, promote_options="default")
    except pa.ArrowException as error:
        raise SpcxrError(f"the sets do not go together: {error}") from error
    return RadiographTable(united, name or " + ".join(table.name for table in tables))
