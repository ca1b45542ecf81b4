"""The grid of the evidence: cells that may be killed, paired predictions, figures by hand, tables without guesses."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining
from spcxr_hf.data.table import read_table
from spcxr_hf.evaluation import metrics
from spcxr_hf.training.optim import StepLog
from spcxr_hf.training.run_report import read_cost
from tests.made_up import write_set
from training_scripts import finetune_classification, linear_probe, pretrain
from training_scripts.benchmarks import evidence
from training_scripts.benchmarks.lib import grid, tables
from training_scripts.benchmarks.lib import predictions as evidence_flow
from training_scripts.benchmarks.lib.grid import Cell, EnergyMeter, Grid
from training_scripts.benchmarks.lib.predictions import Predictions, Report
from training_scripts.benchmarks.lib.results import training_costs

SCRIPTS = Path(evidence.__file__).parents[1]
ROOT = SCRIPTS.parent
GRIDS = sorted((SCRIPTS / "recipes").glob("evidence_*.yaml"))
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SPLITS = ["train"] * 18 + ["val"] * 9 + ["test"] * 12
MODULES = {
    f"{module.__name__.rpartition('.')[2]}.py": module for module in (finetune_classification, linear_probe, pretrain)
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


# ---- figures and intervals ---------------------------------------------------------------------------------------


def predictions(rows: int = 60, classes: int = 3, seed: int = 0, groups: int = 2) -> Predictions:
    drawn = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    logits = drawn.normal(size=(rows, classes)).round(1) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    patients = [None if row % 7 == 0 else f"patient-{row // 2}" for row in range(rows)]
    return Predictions([f"row-{row}" for row in range(rows)], patients, [f"at {row % groups}" for row in range(rows)],
                       labels, probabilities)  # fmt: skip


REPORT = Report("label", "split", "test", {name: [name] for name in "abc"}, recall=["b"], within=("source", "a", "b"))


def test_figures_are_those_of_the_report_for_classifiers():
    found = predictions()
    ours = evidence_flow.figures(found, REPORT, np.ones((1, 60)))
    theirs = metrics.classification_report(found.probabilities, found.labels, list("abc"), resamples=1)
    assert ours["accuracy"][0] == pytest.approx(theirs["accuracy"])
    assert ours["balanced_accuracy"][0] == pytest.approx(theirs["balanced_accuracy"])
    assert ours["auroc"][0] == pytest.approx(theirs["macro_auroc"])
    assert ours["recall_b"][0] == pytest.approx(theirs["classes"]["b"]["accuracy"])


def test_a_weight_is_a_row_that_stands_several_times():
    found = predictions()
    weights = evidence_flow.patient_weights(found.patients, 5)
    figures = evidence_flow.figures(found, REPORT, weights)
    for draw in range(6):
        rows = np.repeat(np.arange(60), weights[draw].astype(int))
        repeated = Predictions([found.ids[row] for row in rows], [found.patients[row] for row in rows],
                               [found.groups[row] for row in rows], found.labels[rows],
                               found.probabilities[rows])  # fmt: skip
        by_hand = evidence_flow.figures(repeated, REPORT, np.ones((1, len(rows))))
        for name, values in figures.items():
            assert values[draw] == pytest.approx(by_hand[name][0]), name


def test_auroc_with_ties_beside_scikit_learn():
    drawn = np.random.default_rng(1)
    scores, positive = drawn.integers(0, 5, 40) / 4, drawn.random(40) < 0.4
    found = evidence_flow.weighted_auroc(scores, positive, np.ones((1, 40)))[0]
    assert found == pytest.approx(metrics.auroc(scores, positive.astype(float)))
    assert math.isnan(evidence_flow.weighted_auroc(scores, positive, np.ones((1, 40)) * positive)[0])


def test_within_a_source():
    """A model that tells the sources apart and nothing else has no AUROC within them."""
    groups, labels = ["x"] * 6 + ["y"] * 6, np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0])
    score = np.where(np.array(groups) == "y", 0.9, 0.1)
    found = Predictions([""] * 12, [None] * 12, groups, labels, np.stack([1 - score, score], axis=1))
    report = Report("l", "s", "t", {"a": ["a"], "b": ["b"]}, within=("source", "a", "b"))
    figures = evidence_flow.figures(found, report, np.ones((1, 12)))
    assert figures["auroc"][0] > 0.8
    assert figures["within_auroc"][0] == 0.5


def test_patients_are_drawn_whole_and_alike_for_every_model():
    patients = ["a", "a", None, None, "b"]
    weights = evidence_flow.patient_weights(patients, 300)
    assert weights.shape == (301, 5) and (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert not (weights[:, 2] == weights[:, 3]).all()  # two rows of unknown patients are two patients
    assert np.array_equal(weights, evidence_flow.patient_weights(patients, 300))


def test_intervals_hold_patients_and_seeds():
    one = {0: {"x": np.array([0.5, *np.linspace(0.4, 0.6, 999)])}}
    alone = evidence_flow.summarise(one)["x"]
    assert alone["sd"] is None and alone["mean"] == 0.5
    assert alone["ci95"] == pytest.approx([0.405, 0.595], abs=1e-3)
    flat = {seed: {"x": np.full(1001, value)} for seed, value in enumerate((0.2, 0.5, 0.8))}
    seeds = evidence_flow.summarise(flat)["x"]  # patients add nothing here: seeds alone
    assert seeds["mean"] == pytest.approx(0.5) and seeds["sd"] == pytest.approx(0.3)
    assert seeds["ci95"] == pytest.approx([0.2, 0.8], abs=0.11) and seeds["ci95"][0] < 0.35


def test_a_difference_is_paired():
    """What patients and seeds have in common drops out of a difference."""
    drawn = np.random.default_rng(0)
    theirs = {seed: {"x": drawn.normal(0.6, 0.1, 1001)} for seed in (0, 1, 2)}
    ours = {seed: {"x": theirs[seed]["x"] + 0.05} for seed in (0, 1)}
    difference = evidence_flow.compare(ours, theirs)["x"]
    assert difference["ci95"] == pytest.approx([0.05, 0.05]) and list(difference["seeds"]) == ["0", "1"]
    assert evidence_flow.compare(ours, {5: theirs[0]}) == {}


def test_reports_select_their_rows(tmp_path):
    path = write_set(tmp_path / "set.parquet", ["test"] * 6)
    table = pq.read_table(path).append_column("findings", pa.array([[], ["Mass"], [], None, ["Edema"], []]))
    pq.write_table(table, path)
    report = Report("findings", "lung_split", "test", {"normal": ["normal"], "sick": ["abnormal"]}, negative="normal")
    rows, labels = report.select(read_table(path))
    assert rows.ids == ["row-0", "row-1", "row-2", "row-4", "row-5"] and labels.tolist() == [0, 1, 0, 1, 0]
    three = np.array([[0.2, 0.5, 0.3]])
    merged = evidence_flow.as_reported(three, ["normal", "bacterial", "viral"], report)
    assert merged.tolist() == [pytest.approx([0.2, 0.8])]
    ordered = Report("l", "s", "t", {"viral": [], "normal": [], "bacterial": []})
    assert evidence_flow.as_reported(three, ["normal", "bacterial", "viral"], ordered).tolist() == [[0.3, 0.2, 0.5]]
    with pytest.raises(SpcxrError, match="no class 'normal'"):
        evidence_flow.as_reported(three, ["a", "b", "c"], report)


def test_predictions_are_kept_exactly(tmp_path):
    kept = {"test": predictions(seed=1), "shift": predictions(9, seed=2)}
    evidence_flow.write_predictions(tmp_path / "p.parquet", kept)
    found = evidence_flow.read_predictions(tmp_path / "p.parquet")
    assert list(found) == ["test", "shift"]
    for name in kept:
        assert (found[name].probabilities == kept[name].probabilities).all()
        assert found[name].patients == kept[name].patients and found[name].ids == kept[name].ids
    numbered = dataclasses.replace(kept["test"], patients=list(range(len(kept["test"].ids))))
    evidence_flow.write_predictions(tmp_path / "p.parquet", {"test": numbered})
    assert evidence_flow.read_predictions(tmp_path / "p.parquet")["test"].patients[:2] == ["0", "1"]
    with pytest.raises(SpcxrError, match="no predictions"):
        evidence_flow.read_predictions(tmp_path / "other.parquet")


# ---- cells -------------------------------------------------------------------------------------------------------


def cell(name: str, code: str = "pass", cost: int = 0, **more) -> Cell:
    return Cell(name, [[sys.executable, "-c", code]], {"code": code}, (cost,), **more)


def runner(folder: Path, **options) -> Grid:
    return Grid(folder, lambda cell, place: {"read": cell.name}, **options)


def test_cells_run_once_and_the_cheapest_first(tmp_path):
    code = f"open({str(tmp_path / 'order')!r}, 'a').write('{{}} ')"
    cells = [cell(f"cell/{cost}", code.format(cost), cost) for cost in (3, 1, 2)]
    assert runner(tmp_path / "out").run(cells).finished == ["cell/1", "cell/2", "cell/3"]
    assert runner(tmp_path / "out").run(cells).finished == []
    assert (tmp_path / "order").read_text() == "1 2 3 "
    assert runner(tmp_path / "out").result(cells[0])["read"] == "cell/3"


def test_weights_go_and_figures_stay(tmp_path):
    code = (
        "from pathlib import Path; f = Path({!r}); (f / 'run/checkpoint-3').mkdir(parents=True);"
        "[(f / n).write_text('') for n in ('run/model.safetensors', 'run/checkpoint-3/x', 'run/log.csv')]"
    )
    for keep in (False, True):
        out = tmp_path / str(keep)
        runner(out, keep_models=keep).run([cell("a", code.format(str(out / "a")))])
        assert (out / "a/run/model.safetensors").exists() == keep == (out / "a/run/checkpoint-3").exists()
        assert (out / "a/run/log.csv").is_file()


def test_a_cell_that_fails_is_named_and_the_others_run(tmp_path, capsys):
    broken = cell("broken", "import sys; print('no such thing'); sys.exit(3)")
    grid = runner(tmp_path)
    tally = grid.run([broken, cell("fine", cost=1)])
    assert tally.finished == ["fine"]
    assert "status 3: no such thing" in tally.failed["broken"] and "status 3" in capsys.readouterr().out
    assert grid.result(broken) is None
    assert runner(tmp_path).run([cell("broken", broken.settings["code"])]).failed  # tried again


def test_other_settings_are_refused(tmp_path):
    runner(tmp_path).run([cell("a")])
    grid = runner(tmp_path)
    tally = grid.run([cell("a", "print()")])
    assert "code: pass, now print()" in tally.failed["a"]
    with pytest.raises(SpcxrError, match="delete it"):
        grid.result(cell("a", "print()"))


def test_cells_wait_for_their_checkpoint(tmp_path):
    late = cell("a", needs=[tmp_path / "checkpoint"])
    assert runner(tmp_path / "out").run([late]).waiting == ["a"]
    (tmp_path / "checkpoint").mkdir()
    assert runner(tmp_path / "out").run([late]).finished == ["a"]


def test_a_finished_cell_needs_its_checkpoint_no_more(tmp_path):
    """Where the weights are missing, the name of the checkpoint must be the same: its digest cannot be looked at."""
    folder = tmp_path / "checkpoint"
    settings = {"init_from": "mae 1234abcd"}
    here = dataclasses.replace(cell("a"), settings=settings)
    assert runner(tmp_path / "out").run([here]).finished == ["a"]
    elsewhere = dataclasses.replace(here, settings={"init_from": "mae not there"}, needs=[folder])
    grid = runner(tmp_path / "out")
    assert grid.result(elsewhere) == grid.result(here)
    assert grid.run([elsewhere]).waiting == []
    other = dataclasses.replace(here, settings={"init_from": "spcxr not there"}, needs=[folder])
    with pytest.raises(SpcxrError, match="init_from: mae 1234abcd, now spcxr not there"):
        grid.result(other)


def test_no_cell_begins_behind_the_deadline(tmp_path):
    assert runner(tmp_path).run([cell("a")], deadline=time.monotonic() - 1).finished == []


def test_two_runners_share_the_cells(tmp_path):
    """A lock goes to the cell's process: while it lives, no other runner touches the cell."""
    slow = cell("a", "import time; time.sleep(20)")
    first = runner(tmp_path)
    thread = __import__("threading").Thread(target=first.run, args=([slow],))
    thread.start()
    while not first._children:
        time.sleep(0.02)
    assert runner(tmp_path).run([slow]).waiting == ["a"]
    first.stop()
    thread.join(10)
    assert "stopped" in first.summary.failed["a"] and first.result(slow) is None


