"""Shortcut tests of a classifier: compared with probes on thumbnails and borders, and on masked images.

    spcxr shortcuts --model model_cards/pneumonia --data ../shared/data \
        --label_column pneumonia_label --split_column pneumonia_split \
        --classes normal "bacterial pneumonia=bacterial" "viral pneumonia=viral" \
        --targets "bacterial pneumonia + viral pneumonia" --output shortcuts.json

The model on whole images is compared, on the same rows and with the same bootstrap by patient, with:

* `thumbnail_16`, `thumbnail_32`, `border`: logistic regression on the grey values of a thumbnail, and on the outermost
  sixteenth of the image alone; fitted on `train`, its strength chosen on `val`. Their performance needs no radiology.
* `lungs_masked`, `lung_box_masked`: the model, unchanged, where the lungs, or the rectangle around them, are filled
  with the image's mean. The remaining performance does not come from inside the lungs; the outline of masked lungs
  still shows, that of the rectangle hardly.
* `lungs_only`: the model where all but the lungs is filled.

The accuracy of the regressions is reported too, at a threshold that was chosen on `val` as the model's default is
(Youden). `survives` is (AUROC - 0.5) / (the model's AUROC - 0.5): the share of the model's performance that remains.
Nothing is trained anew on masked images, so that a low figure can also come from images of a kind that the model never
saw. Columns and classes may be left out where a `recipe.yaml` of the training is beside the weights.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import parse_classes
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import decode_images
from spcxr_hf.evaluation.bootstrap import bootstrap_draws, patient_groups
from spcxr_hf.evaluation.calibration import JOIN, target_columns, target_values, thresholds, to_probabilities
from spcxr_hf.evaluation.metrics import ScoreLevels, areas, classification_report
from spcxr_hf.evaluation.predict import (
    LabelledRows,
    leave_out_broken,
    load_classifier,
    match_classes,
    predict_logits,
    select_rows,
)
from spcxr_hf.evaluation.shortcuts import (
    FEATURES,
    SMALLEST_LUNGS,
    Features,
    boxes,
    choose_probe,
    filled,
)
from spcxr_hf.files import write_json
from spcxr_hf.models.loading import is_multi_label, label_names
from spcxr_hf.models.lungs import load_segmenter
from spcxr_hf.quality.checks import SetArguments, write_skipped
from spcxr_hf.training.arguments import parse_arguments, read_recipe, run_script

AGAINST = " / "  # between two classes whose images alone are compared
LUNGS = "spcxr/lung-segmentation"
VARIANTS = {
    "model": "the model on whole images",
    "thumbnail_16": "logistic regression on 16 x 16 grey values",
    "thumbnail_32": "logistic regression on 32 x 32 grey values",
    "border": "logistic regression on the outermost ring of 16 x 16 grey values",
    "lungs_masked": "the model, lungs filled with the image's mean",
    "lung_box_masked": "the model, the rectangle around the lungs filled with the image's mean",
    "lungs_only": "the model, all but the lungs filled with the image's mean",
}
Scores = dict[str, np.ndarray]  # variant -> probabilities (n, classes)
Cuts = dict[str, dict[str, float]]  # variant -> target -> threshold


@dataclass(kw_only=True)
class Arguments(SetArguments):
    """Compare a classifier with baselines that do not see the lungs."""

    model: str = field(metadata={"help": "folder of a classifier with its image processor"})
    data: str = field(metadata={"help": "Parquet shards with a column of labels and a column of splits"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    label_column: str | None = field(
        default=None, metadata={"help": "column of the labels; by default that of the model's recipe"}
    )
    split_column: str | None = field(
        default=None, metadata={"help": "column of the splits; by default that of the model's recipe"}
    )
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": "the model's classes, as `normal pneumonia=bacterial+viral`; by default the recipe's"},
    )
    targets: list[str] = field(
        default_factory=list,
        metadata={"help": f"what to report besides each class: classes together, 'bacterial{JOIN}viral', or one "
                  f"against another alone, 'covid{AGAINST}pneumonia'"},
    )  # fmt: skip
    by: list[str] = field(
        default_factory=list, metadata={"help": "columns, as view or source: AUROC within each of their values too"}
    )
    splits: list[str] = field(default_factory=lambda: ["test"], metadata={"help": "splits to report"})
    lungs: str = field(default=LUNGS, metadata={"help": "folder or Hub id of a segmentation model with a label `lung`"})
    stored_size: int = field(default=256, metadata={"help": "images are decoded to this size, in pixels"})
    cache_folder: str | None = field(
        default=None, metadata={"help": "folder that keeps the decoded images between starts"}
    )
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    bf16: bool = field(default=False, metadata={"help": "run the models in bfloat16 autocast"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    resamples: int = field(default=1000, metadata={"help": "draws of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})


@dataclass(frozen=True)
class Task:
    """The task: the class names in the model's order, whether they may hold together, and the targets."""

    classes: dict[str, list[str]]
    multi_label: bool
    targets: list[str]

    @property
    def names(self) -> list[str]:
        return list(self.classes)


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    fill_in(arguments)
    model, processor = load_classifier(arguments.model, arguments.device)
    segmenter = load_segmenter(arguments.lungs, arguments.device)
    task = define_task(arguments, model)
    splits, skipped = select(arguments, task)

    probes, cuts = fit_probes(arguments, task, splits)
    result = describe(arguments, task)
    for name in arguments.splits:
        rows = splits[name]
        images = decode_images(rows.table, arguments.stored_size, arguments.cache_folder)
        masks = segmenter.find(images, arguments.batch_size, arguments.bf16)
        scores = judge(arguments, task, model, processor, images, masks)
        scores |= {variant: probe(images) for variant, probe in probes.items()}
        result["splits"][name] = report(arguments, task, rows, {key: scores[key] for key in VARIANTS}, masks, cuts)
        print(json.dumps({name: summary(result["splits"][name])}), flush=True)
    if arguments.output:
        write_json(arguments.output, result)
    write_skipped(arguments.output, skipped)
    return result


