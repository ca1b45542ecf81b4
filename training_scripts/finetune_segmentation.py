"""Fine-tune a pretrained encoder to segment the lungs: `SpcxrForSemanticSegmentation`, labels background and lung.

    spcxr finetune-segmentation small_224 --init-from CHECKPOINT --data ../shared/data

`--data` may be a folder with `images/` and `masks/`, a picture and its mask under one name. Where the set has no column
`lung_split`, its column `split` counts; where it has no split at all, one is drawn by patient (`with_splits`).

The same command resumes from the newest checkpoint. `--from-scratch true` trains the same network without pretraining.
The model is chosen on the rows `val`; the rows `test` and `shift` are neither learned from nor measured. A `lung_split`
that leaks between any of them is refused (`--allow-leaks`, `--exclude`).
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import torch

from spcxr_hf import SpcxrForSemanticSegmentation, SpcxrImageProcessor
from spcxr_hf.data.batches import MicroBatch, RadiographSet
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import decode_set, fingerprint_rows
from spcxr_hf.drawing import overlay, save_grid
from spcxr_hf.evaluation.metrics import dice
from spcxr_hf.files import atomic_folder, os_errors
from spcxr_hf.models.convert import change_image_size
from spcxr_hf.models.loading import load_config, load_network
from spcxr_hf.quality.checks import SplitArguments, check_split, write_skipped
from spcxr_hf.quality.splits import with_splits
from spcxr_hf.training.arguments import (
    FineTuningArguments,
    learning_rate_schedule,
    parse_arguments,
    run_script,
    save_recipe,
)
from spcxr_hf.training.engine import Run
from spcxr_hf.training.optim import layerwise_groups, new_config
from spcxr_hf.training.run_report import write_card
from spcxr_hf.transforms.augment import AugmentationArguments, normalise, resize

LABELS = {0: "background", 1: "lung"}
CURVES = {"cross-entropy + Dice loss": "loss", "Dice on val": "val_dice"}  # name -> column of the log


@dataclass
class Arguments(AugmentationArguments, SplitArguments, FineTuningArguments):
    """Fine-tune SPCXR to segment the lungs."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    arguments.views(arguments.image_size)  # refuses what is out of range
    with Run(arguments) as run:
        training, validation, fingerprint = load_sets(arguments, run)
        model = build_model(arguments)
        run.start(model, layerwise_groups(model, arguments.layer_decay), fingerprint)
        train(arguments, run, training, validation)
        if run.is_main:
            finish(arguments, run, {"train": len(training), "val": len(validation)})


def load_sets(arguments: Arguments, run: Run) -> tuple[RadiographSet, RadiographSet, dict[str, str]]:
    """The rows `train` and `val`, decoded, and the fingerprint of both."""
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    table = with_splits(table, "lung_split")
    splits = [table.where("lung_split", split) for split in ("train", "val")]
    check_split(table, "lung_split", arguments.allow_leaks, processes=run.accelerator, cache=arguments.cache_folder)
    sets, skipped, prints = [], {}, {}
    with run.accelerator.main_process_first():  # the first writes the cache, the others read it
        for name, split in zip(("train", "val"), splits, strict=True):
            decoded = decode_set(
                split, arguments.stored_size, arguments.cache_folder, masks=True, on_error=arguments.on_error
            )
            assert decoded.masks is not None  # they were asked for
            sets.append(RadiographSet(decoded.images, decoded.table.ids, {"masks": decoded.masks}))
            skipped |= decoded.skipped
            prints[name] = fingerprint_rows(decoded.table, ["lung_mask"])
    if run.is_main:
        write_skipped(run.output, skipped)
    training, validation = sets
    training = training.to(run.accelerator.device) if arguments.cache == "device" else training
    return training, validation, prints


def build_model(arguments: Arguments) -> SpcxrForSemanticSegmentation:
    """The pretrained encoder, or a new one, under a new decoder, at this run's image size."""
    torch.manual_seed(arguments.seed)
    values: dict[str, Any] = {
        "drop_path_rate": arguments.drop_path_rate,
        "id2label": LABELS,
        "label2id": {label: index for index, label in LABELS.items()},
    }
    if not arguments.from_scratch:
        model, _ = load_network(
            SpcxrForSemanticSegmentation, str(arguments.init_from), new="head", dtype=torch.float32, **values
        )
        change_image_size(model, arguments.image_size)
    elif arguments.init_from is not None:
        values["image_size"] = arguments.image_size
        model = SpcxrForSemanticSegmentation(load_config(arguments.init_from, any_family=False, **values))
    else:
        values["image_size"] = arguments.image_size
        model = SpcxrForSemanticSegmentation(new_config(arguments.size, **values))
    model.set_attn_implementation(arguments.attention)
    return model.train()


