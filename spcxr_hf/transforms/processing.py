"""Random changes of image processing, for batches: differences between archives, not between patients.

The same film looks different in two archives: another grey curve, another filter when it was scaled down, another
compression, a frame or letters burnt in. A network that reads those recognises the archive. Each change is drawn for
each image on its own and can be switched off; they are applied in the order in which they happen to a film.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ImageFont
from torch import nn

from spcxr_hf.errors import SpcxrError

REFERENCE_SIZE = 256  # pixels: filter widths are given for images of this height and scale with it
GREY_LEVELS = 256
CLAHE_TILES = 8
LETTERS = "LRPAETSHLRLR0123456789"  # of burnt-in markers, L and R more often
RESCALE_MODES = ("nearest-exact", "bilinear", "bicubic", "area")
# The luminance table of the JPEG standard (ITU-T T.81, table K.1).
JPEG_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


@dataclass(frozen=True)
class ProcessingChanges:
    """Changes the processing of a batch of grey images. Call it with the batch and a generator.

    Attributes:
        changes: Which of `CHANGES` to draw from; their order here does not matter.
    """

    changes: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.changes if name not in CHANGES]
        if unknown:
            raise SpcxrError(f"unknown change of processing {unknown[0]!r}; known are all, {', '.join(CHANGES)}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(B, 1, H, W) in 0 .. 255 (uint8) or 0 .. 1 (floating point) -> the same shape, float32 in 0 .. 1.

        `images` stays as it is. All random numbers come from `generator`, which is on the device of `images`.
        """
        changed = images.float() / 255 if images.dtype == torch.uint8 else images.float().clone()
        for name, (probability, change) in CHANGES.items():
            if name not in self.changes:
                continue
            drawn = torch.rand(len(changed), generator=generator, device=changed.device) < probability
            rows = drawn.nonzero().flatten()
            if len(rows):
                changed[rows] = change(changed[rows], generator).clamp(0, 1)
        return changed


def parse_changes(names: list[str]) -> ProcessingChanges | None:
    """Changes from the names on a command line: "all", or some of `CHANGES`; None where there are no names."""
    if not names:
        return None
    return ProcessingChanges(tuple(CHANGES) if names == ["all"] else tuple(names))


# ---- grey values -------------------------------------------------------------------------------------------------


