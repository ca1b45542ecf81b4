"""Baselines for the speed benchmarks: our pretraining step, the GMML release's, ViTMAE's, and encoders of one shape."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from spcxr_hf.errors import SpcxrError
from spcxr_hf.modeling.modeling_spcxr import SpcxrForPreTraining, SpcxrModel
from spcxr_hf.training.optim import new_config, parameter_groups
from spcxr_hf.transforms.augment import Views, normalise
from spcxr_hf.transforms.group_masking import Corrupted, GroupMasking
from training_scripts.benchmarks.lib.timing import matrix_parameters, training_flops

RELEASE_FILES = ("main.py", "utils.py", "vision_transformer.py", "datasets/datasets_utils.py")


# ---- our step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSettings:
    """Settings common to both sides of a comparison.

    Attributes:
        size: "tiny", "small" or "base".
        image_size: Side of a view in pixels.
        device: Where the step runs.
        precision: "fp32", or "bf16" for autocast.
        attention: Attention implementation of our model.
        compile: Whether our model is compiled.
    """

    size: str = "small"
    image_size: int = 224
    device: str = "cpu"
    precision: str = "fp32"
    attention: str = "sdpa"
    compile: bool = False

    def autocast(self) -> torch.autocast:
        """The precision, as a context."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")


class PretrainingStep:
    """The step of `pretrain.py`: view, corrupt, forward, backward, optimiser. `lap` marks the end of each part."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        config = new_config(settings.size, image_size=settings.image_size, drop_path_rate=0.1)
        bare: Any = SpcxrForPreTraining(config)
        self.bare: Any = bare.to(settings.device).train()
        self.bare.set_attn_implementation(settings.attention)
        self.model: Callable[..., Any] = torch.compile(self.bare) if settings.compile else self.bare
        self.optimizer = torch.optim.AdamW(parameter_groups(self.bare), lr=1e-4, fused=True)
        self.generator = torch.Generator(settings.device).manual_seed(0)
        self.views, self.masking = Views(size=settings.image_size), GroupMasking()
        self.corrupted: Corrupted | None = None  # the last step's, whose memory the next one takes

    def __call__(self, clean: torch.Tensor, lap: Callable[[str], None] = lambda name: None) -> None:
        """One step on clean, normalised views (B, 1, S, S)."""
        corrupted = self.corrupted = self.masking(clean, self.generator, reuse=self.corrupted)
        lap("corruption")
        with self.settings.autocast():
            loss = self.model(pixel_values=corrupted.pixel_values, bool_masked_pos=corrupted.mask, labels=clean).loss
        lap("forward")
        loss.backward()
        lap("backward")
        nn.utils.clip_grad_norm_(self.bare.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("optimiser")

    def from_stored(self, stored: torch.Tensor, lap: Callable[[str], None] = lambda name: None) -> None:
        """One step on stored images (B, 1, h, w), uint8: the views are made here."""
        clean = normalise(self.views(stored, self.generator))
        lap("views")
        self(clean, lap)

    def flops_per_image(self) -> int:
        """Of forward and backward, by `training_flops`."""
        config = self.bare.config
        tokens = 1 + config.num_patches
        return training_flops(matrix_parameters(self.bare), tokens, config.num_hidden_layers, config.hidden_size)


# ---- the GMML release's step -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """The modules of a checkout of the GMML release: its training script, and its transforms and corruption."""

    main: Any
    datasets_utils: Any


@contextlib.contextmanager
def import_release(checkout: Path) -> Iterator[Release]:
    """The release's own code, imported from a checkout for the length of a `with`.

    It is GPL-licensed and no part of this tree. Its package `datasets` has the name of the one of Hugging Face, and its
    data sets need files that it does not contain, so that of this package the corruption alone is loaded.

    Raises:
        SpcxrError: the folder is no checkout of it.
    """
    absent = [name for name in RELEASE_FILES if not (checkout / name).is_file()]
    if absent:
        raise SpcxrError(f"{checkout}: no checkout of the GMML release ({', '.join(absent)} missing)")
    names = ["datasets", "main", "utils", "vision_transformer"]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    package: Any = ModuleType("datasets")
    sys.modules["datasets"] = package
    sys.path.insert(0, str(checkout))
    try:
        with warnings.catch_warnings():  # the script turns all warnings off, for everyone
            package.load_dataset = package
            package.datasets_utils = _load_file("gmml_datasets_utils", checkout / "datasets" / "datasets_utils.py")
            yield Release(importlib.import_module("main"), package.datasets_utils)
    finally:
        sys.path.remove(str(checkout))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _load_file(name: str, path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None  # a .py file that is there
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class ReleaseStep:
    """The release's step, by its own functions and at its own defaults, in our precision.

    Its loader corrupts each view by itself on the CPU (`corrupt`); its training loop replaces groups of half of the
    views, image by image, then forward, loss, backward, clipping and AdamW (`train`). Three channels, as it has them.
    """

    DROP = {"drop_type": "noise", "align": 1}

    def __init__(self, release: Release, settings: StepSettings) -> None:
        self.release, self.settings = release, settings
        main = release.main
        encoder = getattr(main.vits, f"vit_{settings.size}")(img_size=[settings.image_size])
        head = main.RECHead(encoder.embed_dim, in_chans=3, patch_size=16)
        self.model = main.FullpiplineSiT(encoder, head).to(settings.device).train()
        self.optimizer = torch.optim.AdamW(main.utils.get_params_groups(self.model))

    def corrupt(self, clean: torch.Tensor) -> list[list[torch.Tensor]]:
        """Clean views (B, 3, S, S) on the CPU, B even -> two crops each of clean, corrupted, and masks."""
        drop = self.release.datasets_utils.GMML_drop_rand_patches
        pairs = [drop(view.clone(), max_replace=0.75, **self.DROP) for view in clean]
        corrupted, masks = (torch.stack(column) for column in zip(*pairs, strict=True))
        return [list(tensor.chunk(2)) for tensor in (clean, corrupted, masks)]

    def train(self, crops: Sequence[Sequence[torch.Tensor]]) -> None:
        """One step on what `corrupt`, or the loader, gives."""
        options = Namespace(output_dir="", batch_size=len(crops[0][0]), epochs=1, clip_grad=3.0)
        vars(options).update(drop_replace=0.3, drop_type="noise", drop_align=1, recons_blocks="6-8-10-12", drop_only=1)
        with contextlib.ExitStack() as patches:
            if self.settings.device == "cpu":
                patches.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, **_: tensor))
                patches.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda: None))
            patches.enter_context(mock.patch.object(torch.cuda.amp, "autocast", lambda _: self.settings.autocast()))
            # Only the main process draws example reconstructions, into an unrequested folder.
            patches.enter_context(mock.patch.object(self.release.main.utils, "is_main_process", lambda: False))
            patches.enter_context(mock.patch.object(Path, "mkdir"))
            patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
            self.release.main.train_one_epoch(
                self.model, [(crops, None)], self.optimizer, [1e-4], [0.04], 0, None, options
            )

    def loader(self, count: int, stored_size: int, batch_size: int, workers: int) -> torch.utils.data.DataLoader:
        """Its transform in its loader, `batch_size` / 2 images of two crops, over `count` images in memory."""
        options = Namespace(drop_perc=0.75, drop_type="noise", drop_align=1, img_size=self.settings.image_size)
        vars(options).update(local_crops_number=0, global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.4))
        transform = self.release.datasets_utils.DataAugmentationSiT(options)
        return torch.utils.data.DataLoader(
            _Pictures(count, stored_size, transform),
            batch_size=batch_size // 2,
            shuffle=True,
            num_workers=workers,
            drop_last=True,
            pin_memory=self.settings.device != "cpu",
            multiprocessing_context="fork" if workers else None,  # its modules have no name to be imported by
        )


class _Pictures(torch.utils.data.Dataset):
    """`count` RGB pictures for a transform; one stands for all of them, decoded already."""

    def __init__(self, count: int, size: int, transform: Callable) -> None:
        from PIL import Image

        self.count, self.transform = count, transform
        grey = torch.randint(256, (size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.picture = Image.fromarray(grey.numpy()).convert("RGB")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.picture), 0


# ---- ViTMAE and timm -------------------------------------------------------------------------------------------


def make_encoders(shared: StepSettings) -> dict[str, tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
    """The modules, and how each turns (B, 3, S, S) into tokens (B, 1 + N, D)."""
    config = new_config(shared.size, image_size=shared.image_size, num_channels=3)
    ours: Any = SpcxrModel(config)
    ours = ours.to(shared.device)
    ours.set_attn_implementation(shared.attention)
    vit_mae = make_vit_mae(shared, mask_ratio=0.0).vit  # nothing masked: all tokens
    modules: dict[str, Any] = {"ours": ours, "vit_mae": vit_mae}
    encoders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "ours": lambda images: ours(images).last_hidden_state,
        "vit_mae": lambda images: vit_mae(images).last_hidden_state,
    }
    try:
        import timm
    except ImportError:
        pass
    else:
        name = f"vit_{shared.size}_patch16_224"
        vit: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=shared.image_size)
        modules["timm"] = vit.to(shared.device)
        encoders["timm"] = lambda images: vit.forward_features(images)
    if shared.compile:
        encoders = {name: torch.compile(encode) for name, encode in encoders.items()}
    return {name: (modules[name], encode) for name, encode in encoders.items()}


@torch.no_grad()
def forward_pass(module: torch.nn.Module, encode: Callable, images: torch.Tensor, shared: StepSettings) -> None:
    """The tokens, as in evaluation."""
    module.eval()
    with shared.autocast():
        encode(images)


def training_pass(module: torch.nn.Module, encode: Callable, images: torch.Tensor, shared: StepSettings) -> None:
    """The tokens and the gradients of their mean square, as in training."""
    module.train()
    with shared.autocast():
        loss = encode(images).float().square().mean()
    loss.backward()
    module.zero_grad(set_to_none=True)


def make_vit_mae(shared: StepSettings, mask_ratio: float) -> Any:
    """`ViTMAEForPreTraining` of our width and depth, with its own decoder."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    ours = new_config(shared.size)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    shape: dict[str, Any] = {name: getattr(ours, name) for name in names}
    config = ViTMAEConfig(**shape, image_size=shared.image_size, mask_ratio=mask_ratio)
    model: Any = ViTMAEForPreTraining(config)
    return model.to(shared.device)


