"""Group masking (GMML): corrupt groups of neighbouring pixels of a whole batch at once, on its device.

The algorithm (arXiv 2205.14986; SPCXR, arXiv 2211.12944): rectangles of random place and size ("groups") are added to
an image until their union covers a target share of it. What they hold is one of four fill modes, drawn per image:

- "noise", "zeros", "block" (target share drawn from `mask_ratio`): N(0, 1) noise, zeros, or, for each group, a block
  from elsewhere in the same image;
- "replace" (target share `replace_ratio`): the same place in another image of the batch.

Each image needs a different number of groups. A plain implementation loops over the images and adds groups one at a
time. Here a round of groups is drawn for every image at once, and two computations replace the loop:

- Which group covers a pixel first? A group is (rows it spans) x (columns it spans), so a sum over the groups is a
  matrix product. Group k has the weight 2^-k, and the exponent of the sum is the first group. From the first groups
  follows the union after every group, hence how many to keep. It is measured on a lattice of pixels, without bias.
- Where is the union of the kept groups? A rectangle is +1 or -1 at its four corners, summed up down the columns and
  along the rows; the sum counts the groups over a pixel. Eight neighbouring counts share a word of 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from spcxr_hf.errors import SpcxrError

FILL_MODES = ("noise", "zeros", "block", "replace")

# Groups drawn per round: enough for nearly every image at the default ratios. Fewer than 128, so that a byte counts
# them, and than 250, the number of exponents that float32 tells apart.
GROUPS_PER_ROUND = 96

# Noise is drawn for this many images; in a larger batch each takes another stretch of the same numbers. Within an image
# they are independent; drawing all of them would take more than half of the time of the whole corruption on a CPU.
NOISE_SHEET = 4

# On a CPU, images filled, and unions computed, at a time: they fit the cache. Other devices work on
# the whole batch.
CPU_PART = 8
CPU_UNION_PART = 32

# A word of eight counts times this is a word of their running sums.
EVERY_BYTE = 0x0101010101010101

# The union is measured on a lattice of at least this many rows and columns, or on every cell of a smaller grid.
LATTICE = 32


class Corrupted(NamedTuple):
    """`pixel_values` (B, C, H, W) after corruption, and `mask` (B, 1, H, W), true where a pixel was corrupted."""

    pixel_values: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class GroupMasking:
    """The corruption of group-masked model learning. Call it with a batch of normalised images.

    Attributes:
        fill_modes: Which of "noise", "zeros", "block" and "replace" to draw from, with equal probability.
        mask_ratio: Least and largest target share of the image for the first three, each in (0, 0.95].
        replace_ratio: Target share for "replace", in (0, 0.95].
        max_block_size: Largest side of a group as a share of the image's side, in (0, 1].
        align: Groups start and end at multiples of this many pixels: 1, or the patch size.

    Raises:
        SpcxrError: an attribute is out of its range; the message names it.
    """

    fill_modes: tuple[str, ...] = ("noise", "replace")
    mask_ratio: tuple[float, float] = (0.5, 0.75)
    replace_ratio: float = 0.3
    max_block_size: float = 0.3
    align: int = 1

    def __post_init__(self) -> None:
        if not self.fill_modes or not set(self.fill_modes) <= set(FILL_MODES):
            raise SpcxrError(f"fill_modes must name some of {', '.join(FILL_MODES)}; got {list(self.fill_modes)}")
        least, largest = self.mask_ratio
        ratios = {"mask_ratio[0]": least, "mask_ratio[1]": largest, "replace_ratio": self.replace_ratio}
        for name, ratio in ratios.items():
            # Above 0.95 the last free pixels, mostly in the corners, take a very long time to be hit.
            if not 0 < ratio <= 0.95:
                raise SpcxrError(f"{name} must lie in (0, 0.95]; got {ratio}")
        if least > largest:
            raise SpcxrError(f"mask_ratio must rise; got {self.mask_ratio}")
        if not 0 < self.max_block_size <= 1:
            raise SpcxrError(f"max_block_size must lie in (0, 1]; got {self.max_block_size}")
        if self.align < 1:
            raise SpcxrError(f"align must be at least 1 pixel; got {self.align}")

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, generator: torch.Generator | None = None, reuse: Corrupted | None = None
    ) -> Corrupted:
        """Corrupt a batch; `images` is not changed.

        Args:
            images: (B, C, H, W), floating point; H and W multiples of `align`.
            generator: Source of all random numbers, on the device of `images`. The same state and batch give the same
                corruption.
            reuse: The result of an earlier call that is no longer needed: for images of the same shape, type and device
                its memory takes the new result. On a CPU new memory costs a third of the corruption's time.

        Raises:
            SpcxrError: `images` has another form, is too small for a group, or "replace" has no other image; `reuse` is
                `images` itself.
        """
        if images.dim() != 4 or not images.is_floating_point() or images.numel() == 0:
            raise SpcxrError(f"images must be floating point (B, C, H, W); got {images.dtype} {tuple(images.shape)}")
        batch, _, height, width = images.shape
        if height % self.align or width % self.align:
            raise SpcxrError(f"images of {height} x {width} pixels are no multiple of align = {self.align}")
        if "replace" in self.fill_modes and batch < 2:
            raise SpcxrError('the fill mode "replace" takes pixels from another image: it needs a batch of at least 2')

        pixel_values, mask = _memory(images, reuse)
        runs = self._draw_fill_modes(batch, generator, images.device)
        low, high = self.mask_ratio
        target = low + (high - low) * torch.rand(batch, generator=generator, device=images.device)
        for run in runs:
            if run.fill_mode == "replace":
                target[run.start : run.stop] = self.replace_ratio

        rows, columns = height // self.align, width // self.align
        longest = max(1, int(rows * self.max_block_size)), max(1, int(columns * self.max_block_size))
        with torch.autocast(images.device.type, enabled=False):  # the exponents need float32 products
            cells = mask.squeeze(1) if self.align == 1 else mask.new_empty(batch, rows, columns)
            source = _draw_groups(cells, target, longest, "block" in self.fill_modes, generator)
        if self.align > 1:
            mask.copy_(self._to_pixels(cells).unsqueeze(1))

        noise = _draw_noise(images, generator) if "noise" in self.fill_modes else None
        part = CPU_PART if images.device.type == "cpu" else batch
        for run in runs:
            for first in range(run.start, run.stop, part):
                chosen = slice(first, min(first + part, run.stop))
                content = self._content(run.fill_mode, images, chosen, noise, source)
                # Exactly the image where the mask is 0, the content where it is 1; on a CPU much faster than `where`.
                torch.lerp(images[chosen], content, mask[chosen].to(images.dtype), out=pixel_values[chosen])
        return Corrupted(pixel_values, mask.view(torch.bool))

    def _draw_fill_modes(self, count: int, generator: torch.Generator | None, device: torch.device) -> list[_Run]:
        """The fill mode of each image of the batch.

        As many of each as independent draws give, but side by side, so that a mode is one stretch of memory; where the
        first stretch starts is drawn too, so that all images have the same chances. (Training batches are shuffled.)
        """
        drawn = torch.randint(len(self.fill_modes), (count,), generator=generator, device=device)
        start = torch.randint(count, (1,), generator=generator, device=device)
        counts = drawn.bincount(minlength=len(self.fill_modes))
        *lengths, begin = torch.cat((counts, start)).tolist()  # one wait for a GPU
        runs = []
        for mode, length in zip(self.fill_modes, lengths, strict=True):
            stop = begin + length
            runs += [_Run(mode, begin, min(stop, count)), _Run(mode, 0, stop - count)]  # it may wrap around
            begin = stop % count
        return [run for run in runs if run.start < run.stop]

    def _content(
        self,
        fill_mode: str,
        images: torch.Tensor,
        chosen: slice,
        noise: torch.Tensor | None,
        source: torch.Tensor | None,
    ) -> torch.Tensor:
        """What groups would hold if they covered the whole of the chosen images; read only."""
        if fill_mode == "noise":
            assert noise is not None  # drawn wherever it is among the modes, as is `source`
            return noise[chosen]
        if fill_mode == "zeros":
            return images.new_zeros(()).expand_as(images[chosen])
        if fill_mode == "replace":
            # The batch is in random order already, so the next image is another image at random.
            following = images[chosen.start + 1 : chosen.stop + 1]
            return following if chosen.stop < len(images) else torch.cat((following, images[:1]))
        assert source is not None
        height, width = images.shape[-2:]
        columns = width // self.align
        row = self._to_pixels(source[chosen] // columns) * self.align
        column = self._to_pixels(source[chosen] % columns) * self.align
        row += torch.arange(height, device=images.device).unsqueeze(1) % self.align
        column += torch.arange(width, device=images.device) % self.align
        pixel = (row * width + column).flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)
        return images[chosen].flatten(2).gather(2, pixel).reshape(images[chosen].shape)

    def _to_pixels(self, cells: torch.Tensor) -> torch.Tensor:
        """(n, rows, columns) -> a new (n, H, W): each cell is `align` x `align` pixels."""
        return cells.repeat_interleave(self.align, dim=1).repeat_interleave(self.align, dim=2)


class _Run(NamedTuple):
    """Neighbouring images start .. stop - 1 of a batch that have the same fill mode."""

    fill_mode: str
    start: int
    stop: int


def _memory(images: torch.Tensor, reuse: Corrupted | None) -> Corrupted:
    """Memory for the corrupted images and the mask (uint8): that of `reuse` where it fits."""
    shape = (len(images), 1, *images.shape[-2:])
    if reuse is not None:
        old = reuse.pixel_values
        if old.data_ptr() == images.data_ptr():
            raise SpcxrError("reuse holds the images that are to be corrupted; give a result that is no longer needed")
        same = (old.shape, old.dtype, old.device) == (images.shape, images.dtype, images.device)
        if same and reuse.mask.shape == shape:
            return Corrupted(old, reuse.mask.view(torch.uint8))
    return Corrupted(torch.empty_like(images), torch.empty(shape, dtype=torch.uint8, device=images.device))


def _draw_noise(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """N(0, 1) noise of the shape of `images`, read only: in a large batch images share their numbers."""
    count, pixels = len(images), images[0].numel()
    drawn = min(count, NOISE_SHEET)
    sheet = torch.randn(drawn * pixels, generator=generator, device=images.device, dtype=images.dtype)
    shift = (drawn - 1) * pixels // max(1, count - 1)  # from the start of one image's numbers to the next one's
    return sheet.as_strided((count, pixels), (shift, 1)).view(images.shape)


# ---- groups ------------------------------------------------------------------------------------------------------


class _Spans(NamedTuple):
    """Intervals of cells along one axis, `start` and `length` (images, groups); `inside` (images, groups, positions) is
    1.0 where a position of the lattice is in the interval."""

    start: torch.Tensor
    length: torch.Tensor
    inside: torch.Tensor


def _draw_groups(
    mask: torch.Tensor,
    target: torch.Tensor,
    max_size: tuple[int, int],
    with_source: bool,
    generator: torch.Generator | None,
) -> torch.Tensor | None:
    """Write groups into `mask` until each image's share `target` (B,) of the cells is covered.

    Args:
        mask: (B, rows, columns) uint8, filled with 1 in the union of the groups, else 0. (On a CPU torch handles bytes
            at several times the speed of booleans.)
        max_size: of a group, in cells.

    Returns:
        With `with_source`, the number of the cell that each cell's block comes from, (B, rows, columns).
    """
    grid = rows, columns = mask.shape[1], mask.shape[2]
    device = target.device
    source = torch.arange(rows * columns, device=device).repeat(len(target), 1) if with_source else None
    lattice = [slice(max(1, size // LATTICE) // 2, None, max(1, size // LATTICE)) for size in grid]  # off the border

    unfinished = None  # in the first round: all
    while unfinished is None or len(unfinished):
        images = torch.arange(len(target), device=device) if unfinished is None else unfinished
        spans = []
        for size, longest, chosen in zip(grid, max_size, lattice, strict=True):
            # 1 to `longest` cells that start anywhere and are cut off at the border
            count = (len(images), GROUPS_PER_ROUND)
            start = torch.randint(size, count, generator=generator, device=device)
            length = torch.randint(1, longest + 1, count, generator=generator, device=device)
            length = torch.minimum(length, size - start)
            spans.append(_Spans(start, length, _inside(start, length, torch.arange(size, device=device)[chosen])))
        vertical, horizontal = spans
        first = _first_group(vertical.inside, horizontal.inside)
        before = None if unfinished is None else mask.index_select(0, images)
        if before is not None:
            first -= (first + 1) * before[:, lattice[0], lattice[1]]  # -1 where it is covered already
        kept, done = _groups_to_keep(first, target[images])
        after = _union(vertical, horizontal, kept, mask if before is None else torch.empty_like(before))
        if before is not None:
            after |= before
            mask.index_copy_(0, images, after)
        if source is not None:
            new = after if before is None else after - before
            shift = _shift_to_blocks(vertical, horizontal, grid, generator) * new
            source.index_add_(0, images, shift.flatten(1))
        unfinished = images[~done]
    return source if source is None else source.view(len(target), rows, columns)


def _inside(start: torch.Tensor, length: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """(images, groups, positions): 1.0 where each of `cells` (positions,) is in the interval, else 0.0."""
    # One comparison: a cell is inside if it is nearer to the middle of the interval than half its length.
    middle = (start + (length - 1) / 2).unsqueeze(2)
    return (cells.to(middle.dtype) - middle).abs_().lt_((length / 2).unsqueeze(2))


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


def _union(vertical: _Spans, horizontal: _Spans, kept: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` (n, rows, columns) uint8, filled: 1 for the cells in any of each image's first `kept` (n,) groups."""
    images, rows, columns = out.shape
    # Corners (n, 4 groups): what each adds to the word of eight counts that it is in, and to all words behind it.
    sign = (torch.arange(vertical.start.shape[1], device=out.device) < kept.unsqueeze(1)).long()
    top, bottom = vertical.start, vertical.start + vertical.length
    left, right = horizontal.start, horizontal.start + horizontal.length
    row = torch.cat((top, bottom, top, bottom), dim=1)
    column = torch.cat((left, left, right, right), dim=1)
    to_behind = torch.cat((sign, -sign, -sign, sign), dim=1)
    to_word = to_behind << ((column & 7) << 3)

    part = min(CPU_UNION_PART, images) if out.device.type == "cpu" else images
    # Row by row, the images of a part side by side, with one more row and word for what ends at the border. One piece
    # of memory for all parts: to allocate it costs more on a CPU than the computation.
    memory = torch.empty(2, rows + 1, part, -(-columns // 8) + 2, dtype=torch.int64, device=out.device)
    for first in range(0, images, part):
        chosen = slice(first, min(first + part, images))
        within, behind = counts = memory[:, :, : chosen.stop - first].zero_()
        stride = counts.stride()
        image = torch.arange(chosen.stop - first, device=out.device).unsqueeze(1)
        place = row[chosen] * stride[1] + image * stride[2] + (column[chosen] >> 3)
        memory.view(-1).scatter_add_(0, place.flatten(), to_word[chosen].flatten())
        memory.view(-1).scatter_add_(0, place.add_(stride[0] + 1).flatten(), to_behind[chosen].flatten())
        sums = within.add_(behind.cumsum_(dim=2)).cumsum_(dim=0).mul_(EVERY_BYTE)
        groups = sums.view(torch.uint8).transpose(0, 1)  # over each cell: 0 .. groups, the lowest byte first
        torch.clamp(groups[:, :rows, :columns], max=1, out=out[chosen])
    return out


def _shift_to_blocks(
    vertical: _Spans, horizontal: _Spans, grid: tuple[int, int], generator: torch.Generator | None
) -> torch.Tensor:
    """(n, rows, columns): how far away, in cells counted row by row, the block of each cell's first group is."""
    shifts, inside = [], []
    for spans, size in zip((vertical, horizontal), grid, strict=True):  # to any interval of the same length
        position = torch.rand(spans.start.shape, generator=generator, device=spans.start.device)
        shifts.append((position * (size - spans.length + 1)).long() - spans.start)
        inside.append(_inside(spans.start, spans.length, torch.arange(size, device=position.device)))
    owner = _first_group(*inside).clamp(max=GROUPS_PER_ROUND - 1).long()
    return (shifts[0] * grid[1] + shifts[1]).gather(1, owner.flatten(1)).reshape(owner.shape)


# ---- targets of the reconstruction -------------------------------------------------------------------------------

MIN_VARIANCE = 1e-6  # as in the masked autoencoder; a patch of constant grey has no structure to scale


def normalise_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images (B, C, H, W) with mean 0 and deviation 1 in each patch and channel; H and W are multiples of it."""
    mean, deviation = _patch_statistics(images, patch_size)
    return (images.float() - mean) / deviation


def as_pixels(config: Any, reconstruction: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """A model's reconstruction (B, C, H, W) on the scale of its `pixel_values`.

    After a pretraining with `norm_pix_loss` each patch takes its mean and deviation from `clean` (B, C, H, W), or of
    one image for all of them, as pictures of masked autoencoders do.
    """
    if not getattr(config, "norm_pix_loss", False):
        return reconstruction
    mean, deviation = _patch_statistics(clean.to(reconstruction.device), config.patch_size)
    return reconstruction * deviation + mean


def _patch_statistics(images: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each pixel's patch, (B, C, H, W) float32."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.float().reshape(batch, channels, rows, patch_size, columns, patch_size)
    variance, mean = torch.var_mean(patches, dim=(3, 5), keepdim=True)
    deviation = (variance + MIN_VARIANCE).sqrt()
    return mean.expand_as(patches).reshape(images.shape), deviation.expand_as(patches).reshape(images.shape)
