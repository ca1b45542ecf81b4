"""Index of Parquet and WebDataset shards, and reading of some of their rows.

`read_index` makes one small record per unit (a Parquet row group, or a run of tar members), without reading an image;
`ShardIndex.read` reads rows of one unit.

Parquet counts come from the footers (a few milliseconds a file): they grow with the files, not their rows. A tar has no
footer: its headers are walked once, without its data (30 seconds per million members), in every process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spcxr_hf.data.table import IMAGE, check_paths
from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.files import as_text

IMAGE_EXTENSIONS = {"png", "jpg", "jpeg", "tif", "tiff", "webp", "bmp", "dcm", "dicom"}  # what `read_radiograph` reads
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
SAMPLES_PER_UNIT, BYTES_PER_UNIT = 256, 2**26  # a tar's unit is closed at whichever comes first
LARGEST_ROW_GROUP = 2**30  # bytes; a stream holds several of them
MAX_GROUP_ROWS = 2**22  # a few kilobytes can hold more of equal values, which a filter would read at once
PARQUET_BATCH = 64  # rows that are decoded at once; more of them could overflow Arrow's 32-bit offsets
REGULAR_FILES = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}

UNIT = np.dtype(
    [
        ("file", np.int32),  # number of the shard in `ShardIndex.files`
        ("place", np.int64),  # Parquet: number of the row group; tar: byte offset of the first header
        ("first_row", np.int64),  # in the shard, for messages
        ("rows", np.int64),  # those that the filter keeps
        ("bytes", np.int64),  # of its images and columns, unfiltered
        ("kept_at", np.int64),  # where its row numbers begin in `ShardIndex.kept`
    ]
)

Source = str | os.PathLike | Sequence[str | os.PathLike]


# ---- index -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Index of a set of shards: a record per unit, the smallest piece that is read at once. No images.

    Attributes:
        name: What to call the set in messages.
        files: The shards, sorted by name within each folder.
        units: (n,) records of the type `UNIT`.
        columns: The columns that Parquet shards have besides `image`; None for tars, which do not say.
        kept: With a filter, (rows,) uint32: each kept row's number within its unit. None: every row is kept.
        image_root: As for `read_index`.
    """

    name: str
    files: tuple[Path, ...]
    units: np.ndarray
    columns: frozenset[str] | None
    kept: np.ndarray | None = None
    image_root: Path | None = None

    def __len__(self) -> int:
        """The rows of all units."""
        return int(self.units["rows"].sum())

    def fingerprint_rows(self) -> str:
        """Identifies the rows, wherever the shards lie: 16 hex digits, of their names, units and kept rows."""
        digest = hashlib.sha256(json.dumps([path.name for path in self.files]).encode())
        digest.update(self.units.tobytes())
        digest.update(b"" if self.kept is None else self.kept.tobytes())
        return digest.hexdigest()[:16]

    def read(self, unit: int, start: int, stop: int, columns: Sequence[str]) -> list[Row]:
        """The kept rows number `start` up to `stop` (excluded) of a unit, encoded; nothing else stays in memory."""
        record = self.units[unit]
        path = self.files[record["file"]]
        at = int(record["kept_at"])
        wanted = np.arange(start, stop) if self.kept is None else self.kept[at + start : at + stop].astype(np.int64)
        read = _read_tar_rows if path.suffix == ".tar" else _read_parquet_rows
        with _naming(path):
            rows = read(path, int(record["place"]), int(record["first_row"]), wanted, columns)
        if any(row.image is not None and row.image.get("bytes") is None for row in rows):
            check_paths(pa.array([row.image for row in rows], IMAGE), path.parent, str(path), self.image_root)
        return rows


class Row(NamedTuple):
    """A radiograph and what is known of it, nothing decoded."""

    id: str
    name: str  # for messages: shard, row and id
    image: dict | None  # `bytes` and `path`, as in the column `image`
    columns: dict[str, Any]
    problem: str | None = None


class _Scan(NamedTuple):
    """Contents of one shard."""

    units: list[tuple[int, int, int, int]]  # place, first row, kept rows, bytes
    kept: list[np.ndarray]  # for each unit, with a filter
    columns: set[str]


