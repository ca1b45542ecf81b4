"""Pixel data of a DICOM file decoded in a child process, which may crash or hang without harm.

decode_apart -> _Child -> main, in the child, which runs this file alone and so starts fast

GDCM, the only freely licensed decoder for lossless JPEG, ends the whole process on some damaged files (an uncaught C++
exception), and pyjpegls takes many seconds over some (64 x 64 pixels of JPEG-LS: 9 s). A training run
must survive that, so both run here. The child is started on first use and serves all later files; the pixels go through
pipes as plain bytes.
"""

import os
import subprocess
import sys
import threading
from io import BytesIO
from typing import IO

import numpy as np

START_SECONDS = 60.0  # to import pydicom, on a busy machine
SECONDS, SECONDS_PER_MEGABYTE = 3.0, 1.0  # to decode
LENGTH = 8  # bytes of a message's length, little-endian


class DecoderError(RuntimeError):
    """The decoder refused the pixel data, crashed or took too long."""


def decode_apart(data: bytes) -> np.ndarray:
    """The stored values (rows, columns) of a DICOM file that pydicom can read, by whatever decoder it has.

    Args:
        data: a complete DICOM file.

    Raises:
        DecoderError: it cannot be decoded. The text holds nothing of the file.
    """
    with _lock:
        reply = _child().ask(data)
    kind, rows, columns = reply[:2].decode(), *(int.from_bytes(reply[n : n + 4], "little") for n in (2, 6))
    if kind not in ("u1", "i1", "u2", "i2", "u4", "i4"):
        raise DecoderError("the decoder gave up")
    return np.frombuffer(reply, np.dtype(f"<{kind}"), offset=10).reshape(rows, columns)


class _Child:
    """A process that decodes one file after the other."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # after a fork, parent and child must not talk to one decoder
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._within(START_SECONDS, b"")

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, data: bytes) -> bytes:
        return self._within(SECONDS + SECONDS_PER_MEGABYTE * len(data) / 1e6, data)

    def _within(self, seconds: float, data: bytes) -> bytes:
        """Send a message unless it is empty, and wait for the answer; a child that takes too long is killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            if data:
                _send(self.process.stdin, data)
            return _receive(self.process.stdout)
        except (OSError, EOFError):
            self.process.kill()
            self.process.wait()
        finally:
            timer.cancel()
        raise DecoderError("the decoder died or took too long")


_lock = threading.Lock()
_current: _Child | None = None


def _child() -> _Child:
    global _current
    if _current is None or not _current.usable:
        _current = _Child()
    return _current


def _send(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(LENGTH, "little") + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    head = stream.read(LENGTH)
    length = int.from_bytes(head, "little")
    data = stream.read(length) if len(head) == LENGTH else b""
    if len(head) < LENGTH or len(data) < length:
        raise EOFError
    return data


# ---- in the child ------------------------------------------------------------------------------------------------


def main() -> None:
    """Decode what comes through the standard input until it ends; `stdout` carries the answers only."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # decoders print
    import pydicom

    _send(answers, b"ready")
    while True:
        try:
            data = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            dataset = pydicom.dcmread(BytesIO(data))
            dataset.pixel_array_options(correct_unused_bits=False)
            values = np.ascontiguousarray(dataset.pixel_array)
            values = values.astype(values.dtype.newbyteorder("<"))
            rows, columns = values.shape
            head = f"{values.dtype.kind}{values.dtype.itemsize}".encode()
            _send(answers, head + rows.to_bytes(4, "little") + columns.to_bytes(4, "little") + values.tobytes())
        except Exception:
            _send(answers, b"--" + bytes(8))


if __name__ == "__main__":
    main()
