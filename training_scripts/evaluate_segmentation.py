"""Report a segmentation model: Dice, IoU and 95 % Hausdorff distance of its lung masks, beside the mean mask's.

    python training_scripts/evaluate_segmentation.py --model runs/finetune_segmentation/final --data ../shared/data \
        --splits val test shift --output results.json

Every mask is compared at its own resolution; distances are shares of the image's height. Intervals come from a
bootstrap over patients. This script alone reads the rows `test` and `shift`: choose models on `val`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable, decode_masks, decode_set, open_image, open_mask
from spcxr_hf.evaluation.bootstrap import patient_groups
from spcxr_hf.evaluation.metrics import segmentation_report
from spcxr_hf.files import write_json
from spcxr_hf.models.loading import Loaded, load_checkpoint, to_pixel_values
from spcxr_hf.models.lungs import segment_lungs
from spcxr_hf.quality.checks import SetArguments, write_skipped
from spcxr_hf.training.arguments import parse_arguments, run_script


@dataclass(kw_only=True)
class Arguments(SetArguments):
    """Measure lung masks against those drawn by humans."""

    model: str = field(metadata={"help": "folder of a segmentation model with its image processor"})
    data: str = field(metadata={"help": "Parquet shards with lung masks"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    splits: list[str] = field(
        default_factory=lambda: ["val"], metadata={"help": "values of lung_split: val, test, shift"}
    )
    baseline: bool = field(default=True, metadata={"help": "report the mean mask of the rows `train` too"})
    batch_size: int = field(default=16, metadata={"help": "images per forward pass"})
    bf16: bool = field(default=False, metadata={"help": "run the model in bfloat16 autocast"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    table = read_set(arguments.data, arguments.exclude)
    skipped: dict[str, str] = {}
    mean_mask = None
    if arguments.baseline:
        mean_mask = decode_masks(readable(arguments, table, "train", skipped), 256).float().mean(dim=0)
    loaded = load_checkpoint("segmentation", arguments.model, arguments.device, any_family=True)
    side = loaded.model.config.image_size
    result: dict = {"model": Path(arguments.model).resolve().name, "image_size": side, "splits": {}}
    for split in arguments.splits:
        rows = readable(arguments, table, split, skipped)
        targets = [open_mask(cell, f"{rows.name}, row {row}") for row, cell in enumerate(rows.column("lung_mask"))]
        patients = rows.column("patient") if "patient" in rows.rows.column_names else [None] * len(rows)
        entry: dict = {"images": len(rows), "patients": len(set(patient_groups(patients, len(rows)) or ()))}
        entry["model"] = report(predict(arguments, loaded, rows), targets, patients)
        if mean_mask is not None:
            entry["mean_training_mask"] = report(
                (at_size(mean_mask, target) > 0.5 for target in targets), targets, patients
            )
        result["splits"][split] = entry
        print(json.dumps({split: entry}), flush=True)
    if arguments.output:
        write_json(arguments.output, result)
    write_skipped(arguments.output, skipped)
    return result


def readable(arguments: Arguments, table: RadiographTable, split: str, skipped: dict[str, str]) -> RadiographTable:
    """The rows of a split; with `on_error` skip those whose image and mask can be read, the others go to `skipped`."""
    rows = table.where("lung_split", split)
    if arguments.on_error == "stop":
        return rows
    decoded = decode_set(rows, 16, masks=True, on_error="skip")
    skipped.update(decoded.skipped)
    return decoded.table


def predict(arguments: Arguments, loaded: Loaded, table: RadiographTable) -> Iterator[torch.Tensor]:
    """Yield each row's lung mask, (H, W) booleans, at the resolution of its image."""
    cells = table.column("image")
    for start in tqdm(range(0, len(table), arguments.batch_size), desc=table.name, unit="batch"):
        part = cells[start : start + arguments.batch_size]
        images = [open_image(cell, f"{table.name}, row {start + row}") for row, cell in enumerate(part)]
        sizes = [(image.height, image.width) for image in images]
        yield from segment_lungs(loaded, to_pixel_values(loaded.processor, images), sizes, arguments.bf16)


def at_size(mean_mask: torch.Tensor, target: Image.Image) -> torch.Tensor:
    """The mean mask (H, W) resized to the target's size."""
    size = (target.height, target.width)
    return torch.nn.functional.interpolate(mean_mask[None, None], size=size, mode="bilinear")[0, 0]


def report(masks: Iterable[torch.Tensor], targets: list[Image.Image], patients: list[str | None]) -> dict:
    """What `metrics.segmentation_report` says of these masks, to four digits; distances in heights of the image."""
    found = segmentation_report(
        masks,
        (np.asarray(target) > 127 for target in targets),
        patients,
        spacing=[(1 / target.height, 1 / target.height) for target in targets],
    )
    return {name: rounded(value) for name, value in found.items() if name not in ("images", "patients")}


def rounded(value: Any) -> Any:
    """Numbers to four digits, those of an interval too."""
    if isinstance(value, list):
        return [rounded(end) for end in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    run_script(main)
