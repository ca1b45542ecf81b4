"""read_dicom: stored values become what the maker wants shown, and the header stays where it is."""

import io
import logging
import re
import warnings
import zlib
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from spcxr_hf.errors import SpcxrError
from spcxr_hf.images import decoder_process, dicom, plausibility
from spcxr_hf.images.dicom import TECHNICAL_ATTRIBUTES
from spcxr_hf.images.reader import read_radiograph, read_with_quality_warnings
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor, SpcxrImageProcessorPil

pytest.importorskip("pydicom")
pytestmark = pytest.mark.filterwarnings("ignore::spcxr_hf.images.plausibility.ImplausibleWarning")

GREY = np.add.outer(np.arange(0, 200, 5), np.arange(0, 55)).astype(np.uint8)  # (40, 55), 0..249
PATIENT = "Doe^Jane"


def dataset(values: np.ndarray, bits: int, photometric: str = "MONOCHROME2", **attributes):
    """A radiograph of (rows, columns) stored values as a pydicom dataset, with a patient's name in it."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = ComputedRadiographyImageStorage, generate_uid()
    made.PatientName, made.PatientID, made.Modality = PATIENT, PATIENT, "CR"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, photometric
    made.Rows, made.Columns = values.shape
    made.BitsAllocated = 8 if values.dtype.itemsize == 1 else 16
    made.BitsStored, made.HighBit = bits, bits - 1
    made.PixelRepresentation = int(values.dtype.kind == "i")
    made.PixelData = values.tobytes()
    for name, value in attributes.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    return made


def saved(made, path):
    made.save_as(path, enforce_file_format=True)
    return path


def levels(image: Image.Image) -> np.ndarray:
    """0..1"""
    return np.asarray(image) / (255 if image.mode == "L" else 65535)


RAMP = np.linspace(0, 4095, 64).round().astype(np.uint16).reshape(8, 8)


def test_window(tmp_path):
    """LINEAR, PS3.3 C.11.2.1.2: center 1000, width 1001 -> black up to 500, white from 1500."""
    path = saved(dataset(RAMP, 12, WindowCenter=1000.5, WindowWidth=1001), tmp_path / "chest.dcm")
    expected = np.clip((RAMP - 500.0) / 1000, 0, 1)
    deep = read_radiograph(path, full_depth=True)
    assert deep.mode == "I;16"
    assert np.abs(levels(deep) - expected).max() < 1e-4
    image = read_radiograph(path)
    assert image.mode == "L"
    assert np.abs(levels(image) - expected).max() < 0.51 / 255


def test_first_of_several_windows(tmp_path):
    path = saved(dataset(RAMP, 12, WindowCenter=[1000.5, 9], WindowWidth=[1001, 3]), tmp_path / "chest.dcm")
    assert np.abs(levels(read_radiograph(path)) - np.clip((RAMP - 500.0) / 1000, 0, 1)).max() < 0.51 / 255


def test_monochrome1_is_inverted(tmp_path):
    options = {"WindowCenter": 1000.5, "WindowWidth": 1001}
    path = saved(dataset(RAMP, 12, "MONOCHROME1", **options), tmp_path / "chest.dcm")
    assert np.abs(levels(read_radiograph(path)) - (1 - np.clip((RAMP - 500.0) / 1000, 0, 1))).max() < 0.51 / 255


@pytest.mark.parametrize(("slope", "center"), [(2, 2001), (-1, -1000.5)])
def test_rescale_comes_before_the_window(tmp_path, slope, center):
    window = {"WindowCenter": center, "WindowWidth": abs(slope) * 1000 + 1}
    path = saved(dataset(RAMP, 12, RescaleSlope=slope, RescaleIntercept=0, **window), tmp_path / "chest.dcm")
    low = center - 0.5 - abs(slope) * 500
    expected = np.clip((RAMP * float(slope) - low) / (abs(slope) * 1000), 0, 1)
    assert np.abs(levels(read_radiograph(path)) - expected).max() < 1 / 255


def test_signed_values(tmp_path):
    signed = RAMP.astype(np.int16) - 2048
    path = saved(dataset(signed, 12, WindowCenter=0.5, WindowWidth=1001), tmp_path / "chest.dcm")
    assert np.abs(levels(read_radiograph(path)) - np.clip((signed + 500.0) / 1000, 0, 1)).max() < 0.51 / 255


def test_sigmoid_window(tmp_path):
    options = {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"}
    path = saved(dataset(RAMP, 12, **options), tmp_path / "chest.dcm")
    assert np.abs(levels(read_radiograph(path)) - 1 / (1 + np.exp(-4 * (RAMP - 2000.0) / 1000))).max() < 0.51 / 255


def test_voi_lut(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 10])
    item.add_new("LUTData", "US", (np.arange(4096) // 4)[::-1].tolist())
    path = saved(dataset(RAMP, 12, VOILUTSequence=[item]), tmp_path / "chest.dcm")
    assert np.abs(levels(read_radiograph(path)) - (1 - RAMP / 4095)).max() < 1.5 / 255


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 9}, {"WindowCenter": 9, "WindowWidth": 0}])
def test_without_a_usable_window_percentiles_serve(tmp_path, window):
    values = np.full((100, 100), 1000, np.uint16)
    values[:50] = 2000
    values[0, :20], values[-1, :20] = 4095, 0  # 0.2 % each: beyond the percentiles
    path = saved(dataset(values, 12, **window), tmp_path / "chest.dcm")
    image = read_radiograph(path, full_depth=True)
    assert np.unique(image).tolist() == [0, 65535]
    assert np.asarray(image)[10, 0] == 65535


def test_the_percentiles_are_half_a_percent_at_either_end():
    """Of the values 0 to 9999, one each, 49 is the smallest that 0.5 % do not exceed, and 9949 that 99.5 % do not."""
    values = np.random.default_rng(0).permutation(10_000).astype(np.uint16).reshape(100, 100)
    found = levels(read_radiograph(dataset(values, 14), full_depth=True))
    assert np.abs(found - np.clip((values - 49.0) / (9949 - 49), 0, 1)).max() < 1e-5


def test_few_bright_pixels_without_a_window(tmp_path):
    values = np.zeros((100, 100), np.uint16)
    values[0, 0] = 100
    image = read_radiograph(saved(dataset(values, 12), tmp_path / "chest.dcm"))
    assert np.unique(image).tolist() == [0, 255]


@pytest.mark.parametrize(("center", "width"), [(60000, 10), (-500, 100), (0, 1)])
def test_a_window_beside_the_values_is_of_no_use(center, width):
    found = read_radiograph(dataset(RAMP, 12, WindowCenter=center, WindowWidth=width))
    assert np.array_equal(np.asarray(found), np.asarray(read_radiograph(dataset(RAMP, 12))))


def test_8_bits_stay_8_bits(tmp_path):
    path = saved(dataset(GREY[:, :54].copy(), 8, WindowCenter=128, WindowWidth=256), tmp_path / "chest.dcm")
    image = read_radiograph(path, full_depth=True)
    assert image.mode == "L"
    assert np.abs(np.asarray(image).astype(int) - GREY[:, :54]).max() <= 1


@pytest.mark.parametrize("implicit", [False, True])
def test_dicom_without_preamble(tmp_path, implicit):
    made = dataset(RAMP, 12, WindowCenter=2048, WindowWidth=4096)
    del made.file_meta
    path = tmp_path / "chest.dcm"
    made.save_as(path, implicit_vr=implicit, little_endian=True)
    assert path.read_bytes()[128:132] != b"DICM"
    assert np.abs(levels(read_radiograph(path)) - RAMP / 4095).max() < 1 / 255


def test_dicom_by_content(tmp_path):
    path = saved(dataset(RAMP, 12), tmp_path / "IM000001")
    assert read_radiograph(path).size == (8, 8)
    assert read_radiograph(BytesIO(path.read_bytes())).size == (8, 8)


REFUSED_DICOMS = {
    "without pixels": ({"PixelData": None}, "without pixel data"),
    "several frames": ({"NumberOfFrames": 5}, "5 frames"),
    "colour": ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "PhotometricInterpretation 'RGB'"),
    "YBR": ({"PhotometricInterpretation": "YBR_FULL_422", "SamplesPerPixel": 3}, "'YBR_FULL_422'"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "'PALETTE COLOR'"),
    "no interpretation": ({"PhotometricInterpretation": None}, "lacks PhotometricInterpretation"),
    "no size": ({"Rows": None, "BitsStored": None}, "lacks Rows, BitsStored"),
    "no rows": ({"Rows": 0}, "0 rows"),
    "too few pixels": ({"Rows": 80}, "damaged or cut short"),
    "impossible depth": ({"BitsAllocated": 7}, "pixel data"),
    "constant": ({"PixelData": bytes(128)}, "no contrast"),
    "bits at the upper end": ({"HighBit": 15}, "highest bit at 15 with 12 bits stored"),
    "too large": ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels"),
}


@pytest.mark.parametrize("case", REFUSED_DICOMS)
def test_refused_dicoms(tmp_path, case):
    attributes, cause = REFUSED_DICOMS[case]
    path = saved(dataset(RAMP, 12, **attributes), tmp_path / "some-file.dcm")
    with pytest.raises(SpcxrError, match=cause) as refusal:
        read_radiograph(path)
    assert "some-file.dcm" in str(refusal.value)
    error = refusal.value
    while error is not None:
        assert PATIENT not in str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about damaged technical attributes
def test_damaged_dicoms(tmp_path):
    """Wherever the file is cut or overwritten, the answer is an image or an SpcxrError, and never says who it was."""
    data = saved(dataset(RAMP, 12, WindowCenter=2048, WindowWidth=4096), tmp_path / "whole.dcm").read_bytes()
    random = np.random.default_rng(0)
    damaged = [data[:cut] for cut in range(1, len(data), 7)]
    for _ in range(60):
        noisy = bytearray(data)
        for place in random.integers(132, len(data), 4):
            noisy[place] = random.integers(256)
        damaged.append(bytes(noisy))
    refused = 0
    path = tmp_path / "damaged.dcm"
    for content in damaged:
        path.write_bytes(content)
        try:
            read_radiograph(path)
        except SpcxrError as error:
            refused += 1
            assert "damaged.dcm: " in str(error)
            assert PATIENT not in str(error)
    assert refused > len(damaged) // 3


def test_unknown_transfer_syntax(tmp_path):
    made = dataset(RAMP, 12)
    from pydicom.encaps import encapsulate

    made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2: a film, which nothing here decodes
    made.PixelData = encapsulate([bytes(64)])
    made["PixelData"].VR = "OB"
    path = tmp_path / "film.dcm"
    made.save_as(path, enforce_file_format=True)
    with pytest.raises(SpcxrError, match=r"transfer syntax .*MPEG2"):
        read_radiograph(path)


def test_only_technical_attributes_are_decoded():
    pydicom = pytest.importorskip("pydicom")
    groups = {name: pydicom.datadict.tag_for_keyword(name) >> 16 for name in TECHNICAL_ATTRIBUTES}
    others = {name for name, group in groups.items() if group not in (0x0028, 0x7FE0)}  # presentation, pixel data
    assert others == {"SOPClassUID", "Modality", "BodyPartExamined", "ViewPosition"}


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"Modality": "CT"}, ["not a plain radiograph by its header: modality CT (computed tomography)"]),
        ({"BodyPartExamined": "hand "}, ["not of the chest by its header: body part HAND (hand)"]),
        ({"ViewPosition": "LL"}, ["not a frontal view by its header: view position LL (lateral)"]),
        (
            {"Modality": "MG", "BodyPartExamined": "BREAST"},
            [
                "not a plain radiograph by its header: modality MG (mammography)",
                "not of the chest by its header: body part BREAST (breast)",
            ],
        ),
        ({"Modality": "DX", "BodyPartExamined": "CHEST", "ViewPosition": "AP"}, []),
        ({"Modality": None, "BodyPartExamined": "", "ViewPosition": PATIENT}, []),
        ({"BodyPartExamined": "PORT CHEST", "ViewPosition": ["PA", "LL"]}, []),
    ],
)
def test_what_the_header_says_it_is_beside_the_pixels(stated, words, monkeypatch):
    monkeypatch.setattr(plausibility, "MIN_CHEST_SCORE", -1e9)  # a ramp would do for a chest
    made = dataset(GREY[:, :54].copy(), 8, WindowCenter=128, WindowWidth=256)
    for name, value in stated.items():
        delattr(made, name) if value is None else setattr(made, name, value)
    image, found = read_with_quality_warnings(made, full_depth=True)
    assert found == words
    assert np.array_equal(np.asarray(image), np.asarray(dicom.read_dicom(made)[0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_radiograph(made)
    assert [str(one.message) for one in caught] == [f"the DICOM dataset: {'; '.join(words)}"] * bool(words)


def public_radiograph(name: str):
    pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not here: it comes with the package pydicom-data")
    return path


@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG1_J2KR.dcm"])
def test_public_radiograph(name):
    """MONOCHROME1, 15 bits, window 15000 / 30000."""
    pydicom = pytest.importorskip("pydicom")
    path = public_radiograph(name)
    try:
        image = read_radiograph(path)
    except SpcxrError as error:
        if "J2K" in name and "decoder" in str(error):
            pytest.skip("no JPEG 2000 decoder is installed")
        raise
    assert image.mode == "L"
    assert image.size == (1841, 1955)
    rows, columns = image.height, image.width
    grey = np.asarray(image).astype(float)

    def mean(top: float, left: float) -> float:
        """Of a square of 8 % of the width at these fractions of height and width."""
        side = int(0.08 * columns)
        return grey[int(top * rows) :, int(left * columns) :][:side, :side].mean()

    lungs = [mean(0.25, 0.30), mean(0.25, 0.62)]
    spine, abdomen, air = mean(0.60, 0.47), mean(0.85, 0.20), mean(0.04, 0.02)
    assert max(lungs) + 30 < min(spine, abdomen)
    assert air < min(lungs)
    stored = pydicom.dcmread(path).pixel_array.astype(float)
    assert np.abs(grey / 255 - (1 - np.clip((stored + 0.5) / 29999, 0, 1))).max() < 1 / 255


# ---- against pydicom's own functions ---------------------------------------------------------------------------

RANDOM = np.random.default_rng(5).integers(0, 4096, (30, 20)).astype(np.uint16)
SIGNED = RANDOM.astype(np.int16) - 2048
WINDOWS = {"WindowCenter": [900, 2000.5], "WindowWidth": [700, 3000]}


def lut(entries: int, first: int, bits: int, seed: int = 0):
    from pydicom import Dataset

    item = Dataset()
    item.add_new("LUTDescriptor", "US", [entries, first, bits])
    data = np.sort(np.random.default_rng(seed).integers(0, 2**bits, entries))
    item.add_new("LUTData", "US", data.tolist())
    return item


def by_hand(made, window: int = 0) -> np.ndarray:
    """0..1 by pydicom's functions on every pixel; the range of the output by the standard."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(made.pixel_array, made)
    shown = apply_voi_lut(values, made, index=window).astype(float)
    if made.get("VOILUTSequence"):
        low, high = 0, 2 ** made.VOILUTSequence[window].LUTDescriptor[2] - 1
    else:
        if made.get("ModalityLUTSequence"):
            low, high = 0, 2 ** made.ModalityLUTSequence[0].LUTDescriptor[2] - 1
        else:
            half = 2 ** (made.BitsStored - 1)
            low, high = (-half, half - 1) if made.PixelRepresentation else (0, 2 * half - 1)
            slope, intercept = made.get("RescaleSlope", 1), made.get("RescaleIntercept", 0)
            low, high = low * slope + intercept, high * slope + intercept
    levels = (shown - low) / (high - low)
    return 1 - levels if made.PhotometricInterpretation == "MONOCHROME1" else levels


