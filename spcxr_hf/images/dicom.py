"""Reading DICOM files as one grey image, lungs dark and bones bright; no other header values leave this module.

read_dicom -> _technical_part, _check_header            the technical attributes, checked
           -> _stored_values -> decoder_process         no decompression bomb is decoded
           -> _brightness -> _modality_values, _voi     what each stored value looks like (PS3.3 C.11.1, C.11.2)

Every step from a stored value to its brightness depends on that value alone. So brightness is computed once for each
value that can occur, at most 65,536, and the image is one look-up.

Attributes are read leniently where the meaning is clear (empty ones count as absent, numbers may have another value
representation), and refused by name where it is not: the table is in tests/images/test_dicom.py.
"""

import logging
import math
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from spcxr_hf.errors import SpcxrError
from spcxr_hf.images.decoder_process import decode_apart
from spcxr_hf.images.limits import check_size, count_values, in_flight, look_up
from spcxr_hf.images.plausibility import HeaderKind

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

BITS_STORED, LUT_BITS = range(8, 17), range(8, 17)
MAX_INFLATED_BYTES = 200_000_000  # of a file in the deflated transfer syntax

# Without a usable window, these percentiles of the values become black and white: wide enough to keep every tissue,
# narrow enough that a burnt-in marker or a collimator edge does not take the contrast.
PERCENTILES = (0.5, 99.5)

# Only these are decoded. None of them says anything about the patient, so no text of an error or a warning can either.
INTEGERS = (
    "SamplesPerPixel", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation",
)  # fmt: skip
REQUIRED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
TEXTS = ("PhotometricInterpretation", "VOILUTFunction", "Modality", "BodyPartExamined", "ViewPosition", "SOPClassUID")
OFFSET_TABLES = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
OTHERS = (
    "PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", *OFFSET_TABLES, "PixelData",
)  # fmt: skip
TECHNICAL_ATTRIBUTES = [*INTEGERS, *TEXTS, *OTHERS]
PHOTOMETRIC_INTERPRETATIONS = (  # PS3.3 C.7.6.3.1.2; messages repeat no other text
    "MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420",
    "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT", "HSV", "ARGB", "CMYK", "XYB",
)  # fmt: skip

DEFLATED = "1.2.840.10008.1.2.1.99"
RLE_LOSSLESS = "1.2.840.10008.1.2.5"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
FIRST_OF_META = slice(128, 144)  # PS3.10 section 7.1: "DICM", then (0002,0000) UL, four bytes long, the group's length
INSTALL = 'pip install "spcxr-hf[dicom]"'

DECODERS = ("pylibjpeg", "pillow", "pydicom")  # that run in this process: pydicom's names, in order of preference
JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
MAX_TILES = 4096  # of a JPEG 2000 codestream

_quiet_lock = threading.Lock()


