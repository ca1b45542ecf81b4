"""Fine-tune an encoder to classify radiographs, by one label each or by several that may hold at once (multi-label).

    spcxr finetune small_224 --init-from CHECKPOINT --data ../shared/data

The same command resumes from the newest checkpoint. `--from-scratch true` trains the same network without pretraining,
`--freeze-encoder true` the head alone, `--lora-rank 8` LoRA adapters and the head. `--init-from` takes SPCXR and any
other family that AutoModelForImageClassification loads. `--seeds 0 1 2` makes a run of each, in `output/seed-<n>`, and
`output/results.json` with means and standard deviations. `--lungs MODEL --lung-only-prob 0.5` fills everything but the
lungs in half of the views; the model is then chosen by the mean of its figures on whole images and on lungs alone.

The model is chosen on the rows `val`; the rows `test` and `shift` are neither learned from nor measured: `evaluate.py`
reports on them. A split that leaks between any of them is refused (`--allow-leaks`, `--exclude`).
"""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spcxr_hf import SpcxrError
from spcxr_hf.data.batches import BalancedSet, MicroBatch, RadiographSet, draw_rows, select
from spcxr_hf.data.labels import names_in, parse_classes, targets_of
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable, decode_set, fingerprint_rows
from spcxr_hf.evaluation.metrics import check_packages
from spcxr_hf.evaluation.shortcuts import lungs_alone
from spcxr_hf.files import atomic_folder, write_json
from spcxr_hf.models.loading import set_attention
from spcxr_hf.models.lungs import Segmenter, find_lungs, load_segmenter
from spcxr_hf.quality.checks import SplitArguments, check_split, write_skipped
from spcxr_hf.training.arguments import (
    check_values,
    flag,
    learning_rate_schedule,
    parse_arguments,
    run_script,
    save_recipe,
)
from spcxr_hf.training.checkpoints import list_checkpoints
from spcxr_hf.training.classifiers import (
    ClassifierArguments,
    Pixels,
    build_classifier,
    choose_linear_head,
    classifier_groups,
    head_input,
    merge_adapters,
    put_head,
    set_training,
)
from spcxr_hf.training.engine import Run
from spcxr_hf.training.losses import METRICS, MULTI_LABEL_METRICS, class_weights, classification_loss, measure
from spcxr_hf.training.run_report import write_card
from spcxr_hf.transforms.augment import AugmentationArguments, mix, resize

CURVES = {"loss": "loss", "loss on val": "val_loss", "AUROC on val": "val_auroc"}  # name -> column of the log


@dataclass
class Arguments(AugmentationArguments, SplitArguments, ClassifierArguments):
    """Fine-tune an encoder to classify radiographs."""

    label_column: str = flag(
        "label",
        "column of the labels: one for each row (a list counts as normal, if empty, or abnormal); "
        "with multi_label a list of those that hold, or a struct with a field for each",
    )
    split_column: str = flag("split", "column of the splits; its rows train and val are read")
    classes: list[str] = flag(
        [],
        "classes in their order, as `normal pneumonia=bacterial+viral`; rows of other labels are "
        "left out. By default the labels of the rows train, sorted",
    )
    label_fraction: float = flag(1.0, "share of each class's training images that is used")
    seeds: list[int] = flag([], "a run for each, in output/seed-<n>; by default one run, of `seed`")
    balance: str = flag("none", "for rare classes: none; loss: higher weight; sampling: balanced sampling")
    label_smoothing: float = flag(0.0, "share of a target that is spread over all classes")
    mixup: float = flag(0.0, "alpha of mixup; 0: none")
    cutmix: float = flag(0.0, "alpha of CutMix; 0: none; with mixup, either half the time")
    metric: str = flag("auroc", f"chooses the model on val: {', '.join(METRICS)}")
    head_from_probe: bool = flag(
        False, "start with a logistic regression on the encoder's features as the head (LP-FT)"
    )
    lungs: str | None = flag(None, "folder or Hub id of a segmentation model with a label `lung`")
    lung_only_prob: float = flag(0.0, "share of the views in which all but the lungs is filled with the image's mean")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    runs = arguments_of_runs(arguments)
    results = [fine_tune(one) for one in runs]
    if arguments.seeds:  # mean and standard deviation (n - 1) over the seeds
        values = {name: np.array([result["val"][name] for result in results]) for name in results[0]["val"]}
        summary = {name: results[0][name] for name in ("metric", "label_fraction", "images")}
        summary["val"] = {
            name: {"mean": each.mean(), "sd": each.std(ddof=1) if len(each) > 1 else math.nan}
            for name, each in values.items()
        }
        summary["seeds"] = {str(result["seed"]): result for result in results}
        write_json(Path(arguments.output) / "results.json", summary)


