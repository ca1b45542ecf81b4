"""read_radiograph: a file becomes one grey image, lungs dark, or an error that names the file and the cause."""

import os
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import check_regular_file
from spcxr_hf.images import limits, reader
from spcxr_hf.images.reader import read_radiograph
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor

pytestmark = pytest.mark.filterwarnings("ignore::spcxr_hf.images.plausibility.ImplausibleWarning")

GREY = np.add.outer(np.arange(0, 200, 5), np.arange(0, 55)).astype(np.uint8)  # (40, 55), 0..249
DEEP = GREY.astype(np.uint16) * 257
PATIENT = "Doe^Jane"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(GREY), "PNG")
JPEG = encoded(Image.fromarray(GREY), "JPEG", quality=95)


def tiff_of_12_bits() -> bytes:
    """2 x 2 pixels of 12 bits, packed: 0, 4095; 2048, 1."""
    pixels = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x01])
    tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    return head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


# Pictures


def test_tiff_of_12_bits_fills_the_range():
    image = read_radiograph(tiff_of_12_bits(), full_depth=True, strict=None)
    assert np.asarray(image).tolist() == [[0, 65535], [32776, 16]]


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    path = tmp_path / "chest"
    path.write_bytes(encoded(Image.fromarray(GREY), kind, exif=exif))
    image = np.asarray(read_radiograph(path)).astype(int)
    assert image.shape == GREY.shape[::-1]
    assert np.abs(image - np.rot90(GREY, -1)).max() <= (12 if kind == "WEBP" else 4)


def test_open_file_and_stream(tmp_path):
    path = tmp_path / "chest.png"
    path.write_bytes(PNG)
    with path.open("rb") as file:
        assert np.array_equal(np.asarray(read_radiograph(file)), GREY)
    assert np.array_equal(np.asarray(read_radiograph(BytesIO(PNG))), GREY)


TIFF_OPTIONS = [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}]


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_other_formats_and_modes(kind, mode):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_radiograph(encoded(Image.fromarray(GREY).convert(mode), kind, **options))
    assert image.mode == "L"
    assert np.abs(np.asarray(image).astype(int) - GREY).max() <= (2 if kind == "WEBP" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_one_bit(kind):
    image = np.asarray(read_radiograph(encoded(Image.fromarray(GREY > 100), kind)))
    assert np.array_equal(image, 255 * (GREY > 100))


@pytest.mark.parametrize("options", TIFF_OPTIONS)
@pytest.mark.parametrize("kind", ["16", "16 big endian", "float", "32"])
def test_deep_tiff(kind, options):
    pixels = {"float": (DEEP / 65535).astype(np.float32), "32": DEEP.astype(np.int32)}.get(kind, DEEP)
    picture = Image.fromarray(pixels)
    if kind == "16 big endian":
        picture = Image.frombytes("I;16B", GREY.shape[::-1], DEEP.astype(">u2").tobytes())
    image = read_radiograph(encoded(picture, "TIFF", **options), full_depth=True)
    assert image.mode == "I;16"
    assert np.array_equal(np.asarray(image), DEEP)


def test_white_is_zero_in_a_16_bit_tiff():
    data = bytearray(encoded(Image.fromarray(DEEP), "TIFF"))
    tag = bytes([0x06, 0x01, 3, 0, 1, 0, 0, 0])  # PhotometricInterpretation, one SHORT
    place = data.index(tag) + len(tag)
    assert data[place] == 1
    data[place] = 0
    assert np.array_equal(np.asarray(read_radiograph(bytes(data), full_depth=True)), 65535 - DEEP)


@pytest.mark.parametrize(
    ("pixels", "cause"),
    [
        (GREY.astype(np.float32), r"float values from 0 to 2\d\d.*0\.\.1"),
        (np.full((9, 9), np.nan, np.float32), "float values from nan"),
        (GREY.astype(np.int32), "integers from 0 to 2"),
        (DEEP.astype(np.int32) - 5, "integers from -5"),
    ],
)
def test_values_of_an_unstated_range_are_refused(pixels, cause):
    with pytest.raises(SpcxrError, match=f"the given bytes: {cause}"):
        read_radiograph(encoded(Image.fromarray(pixels), "TIFF"))


def test_webp_canvas_is_measured_before_it_is_opened(monkeypatch):
    data = bytearray(encoded(Image.fromarray(GREY).convert("RGBA"), "WEBP", lossless=True, exif=Image.Exif().tobytes()))
    assert reader._webp_size(bytes(data)) == (55, 40)
    for options in ({"lossless": True}, {"lossless": False}):
        assert reader._webp_size(encoded(Image.fromarray(GREY).convert("RGB"), "WEBP", **options)) == (55, 40)
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("it was opened"))
    bomb = b"RIFF\0\0\0\0WEBPVP8X" + (10).to_bytes(4, "little") + bytes(4) + b"\xff\x3f\0" * 2
    with pytest.raises(SpcxrError, match="too large: 16384 x 16384"):
        read_radiograph(bomb)


