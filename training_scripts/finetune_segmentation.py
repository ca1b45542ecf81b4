"""Fine-tune a pretrained encoder to find the lungs: `SpcxrForSemanticSegmentation` with the labels background and lung.

    accelerate launch training_scripts/finetune_segmentation.py training_scripts/recipes/finetune_segmentation.yaml \
        --init_from model_cards/CHECKPOINT --data ../shared/data

Started again with the same command, it goes on from its newest checkpoint. `--from_scratch true` trains the same
network without pretraining. The model is chosen on the rows `val`; `test` and `shift` are never read here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForSemanticSegmentation, SpcxrImageProcessor
from spcxr_hf.augment import Views, normalise, resize
from spcxr_hf.convert import change_image_size
from spcxr_hf.data import RadiographTable, batches, decode_images, decode_masks, read_table, step_seed
from spcxr_hf.metrics import dice
from spcxr_hf.pictures import overlay, save_grid
from spcxr_hf.recipe import parse_arguments, save_recipe
from spcxr_hf.training import (
    CosineSchedule,
    StepLog,
    layerwise_groups,
    new_config,
    resume,
    save_checkpoint,
    set_schedule,
    start_accelerator,
)

LABELS = {0: "background", 1: "lung"}
CURVES = {"cross-entropy + Dice loss": "loss", "Dice on val": "val_dice"}  # name -> column of the log


@dataclass
class Arguments:
    """Fine-tune SPCXR to segment the lungs."""

    data: str = field(metadata={"help": "Parquet shards with lung masks"})
    output: str = field(metadata={"help": "folder for checkpoints, pictures and the log"})
    init_from: str | None = field(
        default=None, metadata={"help": "checkpoint to start from, of any task and image size"}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "random weights; of `init_from` only the config is used"}
    )
    size: Literal["tiny", "small", "base"] = field(
        default="small", metadata={"help": "tiny, small or base: from scratch, where there is no init_from"}
    )
    image_size: int = field(default=224, metadata={"help": "side of the input in pixels, a multiple of 16"})
    stored_size: int = field(
        default=256, metadata={"help": "images and masks are kept in memory at this size, in pixels"}
    )
    cache: str | None = field(default=None, metadata={"help": "folder that keeps the decoded images between starts"})
    attention: str = field(
        default="sdpa", metadata={"help": "attention implementation; eager is faster on a CPU below 224 px"}
    )
    drop_path_rate: float = field(default=0.1, metadata={"help": "stochastic depth of the last block"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps in all"})
    batch_size: int = field(default=32, metadata={"help": "images per optimiser step over all processes"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate of the head"})
    final_learning_rate: float = field(default=1e-6, metadata={"help": "learning rate at the end of the cosine"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    layer_decay: float = field(default=0.75, metadata={"help": "learning rate of a block relative to the one above it"})
    weight_decay: float = field(default=0.05, metadata={"help": "weight decay of AdamW"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.4, 1.0], metadata={"help": "area of a crop, least and largest"}
    )
    flip: float = field(default=0.5, metadata={"help": "probability of a left-right flip"})
    brightness: float = field(default=0.2, metadata={"help": "largest shift of the grey values, on 0 .. 1"})
    contrast: float = field(default=0.4, metadata={"help": "largest relative change of the contrast"})
    blur: float = field(default=0.2, metadata={"help": "probability of a Gaussian blur"})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16"})
    save_every: int = field(default=100, metadata={"help": "steps between checkpoints, each with its Dice on val"})
    log_every: int = field(default=10, metadata={"help": "steps between rows of the log"})
    final: str = field(default="best", metadata={"help": "what becomes output/final: best (by Dice on val) or last"})
    seed: int = field(default=0, metadata={"help": "everything random follows from it"})


@dataclass
class LungSet:
    """Radiographs (n, 1, S, S) uint8 and their lung masks (n, S, S) booleans, S the stored size."""

    images: torch.Tensor
    masks: torch.Tensor


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    accelerator = start_accelerator(arguments.mixed_precision)
    output = Path(arguments.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_recipe(arguments, output / "recipe.yaml")

    table = read_table(arguments.data)
    with accelerator.main_process_first():  # the first writes the cache, the others read it
        training, validation = (load_set(arguments, table.where("lung_split", split)) for split in ("train", "val"))
    model = build_model(arguments)
    groups = layerwise_groups(model, arguments.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, arguments.adam_beta2), fused=True)
    state = resume(output, model, optimizer) or {"step": 0, "seconds": 0.0, "best_dice": -1.0, "best_step": 0}
    model, optimizer = accelerator.prepare(model, optimizer)

    train(arguments, accelerator, training, validation, model, optimizer, state)
    if accelerator.is_main_process:
        finish(arguments, accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    accelerator.end_training()


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late, or train something else than was meant."""
    if arguments.init_from is None and not arguments.from_scratch:
        raise SpcxrError("give --init_from CHECKPOINT, or --from_scratch true")
    if arguments.mixed_precision not in ("no", "bf16"):
        raise SpcxrError(f"mixed_precision must be no or bf16; got {arguments.mixed_precision!r}")
    if arguments.final not in ("best", "last"):
        raise SpcxrError(f"final must be best or last; got {arguments.final!r}")


