"""Report a model on splits of a set: every figure with its 95 % interval by patient, as JSON, and as a page.

    spcxr evaluate --model runs/finetune_classification/final --data ../shared/data \
        --label_column pneumonia_label --split_column pneumonia_split --splits val test --output results.json

A classifier is any model that AutoModelForImageClassification loads, through its own image processor. Columns and
classes that are left out are those of the recipe in the model's folder. `--processes 2` shares the images among them;
none is counted twice. `--temperature_from val` divides the logits by one number that was fitted there (temperature
scaling).

`--html FOLDER` writes a page with ROC and precision-recall curves, reliability diagrams, confusion matrices and the
most confident errors. These show radiographs: keep the folder where the images may be, or say `--worst 0`.

Of a segmentation model, Dice, IoU (Jaccard), 95 % Hausdorff and mean boundary distance of its lung masks, or of each of
its structures, stand beside those of the mean mask of the rows it learned from. Every mask is compared at its own
resolution; distances are shares of the image's height, or in the unit of `--image-height`. Of a model that knows the
heart, the cardiothoracic ratio is compared with that of the drawn masks.

Choose models on `val`; `test` and `shift` are for the report.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

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
from spcxr_hf.data.table import (
    OnError,
    RadiographTable,
    check_broken,
    decode_masks,
    decode_set,
    open_image,
    open_mask,
    structure_masks,
)
from spcxr_hf.evaluation.bootstrap import bootstrap_interval, patient_groups
from spcxr_hf.evaluation.calibration import fit_temperature, to_probabilities
from spcxr_hf.evaluation.metrics import (
    brier_score,
    classification_report,
    expected_calibration_error,
    multilabel_report,
    segmentation_report,
)
from spcxr_hf.evaluation.plots import grey_picture
from spcxr_hf.evaluation.predict import load_classifier, match_classes
from spcxr_hf.evaluation.report import Evaluated, ReportOptions, write_evaluation_report
from spcxr_hf.files import write_json
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessorPil
from spcxr_hf.models.loading import (
    Loaded,
    forward,
    is_multi_label,
    label_names,
    load_checkpoint,
    load_config,
    to_pixel_values,
)
from spcxr_hf.models.lungs import check_lungs, lungs_of, segment_structures
from spcxr_hf.quality.checks import SetArguments, write_skipped
from spcxr_hf.quality.splits import with_splits
from spcxr_hf.training.arguments import check_values, fill_from_recipe, parse_arguments, read_recipe, run_script


@dataclass(kw_only=True)
class Arguments(SetArguments):
    """Evaluate a classifier, or masks against reference masks."""

    model: str = field(metadata={"help": "folder or Hub id of a model with its image processor"})
    data: str = field(metadata={"help": "a set with a column of labels, or lung masks, and a column of splits"})
    label_column: str | None = field(
        default=None,
        metadata={"help": "column of the labels: one for each row (a list counts as normal, if empty, or abnormal); "
                  "of a multi-label model a list of those that hold, or a struct with a field for each. By default "
                  "that of the model's recipe, or `label`"},
    )  # fmt: skip
    split_column: str | None = field(
        default=None,
        metadata={"help": "column of the splits; by default that of the model's recipe, or `split`; of a segmentation "
                  "model `lung_split`"},
    )  # fmt: skip
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
    html: str | None = field(
        default=None, metadata={"help": "folder for report.html, its pictures and its results.json"}
    )
    sums: list[str] = field(
        default_factory=list,
        metadata={"help": "more targets of the page: labels joined by ' + ', whose probabilities are added"},
    )
    worst: int = field(default=12, metadata={"help": "how many of the most confident errors to show; 0 for none"})
    mask_column: str | None = field(
        default=None, metadata={"help": "column of the masks; by default that of the model's recipe, or `lung_mask`"}
    )
    image_height: float = field(
        default=1.0, metadata={"help": "height of the images for distances of masks: 358.4 (mm) of JSRT, for example"}
    )
    baseline: bool = field(default=True, metadata={"help": "of a segmentation model: report the mean mask too"})
    image_size: int | None = field(
        default=None, metadata={"help": "side of the input in pixels; by default the image processor's"}
    )
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    bf16: bool = field(default=False, metadata={"help": "run the model in bfloat16 autocast"})
    resamples: int = field(default=2000, metadata={"help": "draws of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})


@dataclass
class Predictions:
    """Predictions of a model on a split.

    Attributes:
        table: The split's rows.
        rows: (n) numbers of those that were predicted.
        logits: (n, classes).
        targets: (n, classes) float32: 1, 0, or NaN where a label is missing.
        patients: (n) whose image each row is, None where unknown; None altogether where the set has no such column.
        skipped: Id -> cause of images that cannot be read.
    """

    table: RadiographTable
    rows: list[int]
    logits: torch.Tensor
    targets: torch.Tensor
    patients: list | None
    skipped: dict[str, str]


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    check_values(
        arguments,
        ranges={"batch_size": "[1, inf)", "resamples": "[1, inf)", "image_size": "[1, inf)", "worst": "[0, inf)"},
    )
    processes = start_processes()
    architectures = load_config(arguments.model).architectures or [""]
    if architectures[0].endswith("ForSemanticSegmentation"):
        return evaluate_masks(arguments, processes)
    return evaluate_classifier(arguments, processes)


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


# ---- classifiers -----------------------------------------------------------------------------------------------


def evaluate_classifier(arguments: Arguments, processes: PartialState) -> dict:
    """Figures of each split; written and, if asked for, drawn by the main process."""
    # The classes of the recipe are those of its own column.
    recipe: dict[str, Any] = {} if arguments.label_column else {"classes": []}
    fill_from_recipe(
        arguments, Path(arguments.model) / "recipe.yaml", label_column="label", split_column="split", **recipe
    )
    model, processor = load_classifier(arguments.model, processes.device)
    multi_label = is_multi_label(model.config)
    classes = match_classes(arguments.model, label_names(model.config), parse_classes(arguments.classes))
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    wanted = dict.fromkeys([*arguments.splits, *([arguments.temperature_from] if arguments.temperature_from else [])])
    sets = {split: select_split(arguments, table, split, classes, multi_label) for split in wanted}

    found = {split: predict(arguments, processes, model, processor, *rows) for split, rows in sets.items()}
    temperature = None
    if arguments.temperature_from:
        fitted = found[arguments.temperature_from]
        temperature = fit_temperature(fitted.logits, fitted.targets, multi_label)
    result: dict[str, Any] = {
        "model": Path(arguments.model).resolve().name,
        "model_type": model.config.model_type,
        "problem_type": model.config.problem_type,
        "label_column": arguments.label_column,
        "split_column": arguments.split_column,
        "classes": classes,
        "temperature": None if temperature is None else {"value": temperature, "from": arguments.temperature_from},
        "splits": {},
    }
    if processes.is_main_process:
        for split in arguments.splits:
            result["splits"][split] = report(arguments, found[split], list(classes), multi_label, temperature)
        write(arguments, result)
        if arguments.html:
            shown = {split: found[split] for split in arguments.splits}
            print(draw_page(arguments, model, shown, multi_label, temperature))
        skipped = {name: cause for one in found.values() for name, cause in one.skipped.items()}
        write_skipped(Path(arguments.html) / "report.html" if arguments.html else arguments.output, skipped)
    processes.wait_for_everyone()
    return result


def select_split(
    arguments: Arguments, table: RadiographTable, split: str, classes: dict[str, list[str]], multi_label: bool
) -> tuple[RadiographTable, torch.Tensor]:
    """The rows of a split and their targets (n, classes).

    Raises:
        SpcxrError: a column is missing, no row has a label, or one has a label that the model does not know, unless
            the command line says which classes are meant.
    """
    rows = table.where(str(arguments.split_column), split)
    cells = rows.column(str(arguments.label_column))
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


@torch.no_grad()
def predict(
    arguments: Arguments,
    processes: PartialState,
    model: PreTrainedModel,
    processor: Any,
    rows: RadiographTable,
    targets: torch.Tensor,
) -> Predictions:
    """The logits of every row that has a label; they are divided among the processes."""
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
        rows,
        seen,
        torch.tensor([by_row[row] for row in seen]),
        targets[seen],
        None if patients is None else [patients[row] for row in seen],
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
    entry["left_out"] = len(found.table) - len(found.rows) - len(found.skipped)
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


def draw_page(
    arguments: Arguments,
    model: PreTrainedModel,
    found: dict[str, Predictions],
    multi_label: bool,
    temperature: float | None,
) -> Path:
    """`report.html` with its pictures and its `results.json`."""
    evaluated = []
    for split, one in found.items():
        probabilities = to_probabilities(one.logits / (temperature or 1.0), multi_label).numpy()
        ids = one.table.ids
        evaluated.append(
            Evaluated(split, probabilities, one.targets.numpy(), [ids[row] for row in one.rows], one.patients)
        )
    names, points = label_names(model.config), getattr(model.config, "operating_points", None) or {}
    name = Path(arguments.model).resolve().name
    settings = ("label_column", "split_column", "splits", "classes", "temperature_from", "bf16", "resamples", "seed")
    options = ReportOptions(
        multi_label=multi_label,
        sums=[*dict.fromkeys([*arguments.sums, *(target for target in points if target not in names)])],
        points=points,
        settings={
            "model": name,
            "set": Path(arguments.data).name,
            **{setting: getattr(arguments, setting) for setting in settings},
        },
        worst=arguments.worst,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )

    def picture(split: str, row: int) -> np.ndarray:
        one = found[split]
        number = one.rows[row]
        return grey_picture(open_image(one.table.rows["image"][number].as_py(), f"{one.table.name}, row {number}"))

    pictures: Callable[[str, int], np.ndarray] | None = picture if arguments.worst else None
    title = f"{name}: {', '.join(arguments.splits)}"
    return write_evaluation_report(Path(str(arguments.html)), title, names, evaluated, options, pictures)


# ---- masks -------------------------------------------------------------------------------------------------------


def evaluate_masks(arguments: Arguments, processes: PartialState) -> dict:
    """Figures of the masks of each split."""
    if processes.num_processes > 1:
        raise SpcxrError("a segmentation model is evaluated by one process; start the script without a launcher")
    if arguments.html or arguments.temperature_from or arguments.label_column or arguments.classes:
        raise SpcxrError("html, temperature_from, label_column and classes are for classifiers")
    has_column = arguments.split_column is not None
    recipe = read_recipe(file) if (file := Path(arguments.model) / "recipe.yaml").is_file() else {}
    arguments.mask_column = arguments.mask_column or recipe.get("mask_column") or "lung_mask"
    column = arguments.split_column or recipe.get("split_column") or "lung_split"
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    table = table if has_column else with_splits(table, column)
    loaded = load_checkpoint("segmentation", arguments.model, processes.device, any_family=True)
    names = label_names(loaded.model.config) if overlapping(loaded) else []
    if not names:
        check_lungs(loaded)
    skipped: dict[str, str] = {}
    mean_masks = None
    if arguments.baseline:
        learned = table.where_any(column, recipe.get("train_splits") or ["train"])
        mean_masks = mean_of_masks(arguments, learned, names, skipped)
    side = loaded.model.config.image_size
    result: dict = {"model": Path(arguments.model).resolve().name, "image_size": side, "splits": {}}
    for split in arguments.splits:
        rows = readable(arguments, table.where(column, split), len(names), skipped)
        patients = rows.column("patient") if "patient" in rows.rows.column_names else [None] * len(rows)
        entry: dict = {"images": len(rows), "patients": len(set(patient_groups(patients, len(rows)) or ()))}
        entry |= compare_masks(arguments, loaded, rows, names, patients, mean_masks)
        result["splits"][split] = entry
        print(json.dumps({split: entry}), flush=True)
    if arguments.output:
        write_json(arguments.output, result)
    write_skipped(arguments.output, skipped)
    return result


def overlapping(loaded: Loaded) -> bool:
    """Whether the labels are structures with a mask each."""
    return bool(loaded.model.config.problem_type == "multi_label_classification")


def readable(arguments: Arguments, rows: RadiographTable, structures: int, skipped: dict[str, str]) -> RadiographTable:
    """These rows; with `on_error` skip those whose image and mask can be read, the others go to `skipped`."""
    if arguments.on_error == "stop":
        return rows
    column = str(arguments.mask_column)
    decoded = decode_set(rows, 16, masks=True, mask_column=column, structures=structures, on_error="skip")
    skipped.update(decoded.skipped)
    return decoded.table


def mean_of_masks(
    arguments: Arguments, rows: RadiographTable, names: Sequence[str], skipped: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Name -> the mean (256, 256) of the masks of these rows; of the lungs alone without names."""
    rows = readable(arguments, rows, len(names), skipped)
    masks = decode_masks(rows, 256, str(arguments.mask_column), len(names))
    if not names:
        return {"lung": masks.float().mean(dim=0)}
    return dict(zip(names, structure_masks(masks, len(names)).float().mean(dim=0), strict=True))


