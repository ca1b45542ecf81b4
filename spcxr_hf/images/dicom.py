"""A DICOM file -> one grey image, lungs dark and bones bright; nothing of its header goes any further.

read_dicom -> _parse, _check_header                    the technical attributes, checked
           -> _decode -> _check_codestream, decoding   stored values; no decompression bomb gets as far
           -> _brightness -> _voi, _percentile_range   what each stored value looks like (PS3.3 C.11.1, C.11.2)
           -> _stated_kind                             modality, body part and view, for `plausibility` to judge

Every step from a stored value to its brightness looks at that value alone. So brightness is worked out once for each
value that can occur, at most 65,536, by pydicom's own functions, and the image is one look-up: as exact, and faster.
"""

import logging
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from spcxr_hf.errors import SpcxrError
from spcxr_hf.images.decoder_process import decode_apart
from spcxr_hf.images.plausibility import HeaderKind

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

# The largest radiographs of today's detectors have 15 million pixels. What declares more than this is refused unread.
MAX_PIXELS = 50_000_000
MAX_INFLATED_BYTES = 4 * MAX_PIXELS  # of a file in the deflated transfer syntax
BITS_STORED = range(8, 17)

# Where a DICOM names no usable window, these percentiles of its values become black and white: wide enough to keep
# every tissue, narrow enough that a burnt-in marker or a collimator edge does not take the contrast.
PERCENTILES = (0.5, 99.5)

# Only these are decoded. None of them says anything about the patient, so no text of an error or a warning can either.
TECHNICAL_ATTRIBUTES = [
    "SOPClassUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows",
    "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData",
    "Modality", "BodyPartExamined", "ViewPosition",
]  # fmt: skip
REQUIRED_ATTRIBUTES = (
    "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation",
)  # fmt: skip
PHOTOMETRIC_INTERPRETATIONS = (  # PS3.3 C.7.6.3.1.2; anything else is not repeated in a message
    "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT",
    "HSV", "ARGB", "CMYK", "XYB",
)  # fmt: skip

DEFLATED = "1.2.840.10008.1.2.1.99"
RLE_LOSSLESS = "1.2.840.10008.1.2.5"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
FIRST_OF_META = slice(128, 144)  # PS3.10 section 7.1: "DICM", then (0002,0000) UL, four bytes long, the group's length
INSTALL = 'pip install "spcxr-hf[dicom]"'

DECODERS = ("pylibjpeg", "pillow", "pydicom")  # that run in this process: pydicom's names, the preferred first
JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
MAX_TILES = 4096  # of a JPEG 2000 codestream

_quiet_lock = threading.Lock()


def read_dicom(source: "bytes | Dataset", *, full_depth: bool = False, window: int = 0) -> Image.Image:
    """Read a DICOM radiograph as its maker wants it shown, lungs dark and bones bright.

    Stored values go through rescale slope and intercept or the modality LUT (PS3.3 C.11.1), a VOI LUT or window
    (C.11.2: linear, linear exact, sigmoid) and, for MONOCHROME1, inversion (C.7.6.3.1.2); pixel padding (C.7.5.1.1.2)
    becomes black. Without a usable window, the 0.5 % and 99.5 % percentiles of the values, padding left out, become
    black and white.

    Args:
        source: the content of a DICOM file, or a pydicom dataset, which is left as it is.
        full_depth: keep more than 8 bits where the file has them.
        window: which of several VOI LUTs, or of several windows, is used, from 0.

    Returns:
        Mode `L`, 0..255; with `full_depth`, mode `I;16`, 0..65535, where more than 8 bits are stored. (Rows, Columns).

    Raises:
        SpcxrError: no pixel data, several frames, colour, not 8 to 16 bits stored, too many pixels, a window that is
            not there, no contrast, damaged, a transfer syntax that no installed decoder reads, or pydicom is missing.
            The text holds technical attributes only.
    """
    return read_dicom_and_kind(source, full_depth=full_depth, window=window)[0]


