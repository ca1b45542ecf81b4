"""Pretrain the encoder by group-masked model learning (GMML): reconstruct radiographs from their corrupted versions.

    spcxr pretrain small_224 --data DATA

The same command resumes from the newest checkpoint.

`--teacher efficientnet-lite0` adds a second target (recipe `pretrain_distill_small_112.yaml`): a share of each batch is
not corrupted; from these films, whole and with their processing changed, the features that a frozen network has of
the film as it is are predicted.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import torch

from spcxr_hf import SpcxrError, SpcxrForPreTraining, SpcxrImageProcessor
from spcxr_hf.data.batches import MicroBatch, RadiographSet
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.streaming import StreamingRadiographs
from spcxr_hf.data.table import decode_set, fingerprint_rows
from spcxr_hf.drawing import save_grid, to_grey
from spcxr_hf.files import atomic_folder, os_errors
from spcxr_hf.modeling.image_processing_spcxr import RADIOGRAPH_MEAN, RADIOGRAPH_STD
from spcxr_hf.models.convert import change_image_size
from spcxr_hf.models.loading import load_network
from spcxr_hf.quality.checks import WITHOUT_PRETRAIN, SetArguments, for_pretraining, write_skipped
from spcxr_hf.training.arguments import (
    PretrainingArguments,
    flag,
    learning_rate_schedule,
    parse_arguments,
    run_script,
    save_recipe,
)
from spcxr_hf.training.distillation import SpcxrForDistillation, draw_student_views, teacher_targets
from spcxr_hf.training.engine import Run, StepSource
from spcxr_hf.training.optim import CosineSchedule, new_config, parameter_groups
from spcxr_hf.training.run_report import write_card
from spcxr_hf.transforms.augment import AugmentationArguments, normalise, resize
from spcxr_hf.transforms.group_masking import Corrupted, GroupMasking, as_pixels, normalise_patches
from spcxr_hf.transforms.processing import parse_changes

CURVES = {"L1 over corrupted pixels": "loss"}  # name -> column of the log
VIEWS = {one.name: one.metadata for one in fields(AugmentationArguments)}  # their help; milder by default here


@dataclass
class Arguments(AugmentationArguments, SetArguments, PretrainingArguments):
    """Pretrain the SPCXR encoder by group-masked model learning."""

    crop_scale: list[float] = flag([0.25, 1.0], VIEWS["crop_scale"]["help"])
    brightness: float = flag(0.1, VIEWS["brightness"]["help"])
    contrast: float = flag(0.2, VIEWS["contrast"]["help"])
    fill_modes: list[str] = flag(["noise", "replace"], "noise, zeros, block, replace: content of masked groups")
    mask_ratio: list[float] = flag([0.5, 0.75], "least and largest masked share of an image")
    replace_ratio: float = flag(0.3, "masked share for the mode replace")
    max_block_size: float = flag(0.3, "largest side of a group as a share of the image's")
    align: int = flag(1, "groups keep to multiples of this many pixels")
    norm_pix_loss: bool = flag(False, "each patch's target has mean 0 and deviation 1")
    teacher: str | None = flag(
        None, "frozen encoder whose features are a second target: efficientnet-lite0, a folder or a Hub id"
    )
    teacher_components: int = flag(256, "principal components of the teacher's features")
    teacher_share: float = flag(0.75, "share of a micro-batch that predicts the teacher")
    teacher_weight: float = flag(1.0, "weight of the teacher's loss")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    with Run(arguments) as run:
        images, fingerprint = load_images(arguments, run)
        model = build_model(arguments)
        groups = parameter_groups(model)
        run.start(model, groups, fingerprint, arguments.adam_beta2, images_seen=model.config.images_seen)
        train(arguments, run, images)
        if run.is_main:
            finish(arguments, run, len(images))


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late."""
    for name in ("mask_ratio", "crop_scale"):
        if len(getattr(arguments, name)) != 2:
            raise SpcxrError(f"{name} takes two numbers, least and largest; got {getattr(arguments, name)}")
    masking(arguments)
    arguments.views(arguments.image_size)
    if arguments.teacher is None:
        return
    if arguments.cache == "none":
        raise SpcxrError("--teacher keeps targets for every image: cache must be memory or device")
    if not 1 <= count_distilled(arguments) <= arguments.micro_batch_size - 2:  # "replace" needs two images
        raise SpcxrError(
            f"teacher_share must leave at least one image of a micro-batch for the teacher and two to reconstruct; got "
            f"{arguments.teacher_share} of {arguments.micro_batch_size}"
        )


