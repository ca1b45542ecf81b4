"""Figures from other sources than a checkpoint's training."""

import numpy as np
import torch

from spcxr_hf import SpcxrForSemanticSegmentation
from spcxr_hf.data.table import read_table
from tests.inference.test_pipeline import save_model
from tests.made_up import write_set
from training_scripts.benchmarks import elsewhere

NAMES = {0: "left lung", 1: "right lung", 2: "heart"}


def test_lungs_of_an_anatomy(tmp_path, monkeypatch):
    table = read_table(write_set(tmp_path / "set.parquet", ["train"] * 2 + ["test"] * 3 + ["shift"] * 2))
    rows = table.rows.select(["id", "patient", "lung_split"]).to_pylist()
    folder = tmp_path / "anatomy"
    save_model(SpcxrForSemanticSegmentation, folder, id2label=NAMES, problem_type="multi_label_classification")
    found = elsewhere.measure_anatomy(folder, table, rows)["lung_masks"]
    assert [entry["images"] for entry in found.values()] == [3, 2]
    for entry in found.values():
        for meaning in ("lungs", "lungs and heart"):
            low, high = entry[meaning]["dice_ci95"]
            assert 0 <= low <= entry[meaning]["dice"] <= high <= 1

    def drawn(loaded, pixel_values, sizes):
        dark = pixel_values[:, 0].numpy() < 0  # of the made pictures the lungs alone are
        masks = [np.kron(one, np.ones((256 // one.shape[0],) * 2)) > 0 for one in dark]
        empty = torch.zeros(256, 256, dtype=torch.bool)
        return [{"left lung": torch.from_numpy(mask), "right lung": empty, "heart": empty} for mask in masks]

    monkeypatch.setattr(elsewhere, "segment_structures", drawn)
    found = elsewhere.measure_anatomy(folder, table, rows)["lung_masks"]
    assert all(entry["lungs"]["dice"] > 0.8 for entry in found.values())
