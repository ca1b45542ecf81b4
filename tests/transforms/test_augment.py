"""Views: ranges, determinism, what stays where, refusals."""

import pytest
import torch

from spcxr_hf.errors import SpcxrError
from spcxr_hf.transforms.augment import Views, resampling_weights, resize

PLAIN = {"scale": (1, 1), "ratio": (1, 1), "flip": 0, "brightness": 0, "contrast": 0, "blur": 0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 1, 40, 56), generator=generator(), dtype=torch.uint8)


def test_shape_and_range(images):
    views = Views(size=24, brightness=0.5, contrast=0.9)(images, generator())
    assert views.shape == (6, 1, 24, 24)
    assert views.dtype == torch.float32
    assert views.min() >= 0
    assert views.max() <= 1


def test_uint8_and_floats_agree(images):
    views = Views(size=24)
    assert torch.allclose(views(images, generator()), views(images.float() / 255, generator()), atol=1e-6)


def test_the_seed_decides(images):
    views = Views(size=24)
    assert torch.equal(views(images, generator(1)), views(images, generator(1)))
    assert not torch.allclose(views(images, generator(1)), views(images, generator(2)), atol=0.01)


def test_each_image_has_its_own_view(images):
    views = Views(size=24)(images[:1].expand(6, -1, -1, -1), generator())
    assert not torch.allclose(views[0], views[1], atol=0.01)


@pytest.mark.parametrize("size", [16, 40, 96])
def test_identity_view_is_a_plain_resize(images, size):
    expected = torch.nn.functional.interpolate(
        images.float() / 255, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    assert torch.allclose(Views(size=size, **PLAIN)(images, generator()), expected, atol=1e-4)
    assert torch.allclose(resize(images.float() / 255, size), expected, atol=1e-4)


def test_the_ratio_is_width_to_height():
    rows, columns = torch.linspace(0, 1, 64).reshape(1, 1, 64, 1), torch.linspace(0, 1, 64).reshape(1, 1, 1, 64)
    images = torch.cat([rows.expand(1, 1, 64, 64), columns.expand(1, 1, 64, 64)], dim=1)
    wide = Views(32, scale=(0.25, 0.25), ratio=(4, 4), flip=0, brightness=0, contrast=0, blur=0)
    view = wide(images)[0]
    height, width = (view.amax(dim=(1, 2)) - view.amin(dim=(1, 2))).tolist()
    assert height == pytest.approx(0.25, abs=0.03) and width == pytest.approx(1, abs=0.03)


def test_flip_mirrors(images):
    plain = Views(size=24, **PLAIN)(images, generator())
    flipped = Views(size=24, **{**PLAIN, "flip": 1})(images, generator())
    assert torch.allclose(flipped, plain.flip(3), atol=1e-6)


def test_masks_move_with_their_images():
    masks = torch.zeros(16, 40, 40, dtype=torch.bool)
    masks[:, 5:22, 8:30] = True
    views = Views(size=32, **{**PLAIN, "scale": (0.3, 1), "ratio": (0.7, 1.4), "flip": 0.5})
    seen, seen_masks = views.with_masks(255 * masks.unsqueeze(1).to(torch.uint8), masks, generator())
    assert seen_masks.dtype == torch.bool
    assert torch.equal(seen_masks, seen.squeeze(1) > 0.5)
    assert len({mask.sum().item() for mask in seen_masks}) > 8


def test_warped_masks_move_with_their_images():
    masks = torch.zeros(8, 2, 40, 40, dtype=torch.bool)
    masks[:, 0, 8:30, 10:28], masks[:, 1, 20:26, 4:34] = True, True
    views = Views(size=40, **PLAIN, rotation=30, shrink=0.3, elastic=0.05)
    for number in (0, 1):
        seen, seen_masks = views.with_masks(255 * masks[:, [number]].to(torch.uint8), masks, generator())
        assert seen_masks.shape == (8, 2, 40, 40)
        assert torch.equal(seen_masks[:, number], seen.squeeze(1) > 0.5)
    assert not torch.equal(seen_masks, masks)
    turned = Views(size=40, **PLAIN, rotation=1e-6).with_masks(masks[:, :1].float(), masks, generator())
    assert torch.equal(turned[1], masks)


def test_a_turn_keeps_areas_and_shrinking_does_not():
    disc = ((torch.arange(80)[:, None] - 39.5) ** 2 + (torch.arange(80) - 39.5) ** 2 < 30**2).expand(6, 80, 80)
    whole = disc[0].sum().item()
    turned = Views(size=80, **PLAIN, rotation=90).with_masks(disc[:, None].float(), disc, generator())[1]
    assert turned.sum(dim=(1, 2)).tolist() == pytest.approx([whole] * 6, rel=0.01)
    smaller = Views(size=80, **PLAIN, shrink=0.5).with_masks(disc[:, None].float(), disc, generator())[1]
    assert all(0.24 * whole < area <= 1.01 * whole for area in smaller.sum(dim=(1, 2)).tolist())
    assert smaller.sum(dim=(1, 2)).min() < 0.8 * whole


def test_grey_values_and_blur_leave_the_mask_alone(images):
    masks = torch.rand(6, 40, 56, generator=generator()) > 0.5
    _, plain = Views(size=24, **PLAIN).with_masks(images, masks, generator(3))
    jitter = {**PLAIN, "brightness": 0.3, "contrast": 0.5, "blur": 1}
    _, jittered = Views(size=24, **jitter).with_masks(images, masks, generator(3))
    assert torch.equal(plain, jittered)


def test_images_without_masks(images):
    views, masks = Views(size=24).with_masks(images, None, generator())
    assert masks is None
    assert torch.equal(views, Views(size=24)(images, generator()))


def test_blur_smooths(images):
    sharp = Views(size=40, **PLAIN)(images, generator())
    blurred = Views(size=40, **{**PLAIN, "blur": 1, "blur_sigma": (1.0, 1.5)})(images, generator())
    assert blurred.std() < 0.6 * sharp.std()
    assert torch.allclose(blurred.mean(), sharp.mean(), atol=0.01)


@pytest.mark.parametrize(("size_in", "size_out"), [(50, 16), (16, 50), (20, 20)])
def test_weights_are_averages(size_in, size_out):
    start, length = torch.tensor([0.0, 3.5, 8.0]), torch.tensor([float(size_in), 5.25, 1.0])
    flipped = torch.tensor([False, True, False])
    weights = resampling_weights(start, length, size_in, size_out, flipped)
    assert weights.shape == (3, size_out, size_in)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(dim=2), torch.ones(3, size_out), atol=1e-5)
    mirrored = resampling_weights(start, length, size_in, size_out)
    assert torch.equal(weights[1], mirrored[1].flip(0))
    assert torch.equal(weights[0], mirrored[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0),
        ("scale", (0, 1)),
        ("scale", (0.5, 1.5)),
        ("scale", (0.9, 0.5)),
        ("ratio", (0, 1)),
        ("ratio", (2, 1)),
        ("flip", 1.5),
        ("brightness", 1),
        ("contrast", -0.1),
        ("blur", -1),
        ("blur_sigma", (0, 1)),
        ("rotation", 181),
        ("shrink", 1),
        ("elastic", -0.1),
    ],
)
def test_refusals_name_the_value(name, value):
    with pytest.raises(SpcxrError, match=rf"^{name} "):
        Views(**{name: value})
