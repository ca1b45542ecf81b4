"""Measure an ONNX export beside PyTorch: speed ratios on two threads, and what 8 bits cost in accuracy or Dice on val.

    python training_scripts/benchmark_onnx.py --model model_cards/lung-segmentation --data ../shared/data \
        --split_column lung_split --output runs/onnx.json

Encoder, classifier and segmentation alike; without `--data` speed alone. Each speed is the median of runs taken in
turn, so that a busy machine is busy for all; the CPU seconds of one thread are told too, since these hardly depend on
who else is there. Accuracy is of PyTorch, of the float export and of its 8-bit version, on the same rows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from spcxr_hf import SpcxrError, SpcxrImageProcessor
from spcxr_hf.archives import read_set
from spcxr_hf.benchmarking import describe_machine, median_ms, paired_ratio, write_results
from spcxr_hf.data import RadiographTable, open_image, open_mask
from spcxr_hf.export import Source, load_source
from spcxr_hf.export_onnx import export_onnx, quantize_int8
from spcxr_hf.metrics import dice
from spcxr_hf.recipe import parse_arguments

Run = Callable[[torch.Tensor], np.ndarray]  # pixel values (B, C, H, W) -> logits, or the pooled embedding


@dataclass
class Arguments:
    """Measure an ONNX export."""

    model: str = field(metadata={"help": "folder or Hub id of a checkpoint of this family"})
    data: str | None = field(default=None, metadata={"help": "Parquet shards with labels or lung masks"})
    split_column: str = field(default="split", metadata={"help": "column of the splits"})
    split: str = field(default="val", metadata={"help": "its value to measure on"})
    label_column: str = field(default="label", metadata={"help": "column of a classifier's labels"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "images per run"})
    threads: int = field(default=2, metadata={"help": "threads of each"})
    repeats: int = field(default=30, metadata={"help": "runs of each, taken in turn"})
    most_rows: int | None = field(default=None, metadata={"help": "measure accuracy on so many rows, evenly spread"})


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    if min([arguments.threads, arguments.repeats, *arguments.batch_sizes]) < 1:
        raise SpcxrError("threads, repeats and batch_sizes must be at least 1")
    source = load_source(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(arguments.model, Path(folder) / "export", num_channels=source.model.config.num_channels)
        files = {"float": file, "int8": quantize_int8(file)}
        result: dict[str, Any] = {"model": Path(arguments.model).name, "task": source.task, "size": list(source.size)}
        result["megabytes"] = {name: round(path.stat().st_size / 1e6, 1) for name, path in files.items()}
        result["speed"] = {
            f"{kind}, {threads} threads" if threads > 1 else f"{kind}, 1 thread": measure_speed(
                arguments, source, files, threads, clock
            )
            for kind, threads, clock in (
                ("wall clock", arguments.threads, time.perf_counter),
                ("CPU time", 1, time.process_time),
            )
        }
        torch.set_num_threads(arguments.threads)
        result |= describe_machine("cpu")
        if arguments.data is not None:
            result["accuracy"] = measure_accuracy(arguments, source, files)
    if arguments.output:
        write_results(Path(arguments.output), result)
    print(result)
    return result


# ---- what is run -------------------------------------------------------------------------------------------------


def runners(source: Source, files: dict[str, Path], threads: int) -> dict[str, Run]:
    """PyTorch, as it is used without any export, and the ONNX files, each on so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    torch.set_num_threads(threads)
    name = "pooler_output" if source.task == "embedding" else "logits"

    @torch.no_grad()
    def eager(values: torch.Tensor) -> np.ndarray:
        return source.model(values)[name].numpy()

    def session(path: Path) -> Run:
        loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda values: loaded.run([name], {"pixel_values": values.numpy()})[0]

    return {"torch": eager, **{kind: session(path) for kind, path in files.items()}}


# ---- speed -------------------------------------------------------------------------------------------------------


def measure_speed(
    arguments: Arguments, source: Source, files: dict[str, Path], threads: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Milliseconds of each and how many times as fast as PyTorch it is, per batch size."""
    runs = runners(source, files, threads)
    found = {}
    for batch in arguments.batch_sizes:
        values = torch.randn(batch, source.model.config.num_channels, *source.size)
        seconds = dict(zip(runs, time_in_turn(list(runs.values()), values, arguments.repeats, clock), strict=True))
        found[f"batch {batch}"] = {
            "ms": {name: median_ms(taken) for name, taken in seconds.items()},
            "times_as_fast": {name: paired_ratio(seconds["torch"], seconds[name]) for name in files},
        }
    return found


def time_in_turn(
    runs: list[Run], values: torch.Tensor, repeats: int, clock: Callable[[], float]
) -> Sequence[Sequence[float]]:
    """Seconds of each run by this clock, the runs taken in turn after one to warm up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, seconds, strict=True):
            begun = clock()
            run(values)
            if repeat:
                taken.append(clock() - begun)
    return seconds


