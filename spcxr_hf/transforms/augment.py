"""Augmentation of a batch of radiographs on its device: random resized crop, flip, jitter, blur; mixup and CutMix.

Cropping and resizing are linear in the image and separate over rows and columns, so that a view is two matrix products
with one small weight matrix per image and axis. The blur is folded into the same matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from spcxr_hf.errors import SpcxrError
from spcxr_hf.modeling.image_processing_spcxr import RADIOGRAPH_MEAN, RADIOGRAPH_STD
from spcxr_hf.transforms.processing import CHANGES, ProcessingChanges, parse_changes


@dataclass(frozen=True)
class Views:
    """Draws one random view per image. Call it with a batch of grey values.

    Attributes:
        size: Side of the square views in pixels.
        scale: Least and largest area of the crop as a share of the image, in (0, 1].
        ratio: Least and largest aspect ratio (width / height) of the crop.
        flip: Probability of a left-right flip. It turns the heart to the right side (situs inversus): harmless for
            pretraining, a choice for fine-tuning.
        brightness: Largest shift of the grey values, on the scale of 0 to 1.
        contrast: Largest relative change of the contrast.
        blur: Probability of a Gaussian blur.
        blur_sigma: Least and largest standard deviation of the blur in pixels of the view.
        rotation: Largest turn in degrees, of the whole image before it is cropped; what lies beyond its edge is black.
        shrink: Largest share by which the image is made smaller with it, in [0, 1).
        elastic: Largest displacement, as a share of the side, of a smooth random field (4 x 4 points) with it.
        processing: Changes of the whole image's processing before it is cropped. The crop, the flip and the jitter are
            drawn first: they are the same with and without these changes.
    """

    size: int = 224
    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.1
    contrast: float = 0.2
    blur: float = 0.2
    blur_sigma: tuple[float, float] = (0.1, 1.5)
    rotation: float = 0.0
    shrink: float = 0.0
    elastic: float = 0.0
    processing: ProcessingChanges | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SpcxrError(f"size must be at least 1 pixel; got {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise SpcxrError(f"scale must rise within (0, 1]; got {self.scale}")
        for name in ("ratio", "blur_sigma"):
            least, largest = getattr(self, name)
            if not 0 < least <= largest:
                raise SpcxrError(f"{name} must rise and be positive; got {(least, largest)}")
        for name in ("flip", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpcxrError(f"{name} is a probability in [0, 1]; got {getattr(self, name)}")
        if not 0 <= self.rotation <= 180:
            raise SpcxrError(f"rotation must lie in [0, 180] degrees; got {self.rotation}")
        for name in ("brightness", "contrast", "shrink", "elastic"):
            if not 0 <= getattr(self, name) < 1:
                raise SpcxrError(f"{name} must lie in [0, 1); got {getattr(self, name)}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(B, C, H, W) in 0 .. 255 (uint8) or 0 .. 1 (floating point) -> (B, C, size, size) float32 in 0 .. 1."""
        views, _ = self.with_masks(images, None, generator)
        return views

    @torch.no_grad()
    def with_masks(
        self, images: torch.Tensor, masks: torch.Tensor | None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same view of the images and of their masks (B, H, W) or (B, K, H, W), which come back as booleans."""
        batch, _, height, width = images.shape
        device = images.device

        def draw(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(batch, generator=generator, device=device)

        area, ratio = draw(*self.scale), torch.exp(draw(math.log(self.ratio[0]), math.log(self.ratio[1])))
        crop_height = (torch.sqrt(area / ratio) * height).clamp(min=1, max=height)
        crop_width = (torch.sqrt(area * ratio) * width).clamp(min=1, max=width)
        top, left = draw(0, 1) * (height - crop_height), draw(0, 1) * (width - crop_width)
        flipped = draw(0, 1) < self.flip
        sigma = torch.where(draw(0, 1) < self.blur, draw(*self.blur_sigma), torch.zeros_like(top))
        gain, shift = 1 + draw(-self.contrast, self.contrast), draw(-self.brightness, self.brightness)

        rows = resampling_weights(top, crop_height, height, self.size)
        columns = resampling_weights(left, crop_width, width, self.size, flipped)
        blur = _gaussian_weights(sigma, self.size)
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        layers = None if masks is None else masks.float().reshape(batch, -1, height, width)
        if self.rotation or self.shrink or self.elastic:
            grid = self._warping((batch, height, width), generator, device)
            pixels = nn.functional.grid_sample(pixels, grid, align_corners=False)
            layers = None if layers is None else nn.functional.grid_sample(layers, grid, align_corners=False)
        if self.processing is not None:
            pixels = self.processing(pixels, generator)
        views = _apply_weights(pixels, blur @ rows, blur @ columns)
        mean = views.mean(dim=(1, 2, 3), keepdim=True)
        views = ((views - mean) * gain.reshape(-1, 1, 1, 1) + mean + shift.reshape(-1, 1, 1, 1)).clamp(0, 1)
        if masks is None or layers is None:
            return views, None
        layers = _apply_weights(layers, rows, columns) > 0.5
        return views, layers.reshape(*masks.shape[:-2], self.size, self.size)

    def _warping(self, shape: tuple[int, int, int], generator: torch.Generator | None, device: Any) -> torch.Tensor:
        """A grid (B, H, W, 2) for `grid_sample`: turned, made smaller, and bent by a smooth random field."""
        batch, height, width = shape
        angle = math.radians(self.rotation) * (2 * torch.rand(batch, generator=generator, device=device) - 1)
        growth = 1 / (1 - self.shrink * torch.rand(batch, generator=generator, device=device))
        cos, sin, none = growth * angle.cos(), growth * angle.sin(), torch.zeros_like(angle)
        turn = torch.stack([cos, -sin * height / width, none, sin * width / height, cos, none], dim=1)
        grid = nn.functional.affine_grid(turn.reshape(-1, 2, 3), [batch, 1, height, width], align_corners=False)
        points = 2 * torch.rand(batch, 2, 4, 4, generator=generator, device=device) - 1
        field = nn.functional.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)
        return grid + 2 * self.elastic * field.movedim(1, -1)


@dataclass
class AugmentationArguments:
    """Augmentation arguments of the training scripts, with the defaults of fine-tuning."""

    crop_scale: list[float] = field(
        default_factory=lambda: [0.4, 1.0], metadata={"help": "area of a crop, least and largest"}
    )
    flip: float = field(default=0.5, metadata={"help": "probability of a left-right flip"})
    brightness: float = field(default=0.2, metadata={"help": "largest shift of the grey values, on 0 .. 1"})
    contrast: float = field(default=0.4, metadata={"help": "largest relative change of the contrast"})
    blur: float = field(default=0.2, metadata={"help": "probability of a Gaussian blur"})
    rotation: float = field(default=0.0, metadata={"help": "largest turn in degrees"})
    shrink: float = field(default=0.0, metadata={"help": "largest share by which an image is made smaller"})
    elastic: float = field(default=0.0, metadata={"help": "largest elastic displacement, as a share of the side"})
    processing: list[str] = field(
        default_factory=list,
        metadata={"help": f"changes of the image's processing: all, or some of {', '.join(CHANGES)}; default: none"},
    )

    def views(self, size: int) -> Views:
        """The augmentation to views of size x size pixels."""
        if len(self.crop_scale) != 2:
            raise SpcxrError(f"crop_scale is the least and the largest area; got {self.crop_scale}")
        scale = (self.crop_scale[0], self.crop_scale[1])
        return Views(
            size,
            scale,
            flip=self.flip,
            brightness=self.brightness,
            contrast=self.contrast,
            blur=self.blur,
            rotation=self.rotation,
            shrink=self.shrink,
            elastic=self.elastic,
            processing=parse_changes(self.processing),
        )


def normalise(grey: torch.Tensor) -> torch.Tensor:
    """Grey values in 0 .. 1 -> `pixel_values`, as the image processor normalises them."""
    return (grey - RADIOGRAPH_MEAN[0]) / RADIOGRAPH_STD[0]


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """The whole image at size x size, (B, C, H, W) -> (B, C, size, size) float32, by the same weights as the views."""
    batch, _, height, width = images.shape
    zeros = torch.zeros(batch, device=images.device)
    rows = resampling_weights(zeros, zeros + height, height, size)
    columns = resampling_weights(zeros, zeros + width, width, size)
    return _apply_weights(images.float(), rows, columns)


def resampling_weights(
    start: torch.Tensor, length: torch.Tensor, size_in: int, size_out: int, flipped: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, size_out, size_in): how much of each input pixel goes into each output pixel along one axis.

    Antialiased bilinear interpolation: a triangle as wide as an output pixel, at least as an input pixel. `start` and
    `length` (B,) give the part of the axis to show, in input pixels; `flipped` (B,): whether to mirror it.
    """
    device = start.device
    step = (length / size_out).reshape(-1, 1, 1)
    centre = start.reshape(-1, 1, 1) + (torch.arange(size_out, device=device).reshape(1, -1, 1) + 0.5) * step
    distance = (torch.arange(size_in, device=device) + 0.5 - centre).abs()
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    weights = weights / weights.sum(dim=2, keepdim=True)
    if flipped is not None:
        weights = torch.where(flipped.reshape(-1, 1, 1), weights.flip(1), weights)
    return weights


def _gaussian_weights(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """(B, size, size): a Gaussian blur along one axis; the identity where `sigma` (B,) is 0."""
    position = torch.arange(size, device=sigma.device)
    distance = (position.unsqueeze(0) - position.unsqueeze(1)).float()
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3).reshape(-1, 1, 1)) ** 2)
    return weights / weights.sum(dim=2, keepdim=True)