def read_dicom_and_kind(
    source: "bytes | Dataset", *, full_depth: bool = False, window: int = 0
) -> tuple[Image.Image, HeaderKind]:
    """The image of `read_dicom`, and what kind of image its header says it is."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise SpcxrError(f"a DICOM file, and reading it needs pydicom: {INSTALL}") from error
    try:
        return _read(source, full_depth, window)
    except SpcxrError:
        raise
    except Exception as error:  # damaged headers surface in pydicom as errors of many types ...
        cause = type(error).__name__
    # ... and the texts of those can quote the header. Here the error is no longer being handled, so nothing is chained.
    raise SpcxrError(f"the DICOM file is damaged ({cause})")


def _read(source: "bytes | Dataset", full_depth: bool, window: int) -> tuple[Image.Image, HeaderKind]:
    with quiet():
        dataset = _parse(source) if isinstance(source, bytes) else _technical_part(source)
        _check_header(dataset)
    codes, kind = _decode(dataset)
    with quiet():
        brightness = _brightness(codes, kind, dataset, window)
        stated = _stated_kind(dataset)
    scale, dtype = (65535, np.uint16) if full_depth and dataset.BitsStored > 8 else (255, np.uint8)
    image = _look_up(np.rint(brightness * scale).astype(dtype), codes)
    if image.min() == image.max():
        raise SpcxrError("the DICOM image has no contrast: all its pixels come out alike")
    return Image.fromarray(image), stated


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom silent: its warnings quote header values that it finds odd, in the warning and in its log.

    Filters of warnings belong to the whole process, hence the lock; it is held for the header, never while pixels are
    decoded.
    """
    log = logging.getLogger("pydicom")
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled, log.disabled = log.disabled, True
        try:
            yield
        finally:
            log.disabled = disabled


# ---- the header --------------------------------------------------------------------------------------------------


def _parse(data: bytes) -> "Dataset":
    """The technical attributes of a file."""
    import pydicom

    if DEFLATED.encode() in data:
        _check_inflated_size(data)
    # force: a file without the preamble, or with a damaged one, still gets the checks
    parsed = pydicom.dcmread(BytesIO(data), force=True, specific_tags=list(TECHNICAL_ATTRIBUTES))
    return _technical_part(parsed)


def _technical_part(dataset: "Dataset") -> "Dataset":
    """A dataset of its own that holds the technical attributes, decoded, and the transfer syntax."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset

    part = Dataset()
    for keyword in TECHNICAL_ATTRIBUTES:
        if keyword in dataset:
            part[keyword] = dataset[keyword]
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = _transfer_syntax(dataset)
    part.file_meta = meta
    part.set_original_encoding(meta.TransferSyntaxUID.is_implicit_VR, meta.TransferSyntaxUID.is_little_endian)
    return part


def _transfer_syntax(dataset: "Dataset") -> "UID":
    """That of the file meta information; without any, what pydicom has found while parsing."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, UID_dictionary

    stated = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if stated is None:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRBigEndian if little is False else ExplicitVRLittleEndian
        return ImplicitVRLittleEndian if implicit else explicit
    if UID_dictionary.get(stated, ("", ""))[1] != "Transfer Syntax":
        raise SpcxrError("the DICOM file's transfer syntax is not one of the standard's")
    return stated


