"""Helpers for measurements: interleaved timing, peak memory, FLOPs, results files and their table.

Ratios are medians over pairs that were measured one after the other, so that other load on the machine affects both.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spcxr_hf.errors import SpcxrError

ROOT = Path(__file__).resolve().parents[3]
NOT_MEASURED = "not measured"
# Dense bf16 FLOP/s by the vendor's data sheets, by the card's name; the first match counts.
BF16_PEAKS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}

# What torch's profiler calls matrix products, and convolutions with their gradients, on a CPU.
PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    *("aten::mkldnn_convolution", "aten::_convolution", "aten::convolution_backward"),
)


# ---- time and memory -------------------------------------------------------------------------------------------


def synchronise() -> None:
    """Wait until the GPU, if there is one, has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each function, measured in turn so that other load on the machine affects all, after one warm-up."""
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, measured in zip(functions, seconds, strict=True):
            started = time.perf_counter()
            function()
            synchronise()
            if repeat:
                measured.append(time.perf_counter() - started)
    return seconds


def clock(function: Callable[[], object]) -> float:
    """Seconds that it takes, what it asks of the GPU included."""
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def median_ms(seconds: Sequence[float]) -> float:
    """The median in milliseconds."""
    return round(1000 * statistics.median(seconds), 2)


def per_second(count: int, seconds: Sequence[float]) -> float:
    """How many a second, if `count` take the median of `seconds`."""
    return round(count / statistics.median(seconds), 2)


def paired_ratio(slow: Sequence[float], fast: Sequence[float], digits: int = 2) -> float:
    """The median of slow / fast over measurements taken in turn: above 1, `fast` is the faster."""
    return round(statistics.median(one / other for one, other in zip(slow, fast, strict=True)), digits)


def product_share(function: Callable[[], object]) -> float:
    """The share of a CPU's time that matrix products and convolutions take, 0..1, by torch's profiler.

    What else a step does can be made faster; these can not, where they run at the processor's peak. A share of 0.8
    means that no other code around the same products is more than 1 / 0.8 = 1.25 times as fast.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    seconds = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return round(sum(seconds.get(name, 0) for name in PRODUCTS) / sum(seconds.values()), 4)


class Laps:
    """A stopwatch: calling it with a name ends the lap of that name. Each lap waits for the GPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a lap here."""
        synchronise()
        self.started = time.perf_counter()

    def __call__(self, name: str) -> None:
        """End a lap and begin the next."""
        synchronise()
        now = time.perf_counter()
        self.seconds.setdefault(name, []).append(now - self.started)
        self.started = now


def peak_memory(device: str) -> int:
    """Most bytes held so far: allocated on the GPU, or resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage: after a fork and exec it may still report the parent's peak
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1])  # type: ignore[index]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_machine(device: str) -> dict[str, Any]:
    """The machine in words: processor, cores, threads, card, torch; no host name, no path."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def measure_elsewhere(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a program of `threads` threads per process that prints its figures as one line of JSON, the last one.

    Raises:
        SpcxrError: it failed; the message holds its last words.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = (done.stderr or done.stdout).strip().splitlines() or ["nothing said"]
        raise SpcxrError(f"a measurement in another process failed with status {done.returncode}: {words[-1]}")
    return json.loads(lines[-1])


# ---- FLOPs -----------------------------------------------------------------------------------------------------


def training_flops(parameters: int, tokens: int, layers: int, width: int) -> int:
    """FLOPs of forward and backward for one image: 6 P T + 12 L T^2 D.

    P weights of matrices meet T tokens each in one multiplication and one addition forward, and in twice that backward
    (gradients of inputs and of weights): 6 P T. Attention multiplies no weights: T x T scores and their product with
    the values are 4 T^2 D per block forward, three times that in all (PaLM, arXiv 2204.02311, appendix B).
    """
    return 6 * parameters * tokens + 12 * layers * tokens**2 * width


