"""Report a classifier on splits of a set: every figure with its 95 % interval by patient, as JSON.

    python training_scripts/evaluate.py --model runs/finetune_classification/final --data ../shared/data \
        --label_column pneumonia_label --split_column pneumonia_split --splits val test --output results.json

Any model that AutoModelForImageClassification loads, through its own image processor. Several processes
(on a CPU `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...`) share the images, and none is
counted twice. `--temperature_from val`
divides the logits by one number that was fitted there (temperature scaling). Choose models on `val`; `test` and `shift`
are for the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import names_in, parse_classes, targets_of
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import OnError, RadiographTable, check_broken, open_image
from spcxr_hf.evaluation.calibration import fit_temperature, to_probabilities
from spcxr_hf.evaluation.metrics import (
    brier_score,
    classification_report,
    expected_calibration_error,
    multilabel_report,
)
from spcxr_hf.evaluation.predict import load_classifier, match_classes
from spcxr_hf.files import write_json
from spcxr_hf.models.loading import forward, is_multi_label, label_names, to_pixel_values
from spcxr_hf.quality.checks import SetArguments, write_skipped
from spcxr_hf.training.arguments import parse_arguments, run_script


@dataclass(kw_only=True)
class Arguments(SetArguments):
    """Measure a classifier."""

    model: str = field(metadata={"help": "folder or Hub id of an image classifier with its image processor"})
    data: str = field(metadata={"help": "Parquet shards with a column of labels and a column of splits"})
    label_column: str = field(
        default="label",
        metadata={"help": "column of the labels: one for each row (a list counts as normal, if empty, or abnormal); "
                  "of a multi-label model a list of those that hold, or a struct with a field for each"},
    )  # fmt: skip
    split_column: str = field(default="split", metadata={"help": "column of the splits"})
    splits: list[str] = field(default_factory=lambda: ["val"], metadata={"help": "its values to report"})
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": "the model's classes, as `normal pneumonia=bacterial+viral`, where their labels have other "
                  "names or rows of other labels are to be left out"},
    )  # fmt: skip
    temperature_from: str | None = field(
        default=None, metadata={"help": "split to fit a temperature on: val, as a rule"}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    image_size: int | None = field(
        default=None, metadata={"help": "side of the input in pixels; by default the image processor's"}
    )
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    bf16: bool = field(default=False, metadata={"help": "run the model in bfloat16 autocast"})
    resamples: int = field(default=2000, metadata={"help": "draws of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})


@dataclass
class Predictions:
    """What a model says of a split.

    Attributes:
        logits: (n, classes).
        targets: (n, classes) float32: 1, 0, or NaN where a label is missing.
        patients: (n) whose image each row is, None where unknown; None altogether where the set has no such column.
        left_out: Rows whose label is missing, or none of the classes.
        skipped: Id -> cause of images that cannot be read.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    patients: list | None
    left_out: int
    skipped: dict[str, str]


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    processes = start_processes()
    model, processor = load_classifier(arguments.model, processes.device)
    classes = match_classes(arguments.model, label_names(model.config), parse_classes(arguments.classes))
    table = read_set(arguments.data, arguments.exclude)
    wanted = dict.fromkeys([*arguments.splits, *([arguments.temperature_from] if arguments.temperature_from else [])])
    sets = {split: select_split(arguments, table, split, classes, is_multi_label(model.config)) for split in wanted}

    found = {split: predict(arguments, processes, model, processor, *rows) for split, rows in sets.items()}
    temperature = None
    if arguments.temperature_from:
        fitted = found[arguments.temperature_from]
        temperature = fit_temperature(fitted.logits, fitted.targets, is_multi_label(model.config))
    result = describe(arguments, model, classes, temperature)
    if processes.is_main_process:
        for split in arguments.splits:
            result["splits"][split] = report(
                arguments, found[split], list(classes), is_multi_label(model.config), temperature
            )
        write(arguments, result)
        write_skipped(arguments.output, {name: why for one in found.values() for name, why in one.skipped.items()})
    processes.wait_for_everyone()
    return result


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late."""
    for name in ("batch_size", "resamples"):
        if getattr(arguments, name) < 1:
            raise SpcxrError(f"{name} must be at least 1; got {getattr(arguments, name)}")
    if arguments.image_size is not None and arguments.image_size < 1:
        raise SpcxrError(f"image_size must be at least 1; got {arguments.image_size}")


def start_processes() -> PartialState:
    """The processes that share the images.

    Raises:
        SpcxrError: several were started and do not know of each other: each would predict all images.
    """
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes.num_processes:
        raise SpcxrError(
            f"{started} processes were started but each runs alone; "
            "on a CPU start them by `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`"
        )
    return processes


# ---- the set ---------------------------------------------------------------------------------------------------


def select_split(
    arguments: Arguments, table: RadiographTable, split: str, classes: dict[str, list[str]], multi_label: bool
) -> tuple[RadiographTable, torch.Tensor]:
    """The rows of a split and their targets (n, classes).

    Raises:
        SpcxrError: a column is missing, no row has a label, or one has a label that the model does not know, unless
            the command line says which classes are meant.
    """
    rows = table.where(arguments.split_column, split)
    cells = rows.column(arguments.label_column)
    known = {label for labels in classes.values() for label in labels}
    others = {name for cell in cells for name in names_in(cell, multi_label)} - known
    if others and not arguments.classes:
        raise SpcxrError(
            f"{rows.name}: {arguments.label_column} holds {', '.join(sorted(others))}, which the model does not know; "
            "--classes leaves rows of other labels out"
        )
    targets = torch.tensor([targets_of(cell, classes, multi_label) for cell in cells])
    if targets.isnan().all():
        raise SpcxrError(f"{rows.name}: no row has a label in {arguments.label_column} that is one of the classes")
    return rows, targets


# ---- predictions -----------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    arguments: Arguments,
    processes: PartialState,
    model: PreTrainedModel,
    processor: Any,
    rows: RadiographTable,
    targets: torch.Tensor,
) -> Predictions:
    """The logits of every row that has a label; each process works on every so-manieth of them."""
    kept = torch.nonzero(~targets.isnan().all(dim=1)).flatten().tolist()
    own = kept[processes.process_index :: processes.num_processes]
    logits: list[tuple[int, list[float]]] = []
    names = rows.ids
    broken: dict[int, str] = {}
    for start in tqdm(range(0, len(own), arguments.batch_size), desc=rows.name, unit="batch"):
        images = read_images(rows, names, own[start : start + arguments.batch_size], arguments.on_error, broken)
        if images:
            values = to_pixel_values(processor, list(images.values()), arguments.image_size)
            logits += zip(images, forward(model, values, arguments.bf16).logits.float().tolist(), strict=True)
    by_row = dict(gather_object(logits))  # by its number, so that none is counted twice
    broken = dict(gather_object(list(broken.items())))
    check_broken(rows.name, list(broken.values()), len(kept), arguments.on_error)
    seen = [row for row in kept if row in by_row]
    patients = rows.column("patient") if "patient" in rows.rows.column_names else None
    return Predictions(
        torch.tensor([by_row[row] for row in seen]),
        targets[seen],
        None if patients is None else [patients[row] for row in seen],
        len(rows) - len(kept),
        {names[row]: cause for row, cause in broken.items()},
    )


def read_images(
    rows: RadiographTable, names: Sequence[str], numbers: Sequence[int], on_error: OnError, broken: dict[int, str]
) -> dict[int, Image.Image]:
    """The images of these rows, by their numbers; a broken one goes to `broken`, with its cause, or ends it."""
    images = {}
    for row in numbers:
        try:
            images[row] = open_image(rows.rows["image"][row].as_py(), f"{rows.name}: {names[row]}")
        except SpcxrError as error:
            if on_error == "stop":
                raise
            broken[row] = str(error)
    return images


# ---- the report ------------------------------------------------------------------------------------------------


def describe(
    arguments: Arguments, model: PreTrainedModel, classes: dict[str, list[str]], temperature: float | None
) -> dict:
    """What the figures are of."""
    return {
        "model": Path(arguments.model).resolve().name,
        "model_type": model.config.model_type,
        "problem_type": model.config.problem_type,
        "label_column": arguments.label_column,
        "split_column": arguments.split_column,
        "classes": classes,
        "temperature": None if temperature is None else {"value": temperature, "from": arguments.temperature_from},
        "splits": {},
    }


def report(
    arguments: Arguments, found: Predictions, names: list[str], multi_label: bool, temperature: float | None
) -> dict:
    """The figures of one split; with a temperature, what the calibration was without it too."""
    probabilities = to_probabilities(found.logits / (temperature or 1.0), multi_label)
    options: dict[str, Any] = {"resamples": arguments.resamples, "seed": arguments.seed}
    if multi_label:
        entry = multilabel_report(probabilities, found.targets, names, found.patients, **options)
    else:
        entry = classification_report(probabilities, found.targets.argmax(dim=1), names, found.patients, **options)
    entry["left_out"] = found.left_out
    entry["broken"] = len(found.skipped)
    if temperature is not None:
        entry["without_temperature"] = calibration(
            to_probabilities(found.logits, multi_label), found.targets, multi_label
        )
    return entry


def calibration(probabilities: torch.Tensor, targets: torch.Tensor, multi_label: bool) -> dict:
    """Brier score and expected calibration error; of labels, their means over the labels that have both sides."""
    figures = {"brier": brier_score, "ece": expected_calibration_error}
    if not multi_label:
        return {name: figure(probabilities, targets.argmax(dim=1)) for name, figure in figures.items()}
    both = ((targets == 1).any(dim=0) & (targets == 0).any(dim=0)).tolist()
    columns = [pair for pair, kept in zip(zip(probabilities.T, targets.T, strict=True), both, strict=True) if kept]
    return {
        f"mean_{name}": float(np.mean([figure(p, y) for p, y in columns])) if columns else None
        for name, figure in figures.items()
    }


def write(arguments: Arguments, result: dict) -> None:
    """Print the figures, and write them where the command line says."""
    if arguments.output:
        write_json(arguments.output, result)
    for split, entry in result["splits"].items():
        print(json.dumps({split: {name: value for name, value in entry.items() if not isinstance(value, dict)}}))


if __name__ == "__main__":
    run_script(main)
