"""The command line's flow beside the bare model, and its memory over many files.

python training_scripts/benchmark_cli.py --output cli.json

Throughput: rounds of made PNGs through `spcxr embed`'s flow (read, check, process, model, write Parquet) take turns
with as many images, in memory already, through the model alone; the ratio is the median over the rounds. Memory: the
peak of the process after a tenth of the files and after all of them, with a tiny model, so that reading is most of the
work. It comes first, since a peak is of all that was before.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from spcxr_hf import SpcxrConfig, SpcxrImageProcessor, SpcxrModel
from spcxr_hf.benchmarking import clock, describe_machine, peak_memory, write_results
from spcxr_hf.errors import SpcxrError
from spcxr_hf.inference import Loaded, Source, answers, choose_device
from spcxr_hf.recipe import parse_arguments
from spcxr_hf.tasks import embed
from spcxr_hf.writers import open_writer

MADE_FILES = 256  # different pictures; more files are links to them


@dataclass
class Arguments:
    """Measure the flow under `spcxr`."""

    size: str = field(default="small", metadata={"help": "of the model: tiny, small or base"})
    image_size: int = field(default=224, metadata={"help": "side of the files and of the model's images"})
    rounds: int = field(default=4, metadata={"help": "of each side, taking turns, after one to warm up"})
    images: int = field(default=256, metadata={"help": "per round"})
    batch_size: int = 16
    workers: int | None = None
    memory_images: int = field(default=10000, metadata={"help": "files of the memory test; 0 leaves it out"})
    device: str = "auto"
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


def main() -> None:
    arguments = parse_arguments(Arguments)
    if min(arguments.rounds, arguments.images) < 1 or 0 < arguments.memory_images < 20:
        raise SpcxrError("rounds and images must be at least 1, memory_images at least 20 or 0")
    device = choose_device(arguments.device)
    result: dict[str, Any] = {"machine": describe_machine(device.type), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        sources = make_files(Path(folder), max(arguments.images, arguments.memory_images), arguments.image_size)
        if arguments.memory_images:
            result["memory"] = measure_memory(arguments, sources[: arguments.memory_images], device)
        result["throughput"] = compare(arguments, sources[: arguments.images], device)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_results(Path(arguments.output), result)


def make_files(folder: Path, count: int, side: int) -> list[Source]:
    """Smooth grey PNGs of random blobs."""
    random = np.random.default_rng(0)
    sources: list[Source] = []
    for number in range(count):
        path = folder / f"{number:06d}.png"
        if number < MADE_FILES:
            blobs = Image.fromarray(random.integers(0, 256, (9, 8), dtype=np.uint8))
            grey = np.asarray(blobs.resize((side, side), Image.Resampling.BICUBIC), np.float64)
            noisy = (grey + random.normal(0, 6, grey.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(path)
        else:
            path.hardlink_to(sources[number % MADE_FILES].path)
        sources.append(Source(path, path.name))
    return sources


def load(size: Mapping[str, Any], side: int, device: torch.device) -> Loaded:
    """A model of random weights."""
    torch.manual_seed(0)
    model = SpcxrModel(SpcxrConfig(image_size=side, **size)).eval().to(device)
    return Loaded("made", model, SpcxrImageProcessor(size={"height": side, "width": side}), device)


def run_flow(loaded: Loaded, sources: list[Source], output: Path, arguments: Arguments) -> int:
    """What `spcxr embed` does, less the progress bar; the number of records."""
    count = 0
    with open_writer(output, "parquet") as writer:
        for step in answers(loaded, sources, embed, arguments.batch_size, arguments.workers):
            writer.write(step.records)
            count += len(step.records)
    return count


def compare(arguments: Arguments, sources: list[Source], device: torch.device) -> dict[str, Any]:
    """Images per second of the flow and of the bare model, turn by turn."""
    from spcxr_hf.modeling.configuration_spcxr import SIZES

    loaded = load(SIZES[arguments.size], arguments.image_size, device)
    batch = torch.randn(arguments.batch_size, 1, arguments.image_size, arguments.image_size, device=device)
    output = sources[0].path.with_name("out.parquet")
    rounded = len(sources) // arguments.batch_size * arguments.batch_size

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(rounded // arguments.batch_size):
            loaded.model(batch).pooler_output.cpu()

    seconds: dict[str, list[float]] = {"bare": [], "flow": []}
    for number in range(arguments.rounds + 1):
        pair = {
            "bare": clock(bare),
            "flow": clock(lambda: run_flow(loaded, sources[:rounded], output, arguments)),
        }
        print(number, pair, flush=True)
        for name, value in pair.items():
            seconds[name] += [value] if number else []
    rates = {name: round(rounded / median(values), 2) for name, values in seconds.items()}
    ratio = median(bare / flow for bare, flow in zip(seconds["bare"], seconds["flow"], strict=True))
    return {
        "model": f"{arguments.size}, {arguments.image_size} px",
        "images": rounded * arguments.rounds,
        "images_per_second": rates,
        "flow_to_bare": round(ratio, 3),
    }


def measure_memory(arguments: Arguments, sources: list[Source], device: torch.device) -> dict[str, Any]:
    """Peak MiB of the process after a tenth of the files and after all."""
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    loaded = load(tiny, arguments.image_size, device)
    output = sources[0].path.with_name("out.parquet")
    found = {}
    for name, some in (("tenth", sources[: len(sources) // 10]), ("all", sources)):
        count = run_flow(loaded, some, output, arguments)
        found[name] = {"images": count, "peak_mib": round(peak_memory("cpu") / 2**20, 1)}
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    main()
