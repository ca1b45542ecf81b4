"""Changes of processing: each does what it says, can be switched off, and follows the generator."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from spcxr_hf import SpcxrError
from spcxr_hf.transforms.processing import (
    CHANGES,
    ProcessingChanges,
    add_border,
    add_marker,
    equalize_histogram,
    gaussian_blur,
    jpeg_artefacts,
    parse_changes,
)


def pictures(count: int = 6, height: int = 128, width: int = 96) -> torch.Tensor:
    """Random pictures with some grain, (count, 1, height, width) in 0 .. 1, that use little of the grey range."""
    coarse = torch.rand(count, 1, 12, 12, generator=seeded())
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    grain = torch.randn(smooth.shape, generator=seeded())
    return (0.2 + 0.5 * smooth + 0.03 * grain).clamp(0, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_alters_images_within_range(name):
    images = pictures()
    changed = CHANGES[name][1](images, seeded()).clamp(0, 1)
    assert changed.shape == images.shape and changed.dtype == torch.float32 and changed.isfinite().all()
    different = (changed - images).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert different.float().mean() > 0.6  # of a border or a window, some are hardly there


def test_switching_off():
    images = pictures(32)
    assert torch.equal(ProcessingChanges(())(images, seeded()), images)
    only_border = ProcessingChanges(("border",))(images, seeded())
    inside = slice(12, -12)
    assert torch.equal(only_border[..., inside, inside], images[..., inside, inside])
    assert not torch.equal(only_border, images)


def test_the_generator_decides():
    changes, images = ProcessingChanges(tuple(CHANGES)), pictures(32)
    before = images.clone()
    first = changes(images, seeded(1))
    assert torch.equal(first, changes(images, seeded(1)))
    assert not torch.equal(first, changes(images, seeded(2)))
    assert torch.equal(images, before)
    untouched = (first == images).flatten(1).all(dim=1)
    assert not untouched.all()


def test_bytes_are_read_as_grey_levels():
    grey = (pictures(2) * 255).round().to(torch.uint8)
    assert torch.allclose(ProcessingChanges(())(grey), grey / 255)


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_jpeg_is_what_pillow_writes(quality):
    image = pictures(1, 64, 60)  # a width that is no multiple of a block
    image = (image + 0.05 * torch.randn(image.shape, generator=seeded())).clamp(0, 1)
    stored = (image[0, 0] * 255).round().to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(stored.numpy()).save(stream, "JPEG", quality=quality)
    expected = np.asarray(Image.open(stream), dtype=np.float32)
    ours = jpeg_artefacts(image, torch.tensor([float(quality)]))[0, 0].numpy() * 255
    whole_blocks = slice(0, 56)  # libjpeg fills the last block in another way
    assert np.abs(ours - expected)[:, whole_blocks].mean() < 0.5
    assert np.abs(expected - stored.numpy())[:, whole_blocks].mean() > 1


def test_equalisation_flattens_the_histogram():
    image = pictures(1, 128, 128)
    flat = equalize_histogram(image, 1, torch.tensor([float("inf")]))
    shares = torch.histc(flat, 4, 0, 1) / flat.numel()
    assert (shares - 0.25).abs().max() < 0.05
    assert torch.histc(image, 4, 0, 1).max() / image.numel() > 0.4
    order = image.flatten().argsort()
    assert (flat.flatten()[order].diff() >= 0).all()  # brighter stays brighter


def test_a_clip_limit_of_one_leaves_the_contrast():
    """With every bin cut to a flat histogram, the table is the identity."""
    image = pictures(1, 64, 64)
    assert torch.allclose(equalize_histogram(image, 8, torch.tensor([0.0])), image, atol=0.01)


def test_blur_keeps_the_mean_and_takes_the_detail():
    point = torch.zeros(2, 1, 41, 41)
    point[:, 0, 20, 20] = 1
    blurred = gaussian_blur(point, torch.tensor([1.0, 3.0]).reshape(-1, 1, 1, 1))
    assert torch.allclose(blurred.sum(dim=(1, 2, 3)), torch.ones(2), atol=1e-4)
    place = torch.arange(41) - 20.0
    deviation = (blurred.sum(dim=(1, 2)) * place**2).sum(dim=1).sqrt()
    assert torch.allclose(deviation, torch.tensor([1.0, 3.0]), rtol=0.05)


def test_borders_and_markers_stay_near_the_edge():
    images = torch.full((40, 1, 100, 100), 0.5)
    for change in (add_border, add_marker):
        assert (change(images, seeded())[..., 40:60, 40:60] == 0.5).all()


def test_names_on_a_command_line():
    assert parse_changes([]) is None
    assert parse_changes(["all"]).changes == tuple(CHANGES)
    assert parse_changes(["jpeg", "gamma"]).changes == ("jpeg", "gamma")
    with pytest.raises(SpcxrError, match="unknown change of processing 'jpg'"):
        parse_changes(["jpg"])