def read_index(
    source: Source, where: tuple[str, Any] | None = None, image_root: str | os.PathLike | None = None
) -> ShardIndex:
    """Find the units of Parquet shards (`*.parquet`) or WebDataset shards (`*.tar`), and count their rows.

    Parquet shards have a column `image` (a struct of `bytes` and `path`, as `datasets` writes it). In a tar,
    consecutive members whose names agree up to the first dot are one sample: `key.jpg` (or png, jpeg, dcm, dicom),
    and beside it `key.json` (its entries are the columns) and `key.cls` (the column `cls`). Samples without a picture
    are passed over.

    Args:
        source: A folder (its subfolders are not searched), a shard, or several of either.
        where: Only rows that hold this value in this column, as (column, value); an entry of the .json in a tar.
        image_root: Where files may lie that Parquet rows name; None: in the shard's folder.

    Raises:
        SpcxrError: nothing is there; a shard is damaged, compressed or cut short, or holds no images; no row has the
            value. The message names the file.
    """
    name, files = _find_shards(source)
    units: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    columns: set[str] = set()
    for number, path in enumerate(files):
        with _naming(path):
            scan = _scan_tar(path, where) if path.suffix == ".tar" else _scan_parquet(path, where)
        units.append(np.array([(number, *unit, 0) for unit in scan.units], UNIT))
        kept += scan.kept
        columns |= scan.columns
    if where is not None and where[0] not in columns:
        raise SpcxrError(f"{name}: no column {where[0]!r}; there are {', '.join(sorted(columns)) or 'none'}")
    records = np.concatenate(units)
    records["kept_at"] = np.cumsum(records["rows"]) - records["rows"]
    records = records[records["rows"] > 0]
    if not len(records):
        raise SpcxrError(f"{name}: no rows" if where is None else f"{name}: no row has {where[0]} = {where[1]!r}")
    known = frozenset(columns) if files[0].suffix == ".parquet" else None
    rows = None if where is None else np.concatenate(kept)
    return ShardIndex(name, tuple(files), records, known, rows, None if image_root is None else Path(image_root))


def _find_shards(source: Source) -> tuple[str, list[Path]]:
    """What to call the set, and its shards, all of one kind."""
    places = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(place) for place in source]
    files = [file for place in places for file in _shards_in(place)]
    name = str(places[0]) if len(places) == 1 else f"{len(places)} shards or folders"
    if len({file.suffix for file in files}) > 1:
        raise SpcxrError(f"{name}: Parquet and tar shards together; name those of one kind")
    if not files:
        raise SpcxrError("no shards: the list is empty")
    if len(set(files)) < len(files):
        raise SpcxrError(f"{name}: a shard is named twice")
    return name, files


def _shards_in(place: Path) -> list[Path]:
    if place.is_file():
        found = [place]
    elif place.is_dir():
        found = sorted(path for path in place.iterdir() if path.is_file())
        found = [path for path in found if path.name.lower().endswith((".parquet", ".tar", *COMPRESSED_SUFFIXES))]
    else:
        raise SpcxrError(f"{place}: no such file or folder")
    for path in found:
        if path.name.lower().endswith(COMPRESSED_SUFFIXES):
            raise SpcxrError(f"{path}: a compressed tar cannot be read from its middle; decompress it")
        if path.suffix not in (".parquet", ".tar"):
            raise SpcxrError(f"{path}: neither a Parquet (.parquet) nor a WebDataset (.tar) shard")
    if not found:
        raise SpcxrError(f"{place}: no Parquet (.parquet) and no WebDataset (.tar) shards in this folder")
    return found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what reading a shard raises into one line that names the shard."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SpcxrError(f"{path}: not a readable {path.suffix} shard ({one_line(error)})") from error


# ---- Parquet ---------------------------------------------------------------------------------------------------