def _apply_weights(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) by rows (B, h, H) and columns (B, w, W) -> (B, C, h, w)."""
    return rows.unsqueeze(1) @ images @ columns.unsqueeze(1).transpose(2, 3)


def mix(
    images: torch.Tensor, targets: torch.Tensor, mixup: float, cutmix: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899): every image with another of its micro-batch.

    Args:
        images: (B, C, S, S).
        targets: (B, classes); a label that either of two images lacks is missing (NaN) from both.
        mixup, cutmix: The alpha of each, 0 for none; with both, each is used for half of the micro-batches.
        seed: Seed of all draws.
    """
    drawn = np.random.default_rng(seed)
    cut = cutmix > 0 and (mixup == 0 or drawn.random() < 0.5)
    alpha = cutmix if cut else mixup
    if not alpha:
        return images, targets
    share = float(drawn.beta(alpha, alpha))
    partners = torch.from_numpy(drawn.permutation(len(images))).to(images.device)
    if cut:  # a box of the other image, about 1 - share of the area
        spans = []
        for side in images.shape[-2:]:
            length, centre = side * math.sqrt(1 - share), drawn.uniform(0, side)
            spans.append(slice(max(0, round(centre - length / 2)), min(side, round(centre + length / 2))))
        rows, columns = spans
        others = images[partners]
        images = images.clone()
        images[..., rows, columns] = others[..., rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / images[0, 0].numel()
    else:
        images = share * images + (1 - share) * images[partners]
    return images, share * targets + (1 - share) * targets[partners]