# ---- the task --------------------------------------------------------------------------------------------------


def fill_in(arguments: Arguments) -> None:
    """Refuse what would fail late; take the columns and classes that are left out from the training's recipe."""
    for name in ("batch_size", "resamples"):
        if getattr(arguments, name) < 1:
            raise SpcxrError(f"{name} must be at least 1; got {getattr(arguments, name)}")
    if arguments.stored_size < 32:
        raise SpcxrError(f"stored_size must be at least 32, for the thumbnails; got {arguments.stored_size}")
    recipe = Path(arguments.model) / "recipe.yaml"
    known = read_recipe(recipe) if recipe.is_file() else {}
    arguments.label_column = arguments.label_column or known.get("label_column")
    arguments.split_column = arguments.split_column or known.get("split_column")
    arguments.classes = arguments.classes or known.get("classes") or []
    for name in ("label_column", "split_column"):
        if not getattr(arguments, name):
            raise SpcxrError(f"{recipe}: no such recipe with a {name}; give --{name}")


def define_task(arguments: Arguments, model: PreTrainedModel) -> Task:
    """The classes and targets, all of them known to the model."""
    names = label_names(model.config)
    classes = match_classes(arguments.model, names, parse_classes(arguments.classes))
    for target in arguments.targets:
        for part in target.split(AGAINST):
            target_columns(part, names)
    return Task(classes, is_multi_label(model.config), [*names, *arguments.targets])


def select(arguments: Arguments, task: Task) -> tuple[dict[str, LabelledRows], dict[str, str]]:
    """The rows of `train` and `val`, for the probes, and of the splits to report; and rows left out: id -> cause."""
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    columns = str(arguments.label_column), str(arguments.split_column)
    wanted = dict.fromkeys(["train", "val", *arguments.splits])
    splits = {name: select_rows(table, *columns, name, task.classes, task.multi_label) for name in wanted}
    for column in arguments.by:
        splits["train"].table.column(column)  # refuse a missing one now
    return leave_out_broken(splits, arguments.on_error)


# ---- probes ----------------------------------------------------------------------------------------------------