def make_vit_mae_step(shared: StepSettings, batch_size: int, mask_ratio: float) -> Callable[[], None]:
    """A training step of `ViTMAEForPreTraining` with AdamW, on one batch."""
    model = make_vit_mae(shared, mask_ratio).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch_size, 3, shared.image_size, shared.image_size).to(shared.device)

    def step() -> None:
        with shared.autocast():
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- the corruption in a loop ----------------------------------------------------------------------------------


def corrupt_one_by_one(masking: GroupMasking, images: torch.Tensor, generator: torch.Generator) -> Corrupted:
    """The corruption of GMML as its description reads: image by image, group by group ("noise" and "replace" only)."""
    corrupted, masks = [], []
    for index, image in enumerate(images):
        number = torch.randint(len(masking.fill_modes), (), generator=generator, device=images.device)
        fill = masking.fill_modes[int(number)]
        low, high = masking.mask_ratio if fill == "noise" else (masking.replace_ratio, masking.replace_ratio)
        share = low + (high - low) * float(torch.rand((), generator=generator, device=images.device))
        other = images[(index + 1) % len(images)]
        output, mask = corrupt_one(masking, image, other if fill == "replace" else None, share, generator)
        corrupted.append(output)
        masks.append(mask)
    return Corrupted(torch.stack(corrupted), torch.stack(masks))


def corrupt_one(
    masking: GroupMasking, image: torch.Tensor, other: torch.Tensor | None, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One image (C, H, W): groups are added until `share` of it is covered. `other` fills them, or else noise."""
    channels, height, width = image.shape
    align, rows, columns = masking.align, height // masking.align, width // masking.align

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator, device=image.device))

    output, mask = image.clone(), torch.zeros(1, height, width, dtype=torch.bool, device=image.device)
    while mask.sum() < share * height * width:
        top, left = draw(0, rows), draw(0, columns)
        bottom = min(top + draw(1, max(1, int(rows * masking.max_block_size)) + 1), rows)
        right = min(left + draw(1, max(1, int(columns * masking.max_block_size)) + 1), columns)
        group = slice(top * align, bottom * align), slice(left * align, right * align)
        mask[:, group[0], group[1]] = True
        if other is None:
            shape = (channels, (bottom - top) * align, (right - left) * align)
            output[:, group[0], group[1]] = torch.randn(shape, generator=generator, device=image.device)
        else:
            output[:, group[0], group[1]] = other[:, group[0], group[1]]
    return output, mask
