"""Evidence for pretraining: a grid of fine-tunings, frozen-feature probes and short ablations, and its tables.

    python -m training_scripts.benchmarks.evidence --grid training_scripts/recipes/evidence_cpu_112.yaml --data DATA \\
        --output runs/evidence_cpu_112 --results training_scripts/benchmarks/results/evidence_cpu_112.json \\
        --kept training_scripts/benchmarks/results/evidence_cpu_112 --models spcxr=CHECKPOINT
    python -m training_scripts.benchmarks.evidence --render training_scripts/benchmarks/README.md \
        --results training_scripts/benchmarks/results/evidence_cpu_112.json

A cell of the grid is a process (or two, one behind the other) with its own folder under `--output`. A cell that
has its `result.json` is not run again, one that was killed resumes from its checkpoint, so that the command may be
stopped at any time and started again. `--kept` names a folder for the results and predictions of finished cells:
small files that are kept without `--output`. Cells run the cheapest first, all inits of a task, share of the labels and
seed before the next. The results file is rewritten after every cell; cells that were not run are marked.

Settings are chosen on `val`; `test`, `shift` and other hospitals are for the report. `--render` fills every block of a
page that stands between `<!-- evidence -->` and `<!-- /evidence -->`, `<!-- evidence pneumonia -->`, ... and draws the
label-efficiency curves into `--figures`.
"""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spcxr_hf import SpcxrError, SpcxrForPreTraining
from spcxr_hf.files import locked, read_json, write_json
from spcxr_hf.training.arguments import parse_arguments, read_recipe, run_script
from spcxr_hf.training.optim import new_config
from training_scripts.benchmarks.lib.grid import Cell, EnergyMeter, Grid, network_fingerprint, weights_digest
from training_scripts.benchmarks.lib.results import ResultReader, collect, training_costs
from training_scripts.benchmarks.lib.tables import blocks, draw_curves
from training_scripts.benchmarks.lib.timing import describe_machine, replace_block

SCRIPTS = Path(__file__).resolve().parents[1]
PLACES = ("exclude",)  # flags whose values are paths: they are no settings of a result
SECTIONS = ("fine_tuning", "probing", "ablations")


