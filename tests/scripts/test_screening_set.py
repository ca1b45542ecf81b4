"""The set for screening: labels and splits of both sources, and a source left out."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spcxr_hf import SpcxrError
from training_scripts import screening_set


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
        source=["nih"] * 4 + ["other"],
        findings=findings,
        findings_split=["train", "train", "val", "test", None],
    )
    rsna = write(
        tmp_path / "rsna",
        list("fghij"),
        source=["rsna_thorax"] * 3 + ["rsna_1024"] * 2,
        rsna_label=["normal", "opacity", "opacity", "other abnormal", "normal"],
        rsna_split=["train", "train", "val", "shift", "shift"],
    )
    return ["--nih", nih, "--rsna", rsna]


def rows(folder):
    table = pq.read_table(folder / "screening.parquet").to_pydict()
    return {name: (split, label) for name, split, label in
            zip(table["id"], table["screening_split"], table["screening"], strict=True)}  # fmt: skip


def test_labels_and_splits(sources, tmp_path):
    screening_set.main([*sources, "--output", str(tmp_path / "set")])
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
    screening_set.main([*sources, "--output", str(tmp_path / "set"), "--train", "rsna_thorax"])
    found = rows(tmp_path / "set")
    assert {name for name, (split, _) in found.items() if split == "train"} == {"f", "g"}
    assert found["d"][0] == "nih_test"
    with pytest.raises(SpcxrError, match="no rows of the source 'mimic'"):
        screening_set.main([*sources, "--output", str(tmp_path / "set"), "--train", "mimic"])