def test_cells_at_a_time(tmp_path):
    """Each waits until all three have begun."""
    begun = tmp_path / "begun"
    begun.mkdir()
    code = f"import os, time; open(os.path.join({str(begun)!r}, '{{}}'), 'w').close(); end = time.time() + 120\n"
    code += f"while len(os.listdir({str(begun)!r})) < 3: assert time.time() < end; time.sleep(0.02)"
    cells = [cell(f"{number}", code.format(number)) for number in range(3)]
    assert len(runner(tmp_path / "out", jobs=3).run(cells).finished) == 3


def test_energy_is_read_or_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RAPL", tmp_path)
    monkeypatch.setattr(grid.shutil, "which", lambda name: None)
    with EnergyMeter() as meter:
        pass
    assert meter.watt_hours is None
    domain = tmp_path / "intel-rapl:0"
    domain.mkdir()
    (domain / "max_energy_range_uj").write_text("10000000000\n")
    (domain / "energy_uj").write_text("9000000000\n")
    with EnergyMeter() as meter:
        (domain / "energy_uj").write_text("2600000000\n")  # the counter began anew
    assert meter.watt_hours == 1.0  # 3,600 J


def test_costs_of_runs_add_up(tmp_path):
    for name, seconds in (("a", 60), ("b", 120)):
        (tmp_path / name).mkdir()
        page = f"| optimiser steps | 10 |\n| images per step | 6 |\n| seconds | {seconds} |\n"
        page += f"| processes | 2{', sharded' * (name == 'b')} |\n| device | cpu |\n"
        (tmp_path / name / "report.md").write_text(page)
    cost = read_cost([str(tmp_path / "a"), str(tmp_path / "b")])
    assert cost == {"device": "cpu", "processes": 2, "minutes": 3.0, "images": 120, "images_per_second": 0.67}
    assert read_cost([str(tmp_path / "a"), str(tmp_path / "none")]) is None is read_cost([])