def fine_tune(arguments: Arguments) -> dict:
    """One run; its figures on val."""
    with Run(arguments) as run:
        labels, training, validation, fingerprint = load_sets(arguments, run)
        model = build_classifier(arguments, labels)
        pixels = Pixels.of(arguments, model)
        if arguments.head_from_probe and not list_checkpoints(run.output):
            fit_head(arguments, run, model, pixels, training, validation)
        run.start(model, classifier_groups(model, arguments.layer_decay), fingerprint)
        train(arguments, run, pixels, training, validation)
        counts = (training.columns["targets"] == 1).sum(dim=0).tolist()
        result = {
            "seed": arguments.seed,
            "label_fraction": arguments.label_fraction,
            "images": {"train": len(training), "val": len(validation)},
            "train_images_by_class": dict(zip(labels, counts, strict=True)),
            "metric": arguments.metric,
            "step": run.state["figures_step"],
            "val": run.state["figures"]["whole"],
            **{f"val_{version}": found for version, found in run.state["figures"].items() if version != "whole"},
        }
        if run.is_main:
            finish(arguments, run, pixels, result)
    return result


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late, or that would ignore a flag."""
    check_packages()
    check_values(
        arguments,
        {
            "metric": MULTI_LABEL_METRICS if arguments.multi_label else METRICS,
            "balance": ("none", "loss", "sampling"),
        },
        {"label_fraction": "(0, 1]", "label_smoothing": "[0, 1)", "lung_only_prob": "[0, 1]"}
        | dict.fromkeys(("mixup", "cutmix", "lora_rank"), "[0, inf)"),
    )
    if bool(arguments.lung_only_prob) != bool(arguments.lungs):
        raise SpcxrError("lungs (a segmentation model) and lung_only_prob (above 0) go together")
    if arguments.freeze_encoder and arguments.lora_rank:
        raise SpcxrError("freeze_encoder and lora_rank exclude each other")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise SpcxrError(f"a seed appears twice among the seeds {' '.join(map(str, arguments.seeds))}")
    arguments.views(arguments.image_size)


def arguments_of_runs(arguments: Arguments) -> list[Arguments]:
    """The command line of each run, one for each seed."""
    if not arguments.seeds:
        return [arguments]
    runs = []
    for seed in arguments.seeds:
        output = str(Path(arguments.output) / f"seed-{seed}")
        repository = arguments.push_to_hub and f"{arguments.push_to_hub}-seed-{seed}"
        runs.append(dataclasses.replace(arguments, seed=seed, seeds=[], output=output, push_to_hub=repository))
    return runs


# ---- labels ----------------------------------------------------------------------------------------------------


def find_classes(arguments: Arguments, training: RadiographTable, validation: RadiographTable) -> dict[str, list[str]]:
    """The classes of the command line, or those of the data; the rows val hold no others.

    Raises:
        SpcxrError: there is one class only, or the rows val hold a label that the rows train do not.
    """
    column, multi_label = arguments.label_column, arguments.multi_label
    found, expected = (
        {name for cell in table.column(column) for name in names_in(cell, multi_label)}
        for table in (training, validation)
    )
    classes = parse_classes(arguments.classes or sorted(found))
    if not arguments.classes and expected - found:
        raise SpcxrError(
            f"{training.name}: no image of {', '.join(sorted(expected - found))}, which {column} of val holds"
        )
    if len(classes) < (1 if multi_label else 2):
        raise SpcxrError(f"{training.name}: {column} holds one class only: {', '.join(classes) or 'none at all'}")
    return classes


# ---- sets ------------------------------------------------------------------------------------------------------


def load_sets(arguments: Arguments, run: Run) -> tuple[list[str], RadiographSet, RadiographSet, dict]:
    """Names of the classes, the rows `train` and `val`, decoded, and the fingerprint of rows and labels.

    Columns of the sets are "targets" (n, classes) and, with a segmentation model, "lungs" (n, S, S).
    """
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    splits = [table.where(arguments.split_column, split) for split in ("train", "val")]
    classes = find_classes(arguments, splits[0], splits[1])
    check_split(
        table, arguments.split_column, arguments.allow_leaks, processes=run.accelerator, cache=arguments.cache_folder
    )
    segmenter = load_segmenter(arguments.lungs, run.accelerator.device) if arguments.lungs else None
    sets: list[RadiographSet] = []
    skipped: dict[str, str] = {}
    prints = {"classes": str(classes)}
    with run.accelerator.main_process_first():  # the first writes the cache, the others read it
        for name, split in zip(("train", "val"), splits, strict=True):
            images, lost, prints[name] = load_set(arguments, split, classes, segmenter)
            sets.append(images)
            skipped |= lost
    if run.is_main:
        write_skipped(run.output, skipped)
    training, validation = draw_labels(arguments, sets[0], list(classes)), sets[1]
    measured = measure(torch.zeros(len(validation), len(classes)), validation.columns["targets"], arguments.multi_label)
    if math.isnan(measured[arguments.metric]):
        raise SpcxrError(f"{splits[1].name}: {arguments.metric} is not defined on it, since no class has both sides")
    training = training.to(run.accelerator.device) if arguments.cache == "device" else training
    if arguments.balance == "sampling":
        training = BalancedSet(training.images, training.ids, training.columns)
    return list(classes), training, validation, prints


def load_set(
    arguments: Arguments, table: RadiographTable, classes: dict[str, list[str]], segmenter: Segmenter | None
) -> tuple[RadiographSet, dict[str, str], str]:
    """Decode the images of a split that have a label; id -> cause of those skipped; the fingerprint of the rest."""
    cells = table.column(arguments.label_column)
    targets = torch.tensor([targets_of(cell, classes, arguments.multi_label) for cell in cells])
    known = ~targets.isnan().all(dim=1)
    if not known.any():
        raise SpcxrError(f"{table.name}: no row has a label in {arguments.label_column} that is one of the classes")
    kept = RadiographTable(table.rows.filter(pa.array(known.tolist())), table.name)
    decoded = decode_set(kept, arguments.stored_size, arguments.cache_folder, on_error=arguments.on_error)
    columns = {"targets": targets[known][decoded.rows]}
    if segmenter is not None:
        columns["lungs"] = find_lungs(
            segmenter, decoded, arguments.cache_folder, bf16=arguments.mixed_precision == "bf16"
        )
    images = RadiographSet(decoded.images, decoded.table.ids, columns)
    return images, decoded.skipped, fingerprint_rows(decoded.table, [arguments.label_column])


def draw_labels(arguments: Arguments, training: RadiographSet, classes: list[str]) -> RadiographSet:
    """The share of the images that the run may learn from: as large of each class, drawn by the seed.

    Raises:
        SpcxrError: a class has no images, or a batch is larger than the remaining set.
    """
    if arguments.label_fraction < 1:
        training = select(training, draw_rows(training.columns["targets"], arguments.label_fraction, arguments.seed))
    counts = (training.columns["targets"] == 1).sum(dim=0).tolist()
    without = [name for name, count in zip(classes, counts, strict=True) if not count]
    if without:
        why = (
            f"label_fraction {arguments.label_fraction} leaves"
            if arguments.label_fraction < 1
            else "the rows train have"
        )
        raise SpcxrError(f"{arguments.data}: {why} no images of {', '.join(without)}")
    if arguments.batch_size > len(training):
        raise SpcxrError(f"a batch of {arguments.batch_size} is larger than the set of {len(training)} images")
    return training


# ---- the head --------------------------------------------------------------------------------------------------


def fit_head(
    arguments: Arguments,
    run: Run,
    model: PreTrainedModel,
    pixels: Pixels,
    training: RadiographSet,
    validation: RadiographSet,
) -> None:
    """Give the model the head of a logistic regression on its features of the images, whole and as lungs alone.

    It is fitted on the CPU, wherever the images are kept.
    """
    sets = []
    for images in (training, validation):
        kinds = versions(images).values()
        features = torch.cat([embed(run, model, pixels, kind) for kind in kinds])
        sets.append((features, images.columns["targets"].cpu().repeat(len(kinds), 1)))
    weights = class_weights(training.columns["targets"].cpu(), arguments.balance != "none", arguments.multi_label)
    put_head(model, choose_linear_head(sets[0], sets[1], arguments.multi_label, weights))
    set_training(model, arguments.freeze_encoder)


def embed(run: Run, model: PreTrainedModel, pixels: Pixels, images: torch.Tensor) -> torch.Tensor:
    """What the head sees of stored images (n, 1, H, W): (n, D). Every process takes its share of them."""
    model.to(run.accelerator.device).eval()
    parts = images.split(run.plan.micro_batch_size)
    features = []
    for part in parts[run.plan.process :: run.plan.processes]:
        pixel_values = pixels.normalise(resize(part.float() / 255, pixels.size)).to(run.accelerator.device)
        with run.autocast():
            features.append(head_input(model, pixel_values, **pixels.options))
    return torch.cat(run.collect(features))


# ---- training --------------------------------------------------------------------------------------------------


def versions(images: RadiographSet) -> dict[str, torch.Tensor]:
    """The images (n, 1, S, S) of a set: `whole`, and where their lungs are known `lungs`, all else filled."""
    whole = {"whole": images.images}
    return (
        whole | {"lungs": lungs_alone(images.images, images.columns["lungs"])} if "lungs" in images.columns else whole
    )


def draw_views(
    arguments: Arguments, pixels: Pixels, micro_batch: MicroBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views of these images, mixed or not: pixel_values (B, C, S, S) and targets (B, classes)."""
    images = micro_batch.images
    generator = torch.Generator(images.device).manual_seed(micro_batch.seed)
    if arguments.lung_only_prob:
        images = lungs_alone(images, micro_batch.columns["lungs"], arguments.lung_only_prob, generator)
    views = pixels.normalise(arguments.views(arguments.image_size)(images, generator))
    views, targets = mix(views, micro_batch.columns["targets"], arguments.mixup, arguments.cutmix, micro_batch.seed)
    return views.to(device), targets.to(device)