TRANSFORMS = {
    "linear": (RANDOM, 12, WINDOWS),
    "linear exact": (RANDOM, 12, WINDOWS | {"VOILUTFunction": "LINEAR_EXACT"}),
    "sigmoid": (RANDOM, 12, WINDOWS | {"VOILUTFunction": "SIGMOID"}),
    "signed": (SIGNED, 12, {"WindowCenter": [-100, 5], "WindowWidth": [900, 2000]}),
    "signed, rescaled": (
        SIGNED,
        12,
        {"RescaleSlope": 2, "RescaleIntercept": 5000, "WindowCenter": [5000, 1], "WindowWidth": [4000, 9000]},
    ),
    "fractional slope": (RANDOM, 12, WINDOWS | {"RescaleSlope": "0.37", "RescaleIntercept": "12.5"}),
    "modality LUT": (RANDOM, 12, {"ModalityLUTSequence": [lut(4096, 0, 16)]} | WINDOWS),
    "VOI LUTs": (RANDOM, 12, {"VOILUTSequence": [lut(4096, 0, 12), lut(1000, 500, 10, 1)]}),
    "VOI LUT after rescale": (
        RANDOM,
        12,
        {"RescaleSlope": 1, "RescaleIntercept": 100, "VOILUTSequence": [lut(4096, 100, 16), lut(640, 109, 10)]},
    ),
    "10 bits": ((RANDOM // 4).astype(np.uint16), 10, {"WindowCenter": [400, 9], "WindowWidth": [300, 900]}),
    "15 bits": ((RANDOM * 8).astype(np.uint16), 15, WINDOWS),
    "16 bits": ((RANDOM * 16).astype(np.uint16), 16, {"WindowCenter": [30000, 40000], "WindowWidth": [60000, 900]}),
    "8 bits": ((RANDOM // 16).astype(np.uint8), 8, {"WindowCenter": [100, 50], "WindowWidth": [100, 30]}),
    "16 bits signed": (
        (RANDOM * 16 - 32768).astype(np.int16),
        16,
        {"WindowCenter": [0, 9], "WindowWidth": [50000, 99]},
    ),
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("case", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:Applying a VOI LUT on a float")  # by hand; ours enters it with whole numbers
def test_every_transform_agrees_with_pydicom_pixel_for_pixel(tmp_path, case, window, photometric):
    import pydicom

    values, bits, attributes = TRANSFORMS[case]
    path = saved(dataset(values, bits, photometric, **attributes), tmp_path / "chest.dcm")
    expected = by_hand(pydicom.dcmread(path), window)
    deep = read_radiograph(path, full_depth=True, window=window)
    assert deep.mode == ("I;16" if bits > 8 else "L")
    top = 65535 if bits > 8 else 255
    assert np.array_equal(np.asarray(deep), np.rint(np.clip(expected, 0, 1) * top))
    shallow = np.asarray(read_radiograph(path, window=window))
    assert np.array_equal(shallow, np.rint(np.clip(expected, 0, 1) * 255))


@pytest.mark.parametrize("window", [-1, 2])
def test_a_window_that_is_not_there(tmp_path, window):
    path = saved(dataset(RANDOM, 12, **WINDOWS), tmp_path / "chest.dcm")
    with pytest.raises(SpcxrError, match=rf"chest\.dcm: .*2 VOI LUTs or windows.* {window}"):
        read_radiograph(path, window=window)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("limit", [None, 20])
def test_padding_is_black_and_not_measured(tmp_path, photometric, limit):
    values = np.full((100, 100), 1000, np.uint16)
    values[:, 50:] = 2000
    values[:30], values[30:40] = 10, 20
    path = saved(
        dataset(values, 12, photometric, PixelPaddingValue=10, **({"PixelPaddingRangeLimit": limit} if limit else {})),
        tmp_path / "chest.dcm",
    )
    image = np.asarray(read_radiograph(path))
    assert image[:30].max() == 0
    black, white = (0, 255) if photometric == "MONOCHROME2" else (255, 0)
    if limit:
        assert image[30:40].max() == 0
        assert (image[40:, :50] == black).all()
        assert (image[40:, 50:] == white).all()
    else:
        assert (image[30:40] == black).all()


def test_negative_padding_that_is_written_unsigned(tmp_path):
    values = SIGNED.copy()
    values[:10] = -2000
    made = dataset(values, 16, WindowCenter=0, WindowWidth=5000)
    made.add_new("PixelPaddingValue", "US", 65536 - 2000)
    image = np.asarray(read_radiograph(saved(made, tmp_path / "chest.dcm")))
    assert image[:10].max() == 0
    assert image[10:].mean() > 50


# ---- what each attribute may be --------------------------------------------------------------------------------

LINEAR = {"WindowCenter": 1000.5, "WindowWidth": 1001}
WIDE = {"WindowCenter": 2048, "WindowWidth": 4096}
RAMP_SIGNED = RAMP.astype(np.int16) - 2048
AS_LINEAR = np.clip((RAMP - 500.0) / 1000, 0, 1)  # black up to 500, white from 1500
AS_PERCENTILES = RAMP / 4095  # of 64 values: the extremes


def table_item(entries: np.ndarray, first: int, bits: int, form: str = "US") -> Any:
    """A LUT; its data as numbers, as words (OW), or as bytes (OB) or words of two 8-bit entries each."""
    from pydicom import Dataset

    item, signed = Dataset(), first < 0 or form == "SS"
    length = len(entries) % 2**16
    if signed and length > 32767:
        length -= 2**16
    item.add_new("LUTDescriptor", "SS" if signed else "US", [length, first, bits])
    if form in ("US", "SS"):
        item.add_new("LUTData", "US", entries.tolist())
    elif form == "packed numbers":
        item.add_new("LUTData", "US", entries.astype(np.uint8).view("<u2").tolist())
    elif form == "packed":
        item.add_new("LUTData", "OW", entries.astype(np.uint8).tobytes())
    else:
        item.add_new("LUTData", form, entries.astype("<u2").tobytes())
    return item


def without(item: Any, *names: str, **values: Any) -> Any:
    for name in names:
        delattr(item, name)
    for name, value in values.items():
        item[name].value = value
    return item


FALLING = {bits: np.linspace(2**bits - 1, 0, 4096).round().astype(int) for bits in range(7, 18)}  # a negative
SHORT = np.arange(1024)[::-1] // 4  # of 8 bits, for values from 1000 on


def by_short(values: np.ndarray) -> np.ndarray:
    return SHORT[np.clip(values.astype(int) - 1000, 0, 1023)] / 255


def with_window(values: np.ndarray) -> np.ndarray:
    return np.clip((values - 500.0) / 1000, 0, 1)


class Of(NamedTuple):
    """An attribute's value with another value representation than the dictionary's."""

    vr: str
    value: Any


ATTRIBUTES: dict[str, tuple[dict[str, Any], np.ndarray | str]] = {
    # C.11.2.1.2: windows
    "function absent": (LINEAR, AS_LINEAR),
    "function empty": (LINEAR | {"VOILUTFunction": ""}, AS_LINEAR),
    "function in lower case": (LINEAR | {"VOILUTFunction": "linear_exact "}, np.clip((RAMP - 500.0) / 1001, 0, 1)),
    "functions": (LINEAR | {"VOILUTFunction": ["LINEAR", "SIGMOID"]}, AS_LINEAR),
    "function unknown": (LINEAR | {"VOILUTFunction": "CUBIC"}, AS_PERCENTILES),
    "function of LO": (LINEAR | {"VOILUTFunction": Of("LO", "SIGMOID")}, 1 / (1 + np.exp(-4 * (RAMP - 1000.5) / 1001))),
    "window absent": ({}, AS_PERCENTILES),
    "window empty": ({"WindowCenter": "", "WindowWidth": ""}, AS_PERCENTILES),
    "width empty": ({"WindowCenter": 1000.5, "WindowWidth": ""}, AS_PERCENTILES),
    "width 0": ({"WindowCenter": 1000.5, "WindowWidth": 0}, AS_PERCENTILES),
    "width 1": ({"WindowCenter": 1000.5, "WindowWidth": 1}, 1.0 * (RAMP > 1000)),
    "width below 0": ({"WindowCenter": 1000.5, "WindowWidth": -9}, AS_PERCENTILES),
    "several centres, one width": ({"WindowCenter": [1000.5, 9], "WindowWidth": 1001}, AS_LINEAR),
    "window of FD": ({"WindowCenter": Of("FD", 1000.5), "WindowWidth": Of("FD", 1001.0)}, AS_LINEAR),
    "window of IS and LO": ({"WindowCenter": Of("LO", "1000.5"), "WindowWidth": Of("IS", 1001)}, AS_LINEAR),
    "window is text": ({"WindowCenter": Of("LO", "middle"), "WindowWidth": 1001}, AS_PERCENTILES),
    "window is not finite": ({"WindowCenter": Of("FD", np.nan), "WindowWidth": 1001}, AS_PERCENTILES),
    # C.11.1: rescale
    "rescale empty": (LINEAR | {"RescaleSlope": "", "RescaleIntercept": ""}, AS_LINEAR),
    "slope empty": (LINEAR | {"RescaleSlope": "", "RescaleIntercept": -200}, with_window(RAMP - 200.0)),
    "slope absent": (LINEAR | {"RescaleIntercept": -200}, with_window(RAMP - 200.0)),
    "intercept empty": (LINEAR | {"RescaleSlope": 2, "RescaleIntercept": ""}, with_window(RAMP * 2.0)),
    "slope below 0": (LINEAR | {"RescaleSlope": -1, "RescaleIntercept": 3000}, with_window(3000.0 - RAMP)),
    "slope 0": (LINEAR | {"RescaleSlope": 0, "RescaleIntercept": 1000}, "no contrast"),
    "slope of FL": (LINEAR | {"RescaleSlope": Of("FL", 0.5)}, with_window(RAMP * 0.5)),
    "slope is text": (LINEAR | {"RescaleSlope": Of("LO", "steep")}, "RescaleSlope cannot be read as a number"),
    "two slopes": (LINEAR | {"RescaleSlope": [1, 2]}, "RescaleSlope holds 2 values"),
    "slope is not finite": (LINEAR | {"RescaleSlope": Of("FD", np.inf)}, "RescaleSlope is not a finite number"),
    # C.11.1.1: modality LUTs
    **{
        f"modality LUT of {bits} bits": (
            {
                "WindowCenter": 2**bits / 2,
                "WindowWidth": 2**bits,
                "ModalityLUTSequence": [table_item(FALLING[bits], 0, bits)],
            },
            FALLING[bits][RAMP] / (2**bits - 1),
        )
        for bits in range(8, 17)
    },
    "modality LUT in bytes": (
        {"WindowCenter": 128, "WindowWidth": 256, "ModalityLUTSequence": [table_item(SHORT, 1000, 8, "packed")]},
        by_short(RAMP),
    ),
    "modality LUT in words of two": (
        {
            "WindowCenter": 128,
            "WindowWidth": 256,
            "ModalityLUTSequence": [table_item(SHORT, 1000, 8, "packed numbers")],
        },
        by_short(RAMP),
    ),
    "modality LUT of OW": (
        {"WindowCenter": 2048, "WindowWidth": 4096, "ModalityLUTSequence": [table_item(FALLING[12], 0, 12, "OW")]},
        FALLING[12][RAMP] / 4095,
    ),
    "modality LUT before slope": (
        LINEAR | {"RescaleSlope": 3, "RescaleIntercept": 9, "ModalityLUTSequence": [table_item(FALLING[12], 0, 12)]},
        with_window(FALLING[12][RAMP].astype(float)),
    ),
    "modality LUT of 65,536": (
        WIDE | {"ModalityLUTSequence": [table_item(np.clip(4095 - np.arange(65536), 0, None), 0, 12, "OW")]},
        1 - RAMP / 4095,
    ),
    "no modality LUT in the sequence": (LINEAR | {"ModalityLUTSequence": []}, AS_LINEAR),
    "modality LUT of 7 bits": ({"ModalityLUTSequence": [table_item(FALLING[7], 0, 7)]}, "from 8 to 16 bits"),
    "modality LUT of 17 bits": ({"ModalityLUTSequence": [table_item(FALLING[16], 0, 17)]}, "from 8 to 16 bits"),
    "modality LUT too short": (
        {"ModalityLUTSequence": [without(table_item(FALLING[12], 0, 12), LUTData=[1, 2, 3])]},
        "not 4096 entries of 12 bits",
    ),
    "modality LUT of more bits": ({"ModalityLUTSequence": [table_item(FALLING[12], 0, 10)]}, "not 4096 entries of 10"),
    "modality LUT without data": (
        {"ModalityLUTSequence": [without(table_item(FALLING[12], 0, 12), "LUTData")]},
        "not 4096 entries of 12 bits",
    ),
    "modality LUT without descriptor": (
        {"ModalityLUTSequence": [without(table_item(FALLING[12], 0, 12), "LUTDescriptor")]},
        "no descriptor of three numbers",
    ),
    # C.11.2.1.1: VOI LUTs
    **{
        f"VOI LUT of {bits} bits": (
            {"VOILUTSequence": [table_item(FALLING[bits], 0, bits)]},
            FALLING[bits][RAMP] / (2**bits - 1),
        )
        for bits in range(8, 17)
    },
    "VOI LUT in bytes": ({"VOILUTSequence": [table_item(SHORT, 1000, 8, "packed")]}, by_short(RAMP)),
    "VOI LUT of OW": ({"VOILUTSequence": [table_item(SHORT, 1000, 8, "OW")]}, by_short(RAMP)),
    "VOI LUT before window": (LINEAR | {"VOILUTSequence": [table_item(SHORT, 1000, 8)]}, by_short(RAMP)),
    "VOI LUT after slope": (
        {"RescaleSlope": "0.5", "RescaleIntercept": 0, "VOILUTSequence": [table_item(SHORT, 1000, 8)]},
        by_short(RAMP / 2),
    ),
    "broken VOI LUT, window": (LINEAR | {"VOILUTSequence": [table_item(FALLING[12], 0, 10)]}, AS_LINEAR),
    "broken VOI LUT, no window": ({"VOILUTSequence": [table_item(FALLING[12], 0, 10)]}, "not 4096 entries of 10 bits"),
    "VOI LUT without data": (
        LINEAR | {"VOILUTSequence": [without(table_item(SHORT, 1000, 8), "LUTData")]},
        AS_LINEAR,
    ),
    "VOI LUT empty": ({"VOILUTSequence": [without(table_item(SHORT, 1000, 8), LUTData=None)]}, AS_PERCENTILES),
    "12 bits declared as 16": ({"VOILUTSequence": [table_item(FALLING[12], 0, 16)]}, FALLING[12][RAMP] / 4095),
    # C.7.5.1.1.2: padding
    "padding": (LINEAR | {"PixelPaddingValue": 4095}, np.where(RAMP == 4095, 0, AS_LINEAR)),
    "padding empty": (LINEAR | {"PixelPaddingValue": None}, AS_LINEAR),
    "padding range": (
        LINEAR | {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4000},
        np.where(RAMP >= 4000, 0, AS_LINEAR),
    ),
    "padding of IS": (LINEAR | {"PixelPaddingValue": Of("IS", "4095")}, np.where(RAMP == 4095, 0, AS_LINEAR)),
    "padding in bytes": (LINEAR | {"PixelPaddingValue": Of("OB", b"\xff\x0f")}, np.where(RAMP == 4095, 0, AS_LINEAR)),
    "padding is text": (LINEAR | {"PixelPaddingValue": Of("LO", "none")}, "PixelPaddingValue cannot be read"),
    "two paddings": (LINEAR | {"PixelPaddingValue": Of("US", [1, 2])}, "PixelPaddingValue holds 2 values"),
    # C.7.6.3: the pixels
    "rows of IS": (LINEAR | {"Rows": Of("IS", "8")}, AS_LINEAR),
    "rows of FD": (LINEAR | {"Rows": Of("FD", 8.0), "Columns": Of("UL", 8)}, AS_LINEAR),
    "rows in bytes": (LINEAR | {"Rows": Of("OB", b"\x08\0")}, AS_LINEAR),
    "rows with a fraction": (LINEAR | {"Rows": Of("FD", 8.5)}, "Rows is not a whole number"),
    "rows empty": ({"Rows": None}, "lacks Rows"),
    "two numbers of rows": ({"Rows": Of("US", [8, 8])}, "Rows holds 2 values"),
    "rows are text": ({"Rows": Of("LO", "eight")}, "Rows cannot be read as a number"),
    "rows below 0": ({"Rows": Of("SS", -8)}, "-8 rows"),
    "samples empty": (LINEAR | {"SamplesPerPixel": None}, AS_LINEAR),
    "2 samples": ({"SamplesPerPixel": 2}, "'MONOCHROME2' with 2 sample"),
    "frames empty": (LINEAR | {"NumberOfFrames": None}, AS_LINEAR),
    "0 frames": (LINEAR | {"NumberOfFrames": 0}, AS_LINEAR),
    "photometric in lower case": (LINEAR | {"PhotometricInterpretation": "monochrome1 "}, 1 - AS_LINEAR),
    "photometric empty": ({"PhotometricInterpretation": ""}, "lacks PhotometricInterpretation"),
    "photometric unknown": ({"PhotometricInterpretation": "GREY"}, "of an unknown kind"),
    "7 bits stored": ({"BitsStored": 7, "HighBit": 6}, "7 bits stored"),
    "17 bits stored": ({"BitsStored": 17, "HighBit": 16}, "17 bits stored"),
    "12 bits allocated": ({"BitsAllocated": 12}, "12 bits allocated"),
    "fewer allocated than stored": ({"BitsAllocated": 8}, "8 bits allocated for 12"),
    "representation empty": ({"PixelRepresentation": None}, "lacks PixelRepresentation"),
    "representation 2": ({"PixelRepresentation": 2}, "representation 2"),
    "high bit empty": (LINEAR | {"HighBit": None}, AS_LINEAR),
    "high bit at the end": ({"HighBit": 15}, "highest bit at 15"),
    "bits above": (LINEAR | {"PixelData": (RAMP | 0xA000).tobytes()}, AS_LINEAR),
    "32 bits allocated": (
        LINEAR | {"BitsAllocated": 32, "PixelData": (RAMP.astype("<u4") | 0x5A000).tobytes()},
        AS_LINEAR,
    ),
    "no pixels": ({"PixelData": b""}, "without pixel data"),
}
RISING = FALLING[12][::-1]
OF_SIGNED = {  # attributes, window
    "bits above": ({"PixelData": (RAMP_SIGNED.view(np.uint16) & 0xFFF | 0x5000).tobytes()}, (0, 4096)),
    "padding of the other sign": ({"PixelPaddingValue": Of("US", 65536 - 2048)}, (0, 4096)),
    "modality LUT of the other sign": (
        {"ModalityLUTSequence": [table_item(RISING, 65536 - 2048, 12)]},
        (2048, 4096),
    ),
    "modality LUT of SS": ({"ModalityLUTSequence": [table_item(RISING, -2048, 12)]}, (2048, 4096)),
    "VOI LUT of the other sign": ({"VOILUTSequence": [table_item(RISING, 65536 - 2048, 12)]}, None),
}


def stated(made: Any, attributes: dict[str, Any]) -> Any:
    """The dataset with these attributes, valid or not."""
    for name, value in attributes.items():
        if isinstance(value, Of):
            made.add_new(name, *value)
        else:
            setattr(made, name, value)
    return made


def forms(made: Any) -> list[Any]:
    """The dataset, and the file that holds it."""
    import pydicom

    buffer = BytesIO()
    made["PixelData"].VR = "OW"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydicom.config.settings, "_writing_validation_mode", pydicom.config.IGNORE)
        made.save_as(buffer, enforce_file_format=True)
    return [made, buffer.getvalue()]


@pytest.mark.parametrize("case", ATTRIBUTES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, about values that its dictionary does not allow
def test_what_an_attribute_may_be(case):
    attributes, expected = ATTRIBUTES[case]
    for source in forms(stated(dataset(RAMP, 12), attributes)):
        if isinstance(expected, str):
            with pytest.raises(SpcxrError, match=expected) as refusal:
                read_radiograph(source)
            assert refusal.value.__cause__ is None or isinstance(refusal.value.__cause__, SpcxrError)
        else:
            assert np.abs(levels(read_radiograph(source, full_depth=True)) - expected).max() < 1e-4


@pytest.mark.parametrize("case", OF_SIGNED)
def test_what_an_attribute_may_be_for_signed_pixels(case):
    attributes, window = OF_SIGNED[case]
    window = {"WindowCenter": window[0], "WindowWidth": window[1]} if window else {}
    for source in forms(stated(dataset(RAMP_SIGNED, 12), window | attributes)):
        assert np.abs(levels(read_radiograph(source, full_depth=True)) - RAMP / 4095).max() < 1e-4


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless", "JPEGLSLossless"])
@pytest.mark.parametrize("values", [RAMP, RAMP_SIGNED], ids=["unsigned", "signed"])
def test_bits_above_those_stored_in_a_codestream(syntax, values):
    """Of RLE they count as unused; a codestream that holds more bits than the header states is refused."""
    import pydicom.uid

    shifted = values + (0 if values.dtype.kind == "u" else 2048)
    for above in (0, 0x3000):
        made = dataset(
            values.view(np.uint16) | np.uint16(above),
            16,
            WindowCenter=2048 - 2048 * (values.dtype.kind == "i"),
            WindowWidth=4096,
        )
        made.PixelRepresentation = int(values.dtype.kind == "i")
        try:
            made.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            pytest.skip(f"no encoder for it is installed: {type(error).__name__}")
        made.BitsStored, made.HighBit = 12, 11
        if above and syntax != "RLELossless":
            with pytest.raises(SpcxrError, match="more than the 12 bits"):
                read_radiograph(made)
        else:
            assert np.abs(levels(read_radiograph(made, full_depth=True)) - shifted / 4095).max() < 1e-4


# ---- encodings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax",
    ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"],
)
@pytest.mark.parametrize("values", [RANDOM, SIGNED, (RANDOM // 16).astype(np.uint8)])
def test_byte_orders(syntax, values):
    import pydicom.uid

    bits = 8 if values.dtype.itemsize == 1 else 12
    made = dataset(values, bits, WindowCenter=100, WindowWidth=2000)
    expected = np.asarray(read_radiograph(made, full_depth=True))
    if syntax == "ExplicitVRBigEndian":
        made.PixelData = values.astype(values.dtype.newbyteorder(">")).tobytes()
    made.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    buffer = BytesIO()
    little = syntax != "ExplicitVRBigEndian"
    made["PixelData"].VR = "OW" if bits > 8 else "OB"
    pydicom.dcmwrite(
        buffer, made, implicit_vr=syntax.startswith("Implicit"), little_endian=little, enforce_file_format=True
    )
    assert np.array_equal(np.asarray(read_radiograph(buffer.getvalue(), full_depth=True)), expected)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless", "JPEGLSLossless"])
def test_lossless_compression(syntax):
    import pydicom.uid

    made = dataset(RANDOM, 12, WindowCenter=2000, WindowWidth=4000)
    expected = np.asarray(read_radiograph(made, full_depth=True))
    try:
        made.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"no encoder for it is installed: {type(error).__name__}")
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    assert np.array_equal(np.asarray(read_radiograph(buffer.getvalue(), full_depth=True)), expected)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
@pytest.mark.parametrize(("mode", "size"), [("L", (3000, 2000)), ("L", (8, 9)), ("L", (9, 8)), ("RGB", (8, 8))])
def test_a_codestream_of_another_size_is_not_decoded(kind, mode, size, monkeypatch):
    """8 x 8 grey pixels in the header, thousands in the codestream: what a decompression bomb looks like. Or colour."""
    import pydicom
    from pydicom.encaps import encapsulate

    buffer = BytesIO()
    Image.new(mode, size).save(buffer, kind)
    made = dataset(RAMP.astype(np.uint8), 8)
    made.file_meta.TransferSyntaxUID = {"JPEG": "1.2.840.10008.1.2.4.50", "JPEG2000": "1.2.840.10008.1.2.4.90"}[kind]
    made.PixelData = encapsulate([buffer.getvalue()])
    made["PixelData"].VR = "OB"
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda self: pytest.fail("it was decoded")))
    with pytest.raises(SpcxrError, match="not of the 8 x 8 grey pixels"):
        read_radiograph(made)


BOXES = b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\x00\x00\x00\x00jp2h" + bytes(50)  # a box without length


@pytest.mark.parametrize(
    "codestream",
    [
        BOXES,
        bytes(100),
        b"\xff\xd8\xff",
        b"\xff\x4f\xff\x51\0\x29\0\0" + b"\0\0\0\x08" * 2 + bytes(8) + b"\xff\xff\0\0" * 2 + bytes(8) + b"\0\x01",
        b"\xff\x4f\xff\x51\0\x29\0\0" + b"\0\0\xff\xff" * 2 + bytes(8) + b"\0\0\0\x01" * 2 + bytes(8) + b"\0\x01",
    ],
    ids=["box without length", "zeros", "no frame header", "huge tiles", "too many tiles"],
)
def test_codestreams_that_decoders_hang_on(codestream):
    from pydicom.encaps import encapsulate

    made = dataset(RAMP.astype(np.uint8), 8)
    made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.90"
    made.PixelData = encapsulate([codestream])
    made["PixelData"].VR = "OB"
    with pytest.raises(SpcxrError, match="damaged, or not of the 8 x 8"):
        read_radiograph(made)


@pytest.fixture
def lossless_jpeg() -> Path:
    if not available(uid := "1.2.840.10008.1.2.4.70"):
        pytest.skip(f"no decoder for {uid} is installed")
    return Path(public_radiograph("JPGLosslessP14SV1_1s_1f_8b.dcm"))


def available(uid: str) -> bool:
    from pydicom.pixels import get_decoder

    return bool(get_decoder(uid).available_plugins)


def test_gdcm_decodes_in_a_process_of_its_own(lossless_jpeg):
    """As many files as one likes by one child, and a dead one is replaced."""
    import pydicom

    data = lossless_jpeg.read_bytes()
    expected = pydicom.dcmread(lossless_jpeg).pixel_array
    assert np.array_equal(decoder_process.decode_apart(data), expected)
    child = decoder_process._child()
    assert np.array_equal(decoder_process.decode_apart(data), expected)
    assert decoder_process._child() is child
    child.process.kill()
    child.process.wait()
    assert np.array_equal(decoder_process.decode_apart(data), expected)
    assert decoder_process._child() is not child


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80"])
def test_decoders_that_die_or_take_seconds_are_kept_apart(uid, monkeypatch):
    """GDCM, and pyjpegls, which took 9 s over 64 x 64 damaged pixels, whatever else is installed."""
    from types import SimpleNamespace

    everything = SimpleNamespace(available_plugins=("gdcm", "pyjpegls"))
    monkeypatch.setattr("pydicom.pixels.get_decoder", lambda syntax: everything)
    assert dicom._decoder(uid) == ""


def test_a_decoder_that_dies_or_hangs_is_an_error(lossless_jpeg, tmp_path, monkeypatch):
    data = lossless_jpeg.read_bytes()
    with pytest.raises(decoder_process.DecoderError, match="gave up"):
        decoder_process.decode_apart(b"not a DICOM file")
    for work in ("import os, sys; sys.stdin.buffer.read(8); os.abort()", "while True: pass"):
        script = tmp_path / "child.py"
        ready = "import sys; sys.stdout.buffer.write((5).to_bytes(8, 'little') + b'ready'); sys.stdout.flush()\n"
        script.write_text(ready + work, encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(decoder_process, "__file__", str(script))
            patch.setattr(decoder_process, "_current", None)
            patch.setattr(decoder_process, "SECONDS", 0.5)
            monkeypatch.setattr(dicom, "_decoder", lambda syntax: "")
            with pytest.raises(SpcxrError, match="the given bytes: .*cannot be decoded") as refusal:
                read_radiograph(data)
        assert "\n" not in str(refusal.value)
    assert np.asarray(read_radiograph(data)).std() > 0  # and the next one is decoded again


def test_deflated_bomb(monkeypatch):
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    made = dataset(RAMP, 12)
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    start = 144 + int.from_bytes(data[140:144], "little")
    packer = zlib.compressobj(wbits=-15)
    bomb = data[:start] + packer.compress(bytes(3_000_000)) + packer.flush()
    monkeypatch.setattr(dicom, "MAX_INFLATED_BYTES", 1_000_000)
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **kwargs: pytest.fail("it was inflated"))
    with pytest.raises(SpcxrError, match="decompression bomb"):
        read_radiograph(bomb)


def test_dataset_in_memory_is_left_as_it_is():
    made = dataset(RANDOM, 12, WindowCenter=2000, WindowWidth=4000)
    before = made.to_json()
    image = read_radiograph(made, full_depth=True)
    assert made.to_json() == before
    buffer = BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    assert np.array_equal(np.asarray(image), np.asarray(read_radiograph(buffer.getvalue(), full_depth=True)))
    del made.file_meta
    assert np.array_equal(np.asarray(image), np.asarray(read_radiograph(made, full_depth=True)))
    with pytest.raises(SpcxrError, match="the DICOM dataset: .*without pixel data"):
        read_radiograph(type(made)())


# ---- one picture, four ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [SpcxrImageProcessor, SpcxrImageProcessorPil])
def test_png_16_bit_png_dicom_and_numpy_agree(tmp_path, backend):
    rows, columns = np.mgrid[0:300, 0:260]
    levels = (np.sin(rows / 17) + np.cos(columns / 11 + rows / 40) + 2) / 4
    twelve = np.rint(levels * 4095).astype(np.uint16)
    Image.fromarray(np.rint(levels * 255).astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(np.rint(levels * 65535).astype(np.uint16)).save(tmp_path / "16.png")
    saved(dataset(twelve, 12, WindowCenter=2048, WindowWidth=4096), tmp_path / "2.dcm")
    saved(dataset(4095 - twelve, 12, "MONOCHROME1", WindowCenter=2048, WindowWidth=4096), tmp_path / "1.dcm")
    pictures = [levels, levels.astype(np.float32)]
    for name in ("8.png", "16.png", "2.dcm", "1.dcm"):
        pictures += [read_radiograph(tmp_path / name), read_radiograph(tmp_path / name, full_depth=True)]
    values = backend(do_normalize=False)(pictures, return_tensors="pt").pixel_values
    assert (values - values[:1]).abs().max() <= 2 / 255
    assert values[0].max() - values[0].min() > 0.9


# ---- nothing of the header gets out ----------------------------------------------------------------------------

MARK = "SECRETMARK"
TEXT_VALUES = {  # by value representation, PS3.5 section 6.2
    "AE": MARK, "AS": "077Y", "CS": MARK, "DA": "19770707", "DT": "19770707070707", "LO": MARK, "LT": MARK, "PN": MARK,
    "SH": MARK, "ST": MARK, "TM": "070707", "UC": MARK, "UI": "1.2.777.777.777", "UR": f"http://{MARK}", "UT": MARK,
    "DS": "777.777", "IS": "777777",
}  # fmt: skip
MARKS = (MARK, "19770707", "070707", "1.2.777", "777.777", "777777", "077Y")


def seeded(made):
    """Every text element of the dictionary's patient, study, series and equipment groups, and wrong text elsewhere."""
    from pydicom.datadict import DicomDictionary, dictionary_VR

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag in DicomDictionary:
            group, kind = tag >> 16, dictionary_VR(tag)
            if group in (0x0008, 0x0010, 0x0012, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040) and kind in TEXT_VALUES:
                made.add_new(tag, kind, TEXT_VALUES[kind])
    made.file_meta.SourceApplicationEntityTitle = MARK
    return made


def raw(made) -> bytes:
    buffer = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.preamble = bytes(128)
        made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@lru_cache
def seeded_files() -> dict[str, bytes]:
    """One that is read, and ways to fail with marked text where a number or a known name belongs."""
    window = {"WindowCenter": 128, "WindowWidth": 256}
    plain = dataset(GREY[:, :54].copy(), 8, **window)
    good = raw(seeded(plain))
    files = {
        "good": good,
        "cut": good[:-100],
        "cut in the header": good[: len(good) // 2],
        "characters": good.replace(b"SECRETMARK", b"\xff\xfeCRETMARK"),
        "no pixels": raw(seeded(dataset(RAMP, 12, PixelData=None))),
        "frames": raw(seeded(dataset(RAMP, 12, NumberOfFrames=3))),
        "constant": raw(seeded(dataset(RAMP, 12, PixelData=bytes(128)))),
    }
    wrong = {"PhotometricInterpretation": MARK, "VOILUTFunction": MARK, "NumberOfFrames": MARK, "WindowCenter": MARK}
    wrong |= {"RescaleSlope": MARK}
    for name, value in wrong.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = seeded(dataset(RAMP, 12, WindowCenter="11.11", WindowWidth="22.22", RescaleIntercept=0))
            kind = {"NumberOfFrames": "IS", "WindowCenter": "DS", "RescaleSlope": "DS"}.get(name, "CS")
            made.add_new(name, kind, "33" if kind in ("IS", "DS") else value)
        data = raw(made)
        if kind in ("IS", "DS"):  # pydicom writes no text as a number, so it is put in afterwards
            from pydicom.datadict import tag_for_keyword

            tag = tag_for_keyword(name)
            place = data.index(tag.to_bytes(4, "big")[1::-1] + tag.to_bytes(4, "big")[:1:-1] + kind.encode())
            data = data[: place + 6] + len(value).to_bytes(2, "little") + value.encode() + data[place + 10 :]
        files[f"wrong {name}"] = data
    return files


def everything_said(caught, caplog, capfd, error: BaseException | None) -> str:
    import traceback

    texts = [str(warning.message) for warning in caught] + [caplog.text, *capfd.readouterr()]
    while error is not None:
        texts += ["".join(traceback.format_exception(error)), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


@pytest.mark.parametrize("form", ["path", "bytes", "dataset"])
@pytest.mark.parametrize("case", sorted(seeded_files()))
def test_nothing_of_the_header_gets_out(tmp_path, caplog, capfd, case, form):
    import pydicom

    data, path = seeded_files()[case], tmp_path / "chest.dcm"
    path.write_bytes(data)
    caplog.set_level(logging.DEBUG)
    failure: BaseException | None = None
    image = None
    source = {"path": path, "bytes": data}.get(form)
    if source is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = pydicom.dcmread(path, force=True)
    caplog.clear()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            image = read_radiograph(source)
            read_radiograph(source, strict=True)
        except SpcxrError as error:
            failure = error
    said = everything_said(caught, caplog, capfd, failure)
    if image is not None:
        image.save(tmp_path / "out.png")
        image.save(tmp_path / "out.tiff")
        features = SpcxrImageProcessor()(image, return_tensors="pt")
        said += repr(image.info) + repr(sorted(features)) + str(vars(image))
        said += "".join(file.read_bytes().decode("latin-1") for file in tmp_path.glob("out.*"))
    assert (image is not None) >= (case == "good")
    assert image is not None or failure is not None
    assert [mark for mark in MARKS if mark in said or mark.encode().hex() in said] == []


def test_the_search_would_find_a_leak(capfd, caplog):
    """pydicom itself does say what it read."""
    import pydicom

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = pydicom.dcmread(io.BytesIO(seeded_files()["good"]), force=True)
        said = everything_said(caught, caplog, capfd, ValueError(made.PatientName))
    assert MARK in said


def test_the_demo_s_text_holds_nothing_of_the_header(tmp_path, capfd):
    """What `spcxr demo` prints about a file."""
    from spcxr_hf.inference import demo

    path = tmp_path / "chest.dcm"
    path.write_bytes(seeded_files()["good"])
    said = demo.describe_file(path, read_radiograph(path, full_depth=True)) + capfd.readouterr().out
    assert "MONOCHROME2" in said
    assert [mark for mark in MARKS if mark in said] == []


# ---- public files ----------------------------------------------------------------------------------------------


def public_files() -> list[Path]:
    """Every DICOM file of pydicom and of pydicom-data that is here."""
    import pydicom

    folders = [Path(pydicom.__file__).parent / "data" / "test_files"]
    try:
        import data_store

        folders += [Path(folder) / "data" for folder in data_store.__path__]
    except ImportError:
        pass
    return sorted(path for folder in folders for path in folder.glob("*.dcm"))


CAUSES = {  # of the public files that are refused for another reason than what their header says
    "JPEG-lossy.dcm": "12-bit lossy JPEG has no decoder",
    "JPGExtended.dcm": "12-bit lossy JPEG has no decoder",
    "JPEG2000-embedded-sequence-delimiter.dcm": "damaged|not of the",
    "MR_truncated.dcm": "damaged or cut short",
    "badVR.dcm": "NumberOfFrames cannot be read as a number",
}


def cause(path: Path, made) -> str:
    """What the refusal of a file must say, by its header."""
    if path.name in CAUSES:
        return CAUSES[path.name]
    if made.get("PixelData") is None or made.get("Rows") is None:
        return "without pixel data|lacks"
    if made.get("SamplesPerPixel", 1) > 1 or made.PhotometricInterpretation == "PALETTE COLOR":
        return f"PhotometricInterpretation '{made.PhotometricInterpretation}'"
    if int(made.get("NumberOfFrames") or 1) > 1:
        return f"{made.NumberOfFrames} frames"
    return f"{made.BitsStored} bits" if made.BitsStored not in range(8, 17) else "nothing is wrong with it"


@pytest.mark.parametrize("path", public_files(), ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_public_file(path):
    """A grey frame of 8 to 16 bits is read as pydicom's functions say; anything else is refused for what it is."""
    import pydicom

    made = pydicom.dcmread(path, force=True)
    try:
        image = read_radiograph(path, full_depth=True, strict=None)
    except SpcxrError as error:
        if "a decoder is missing" in str(error) and path.name not in CAUSES:
            pytest.skip("its decoder is not installed")
        assert re.search(cause(path, made), str(error).removeprefix(str(path)))
        return
    assert image.size == (made.Columns, made.Rows)
    top = 65535 if image.mode == "I;16" else 255
    if made.get("WindowCenter") is None and not made.get("VOILUTSequence"):
        assert np.asarray(image).max() == top
        return
    expected = np.rint(np.clip(by_hand(made), 0, 1) * top)
    if made.get("PixelPaddingValue") is not None:
        expected[made.pixel_array == made.PixelPaddingValue] = 0
    assert np.array_equal(np.asarray(image), expected)


def test_the_tibia_is_not_a_chest():
    path = public_radiograph("RG3_UNCR.dcm")
    said = r"RG3_UNCR\.dcm: not of the chest by its header: body part EXTREMITY \(limb\); does not look like an upright"
    with pytest.raises(SpcxrError, match=said):
        read_radiograph(path, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_radiograph(public_radiograph("RG1_UNCR.dcm"), strict=False)
