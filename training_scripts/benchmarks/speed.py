"""Measure speed and memory: ratios of ours to a peer or to a plain version, interleaved, medians.

    python -m training_scripts.benchmarks.speed --gmml_release CHECKOUT \
        --output training_scripts/benchmarks/results/benchmark_cpu.json
    python -m training_scripts.benchmarks.speed --device cuda --compile true --gmml_release CHECKOUT \\
        --output training_scripts/benchmarks/results/benchmark_cuda.json
    python -m training_scripts.benchmarks.speed --render training_scripts/benchmarks/README.md

Parts that are not measured again (`--only`) keep their figures in the results file. `--render` measures nothing and
rewrites the table of a page from the results files. timm comes with the extra `test`; without it, and without a
checkout of the GMML release, their columns say "not measured".
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spcxr_hf import SpcxrError
from spcxr_hf.files import read_json, write_json
from spcxr_hf.training.arguments import parse_arguments, run_script
from spcxr_hf.transforms.group_masking import GroupMasking
from training_scripts.benchmarks.lib.baselines import (
    PretrainingStep,
    ReleaseStep,
    StepSettings,
    corrupt_one_by_one,
    forward_pass,
    import_release,
    make_encoders,
    make_vit_mae_step,
    training_pass,
)
from training_scripts.benchmarks.lib.timing import (
    NOT_MEASURED,
    Laps,
    bf16_peak,
    clock,
    describe_machine,
    in_turn,
    measure_elsewhere,
    median_ms,
    merge_results,
    paired_ratio,
    peak_memory,
    per_second,
    performance_table,
    product_share,
    replace_block,
)

RESULTS = Path(__file__).resolve().parent / "results"
# A smoke run: everything once, on tiny inputs.
QUICK: dict[str, Any] = {"size": "tiny", "image_size": 32, "stored_size": 40, "batch_size": 4, "step_batch_size": 4}
QUICK |= {
    "repeats": 1,
    "loader_workers": 1,
    "growth_sizes": [32],
    "growth_processes": [1],
    "growth_rows": [1, 2],
    "shard_rows": 64,
}


@dataclass
class Arguments:
    """Measure corruption, pretraining step, encoder, growth and memory beside their peers."""

    output: str | None = field(default=None, metadata={"help": "JSON file to write; parts not measured stay in it"})
    only: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "corruption, step, encoder, memory, growth"}
    )
    quick: bool = field(default=False, metadata={"help": "a smoke run of a tiny model; its figures are not valid"})
    render: str | None = field(default=None, metadata={"help": "measure nothing; rewrite the table in this page"})
    results: str = field(default=str(RESULTS), metadata={"help": "folder of the results files, for --render"})
    gmml_release: str | None = field(default=None, metadata={"help": "folder of a checkout of the GMML release"})
    size: str = field(default="small", metadata={"help": "tiny, small or base"})
    image_size: int = field(default=224, metadata={"help": "side of the images in pixels"})
    stored_size: int = field(default=256, metadata={"help": "side of the images that views are made of, in pixels"})
    batch_size: int = field(default=128, metadata={"help": "images per batch of the corruption"})
    step_batch_size: int = field(
        default=0, metadata={"help": "views per pretraining step, even; 0: 32 on a CPU, 256 on a GPU"}
    )
    precision: list[str] = field(default_factory=lambda: ["bf16"], metadata={"help": "fp32, bf16"})
    attention: str = field(default="auto", metadata={"help": "of our model; auto: eager on a CPU, sdpa on a GPU"})
    compile: bool = field(default=False, metadata={"help": "torch.compile our step, and every encoder"})
    repeats: int = field(default=7, metadata={"help": "measurements of each, taken in turn"})
    threads: int = field(default=0, metadata={"help": "threads of torch; 0: torch's default"})
    loader_workers: int = field(default=0, metadata={"help": "processes of the release's loader; 0: one per core"})
    device: str = field(default="cpu", metadata={"help": "where the images are kept: cpu or cuda"})
    growth_sizes: list[int] = field(default_factory=lambda: [112, 224, 448], metadata={"help": "sides in pixels"})
    growth_processes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "numbers of processes"})
    growth_rows: list[int] = field(default_factory=lambda: [1, 10, 100], metadata={"help": "shards streamed"})
    shard_rows: int = field(default=1024, metadata={"help": "rows per shard streamed"})
    stream: str | None = field(default=None, metadata={"help": "internal: shards to stream"})
    probe: str | None = field(default=None, metadata={"help": "internal: measure one thing in this process"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = prepare(parse_arguments(Arguments, argv))
    if arguments.render:
        render(Path(arguments.render), Path(arguments.results))
        return
    if arguments.probe:
        PROBES[arguments.probe](arguments)
        return
    earlier = read_json(Path(arguments.output)) if arguments.output else {}
    results = measure(arguments, earlier)
    print(json.dumps(results, indent=2))


def prepare(arguments: Arguments) -> Arguments:
    """Check the flags and fill in those that follow from others."""
    unknown = [name for name in arguments.only if name not in PARTS]
    if unknown:
        raise SpcxrError(f"--only {' '.join(unknown)}: the parts are {', '.join(PARTS)}")
    if not set(arguments.precision) <= {"fp32", "bf16"}:
        raise SpcxrError(f"--precision is fp32, bf16 or both; got {' '.join(arguments.precision)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SpcxrError("--device cuda: torch sees no GPU here")
    if arguments.quick and not arguments.probe:
        arguments = dataclasses.replace(arguments, **QUICK, precision=arguments.precision[:1])
    on_cpu = arguments.device == "cpu"
    arguments.attention = arguments.attention.replace("auto", "eager" if on_cpu else "sdpa")
    arguments.step_batch_size = arguments.step_batch_size or (32 if on_cpu else 256)
    arguments.loader_workers = arguments.loader_workers or os.cpu_count() or 1
    if arguments.step_batch_size % 2:
        raise SpcxrError(f"--step_batch_size must be even, two crops of an image each; got {arguments.step_batch_size}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def measure(arguments: Arguments, results: dict) -> dict:
    """Every part that is asked for, written out as it is done."""
    for name in arguments.only:
        started = time.perf_counter()
        machine = describe_machine(arguments.device)
        measured = {**machine, name: PARTS[name](arguments)}
        # Parts may be of different days and settings: each says how it was measured.
        run = {**machine, "repeats": arguments.repeats, "quick": arguments.quick}
        measured["runs"] = {name: run | {"seconds": round(time.perf_counter() - started)}}
        results = merge_results(results, measured, deep=("runs", "step", "encoder"))
        print(f"{name}: {json.dumps(measured[name])}", flush=True)
        if arguments.output:
            write_json(Path(arguments.output), results)
    return results


# ---- corruption ------------------------------------------------------------------------------------------------


def measure_corruption(arguments: Arguments) -> dict:
    """Milliseconds per batch of the corruption, for the whole batch at once and in a loop, and their ratio."""
    masking = GroupMasking()
    generator = torch.Generator(arguments.device).manual_seed(0)
    shape = (arguments.batch_size, 1, arguments.image_size, arguments.image_size)
    images = torch.randn(shape, generator=generator, device=arguments.device)
    earlier = masking(images, generator)  # as in training: the last batch's memory is used again
    at_once, looped = in_turn(
        [lambda: masking(images, generator, earlier), lambda: corrupt_one_by_one(masking, images, generator)],
        3 * arguments.repeats,  # short, so that other load on the machine weighs more
    )
    return {
        "batch_size": arguments.batch_size,
        "image_size": arguments.image_size,
        "at_once_ms": median_ms(at_once),
        "looped_ms": median_ms(looped),
        "ratio": paired_ratio(looped, at_once, 1),
    }


# ---- the pretraining step --------------------------------------------------------------------------------------


def measure_step(arguments: Arguments) -> dict:
    """The pretraining step by precision: its phases, beside the release's, from end to end, its share of the peak."""
    return {precision: measure_step_in(arguments, settings(arguments, precision)) for precision in arguments.precision}