def train(arguments: Arguments, run: Run, pixels: Pixels, training: RadiographSet, validation: RadiographSet) -> None:
    """The loop: view, classify, step; now and then a checkpoint with its figures on val."""
    learning_rate = learning_rate_schedule(arguments)
    every = training.columns["targets"]
    weights = class_weights(every, arguments.balance == "loss", arguments.multi_label)
    weights = weights.to(run.accelerator.device)
    known_share = 1 - every.isnan().float().mean().item()
    seen = versions(validation)
    metrics = MULTI_LABEL_METRICS if arguments.multi_label else METRICS
    columns = [column(version, name) for version in seen for name in metrics]
    for step, micro_batches in run.steps(training, CURVES):
        for micro_batch in micro_batches:
            pixel_values, targets = draw_views(arguments, pixels, micro_batch, run.accelerator.device)
            with run.forward(micro_batch) as model:
                logits = model(pixel_values, **pixels.options).logits
            smoothing = arguments.label_smoothing
            loss = classification_loss(logits, targets, arguments.multi_label, weights, smoothing, known_share)
            run.backward(loss)
        run.update(learning_rate(step), arguments.weight_decay)
        run.scores = dict.fromkeys(columns, "")
        if run.is_due:
            validate(arguments, run, pixels, validation, seen)