def compare_masks(
    arguments: Arguments,
    loaded: Loaded,
    rows: RadiographTable,
    names: Sequence[str],
    patients: list[str | None],
    mean_masks: dict[str, torch.Tensor] | None,
) -> dict:
    """The figures of a split: "model" and "mean_training_mask" of the lungs, or of each name and pair of names."""
    cells = rows.column(str(arguments.mask_column))
    drawn = [open_mask(cell, f"{rows.name}, row {row}", len(names)) for row, cell in enumerate(cells)]
    found = list(predict_masks(arguments, loaded, rows))
    if not names:
        targets = [{"lung": np.asarray(mask) > 127} for mask in drawn]
        found = [{"lung": lungs_of(masks)} for masks in found]
    else:
        taken_apart = [structure_masks(torch.from_numpy(np.array(mask)), len(names)) for mask in drawn]
        targets = [dict(zip(names, masks, strict=True)) for masks in taken_apart]
    figures: dict = {}
    for name, parts in ({"lung": ["lung"]} if not names else with_pairs(names)).items():
        reference = [union(masks, parts) for masks in targets]
        reports = {"model": mask_report(arguments, (union(masks, parts) for masks in found), reference, patients)}
        if mean_masks is not None:
            mean = torch.stack([mean_masks[part] for part in parts]).amax(dim=0)
            masks = (at_size(mean, target) > 0.5 for target in reference)
            reports["mean_training_mask"] = mask_report(arguments, masks, reference, patients)
        figures[name] = reports
    if not names:
        return figures["lung"]
    return {"structures": figures} | compare_ratios(found, targets, patients)


