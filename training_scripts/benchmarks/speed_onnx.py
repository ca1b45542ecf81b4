"""Measure ONNX exports beside PyTorch: speed ratios on two threads, and the loss of 8 bits in accuracy or Dice on val.

    python -m training_scripts.benchmarks.speed_onnx --model model_cards/pneumonia --data ../shared/data \
        --output training_scripts/benchmarks/results/onnx.json
    python -m training_scripts.benchmarks.speed_onnx --render training_scripts/GUIDES.md

Encoder, classifier and segmentation alike; without `--data` speed alone. Each model has its own entry in the
results file, in which `--parts accuracy` or `--parts speed` renew the one and leave the other: accuracy takes minutes
and any machine will do, speed takes one and wants a machine with nothing else on it. Which column holds the labels and
the split, and which labels are which class, comes from the recipe in the checkpoint's folder unless a flag says it.

Each speed is the median of runs taken in turn, by the wall clock. Before each, all rest until the threads of the others
have stopped waiting for work on the cores, and it runs once untimed. Accuracy is of PyTorch, of the float export and of
its 8-bit version, on the same rows and with exact sums (`EXACT_SUMS` of `hub.export_onnx`). What 8 bits give by
themselves on an x86 processor without VNNI is measured on one and kept beside; so is what 7 bits give, on any
(`--reduce_range true`). `--alternatives true` measures what ONNX Runtime's own quantisation gives. `--render` measures
nothing and writes the tables of the results between `<!-- onnx -->` and `<!-- /onnx -->`.
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
from spcxr_hf.data.labels import parse_classes
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable, open_image, open_mask
from spcxr_hf.evaluation.calibration import to_probabilities
from spcxr_hf.evaluation.metrics import dice
from spcxr_hf.evaluation.predict import match_classes, select_rows
from spcxr_hf.files import read_json, write_json
from spcxr_hf.hub.export import ExportSource, load_source
from spcxr_hf.hub.export_onnx import EXACT_SUMS, export_onnx, lacks_vnni, quantize_int8
from spcxr_hf.models.loading import is_multi_label, label_names
from spcxr_hf.training.arguments import parse_arguments, read_recipe, run_script
from spcxr_hf.training.losses import measure
from training_scripts.benchmarks.lib.timing import describe_machine, median_ms, paired_ratio, replace_block

RESULTS = Path(__file__).resolve().parent / "results" / "onnx.json"
HEAD = """| checkpoint | figure on `val` | PyTorch | float32 | int8 | int8 loses, points | without VNNI | 7 bits | float32 off by |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501
SPEED_HEAD = """| checkpoint | PyTorch, ms per image | float32 as fast | int8 as fast | MB of float32, int8 |
|---|---|---|---|---|"""
PARTS = ("accuracy", "speed")
CALIBRATION_IMAGES = 64  # of the static quantisation
WITHOUT_VNNI = "accuracy without VNNI"  # the same file overflows there
IN_7_BITS = "accuracy in 7 bits"
REST = 0.05  # seconds: the threads of torch and of ONNX Runtime spin for some milliseconds before they sleep
Run = Callable[[torch.Tensor], np.ndarray]  # pixel values (B, C, H, W) -> logits, or the pooled embedding


