"""Fuzz the reader and the image processor with damaged files: each must give an image or a SpcxrError.

python -m training_scripts.benchmarks.fuzz_reader --count 10000 --seed 0 --output fuzz.json

A seeded corpus (PNG, JPEG, TIFF, BMP, WebP, DICOM in several transfer syntaxes; more than 8 bits too; sets in Parquet,
of which every row is read) is mutated: bits flipped, cut short, the head of one file on the body of another, declared
sizes overwritten by huge ones. Each file is read in a child process that may take 1 GiB beyond what it starts with and
5 s per file; a child that dies or hangs is restarted. Anything but an image or a SpcxrError that names the file is a
finding.

`--coverage true` runs atheris, a coverage-guided fuzzer, on the DICOM and processor path instead, for `--count` runs,
where it is installed (pip install atheris).
"""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spcxr_hf import SpcxrImageProcessor, read_radiograph
from spcxr_hf.data.shards import read_index
from spcxr_hf.data.table import open_image, read_table
from spcxr_hf.errors import SpcxrError
from spcxr_hf.training.arguments import parse_arguments, run_script

SECONDS, BYTES = 5.0, 1 << 30
NAME, SET = "mutated.bin", "mutated.parquet"
ROWS = 64  # of a set, at once
EXPECTED = ("image", "refused")
HUGE = (0xFFFFFFFF, 0x7FFFFFFF, 0xFFFF, 0x7FFF, 0x10000, 0)


