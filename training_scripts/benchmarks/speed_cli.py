"""Throughput of `spcxr embed` relative to the bare model, memory over many files, and start-up time.

    python -m training_scripts.benchmarks.speed_cli --memory_images 0 \
        --output training_scripts/benchmarks/results/cli.json
    python -m training_scripts.benchmarks.speed_cli --images 0 --output training_scripts/benchmarks/results/cli.json
    python -m training_scripts.benchmarks.speed_cli --render training_scripts/GUIDES.md

Throughput: rounds of made PNGs through `spcxr embed`'s flow (read, check, process, model, write Parquet) take turns
with as many images, in memory already, through the model alone; the ratio is the median over the rounds. It wants a
quiet machine. Memory: the peak of the process after a tenth of the files and after all of them, with a tiny model, so
that reading is most of the work. It comes first, since a peak is of all that was before. Start-up: the median of fresh
processes. What is left out keeps its figures in the file. `--render` measures nothing and writes the table of the
results between `<!-- cli -->` and `<!-- /cli -->`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from spcxr_hf import SpcxrConfig, SpcxrImageProcessor, SpcxrModel
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import read_json, write_json
from spcxr_hf.inference.pipeline import Source, answers
from spcxr_hf.inference.tasks import embed
from spcxr_hf.inference.writers import open_writer
from spcxr_hf.models.loading import Loaded, choose_device
from spcxr_hf.training.arguments import parse_arguments, run_script
from training_scripts.benchmarks.lib.timing import clock, describe_machine, peak_memory, replace_block

RESULTS = Path(__file__).resolve().parent / "results" / "cli.json"
MADE_FILES = 256  # different pictures; more files are links to them


@dataclass
class Arguments:
    """Measure the flow under `spcxr`."""

    size: str = field(default="small", metadata={"help": "of the model: tiny, small or base"})
    image_size: int = field(default=224, metadata={"help": "side of the files and of the model's images"})
    rounds: int = field(default=4, metadata={"help": "of each side, taking turns, after one to warm up"})
    images: int = field(default=256, metadata={"help": "per round; 0 leaves throughput and start-up out"})
    batch_size: int = 16
    workers: int | None = None
    memory_images: int = field(default=10000, metadata={"help": "files of the memory test; 0 leaves it out"})
    device: str = "auto"
    output: str | None = field(default=None, metadata={"help": "JSON file to write, or to render from"})
    render: str | None = field(default=None, metadata={"help": "measure nothing; rewrite the table in this page"})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(Arguments, argv)
    if arguments.render:
        results = read_json(Path(arguments.output or RESULTS))
        replace_block(Path(arguments.render), "cli", table_of(results))
        return results
    check(arguments)
    results = measure(arguments)
    print(json.dumps(results, indent=2))
    if arguments.output:
        path = Path(arguments.output)
        write_json(path, {**read_json(path), **results})
    return results


def check(arguments: Arguments) -> None:
    """Refuse what would fail late."""
    if min(arguments.rounds, arguments.batch_size) < 1 or 0 < arguments.memory_images < 20:
        raise SpcxrError("rounds and batch_size must be at least 1, memory_images at least 20 or 0")
    if arguments.images and arguments.images < arguments.batch_size:
        raise SpcxrError("images must be a batch at least, or 0")


def measure(arguments: Arguments) -> dict[str, Any]:
    """What was asked for, each part with the machine it was measured on."""
    device = choose_device(arguments.device)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = make_files(Path(folder), max(arguments.images, arguments.memory_images), arguments.image_size)
        if arguments.memory_images:
            results["memory"] = measure_memory(arguments, sources[: arguments.memory_images], device)
        if arguments.images:
            results["throughput"] = compare(arguments, sources[: arguments.images], device)
            results["start_up"] = measure_help(arguments.rounds)
    return {name: {**found, "machine": describe_machine(device.type)} for name, found in results.items()}


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


def measure_help(rounds: int) -> dict[str, Any]:
    """Seconds that `spcxr --help` takes in a fresh process; the first one fills the disk's cache and is left out."""
    command = [str(Path(sys.executable).with_name("spcxr")), "--help"]
    seconds = [clock(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(rounds + 1)]
    return {"help_seconds": round(median(seconds[1:]), 2), "rounds": rounds}


def table_of(results: Mapping[str, Any]) -> str:
    """Markdown; parts that were not measured are marked."""
    lines = ["| | measured | machine |", "|---|---|---|"]
    if found := results.get("throughput"):
        rates = found["images_per_second"]
        told = f"{rates['flow']} images/s beside {rates['bare']}: {found['flow_to_bare']:.3f} of it"
        lines.append(row(f"`spcxr embed` beside the bare model ({found['model']}, images in memory)", told, found))
    if found := results.get("memory"):
        tenth, all_ = found["tenth"], found["all"]
        told = f"{tenth['peak_mib']:.0f} MiB after {tenth['images']:,} files"
        told += f", {all_['peak_mib']:.0f} after {all_['images']:,}"
        lines.append(row("peak memory of the process", told, found))
    if found := results.get("start_up"):
        lines.append(row("`spcxr --help`", f"{found['help_seconds']:.2f} s", found))
    return "\n".join(lines if len(lines) > 2 else ["Not measured."])


def row(what: str, told: str, found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return f"| {what} | {told} | {machine['machine']}, {machine['device']} |"


if __name__ == "__main__":
    run_script(main)
