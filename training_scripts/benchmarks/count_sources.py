"""Count training images by source, licence, label and view, for the table on a checkpoint's card.

    python -m training_scripts.benchmarks.count_sources --data ../shared/data --split_column pneumonia_split \
        --label_column pneumonia_label --output training_data.json

`--split_column pretrain --splits true` counts the pretraining images. Nothing is decoded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from spcxr_hf import SpcxrError
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable
from spcxr_hf.files import write_json
from spcxr_hf.training.arguments import parse_arguments, run_script

OPTIONAL = ("view", "licence_class")


@dataclass
class Arguments:
    """Count images by where they come from."""

    data: str = field(metadata={"help": "Parquet shards with the columns source, licence and licence_class"})
    split_column: str = field(metadata={"help": "column of the splits, or `pretrain`"})
    splits: list[str] = field(
        default_factory=lambda: ["train", "val", "test"], metadata={"help": "its values; true for `pretrain`"}
    )
    label_column: str | None = field(default=None, metadata={"help": "column of the labels; rows without are left out"})
    exclude: str | None = field(default=None, metadata={"help": "text file of ids that the training left out"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    table = read_set(arguments.data, arguments.exclude)
    result: dict = {"split_column": arguments.split_column, "label_column": arguments.label_column, "splits": {}}
    for split in arguments.splits:
        value = {"true": True, "false": False}.get(split, split)
        result["splits"][split] = count(table.where(arguments.split_column, value), arguments.label_column)
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result))
    return result


def count(table: RadiographTable, label_column: str | None) -> dict:
    """Images and patients of these rows, by source, licence and label."""
    columns = {name: table.column(name) for name in ("source", "licence", *OPTIONAL, "patient")}
    labels = table.column(label_column) if label_column else [""] * len(table)
    kept = [row for row, label in enumerate(labels) if label is not None]
    if not kept:
        raise SpcxrError(f"{table.name}: no row has a label in {label_column}")
    chosen = {name: [str(values[row]) for row in kept] for name, values in columns.items()}
    entry: dict = {
        "images": len(kept),
        "patients": len({name for name in chosen["patient"] if name != "None"}),
        "images_of_unknown_patients": chosen["patient"].count("None"),
        "sources": {},
    }
    for source in sorted(set(chosen["source"])):
        rows = [row for row, name in enumerate(chosen["source"]) if name == source]
        entry["sources"][source] = {"images": len(rows)} | {
            name: tally(chosen[name][row] for row in rows) for name in ("licence", "licence_class")
        }
    entry |= {name: tally(chosen[name]) for name in OPTIONAL}
    if label_column:
        entry["labels"] = tally(word for row in kept for word in words(labels[row]))
    return entry


def words(label: object) -> list[str]:
    """The labels of a row; a list of findings is as many, an empty one is `no finding`."""
    if isinstance(label, list):
        return [str(one) for one in label] or ["no finding"]
    return [str(label)]


def tally(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


if __name__ == "__main__":
    run_script(main)