def test_costs_outlive_the_folders_of_their_runs(tmp_path):
    known = {"device": "cpu", "minutes": 1.0, "weights": "12345678"}
    earlier = {"cost": {"trainings": {"spcxr": known}}}
    gone = {"spcxr": [str(tmp_path / "gone")], "mae": []}
    weights = {"spcxr": "12345678", "mae": "not there"}
    assert training_costs(gone, weights, earlier) == {"spcxr": known, "mae": None}
    assert training_costs(gone, weights | {"spcxr": "not there"}, earlier)["spcxr"] == known
    assert training_costs(gone, weights | {"spcxr": "87654321"}, earlier)["spcxr"] is None  # trained anew meanwhile
    assert training_costs(gone, weights, {}) == {"spcxr": None, "mae": None}
    run = tmp_path / "run"
    run.mkdir()
    rows = {"optimiser steps": 10, "images per step": 6, "seconds": 60, "processes": 2, "device": "cuda"}
    (run / "report.md").write_text("".join(f"| {name} | {value} |\n" for name, value in rows.items()))
    here = training_costs({"spcxr": [str(run)]}, weights, earlier)["spcxr"]
    assert here is not None and here["device"] == "cuda" and here["weights"] == "12345678"  # it comes first


# ---- the whole thing on made-up radiographs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = write_set(tmp_path_factory.mktemp("set") / "set.parquet", SPLITS)
    table = pq.read_table(path)
    findings = [[] if row % 2 else ["Pneumonia"] for row in range(len(SPLITS))]
    table = table.append_column("findings", pa.array(findings)).append_column("findings_split", pa.array(SPLITS))
    pq.write_table(table, path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    SpcxrForPreTraining(SpcxrConfig(**TINY, image_size=32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**TINY, **decoder, image_size=32, patch_size=16, num_channels=1, decoder_intermediate_size=64)
    ViTMAEForPreTraining(config).save_pretrained(folder)
    return str(folder)


def small_plan() -> dict:
    """The grid of the tree, made small."""
    plan = yaml.safe_load(GRIDS[0].read_text(encoding="utf-8"))
    fine_tuning = plan["fine_tuning"]
    fine_tuning["settings"] |= {"image_size": 32, "stored_size": 40, "mixed_precision": "no", "micro_batch_size": 6}
    budget = {"batch_size": 6, "warmup_steps": 1, "allow_leaks": "all"}
    fine_tuning["fractions"] = {
        0.5: {**budget, "seeds": [0, 1], "steps": 1, "save_every": 1},
        1.0: {**budget, "seeds": [0], "steps": 2, "save_every": 2},
    }
    fine_tuning["tasks"] = {"pneumonia": fine_tuning["tasks"]["pneumonia"]}
    plan["probing"]["groups"] = {"pneumonia": plan["probing"]["groups"]["pneumonia"]}
    plan["probing"]["models"].pop("random")
    plan["probing"]["settings"] |= {"image_size": 32, "bf16": False, "label_fraction": [1.0], "resamples": 5}
    plan["ablations"]["pretraining"] |= {"image_size": 32, "stored_size": 40, "mixed_precision": "no", "steps": 1,
                                         "batch_size": 4, "micro_batch_size": 4, "exclude": None}  # fmt: skip
    for probe in plan["ablations"]["probes"].values():
        probe |= {"image_size": 32, "bf16": False, "label_fraction": [1.0], "resamples": 5}
    variants = plan["ablations"]["variants"]
    plan["ablations"]["variants"] = {name: variants[name] for name in ("last block alone",)}
    return plan | {"jobs": 1}


@pytest.fixture
def in_process(monkeypatch):
    """The cells' scripts in this process: importing everything anew takes longer than their work."""
    called = []
    monkeypatch.setattr(StepLog, "draw", lambda *arguments: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # tiny work is slower on several

    def call(self, command, log, lock):
        script = Path(command[1]).name
        called.append(script)
        AcceleratorState._reset_state(True)
        MODULES[script].main(command[2:])

    monkeypatch.setattr(Grid, "_call", call)
    return called


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder / "grid.yaml").write_text(yaml.safe_dump(small_plan(), sort_keys=False))
    return folder


def start(place: Path, shard: str, models: list[str], *flags: str) -> dict:
    words = ["--grid", str(place / "grid.yaml"), "--data", shard, "--output", str(place / "cells"), "--resamples", "20"]
    words += ["--results", str(place / "results.json"), "--cache_folder", str(place / "cache"), "--models", *models]
    evidence.main([*words, *flags])
    return json.loads((place / "results.json").read_text())


@pytest.mark.slow
def test_a_grid_from_its_first_cell_to_its_tables(place, shard, checkpoint, mae, in_process, capsys):
    models = [f"spcxr={checkpoint}", f"mae={place / 'none'}"]
    keeping = ["--kept", str(place / "kept")]
    results = start(place, shard, models, *keeping, "--only", "pneumonia/0.5")
    # All inits of a seed before the next seed; what waits for its checkpoint is named.
    setting = results["fine_tuning"]["pneumonia"]["fractions"]["0.5"]
    assert in_process == ["finetune_classification.py"] * 4
    assert setting["inits"]["spcxr"]["finished"] == [0, 1] and setting["inits"]["mae"]["missing"] == [0, 1]
    assert "seed-0/mae: waits for its checkpoint" in capsys.readouterr().out
    check_setting(setting)
    assert results["cells"] == {"finished": 4, "missing": 10, "carried_over": 0}
    assert {entry["state"] for entry in results["goals"][:3]} <= {"open: cells not run", "reached", "missed"}
    table = tables.blocks(results)["evidence comparison"]
    assert table.splitlines()[2].startswith("| pneumonia | 50 % (9) | ") and "mae |" not in table
    assert table.endswith("Not run: pneumonia 100 %.")

    shutil.rmtree(place / "kept")  # not asked for until now
    assert start(place, shard, models, *keeping, "--only", "pneumonia/0.5")["cells"]["finished"] == 4
    assert len(in_process) == 4

    shutil.rmtree(place / "cells")  # another machine
    results = start(place, shard, [models[0], f"mae={mae}"], *keeping)
    assert in_process[4:].count("finetune_classification.py") == 2 + 3  # what was finished is not run again
    assert results["cells"] == {"finished": 14, "missing": 0, "carried_over": 0}
    assert setting["inits"]["spcxr"] == results["fine_tuning"]["pneumonia"]["fractions"]["0.5"]["inits"]["spcxr"]
    check_the_rest(results)
    assert not list((place / "cells").rglob("*.safetensors"))
    assert str(place) not in json.dumps(results) and checkpoint not in json.dumps(results)


@pytest.mark.slow
def test_settings_whose_cells_are_gone_keep_their_figures(shard, checkpoint, in_process, tmp_path):
    """Without `--kept` they go with the folder of the cells; other weights have other figures."""
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(small_plan(), sort_keys=False))
    models = [f"spcxr={checkpoint}"]
    before = start(tmp_path, shard, models, "--only", "*/1/*/spcxr", "*/1/*/scratch")
    shutil.rmtree(tmp_path / "cells")
    probed = {"cells": 3, "minutes": 7.0, "training_minutes": 0.0}
    earlier = {**before, "probing": {"models": ["spcxr"], "methods": [], "tasks": {}, "fractions": [], "results": {}}}
    earlier["cost"]["cells"]["probing"] = probed
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    after = start(tmp_path, shard, models, "--only", "*/0.5/seed-0/spcxr")
    assert after["probing"] == earlier["probing"] and after["cost"]["cells"]["probing"] == probed
    kept = after["fine_tuning"]["pneumonia"]["fractions"]
    assert kept["1"] == before["fine_tuning"]["pneumonia"]["fractions"]["1"]
    assert kept["0.5"]["inits"]["spcxr"]["finished"] == [0]
    assert after["cells"] == {"finished": 1, "missing": 14 - 1 - 2 - 3, "carried_over": 2 + 3}
    assert after["goals"][2]["state"] == before["goals"][2]["state"] != "open: cells not run"

    file = tmp_path / "results.json"
    file.write_text(file.read_text().replace(after["weights"], "00000000"))
    of_others = start(tmp_path, shard, models, "--only", "*/0.5/seed-0/spcxr")
    assert of_others["cells"]["carried_over"] == 0


def check_setting(setting: dict) -> None:
    """Means, differences and labels of one setting hold together."""
    assert setting["labels"] == 9
    for report in ("test", "test, normal against pneumonia", "NIH adults, normal against abnormal"):
        ours, floor = (setting["inits"][init]["reports"][report] for init in ("spcxr", "scratch"))
        difference = setting["differences"]["spcxr - scratch"][report]
        for name in ("accuracy", "balanced_accuracy", "auroc"):
            assert ours[name]["mean"] == pytest.approx(np.mean(list(ours[name]["seeds"].values())))
            assert difference[name]["mean"] == pytest.approx(ours[name]["mean"] - floor[name]["mean"])
            assert difference[name]["ci95"][0] <= difference[name]["ci95"][1]


def check_the_rest(results: dict) -> None:
    probing, ablations = results["probing"], results["ablations"]
    assert set(probing["results"]) == {"spcxr", "mae"} and set(probing["results"]["mae"]) == {"linear", "knn"}
    assert probing["results"]["spcxr"]["linear"]["pneumonia"]["1"]["test"]["mean"] is not None
    assert list(ablations["variants"]) == ["last block alone"]
    assert all(set(values) == set(ablations["tasks"]) for values in ablations["variants"].values())
    assert len(ablations["tasks"]) == 2  # two poolings
    assert results["cost"]["cells"]["fine_tuning"]["cells"] == 9
    assert results["cost"]["trainings"] == {"spcxr": None, "mae": None}
    states = {entry["goal"]: entry["state"] for entry in results["goals"]}
    assert states["never worse at 100 %"] in ("reached", "missed")


def test_rendering_from_the_results_alone(tmp_path):
    page, file = tmp_path / "page.md", tmp_path / "results.json"
    results = whole_results()
    file.write_text(json.dumps(results))
    blocks = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("evidence", "evidence pneumonia")]
    page.write_text("before\n" + "between\n".join(blocks))
    words = ["--results", str(file), "--render", str(page), "--figures", str(tmp_path / "figures")]
    evidence.main(words)
    text = page.read_text()
    for name in ("evidence", "evidence pneumonia"):
        assert f"<!-- {name} -->\n{tables.blocks(results)[name]}\n<!-- /{name} -->" in text
    assert "old" not in text and "**Goals**" in text and "| fill noise | 0.710 |" in text
    assert "| three_way | linear probe | 100 % | balanced accuracy | 0.800 |" in text
    assert "| spcxr | cpu | 3.0 | 1,200 | 6.7 | not read |\n\nNot kept: mae." in text
    assert "| fine-tuning | 3 | 12 | 10 |" in text and "| ablations | 0 |" not in text
    evidence.main(words)
    assert page.read_text() == text
    assert (tmp_path / "figures" / "evidence_pneumonia.png").stat().st_size > 5000
    page.write_text("nothing")
    with pytest.raises(SpcxrError, match=r"page\.md: holds none of the blocks <!-- evidence -->"):
        evidence.main(words)