def _scan_parquet(path: Path, where: tuple[str, Any] | None) -> _Scan:
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        image = schema.field("image").type if "image" in schema.names else None
        if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise SpcxrError(f"{path}: no column `image` with the bytes of a picture")
        units, kept, first_row = [], [], 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            size = group.total_byte_size  # of all columns: asked for one of them, pyarrow may end the process
            if group.num_rows > MAX_GROUP_ROWS:
                raise SpcxrError(f"{path}: row group {number} has {group.num_rows:,} rows; at most {MAX_GROUP_ROWS:,}")
            if size > LARGEST_ROW_GROUP:
                raise SpcxrError(
                    f"{path}: row group {number} holds {size / 2**30:.1f} GiB, which is too much to read at once; "
                    "write the shard with smaller row groups (row_group_size=256)"
                )
            rows = group.num_rows
            if where is not None:
                kept.append(_kept_rows(path, file, number, where))
                rows = len(kept[-1])
            units.append((number, first_row, rows, size))
            first_row += group.num_rows
    return _Scan(units, kept, set(schema.names) - {"image"})


def _kept_rows(path: Path, file: pq.ParquetFile, group: int, where: tuple[str, Any]) -> np.ndarray:
    """The numbers of the rows of a group that hold the value, uint32."""
    column, value = where
    if column not in file.schema_arrow.names:
        return np.empty(0, np.uint32)
    try:
        values = file.read_row_group(group, columns=[column], use_threads=False)[column]
        is_kept = pc.fill_null(pc.equal(values, pa.scalar(value)), False)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise SpcxrError(f"{path}: column {column!r} cannot be compared with {value!r}") from error
    return np.flatnonzero(is_kept.to_numpy()).astype(np.uint32)


def _read_parquet_rows(path: Path, group: int, first_row: int, wanted: np.ndarray, columns: Sequence[str]) -> list[Row]:
    """These rows of a row group, in this (ascending) order."""
    rows: list[Row] = []
    with pq.ParquetFile(path) as file:
        names = [name for name in dict.fromkeys(["image", "id", *columns]) if name in file.schema_arrow.names]
        done = 0
        for batch in file.iter_batches(PARQUET_BATCH, row_groups=[group], columns=names, use_threads=False):
            here = wanted[(wanted >= done) & (wanted < done + batch.num_rows)] - done
            for number, cells in zip(here + first_row + done, batch.take(pa.array(here)).to_pylist(), strict=True):
                key = str(cells["id"]) if cells.get("id") is not None else f"{path.name}:{number}"
                values = {column: cells.get(column) for column in columns}
                rows.append(Row(key, f"{path}: row {number}: {key}", cells["image"], values))
            done += batch.num_rows
    if len(rows) < len(wanted):
        raise SpcxrError(f"{path}: row group {group} has lost rows since the start")
    return rows


# ---- WebDataset ------------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """The members of one key, a picture among them."""

    key: str
    members: dict[str, tarfile.TarInfo]  # by extension, in lower case


def _scan_tar(path: Path, where: tuple[str, Any] | None) -> _Scan:
    with path.open("rb", buffering=0) as file:
        if file.read(8).startswith(COMPRESSED_STARTS):
            raise SpcxrError(f"{path}: a compressed tar cannot be read from its middle; decompress it")
        units, kept, columns, first_row = [], [], set(), 0
        for run in _runs(_samples(file, path, 0)):
            rows, size = len(run), sum(member.size for sample in run for member in sample.members.values())
            if where is not None:
                values = [_tar_columns(file, sample, f"{path}: {sample.key}") for sample in run]
                columns |= set().union(*values)
                matches = [where[0] in cells and cells[where[0]] == where[1] for cells in values]
                kept.append(np.flatnonzero(matches).astype(np.uint32))
                rows = len(kept[-1])
            first = next(iter(run[0].members.values()))
            units.append((first.offset, first_row, rows, size))
            first_row += len(run)
    if not first_row:
        raise SpcxrError(f"{path}: no pictures ({', '.join(sorted(IMAGE_EXTENSIONS))}) in this tar")
    return _Scan(units, kept, columns)


def _runs(samples: Iterable[_Sample]) -> Iterator[list[_Sample]]:
    """Consecutive samples, as many as make a unit."""
    run: list[_Sample] = []
    size = 0
    for sample in samples:
        run.append(sample)
        size += sum(member.size for member in sample.members.values())
        if len(run) == SAMPLES_PER_UNIT or size >= BYTES_PER_UNIT:
            yield run
            run, size = [], 0
    if run:
        yield run