def read_dicom(
    source: "bytes | Dataset", *, full_depth: bool = False, window: int = 0
) -> tuple[Image.Image, HeaderKind]:
    """Read a DICOM radiograph as displayed by a viewer, lungs dark and bones bright.

    Stored values go through the modality LUT or rescale slope and intercept (PS3.3 C.11.1), a VOI LUT or window
    (C.11.2: linear, linear exact, sigmoid) and, for MONOCHROME1, inversion (C.7.6.3.1.2); pixel padding (C.7.5.1.1.2)
    becomes black. Without a usable window, the 0.5 % and 99.5 % percentiles of the values, padding left out, become
    black and white.

    Args:
        source: the content of a DICOM file, or a pydicom dataset, which is not changed.
        full_depth: keep more than 8 bits where the file has them.
        window: which of several VOI LUTs, or of several windows, is used, from 0.

    Returns:
        The image, (Rows, Columns): mode `L`, 0..255; with `full_depth`, mode `I;16`, 0..65535, where more than 8 bits
        are stored. And the kind of image that the header states.

    Raises:
        SpcxrError: no pixel data, several frames, colour, not 8 to 16 bits stored, too many pixels, an attribute that
            cannot be interpreted, a window that is not there, no contrast, damaged, a transfer syntax that no installed
            decoder reads, or pydicom is missing. The text holds technical attributes only.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise SpcxrError(f"a DICOM file, and reading it needs pydicom: {INSTALL}") from error
    try:
        with quiet():
            dataset = _technical_part(_parse(source) if isinstance(source, bytes) else source)
            _check_header(dataset)
        with in_flight(dataset.Columns * dataset.Rows):
            codes, kind = _stored_values(dataset)
            with quiet():
                brightness = _brightness(codes, kind, dataset, window)
            scale, dtype = (65535, np.uint16) if full_depth and dataset.BitsStored > 8 else (255, np.uint8)
            pixels = look_up(np.rint(brightness * scale).astype(dtype), codes)
            if pixels.min() == pixels.max():
                raise SpcxrError("the DICOM image has no contrast: all its pixels come out alike")
            return Image.fromarray(pixels), HeaderKind(dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition)
    except SpcxrError:
        raise
    except Exception as error:  # damaged headers surface in pydicom as errors of many types ...
        cause = type(error).__name__
    # ... and the texts of those can quote the header. Here the error is no longer being handled, so nothing is chained.
    raise SpcxrError(f"the DICOM file is damaged ({cause})")


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
    """The technical attributes of a file, as pydicom parses them."""
    import pydicom

    if DEFLATED.encode() in data:  # refused where it would fill the memory: pydicom inflates it in one go
        head = data[FIRST_OF_META]
        if head[:12] != b"DICM\x02\x00\x00\x00UL\x04\x00":
            raise SpcxrError("a deflated DICOM file whose file meta information is damaged")
        start = FIRST_OF_META.stop + int.from_bytes(head[12:], "little")
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(data[start:], MAX_INFLATED_BYTES)
        if inflater.unconsumed_tail:
            raise SpcxrError(
                f"the deflated DICOM file holds more than {MAX_INFLATED_BYTES} bytes: a decompression bomb"
            )
    # force: a file without the preamble, or with a damaged one, still gets the checks
    return pydicom.dcmread(BytesIO(data), force=True, specific_tags=list(TECHNICAL_ATTRIBUTES))


def _technical_part(dataset: "Dataset") -> "Dataset":
    """A new dataset of the technical attributes, numbers and texts as such, and the transfer syntax."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, UID_dictionary

    syntax: UID | None = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if not syntax:  # what pydicom has found while parsing
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRBigEndian if little is False else ExplicitVRLittleEndian
        syntax = ImplicitVRLittleEndian if implicit else explicit
    if UID_dictionary.get(syntax, ("", ""))[1] != "Transfer Syntax":
        raise SpcxrError("the DICOM file's transfer syntax is not one of the standard's")
    part = Dataset()
    part.file_meta = FileMetaDataset()
    part.file_meta.TransferSyntaxUID = syntax
    part.set_original_encoding(syntax.is_implicit_VR, syntax.is_little_endian)
    for keyword in OTHERS:
        if keyword in dataset:
            try:
                part[keyword] = dataset[keyword]
            except Exception:  # refused by its name where it is needed
                part[keyword] = dataset.get_item(keyword)
    for keyword in TEXTS:
        try:
            value = dataset.get(keyword) or ""
            value = value.decode("latin-1") if isinstance(value, bytes) else value
            text = value if isinstance(value, str) else str(value[0])
        except Exception:  # not a text: counts as absent
            text = ""
        setattr(part, keyword, text.strip(" \0").upper())
    # What the standard calls this kind of object, such as RT Dose Storage; an unknown UID is not repeated.
    object_name = f" ({UID_dictionary[uid][0]})" if (uid := part.SOPClassUID) in UID_dictionary else ""
    if not part.get("PixelData"):
        raise SpcxrError(f"a DICOM file without pixel data{object_name}, or no DICOM file at all")
    for keyword in INTEGERS:
        if (value := _number(dataset, keyword, syntax.is_little_endian)) is not None:
            if value % 1:
                raise SpcxrError(f"the DICOM file's {keyword} is not a whole number")
            setattr(part, keyword, int(value))
    return part