def whole_results() -> dict:
    """A results file with a bit of everything."""
    results = results_with({"0.01": 0.26, "1": None}) | {"setting": "As it was.", "method": "By hand."}
    probed = {"spcxr": {"linear": {"three_way": {"1": {"test": {"mean": 0.8}}}}}}
    results["probing"] = {"models": ["spcxr", "mae"], "methods": ["linear", "knn"], "fractions": ["1"],
                          "tasks": {"three_way": "balanced accuracy"}, "results": probed}  # fmt: skip
    variants = {"fill noise": {"three_way": 0.71}, "fill zeros": None}
    results["ablations"] = {"setting": "Short.", "tasks": ["three_way"], "variants": variants}
    cost = {"device": "cpu", "minutes": 3.0, "images": 1200, "images_per_second": 6.67}
    cells = {"fine_tuning": {"cells": 3, "minutes": 12.4, "training_minutes": 9.6},
             "ablations": {"cells": 0, "minutes": 0.0, "training_minutes": 0.0}}  # fmt: skip
    results["cost"] = {"trainings": {"spcxr": cost, "mae": None}, "cells": cells}
    return results | {"goals": tables.goals(results)}


FIRST = ((0, "spcxr"), (0, "scratch"), (0, "mae"), (1, "spcxr"))


