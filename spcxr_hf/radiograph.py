"""A file -> one grey image, lungs dark and bones bright.

read_radiograph -> _read_bytes -> _read_picture                                        PNG, JPEG
                               -> _read_dicom -> _check_header, _stored_values, _window  DICOM
"""

import os
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .errors import SpcxrError

if TYPE_CHECKING:
    from pydicom import Dataset

PICTURE_FORMATS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}  # name in Pillow: first bytes of the file
DICOM_PREFIX = slice(128, 132)  # DICOM PS3.10 section 7.1: a preamble of 128 bytes, then "DICM"
DICOM_SUFFIXES = (".dcm", ".dicom")  # a file without the preamble is believed by its name

# Where a DICOM names no usable window, these percentiles of its values become black and white: wide enough to keep
# every tissue, narrow enough that a burnt-in marker or a collimator edge does not take the contrast.
PERCENTILES = (0.5, 99.5)

# Only these are decoded. None of them says anything about the patient, so no text of an error or a warning can either.
TECHNICAL_ATTRIBUTES = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ModalityLUTSequence", "RescaleSlope",
    "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "PixelData",
]  # fmt: skip
REQUIRED_ATTRIBUTES = (
    "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation",
)  # fmt: skip


def read_radiograph(source: str | os.PathLike | BinaryIO, *, full_depth: bool = False) -> Image.Image:
    """Read a PNG, a JPEG or a DICOM file into one grey image with lungs dark and bones bright.

    What the file is follows from its content. A picture is taken as it is: its EXIF orientation is honoured, colour
    becomes luminance (ITU-R BT.601), alpha is dropped, and that its lungs are dark is for its maker to say. A DICOM
    goes through rescale slope and intercept or modality LUT (PS3.3 C.11.1), the first VOI LUT or window (C.11.2) and,
    for MONOCHROME1, inversion (C.7.6.3.1.2); where it has no usable window, its 0.5 % and 99.5 % percentiles become
    black and white.

    Args:
        source: path, or file open for binary reading (read to its end).
        full_depth: keep more than 8 bits where the file has them. Off, because most software, the pipelines of
            transformers included, turns a 16-bit image into 8 bits by cutting it off at 255, which leaves a white
            picture; the image processor of this package takes both.

    Returns:
        Mode `L`, 0..255; with `full_depth`, mode `I;16`, 0..65535, for files of more than 8 bits per pixel. A DICOM's
        window fills the whole range; the values of a 16-bit PNG are 0..65535 already.

    Raises:
        SpcxrError: the file is missing, unreadable, empty, truncated, corrupt, too large or of another kind; or a DICOM
            without pixel data, with several frames, in colour, in a transfer syntax that no installed decoder reads, or
            without pydicom. The text has the file's name and the cause.
    """
    name, data = _read_bytes(source)
    try:
        image = _read_dicom(data) if _is_dicom(name, data) else _read_picture(data)
    except SpcxrError as error:
        raise SpcxrError(f"{name}: {error}") from (error.__cause__ or error)
    return image if full_depth else _to_8_bit(image)


def _read_bytes(source: str | os.PathLike | BinaryIO) -> tuple[str, bytes]:
    """The name that errors give the file, and its content."""
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
    elif hasattr(source, "read"):
        name = source.name if isinstance(getattr(source, "name", None), str) else "the open file"
    else:
        raise SpcxrError(f"read_radiograph takes a path or a file open for binary reading; got {type(source).__name__}")
    try:
        if isinstance(source, (str, os.PathLike)):
            with open(name, "rb") as file:
                data = file.read()
        else:
            data = source.read()
    except OSError as error:
        raise SpcxrError(f"{name}: {error.strerror or type(error).__name__}") from error
    except ValueError as error:  # a null character in the path, a file that is closed, text that does not decode
        raise SpcxrError(f"{name}: cannot be read: {error}") from error
    if not isinstance(data, (bytes, bytearray)):
        raise SpcxrError(f"{name}: the file must be open for binary reading; it gave {type(data).__name__}")
    if not data:
        raise SpcxrError(f"{name}: the file is empty")
    return name, bytes(data)


def _is_dicom(name: str, data: bytes) -> bool:
    if data.startswith(tuple(PICTURE_FORMATS.values())):
        return False
    return data[DICOM_PREFIX] == b"DICM" or name.lower().endswith(DICOM_SUFFIXES)


def _read_picture(data: bytes) -> Image.Image:
    """PNG or JPEG -> mode `L` or `I;16`."""
    if not data.startswith(tuple(PICTURE_FORMATS.values())):
        raise SpcxrError("not a PNG, JPEG or DICOM file")
    try:
        picture = Image.open(BytesIO(data), formats=list(PICTURE_FORMATS))
        _check_pixel_count(*picture.size)
        frames = getattr(picture, "n_frames", 1)
        if picture.format == "PNG" and frames > 1:
            raise SpcxrError(f"an animated PNG of {frames} frames; one image is needed")
        picture.load()
        return _to_grey(ImageOps.exif_transpose(picture))
    except SpcxrError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SpcxrError("the picture is too large: its header announces a decompression bomb") from error
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, struct.error, zlib.error and more
        raise SpcxrError(f"the picture is damaged or cut short ({type(error).__name__})") from error


