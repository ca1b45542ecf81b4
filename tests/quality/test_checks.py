"""What command lines say of their set: rows to leave out, the verdict on leaks, the list of broken files."""

import pytest

from spcxr_hf.data.sets import read_ids, read_set, write_ids
from spcxr_hf.errors import SpcxrError
from spcxr_hf.quality import checks
from spcxr_hf.quality.checks import check_split, write_skipped
from tests.made_up import write_set

SPLITS = ["train"] * 4 + ["val"] * 2


def test_rows_to_leave_out(tmp_path):
    shard = str(write_set(tmp_path / "set.parquet", SPLITS))
    write_ids(tmp_path / "out.txt", ["row-3", "row-1"], "2 rows")
    assert (tmp_path / "out.txt").read_text() == "# 2 rows\nrow-1\nrow-3\n"
    assert read_ids(tmp_path / "out.txt") == {"row-1", "row-3"}
    assert read_set(shard, tmp_path / "out.txt").ids == ["row-0", "row-2", "row-4", "row-5"]
    assert len(read_set(shard)) == len(read_set(shard, "")) == 6
    write_ids(tmp_path / "out.txt", ["elsewhere"], "another set's")
    with pytest.raises(SpcxrError, match="none of the 1 ids to leave out is in it"):
        read_set(shard, tmp_path / "out.txt")


def test_a_clean_verdict_is_kept_for_the_same_set_and_sides(tmp_path, monkeypatch):
    table = read_set(str(write_set(tmp_path / "set.parquet", SPLITS)))
    compared = []
    refuse = checks.refuse_leaks
    monkeypatch.setattr(checks, "refuse_leaks", lambda *a, **k: compared.append(k["images"]) or refuse(*a, **k))
    for _ in range(2):
        check_split(table, "lung_split", cache=tmp_path / "cache")
    check_split(table.without({"row-0"}), "lung_split", cache=tmp_path / "cache")
    check_split(table, "pneumonia_split", sides=["train", "val"], cache=tmp_path / "cache")
    check_split(table, "lung_split")
    check_split(table, "lung_split", allow="images", cache=tmp_path / "cache")
    assert compared == [True, False, True, True, True, False]


def test_a_leak_leaves_no_verdict(tmp_path):
    table = read_set(str(write_set(tmp_path / "set.parquet", SPLITS)))
    place = table.rows.column_names.index("patient")
    rows = table.rows.set_column(place, "patient", [["one", *["two"] * 3, "one", "three"]])
    for _ in range(2):
        with pytest.raises(
            SpcxrError, match=r"split by patient \(spcxr_hf.quality.splits\), or .*--allow_leaks patients"
        ):
            check_split(type(table)(rows, "set"), "lung_split", cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_broken_files_of_several_starts(tmp_path, capsys):
    run, listed = tmp_path / "run", f"listed in {tmp_path / 'run' / 'skipped.csv'}\n"
    run.mkdir()
    write_skipped(run, {})
    assert not list(run.iterdir())
    write_skipped(run, {"b": "torn, in two", "a": 'said "no"'})
    assert capsys.readouterr().out == f"skipped 2 broken files, {listed}"
    write_skipped(run / "results.json", {"c": "cut short"})
    assert capsys.readouterr().out == f"skipped 3 broken files, {listed}"
    write_skipped(run, {"a": 'said "no"'})
    assert capsys.readouterr().out == f"skipped 3 broken files, {listed}"
    lines = (run / "skipped.csv").read_text().splitlines()
    assert lines == ["id,cause", 'a,"said ""no"""', 'b,"torn, in two"', "c,cut short"]
    write_skipped(None, {"c": "cut short"})
    assert capsys.readouterr().out == "skipped c: cut short\n"
    second = type("Second", (), {"num_processes": 1, "is_main_process": False})()
    write_skipped(run, {"d": "the first process writes"}, second)
    assert capsys.readouterr().out == "" and "\nd," not in (run / "skipped.csv").read_text()


def test_ids_are_read_as_they_were_written(tmp_path):
    ids = ["b#2.png", "a scan #1.png"]
    write_ids(tmp_path / "out.txt", ids, "with a # in the name")
    assert read_ids(tmp_path / "out.txt") == set(ids)
    for odd in ("#1.png", " a.png", "a\nb.png", ""):
        with pytest.raises(SpcxrError, match=r"out\.txt: cannot hold the id"):
            write_ids(tmp_path / "out.txt", [odd], "refused")
    assert read_ids(tmp_path / "out.txt") == set(ids)
