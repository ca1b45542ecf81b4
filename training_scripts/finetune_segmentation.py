"""Fine-tune a pretrained encoder to segment the lungs, or several structures: `SpcxrForSemanticSegmentation`.

    spcxr finetune-segmentation small_224 --init-from CHECKPOINT --data ../shared/data

`--data` may be a folder with `images/` and `masks/`, a picture and its mask under one name. Where the set has no column
`lung_split`, its column `split` counts; where it has no split at all, one is drawn by patient (`with_splits`).

Structures that overlap are the bits of one mask, named from the lowest: a sigmoid map for each.

    python training_scripts/finetune_segmentation.py \
        training_scripts/recipes/finetune_segmentation_anatomy_cpu_256.yaml \
        --init-from model_cards/lung-segmentation --data ../shared/rsna_jsrt/jsrt-00.parquet

The same command resumes from the newest checkpoint. `--from-scratch true` trains the same network without pretraining.
The model is chosen on the rows `val`; the rows `test` and `shift` are neither learned from nor measured. A `lung_split`
that leaks between any of them is refused (`--allow-leaks`, `--exclude`). `--train-splits` names other rows to learn
from; of a set without `val` the last model is the result.
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

from spcxr_hf import SpcxrForSemanticSegmentation, SpcxrImageProcessor, SpcxrModel
from spcxr_hf.data.batches import MicroBatch, RadiographSet
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import decode_set, fingerprint_rows, structure_masks
from spcxr_hf.drawing import overlay, save_grid
from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation.metrics import dice
from spcxr_hf.files import atomic_folder, note, os_errors
from spcxr_hf.models.convert import change_image_size
from spcxr_hf.models.loading import load_config, load_network
from spcxr_hf.quality.checks import SplitArguments, check_split, write_skipped
from spcxr_hf.quality.splits import with_splits
from spcxr_hf.training.arguments import (
    FineTuningArguments,
    flag,
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
    """Fine-tune SPCXR to segment the lungs, or several structures."""

    mask_column: str = flag("lung_mask", "column of the masks")
    structures: list[str] = flag([], "names of the mask's bits, from the lowest; by default it is of the lungs alone")
    split_column: str = flag("lung_split", "column of the splits")
    train_splits: list[str] = flag(["train"], "its values to learn from")

    doublings: int = flag(2, "how often the decoder doubles the grid of patches")

    head_scale: float = flag(1.0, "learning rate of the decoder, relative to the encoder's last block")
    frozen_blocks: int = flag(0, "the embeddings and so many blocks stay as they are")

    def labels(self) -> dict[int, str]:
        """Number -> label.

        Raises:
            SpcxrError: the structures are no names of bits, or a flip would exchange left and right.
        """
        names = self.structures
        if len(set(names)) < len(names) or len(names) > 8:
            raise SpcxrError(f"structures must be at most 8 different names, one for each bit; got {' '.join(names)}")
        if self.flip and any(name.startswith(("left", "right")) for name in names):
            raise SpcxrError("a flip exchanges left and right, which the structures tell apart: add --flip 0")
        return dict(enumerate(names)) if names else LABELS


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    arguments.views(arguments.image_size)  # refuses what is out of range
    arguments.labels()
    with Run(arguments) as run:
        training, validation, fingerprint = load_sets(arguments, run)
        model = build_model(arguments)
        groups = layerwise_groups(model, arguments.layer_decay, head_scale=arguments.head_scale)
        run.start(model, groups, fingerprint)
        train(arguments, run, training, validation)
        if run.is_main:
            images = {"train": len(training)} | ({} if validation is None else {"val": len(validation)})
            finish(arguments, run, images)


def load_sets(arguments: Arguments, run: Run) -> tuple[RadiographSet, RadiographSet | None, dict[str, str]]:
    """The rows to learn from and those to choose on (if any), decoded, and the fingerprint of both."""
    column = arguments.split_column
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    table = with_splits(table, column)
    splits = {"train": table.where_any(column, arguments.train_splits)}
    if "val" in table.column(column):
        splits["val"] = table.where(column, "val")
    else:
        note(f"{table.name}: no row has {column} = 'val'; the last model is the result")
    check_split(table, column, arguments.allow_leaks, processes=run.accelerator, cache=arguments.cache_folder)
    sets: list[RadiographSet] = []
    skipped: dict[str, str] = {}
    prints: dict[str, str] = {}
    with run.accelerator.main_process_first():  # the first writes the cache, the others read it
        for name, split in splits.items():
            decoded = decode_set(
                split,
                arguments.stored_size,
                arguments.cache_folder,
                masks=True,
                mask_column=arguments.mask_column,
                structures=len(arguments.structures),
                on_error=arguments.on_error,
            )
            assert decoded.masks is not None  # they were asked for
            sets.append(RadiographSet(decoded.images, decoded.table.ids, {"masks": decoded.masks}))
            skipped |= decoded.skipped
            prints[name] = fingerprint_rows(decoded.table, [arguments.mask_column])
    if run.is_main:
        write_skipped(run.output, skipped)
    training, validation = sets if len(sets) == 2 else (sets[0], None)
    training = training.to(run.accelerator.device) if arguments.cache == "device" else training
    return training, validation, prints


def build_model(arguments: Arguments) -> SpcxrForSemanticSegmentation:
    """The pretrained encoder, or a new one, under a new decoder, at this run's image size."""
    torch.manual_seed(arguments.seed)
    labels = arguments.labels()
    values: dict[str, Any] = {
        "drop_path_rate": arguments.drop_path_rate,
        "id2label": labels,
        "label2id": {label: index for index, label in labels.items()},
        "segmentation_doublings": arguments.doublings,
        "problem_type": "multi_label_classification" if arguments.structures else None,
    }
    if not arguments.from_scratch:
        model, fresh = load_network(
            SpcxrForSemanticSegmentation, str(arguments.init_from), new="head", dtype=torch.float32, **values
        )
        change_image_size(model, arguments.image_size)
        if arguments.structures and "decoder.classifier.weight" in fresh:
            # At the usual 0.02 a short run ends before the logits are far enough from 0 for sharp edges.
            torch.nn.init.normal_(model.decoder.classifier.weight, std=0.3)
    elif arguments.init_from is not None:
        values["image_size"] = arguments.image_size
        model = SpcxrForSemanticSegmentation(load_config(arguments.init_from, any_family=False, **values))
    else:
        values["image_size"] = arguments.image_size
        model = SpcxrForSemanticSegmentation(new_config(arguments.size, **values))
    if arguments.frozen_blocks:
        encoder = cast(SpcxrModel, model.base_model)
        for part in (encoder.embeddings, *encoder.encoder.layers[: arguments.frozen_blocks]):
            part.requires_grad_(False)
    model.set_attn_implementation(arguments.attention)
    return model.train()


