"""Pretrain the encoder by group-masked model learning (GMML): reconstruct radiographs from their corrupted versions.

    accelerate launch training_scripts/pretrain.py training_scripts/recipes/pretrain_small_224.yaml --data DATA

Started again with the same command, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from spcxr_hf import SpcxrError, SpcxrForPreTraining, SpcxrImageProcessor
from spcxr_hf.augment import Views, normalise, resize
from spcxr_hf.convert import change_image_size
from spcxr_hf.corruption import Corrupted, GroupMasking
from spcxr_hf.data import batches, decode_images, read_table, step_seed
from spcxr_hf.modeling.image_processing_spcxr import RADIOGRAPH_MEAN, RADIOGRAPH_STD
from spcxr_hf.pictures import save_grid, to_grey
from spcxr_hf.recipe import parse_arguments, save_recipe
from spcxr_hf.training import (
    CosineSchedule,
    StepLog,
    new_config,
    parameter_groups,
    resume,
    save_checkpoint,
    set_schedule,
    start_accelerator,
)


@dataclass
class Arguments:
    """Pretrain the SPCXR encoder by group-masked model learning."""

    data: str = field(metadata={"help": "Parquet shards or a folder of pictures"})
    output: str = field(metadata={"help": "folder for checkpoints, pictures and the log"})
    pretrain_only: bool = field(default=True, metadata={"help": "only rows whose column `pretrain` is true"})
    cache: str | None = field(default=None, metadata={"help": "folder that keeps the decoded images between starts"})
    stored_size: int = field(default=256, metadata={"help": "images are kept in memory at this size, in pixels"})
    size: str = field(default="small", metadata={"help": "tiny, small or base"})
    image_size: int = field(default=224, metadata={"help": "side of a view in pixels, a multiple of 16"})
    init_from: str | None = field(default=None, metadata={"help": "checkpoint to start from, of any image size"})
    attention: str = field(
        default="sdpa", metadata={"help": "attention implementation; eager is faster on a CPU below 224 px"}
    )
    drop_path_rate: float = field(default=0.1, metadata={"help": "stochastic depth of the last block"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps in all"})
    batch_size: int = field(default=64, metadata={"help": "images per optimiser step over all processes"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    final_learning_rate: float = field(default=1e-6, metadata={"help": "learning rate at the end of the cosine"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    decay_steps: int | None = field(
        default=None, metadata={"help": "length of the cosine at the end; all steps after the warm-up by default"}
    )
    weight_decay: float = field(default=0.04, metadata={"help": "weight decay at the start"})
    final_weight_decay: float = field(default=0.4, metadata={"help": "weight decay at the end of its cosine"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta"})
    max_grad_norm: float = field(default=3.0, metadata={"help": "gradients are clipped to this norm"})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.25, 1.0], metadata={"help": "area of a crop, least and largest"}
    )
    fills: list[str] = field(
        default_factory=lambda: ["noise", "replace"], metadata={"help": "noise, zeros, block, replace"}
    )
    drop_share: list[float] = field(
        default_factory=lambda: [0.5, 0.75], metadata={"help": "share to corrupt, least and largest"}
    )
    replace_share: float = field(default=0.3, metadata={"help": "share to replace from another image"})
    max_side: float = field(default=0.3, metadata={"help": "largest side of a group as a share of the image's"})
    align: int = field(default=1, metadata={"help": "groups keep to multiples of this many pixels"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    log_every: int = field(default=20, metadata={"help": "steps between rows of the log"})
    seed: int = field(default=0, metadata={"help": "everything random follows from it"})
    device_cache: bool = field(default=True, metadata={"help": "keep the decoded images on the accelerator"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    accelerator = start_accelerator(arguments.mixed_precision)
    output = Path(arguments.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_recipe(arguments, output / "recipe.yaml")

    images = load_images(arguments, accelerator)
    model = build_model(arguments)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, arguments.adam_beta2), fused=True)
    state = resume(output, model, optimizer) or {"step": 0, "seconds": 0.0, "images_seen": model.config.images_seen}
    model, optimizer = accelerator.prepare(model, optimizer)

    train(arguments, accelerator, images, model, optimizer, state)
    if accelerator.is_main_process:
        finish(arguments, accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    accelerator.end_training()


def load_images(arguments: Arguments, accelerator: Accelerator) -> torch.Tensor:
    """Every image, (n, 1, stored_size, stored_size) uint8, on the accelerator if it is to be kept there."""
    table = read_table(arguments.data)
    if arguments.pretrain_only:
        table = table.where("pretrain", True)
    with accelerator.main_process_first():  # the first writes the cache, the others read it
        images = decode_images(table, arguments.stored_size, arguments.cache)
    return images.to(accelerator.device) if arguments.device_cache else images


def build_model(arguments: Arguments) -> SpcxrForPreTraining:
    """A new model, or the one to start from, at this run's image size."""
    torch.manual_seed(arguments.seed)
    if arguments.init_from is None:
        config = new_config(arguments.size, image_size=arguments.image_size, drop_path_rate=arguments.drop_path_rate)
        model = SpcxrForPreTraining(config)
    else:
        model = SpcxrForPreTraining.from_pretrained(
            arguments.init_from, drop_path_rate=arguments.drop_path_rate, dtype=torch.float32
        )
        change_image_size(model, arguments.image_size)
    model.config.images_seen = getattr(model.config, "images_seen", 0)  # travels with every checkpoint
    model.set_attn_implementation(arguments.attention)
    return model.train()