def test_the_grid_lists_its_cells(place, shard, checkpoint, capsys):
    words = [
        "--grid",
        str(place / "grid.yaml"),
        "--data",
        shard,
        "--output",
        str(place / "other"),
        "--list_only",
        "true",
    ]
    evidence.main([*words, "--models", f"spcxr={checkpoint}", "mae=nowhere"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14
    assert [line.split(": ")[0] for line in lines[:4]] == [
        f"fine_tuning/pneumonia/0.5/seed-{seed}/{init}" for seed, init in FIRST
    ]
    assert lines[2].endswith("waits for nowhere") and lines[0].endswith("not run")
    evidence.main([*words, "--models", f"spcxr={checkpoint}", "mae=nowhere", "--only", "*/0.5/seed-1"])
    assert [line.split("/")[3] for line in capsys.readouterr().out.splitlines()] == ["seed-1"] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --grid"),
        (["--grid", "x.yaml"], "--data is missing"),
        (["--results", "none.json", "--render", "page.md"], "no such results file"),
        (["--grid", str(GRIDS[0]), "--data", "x", "--max_minutes", "0"], "max_minutes must be above 0"),
        (["--grid", str(GRIDS[0]), "--data", "x", "--models", "spcxr"], "--models takes name=FOLDER"),
        (["--grid", str(GRIDS[0]), "--data", "x", "--only", "cats"], "no cell is called so"),
    ],
)
def test_refusals(flags, message, tmp_path):
    with pytest.raises(SpcxrError, match=message):
        evidence.main([*flags, "--output", str(tmp_path / "cells")])


