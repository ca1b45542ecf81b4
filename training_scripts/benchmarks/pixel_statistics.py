"""Mean and standard deviation of the grey values of a set, for the image processor: over all pixels, on 0 .. 1.

python -m training_scripts.benchmarks.pixel_statistics --data ../shared/data --output modeling_statistics.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import decode_images
from spcxr_hf.quality.checks import for_pretraining
from spcxr_hf.training.arguments import parse_arguments, run_script


@dataclass
class Arguments:
    """Measure the grey values of the radiographs that pretraining may see."""

    data: str = field(metadata={"help": "Parquet shards or a folder of pictures"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    size: int = field(default=224, metadata={"help": "images are measured at size x size pixels"})
    pretrain_only: bool = field(default=True, metadata={"help": "only rows whose column `pretrain` is true"})
    cache: str | None = field(default=None, metadata={"help": "folder that keeps the decoded images"})


def main() -> None:
    arguments = parse_arguments(Arguments)
    table = read_set(arguments.data)
    if arguments.pretrain_only:
        table = for_pretraining(table)
    images = decode_images(table, arguments.size, arguments.cache)
    counts = torch.stack([torch.bincount(chunk.flatten().int(), minlength=256) for chunk in images.split(512)]).sum(0)
    grey = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * grey).sum() / counts.sum()
    std = ((counts * (grey - mean) ** 2).sum() / counts.sum()).sqrt()
    result = {"images": len(table), "size": arguments.size, "mean": round(mean.item(), 4), "std": round(std.item(), 4)}
    print(json.dumps(result))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
