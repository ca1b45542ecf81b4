"""Calibrate a classifier on `val` and give it decision thresholds; both become part of the checkpoint.

    spcxr calibrate --model runs/finetune_classification/final --data ../shared/data \
        --label_column pneumonia_label --split_column pneumonia_split \
        --classes normal "bacterial pneumonia=bacterial" "viral pneumonia=viral" \
        --sums "bacterial pneumonia + viral pneumonia" --output runs/pneumonia_calibrated

Columns and classes may be left out where a `recipe.yaml` of the training is beside the weights. One temperature for
classes that exclude each other, a scale and a bias for each label that may hold with others; folded into the head's
weights, so that softmax or sigmoid of the logits is the calibrated probability everywhere. The folder `output` then has
weights, config (with the thresholds), image processor, recipe, `calibration.json` and, with matplotlib, two pictures.

Everything is fitted on `val`. The other splits are for the report: Brier score and expected calibration error before
and after, and the sensitivity and specificity that the thresholds reach there, with 95 % intervals by patient.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import numpy as np
import torch
from transformers import PreTrainedModel

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import parse_classes
from spcxr_hf.data.sets import read_set
from spcxr_hf.evaluation.bootstrap import bootstrap_draws, patient_groups
from spcxr_hf.evaluation.calibration import (
    JOIN,
    POINTS,
    Calibration,
    count_cases,
    decision_figures,
    fit_calibration,
    fold_into_head,
    operating_points,
    reliability_bins,
    set_operating_points,
    target_values,
    to_probabilities,
)
from spcxr_hf.evaluation.curves import Curve, Reliability, roc_curve
from spcxr_hf.evaluation.curves import reliability as reliability_diagram
from spcxr_hf.evaluation.metrics import BINS, classification_report, multilabel_report
from spcxr_hf.evaluation.plots import STYLES, draw_reliability, draw_roc, save_figure
from spcxr_hf.evaluation.predict import (
    LabelledRows,
    leave_out_broken,
    load_classifier,
    match_classes,
    open_images,
    predict_logits,
    select_rows,
)
from spcxr_hf.files import atomic_folder, write_json
from spcxr_hf.models.loading import is_multi_label, label_names
from spcxr_hf.quality.checks import SetArguments, write_skipped
from spcxr_hf.training.arguments import parse_arguments, read_recipe, run_script

RECIPE = "recipe.yaml"
DECISIONS = ("sensitivity", "specificity", "accuracy")


@dataclass(kw_only=True)
class Arguments(SetArguments):
    """Calibrate a classifier and choose its decision thresholds."""

    model: str = field(metadata={"help": "folder of a trained classifier with its image processor"})
    data: str = field(metadata={"help": "Parquet shards with a column of labels and a column of splits"})
    output: str = field(metadata={"help": "folder for the calibrated checkpoint and calibration.json"})
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
    sums: list[str] = field(
        default_factory=list,
        metadata={"help": f"classes that get a threshold together, joined by '{JOIN}', as 'bacterial{JOIN}viral'"},
    )
    exclude: str | None = field(
        default=None,
        metadata={"help": "text file of ids to leave out, one a line; by default the recipe's; empty: none"},
    )
    fit_on: str = field(default="val", metadata={"help": "split that everything is fitted on"})
    splits: list[str] = field(
        default_factory=lambda: ["val", "test"], metadata={"help": "splits to report; the fitted one is always there"}
    )
    min_cases: int = field(
        default=50, metadata={"help": "positives, and negatives, that a target needs on fit_on to get thresholds"}
    )
    operating_point: str = field(default="youden", metadata={"help": f"the default one: {', '.join(POINTS)}"})
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    bf16: bool = field(default=False, metadata={"help": "run the model in bfloat16 autocast"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    resamples: int = field(default=2000, metadata={"help": "draws of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap"})


@dataclass(frozen=True)
class Split:
    """Predictions on a split: logits (n, classes) and the rows' targets (n, classes)."""

    rows: LabelledRows
    logits: torch.Tensor

    @property
    def targets(self) -> np.ndarray:
        return self.rows.targets.double().numpy()


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    model, processor = load_classifier(arguments.model, arguments.device)
    classes = match_classes(arguments.model, label_names(model.config), parse_classes(arguments.classes))
    multi_label = is_multi_label(model.config)
    rows, skipped = select(arguments, classes, multi_label)
    splits = predict(arguments, model, processor, rows)

    fitted = splits[arguments.fit_on]
    calibration = fit_calibration(fitted.logits, fitted.rows.targets, multi_label)
    points = operating_points(
        to_probabilities(calibration(fitted.logits), multi_label).numpy(), fitted.targets, list(classes), arguments.sums
    )
    fold_into_head(model, calibration)
    set_operating_points(model.config, reliable(arguments, points, fitted, list(classes)), arguments.operating_point)

    result = describe(arguments, model, classes, calibration)
    for name, split in splits.items():
        result["splits"][name] = report(arguments, split, calibration, list(classes), points, multi_label)
    save(arguments, model, processor, result)
    write_skipped(Path(arguments.output) / "calibration.json", skipped)
    draw(arguments, result, splits, calibration, list(classes), multi_label)
    return result


