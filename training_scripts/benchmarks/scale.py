"""Write SCALE.md: cost of 1 and 10 million radiographs on 1, 8 and 64 GPUs, and the first bottleneck.

    python -m training_scripts.benchmarks.scale [--data DATA]

Everything follows from results files: `benchmark_cpu.json` and `benchmark_cuda.json` of `speed.py`, and `scale.json`:
the size of a radiograph, which `--data` measures anew, and a training on a GPU. Without `benchmark_cuda.json` the rate
of a GPU is computed from that training, by the FLOPs of an image at its size and at the page's.
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
from training_scripts.benchmarks.lib.timing import bf16_peak, matrix_parameters, training_flops

FOLDER = Path(__file__).resolve().parent
IMAGE_SIZE = 224
RADIOGRAPHS = (1_000_000, 10_000_000)
EPOCHS = (100, 800)  # 800: the GMML release's own default
GPUS = {1: "single_gpu", 8: "eight_gpus", 64: "eight_nodes"}
GPUS_PER_NODE = 8
SHARD_BYTES = 256_000_000
STORED_SIZE = 256  # side in pixels of a decoded image, one byte a pixel
# What a node is taken to have: assumptions, but for the memory of an H200.
GPU_MEMORY, NODE_MEMORY, CORES_PER_GPU, NODE_NETWORK = 141e9, 1e12, 16, 25e9 / 8
SOURCE = "NVIDIA's data sheet of the H200"  # of GPU_MEMORY, and of the peak in lib/timing.py


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
        kept = read_json(folder / "scale.json")
        write_json(folder / "scale.json", {**kept, **measure(arguments.data, arguments.sample)})
    Path(arguments.output).write_text(render(read_figures(folder)), encoding="utf-8")
    print(f"wrote {arguments.output}")


# ---- figures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What was measured, for one device each.

    Attributes:
        image_bytes: Mean encoded bytes of a radiograph.
        decode_s: Seconds of one core to decode one, and to bring it to the stored size.
        measured_on: How many radiographs these two come from.
        parameters: Of the model.
        core_rate: Images per second and CPU core of the pretraining step, views included where measured.
        gpu_rate: Images per second of one GPU.
        gpu_batch: Images per step of one GPU.
        cpu: The machine in words.
        gpu: The card, and where its rate comes from.
    """

    image_bytes: float
    decode_s: float
    measured_on: int
    parameters: int
    core_rate: float
    gpu_rate: float
    gpu_batch: int
    cpu: str
    gpu: str


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
        SpcxrError: the size of a radiograph or the step of a CPU or GPU is not there, or figures come from a smoke run.
    """
    radiograph = read_json(folder / "scale.json")
    if not radiograph:
        raise SpcxrError(f"{folder / 'scale.json'}: no such results file; measure with --data")
    cpu, gpu = (read_json(folder / f"benchmark_{device}.json") for device in ("cpu", "cuda"))
    if not step_of(cpu):
        raise SpcxrError(f"{folder / 'benchmark_cpu.json'}: has no pretraining step; measure it with benchmarks.speed")
    if any(results.get("runs", {}).get("step", {}).get("quick") for results in (cpu, gpu)):
        raise SpcxrError(f"{folder}: the pretraining step comes from a smoke run (--quick); measure it")
    if step_of(gpu):
        card = gpu["runs"]["step"]["device"]
        rate, batch, words = (
            step_rate(gpu),
            step_of(gpu)["batch_size"],
            f"{card}: {step_rate(gpu):,.0f} images/s, measured",
        )
    else:
        rate, batch, words = rate_of_the_training(radiograph)
    return Figures(
        image_bytes=radiograph["mean_bytes"],
        decode_s=radiograph["decode_ms"] / 1000,
        measured_on=radiograph["radiographs"],
        parameters=radiograph["parameters"],
        core_rate=step_rate(cpu) / cpu["runs"]["step"]["threads"],
        gpu_rate=rate,
        gpu_batch=batch,
        cpu=cpu["runs"]["step"]["machine"],
        gpu=words,
    )


def rate_of_the_training(results: Mapping[str, Any]) -> tuple[float, int, str]:
    """Images per second at the page's size by the training in `scale.json`, its batch size, and how that came."""
    if "training" not in results:
        raise SpcxrError("scale.json: has no training on a GPU, and there is no benchmark_cuda.json")
    training = results["training"]
    card, trained, side = training["device"], training["images_per_second"], training["image_size"]
    small, large = flops(training["size"], side), flops(training["size"], IMAGE_SIZE)
    if (peak := bf16_peak(card)) is None:
        raise SpcxrError(f"scale.json: the bf16 peak of {card} is not known")
    words = f"""{card}: {trained * small / large:,.0f} images/s, computed from its {trained:,.0f} at {side} px,
  measured ({training["run"]}): {100 * trained * small / peak:.0f} % of the card's {peak / 1e12:.0f} TFLOP/s in
  bf16 (source: {SOURCE}). An image takes {small / 1e9:.1f} GFLOP at {side} px and {large / 1e9:.1f} at
  {IMAGE_SIZE} px, computed; the share is assumed to stay"""
    return trained * small / large, training["batch_size"], words


