"""Write SCALE.md: cost of 1 and 10 million radiographs on 1, 8 and 64 GPUs, and the first bottleneck.

    python -m training_scripts.benchmarks.scale [--data DATA]

Everything follows from the results files: `benchmark_cpu.json` and `benchmark_cuda.json` of `benchmark.py`, and
`scale.json`, the size of a radiograph, which `--data` measures anew. Without them the page says "not measured".
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spcxr_hf import SpcxrError, SpcxrForPreTraining
from spcxr_hf.data.table import open_image, read_table
from spcxr_hf.files import read_json, write_json
from spcxr_hf.training.arguments import parse_arguments, run_script
from spcxr_hf.training.optim import new_config
from training_scripts.benchmarks.lib.timing import NOT_MEASURED

FOLDER = Path(__file__).resolve().parent
RADIOGRAPHS = (1_000_000, 10_000_000)
EPOCHS = (100, 800)  # 800: the GMML release's own default
GPUS = {1: "single_gpu", 8: "eight_gpus", 64: "eight_nodes"}
GPUS_PER_NODE = 8
SHARD_BYTES = 256_000_000
STORED_SIZE = 256  # side in pixels of a decoded image, one byte a pixel
# What a node is taken to have: assumptions, not measurements.
GPU_MEMORY, NODE_MEMORY, CORES_PER_GPU, NODE_NETWORK = 80e9, 1e12, 16, 25e9 / 8


@dataclass
class Arguments:
    """Write the page on scale from the results files."""

    data: str | None = field(default=None, metadata={"help": "measure the radiographs of this set first"})
    results: str = field(default=str(FOLDER / "results"), metadata={"help": "folder of the results files"})
    output: str = field(default=str(FOLDER / "SCALE.md"), metadata={"help": "the page"})
    sample: int = field(default=200, metadata={"help": "radiographs to decode for the time that it takes"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    folder = Path(arguments.results)
    if arguments.data is not None:
        write_json(folder / "scale.json", measure(arguments.data, arguments.sample))
    Path(arguments.output).write_text(render(read_figures(folder)), encoding="utf-8")
    print(f"wrote {arguments.output}")


# ---- figures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What was measured, for one device each; None where it was not.

    Attributes:
        image_bytes: Mean encoded bytes of a radiograph.
        decode_s: Seconds of one core to decode one, and to bring it to the stored size.
        measured_on: How many radiographs these two come from.
        parameters: Of the model.
        core_rate: Images per second and CPU core of the pretraining step, views included where measured.
        gpu_rate: Images per second of one GPU.
        gpu_batch: Images per step of one GPU.
        cpu, card: The machines in words.
    """

    image_bytes: float
    decode_s: float
    measured_on: int
    parameters: int
    core_rate: float | None
    gpu_rate: float | None
    gpu_batch: int | None
    cpu: str
    card: str


