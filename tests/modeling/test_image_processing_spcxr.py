"""The image processor: equal pictures give equal values, whatever their kind; what is unclear is refused."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.image_utils import PILImageResampling

from spcxr_hf.images import limits
from spcxr_hf.images.reader import read_radiograph
from spcxr_hf.modeling import image_processing_spcxr
from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig
from spcxr_hf.modeling.image_processing_spcxr import RADIOGRAPH_MEAN, RADIOGRAPH_STD
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor as Torchvision
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessorPil as Pillow
from spcxr_hf.modeling.modeling_spcxr import (
    SpcxrForImageClassification,
    SpcxrForSemanticSegmentation,
    SpcxrModel,
)
from tests.common import build
from tests.phantom import draw_chest

BACKENDS = [Torchvision, Pillow]
HEIGHT, WIDTH = 300, 260


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth grey pattern (height, width) uint8 with values from 0 to 255 and no symmetry."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.sin(rows / 17) + np.cos(columns / 11 + rows / 40) + rows / height
    return np.rint((waves - waves.min()) / np.ptp(waves) * 255).astype(np.uint8)


def processed(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs).pixel_values


def unit(processor, images, **kwargs) -> torch.Tensor:
    """Processed, but not normalised: 0..1."""
    return processed(processor, images, do_normalize=False, **kwargs)


def kinds_of(grey: np.ndarray) -> dict[str, object]:
    """The same picture in every accepted kind."""
    deep = grey.astype(np.uint16) * 257
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    alpha = np.full((*grey.shape, 1), 128, np.uint8)
    palette = Image.fromarray(grey).convert("P")
    assert palette.mode == "P"
    return {
        "PIL L": Image.fromarray(grey),
        "PIL LA": Image.merge("LA", [Image.fromarray(grey), Image.new("L", grey.shape[::-1], 9)]),
        "PIL RGB": Image.fromarray(rgb),
        "PIL RGBA": Image.fromarray(np.concatenate([rgb, alpha], axis=-1)),
        "PIL P": palette,
        "PIL PA": palette.convert("PA"),
        "PIL I;16": Image.fromarray(deep),
        "PIL I;16B": Image.frombytes("I;16B", grey.shape[::-1], deep.astype(">u2").tobytes()),
        "PIL I": Image.fromarray(deep.astype(np.int32)),
        "PIL F": Image.fromarray(grey.astype(np.float32) / 255),
        "uint8 HW": grey,
        "uint8 HW1": grey[..., None],
        "uint8 1HW": grey[None],
        "uint8 HW3": rgb,
        "uint8 3HW": np.moveaxis(rgb, -1, 0),
        "uint8 HW4": np.concatenate([rgb, alpha], axis=-1),
        "uint16": deep,
        "big-endian uint16": deep.astype(">u2"),
        "uint32": deep.astype(np.uint32),
        "int32": deep.astype(np.int32),
        "int64": deep.astype(np.int64),
        "float64": grey / 255,
        "float32": (grey / 255).astype(np.float32),
        "float16": (grey / 255).astype(np.float16),
        "mirrored twice": grey[:, ::-1].copy()[:, ::-1],
        "torch uint8": torch.from_numpy(grey),
        "torch uint8 3HW": torch.from_numpy(np.moveaxis(rgb, -1, 0).copy()),
        "torch uint8 HW3": torch.from_numpy(rgb),
        "torch uint16": torch.from_numpy(deep),
        "torch float32 1HW": torch.from_numpy(grey[None] / 255).float(),
        "torch float16": torch.from_numpy(grey / 255).half(),
        "torch bfloat16": torch.from_numpy(grey / 255).bfloat16(),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults(backend):
    pixel_values = processed(backend(), Image.fromarray(picture()))
    assert pixel_values.shape == (1, 1, 224, 224)
    assert pixel_values.dtype == torch.float32
    mean, std = RADIOGRAPH_MEAN[0], RADIOGRAPH_STD[0]
    assert pixel_values.min() == pytest.approx(-mean / std, abs=0.05)
    assert pixel_values.max() == pytest.approx((1 - mean) / std, abs=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", kinds_of(picture(8, 8)))
def test_every_kind_of_one_picture_gives_the_same_values(backend, kind):
    grey = picture()
    expected = unit(backend(), grey)
    assert expected.max() - expected.min() > 0.9
    difference = (unit(backend(), kinds_of(grey)[kind]) - expected).abs().max()
    assert difference <= 2 / 255


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_at_the_picture_s_own_size(backend):
    """Without resizing, the values are the stored ones over the range of their type, exactly."""
    grey = np.array([[0, 51, 255]], dtype=np.uint8)
    deep = np.array([[0, 13107, 65535]], dtype=np.uint16)
    for image in (grey, deep, Image.fromarray(grey), Image.fromarray(deep)):
        assert unit(backend(), image, do_resize=False).flatten().tolist() == pytest.approx([0, 0.2, 1], abs=1e-7)
    bits = np.array([[False, True, True]])
    for image in (bits, torch.from_numpy(bits), Image.fromarray(bits)):
        assert unit(backend(), image, do_resize=False).flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_grey_is_the_luminance(backend):
    rgb = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pillow = np.asarray(Image.fromarray(rgb).convert("L")) / 255
    ours = unit(backend(), rgb, do_resize=False)[0, 0].numpy()
    assert np.abs(ours - pillow).max() <= 0.51 / 255  # Pillow rounds to a whole grey level
    same = np.repeat(rgb[..., :1], 3, axis=-1)
    assert torch.equal(
        unit(backend(), same, do_resize=False), unit(backend(), np.ascontiguousarray(rgb[..., 0]), do_resize=False)
    )


@pytest.mark.parametrize("resample", [PILImageResampling.BILINEAR, PILImageResampling.BICUBIC])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (97, 613), (100, 100), (224, 224), (1024, 900)])
def test_back_ends_agree(shape, resample):
    deep = np.random.default_rng(1).integers(0, 65536, shape).astype(np.uint16)
    difference = unit(Torchvision(), deep, resample=resample) - unit(Pillow(), deep, resample=resample)
    assert difference.abs().max() < 1 / 255


@pytest.mark.parametrize("backend", BACKENDS)
def test_resizing_keeps_16_bits_and_antialiases(backend):
    faint = np.full((448, 448), 30000, np.uint16)
    faint[:, 224:] = 30010  # less than an 8-bit step
    values = unit(backend(), faint)[0, 0]
    assert values[0, 0].item() == pytest.approx(30000 / 65535, abs=1e-6)
    assert values[0, -1].item() == pytest.approx(30010 / 65535, abs=1e-6)
    stripes = np.tile(np.array([0, 255], np.uint8), (448, 448))
    assert unit(backend(), stripes)[..., 1:-1].sub(0.5).abs().max() < 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_image_at_another_size(backend):
    grey = np.zeros((200, 100), np.uint8)
    grey[:, :2], grey[:, -2:] = 255, 255  # the borders survive: nothing is cropped
    values = unit(backend(), grey, size={"height": 96, "width": 160})
    assert values.shape == (1, 1, 96, 160)
    assert values[..., 0].min() > 0.9
    assert values[..., -1].min() > 0.9
    assert values[..., 80].max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(backend):
    grey, other = picture(), picture(50, 70)
    mixed = [
        Image.fromarray(grey),
        other,
        torch.from_numpy(grey / 255),
        np.stack([other] * 3, -1),
        Image.new("1", (9, 9)),
    ]
    processor = backend()
    batch = processed(processor, mixed)
    assert batch.shape == (5, 1, 224, 224)
    for row, image in zip(batch, mixed, strict=True):
        assert torch.equal(row, processed(processor, image)[0])
    for array in (np.stack([other, other])[:, None], np.stack([other, other])[..., None]):
        assert torch.equal(processed(processor, array), batch[1:2].expand(2, -1, -1, -1))
        assert torch.equal(processed(processor, torch.from_numpy(array)), batch[1:2].expand(2, -1, -1, -1))
    assert torch.equal(processed(processor, [[grey], [other, other]])[2], batch[1])
    assert [tuple(row.shape) for row in processor([grey, other], do_resize=False)["pixel_values"]] == [
        (1, HEIGHT, WIDTH),
        (1, 50, 70),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_channels_for_an_rgb_model(backend):
    one, three = processed(backend(), picture()), processed(backend(num_output_channels=3), picture())
    assert three.shape == (1, 3, 224, 224)
    assert torch.equal(three, one.expand(-1, 3, -1, -1))
    per_channel = processed(
        backend(), picture(), num_output_channels=3, image_mean=[0.1, 0.2, 0.3], image_std=[1.0] * 3
    )
    assert (per_channel[:, 0] - per_channel[:, 2]).mean().item() == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_data_format_decides(backend):
    array = np.random.default_rng(2).integers(0, 256, (3, 20, 3), dtype=np.uint8)
    first = unit(backend(), array, input_data_format="channels_first", do_resize=False)
    last = unit(backend(), array, input_data_format="channels_last", do_resize=False)
    assert first.shape == (1, 1, 20, 3)
    assert last.shape == (1, 1, 3, 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rescale_options(backend):
    twelve_bits = np.array([[0, 819, 4095]], np.uint16)
    values = unit(backend(), twelve_bits, do_resize=False, rescale_factor=1 / 4095)
    assert values.flatten().tolist() == pytest.approx([0, 0.2, 1])
    floats = picture() / 255
    assert torch.equal(processed(backend(), floats, do_rescale=False), processed(backend(), floats))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("low", "high"), [(0, 255), (-1024, 1024), (-1.0, 1.0)])
def test_a_stated_range(backend, low, high, tmp_path):
    """Values of any range are taken where it is stated, per call or in the configuration, and none beyond it."""
    levels = picture() / 255
    stated = levels * (high - low) + low
    expected = unit(backend(), levels)
    assert (unit(backend(), stated, value_range=(low, high)) - expected).abs().max() < 1e-5
    backend(value_range=(low, high)).save_pretrained(tmp_path)
    assert (unit(backend.from_pretrained(tmp_path), torch.from_numpy(stated)) - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="check value_range"):
        unit(backend(), stated * 2, value_range=(low, high))
    with pytest.raises(ValueError, match="lower first"):
        unit(backend(), stated, value_range=(high, low))


GREY = picture(32, 32)
REFUSED = {
    "float above the range": (GREY.astype(np.float32), r"from 0 to 255, outside 0\.\.1: .*uint8"),
    "normalised beforehand": (GREY / 64 - 2.0, r"from -2 to 1\.98\d*, outside 0\.\.1: .*do not normalise"),
    "PIL F out of range": (Image.fromarray(GREY.astype(np.float32)), r"outside 0\.\.1"),
    "NaN": (np.full((4, 4), np.nan), "NaN or infinite"),
    "one NaN": (torch.tensor([[0.1, float("nan")], [0.2, 0.3]]), "NaN or infinite"),
    "infinite": (np.array([[0.5, np.inf], [0, 0]]), "NaN or infinite"),
    "negative": (np.array([[-1, 300], [5, 6]], np.int16), r"int16 values from -1 to 300: .*0\.\.65535"),
    "too large": (np.array([[0, 70000]], np.int32), r"to 70000: .*0\.\.65535"),
    "8 or 16 bit": (GREY.astype(np.int64), r"int64 values from 0 to 255 can be 8 or 16 bit"),
    "PIL I with 8 bits": (Image.fromarray(GREY.astype(np.int32)), "8 or 16 bit"),
    "complex": (GREY.astype(np.complex64), "complex64 are not accepted"),
    "complex tensor": (torch.zeros(4, 4, dtype=torch.complex64), "complex images"),
    "object array": (np.full((3, 3), None), "object are not accepted"),
    "text array": (np.full((3, 3), "a"), "are not accepted"),
    "empty": (np.zeros((0, 5), np.uint8), "holds no pixels"),
    "empty PIL": (Image.new("L", (0, 7)), "holds no pixels"),
    "empty list": ([], "no images given"),
    "empty batch": (np.zeros((0, 1, 5, 5), np.uint8), "no images given"),
    "1 dimension": (np.zeros(5, np.uint8), r"got \(5,\)"),
    "2 channels": (np.zeros((32, 32, 2), np.uint8), r"1, 3 or 4 channels; got the shape \(32, 32, 2\)"),
    "5 channels": (np.zeros((5, 32, 32), np.uint8), "1, 3 or 4 channels"),
    "grey images without a channel": (np.zeros((8, 32, 32), np.uint8), r"\(N, 1, H, W\)"),
    "5 dimensions": (torch.zeros(1, 1, 1, 8, 8), "at most 4 dimensions"),
    "4 grey images": (np.zeros((4, 32, 32), np.uint8), r"four grey ones: give grey images as \(4, 1, H, W\)"),
    "batch of 4 grey images each": (torch.zeros(2, 4, 32, 32), "four grey ones"),
    "too long": (np.zeros((1, 49_000_000), np.uint8), "1 x 49000000 pixels is too large or too long"),
    "too long PIL": (Image.new("L", (49_000_000, 1)), "1 x 49000000 pixels is too large or too long"),
    "strip": (torch.zeros(1, 600, 10), "600 x 10 pixels is too large or too long"),
    "two readings": (np.zeros((3, 32, 3), np.uint8), "input_data_format"),
    "path": ("chest.png", "read_radiograph"),
    "Path": (Path("chest.png"), "read_radiograph"),
    "bytes": (b"\x89PNG", "read_radiograph"),
    "None": (None, "got NoneType"),
    "list of numbers": ([[0, 1], [1, 0]], "got int"),
    "dict": ({"image": GREY}, "got dict"),
    "CMYK": (Image.new("CMYK", (8, 8)), "PIL mode 'CMYK' is not accepted"),
    "HSV": (Image.new("HSV", (8, 8)), "PIL mode 'HSV' is not accepted"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REFUSED)
def test_refused(backend, case):
    image, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        backend()(image, return_tensors="pt")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_rescale": False}, "do_rescale=False needs a float image"),
        ({"rescale_factor": 1 / 127}, "check rescale_factor"),
        ({"size": {"shortest_edge": 224}}, "size must give height and width"),
        ({"num_output_channels": 2}, "num_output_channels must be 1 or 3"),
        ({"do_convert_rgb": True}, "num_output_channels=3"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "image_mean has 3 values for 1 output"),
        ({"input_data_format": "channels_last"}, "1, 3 or 4 channels"),
    ],
)
def test_refused_options(backend, options, message):
    with pytest.raises(ValueError, match=message):
        backend()(GREY[None], return_tensors="pt", **options)


def test_refusal_says_which_image():
    with pytest.raises(ValueError, match="image 2: the image holds NaN"):
        Torchvision()([GREY, GREY, np.full((4, 4), np.nan)])


def test_rounding_beyond_the_range_is_cut_off():
    values = unit(Torchvision(), torch.tensor([[-0.0005, 1.0005]]), do_resize=False)
    assert values.flatten().tolist() == [0, 1]


@pytest.fixture
def warned(monkeypatch) -> list[str]:
    """What the image processor warns of."""
    texts: list[str] = []
    monkeypatch.setattr(image_processing_spcxr.logger, "warning_once", texts.append)
    return texts


def test_dark_16_bit_images_are_warned_of(warned):
    for bits, expected in ((16, False), (15, False), (14, True), (12, True)):
        warned.clear()
        unit(Torchvision(), GREY.astype(np.uint16) * ((2**bits - 1) // 255))
        assert ["rescale_factor=1/4095" in text for text in warned] == [True] * expected


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_picture_that_lost_its_greys_is_warned_of(backend, bits, warned, tmp_path):
    """The pipelines of transformers cut a 16-bit file off at 255."""
    path = tmp_path / "chest.png"
    Image.fromarray(np.asarray(draw_chest(128)).astype(np.uint16) * ((2**bits - 1) // 255)).save(path)
    config = SpcxrConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    processor = backend(size={"height": 32, "width": 32})
    classify = pipeline("image-classification", model=SpcxrForImageClassification(config), image_processor=processor)
    classify(str(path))
    assert len(warned) == 1
    assert "spcxr_hf.read_radiograph" in warned[0]
    warned.clear()
    classify(read_radiograph(path, strict=None))
    assert warned == []
    for constant in (np.zeros((40, 40), np.uint8), np.full((40, 40), 0.3), Image.new("RGB", (40, 40), "white")):
        warned.clear()
        processor(constant)
        assert "constant" in warned[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_channels_are_one_rgb_picture(backend, warned):
    """A stack of three grey images is warned of; equal channels, channels last and a stated layout are not."""
    stack = np.stack([GREY, GREY[::-1], 255 - GREY])
    luminance = np.tensordot([0.299, 0.587, 0.114], stack / 255, 1)
    found = unit(backend(), stack, do_resize=False)
    assert (found[0, 0] - torch.from_numpy(luminance)).abs().max() < 1e-6
    assert len(warned) == 1
    assert "(3, 1, H, W)" in warned[0]
    warned.clear()
    last = unit(backend(), np.ascontiguousarray(stack.transpose(1, 2, 0)), do_resize=False)
    stated = unit(backend(), stack, do_resize=False, input_data_format="channels_first")
    assert torch.equal(last, found)
    assert torch.equal(stated, found)
    unit(backend(), np.repeat(GREY[None], 3, axis=0))
    unit(backend(), np.concatenate([stack, stack[:1]]), input_data_format="channels_first")  # RGBA
    assert warned == []


def test_sizes_are_bounded_as_the_reader_s():
    for name in ("MAX_PIXELS", "MAX_SIDE", "MAX_ASPECT"):
        assert getattr(image_processing_spcxr, name) == getattr(limits, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segmentation_maps(backend):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:150, :130], labels[150:, 130:] = 3, 255
    palette = Image.fromarray(labels)
    palette.putpalette([7] * 768)  # every label of the same colour
    kinds = [labels, torch.from_numpy(labels), Image.fromarray(labels), palette, labels.astype(np.int64)]
    batch = backend()([picture()] * 5, segmentation_maps=kinds, return_tensors="pt")
    assert batch["labels"].shape == (5, 224, 224)
    assert batch["labels"].dtype == torch.int64
    expected = torch.zeros(224, 224, dtype=torch.int64)
    expected[:112, :112], expected[112:, 112:] = 3, 255
    assert all(torch.equal(row, expected) for row in batch["labels"])
    assert torch.equal(batch["pixel_values"][:1], processed(backend(), picture()))
    stacked = backend()([picture()] * 2, np.stack([labels, labels]), return_tensors="pt")["labels"]
    assert torch.equal(stacked[1], expected)
    ignored = backend()(GREY, np.full((32, 32), -100), return_tensors="pt")["labels"]
    assert ignored.unique().tolist() == [-100]


def test_masks_of_0_and_255_are_two_classes():
    """255 is the label that the loss ignores: as it is, nothing inside would be learned."""
    inside = np.zeros((40, 40), bool)
    inside[5:30, 10:20] = True
    colour = Image.fromarray(np.where(inside[..., None], (255, 0, 0), (0, 0, 0)).astype(np.uint8))
    kinds = [inside, inside * np.uint8(255), inside * np.uint8(1), Image.fromarray(inside * np.uint8(255)), colour]
    labels = Torchvision()([picture()] * 5, segmentation_maps=kinds, return_tensors="pt")["labels"]
    assert all(torch.equal(one, labels[0]) for one in labels) and labels[0].unique().tolist() == [0, 1]
    ignored = inside * np.uint8(1)
    ignored[:3] = 255
    kept = Torchvision()(picture(), segmentation_maps=ignored, return_tensors="pt")["labels"]
    assert kept.unique().tolist() == [0, 1, 255]
    two = Image.fromarray(np.where(inside[..., None], (255, 0, 0), (0, 0, 255)).astype(np.uint8))
    with pytest.raises(ValueError, match="black outside"):
        Torchvision()(picture(), segmentation_maps=two)


def test_segmentation_maps_agree_between_back_ends():
    labels = np.random.default_rng(3).integers(0, 9, (311, 777))
    ours = [backend()(labels / 9, labels, return_tensors="pt")["labels"] for backend in BACKENDS]
    assert (ours[0] != ours[1]).float().mean() < 0.01
    assert ours[0].max() == 8


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (GREY / 255, "integer labels; got torch.float64"),
        (np.stack([GREY] * 2), "2 segmentation maps for 1 images"),
        (Image.new("LA", (32, 32)), "PIL mode 'LA'"),
        (Image.fromarray(np.eye(3, dtype=np.uint8)[np.arange(9).reshape(3, 3) % 3]), "two colours, black and another"),
        (np.full((4, 4), 2**25), "labels up to"),
        (np.zeros((0, 4), np.uint8), "not empty"),
        ("mask.png", "not paths"),
    ],
)
def test_refused_segmentation_maps(labels, message):
    with pytest.raises(ValueError, match=message):
        Torchvision()(GREY, labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_post_process_semantic_segmentation(backend):
    logits = torch.zeros(2, 3, 8, 8)
    logits[0, 2, :4], logits[1, 1, :, :2] = 5, 5
    outputs = SimpleNamespace(logits=logits)
    maps = backend().post_process_semantic_segmentation(outputs)
    assert [tuple(labels.shape) for labels in maps] == [(8, 8), (8, 8)]
    assert maps[0].dtype == torch.int64
    assert maps[0][:4].unique().tolist() == [2]
    assert maps[0][4:].unique().tolist() == [0]
    large, wide = backend().post_process_semantic_segmentation(outputs, target_sizes=[(80, 40), (16, 64)])
    assert large.shape == (80, 40)
    assert wide.shape == (16, 64)
    assert large[:36].unique().tolist() == [2]
    assert wide[:, :14].unique().tolist() == [1]
    assert wide[:, 20:].unique().tolist() == [0]
    with pytest.raises(ValueError, match="1 target_sizes for 2 images"):
        backend().post_process_semantic_segmentation(outputs, target_sizes=[(8, 8)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_post_process_overlapping_segmentation(backend, tmp_path):
    logits = torch.full((1, 2, 8, 8), -5.0)
    logits[0, 0, :4], logits[0, 1, :, :4] = 5, 5
    outputs = SimpleNamespace(logits=logits)
    backend(overlapping_labels=True).save_pretrained(tmp_path)
    processor = backend.from_pretrained(tmp_path)
    (small,) = processor.post_process_overlapping_segmentation(outputs)
    assert torch.equal(small, logits[0] > 0)
    (large,) = processor.post_process_overlapping_segmentation(outputs, [(80, 40)])
    assert large.shape == (2, 80, 40) and large[:, :36, :18].all() and not large[:, 44:, 22:].any()
    with pytest.raises(ValueError, match="these labels overlap"):
        processor.post_process_semantic_segmentation(outputs)
    assert hasattr(processor, "post_process_instance_segmentation")
    assert not hasattr(backend(), "post_process_instance_segmentation")
    assert "overlapping_labels" not in backend().to_dict()


def test_pipeline_of_overlapping_labels():
    names = {0: "left lung", 1: "heart", 2: "clavicle"}
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    grey = Image.fromarray(GREY)
    config = tiny_config(problem_type="multi_label_classification", **labels)
    model = build(SpcxrForSemanticSegmentation, config).eval()
    with torch.no_grad():
        model.decoder.classifier.bias.copy_(torch.tensor([3.0, 3.0, -20.0]))
    processor = Torchvision(size={"height": 32, "width": 32}, overlapping_labels=True)
    segmenter = pipeline("image-segmentation", model=model, image_processor=processor)
    found = segmenter(grey, threshold=0.5)
    assert [entry["label"] for entry in found] == ["left lung", "heart"]  # the third is nowhere
    outputs = model(**processor(grey, return_tensors="pt"))
    expected = processor.post_process_overlapping_segmentation(outputs, [(grey.height, grey.width)])[0].numpy()
    assert (expected[0] & expected[1]).any()
    for entry, mask in zip(found, expected, strict=False):
        assert ((np.asarray(entry["mask"]) == 255) == mask).mean() > 0.99
        assert 0.5 < entry["score"] <= 1


def test_cardiothoracic_ratio():
    masks = {name: torch.zeros(100, 200, dtype=torch.bool) for name in ("heart", "left lung", "right lung")}
    masks["right lung"][20:80, 20:80] = masks["left lung"][20:80, 120:180] = masks["heart"][50:80, 70:150] = True
    assert Torchvision.cardiothoracic_widths(masks) == {"heart": (70, 149), "lungs": (20, 179)}
    assert Torchvision().cardiothoracic_ratio(masks) == 0.5
    masks["heart"][0, 3] = True  # a speck is no edge
    assert Torchvision.cardiothoracic_ratio(masks) == 0.5
    masks["heart"][:] = False
    assert Torchvision.cardiothoracic_ratio(masks) is None
    assert Torchvision.cardiothoracic_ratio({"lung": masks["left lung"]}) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_and_reloaded(backend, tmp_path):
    processor = backend(size={"height": 96, "width": 64}, image_mean=[0.4], num_output_channels=3)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["image_processor_type"] == "SpcxrImageProcessor"
    assert config["auto_map"]["AutoImageProcessor"] == {
        "pil": "image_processing_spcxr.SpcxrImageProcessorPil",
        "torchvision": "image_processing_spcxr.SpcxrImageProcessor",
    }
    for other in BACKENDS:
        reloaded = other.from_pretrained(tmp_path)
        assert reloaded.to_dict() == processor.to_dict()
        assert processed(reloaded, GREY).shape == (1, 3, 96, 64)
    assert torch.equal(processed(backend.from_pretrained(tmp_path), GREY), processed(processor, GREY))


WITHOUT_THE_PACKAGE = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "spcxr_hf":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())

    import numpy as np
    from transformers import AutoImageProcessor

    folder, again = sys.argv[1:]
    image = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48) * 21
    values = {}
    for backend in ("torchvision", "pil", None):
        chosen = {} if backend is None else {"backend": backend}
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, **chosen)
        expected = "SpcxrImageProcessorPil" if backend == "pil" else "SpcxrImageProcessor"
        assert type(processor).__name__ == expected, (backend, type(processor))
        assert type(processor).__module__.startswith("transformers_modules."), type(processor).__module__
        values[backend] = processor(image, return_tensors="pt").pixel_values
        assert values[backend].shape == (1, 1, 224, 224)
    assert (values["pil"] - values["torchvision"]).abs().max() < 1e-4

    # Loaded in this way, it is saved with its code, and so loads again from there.
    processor.save_pretrained(again)
    reloaded = AutoImageProcessor.from_pretrained(again, trust_remote_code=True, backend="pil")
    assert type(reloaded).__name__ == "SpcxrImageProcessorPil"
    assert not [name for name in sys.modules if name.startswith("spcxr_hf")]
    print("loaded")
"""