def _check_header(dataset: "Dataset") -> None:
    """One grey frame with pixels, or the reason why not."""
    photometric = dataset.PhotometricInterpretation
    missing = ["PhotometricInterpretation"] * (not photometric)
    missing += [name for name in REQUIRED if name not in dataset]
    if missing:
        raise SpcxrError(f"the DICOM file lacks {', '.join(missing)}")
    samples = dataset.get("SamplesPerPixel", 1)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        name = repr(photometric) if photometric in PHOTOMETRIC_INTERPRETATIONS else "of an unknown kind"
        raise SpcxrError(
            f"PhotometricInterpretation {name} with {samples} sample(s) per pixel is not accepted; MONOCHROME1 and "
            "MONOCHROME2 with one are"
        )
    dataset.SamplesPerPixel = 1
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise SpcxrError(f"the DICOM file has {frames} frames; a radiograph has one")
    dataset.NumberOfFrames = 1
    stored, allocated = dataset.BitsStored, dataset.BitsAllocated
    if stored not in BITS_STORED or dataset.PixelRepresentation not in (0, 1):
        raise SpcxrError(
            f"the pixel data have {stored} bits stored, pixel representation "
            f"{dataset.PixelRepresentation}; a radiograph has 8 to 16 bits, representation 0 or 1"
        )
    if allocated not in (8, 16, 32) or allocated < stored:
        raise SpcxrError(
            f"the pixel data have {allocated} bits allocated for {stored} bits stored; 8, 16 and 32 are read"
        )
    high, compressed = dataset.get("HighBit"), dataset.file_meta.TransferSyntaxUID.is_compressed
    if high not in (None, stored - 1) and not compressed:
        raise SpcxrError(
            f"the pixel data have their highest bit at {high} with {stored} bits stored; it must be the "
            "last of them (PS3.5 section 8.1.1)"
        )
    dataset.HighBit = stored - 1
    check_size(dataset.Columns, dataset.Rows)


def _values(dataset: "Dataset", keyword: str, little_endian: bool = True) -> list[float]:
    """The numbers of an attribute, whatever its value representation; [] where it is absent or empty.

    Raises:
        SpcxrError: it holds something else. The text holds nothing of it, and nothing is chained that could.
    """
    try:
        value = dataset[keyword].value if keyword in dataset else None
        if isinstance(value, bytes):  # OB, OW, UN
            return np.frombuffer(value, "<u2" if little_endian else ">u2").tolist()
        if isinstance(value, str):
            value = value.strip(" \0").split("\\") if value.strip(" \0") else None
        if value is None:
            return []
        values: Any = value if hasattr(value, "__len__") else [value]
        return [one if isinstance(one, int) else float(one) for one in values]
    except Exception:
        pass
    raise SpcxrError(f"the DICOM file's {keyword} cannot be read as a number")


def _number(dataset: "Dataset", keyword: str, little_endian: bool = True) -> float | None:
    """The one number of an attribute; None where it is absent or empty."""
    values = _values(dataset, keyword, little_endian)
    if len(values) > 1:
        raise SpcxrError(f"the DICOM file's {keyword} holds {len(values)} values; one is allowed")
    if values and not math.isfinite(values[0]):
        raise SpcxrError(f"the DICOM file's {keyword} is not a finite number")
    return values[0] if values else None


# ---- the stored values -------------------------------------------------------------------------------------------


