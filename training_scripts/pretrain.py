"""Pretrain the encoder by group-masked model learning (GMML): reconstruct radiographs from their corrupted versions.

    accelerate launch training_scripts/pretrain.py training_scripts/recipes/pretrain_small_112.yaml --data ../shared/data

Started again with the same command, it goes on from its newest checkpoint.
"""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining, SpcxrImageProcessor
from spcxr_hf.augment import Views
from spcxr_hf.convert import change_image_size
from spcxr_hf.corruption import GroupMasking
from spcxr_hf.data import batches, decode_images, read_table, step_seed
from spcxr_hf.pictures import save_curves, save_grid, to_grey
from spcxr_hf.recipe import parse_arguments, save_recipe
from spcxr_hf.training import CosineSchedule, parameter_groups, resume, save_checkpoint, set_schedule


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
    attention: str = field(default="sdpa", metadata={"help": "attention implementation; eager is faster on a CPU below 224 px"})
    drop_path_rate: float = field(default=0.1, metadata={"help": "stochastic depth of the last block"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps in all"})
    batch_size: int = field(default=64, metadata={"help": "images per optimiser step over all processes"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    final_learning_rate: float = field(default=1e-6, metadata={"help": "learning rate at the end of the cosine"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(default=0.04, metadata={"help": "weight decay at the start"})
    final_weight_decay: float = field(default=0.4, metadata={"help": "weight decay at the end of its cosine"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta"})
    max_grad_norm: float = field(default=3.0, metadata={"help": "gradients are clipped to this norm"})
    crop_scale: list[float] = field(default_factory=lambda: [0.25, 1.0], metadata={"help": "area of a crop, least and largest"})
    fills: list[str] = field(default_factory=lambda: ["noise", "replace"], metadata={"help": "noise, zeros, block, replace"})
    drop_share: list[float] = field(default_factory=lambda: [0.5, 0.75], metadata={"help": "share to corrupt, least and largest"})
    replace_share: float = field(default=0.3, metadata={"help": "share to replace from another image"})
    max_side: float = field(default=0.3, metadata={"help": "largest side of a group as a share of the image's"})
    align: int = field(default=1, metadata={"help": "groups keep to multiples of this many pixels"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    log_every: int = field(default=20, metadata={"help": "steps between rows of the log"})
    seed: int = field(default=0, metadata={"help": "everything random follows from it"})
    device_cache: bool = field(default=True, metadata={"help": "keep the decoded images on the accelerator"})


def main() -> None:
    arguments = parse_arguments(Arguments)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    output = Path(arguments.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        save_recipe(arguments, output / "recipe.yaml")

    images = load_images(arguments, accelerator)
    model = build_model(arguments)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, arguments.adam_beta2), fused=True)
    state = resume(output, model, optimizer) or {"step": 0, "images_seen": seen_before(arguments), "seconds": 0.0}
    model, optimizer = accelerator.prepare(model, optimizer)

    train(arguments, accelerator, images, model, optimizer, state, output)
    if accelerator.is_main_process:
        finish(arguments, accelerator.unwrap_model(model), images, output)
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
        config = SpcxrConfig.from_size(
            arguments.size, image_size=arguments.image_size, drop_path_rate=arguments.drop_path_rate
        )
        model = SpcxrForPreTraining(config)
    else:
        model = SpcxrForPreTraining.from_pretrained(
            arguments.init_from, drop_path_rate=arguments.drop_path_rate, dtype=torch.float32
        )
        change_image_size(model, arguments.image_size)
    model.set_attn_implementation(arguments.attention)
    return model.train()


def seen_before(arguments: Arguments) -> int:
    """How many images the checkpoint to start from had seen."""
    if arguments.init_from is None:
        return 0
    return getattr(SpcxrConfig.from_pretrained(arguments.init_from), "images_seen", 0)


def train(
    arguments: Arguments,
    accelerator: Accelerator,
    images: torch.Tensor,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    output: Path,
) -> None:
    """The loop: view, corrupt, reconstruct, step."""
    learning_rate = CosineSchedule(
        arguments.learning_rate, arguments.final_learning_rate, arguments.warmup_steps, arguments.steps
    )
    weight_decay = CosineSchedule(arguments.weight_decay, arguments.final_weight_decay, 0, arguments.steps)
    make_views = Views(size=arguments.image_size, scale=tuple(arguments.crop_scale))
    corrupt = masking(arguments)
    processor = SpcxrImageProcessor()
    mean, std = processor.image_mean[0], processor.image_std[0]
    step_model = torch.compile(model) if arguments.compile else model
    generator = torch.Generator(images.device)
    progress = tqdm(
        total=arguments.steps * arguments.batch_size,
        initial=state["step"] * arguments.batch_size,
        unit="image",
        disable=not accelerator.is_main_process,
    )
    log = StepLog(output / "log.csv", state["step"])
    started = time.perf_counter() - state["seconds"]
    seen_at_start = state["images_seen"] - state["step"] * arguments.batch_size

    for step, rows in enumerate(
        batches(len(images), arguments.batch_size, arguments.seed, state["step"], arguments.steps), state["step"]
    ):
        rows = rows[accelerator.process_index :: accelerator.num_processes]
        seed = step_seed(arguments.seed, step) + accelerator.process_index
        generator.manual_seed(seed)
        torch.manual_seed(seed)  # stochastic depth
        views = (make_views(images[rows.to(images.device)], generator) - mean) / std
        corrupted = corrupt(views, generator)

        set_schedule(optimizer, learning_rate(step), weight_decay(step))
        with accelerator.autocast():
            loss = step_model(
                pixel_values=corrupted.pixel_values.to(accelerator.device),
                bool_masked_pos=corrupted.mask.to(accelerator.device),
                labels=views.to(accelerator.device),
            ).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        progress.update(arguments.batch_size)
        done = step + 1
        if not accelerator.is_main_process:
            continue
        if done % arguments.log_every == 0 or done == arguments.steps:
            log.add(step=done, loss=round(loss.item(), 5), learning_rate=f"{learning_rate(step):.3g}")
            progress.set_postfix(loss=f"{loss.item():.4f}", lr=f"{learning_rate(step):.2g}")
        if done % arguments.save_every == 0 or done == arguments.steps:
            bare = accelerator.unwrap_model(model)
            bare.config.images_seen = seen_at_start + done * arguments.batch_size
            state = {"images_seen": bare.config.images_seen, "seconds": round(time.perf_counter() - started, 1)}
            save_checkpoint(output, done, bare, optimizer, state)
            draw(arguments, bare, images, output)
            log.draw(output / "loss.png")


def masking(arguments: Arguments) -> GroupMasking:
    return GroupMasking(
        fills=tuple(arguments.fills),
        drop_share=tuple(arguments.drop_share),
        replace_share=arguments.replace_share,
        max_side=arguments.max_side,
        align=arguments.align,
    )


class StepLog:
    """A CSV file with a row per logged step; on resume, rows after the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows: list[dict] = []
        if path.is_file() and step:
            with path.open(newline="", encoding="utf-8") as stream:
                self.rows = [row for row in csv.DictReader(stream) if int(row["step"]) <= step]

    def add(self, **row) -> None:
        self.rows.append(row)
        with self.path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self, path: Path) -> None:
        points = [(int(row["step"]), float(row["loss"])) for row in self.rows]
        save_curves({"L1 over corrupted pixels": points}, path, "step", "loss")


@torch.no_grad()
def draw(arguments: Arguments, model: SpcxrForPreTraining, images: torch.Tensor, output: Path) -> None:
    """Write `reconstruction.png`: clean, corrupted, reconstructed and mask, a row for each of four images."""
    processor = SpcxrImageProcessor()
    mean, std = processor.image_mean[0], processor.image_std[0]
    generator = torch.Generator(images.device).manual_seed(arguments.seed)
    count = min(4, len(images))
    views = Views(size=arguments.image_size, scale=(1, 1), ratio=(1, 1), flip=0, brightness=0, contrast=0, blur=0)
    clean = (views(images[:: max(1, len(images) // count)][:count], generator) - mean) / std
    corrupted = masking(arguments)(clean, generator)
    model.eval()
    reconstruction = model(corrupted.pixel_values.to(model.device)).reconstruction.to(clean.device)
    model.train()
    columns = [to_grey(values, mean, std) for values in (clean, corrupted.pixel_values, reconstruction)]
    columns.append(corrupted.mask.squeeze(1).float())
    save_grid(list(zip(*columns, strict=True)), output / "reconstruction.png")


def finish(arguments: Arguments, model: SpcxrForPreTraining, images: torch.Tensor, output: Path) -> None:
    """Write the final model, with its image processor, into `output/final`."""
    final = output / "final"
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
