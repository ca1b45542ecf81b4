"""GMML: corrupt groups of neighbouring pixels of a whole batch at once, on its device.

The algorithm (arXiv 2205.14986; SPCXR, arXiv 2211.12944): rectangles of random place and size ("groups") are added to an
image until their union covers a target share of it. What the groups hold then follows one of these fills, drawn per image:

- "noise", "zeros", "block" (*drop*, target share drawn from `drop_share`): N(0, 1) noise, zeros, or, for each group, a
  block from elsewhere in the same image;
- "replace" (target share `replace_share`): the same place in another image of the batch.

Every image needs another number of groups. A loop per image would add one, measure the union, and so on. Here a round of
groups is drawn for every image at once, and one batched matrix product tells for each pixel which group covers it first:
a group is (rows it spans) x (columns it spans), group k is weighted 2^-k, so the exponent of the sum over the groups is
the first of them. From the first groups follows the union after every group, hence the number of groups to keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .errors import SpcxrError

FILLS = ("noise", "zeros", "block", "replace")

# Groups drawn per round. Fewer than 250, the number of exponents that float32 tells apart.
GROUPS_PER_ROUND = 64


class Corrupted(NamedTuple):
    """`pixel_values` (B, C, H, W) after corruption, and `mask` (B, 1, H, W), true where a pixel was corrupted."""

    pixel_values: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class GroupMasking:
    """The corruption of group-masked model learning. Call it with a batch of normalised images.

    Attributes:
        fills: Which of "noise", "zeros", "block" and "replace" to draw from, each as likely as the others, one per image.
        drop_share: Least and largest target share of the image for the first three, each in (0, 0.95].
        replace_share: Target share for "replace", in (0, 0.95].
        max_side: Largest side of a group as a share of the image's side, in (0, 1].
        align: Groups start and end at multiples of this many pixels: 1, or the patch size.

    Raises:
        SpcxrError: an attribute is out of its range; the message names it.
    """

    fills: tuple[str, ...] = ("noise", "replace")
    drop_share: tuple[float, float] = (0.5, 0.75)
    replace_share: float = 0.3
    max_side: float = 0.3
    align: int = 1

    def __post_init__(self) -> None:
        unknown = [fill for fill in self.fills if fill not in FILLS]
        if unknown or not self.fills:
            raise SpcxrError(f"fills must name some of {', '.join(FILLS)}; got {list(self.fills)}")
        shares = {"drop_share[0]": self.drop_share[0], "drop_share[1]": self.drop_share[1],
                  "replace_share": self.replace_share}  # fmt: skip
        for name, share in shares.items():
            # Above 0.95 the last free pixels, mostly in the corners, take a very long time to be hit.
            if not 0 < share <= 0.95:
                raise SpcxrError(f"{name} must lie in (0, 0.95]; got {share}")
        if self.drop_share[0] > self.drop_share[1]:
            raise SpcxrError(f"drop_share must rise; got {self.drop_share}")
        if not 0 < self.max_side <= 1:
            raise SpcxrError(f"max_side must lie in (0, 1]; got {self.max_side}")
        if self.align < 1:
            raise SpcxrError(f"align must be at least 1 pixel; got {self.align}")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, generator: torch.Generator | None = None) -> Corrupted:
        """Corrupt a batch; `images` stays as it is.

        Args:
            images: (B, C, H, W), floating point; H and W multiples of `align`.
            generator: Where every random number comes from, on the device of `images`. The same state and the same batch
                give the same corruption.

        Raises:
            SpcxrError: `images` has another form, is too small for a group, or "replace" has no other image to take from.
        """
        self._check(images)
        batch, _, height, width = images.shape
        rows, columns = height // self.align, width // self.align
        fill = torch.randint(len(self.fills), (batch,), generator=generator, device=images.device)
        target = self._draw_targets(fill, generator)
        with torch.autocast(images.device.type, enabled=False):  # the exponents need float32 products
            groups = _draw_groups(
                target,
                (rows, columns),
                (max(1, int(rows * self.max_side)), max(1, int(columns * self.max_side))),
                with_source="block" in self.fills,
                generator=generator,
            )
        mask = groups.mask.unsqueeze(1)
        if self.align > 1:
            mask = mask.repeat_interleave(self.align, dim=2).repeat_interleave(self.align, dim=3)

        corrupted = images.clone()
        for index, name in enumerate(self.fills):
            chosen = (fill == index).nonzero().squeeze(1)
            if chosen.numel():
                content = self._content(name, images, chosen, groups, generator)
                corrupted[chosen] = torch.where(mask[chosen], content, images[chosen])
        return Corrupted(corrupted, mask)

    def _check(self, images: torch.Tensor) -> None:
        if images.dim() != 4 or not images.is_floating_point() or images.numel() == 0:
            raise SpcxrError(f"images must be floating point (B, C, H, W); got {images.dtype} {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height % self.align or width % self.align:
            raise SpcxrError(f"images of {height} x {width} pixels are no multiple of align = {self.align}")
        if "replace" in self.fills and images.shape[0] < 2:
            raise SpcxrError('the fill "replace" takes pixels from another image: it needs a batch of at least 2')

    def _draw_targets(self, fill: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The share of each image to cover, (B,)."""
        low, high = self.drop_share
        target = low + (high - low) * torch.rand(fill.shape, generator=generator, device=fill.device)
        if "replace" in self.fills:
            target[fill == self.fills.index("replace")] = self.replace_share
        return target

    def _content(
        self,
        name: str,
        images: torch.Tensor,
        chosen: torch.Tensor,
        groups: _Groups,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """What the groups of the `chosen` images hold: (len(chosen), C, H, W), or what broadcasts to it."""
        if name == "zeros":
            return torch.zeros((), dtype=images.dtype, device=images.device)
        if name == "noise":
            shape = (len(chosen), *images.shape[1:])
            return torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
        if name == "replace":
            # The batch is in random order already, so the next image is another image at random.
            return images[(chosen + 1) % images.shape[0]]
        return self._blocks(images[chosen], groups.source[chosen])

    def _blocks(self, images: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Every pixel from where its group's block comes from; `source` (n, rows, columns) counts cells row by row."""
        batch, channels, height, width = images.shape
        cell_row, cell_column = source // (width // self.align), source % (width // self.align)
        cell_row, cell_column = (
            cells.repeat_interleave(self.align, dim=1).repeat_interleave(self.align, dim=2)
            for cells in (cell_row, cell_column)
        )
        row = cell_row * self.align + torch.arange(height, device=images.device).unsqueeze(1) % self.align
        column = cell_column * self.align + torch.arange(width, device=images.device) % self.align
        pixel = (row * width + column).reshape(batch, 1, -1).expand(-1, channels, -1)
        return images.flatten(2).gather(2, pixel).reshape(images.shape)


class _Groups(NamedTuple):
    """`mask` (B, rows, columns): the union of the groups. `source`: the cell that each cell's block comes from."""

    mask: torch.Tensor
    source: torch.Tensor | None


def _draw_groups(
    target: torch.Tensor,
    grid: tuple[int, int],
    max_side: tuple[int, int],
    with_source: bool,
    generator: torch.Generator | None,
) -> _Groups:
    """Add groups to each image until its share `target` (B,) of the grid's cells is covered."""
    rows, columns = grid
    device = target.device
    mask = torch.zeros(len(target), rows, columns, dtype=torch.bool, device=device)
    source = torch.arange(rows * columns, device=device).reshape(1, rows, columns).repeat(len(target), 1, 1)
    # On a large grid the union is measured on every second row and column: a quarter of the work, and unbiased.
    stride = 2 if min(grid) >= 64 else 1

    open_images = torch.arange(len(target), device=device)
    while len(open_images):
        count = (len(open_images), GROUPS_PER_ROUND)
        top, height, row_spans = _draw_spans(count, rows, max_side[0], generator, device)
        left, width, column_spans = _draw_spans(count, columns, max_side[1], generator, device)

        before = mask[open_images]
        first = _first_group(row_spans[..., ::stride], column_spans[..., ::stride])
        first = first.masked_fill(before[:, ::stride, ::stride], -1)
        kept, done = _groups_to_keep(first, target[open_images])

        # Without the rows of the groups beyond the last that was kept, the product counts the kept ones alone.
        row_spans = row_spans * (torch.arange(GROUPS_PER_ROUND, device=device) < kept.unsqueeze(1)).unsqueeze(2)
        after = before | (row_spans.transpose(1, 2) @ column_spans > 0.5)
        if with_source:
            shift = _draw_shift(top, height, rows, generator) * columns
            shift = shift + _draw_shift(left, width, columns, generator)
            owner = _first_group(row_spans, column_spans).clamp(max=GROUPS_PER_ROUND - 1)
            moved = source[open_images] + shift.gather(1, owner.flatten(1)).reshape(owner.shape)
            source[open_images] = torch.where(after & ~before, moved, source[open_images])
        mask[open_images] = after
        open_images = open_images[~done]
    return _Groups(mask, source if with_source else None)


def _draw_spans(
    count: tuple[int, int], size: int, longest: int, generator: torch.Generator | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Intervals of 1 to `longest` cells that start anywhere in 0 .. size - 1 and are cut off at the border.

    Returns start and length (n, groups), and the cells inside (n, groups, size), 1.0 or 0.0.
    """
    start = torch.randint(size, count, generator=generator, device=device)
    length = torch.randint(1, longest + 1, count, generator=generator, device=device)
    length = torch.minimum(length, size - start)
    offset = torch.arange(size, device=device) - start.unsqueeze(2)
    return start, length, ((offset >= 0) & (offset < length.unsqueeze(2))).float()


def _draw_shift(
    start: torch.Tensor, length: torch.Tensor, size: int, generator: torch.Generator | None
) -> torch.Tensor:
    """How far to go from each interval to an interval of the same length anywhere in 0 .. size - 1."""
    position = torch.rand(start.shape, generator=generator, device=start.device)
    return (position * (size - length + 1)).long() - start


def _first_group(row_spans: torch.Tensor, column_spans: torch.Tensor) -> torch.Tensor:
    """(n, groups, rows) x (n, groups, columns) -> (n, rows, columns): index of the first group over each cell, 253 if none."""
    weights = torch.ldexp(
        torch.ones(row_spans.shape[1], device=row_spans.device), 126 - torch.arange(row_spans.shape[1], device=row_spans.device)
    )
    total = (row_spans * weights.unsqueeze(1)).transpose(1, 2) @ column_spans
    biased_exponent = total.view(torch.int32) >> 23  # 253 - k for a leading term of 2^(126 - k), and 0 for a sum of 0
    return (253 - biased_exponent).long()


def _groups_to_keep(first: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many groups (n,) an image keeps until its union reaches `target` (n,), and whether it does.

    `first` (n, rows, columns) is each cell's first group, -1 where an earlier round had covered it.
    """
    images, cells = len(first), first[0].numel()
    slots = GROUPS_PER_ROUND + 2  # slot 0: covered before; then the groups; the last: in none
    slot = (first + 1).clamp(max=slots - 1) + slots * torch.arange(images, device=first.device).reshape(-1, 1, 1)
    new_cells = torch.bincount(slot.flatten(), minlength=images * slots).reshape(images, slots)
    union = new_cells[:, :-1].cumsum(dim=1)  # after 0, 1, 2, ... groups
    short = union < (target * cells).unsqueeze(1)
    kept = short.sum(dim=1).clamp(max=GROUPS_PER_ROUND)
    return kept, ~short[:, -1]
