"""Reading image files as one grey image, lungs dark and bones bright.

read_radiograph, read_with_quality_warnings -> _read -> _read_picture -> _to_grey         PNG, JPEG, TIFF, WebP, BMP
                                                     -> dicom.read_dicom                  DICOM
                                                     -> plausibility.quality_warnings     is it a chest radiograph?
"""

import os
import sys
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from PIL import Image, ImageOps

from spcxr_hf.errors import SpcxrError, printable
from spcxr_hf.files import check_regular_file
from spcxr_hf.images.dicom import read_dicom
from spcxr_hf.images.limits import MAX_FILE_BYTES, check_size, in_flight, look_up
from spcxr_hf.images.plausibility import HeaderKind, ImplausibleWarning, colourfulness, quality_warnings

if TYPE_CHECKING:
    from pydicom import Dataset

# Name in Pillow: first bytes of the file.
PICTURE_FORMATS: dict[str, tuple[bytes, ...]] = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "WEBP": (b"RIFF",),
}
# These may also be in the preamble of a DICOM file (PS3.10 section 7.1), whose own prefix takes precedence.
PREAMBLE_FORMATS: dict[str, tuple[bytes, ...]] = {"TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "BMP": (b"BM",)}
DICOM_PREFIX = slice(128, 132)  # DICOM PS3.10 section 7.1: a preamble of 128 bytes, then "DICM"
DICOM_SUFFIXES = (".dcm", ".dicom")  # they decide where a file has no prefix

TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC = 258, 262  # tags of TIFF 6.0, section 8
FLOAT_TOLERANCE = 1e-3  # what resampling and rounding may leave outside 0..1


def read_radiograph(
    source: "str | os.PathLike | bytes | BinaryIO | Dataset",
    *,
    full_depth: bool = False,
    window: int = 0,
    strict: bool | None = False,
) -> Image.Image:
    """Read a PNG, JPEG, TIFF, WebP, BMP or DICOM file into one grey image with lungs dark and bones bright.

    The kind of file follows from its content. A picture keeps its grey values: its EXIF orientation is applied, colour
    becomes luminance (ITU-R BT.601), alpha is dropped, and no inversion is attempted. Floats (TIFF) must lie in 0..1. A
    DICOM goes through rescale or modality LUT (PS3.3 C.11.1), a VOI LUT or window (C.11.2) and, for MONOCHROME1,
    inversion (C.7.6.3.1.2); pixel padding becomes black; where there is no usable window, or one beside all of the
    values, the 0.5 % and 99.5 % percentiles become black and white.

    Args:
        source: path of a regular file, file open for binary reading (read to its end), content of a file, or
            `pydicom.Dataset`.
        full_depth: keep more than 8 bits where the file has them. Off, because most software, the pipelines of
            transformers included, turns a 16-bit image into 8 bits by cutting it off at 255, which leaves a white
            picture; the image processor of this package takes both.
        window: which of a DICOM's VOI LUTs or windows is used, from 0.
        strict: what happens to an image that is constant, nearly empty, nearly black, colourful, a probable negative or
            not an upright frontal chest radiograph, by the tests of `plausibility` on its grey values and a DICOM's
            header: an `ImplausibleWarning` (False), a SpcxrError (True), or no test (None).

    Returns:
        Mode `L`, 0..255; with `full_depth`, mode `I;16`, 0..65535, for files of more than 8 bits per pixel. A DICOM's
        window fills the whole range; the values of a 16-bit PNG are 0..65535 already.

    Raises:
        SpcxrError: the file is missing, unreadable, empty, truncated, corrupt, too large or of another kind; or a DICOM
            without pixel data, with several frames, in colour, in a transfer syntax that no installed decoder reads, or
            without pydicom; or, with `strict=True`, an image that is not plausible. The text has the file's name and
            the cause, and nothing of a DICOM's header but technical attributes.
    """
    name, image, colour, header = _read(source, full_depth, window)
    if strict is not None and (found := quality_warnings(image, colour, header)):
        text = f"{name}: {'; '.join(found)}"
        if strict:
            raise SpcxrError(text)
        warnings.warn(text, ImplausibleWarning, stacklevel=2)
    return image


def read_with_quality_warnings(
    source: "str | os.PathLike | bytes | BinaryIO | Dataset", *, full_depth: bool = False, window: int = 0
) -> tuple[Image.Image, list[str]]:
    """The image of `read_radiograph`, and the texts of its warnings (Python's warning filters are not thread-safe)."""
    _, image, colour, header = _read(source, full_depth, window)
    return image, quality_warnings(image, colour, header)


def _read(source: Any, full_depth: bool, window: int) -> tuple[str, Image.Image, float, HeaderKind]:
    """The file's name in messages, the image, its `colourfulness` before it became grey, and its kind by its header."""
    name, content = _content(source)
    colour, header = 0.0, HeaderKind()
    try:
        if isinstance(content, bytes) and (kind := file_kind(content, name)) != "DICOM":
            image, colour = _read_picture(content, kind, name)
        else:
            image, header = read_dicom(content, full_depth=full_depth, window=window)
    except SpcxrError as error:
        raise SpcxrError(f"{name}: {error}") from (error.__cause__ or error)
    return name, image if full_depth else to_8_bit(image), colour, header


def _content(source: Any) -> "tuple[str, bytes | Dataset]":
    """The name of the source in messages, and its content."""
    # Not loaded: then it is no data set of pydicom's. (While a thread is loading it, the module has no such name yet.)
    if isinstance(source, getattr(sys.modules.get("pydicom"), "Dataset", ())):
        return "the DICOM dataset", cast(Any, source)
    name, is_path = "the given bytes", isinstance(source, (str, os.PathLike))
    if isinstance(source, (bytes, bytearray, memoryview)):
        data: Any = bytes(source)
    elif is_path or hasattr(source, "read"):
        file_name = os.fsdecode(source) if is_path else getattr(source, "name", None)
        name = printable(file_name) if isinstance(file_name, str) else "the open file"
        size = check_regular_file(source, MAX_FILE_BYTES) if is_path else MAX_FILE_BYTES + 1
        try:
            if is_path:
                with open(source, "rb") as file:
                    data = file.read(size)
            else:
                data = source.read(size)
        except OSError as error:
            raise SpcxrError(f"{name}: {error.strerror or type(error).__name__}") from error
        except ValueError as error:  # a file that is closed, text that does not decode
            raise SpcxrError(f"{name}: cannot be read: {error}") from error
        if not isinstance(data, (bytes, bytearray)):
            raise SpcxrError(f"{name}: the file must be open for binary reading; it gave {type(data).__name__}")
        if len(data) > MAX_FILE_BYTES:
            raise SpcxrError(f"{name}: the file is too large: more than {MAX_FILE_BYTES:,} bytes")
    else:
        raise SpcxrError(
            "read_radiograph takes a path, a file open for binary reading, bytes or a pydicom.Dataset; got "
            f"{type(source).__name__}"
        )
    if not data:
        raise SpcxrError(f"{name}: the file is empty")
    return name, bytes(data)


def file_kind(data: bytes, name: str = "") -> str | None:
    """The kind of a file by its first 132 bytes or, failing that, its name.

    Returns:
        `PNG`, `JPEG`, `WEBP`, `TIFF`, `BMP` (Pillow's names), `DICOM`, or None for anything else.
    """
    for kind, beginnings in PICTURE_FORMATS.items():
        if data.startswith(beginnings) and (kind != "WEBP" or data[8:12] == b"WEBP"):
            return kind
    if data[DICOM_PREFIX] == b"DICM":
        return "DICOM"
    for kind, beginnings in PREAMBLE_FORMATS.items():
        if data.startswith(beginnings):
            return kind
    return "DICOM" if name.lower().endswith(DICOM_SUFFIXES) else None


# ---- pictures ----------------------------------------------------------------------------------------------------


def _read_picture(data: bytes, kind: str | None, name: str) -> tuple[Image.Image, float]:
    """PNG, JPEG, TIFF, WebP or BMP -> mode `L` or `I;16`, and how colourful it was."""
    if kind is None and name.lower().endswith(".img"):
        raise SpcxrError("a raw .IMG, as JSRT ships, has no header; spcxr_hf.data.masks.convert_jsrt makes PNG files")
    if kind is None:
        raise SpcxrError("not a PNG, JPEG, TIFF, WebP, BMP or DICOM file")
    try:
        if kind == "WEBP":
            check_size(*_webp_size(data))  # Pillow's decoder allocates the canvas as soon as it opens it
        picture = Image.open(BytesIO(data), formats=[kind])
        check_size(*picture.size)
        frames = getattr(picture, "n_frames", 1)
        if kind != "JPEG" and frames > 1:  # a camera's JPEG may carry a preview behind the image
            raise SpcxrError(
                f"{'an animated' if kind != 'TIFF' else 'a'} {kind} of {frames} frames; one image is needed"
            )
        with in_flight(picture.width * picture.height):
            picture.load()
            grey = _to_grey(picture)
            ImageOps.exif_transpose(grey, in_place=True)
            return grey, colourfulness(picture) if picture.mode in ("RGB", "RGBA", "P") else 0.0
    except SpcxrError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SpcxrError("the picture is too large: its header announces a decompression bomb") from error
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, struct.error, zlib.error and more
        raise SpcxrError(f"the picture is damaged or cut short ({type(error).__name__})") from error


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) that the first chunk of a WebP file declares (RFC 9649 sections 2.5 to 2.7)."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise SpcxrError("the picture is damaged or cut short")
    if chunk == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _to_grey(image: Image.Image) -> Image.Image:
    """Any mode that a picture of a radiograph has -> `L`, or `I;16` with 0..65535."""
    if image.mode == "L":
        return image
    if image.mode in ("1", "LA", "RGB"):
        return image.convert("L")
    if image.mode in ("P", "PA", "RGBA", "RGBX"):  # by way of RGB: the palette is looked up, alpha is dropped
        return image.convert("RGB").convert("L")
    if image.mode != "F" and not image.mode.startswith("I"):
        raise SpcxrError(f"colour mode {image.mode} is not accepted; grey, RGB and palette pictures are")

    tags = getattr(image, "tag_v2", {})
    white_is_zero = tags.get(TIFF_PHOTOMETRIC) == 0  # Pillow inverts only 8 bits and less
    twelve_bits = tags.get(TIFF_BITS_PER_SAMPLE) == (12,)
    if image.mode == "I;16" and not white_is_zero and not twelve_bits:
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())  # NaN anywhere makes both NaN
    if image.mode == "F":
        if not (low >= -FLOAT_TOLERANCE and high <= 1 + FLOAT_TOLERANCE):
            raise SpcxrError(f"float values from {low:.6g} to {high:.6g}; a picture of floats must lie in 0..1")
        values = np.rint(values.clip(0, 1).astype(np.float64) * 65535)
    elif twelve_bits:
        values = np.rint(values * (65535 / 4095))
    # 32 or signed 16 bits; of a 16-bit PNG, older Pillow makes 32 bits
    elif image.mode == "I" and image.format != "PNG" and (low < 0 or high > 65535 or 0 < high < 256):
        raise SpcxrError(
            f"integers from {low:.0f} to {high:.0f} in a picture of 32 or signed 16 bits; 16 unsigned bits are meant"
        )
    deep = values.astype(np.uint16)
    return Image.fromarray(65535 - deep if white_is_zero else deep)


def to_8_bit(image: Image.Image) -> Image.Image:
    """`L` or 0..65535 (`I;16`, `I`) -> `L`."""
    if image.mode == "L":
        return image
    levels = (np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(look_up(levels.astype(np.uint8), np.asarray(image)))