def _check_pixel_count(width: int, height: int) -> None:
    """Refuse what Pillow only warns of: no radiograph has 90 million pixels, a decompression bomb has."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise SpcxrError(f"the image is too large: {width} x {height} pixels, the limit is {limit}")


def _to_grey(image: Image.Image) -> Image.Image:
    """Any mode that a PNG or JPEG radiograph has -> `L` or `I;16`."""
    if image.mode in ("L", "I;16"):
        return image
    if image.mode.startswith("I"):  # 16 bits in another layout, as older Pillow opens a 16-bit PNG
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("1", "LA", "RGB"):
        return image.convert("L")
    if image.mode in ("P", "PA", "RGBA"):  # by way of RGB: the palette is looked up, alpha is dropped
        return image.convert("RGB").convert("L")
    raise SpcxrError(f"colour mode {image.mode} is not accepted; grey, RGB and palette pictures are")


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode == "L":
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _read_dicom(data: bytes) -> Image.Image:
    """DICOM -> mode `L` up to 8 bits stored, `I;16` above."""
    try:
        import pydicom
    except ImportError as error:
        raise SpcxrError('a DICOM file, and reading it needs pydicom: pip install "spcxr-hf[dicom]"') from error
    try:
        # force: a file without the preamble, or with a damaged one, still gets the checks below
        dataset = pydicom.dcmread(BytesIO(data), force=True, specific_tags=list(TECHNICAL_ATTRIBUTES))
        _check_header(dataset)
        brightness = _window(_stored_values(dataset), dataset)
        if dataset.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
            brightness = 1 - brightness
        deep = dataset.BitsStored > 8
    except SpcxrError:
        raise
    except Exception as error:  # damaged headers surface in pydicom as errors of many types
        raise SpcxrError(f"the DICOM file is damaged ({type(error).__name__})") from error
    scale, dtype = (65535, np.uint16) if deep else (255, np.uint8)
    return Image.fromarray(np.rint(brightness * scale).astype(dtype))


def _check_header(dataset: "Dataset") -> None:
    """One grey frame with pixels, or the reason why not."""
    if "PixelData" not in dataset:
        raise SpcxrError("a DICOM file without pixel data, or no DICOM file at all")
    missing = [name for name in REQUIRED_ATTRIBUTES if dataset.get(name) is None]
    if missing:
        raise SpcxrError(f"the DICOM file lacks {', '.join(missing)}")
    photometric, samples = dataset.PhotometricInterpretation, dataset.get("SamplesPerPixel") or 1
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        raise SpcxrError(
            f"PhotometricInterpretation {str(photometric)[:16]!r} with {samples} sample(s) per pixel is not accepted; "
            "MONOCHROME1 and MONOCHROME2 with one are"
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise SpcxrError(f"the DICOM file has {frames} frames; a radiograph has one")
    if not (dataset.Rows and dataset.Columns):
        raise SpcxrError(f"the DICOM image has {dataset.Rows} rows and {dataset.Columns} columns")
    _check_pixel_count(dataset.Columns, dataset.Rows)


def _stored_values(dataset: "Dataset") -> np.ndarray:
    """The decoded pixels (rows, columns), as stored."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in dataset.file_meta:  # no file meta information: pydicom has found the encoding itself
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        return dataset.pixel_array
    except (NotImplementedError, RuntimeError) as error:  # the codec is missing, or it gave up
        raise SpcxrError(
            f'pixel data in transfer syntax "{syntax.name}" cannot be decoded: the data are damaged, or a decoder is '
            'missing (pip install "spcxr-hf[dicom]")'
        ) from error
    except Exception as error:
        raise SpcxrError(
            f'the pixel data are damaged or cut short ({type(error).__name__}; transfer syntax "{syntax.name}")'
        ) from error


def _window(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Stored values -> 0..1, by the first VOI LUT or window (DICOM PS3.3 C.11.2), or by percentiles."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    values = apply_modality_lut(stored, dataset)
    try:
        windowed = apply_voi_lut(values, dataset, index=0).astype(np.float64)
        low, high = _window_range(dataset)
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError):  # a width below 1, a broken LUT
        low = high = None
    if low is None or high is None:
        windowed = values.astype(np.float64)
        low, high = np.percentile(windowed, PERCENTILES)
        if low == high:
            low, high = windowed.min(), windowed.max()
    if low == high or windowed.min() == windowed.max():
        raise SpcxrError("the DICOM image has no contrast: all its pixels come out alike")
    return np.clip((windowed - low) / (high - low), 0, 1)


def _window_range(dataset: "Dataset") -> tuple[float | None, float | None]:
    """What the VOI transformation gives for black and for white; (None, None) where there is none."""
    from pydicom.pixels import apply_windowing

    if dataset.get("VOILUTSequence"):
        return 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1  # C.11.2.1.1: bits of each entry
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return None, None
    with np.errstate(over="ignore"):  # a sigmoid saturates
        black, white = apply_windowing(np.array([-1e12, 1e12]), dataset, index=0)
    return float(black), float(white)