def with_pairs(names: Sequence[str]) -> dict[str, list[str]]:
    """What is reported: each structure, and left and right together, as "lungs" of "left lung" and "right lung"."""
    pairs = {
        f"{name.removeprefix('left ')}s": [name, other]
        for name in names
        if name.startswith("left ") and (other := name.replace("left", "right", 1)) in names
    }
    return pairs | {name: [name] for name in names}


def union(masks: Mapping[str, Any], parts: Sequence[str]) -> torch.Tensor:
    """Where one of the parts is, (H, W) booleans."""
    return torch.stack([torch.as_tensor(masks[part]) for part in parts]).any(dim=0)


def compare_ratios(found: Sequence[dict], targets: Sequence[dict], patients: list[str | None]) -> dict:
    """Cardiothoracic ratios of the model beside those of the drawn masks; nothing for a model without a heart."""
    pairs = [tuple(map(SpcxrImageProcessorPil.cardiothoracic_ratio, pair)) for pair in zip(found, targets, strict=True)]
    kept = [row for row, pair in enumerate(pairs) if None not in pair]
    if not kept:
        return {}
    ratios = np.array([pairs[row] for row in kept], dtype=float)
    errors = ratios[:, 0] - ratios[:, 1]
    groups = patient_groups([patients[row] for row in kept], len(kept))
    report: dict = {"images": len(kept), "not_measured": len(pairs) - len(kept)}
    means = {"model": ratios[:, 0], "drawn": ratios[:, 1], "error": errors, "absolute_error": np.abs(errors)}
    for name, values in means.items():
        report[f"mean_{name}"] = round(float(values.mean()), 4)
        report[f"mean_{name}_ci95"] = [round(end, 4) for end in bootstrap_interval(values, groups)]
    return {"cardiothoracic_ratio": report}