def _stored_values(dataset: "Dataset") -> tuple[np.ndarray, np.dtype]:
    """The stored values as unsigned codes (rows, columns), and the type that they are the bits of."""
    from pydicom import Dataset

    syntax, cause = dataset.file_meta.TransferSyntaxUID, None
    try:
        decoder = ""
        if syntax.is_encapsulated:
            decoder = _decoder(syntax)
            _check_codestream(dataset)
        if decoder or not syntax.is_encapsulated:
            dataset.pixel_array_options(decoding_plugin=decoder, correct_unused_bits=False)
            stored = dataset.pixel_array
        else:  # only GDCM or pyjpegls are left, which may die or hang
            alone = Dataset()
            for keyword in (*INTEGERS, "PhotometricInterpretation", "PixelData", *OFFSET_TABLES):
                if keyword in dataset:
                    alone[keyword] = dataset[keyword]
            alone.file_meta, file = dataset.file_meta, BytesIO()
            alone.save_as(file, implicit_vr=False, little_endian=True)
            stored = decode_apart(bytes(128) + b"DICM" + file.getvalue())
    except SpcxrError:
        raise
    except Exception as error:  # the codec is missing or gave up; the length is wrong; and more
        cause = error
    if cause is not None:  # the texts of these errors can quote the header: nothing is chained
        raise SpcxrError(_decoding_failure(cause, syntax, dataset.BitsStored))
    if stored.shape != (dataset.Rows, dataset.Columns) or stored.dtype.kind not in "iu":
        raise SpcxrError(f"the pixel data are damaged: not {dataset.Rows} x {dataset.Columns} integers")
    return _used_bits(stored, dataset)


def _used_bits(stored: np.ndarray, dataset: "Dataset") -> tuple[np.ndarray, np.dtype]:
    """Values of the bits that are stored; the others may hold anything (PS3.5 section 8.1.1), not so in a codestream.

    Returns:
        The values as unsigned codes, and the type that they are the bits of.
    """
    bits, signed = dataset.BitsStored, dataset.PixelRepresentation == 1
    stored = np.ascontiguousarray(stored, stored.dtype.newbyteorder("="))
    width = 8 * stored.dtype.itemsize
    codes, kind = stored.view(f"u{width // 8}"), np.dtype(f"{'i' if signed else 'u'}{width // 8}")
    if bits < width:
        values = codes.view(kind)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if values.min() < low or values.max() > high:
            syntax = dataset.file_meta.TransferSyntaxUID
            if syntax.is_encapsulated and syntax != RLE_LOSSLESS and codes.max() >= 2**bits:
                raise SpcxrError(
                    f"the compressed pixel data hold values of more than the {bits} bits that the DICOM header states"
                )
            values = (codes << (width - bits)).view(kind) >> (width - bits)
            codes = values.view(codes.dtype)
    if width > 16:  # 32 bits allocated
        kind = np.dtype(f"{kind.kind}2")
        codes = codes.astype(np.uint16)
    return codes, kind


def _decoder(syntax: str) -> str:
    """The decoder to use in this process; "" where none but those of `decoder_process` are installed, if any."""
    from pydicom.pixels import get_decoder

    available = get_decoder(syntax).available_plugins
    return next((name for name in DECODERS if name in available), "")


def _decoding_failure(error: Exception, syntax: "UID", bits: int) -> str:
    """The message of an error while decoding."""
    name = syntax.name
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
    """Refuse a compressed frame that states no size, or another than the header does: decoders rely on it."""
    from pydicom.encaps import generate_frames

    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    if dataset.file_meta.TransferSyntaxUID == RLE_LOSSLESS:  # has no header of its own
        return
    sizes = _codestream_sizes(frame)
    expected = (dataset.Columns, dataset.Rows, 1)
    if not sizes or any(size != expected for size in sizes):
        raise SpcxrError(
            f"the compressed pixel data are damaged, or not of the {expected[0]} x {expected[1]} grey pixels that the "
            "DICOM header states"
        )