def fit_probes(
    arguments: Arguments, task: Task, splits: Mapping[str, LabelledRows]
) -> tuple[dict[str, Features], Cuts]:
    """Variant -> from images (n, 1, S, S) uint8 to probabilities (n, classes); and each one's thresholds, by `val`."""
    sets = {name: splits[name] for name in ("train", "val")}
    images = {
        name: decode_images(rows.table, arguments.stored_size, arguments.cache_folder) for name, rows in sets.items()
    }
    targets = {name: rows.targets.double().numpy() for name, rows in sets.items()}
    probes, cuts = {}, {}
    for variant, features in tqdm(FEATURES.items(), desc="probes", unit="probe"):
        found = {name: features(images[name]) for name in sets}
        probes[variant] = choose_probe(features, found, targets, task.multi_label)
        cuts[variant] = choose_cuts(task, probes[variant](images["val"]), targets["val"])
    return probes, cuts


def choose_cuts(task: Task, values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Target -> the threshold with the greatest sensitivity + specificity; of those that have both sides here."""
    cuts = {}
    for target in task.targets:
        score, held = ranked(values, truth, target, task.names)
        known = ~np.isnan(held)
        if len(np.unique(held[known])) == 2:
            cuts[target] = thresholds(score[known], held[known])["youden"]
    return cuts


# ---- masked images ---------------------------------------------------------------------------------------------


def pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image[0].numpy()) for image in images]


def judge(
    arguments: Arguments,
    task: Task,
    model: PreTrainedModel,
    processor: Any,
    images: torch.Tensor,
    masks: torch.Tensor,
) -> Scores:
    """The model's probabilities (n, classes) on whole and on masked images."""
    hidden: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "model": torch.zeros_like,
        "lungs_masked": lambda lungs: lungs,
        "lung_box_masked": boxes,
        "lungs_only": torch.logical_not,
    }

    def shown(hide: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Image.Image]:
        for part, lungs in zip(images.split(64), masks.split(64), strict=True):
            yield from pictures(filled(part, hide(lungs)))

    options = (arguments.batch_size, arguments.bf16)
    return {
        variant: to_probabilities(
            predict_logits(model, processor, shown(hide), *options, variant), task.multi_label
        ).numpy()
        for variant, hide in hidden.items()
    }


# ---- the report ------------------------------------------------------------------------------------------------


def describe(arguments: Arguments, task: Task) -> dict:
    """What the figures are of."""
    return {
        "model": Path(arguments.model).resolve().name,
        "lungs": Path(arguments.lungs).resolve().name,
        "label_column": arguments.label_column,
        "split_column": arguments.split_column,
        "classes": task.classes,
        "targets": task.targets,
        "variants": VARIANTS,
        "resamples": arguments.resamples,
        "seed": arguments.seed,
        "splits": {},
    }


def report(
    arguments: Arguments, task: Task, rows: LabelledRows, scores: Scores, masks: torch.Tensor, cuts: Cuts
) -> dict:
    """The figures of one split: every variant's, and those within the values of a column."""
    areas = masks.float().mean(dim=(1, 2))
    truth = rows.targets.double().numpy()
    groups = patient_groups(rows.patients, len(rows))
    entry: dict = {
        "images": len(rows),
        "patients": len(set(groups)) if groups else None,
        "mean_lung_area": float(areas.mean()),
        "images_without_lungs": int((areas < SMALLEST_LUNGS).sum()),
        "variants": {variant: {"targets": {}} for variant in scores},
    }
    if not task.multi_label:
        for variant, values in scores.items():
            entry["variants"][variant] |= class_figures(arguments, task, rows, values)
    add_targets(arguments, task, entry["variants"], scores, truth, groups)
    add_accuracies(arguments, task, entry["variants"], scores, truth, groups, cuts)
    entry["by"] = {column: by_value(arguments, task, rows, scores, column) for column in arguments.by}
    return entry