# ---- the command line ------------------------------------------------------------------------------------------


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late; fill in what the model's recipe says."""
    for name in ("batch_size", "resamples", "min_cases"):
        if getattr(arguments, name) < 1:
            raise SpcxrError(f"{name} must be at least 1; got {getattr(arguments, name)}")
    if arguments.operating_point not in POINTS:
        raise SpcxrError(f"operating_point must be {', '.join(POINTS)}; got {arguments.operating_point!r}")
    if Path(arguments.output).resolve() == Path(arguments.model).resolve():
        raise SpcxrError(f"{arguments.output}: the calibrated model needs a separate folder")
    there = {path.name for path in Path(arguments.output).glob("*")}
    if there and "calibration.json" not in there:  # the folder is replaced whole
        raise SpcxrError(f"{arguments.output}: holds something else than a calibrated model; name another folder")
    fill_in(arguments, Path(arguments.model) / RECIPE)


def fill_in(arguments: Arguments, recipe: Path) -> None:
    """Take the columns, classes and rows to leave out from the training's recipe where the command line has none."""
    known = read_recipe(recipe) if recipe.is_file() else {}
    arguments.label_column = arguments.label_column or known.get("label_column")
    arguments.split_column = arguments.split_column or known.get("split_column")
    arguments.classes = arguments.classes or known.get("classes") or []
    if arguments.exclude is None:
        arguments.exclude = known.get("exclude")
    for name in ("label_column", "split_column"):
        if not getattr(arguments, name):
            raise SpcxrError(f"{recipe}: no such recipe with a {name}; give --{name}")


# ---- the report ------------------------------------------------------------------------------------------------


def select(
    arguments: Arguments, classes: dict[str, list[str]], multi_label: bool
) -> tuple[dict[str, LabelledRows], dict[str, str]]:
    """The rows of every split, the fitted one first, and the rows left out: id -> cause.

    All labels are read before the first image is.
    """
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    columns = str(arguments.label_column), str(arguments.split_column)
    names = dict.fromkeys([arguments.fit_on, *arguments.splits])
    rows = {name: select_rows(table, *columns, name, classes, multi_label) for name in names}
    return leave_out_broken(rows, arguments.on_error)


def predict(
    arguments: Arguments, model: PreTrainedModel, processor: Any, rows: dict[str, LabelledRows]
) -> dict[str, Split]:
    """The logits of every split."""
    return {
        name: Split(
            part,
            predict_logits(
                model, processor, open_images(part.table), arguments.batch_size, arguments.bf16, part.table.name
            ),
        )
        for name, part in rows.items()
    }


def reliable(
    arguments: Arguments, points: dict[str, dict[str, float]], fitted: Split, names: list[str]
) -> dict[str, dict[str, float]]:
    """The points of the targets that the fitted split has enough cases of; the others are listed."""
    kept = {}
    for target, values in points.items():
        positives, negatives = count_cases(fitted.targets, target, names)
        if min(positives, negatives) >= arguments.min_cases:
            kept[target] = values
        else:
            cases = f"{arguments.fit_on} has {positives} positives and {negatives} negatives of it"
            print(f"no thresholds for {target!r}: {cases}, --min-cases is {arguments.min_cases}", flush=True)
    return kept