def count_distilled(arguments: Arguments) -> int:
    """Images of a micro-batch that predict the teacher's features."""
    return round(arguments.teacher_share * arguments.micro_batch_size)


def load_images(arguments: Arguments, run: Run) -> tuple[RadiographSet | StreamingRadiographs, dict[str, str]]:
    """The images, in memory or as a stream, and the fingerprint of their rows."""
    if arguments.cache == "none":
        if arguments.exclude:
            raise SpcxrError("--exclude needs images in memory: with --cache none write shards without these rows")
        if len(arguments.splits) > 1:
            raise SpcxrError("--cache none takes one of --splits only")
        by_column = "pretrain" if arguments.pretrain_only else None
        where = (arguments.split_column, arguments.splits[0]) if arguments.splits else by_column
        try:
            stream = StreamingRadiographs(
                arguments.data,
                arguments.stored_size,
                where,
                arguments.workers,
                on_error=arguments.on_error,
                image_root=arguments.image_root,
            )
        except SpcxrError as error:
            hint = f"; {WITHOUT_PRETRAIN}" if "no column 'pretrain'" in str(error) else ""
            raise SpcxrError(f"{error}{hint}") from error
        return stream, {"the stream": stream.index.fingerprint_rows()}
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    if arguments.splits or arguments.pretrain_only:
        table = for_pretraining(table, arguments.splits, arguments.split_column)
    targets: dict[str, torch.Tensor] = {}
    with run.accelerator.main_process_first():  # the first writes the cache, the others read it
        decoded = decode_set(table, arguments.stored_size, arguments.cache_folder, on_error=arguments.on_error)
        if arguments.teacher is not None:
            targets = teacher_targets(
                arguments.teacher,
                decoded.table,
                decoded.images,
                arguments.teacher_components,
                arguments.cache_folder,
                run.accelerator.device.type,
            )
    if run.is_main:
        write_skipped(run.output, decoded.skipped)
    images = RadiographSet(decoded.images, decoded.table.ids, targets)
    images = images.to(run.accelerator.device) if arguments.cache == "device" else images
    return images, {"the set": fingerprint_rows(decoded.table)}


def build_model(arguments: Arguments) -> SpcxrForPreTraining:
    """A new model, or the one to start from, at this run's image size."""
    torch.manual_seed(arguments.seed)
    model_class: type[SpcxrForPreTraining] = SpcxrForPreTraining
    values: dict[str, Any] = {"drop_path_rate": arguments.drop_path_rate}
    if arguments.teacher is not None:
        model_class, values["teacher_components"] = SpcxrForDistillation, arguments.teacher_components
    if arguments.init_from is None:
        model = model_class(new_config(arguments.size, image_size=arguments.image_size, **values))
    else:
        model, _ = load_network(model_class, arguments.init_from, new="head", dtype=torch.float32, **values)
        change_image_size(model, arguments.image_size)
    model.config.images_seen = getattr(model.config, "images_seen", 0)  # saved with every checkpoint
    if arguments.norm_pix_loss or hasattr(model.config, "norm_pix_loss"):
        model.config.norm_pix_loss = arguments.norm_pix_loss  # so that its reconstructions are read as they are meant
    model.set_attn_implementation(arguments.attention)
    return model.train()


def train(arguments: Arguments, run: Run, source: StepSource) -> None:
    """The loop: view, corrupt, reconstruct, step; now and then a checkpoint and pictures."""
    learning_rate = learning_rate_schedule(arguments)
    weight_decay = CosineSchedule(arguments.weight_decay, arguments.final_weight_decay, 0, arguments.steps)
    corrupted = None
    for step, micro_batches in run.steps(source, CURVES, "L1"):
        for micro_batch in micro_batches:
            micro_batch, distilled = divide(arguments, micro_batch, run)
            clean, corrupted = draw_views(arguments, micro_batch, run.accelerator.device, corrupted)
            target = normalise_patches(clean, run.bare_model.config.patch_size) if arguments.norm_pix_loss else clean
            with run.forward(micro_batch) as model:
                loss = model(corrupted.pixel_values, bool_masked_pos=corrupted.mask, labels=target, **distilled).loss
            run.backward(loss)
        run.update(learning_rate(step), weight_decay(step))
        run.state["images_seen"] += arguments.batch_size
        run.bare_model.config.images_seen = run.state["images_seen"]  # saved with every checkpoint
        if run.is_due and isinstance(source, StreamingRadiographs):
            write_skipped(run.output, source.skipped, run.accelerator)
        if run.is_due and run.is_main:
            draw(arguments, run, micro_batches[0].images)


