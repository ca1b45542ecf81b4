"""How fast WebDataset shards are indexed, read from the start, and read from the middle of an epoch, by three readers.

    python -m training_scripts.benchmarks.speed_shards --samples 20000 --output shards.json

Needs `pip install webdataset`. The shards are made here: a JPEG and a .json per sample. Compared are the index of
`spcxr_hf.data.shards` (through Python's `tarfile`), the package webdataset, and the same samples as Parquet. `damaged`
is what each reader reports of a tar with one damaged header in its middle.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spcxr_hf.data.shards import read_index
from spcxr_hf.files import write_json
from spcxr_hf.training.arguments import parse_arguments, run_script


@dataclass
class Arguments:
    """Measure readers of WebDataset shards."""

    samples: int = field(default=20_000, metadata={"help": "in one shard"})
    side: int = field(default=128, metadata={"help": "of the images, in pixels"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, arguments.samples, arguments.side)
        readers: dict[str, Callable[[Path, int, int], int]] = {
            "tarfile": read_indexed, "webdataset": read_webdataset, "parquet": read_indexed,
        }  # fmt: skip
        found: dict[str, dict] = {}
        for name, read in readers.items():
            path = folder / ("set.parquet" if name == "parquet" else "set.tar")
            half = arguments.samples // 2
            found[name] = {
                "first_sample_processor_seconds": seconds(read, path, 0, 1),
                "middle_sample_processor_seconds": seconds(read, path, half, half + 1),
                "samples_per_processor_second": round(arguments.samples / seconds(read, path, 0, arguments.samples)),
            }
            if name != "parquet":
                found[name]["damaged"] = attempt(read, damage(path))
        found["sizes"] = {path.name: path.stat().st_size for path in sorted(folder.glob("set.*"))}
    print(json.dumps(found, indent=2))
    if arguments.output:
        write_json(arguments.output, found)


def write_shards(folder: Path, samples: int, side: int) -> None:
    generator = np.random.default_rng(0)
    rows = []
    with tarfile.open(folder / "set.tar", "w") as tar:
        for number in range(samples):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (side, side), dtype=np.uint8)).save(buffer, "JPEG", quality=30)
            picture = buffer.getvalue()
            rows.append({"bytes": picture, "path": None})
            for suffix, content in (("jpg", picture), ("json", b'{"label": "normal"}')):
                member = tarfile.TarInfo(f"{number:07d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, struct), "label": ["normal"] * samples})
    pq.write_table(table, folder / "set.parquet", row_group_size=256)


def damage(path: Path) -> Path:
    """A copy whose header in the middle is overwritten."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    content = bytearray(path.read_bytes())
    at = members[len(members) // 2].offset
    content[at : at + 300] = b"?" * 300
    broken = path.with_name("damaged.tar")
    broken.write_bytes(content)
    return broken


def seconds(read: Callable[[Path, int, int], int], path: Path, start: int, stop: int) -> float:
    began = time.process_time()
    assert read(path, start, stop) == stop - start
    return round(time.process_time() - began, 4)


def attempt(read: Callable[[Path, int, int], int], path: Path) -> str:
    try:
        return f"{read(path, 0, 10**9)} samples, and no error"
    except Exception as error:  # what a reader raises is what is measured
        return f"{type(error).__name__}: {str(error)[-90:]}"


def read_indexed(path: Path, start: int, stop: int) -> int:
    """Samples from `start` to `stop`, in units, through the index."""
    index = read_index(path)
    ends = np.cumsum(index.units["rows"])
    count = 0
    for unit, (rows, end) in enumerate(zip(index.units["rows"], ends, strict=True)):
        first, last = max(start - (end - rows), 0), min(stop - (end - rows), rows)
        if first < last:
            count += len(index.read(unit, int(first), int(last), ["label"]))
    return count


def read_webdataset(path: Path, start: int, stop: int) -> int:
    """Samples from `start` to `stop`; what comes before is read and dropped, there is no other way to a place."""
    import webdataset

    count = 0
    for number, sample in enumerate(webdataset.WebDataset(str(path), shardshuffle=False)):
        if start <= number < stop:
            count += bool(sample["jpg"]) and bool(json.loads(sample["json"]))
        if number + 1 >= stop:
            break
    return count


if __name__ == "__main__":
    run_script(main)