@pytest.mark.parametrize(
    ("pattern", "asked"),
    [("pneumonia/0.01", True), ("*/0.01/seed-2", True), ("fine_tuning", True), ("pneumonia/0.0", False),
     ("*/spcxr", True), ("probing", False)],
)  # fmt: skip
def test_what_only_asks_for(pattern, asked):
    assert evidence.is_chosen("fine_tuning/pneumonia/0.01/seed-2/spcxr", [pattern]) == asked


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_scripts_take_every_cell_of_the_grids(path, tmp_path, monkeypatch):
    """Every flag of every cell parses, and the same budget goes to every init."""
    from spcxr_hf.training.arguments import parse_arguments

    monkeypatch.setattr(grid, "weights_digest", lambda folder: "")
    arguments = evidence.Arguments(grid=str(path), data="x", output=str(tmp_path))
    plan = evidence.read_plan(arguments)
    cells = list(evidence.make_cells(arguments, plan))
    assert len({cell.name for cell in cells}) == len(cells)
    parsed = {}
    for one in cells:
        for command in one.commands:
            module = MODULES[Path(command[1]).name]
            parsed[one.name] = parse_arguments(module.Arguments, list(command[2:]))
    for name, found in parsed.items():
        if name.startswith("fine_tuning"):
            peer = parsed[name.rpartition("/")[0] + "/scratch"]
            # Not the learning rate: each init has its own best on val, where the grid says so.
            for setting in ("steps", "batch_size", "save_every", "label_fraction", "seed", "crop_scale", "balance"):
                assert getattr(found, setting) == getattr(peer, setting)
            assert found.metric == "balanced_accuracy" and found.steps % found.save_every == 0