@pytest.mark.slow
def test_loads_as_remote_code_without_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    monkeypatch.setattr(Torchvision, "_auto_class", None)  # undone afterwards
    Torchvision.register_for_auto_class("AutoImageProcessor")
    Torchvision().save_pretrained(folder)
    assert (folder / "image_processing_spcxr.py").exists()
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_THE_PACKAGE), str(folder), str(tmp_path / "again")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("loaded")


REGISTERED = """
    import sys

    from transformers import AutoImageProcessor
    from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig
    from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor, SpcxrImageProcessorPil

    AutoImageProcessor.register(
        SpcxrConfig,
        image_processor_classes={"torchvision": SpcxrImageProcessor, "pil": SpcxrImageProcessorPil},
        exist_ok=True,
    )
    folder = sys.argv[1]
    assert type(AutoImageProcessor.from_pretrained(folder)) is SpcxrImageProcessor
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")) is SpcxrImageProcessorPil
    assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)) is SpcxrImageProcessor
    print("loaded")
"""


@pytest.mark.slow
def test_loads_when_registered(tmp_path, monkeypatch):
    """The installed package serves, and the code file need not lie in the folder."""
    Torchvision().save_pretrained(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REGISTERED), str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("loaded")


WITHOUT_TORCHVISION = """
    import importlib.util
    import sys

    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *args: None if name == "torchvision" else find_spec(name, *args)
    sys.modules["torchvision"] = None

    import numpy as np
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError:  # earlier releases of transformers 5 ask for torchvision here whatever the back end
        sys.path.insert(0, sys.argv[1])
        from image_processing_spcxr import SpcxrImageProcessorPil

        processor = SpcxrImageProcessorPil.from_pretrained(sys.argv[1])
    assert type(processor).__name__ == "SpcxrImageProcessorPil", type(processor)
    batch = processor(np.eye(50), np.eye(50, dtype=int), return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 1, 224, 224)
    assert batch["labels"].shape == (1, 224, 224)
    module = sys.modules[type(processor).__module__]
    try:
        module.SpcxrImageProcessor()
    except ImportError as error:
        assert "orchvision" in str(error)
    else:
        raise AssertionError("the torchvision back end starts without torchvision")
    print("loaded")
"""


@pytest.mark.slow
def test_works_without_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    monkeypatch.setattr(Torchvision, "_auto_class", "AutoImageProcessor")
    Torchvision().save_pretrained(folder)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCHVISION), str(folder)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("loaded")


def tiny_config(**overrides) -> SpcxrConfig:
    return SpcxrConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        **overrides,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_pipelines(backend):
    processor = backend(size={"height": 32, "width": 32})
    image = Image.fromarray(picture())

    classify = pipeline(
        "image-classification", model=SpcxrForImageClassification(tiny_config(num_labels=3)), image_processor=processor
    )
    assert len(classify(image, top_k=3)) == 3

    model = SpcxrForSemanticSegmentation(tiny_config(num_labels=2)).eval()
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    pieces = segment(image)
    assert pieces
    assert {piece["mask"].size for piece in pieces} == {(WIDTH, HEIGHT)}
    assert sum(np.asarray(piece["mask"]).astype(bool) for piece in pieces).tolist() == np.ones((HEIGHT, WIDTH)).tolist()

    extract = pipeline("image-feature-extraction", model=SpcxrModel(tiny_config()), image_processor=processor)
    assert np.asarray(extract(image)).shape == (1, 17, 16)
