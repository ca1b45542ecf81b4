"""Checks of a data set shared by the training scripts: excluded rows, broken files, split leakage.

check_split -> refuse_leaks, with the way out
write_skipped -> skipped.csv
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from spcxr_hf.data.table import OnError, RadiographTable, cache_key
from spcxr_hf.errors import SpcxrError, printable
from spcxr_hf.files import atomic_file
from spcxr_hf.quality.duplicates import SAME_IMAGE, LeakError, Leaks, refuse_leaks

SKIPPED_FILE = "skipped.csv"
WITHOUT_PRETRAIN = "--splits train takes the rows of a split, --pretrain-only false every row"
Processes: TypeAlias = Accelerator | PartialState | None  # None: a single process


@dataclass
class SetArguments:
    """Dataset arguments shared by the training scripts."""

    exclude: str | None = field(
        default=None,
        metadata={
            "help": "text file of ids to leave out, one a line, as copies of held-out images "
            "(spcxr audit --copies-list); by default, or empty, none"
        },
    )
    on_error: OnError = field(
        default="stop",
        metadata={"help": "a broken file: stop ends the run, skip leaves it out and lists it in skipped.csv beside the "
                  "results; a set that is more than half broken stops in any case"},
    )  # fmt: skip
    read_as: str | None = field(
        default=None,
        metadata={"help": "what the data's folder is, where it is not recognised: folder, classes, pictures, or the "
                  "name of a public archive"},
    )  # fmt: skip
    image_root: str | None = field(
        default=None,
        metadata={"help": "folder below which the files may lie that a table names; by default the table's own folder"},
    )


@dataclass
class SplitArguments(SetArguments):
    """Split arguments of the scripts that train on one side of a split."""

    allow_leaks: Leaks = field(
        default="no",
        metadata={"help": "train although the split leaks: no (the default), patients (one may be on several sides), "
                  "images (nearly the same one may; they are not compared then) or all"},
    )  # fmt: skip


# ---- rows --------------------------------------------------------------------------------------------------------


def for_pretraining(table: RadiographTable, splits: Sequence[str] = (), split_column: str = "split") -> RadiographTable:
    """The rows of these splits; without any, the rows whose column `pretrain` is true."""
    if splits:
        return table.where_any(split_column, splits)
    if "pretrain" not in table.rows.column_names:
        raise SpcxrError(f"{table.name}: no column 'pretrain'; {WITHOUT_PRETRAIN}")
    return table.where("pretrain", True)


# ---- leaks -------------------------------------------------------------------------------------------------------


def check_split(
    table: RadiographTable,
    split_column: str,
    allow: Leaks = "no",
    sides: Sequence[str] | None = None,
    processes: Processes = None,
    cache: str | os.PathLike | None = None,
) -> None:
    """Refuse a split that leaks; the first of several processes checks and broadcasts the result.

    Args:
        allow: As for `refuse_leaks`; where images may leak, they are not compared.
        sides: The splits in use; by default all values of the column.
        cache: A folder to keep the verdict in where no image leaks, so that the next start need not compare them.

    Raises:
        SpcxrError: the split leaks; the message says how, and the way out.
    """
    message: list[str | None] = [None]
    if processes is None or processes.is_main_process:
        try:
            _compare(table, split_column, allow, sides, cache)
        except LeakError as error:
            message = [f"{error}; {_way_out(error, split_column)}"]
        except SpcxrError as error:
            message = [str(error)]
    if processes is not None and processes.num_processes > 1:
        broadcast_object_list(message)
    if message[0] is not None:
        raise SpcxrError(message[0])


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
        verdict = Path(cache) / f"{cache_key(table)}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.no_leak"
        images = not verdict.is_file()
    refuse_leaks(table, split_column, sides, allow=allow, images=images)
    if images and verdict is not None:
        verdict.parent.mkdir(parents=True, exist_ok=True)
        verdict.touch()


def _way_out(error: LeakError, split_column: str) -> str:
    kinds = [name for name in ("patients", "images") if getattr(error.report, name)]
    ways = [f"--allow_leaks {'all' if len(kinds) > 1 else kinds[0]} continues anyway"]
    if "images" in kinds:
        write = f"spcxr audit SET --split {split_column} --copies-list FILE"
        ways.insert(0, f"--exclude FILE leaves copies out ({write} writes them)")
    else:
        ways.insert(0, "split by patient (spcxr_hf.quality.splits), or leave rows out with --exclude FILE")
    return "; ".join(ways)


# ---- broken files ------------------------------------------------------------------------------------------------


def write_skipped(target: str | os.PathLike | None, skipped: Mapping[str, str], processes: Processes = None) -> None:
    """Write the id and cause of each broken file to `skipped.csv`, and print one line; all processes call it.

    Rows of an earlier start are kept. Without any broken file nothing is written.

    Args:
        target: The folder of a run, or a results file beside which it goes; None: the files are printed.
        skipped: Id -> cause, of this process.
    """
    together = processes is not None and processes.num_processes > 1
    shares = gather_object([dict(skipped)]) if together else [dict(skipped)]
    found = {name: cause for share in shares for name, cause in share.items()}
    if not found or (processes is not None and not processes.is_main_process):
        return
    if target is None:
        for name, cause in found.items():
            print(f"skipped {printable(name)}: {printable(cause)}")
        return
    folder = Path(target) if Path(target).is_dir() else Path(target).parent
    path, known = folder / SKIPPED_FILE, {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            known = {row["id"]: row["cause"] for row in csv.DictReader(file)}
    rows = sorted({**known, **found}.items())
    if not found.keys() <= known.keys():
        with atomic_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "cause"), *rows])
    print(f"skipped {len(rows)} broken files, listed in {path}")