def _codestream_sizes(frame: bytes) -> list[tuple[int, int, int]]:
    """(width, height, components) of every frame header in a JPEG, JPEG-LS or JPEG 2000 codestream; [] of none."""
    if frame.startswith(JP2_SIGNATURE):  # boxes before the codestream (ISO/IEC 15444-1 I.5)
        place = len(JP2_SIGNATURE)
        while place + 8 <= len(frame) and frame[place + 4 : place + 8] != b"jp2c":
            length = int.from_bytes(frame[place : place + 4], "big")
            if length < 8:  # pydicom hangs on it
                return []
            place += length
        frame = frame[place + 8 :]
    if frame.startswith(b"\xff\x4f\xff\x51"):  # SOC, SIZ: ISO/IEC 15444-1 A.5.1
        fields = [int.from_bytes(frame[8 + 4 * n : 12 + 4 * n], "big") for n in range(8)]
        right, bottom, left, top, tile_width, tile_height = fields[:6]
        if not (0 < tile_width < 2**16 and 0 < tile_height < 2**16):
            return []
        if -(-right // tile_width) * -(-bottom // tile_height) > MAX_TILES:
            return []
        return [(right - left, bottom - top, int.from_bytes(frame[40:42], "big"))]
    sizes = []
    place = 2 if frame.startswith(b"\xff\xd8") else len(frame)
    while place + 10 <= len(frame) and frame[place] == 0xFF:
        marker, length = frame[place + 1], int.from_bytes(frame[place + 2 : place + 4], "big")
        # SOF0..15 but DHT, JPG and DAC (ITU-T T.81 table B.1); SOF55 is JPEG-LS (T.87)
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(frame[place + n : place + n + 2], "big") for n in (5, 7))
            sizes.append((width, height, frame[place + 9]))
        place += 1 if marker == 0xFF else 2 + length
    return sizes


# ---- stored value -> brightness ----------------------------------------------------------------------------------