def train(arguments: Arguments, run: Run, training: RadiographSet, validation: RadiographSet) -> None:
    """The loop: view, segment, step; now and then a checkpoint with its Dice on val."""
    learning_rate = learning_rate_schedule(arguments)
    for step, micro_batches in run.steps(training, CURVES):
        for micro_batch in micro_batches:
            pixel_values, labels = draw_views(arguments, micro_batch)
            with run.forward(micro_batch) as model:
                loss = model(pixel_values.to(run.accelerator.device), labels=labels.to(run.accelerator.device)).loss
            run.backward(loss)
        run.update(learning_rate(step), arguments.weight_decay)
        run.scores = {"val_dice": ""}
        if run.is_due:
            masks = predict(arguments, run, validation.images)
            value = round(dice(masks, validation.columns["masks"]).mean().item(), 5)
            run.keep_best("val_dice", value, arguments.patience)
            if run.is_main:
                draw(validation, masks, run.output / "masks.png")


def draw_views(arguments: Arguments, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views of these images: pixel_values (B, 1, S, S) and labels (B, S, S)."""
    generator = torch.Generator(micro_batch.images.device).manual_seed(micro_batch.seed)
    views, masks = arguments.views(arguments.image_size).with_masks(
        micro_batch.images, micro_batch.columns["masks"], generator
    )
    assert masks is not None  # they come back as they are given
    return normalise(views), masks.long()


@torch.no_grad()
def predict(arguments: Arguments, run: Run, images: torch.Tensor) -> torch.Tensor:
    """Lung masks (n, H, W), booleans, of stored images (n, 1, H, W); every process predicts its share of them."""
    parts = images.split(run.plan.micro_batch_size)
    own = parts[run.plan.process :: run.plan.processes]
    with run.averaged() as model:
        model.eval()
        masks = [predict_part(arguments, run, cast(SpcxrForSemanticSegmentation, model), part) for part in own]
        model.train()
    return torch.cat(run.collect(masks))


def predict_part(
    arguments: Arguments, run: Run, model: SpcxrForSemanticSegmentation, images: torch.Tensor
) -> torch.Tensor:
    """Lung masks (B, H, W), booleans, of stored images (B, 1, H, W) that the model sees at its own size."""
    pixel_values = normalise(resize(images.float() / 255, arguments.image_size)).to(run.accelerator.device)
    with run.autocast():
        logits = model(pixel_values).logits
    logits = torch.nn.functional.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear")
    return logits.argmax(dim=1).bool().cpu()


def draw(validation: RadiographSet, masks: torch.Tensor, path: Path, count: int = 4) -> None:
    """Write a picture: image, mask drawn by a human, mask of the model, a row for each of `count` images of val."""
    chosen = range(0, len(masks), max(1, len(masks) // count))[:count]
    rows = []
    for index in chosen:
        grey = validation.images[index, 0].float() / 255
        rows.append(
            [
                overlay(grey, torch.zeros_like(masks[index])),
                overlay(grey, validation.columns["masks"][index]),
                overlay(grey, masks[index]),
            ]
        )
    with os_errors(path):
        save_grid(rows, path)


def finish(arguments: Arguments, run: Run, images: dict[str, int]) -> None:
    """Write the best model, with its image processor and recipe, into `output/final`."""
    size = {"height": arguments.image_size, "width": arguments.image_size}
    with atomic_folder(run.output / "final") as folder:
        model, _ = load_network(SpcxrForSemanticSegmentation, str(run.output / "best"))
        model.eval().set_attn_implementation("sdpa")
        model.save_pretrained(folder)
        SpcxrImageProcessor(size=size).save_pretrained(folder)
        save_recipe(arguments, folder / "recipe.yaml")
        write_card(folder, "image-segmentation", arguments.init_from, {"Dice": run.state["best"]}, images)
    run.report("Lung segmentation", ["loss.png", "masks.png"])
    print(f"saved {run.output / 'final'}")


if __name__ == "__main__":
    run_script(main)