def describe(
    arguments: Arguments, model: PreTrainedModel, classes: dict[str, list[str]], calibration: Calibration
) -> dict:
    """Metadata of the report."""
    scales, biases = calibration.scale.tolist(), calibration.bias.tolist()
    entry: dict = {
        "model": Path(arguments.output).resolve().name,
        "problem_type": model.config.problem_type,
        "label_column": arguments.label_column,
        "split_column": arguments.split_column,
        "classes": classes,
        "fitted_on": arguments.fit_on,
        "method": "scale and bias of each label" if is_multi_label(model.config) else "temperature",
    }
    if is_multi_label(model.config):
        entry["scale"] = dict(zip(classes, scales, strict=True))
        entry["bias"] = dict(zip(classes, biases, strict=True))
    else:
        entry["temperature"] = 1 / scales[0]
    entry["min_cases"] = arguments.min_cases
    entry["operating_points"] = model.config.operating_points
    entry["operating_point"] = model.config.operating_point
    return entry | {"resamples": arguments.resamples, "seed": arguments.seed, "splits": {}}


def report(
    arguments: Arguments,
    split: Split,
    calibration: Calibration,
    names: list[str],
    points: dict[str, dict[str, float]],
    multi_label: bool,
) -> dict:
    """The figures of one split."""
    before = to_probabilities(split.logits, multi_label).numpy()
    after = to_probabilities(calibration(split.logits), multi_label).numpy()
    groups = patient_groups(split.rows.patients, len(split.rows))
    return {
        "images": len(split.rows),
        "patients": len(set(groups)) if groups else None,
        "before": calibration_figures(arguments, before, split, names, multi_label),
        "after": calibration_figures(arguments, after, split, names, multi_label),
        "reliability": {
            "before": reliability(before, split.targets, names, multi_label),
            "after": reliability(after, split.targets, names, multi_label),
        },
        "operating_points": {
            target: decisions(arguments, after, split, names, target, values) for target, values in points.items()
        },
    }


def calibration_figures(
    arguments: Arguments, probabilities: np.ndarray, split: Split, names: list[str], multi_label: bool
) -> dict:
    """Brier score and expected calibration error, with intervals; of labels their means and each label's."""
    options: dict[str, Any] = {"resamples": arguments.resamples, "seed": arguments.seed}
    if multi_label:
        whole = multilabel_report(probabilities, split.targets, names, split.rows.patients, **options)
        entry = pick(whole, ("mean_brier", "mean_ece"))
        return entry | {"labels": {name: pick(one, ("brier", "ece")) for name, one in whole["labels"].items()}}
    truth = split.targets.argmax(axis=1)
    return pick(
        classification_report(probabilities, truth, names, split.rows.patients, **options),
        ("brier", "ece", "accuracy", "balanced_accuracy"),
    )


def pick(whole: dict, names: Sequence[str]) -> dict:
    """These figures of a report, with their intervals."""
    return {key: whole[key] for name in names for key in (name, f"{name}_ci95")}


def reliability(probabilities: np.ndarray, targets: np.ndarray, names: list[str], multi_label: bool) -> Any:
    """The points of the diagram: of the most probable class, or of each label."""
    if not multi_label:
        hits = probabilities.argmax(axis=1) == targets.argmax(axis=1)
        return reliability_bins(probabilities.max(axis=1), hits.astype(float))
    columns = zip(names, probabilities.T, targets.T, strict=True)
    return {name: reliability_bins(scores, truth) for name, scores, truth in columns}


def decisions(
    arguments: Arguments,
    probabilities: np.ndarray,
    split: Split,
    names: list[str],
    target: str,
    values: dict[str, float],
) -> dict:
    """What a target's thresholds reach on a split."""
    truth = target_values(split.targets, target, names)
    kept = split.rows.where(~np.isnan(truth))
    scores, truth = target_values(probabilities, target, names)[~np.isnan(truth)], truth[~np.isnan(truth)]
    entry: dict = {"positives": int(truth.sum()), "negatives": int((1 - truth).sum())}
    groups = patient_groups(kept.patients, len(kept))
    for name, threshold in values.items():
        draws = bootstrap_draws(
            lambda rows, threshold=threshold: decision_figures(scores[rows], truth[rows], threshold),  # type: ignore[misc]
            len(scores),
            groups,
            arguments.resamples,
            arguments.seed,
        )
        reached = decision_figures(scores, truth, threshold)
        entry[name] = {"threshold": threshold}
        for figure, value, drawn in zip(DECISIONS, reached, draws.T, strict=True):
            entry[name] |= {figure: value, f"{figure}_ci95": interval(drawn) if np.isfinite(value) else None}
    return entry