def settings(arguments: Arguments, precision: str) -> StepSettings:
    return StepSettings(
        arguments.size, arguments.image_size, arguments.device, precision, arguments.attention, arguments.compile
    )


def measure_step_in(arguments: Arguments, shared: StepSettings) -> dict:
    torch.manual_seed(0)
    ours = PretrainingStep(shared)
    stored = make_stored(arguments, 4 * arguments.step_batch_size)
    result: dict[str, Any] = {"batch_size": arguments.step_batch_size, **dataclasses.asdict(shared)}
    result |= measure_phases(arguments, ours, stored)
    if arguments.gmml_release is None:
        seconds = in_turn([stepper(arguments, ours)], arguments.repeats)[0]
        result |= {"ours": rate(arguments, seconds), "release": NOT_MEASURED, "end_to_end": NOT_MEASURED}
    else:
        with import_release(Path(arguments.gmml_release)) as release:
            theirs = ReleaseStep(release, shared)
            result |= compare_steps(arguments, ours, theirs)
            result["end_to_end"] = compare_end_to_end(arguments, ours, theirs, stored)
    return result | utilisation(ours, result["ours"]["images_per_s"], shared)


def make_stored(arguments: Arguments, count: int) -> torch.Tensor:
    """Stored images, (count, 1, stored_size, stored_size) uint8, on the device."""
    shape = (count, 1, arguments.stored_size, arguments.stored_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(arguments.device)


def stepper(arguments: Arguments, ours: PretrainingStep) -> Callable[[], None]:
    """Our step on views that are made already."""
    shape = (arguments.step_batch_size, 1, arguments.image_size, arguments.image_size)
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    return lambda: ours(clean)


def rate(arguments: Arguments, seconds: Sequence[float]) -> dict:
    return {"step_ms": median_ms(seconds), "images_per_s": per_second(arguments.step_batch_size, seconds)}


def measure_phases(arguments: Arguments, ours: PretrainingStep, stored: torch.Tensor) -> dict:
    """Median milliseconds of each phase, from stored images on, and the share outside the model and its optimiser."""
    ours.from_stored(stored[: arguments.step_batch_size])  # warm-up
    laps = Laps()
    for _ in range(arguments.repeats):
        rows = torch.randint(len(stored), (arguments.step_batch_size,)).to(stored.device)
        laps.restart()
        ours.from_stored(stored[rows], laps)
    phases = {name: median_ms(seconds) for name, seconds in laps.seconds.items()}
    outside = phases["views"] + phases["corruption"]
    return {
        "phases_ms": phases,
        "outside_share": round(outside / sum(phases.values()), 4),
        "product_share": product_share(stepper(arguments, ours)) if arguments.device == "cpu" else None,
    }


def compare_steps(arguments: Arguments, ours: PretrainingStep, theirs: ReleaseStep) -> dict:
    """Both steps on ready views, in turn.

    The release corrupts in its loader's processes: on a CPU that work is shared out over the cores, and on a GPU it
    goes on beside the step. `ratio` grants it that in full; `ratio_in_sequence` is what one process alone takes.
    """
    laps = Laps()
    shape = (arguments.step_batch_size, 3, arguments.image_size, arguments.image_size)
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def their_step() -> None:
        laps.restart()
        crops = theirs.corrupt(clean)
        laps("corruption")
        theirs.train(crops)
        laps("training")

    our_seconds, in_sequence = in_turn([stepper(arguments, ours), their_step], arguments.repeats)
    pairs = list(zip(laps.seconds["corruption"], laps.seconds["training"], strict=True))[1:]  # without the warm-up
    workers = min(arguments.loader_workers, torch.get_num_threads()) if arguments.device == "cpu" else 0
    shared_out = [
        corruption / workers + training if workers else max(corruption / arguments.loader_workers, training)
        for corruption, training in pairs
    ]
    return {
        "ours": rate(arguments, our_seconds),
        "release": rate(arguments, shared_out)
        | {"corruption_ms": median_ms([one for one, _ in pairs]), "training_ms": median_ms([one for _, one in pairs])},
        "ratio": paired_ratio(shared_out, our_seconds),
        "ratio_in_sequence": paired_ratio(in_sequence, our_seconds),
    }


def compare_end_to_end(
    arguments: Arguments, ours: PretrainingStep, theirs: ReleaseStep, stored: torch.Tensor, steps: int = 4
) -> dict:
    """Views included: theirs by its transform in its loader on decoded pictures, ours on the device, in turn.

    Batches that its loader had ready before the clock started would come for free, so they are used up first.
    """
    batch_size, workers = arguments.step_batch_size, arguments.loader_workers
    ahead = 2 * workers  # the loader's own prefetching
    our_seconds, their_seconds = [], []

    def their_steps() -> None:
        for crops, _ in batches:
            theirs.train(crops)

    def our_steps() -> None:
        for _ in range(steps):
            rows = torch.randint(len(stored), (batch_size,)).to(stored.device)
            ours.from_stored(stored[rows])

    for _ in range(arguments.repeats):
        batches = iter(theirs.loader((ahead + steps) * batch_size // 2, arguments.stored_size, batch_size, workers))
        for _ in range(ahead):
            theirs.train(next(batches)[0])
        their_seconds.append(clock(their_steps) / steps)
        our_seconds.append(clock(our_steps) / steps)
    return {
        "loader_workers": workers,
        "ours_images_per_s": per_second(batch_size, our_seconds),
        "release_images_per_s": per_second(batch_size, their_seconds),
        "ratio": paired_ratio(their_seconds, our_seconds),
    }


def utilisation(ours: PretrainingStep, images_per_s: float, shared: StepSettings) -> dict:
    """Model FLOPs utilisation: the FLOPs that forward and backward need, over the card's bf16 peak."""
    flops = ours.flops_per_image()
    card = describe_machine(shared.device)["device"]
    peak = bf16_peak(card) if shared.precision == "bf16" else None
    return {"flops_per_image": flops, "mfu": None if peak is None else round(flops * images_per_s / peak, 4)}


# ---- the encoder -----------------------------------------------------------------------------------------------


def measure_encoder(arguments: Arguments) -> dict:
    """Encoder forward, and forward and backward, beside ViTMAE's and timm's, by precision."""
    return {
        precision: measure_encoder_in(arguments, settings(arguments, precision)) for precision in arguments.precision
    }


def measure_encoder_in(arguments: Arguments, shared: StepSettings) -> dict:
    """Three encoders of equal width, depth and tokens, on three channels, in turn."""
    torch.manual_seed(0)
    shape = (arguments.step_batch_size, 3, arguments.image_size, arguments.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    encoders = make_encoders(shared)
    with torch.no_grad():
        tokens = {name: tuple(encode(images).shape) for name, (_, encode) in encoders.items()}
    if len(set(tokens.values())) > 1:
        raise SpcxrError(f"the encoders give different tokens: {tokens}")
    passes = {"forward": forward_pass, "forward_backward": training_pass}
    result: dict[str, Any] = {"batch_size": arguments.step_batch_size, **dataclasses.asdict(shared)}
    result["tokens"] = tokens["ours"][1]
    for name, run in passes.items():
        runs = [lambda run=run, encoder=encoder: run(*encoder, images, shared) for encoder in encoders.values()]
        seconds = dict(zip(encoders, in_turn(runs, arguments.repeats), strict=True))
        result[name] = {
            f"{peer}_images_per_s": per_second(arguments.step_batch_size, taken) for peer, taken in seconds.items()
        }
        for peer in ("vit_mae", "timm"):
            known = peer in seconds
            result[name][f"ratio_{peer}"] = paired_ratio(seconds[peer], seconds["ours"]) if known else NOT_MEASURED
    return result


# ---- memory, each in a separate process ----------------------------------------------------------------------


def measure_memory(arguments: Arguments) -> dict:
    """Peak memory of a training step: ours, and ViTMAE's on a quarter of the tokens (its default) and on all."""
    peers = {"ours": "memory_ours", "vit_mae": "memory_vit_mae", "vit_mae_all_tokens": "memory_vit_mae_all"}
    first: dict[str, Any] = {"batch_size": arguments.step_batch_size, "image_size": arguments.image_size}
    first |= {"precision": arguments.precision[0]}
    return first | {name: probe(arguments, what) for name, what in peers.items()}


def probe(arguments: Arguments, name: str, processes: int = 1, **changes: Any) -> dict:
    """Run this script again for one figure, in as many processes, which share the threads."""
    threads = max(1, torch.get_num_threads() // processes)
    words: list[str] = []
    shared = {"probe": name, "threads": threads, "output": None, "gmml_release": None} | changes
    for key, value in {**dataclasses.asdict(arguments), **shared}.items():
        if value is not None:
            words += [f"--{key}", *(str(one) for one in (value if isinstance(value, list) else [value]))]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return measure_elsewhere(
        [sys.executable, *(launch if processes > 1 else []), "-m", "training_scripts.benchmarks.speed", *words], threads
    )


def probe_memory(arguments: Arguments, make: Callable[[StepSettings], Callable[[], object]]) -> None:
    """Megabytes at the peak of two training steps, and before the model was there."""
    before = peak_memory(arguments.device)
    step = make(settings(arguments, arguments.precision[0]))
    for _ in range(2):  # the optimiser's moments are there from the second on
        step()
    peak = max(before, peak_memory(arguments.device))  # the kernel's counters are approximate and may step back
    figures = {"before_mb": before, "peak_mb": peak}
    print(json.dumps({name: round(value / 1e6, 1) for name, value in figures.items()}))


# ---- growth ----------------------------------------------------------------------------------------------------


def measure_growth(arguments: Arguments) -> dict:
    """Images per second and memory of the pretraining step over image sizes, processes, and rows streamed."""
    batch = max(2, arguments.step_batch_size // 4)  # the largest images have to fit
    sizes = {
        str(size): probe(arguments, "step", image_size=size, step_batch_size=batch) for size in arguments.growth_sizes
    }
    processes: dict[str, Any] = {}
    for count in arguments.growth_processes:
        enough = arguments.device == "cpu" or torch.cuda.device_count() >= count
        processes[str(count)] = probe(arguments, "step", count) if enough else NOT_MEASURED
    return {"batch_size": batch, "image_size": sizes, "processes": processes, "rows": measure_rows(arguments)}


def probe_step(arguments: Arguments) -> None:
    """Images per second over all processes, and megabytes at the peak of one of them."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=arguments.device == "cpu")
    arguments = dataclasses.replace(arguments, step_batch_size=arguments.step_batch_size // accelerator.num_processes)
    ours = PretrainingStep(settings(arguments, arguments.precision[0]))
    if accelerator.num_processes > 1:
        ours.model = accelerator.prepare_model(ours.model)
    seconds = in_turn([stepper(arguments, ours)], arguments.repeats)[0]
    count = arguments.step_batch_size * accelerator.num_processes
    if accelerator.is_main_process:
        peak = round(peak_memory(arguments.device) / 1e6, 1)
        print(json.dumps({"images_per_s": per_second(count, seconds), "peak_mb": peak}), flush=True)
    accelerator.end_training()


def measure_rows(arguments: Arguments) -> dict:
    """Seconds to the first micro-batch and megabytes at the peak, over the number of rows on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(arguments, Path(folder) / "shard.parquet")
        figures = {}
        for count in arguments.growth_rows:
            stream = Path(folder) / str(count)
            stream.mkdir()
            for number in range(count):
                (stream / f"{number:05}.parquet").hardlink_to(shard)  # as many shards, no more disk
            figures[str(count * arguments.shard_rows)] = probe(arguments, "rows", stream=str(stream))
    return figures


def write_shard(arguments: Arguments, path: Path) -> Path:
    """A Parquet shard of one noisy picture over and over, in row groups of 32."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(make_stored(dataclasses.replace(arguments, device="cpu"), 1)[0, 0].numpy()).save(buffer, "JPEG")
    cells = [{"bytes": buffer.getvalue(), "path": None}] * arguments.shard_rows
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(cells, struct)}), path, row_group_size=32)
    return path


def probe_rows(arguments: Arguments) -> None:
    """Open a stream, and read 64 micro-batches of it."""
    from spcxr_hf.data.batches import StepPlan
    from spcxr_hf.data.streaming import StreamingRadiographs

    before, started = peak_memory("cpu"), time.perf_counter()
    stream = StreamingRadiographs(str(arguments.stream), arguments.stored_size)
    plan = StepPlan(batch_size=8, micro_batch_size=4) if arguments.quick else StepPlan(32, 16)
    start_s = None
    for _ in stream.steps(plan, 0, 32):
        start_s = start_s or time.perf_counter() - started
    peak = max(before, peak_memory("cpu"))  # the kernel's counters are approximate and may step back
    figures = {"before_mb": before / 1e6, "peak_mb": peak / 1e6}
    print(json.dumps({"start_s": round(start_s or 0.0, 3)} | {name: round(mb, 1) for name, mb in figures.items()}))


# ---- the page --------------------------------------------------------------------------------------------------


def render(page: Path, folder: Path) -> None:
    """Rewrite the table between `<!-- performance -->` and `<!-- /performance -->` from the results files."""
    cpu, gpu = (read_json(folder / f"benchmark_{device}.json") for device in ("cpu", "cuda"))
    if not cpu:
        raise SpcxrError(f"{folder / 'benchmark_cpu.json'}: no such results file")
    replace_block(page, "performance", performance_table(cpu, gpu))


PARTS: dict[str, Callable[[Arguments], dict]] = {
    "corruption": measure_corruption,
    "step": measure_step,
    "encoder": measure_encoder,
    "memory": measure_memory,
    "growth": measure_growth,
}
PROBES: dict[str, Callable[[Arguments], None]] = {
    "memory_ours": lambda arguments: probe_memory(
        arguments, lambda shared: stepper(arguments, PretrainingStep(shared))
    ),
    "memory_vit_mae": lambda arguments: probe_memory(
        arguments, lambda shared: make_vit_mae_step(shared, arguments.step_batch_size, mask_ratio=0.75)
    ),
    "memory_vit_mae_all": lambda arguments: probe_memory(
        arguments, lambda shared: make_vit_mae_step(shared, arguments.step_batch_size, mask_ratio=0.0)
    ),
    "step": probe_step,
    "rows": probe_rows,
}


if __name__ == "__main__":
    run_script(main)
