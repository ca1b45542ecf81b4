"""Streaming of shards: nothing lost or twice, the same on any number of processes and workers, after any break."""

import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from spcxr_hf.data import shards
from spcxr_hf.data.batches import StepPlan, step_seed
from spcxr_hf.data.manifests import read_shards
from spcxr_hf.data.shards import ShardIndex, read_index
from spcxr_hf.data.streaming import MicroBatchStream, StreamingRadiographs, deal_streams
from spcxr_hf.data.table import RadiographTable, decode_images, decode_set, read_table
from spcxr_hf.errors import SpcxrError
from tests.made_up import STRUCT, encoded, picture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

SIZE = 16
PLAN = StepPlan(batch_size=8, micro_batch_size=2, seed=3)  # 4 streams
GROUPS = (5, 3, 7, 4), (6, 1, 8), (3, 9)  # rows of each row group of each shard
TOTAL = 46


def rows_of(first: int, count: int) -> dict[str, list]:
    numbers = range(first, first + count)
    return {
        "image": [encoded(picture(number, 24)[0]) for number in numbers],
        "id": [f"row-{number}" for number in numbers],
        "number": list(numbers),
        "view": ["PA" if number % 3 else None for number in numbers],
        "pretrain": [None if number == 7 else number % 4 != 0 for number in numbers],
    }