def interval(draws: np.ndarray) -> list[float] | None:
    """The middle 95 % of the draws that are defined."""
    defined = draws[~np.isnan(draws)]
    return np.quantile(defined, [0.025, 0.975]).tolist() if len(defined) else None


# ---- the folder ------------------------------------------------------------------------------------------------


def save(arguments: Arguments, model: PreTrainedModel, processor: Any, result: dict) -> None:
    """Write the checkpoint and the figures."""
    with atomic_folder(Path(arguments.output)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if (Path(arguments.model) / RECIPE).is_file():
            shutil.copyfile(Path(arguments.model) / RECIPE, folder / RECIPE)
        write_json(folder / "calibration.json", result)
    for name, entry in result["splits"].items():
        shown = {when: {key: entry[when][key] for key in list(entry[when])[:4]} for when in ("before", "after")}
        print(json.dumps({name: shown}))
    print(f"saved {arguments.output}")


def draw(
    arguments: Arguments,
    result: dict,
    splits: dict[str, Split],
    calibration: Calibration,
    names: list[str],
    multi_label: bool,
) -> None:
    """Write `roc.png`, a panel for each target, and `reliability.png`, a panel for each split (of labels: the first).

    Both are of the calibrated probabilities; the thresholds are marked on the curve of the split that chose them.
    """
    if find_spec("matplotlib") is None:
        print('no pictures without matplotlib; `pip install "spcxr-hf[demo]"`', flush=True)
        return
    shown = {  # a panel takes no more lines than there are styles
        title: (split, to_probabilities(calibration(split.logits), multi_label).numpy())
        for title, split in list(splits.items())[: len(STYLES)]
    }
    chosen = result["splits"][arguments.fit_on]["operating_points"]  # none where no target has both sides
    if curves := roc_panels(arguments, shown, list(chosen), names):
        marks = {
            target: {name: (1 - at[name]["specificity"], at[name]["sensitivity"]) for name in POINTS}
            for target, at in chosen.items()
        }
        save_figure(draw_roc(curves, marks), Path(arguments.output) / "roc.png")
    if diagrams := reliability_panels(shown, names[0] if multi_label else None):
        save_figure(draw_reliability(diagrams), Path(arguments.output) / "reliability.png")


def roc_panels(
    arguments: Arguments, shown: dict[str, tuple[Split, np.ndarray]], targets: list[str], names: list[str]
) -> dict[str, dict[str, Curve]]:
    """Target -> split -> its curve, where the split has both sides."""
    panels: dict[str, dict[str, Curve]] = {}
    for target, (title, (split, probabilities)) in itertools.product(targets, shown.items()):
        scores, truth = target_values(probabilities, target, names), target_values(split.targets, target, names)
        if {0.0, 1.0} <= set(truth.tolist()):
            curve = roc_curve(scores, truth, split.rows.patients, arguments.resamples, arguments.seed)
            panels.setdefault(target, {})[title] = curve
    return panels


def reliability_panels(shown: dict[str, tuple[Split, np.ndarray]], label: str | None) -> dict[str, Reliability]:
    """Split -> the diagram of the most probable class or, with `label`, of the first label."""
    panels: dict[str, Reliability] = {}
    for title, (split, probabilities) in shown.items():
        if label is not None:
            scores, truth = probabilities[:, 0], split.targets[:, 0]
        else:
            hits = probabilities.argmax(axis=1) == split.targets.argmax(axis=1)
            scores, truth = probabilities.max(axis=1), hits.astype(float)
        if not np.isnan(truth).all():
            what = label or "most probable class"
            panels[f"{what}, {title}"] = reliability_diagram(scores, truth, BINS)
    return panels


if __name__ == "__main__":
    run_script(main)
