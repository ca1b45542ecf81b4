"""Lungs found by a model in a set's images, kept between starts, and images of which nothing else is left."""

import pytest
import torch

from spcxr_hf import (
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
)
from spcxr_hf.data.table import decode_set, read_table
from spcxr_hf.evaluation.shortcuts import lungs_alone
from spcxr_hf.models.lungs import Segmenter, find_lungs, load_segmenter, segment_lungs, segment_structures
from tests.common import build, tiny_config
from tests.made_up import write_set

NAMES = {"id2label": {0: "background", 1: "lung"}, "label2id": {"background": 0, "lung": 1}}


def save(model, folder):
    model.save_pretrained(folder)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = build(SpcxrForSemanticSegmentation, tiny_config(num_labels=2, **NAMES))
    return save(model, tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    return decode_set(read_table(write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 5)), 48)


def test_batches_change_nothing(folder, decoded):
    segmenter = load_segmenter(folder)
    lungs = segmenter.find(decoded.images, batch_size=2)
    assert lungs.shape == (5, 48, 48) and lungs.dtype == torch.bool
    assert 0 < lungs.float().mean() < 1
    one_by_one = torch.cat([segmenter.find(image[None]) for image in decoded.images])
    assert (lungs == one_by_one).float().mean() > 0.999


def test_lungs_are_kept_for_the_same_rows_and_weights(folder, decoded, tmp_path, monkeypatch):
    segmenter = load_segmenter(folder)
    found = find_lungs(segmenter, decoded, tmp_path)
    assert torch.equal(found, segmenter.find(decoded.images))
    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "find", lambda *_, **__: pytest.fail("they are found again"))
        assert torch.equal(find_lungs(load_segmenter(folder), decoded, tmp_path), found)
    with torch.no_grad():
        next(segmenter.loaded.model.parameters()).add_(1)
    find_lungs(segmenter, decoded, tmp_path)
    fewer = decode_set(decoded.table.without(["row-0"]), 48)
    assert len(find_lungs(segmenter, fewer, tmp_path)) == 4
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_two_lungs_are_lungs(decoded, tmp_path):
    names = {0: "heart", 1: "left lung", 2: "right lung"}
    options = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    config = tiny_config(problem_type="multi_label_classification", **options)
    segmenter = load_segmenter(save(build(SpcxrForSemanticSegmentation, config), tmp_path))
    loaded = segmenter.loaded
    pixel_values = loaded.processor(decoded.images[:2].numpy(), return_tensors="pt").pixel_values
    structures = segment_structures(loaded, pixel_values, [(48, 48), (20, 30)])
    assert [list(masks) for masks in structures] == [["heart", "left lung", "right lung"]] * 2
    assert structures[1]["heart"].shape == (20, 30)
    lungs = segment_lungs(loaded, pixel_values, [(48, 48), (20, 30)])
    for found, masks in zip(lungs, structures, strict=True):
        assert torch.equal(found, masks["left lung"] | masks["right lung"])
    assert segmenter.find(decoded.images).shape == (5, 48, 48)


def test_what_is_no_segmenter_of_lungs(tmp_path):
    with pytest.raises(SpcxrError, match="nowhere: there is no such folder"):
        load_segmenter(str(tmp_path / "nowhere"))
    other = {"id2label": {0: "background", 1: "heart"}, "label2id": {"background": 0, "heart": 1}}
    hearts = save(build(SpcxrForSemanticSegmentation, tiny_config(num_labels=2, **other)), tmp_path / "hearts")
    with pytest.raises(SpcxrError, match="its labels are background, heart; there is no 'lung'"):
        load_segmenter(hearts)
    classifier = save(build(SpcxrForImageClassification, tiny_config(num_labels=2)), tmp_path / "classifier")
    with pytest.raises(SpcxrError, match="no weights for .* SpcxrForSemanticSegmentation"):
        load_segmenter(classifier)


def test_lungs_alone():
    images = torch.randint(0, 256, (200, 1, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    lungs = torch.zeros(200, 20, 20, dtype=torch.bool)
    lungs[:, 5:15, 5:15] = True
    lungs[0] = False
    lungs[0, 0, :19] = True  # 4.75 % of the image: not found
    alone = lungs_alone(images, lungs)
    assert torch.equal(alone[0], images[0])
    assert torch.equal(alone[1:, 0][lungs[1:]], images[1:, 0][lungs[1:]])
    for image, whole in zip(alone[1:], images[1:], strict=True):
        assert (image[0, :5] == whole.float().mean().round()).all() and (image[0, 15:] == image[0, 0, 0]).all()
    assert torch.equal(lungs_alone(images, lungs, 0.0), images)
    half = lungs_alone(images, lungs, 0.5, torch.Generator().manual_seed(1))
    changed = (half != images).flatten(1).any(dim=1)
    assert 70 < changed.sum() < 130
    assert torch.equal(half[changed], alone[changed])
