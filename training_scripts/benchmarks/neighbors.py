"""Draw the nearest neighbors of radiographs in a model's feature space: a row of pictures for each of them.

    python -m training_scripts.benchmarks.neighbors --model model_cards/base --data ../shared/data \
        --split_column pneumonia_split --split test --label_column pneumonia_label --output neighbors/

Features are searched exactly, by cosine similarity. Neighbors of the same patient are left out where the set tells
patients apart: they are alike for another reason. `sheet.png` shows radiographs: keep the folder
where the images may be. `index.safetensors` holds features and ids, `results.json` who is next to whom and, with a
column of labels, how often a neighbor has the label of its image, beside how often any image of the set has.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spcxr_hf import SpcxrError
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable, open_image
from spcxr_hf.evaluation.plots import draw_contact_sheet, grey_picture, save_figure
from spcxr_hf.files import software_versions, write_json
from spcxr_hf.inference.neighbors import NeighborIndex, build_index
from spcxr_hf.models.encoders import load_encoder
from spcxr_hf.training.arguments import parse_arguments, run_script

NOTICE = "For research use only, not for clinical use."
WIDTH = 26  # letters of a line under a picture
SIDE = 320  # pixels of a picture on the sheet


@dataclass
class Arguments:
    """Draw nearest neighbors."""

    model: str = field(metadata={"help": "folder or Hub id of an encoder"})
    data: str = field(metadata={"help": "the set whose images are searched, and looked for"})
    output: str = field(metadata={"help": "folder for sheet.png, index.safetensors and results.json"})
    split_column: str = field(default="split", metadata={"help": "column of the splits"})
    split: str | None = field(default=None, metadata={"help": "search its rows alone; by default all rows"})
    label_column: str | None = field(default=None, metadata={"help": "column of labels, shown under the pictures"})
    queries: int = field(default=6, metadata={"help": "how many images to look for, drawn at random"})
    ids: list[str] = field(default_factory=list, metadata={"help": "these images instead"})
    neighbors: int = field(default=5, metadata={"help": "how many of each to show"})
    limit: int | None = field(default=None, metadata={"help": "take that many rows, drawn at random"})
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    seed: int = field(default=0, metadata={"help": "of what is drawn at random"})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    table = select(arguments)
    folder = Path(arguments.output)
    index = build_index(load_encoder(arguments.model), table, name_of(arguments), arguments.batch_size)
    index.save(folder / "index.safetensors")
    rows = choose(arguments, index)
    found = search(index, patients_of(table), rows, arguments.neighbors)
    labels = table.column(arguments.label_column) if arguments.label_column else None
    draw(table, index, rows, found, labels, folder / "sheet.png")
    result = describe(arguments, index, rows, found, labels)
    write_json(folder / "results.json", result)
    print(folder / "sheet.png")
    return result


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late."""
    for name in ("queries", "neighbors", "batch_size", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SpcxrError(f"{name} must be at least 1; got {value}")


def name_of(arguments: Arguments) -> str:
    return Path(arguments.model).resolve().name


def select(arguments: Arguments) -> RadiographTable:
    """The rows to search."""
    table = read_set(arguments.data)
    if arguments.split is not None:
        table = table.where(arguments.split_column, arguments.split)
    order = np.random.default_rng(arguments.seed).permutation(len(table))[: arguments.limit]
    return RadiographTable(table.rows.take(np.sort(order)), table.name)


def choose(arguments: Arguments, index: NeighborIndex) -> list[int]:
    """The rows of the images to look for."""
    if unknown := [name for name in arguments.ids if name not in index.ids]:
        raise SpcxrError(f"{unknown[0]!r} is not among the {len(index)} images")
    if arguments.ids:
        return [index.ids.index(name) for name in arguments.ids]
    return np.random.default_rng(arguments.seed).permutation(len(index))[: arguments.queries].tolist()


def patients_of(table: RadiographTable) -> list | None:
    return table.column("patient") if "patient" in table.rows.column_names else None


def search(index: NeighborIndex, patients: list | None, rows: Sequence[int], count: int) -> list[list[tuple]]:
    """(row, similarity) of the nearest images of each, without itself and without others of its patient."""
    found = []
    for row in rows:
        similarities = (index.features @ index.features[row]).clamp(-1, 1)
        order = similarities.sort(descending=True, stable=True).indices.tolist()
        kept = [other for other in order if other != row and not same_patient(patients, row, other)][:count]
        found.append([(other, similarities[other].item()) for other in kept])
    return found


def same_patient(patients: list | None, one: int, other: int) -> bool:
    return patients is not None and patients[one] is not None and patients[one] == patients[other]


def draw(
    table: RadiographTable,
    index: NeighborIndex,
    rows: Sequence[int],
    found: Sequence[Sequence[tuple]],
    labels: list | None,
    path: Path,
) -> None:
    """A row for each image: itself, then its neighbors."""
    columns = 1 + max(map(len, found))
    tiles = []
    for row, neighbors in zip(rows, found, strict=True):
        tiles.append((picture(table, row), f"looked for\n{words(labels, row)}"))
        tiles += [(picture(table, other), f"{value:.3f}\n{words(labels, other)}") for other, value in neighbors]
        tiles += [(np.ones((SIDE, SIDE)), "")] * (columns - 1 - len(neighbors))
    title = f"Nearest neighbors by {index.model}: cosine similarity. {NOTICE}"
    save_figure(draw_contact_sheet(tiles, columns, title), path)


def picture(table: RadiographTable, row: int) -> np.ndarray:
    return grey_picture(open_image(table.rows["image"][row].as_py(), f"{table.name}: {table.ids[row]}"), SIDE)


def words(labels: list | None, row: int) -> str:
    """The label of a row in at most two short lines."""
    if labels is None:
        return ""
    label = labels[row]
    text = ", ".join(map(str, label)) or "no finding" if isinstance(label, list) else str(label)
    return textwrap.fill(text, WIDTH, max_lines=2, placeholder=" …")


def describe(
    arguments: Arguments,
    index: NeighborIndex,
    rows: Sequence[int],
    found: Sequence[Sequence[tuple]],
    labels: list | None,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "notice": NOTICE,
        "model": index.model,
        "images": len(index),
        "split": arguments.split,
        "seed": arguments.seed,
        "software": software_versions(),
        "neighbors": {
            index.ids[row]: [{"id": index.ids[other], "similarity": value} for other, value in neighbors]
            for row, neighbors in zip(rows, found, strict=True)
        },
    }
    if labels is not None:
        same = [labels[other] == labels[row] for row, near in zip(rows, found, strict=True) for other, _ in near]
        chance = [labels[other] == labels[row] for row in rows for other in range(len(index)) if other != row]
        result["same_label"] = {"of_neighbors": float(np.mean(same)), "of_any_image": float(np.mean(chance))}
    return result


if __name__ == "__main__":
    run_script(main)