def flops(size: str, side: int) -> int:
    """Of forward and backward of the pretraining step, for one image of this side in pixels."""
    config = new_config(size)
    config.image_size = side
    with torch.device("meta"):
        model = SpcxrForPreTraining(config)
    return training_flops(
        matrix_parameters(model), 1 + config.num_patches, config.num_hidden_layers, config.hidden_size
    )


def step_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The pretraining step in bf16, or else in what it was measured in; empty where it was not."""
    steps = results.get("step", {})
    return steps.get("bf16") or next(iter(steps.values()), {})


def step_rate(results: Mapping[str, Any]) -> float:
    """Images per second of the step with its views, or on ready views where that is all there is."""
    step = step_of(results)
    if isinstance(step.get("end_to_end"), Mapping):
        return step["end_to_end"]["ours_images_per_s"]
    return step["ours"]["images_per_s"]


# ---- arithmetic ------------------------------------------------------------------------------------------------


def core_hours(figures: Figures, views: int) -> float:
    return views / figures.core_rate / 3600


def gpu_hours(figures: Figures, views: int) -> float:
    return views / figures.gpu_rate / 3600


def shards(figures: Figures, radiographs: int) -> int:
    return math.ceil(radiographs * figures.image_bytes / SHARD_BYTES)


def read_rate(figures: Figures, gpus: int) -> float:
    """Bytes a second that a node reads: every view is decoded from a radiograph anew."""
    return min(gpus, GPUS_PER_NODE) * figures.gpu_rate * figures.image_bytes


def gradient_rate(figures: Figures, gpus: int) -> float:
    """Bytes a second that a node sends to average float32 gradients over n nodes by a ring: 2 (n - 1) / n of them."""
    nodes = math.ceil(gpus / GPUS_PER_NODE)
    return 2 * (nodes - 1) / nodes * 4 * figures.parameters * figures.gpu_rate / figures.gpu_batch


def decoding_cores(figures: Figures) -> float:
    """CPU cores that one GPU keeps busy with decoding."""
    return figures.gpu_rate * figures.decode_s


def loads(figures: Figures, radiographs: int, gpus: int) -> dict[str, float]:
    """Required over available resources, the largest first; above 1 is a bottleneck."""
    decoded = radiographs * STORED_SIZE**2
    found = {
        "images kept on the GPU": decoded / GPU_MEMORY,
        "images kept in a node's memory": decoded / NODE_MEMORY,
        "decoding while streaming": decoding_cores(figures) / CORES_PER_GPU,
        "network while streaming": max(read_rate(figures, gpus), gradient_rate(figures, gpus)) / NODE_NETWORK,
    }
    return dict(sorted(found.items(), key=lambda pair: pair[1], reverse=True))


# ---- the page --------------------------------------------------------------------------------------------------


def render(figures: Figures) -> str:
    """The page, the same for the same figures."""
    sections = (introduction, cost_section, storage_section, network_section, limits_section, recipes_section)
    return "\n\n".join(section(figures) for section in sections) + "\n"


def introduction(figures: Figures) -> str:
    size, decode_ms = f"{figures.image_bytes:,.0f}", f"{1000 * figures.decode_s:.2f}"
    return f"""# Scale

What pretraining on millions of radiographs costs. Each figure is measured, computed from measured ones, assumed, or has
its source; a column's heading says it for its cells. `python -m training_scripts.benchmarks.scale` writes this page
from `training_scripts/benchmarks/results/`; nothing in it is written by hand.

- A radiograph, measured: {size} bytes encoded, {decode_ms} ms of one core to decode, the means of a set of
  {figures.measured_on:,} pictures whose shorter side is at most 256 px. Larger originals cost more of both.
