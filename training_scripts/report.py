"""Report a classifier on splits of a set, with figures: one HTML file that holds everything, and its pictures as PNG.

    python training_scripts/report.py --model model_cards/pneumonia --data ../shared/data --splits val test \
        --label_efficiency training_scripts/benchmarks/results/evidence_cpu_112.json --output reports/pneumonia

ROC and precision-recall curves with 95 % bands by patient, reliability diagrams, confusion matrices, label efficiency
(from the results of `evidence.py`, or rows with fraction, seed, init and the metric), and the most confident errors.
These show radiographs: keep the folder where the images may be, or say `--worst 0`. Columns and classes that are left
out are those of the recipe in the model's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import parse_classes
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import open_image
from spcxr_hf.evaluation.calibration import to_probabilities
from spcxr_hf.evaluation.curves import read_results
from spcxr_hf.evaluation.plots import grey_picture
from spcxr_hf.evaluation.predict import (
    LabelledRows,
    leave_out_broken,
    load_classifier,
    match_classes,
    open_images,
    predict_logits,
    select_rows,
)
from spcxr_hf.evaluation.report import Evaluated, ReportOptions, write_evaluation_report
from spcxr_hf.models.loading import is_multi_label, label_names
from spcxr_hf.quality.checks import SetArguments, write_skipped
from spcxr_hf.training.arguments import fill_from_recipe, parse_arguments, run_script


@dataclass(kw_only=True)
class Arguments(SetArguments):
    """Draw the report on a classifier."""

    model: str = field(metadata={"help": "folder or Hub id of an image classifier with its image processor"})
    data: str = field(metadata={"help": "a set with a column of labels and a column of splits"})
    output: str = field(metadata={"help": "folder for report.html, results.json and the pictures"})
    label_column: str | None = field(
        default=None, metadata={"help": "column of the labels; by default that of the model's recipe, or `label`"}
    )
    split_column: str | None = field(
        default=None, metadata={"help": "column of the splits; by default that of the model's recipe, or `split`"}
    )
    splits: list[str] = field(default_factory=lambda: ["val"], metadata={"help": "its values to report"})
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": "the model's classes, as `normal pneumonia=bacterial+viral`; by default the recipe's"},
    )
    sums: list[str] = field(
        default_factory=list, metadata={"help": "more targets: labels joined by ' + ', whose probabilities are added"}
    )
    label_efficiency: str | None = field(
        default=None, metadata={"help": "results of evidence.py, or a JSON file with rows of fraction, seed, init"}
    )
    task: str | None = field(default=None, metadata={"help": "its task; by default called as the model's folder"})
    metric: str = field(default="auroc", metadata={"help": "its key of the value"})
    title: str | None = field(default=None, metadata={"help": "of the page; by default the model's name"})
    worst: int = field(default=12, metadata={"help": "how many of the most confident errors to show; 0 for none"})
    limit: int | None = field(default=None, metadata={"help": "take that many rows of each split, drawn at random"})
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    bf16: bool = field(default=False, metadata={"help": "run the model in bfloat16 autocast"})
    resamples: int = field(default=1000, metadata={"help": "draws of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap and of --limit"})


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    efficiency = read_efficiency(arguments)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    model, processor = load_classifier(arguments.model, device)
    rows, skipped = select(arguments, model)
    evaluated = [judge(arguments, model, processor, split, found) for split, found in rows.items()]
    options = options_of(arguments, model, efficiency)
    path = write_evaluation_report(
        Path(arguments.output),
        title_of(arguments),
        label_names(model.config),
        evaluated,
        options,
        pictures_of(arguments, rows),
    )
    write_skipped(path, skipped)
    print(path)
    return path


def read_efficiency(arguments: Arguments) -> list[dict]:
    """Rows for the curves of label efficiency; none where there is no file of them."""
    if not arguments.label_efficiency:
        return []
    return read_results(Path(arguments.label_efficiency), arguments.task or Path(arguments.model).resolve().name)


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late; fill in what the model's recipe says."""
    recipe = Path(arguments.model) / "recipe.yaml"
    fill_from_recipe(arguments, recipe, label_column="label", split_column="split", classes=[])
    for name in ("batch_size", "resamples", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SpcxrError(f"{name} must be at least 1; got {value}")
    if arguments.worst < 0:
        raise SpcxrError(f"worst must be at least 0; got {arguments.worst}")


def select(arguments: Arguments, model: Any) -> tuple[dict[str, LabelledRows], dict[str, str]]:
    """The labelled rows of each split, and what is left out of them: id -> cause."""
    table = read_set(arguments.data, arguments.exclude)
    columns = str(arguments.label_column), str(arguments.split_column)
    classes = match_classes(arguments.model, label_names(model.config), parse_classes(arguments.classes))
    found = {}
    for split in dict.fromkeys(arguments.splits):
        rows = select_rows(table, *columns, split, classes, is_multi_label(model.config))
        found[split] = rows.where(draw(len(rows), arguments.limit, arguments.seed))
    return leave_out_broken(found, arguments.on_error)


def draw(count: int, limit: int | None, seed: int) -> np.ndarray:
    """Which of `count` rows to take: all of them, or `limit` at random."""
    kept = np.zeros(count, dtype=bool)
    kept[np.random.default_rng(seed).permutation(count)[:limit]] = True
    return kept


def judge(arguments: Arguments, model: Any, processor: Any, split: str, rows: LabelledRows) -> Evaluated:
    """What the model says of a split."""
    logits = predict_logits(model, processor, open_images(rows.table), arguments.batch_size, arguments.bf16, split)
    probabilities = to_probabilities(logits, is_multi_label(model.config)).numpy()
    return Evaluated(split, probabilities, rows.targets.numpy(), rows.table.ids, rows.patients)


def options_of(arguments: Arguments, model: Any, efficiency: list[dict]) -> ReportOptions:
    points = getattr(model.config, "operating_points", None) or {}
    settings = {
        "model": Path(arguments.model).resolve().name,
        "set": Path(arguments.data).name,
        **{name: getattr(arguments, name) for name in ("label_column", "split_column", "splits", "classes", "limit",
                                                       "bf16", "resamples", "seed")},
    }  # fmt: skip
    return ReportOptions(
        multi_label=is_multi_label(model.config),
        sums=[
            *dict.fromkeys([*arguments.sums, *(target for target in points if target not in label_names(model.config))])
        ],
        points=points,
        efficiency=efficiency,
        metric=arguments.metric,
        settings=settings,
        worst=arguments.worst,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )


def title_of(arguments: Arguments) -> str:
    return arguments.title or f"{Path(arguments.model).resolve().name}: {', '.join(arguments.splits)}"


def pictures_of(arguments: Arguments, rows: dict[str, LabelledRows]) -> Callable[[str, int], np.ndarray] | None:
    """A function that reads the picture of a split's row, or None where none are wanted."""
    if not arguments.worst:
        return None

    def read(split: str, row: int) -> np.ndarray:
        table = rows[split].table
        return grey_picture(open_image(table.rows["image"][row].as_py(), f"{table.name}: {table.ids[row]}"))

    return read


if __name__ == "__main__":
    run_script(main)