def predict_masks(arguments: Arguments, loaded: Loaded, table: RadiographTable) -> Iterator[dict[str, torch.Tensor]]:
    """Yield each row's masks by label, (H, W) booleans, at the resolution of its image."""
    cells = table.column("image")
    for start in tqdm(range(0, len(table), arguments.batch_size), desc=table.name, unit="batch"):
        part = cells[start : start + arguments.batch_size]
        images = [open_image(cell, f"{table.name}, row {start + row}") for row, cell in enumerate(part)]
        sizes = [(image.height, image.width) for image in images]
        values = to_pixel_values(loaded.processor, images, arguments.image_size)
        yield from segment_structures(loaded, values, sizes, arguments.bf16)


def at_size(mean_mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean mask (H, W) resized to the target's size."""
    return torch.nn.functional.interpolate(mean_mask[None, None], size=target.shape, mode="bilinear")[0, 0]


def mask_report(
    arguments: Arguments, masks: Iterable[torch.Tensor], targets: list[torch.Tensor], patients: list[str | None]
) -> dict:
    """What `metrics.segmentation_report` says of these masks, to four digits."""
    sides = [arguments.image_height / len(target) for target in targets]
    found = segmentation_report(masks, targets, patients, spacing=[(side, side) for side in sides])
    return {
        name: [round(end, 4) for end in value] if isinstance(value, list) else
        round(value, 4) if isinstance(value, float) else value
        for name, value in found.items() if name not in ("images", "patients")
    }  # fmt: skip


if __name__ == "__main__":
    run_script(main)
