"""Report a segmentation model: Dice and IoU of its lung masks, with intervals, beside the mean training mask's.

    python training_scripts/evaluate_segmentation.py --model runs/finetune_segmentation/final --data ../shared/data \
        --splits val test shift --output results.json

Every mask is compared at its own resolution. Intervals come from a bootstrap over patients. This script alone reads the
rows `test` and `shift`: choose models on `val`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel

from spcxr_hf import SpcxrError
from spcxr_hf.data import RadiographTable, decode_masks, decode_set, open_image, open_mask
from spcxr_hf.metrics import bootstrap_interval, dice, iou
from spcxr_hf.recipe import parse_arguments
from spcxr_hf.sets import SetArguments, read_rows, report_skipped


@dataclass
class _Source:
    """The flags that have no default; those of the set come behind them."""

    model: str = field(metadata={"help": "folder of a segmentation model with its image processor"})
    data: str = field(metadata={"help": "Parquet shards with lung masks"})


@dataclass
class Arguments(SetArguments, _Source):
    """Measure lung masks against those drawn by humans."""

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
    table = read_rows(arguments.data, arguments.exclude)
    skipped: dict[str, str] = {}
    mean_mask = None
    if arguments.baseline:
        mean_mask = decode_masks(readable(arguments, table, "train", skipped), 256).float().mean(dim=0)
    model = AutoModelForSemanticSegmentation.from_pretrained(arguments.model).to(arguments.device).eval()
    processor = AutoImageProcessor.from_pretrained(arguments.model)

    result: dict = {"model": Path(arguments.model).resolve().name, "image_size": model.config.image_size, "splits": {}}
    for split in arguments.splits:
        rows = readable(arguments, table, split, skipped)
        targets = [open_mask(cell, f"{rows.name}, row {row}") for row, cell in enumerate(rows.column("lung_mask"))]
        patients = name_patients(rows)
        entry: dict = {"images": len(rows), "patients": len(set(patients))}
        entry["model"] = report(predict(arguments, model, processor, rows), targets, patients)
        if mean_mask is not None:
            entry["mean_training_mask"] = report(
                (at_size(mean_mask, target) > 0.5 for target in targets), targets, patients
            )
        result["splits"][split] = entry
        print(json.dumps({split: entry}), flush=True)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report_skipped(arguments.output, skipped)
    return result


def readable(arguments: Arguments, table: RadiographTable, split: str, skipped: dict[str, str]) -> RadiographTable:
    """The rows of a split; with `on_error` skip those whose image and mask can be read, the others go to `skipped`."""
    rows = table.where("lung_split", split)
    if arguments.on_error == "stop":
        return rows
    decoded = decode_set(rows, 16, masks=True, on_error="skip")
    skipped.update(decoded.skipped)
    return decoded.table


def name_patients(table: RadiographTable) -> list[str]:
    """Whose image each row is; a row whose patient is unknown counts as a patient of its own."""
    if "patient" not in table.rows.column_names:
        return [f"row {row}" for row in range(len(table))]
    return [patient or f"row {row}" for row, patient in enumerate(table.column("patient"))]


@torch.no_grad()
def predict(arguments: Arguments, model: PreTrainedModel, processor, table: RadiographTable):
    """Yield each row's lung mask, (H, W) booleans, at the resolution of its image."""
    lung = dict(model.config.label2id or {}).get("lung")
    if lung is None:
        raise SpcxrError(f"{arguments.model}: its labels are {model.config.label2id}; there is no 'lung' among them")
    cells = table.column("image")
    for start in tqdm(range(0, len(table), arguments.batch_size), desc=table.name, unit="batch"):
        part = cells[start : start + arguments.batch_size]
        images = [open_image(cell, f"{table.name}, row {start + row}") for row, cell in enumerate(part)]
        inputs = processor(images, return_tensors="pt").to(arguments.device)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16, enabled=arguments.bf16):
            outputs = model(**inputs)
        sizes = [(image.height, image.width) for image in images]
        for labels in processor.post_process_semantic_segmentation(outputs, sizes):
            yield (labels == lung).cpu()


def at_size(mean_mask: torch.Tensor, target: Image.Image) -> torch.Tensor:
    """The mean mask (H, W) resized to the target's size."""
    size = (target.height, target.width)
    return torch.nn.functional.interpolate(mean_mask[None, None], size=size, mode="bilinear")[0, 0]


def report(masks, targets: list[Image.Image], patients: list[str]) -> dict:
    """Mean Dice and IoU over the images, each with its 95 % interval."""
    figures: dict[str, list[float]] = {"dice": [], "iou": []}
    for mask, image in zip(masks, targets, strict=True):
        target = torch.from_numpy(np.asarray(image) > 127)
        figures["dice"].append(dice(mask, target).item())
        figures["iou"].append(iou(mask, target).item())
    entry: dict = {}
    for name, values in figures.items():
        entry[name] = round(float(np.mean(values)), 4)
        entry[f"{name}_ci95"] = [round(end, 4) for end in bootstrap_interval(values, patients)]
    entry["dice_tenth_percentile"] = round(float(np.quantile(figures["dice"], 0.1)), 4)
    return entry


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