def train(
    arguments: Arguments,
    accelerator: Accelerator,
    images: torch.Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
) -> None:
    """The loop: view, corrupt, reconstruct, step; now and then a checkpoint and pictures."""
    learning_rates, weight_decays = schedules(arguments)
    step_model = torch.compile(model) if arguments.compile else model
    first_step, seen = state["step"], state["images_seen"]
    progress = tqdm(
        total=arguments.steps * arguments.batch_size,
        initial=first_step * arguments.batch_size,
        unit="image",
        disable=not accelerator.is_main_process,
    )
    log = StepLog(Path(arguments.output) / "log.csv", first_step)
    started = time.perf_counter() - state["seconds"]

    order = batches(len(images), arguments.batch_size, arguments.seed, first_step, arguments.steps)
    for done, rows in enumerate(order, first_step + 1):
        rows = rows[accelerator.process_index :: accelerator.num_processes]
        clean, corrupted = draw_views(
            arguments, images, rows, step_seed(arguments.seed, done - 1) + accelerator.process_index
        )
        set_schedule(optimizer, learning_rates(done - 1), weight_decays(done - 1))
        with accelerator.autocast():
            loss = step_model(
                pixel_values=corrupted.pixel_values.to(accelerator.device),
                bool_masked_pos=corrupted.mask.to(accelerator.device),
                labels=clean.to(accelerator.device),
            ).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        seen += arguments.batch_size
        progress.update(arguments.batch_size)
        if not accelerator.is_main_process:
            continue
        due = done % arguments.save_every == 0 or done == arguments.steps
        if due or done % arguments.log_every == 0:
            row = {"loss": round(loss.item(), 5), "learning_rate": f"{learning_rates(done - 1):.3g}"}
            progress.set_postfix(row)
            log.add(step=done, **row)
        if due:
            bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            bare.config.images_seen = seen
            seconds = round(time.perf_counter() - started, 1)
            save_checkpoint(Path(arguments.output), done, bare, optimizer, {"seconds": seconds, "images_seen": seen})
            draw(arguments, bare, images)
            log.draw(Path(arguments.output) / "loss.png", {"L1 over corrupted pixels": "loss"})


def schedules(arguments: Arguments) -> tuple[CosineSchedule, CosineSchedule]:
    """Learning rate and weight decay over the steps."""
    learning_rate = CosineSchedule(
        arguments.learning_rate,
        arguments.final_learning_rate,
        arguments.warmup_steps,
        arguments.steps,
        arguments.decay_steps,
    )
    return learning_rate, CosineSchedule(arguments.weight_decay, arguments.final_weight_decay, 0, arguments.steps)


def draw_views(
    arguments: Arguments, images: torch.Tensor, rows: torch.Tensor, seed: int
) -> tuple[torch.Tensor, Corrupted]:
    """Random views of these rows, normalised (B, 1, S, S), and their corruption."""
    torch.manual_seed(seed)  # stochastic depth
    generator = torch.Generator(images.device).manual_seed(seed)
    make_views = Views(size=arguments.image_size, scale=(arguments.crop_scale[0], arguments.crop_scale[1]))
    clean = normalise(make_views(images[rows.to(images.device)], generator))
    return clean, masking(arguments)(clean, generator)


def masking(arguments: Arguments) -> GroupMasking:
    return GroupMasking(
        fills=tuple(arguments.fills),
        drop_share=(arguments.drop_share[0], arguments.drop_share[1]),
        replace_share=arguments.replace_share,
        max_side=arguments.max_side,
        align=arguments.align,
    )


@torch.no_grad()
def draw(arguments: Arguments, model: SpcxrForPreTraining, images: torch.Tensor) -> None:
    """Write `reconstruction.png`: clean, corrupted, reconstructed and mask, a row for each of four images."""
    count = min(4, len(images))
    generator = torch.Generator(images.device).manual_seed(arguments.seed)
    grey = resize(images[:: len(images) // count][:count], arguments.image_size) / 255
    clean = normalise(grey)
    corrupted = masking(arguments)(clean, generator)
    model.eval()
    reconstruction = model(corrupted.pixel_values.to(model.device)).reconstruction.to(clean.device)
    model.train()
    columns = [
        to_grey(values, RADIOGRAPH_MEAN[0], RADIOGRAPH_STD[0])
        for values in (clean, corrupted.pixel_values, reconstruction)
    ]
    columns.append(corrupted.mask.squeeze(1).float())
    save_grid(list(zip(*columns, strict=True)), Path(arguments.output) / "reconstruction.png")


def finish(arguments: Arguments, model: SpcxrForPreTraining) -> None:
    """Write the final model, with its image processor and recipe, into `output/final`."""
    final = Path(arguments.output) / "final"
    model.eval().set_attn_implementation("sdpa")
    model.save_pretrained(final)
    size = {"height": arguments.image_size, "width": arguments.image_size}
    SpcxrImageProcessor(size=size).save_pretrained(final)
    save_recipe(arguments, final / "recipe.yaml")
    print(f"saved {final}")


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