def _brightness(codes: np.ndarray, kind: np.dtype, dataset: "Dataset", window: int) -> np.ndarray:
    """The brightness, 0..1, of each code from 0 to the largest: the look-up table of this image."""
    stored = np.arange(int(codes.max()) + 1).astype(codes.dtype).view(kind)
    values = _modality_values(stored, dataset)
    padding = _padding(stored, dataset)
    brightness = _voi(values, dataset, window)
    counts = None
    if brightness is None or brightness[int(codes.min())] == brightness[-1]:  # no window, or perhaps none of use
        counts = count_values(codes, len(stored))
        present = counts > 0
        # A single grey comes of a window of another exposure.
        if brightness is None or (brightness[present] == brightness[-1]).all():
            counts[padding] = 0
            black, white = _percentile_range(values, counts)
            if black == white:
                raise SpcxrError("the DICOM image has no contrast: all its pixels come out alike")
            brightness = np.clip((values - black) / (white - black), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
        brightness = 1 - brightness
    brightness[padding] = 0
    return brightness


def _modality_values(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """The stored values by the modality LUT, or by slope and intercept, which are 1 and 0 where they lack (C.11.1)."""
    if items := _items(dataset, "ModalityLUTSequence"):
        return _Lut.read(items[0], dataset).apply(stored)
    slope, intercept = (_number(dataset, keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope is None and intercept is None:
        return stored
    values = stored * float(1 if slope is None else slope) + float(intercept or 0)
    if not np.isfinite(values).all():
        raise SpcxrError("the DICOM file's RescaleSlope and RescaleIntercept are out of range")
    return values


def _padding(stored: np.ndarray, dataset: "Dataset") -> np.ndarray:
    """Which stored values are padding: one, or a range (PS3.3 C.7.5.1.1.2)."""
    little = dataset.file_meta.TransferSyntaxUID.is_little_endian
    first, last = (_number(dataset, name, little) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if first is None:
        return np.zeros(len(stored), bool)
    bounds = [first, first if last is None else last]
    if stored.dtype.kind == "i":  # the value representation can be that of the other sign
        bounds = [bound - 65536 if bound > 32767 else bound for bound in bounds]
    else:
        bounds = [bound + 65536 if bound < 0 else bound for bound in bounds]
    return (stored >= min(bounds)) & (stored <= max(bounds))


def _voi(values: np.ndarray, dataset: "Dataset", window: int) -> np.ndarray | None:
    """Brightness, 0..1, of the values by the chosen VOI LUT or, without any, window; None without a usable one."""
    windows = []
    with suppress(SpcxrError):  # without numbers there is no window
        windows = list(zip(_values(dataset, "WindowCenter"), _values(dataset, "WindowWidth"), strict=False))
    luts = _items(dataset, "VOILUTSequence")
    if not all("LUTDescriptor" in item and item.get("LUTData") for item in luts):
        luts = []
    choices = len(luts or windows)
    if window < 0 or window >= max(choices, 1):
        raise SpcxrError(
            f"the DICOM file has {choices} VOI LUTs or windows; number {window} is not there (they count from 0)"
        )
    if luts:
        try:
            lut = _Lut.read(luts[window], dataset)
            # Some devices declare 16 bits for entries of 12, which would make the picture a sixteenth as bright.
            white = 2 ** min(lut.bits, int(lut.entries.max()).bit_length()) - 1
            return lut.apply(values) / max(white, 1)
        except SpcxrError:
            if not windows:  # a window is another view of the same image; percentiles can be its negative
                raise
    if window >= len(windows):
        return None
    center, width = windows[window]
    function = dataset.VOILUTFunction or "LINEAR"  # C.11.2.1.2 and C.11.2.1.3
    least = 1 if function == "LINEAR" else np.nextafter(0, 1)
    if not (math.isfinite(center) and math.isfinite(width) and width >= least):
        return None
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
        if width == 0:
            return (values > center).astype(np.float64)
    if function in ("LINEAR", "LINEAR_EXACT"):
        return np.clip((values - center) / width + 0.5, 0, 1)
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-4 * (values - center) / width))
    return None


def _items(dataset: "Dataset", keyword: str) -> "list[Dataset]":
    """The items of a sequence; [] where it is absent or empty."""
    value = dataset[keyword].value if keyword in dataset else None
    if not value:
        return []
    if not all(hasattr(item, "get") for item in value):
        raise SpcxrError(f"the DICOM file's {keyword} is not a sequence")
    return list(value)


class _Lut(NamedTuple):
    """A look-up table (C.11.1.1, C.11.2.1.1): `entries` of `bits` bits each for the values from `first` on."""

    entries: np.ndarray
    first: int
    bits: int

    @classmethod
    def read(cls, item: "Dataset", dataset: "Dataset") -> "_Lut":
        """One item of a modality or VOI LUT sequence."""
        little = dataset.file_meta.TransferSyntaxUID.is_little_endian
        descriptor = _values(item, "LUTDescriptor", little)
        if len(descriptor) != 3 or descriptor[2] not in LUT_BITS:
            raise SpcxrError("a LUT of the DICOM file has no descriptor of three numbers, the last from 8 to 16 bits")
        length, first, bits = (int(number) for number in descriptor)
        length = length % 2**16 or 2**16  # 0 means 65,536; negative where it is written as a signed number
        data = item.get("LUTData")
        if isinstance(data, bytes):
            order = "<u2" if little or item["LUTData"].VR == "OB" else ">u2"
            words = np.frombuffer(data + bytes(len(data) % 2), order)
        else:
            words = np.asarray(_values(item, "LUTData", little)).astype(np.int64).astype(np.uint16)
        if len(words) < length and bits == 8:  # two entries in each word, the lower byte first
            words = words.astype("<u2").view(np.uint8)
        entries = words[:length].astype(np.int64)
        if len(entries) < length or entries.max() >= 2**bits:
            raise SpcxrError(f"a LUT of the DICOM file is damaged: not {length} entries of {bits} bits")
        return cls(entries, first, bits)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """The entry of each value; values before the first entry have that, values behind the last have the last."""
        low, high, first, length = float(values.min()), float(values.max()), self.first, len(self.entries)
        if not low < first + length or not high >= first:  # the first value may be written with the other sign
            first = next((f for f in (first - 65536, first + 65536) if f <= high and low < f + length), first)
        return self.entries[np.clip(np.floor(values.astype(np.float64)) - first, 0, length - 1).astype(np.int64)]


def _percentile_range(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The smallest values that 0.5 % and 99.5 % of the pixels do not exceed; the extremes where these two agree."""
    order = np.argsort(values, kind="stable")
    order = order[counts[order] > 0]
    if not len(order):
        return 0.0, 0.0
    reached = np.cumsum(counts[order]) / counts.sum()
    low, high = (float(values[order[np.searchsorted(reached, share / 100)]]) for share in PERCENTILES)
    return (low, high) if low < high else (float(values[order[0]]), float(values[order[-1]]))