def write_parquet(path: Path, groups: list[dict[str, list]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [pa.table({**rows, "image": pa.array(rows["image"], STRUCT)}) for rows in groups]
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def tar_members(first: int, count: int, prefix: str = "") -> list[tuple[str, bytes]]:
    rows = rows_of(first, count)
    members = []
    for row in range(count):
        columns = {name: rows[name][row] for name in ("number", "view", "pretrain")}
        members.append((f"{prefix}{rows['id'][row]}.png", rows["image"][row]["bytes"]))
        members.append((f"{prefix}{rows['id'][row]}.json", json.dumps(columns).encode()))
    return members


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same 46 rows as Parquet and as tar shards."""
    root = tmp_path_factory.mktemp("shards")
    first = 0
    for shard, counts in enumerate(GROUPS):
        starts = [first + sum(counts[:group]) for group in range(len(counts))]
        write_parquet(
            root / "parquet" / f"{shard}.parquet",
            [rows_of(start, count) for start, count in zip(starts, counts, strict=True)],
        )
        write_tar(root / "tar" / f"{shard}.tar", tar_members(first, sum(counts)))
        first += sum(counts)
    assert first == TOTAL
    return root


@pytest.fixture(params=["parquet", "tar"])
def folder(folders, request, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLES_PER_UNIT", 4)  # several units in a tar
    return folders / request.param


def take(stream, plan=PLAN, first_step=0, steps=6):
    return list(stream.micro_batches(plan, first_step, first_step + steps))


def same(one, other):
    return one._replace(images=None) == other._replace(images=None) and torch.equal(one.images, other.images)


def all_same(ones, others):
    return len(ones) == len(others) and all(same(one, other) for one, other in zip(ones, others, strict=True))


# What lies where


def test_the_index_counts_every_row(folders, folder):
    index = read_index(folder)
    assert len(index) == TOTAL
    assert [path.stem for path in index.files] == ["0", "1", "2"]
    expected = GROUPS if folder.name == "parquet" else ((4, 4, 4, 4, 3), (4, 4, 4, 3), (4, 4, 4))
    assert index.units["rows"].tolist() == list(itertools.chain(*expected))
    assert index.units["first_row"].tolist() == [
        sum(counts[:group]) for counts in expected for group in range(len(counts))
    ]
    ids = [row.id for unit, rows in enumerate(index.units["rows"]) for row in index.read(unit, 0, int(rows), ["view"])]
    assert ids == [f"row-{number}" for number in range(TOTAL)]


def test_a_file_and_a_list(folder):
    files = sorted(folder.iterdir())
    assert len(read_index(files[0])) == sum(GROUPS[0])
    assert len(read_index([files[2], str(files[0])])) == sum(GROUPS[0]) + sum(GROUPS[2])


def test_the_pixels_are_those_of_a_set_in_memory(folders, folder):
    expected = decode_images(read_table(folders / "parquet"), SIZE)
    seen = set()
    for batch in take(StreamingRadiographs(folder, SIZE, columns=["number", "view"])):
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, expected[batch.columns["number"]])
        assert batch.ids == [f"row-{number}" for number in batch.columns["number"]]
        assert batch.columns["view"] == ["PA" if number % 3 else None for number in batch.columns["number"]]
        seen |= set(batch.ids)
    assert len(seen) > 40


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("pretrain", [number for number in range(TOTAL) if number % 4 and number != 7]),
        (("view", "PA"), [number for number in range(TOTAL) if number % 3]),
        (("number", 30), [30]),
    ],
)
def test_a_filter_keeps_exactly_its_rows(folder, where, kept):
    stream = StreamingRadiographs(folder, SIZE, where, columns=["number"])
    assert len(stream) == len(kept)
    plan = StepPlan(batch_size=1, micro_batch_size=1)
    epoch = take(stream, plan, steps=len(kept))
    assert sorted(number for batch in epoch for number in batch.columns["number"]) == kept
    assert stream.index.kept.dtype == np.uint32


def test_a_filter_reads_no_other_row(folder):
    index = read_index(folder, ("number", 30))
    assert len(index.units) == 1
    (row,) = index.read(0, 0, 1, [])
    assert row.id == "row-30"
    assert "row 11: row-30" in row.name  # the shard's rows are 19 .. 33


# Tars in all their forms


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_length(tmp_path, kind):
    prefix = "folder.with.dots/" + "x" * (60 if kind == tarfile.USTAR_FORMAT else 200) + "/"
    path = write_tar(tmp_path / "a.tar", tar_members(0, 9, prefix), kind)
    index = read_index(path)
    assert [row.id for row in index.read(0, 0, 9, [])] == [f"{prefix}row-{number}" for number in range(9)]
    with tarfile.open(path) as tar:
        picture_bytes = tar.extractfile(f"{prefix}row-8.png").read()
    assert index.read(0, 8, 9, [])[0].image["bytes"] == picture_bytes


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_names_in_a_tar_that_are_no_utf_8(tmp_path, kind):
    odd = os.fsdecode(b"caf\xe9/row-1")
    members = tar_members(0, 3)
    members = [(name.replace("row-1", odd), content) for name, content in members]
    path = write_tar(tmp_path / "a.tar", members, kind)
    assert b"caf\xe9" in path.read_bytes()
    assert read_index(path).units["rows"].sum() == 3
    table = read_shards(path)
    assert table.ids == ["row-0", r"caf\xe9/row-1", "row-2"]
    table.rows.validate(full=True)
    assert len(decode_set(table, 16).table) == 3
    members[next(n for n, (name, _) in enumerate(members) if name == f"{odd}.png")] = (f"{odd}.png", b"no picture")
    found = decode_set(read_shards(write_tar(path, members, kind)), 16, on_error="skip")
    assert found.table.ids == ["row-0", "row-2"] and list(found.skipped) == [r"caf\xe9/row-1"]


def test_what_else_lies_in_a_tar(tmp_path):
    picture_bytes = encoded(picture(1)[0])["bytes"]
    members = [
        ("README", b"no sample"),
        ("._a.png", b"what some systems add"),
        ("a.PNG", picture_bytes),
        ("._a.json", b"and again"),
        ("a.json", b'{"view": "PA"}'),
        ("a.mask.png", b"of another use"),
        ("b.json", b"{}"),
        ("c.cls", b"2"),
        ("c.jpg", picture_bytes),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.PNG"
        tar.addfile(link)
    rows = read_index(path).read(0, 0, 2, ["view", "cls"])
    assert [(row.id, row.columns) for row in rows] == [
        ("a", {"view": "PA", "cls": None}),
        ("c", {"view": None, "cls": 2}),
    ]
    assert len(read_index(path)) == 2
    assert len(read_index(path, ("cls", 2))) == 1


def test_large_samples_close_a_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BYTES_PER_UNIT", 1)
    assert read_index(write_tar(tmp_path / "a.tar", tar_members(0, 5))).units["rows"].tolist() == [1] * 5


# Who reads what


def test_a_fingerprint_of_the_rows(folders, tmp_path):
    for kind in ("parquet", "tar"):
        there = read_index(folders / kind)
        shutil.copytree(folders / kind, tmp_path / kind)
        assert read_index(tmp_path / kind).fingerprint_rows() == there.fingerprint_rows()
        assert read_index(folders / kind, ("pretrain", True)).fingerprint_rows() != there.fingerprint_rows()
        min((tmp_path / kind).iterdir()).unlink()
        assert read_index(tmp_path / kind).fingerprint_rows() != there.fingerprint_rows()


@pytest.mark.parametrize("streams", [1, 2, 5, 9, 23])
@pytest.mark.parametrize("where", [None, ("pretrain", True)])
def test_every_row_belongs_to_one_stream(folder, streams, where):
    index = read_index(folder, where)
    dealt = deal_streams(index, streams, 1, seed=5, window=3)
    owners = Counter(
        (unit, row)
        for stream in dealt
        for unit, start, stop in zip(stream.units, stream.starts, stream.stops, strict=True)
        for row in range(start, stop)
    )
    assert owners == Counter((unit, row) for unit, rows in enumerate(index.units["rows"]) for row in range(rows))
    sizes = [len(stream) for stream in dealt]
    assert max(sizes) - min(sizes) <= 1


def test_the_seed_deals_and_shuffles(folder):
    index = read_index(folder)
    shares = [deal_streams(index, 3, 1, seed, 3)[0].units.tolist() for seed in range(8)]
    assert len({tuple(share) for share in shares}) > 1
    assert shares == [deal_streams(index, 3, 1, seed, 3)[0].units.tolist() for seed in range(8)]
    assert not all_same(take(StreamingRadiographs(folder, SIZE)), take(StreamingRadiographs(folder, SIZE, window=2)))


STREAM = MicroBatchStream(
    1, 7, 3, np.array([9, 4, 2, 6, 0, 5, 8]), np.array([0, 2, 0, 1, 0, 0, 3]), np.array([5, 4, 1, 4, 6, 2, 7])
)


def test_each_epoch_of_a_stream_has_each_row_once():
    size = 5 + 2 + 1 + 3 + 6 + 2 + 4
    assert len(STREAM) == size
    order = list(itertools.islice(STREAM.start_at(0), 3 * size))
    epochs = [order[epoch * size : (epoch + 1) * size] for epoch in range(3)]
    expected = {
        (unit, row) for unit, a, b in zip(STREAM.units, STREAM.starts, STREAM.stops, strict=True) for row in range(a, b)
    }
    for number, epoch in enumerate(epochs):
        assert {position.epoch for position in epoch} == {number}
        assert {(position.unit, position.row) for position in epoch} == expected
    assert len({tuple((position.unit, position.row) for position in epoch) for epoch in epochs}) == 3


def test_a_block_has_no_more_units_than_the_window_and_mixes_them():
    order = list(itertools.islice(STREAM.start_at(0), len(STREAM)))
    blocks = [[p.unit for p in order if p.block == block] for block in range(3)]
    assert [len(set(units)) for units in blocks] == [3, 2, 2]  # 7 units by at most 3: none is left alone
    assert [position.block for position in order] == sorted(position.block for position in order)
    assert any(units != sorted(units, key=units.index) for units in blocks)  # not unit after unit


@pytest.mark.parametrize("samples", [0, 1, 4, 22, 23, 24, 40, 45, 46, 1000])
def test_a_stream_starts_anywhere(samples):
    expected = list(itertools.islice(STREAM.start_at(0), samples, samples + 60))
    assert list(itertools.islice(STREAM.start_at(samples), 60)) == expected


def test_starting_far_on_is_counted_not_walked():
    position = next(STREAM.start_at(10**15))
    assert position.epoch == 10**15 // len(STREAM)


# The same, whoever does it


@pytest.fixture
def expected(folder):
    return take(StreamingRadiographs(folder, SIZE, columns=["number"]), steps=14)  # streams of 11 or 12: two epochs


def test_steps_and_streams_in_order(expected):
    assert [(batch.step, batch.stream) for batch in expected] == list(itertools.product(range(14), range(4)))
    for stream in range(4):
        ids = [name for batch in expected for name in batch.ids if batch.stream == stream]
        assert len(ids) == 28
        size = len(set(ids))
        assert size in (11, 12)
        assert set(Counter(ids[:size]).values()) == {1}
        assert set(ids[size : 2 * size]) == set(ids[:size])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers(folder, expected, workers):
    assert all_same(take(StreamingRadiographs(folder, SIZE, workers=workers, columns=["number"]), steps=14), expected)


def test_workers_outlive_a_sigterm(folder, expected):
    """Launchers send it to every process; the run saves a checkpoint behind the step at hand, and needs its images."""
    batches = StreamingRadiographs(folder, SIZE, workers=2, columns=["number"]).micro_batches(PLAN, 0, 14)
    found = [next(batches), next(batches)]  # of both workers, which are at work by now
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    found += [next(batches) for _ in range(3)]
    assert all_same(found, expected[:5])
    assert all(worker.is_alive() for worker in workers)
    os.kill(workers[0].pid, signal.SIGTERM)  # the run's own, as at its end
    workers[0].join(20)
    assert not workers[0].is_alive()
    batches.close()
    workers[1].join(20)
    assert not workers[1].is_alive()


RUN_OF_ITS_OWN = """
import multiprocessing, os, signal, sys
from spcxr_hf.data.batches import StepPlan
from spcxr_hf.data.streaming import StreamingRadiographs

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    batches = StreamingRadiographs(sys.argv[1], 32, workers=2).micro_batches(StepPlan(8, 2, 3), 0, 14)
    next(batches), next(batches)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the processes in /proc")
@pytest.mark.parametrize("folder", ["parquet"], indirect=True)
def test_workers_end_when_their_run_is_killed(folder, tmp_path):
    """Those that come from a server too, as they do by default from Python 3.14: torch does not look after them."""
    (tmp_path / "run.py").write_text(RUN_OF_ITS_OWN)
    command = [sys.executable, str(tmp_path / "run.py"), str(folder)]
    with (tmp_path / "told").open("w") as told:
        assert subprocess.run(command, stdout=told, timeout=120).returncode == -signal.SIGKILL
    workers = [Path("/proc") / pid for pid in (tmp_path / "told").read_text().split()]
    assert len(workers) == 2
    end = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(process: Path) -> bool:
    """Not gone, nor a zombie that nobody has waited for."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (4, 0), (2, 3)])
def test_any_number_of_processes(folder, expected, processes, workers):
    for process in range(processes):
        plan = StepPlan(8, 2, 3, process, processes)
        made = take(StreamingRadiographs(folder, SIZE, workers=workers, columns=["number"]), plan, steps=14)
        assert all_same(made, [batch for batch in expected if batch.stream % processes == process])


@pytest.mark.parametrize("workers", [0, 3])
def test_resumed_at_any_step(folder, expected, workers):
    stream = StreamingRadiographs(folder, SIZE, workers=workers, columns=["number"])
    steps = range(1, 14) if workers == 0 else random.Random(0).sample(range(1, 13), 2)
    for step in steps:
        assert all_same(take(stream, first_step=step, steps=14 - step), expected[4 * step :])


def test_with_a_filter_too(folder):
    expected = take(StreamingRadiographs(folder, SIZE, "pretrain"))
    assert all_same(take(StreamingRadiographs(folder, SIZE, "pretrain", 2)), expected)
    assert all_same(take(StreamingRadiographs(folder, SIZE, "pretrain"), first_step=4, steps=2), expected[16:])
    assert not {f"row-{number}" for number in range(0, TOTAL, 4)} & {name for batch in expected for name in batch.ids}


def test_steps_for_a_run(folder):
    stream = StreamingRadiographs(folder, SIZE, columns=["number"])
    plan = StepPlan(8, 2, 3, 1, 2)
    steps = list(stream.steps(plan, 2, 5))
    assert [len(step) for step in steps] == [2, 2, 2]
    flat = [(step, stream) for step in range(2, 5) for stream in (1, 3)]
    batches = take(stream, plan, 2, 3)
    for (step, stream), made, batch in zip(flat, itertools.chain(*steps), batches, strict=True):
        assert (made.ids, made.seed) == (batch.ids, step_seed(3, step, stream))
        assert torch.equal(made.images, batch.images)
        assert made.columns["number"].tolist() == batch.columns["number"]
    with pytest.raises(SpcxrError, match="column 'view': not a number in every row"):
        list(StreamingRadiographs(folder, SIZE, columns=["view"]).steps(plan, 0, 3))


def test_the_global_generator_is_left_alone(folder):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(StreamingRadiographs(folder, SIZE), steps=1)
    assert torch.equal(torch.rand(1), expected)


# Broken images


def write_broken(folder: Path, kind: str, broken: set[int], count: int = 12) -> Path:
    rows = rows_of(0, count)
    for number in broken:
        rows["image"][number] = {"bytes": b"no picture", "path": None}
    if kind == "parquet":
        write_parquet(folder / "a.parquet", [rows])
        return folder / "a.parquet"
    return write_tar(
        folder / "a.tar", [(f"{name}.png", cell["bytes"]) for name, cell in zip(rows["id"], rows["image"], strict=True)]
    )


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_stop_names_shard_row_and_cause(tmp_path, kind, workers):
    stream = StreamingRadiographs(write_broken(tmp_path, kind, {5}), SIZE, workers=workers)
    with pytest.raises(SpcxrError, match=rf"a\.{kind}: row 5: row-5(\.png)?: not a PNG, JPEG, .*file$") as caught:
        take(stream, StepPlan(2, 2))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_and_lists(tmp_path, kind, workers):
    plan = StepPlan(6, 3)
    whole = take(StreamingRadiographs(write_broken(tmp_path / "whole", kind, set()), SIZE), plan)
    stream = StreamingRadiographs(write_broken(tmp_path / "broken", kind, {5}), SIZE, workers=workers, on_error="skip")
    made = take(stream, plan)
    assert [batch.ids for batch in made] == [[name for name in batch.ids if name != "row-5"] for batch in whole]
    assert [list(batch.skipped) for batch in made] == [["row-5"] * ("row-5" in batch.ids) for batch in whole]
    assert all(len(batch.images) == len(batch.ids) for batch in made)
    assert list(stream.skipped) == ["row-5"]
    assert "row 5: row-5" in stream.skipped["row-5"]


@pytest.mark.parametrize(("broken", "stops"), [(6, False), (7, True)])
def test_skip_stops_where_more_than_half_is_broken(tmp_path, broken, stops):
    """Not before all twelve rows were seen, and without regard to which micro-batch they fall in."""
    shards = write_broken(tmp_path, "parquet", set(range(broken)))
    stream = StreamingRadiographs(shards, SIZE, on_error="skip")
    found = stream.micro_batches(StepPlan(12, 12), 0, 2)
    if stops:
        with pytest.raises(SpcxrError, match="7 of 12 files are broken, more than half; one of them: .*row-"):
            next(found)
    else:
        assert [len(batch.ids) for batch in found] == [6, 6]


def test_skip_stops_where_nothing_is_left(tmp_path):
    stream = StreamingRadiographs(write_broken(tmp_path, "parquet", set(range(12))), SIZE, on_error="skip")
    with pytest.raises(
        SpcxrError, match=r"step 0, stream 0: none of 2 images can be read; the last: .*a\.parquet: row "
    ):
        take(stream, StepPlan(4, 2))


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        (None, "no image in this row"),
        ({"bytes": None, "path": None}, "no image in this row"),
        ({"bytes": None, "path": "gone.png"}, ".*gone.png: No such file"),
        ({"bytes": b"", "path": None}, "the file is empty"),
    ],
)
def test_a_row_without_an_image(tmp_path, monkeypatch, cell, cause):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", [{"image": [cell] * 2}])  # and no ids
    with pytest.raises(SpcxrError, match=rf"a\.parquet: row [01]: a\.parquet:[01]: {cause}"):
        take(StreamingRadiographs(tmp_path, SIZE), StepPlan(1, 1))


def test_a_path_instead_of_bytes(tmp_path):
    Image.fromarray(picture(1)[0]).save(tmp_path / "a.png")
    write_parquet(tmp_path / "a.parquet", [{"image": [{"bytes": None, "path": str(tmp_path / "a.png")}]}])
    (batch,) = take(StreamingRadiographs(tmp_path, SIZE), StepPlan(1, 1), steps=1)
    rows = RadiographTable(pa.table({"image": pa.array([encoded(picture(1)[0])], STRUCT)}), "one")
    assert torch.equal(batch.images, decode_images(rows, SIZE))


@pytest.mark.parametrize(
    ("extension", "content", "cause"),
    [
        ("json", b"{", "its .json cannot be read"),
        ("json", b"\xff\xfe\x00", "its .json cannot be read"),
        ("json", b"[1]", "its .json is no object"),
        ("cls", b"cat", "its .cls is not the number of a class"),
    ],
)
def test_broken_columns_in_a_tar(tmp_path, extension, content, cause):
    members = [("a.png", encoded(picture(1)[0])["bytes"]), (f"a.{extension}", content)]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(SpcxrError, match=rf"a\.tar: row 0: a\.png: {cause}"):
        take(StreamingRadiographs(path, SIZE, columns=["view"]), StepPlan(1, 1))
    with pytest.raises(SpcxrError, match=rf"a\.tar: a: {cause}"):
        read_index(path, ("view", "PA"))
    assert len(take(StreamingRadiographs(path, SIZE), StepPlan(1, 1), steps=2)) == 2  # where nobody asks for them


# Bad shards and settings


def test_nothing_there(tmp_path):
    with pytest.raises(SpcxrError, match="missing: no such file or folder"):
        read_index(tmp_path / "missing")
    with pytest.raises(SpcxrError, match=r"no Parquet \(\.parquet\) and no WebDataset \(\.tar\) shards"):
        read_index(tmp_path)
    with pytest.raises(SpcxrError, match="the list is empty"):
        read_index([])


def test_mixed_kinds_and_doubles(folders):
    files = [folders / "parquet" / "0.parquet", folders / "tar" / "0.tar"]
    with pytest.raises(SpcxrError, match="Parquet and tar shards together"):
        read_index(files)
    with pytest.raises(SpcxrError, match="a shard is named twice"):
        read_index([files[0], folders / "parquet"])
    with pytest.raises(SpcxrError, match=r"test_streaming\.py: neither a Parquet"):
        read_index(Path(__file__))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_compressed_tars(tmp_path, name):
    write_tar(tmp_path / name, tar_members(0, 2), mode="w:gz")
    with pytest.raises(SpcxrError, match=rf"{name}: a compressed tar cannot be read from its middle"):
        read_index(tmp_path)


def broken_tars():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in tar_members(0, 4):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        third = tar.getmembers()[2]
    yield pytest.param(whole[: third.offset_data + 10], "cut short, within the member at byte", id="cut in data")
    yield pytest.param(whole[: third.offset + 100], "cut short, it ends at byte", id="cut in a header")
    yield pytest.param(whole[: third.offset], "cut short, it ends at byte", id="cut between members")
    damaged = whole[: third.offset + 20] + b"\xff" * 20 + whole[third.offset + 40 :]
    yield pytest.param(damaged, f"no header at byte {third.offset}", id="damaged header")
    yield pytest.param(b"x" * 2000, "not a tar, or damaged: no header at byte 0", id="no tar")
    yield pytest.param(b"", "cut short, it ends at byte 0", id="empty file")
    yield pytest.param(bytes(10240), "no pictures", id="empty tar")


@pytest.mark.parametrize(("content", "cause"), list(broken_tars()))
def test_broken_tars(tmp_path, content, cause):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(SpcxrError, match=rf"a\.tar: .*{cause}"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (["a.txt"], "no pictures"),
        (["a.png", "a.jpg"], r"sample a has several pictures \(jpg, png\)"),
        (["a.png", "a.png"], r"two members in a row are called a\.png"),
    ],
)
def test_tars_that_do_not_say_what_the_picture_is(tmp_path, names, cause):
    path = write_tar(tmp_path / "a.tar", [(name, b"...") for name in names])
    with pytest.raises(SpcxrError, match=rf"a\.tar: {cause}"):
        read_index(path)


def test_a_size_that_octal_digits_cannot_hold(tmp_path):
    header = tarfile.TarInfo("a.png")
    header.size = 2**40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(SpcxrError, match=r"a\.tar: the tar is cut short, within the member at byte 0"):
        read_index(tmp_path)
    header = tarfile.TarInfo("a.png")
    header.size = 5
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + (5).to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    (tmp_path / "a.tar").write_bytes(bytes(block) + b"abcde".ljust(512, b"\0") + bytes(1024))
    assert read_index(tmp_path).read(0, 0, 1, [])[0].image["bytes"] == b"abcde"


def test_a_broken_pax_header(tmp_path):
    path = write_tar(tmp_path / "a.tar", tar_members(0, 1, "x" * 200), tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    for broken in (whole.replace(b" path=", b"x path="), whole.replace(b" path=", b" size="), whole[:700]):
        path.write_bytes(broken)
        with pytest.raises(SpcxrError, match=r"a\.tar: "):
            read_index(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_bad_later(folders, tmp_path, workers):
    path = tmp_path / "a.parquet"
    path.write_bytes((folders / "parquet" / "0.parquet").read_bytes())
    stream = StreamingRadiographs(path, SIZE, workers=workers)
    path.unlink()
    with pytest.raises(SpcxrError, match=r"a\.parquet: not a readable \.parquet shard \(.*a\.parquet"):
        take(stream)


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ({"id": ["a"]}, "no column `image`"),
        ({"image": ["text"]}, "no column `image`"),
        ({"image": [{"path": "a"}]}, "no"),
    ],
)
def test_parquet_without_images(tmp_path, columns, cause):
    pq.write_table(pa.table(columns), tmp_path / "odd.parquet")
    with pytest.raises(SpcxrError, match=rf"odd\.parquet: {cause}"):
        read_index(tmp_path)


def test_damaged_parquet(folders, tmp_path):
    (tmp_path / "worse.parquet").write_bytes((folders / "parquet" / "0.parquet").read_bytes()[:500])
    with pytest.raises(SpcxrError, match=r"worse\.parquet: not a readable \.parquet shard"):
        read_index(tmp_path)


def test_parquet_with_nothing_in_it(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"image": []}])
    with pytest.raises(SpcxrError, match="no rows"):
        read_index(tmp_path)


def test_row_groups_that_are_too_large(folders, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST_ROW_GROUP", 100)
    with pytest.raises(SpcxrError, match=r"0\.parquet: row group 0 holds .* smaller row groups"):
        read_index(folders / "parquet")
    monkeypatch.undo()
    monkeypatch.setattr(shards, "MAX_GROUP_ROWS", 2)
    with pytest.raises(SpcxrError, match=r"0\.parquet: row group 0 has 5 rows; at most 2"):
        read_index(folders / "parquet")


def test_columns_of_some_shards_only(folders, tmp_path):
    write_parquet(tmp_path / "a.parquet", [rows_of(0, 4)])
    write_parquet(tmp_path / "b.parquet", [{"image": rows_of(4, 4)["image"]}])
    made = take(StreamingRadiographs(tmp_path, SIZE, columns=["number"]), StepPlan(8, 8), steps=1)[0]
    assert sorted(value for value in made.columns["number"] if value is not None) == [0, 1, 2, 3]
    assert made.columns["number"].count(None) == 4
    assert len(read_index(tmp_path, ("pretrain", True))) == 3


def test_filters_that_find_nothing(folder):
    with pytest.raises(SpcxrError, match="no column 'colour'; there are "):
        read_index(folder, ("colour", 1))
    with pytest.raises(SpcxrError, match="no row has number = -1"):
        read_index(folder, ("number", -1))


def test_parquet_columns_are_checked_at_once(folders):
    with pytest.raises(SpcxrError, match="no column 'colour'; there are id, number, pretrain, view"):
        StreamingRadiographs(folders / "parquet", SIZE, columns=["colour"])
    with pytest.raises(SpcxrError, match="column 'view' cannot be compared with True"):
        StreamingRadiographs(folders / "parquet", SIZE, "view")


def test_too_few_rows(folder):
    plan = StepPlan(batch_size=48, micro_batch_size=16)
    with pytest.raises(SpcxrError, match=r"46 rows are fewer than the 48 of one step \(3 micro-batches of 16\)"):
        take(StreamingRadiographs(folder, SIZE), plan)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"stored_size": 0}, "stored_size must be at least 1; got 0"),
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
        ({"on_error": "ignore"}, "on_error must be"),
    ],
)
def test_settings_out_of_range(folders, settings, cause):
    with pytest.raises(SpcxrError, match=cause):
        StreamingRadiographs(folders / "parquet", **{"stored_size": SIZE, **settings})


def test_an_index_is_filtered_where_it_is_read(folders):
    index = read_index(folders / "parquet", ("pretrain", True))
    assert len(StreamingRadiographs(index, SIZE)) == len(index)
    with pytest.raises(SpcxrError, match="give the filter to read_index"):
        StreamingRadiographs(index, SIZE, "pretrain")


# Start-up and memory do not grow with the rows

GROUP, NOISE = 32, 64  # rows in a row group; side of an image that hardly compresses: 4 kB each


def write_large(path: Path, kind: str, groups: int) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (GROUP, NOISE, NOISE), dtype=np.uint8)
    cells = [encoded(pixels) for pixels in noise]
    if kind == "parquet":
        table = pa.table({"image": pa.array(cells, STRUCT)})
        with pq.ParquetWriter(path, table.schema, use_dictionary=False, compression="none") as writer:
            for _ in range(groups):
                writer.write_table(table)
        return path
    names = (f"{number:06d}.png" for number in itertools.count())
    return write_tar(path, [(next(names), cell["bytes"]) for _ in range(groups) for cell in cells])


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_hundred_times_the_rows(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shards, "SAMPLES_PER_UNIT", GROUP)
    units_read = []
    read = ShardIndex.read
    monkeypatch.setattr(ShardIndex, "read", lambda self, *given: units_read.append(given[0]) or read(self, *given))
    measured = {}
    for times in (1, 10, 100):
        path = write_large(tmp_path / f"{times}.{kind}", kind, 8 * times)
        units_read.clear()
        resident, started = resident_bytes(), time.process_time()
        next(StreamingRadiographs(path, SIZE, window=4).micro_batches(StepPlan(8, 4)))
        seconds, first_reads = time.process_time() - started, len(units_read)
        tracemalloc.start()
        stream = StreamingRadiographs(path, SIZE, window=4)
        batches = stream.micro_batches(StepPlan(8, 4))
        for _ in range(40):
            next(batches)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        measured[times] = (first_reads, seconds, peak, resident_bytes() - resident)
        sizes = stream.index.units["bytes"]
        held = sum(np.sort(sizes[one.units])[-4:].sum() for one in stream.streams(StepPlan(8, 4)))
        assert peak < 2 * held + 2**20
        batches.close()
    assert len(stream) == 100 * 8 * GROUP  # 100 MB of images
    reads, seconds, peaks, grown = zip(*measured.values(), strict=True)
    assert max(reads) <= 4  # the units of one window, however many there are
    assert seconds[2] < 10 * seconds[0] + 1  # of this process; a tar's headers are walked: 25 600 of them here
    assert peaks[2] < 2 * peaks[0]
    assert grown[2] < 30e6
