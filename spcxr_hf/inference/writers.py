"""Writers of records: table, JSON Lines, CSV, Parquet; vectors as safetensors. Files are valid after an interruption.

choose_format -> open_writer -> _JsonLines, _Csv       a line at a time, appended
                             -> _Parquet, _Vectors     beside the target, which they replace when they are closed
                             -> _Table                 to read
finished                                               the paths that an earlier run has written

A record is a dict with a `path`, of texts, numbers, lists and dicts of them. JSON Lines keeps it as it is; CSV and
Parquet have a column for each number or text in it, `probabilities.normal` for instance.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from spcxr_hf.errors import SpcxrError, printable
from spcxr_hf.files import RESEARCH_NOTICE, atomic_file, os_errors

FORMATS = {".txt": "table", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet",
           ".safetensors": "safetensors"}  # fmt: skip
FILES_ONLY = ("parquet", "safetensors")
ROW_GROUP = 1024  # records of a Parquet row group
TABLE_ROWS = 500  # records that a table collects before it is printed
HIDDEN_IN_TABLES = ("model", "population", "note", "operating_point")  # below the table: the same for every record
SPEAK_FOR_THEMSELVES = ("probabilities", "fills")  # of these a column is called by its part alone
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
TEXTS = ("label", "decision", "operating_point")  # what may be None in every record
LONGEST_WORD = 20  # characters of a table's word that stay together

Record = Mapping[str, Any]


class Writer(Protocol):
    """Takes records until it is closed."""

    def write(self, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


# ---- where and how -----------------------------------------------------------------------------------------------


def choose_format(output: Path | None, stated: str | None = None, is_terminal: bool = False) -> str:
    """The format by what was stated, else by the suffix, else a table in a terminal and JSON Lines in a pipe."""
    known = list(dict.fromkeys(FORMATS.values()))
    if stated is not None and stated not in known:
        raise SpcxrError(f"no format {stated!r}; there are {', '.join(known)}")
    chosen = stated or (FORMATS.get(output.suffix.lower()) if output else "table" if is_terminal else "jsonl")
    if chosen is None:
        raise SpcxrError(f"{output}: the suffix names no format ({', '.join(FORMATS)}); give --format")
    if chosen in FILES_ONLY and output is None:
        raise SpcxrError(f"{chosen} is written to a file: give --output FILE")
    return chosen


def check_output(output: Path | None, resume: bool, overwrite: bool) -> None:
    """Check the output before any work: that it can be written and destroys nothing.

    Raises:
        SpcxrError: the folder is missing, or the file exists and neither `resume` nor `overwrite` is set.
    """
    if resume and overwrite:
        raise SpcxrError("--resume keeps what is there and --overwrite does not: give one of them")
    if resume and output is None:
        raise SpcxrError("--resume continues a file: give --output FILE")
    if output is None:
        return
    if output.is_dir():
        raise SpcxrError(f"{output}: a folder, and a file is needed")
    if not output.absolute().parent.is_dir():
        raise SpcxrError(f"{output}: no such folder to write it to")
    if not os.access(output if output.exists() else output.absolute().parent, os.W_OK):
        raise SpcxrError(f"{output}: may not be written")
    if output.exists() and not (resume or overwrite):
        raise SpcxrError(f"{output}: already exists; --resume continues it, --overwrite replaces it")


@contextmanager
def open_writer(output: Path | None, kind: str, resume: bool = False) -> Iterator[Writer]:
    """A writer of one of the formats, to a file or to standard output, closed at the end, also of an interrupted run.

    Args:
        output: The file; None is standard output.
        kind: What `choose_format` says.
        resume: Go on with the file where it exists; otherwise it is replaced.
    """
    with os_errors(output):
        writer = _writer(output, kind, resume)
        try:
            yield writer
        finally:
            writer.close()


def _writer(output: Path | None, kind: str, resume: bool) -> Writer:
    if kind in FILES_ONLY:
        assert output is not None
        return _Parquet(output, resume) if kind == "parquet" else _Vectors(output, resume)
    if output is None:
        stream: IO[str] = sys.stdout
    else:
        if resume and output.exists():
            _cut_to_whole_lines(output)
        stream = output.open("a" if resume else "w", encoding="utf-8", newline="")
    kinds: dict[str, Any] = {"jsonl": _JsonLines, "csv": _Csv, "table": _Table}
    return kinds[kind](stream, output)


# ---- a line a record ---------------------------------------------------------------------------------------------


class _Lines:
    """What the formats of text share: `stream` is standard output where `output` is None, and then stays open."""

    def __init__(self, stream: IO[str], output: Path | None) -> None:
        self.stream, self.output = stream, output

    def close(self) -> None:
        self.stream.flush()
        if self.output is not None:
            self.stream.close()


class _JsonLines(_Lines):
    def write(self, records: Sequence[Record]) -> None:
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        self.stream.write("".join(lines))
        self.stream.flush()


class _Csv(_Lines):
    def __init__(self, stream: IO[str], output: Path | None) -> None:
        super().__init__(stream, output)
        self.columns = _csv_header(output) if output is not None and output.stat().st_size else None

    def write(self, records: Sequence[Record]) -> None:
        writer = csv.writer(self.stream, lineterminator="\n")
        show = printable if self.stream.isatty() else str
        for record in records:
            row = flatten(record)
            if self.columns is None:
                self.columns = list(row)
                writer.writerow([show(no_formula(name)) for name in self.columns])
            _check_columns(self.output, self.columns, row)
            writer.writerow([show(_csv_cell(row[name])) for name in self.columns])
        self.stream.flush()


def flatten(record: Record, prefix: str = "") -> dict[str, Any]:
    """Dicts inside a record become columns: `{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    row: dict[str, Any] = {}
    for name, value in record.items():
        row |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return row


def _csv_cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return json.dumps(value) if value and not isinstance(value[0], str) else no_formula("; ".join(value))
    return "" if value is None else no_formula(value) if isinstance(value, str) else str(value)


def no_formula(cell: str) -> str:
    """Prefix formulas of spreadsheets with an apostrophe (OWASP, "CSV Injection")."""
    return f"'{cell}" if cell.startswith((*FORMULA_STARTS, "'")) else cell


def from_cell(cell: str) -> str:
    """The cell that `no_formula` was given."""
    return cell.removeprefix("'")


def _csv_header(output: Path) -> list[str]:
    with output.open(encoding="utf-8", newline="") as stream:
        return list(map(from_cell, next(csv.reader(stream), [])))


def _check_columns(output: Path | None, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    if set(columns) != row.keys():
        raise SpcxrError(f"{output or 'standard output'}: has other columns, so another model or task wrote it")


def _cut_to_whole_lines(output: Path) -> None:
    """Remove a last line that a killed run did not finish: what follows the last line end outside quotation marks."""
    content = output.read_bytes()
    end = content.rfind(b"\n") + 1
    if output.suffix.lower() == ".csv":
        while end and content.count(b'"', 0, end) % 2:
            end = content.rfind(b"\n", 0, end - 1) + 1
    if end < len(content):
        os.truncate(output, end)


# ---- Parquet and safetensors -------------------------------------------------------------------------------------


class _Parquet:
    """Row groups beside the target, which is replaced when the writer is closed; the rows that are there come first."""

    def __init__(self, output: Path, resume: bool) -> None:
        self.output, self.rows = output, list[dict[str, Any]]()
        self.stack = ExitStack()
        self.file: Any = None
        self.earlier = output if resume and output.exists() else None

    def write(self, records: Sequence[Record]) -> None:
        self.rows += [flatten(record) for record in records]
        if len(self.rows) >= ROW_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa

        if self.file is None:
            self._open(self.rows)
        for row in self.rows:
            _check_columns(self.output, self.file.schema.names, row)
        self.file.write_table(pa.Table.from_pylist(self.rows, schema=self.file.schema))
        self.rows = []

    def _open(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow.parquet as pq

        earlier = _open_parquet(self.earlier) if self.earlier else None
        schema = earlier.schema_arrow if earlier else _schema(rows)
        partial = self.stack.enter_context(atomic_file(self.output))
        self.file = self.stack.enter_context(pq.ParquetWriter(partial, schema))
        if earlier:
            for batch in earlier.iter_batches(ROW_GROUP):
                self.file.write_batch(batch)
            earlier.close()

    def close(self) -> None:
        with self.stack:
            if self.rows:
                self._write_group()


def _schema(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A column's type follows its first value; one without values holds texts where its name is one of `TEXTS`."""
    import pyarrow as pa

    def kind(name: str) -> Any:
        value = next((row[name] for row in rows if row[name] is not None), "" if name.endswith(TEXTS) else 0.0)
        if isinstance(value, list | tuple):
            return pa.list_(pa.float32() if value and not isinstance(value[0], str) else pa.string())
        return {float: pa.float64(), int: pa.int64(), bool: pa.bool_()}.get(type(value), pa.string())

    return pa.schema([(name, kind(name)) for name in rows[0]], metadata={"note": RESEARCH_NOTICE})


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise SpcxrError(f"{path}: not a readable Parquet file ({error})") from error


class _Vectors:
    """`embeddings` (n, D) float32; the rows' other fields are JSON in the metadata. In memory until it is closed."""

    def __init__(self, output: Path, resume: bool) -> None:
        self.output = output
        self.vectors: list[np.ndarray] = []
        self.columns: dict[str, list] = {"path": [], "model": [], "warnings": []}
        self.has_new = False
        if resume and output.exists():
            metadata, vectors = _read_vectors(output)
            self.vectors = list(vectors)
            self.columns = {name: json.loads(metadata[name]) for name in self.columns}

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            if "embedding" not in record:
                raise SpcxrError(f"{self.output}: safetensors hold embeddings, and this task has none")
            self.vectors.append(np.asarray(record["embedding"], dtype=np.float32))
            for name, values in self.columns.items():
                values.append(record[name])
            self.has_new = True

    def close(self) -> None:
        from safetensors.numpy import save_file

        if self.has_new:
            metadata = {"note": RESEARCH_NOTICE, **{name: json.dumps(values) for name, values in self.columns.items()}}
            with atomic_file(self.output) as partial:
                save_file({"embeddings": np.stack(self.vectors)}, partial, metadata=metadata)


def _read_vectors(path: Path) -> tuple[dict[str, str], np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if not {"path", "model", "warnings"} <= metadata.keys():
                raise SpcxrError(f"{path}: not written by spcxr embed; --resume cannot continue it")
            return metadata, file.get_tensor("embeddings")
    except SafetensorError as error:
        raise SpcxrError(f"{path}: not a readable safetensors file ({error})") from error


# ---- tables -------------------------------------------------------------------------------------------------


class _Table(_Lines):
    """A rich table; it needs the width of its columns before it can be printed, so records are collected."""

    def __init__(self, stream: IO[str], output: Path | None) -> None:
        super().__init__(stream, output)
        self.rows: list[dict[str, str]] = []
        self.caption = RESEARCH_NOTICE

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self.rows.append(table_row(record))
            self.caption = caption_of(record)
        if len(self.rows) >= TABLE_ROWS:
            self._print()

    def _print(self) -> None:
        from rich.console import Console

        console = Console(
            file=self.stream, width=None if self.stream.isatty() else 240, highlight=False, markup=False, emoji=False
        )
        columns = {name: [row.get(name, "") for row in self.rows] for row in self.rows for name in row}
        if _least_width(columns) <= console.width:
            console.print(_grid(columns, self.caption))
        else:  # too narrow for the columns side by side: a paragraph for each record
            console.print("\n\n".join([*map(_paragraph, self.rows), self.caption]), soft_wrap=True)
        self.rows = []

    def close(self) -> None:
        if self.rows:
            self._print()
        super().close()


def _grid(columns: Mapping[str, Sequence[str]], caption: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text(caption))
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _least_width(columns: Mapping[str, Sequence[str]]) -> int:
    """That a table can be read at: words stay whole, but for long ones, as those of paths, which are folded."""
    words = [max((len(word) for cell in (name, *cells) for word in cell.split()), default=0)
             for name, cells in columns.items()]  # fmt: skip
    return sum(min(longest, LONGEST_WORD) + 3 for longest in words) + 1


def _paragraph(row: Mapping[str, str]) -> str:
    """The first cell, the path, then a line for each other."""
    first, *others = row.items()
    return "\n".join([first[1], *(f"  {name}: {cell}" for name, cell in others if cell)])


def caption_of(record: Record) -> str:
    """Caption of a table: the model, its intended population, the operating point, the notice."""
    said = [str(record["model"])] if record.get("model") else []
    said += [f"made for {record['population']}"] if record.get("population") else []
    said += [f"operating point {record['operating_point']}"] if record.get("operating_point") else []
    return printable("; ".join([*said, RESEARCH_NOTICE]))


def table_row(record: Record) -> dict[str, str]:
    """A record as a few short texts by column: a dict as one cell for each part, of the targets the
    first alone, the verdict."""
    row: dict[str, str] = {}
    for name, value in record.items():
        if name in HIDDEN_IN_TABLES or value is None or value == []:
            continue
        if isinstance(value, Mapping):
            prefix = "verdict " if name == "targets" else "" if name in SPEAK_FOR_THEMSELVES else f"{name} "
            parts = list(value.items())[: 1 if name == "targets" else None]
            for part, cell in parts:
                row[printable(f"{prefix}{part}")] = _cell(cell)
        else:
            row[name] = _cell(value)
    return row


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        if value.keys() == {"probability", "decision", "threshold"}:
            if value["probability"] is None:
                return "no answer"
            return f"{value['probability']:.3f} ({value['decision']} {value['threshold']:.3f})"
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        if value and not isinstance(value[0], str):
            return f"{len(value)} values, L2 norm {float(np.linalg.norm(value)):.3f}"
        return "; ".join(map(printable, value))
    return printable(str(value))


# ---- what an earlier run has written -----------------------------------------------------------------------------


def finished(output: Path | None, kind: str, model: str) -> set[str]:
    """The paths of the records in a file that an earlier run with the same model has written."""
    if output is None or not output.exists():
        return set()
    if kind == "table":
        raise SpcxrError(f"{output}: --resume cannot read tables; choose another format")
    readers = {"jsonl": _read_json_lines, "csv": _read_csv, "parquet": _read_parquet, "safetensors": _read_paths}
    found: set[str] = set()
    with os_errors(output):
        for path, its_model in readers[kind](output):
            if its_model != model:
                raise SpcxrError(f"{output}: holds records of the model {its_model}, this run's is {model}")
            found.add(path)
    return found


def _read_json_lines(output: Path) -> Iterator[tuple[str, str]]:
    _cut_to_whole_lines(output)
    with output.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                record = json.loads(line)
                yield record["path"], record["model"]
            except (ValueError, KeyError, TypeError) as error:
                raise SpcxrError(f"{output}, line {number}: no record of spcxr") from error


def _read_csv(output: Path) -> Iterator[tuple[str, str]]:
    _cut_to_whole_lines(output)
    with output.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if not {"path", "model"} <= row.keys():
                raise SpcxrError(f"{output}: no records of spcxr, the columns path and model are missing")
            yield from_cell(row["path"]), from_cell(row["model"])


def _read_parquet(output: Path) -> Iterator[tuple[str, str]]:
    with _open_parquet(output) as file:
        if not {"path", "model"} <= set(file.schema_arrow.names):
            raise SpcxrError(f"{output}: no records of spcxr, the columns path and model are missing")
        for batch in file.iter_batches(columns=["path", "model"]):
            yield from zip(batch["path"].to_pylist(), batch["model"].to_pylist(), strict=True)


def _read_paths(output: Path) -> Iterator[tuple[str, str]]:
    metadata, _ = _read_vectors(output)
    yield from zip(json.loads(metadata["path"]), json.loads(metadata["model"]), strict=True)