def add_noise(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gaussian noise with a standard deviation of 0.005 to 0.04."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images + _draw(images, 0.005, 0.04, generator) * noise


def change_gamma(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A power of the grey values, from 0.61 to 1.65."""
    return images ** torch.exp(_draw(images, -0.5, 0.5, generator))


def change_window(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A narrower window, which clips, or a smaller range of grey values, each in half of the cases."""
    low, high = _draw(images, 0.0, 0.2, generator), _draw(images, 0.8, 1.0, generator)
    clipped, squeezed = (images - low) / (high - low), images * (high - low) + low
    return torch.where(_draw(images, 0.0, 1.0, generator) < 0.5, clipped, squeezed)


def mix_equalized(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """The image blended with its global histogram equalisation, which counts 0.3 to 1."""
    no_limit = torch.full((len(images),), math.inf, device=images.device)
    return torch.lerp(images, equalize_histogram(images, 1, no_limit), _draw(images, 0.3, 1.0, generator))


def apply_clahe(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """CLAHE with 8 x 8 tiles and a clip limit of 1.2 to 4."""
    return equalize_histogram(images, CLAHE_TILES, _draw(images, 1.2, 4.0, generator).flatten())


def equalize_histogram(images: torch.Tensor, tiles: int, clip_limit: torch.Tensor) -> torch.Tensor:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld, Graphics Gems IV, 1994).

    Args:
        images: (B, 1, H, W) in 0 .. 1.
        tiles: Tiles along each side; 1 is the equalisation of the whole image.
        clip_limit: (B,) largest height of a bin relative to a flat histogram; infinity is no limit.

    Returns:
        (B, 1, H, W) in 0 .. 1.
    """
    batch, _, height, width = images.shape
    device = images.device
    levels = (images.squeeze(1) * (GREY_LEVELS - 1)).round().long()  # (B, H, W)
    rows = torch.arange(height, device=device) * tiles // height
    columns = torch.arange(width, device=device) * tiles // width
    bins = ((rows[:, None] * tiles + columns) * GREY_LEVELS + levels).flatten(1)
    histogram = torch.zeros(batch, tiles * tiles * GREY_LEVELS, device=device)
    histogram.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float32))
    histogram = histogram.reshape(batch, tiles * tiles, GREY_LEVELS)
    histogram = histogram / histogram.sum(dim=2, keepdim=True)
    clipped = torch.minimum(histogram, clip_limit.reshape(-1, 1, 1) / GREY_LEVELS)
    clipped = clipped + (1 - clipped.sum(dim=2, keepdim=True)) / GREY_LEVELS  # what was cut off, to all alike
    table = (clipped.cumsum(dim=2) - clipped / 2).flatten(1)  # (B, tiles * tiles * levels)

    def look_up(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        index = (rows[:, None] * tiles + columns) * GREY_LEVELS + levels
        return table.gather(1, index.flatten(1)).reshape(batch, height, width)

    top, bottom, down = _nearest_tiles(height, tiles, device)
    left, right, across = _nearest_tiles(width, tiles, device)
    upper = torch.lerp(look_up(top, left), look_up(top, right), across)
    lower = torch.lerp(look_up(bottom, left), look_up(bottom, right), across)
    return torch.lerp(upper, lower, down[:, None]).unsqueeze(1)


def _nearest_tiles(size: int, tiles: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each pixel of an axis: the two tiles with the nearest centres, and the weight of the second, (size,)."""
    place = (torch.arange(size, device=device) + 0.5) * tiles / size - 0.5
    first = place.floor().clamp(0, tiles - 1)
    return first.long(), (first + 1).clamp(max=tiles - 1).long(), (place - first).clamp(0, 1)


# ---- burnt-in ----------------------------------------------------------------------------------------------------


def add_border(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A frame of up to 8 % of the image on some sides; black in 60 % of the cases, white in 15 %, otherwise grey."""
    height, width = images.shape[-2:]
    top, bottom, left, right = (_draw(images, -0.04, 0.08, generator) for _ in range(4))
    y = ((torch.arange(height, device=images.device) + 0.5) / height).reshape(1, 1, -1, 1)
    x = ((torch.arange(width, device=images.device) + 0.5) / width).reshape(1, 1, 1, -1)
    outside = (y < top) | (y > 1 - bottom) | (x < left) | (x > 1 - right)
    kind, grey = _draw(images, 0.0, 1.0, generator), _draw(images, 0.0, 1.0, generator)
    grey = torch.where(kind < 0.6, 0.0, torch.where(kind < 0.75, 1.0, grey))
    return torch.where(outside, grey, images)


def add_marker(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One to three bright letters near an edge; in a quarter of the cases dark ones on a bright plate."""
    images = images.clone()
    height, width = images.shape[-2:]
    draws = torch.rand(len(images), 10, generator=generator, device=images.device).tolist()
    for image, (first, second, third, count, size, along, across, grey, side, plate) in zip(images, draws, strict=True):
        text = "".join(LETTERS[int(draw * len(LETTERS))] for draw in (first, second, third)[: 1 + int(count * 3)])
        letters = _letters(text, max(6, int(height * (0.03 + 0.07 * size))))[:height, :width].to(images.device)
        if plate < 0.25:
            letters = 1 - letters
        y, x = ((across / 5, along), (1 - across / 5, along), (along, across / 5), (along, 1 - across / 5))[
            int(side * 4)
        ]
        top, left = int(y * (height - letters.shape[0])), int(x * (width - letters.shape[1]))
        below = image[0, top : top + letters.shape[0], left : left + letters.shape[1]]
        below.lerp_(torch.full_like(below, 0.7 + 0.3 * grey), letters)
    return images


def _letters(text: str, size: int) -> torch.Tensor:
    """(h, w) in 0 .. 1: a text in Pillow's own font."""
    mask: Any = ImageFont.load_default(size).getmask(text, mode="L")
    return torch.from_numpy(np.array(mask, dtype=np.float32).reshape(mask.size[::-1]) / 255)


# ---- scaling, filters, compression -------------------------------------------------------------------------------


def rescale(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Down to 0.3 to 1 of the size and up again, each by one of several filters, with and without antialiasing."""
    height, width = images.shape[-2:]
    share = torch.exp(_draw(images, math.log(0.3), 0.0, generator)).flatten().tolist()
    choices = torch.randint(12, (2, len(images)), generator=generator, device=images.device).tolist()
    changed = []
    for image, scale, down, up in zip(images.split(1), share, *choices, strict=True):
        size = (max(8, round(height * scale)), max(8, round(width * scale)))
        small = _resize(image, size, RESCALE_MODES[down % 4], antialias=down >= 3)  # antialiased in 3 of 4 cases
        changed.append(_resize(small, (height, width), RESCALE_MODES[up % 3], antialias=False))
    return torch.cat(changed)


def _resize(image: torch.Tensor, size: tuple[int, int], mode: str, antialias: bool) -> torch.Tensor:
    antialias = antialias and mode in ("bilinear", "bicubic")  # the others have no such choice
    return nn.functional.interpolate(image, size=size, mode=mode, antialias=antialias)


def blur(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A Gaussian blur; its standard deviation is 0.3 to 1.5 pixels of an image of 256."""
    return gaussian_blur(images, _draw(images, 0.3, 1.5, generator) * images.shape[-2] / REFERENCE_SIZE)


def sharpen(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """An unsharp mask: standard deviation 0.6 to 8 pixels of an image of 256, amount 0.2 to 1.5."""
    sigma = torch.exp(_draw(images, math.log(0.6), math.log(8.0), generator)) * images.shape[-2] / REFERENCE_SIZE
    return images + _draw(images, 0.2, 1.5, generator) * (images - gaussian_blur(images, sigma))


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Images (B, 1, H, W), each blurred by its own standard deviation (B, 1, 1, 1) in pixels; edges are repeated."""
    batch, _, height, width = images.shape
    radius = max(1, min(math.ceil(3 * float(sigma.max())), height - 1, width - 1))
    distance = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (distance / sigma.reshape(-1, 1).clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).reshape(batch, 1, -1, 1)
    # The images are the channels of one image, so that each has its own kernel.
    padded = nn.functional.pad(images.reshape(1, batch, height, width), (radius,) * 4, mode="replicate")
    blurred = nn.functional.conv2d(padded, kernel, groups=batch)
    return nn.functional.conv2d(blurred, kernel.transpose(2, 3), groups=batch).reshape(images.shape)


def compress(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """JPEG at a quality of 15 to 95."""
    return jpeg_artefacts(images, _draw(images, 15.0, 95.0, generator).flatten())


def jpeg_artefacts(images: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Images (B, 1, H, W) in 0 .. 1 after baseline JPEG at a quality (B,) of 1 .. 100, as libjpeg scales its table."""
    height, width = images.shape[-2:]
    padded = nn.functional.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
    rows, columns = padded.shape[-2] // 8, padded.shape[-1] // 8
    levels = (padded * 255).round() - 128
    blocks = levels.reshape(-1, rows, 8, columns, 8).transpose(2, 3)  # (B, rows, columns, 8, 8)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).reshape(-1, 1, 1)
    table = ((torch.tensor(JPEG_TABLE, device=images.device) * scale + 50) / 100).floor().clamp(1, 255)[:, None, None]
    cosine = _cosine_transform(images.device)
    coefficients = ((cosine @ blocks @ cosine.T) / table).round() * table
    restored = (cosine.T @ coefficients @ cosine).transpose(2, 3).reshape(padded.shape) + 128
    return restored[..., :height, :width].round().clamp(0, 255) / 255


def _cosine_transform(device: torch.device) -> torch.Tensor:
    """The orthonormal discrete cosine transform of eight values, (8, 8)."""
    place = torch.arange(8, device=device)
    matrix = torch.cos((2 * place + 1) * place[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _draw(images: torch.Tensor, low: float, high: float, generator: torch.Generator | None) -> torch.Tensor:
    """One number in low .. high for each image, (B, 1, 1, 1)."""
    draws = torch.rand(len(images), generator=generator, device=images.device)
    return (low + (high - low) * draws).reshape(-1, 1, 1, 1)


# Name -> how probable it is for an image, and the change, in the order in which they are applied.
Change = Callable[[torch.Tensor, torch.Generator | None], torch.Tensor]
CHANGES: dict[str, tuple[float, Change]] = {
    "noise": (0.2, add_noise),
    "gamma": (0.4, change_gamma),
    "window": (0.3, change_window),
    "equalize": (0.15, mix_equalized),
    "clahe": (0.15, apply_clahe),
    "border": (0.15, add_border),
    "marker": (0.2, add_marker),
    "rescale": (0.4, rescale),
    "blur": (0.15, blur),
    "sharpen": (0.25, sharpen),
    "jpeg": (0.4, compress),
}
