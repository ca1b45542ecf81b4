"""Write a screening set of adults from two sources that hold both classes: NIH and RSNA.

    python training_scripts/screening_set.py --nih ../shared/data --rsna ../shared/rsna_jsrt --output runs/screening_set

A head that learns from a source in which the classes differ in more than the disease learns that difference. So a
source enters only with normal and abnormal films of its own. The set has the columns of the sources and three more:

- `screening`, a struct: `abnormal` (any finding) and `opacity`. Opacity is not known of NIH's abnormal films.
- `screening_split`: train; val (RSNA in the processing `rsna_thorax`, what models are chosen by); and for the report
  test (`rsna_thorax`), nih_val, nih_test, and shift (`rsna_1024`, the same archive in another processing).
- `opacity_split`, the same without films of another abnormality: opacity against normal.

`--train rsna_thorax` leaves the other source out of the training, for the figure on a source never seen.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import pyarrow as pa
import pyarrow.parquet as pq

from spcxr_hf import SpcxrError
from spcxr_hf.data.table import RadiographTable, join_tables, read_table
from spcxr_hf.files import atomic_file
from spcxr_hf.training.arguments import parse_arguments, run_script

LABELS = pa.struct([("abnormal", pa.bool_()), ("opacity", pa.bool_())])
RSNA_LABELS = {
    "normal": {"abnormal": False, "opacity": False},
    "opacity": {"abnormal": True, "opacity": True},
    "other abnormal": {"abnormal": True, "opacity": False},
}
NIH_SPLITS = {"train": "train", "val": "nih_val", "test": "nih_test"}
COLUMNS = ("image", "id", "source", "patient", "view", "licence", "licence_class")


@dataclass
class Arguments:
    """Write the set for screening."""

    nih: str = field(metadata={"help": "Parquet shards with the columns `findings` and `findings_split`"})
    rsna: str = field(metadata={"help": "Parquet shards with the columns `rsna_label` and `rsna_split`"})
    output: str = field(metadata={"help": "folder for `screening.parquet`"})
    train: list[str] = field(
        default_factory=lambda: ["nih", "rsna_thorax"], metadata={"help": "sources whose rows train are kept"}
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    nih, rsna = read_table(arguments.nih), read_table(arguments.rsna)
    table = join_tables(
        [
            labelled(nih, "findings_split", nih.column("findings"), nih_labels, NIH_SPLITS),
            labelled(rsna, "rsna_split", rsna.column("rsna_label"), RSNA_LABELS.__getitem__, {}),
        ]
    )
    known = set(table.column("source"))
    if unknown := sorted(set(arguments.train) - known):
        raise SpcxrError(f"--train: no rows of the source {unknown[0]!r}; there are {', '.join(sorted(known))}")
    rows = zip(table.column("source"), table.column("screening_split"), strict=True)
    kept = [split != "train" or source in arguments.train for source, split in rows]
    table = RadiographTable(table.rows.filter(pa.array(kept)), table.name)
    with atomic_file(Path(arguments.output) / "screening.parquet") as path:
        pq.write_table(table.rows, path)
    describe(table)


def labelled(table: RadiographTable, split_column: str, cells: list, labels_of: Any, names: dict) -> RadiographTable:
    """The rows of a split, with their labels and the split's name in this set."""
    splits = table.column(split_column)
    kept = [split is not None for split in splits]
    columns = [name for name in COLUMNS if name in table.rows.column_names]
    rows = table.rows.select(columns).filter(pa.array(kept))
    labels = [labels_of(cell) for cell, keep in zip(cells, kept, strict=True) if keep]
    rows = rows.append_column("screening", pa.array(labels, LABELS))
    own = [names.get(split, split) for split in splits if split is not None]
    rows = rows.append_column("screening_split", pa.array(own))
    clear = [label["opacity"] is not None and label["abnormal"] == label["opacity"] for label in labels]
    opacity = [split if keep else None for split, keep in zip(own, clear, strict=True)]
    return RadiographTable(rows.append_column("opacity_split", pa.array(opacity, pa.string())), table.name)


def nih_labels(findings: list[str]) -> dict[str, bool | None]:
    """NIH names no opacity: of a film with findings it is not known."""
    return {"abnormal": bool(findings), "opacity": None if findings else False}


def describe(table: RadiographTable) -> None:
    """Print how many rows of each kind the set holds."""
    rows = zip(table.column("screening_split"), table.column("source"), table.column("screening"), strict=True)
    counts = Counter((split, source, labels["abnormal"]) for split, source, labels in rows)
    for (split, source, abnormal), count in sorted(counts.items()):
        print(f"{split:9} {source:12} {'abnormal' if abnormal else 'normal':9} {count:5}")


if __name__ == "__main__":
    run_script(main)