def _samples(file: BinaryIO, path: Path, offset: int) -> Iterator[_Sample]:
    """The samples that have a picture, from the header at `offset` to the end."""
    named = ((*_split_name(as_text(member.name)), member) for member in _members(file, path, offset))
    visible = (entry for entry in named if entry[0] and not entry[0].endswith("/"))  # some systems add `._key.jpg`
    for key, group in itertools.groupby(visible, key=lambda entry: entry[0]):
        members: dict[str, tarfile.TarInfo] = {}
        for _, extension, member in group:
            if extension in members:
                raise SpcxrError(f"{path}: two members in a row are called {as_text(member.name)}")
            members[extension] = member
        pictures = members.keys() & IMAGE_EXTENSIONS
        if len(pictures) > 1:
            raise SpcxrError(f"{path}: sample {key} has several pictures ({', '.join(sorted(pictures))})")
        if pictures:
            yield _Sample(key, members)


def _split_name(name: str) -> tuple[str, str]:
    """A member's name -> (key, extension): its folder and its name up to the first dot; the rest in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _members(file: BinaryIO, path: Path, offset: int) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar from the header at this byte on, by their headers alone.

    `tarfile` takes a damaged header for the end of the archive: whether the end marker is there is checked here.
    """
    end = file.seek(0, os.SEEK_END)
    at = file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or all are kept
                if member.size < 0 or tar.offset <= at:
                    raise SpcxrError(f"{path}: not a tar, or damaged: no header at byte {at}")
                if member.offset_data + member.size > end:
                    raise SpcxrError(f"{path}: the tar is cut short, within the member at byte {at}")
                at = tar.offset
                if member.type in REGULAR_FILES:
                    yield member
    except SpcxrError:
        raise
    except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError):
        pass  # no header there, as is found below
    file.seek(at)
    if (block := file.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
        if len(block) < tarfile.BLOCKSIZE:
            raise SpcxrError(f"{path}: the tar is cut short, it ends at byte {at + len(block)} without an end marker")
        raise SpcxrError(f"{path}: not a tar, or damaged: no header at byte {at}")


def _read_member(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _tar_columns(file: BinaryIO, sample: _Sample, name: str) -> dict[str, Any]:
    """The entries of a sample's .json, and its class from .cls."""
    columns: dict[str, Any] = {}
    if "json" in sample.members:
        try:
            columns = json.loads(_read_member(file, sample.members["json"]))
        except ValueError as error:
            raise SpcxrError(f"{name}: its .json cannot be read ({error})") from error
        if not isinstance(columns, dict):
            raise SpcxrError(f"{name}: its .json is no object with a value per column")
    if "cls" in sample.members:
        try:
            columns["cls"] = int(_read_member(file, sample.members["cls"]))
        except ValueError as error:
            raise SpcxrError(f"{name}: its .cls is not the number of a class") from error
    return columns


def _read_tar_rows(path: Path, offset: int, first_row: int, wanted: np.ndarray, columns: Sequence[str]) -> list[Row]:
    """These samples of the run at a byte offset, in this (ascending) order; the data of others are not read."""
    rows: list[Row] = []
    numbers = {int(number) for number in wanted}
    with path.open("rb", buffering=0) as file:
        for number, sample in enumerate(itertools.islice(_samples(file, path, offset), max(numbers, default=-1) + 1)):
            if number not in numbers:
                continue
            (picture,) = (sample.members[extension] for extension in sample.members.keys() & IMAGE_EXTENSIONS)
            name = f"{path}: row {first_row + number}: {as_text(picture.name)}"
            values, problem = {}, None
            try:
                values = _tar_columns(file, sample, name) if columns else {}
            except SpcxrError as error:
                problem = str(error)
            image = {"bytes": _read_member(file, picture), "path": None}
            rows.append(Row(sample.key, name, image, {column: values.get(column) for column in columns}, problem))
    if len(rows) < len(numbers):
        raise SpcxrError(f"{path}: the tar has lost samples since the start")
    return rows