@dataclass
class Arguments:
    """Measure an ONNX export."""

    model: str | None = field(default=None, metadata={"help": "folder or Hub id of a checkpoint of this family"})
    data: str | None = field(default=None, metadata={"help": "Parquet shards with labels or lung masks"})
    split_column: str | None = field(
        default=None,
        metadata={"help": "column of the splits; by default the recipe's, or split; of other tasks lung_split"},
    )
    split: str = field(default="val", metadata={"help": "its value to measure on"})
    label_column: str | None = field(
        default=None, metadata={"help": "column of a classifier's labels; by default the recipe's, or label"}
    )
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": "a classifier's classes, as `normal pneumonia=bacterial+viral`; by default the recipe's"},
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "images per run"})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "accuracy, speed"})
    reduce_range: bool = field(
        default=False, metadata={"help": "measure the accuracy of 7 bits, for x86 processors without VNNI, not of 8"}
    )
    alternatives: bool = field(
        default=False, metadata={"help": "also ONNX Runtime's own 8 bits: dynamic, and static with images of train"}
    )
    threads: int = field(default=2, metadata={"help": "threads of each"})
    repeats: int = field(default=30, metadata={"help": "runs of each, taken in turn"})
    most_rows: int | None = field(default=None, metadata={"help": "measure accuracy on this many rows, evenly spread"})
    render: str | None = field(default=None, metadata={"help": "measure nothing; rewrite the table in this page"})


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    if arguments.render:
        replace_block(Path(arguments.render), "onnx", table_of(read_json(Path(arguments.output or RESULTS))))
        return {}
    if arguments.model is None:
        raise SpcxrError("give --model to measure, or --render PAGE")
    if min([arguments.threads, arguments.repeats, *arguments.batch_sizes]) < 1:
        raise SpcxrError("threads, repeats and batch_sizes must be at least 1")
    if unknown := set(arguments.parts) - set(PARTS):
        raise SpcxrError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.reduce_range and arguments.parts != ["accuracy"]:
        raise SpcxrError("--reduce_range goes with --parts accuracy: the speeds are those of 8 bits")
    source = load_source(arguments.model)
    fill_from_recipe(arguments, source.task, Path(arguments.model) / "recipe.yaml")
    result = measure_model(arguments, source)
    if arguments.output:
        path = Path(arguments.output)
        name, known = Path(arguments.model).name, read_json(path)
        write_json(path, {**known, name: {**known.get(name, {}), **result}})
    print(result)
    return result


def fill_from_recipe(arguments: Arguments, task: str, recipe: Path) -> None:
    """Flags that are not given are taken from the training recipe beside the weights."""
    known = read_recipe(recipe) if recipe.is_file() else {}
    splits = "split" if task == "classification" else "lung_split"
    arguments.split_column = arguments.split_column or known.get("split_column") or splits
    arguments.label_column = arguments.label_column or known.get("label_column") or "label"
    arguments.classes = arguments.classes or known.get("classes") or []


def measure_model(arguments: Arguments, source: ExportSource) -> dict[str, Any]:
    """Sizes, speeds and, where there is a set, accuracy of one model and its two exports."""
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(str(arguments.model), Path(folder) / "export", num_channels=source.model.config.num_channels)
        files = {"float": file, "int8": quantize_int8(file, reduce_range=arguments.reduce_range)}
        if arguments.alternatives:
            files |= quantize_otherwise(arguments, source, file)
        result: dict[str, Any] = {"task": source.task, "size": list(source.size)}
        result["megabytes"] = {name: round(path.stat().st_size / 1e6, 1) for name, path in files.items()}
        if arguments.data is not None and "accuracy" in arguments.parts:
            part = IN_7_BITS if arguments.reduce_range else "accuracy"
            result[part] = measure_accuracy(arguments, source, files, exact=True)
            if lacks_vnni() and not arguments.reduce_range:
                result[WITHOUT_VNNI] = measure_accuracy(arguments, source, files, exact=False)
        if "speed" in arguments.parts:
            result["speed"] = measure_speed(arguments, source, files) | describe_machine("cpu")
    return result


def quantize_otherwise(arguments: Arguments, source: ExportSource, file: Path) -> dict[str, Path]:
    """The file in 8 bits as ONNX Runtime does it by itself: dynamic, and static, calibrated on images of `train`."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    table = read_set(str(arguments.data)).where(str(arguments.split_column), "train")
    rows = np.linspace(0, len(table) - 1, CALIBRATION_IMAGES).astype(int).tolist()

    class Images(CalibrationDataReader):
        values = ({"pixel_values": one.numpy()} for _, _, one in pixel_values(source, table, rows))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.values, None)

    files = {name: file.with_name(f"model_{name}.onnx") for name in ("dynamic", "static")}
    options: Any = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(file, files["dynamic"], **options)
    quantize_static(file, files["static"], Images(), **options)
    return files


# ---- what is run -------------------------------------------------------------------------------------------------


def runners(source: ExportSource, files: dict[str, Path], threads: int, exact: bool = False) -> dict[str, Run]:
    """PyTorch, as it is used without any export, and the ONNX files, each on this many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry(*EXACT_SUMS)
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