- One CPU core ({figures.cpu}), ViT-S/16 at {IMAGE_SIZE} px, measured: {figures.core_rate:.2f} images/s.
- One GPU, the same. {figures.gpu}.
  More GPUs are assumed to be as many times as fast, which is the best case.
- The model: {figures.parameters:,} parameters, counted; {12 * figures.parameters / 1e9:.2f} GB with the optimiser's
  moments, computed."""


def cost_section(figures: Figures) -> str:
    hours = [f"hours on {gpus} (computed)" for gpus in GPUS]
    header = ["radiographs", "epochs", "views (computed)", "CPU-core-hours (computed)", "GPU-hours (computed)", *hours]
    rows = []
    for radiographs in RADIOGRAPHS:
        for epochs in EPOCHS:
            views = radiographs * epochs
            cells = (f"{cost(figures, views):,.0f}" for cost in (core_hours, gpu_hours))
            row = [f"{radiographs:,}", str(epochs), f"{views:,}", *cells]
            rows.append([*row, *(f"{gpu_hours(figures, views) / gpus:,.1f}" for gpus in GPUS)])
    return f"## What a run costs\n\n{table(header, rows)}"


def storage_section(figures: Figures) -> str:
    header = ["radiographs", "encoded", f"shards of {SHARD_BYTES / 1e6:.0f} MB", f"decoded at {STORED_SIZE} px"]
    header[1:] = [f"{name} (computed)" for name in header[1:]]
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
    header = ["images/s", "read per node", "gradients sent per node", "cores for decoding per GPU"]
    rows = [
        [
            str(gpus),
            f"{gpus * figures.gpu_rate:,.0f}",
            f"{read_rate(figures, gpus) / 1e6:,.1f} MB/s",
            f"{gradient_rate(figures, gpus) / 1e6:,.1f} MB/s",
            f"{decoding_cores(figures):,.1f}",
        ]
        for gpus in GPUS
    ]
    return f"""## Network and decoding

{table(["GPUs", *(f"{name} (computed)" for name in header)], rows)}

Reading is that of a run that streams: each view reads its radiograph anew. Gradients are float32, averaged once a step;
images per GPU and step, as in that training: {figures.gpu_batch:,}."""


def limits_section(figures: Figures) -> str:
    header = ["radiographs", "GPUs", "what is loaded most, need over what there is (computed)", "so"]
    rows = []
    for radiographs in RADIOGRAPHS:
        for gpus in GPUS:
            ranked = loads(figures, radiographs, gpus)
            words = "; ".join(f"{what}: {load:.2f}" for what, load in ranked.items())
            rows.append([f"{radiographs:,}", str(gpus), words, advice(ranked)])
    node = (
        f"A node is assumed to have {GPUS_PER_NODE} GPUs of {GPU_MEMORY / 1e9:.0f} GB (source: {SOURCE}), "
        f"{CORES_PER_GPU} cores for each,\n{NODE_MEMORY / 1e12:.0f} TB of memory and a network of "
        f"{8 * NODE_NETWORK / 1e9:.0f} Gbit/s."
    )
    return f"""## What breaks first

Above 1 it breaks. {node} Memory and streaming are alternatives:
images that fit are decoded once, before the training.

{table(header, rows)}"""


def advice(ranked: Mapping[str, float]) -> str:
    """Advice for each bottleneck."""
    if ranked["images kept on the GPU"] <= 1:
        return "keep the images on the GPU"
    if ranked["images kept in a node's memory"] <= 1:
        return "keep the images in memory"
    first = next((what for what, load in ranked.items() if "streaming" in what and load > 1), None)
    return "stream" + (f"; {first} breaks first" if first else "")


def recipes_section(figures: Figures) -> str:
    del figures  # the same for all
    rows = [[str(gpus), f"[{name}.yaml](../recipes/accelerate/{name}.yaml)"] for gpus, name in GPUS.items()]
    return f"""## How to start it

{table(["GPUs", "recipe of accelerate"], rows)}

```bash
spcxr pretrain small_224 --config-file {GPUS[8]} --data SHARDS --cache none \\
    --workers 8 --batch_size 4096 --micro_batch_size 512
```

Over several nodes the `accelerate launch` command that it prints runs on each, with `--machine_rank` and
`--main_process_ip`. A step's
micro-batches (`batch_size / micro_batch_size`) must share out among the processes: 64 GPUs take
`--micro_batch_size 64`. `two_machines_cpu.yaml`, beside these, is for machines without a GPU. Every preset fits one
GPU, so nothing is sharded."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_script(main)
