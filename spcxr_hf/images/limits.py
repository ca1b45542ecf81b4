"""Limits of decoding (image size, pixels in memory at a time), and look-ups with bounded memory."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from spcxr_hf.errors import SpcxrError

# The largest radiographs of today's detectors have 15 million pixels, and 4,300 along a side.
MAX_PIXELS, MAX_SIDE, MAX_ASPECT = 50_000_000, 32_768, 50
MAX_FILE_BYTES = 8 * MAX_PIXELS  # RGBA of 16 bits, not compressed
MAX_PIXELS_IN_FLIGHT = 2 * MAX_PIXELS  # decoded at a time by all threads of a process, each some 10 bytes
CHUNK = 1 << 20  # pixels; look-ups widen their indices to 8 bytes, so they go piece by piece

_free = threading.Condition()
_pixels_in_flight = 0


def check_size(width: int, height: int) -> None:
    """Refuse decompression bombs: images with more pixels or more extreme shapes than any radiograph.

    Raises:
        SpcxrError: no pixels; more than `MAX_PIXELS` or, where that is less, Pillow's `MAX_IMAGE_PIXELS`; a side of
            more than `MAX_SIDE`; or one side more than `MAX_ASPECT` times the other.
    """
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if width <= 0 or height <= 0:
        raise SpcxrError(f"the image has {height} rows and {width} columns")
    if width * height > limit or max(width, height) > MAX_SIDE:
        raise SpcxrError(
            f"the image is too large: {width} x {height} pixels; at most {limit:,} in all, {MAX_SIDE:,} along a side"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SpcxrError(
            f"the image is too long: {width} x {height} pixels; at most {MAX_ASPECT} times as long as wide"
        )


def _reset() -> None:
    """In a forked process no other thread is decoding."""
    global _free, _pixels_in_flight
    _free, _pixels_in_flight = threading.Condition(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)


@contextmanager
def in_flight(pixels: int) -> Iterator[None]:
    """Wait until other threads have decoded enough of their images; held while this one is decoded."""
    global _pixels_in_flight
    with _free:
        _free.wait_for(lambda: _pixels_in_flight + pixels <= MAX_PIXELS_IN_FLIGHT)
        _pixels_in_flight += pixels
    try:
        yield
    finally:
        with _free:
            _pixels_in_flight -= pixels
            _free.notify_all()


def look_up(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """`table[codes]`, of the type of the table and the shape of the codes."""
    image = np.empty(codes.size, table.dtype)
    flat = codes.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        np.take(table, flat[start : start + CHUNK], out=image[start : start + CHUNK], mode="clip")
    return image.reshape(codes.shape)


def count_values(codes: np.ndarray, length: int) -> np.ndarray:
    """How often each code from 0 to length - 1 occurs, (length,)."""
    flat = codes.reshape(-1)
    pieces = (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    return sum((np.bincount(piece, minlength=length) for piece in pieces), np.zeros(length, np.int64))
