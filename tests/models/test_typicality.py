"""How unlike its training images a classifier finds another: distances, ranks, the file, and what is done with it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import mahalanobis

from spcxr_hf import SpcxrError, SpcxrForImageClassification, SpcxrImageProcessor
from spcxr_hf.inference import tasks
from spcxr_hf.inference.pipeline import Job, find_sources
from spcxr_hf.models.loading import load_checkpoint, load_statistics
from spcxr_hf.models.typicality import fit_statistics
from tests.common import build, tiny_config
from tests.made_up import picture, write_set
from training_scripts import feature_statistics

LABELS = {0: "normal", 1: "bacterial pneumonia", 2: "viral pneumonia"}
RECIPE = """label_column: pneumonia_label
split_column: pneumonia_split
classes: [normal, bacterial pneumonia=bacterial, viral pneumonia=viral]
"""


def clouds(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of 200 points around (0, 0, 0) and (4, 4, 4), wide along the first axis."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.tensor([[1.0, 0.0]] * 200 + [[0.0, 1.0]] * 200)
    points = torch.randn(400, 3, generator=generator) * torch.tensor([5.0, 1.0, 0.2]) + 4 * targets[:, 1:]
    return points, targets


def test_distances_are_mahalanobis_to_the_nearest_mean():
    points, targets = clouds()
    found = fit_statistics(points, targets, clouds(1)[0])
    assert found["means"].shape == (2, 3) and found["precision"].shape == (3, 3)
    queries = torch.tensor([[0.0, 0.0, 0.0], [4.0, 4.0, 4.0], [9.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    distances = SpcxrForImageClassification.training_distance(queries, found)
    for query, distance in zip(queries, distances, strict=True):
        each = [mahalanobis(query.numpy(), mean.numpy(), found["precision"].numpy()) ** 2 for mean in found["means"]]
        assert distance.item() == pytest.approx(min(each), rel=1e-4)
    assert distances[3] > distances[2]  # 2 along the narrow axis is farther than 9 along the wide one


def test_the_share_is_a_rank_among_validation_images():
    points, targets = clouds()
    validation = clouds(1)[0]
    found = fit_statistics(points, targets, validation)
    shares = SpcxrForImageClassification.unlike_training(validation, found)
    assert shares.min() == 0 and shares.max() == pytest.approx(1 - 1 / len(validation), abs=2 / len(validation))
    assert shares.median() == pytest.approx(0.5, abs=0.01)
    assert SpcxrForImageClassification.unlike_training(torch.full((1, 3), 100.0), found).item() == 1.0


def test_images_with_equal_labels_are_one_class():
    """A missing label is a value of its own, not a class of each image."""
    targets = torch.tensor([[1.0, float("nan")]] * 5 + [[0.0, 1.0]] * 5)
    assert fit_statistics(torch.randn(10, 4), targets, torch.randn(3, 4))["means"].shape == (2, 4)
    with pytest.raises(SpcxrError, match="need two training images"):
        fit_statistics(torch.randn(1, 4), targets[:1], torch.randn(3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier with the statistics that the script writes."""
    folder = tmp_path_factory.mktemp("model")
    names = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    points = {"bacterial pneumonia": {"youden": 0.4}}
    config = tiny_config(problem_type="single_label_classification", operating_points=points, **names)
    build(SpcxrForImageClassification, config).save_pretrained(folder)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    data = write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 30 + ["val"] * 12)
    feature_statistics.main(["--model", str(folder), "--data", str(data)])
    return folder


def test_the_script_writes_what_the_loader_reads(folder):
    found = load_statistics(str(folder))
    assert {name: values.shape[0] for name, values in found.items()} == {"means": 3, "precision": 32, "distances": 12}
    assert (found["distances"].diff() >= 0).all()
    assert load_checkpoint("classification", folder, "cpu").statistics is not None


@pytest.mark.parametrize("change", ["cut", "shapes", "nan"])
def test_damaged_statistics_are_named(folder, tmp_path, change):
    name = "feature_statistics.safetensors"
    found = load_file(folder / name)
    if change == "shapes":
        found["precision"] = found["precision"][:5]
    elif change == "nan":
        found["means"][0, 0] = float("nan")
    save_file({key: values.contiguous() for key, values in found.items()}, tmp_path / name)
    if change == "cut":
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(SpcxrError, match=f"{name} cannot be used"):
        load_statistics(str(tmp_path))


def unlike(distances):
    """Statistics in which every image is nearer to the training images than these say."""
    return {"means": torch.zeros(1, 32), "precision": torch.eye(32), "distances": torch.tensor(distances)}


@pytest.fixture
def sources(tmp_path):
    for number in range(2):
        Image.fromarray(picture(number, size=40)[0]).save(tmp_path / f"{number}.png")
    return find_sources([tmp_path])


def test_an_unlike_image_is_warned_of(folder, sources, tmp_path):
    loaded = load_checkpoint("classification", folder, "cpu")
    for distances, share in ([0.0, 1e9], 0.5), ([0.0, 0.0], 1.0):
        loaded = loaded._replace(statistics=unlike(distances))
        output = tmp_path / f"{share}.jsonl"
        Job(sources, output).run(loaded, tasks.Predictor(loaded))
        for record in map(json.loads, output.read_text().splitlines()):
            assert record["unlike_training"] == share
            assert ("unlike the images" in " ".join(record["warnings"])) == (share > 0.99)
            assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_abstaining_leaves_the_answer_empty(folder, sources, tmp_path):
    """In every format, also where the first record is the empty one."""
    loaded = load_checkpoint("classification", folder, "cpu")
    predictor = tasks.Predictor(loaded, abstain=True)
    for suffix in (".jsonl", ".csv", ".parquet", ".txt"):
        Job(sources, tmp_path / f"all{suffix}").run(loaded._replace(statistics=unlike([0.0])), predictor)
    record = json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])
    assert record["label"] is None and set(record["probabilities"].values()) == {None}
    assert record["targets"]["bacterial pneumonia"] == {"probability": None, "decision": None, "threshold": 0.4}
    rows = pq.read_table(tmp_path / "all.parquet")
    assert rows.schema.field("probabilities.normal").type == "double" and rows.schema.field("label").type == "string"
    assert rows["probabilities.normal"].null_count == 2
    assert "no answer" in (tmp_path / "all.txt").read_text()
    kept = loaded._replace(statistics=unlike([0.0, 1e9]))
    Job(sources, tmp_path / "kept.jsonl").run(kept, predictor)
    kept_record = json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])
    assert np.isfinite(list(kept_record["probabilities"].values())).all()


def test_without_statistics_there_is_nothing_to_abstain_by(folder):
    loaded = load_checkpoint("classification", folder, "cpu")._replace(statistics=None)
    with pytest.raises(SpcxrError, match="has no feature_statistics.safetensors, so it cannot abstain"):
        tasks.Predictor(loaded, abstain=True)