def test_two_pages():
    pages = [Image.fromarray(GREY), Image.fromarray(GREY)]
    with pytest.raises(SpcxrError, match="TIFF of 2 frames"):
        read_radiograph(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))


def test_the_preamble_of_a_dicom_may_look_like_a_tiff():
    assert reader.file_kind(b"II*\0" + bytes(124) + b"DICM") == "DICOM"
    assert reader.file_kind(b"II*\0" + bytes(128), "chest.dcm") == "TIFF"
    assert reader.file_kind(PNG[:128].ljust(128, b"\0") + b"DICM", "chest.dcm") == "PNG"
    assert reader.file_kind(b"RIFF\0\0\0\0WAVE") is None
    assert reader.file_kind(b"\x08\0", "CHEST.DCM") == "DICOM"


def test_mutated_files_end_in_an_image_or_in_our_error():
    """300 of the 10,000 that `fuzz_reader.py` reads by default, more than 1 GiB or 5 s being findings too."""
    from training_scripts.benchmarks import fuzz_reader

    result = fuzz_reader.fuzz(300, seed=7)
    assert result["findings"] == []
    assert result["total"]["refused"] > 100
    assert result["total"]["image"] > 30


def test_the_fuzzer_finds_what_it_looks_for(monkeypatch):
    from training_scripts.benchmarks import fuzz_reader

    def careless(stream):
        if stream.read(1) == b"\x89":
            raise KeyError("no SpcxrError")
        return Image.fromarray(GREY)

    monkeypatch.setattr(fuzz_reader, "read_radiograph", careless)
    result = fuzz_reader.fuzz(40, seed=1)
    assert result["findings"]
    assert {finding["what"] for finding in result["findings"]} == {"KeyError: 'no SpcxrError'"}


def animated_png() -> bytes:
    frames = [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


def text_bomb() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 10_000_000, zip=True)
    return encoded(Image.fromarray(GREY), "PNG", pnginfo=text)


REFUSED_FILES = {
    "empty": (b"", "the file is empty"),
    "text": (b"not an image" * 20, "not a PNG, JPEG, TIFF, WebP, BMP or DICOM file"),
    "GIF": (encoded(Image.fromarray(GREY), "GIF"), "not a PNG, JPEG, TIFF, WebP, BMP or DICOM file"),
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
    for source in (None, 3, [PNG], Image.fromarray(GREY)):
        with pytest.raises(SpcxrError, match=f"got {type(source).__name__}"):
            read_radiograph(source)


def test_only_regular_files_of_bounded_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    sparse = tmp_path / "sparse.png"
    sparse.touch()
    os.truncate(sparse, 6 * 2**30)
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name, cause in (
        ("pipe.png", "not a regular file"),
        ("link.png", "not a regular file"),
        ("sparse.png", "too large: 6,442,450,944 bytes"),
    ):
        with pytest.raises(SpcxrError, match=f"{name}: .*{cause}"):
            read_radiograph(tmp_path / name)
    with open("/dev/zero", "rb") as endless, pytest.raises(SpcxrError, match="/dev/zero: the file is too large"):
        read_radiograph(endless)
    (tmp_path / "good.png").symlink_to(tmp_path / "behind.png")
    (tmp_path / "behind.png").write_bytes(PNG)
    assert check_regular_file(tmp_path / "good.png", len(PNG)) == len(PNG)
    assert np.array_equal(np.asarray(read_radiograph(tmp_path / "good.png")), GREY)


def test_names_that_are_no_utf_8(tmp_path):
    for content in (PNG, b"no picture"):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/odd-\xff\n.png")
        with open(path, "wb") as file:
            file.write(content)
        if content == PNG:
            assert np.array_equal(np.asarray(read_radiograph(path)), GREY)
            continue
        with pytest.raises(SpcxrError, match="not a PNG") as refusal:
            read_radiograph(path)
        assert r"odd-\udcff\n.png" in str(refusal.value).encode("utf-8").decode()  # can be printed


def test_a_side_and_the_ratio_of_sides_are_bounded():
    for size, cause in (((49_000_000, 1), "too large"), ((40_000, 1_000), "too large"), ((1_000, 10), "too long")):
        with pytest.raises(SpcxrError, match=f"the image is {cause}: {size[0]} x {size[1]} pixels"):
            read_radiograph(encoded(Image.new("L", size), "PNG"))


def test_the_pixels_that_threads_decode_at_a_time_are_bounded(monkeypatch):
    """Each image of 2,200 pixels waits until those of other threads are done with."""
    held: list[int] = []
    monkeypatch.setattr(limits, "MAX_PIXELS_IN_FLIGHT", 2 * GREY.size)
    look = reader._to_grey

    def watched(image: Image.Image) -> Image.Image:
        held.append(limits._pixels_in_flight)
        time.sleep(0.01)
        return look(image)

    monkeypatch.setattr(reader, "_to_grey", watched)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(read_radiograph, [PNG] * 24))
    assert len(images) == 24
    assert max(held) == 2 * GREY.size
    assert limits._pixels_in_flight == 0


def test_no_permission(tmp_path, monkeypatch):
    def locked(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "locked.png").write_bytes(PNG)
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
