"""shortcuts.py on made-up radiographs whose label stands on the border, in the lungs, or in both."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spcxr_hf import (
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
)
from spcxr_hf.data.table import RadiographTable
from spcxr_hf.evaluation.predict import LabelledRows
from spcxr_hf.evaluation.shortcuts import border, boxes, choose_probe, filled, grey_means
from tests.common import build, tiny_config
from tests.made_up import break_rows, encoded, picture, write_set
from training_scripts import shortcuts

SPLITS = ["train"] * 18 + ["val"] * 9 + ["test"] * 15
LABELS = {0: "normal", 1: "bacterial", 2: "viral"}
SUM, PAIR = "bacterial + viral", "bacterial / viral"
COLUMNS = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Normal images have a bright frame."""
    path = write_set(tmp_path_factory.mktemp("set") / "set.parquet", SPLITS)
    table = pq.read_table(path)
    cells = table.column("image").to_pylist()
    for row in range(0, len(SPLITS), 3):
        pixels = np.array(Image.open(io.BytesIO(cells[row]["bytes"])))
        pixels[:3], pixels[-3:] = 255, 255
        cells[row] = encoded(pixels)
    images = pa.array(cells, table.schema.field("image").type)
    table = table.set_column(table.schema.get_field_index("image"), "image", images)
    views = ["AP" if row % 2 else "PA" for row in range(len(SPLITS))]
    pq.write_table(table.append_column("view", pa.array(views)), path)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    classifier = build(SpcxrForImageClassification, tiny_config(problem_type="single_label_classification", **names))
    lungs = {"id2label": {0: "background", 1: "lung"}, "label2id": {"background": 0, "lung": 1}}
    segmenter = build(SpcxrForSemanticSegmentation, tiny_config(num_labels=2, **lungs))
    for name, model in (("classifier", classifier), ("lungs", segmenter)):
        model.save_pretrained(folder / name)
        SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    return ["--model", str(folder / "classifier"), "--lungs", str(folder / "lungs"), "--stored_size", "48"]


def test_every_variant_is_reported(models, shard, tmp_path):
    output = tmp_path / "results" / "shortcuts.json"
    flags = [*COLUMNS, "--targets", SUM, PAIR, "--by", "view", "--resamples", "30", "--output", str(output)]
    shortcuts.main([*models, "--data", shard, *flags, "--splits", "val", "test"])
    result = json.loads(output.read_text())
    assert result["targets"] == ["normal", "bacterial", "viral", SUM, PAIR]
    assert list(result["splits"]) == ["val", "test"]
    entry = result["splits"]["test"]
    assert entry["images"] == 15 and list(entry["variants"]) == list(shortcuts.VARIANTS)
    for found in entry["variants"].values():
        assert list(found["targets"]) == result["targets"]
        assert 0 <= found["balanced_accuracy"] <= 1 and len(found["recall"]["viral"]["recall_ci95"]) == 2
        normal, ill = found["targets"]["normal"], found["targets"][SUM]
        assert normal["auroc"] == pytest.approx(ill["auroc"])  # what is not normal is ill
        low, high = normal["auroc_ci95"]
        assert low <= normal["auroc"] <= high
        if "threshold" in ill:
            assert 0 <= ill["accuracy_ci95"][0] <= ill["accuracy"] <= ill["accuracy_ci95"][1] <= 1
    judged = {name for name, found in entry["variants"].items() if "threshold" in found["targets"][SUM]}
    assert judged == {"thumbnail_16", "thumbnail_32", "border"}
    model = entry["variants"]["model"]["targets"]["normal"]
    assert model["survives"] in (None, pytest.approx(1.0))
    assert set(entry["by"]["view"]) == {"AP", "PA"}
    assert sum(part["images"] for part in entry["by"]["view"].values()) == 15


def test_a_border_that_tells_is_found(models, shard):
    result = shortcuts.main([*models, "--data", shard, *COLUMNS, "--resamples", "5"])
    variants = result["splits"]["test"]["variants"]
    for variant in ("border", "thumbnail_16", "thumbnail_32"):
        assert variants[variant]["targets"]["normal"]["auroc"] > 0.95
    # Two kinds of pneumonia differ inside the lungs alone, which the border does not show.
    assert variants["border"]["targets"]["viral"]["auroc"] < variants["thumbnail_16"]["targets"]["viral"]["auroc"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", "bacterial + fungal"], "'fungal' is no label"),
        (["--targets", "bacterial / fungal"], "'fungal' is no label"),
        (["--by", "hospital"], "no column 'hospital'"),
        (["--classes", "normal", "ill"], "--classes names normal, ill"),
        (["--stored_size", "16"], "stored_size must be at least 32"),
        (["--resamples", "0"], "resamples must be at least 1"),
        (["--lungs", "/no/such/folder"], "folder: there is no such folder"),
        (["--splits", "shift"], "no row has pneumonia_split = 'shift'"),
    ],
    ids=str,
)
def test_refusals(models, shard, flags, message):
    with pytest.raises(SpcxrError, match=message):
        shortcuts.main([*models, "--data", shard, *COLUMNS, *flags])


def test_a_classifier_has_no_lungs(models, shard):
    with pytest.raises(SpcxrError, match=r"no weights for .* SpcxrForSemanticSegmentation"):
        shortcuts.main([*models, "--data", shard, *COLUMNS, "--lungs", models[1]])


def test_columns_are_needed_without_a_recipe(models, shard):
    with pytest.raises(SpcxrError, match="give --label_column"):
        shortcuts.main([*models, "--data", shard])