def matrix_parameters(model: nn.Module) -> int:
    """The number of weights that multiply tokens: without biases, norms, CLS and positions."""
    skipped = ("cls_token", "position_embeddings")
    return sum(
        weight.numel() for name, weight in model.named_parameters() if weight.dim() >= 2 and not name.endswith(skipped)
    )


def bf16_peak(card: str) -> float | None:
    """Dense bf16 FLOP/s of a card by its name; None for one that is not known here, so that nothing is made up."""
    return next((peak for name, peak in BF16_PEAKS.items() if name in card), None)


# ---- results ---------------------------------------------------------------------------------------------------


def merge_results(earlier: Mapping[str, Any], new: Mapping[str, Any], deep: Sequence[str] = ()) -> dict[str, Any]:
    """New parts over earlier ones; of those in `deep`, entry by entry. What was not measured again stays."""
    merged = {**earlier, **new}
    for name in deep:
        if name in earlier and name in new:
            merged[name] = {**earlier[name], **new[name]}
    return merged


def replace_block(page: Path, name: str, content: str) -> None:
    """Put `content` between the lines `<!-- name -->` and `<!-- /name -->` of a Markdown page.

    Raises:
        SpcxrError: the page cannot be read, or does not hold the two lines once each, in this order.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise SpcxrError(f"{page}: cannot be read ({error})") from error
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SpcxrError(f"{page}: must hold {begin} and, after it, {end}, once each")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{content.strip()}\n{end}{after}", encoding="utf-8")


# ---- the table -------------------------------------------------------------------------------------------------


def performance_table(cpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    """A Markdown table of two results files; one that is empty has no column, a row that was not measured is left out.

    Raises:
        SpcxrError: a part comes from a smoke run, whose figures mean nothing.
    """
    columns = {kind: _Column(results) for kind, results in (("CPU", cpu), ("GPU", gpu)) if results}
    titles = [column.title(kind) for kind, column in columns.items()]
    lines = [f"| | {' | '.join(titles)} |", f"|---{'|---' * len(columns)}|"]
    for what, cell in _rows(list(columns.values())):
        cells = [cell(column) for column in columns.values()]
        if set(cells) != {NOT_MEASURED}:
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


class _Column:
    """What a results file holds, in words; whatever is not there is "not measured"."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        smoke = [part for part, run in results.get("runs", {}).items() if run["quick"]]
        if smoke:
            raise SpcxrError(f"the results of {', '.join(smoke)} come from a smoke run (--quick); measure them")
        self.results = results

    def title(self, kind: str) -> str:
        """The machine."""
        device = self.results["device"]
        words = self.results["machine"] if device == "cpu" else f"{device}, {self.results['machine']}"
        return f"{kind}: {words}, torch {self.results['torch']}"

    def value(self, path: str) -> Any:
        """The entry at `part/key/key`; None where it was not measured."""
        entry: Any = self.results
        for key in path.split("/"):
            entry = entry.get(key) if isinstance(entry, Mapping) else None
        return None if entry == NOT_MEASURED else entry

    def say(self, text: str, *paths: str, scale: float = 1) -> str:
        """The template `text`, filled in with the entries in turn."""
        values = [self.value(path) for path in paths]
        if any(value is None for value in values):
            return NOT_MEASURED
        return text.format(*(value * scale for value in values))


Cell = Callable[[_Column], str]


def _rows(columns: Sequence[_Column]) -> list[tuple[str, Cell]]:
    """What each row is called, and its cell in a column."""
    precisions = sorted({name for column in columns for name in column.value("step") or {}})
    encoders = sorted({name for column in columns for name in column.value("encoder") or {}})
    return [
        (
            "Corruption of a batch beside a loop over its images",
            lambda column: column.say(
                "{:.1f} ms for {} images at {} px, {:.1f} times as fast",
                *(f"corruption/{key}" for key in ("at_once_ms", "batch_size", "image_size", "ratio")),
            ),
        ),
        *(row for precision in precisions for row in _step_rows(precision)),
        *(row for precision in encoders for row in _encoder_rows(precision)),
        ("Peak memory of a pretraining step, beside ViTMAE's on a quarter of the tokens / on all", _memory_cell),
        ("Pretraining step over image sizes", lambda column: _growth_cell(column, "image_size", " px")),
        ("Pretraining step over processes", lambda column: _growth_cell(column, "processes", "")),
        ("Streaming, to the first images and at the peak, over the rows on the disk", _stream_cell),
    ]


