"""From the cells of the grid to its results file: predictions of finished models, figures, differences, cost."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import decode_images
from spcxr_hf.errors import SpcxrError
from spcxr_hf.models.loading import label_names
from spcxr_hf.training.run_report import read_cost
from training_scripts.benchmarks.lib.grid import NOT_THERE, PREDICTIONS, Cell, Grid, weights_digest
from training_scripts.benchmarks.lib.predictions import (
    METHOD,
    Predictions,
    Report,
    as_reported,
    compare,
    figures,
    load_classifier,
    patient_weights,
    predict,
    read_predictions,
    summarise,
    write_predictions,
)
from training_scripts.benchmarks.lib.tables import goals

Plan = Mapping[str, Any]
Draws = dict[str, np.ndarray]  # figure -> (resamples + 1,)


def report_of(spec: Mapping[str, Any], change: Mapping[str, Any]) -> Report:
    """A report of a task: what the task says of its rows, and what this report says else.

    Raises:
        SpcxrError: a key is unknown or missing.
    """
    values = {name: spec[name] for name in ("label_column", "split_column", "classes")} | dict(change)
    try:
        pairs = [str(word).partition("=") for word in values.pop("classes")]
        classes = {name: labels.split("+") if labels else [name] for name, _, labels in pairs}
        return Report(classes=classes, **values)
    except TypeError as error:
        raise SpcxrError(f"a report of the grid is wrong ({error})") from error


# ---- a finished cell -----------------------------------------------------------------------------------------------


class ResultReader:
    """Reads what a cell's processes left; of a fine-tuned model, its predictions on every report of its task.

    Args:
        data: The set.
        plan: The grid.
        cache_folder: Where decoded images are kept.
        device: Where models run.
    """

    def __init__(self, data: str, plan: Plan, cache_folder: str | None = None, device: str = "cpu"):
        self.data, self.plan, self.cache_folder, self.device = data, plan, cache_folder, device
        self._rows: dict[tuple[str, str], tuple[Report, torch.Tensor, Predictions]] = {}
        self._lock = threading.Lock()

    def read(self, cell: Cell, folder: Path) -> dict:
        """The result of a cell, by its section."""
        if cell.about["section"] == "fine_tuning":
            return self._read_fine_tuning(cell, folder)
        if cell.about["section"] == "probing":
            return {"tasks": _tasks(folder / "probe.json")}
        probes = {name: _tasks(folder / f"probe-{name}.json") for name in cell.about["probes"]}
        shutil.rmtree(folder / "init", ignore_errors=True)
        return {"probes": probes, "cost": read_cost([str(folder / "run")])}

    def _read_fine_tuning(self, cell: Cell, folder: Path) -> dict:
        task, settings = cell.about["task"], cell.settings
        model, processor = load_classifier(
            str(folder / "run" / "final"), self.device, settings.get("attention", "sdpa")
        )
        names = label_names(model.config)
        bf16 = settings.get("mixed_precision") == "bf16"
        found = {}
        for name in self.plan["fine_tuning"]["tasks"][task]["reports"]:
            report, images, rows = self._load(task, name)
            probabilities = as_reported(predict(model, processor, images, bf16), names, report)
            found[name] = Predictions(rows.ids, rows.patients, rows.groups, rows.labels, probabilities)
        write_predictions(folder / PREDICTIONS, found)
        result = _read(folder / "run" / "results.json")
        told = {name: result.get(name) for name in ("images", "train_images_by_class", "step", "val")}
        return {**told, "cost": read_cost([str(folder / "run")])}

    def _load(self, task: str, name: str) -> tuple[Report, torch.Tensor, Predictions]:
        """The rows of a report, decoded once."""
        with self._lock:
            if (task, name) not in self._rows:
                section = self.plan["fine_tuning"]
                spec = section["tasks"][task]
                report = report_of(spec, spec["reports"][name])
                rows, labels = report.select(read_set(self.data, spec.get("exclude")))
                size = section.get("settings", {}).get("stored_size", 256)
                unknown: list[Any] = [None] * len(rows)
                patients = rows.column("patient") if "patient" in rows.rows.column_names else unknown
                groups = rows.column(report.within[0]) if report.within else unknown
                empty = Predictions(rows.ids, patients, groups, labels, np.empty(0))
                self._rows[task, name] = report, decode_images(rows, size, self.cache_folder), empty
            return self._rows[task, name]


def _tasks(path: Path) -> dict[str, Any]:
    """What `linear_probe.py` found, without its seeds one by one."""
    found = {}
    for task, entry in _read(path)["tasks"].items():
        fractions = {
            fraction: {name: value for name, value in figures.items() if name != "seeds"}
            for fraction, figures in entry["label_fraction"].items()
        }
        found[task] = {"metric": entry["metric"], "label_fraction": fractions}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpcxrError(f"{path}: no results ({error})") from error


def training_costs(
    runs: Mapping[str, Sequence[str]], weights: Mapping[str, str], earlier: Mapping[str, Any]
) -> dict[str, dict[str, Any] | None]:
    """Cost of each checkpoint's training, by the folders of its runs, and its "weights".

    Args:
        runs: Name of a checkpoint -> folders.
        weights: Name of a checkpoint -> its `weights_digest`.
        earlier: What the results file held before. A checkpoint whose runs are not here keeps its cost from there,
            unless it has other weights by now.
    """
    known = earlier.get("cost", {}).get("trainings", {})
    found: dict[str, dict[str, Any] | None] = {}
    for name, folders in runs.items():
        cost, before = read_cost(folders), known.get(name)
        if cost is not None:
            found[name] = {**cost, "weights": weights[name]}
        else:
            found[name] = before if before and weights[name] in (before["weights"], NOT_THERE) else None
    return found


# ---- all cells -----------------------------------------------------------------------------------------------------

_drawn: dict[tuple[str, str, int], Draws] = {}  # of cells that were read before: their files do not change


def collect(
    plan: Plan, grid: Grid, cells: Sequence[Cell], resamples: int = 1000, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The results file of the cells that are finished.

    Args:
        earlier: What the file held before. A setting without cells here keeps the figures that it has there.
    """
    found = {cell.name: result for cell in cells if (result := grid.result(cell)) is not None}
    section = plan["fine_tuning"]
    results: dict[str, Any] = {
        "grid": plan["name"],
        "setting": plan["setting"],
        "method": f"{METHOD} {resamples} resamples.",
        "compare": plan["compare"],
        "inits": list(section["inits"]),
        "cells": {"finished": len(found), "missing": len(cells) - len(found), "carried_over": 0},
        "fine_tuning": {
            task: _collect_task(
                plan, grid, [cell for cell in cells if cell.about.get("task") == task], found, resamples
            )
            for task in section["tasks"]
        },
    }
    results["probing"] = _collect_probes(plan, cells, found)
    results["ablations"] = _collect_ablations(plan, cells, found)
    results["cost"] = {"cells": _collect_minutes(cells, found)}
    results["weights"] = weights_digest(Path(plan["models"].get(plan["compare"]["ours"], "")))
    if earlier and (earlier.get("grid"), earlier.get("weights", results["weights"])) == (
        plan["name"],
        results["weights"],
    ):
        _carry_over(results, earlier)
    results["goals"] = goals(results)
    return results