def train(arguments: Arguments, run: Run, training: RadiographSet, validation: RadiographSet | None) -> None:
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
        if run.is_due and validation is not None:
            masks = predict(arguments, run, validation.images)
            value = round(dice(masks, human_masks(arguments, validation.columns["masks"])).mean().item(), 5)
            run.keep_best("val_dice", value, arguments.patience)
            if run.is_main:
                draw(validation, masks, run.output / "masks.png")


def draw_views(arguments: Arguments, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views of these images: pixel_values (B, 1, S, S) and the model's labels."""
    generator = torch.Generator(micro_batch.images.device).manual_seed(micro_batch.seed)
    views, masks = arguments.views(arguments.image_size).with_masks(
        micro_batch.images, human_masks(arguments, micro_batch.columns["masks"]), generator
    )
    assert masks is not None  # they come back as they are given
    return normalise(views), masks.float() if arguments.structures else masks.long()


def human_masks(arguments: Arguments, masks: torch.Tensor) -> torch.Tensor:
    """Stored masks (n, H, W) -> booleans of that shape, or (n, structures, H, W)."""
    return structure_masks(masks, len(arguments.structures)) if arguments.structures else masks


@torch.no_grad()
def predict(arguments: Arguments, run: Run, images: torch.Tensor) -> torch.Tensor:
    """Masks of stored images (n, 1, H, W), as `human_masks` gives them; every process predicts its share of them."""
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
    """Masks of stored images (B, 1, H, W) that the model sees at its own size."""
    pixel_values = normalise(resize(images.float() / 255, arguments.image_size)).to(run.accelerator.device)
    with run.autocast():
        logits = model(pixel_values).logits
    logits = torch.nn.functional.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear")
    return (logits > 0 if arguments.structures else logits.argmax(dim=1).bool()).cpu()


def draw(validation: RadiographSet, masks: torch.Tensor, path: Path, count: int = 4) -> None:
    """Write a picture: image, mask drawn by a human, mask of the model, a row for each of `count` images of val."""
    chosen = range(0, len(masks), max(1, len(masks) // count))[:count]
    rows = []
    for index in chosen:
        grey = validation.images[index, 0].float() / 255
        rows.append(
            [
                overlay(grey, torch.zeros(grey.shape, dtype=torch.bool)),
                overlay(grey, validation.columns["masks"][index] > 0),
                overlay(grey, masks[index].reshape(-1, *grey.shape).any(dim=0)),
            ]
        )
    with os_errors(path):
        save_grid(rows, path)


def finish(arguments: Arguments, run: Run, images: dict[str, int]) -> None:
    """Write the best model, or the last, with its image processor and recipe, into `output/final`."""
    size = {"height": arguments.image_size, "width": arguments.image_size}
    if "best" not in run.state:  # there was nothing to choose on
        with run.averaged() as last, atomic_folder(run.output / "best") as folder:
            last.save_pretrained(folder)
    with atomic_folder(run.output / "final") as folder:
        model, _ = load_network(SpcxrForSemanticSegmentation, str(run.output / "best"))
        model.eval().set_attn_implementation("sdpa")
        model.save_pretrained(folder)
        SpcxrImageProcessor(size=size, overlapping_labels=bool(arguments.structures) or None).save_pretrained(folder)
        save_recipe(arguments, folder / "recipe.yaml")
        figures = {"Dice": run.state["best"]} if "best" in run.state else {}
        write_card(folder, "image-segmentation", arguments.init_from, figures, images)
    run.report("Segmentation", ["loss.png", "masks.png"] if "val" in images else ["loss.png"])
    print(f"saved {run.output / 'final'}")


if __name__ == "__main__":
    run_script(main)