# ---- accuracy ----------------------------------------------------------------------------------------------------


def measure_accuracy(arguments: Arguments, source: Source, files: dict[str, Path]) -> dict[str, Any]:
    """The figure of each on the split, and the points that the exports lose against PyTorch."""
    table = read_set(str(arguments.data)).where(arguments.split_column, arguments.split)
    rows = list(range(len(table)))
    if arguments.most_rows is not None:
        rows = rows[:: max(1, len(rows) // arguments.most_rows)][: arguments.most_rows]
    judge = {"classification": judge_classes, "segmentation": judge_lungs, "embedding": judge_embeddings}[source.task]
    name, figures = judge(arguments, source, runners(source, files, arguments.threads), table, rows)
    return {
        "figure": name,
        "split": arguments.split,
        "rows": len(rows),
        **{kind: round(value, 4) for kind, value in figures.items()},
        "points_lost": {kind: round(100 * (figures["torch"] - figures[kind]), 3) for kind in files},
    }


def pixel_values(source: Source, table: RadiographTable, rows: list[int]) -> Iterator[tuple[int, Any, torch.Tensor]]:
    """Row, image and its pixel values (1, C, H, W)."""
    height, width = source.size
    processor = SpcxrImageProcessor(
        size={"height": height, "width": width},
        image_mean=[source.mean],
        image_std=[source.std],
        num_output_channels=source.model.config.num_channels,
    )
    cells, names = table.rows["image"], table.ids
    for row in tqdm(rows, desc=table.name, unit="image"):
        image = open_image(cells[row].as_py(), f"{table.name}: {names[row]}")
        yield row, image, processor(image, return_tensors="pt").pixel_values


def judge_classes(
    arguments: Arguments, source: Source, runs: dict[str, Run], table: RadiographTable, rows: list[int]
) -> tuple[str, dict[str, float]]:
    """Accuracy; of a multi-label model, over all its labels at 0.5. Rows of unknown labels are refused."""
    labels = table.column(arguments.label_column)
    hits: dict[str, list[float]] = {name: [] for name in runs}
    multi_label = source.model.config.problem_type == "multi_label_classification"
    names = [source.model.config.id2label[index] for index in range(source.model.config.num_labels)]
    for row, _, values in pixel_values(source, table, rows):
        label = labels[row]
        held = label if isinstance(label, list) else [label]
        if set(held) - set(names):
            raise SpcxrError(f"{table.name}: {arguments.label_column} holds {label!r}; the model knows {names}")
        truth = np.array([name in held for name in names])
        for name, run in runs.items():
            logits = run(values)[0]
            right = ((logits > 0) == truth) if multi_label else [truth[logits.argmax()]]
            hits[name].append(float(np.mean(right)))
    return "accuracy", {name: statistics.fmean(values) for name, values in hits.items()}


def judge_lungs(
    arguments: Arguments, source: Source, runs: dict[str, Run], table: RadiographTable, rows: list[int]
) -> tuple[str, dict[str, float]]:
    """Mean Dice of the lung masks, each at its image's own size."""
    lung = source.model.config.label2id.get("lung")
    if lung is None:
        raise SpcxrError(f"{source.name}: there is no 'lung' among its labels")
    masks = table.column("lung_mask")
    found: dict[str, list[float]] = {name: [] for name in runs}
    for row, image, values in pixel_values(source, table, rows):
        target = torch.from_numpy(np.asarray(open_mask(masks[row], f"{table.name}, row {row}")) > 127)
        for name, run in runs.items():
            logits = torch.from_numpy(run(values))
            resized = torch.nn.functional.interpolate(logits, size=(image.height, image.width), mode="bilinear")
            found[name].append(dice(resized[0].argmax(dim=0) == lung, target).item())
    return "dice", {name: statistics.fmean(values) for name, values in found.items()}


def judge_embeddings(
    arguments: Arguments, source: Source, runs: dict[str, Run], table: RadiographTable, rows: list[int]
) -> tuple[str, dict[str, float]]:
    """Mean cosine similarity with PyTorch's embedding: what an encoder alone can be judged by."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _, _, values in pixel_values(source, table, rows):
        expected = runs["torch"](values)[0]
        for name, run in runs.items():
            embedding = run(values)[0]
            norms = np.linalg.norm(embedding) * np.linalg.norm(expected)
            found[name].append(float(embedding @ expected / norms))
    return "cosine similarity", {name: statistics.fmean(values) for name, values in found.items()}


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