def test_other_weights_leave_what_is_from_scratch_as_it_was(tmp_path):
    """Random weights take the network alone from a checkpoint; more training of it is no reason to run them again."""
    names = []
    for seen, dropped, layers in ((0, 0.0, 1), (64, 0.1, 1), (64, 0.1, 2)):
        folder = tmp_path / f"{seen}-{layers}"
        torch.manual_seed(seen)
        config = SpcxrConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
                             reconstruction_layers=[1], segmentation_layers=[1], drop_path_rate=dropped)  # fmt: skip
        config.images_seen = seen
        SpcxrForPreTraining(config).save_pretrained(folder)
        kinds: list[dict] = [{}, {"from_scratch": True}, {"random_init": True}]
        names.append([evidence.name_model("spcxr", folder, flags) for flags in kinds])
    first, trained, deeper = names
    assert first[0] != trained[0] != deeper[0]
    assert first[1:] == trained[1:] and trained[1] == trained[2] != deeper[1]
    assert evidence.name_model("spcxr", tmp_path / "gone", {"from_scratch": True}) == "network of spcxr not there"


# ---- goals and tables ------------------------------------------------------------------------------------------------


def results_with(differences: dict[str, float | None], peer: float | None = 0.5) -> dict:
    """Results of one task by share of the labels."""
    fractions = {}
    for fraction, value in differences.items():
        summary = (
            {"mean": value, "ci95": [value, value], "sd": None, "seeds": {"0": value}} if value is not None else None
        )
        figures = {name: {"test": {"balanced_accuracy": {"mean": mean, "ci95": None, "sd": None, "seeds": {"0": mean}}}}
                   for name, mean in (("spcxr", 0.6), ("mae", peer)) if mean is not None}  # fmt: skip
        inits = {name: {"missing": [], "reports": figures.get(name, {})} for name in ("spcxr", "scratch", "mae")}
        entry = {"spcxr - scratch": {"test": {"balanced_accuracy": summary}}} if summary else {}
        fractions[fraction] = {"labels": 9, "inits": inits, "differences": entry}
    task = {"main": "test", "reports": {"test": ["balanced_accuracy"]}, "fractions": fractions}
    return {"compare": {"ours": "spcxr", "floor": "scratch", "peer": "mae"}, "inits": ["spcxr", "scratch", "mae"],
            "fine_tuning": {"pneumonia": task}}  # fmt: skip


def test_a_goal_with_seeds_still_to_run_says_so():
    results = results_with({"0.01": 0.26, "0.1": 0.06, "1": 0.0})
    results["fine_tuning"]["pneumonia"]["fractions"]["1"]["inits"]["scratch"]["missing"] = [1, 2]
    states = [entry["state"] for entry in tables.goals(results)[:3]]
    assert states == ["reached", "reached", "reached, by the seeds that were run"]


@pytest.mark.parametrize(
    ("differences", "states"),
    [
        ({"0.01": 0.26, "0.1": 0.06, "1": 0.0}, ["reached", "reached", "reached"]),
        ({"0.01": 0.24, "0.1": 0.04, "1": -0.01}, ["missed", "missed", "missed"]),
        ({"0.01": 0.26, "0.1": None, "1": None}, ["reached", "open: cells not run", "open: cells not run"]),
        ({"0.01": None, "0.1": 0.04, "1": 0.3}, ["open: cells not run", "missed", "reached"]),
    ],
)
def test_goals(differences, states):
    found = tables.goals(results_with(differences))
    assert [entry["state"] for entry in found[:3]] == states