def class_figures(arguments: Arguments, task: Task, rows: LabelledRows, values: np.ndarray) -> dict:
    """Balanced accuracy, accuracy and each class's recall, with intervals."""
    whole = classification_report(
        values,
        rows.targets.argmax(dim=1).numpy(),
        task.names,
        rows.patients,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    entry = {key: whole[key] for name in ("balanced_accuracy", "accuracy") for key in (name, f"{name}_ci95")}
    recalls = {name: [one["accuracy"], one["accuracy_ci95"]] for name, one in whole["classes"].items()}
    return entry | {"recall": {name: {"recall": value, "recall_ci95": ci} for name, (value, ci) in recalls.items()}}


def add_targets(
    arguments: Arguments, task: Task, entries: dict, scores: Scores, truth: np.ndarray, groups: Any
) -> None:
    """Put the AUROC of every target, and what of the model's survives, into each variant's entry."""
    for target in task.targets:
        sides = [ranked(values, truth, target, task.names) for values in scores.values()]
        levels = [ScoreLevels(score, held) for score, held in sides]

        def aurocs(rows: np.ndarray, levels: list[ScoreLevels] = levels) -> np.ndarray:
            return np.array([areas(*one.cumulative(rows))[0] for one in levels])

        found = aurocs(np.arange(len(truth)))
        draws = bootstrap_draws(aurocs, len(truth), groups, arguments.resamples, arguments.seed)
        for number, variant in enumerate(scores):
            entries[variant]["targets"][target] = {
                "auroc": found[number],
                "auroc_ci95": interval(draws[:, number]),
                "survives": share(found[number], found[0]),
                "survives_ci95": interval(share(draws[:, number], draws[:, 0])),
            }


def add_accuracies(
    arguments: Arguments, task: Task, entries: dict, scores: Scores, truth: np.ndarray, groups: Any, cuts: Cuts
) -> None:
    """Put the share of right decisions at its threshold into the entry of each variant and target that has one."""
    for variant, chosen in cuts.items():
        for target, cut in chosen.items():
            score, held = ranked(scores[variant], truth, target, task.names)
            right = np.where(np.isnan(held), np.nan, (score >= cut) == (held > 0.5))

            def accuracy(rows: np.ndarray, right: np.ndarray = right) -> float:
                known = right[rows][~np.isnan(right[rows])]
                return float(known.mean()) if len(known) else np.nan

            draws = bootstrap_draws(accuracy, len(right), groups, arguments.resamples, arguments.seed)
            entries[variant]["targets"][target] |= {
                "threshold": cut,
                "accuracy": accuracy(np.arange(len(right))),
                "accuracy_ci95": interval(draws),
            }


def ranked(values: np.ndarray, truth: np.ndarray, target: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n,) of a target and whether it holds, 1, 0 or NaN; of "a / b" where neither holds it is NaN."""
    first, _, second = target.partition(AGAINST)
    score, held = (target_values(one, first, names) for one in (values, truth))
    if second:
        other, other_held = (target_values(one, second, names) for one in (values, truth))
        score = score / (score + other + 1e-12)
        held = np.where(held + other_held == 1, held, np.nan)
    return score, held


def share(figure: Any, whole: Any) -> Any:
    """(figure - 0.5) / (whole - 0.5); NaN where the model itself is hardly better than chance."""
    known = np.asarray(whole) - 0.5
    return np.where(known > 0.01, (np.asarray(figure) - 0.5) / np.where(known > 0.01, known, 1.0), np.nan)


def interval(draws: np.ndarray) -> list[float] | None:
    """The middle 95 % of the draws that are defined."""
    defined = draws[~np.isnan(draws)]
    return np.quantile(defined, [0.025, 0.975]).tolist() if len(defined) else None


def by_value(arguments: Arguments, task: Task, rows: LabelledRows, scores: Scores, column: str) -> dict:
    """The AUROC of every target within each value of a column; where nothing has both sides it is null."""
    cells = np.array([str(cell) for cell in rows.table.column(column)])
    found = {}
    for value in sorted(set(cells)):
        kept = cells == value
        part = rows.where(kept)
        entries: dict = {variant: {"targets": {}} for variant in scores}
        groups = patient_groups(part.patients, len(part))
        inside = {variant: values[kept] for variant, values in scores.items()}
        add_targets(arguments, task, entries, inside, part.targets.double().numpy(), groups)
        found[value] = {"images": len(part), "variants": entries}
    return found


def summary(entry: dict) -> dict:
    """AUROC by variant and target, to print."""
    return {
        variant: {target: round(float(one["auroc"]), 3) for target, one in found["targets"].items()}
        for variant, found in entry["variants"].items()
    }


if __name__ == "__main__":
    run_script(main)
