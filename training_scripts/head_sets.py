"""Write the set that a head of adults is trained on, out of sources that hold more than one of its classes.

    python training_scripts/head_sets.py --task screening --data ../shared/data --rsna ../shared/rsna_jsrt --output DATA
    python training_scripts/head_sets.py --task covid     --data ../shared/data --rsna ../shared/rsna_jsrt --output DATA

A head that learns from sources in which the classes differ in more than the disease learns that difference.

`screening.parquet`: NIH and RSNA, each with normal and abnormal films of its own. It has the columns of the sources and
- `screening`, a struct: `abnormal` (any finding) and `opacity`. Opacity is not known of NIH's abnormal films.
- `screening_split`: train; val (RSNA in the processing `rsna_thorax`, what models are chosen by); and for the report
  test (`rsna_thorax`), nih_val, nih_test, and shift (`rsna_1024`, the same archive in another processing).
- `opacity_split`, the same without films of another abnormality: opacity against normal.
`--train rsna_thorax` leaves the other source out of the training, for the figure on a source never seen.

`covid.parquet`: COVID-19 of the COVID-19 Radiography Database, and opacities ("pneumonia") and normals of RSNA as that
database holds them (`rsna_thorax`): one file form for the three classes of `covid`. `covid_split` is train, val, test,
and shift: COVID-19 of other hospitals beside films without it, theirs and those of `rsna_1024`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """Write the set of a head."""

    task: str = field(metadata={"help": "screening or covid"})
    data: str = field(metadata={"help": "Parquet shards with the columns `findings`, `covid_label` and their splits"})
    rsna: str = field(metadata={"help": "Parquet shards with the columns `rsna_label` and `rsna_split`"})
    output: str = field(metadata={"help": "folder for TASK.parquet"})
    train: list[str] = field(
        default_factory=list, metadata={"help": "sources whose rows train are kept; all by default"}
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    tasks = {"screening": screening_table, "covid": covid_table}
    if arguments.task not in tasks:
        raise SpcxrError(f"--task: there is no {arguments.task!r}; there are {' and '.join(tasks)}")
    table = tasks[arguments.task](read_table(arguments.data), read_table(arguments.rsna))
    splits, sources = table.column(f"{arguments.task}_split"), table.column("source")
    if unknown := sorted(set(arguments.train) - set(sources)):
        raise SpcxrError(f"--train: no rows of the source {unknown[0]!r}; there are {', '.join(sorted(set(sources)))}")
    kept = [not arguments.train or split != "train" or source in arguments.train
            for split, source in zip(splits, sources, strict=True)]  # fmt: skip
    rows = table.rows.filter(pa.array(kept))
    with atomic_file(Path(arguments.output) / f"{arguments.task}.parquet") as path:
        pq.write_table(rows, path)
    columns = (rows[name].to_pylist() for name in (f"{arguments.task}_split", "source", arguments.task))
    counts = Counter((split, source, str(label)) for split, source, label in zip(*columns, strict=True))
    for (split, source, label), count in sorted(counts.items()):
        print(f"{split:9} {source:18} {count:5}  {label}")


def screening_table(data: RadiographTable, rsna: RadiographTable) -> RadiographTable:
    """NIH and RSNA with the columns `screening`, `screening_split` and `opacity_split`."""
    table = join_tables(
        [
            labelled(data, "screening", LABELS, data.column("findings"), nih_labels,
                     [NIH_SPLITS.get(split) for split in data.column("findings_split")]),
            labelled(rsna, "screening", LABELS, rsna.column("rsna_label"), RSNA_LABELS.get, rsna.column("rsna_split")),
        ]
    )  # fmt: skip
    rows = zip(table.column("screening"), table.column("screening_split"), strict=True)
    opacity = [split if label["abnormal"] == label["opacity"] else None for label, split in rows]
    return RadiographTable(table.rows.append_column("opacity_split", pa.array(opacity, pa.string())), table.name)


def covid_table(data: RadiographTable, rsna: RadiographTable) -> RadiographTable:
    """COVID-19 of one database, RSNA as that database holds it, and other hospitals as the split shift."""
    rows = zip(data.column("source"), data.column("covid_label"), data.column("covid_split"), strict=True)
    splits = [split if split == "shift" or source == "radiography_covid" else None for source, _, split in rows]
    names = {"normal": "normal", "opacity": "pneumonia"}
    return join_tables(
        [
            labelled(data, "covid", pa.string(), data.column("covid_label"), str, splits),
            labelled(rsna, "covid", pa.string(), rsna.column("rsna_label"), names.get, rsna.column("rsna_split")),
        ]
    )


def labelled(
    table: RadiographTable, task: str, kind: pa.DataType, cells: list, label_of: Callable[[Any], Any], splits: list
) -> RadiographTable:
    """The rows with a split and a label, and these two as the columns `task` and `task`_split."""
    labels = [None if split is None else label_of(cell) for cell, split in zip(cells, splits, strict=True)]
    kept = pa.array([label is not None for label in labels])
    rows = table.rows.select([name for name in COLUMNS if name in table.rows.column_names])
    rows = rows.append_column(task, pa.array(labels, kind)).append_column(
        f"{task}_split", pa.array(splits, pa.string())
    )
    return RadiographTable(rows.filter(kept), table.name)


def nih_labels(findings: list[str]) -> dict[str, bool | None]:
    """NIH names no opacity: of a film with findings it is not known."""
    return {"abnormal": bool(findings), "opacity": None if findings else False}


if __name__ == "__main__":
    run_script(main)
