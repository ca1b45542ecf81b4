"""PNG pictures: grids of radiographs, masks over them, curves."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

MASK_COLOUR = (0.15, 0.65, 1.0)
OUTLINE = (0.337, 0.706, 0.914)  # sky blue
COLOURS = {"heart": (0.835, 0.369, 0.0)} | dict.fromkeys(("left clavicle", "right clavicle"), (0.941, 0.894, 0.259))
MARGIN = 6  # pixels around words and between titled tiles
TILE = 224  # about as many pixels has a side of a titled tile


def to_grey(pixel_values: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Normalised (B, 1, H, W) or (B, 3, H, W) -> grey values in 0 .. 1, (B, H, W)."""
    return (pixel_values.float().mean(dim=1) * std + mean).clamp(0, 1)


def to_picture(tile: torch.Tensor) -> Image.Image:
    """(H, W) grey or (H, W, 3) colour in 0 .. 1 as a picture of 8 bits."""
    return Image.fromarray((tile.cpu().clamp(0, 1).numpy() * 255).round().astype(np.uint8))


def overlay(grey: torch.Tensor, mask: torch.Tensor, opacity: float = 0.35) -> torch.Tensor:
    """Tint where `mask` (H, W) is true: grey (H, W) in 0 .. 1 -> colour (H, W, 3) in 0 .. 1."""
    colour = grey.unsqueeze(-1).repeat(1, 1, 3)
    tinted = (1 - opacity) * colour + opacity * torch.tensor(MASK_COLOUR)
    return torch.where(mask.unsqueeze(-1), tinted, colour)


def outline(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The inner edge of a mask (h, w), drawn at `size`: booleans (H, W), about 1/150 of the side thick."""
    resized = functional.interpolate(mask.cpu().float()[None, None], size=size, mode="nearest")
    reach = max(1, round(min(size) / 150))
    # Padded by hand: where the mask touches the picture's border, the border is its edge.
    padded = functional.pad(1 - resized, [reach] * 4, value=1.0)
    near_outside = functional.max_pool2d(padded, 2 * reach + 1, stride=1)
    return (resized * near_outside)[0, 0] > 0


def draw_structures(
    grey: torch.Tensor, masks: Mapping[str, torch.Tensor], widths: Mapping[str, tuple[int, int]] | None = None
) -> Image.Image:
    """The outlines of structures over a radiograph, and the widths that a ratio is made of as horizontal lines.

    Args:
        grey: (H, W) in 0 .. 1.
        masks: Name -> (h, w) booleans over the same picture.
        widths: Name -> first and last column of a mask; a line is drawn at the mean height of the structures that the
            name is part of ("lungs": both of them).
    """
    height, width = grey.shape
    picture = grey.unsqueeze(-1).repeat(1, 1, 3)
    for name, mask in masks.items():
        edge = outline(mask, (height, width)).unsqueeze(-1)
        picture = torch.where(edge, torch.tensor(COLOURS.get(name, OUTLINE)), picture)
    canvas = Image.fromarray((picture.clamp(0, 1).numpy() * 255).round().astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for name, ends in (widths or {}).items():
        parts = [mask for label, mask in masks.items() if label.endswith(name.removesuffix("s"))]
        rows, columns = parts[0].shape
        row = sum(mask.nonzero()[:, 0].float().mean().item() for mask in parts) / len(parts)
        y = (row + 0.5) * height / rows
        line = [(ends[0] * width / columns, y), ((ends[1] + 1) * width / columns, y)]
        colour = tuple(round(255 * level) for level in COLOURS.get(name, OUTLINE))
        pen.line(line, fill=colour, width=max(2, round(min(height, width) / 150)))
    return canvas


def with_words(picture: Image.Image, words: Sequence[str]) -> Image.Image:
    """The picture with lines of text below it, dark on white, in a font size that suits the width."""
    font = font_for(picture.width)
    pen = ImageDraw.Draw(picture)
    lines = [line for text in words for line in _wrap(pen, text, font, picture.width - 2 * MARGIN)]
    height = round(1.35 * font.size)
    canvas = Image.new(picture.mode, (picture.width, picture.height + height * len(lines) + 2 * MARGIN), "white")
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        pen.text((MARGIN, picture.height + MARGIN + number * height), line, fill="black", font=font)
    return canvas


def font_for(width: int) -> Any:
    """Pillow's own font at a size that suits a picture of that width."""
    return ImageFont.load_default(size=max(12, min(24, width // 40)))


def _wrap(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> list[str]:
    """Whole words, as many in a line as it holds."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def titled_grid(
    rows: Sequence[Sequence[torch.Tensor]], titles: Sequence[Sequence[str]], size: tuple[int, int] | None = None
) -> Image.Image:
    """A grid of tiles with a title above each.

    Args:
        rows: Tiles, (H, W) grey or (H, W, 3) colour in 0 .. 1, enlarged pixel by pixel, so that what a model saw stays
            what is seen.
        titles: Of each tile; all with the same number of lines.
        size: (width, height) of a tile in the picture; by default a multiple of the first one's own, about 224 pixels.
    """
    if size is None:
        height, width = rows[0][0].shape[:2]
        times = max(1, round(TILE / max(height, width)))
        size = (width * times, height * times)
    width, height = size
    font = font_for(len(rows[0]) * width)
    title = round(font.size * (0.4 + 1.2 * (1 + max(text.count("\n") for text in titles[0]))))
    mode = "L" if all(tile.dim() == 2 for row in rows for tile in row) else "RGB"
    canvas = Image.new(mode, (len(rows[0]) * (width + MARGIN) - MARGIN, len(rows) * (height + title + MARGIN)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (row, names) in enumerate(zip(rows, titles, strict=True)):
        top = y * (height + title + MARGIN)
        for x, (tile, name) in enumerate(zip(row, names, strict=True)):
            pen.text((x * (width + MARGIN), top), name, fill="black", font=font)
            canvas.paste(to_picture(tile).resize(size, Image.Resampling.NEAREST), (x * (width + MARGIN), top + title))
    return canvas


def save_grid(rows: Sequence[Sequence[torch.Tensor]], path: Path, gap: int = 4) -> None:
    """Write a grid of equally sized pictures, each (H, W) grey or (H, W, 3) colour in 0 .. 1, as one PNG."""
    colour = [[tile if tile.dim() == 3 else tile.unsqueeze(-1).repeat(1, 1, 3) for tile in row] for row in rows]
    height, width = colour[0][0].shape[:2]
    canvas = np.full((len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for y, row in enumerate(colour):
        for x, tile in enumerate(row):
            top, left = y * (height + gap), x * (width + gap)
            canvas[top : top + height, left : left + width] = (tile.cpu().clamp(0, 1).numpy() * 255).round()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)


@functools.cache
def _print_once(text: str) -> None:
    print(text, flush=True)


def save_curves(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, x_label: str, y_label: str) -> None:
    """Write named curves of (x, y) points as one PNG; without matplotlib (the extra `demo`) say so and write none."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps global state
    except ImportError:  # a failed drawing must not end a run
        _print_once(f'{path}: not drawn without matplotlib; `pip install "spcxr-hf[demo]"`')
        return

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name) if points else None
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if any(curves.values()):
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
