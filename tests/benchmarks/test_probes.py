"""The list of probes on made-up films: every row is there, what can be seen is found, and what cannot is not."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spcxr_hf import SpcxrForPreTraining, SpcxrImageProcessor
from tests.common import tiny_config
from training_scripts.benchmarks import probes

pytestmark = pytest.mark.slow  # many starts of a second each

PNG = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(pixels: np.ndarray) -> dict:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def film(sick: bool, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture whose right half is bright where it is sick, and a mask of its bright left half."""
    pixels = generator.integers(0, 60, (64, 64))
    pixels[:, :32] += 150
    pixels[:, 32:] += 120 * sick
    mask = np.zeros((64, 64))
    mask[:, :32] = 1
    return pixels, mask


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    generator = np.random.default_rng(0)
    splits = ["train"] * 40 + ["val"] * 12 + ["test"] * 12
    rows: dict[str, list] = {name: [] for name in ("image", "id", *probes.COLUMNS)}

    def add(source: str, split: str, sick: bool, **labels: object) -> None:
        pixels, mask = film(sick, generator)
        row = {"image": png(pixels), "id": f"{source}-{len(rows['id'])}", "source": source, **labels}
        if source == "kermany":
            row |= {"lung_mask": png(255 * mask), "lung_split": split}
        if source == "jsrt":
            row |= {"anatomy_mask": png(mask * (probes.LEFT_LUNG + probes.HEART)), "anatomy_split": split}
        for name in rows:
            rows[name].append(row.get(name))

    for number, split in enumerate(splits):
        sick = number % 2 == 1
        add("kermany", split, sick, pneumonia_label="viral" if sick else "normal", pneumonia_split=split)
        chance = bool(generator.integers(2)) if split != "val" else sick  # a label that the picture does not show
        add("nih", split, False, findings=["Mass"] if chance else [], findings_split=split)
        add("cohen", split, sick, covid_label=("covid", "normal", "pneumonia")[number % 3], covid_split=split)
        add("rsna_thorax", split, sick, rsna_label="opacity" if sick else "normal", rsna_split=split)
        add("jsrt", "train" if number % 2 else "test", sick)
    for number in range(12):
        label = ("normal", "opacity", "normal", "other abnormal")[number % 4]
        add(
            "rsna_1024",
            "shift",
            label != "normal",
            rsna_label=label,
            rsna_split="shift",
            view=("PA", "AP")[number // 6],
        )
    add("kermany", "shift", True)
    folder = tmp_path_factory.mktemp("sets")
    kinds = {"image": PNG, "lung_mask": PNG, "anatomy_mask": PNG, "findings": pa.list_(pa.string())}
    for name, take in (("data", slice(0, 100)), ("rsna", slice(100, None))):
        (folder / name).mkdir()
        columns = {key: pa.array(values[take], kinds.get(key, pa.string())) for key, values in rows.items()}
        pq.write_table(pa.table(columns), folder / name / "set.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    SpcxrForPreTraining(tiny_config(image_size=32, patch_size=16)).save_pretrained(folder)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_the_whole_list(folders, model, tmp_path, capsys):
    words = ["--data", str(folders / "data"), "--rsna", str(folders / "rsna"), "--models", str(model)]
    probes.main([*words, "--results", str(tmp_path / "probes.json")])
    found = json.loads((tmp_path / "probes.json").read_text())["models"]["tiny"]
    assert found["image_size"] == 32
    rows = found["probes"]
    assert len(rows) == 2 * 6 + 3
    for method in ("linear", "k-NN"):
        assert rows[f"children, 100% of the labels, {method}"]["test"] == 1
        assert rows[f"screening, rsna_thorax, {method}"]["rsna_1024"] > 0.9
        assert 0.1 < rows[f"screening, NIH, {method}"]["test"] < 0.9
        assert rows[f"COVID-19, {method}"]["test"] < 0.8  # chance is 1 / 3
    for row in ("lungs, children, linear", "lungs, JSRT, linear", "heart, JSRT, linear"):
        assert rows[row]["test"] > 0.95
    table = capsys.readouterr().out
    assert "| probe | figure on | tiny |" in table and "| heart, JSRT, linear | test | **" in table


def test_patches_and_dice():
    mask = np.zeros((4, 4), bool)
    mask[0, 3] = True
    patches = probes.in_patches(mask, 4)
    assert patches.shape == (4, 4) and patches[1, 1] == 1 and patches.sum() == 1
    assert probes.dice(np.array([[True, True, False]]), np.array([[1.0, 0.0, 0.0]])) == pytest.approx(2 / 3, abs=1e-4)
