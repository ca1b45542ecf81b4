"""Linear probe and k-NN: figures against other implementations, tasks of every kind, refusals, the results file."""

import json
import math
import runpy
import sys
from collections import Counter
from math import exp

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score
from transformers import Dinov2Config, ResNetConfig, ViTMAEConfig

from spcxr_hf import SpcxrError
from spcxr_hf.data.table import RadiographTable
from tests.made_up import STRUCT, encoded, picture
from training_scripts import linear_probe
from training_scripts.linear_probe import TASKS, Task, draw_labels, measure, recalls, vote

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
SMALL = ["--label_fraction", "1.0", "--seeds", "0", "--image_size", "32", "--pooling", "mean", "--resamples", "50"]
SMALL += ["--c_values", "0.01", "1.0", "--neighbours", "1", "3", "500", "--random_init", "true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A configuration alone."""
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Config(**TINY, patch_size=8).save_pretrained(folder)
    return str(folder)


def write(path, splits, labels, patients=None, **columns):
    """A shard whose images are the brighter the later their label stands in the alphabet."""
    names = sorted({str(label) for label in labels})
    images = [encoded(picture(row, 32, 40 * names.index(str(label)))[0]) for row, label in enumerate(labels)]
    columns = {"split": splits, "label": labels, "patient": patients or [None] * len(labels)} | columns
    pq.write_table(pa.table({"image": pa.array(images, STRUCT), **columns}), path)
    return str(path)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Two classes, twelve images for training, four patients of two images in val and in test."""
    splits = ["train"] * 12 + ["val"] * 8 + ["test"] * 8
    patients = [f"patient-{row // 2}" for row in range(28)]
    labels = ["clear" if row // 2 % 2 else "opaque" for row in range(28)]
    return write(tmp_path_factory.mktemp("set") / "own.parquet", splits, labels, patients)


OWN = ["--label_column", "label", "--split_column", "split"]


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_a_separable_set_of_ones_own(own, model, tmp_path, method):
    output = tmp_path / "new" / "result.json"
    flags = ["--model", model, "--data", own, *OWN, *SMALL, "--method", method, "--output", str(output)]
    result = linear_probe.main(flags)
    assert json.loads(output.read_text()) == result
    assert result["images"] == {"train": 12, "val": 8, "test": 8}
    assert result["patients"] == {"train": 6, "val": 4, "test": 4}
    assert result["method"] == method and result["features"] == 32
    task = result["tasks"]["label"]
    assert (task["metric"], task["classes"]) == ("AUROC", ["clear", "opaque"])
    entry = task["label_fraction"]["1"]
    (run,) = entry["seeds"]
    assert entry["test"] == {"mean": run["test"], "sd": None, "ci95": run["test_ci95"]}
    if method == "linear":
        assert run["val"] == run["test"] == 1.0 and run["test_ci95"] == [1.0, 1.0]
    assert run["test"] > 0.8  # the random network's nearest neighbours differ with torch's version
    assert run["C"] == 0.01 if method == "linear" else run["k"] in (1, 3, 12)  # 500 neighbours are all twelve


def test_without_report_test_the_test_split_stays_unread(own, model, tmp_path):
    table = pq.read_table(own)
    cells = [
        {"bytes": b"no picture", "path": None} if split == "test" else cell
        for cell, split in zip(table["image"].to_pylist(), table["split"].to_pylist(), strict=True)
    ]
    shard = tmp_path / "unreadable.parquet"
    pq.write_table(table.set_column(0, "image", pa.array(cells, STRUCT)), shard)
    flags = ["--model", model, "--data", str(shard), *OWN, *SMALL]
    result = linear_probe.main([*flags, "--report_test", "false"])
    assert set(result["images"]) == {"train", "val"}
    assert set(result["tasks"]["label"]["label_fraction"]["1"]) == {"labels", "val", "seeds"}
    with pytest.raises(SpcxrError, match=r"split=test"):
        linear_probe.main(flags)


def test_few_labels_and_several_seeds(own, model):
    flags = ["--model", model, "--data", own, *OWN, *SMALL, "--method", "knn"]
    result = linear_probe.main([*flags, "--label_fraction", "0.5", "1.0", "--seeds", "0", "1", "--layer", "1"])
    half, whole = result["tasks"]["label"]["label_fraction"].values()
    assert (half["labels"], whole["labels"]) == (6, 12)
    assert [run["seed"] for run in half["seeds"]] == [0, 1]
    low, high = half["test"]["ci95"]
    assert low <= half["test"]["mean"] <= high
    assert half["test"]["mean"] == pytest.approx(np.mean([run["test"] for run in half["seeds"]]), abs=1e-4)


def test_other_peers(own, tmp_path):
    ViTMAEConfig(**TINY, patch_size=8).save_pretrained(tmp_path / "mae")
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]).save_pretrained(tmp_path / "resnet")
    for name, width in (("mae", 32), ("resnet", 16)):
        assert linear_probe.main(["--model", str(tmp_path / name), "--data", own, *OWN, *SMALL])["features"] == width


def test_screening_reads_lists_of_findings(model, tmp_path):
    splits = ["train"] * 8 + ["val"] * 4 + ["test"] * 4
    findings = [[] if row % 2 else ["Pneumonia", "Effusion"] for row in range(16)]
    shard = write(tmp_path / "set.parquet", splits, [str(not found) for found in findings], findings=findings,
                  findings_split=splits)  # fmt: skip
    result = linear_probe.main(["--model", model, "--data", shard, "--task", "screening", *SMALL])
    assert result["tasks"]["screening"]["classes"] == ["normal", "abnormal"]
    assert result["tasks"]["screening"]["label_fraction"]["1"]["test"]["mean"] == 1.0
    same = ["--label_column", "findings", "--split_column", "findings_split"]
    own = linear_probe.main(["--model", model, "--data", shard, *same, *SMALL])
    assert own["tasks"]["findings"] == result["tasks"]["screening"]


def test_covid_reports_other_hospitals(model, tmp_path):
    labels = ["normal", "pneumonia", "covid"] * 8 + ["covid", "covid", "pneumonia", "covid"]
    splits = ["train"] * 12 + ["val"] * 6 + ["test"] * 6 + ["shift"] * 4
    sources = ["adults"] * 24 + ["north", "north", "north", "south"]
    shard = write(tmp_path / "set.parquet", splits, labels, covid_label=labels, covid_split=splits, source=sources)
    result = linear_probe.main(["--model", model, "--data", shard, "--task", "covid", *SMALL])
    assert result["images"] == {"train": 12, "val": 6, "test": 6, "shift": 4}
    entry = result["tasks"]["covid"]["label_fraction"]["1"]
    assert result["tasks"]["covid"]["metric"] == "balanced accuracy"
    assert set(entry["test"]["recall"]) == {"normal", "pneumonia", "covid"}
    assert set(entry["shift"]["recall"]) == {"pneumonia", "covid"}  # there is no normal image
    assert set(entry["shift"]["within"]) == {"north"}  # the one source with both diseases
    assert entry["shift"]["mean"] == pytest.approx(np.mean(list(entry["shift"]["recall"].values())), abs=1e-4)


# Figures


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_scikit_learn_on_every_resample(seed):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 3, 40)
    scores = generator.integers(0, 6, (40, 3)).astype(float) + 2 * np.eye(3)[targets]  # with ties
    rows = generator.integers(0, 40, (5, 40))
    weights = np.stack([np.bincount(drawn, minlength=40) for drawn in rows])
    positive, pair = targets % 2, scores[:, :2]
    assert measure(scores, targets) == pytest.approx(balanced_accuracy_score(targets, scores.argmax(axis=1)))
    assert measure(pair, positive) == pytest.approx(roc_auc_score(positive, pair[:, 1] - pair[:, 0]))
    found = measure(scores, targets, weights), measure(pair, positive, weights)
    for index, drawn in enumerate(rows):
        right = recall_score(targets[drawn], scores[drawn].argmax(axis=1), average=None, labels=[0, 1, 2])
        assert recalls(scores, targets, weights)[index] == pytest.approx(right)
        assert found[0][index] == pytest.approx(right.mean())
        expected = roc_auc_score(positive[drawn], (pair[:, 1] - pair[:, 0])[drawn])
        assert found[1][index] == pytest.approx(expected)
    alone = np.bincount(np.flatnonzero(positive)[:3], minlength=40)[None]
    assert np.isnan(measure(pair, positive, alone)).all()  # one class: no AUROC


def test_neighbours_vote_as_in_the_paper():
    generator = np.random.default_rng(0)
    inputs, queries = generator.normal(size=(30, 4)).astype(np.float32), generator.normal(size=(7, 4))
    targets = np.arange(30) % 3
    for count in (1, 5, 30):
        shares = vote(inputs, targets, queries, count, temperature=0.07, chunk=3)
        for query, share in zip(queries, shares, strict=True):
            cosine = [
                sum(a * b for a, b in zip(one, query, strict=True)) / (sum(one**2) ** 0.5 * sum(query**2) ** 0.5)
                for one in inputs.astype(float)
            ]
            votes: Counter = Counter()
            for row in sorted(range(30), key=lambda row, cosine=cosine: -cosine[row])[:count]:
                votes[int(targets[row])] += exp(cosine[row] / 0.07)
            assert share == pytest.approx([votes[number] / sum(votes.values()) for number in range(3)], abs=1e-6)


def test_a_small_temperature_does_not_overflow():
    shares = vote(np.eye(3), np.array([0, 1, 2]), np.array([[1.0, 0.1, 0.0]]), 3, temperature=1e-4)
    assert shares[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_few_labels_leave_images_of_every_class():
    classes = np.repeat([0, 1, 2], [500, 30, 3])
    assert np.bincount(classes[draw_labels(classes, 0.001, seed=0)]).tolist() == [2, 2, 2]


def test_two_tasks_of_one_column_share_their_labels():
    three, two = TASKS["pneumonia_three_way"], TASKS["pediatric_pneumonia"]
    assert three.labels == two.labels == ["normal", "bacterial", "viral"]
    assert three.targets(np.array([0, 2, 1])).tolist() == [0, 2, 1]
    assert two.targets(np.array([0, 2, 1])).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b"], ["a", "b"]),
        (["normal", "abnormal"], ["normal", "abnormal"]),
        ([10, 9, 0], ["0", "9", "10"]),
        ([True, False], ["False", "True"]),
        ([["Mass"], []], ["normal", "abnormal"]),
    ],
)
def test_classes_of_ones_own(labels, classes):
    rows = pa.table({"label": labels, "split": ["train"] * len(labels)})
    task = linear_probe.own_task(RadiographTable(rows, "set"), "label", "split")
    assert isinstance(task, Task) and list(task.classes) == classes


# Refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "gout"], "task must be any of pediatric_pneumonia, .*; got 'gout'"),
        (["--task", "covid", "screening"], "are of different columns"),
        (["--task", "screening"], "no column 'findings_split'"),
        (["--label_column", "label"], "--label_column and --split_column go together"),
        (["--label_column", "no", "--split_column", "split"], "no column 'no'"),
        (["--label_column", "label", "--split_column", "no"], "no column 'no'"),
        (["--label_column", "label", "--split_column", "number"], "number holds int64, not words such as 'train'"),
        ([*OWN, "--method", "forest"], "method must be linear or knn; got 'forest'"),
        ([*OWN, "--temperature", "0"], "temperature must be above 0"),
        ([*OWN, "--neighbours", "5", "0"], "neighbours must be above 0"),
        ([*OWN, "--label_fraction", "1.5"], "label_fraction must lie in"),
        ([*OWN, "--layer", "9"], "Dinov2Model has no hidden state 9"),
    ],
)
def test_wrong_flags(own, model, tmp_path, flags, message):
    table = pq.read_table(own)
    shard = tmp_path / "set.parquet"
    pq.write_table(table.append_column("number", pa.array(range(len(table)))), shard)
    with pytest.raises(SpcxrError, match=message):
        linear_probe.main(["--model", model, "--data", str(shard), *SMALL, *flags])


TRAINING = ["train", "train", "val", "val", "test", "test"]


@pytest.mark.parametrize(
    ("splits", "labels", "message"),
    [
        (TRAINING, ["a", "a", "a", "b", "a", "b"], r"has one class in train \(a\)"),
        (TRAINING, ["a", "b", "a", "a", "a", "b"], r"split=val\]: no image with label = 'b'"),
        (TRAINING, ["a", "b", "a", "b", "b", "b"], r"split=test\]: no image with label = 'a'"),
        (TRAINING, ["a", "b", "a", "c", "a", "b"], "label holds 'c'; known are a, b"),
        (TRAINING, ["a", None, "a", "b", "a", "b"], "1 of 2 rows have no label"),
        (["train"] * 4 + ["test"] * 2, ["a", "b"] * 3, "no row has split = 'val'"),
        (["val"] * 4 + ["test"] * 2, ["a", "b"] * 3, "no row has split = 'train'"),
    ],
)
def test_sets_that_cannot_be_measured(model, tmp_path, splits, labels, message):
    shard = write(tmp_path / "set.parquet", splits, labels)
    with pytest.raises(SpcxrError, match=message) as refusal:
        linear_probe.main(["--model", model, "--data", shard, *OWN, *SMALL])
    assert "\n" not in str(refusal.value)


def test_a_preset_misses_a_class_in_training(model, tmp_path):
    labels = ["normal", "bacterial", "bacterial", "normal", "bacterial", "viral"]
    shard = write(tmp_path / "set.parquet", TRAINING, labels, pneumonia_label=labels, pneumonia_split=TRAINING)
    with pytest.raises(SpcxrError, match=r"split=train\]: no image with pneumonia_label = 'viral'"):
        linear_probe.main(["--model", model, "--data", shard, *SMALL])


def test_the_script_refuses_in_one_line(own, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", "--model", str(tmp_path), "--data", own, *OWN])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(linear_probe.__file__, run_name="__main__")
    assert stop.value.code == f"error: {tmp_path}: no checkpoint, there is no config.json in this folder"


def test_a_leaking_split_is_refused(own, model, tmp_path):
    table = pq.read_table(own)
    cells = table["image"].to_pylist()
    cells[27] = cells[3]  # test, train
    shard = str(tmp_path / "leaking.parquet")
    pq.write_table(table.set_column(0, "image", pa.array(cells, STRUCT)), shard)
    flags = ["--model", model, "--data", shard, *OWN, *SMALL]
    with pytest.raises(SpcxrError, match=r"split leaks: 1 nearly equal image pair.*--exclude FILE leaves copies out"):
        linear_probe.main(flags)
    (tmp_path / "copies.txt").write_text("row 3\n")
    assert linear_probe.main([*flags, "--exclude", str(tmp_path / "copies.txt")])["images"]["train"] == 11
    assert linear_probe.main([*flags, "--allow_leaks", "images"])["images"]["train"] == 12
    assert linear_probe.main([*flags, "--report_test", "false"])["images"] == {"train": 12, "val": 8}


def test_broken_files_are_skipped_and_listed(own, model, tmp_path):
    table = pq.read_table(own)
    cells = table["image"].to_pylist()
    cells[2] = {"bytes": b"no picture", "path": None}
    pq.write_table(table.set_column(0, "image", pa.array(cells, STRUCT)), tmp_path / "set.parquet")
    flags = ["--model", model, "--data", str(tmp_path / "set.parquet"), *OWN, *SMALL, "--on_error", "skip"]
    result = linear_probe.main([*flags, "--output", str(tmp_path / "report" / "probe.json")])
    assert result["images"] == {"train": 11, "val": 8, "test": 8}
    assert (tmp_path / "report" / "skipped.csv").read_text().splitlines()[1].startswith("row 2,")


def test_rows_of_unknown_patients_are_patients_of_their_own():
    columns = {"patient": pa.array([3.0, math.nan, None, 3.0])}
    numbers = linear_probe.name_patients(RadiographTable(pa.table(columns), "set"))
    assert numbers[0] == numbers[3] and len(set(numbers)) == 3
    columns = {"patient": ["a", "", "", "a"]}
    assert len(set(linear_probe.name_patients(RadiographTable(pa.table(columns), "set")))) == 3
