"""On the real development radiographs: splits do not overlap, back ends agree, the bundled lungs are lungs."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSemanticSegmentation

from spcxr_hf import SpcxrImageProcessor, SpcxrImageProcessorPil
from spcxr_hf.data import open_image, open_mask, read_table
from spcxr_hf.metrics import dice

TREE = Path(__file__).parents[1]
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


def test_back_ends_agree():
    table = read_table(DATA / "nih-00.parquet")
    images = [open_image(cell, "nih") for cell in table.column("image")[:40]]
    torchvision, pillow = (kind(do_normalize=False) for kind in (SpcxrImageProcessor, SpcxrImageProcessorPil))
    one, other = (processor(images, return_tensors="pt").pixel_values for processor in (torchvision, pillow))
    assert one.shape == (40, 1, 224, 224)
    assert (one - other).abs().max() <= 1 / 255


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
