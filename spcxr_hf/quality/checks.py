"""What the scripts' command lines say of their set: rows to leave out, broken files, leaks of the split.

read_rows -> read_set, less the rows of `exclude`
check_split -> refuse_leaks, with the way out
Skipped -> skipped.csv
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from spcxr_hf.data.archives.registry import read_set
from spcxr_hf.data.table import OnError, RadiographTable, fingerprint
from spcxr_hf.errors import SpcxrError
from spcxr_hf.quality.duplicates import SAME_IMAGE, LeakError, Leaks, refuse_leaks

SKIPPED_FILE = "skipped.csv"
Processes: TypeAlias = Accelerator | PartialState | None  # None: this process is alone


@dataclass
class SetArguments:
    """What the command lines of all scripts say of their set."""

    exclude: str | None = field(
        default=None,
        metadata={
            "help": "text file of ids to leave out, one a line, as copies of held-out images (check_leaks.py); "
            "by default, or empty, none"
        },
    )
    on_error: OnError = field(
        default="stop",
        metadata={"help": "a broken file: stop ends the run, skip leaves it out and lists it in skipped.csv beside the "
                  "results; a set that is more than half broken stops in any case"},
    )  # fmt: skip


@dataclass
class SplitArguments(SetArguments):
    """What the command lines of scripts that learn from one side of a split say besides."""

    allow_leaks: Leaks = field(
        default="no",
        metadata={"help": "go on although the split leaks: no (the default), patients (one may be on several sides), "
                  "images (nearly the same one may; they are not compared then) or all"},
    )  # fmt: skip


# ---- rows --------------------------------------------------------------------------------------------------------


def read_rows(source: str, exclude: str | os.PathLike | None = None) -> RadiographTable:
    """A set (whatever `read_set` takes) without the rows whose ids a file lists; None or "" is no such file.

    Raises:
        SpcxrError: it cannot be read, or the list is of another set.
    """
    table = read_set(source)
    return table.without(read_ids(exclude)) if exclude else table


def for_pretraining(table: RadiographTable) -> RadiographTable:
    """The rows whose column `pretrain` is true.

    Raises:
        SpcxrError: there is no such column, or no such row.
    """
    if "pretrain" not in table.rows.column_names:
        raise SpcxrError(f"{table.name}: no column 'pretrain'; --pretrain_only false takes every row")
    return table.where("pretrain", True)


def read_ids(path: str | os.PathLike) -> set[str]:
    """The ids in a text file, one a line; a line that begins with `#` is a comment.

    Raises:
        SpcxrError: the file cannot be read, or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpcxrError(f"{path}: no list of ids ({getattr(error, 'strerror', None) or error})") from error
    ids = {name for line in lines if (name := line.strip()) and not name.startswith("#")}
    if not ids:
        raise SpcxrError(f"{path}: holds no ids")
    return ids


def write_ids(path: str | os.PathLike, ids: Sequence[str], comment: str) -> None:
    """Write a file for `read_ids`: a comment, then the ids, sorted.

    Raises:
        SpcxrError: it cannot be written, or `read_ids` would not read an id as it is.
    """
    odd = [name for name in ids if name.startswith("#") or name.splitlines() != [name.strip()]]
    if odd:
        raise SpcxrError(f"{path}: cannot hold the id {odd[0]!r}: it begins with #, is empty or has blanks around it")
    try:
        Path(path).write_text("\n".join([f"# {comment}", *sorted(ids)]) + "\n", encoding="utf-8")
    except OSError as error:
        raise SpcxrError(f"{path}: cannot be written ({error.strerror})") from error


def sketch(rows: Iterable[Any]) -> list[str]:
    """Sixteen short hashes by which a set is known again though some of its rows come or go (MinHash, Broder 1997).

    Args:
        rows: What is learned of each row, its id first; anything that JSON holds.
    """
    return sorted({hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12] for row in rows})[:16]


# ---- leaks -------------------------------------------------------------------------------------------------------