def _check_inflated_size(data: bytes) -> None:
    """Refuse a deflated data set that would fill the memory; pydicom inflates it in one go."""
    head = data[FIRST_OF_META]
    if head[:12] != b"DICM\x02\x00\x00\x00UL\x04\x00":
        raise SpcxrError("a deflated DICOM file whose file meta information is damaged")
    start = FIRST_OF_META.stop + int.from_bytes(head[12:], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(data[start:], MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise SpcxrError(f"the deflated DICOM file holds more than {MAX_INFLATED_BYTES} bytes: a decompression bomb")


def _check_header(dataset: "Dataset") -> None:
    """One grey frame with pixels, or the reason why not."""
    if "PixelData" not in dataset:
        raise SpcxrError(f"a DICOM file without pixel data{_object_name(dataset)}, or no DICOM file at all")
    missing = [name for name in REQUIRED_ATTRIBUTES if dataset.get(name) is None]
    if missing:
        raise SpcxrError(f"the DICOM file lacks {', '.join(missing)}")
    _check_grey(dataset)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise SpcxrError(f"the DICOM file{_object_name(dataset)} has {frames} frames; a radiograph has one")
    if int(dataset.BitsStored) not in BITS_STORED or int(dataset.PixelRepresentation) not in (0, 1):
        raise SpcxrError(
            f"the pixel data{_object_name(dataset)} have {int(dataset.BitsStored)} bits stored, pixel representation "
            f"{int(dataset.PixelRepresentation)}; a radiograph has 8 to 16 bits, representation 0 or 1"
        )
    high, compressed = dataset.get("HighBit"), dataset.file_meta.TransferSyntaxUID.is_compressed
    if isinstance(high, int) and high != int(dataset.BitsStored) - 1 and not compressed:
        raise SpcxrError(
            f"the pixel data{_object_name(dataset)} have their highest bit at {high} with {int(dataset.BitsStored)} "
            "bits stored; it must be the last of them (PS3.5 section 8.1.1)"
        )
    check_pixel_count(int(dataset.Columns), int(dataset.Rows))


def _check_grey(dataset: "Dataset") -> None:
    photometric, samples = dataset.PhotometricInterpretation, int(dataset.get("SamplesPerPixel") or 1)
    if photometric in ("MONOCHROME1", "MONOCHROME2") and samples == 1:
        return
    known = photometric in (*PHOTOMETRIC_INTERPRETATIONS, "MONOCHROME1", "MONOCHROME2")
    name = repr(str(photometric)) if known else "of an unknown kind"
    raise SpcxrError(
        f"PhotometricInterpretation {name} with {samples} sample(s) per pixel is not accepted; MONOCHROME1 and "
        "MONOCHROME2 with one are"
    )


def _object_name(dataset: "Dataset") -> str:
    """' (RT Dose Storage)': what the standard calls this kind of object; a UID it does not know is not repeated."""
    from pydicom.uid import UID_dictionary

    entry = UID_dictionary.get(str(dataset.get("SOPClassUID", "")))
    return f" ({entry[0]})" if entry else ""


def _stated_kind(dataset: "Dataset") -> HeaderKind:
    texts = []
    for keyword in ("Modality", "BodyPartExamined", "ViewPosition"):
        try:
            texts.append(str(dataset.get(keyword) or ""))
        except Exception:  # whatever it holds, the image does not need it
            texts.append("")
    return HeaderKind(*texts)


def check_pixel_count(width: int, height: int) -> None:
    """Refuse what a decoder could not hold: no radiograph has so many pixels, a decompression bomb has.

    Raises:
        SpcxrError: no pixels, or more than `MAX_PIXELS` or, where that is less, Pillow's `MAX_IMAGE_PIXELS`.
    """
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if width * height > limit:
        raise SpcxrError(f"the image is too large: {width} x {height} pixels; at most {limit:,} in all")
    if width <= 0 or height <= 0:
        raise SpcxrError(f"the image has {height} rows and {width} columns")


# ---- the stored values -------------------------------------------------------------------------------------------


def _decode(dataset: "Dataset") -> tuple[np.ndarray, np.dtype]:
    """The stored values as unsigned codes (rows, columns), and the type that they are the bits of."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        stored = _decode_encapsulated(dataset) if syntax.is_encapsulated else dataset.pixel_array
    except SpcxrError:
        raise
    except Exception as error:  # the codec is missing or gave up; the length is wrong; and more
        cause = error
    else:
        if stored.shape != (dataset.Rows, dataset.Columns) or stored.dtype.kind not in "iu":
            raise SpcxrError(f"the pixel data are damaged: not {dataset.Rows} x {dataset.Columns} integers")
        stored = np.ascontiguousarray(stored, stored.dtype.newbyteorder("="))
        if stored.dtype.itemsize > 2:  # 32 bits allocated
            stored = stored.astype(f"{stored.dtype.kind}2")
        return stored.view(f"u{stored.dtype.itemsize}"), stored.dtype
    raise SpcxrError(_decoding_complaint(cause, syntax, int(dataset.BitsStored)))


def _decode_encapsulated(dataset: "Dataset") -> np.ndarray:
    """By the preferred decoder; where only GDCM or pyjpegls is left, in a process of its own."""
    decoder = _decoder(dataset.file_meta.TransferSyntaxUID)
    _check_codestream(dataset)
    if decoder:
        dataset.pixel_array_options(decoding_plugin=decoder)
        return dataset.pixel_array
    file = BytesIO()
    dataset.save_as(file, implicit_vr=False, little_endian=True)  # the technical attributes alone
    return decode_apart(bytes(128) + b"DICM" + file.getvalue())


def _decoder(syntax: str) -> str:
    """The decoder to use; '' where there are none but those that `decoding` keeps apart, if any."""
    from pydicom.pixels import get_decoder

    available = get_decoder(syntax).available_plugins
    return next((name for name in DECODERS if name in available), "")


def _decoding_complaint(error: Exception, syntax: str, bits: int) -> str:
    from pydicom.uid import UID

    name = UID(syntax).name
    if not isinstance(error, (NotImplementedError, RuntimeError)):
        return f'the pixel data are damaged or cut short ({type(error).__name__}; transfer syntax "{name}")'
    if syntax == JPEG_EXTENDED and bits > 8:
        return (
            f'pixel data in transfer syntax "{name}" with {bits} bits cannot be decoded: 12-bit lossy JPEG has no '
            "decoder under a permissive licence (pylibjpeg-libjpeg, which is GPL, has one; install it yourself)"
        )
    return (
        f'pixel data in transfer syntax "{name}" cannot be decoded: the data are damaged, or a decoder is missing '
        f"({INSTALL})"
    )


def _check_codestream(dataset: "Dataset") -> None:
    """Refuse a compressed frame that states no size, or another than the header does: the decoder would believe it."""
    from pydicom.encaps import generate_frames

    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    if dataset.file_meta.TransferSyntaxUID == RLE_LOSSLESS:  # has no header of its own
        return
    sizes = _codestream_sizes(frame)
    expected = (int(dataset.Columns), int(dataset.Rows), 1)
    if not sizes or any(size != expected for size in sizes):
        raise SpcxrError(
            f"the compressed pixel data are damaged, or not of the {expected[0]} x {expected[1]} grey pixels that the "
            "DICOM header states"
        )


def _codestream_sizes(frame: bytes) -> list[tuple[int, int, int]]:
    """(width, height, components) of every frame header in a JPEG, JPEG-LS or JPEG 2000 codestream; [] of none."""
    if frame.startswith(JP2_SIGNATURE):
        frame = frame[_jp2_codestream(frame) :]
    if frame.startswith(b"\xff\x4f\xff\x51"):  # SOC, SIZ: ISO/IEC 15444-1 A.5.1
        return _j2k_sizes(frame)
    return _jpeg_sizes(frame) if frame.startswith(b"\xff\xd8") else []


def _jp2_codestream(frame: bytes) -> int:
    """Where the codestream of a JP2 file begins (ISO/IEC 15444-1 I.5); on a box without length pydicom hangs."""
    place = len(JP2_SIGNATURE)
    while place + 8 <= len(frame) and frame[place + 4 : place + 8] != b"jp2c":
        length = int.from_bytes(frame[place : place + 4], "big")
        if length < 8:
            return len(frame)
        place += length
    return place + 8


def _j2k_sizes(frame: bytes) -> list[tuple[int, int, int]]:
    fields = [int.from_bytes(frame[8 + 4 * n : 12 + 4 * n], "big") for n in range(8)]
    right, bottom, left, top, tile_width, tile_height = fields[:6]
    if not (0 < tile_width < 2**16 and 0 < tile_height < 2**16):
        return []
    if -(-right // tile_width) * -(-bottom // tile_height) > MAX_TILES:
        return []
    return [(right - left, bottom - top, int.from_bytes(frame[40:42], "big"))]


def _jpeg_sizes(frame: bytes) -> list[tuple[int, int, int]]:
    sizes = []
    place = 2
    while place + 10 <= len(frame) and frame[place] == 0xFF:
        marker, length = frame[place + 1], int.from_bytes(frame[place + 2 : place + 4], "big")
        # SOF0..15 but DHT, JPG and DAC (ITU-T T.81 table B.1); SOF55 is JPEG-LS (T.87)
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(frame[place + n : place + n + 2], "big") for n in (5, 7))
            sizes.append((width, height, frame[place + 9]))
        place += 1 if marker == 0xFF else 2 + length
    return sizes


# ---- stored value -> brightness ----------------------------------------------------------------------------------

CHUNK = 1 << 20  # pixels; look-ups widen their indices to 8 bytes, so they go piece by piece


def _look_up(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    image = np.empty(codes.size, table.dtype)
    flat = codes.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        np.take(table, flat[start : start + CHUNK], out=image[start : start + CHUNK], mode="clip")
    return image.reshape(codes.shape)


def _counts(codes: np.ndarray, length: int) -> np.ndarray:
    flat = codes.reshape(-1)
    pieces = (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    return sum((np.bincount(piece, minlength=length) for piece in pieces), np.zeros(length, np.int64))


def _brightness(codes: np.ndarray, kind: np.dtype, dataset: "Dataset", window: int) -> np.ndarray:
    """The brightness, 0..1, of each code from 0 to the largest: the look-up table of this image."""
    stored = np.arange(int(codes.max()) + 1).astype(codes.dtype).view(kind)
    values = _modality(stored, dataset)
    if values.dtype.kind == "f" and np.array_equal(values, np.rint(values)) and np.abs(values).max() < 2**31:
        values = values.astype(np.int64)  # a VOI LUT is entered with whole numbers
    padding = _padding(stored, dataset)
    brightness = _voi(values, dataset, window)
    if brightness is None or _is_flat(brightness, codes):
        counts = _counts(codes, len(stored))
        counts[padding] = 0
        brightness = _unit(values, *_percentile_range(values, counts))
    if brightness is None:
        raise SpcxrError("the DICOM image has no contrast: all its pixels come out alike")
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
        brightness = 1 - brightness
    brightness[padding] = 0
    return brightness


def _modality(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """The stored values by the modality LUT, or by slope and intercept (PS3.3 C.11.1); one that lacks is 1 or 0."""
    from pydicom.pixels import apply_modality_lut

    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if dataset.get("ModalityLUTSequence") or (slope is None) == (intercept is None):
        return apply_modality_lut(stored, dataset)
    return stored * float(1 if slope is None else slope) + float(intercept or 0)


def _unit(values: np.ndarray, black: float, white: float) -> np.ndarray | None:
    """Brightness, 0..1, of values between black and white; None where these are one, or a value is not finite."""
    values = values.astype(np.float64)
    if black == white or not np.isfinite(values).all():
        return None
    return np.clip((values - black) / (white - black), 0, 1)


def _is_flat(brightness: np.ndarray, codes: np.ndarray) -> bool:
    """Whether an image comes out as a single grey: its window is that of another exposure."""
    if brightness[int(codes.min())] != brightness[-1]:  # almost always; else it is worth a look at every pixel
        return False
    present = brightness[_counts(codes, len(brightness)) > 0]
    return bool((present == present[0]).all())


def _padding(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Which stored values are padding: one, or a range (PS3.3 C.7.5.1.1.2)."""
    first = dataset.get("PixelPaddingValue")
    if not isinstance(first, int):
        return np.zeros(len(stored), bool)
    last = dataset.get("PixelPaddingRangeLimit")
    bounds = [first, last if isinstance(last, int) else first]
    if stored.dtype.kind == "i":  # its VR can say unsigned where the pixels are signed
        bounds = [bound - 65536 if bound > 32767 else bound for bound in bounds]
    return (stored >= min(bounds)) & (stored <= max(bounds))


def _voi(values: np.ndarray, dataset: "Dataset", window: int) -> np.ndarray | None:
    """Brightness, 0..1, of the values by the chosen VOI LUT or window; None without a usable one."""
    from pydicom.pixels import apply_voi, apply_windowing

    choices = _count_views(dataset)
    if window < 0 or window >= max(choices, 1):
        raise SpcxrError(
            f"the DICOM file has {choices} VOI LUTs or windows; number {window} is not there (they count from 0)"
        )
    if not choices:
        return None
    try:
        apply = apply_voi if _has_luts(dataset) else apply_windowing
        return _unit(apply(values, dataset, index=window), *_voi_range(dataset, window))
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError):  # a width below 1, a broken LUT
        return None


def _has_luts(dataset: "Dataset") -> bool:
    """Whether there are VOI LUTs, which go before windows, and none lacks its data."""
    items = dataset.get("VOILUTSequence") or []
    return bool(items) and all(item.get("LUTDescriptor") and item.get("LUTData") is not None for item in items)


def _count_views(dataset: "Dataset") -> int:
    if _has_luts(dataset):
        return len(dataset.VOILUTSequence)
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return 0
    return min(dataset["WindowCenter"].VM, dataset["WindowWidth"].VM)


def _voi_range(dataset: "Dataset", window: int) -> tuple[float, float]:
    """What the VOI transformation gives for black and for white."""
    from pydicom.pixels import apply_voi, apply_windowing

    if _has_luts(dataset):
        length, first, bits = dataset.VOILUTSequence[window].LUTDescriptor  # C.11.2.1.1: bits of each entry
        entries = apply_voi(np.arange(first, first + (length or 2**16)), dataset, index=window)
        # Some devices declare 16 bits for entries of 12, which would make the picture a sixteenth as bright.
        return 0.0, 2.0 ** min(bits, int(entries.max()).bit_length()) - 1
    with np.errstate(over="ignore"):  # a sigmoid saturates
        black, white = apply_windowing(np.array([-1e12, 1e12]), dataset, index=window)
    return float(black), float(white)


def _percentile_range(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The smallest values that 0.5 % and 99.5 % of the pixels do not exceed; the extremes where these two agree."""
    order = np.argsort(values, kind="stable")
    order = order[counts[order] > 0]
    if not len(order):
        return 0.0, 0.0
    reached = np.cumsum(counts[order]) / counts.sum()
    low, high = (float(values[order[np.searchsorted(reached, share / 100)]]) for share in PERCENTILES)
    return (low, high) if low < high else (float(values[order[0]]), float(values[order[-1]]))
