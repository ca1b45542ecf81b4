"""GMML: corrupt groups of neighbouring pixels of a whole batch at once, on its device.

The algorithm (arXiv 2205.14986; SPCXR, arXiv 2211.12944): rectangles of random place and size ("groups") are added to
an image until their union covers a target share of it. What they hold follows one of these fills, drawn per image:

- "noise", "zeros", "block" (*drop*, target share drawn from `drop_share`): N(0, 1) noise, zeros, or, for each group, a
  block from elsewhere in the same image;
- "replace" (target share `replace_share`): the same place in another image of the batch.

Every image needs another number of groups. A loop per image would add one, measure the union, and so on. Here a round
of groups is drawn for every image at once, and two facts replace the loop:

- Which group covers a pixel first? A group is (rows it spans) x (columns it spans), so a sum over the groups is a
  matrix product. Weigh group k with 2^-k, and the exponent of the sum is the first group. From the first groups follows
  the union after every group, hence how many to keep. It is measured on a lattice of pixels, which is unbiased.
- Where is the union of the kept groups? Each column of each group is a run of pixels: +1 at its start, -1 behind its
  end, and the running sum down the column is above 0 inside the union.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from .errors import SpcxrError

FILLS = ("noise", "zeros", "block", "replace")

# Groups drawn per round: enough for nearly every image at the usual shares. Fewer than 128, so that int8 counts them,
# and than 250, the number of exponents that float32 tells apart.
GROUPS_PER_ROUND = 96

# The union is measured on a lattice of at least this many rows and columns, or on every cell of a smaller grid.
LATTICE = 48


class Corrupted(NamedTuple):
    """`pixel_values` (B, C, H, W) after corruption, and `mask` (B, 1, H, W), true where a pixel was corrupted."""

    pixel_values: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class GroupMasking:
    """The corruption of group-masked model learning. Call it with a batch of normalised images.

    Attributes:
        fills: Which of "noise", "zeros", "block" and "replace" to draw from, each as likely as the others.
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
            generator: Where every random number comes from, on the device of `images`. The same state and batch
                give the same corruption.

        Raises:
            SpcxrError: `images` has another form, is too small for a group, or "replace" has no other image.
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

        content = torch.empty_like(images)
        for index, name in enumerate(self.fills):
            chosen = (fill == index).nonzero().squeeze(1)
            if len(chosen):
                content.index_copy_(0, chosen, self._content(name, images, chosen, groups, generator))
        # Exactly `images` where the mask is 0 and `content` where it is 1, and on a CPU a third of the time of `where`.
        return Corrupted(torch.lerp(images, content, mask.to(images.dtype)), mask)

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
        """What the groups of the `chosen` images hold, (len(chosen), C, H, W)."""
        if name == "zeros":
            return torch.zeros_like(images[: len(chosen)])
        if name == "noise":
            shape = (len(chosen), *images.shape[1:])
            return torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
        if name == "replace":
            # The batch is in random order already, so the next image is another image at random.
            return images.index_select(0, (chosen + 1) % images.shape[0])
        assert groups.source is not None  # drawn wherever "block" is among the fills
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


