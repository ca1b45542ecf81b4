"""The picture of nearest neighbors: who is next to whom, and who may not be."""

import json

import pyarrow.parquet as pq
import pytest
from PIL import Image

from spcxr_hf import SpcxrError, SpcxrImageProcessor, SpcxrModel
from spcxr_hf.inference.neighbors import NeighborIndex
from tests.common import build, tiny_config
from tests.made_up import write_set
from training_scripts.benchmarks import neighbors


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neighbors")
    build(SpcxrModel, tiny_config()).save_pretrained(folder / "model")
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    data = write_set(folder / "set.parquet", ["test"] * 9 + ["train"] * 3)
    return ["--model", str(folder / "model"), "--data", str(data)]


def test_a_row_for_each_image(words, tmp_path, capsys):
    flags = ["--split_column", "pneumonia_split", "--split", "test", "--label_column", "pneumonia_label"]
    result = neighbors.main([*words, *flags, "--queries", "3", "--neighbors", "2", "--output", str(tmp_path)])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'sheet.png'}\n")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (result["images"], len(result["neighbors"])) == (9, 3)
    index = NeighborIndex.load(tmp_path / "index.safetensors")
    for name, found in result["neighbors"].items():
        assert [one["id"] for one in found] != [name] and len(found) == 2
        nearest = {one.id: one.similarity for one in index.neighbors_of(name, 8)}
        for one in found:
            assert nearest[one["id"]] == pytest.approx(one["similarity"], abs=1e-6)
    assert 0 <= result["same_label"]["of_neighbors"] <= 1
    assert Image.open(tmp_path / "sheet.png").width > 300


@pytest.mark.slow
def test_images_of_the_same_patient_are_no_neighbors(words, tmp_path):
    table = pq.read_table(words[-1])
    patients = table["patient"].to_pylist()
    result = neighbors.main([*words, "--queries", "12", "--neighbors", "11", "--output", str(tmp_path)])
    patient_of = dict(zip(table["id"].to_pylist(), patients, strict=True))  # None is nobody known
    assert {None, "patient-2"} <= set(patients)
    for name, found in result["neighbors"].items():
        patient = patient_of[name]
        others = [one for one in patient_of if one != name and (patient is None or patient_of[one] != patient)]
        assert sorted(one["id"] for one in found) == sorted(others)


def test_refusals(words, tmp_path):
    with pytest.raises(SpcxrError, match="'nobody' is not among the 12 images"):
        neighbors.main([*words, "--ids", "nobody", "--output", str(tmp_path)])
    with pytest.raises(SpcxrError, match="queries must be at least 1"):
        neighbors.main([*words, "--queries", "0", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("label", "shown"),
    [(None, "None"), ("normal", "normal"), ([], "no finding"), (["Edema", "Mass"], "Edema, Mass")],
)
def test_labels_under_pictures(label, shown):
    assert neighbors.words([label], 0) == shown
    assert len(neighbors.words([["Consolidation"] * 9], 0).splitlines()) == 2
