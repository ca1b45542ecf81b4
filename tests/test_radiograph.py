"""read_radiograph: a file becomes one grey image, lungs dark, or an error that names the file and the cause."""

import sys
from io import BytesIO, StringIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from spcxr_hf.errors import SpcxrError
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor
from spcxr_hf.radiograph import TECHNICAL_ATTRIBUTES, read_radiograph

GREY = np.add.outer(np.arange(0, 200, 5), np.arange(0, 55)).astype(np.uint8)  # (40, 55), 0..249
DEEP = GREY.astype(np.uint16) * 257
PATIENT = "Doe^Jane"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(GREY), "PNG")
JPEG = encoded(Image.fromarray(GREY), "JPEG", quality=95)


# Pictures


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_png_of_any_colour_mode(tmp_path, mode):
    path = tmp_path / "chest.png"
    Image.fromarray(GREY).convert(mode).save(path)
    image = read_radiograph(path)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), GREY)


def test_colour_becomes_luminance(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / "chest.png"
    Image.fromarray(rgb).save(path)
    luminance = rgb @ [0.299, 0.587, 0.114]
    assert np.abs(np.asarray(read_radiograph(path)) - luminance).max() <= 0.51


def test_16_bit_png(tmp_path):
    path = tmp_path / "chest.png"
    Image.fromarray(DEEP + 3).save(path)
    deep = read_radiograph(path, full_depth=True)
    assert deep.mode == "I;16"
    assert np.array_equal(np.asarray(deep), DEEP + 3)
    image = read_radiograph(path)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), GREY)
    # Both are right for the processor; only the 8-bit one survives the convert("RGB") of the pipelines.
    processor = SpcxrImageProcessor()
    values = [processor(picture, return_tensors="pt").pixel_values for picture in (deep, image, image.convert("RGB"))]
    assert (values[0] - values[1]).abs().max() < 1 / 255 / processor.image_std[0]
    assert (values[2] - values[1]).abs().max() == 0


@pytest.mark.parametrize("name", ["chest.jpg", "chest.png", "chest", "chest.dcm"])
def test_content_decides_not_the_name(tmp_path, name):
    for data in (PNG, JPEG):
        path = tmp_path / name
        path.write_bytes(data)
        image = read_radiograph(str(path))
        assert np.abs(np.asarray(image).astype(int) - GREY).max() <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    path = tmp_path / "chest"
    path.write_bytes(encoded(Image.fromarray(GREY), kind, exif=exif))
    image = np.asarray(read_radiograph(path)).astype(int)
    assert image.shape == GREY.shape[::-1]
    assert np.abs(image - np.rot90(GREY, -1)).max() <= 4


def test_open_file_and_stream(tmp_path):
    path = tmp_path / "chest.png"
    path.write_bytes(PNG)
    with path.open("rb") as file:
        assert np.array_equal(np.asarray(read_radiograph(file)), GREY)
    assert np.array_equal(np.asarray(read_radiograph(BytesIO(PNG))), GREY)


def animated_png() -> bytes:
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


def text_bomb() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 10_000_000, zip=True)
    return encoded(Image.fromarray(GREY), "PNG", pnginfo=text)


REFUSED_FILES = {
    "empty": (b"", "the file is empty"),
    "text": (b"not an image" * 20, "not a PNG, JPEG or DICOM file"),
    "GIF": (encoded(Image.fromarray(GREY), "GIF"), "not a PNG, JPEG or DICOM file"),
    "PNG cut short": (PNG[: len(PNG) // 2], "damaged or cut short"),
    "JPEG cut short": (JPEG[: len(JPEG) // 2], "damaged or cut short"),
    "PNG signature alone": (PNG[:8], "damaged or cut short"),
    "JPEG signature alone": (JPEG[:3], "damaged or cut short"),
    "PNG with wrong bytes": (PNG[:45] + bytes(40) + PNG[85:], "damaged or cut short"),
    "text bomb in a PNG": (text_bomb(), "damaged or cut short"),
    "CMYK": (encoded(Image.new("CMYK", (9, 9)), "JPEG"), "colour mode CMYK"),
    "animation": (animated_png(), "animated PNG of 2 frames"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_refused_files(tmp_path, case):
    data, cause = REFUSED_FILES[case]
    path = tmp_path / "some-file.png"
    path.write_bytes(data)
    with pytest.raises(SpcxrError, match=cause) as refusal:
        read_radiograph(path)
    assert "some-file.png" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(SpcxrError, match=f"the open file: .*{cause}|{cause}"):
        read_radiograph(BytesIO(data))


@pytest.mark.parametrize("limit", [GREY.size - 1, GREY.size // 2 - 1])  # Pillow warns; Pillow raises
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    path = tmp_path / "bomb.png"
    path.write_bytes(PNG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(SpcxrError, match=r"bomb\.png: the (image|picture) is too large"):
        read_radiograph(path)


def test_refused_paths(tmp_path):
    with pytest.raises(SpcxrError, match=r"missing\.png: No such file") as refusal:
        read_radiograph(tmp_path / "missing.png")
    assert isinstance(refusal.value.__cause__, FileNotFoundError)
    with pytest.raises(SpcxrError, match=r"[Dd]irectory|Permission denied"):
        read_radiograph(tmp_path)
    with pytest.raises(SpcxrError, match="cannot be read"):
        read_radiograph("chest\0.png")
    with pytest.raises(SpcxrError, match="binary"):
        read_radiograph(StringIO("text"))
    closed = BytesIO(PNG)
    closed.close()
    with pytest.raises(SpcxrError, match="the open file: cannot be read"):
        read_radiograph(closed)
    for source in (None, 3, PNG, Image.fromarray(GREY)):
        with pytest.raises(SpcxrError, match=f"got {type(source).__name__}"):
            read_radiograph(source)


def test_no_permission(tmp_path, monkeypatch):
    def locked(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", locked)
    with pytest.raises(SpcxrError, match=r"locked\.png: Permission denied"):
        read_radiograph(tmp_path / "locked.png")


def test_dicom_without_pydicom(tmp_path, monkeypatch):
    path = tmp_path / "chest.dcm"
    path.write_bytes(bytes(128) + b"DICM" + bytes(100))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(SpcxrError, match=r'chest\.dcm: .*pip install "spcxr-hf\[dicom\]"') as refusal:
        read_radiograph(path)
    assert isinstance(refusal.value.__cause__, ImportError)


# DICOM


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


def test_few_bright_pixels_without_a_window(tmp_path):
    values = np.zeros((100, 100), np.uint16)
    values[0, 0] = 100
    image = read_radiograph(saved(dataset(values, 12), tmp_path / "chest.dcm"))
    assert np.unique(image).tolist() == [0, 255]


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
    "window beside the values": ({"WindowCenter": 60000, "WindowWidth": 10}, "no contrast"),
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
    groups = {pydicom.datadict.tag_for_keyword(name) >> 16 for name in TECHNICAL_ATTRIBUTES}
    assert groups == {0x0028, 0x7FE0}  # image presentation and pixel data; patients are in group 0010


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