def measure_speed(arguments: Arguments, source: ExportSource, files: dict[str, Path]) -> dict[str, Any]:
    """Milliseconds of each and how many times as fast as PyTorch it is, per batch size."""
    runs = runners(source, files, arguments.threads)
    found = {}
    for batch in arguments.batch_sizes:
        values = torch.randn(batch, source.model.config.num_channels, *source.size)
        seconds = dict(zip(runs, time_in_turn(list(runs.values()), values, arguments.repeats), strict=True))
        found[f"batch {batch}"] = {
            "ms": {name: median_ms(taken) for name, taken in seconds.items()},
            "times_as_fast": {name: paired_ratio(seconds["torch"], seconds[name]) for name in files},
        }
    return found


def time_in_turn(runs: list[Run], values: torch.Tensor, repeats: int) -> Sequence[Sequence[float]]:
    """Seconds of each run, the runs taken in turn, each rested and warm."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, seconds, strict=True):
            time.sleep(REST)
            run(values)
            begun = time.perf_counter()
            run(values)
            taken.append(time.perf_counter() - begun)
    return seconds


# ---- accuracy --------------------------------------------------------------------------------------------------------

Figures = dict[str, dict[str, float]]  # figure -> what computed it -> value


def measure_accuracy(arguments: Arguments, source: ExportSource, files: dict[str, Path], exact: bool) -> dict[str, Any]:
    """The figures of each on the split, the points that the exports lose against PyTorch, and how far they are off."""
    runs = runners(source, files, 1, exact)
    off = dict.fromkeys(files, 0.0)

    def compute(values: torch.Tensor) -> dict[str, np.ndarray]:
        found = {name: run(values) for name, run in runs.items()}
        for name in off:
            off[name] = max(off[name], float(np.abs(found[name] - found["torch"]).max()))
        return found

    judge = {"classification": measure_classes, "segmentation": measure_lungs, "embedding": measure_embeddings}[
        source.task
    ]
    rows, figures = judge(arguments, source, compute, read_set(str(arguments.data)))
    return {
        "split": arguments.split,
        "rows": rows,
        "figures": {name: {run: round(value, 4) for run, value in each.items()} for name, each in figures.items()},
        "points_lost": {
            name: {kind: round(100 * (each["torch"] - each[kind]), 3) for kind in files}
            for name, each in figures.items()
        },
        "largest_difference_of_outputs": {name: float(f"{value:.3g}") for name, value in off.items()},
    }


Compute = Callable[[torch.Tensor], dict[str, np.ndarray]]


def spread(arguments: Arguments, count: int) -> list[int]:
    """The numbers of the rows to measure on."""
    most = count if arguments.most_rows is None else min(count, arguments.most_rows)
    return np.linspace(0, count - 1, most).astype(int).tolist()


def pixel_values(
    source: ExportSource, table: RadiographTable, rows: list[int]
) -> Iterator[tuple[int, Any, torch.Tensor]]:
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


def measure_classes(
    arguments: Arguments, source: ExportSource, compute: Compute, table: RadiographTable
) -> tuple[int, Figures]:
    """AUROC (mean over the classes), accuracy of the decisions, and how many of PyTorch's decisions are kept."""
    multi_label = is_multi_label(source.model.config)
    classes = match_classes(source.name, label_names(source.model.config), parse_classes(arguments.classes))
    labelled = select_rows(
        table, str(arguments.label_column), str(arguments.split_column), arguments.split, classes, multi_label
    )
    rows = spread(arguments, len(labelled))
    found = [compute(values) for _, _, values in pixel_values(source, labelled.table, rows)]
    logits = {name: torch.from_numpy(np.concatenate([one[name] for one in found])) for name in found[0]}
    targets = labelled.targets[rows]
    said = {name: decisions(source, values, multi_label) for name, values in logits.items()}
    truth = targets if multi_label else targets.argmax(dim=1)
    known = ~truth.isnan()
    return len(rows), {
        "auroc": {name: measure(values, targets, multi_label)["auroc"] for name, values in logits.items()},
        "accuracy": {name: (one == truth)[known].float().mean().item() for name, one in said.items()},
        "decisions kept": {name: (one == said["torch"]).float().mean().item() for name, one in said.items()},
    }