def validate(
    arguments: Arguments, run: Run, pixels: Pixels, validation: RadiographSet, seen: dict[str, torch.Tensor]
) -> None:
    """Measure the model on the versions of val that it is chosen by, and keep it if it is the best so far."""
    targets = validation.columns["targets"]
    figures = {
        name: measure(predict(arguments, run, pixels, images), targets, arguments.multi_label)
        for name, images in seen.items()
    }
    sign = -1 if arguments.metric == "loss" else 1  # the engine's best is the highest
    chosen_by = sum(found[arguments.metric] for found in figures.values()) / len(figures)
    run.keep_best(f"val_{arguments.metric}", sign * chosen_by, arguments.patience)
    run.scores = {
        column(version, name): "" if math.isnan(value) else round(value, 5)
        for version, found in figures.items()
        for name, value in found.items()
    }
    if run.state.get("best_step") == run.state["step"] + 1:
        run.state["figures"] = figures
        run.state["figures_step"] = run.state["step"] + 1


def column(version: str, figure: str) -> str:
    """What the log calls a figure on a version of val."""
    return f"val_{figure}" if version == "whole" else f"val_{version}_{figure}"


@torch.no_grad()
def predict(arguments: Arguments, run: Run, pixels: Pixels, images: torch.Tensor) -> torch.Tensor:
    """Logits (n, classes) of stored images (n, 1, H, W); every process predicts its share of them."""
    parts = images.split(run.plan.micro_batch_size)
    logits = []
    with run.averaged() as model:
        model.eval()
        for part in parts[run.plan.process :: run.plan.processes]:
            pixel_values = pixels.normalise(resize(part.float() / 255, pixels.size)).to(run.accelerator.device)
            with run.autocast():
                logits.append(model(pixel_values, **pixels.options).logits.float().cpu())
        set_training(model, arguments.freeze_encoder)
    return torch.cat(run.collect(logits))


# ---- the end ---------------------------------------------------------------------------------------------------


def finish(arguments: Arguments, run: Run, pixels: Pixels, result: dict) -> None:
    """Write the best model, with its image processor and recipe, into `output/final`, and its figures."""
    with run.averaged() as model, atomic_folder(run.output / "final") as folder:
        model.load_state_dict(load_file(run.output / "best" / "model.safetensors", device="cpu"))
        if arguments.lora_rank:
            merge_adapters(model)
        set_attention(model.eval(), "sdpa")
        type(model).save_pretrained(model, folder)  # in the library's own form, not the checkpoints'
        pixels.processor().save_pretrained(folder)
        save_recipe(arguments, folder / "recipe.yaml")
        images = {**result["images"], **{f"train: {name}": n for name, n in result["train_images_by_class"].items()}}
        write_card(folder, "image-classification", arguments.init_from, result["val"], images)
    write_json(run.output / "results.json", result)
    run.report("Classification")
    print(f"saved {run.output / 'final'}")


if __name__ == "__main__":
    run_script(main)
