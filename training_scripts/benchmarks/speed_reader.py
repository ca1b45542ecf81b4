"""Images per second on one core: our reader and processor compared with hand-written code.

python -m training_scripts.benchmarks.speed_reader --data ../shared/data --output reader.json

JPEG: `read_radiograph` + `SpcxrImageProcessor` beside `PIL.Image.open` + the ViT image processor of transformers,
each with its own defaults at 224 x 224. DICOM: `read_radiograph` beside pydicom and NumPy by hand, on made files.
Both sides of a comparison take turns, and the median of the rounds counts.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from spcxr_hf import SpcxrImageProcessor, read_radiograph
from spcxr_hf.data.table import read_table
from spcxr_hf.errors import SpcxrError
from spcxr_hf.training.arguments import parse_arguments, run_script

DICOM_ROWS, DICOM_COLUMNS = 1955, 1841


@dataclass
class Arguments:
    """Measure the reader and the image processor, one thread, files in memory."""

    data: str = field(metadata={"help": "Parquet shards or a folder of JPEG pictures"})
    images: int = field(default=256, metadata={"help": "pictures per round"})
    rounds: int = field(default=7, metadata={"help": "of each side, taking turns"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


def main() -> None:
    arguments = parse_arguments(Arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    files = load(arguments.data, arguments.images)
    result = {"images": len(files), "rounds": arguments.rounds, "jpeg": compare_jpeg(files, arguments.rounds)}
    result["dicom"] = compare_dicom(arguments.rounds)
    print(json.dumps(result, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def load(data: str, count: int) -> list[bytes]:
    """The bytes of `count` files, spread over the set."""
    table = read_table(data)
    cells = table.column("image")
    rows = np.linspace(0, len(cells) - 1, min(count, len(cells))).astype(int)
    return [cells[row]["bytes"] or Path(cells[row]["path"]).read_bytes() for row in rows]


def take_turns(ours: Callable[[], Any], theirs: Callable[[], Any], count: int, rounds: int) -> dict[str, float]:
    """Images per second of both, and the ratio; one round of each warms up."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for name, work in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: count / median(values[1:]) for name, values in seconds.items()}
    return {name: round(rate, 1) for name, rate in rates.items()} | {"ratio": round(rates["ours"] / rates["theirs"], 3)}


def compare_jpeg(files: list[bytes], rounds: int) -> dict[str, float]:
    """Each side reads one file at a time and makes `pixel_values` of it."""
    from transformers import ViTImageProcessor

    spcxr, vit = SpcxrImageProcessor(), ViTImageProcessor()

    def ours() -> None:
        for file in files:
            spcxr(read_radiograph(file), return_tensors="pt")

    def theirs() -> None:
        for file in files:
            vit(Image.open(BytesIO(file)).convert("RGB"), return_tensors="pt")

    return take_turns(ours, theirs, len(files), rounds)


def compare_dicom(rounds: int) -> dict[str, dict[str, float]]:
    """By how the file is written: a linear window on 12 bits, and no window at all."""
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "RescaleSlope": 1, "RescaleIntercept": 0}
    cases: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
        "window": (dicom(**window), by_hand),
        "no window": (dicom(), by_hand),
    }
    found = {}
    for name, (file, hand) in cases.items():
        found[name] = take_turns(partial(read_radiograph, file), partial(hand, file), 1, rounds)
    return found


def by_hand(file: bytes) -> Image.Image:
    """A typical hand-written reader: rescale, window or percentiles, invert, 8 bits."""
    import pydicom

    made = pydicom.dcmread(BytesIO(file))
    values = made.pixel_array.astype(np.float32)
    values = values * float(made.get("RescaleSlope", 1)) + float(made.get("RescaleIntercept", 0))
    if "WindowCenter" in made:
        low = float(made.WindowCenter) - 0.5 - (float(made.WindowWidth) - 1) / 2
        high = low + float(made.WindowWidth) - 1
    else:
        low, high = np.percentile(values, (0.5, 99.5))
    levels = np.clip((values - low) / (high - low), 0, 1)
    if made.PhotometricInterpretation == "MONOCHROME1":
        levels = 1 - levels
    return Image.fromarray((levels * 255).round().astype(np.uint8))


def dicom(**attributes: Any) -> bytes:
    """A made radiograph of 12 bits, MONOCHROME1, of the size of a common detector."""
    try:
        from pydicom import Dataset
        from pydicom.dataset import FileMetaDataset
        from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian
    except ImportError as error:
        raise SpcxrError('the comparison on DICOM needs pydicom: pip install "spcxr-hf[dicom]"') from error
    rows, columns = np.mgrid[0:DICOM_ROWS, 0:DICOM_COLUMNS]
    noise = np.random.default_rng(0).normal(0, 40, rows.shape)
    values = np.clip(2000 + 1500 * np.sin(rows / 300) * np.cos(columns / 250) + noise, 0, 4095).astype(np.uint16)
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3.4"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME1"
    made.Rows, made.Columns = values.shape
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelData = values.tobytes()
    made["PixelData"].VR = "OW"
    for name, value in attributes.items():
        setattr(made, name, value)
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


if __name__ == "__main__":
    run_script(main)