def decisions(source: ExportSource, logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    """The likeliest class (n), or of a multi-label model (n, labels): 1 from the label's threshold on.

    The threshold is the operating point that the configuration names; 0.5 where there is none.
    """
    if not multi_label:
        return logits.argmax(dim=1)
    config: Any = source.model.config
    points = getattr(config, "operating_points", None) or {}
    named = [
        points.get(name, {}).get(getattr(config, "operating_point", None), 0.5)
        for name in label_names(source.model.config)
    ]
    return (to_probabilities(logits, multi_label) >= torch.tensor(named)).float()


def measure_lungs(
    arguments: Arguments, source: ExportSource, compute: Compute, table: RadiographTable
) -> tuple[int, Figures]:
    """Mean Dice of the lung masks, each at its image's own size."""
    config: Any = source.model.config
    lung = config.label2id.get("lung")
    if lung is None:
        raise SpcxrError(f"{source.name}: there is no 'lung' among its labels")
    table = table.where(str(arguments.split_column), arguments.split)
    rows = spread(arguments, len(table))
    masks = table.column("lung_mask")
    found: dict[str, list[float]] = {}
    for row, image, values in pixel_values(source, table, rows):
        target = torch.from_numpy(np.asarray(open_mask(masks[row], f"{table.name}, row {row}")) > 127)
        for name, output in compute(values).items():
            resized = torch.nn.functional.interpolate(
                torch.from_numpy(output), size=(image.height, image.width), mode="bilinear"
            )
            found.setdefault(name, []).append(dice(resized[0].argmax(dim=0) == lung, target).item())
    return len(rows), {"dice": {name: statistics.fmean(values) for name, values in found.items()}}


def measure_embeddings(
    arguments: Arguments, source: ExportSource, compute: Compute, table: RadiographTable
) -> tuple[int, Figures]:
    """Mean cosine similarity with PyTorch's embedding: the accuracy measure of an encoder."""
    table = table.where(str(arguments.split_column), arguments.split)
    rows = spread(arguments, len(table))
    found: dict[str, list[float]] = {}
    for _, _, values in pixel_values(source, table, rows):
        outputs = compute(values)
        expected = outputs["torch"][0]
        for name, output in outputs.items():
            norms = np.linalg.norm(output[0]) * np.linalg.norm(expected)
            found.setdefault(name, []).append(float(output[0] @ expected / norms))
    return len(rows), {"cosine similarity": {name: statistics.fmean(values) for name, values in found.items()}}


# ---- the table ---------------------------------------------------------------------------------------------------


def table_of(results: dict[str, Any]) -> str:
    """In Markdown: a row for each figure of each model, and a row for the speed of each."""
    figures = [row for name, result in results.items() for row in figure_rows(name, result)]
    speeds = [speed_row(name, result) for name, result in results.items() if "speed" in result]
    return "\n".join([HEAD, *figures, "", SPEED_HEAD, *speeds])


def figure_rows(name: str, result: dict[str, Any]) -> Iterator[str]:
    """What each figure is by PyTorch and by both files, and how far float32's outputs are off at most."""
    accuracy = result.get("accuracy", {})
    others = [result.get(part, {}).get("points_lost", {}) for part in (WITHOUT_VNNI, IN_7_BITS)]
    for figure, each in accuracy.get("figures", {}).items():
        lost = accuracy["points_lost"][figure]["int8"]
        cells = [*(f"{each[run]:.4f}" for run in ("torch", "float", "int8")), f"{lost:.2f}"]
        cells += [f"{other[figure]['int8']:.2f}" if figure in other else "" for other in others]
        cells.append(f"{accuracy['largest_difference_of_outputs']['float']:.1e}")
        yield f"| `{name}` | {figure} ({accuracy['rows']} images) | {' | '.join(cells)} |"


def speed_row(name: str, result: dict[str, Any]) -> str:
    """Milliseconds per image, and how many times as fast both files are, by batch size."""
    batches = {batch: each for batch, each in result["speed"].items() if batch.startswith("batch")}
    cells = [
        ", ".join(f"{each['ms']['torch'] / int(batch[6:]):.1f} ({batch})" for batch, each in batches.items()),
        *(
            ", ".join(f"{each['times_as_fast'][kind]:.2f} ({batch})" for batch, each in batches.items())
            for kind in ("float", "int8")
        ),
        ", ".join(f"{result['megabytes'][kind]:.0f}" for kind in ("float", "int8")),
    ]
    return f"| `{name}` | {' | '.join(cells)} |"


if __name__ == "__main__":
    run_script(main)