@dataclass
class Arguments:
    """Run the grid of the evidence, or render what it found."""

    grid: str | None = field(default=None, metadata={"help": "YAML file of tasks, shares of labels, seeds and inits"})
    data: str | None = field(default=None, metadata={"help": "Parquet shards"})
    output: str = field(default="runs/evidence", metadata={"help": "folder with a folder for each cell"})
    results: str | None = field(default=None, metadata={"help": "JSON file to write, or to render from"})
    models: list[str] = field(
        default_factory=list, metadata={"help": "name=CHECKPOINT, in place of the grid's `models`"}
    )
    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "name=FOLDER of a pretraining's run, for its cost; a name may be repeated"},
    )
    only: list[str] = field(
        default_factory=list,
        metadata={"help": "run cells whose place begins so: pneumonia/0.01, */1/seed-0, probing, ablations, ..."},
    )
    max_minutes: float | None = field(default=None, metadata={"help": "begin no cell after this time"})
    kept: str | None = field(
        default=None, metadata={"help": "folder that keeps results and predictions; a cell in it is not run again"}
    )
    keep_models: bool = field(default=False, metadata={"help": "keep the weights of finished cells"})
    list_only: bool = field(default=False, metadata={"help": "run nothing; list the cells and their state"})
    cache_folder: str | None = field(default=None, metadata={"help": "folder that keeps the decoded images"})
    device: str = field(default="cpu", metadata={"help": "where finished models are evaluated: cpu or cuda"})
    resamples: int = field(default=1000, metadata={"help": "draws of the bootstrap"})
    render: str | None = field(default=None, metadata={"help": "run nothing; fill the blocks of this page"})
    figures: str | None = field(default=None, metadata={"help": "folder for the curves"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    if arguments.grid is None:
        show(arguments)
        return
    plan = read_plan(arguments)
    cells = list(make_cells(arguments, plan))
    reader = ResultReader(arguments.data or "", plan, arguments.cache_folder, arguments.device)
    kept = Path(arguments.kept) if arguments.kept else None
    grid = Grid(Path(arguments.output), reader.read, prepare, plan.get("jobs", 1), arguments.keep_models, kept)
    if arguments.list_only:
        list_cells(grid, choose(cells, arguments.only))
        return
    with locked(Path(arguments.output)):
        run(arguments, plan, grid, cells)
    if arguments.render or arguments.figures:
        show(arguments)
    if grid.summary.failed:
        raise SpcxrError(f"{len(grid.summary.failed)} cells failed: {', '.join(grid.summary.failed)}")


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late."""
    if arguments.grid is None and not (arguments.results and (arguments.render or arguments.figures)):
        raise SpcxrError("give --grid GRID.yaml to run, or --results FILE.json with --render PAGE or --figures FOLDER")
    if arguments.grid is not None and arguments.data is None:
        raise SpcxrError("--data is missing")
    for name in ("max_minutes", "resamples"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise SpcxrError(f"{name} must be above 0; got {value}")


def run(arguments: Arguments, plan: dict[str, Any], grid: Grid, cells: list[Cell]) -> None:
    """Run the cells that are not finished, and keep the results file up to date."""
    chosen = choose(cells, arguments.only)
    if "jobs" in plan:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // plan["jobs"]))
    deadline = None if arguments.max_minutes is None else time.monotonic() + 60 * arguments.max_minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: running processes are terminated
    publish(arguments, plan, grid, cells)  # also where nothing is left to run
    energy = EnergyMeter()
    with energy:
        summary = grid.run(chosen, deadline, lambda cell: publish(arguments, plan, grid, cells))
    if summary.finished:
        add_energy(Path(arguments.output) / "energy.json", energy, len(summary.finished))
        publish(arguments, plan, grid, cells)
    left = sum(grid.result(cell) is None for cell in chosen if cell.name not in summary.failed)
    print(f"{len(summary.finished)} cells finished now, {len(summary.failed)} failed, {left} are left", flush=True)
    for name in summary.waiting:
        print(f"{name}: waits for its checkpoint, or is run by another process", flush=True)


def publish(arguments: Arguments, plan: dict[str, Any], grid: Grid, cells: list[Cell]) -> None:
    """Write the results file from all finished cells."""
    if arguments.results is None:
        return
    earlier = read_json(Path(arguments.results))
    results = collect(plan, grid, cells, arguments.resamples, earlier)
    named = name_values(arguments.runs, "runs")
    runs = {name: named.get(name, folders) for name, folders in plan["trainings"].items()}
    weights = {name: weights_digest(Path(model_folder(plan, name))) for name in runs}
    trainings = training_costs(runs, weights, earlier)
    energy = read_json(Path(arguments.output) / "energy.json")
    results["cost"] = {"machine": describe_machine(arguments.device), "trainings": trainings, **results["cost"]}
    results["cost"]["energy_wh_of_cells"] = energy.get("watt_hours", "not read")
    write_json(arguments.results, results)


def add_energy(file: Path, energy: EnergyMeter, cells: int) -> None:
    """Add what this start of the grid took to what earlier ones did; one that was not read leaves it unknown."""
    earlier = read_json(file)
    known = energy.watt_hours is not None and earlier.get("watt_hours", 0.0) is not None
    watt_hours = round(earlier.get("watt_hours", 0.0) + energy.watt_hours, 2) if known else None
    write_json(file, {"watt_hours": watt_hours, "cells": earlier.get("cells", 0) + cells})


def show(arguments: Arguments) -> None:
    """Fill the blocks of a page, and draw the curves."""
    file = Path(arguments.results or "")
    results = read_json(file)
    if not results:
        raise SpcxrError(f"{file}: no such results file")
    if arguments.render:
        page = Path(arguments.render)
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        wanted = {name: content for name, content in blocks(results).items() if f"<!-- {name} -->" in text}
        if not wanted:
            raise SpcxrError(
                f"{page}: holds none of the blocks {', '.join(f'<!-- {name} -->' for name in blocks(results))}"
            )
        for name, content in wanted.items():
            replace_block(page, name, content)
    if arguments.figures:
        for path in draw_curves(results, Path(arguments.figures)):
            print(f"drew {path}")


def list_cells(grid: Grid, cells: Sequence[Cell]) -> None:
    """Print every cell in the order in which they run, and whether it is finished."""
    for cell in sorted(cells, key=lambda cell: cell.cost):
        absent = [str(path) for path in cell.needs if not path.exists()]
        unfinished = f"waits for {absent[0]}" if absent else "not run"
        print(f"{cell.name}: {unfinished if grid.result(cell) is None else 'finished'}")


# ---- the grid --------------------------------------------------------------------------------------------------


def read_plan(arguments: Arguments) -> dict[str, Any]:
    """The grid's YAML with the models of the command line in it.

    Raises:
        SpcxrError: a section or a key is missing or unknown.
    """
    path = Path(str(arguments.grid))
    plan = read_recipe(path)
    known = {"name", "setting", "jobs", "launch", "models", "trainings", "compare", *SECTIONS}
    if unknown := sorted(set(plan) - known):
        raise SpcxrError(f"{path}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    if missing := [name for name in ("name", "setting", "compare", "fine_tuning") if name not in plan]:
        raise SpcxrError(f"{path}: no {missing[0]}")
    models = {
        **plan.get("models", {}),
        **{name: words[-1] for name, words in name_values(arguments.models, "models").items()},
    }
    return {"trainings": {}, **plan, "models": models}


def name_values(words: Sequence[str], flag: str) -> dict[str, list[str]]:
    """Of `name=value`, the values by name."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise SpcxrError(f"--{flag} takes name=FOLDER; got {word!r}")
        found.setdefault(name, []).append(value)
    return found


def choose(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells that are asked for.

    Raises:
        SpcxrError: there is none.
    """
    chosen = [cell for cell in cells if is_chosen(cell.name, patterns)]
    if not chosen:
        raise SpcxrError(f"--only {' '.join(patterns)}: no cell is called so; --list_only true alone names them all")
    return chosen


def is_chosen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a cell is asked for; the section `fine_tuning` need not be said."""
    names = [name, name.removeprefix("fine_tuning/")]
    return not patterns or any(
        fnmatch.fnmatchcase(one, pattern) or fnmatch.fnmatchcase(one, f"{pattern}/*")
        for one in names
        for pattern in patterns
    )


def make_cells(arguments: Arguments, plan: Mapping[str, Any]) -> Iterator[Cell]:
    """Every cell of the grid."""
    yield from fine_tuning_cells(arguments, plan)
    if "probing" in plan:
        yield from probing_cells(arguments, plan)
    if "ablations" in plan:
        yield from ablation_cells(arguments, plan)


def fine_tuning_cells(arguments: Arguments, plan: Mapping[str, Any]) -> Iterator[Cell]:
    """A fine-tuning for each task, share of the labels, seed and init."""
    section = plan["fine_tuning"]
    for place, (task, spec) in enumerate(section["tasks"].items()):
        for fraction, shared in section["fractions"].items():
            own = {**section.get("settings", {}), **spec.get("settings", {}), **shared}
            own |= spec.get("fractions", {}).get(fraction, {})
            seeds = own.pop("seeds")
            for turn, seed in enumerate(seeds):
                for number, (init, flags) in enumerate(section["inits"].items()):
                    name = f"fine_tuning/{task}/{fraction:g}/seed-{seed}/{init}"
                    settings = {**own, **flags, "label_fraction": fraction, "seed": seed, "classes": spec["classes"]}
                    settings |= {"label_column": spec["label_column"], "split_column": spec["split_column"]}
                    folder = Path(arguments.output) / name
                    flags_of_run = {"data": arguments.data, "output": str(folder / "run")}
                    flags_of_run |= {"cache_folder": arguments.cache_folder, "exclude": spec.get("exclude")}
                    yield make_cell(
                        plan,
                        name,
                        [("finetune_classification.py", {**settings, **flags_of_run}, True)],
                        (own["steps"] * own["batch_size"], turn, place, number),
                        {
                            "section": "fine_tuning",
                            "task": task,
                            "fraction": f"{fraction:g}",
                            "seed": seed,
                            "init": init,
                        },
                    )


def probing_cells(arguments: Arguments, plan: Mapping[str, Any]) -> Iterator[Cell]:
    """Linear probe and k-NN on frozen features, for each group of tasks that share their columns."""
    section = plan["probing"]
    for place, (group, own) in enumerate(section["groups"].items()):
        for turn, method in enumerate(section["methods"]):
            for number, (model, flags) in enumerate(section["models"].items()):
                name = f"probing/{group}/{method}/{model}"
                file = Path(arguments.output) / name / "probe.json"
                settings = {**section.get("settings", {}), **own, **flags, "method": method}
                places = {"data": arguments.data, "output": str(file), "cache": arguments.cache_folder}
                yield make_cell(
                    plan,
                    name,
                    [("linear_probe.py", {**settings, **places}, False)],
                    (section.get("cost", 0), place, turn, number),
                    {"section": "probing", "group": group, "method": method, "model": model},
                )


def ablation_cells(arguments: Arguments, plan: Mapping[str, Any]) -> Iterator[Cell]:
    """Short pretrainings, each other in one thing, and linear probes of what came out."""
    section = plan["ablations"]
    for place, (variant, change) in enumerate(section["variants"].items()):
        name = f"ablations/{variant}"
        folder = Path(arguments.output) / name
        change = dict(change or {})
        config = change.pop("config", None)
        places = {"data": arguments.data, "output": str(folder / "run"), "cache_folder": arguments.cache_folder}
        pretraining = {**section["pretraining"], **change, **places}
        if config is not None:
            pretraining["init_from"] = str(folder / "init")
        commands: list[tuple[str, dict, bool]] = [("pretrain.py", pretraining, True)]
        for probe, flags in section["probes"].items():
            own = {"model": str(folder / "run" / "final"), "data": arguments.data, "cache": arguments.cache_folder}
            own["output"] = str(folder / f"probe-{probe}.json")
            commands.append(("linear_probe.py", {**flags, **own}, False))
        about = {"section": "ablations", "variant": variant, "probes": list(section["probes"])}
        about["config"] = None if config is None else {**section["pretraining"], **(config or {})}
        yield make_cell(plan, name, commands, (section.get("cost", 1 << 40), place), about | {"change": config})


def make_cell(
    plan: Mapping[str, Any],
    name: str,
    commands: Sequence[tuple[str, dict[str, Any], bool]],
    cost: tuple,
    about: dict[str, Any],
) -> Cell:
    """A cell of commands: script, flags, and whether it is a training, which `launch` starts.

    A value `$name` stands for the checkpoint of that name among the plan's `models`.
    """
    words: list[list[str]] = []
    settings: dict[str, Any] = {}
    needs: list[Path] = []
    for script, flags, trains in commands:
        resolved, own = {}, {}
        for flag, value in flags.items():
            is_model = isinstance(value, str) and value.startswith("$")
            resolved[flag] = model_folder(plan, value[1:]) if is_model else value
            if is_model:
                needs.append(Path(resolved[flag]))
                own[flag] = name_model(value[1:], Path(resolved[flag]), flags)
            elif flag not in ("data", "output", "cache", "cache_folder", "init_from", "model", *PLACES):
                own[flag] = value
        launch = plan.get("launch", []) if trains else []
        words.append([sys.executable, *launch, str(SCRIPTS / script), *as_flags(resolved)])
        settings |= own if len(commands) == 1 else {f"{script} {len(words)}": own}
    return Cell(
        name, words, settings | ({"config": about["change"]} if about.get("change") else {}), cost, needs, about
    )


def name_model(name: str, folder: Path, flags: Mapping[str, Any]) -> str:
    """What a cell depends on of a checkpoint: its weights, or its network alone where these are drawn anew."""
    if flags.get("from_scratch") or flags.get("random_init"):
        return f"network of {name} {network_fingerprint(folder)}"
    return f"{name} {weights_digest(folder)}"


def model_folder(plan: Mapping[str, Any], name: str) -> str:
    if name not in plan["models"]:
        raise SpcxrError(f"no model is called {name!r}; give --models {name}=CHECKPOINT")
    return plan["models"][name]


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line; what is None is left out."""
    words = []
    for name, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(str(item) for item in items)]
    return words


def prepare(cell: Cell, folder: Path) -> None:
    """Of an ablation that changes the network, its random weights, drawn as `pretrain.py` draws them."""
    recipe = cell.about.get("config")
    if recipe is None or (folder / "init").is_dir():
        return
    torch.manual_seed(recipe.get("seed", 0))
    config = new_config(recipe["size"], image_size=recipe["image_size"], **cell.about["change"])
    SpcxrForPreTraining(config).save_pretrained(folder / "init")


if __name__ == "__main__":
    run_script(main)