@dataclass
class Arguments:
    """Read damaged files and report the outcomes."""

    count: int = field(default=10_000, metadata={"help": "files"})
    seed: int = field(default=0, metadata={"help": "of the corpus and the mutations"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    keep: str | None = field(default=None, metadata={"help": "folder for the files that are findings"})
    coverage: bool = field(default=False, metadata={"help": "coverage-guided, with atheris"})


def main() -> None:
    arguments = parse_arguments(Arguments)
    if arguments.coverage:
        guided(arguments.count, arguments.seed)
        return
    result = fuzz(arguments.count, arguments.seed, Path(arguments.keep) if arguments.keep else None)
    print(json.dumps(result, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# ---- the corpus --------------------------------------------------------------------------------------------------


def corpus(seed: int) -> dict[str, bytes]:
    """Small files of every kind, by name."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:48, 0:40]
    levels = (np.sin(rows / 7) + np.cos(columns / 5)) / 4 + 0.5 + generator.normal(0, 0.01, (48, 40))
    grey = Image.fromarray(np.rint(levels.clip(0, 1) * 255).astype(np.uint8))
    deep = np.rint(levels.clip(0, 1) * 65535).astype(np.uint16)
    files = {
        "png": encoded(grey, "PNG"),
        "png-16": encoded(Image.fromarray(deep), "PNG"),
        "png-rgb": encoded(grey.convert("RGBA"), "PNG"),
        "png-palette": encoded(grey.convert("P"), "PNG"),
        "jpeg": encoded(grey, "JPEG"),
        "jpeg-progressive": encoded(grey.convert("RGB"), "JPEG", progressive=True),
        "tiff": encoded(grey, "TIFF"),
        "tiff-16": encoded(Image.fromarray(deep), "TIFF"),
        "tiff-float": encoded(Image.fromarray(levels.clip(0, 1).astype(np.float32)), "TIFF"),
        "tiff-lzw": encoded(grey, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": encoded(grey, "TIFF", compression="tiff_adobe_deflate"),
        "bmp": encoded(grey, "BMP"),
        "bmp-rgb": encoded(grey.convert("RGB"), "BMP"),
        "webp": encoded(grey.convert("RGB"), "WEBP"),
        "webp-lossless": encoded(grey.convert("RGBA"), "WEBP", lossless=True),
    }
    return files | dicoms(grey, deep) | sets(files)


def sets(files: dict[str, bytes]) -> dict[str, bytes]:
    """Pictures as rows of a set, with and without compression of the columns."""
    cells = [{"bytes": files[name], "path": f"{name}.img"} for name in ("png", "jpeg", "tiff")]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table({"image": pa.array(cells, struct), "id": ["first", "second", "third"], "label": ["a", None, "b"]})
    return {f"parquet-{codec}": in_parquet(rows, codec) for codec in ("none", "snappy")}


def in_parquet(rows: pa.Table, codec: str) -> bytes:
    buffer = BytesIO()
    pq.write_table(rows, buffer, compression=codec)
    return buffer.getvalue()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dicoms(grey: Image.Image, deep: np.ndarray) -> dict[str, bytes]:
    """The picture in each transfer syntax for which an encoder is installed; {} without pydicom."""
    try:
        import pydicom.uid as uid
        from pydicom.encaps import encapsulate
    except ImportError:
        return {}
    values = deep >> 4
    files = {"dicom": written(dicom(values), uid.ExplicitVRLittleEndian)}
    files["dicom-implicit"] = written(dicom(values), uid.ImplicitVRLittleEndian)
    files["dicom-deflated"] = written(dicom(values), uid.DeflatedExplicitVRLittleEndian)
    files["dicom-big"] = written(dicom(values.astype(">u2")), uid.ExplicitVRBigEndian)
    for name, syntax in (("rle", uid.RLELossless), ("j2k", uid.JPEG2000Lossless), ("jpeg-ls", uid.JPEGLSLossless)):
        made = dicom(values)
        try:
            made.compress(syntax, generate_instance_uid=False)
        except (RuntimeError, ValueError, NotImplementedError):
            continue  # no encoder for it here
        files[f"dicom-{name}"] = written(made, syntax)
    for name, kind, number in (("jpeg", "JPEG", uid.JPEGBaseline8Bit), ("j2k-8", "JPEG2000", uid.JPEG2000)):
        made = dicom(np.asarray(grey))
        made.PixelData = encapsulate([encoded(grey, kind)])
        made["PixelData"].VR = "OB"
        files[f"dicom-{name}"] = written(made, number)
    return files | public_dicoms()


def dicom(values: np.ndarray) -> Any:
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3.4"
    made.PatientName, made.PatientID, made.Modality = "Nobody", "0", "CR"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME1"
    made.Rows, made.Columns = values.shape
    made.BitsAllocated = 8 * values.dtype.itemsize
    made.BitsStored = 8 if values.dtype.itemsize == 1 else 12
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, 0
    made.WindowCenter, made.WindowWidth = [2048, 900], [4096, 500]
    made.RescaleSlope, made.RescaleIntercept = 1, 0
    made.PixelData = values.tobytes()
    made["PixelData"].VR = "OW" if values.dtype.itemsize > 1 else "OB"
    return made


def written(made: Any, syntax: str) -> bytes:
    import pydicom

    made.file_meta.TransferSyntaxUID = syntax
    buffer = BytesIO()
    pydicom.dcmwrite(
        buffer,
        made,
        implicit_vr=made.file_meta.TransferSyntaxUID.is_implicit_VR,
        little_endian=made.file_meta.TransferSyntaxUID.is_little_endian,
        enforce_file_format=True,
    )
    return buffer.getvalue()


def public_dicoms() -> dict[str, bytes]:
    """Small compressed files that come with pydicom, for syntaxes that nothing here may be able to write."""
    from pydicom.data import get_testdata_file

    names = (
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_RLE.dcm",
        "MR_small_expb.dcm",
        "JPEG-LL.dcm",  # JPEG lossless, 117 kB; in pydicom-data
    )
    found = {name: get_testdata_file(name, download=False) for name in names}
    return {name: Path(path).read_bytes() for name, path in found.items() if path}


# ---- mutations ---------------------------------------------------------------------------------------------------


def flip(data: bytearray, generator: np.random.Generator, files: list[bytes]) -> bytearray:
    """1 to 16 bits anywhere, or all of them near the beginning."""
    end = len(data) if generator.random() < 0.5 else min(len(data), 1024)
    for place in generator.integers(0, end, generator.integers(1, 17)):
        data[place] ^= 1 << int(generator.integers(8))
    return data


def cut(data: bytearray, generator: np.random.Generator, files: list[bytes]) -> bytearray:
    return data[: int(generator.integers(1, len(data)))]


def splice(data: bytearray, generator: np.random.Generator, files: list[bytes]) -> bytearray:
    """The head of this file on the body of another."""
    other = files[int(generator.integers(len(files)))]
    return data[: int(generator.integers(1, min(len(data), 600)))] + other[int(generator.integers(len(other))) :]


def enlarge(data: bytearray, generator: np.random.Generator, files: list[bytes]) -> bytearray:
    """Two or four bytes near the beginning become a huge number, or none: sizes, lengths, counts, offsets."""
    for _ in range(int(generator.integers(1, 4))):
        size = int(generator.choice([2, 4]))
        place = int(generator.integers(0, max(1, min(len(data), 1200) - size)))
        value = HUGE[int(generator.integers(len(HUGE)))] & (256**size - 1)
        data[place : place + size] = value.to_bytes(size, "little" if generator.random() < 0.5 else "big")
    return data


def remove(data: bytearray, generator: np.random.Generator, files: list[bytes]) -> bytearray:
    """Some bytes in the middle go, so that all behind them is out of place."""
    start = int(generator.integers(len(data)))
    del data[start : start + int(generator.integers(1, 64))]
    return data


MUTATIONS: dict[str, Callable[[bytearray, np.random.Generator, list[bytes]], bytearray]] = {
    "bits flipped": flip,
    "cut short": cut,
    "spliced": splice,
    "huge sizes": enlarge,
    "bytes removed": remove,
}


def mutated(count: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """(kind of file, mutation, content); the same for the same seed."""
    generator = np.random.default_rng(seed)
    files = corpus(seed)
    kinds, contents = list(files), list(files.values())
    names = list(MUTATIONS)
    for _ in range(count):
        kind = int(generator.integers(len(kinds)))
        name = names[int(generator.integers(len(names)))]
        yield kinds[kind], name, bytes(MUTATIONS[name](bytearray(contents[kind]), generator, contents))


# ---- reading them ------------------------------------------------------------------------------------------------


def read(kind: str, data: bytes, processor: Any) -> str:
    """Outcome of a file: 'image', 'refused', or what is wrong."""
    if not kind.startswith("parquet"):
        return outcome_of(lambda: [read_radiograph(named(data))], processor)
    path = Path(tempfile.gettempdir()) / SET
    path.write_bytes(data)
    streamed = outcome_of(lambda: shard_images(path), processor)
    return streamed if streamed not in EXPECTED else outcome_of(lambda: table_images(path), processor)


def outcome_of(images: Callable[[], list[Image.Image]], processor: Any) -> str:
    try:
        for image in images():
            processor(image, return_tensors="pt")
    except SpcxrError as error:
        text = str(error).removeprefix(f"{tempfile.gettempdir()}{os.sep}")
        is_named = text.startswith((f"{NAME}: ", f"{SET}: "))
        return "refused" if is_named and "\n" not in text else f"no name or cause: {text[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "image"


def named(data: bytes) -> BytesIO:
    stream = BytesIO(data)
    stream.name = NAME
    return stream


def table_images(path: Path) -> list[Image.Image]:
    """The images of a set, with all that it is asked for before they are read."""
    table = read_table(path)
    cells, names = table.column("image"), table.ids
    for name in table.rows.column_names:
        table.column(name)
    return [open_image(cell, f"{table.name}: {name}") for cell, name in zip(cells, names, strict=True) if cell]


def shard_images(path: Path) -> list[Image.Image]:
    """The images of a set as they are streamed."""
    index = read_index(path)
    counts = [min(int(unit["rows"]), ROWS) for unit in index.units]
    rows = [row for unit, count in enumerate(counts) for row in index.read(unit, 0, count, ["label"])]
    return [open_image(row.image, row.name) for row in rows if row.image]


def child(pipe: Connection) -> None:
    """Read what comes through the pipe, in bounded memory."""
    warnings.simplefilter("ignore")
    processor = SpcxrImageProcessor()
    tempfile.tempdir = tempfile.mkdtemp(prefix="fuzz-")  # of this child alone
    for kind, data in corpus(0).items():  # every decoder is imported before memory and time are counted
        read(kind, data, processor)
    limit = memory_taken(0) + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while (mutated := pipe.recv()) is not None:
        started = time.perf_counter()
        kind, data = mutated
        outcome = read(kind, data, processor)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((outcome, time.perf_counter() - started, peak))
    shutil.rmtree(tempfile.tempdir)


def memory_taken(field: int = 1) -> int:
    """Bytes that this process takes: in its address space (0) or resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


class Reader:
    """A child process that reads files; restarted when it dies."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("fork")
        self.start()

    def start(self) -> None:
        self.pipe, other = self.context.Pipe()
        self.process = self.context.Process(target=child, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, kind: str, data: bytes) -> tuple[str, float, int]:
        """(outcome, seconds, most memory in bytes)"""
        try:
            self.pipe.send((kind, data))
            if self.pipe.poll(4 * SECONDS):
                outcome, seconds, peak = self.pipe.recv()
                return (outcome if seconds < SECONDS else f"took {seconds:.1f} s"), seconds, peak
            finding = f"no answer in {4 * SECONDS:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(SECONDS)
            finding = f"the process died (exit code {self.process.exitcode})"
        self.process.kill()
        self.start()
        return finding, 4 * SECONDS, 0

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(SECONDS)


def fuzz(count: int, seed: int, keep: Path | None = None) -> dict[str, Any]:
    """Read `count` mutated files; how each kind of them ended, and every finding with its number."""
    reader = Reader()
    outcomes: dict[str, Counter] = {}
    findings, slowest, peak = [], 0.0, 0
    for number, (kind, mutation, data) in enumerate(mutated(count, seed)):
        outcome, seconds, memory = reader(kind, data)
        slowest, peak = max(slowest, seconds), max(peak, memory)
        expected = outcome in EXPECTED
        outcomes.setdefault(kind, Counter())[outcome if expected else "finding"] += 1
        if not expected:
            findings.append({"number": number, "kind": kind, "mutation": mutation, "what": outcome})
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}-{kind}").write_bytes(data)
    reader.close()
    return {
        "files": count,
        "seed": seed,
        "outcomes": {kind: dict(counter) for kind, counter in sorted(outcomes.items())},
        "total": dict(sum(outcomes.values(), Counter())),
        "slowest_seconds": round(slowest, 3),
        "peak_bytes_of_the_whole_process": peak,
        "memory_limit_beyond_start": BYTES,
        "findings": findings,
    }


def own_functions(owner: Any) -> list[str]:
    """Names of the functions that a module or a class defines itself."""
    name = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    return [
        key
        for key, value in vars(owner).items()
        if inspect.isfunction(value) and value.__module__ == name and not hasattr(value, "__wrapped__")
    ]


def guided(runs: int, seed: int) -> None:
    """atheris on the DICOM and processor path; it ends the process, with an error where it has found something."""
    try:
        import atheris
    except ImportError as error:
        raise SpcxrError("the coverage-guided fuzzer is atheris: pip install atheris") from error
    instrument(atheris)
    warnings.simplefilter("ignore")
    processor = SpcxrImageProcessor()

    def one(data: bytes) -> None:
        if (outcome := read("", data, processor)) not in EXPECTED:
            raise RuntimeError(outcome)

    folder = Path(f"fuzz-corpus-{seed}")
    folder.mkdir(exist_ok=True)
    for name, data in corpus(seed).items():
        if not name.startswith("parquet"):
            read(name, data, processor)  # every decoder is imported before memory is counted
            (folder / name).write_bytes(data)
    limits = [f"-timeout={SECONDS:.0f}", f"-rss_limit_mb={(memory_taken() + BYTES) >> 20}", "-max_len=20000"]
    atheris.Setup(["fuzz", f"-runs={runs}", f"-seed={seed + 1}", *limits, str(folder)], one)
    atheris.Fuzz()


def instrument(atheris: Any) -> None:
    """Count the coverage of the Python code that a file goes through: pydicom's, the reader's, the processor's."""
    with atheris.instrument_imports(include=["pydicom"]):
        import pydicom.filereader
        import pydicom.pixels  # noqa: F401
    import spcxr_hf.images.dicom
    import spcxr_hf.images.plausibility
    import spcxr_hf.images.reader
    from spcxr_hf.modeling import image_processing_spcxr as processing

    owners = [
        spcxr_hf.images.dicom,
        spcxr_hf.images.plausibility,
        spcxr_hf.images.reader,
        processing,
        *SpcxrImageProcessor.__mro__,
    ]
    for owner in (one for one in owners if inspect.ismodule(one) or one.__module__ == processing.__name__):
        for name in own_functions(owner):
            setattr(owner, name, atheris.instrument_func(getattr(owner, name)))


if __name__ == "__main__":
    run_script(main)