@pytest.mark.parametrize(("peer", "state"), [(0.5, "reached"), (0.7, "missed"), (None, "open: cells not run")])
def test_the_goal_against_the_peer(peer, state):
    assert tables.goals(results_with({"0.01": 0.1, "0.1": 0.1}, peer))[-1]["state"] == state


def test_the_goal_against_the_peer_counts_tasks_at_each_share_that_was_run():
    results = results_with({"0.01": 0.1, "0.1": 0.1})
    task = results["fine_tuning"]["pneumonia"]
    task["peer_tasks"] = {"pneumonia": "two classes", "three_way": "test"}
    inits = task["fractions"]["0.1"]["inits"]
    for name, mean in (("spcxr", 0.8), ("mae", 0.9)):
        inits[name]["reports"]["two classes"] = {"balanced_accuracy": {"mean": mean}}
    del task["fractions"]["0.01"]["inits"]["mae"]["reports"]["test"]
    goal = tables.goals(results)[-1]
    assert goal["goal"].endswith("(fine-tuning, 10 % of the labels)")  # the other was not run at 1 %
    assert (goal["found"], goal["state"]) == ("ahead on 1 of 2 (three_way)", "missed")


def test_cells_of_the_table():
    lines = tables.comparison_table(results_with({"0.01": 0.261, "1": None})).splitlines()
    assert lines[0] == "| task | labels | figure | spcxr | spcxr - scratch |"
    assert len({line.count("|") for line in lines[:3]}) == 1
    absent = "pneumonia 100 % (9); scratch"  # its figure beside nothing is not told
    figures = "| pneumonia | 1 % (9) | balanced accuracy | 0.600 | +26.1 [+26.1, +26.1] |"
    assert lines[2:] == [figures, "", f"Not run: {absent}."]


def test_cells_of_the_table_against_another_pretext():
    results = results_with({"0.01": 0.261, "1": None})
    summary = {"mean": -0.1, "ci95": [-0.15, -0.05], "sd": None, "seeds": {"0": -0.1}}
    setting = results["fine_tuning"]["pneumonia"]["fractions"]["0.01"]
    setting["differences"]["spcxr - mae"] = {"test": {"balanced_accuracy": summary, "auroc": summary}}
    for init, mean in (("spcxr", 0.7), ("mae", 0.8)):
        setting["inits"][init]["reports"]["test"]["auroc"] = {"mean": mean, "ci95": None, "sd": None, "seeds": {}}
    lines = tables.comparison_table(results, role="peer").splitlines()
    assert lines[0] == "| task | labels | figure | spcxr | mae | spcxr - mae |"
    assert lines[2:] == [
        "| pneumonia | 1 % (9) | balanced accuracy | 0.600 | 0.500 | -10.0 [-15.0, -5.0] |",
        "| pneumonia | 1 % (9) | AUROC | 0.700 | 0.800 | -10.0 [-15.0, -5.0] |",
        "",
        "Not run: pneumonia 100 % (9).",
    ]


NOTHING_MEASURED = "Not rendered yet: the figures that there are stand on the cards."


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*/README.md"))], ids=str)
def test_pages_in_the_tree_follow_from_the_results(page):
    """Every block of evidence in a page is what the results file gives."""
    text = page.read_text(encoding="utf-8")
    if "<!-- evidence" not in text:
        pytest.skip("this page has no block of evidence")
    files = [file for file in (SCRIPTS / "benchmarks" / "results").glob("evidence_*.json") if file.is_file()]
    rendered = [tables.blocks(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    for name in dict.fromkeys(part.split(" -->")[0] for part in text.split("<!-- ")[1:]):
        if name.startswith("evidence"):
            block = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()
            expected = [one.get(name, "").strip() for one in rendered] or [NOTHING_MEASURED]
            assert block in expected, name


@pytest.mark.slow  # processes that import everything
def test_killed_and_started_again(shard, checkpoint, tmp_path):
    """SIGTERM ends the runner and its cell; the same command resumes and writes complete results."""
    plan = small_plan()
    del plan["probing"], plan["ablations"]
    plan["fine_tuning"]["fractions"] = {1.0: plan["fine_tuning"]["fractions"][1.0]}
    plan["fine_tuning"]["inits"].pop("mae")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    command = [
        sys.executable,
        "-m",
        evidence.__name__,
        "--grid",
        str(tmp_path / "grid.yaml"),
        "--data",
        shard,
        "--resamples",
        "20",
    ]
    command += [
        "--output",
        str(tmp_path / "cells"),
        "--results",
        str(tmp_path / "r.json"),
        "--models",
        f"spcxr={checkpoint}",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "cells/fine_tuning/pneumonia/1/seed-0/spcxr/log.txt"
    deadline = time.monotonic() + 120
    while not log.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped" in said
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["cells"] == {"finished": 2, "missing": 0, "carried_over": 0}