def measure(data: str, sample: int) -> dict[str, Any]:
    """Mean encoded bytes of the radiographs of a set, and the milliseconds of one core to decode one."""
    table = read_table(data)
    cells = table.rows["image"]
    sizes = [
        len(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]).stat().st_size
        for cell in (scalar.as_py() for scalar in cells)
    ]
    drawn = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:sample].tolist()
    started = time.process_time()
    for row in drawn:
        open_image(cells[row].as_py(), f"{table.name}: row {row}").resize((STORED_SIZE, STORED_SIZE))
    decode_s = (time.process_time() - started) / len(drawn)
    model = SpcxrForPreTraining(new_config("small"))
    return {
        "radiographs": len(table),
        "mean_bytes": round(sum(sizes) / len(sizes), 1),
        "decode_ms": round(1000 * decode_s, 3),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def read_figures(folder: Path) -> Figures:
    """The figures in a folder of results files.

    Raises:
        SpcxrError: the size of a radiograph is not there, or figures come from a smoke run.
    """
    radiograph = read_json(folder / "scale.json")
    if not radiograph:
        raise SpcxrError(f"{folder / 'scale.json'}: no such results file; measure with --data")
    cpu, gpu = (read_json(folder / f"benchmark_{device}.json") for device in ("cpu", "cuda"))
    if any(results.get("runs", {}).get("step", {}).get("quick") for results in (cpu, gpu)):
        raise SpcxrError(f"{folder}: the pretraining step comes from a smoke run (--quick); measure it")
    cpu_rate, gpu_rate = step_rate(cpu), step_rate(gpu)
    return Figures(
        image_bytes=radiograph["mean_bytes"],
        decode_s=radiograph["decode_ms"] / 1000,
        measured_on=radiograph["radiographs"],
        parameters=radiograph["parameters"],
        core_rate=None if cpu_rate is None else cpu_rate / cpu["runs"]["step"]["threads"],
        gpu_rate=gpu_rate,
        gpu_batch=None if gpu_rate is None else step_of(gpu)["batch_size"],
        cpu=NOT_MEASURED if cpu_rate is None else cpu["runs"]["step"]["machine"],
        card=NOT_MEASURED if gpu_rate is None else gpu["runs"]["step"]["device"],
    )


def step_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The pretraining step in bf16, or else in what it was measured in; empty where it was not."""
    steps = results.get("step", {})
    return steps.get("bf16") or next(iter(steps.values()), {})


def step_rate(results: Mapping[str, Any]) -> float | None:
    """Images per second of the step with its views, or on ready views where that is all there is."""
    step = step_of(results)
    if isinstance(step.get("end_to_end"), Mapping):
        return step["end_to_end"]["ours_images_per_s"]
    return step["ours"]["images_per_s"] if step else None


# ---- arithmetic ------------------------------------------------------------------------------------------------


def core_hours(figures: Figures, views: int) -> float | None:
    return None if figures.core_rate is None else views / figures.core_rate / 3600


def gpu_hours(figures: Figures, views: int) -> float | None:
    return None if figures.gpu_rate is None else views / figures.gpu_rate / 3600


def shards(figures: Figures, radiographs: int) -> int:
    return math.ceil(radiographs * figures.image_bytes / SHARD_BYTES)


def read_rate(figures: Figures, gpus: int) -> float | None:
    """Bytes a second that a node reads: every view is decoded from a radiograph anew."""
    return None if figures.gpu_rate is None else min(gpus, GPUS_PER_NODE) * figures.gpu_rate * figures.image_bytes


def gradient_rate(figures: Figures, gpus: int) -> float | None:
    """Bytes a second that a node sends to average float32 gradients over n nodes by a ring: 2 (n - 1) / n of them."""
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    if figures.gpu_rate is None or figures.gpu_batch is None:
        return None
    return 2 * (nodes - 1) / nodes * 4 * figures.parameters * figures.gpu_rate / figures.gpu_batch


def decoding_cores(figures: Figures) -> float | None:
    """CPU cores that one GPU keeps busy with decoding."""
    return None if figures.gpu_rate is None else figures.gpu_rate * figures.decode_s


def loads(figures: Figures, radiographs: int, gpus: int) -> dict[str, float | None]:
    """Required over available resources, the largest first; above 1 is a bottleneck."""
    decoded = radiographs * STORED_SIZE**2
    cores, reading, gradients = decoding_cores(figures), read_rate(figures, gpus), gradient_rate(figures, gpus)
    found: dict[str, float | None] = {
        "images kept on the GPU": decoded / GPU_MEMORY,
        "images kept in a node's memory": decoded / NODE_MEMORY,
        "decoding while streaming": None if cores is None else cores / CORES_PER_GPU,
        "network while streaming": None
        if reading is None or gradients is None
        else max(reading, gradients) / NODE_NETWORK,
    }
    return dict(sorted(found.items(), key=lambda pair: -1.0 if pair[1] is None else pair[1], reverse=True))


# ---- the page --------------------------------------------------------------------------------------------------


def render(figures: Figures) -> str:
    """The page, the same for the same figures."""
    sections = (introduction, cost_section, storage_section, network_section, limits_section, recipes_section)
    return "\n\n".join(section(figures) for section in sections) + "\n"


def introduction(figures: Figures) -> str:
    size, decode_ms = f"{figures.image_bytes:,.0f}", f"{1000 * figures.decode_s:.2f}"
    return f"""# Scale

What pretraining on millions of radiographs costs, by arithmetic from measured figures.
`python -m training_scripts.benchmarks.scale` writes this page from `training_scripts/benchmarks/results/`;
nothing in it is written by hand.

- A radiograph: {size} bytes encoded, {decode_ms} ms of one core to decode, the means of a set of
  {figures.measured_on:,} pictures whose shorter side is at most 256 px. Larger originals cost more of both.
- One CPU core ({figures.cpu}), ViT-S/16 at 224 px: {say(figures.core_rate, "{:.2f} images/s")}.
- One GPU ({figures.card}), the same: {say(figures.gpu_rate, "{:,.0f} images/s")}. More GPUs are taken to be as many
  times as fast, which is the best case and not measured.
- The model: {figures.parameters:,} parameters; {12 * figures.parameters / 1e9:.2f} GB with the optimiser's moments."""


def cost_section(figures: Figures) -> str:
    header = ["radiographs", "epochs", "views", "CPU-core-hours", "GPU-hours", *(f"hours on {gpus}" for gpus in GPUS)]
    rows = []
    for radiographs in RADIOGRAPHS:
        for epochs in EPOCHS:
            views = radiographs * epochs
            hours = gpu_hours(figures, views)
            row = [f"{radiographs:,}", str(epochs), f"{views:,}", say(core_hours(figures, views)), say(hours)]
            rows.append([*row, *(say(None if hours is None else hours / gpus, "{:,.1f}") for gpus in GPUS)])
    return f"## What a run costs\n\n{table(header, rows)}"


def storage_section(figures: Figures) -> str:
    header = ["radiographs", "encoded", f"shards of {SHARD_BYTES / 1e6:.0f} MB", f"decoded at {STORED_SIZE} px"]
    rows = [
        [
            f"{radiographs:,}",
            f"{radiographs * figures.image_bytes / 1e9:,.1f} GB",
            f"{shards(figures, radiographs):,}",
            f"{radiographs * STORED_SIZE**2 / 1e9:,.1f} GB",
        ]
        for radiographs in RADIOGRAPHS
    ]
    return f"## Storage\n\n{table(header, rows)}"


def network_section(figures: Figures) -> str:
    header = ["GPUs", "images/s", "read per node", "gradients sent per node", "cores for decoding per GPU"]
    rate, cores = figures.gpu_rate, decoding_cores(figures)
    rows = [
        [
            str(gpus),
            say(None if rate is None else gpus * rate),
            say(megabytes(read_rate(figures, gpus)), "{:,.1f} MB/s"),
            say(megabytes(gradient_rate(figures, gpus)), "{:,.1f} MB/s"),
            say(cores, "{:,.1f}"),
        ]
        for gpus in GPUS
    ]
    return f"""## Network and decoding

{table(header, rows)}

Reading is that of a run that streams: each view reads its radiograph anew. Gradients are float32, averaged once a step;
images per GPU and step: {say(figures.gpu_batch, "{}")}."""


def limits_section(figures: Figures) -> str:
    header = ["radiographs", "GPUs", "what is loaded most, need over what there is", "so"]
    rows = []
    for radiographs in RADIOGRAPHS:
        for gpus in GPUS:
            ranked = loads(figures, radiographs, gpus)
            words = "; ".join(f"{what}: {say(load, '{:.2f}')}" for what, load in ranked.items())
            rows.append([f"{radiographs:,}", str(gpus), words, advice(ranked)])
    node = (
        f"A node is taken to have {GPUS_PER_NODE} GPUs of {GPU_MEMORY / 1e9:.0f} GB, {CORES_PER_GPU} cores for each, "
        f"{NODE_MEMORY / 1e12:.0f} TB of memory and a network of {8 * NODE_NETWORK / 1e9:.0f} Gbit/s."
    )
    return f"""## What breaks first

Above 1 it breaks. {node} Memory and streaming are alternatives:
images that fit are decoded once, before the training.

{table(header, rows)}"""


def advice(ranked: Mapping[str, float | None]) -> str:
    """Advice for each bottleneck."""

    def breaks(what: str) -> bool:
        load = ranked[what]
        return load is not None and load > 1

    if not breaks("images kept on the GPU"):
        return "keep the images on the GPU"
    if not breaks("images kept in a node's memory"):
        return "keep the images in memory"
    first = next((what for what in ranked if "streaming" in what and breaks(what)), None)
    unknown = any(load is None for load in ranked.values())
    return "stream" + (f"; {first} breaks first" if first else "; whether that keeps up is not measured" * unknown)


def recipes_section(figures: Figures) -> str:
    del figures  # the same for all
    folder = "training_scripts/recipes/accelerate"
    rows = [[str(gpus), f"[{name}.yaml](../recipes/accelerate/{name}.yaml)"] for gpus, name in GPUS.items()]
    return f"""## How to start it

{table(["GPUs", "recipe of accelerate"], rows)}

```bash
accelerate launch --config_file {folder}/{GPUS[8]}.yaml \\
    training_scripts/pretrain.py training_scripts/recipes/pretrain_small_224.yaml --data SHARDS \\
    --cache none --workers 8 --batch_size 4096 --micro_batch_size 512
```

Over several nodes the same command runs on each, with `--machine_rank` and `--main_process_ip`. A step's
micro-batches (`batch_size / micro_batch_size`) must share out among the processes: 64 GPUs take
`--micro_batch_size 64`. `two_machines_cpu.yaml`, beside these, is for machines without a GPU. Every preset fits one
GPU, so nothing is sharded."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def say(value: float | None, form: str = "{:,.0f}") -> str:
    return NOT_MEASURED if value is None else form.format(value)


def megabytes(value: float | None) -> float | None:
    return None if value is None else value / 1e6


if __name__ == "__main__":
    run_script(main)
