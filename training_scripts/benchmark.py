"""Measure what is fast and what is not: ratios of ours to a peer or to a plain version, interleaved, medians.

python training_scripts/benchmark.py --output benchmark.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spcxr_hf import SpcxrError
from spcxr_hf.corruption import Corrupted, GroupMasking
from spcxr_hf.recipe import parse_arguments


@dataclass
class Arguments:
    """Measure the corruption of a batch beside a plain loop over its images."""

    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    batch_size: int = field(default=128, metadata={"help": "images per batch"})
    image_size: int = field(default=224, metadata={"help": "side of the images in pixels"})
    repeats: int = field(default=7, metadata={"help": "measurements of each, taken in turn"})
    threads: int = field(default=0, metadata={"help": "threads of torch; 0: as many as it takes by itself"})
    device: str = field(default="cpu", metadata={"help": "where the images lie: cpu or cuda"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "corruption": measure_corruption(arguments),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure_corruption(arguments: Arguments) -> dict:
    """Milliseconds per batch of the corruption, for the whole batch at once and in a loop, and their ratio."""
    masking = GroupMasking()
    generator = torch.Generator(arguments.device).manual_seed(0)
    shape = (arguments.batch_size, 1, arguments.image_size, arguments.image_size)
    images = torch.randn(shape, generator=generator, device=arguments.device)
    at_once, looped = in_turn(
        [lambda: masking(images, generator), lambda: corrupt_one_by_one(masking, images, generator)], arguments.repeats
    )
    return {
        "batch_size": arguments.batch_size,
        "image_size": arguments.image_size,
        "at_once_ms": round(1000 * statistics.median(at_once), 2),
        "looped_ms": round(1000 * statistics.median(looped), 2),
        "ratio": round(statistics.median(slow / fast for slow, fast in zip(looped, at_once, strict=True)), 1),
    }


def in_turn(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each function, measured in turn so that a busy moment of the machine meets all, after one warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, measured in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                measured.append(time.perf_counter() - started)
    return seconds


def corrupt_one_by_one(masking: GroupMasking, images: torch.Tensor, generator: torch.Generator) -> Corrupted:
    """The corruption of GMML as its description reads: image by image, group by group ("noise" and "replace" only)."""
    corrupted, masks = [], []
    for index, image in enumerate(images):
        fill = masking.fills[int(torch.randint(len(masking.fills), (), generator=generator, device=images.device))]
        low, high = masking.drop_share if fill == "noise" else (masking.replace_share, masking.replace_share)
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
        bottom = min(top + draw(1, max(1, int(rows * masking.max_side)) + 1), rows)
        right = min(left + draw(1, max(1, int(columns * masking.max_side)) + 1), columns)
        group = slice(top * align, bottom * align), slice(left * align, right * align)
        mask[:, group[0], group[1]] = True
        if other is None:
            shape = (channels, (bottom - top) * align, (right - left) * align)
            output[:, group[0], group[1]] = torch.randn(shape, generator=generator, device=image.device)
        else:
            output[:, group[0], group[1]] = other[:, group[0], group[1]]
    return output, mask


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