# ---- parts ---------------------------------------------------------------------------------------------------------


def images(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.stack([torch.from_numpy(picture(seed, side)[0])[None] for seed in range(count)])


def test_thumbnails_are_means():
    found = grey_means(images(), 16).reshape(4, 16, 16)
    assert found[1, 3, 5] == pytest.approx(images()[1, 0, 6:8, 10:12].float().mean().item() / 255, abs=1e-6)
    assert border(images()).shape == (4, 60)


def test_the_border_does_not_depend_on_what_is_inside():
    changed = images()
    changed[:, :, 2:-2, 2:-2] = 7
    assert np.array_equal(border(changed), border(images()))
    changed[:, :, :1] = 7
    assert not np.array_equal(border(changed), border(images()))


def test_filled_with_the_mean():
    where = torch.zeros(4, 32, 32, dtype=torch.bool)
    where[2, 4:9, 10:20] = True
    found = filled(images(), where)
    assert torch.equal(found[[0, 1, 3]], images()[[0, 1, 3]])
    mean = images()[2].float().mean().round().item()
    assert (found[2, 0][where[2]] == mean).all() and torch.equal(found[2, 0][~where[2]], images()[2, 0][~where[2]])


def test_boxes():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2, 1], masks[0, 5, 6] = True, True
    found = boxes(masks)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6, 1:7] = True
    assert torch.equal(found[0], expected) and not found[1].any()


@pytest.mark.parametrize("multi_label", [False, True])
def test_probes(multi_label):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 200)
    values = generator.normal(size=(200, 5)) + 2 * labels[:, None] * np.eye(5)[0]
    targets = np.stack([1 - labels, labels], axis=1).astype(float)
    if multi_label:
        targets[:20, 0] = np.nan
        targets = np.append(targets, np.zeros((200, 1)), axis=1)  # a label that never holds
    found = {"train": values[:120], "val": values[120:]}
    sides = {"train": targets[:120], "val": targets[120:]}
    probe = choose_probe(lambda rows: rows.numpy(), found, sides, multi_label)
    said = probe(torch.from_numpy(values[120:]))
    assert said.shape == (80, targets.shape[1]) and ((said >= 0) & (said <= 1)).all()
    assert ((said[:, 1] > 0.5) == labels[120:]).mean() > 0.75
    assert not multi_label or (said[:, 2] == 0.5).all()


def test_accuracy_of_a_probe_at_its_threshold():
    task = shortcuts.Task({"a": ["a"], "b": ["b"], "c": ["c"]}, False, ["a", "a / b"])
    values = np.array([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.3, 0.6, 0.1], [0.7, 0.1, 0.2]])
    truth = np.eye(3)[[0, 0, 1, 2]]
    cuts = shortcuts.choose_cuts(task, values, truth)
    assert cuts["a"] == pytest.approx(0.45)  # of the cuts that part equally well the most sensitive one
    assert cuts["a / b"] == pytest.approx((0.6 / 0.8 + 0.3 / 0.9) / 2)
    entries = {"border": {"targets": {"a": {}, "a / b": {}}}}
    arguments = shortcuts.Arguments(model="", data="", resamples=20)
    shortcuts.add_accuracies(arguments, task, entries, {"border": values}, truth, None, {"border": cuts})
    found = entries["border"]["targets"]
    assert found["a"]["accuracy"] == 0.75
    assert found["a / b"]["accuracy"] == 1.0  # the third class is left out
    assert not shortcuts.choose_cuts(task, values[:2], truth[:2])  # nothing of the other side, no threshold


def test_one_against_another_leaves_the_rest_out():
    names = ["a", "b", "c"]
    values = np.array([[0.2, 0.2, 0.6], [0.1, 0.3, 0.6], [0.5, 0.3, 0.2]])
    scores, held = shortcuts.ranked(values, np.eye(3), "a / b", names)
    assert scores == pytest.approx([0.5, 0.25, 0.625])
    assert held[:2].tolist() == [1, 0] and np.isnan(held[2])


@pytest.mark.parametrize(("figure", "whole", "expected"), [(0.75, 1.0, 0.5), (0.9, 0.9, 1.0), (0.4, 0.9, -0.25)])
def test_what_survives(figure, whole, expected):
    assert float(shortcuts.share(figure, whole)) == pytest.approx(expected)
    assert np.isnan(shortcuts.share(figure, 0.5))


def test_rows_are_chosen_with_their_patients():
    table = RadiographTable(pa.table({"id": ["x", "y", "z"]}), "set")
    rows = LabelledRows(table, torch.eye(3), ["p", None, "q"])
    kept = rows.where([True, False, True])
    assert (kept.table.ids, kept.patients, len(kept)) == (["x", "z"], ["p", "q"], 2)
    assert torch.equal(kept.targets, torch.eye(3)[[0, 2]])


def test_broken_files_are_skipped_and_listed(models, shard, tmp_path):
    (tmp_path / "set.parquet").write_bytes(Path(shard).read_bytes())
    damaged = break_rows(tmp_path / "set.parquet", {1, 20, 30, 33})  # train, val, twice test
    words = [*models, "--data", damaged, *COLUMNS, "--resamples", "2", "--output", str(tmp_path / "out" / "r.json")]
    with pytest.raises(SpcxrError, match="damaged or cut short"):
        shortcuts.main(words)
    assert shortcuts.main([*words, "--on_error", "skip"])["splits"]["test"]["images"] == 13
    lines = (tmp_path / "out" / "skipped.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["id", "row-1", "row-20", "row-30", "row-33"]
