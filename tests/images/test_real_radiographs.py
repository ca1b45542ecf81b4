"""On the real development radiographs: splits do not overlap, back ends agree, the bundled lungs are lungs."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation

from spcxr_hf import SpcxrImageProcessor, SpcxrImageProcessorPil
from spcxr_hf.data.table import open_image, open_mask, read_table
from spcxr_hf.evaluation.metrics import dice

TREE = Path(__file__).parents[2]
DATA = TREE.parent / "shared" / "data"
SPLITS = ("pneumonia_split", "findings_split", "covid_split", "lung_split")

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason="the development radiographs are not beside the checkout"),
]


def test_pretraining_sees_no_image_that_a_task_is_judged_on():
    seen = 0
    for shard in sorted(DATA.glob("*.parquet")):
        rows = pq.read_table(shard, columns=["pretrain", *SPLITS]).to_pylist()
        for row in rows:
            held_out = any(row[split] in ("val", "test", "shift") for split in SPLITS)
            assert not (row["pretrain"] and held_out), shard.name
        seen += sum(row["pretrain"] for row in rows)
    assert seen == 18103


@pytest.mark.slow
def test_back_ends_agree_on_two_hundred_radiographs():
    folder = TREE / "model_cards" / "pneumonia"
    kinds = (SpcxrImageProcessor, SpcxrImageProcessorPil)
    processors = [kind.from_pretrained(folder) for kind in kinds]
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    cells = [cell for shard in ("nih-00", "kermany-00") for cell in first_images(shard, 100)]
    for start in range(0, len(cells), 50):
        images = [open_image(cell, "image") for cell in cells[start : start + 50]]
        one, other = (processor(images, return_tensors="pt").pixel_values for processor in processors)
        assert (one - other).abs().max() * processors[0].image_std[0] <= 1 / 255
        with torch.no_grad():
            first, second = (model(values).logits.argmax(dim=1) for values in (one, other))
        assert torch.equal(first, second)
    assert len(cells) == 200


def first_images(shard: str, count: int) -> list:
    return read_table(DATA / f"{shard}.parquet").rows["image"][:count].to_pylist()


@pytest.mark.slow
def test_bundled_lung_segmentation():
    folder = TREE / "model_cards" / "lung-segmentation"
    table = read_table(DATA / "kermany-00.parquet").where("lung_split", "val")
    rows = range(0, len(table), max(1, len(table) // 12))[:12]
    images = [open_image(table.column("image")[row], "image") for row in rows]
    targets = [np.asarray(open_mask(table.column("lung_mask")[row], "mask")) > 127 for row in rows]
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    processor = SpcxrImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images, return_tensors="pt"))
    sizes = [target.shape for target in targets]
    masks = processor.post_process_semantic_segmentation(outputs, sizes)
    scores = [dice(mask == 1, torch.from_numpy(target)).item() for mask, target in zip(masks, targets, strict=True)]
    assert np.mean(scores) > 0.88  # the mean training mask reaches 0.83, this checkpoint 0.917 on all of val
