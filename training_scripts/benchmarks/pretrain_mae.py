"""Pretrain the same encoder as a masked autoencoder (MAE), to compare with `pretrain.py`.

    python -m training_scripts.benchmarks.pretrain_mae training_scripts/recipes/pretrain_mae_small_224.yaml \
        --data DATA --max_minutes MINUTES

transformers' `ViTMAEForPreTraining` with SPCXR's width, depth, heads and patches, one grey channel, the same images,
views, optimiser and precision. `--max_minutes` gives it the same device time as the other pretraining: the rate is
measured on a few steps of a throwaway model (or given: `--images_per_second`), the number of steps follows and is kept
in `output/plan.json`, so that a run that is started again keeps to its schedule.

Paper: He et al., Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining

from spcxr_hf import SpcxrError, SpcxrImageProcessor
from spcxr_hf.data.batches import MicroBatch, RadiographSet
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import decode_images, fingerprint_rows
from spcxr_hf.files import atomic_folder, write_json
from spcxr_hf.quality.checks import for_pretraining
from spcxr_hf.training.arguments import (
    PretrainingArguments,
    check_values,
    flag,
    learning_rate_schedule,
    parse_arguments,
    run_script,
    save_recipe,
)
from spcxr_hf.training.engine import Run
from spcxr_hf.training.optim import CosineSchedule, new_config, parameter_groups
from spcxr_hf.transforms.augment import Views, normalise

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
CURVES = {"MSE over masked patches": "loss"}  # name -> column of the log
PLAN = "plan.json"
WARM_UP, MEASURED = 2, 6  # steps of the throwaway model


@dataclass
class Arguments(PretrainingArguments):
    """Pretrain a ViT of SPCXR's shape as a masked autoencoder."""

    exclude: str | None = flag(None, "text file of ids to leave out, as copies of held-out images; one a line")
    max_minutes: float | None = flag(None, "sets `steps` so that the training takes this long")
    images_per_second: float | None = flag(None, "of all processes, for max_minutes; measured by default")
    crop_scale: list[float] = flag([0.25, 1.0], "area of a crop, least and largest")
    drop_path_rate: float = flag(0.0, "ViTMAE has no stochastic depth: 0")
    mask_ratio: float = flag(0.75, "share of the patches that the encoder does not see")
    norm_pix_loss: bool = flag(True, "each patch's target has mean 0 and deviation 1")
    decoder_width: int = flag(256, "of the decoder, which is dropped afterwards")
    decoder_depth: int = flag(4, "blocks of the decoder")
    decoder_heads: int = flag(8, "attention heads of the decoder")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = as_planned(parse_arguments(Arguments, argv))
    check(arguments)
    with Run(arguments) as run:
        images, fingerprint = load_images(arguments, run)
        arguments = plan_steps(arguments, run, images)
        model = build_model(arguments)
        run.start(model, parameter_groups(model), fingerprint, arguments.adam_beta2, images_seen=0)
        train(arguments, run, images)
        if run.is_main:
            finish(arguments, run)


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late."""
    if arguments.cache == "none":
        raise SpcxrError("this script keeps its images: cache must be memory or device")
    if arguments.init_from is not None:
        raise SpcxrError("a masked autoencoder is trained from random weights here: leave --init_from out")
    if arguments.drop_path_rate:
        raise SpcxrError(f"ViTMAE has no stochastic depth: drop_path_rate must be 0; got {arguments.drop_path_rate}")
    check_values(arguments, ranges={"mask_ratio": "(0, 1)", "max_minutes": "(0, inf)", "images_per_second": "(0, inf)"})
    if arguments.decoder_width % (4 * arguments.decoder_heads):
        raise SpcxrError(
            f"decoder_width {arguments.decoder_width} must be a multiple of 4 x decoder_heads "
            f"({arguments.decoder_heads}): sines and cosines of two axes, shared out among the heads"
        )


def load_images(arguments: Arguments, run: Run) -> tuple[RadiographSet, dict[str, str]]:
    """The images that `pretrain.py` learns from with the same flags, and the fingerprint of their rows."""
    table = read_set(arguments.data, arguments.exclude)
    if arguments.splits or arguments.pretrain_only:
        table = for_pretraining(table, arguments.splits, arguments.split_column)
    with run.accelerator.main_process_first():  # the first writes the cache, the others read it
        images = RadiographSet(decode_images(table, arguments.stored_size, arguments.cache_folder), table.ids)
    images = images.to(run.accelerator.device) if arguments.cache == "device" else images
    return images, {"the set": fingerprint_rows(table)}


def build_model(arguments: Arguments) -> PreTrainedModel:
    """A new masked autoencoder whose encoder has the shape of the preset of SPCXR of this size."""
    torch.manual_seed(arguments.seed)
    ours = new_config(arguments.size, image_size=arguments.image_size)
    shape: dict[str, Any] = {name: getattr(ours, name) for name in SHAPE}
    config = ViTMAEConfig(
        **shape,
        image_size=arguments.image_size,
        num_channels=ours.num_channels,
        layer_norm_eps=ours.layer_norm_eps,
        mask_ratio=arguments.mask_ratio,
        norm_pix_loss=arguments.norm_pix_loss,
        decoder_hidden_size=arguments.decoder_width,
        decoder_num_hidden_layers=arguments.decoder_depth,
        decoder_num_attention_heads=arguments.decoder_heads,
        decoder_intermediate_size=4 * arguments.decoder_width,
    )
    model = ViTMAEForPreTraining(config)
    initialise(model)
    model.config.images_seen = 0  # travels with every checkpoint
    model.set_attn_implementation(arguments.attention)
    # Checkpoints keep the names that the module has; the library would write those of its former releases.
    cast(Any, model).save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model.train()


@torch.no_grad()
def initialise(model: Any) -> None:
    """Positions, tokens and patch projection as the paper's section A.1 and its release have them.

    transformers leaves them at zero in a model that is not loaded from a checkpoint (5.23: `_init_weights` zeroes the
    decoder's positions and skips the encoder's): without positions no masked patch can be told from another, and the
    loss stays where it is.
    """
    embeddings, decoder = model.vit.embeddings, model.decoder
    side = math.isqrt(embeddings.patch_embeddings.num_patches)
    for positions in (embeddings.position_embeddings, decoder.decoder_pos_embed):
        positions.copy_(position_embeddings(side, positions.shape[-1]))
    for token in (embeddings.cls_token, decoder.mask_token):
        nn.init.normal_(token, std=model.config.initializer_range)
    projection = embeddings.patch_embeddings.projection.weight
    nn.init.xavier_uniform_(projection.view(len(projection), -1))


def position_embeddings(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of columns and rows (Vaswani et al., arXiv 1706.03762, section 3.5), CLS at zero.

    Returns:
        (1, 1 + side x side, width), `width` a multiple of 4.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([torch.zeros(1, width), torch.cat([columns, rows], dim=1)])[None]


# ---- number of steps ------------------------------------------------------------------------------------------


def as_planned(arguments: Arguments) -> Arguments:
    """The same command line with the steps of the plan that an earlier start has left, where there is one.

    Raises:
        SpcxrError: that plan was made for another time or another batch.
    """
    file = Path(arguments.output) / PLAN
    if arguments.max_minutes is None or not file.is_file():
        return arguments
    plan = json.loads(file.read_text(encoding="utf-8"))
    if any(plan[name] != getattr(arguments, name) for name in ("max_minutes", "batch_size")):
        raise SpcxrError(f"{file}: the run was planned for {plan['max_minutes']} minutes; choose another --output")
    return dataclasses.replace(arguments, steps=plan["steps"])


def plan_steps(arguments: Arguments, run: Run, images: RadiographSet) -> Arguments:
    """The same command line with the steps that `max_minutes` allows, where no plan says them already."""
    file = run.output / PLAN
    if arguments.max_minutes is None or file.is_file():
        return arguments
    rate = arguments.images_per_second or measure_rate(arguments, run, images)
    planned = dataclasses.replace(
        arguments, steps=max(1, round(60 * arguments.max_minutes * rate / arguments.batch_size))
    )
    run.arguments = planned
    run.accelerator.wait_for_everyone()  # all have looked for the plan before the first writes it
    if run.is_main:
        asked = {"max_minutes": arguments.max_minutes, "batch_size": arguments.batch_size}
        write_json(file, {**asked, "images_per_second": round(rate, 2), "steps": planned.steps})
    return planned


def measure_rate(arguments: Arguments, run: Run, images: RadiographSet) -> float:
    """Images per second of all processes: steps of a throwaway model, all processes at work at once."""
    model = build_model(arguments).to(run.accelerator.device)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-6, fused=True)
    step_model = torch.compile(model) if arguments.compile else model
    run.accelerator.wait_for_everyone()
    started = time.perf_counter()
    for step, micro_batches in enumerate(images.steps(run.plan, 0, WARM_UP + MEASURED)):
        if step == WARM_UP:
            synchronise(run)
            started = time.perf_counter()
        for micro_batch in micro_batches:
            with run.autocast():
                loss = step_model(draw_views(arguments, micro_batch, run.accelerator.device)).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronise(run)
    seconds = torch.tensor(time.perf_counter() - started, device=run.accelerator.device)
    slowest = float(cast(torch.Tensor, run.accelerator.gather(seconds.reshape(1))).max())
    return MEASURED * arguments.batch_size / slowest


def synchronise(run: Run) -> None:
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


# ---- training --------------------------------------------------------------------------------------------------


def train(arguments: Arguments, run: Run, images: RadiographSet) -> None:
    """The loop: view, mask and reconstruct, step; now and then a checkpoint."""
    learning_rate = learning_rate_schedule(arguments)
    weight_decay = CosineSchedule(arguments.weight_decay, arguments.final_weight_decay, 0, arguments.steps)
    for step, micro_batches in run.steps(images, CURVES, "mean squared error"):
        for micro_batch in micro_batches:
            views = draw_views(arguments, micro_batch, run.accelerator.device)
            with run.forward(micro_batch) as model:  # which patches are masked follows from the micro-batch's seed
                loss = model(views).loss
            run.backward(loss)
        run.update(learning_rate(step), weight_decay(step))
        run.state["images_seen"] += arguments.batch_size
        run.bare_model.config.images_seen = run.state["images_seen"]


def draw_views(arguments: Arguments, micro_batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """Random views of these images, normalised as SPCXR's are: (B, 1, S, S)."""
    generator = torch.Generator(device).manual_seed(micro_batch.seed)
    make_views = Views(size=arguments.image_size, scale=(arguments.crop_scale[0], arguments.crop_scale[1]))
    return normalise(make_views(micro_batch.images.to(device), generator))


def finish(arguments: Arguments, run: Run) -> None:
    """Write the final model, with its image processor and recipe, into `output/final`."""
    size = {"height": arguments.image_size, "width": arguments.image_size}
    with run.averaged() as model, atomic_folder(run.output / "final") as folder:
        model.eval().set_attn_implementation("sdpa")
        type(model).save_pretrained(model, folder)  # in the library's own form, not the checkpoints'
        SpcxrImageProcessor(size=size).save_pretrained(folder)
        save_recipe(arguments, folder / "recipe.yaml")
    run.report("Masked autoencoder", ["loss.png"])
    print(f"saved {run.output / 'final'}")


if __name__ == "__main__":
    run_script(main)