def divide(arguments: Arguments, micro_batch: MicroBatch, run: Run) -> tuple[MicroBatch, dict[str, Any]]:
    """The images of a micro-batch that are reconstructed, and what the model takes of those that are distilled."""
    if arguments.teacher is None:
        return micro_batch, {}
    count = count_distilled(arguments)
    device = run.accelerator.device
    generator = torch.Generator(device).manual_seed(micro_batch.seed + 1)
    distilled = draw_student_views(
        micro_batch.images[:count].to(device),
        {name: values[:count].to(device) for name, values in micro_batch.columns.items()},
        arguments.image_size,
        run.bare_model.config.patch_size,
        parse_changes(arguments.processing),
        generator,
    )
    rest = MicroBatch(micro_batch.images[count:], micro_batch.ids[count:], {}, micro_batch.seed)
    return rest, {**distilled, "teacher_weight": arguments.teacher_weight}


def draw_views(
    arguments: Arguments, micro_batch: MicroBatch, device: torch.device, earlier: Corrupted | None = None
) -> tuple[torch.Tensor, Corrupted]:
    """Random views of these images, normalised (B, 1, S, S), and their corruption, in the memory of an earlier one."""
    generator = torch.Generator(device).manual_seed(micro_batch.seed)
    views = arguments.views(arguments.image_size)
    if arguments.teacher is not None:  # the changes of processing are for the other images
        views = replace(views, processing=None)
    clean = normalise(views(micro_batch.images.to(device), generator))
    return clean, masking(arguments)(clean, generator, reuse=earlier)


def masking(arguments: Arguments) -> GroupMasking:
    return GroupMasking(
        fill_modes=tuple(arguments.fill_modes),
        mask_ratio=(arguments.mask_ratio[0], arguments.mask_ratio[1]),
        replace_ratio=arguments.replace_ratio,
        max_block_size=arguments.max_block_size,
        align=arguments.align,
    )


@torch.no_grad()
def draw(arguments: Arguments, run: Run, images: torch.Tensor) -> None:
    """Write `reconstruction.png`: clean, corrupted, reconstructed and mask, a row for each of up to four images."""
    generator = torch.Generator(images.device).manual_seed(arguments.seed)
    clean = normalise(resize(images[:4], arguments.image_size) / 255)
    corrupted = masking(arguments)(clean, generator)
    with run.averaged() as model:
        model.eval()
        reconstruction = model(corrupted.pixel_values.to(model.device)).reconstruction.to(clean.device)
        reconstruction = as_pixels(model.config, reconstruction, clean)
        model.train()
    columns = [
        to_grey(values, RADIOGRAPH_MEAN[0], RADIOGRAPH_STD[0])
        for values in (clean, corrupted.pixel_values, reconstruction)
    ]
    columns.append(corrupted.mask.squeeze(1).float())
    path = run.output / "reconstruction.png"
    with os_errors(path):
        save_grid(list(zip(*columns, strict=True)), path)


def finish(arguments: Arguments, run: Run, count: int) -> None:
    """Write the final model, with its image processor and recipe, into `output/final`."""
    size = {"height": arguments.image_size, "width": arguments.image_size}
    with run.averaged() as model, atomic_folder(run.output / "final") as folder:
        kept = model.without_heads() if isinstance(model, SpcxrForDistillation) else model
        kept.eval().set_attn_implementation("sdpa")
        kept.save_pretrained(folder)
        SpcxrImageProcessor(size=size).save_pretrained(folder)
        save_recipe(arguments, folder / "recipe.yaml")
        write_card(folder, "image-feature-extraction", arguments.init_from, {}, {"train": count})
    run.report("Group-masked pretraining", ["loss.png", "reconstruction.png"])
    print(f"saved {run.output / 'final'}")


if __name__ == "__main__":
    run_script(main)
