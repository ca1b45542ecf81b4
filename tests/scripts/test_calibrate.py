"""calibrate.py on made-up radiographs: what it writes loads, is calibrated, and has its thresholds from `val` alone."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from spcxr_hf import SpcxrError, SpcxrForImageClassification, SpcxrImageProcessor
from spcxr_hf.data.labels import parse_classes, targets_of
from spcxr_hf.data.table import read_table
from spcxr_hf.evaluation.calibration import POINTS, thresholds, to_probabilities
from spcxr_hf.evaluation.predict import load_classifier, open_images, predict_logits, select_rows
from tests.common import build, tiny_config
from tests.made_up import break_rows, write_set
from training_scripts import calibrate

SPLITS = ["train"] * 3 + ["val"] * 24 + ["test"] * 18
LABELS = {0: "normal", 1: "bacterial pneumonia", 2: "viral pneumonia"}
CLASSES = ["normal", "bacterial pneumonia=bacterial", "viral pneumonia=viral"]
SUM = "bacterial pneumonia + viral pneumonia"
FINDINGS = ("Edema", "Effusion")
ALL_POINTS = ["--min_cases", "1"]
MULTI_CLASSES = ["abnormal=Edema+Effusion", "oedema=Edema", "effusion=Effusion"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = write_set(tmp_path_factory.mktemp("set") / "set.parquet", SPLITS)
    table = pq.read_table(path)
    lists = [[name for name, every in zip(FINDINGS, (2, 3), strict=True) if row % every == 0] for row in range(45)]
    lists[5] = None
    pq.write_table(table.append_column("findings", pa.array(lists)), path)
    return str(path)


def checkpoint(folder: Path, labels: dict, multi_label: bool, recipe: str = "steps: 3\n") -> Path:
    problem = "multi_label_classification" if multi_label else "single_label_classification"
    names = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    model = build(SpcxrForImageClassification, tiny_config(problem_type=problem, **names))
    with torch.no_grad():  # overconfident, so that there is something to mend
        model.classifier.weight.mul_(8)
    model.save_pretrained(folder)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def calibrated(shard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    model = checkpoint(folder / "final", LABELS, multi_label=False)
    flags = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    flags += ["--sums", SUM, *ALL_POINTS, "--resamples", "40", "--output", str(folder / "calibrated")]
    result = calibrate.main(["--model", str(model), "--data", shard, *flags])
    return model, folder / "calibrated", json.loads(json.dumps(result, default=float))


def test_the_folder_is_a_checkpoint(calibrated):
    _, folder, result = calibrated
    names = {path.name for path in folder.iterdir()}
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "calibration.json"}
    assert expected <= names
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 32, "width": 32}
    assert model.config.operating_points == result["operating_points"]
    assert set(model.config.operating_points) == {*LABELS.values(), SUM}
    assert model.config.operating_point == "youden"
    written = json.loads((folder / "calibration.json").read_text())
    assert written["splits"]["test"]["after"] == result["splits"]["test"]["after"]


def test_the_pictures_show_every_split(calibrated, shard, tmp_path, monkeypatch):
    """A panel for each target with a curve for each split; a diagram for each split with the error that is reported."""
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    drawn = {}
    monkeypatch.setattr(calibrate, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    flags = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    flags += ["--sums", SUM, "--resamples", "20", "--output", str(tmp_path / "calibrated")]
    result = calibrate.main(["--model", str(calibrated[0]), "--data", shard, *flags])

    panels = {axes.get_title().replace("\n", " "): axes for axes in drawn["roc.png"].axes if axes.get_visible()}
    assert set(panels) == {*LABELS.values(), SUM}
    for target, axes in panels.items():
        points = result["splits"]["val"]["operating_points"][target]
        shown = {text.get_text().split(":")[0] for text in axes.get_legend().get_texts()}
        assert shown == {"val", "test", *POINTS}
        marks = {line.get_label(): tuple(map(float, line.get_xydata()[0])) for line in axes.lines}
        youden = points["youden"]
        assert marks["youden"] == pytest.approx((1 - youden["specificity"], youden["sensitivity"]))
    titles = [axes.get_title() for axes in drawn["reliability.png"].axes]
    assert titles == [
        f"most probable class, {name}\nECE {entry['after']['ece']:.3f}, {entry['images']} images"
        for name, entry in result["splits"].items()
    ]


def test_the_saved_head_gives_the_calibrated_probabilities(calibrated, shard):
    source, folder, result = calibrated
    rows = select_rows(
        read_table(shard), "pneumonia_label", "pneumonia_split", "test", parse_classes(CLASSES), multi_label=False
    )
    before, after = (
        predict_logits(*load_classifier(str(one)), open_images(rows.table), batch_size=size)
        for one, size in ((source, 7), (folder, 32))
    )
    torch.testing.assert_close(after, before / result["temperature"], rtol=1e-4, atol=1e-4)
    assert result["temperature"] > 1
    entry = result["splits"]["test"]
    scores = to_probabilities(after, False).numpy()[:, 1:].sum(axis=1)
    truth = rows.targets[:, 1:].sum(dim=1).numpy()
    reached = entry["operating_points"][SUM]["youden"]
    said = scores >= reached["threshold"]
    assert reached["sensitivity"] == pytest.approx(said[truth == 1].mean())
    assert reached["specificity"] == pytest.approx(1 - said[truth == 0].mean())
    assert (entry["images"], entry["operating_points"][SUM]["positives"]) == (18, 12)


def test_thresholds_are_of_calibrated_probabilities(calibrated, shard):
    _, folder, result = calibrated
    rows = select_rows(read_table(shard), "pneumonia_label", "pneumonia_split", "val", parse_classes(CLASSES), False)
    logits = predict_logits(*load_classifier(str(folder)), open_images(rows.table))
    scores, truth = to_probabilities(logits, False).numpy()[:, 0], rows.targets[:, 0].numpy()
    assert result["operating_points"]["normal"] == pytest.approx(thresholds(scores, truth), abs=1e-4)


def test_on_val_the_named_points_hold_what_they_say(calibrated):
    _, _, result = calibrated
    entry = result["splits"]["val"]
    assert entry["after"]["brier"] < entry["before"]["brier"]
    for target in (*LABELS.values(), SUM):
        found = entry["operating_points"][target]
        assert found["sensitivity 0.90"]["sensitivity"] >= 0.9
        assert found["specificity 0.90"]["specificity"] >= 0.9
        for name in POINTS:
            for figure in ("sensitivity", "specificity", "accuracy"):
                low, high = found[name][f"{figure}_ci95"]
                assert 0 <= low <= found[name][figure] <= high <= 1
    assert sum(one["images"] for one in entry["reliability"]["after"]) == entry["images"] == 24


@pytest.mark.slow
def test_labels_that_hold_together_by_the_recipe(shard, tmp_path):
    """Columns and classes come from the recipe beside the weights, and any finding is abnormal."""
    names = dict(enumerate(word.partition("=")[0] for word in MULTI_CLASSES))
    recipe = f"label_column: findings\nsplit_column: pneumonia_split\nclasses: {json.dumps(MULTI_CLASSES)}\n"
    model = checkpoint(tmp_path / "final", names, multi_label=True, recipe=recipe)
    output = str(tmp_path / "calibrated")
    result = calibrate.main(
        ["--model", str(model), "--data", shard, "--output", output, *ALL_POINTS, "--resamples", "20"]
    )
    assert set(result["scale"]) == set(names.values()) and all(value > 0 for value in result["scale"].values())
    entry = result["splits"]["val"]
    assert entry["images"] == 23 and list(entry["after"]["labels"]) == list(names.values())
    assert entry["after"]["mean_brier"] < entry["before"]["mean_brier"]
    points = AutoModelForImageClassification.from_pretrained(output).config.operating_points
    assert points == result["operating_points"] and set(points) == set(names.values())
    again = calibrate.main(
        ["--model", str(model), "--data", shard, "--output", output, *ALL_POINTS, "--resamples", "20"]
    )
    assert again["operating_points"] == result["operating_points"]


@pytest.mark.slow
def test_a_target_with_few_cases_has_thresholds_in_the_report_alone(calibrated, shard, tmp_path, capsys):
    """`val` has 8 images of each class: 8 of one and 16 of the others are too few where 10 are asked for."""
    model, _, every = calibrated
    flags = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    flags += ["--sums", SUM, "--splits", "val", "--resamples", "5", "--output", str(tmp_path / "out")]
    words = ["--model", str(model), "--data", shard, *flags, "--min_cases"]
    result = calibrate.main([*words, "10"])
    assert result["operating_points"] is None and "operating_points" not in config_of(tmp_path / "out")
    assert set(result["splits"]["val"]["operating_points"]) == {*LABELS.values(), SUM}
    said = capsys.readouterr().out
    assert "no thresholds for 'normal': val has 8 positives and 16 negatives of it, --min-cases is 10\n" in said
    assert calibrate.main([*words, "8"])["operating_points"] == every["operating_points"]
    assert "no thresholds" not in capsys.readouterr().out


def config_of(folder: Path) -> dict:
    return {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if value is not None}


def test_thresholds_do_not_depend_on_what_is_reported(calibrated, shard, tmp_path):
    model, _, result = calibrated
    flags = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    flags += [
        "--splits",
        "val",
        "--resamples",
        "5",
        "--output",
        str(tmp_path / "out"),
        "--sums",
        SUM,
        "--min_cases",
        "1",
    ]
    again = calibrate.main(["--model", str(model), "--data", shard, *flags])
    assert again["operating_points"] == result["operating_points"] and list(again["splits"]) == ["val"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resamples", "0"], "resamples must be at least 1"),
        (["--operating_point", "best"], "operating_point must be youden"),
        (["--classes", "normal", "ill"], "its classes are normal, .* --classes names normal, ill"),
        (["--classes", "normal", "normal"], "a class appears twice among normal normal"),
        (["--sums", "normal + ill"], "'ill' is no label"),
        (["--label_column", "nothing"], "no column 'nothing'"),
        (["--splits", "shift"], "no row has pneumonia_split = 'shift'"),
        (["--model", "/no/such/folder"], "folder: there is no such folder"),
    ],
    ids=str,
)
def test_refusals(calibrated, shard, tmp_path, flags, message):
    words = ["--model", str(calibrated[0]), "--data", shard, "--output", str(tmp_path / "out")]
    words += ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    with pytest.raises(SpcxrError, match=message):
        calibrate.main([*words, *flags])
    assert not (tmp_path / "out").exists()


def test_no_column_and_no_folder_of_its_own(calibrated, shard, tmp_path):
    model = str(calibrated[0])
    with pytest.raises(SpcxrError, match="give --label_column"):
        calibrate.main(["--model", model, "--data", shard, "--output", str(tmp_path / "out")])
    with pytest.raises(SpcxrError, match="needs a separate folder"):
        calibrate.main(["--model", model, "--data", shard, "--output", model])
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SpcxrError, match="holds something else"):
        calibrate.main(["--model", model, "--data", shard, "--output", str(tmp_path)])
    assert (tmp_path / "thesis.txt").exists()


def test_a_label_may_count_as_several_classes():
    classes = parse_classes(["abnormal=Edema+Effusion", "oedema=Edema"])
    assert targets_of(["Edema"], classes, True) == [1, 1]
    assert targets_of(["Effusion"], classes, True) == [1, 0]
    assert targets_of([], classes, True) == [0, 0]
    known = targets_of({"Edema": False, "Effusion": None}, classes, True)
    assert math.isnan(known[0]) and known[1] == 0
    assert np.isnan(targets_of(None, classes, True)).all()
    assert np.isnan(targets_of("fungal", parse_classes(["normal", "viral"]), False)).all()
    assert targets_of(["Edema"], parse_classes(["normal", "abnormal"]), False) == [0, 1]
    with pytest.raises(SpcxrError, match="holds 'Edema'"):
        targets_of("Edema", classes, True)


def test_a_set_of_one_class_has_no_thresholds_and_no_curves(shard, calibrated, tmp_path):
    table = read_table(shard).where("pneumonia_label", "normal").where("pneumonia_split", "val")
    pq.write_table(table.rows, tmp_path / "normal.parquet")
    flags = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    flags += ["--splits", "val", "--resamples", "5", "--output", str(tmp_path / "out")]
    result = calibrate.main(["--model", str(calibrated[0]), "--data", str(tmp_path / "normal.parquet"), *flags])
    assert result["operating_points"] is None
    assert not (tmp_path / "out" / "roc.png").exists()


def test_intervals_are_by_patient(calibrated, shard, tmp_path):
    """Where all images are of two people, a draw takes both, or one of them twice."""
    model, _, apart = calibrated
    table = pq.read_table(shard)
    people = pa.array([f"patient {row % 2}" for row in range(len(table))])
    place = table.column_names.index("patient")
    pq.write_table(table.set_column(place, "patient", people), tmp_path / "two.parquet")
    flags = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    words = ["--model", str(model), "--data", str(tmp_path / "two.parquet"), *flags, "--sums", SUM]
    entry = calibrate.main([*words, *ALL_POINTS, "--resamples", "40", "--output", str(tmp_path / "out")])["splits"][
        "test"
    ]
    assert entry["patients"] == 2
    assert entry["after"]["brier"] == pytest.approx(apart["splits"]["test"]["after"]["brier"])
    rows = select_rows(read_table(shard), "pneumonia_label", "pneumonia_split", "test", parse_classes(CLASSES), False)
    scores = to_probabilities(predict_logits(*load_classifier(str(tmp_path / "out")), open_images(rows.table)), False)
    truth, first = rows.targets.numpy(), SPLITS.index("test") % 2
    own = [((scores.numpy() - truth) ** 2).sum(axis=1)[(first + one) % 2 :: 2].mean() for one in (0, 1)]
    assert entry["after"]["brier_ci95"] == pytest.approx([min(own), max(own)], rel=1e-5)
    decided = entry["operating_points"][SUM]["youden"]
    right = (scores.numpy()[:, 1:].sum(axis=1) >= decided["threshold"]) == truth[:, 1:].sum(axis=1)
    shares = [right[(first + one) % 2 :: 2].mean() for one in (0, 1)]
    assert decided["accuracy_ci95"] == pytest.approx([min(shares), max(shares)])


@pytest.mark.slow
def test_rows_that_the_training_left_out_are_left_out(shard, tmp_path):
    (tmp_path / "copies.txt").write_text("row-5\nrow-30\n")
    recipe = f"label_column: pneumonia_label\nsplit_column: pneumonia_split\nexclude: {tmp_path / 'copies.txt'}\n"
    recipe += f"classes: {json.dumps(CLASSES)}\n"
    model = checkpoint(tmp_path / "final", LABELS, multi_label=False, recipe=recipe)
    words = ["--model", str(model), "--data", shard, "--resamples", "5", "--splits", "val", "test"]
    found = calibrate.main([*words, "--output", str(tmp_path / "out")])["splits"]
    assert [found[name]["images"] for name in ("val", "test")] == [23, 17]
    every = calibrate.main([*words, "--output", str(tmp_path / "every"), "--exclude", ""])["splits"]
    assert [every[name]["images"] for name in ("val", "test")] == [24, 18]


@pytest.mark.slow
def test_broken_files_are_skipped_and_listed(calibrated, shard, tmp_path, capsys):
    model, _, before = calibrated
    (tmp_path / "set.parquet").write_bytes(Path(shard).read_bytes())
    damaged = break_rows(tmp_path / "set.parquet", {SPLITS.index("val"), SPLITS.index("test"), SPLITS.index("train")})
    flags = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--classes", *CLASSES]
    words = ["--model", str(model), "--data", damaged, *flags, "--resamples", "5", "--output", str(tmp_path / "out")]
    with pytest.raises(SpcxrError, match="damaged or cut short"):
        calibrate.main(words)
    assert not (tmp_path / "out").exists()
    found = calibrate.main([*words, "--on_error", "skip"])
    for split in ("val", "test"):
        assert found["splits"][split]["images"] == before["splits"][split]["images"] - 1
    lines = (tmp_path / "out" / "skipped.csv").read_text().splitlines()
    ids = [f"row-{SPLITS.index(split)}" for split in ("val", "test")]
    assert sorted(line.partition(",")[0] for line in lines) == sorted(["id", *ids])
    assert "skipped 2 broken files" in capsys.readouterr().out
    assert calibrate.main([*words, "--on_error", "skip"])["splits"].keys() == found["splits"].keys()  # once more
