"""The sets of the heads: labels and splits of the sources, and a source left out."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spcxr_hf import SpcxrError
from training_scripts import head_sets


def write(path, ids, **columns):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": b"x", "path": None}] * len(ids), struct)
    path.mkdir()
    pq.write_table(pa.table({"image": image, "id": ids, **columns}), path / "set.parquet")
    return str(path)


@pytest.fixture
def sources(tmp_path):
    findings = pa.array([[], ["Pneumonia"], [], ["Mass"], None], pa.list_(pa.string()))
    nih = write(
        tmp_path / "nih",
        list("abcde"),
        source=["nih"] * 3 + ["cohen", "radiography_covid"],
        findings=findings,
        findings_split=["train", "train", "val", "test", None],
        covid_label=["pneumonia", "normal", None, "covid", "covid"],
        covid_split=["train", "shift", None, "shift", "train"],
    )
    rsna = write(
        tmp_path / "rsna",
        list("fghij"),
        source=["rsna_thorax"] * 3 + ["rsna_1024"] * 2,
        rsna_label=["normal", "opacity", "opacity", "other abnormal", "normal"],
        rsna_split=["train", "train", "val", "shift", "shift"],
    )
    return ["--data", nih, "--rsna", rsna]


def rows(folder):
    table = pq.read_table(folder / "screening.parquet").to_pydict()
    return {name: (split, label) for name, split, label in
            zip(table["id"], table["screening_split"], table["screening"], strict=True)}  # fmt: skip


def test_labels_and_splits(sources, tmp_path):
    head_sets.main(["--task", "screening", *sources, "--output", str(tmp_path / "set")])
    found = rows(tmp_path / "set")
    assert found["a"] == ("train", {"abnormal": False, "opacity": False})
    assert found["b"] == ("train", {"abnormal": True, "opacity": None})
    assert found["c"][0] == "nih_val" and found["d"][0] == "nih_test"
    assert "e" not in found
    assert found["h"] == ("val", {"abnormal": True, "opacity": True})
    assert found["i"] == ("shift", {"abnormal": True, "opacity": False})
    assert len(found) == 9
    table = pq.read_table(tmp_path / "set" / "screening.parquet").to_pydict()
    split = dict(zip(table["id"], table["opacity_split"], strict=True))
    assert split["j"] == "shift" and split["i"] is None and split["b"] is None and split["a"] == "train"


def test_a_source_left_out_of_the_training(sources, tmp_path):
    head_sets.main(["--task", "screening", *sources, "--output", str(tmp_path / "set"), "--train", "rsna_thorax"])
    found = rows(tmp_path / "set")
    assert {name for name, (split, _) in found.items() if split == "train"} == {"f", "g"}
    assert found["d"][0] == "nih_test"
    with pytest.raises(SpcxrError, match="no rows of the source 'mimic'"):
        head_sets.main(["--task", "screening", *sources, "--output", str(tmp_path / "set"), "--train", "mimic"])


def test_covid_and_normal_from_one_database(sources, tmp_path):
    head_sets.main(["--task", "covid", *sources, "--output", str(tmp_path / "set")])
    table = pq.read_table(tmp_path / "set" / "covid.parquet").to_pydict()
    found = dict(zip(table["id"], zip(table["covid_split"], table["covid"], strict=True), strict=True))
    assert found == {
        "b": ("shift", "normal"),
        "d": ("shift", "covid"),
        "e": ("train", "covid"),
        "f": ("train", "normal"),
        "g": ("train", "pneumonia"),
        "h": ("val", "pneumonia"),
        "j": ("shift", "normal"),
    }


def test_an_unknown_task_is_refused(sources, tmp_path):
    with pytest.raises(SpcxrError, match="no 'lungs'; there are screening and covid"):
        head_sets.main(["--task", "lungs", *sources, "--output", str(tmp_path / "set")])