def load_set(arguments: Arguments, table: RadiographTable) -> LungSet:
    """Decode the images and masks of a split."""
    images = decode_images(table, arguments.stored_size, arguments.cache)
    return LungSet(images, decode_masks(table, arguments.stored_size))


def build_model(arguments: Arguments) -> SpcxrForSemanticSegmentation:
    """The pretrained encoder, or a new one, under a new decoder, at this run's image size."""
    torch.manual_seed(arguments.seed)
    values: dict[str, Any] = {
        "drop_path_rate": arguments.drop_path_rate,
        "id2label": LABELS,
        "label2id": {label: index for index, label in LABELS.items()},
    }
    if not arguments.from_scratch:
        model = SpcxrForSemanticSegmentation.from_pretrained(arguments.init_from, dtype=torch.float32, **values)
        change_image_size(model, arguments.image_size)
    elif arguments.init_from is not None:
        values["image_size"] = arguments.image_size
        model = SpcxrForSemanticSegmentation(SpcxrConfig.from_pretrained(arguments.init_from, **values))
    else:
        values["image_size"] = arguments.image_size
        model = SpcxrForSemanticSegmentation(new_config(arguments.size, **values))
    model.set_attn_implementation(arguments.attention)
    return model.train()


def train(
    arguments: Arguments,
    accelerator: Accelerator,
    training: LungSet,
    validation: LungSet,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
) -> None:
    """The loop: view, segment, step; now and then a checkpoint with its Dice on val."""
    schedule = CosineSchedule(
        arguments.learning_rate, arguments.final_learning_rate, arguments.warmup_steps, arguments.steps
    )
    make_views = augmentation(arguments)
    first_step = state["step"]
    progress = tqdm(
        total=arguments.steps * arguments.batch_size,
        initial=first_step * arguments.batch_size,
        unit="image",
        disable=not accelerator.is_main_process,
    )
    log = StepLog(Path(arguments.output) / "log.csv", first_step)
    started = time.perf_counter() - state["seconds"]

    order = batches(len(training.images), arguments.batch_size, arguments.seed, first_step, arguments.steps)
    for done, rows in enumerate(order, first_step + 1):
        rows = rows[accelerator.process_index :: accelerator.num_processes]
        seed = step_seed(arguments.seed, done - 1) + accelerator.process_index
        pixel_values, labels = draw_views(make_views, training, rows, seed)
        learning_rate = schedule(done - 1)
        set_schedule(optimizer, learning_rate, arguments.weight_decay)
        with accelerator.autocast():
            loss = model(pixel_values.to(accelerator.device), labels=labels.to(accelerator.device)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        progress.update(arguments.batch_size)
        if not accelerator.is_main_process:
            continue
        row = {"step": done, "loss": round(loss.item(), 5), "learning_rate": f"{learning_rate:.3g}", "val_dice": ""}
        progress.set_postfix(loss=f"{row['loss']:.4f}", lr=row["learning_rate"], best=f"{state['best_dice']:.4f}")
        due = done % arguments.save_every == 0 or done == arguments.steps
        if due:
            seconds = round(time.perf_counter() - started, 1)
            row["val_dice"] = keep(arguments, accelerator, validation, model, optimizer, state, done, seconds)
        if due or done % arguments.log_every == 0:
            log.add(**row)
        if due:
            log.draw(Path(arguments.output) / "loss.png", CURVES, y_label="")


def augmentation(arguments: Arguments) -> Views:
    return Views(
        size=arguments.image_size,
        scale=(arguments.crop_scale[0], arguments.crop_scale[1]),
        flip=arguments.flip,
        brightness=arguments.brightness,
        contrast=arguments.contrast,
        blur=arguments.blur,
    )


def draw_views(
    make_views: Views, training: LungSet, rows: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views of these rows: pixel_values (B, 1, S, S) and labels (B, S, S)."""
    torch.manual_seed(seed)  # stochastic depth
    generator = torch.Generator(training.images.device).manual_seed(seed)
    views, masks = make_views.with_masks(training.images[rows], training.masks[rows], generator)
    assert masks is not None  # they come back as they are given
    return normalise(views), masks.long()


def keep(
    arguments: Arguments,
    accelerator: Accelerator,
    validation: LungSet,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    step: int,
    seconds: float,
) -> float:
    """Write a checkpoint, and the model once more if it is the best so far; returns its mean Dice on val."""
    output, bare = Path(arguments.output), accelerator.unwrap_model(model)
    masks = predict(bare, validation.images, arguments.image_size, arguments.batch_size, accelerator)
    value = round(dice(masks, validation.masks).mean().item(), 5)
    if value > state["best_dice"]:
        state.update(best_dice=value, best_step=step)
        bare.save_pretrained(output / "best")
    state.update(seconds=seconds)
    save_checkpoint(output, step, bare, optimizer, {name: state[name] for name in state if name != "step"})
    draw(validation, masks, output / "masks.png")
    return value


@torch.no_grad()
def predict(
    model: torch.nn.Module, images: torch.Tensor, image_size: int, batch_size: int, accelerator: Accelerator
) -> torch.Tensor:
    """Lung masks (n, H, W), booleans, of stored images (n, 1, H, W) that the model sees at image_size."""
    model.eval()
    masks = []
    for part in images.split(batch_size):
        pixel_values = normalise(resize(part.float() / 255, image_size)).to(accelerator.device)
        with accelerator.autocast():
            logits = model(pixel_values).logits
        logits = torch.nn.functional.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear")
        masks.append(logits.argmax(dim=1).bool().cpu())
    model.train()
    return torch.cat(masks)


def draw(validation: LungSet, masks: torch.Tensor, path: Path, count: int = 4) -> None:
    """Write a picture: image, mask drawn by a human, mask of the model, a row for each of `count` images of val."""
    chosen = range(0, len(masks), max(1, len(masks) // count))[:count]
    rows = []
    for index in chosen:
        grey = validation.images[index, 0].float() / 255
        rows.append(
            [
                overlay(grey, torch.zeros_like(masks[index])),
                overlay(grey, validation.masks[index]),
                overlay(grey, masks[index]),
            ]
        )
    save_grid(rows, path)


def finish(arguments: Arguments, model: SpcxrForSemanticSegmentation) -> None:
    """Write the best (or the last) model, with its image processor and recipe, into `output/final`."""
    output = Path(arguments.output)
    if arguments.final == "best":
        model = SpcxrForSemanticSegmentation.from_pretrained(output / "best")
    model.eval().set_attn_implementation("sdpa")
    model.save_pretrained(output / "final")
    size = {"height": arguments.image_size, "width": arguments.image_size}
    SpcxrImageProcessor(size=size).save_pretrained(output / "final")
    save_recipe(arguments, output / "final" / "recipe.yaml")
    print(f"saved {output / 'final'}")


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