def _step_rows(precision: str) -> list[tuple[str, Cell]]:
    step = f"step/{precision}"
    return [
        (
            f"Pretraining step ({precision}) beside the GMML release's",
            lambda column: _beside(column, f"{step}/ours/images_per_s", f"{step}/ratio"),
        ),
        (
            f"The same from stored images on, views included ({precision})",
            lambda column: _beside(column, f"{step}/end_to_end/ours_images_per_s", f"{step}/end_to_end/ratio"),
        ),
        (
            f"Share of a step outside forward, backward and optimiser ({precision})",
            lambda column: column.say("{:.1f} %", f"{step}/outside_share", scale=100),
        ),
        (
            f"Share of a step in matrix products, which both sides have alike ({precision})",
            lambda column: column.say("{:.1f} %", f"{step}/product_share", scale=100),
        ),
        (
            f"Model FLOPs utilisation of the bf16 peak ({precision})",
            lambda column: column.say("{:.1f} %", f"{step}/mfu", scale=100),
        ),
    ]


def _beside(column: _Column, rate: str, ratio: str) -> str:
    return _listed(column.say("{:.1f} images/s", rate), column.say("{:.2f} times as fast", ratio))


def _listed(*words: str) -> str:
    """With commas; where nothing was measured, that is said once."""
    return NOT_MEASURED if set(words) == {NOT_MEASURED} else ", ".join(words)


def _encoder_rows(precision: str) -> list[tuple[str, Cell]]:
    def cell(passes: str) -> Cell:
        place = f"encoder/{precision}/{passes}"

        def words(column: _Column) -> str:
            peers = [column.say("{:.2f}", f"{place}/ratio_{peer}") for peer in ("vit_mae", "timm")]
            ratios = NOT_MEASURED if set(peers) == {NOT_MEASURED} else f"{' / '.join(peers)} times as fast"
            return _listed(column.say("{:.1f} images/s", f"{place}/ours_images_per_s"), ratios)

        return words

    return [
        (f"Encoder forward ({precision}) beside ViTMAE's / timm's", cell("forward")),
        (f"Encoder forward and backward ({precision}) beside ViTMAE's / timm's", cell("forward_backward")),
    ]


def _memory_cell(column: _Column) -> str:
    names = ("ours", "vit_mae", "vit_mae_all_tokens")
    return column.say("{:.2f} GB, {:.2f} / {:.2f} GB", *(f"memory/{name}/peak_mb" for name in names), scale=1e-3)


def _growth_cell(column: _Column, what: str, unit: str) -> str:
    steps = column.value(f"growth/{what}") or {}
    said = []
    for name in steps:
        place = f"growth/{what}/{name}"
        rate, memory = column.say("{:.1f} images/s", f"{place}/images_per_s"), column.value(f"{place}/peak_mb")
        said.append(f"{name}{unit}: {rate}" + (f", {memory / 1e3:.2f} GB" if memory is not None else ""))
    return "; ".join(said) or NOT_MEASURED


def _stream_cell(column: _Column) -> str:
    rows = column.value("growth/rows") or {}
    said = [
        f"{int(name):,}: {column.say('{:.2f} s', f'growth/rows/{name}/start_s')}, "
        f"{column.say('{:.0f} MB', f'growth/rows/{name}/peak_mb')}"
        for name in rows
    ]
    return "; ".join(said) or NOT_MEASURED