def check_split(
    table: RadiographTable,
    split_column: str,
    allow: Leaks = "no",
    sides: Sequence[str] | None = None,
    processes: Processes = None,
    cache: str | os.PathLike | None = None,
) -> None:
    """Refuse a split that leaks; the first of several processes looks, the others hear of it.

    Images of held-out sides are opened for this alone. One that is broken is like no other.

    Args:
        allow: What `refuse_leaks` takes; where images may leak, they are not compared.
        sides: The splits in use; by default all values of the column.
        processes: Those that were started together.
        cache: A folder to keep the verdict in where no image leaks, so that the next start need not compare them.

    Raises:
        SpcxrError: the split leaks; the message says how, and the way out.
    """
    told: list[str | None] = [None]
    if processes is None or processes.is_main_process:
        try:
            _compare(table, split_column, allow, sides, cache)
        except LeakError as error:
            told = [f"{error}; {_way_out(error, split_column)}"]
        except SpcxrError as error:
            told = [str(error)]
    if processes is not None and processes.num_processes > 1:
        broadcast_object_list(told)
    if told[0] is not None:
        raise SpcxrError(told[0])


def _compare(
    table: RadiographTable,
    split_column: str,
    allow: Leaks,
    sides: Sequence[str] | None,
    cache: str | os.PathLike | None,
) -> None:
    images, verdict = allow not in ("images", "all"), None
    if images and cache is not None:
        wanted = json.dumps([table.column(split_column), sides, SAME_IMAGE], default=str)
        verdict = Path(cache) / f"{fingerprint(table)}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.no_leak"
        images = not verdict.is_file()
    refuse_leaks(table, split_column, sides, allow=allow, images=images)
    if images and verdict is not None:
        verdict.parent.mkdir(parents=True, exist_ok=True)
        verdict.touch()


def _way_out(error: LeakError, split_column: str) -> str:
    kinds = [name for name in ("patients", "images") if getattr(error.report, name)]
    ways = [f"--allow_leaks {'all' if len(kinds) > 1 else kinds[0]} goes on all the same"]
    if "images" in kinds:
        write = f"check_leaks.py --copies_of {split_column} --copies_list FILE"
        ways.insert(0, f"--exclude FILE leaves copies out ({write} writes them)")
    else:
        ways.insert(0, "split by patient (spcxr_hf.quality.splits), or leave rows out with --exclude FILE")
    return "; ".join(ways)


# ---- broken files ------------------------------------------------------------------------------------------------


def list_skipped(folder: str | os.PathLike, skipped: Mapping[str, str], processes: Processes = None) -> None:
    """Write what was skipped, id and cause, to `skipped.csv` in a folder; all processes call it.

    Those that stand there from an earlier start are kept. Without any, nothing is written.

    Args:
        folder: The run's output.
        skipped: Id -> cause, of this process.
        processes: Those that were started together.

    Raises:
        SpcxrError: the file cannot be written.
    """
    together = processes is not None and processes.num_processes > 1
    shares = gather_object([dict(skipped)]) if together else [dict(skipped)]
    found = {name: cause for share in shares for name, cause in share.items()}
    if not found or (processes is not None and not processes.is_main_process):
        return
    path = Path(folder) / SKIPPED_FILE
    known = read_skipped(path)
    if found.keys() <= known.keys():
        return
    rows = sorted({**known, **found}.items())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "cause"), *rows])
    except OSError as error:
        raise SpcxrError(f"{path}: cannot be written ({error.strerror})") from error


def tell_skipped(folder: str | os.PathLike) -> None:
    """The last line of a run that skipped broken files."""
    path = Path(folder) / SKIPPED_FILE
    if skipped := read_skipped(path):
        print(f"skipped {len(skipped)} broken files, listed in {path}")


def report_skipped(output: str | os.PathLike | None, skipped: Mapping[str, str]) -> None:
    """For a script whose results are one file: `skipped.csv` beside it, or lines where there is no such file."""
    if output is not None:
        list_skipped(Path(output).parent, skipped)
        tell_skipped(Path(output).parent)
        return
    for name, cause in skipped.items():
        print(f"skipped {name}: {cause}")


def read_skipped(path: Path) -> dict[str, str]:
    """Id -> cause in a `skipped.csv`; nothing where there is none."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["id"]: row["cause"] for row in csv.DictReader(file)}