class _Spans(NamedTuple):
    """Intervals of cells along one axis, `start` and `length` (images, groups); `inside` (images, groups, positions) is
    1.0 where a position of the lattice lies in the interval."""

    start: torch.Tensor
    length: torch.Tensor
    inside: torch.Tensor


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
    step = max(1, rows // LATTICE), max(1, columns // LATTICE)

    unfinished = torch.arange(len(target), device=device)
    while len(unfinished):
        count = (len(unfinished), GROUPS_PER_ROUND)
        vertical = _draw_spans(count, rows, max_side[0], step[0], generator, device)
        horizontal = _draw_spans(count, columns, max_side[1], step[1], generator, device)
        before = mask.index_select(0, unfinished)  # far quicker here than mask[unfinished]
        first = _first_group(vertical.inside, horizontal.inside)
        first.masked_fill_(before[:, :: step[0], :: step[1]], -1)
        kept, done = _groups_to_keep(first, target[unfinished])
        after = before | _union(vertical, horizontal, kept, grid)
        if with_source:
            moved = source[unfinished] + _shift_to_blocks(vertical, horizontal, grid, generator)
            source[unfinished] = torch.where(after & ~before, moved, source[unfinished])
        mask.index_copy_(0, unfinished, after)
        unfinished = unfinished[~done]
    return _Groups(mask, source if with_source else None)


def _draw_spans(
    count: tuple[int, int],
    size: int,
    longest: int,
    step: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> _Spans:
    """Intervals of 1 to `longest` cells that start anywhere in 0 .. size - 1 and are cut off at the border."""
    start = torch.randint(size, count, generator=generator, device=device)
    length = torch.randint(1, longest + 1, count, generator=generator, device=device)
    length = torch.minimum(length, size - start)
    return _Spans(start, length, _inside(start, length, size, step))


def _inside(start: torch.Tensor, length: torch.Tensor, size: int, step: int) -> torch.Tensor:
    """(images, groups, ceil(size / step)): 1.0 where every step-th cell lies in the interval, else 0.0."""
    offset = torch.arange(0, size, step, device=start.device, dtype=torch.float32) - start.unsqueeze(2)
    return ((offset >= 0) & (offset < length.unsqueeze(2))).float()


def _first_group(row_spans: torch.Tensor, column_spans: torch.Tensor) -> torch.Tensor:
    """(n, groups, rows) x (n, groups, columns) -> (n, rows, columns): the first group over each cell, 253 if none."""
    exponents = 126 - torch.arange(row_spans.shape[1], device=row_spans.device)
    weights = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    total = (row_spans * weights.unsqueeze(1)).transpose(1, 2) @ column_spans
    biased_exponent = total.view(torch.int32) >> 23  # 253 - k for a leading term of 2^(126 - k), and 0 for a sum of 0
    return 253 - biased_exponent


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


def _union(vertical: _Spans, horizontal: _Spans, kept: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(n, rows, columns): the cells in any of each image's first `kept` (n,) groups."""
    rows, columns = grid
    images, groups = vertical.start.shape
    device = kept.device
    width = horizontal.length * (torch.arange(groups, device=device) < kept.unsqueeze(1))  # 0 columns for the others
    group = torch.arange(images * groups, device=device).repeat_interleave(width.flatten())  # one entry per run
    first_run = width.flatten().cumsum(0) - width.flatten()
    column = horizontal.start.flatten()[group] + torch.arange(len(group), device=device) - first_run[group]
    line = group // groups * columns + column
    begin = vertical.start.flatten()[group]
    end = begin + vertical.length.flatten()[group]
    # Rows first, so that the running sum adds whole rows of all images to each other.
    depth = torch.zeros(rows + 1, images * columns, dtype=torch.int8, device=device)
    one = torch.ones((), dtype=torch.int8, device=device)
    depth.view(-1).scatter_add_(0, begin * (images * columns) + line, one.expand(len(group)))
    depth.view(-1).scatter_add_(0, end * (images * columns) + line, (-one).expand(len(group)))
    depth = _running_sum(depth)[:rows]
    return (depth > 0).reshape(rows, images, columns).transpose(0, 1).contiguous()


def _running_sum(values: torch.Tensor) -> torch.Tensor:
    """The running sum down the rows of an int8 matrix. May change its input."""
    if values.device.type != "cpu":
        return values.cumsum(dim=0, dtype=torch.int8)
    rows = values.unbind(0)
    for above, row in pairwise(rows):  # vectorised additions; torch.cumsum takes 20 times as long here
        row.add_(above)
    return values


def _shift_to_blocks(
    vertical: _Spans, horizontal: _Spans, grid: tuple[int, int], generator: torch.Generator | None
) -> torch.Tensor:
    """(n, rows, columns): how far away, in cells counted row by row, the block of each cell's first group is."""
    rows, columns = grid
    shift = _draw_shift(vertical, rows, generator) * columns + _draw_shift(horizontal, columns, generator)
    inside = [_inside(spans.start, spans.length, size, 1) for spans, size in ((vertical, rows), (horizontal, columns))]
    owner = _first_group(*inside).clamp(max=GROUPS_PER_ROUND - 1).long()
    return shift.gather(1, owner.flatten(1)).reshape(owner.shape)


def _draw_shift(spans: _Spans, size: int, generator: torch.Generator | None) -> torch.Tensor:
    """How far to go from each interval to one of the same length anywhere in 0 .. size - 1, (images, groups)."""
    position = torch.rand(spans.start.shape, generator=generator, device=spans.start.device)
    return (position * (size - spans.length + 1)).long() - spans.start