def _carry_over(results: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Fill settings and sections whose cells are gone from an earlier results file of the same grid and weights."""
    carried = 0
    here, before = results["cost"]["cells"], earlier["cost"]["cells"]
    for section in ("fine_tuning", "probing", "ablations"):
        if section in here and section in before and not here[section]["cells"]:
            here[section] = before[section]
            if section != "fine_tuning":  # whose settings are looked at one by one
                results[section] = earlier[section]
                carried += before[section]["cells"]
    for task, entry in results["fine_tuning"].items():
        known = earlier["fine_tuning"].get(task, {}).get("fractions", {})
        for fraction, setting in entry["fractions"].items():
            before = sum(len(init["finished"]) for init in known.get(fraction, {}).get("inits", {}).values())
            if before and not any(init["finished"] for init in setting["inits"].values()):
                entry["fractions"][fraction] = known[fraction]
                carried += before
    results["cells"]["carried_over"] = carried
    results["cells"]["missing"] -= carried


def _collect_task(
    plan: Plan, grid: Grid, cells: Sequence[Cell], found: Mapping[str, dict], resamples: int
) -> dict[str, Any]:
    """One task: every share of the labels, every init."""
    spec = plan["fine_tuning"]["tasks"][cells[0].about["task"]]
    reports = {name: report_of(spec, change) for name, change in spec["reports"].items()}
    fractions = {
        fraction: _collect_setting(
            plan, grid, [cell for cell in cells if cell.about["fraction"] == fraction], found, reports, resamples
        )
        for fraction in dict.fromkeys(cell.about["fraction"] for cell in cells)
    }
    asked = {name: list(spec["reports"][name].get("tell", _figure_names(report))) for name, report in reports.items()}
    main = next(iter(reports))
    peer_tasks = spec.get("peer_tasks", {cells[0].about["task"]: main})
    if unknown := sorted(set(peer_tasks.values()) - set(reports)):
        raise SpcxrError(f"peer_tasks of {cells[0].about['task']}: there is no report {unknown[0]!r}")
    return {"main": main, "reports": asked, "peer_tasks": peer_tasks, "fractions": fractions}


def _figure_names(report: Report) -> list[str]:
    names = [f"recall_{name}" for name in report.recall] + (["within_auroc"] if report.within else [])
    return names or ["balanced_accuracy", "auroc"]


def _collect_setting(
    plan: Plan,
    grid: Grid,
    cells: Sequence[Cell],
    found: Mapping[str, dict],
    reports: Mapping[str, Report],
    resamples: int,
) -> dict[str, Any]:
    """One task and share of the labels: figures of every init, and the differences."""
    drawn: dict[str, dict[int, dict[str, Draws]]] = {}
    entry: dict[str, Any] = {"labels": None, "steps": cells[0].settings["steps"], "inits": {}, "differences": {}}
    for cell in cells:
        init, seed = cell.about["init"], cell.about["seed"]
        state = entry["inits"].setdefault(init, {"finished": [], "missing": [], "reports": {}})
        state["finished" if cell.name in found else "missing"].append(seed)
        if cell.name in found:
            entry["labels"] = found[cell.name]["images"]["train"]
            drawn.setdefault(init, {})[seed] = _draw(grid, cell, reports, resamples)
    for init, runs in drawn.items():
        for name in reports:
            entry["inits"][init]["reports"][name] = summarise({seed: one[name] for seed, one in runs.items()})
    names = plan["compare"]
    for other in (names["floor"], names["peer"]):
        pair = [drawn.get(one, {}) for one in (names["ours"], other)]
        sides = {name: [{seed: one[name] for seed, one in side.items()} for side in pair] for name in reports}
        differences = {name: compare(both[0], both[1]) for name, both in sides.items()}
        if any(differences.values()):
            entry["differences"][f"{names['ours']} - {other}"] = differences
    return entry


def _draw(grid: Grid, cell: Cell, reports: Mapping[str, Report], resamples: int) -> dict[str, Draws]:
    """The figures of a finished cell on every report and resample; the same patients are drawn for every cell."""
    path = grid.home(cell) / PREDICTIONS
    missing = [name for name in reports if (str(path), name, resamples) not in _drawn]
    predictions = read_predictions(path) if missing else {}
    for name in missing:
        if name not in predictions:
            raise SpcxrError(f"{path}: no predictions for the report {name!r}; delete the cell to run it again")
        found = predictions[name]
        weights = patient_weights(found.patients, resamples)
        _drawn[str(path), name, resamples] = figures(found, reports[name], weights)
    return {name: _drawn[str(path), name, resamples] for name in reports}


def _collect_probes(plan: Plan, cells: Sequence[Cell], found: Mapping[str, dict]) -> dict[str, Any]:
    """model -> method -> task -> share of the labels -> figures."""
    if "probing" not in plan:
        return {}
    section = plan["probing"]
    results: dict[str, Any] = {}
    metrics: dict[str, str] = dict.fromkeys(section.get("tasks", ()), "")
    fractions: dict[str, None] = {}
    for cell in cells:
        if cell.about["section"] != "probing" or cell.name not in found:
            continue
        for task, entry in found[cell.name]["tasks"].items():
            place = results.setdefault(cell.about["model"], {}).setdefault(cell.about["method"], {})
            place[task] = entry["label_fraction"]
            metrics[task] = entry["metric"]
            fractions |= dict.fromkeys(entry["label_fraction"])
    names = {"models": list(section["models"]), "methods": list(section["methods"])}
    return {**names, "tasks": metrics, "fractions": sorted(fractions, key=float), "results": results}


def _collect_ablations(plan: Plan, cells: Sequence[Cell], found: Mapping[str, dict]) -> dict[str, Any]:
    """variant -> task and probe -> mean on val: ablations choose, so they read no test images."""
    if "ablations" not in plan:
        return {}
    variants: dict[str, Any] = {}
    names: dict[str, None] = {}
    for cell in cells:
        if cell.about["section"] != "ablations":
            continue
        variants[cell.about["variant"]] = None
        if cell.name in found:
            values = {
                f"{task}, {probe}, {100 * float(fraction):g} % of the labels": figures["val"]["mean"]
                for probe, tasks in found[cell.name]["probes"].items()
                for task, entry in tasks.items()
                for fraction, figures in entry["label_fraction"].items()
            }
            variants[cell.about["variant"]] = values
            names |= dict.fromkeys(values)
    return {"setting": plan["ablations"]["setting"], "tasks": list(names), "variants": variants}


def _collect_minutes(cells: Sequence[Cell], found: Mapping[str, dict]) -> dict[str, Any]:
    """Minutes of the finished cells of every section (several ran at a time on one machine)."""
    taken: dict[str, Any] = {}
    for cell in cells:
        entry = taken.setdefault(cell.about["section"], {"cells": 0, "minutes": 0.0, "training_minutes": 0.0})
        if cell.name in found:
            cost = found[cell.name].get("cost") or {}
            entry["cells"] += 1
            entry["minutes"] = round(entry["minutes"] + found[cell.name]["minutes"], 2)
            entry["training_minutes"] = round(entry["training_minutes"] + cost.get("minutes", 0.0), 2)
    return taken
