"""Records in every format: read back, gone on with, whole after an interruption, refused where they would destroy."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open

from spcxr_hf import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE, write_png
from spcxr_hf.inference import writers
from spcxr_hf.inference.writers import check_output, choose_format, finished, open_writer

KINDS = ("jsonl", "csv", "parquet", "safetensors")


def record(number: int, model: str = "m") -> dict:
    return {
        "path": f'a "b", {number}\n.png',
        "embedding": [number + 0.5, 2.0],
        "probabilities": {"normal": number / 10},
        "model": model,
        "warnings": ["odd"] if number == 1 else [],
        "note": RESEARCH_NOTICE,
    }


def write(output: Path, kind: str, numbers, resume: bool = False, **options) -> None:
    with open_writer(output, kind, resume) as writer:
        for number in numbers:
            writer.write([record(number, **options)])


def paths_in(output: Path, kind: str) -> list[str]:
    if kind == "jsonl":
        return [json.loads(line)["path"] for line in output.read_text().splitlines()]
    if kind == "csv":
        return [row["path"] for row in csv.DictReader(io.StringIO(output.read_text()))]
    if kind == "parquet":
        return pq.read_table(output)["path"].to_pylist()
    with safe_open(output, "numpy") as file:
        return json.loads(file.metadata()["path"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_where_one_ended(tmp_path, kind):
    output = tmp_path / f"out.{kind}"
    write(output, kind, range(3))
    assert finished(output, kind, "m") == {record(number)["path"] for number in range(3)}
    write(output, kind, range(3, 5), resume=True)
    assert paths_in(output, kind) == [record(number)["path"] for number in range(5)]
    write(output, kind, [], resume=True)
    assert len(paths_in(output, kind)) == 5
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    with pytest.raises(SpcxrError, match="holds records of the model m, this run's is n"):
        finished(output, kind, "n")


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_interrupted_run_wrote_is_whole(tmp_path, kind):
    output = tmp_path / f"out.{kind}"
    with pytest.raises(KeyboardInterrupt), open_writer(output, kind) as writer:
        writer.write([record(0), record(1)])
        raise KeyboardInterrupt
    assert paths_in(output, kind) == [record(0)["path"], record(1)["path"]]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_killed_runs_half_line_is_removed(tmp_path, kind):
    output = tmp_path / f"out.{kind}"
    write(output, kind, range(2))
    whole = output.read_bytes()
    for cut in range(1, 60):
        output.write_bytes(whole[:-cut])
        assert finished(output, kind, "m") == {record(0)["path"]}
        write(output, kind, [1], resume=True)
        assert output.read_bytes() == whole


def test_parquet_is_written_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "ROW_GROUP", 2)
    write(tmp_path / "out.parquet", "parquet", range(5))
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert file.metadata.num_row_groups == 3
    assert file.schema_arrow.metadata[b"note"] == RESEARCH_NOTICE.encode()
    rows = file.read().to_pylist()
    assert rows[1]["warnings"] == ["odd"]
    assert rows[3]["embedding"] == [3.5, 2.0]
    assert rows[3]["probabilities.normal"] == pytest.approx(0.3)


def test_safetensors_hold_the_vectors(tmp_path):
    write(tmp_path / "out.safetensors", "safetensors", range(2))
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("embeddings"), np.float32([[0.5, 2], [1.5, 2]]))
        assert file.metadata()["note"] == RESEARCH_NOTICE


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_columns_are_refused(tmp_path, kind):
    output = tmp_path / f"out.{kind}"
    write(output, kind, [0])
    with (
        pytest.raises(SpcxrError, match="has other columns"),
        open_writer(output, kind, resume=True) as writer,
    ):
        writer.write([{"path": "x", "model": "m"}])
    assert len(paths_in(output, kind)) == 1


def test_a_table_is_for_the_eye(capsys):
    with open_writer(None, "table") as writer:
        writer.write([prediction("[a].png"), prediction("b\n\x1b[31m.png")])
    printed = capsys.readouterr().out
    for words in ("[a].png", r"b\n\x1b[31m.png", "normal", "0.290", "viral", "0.710 (above 0.500)"):
        assert words in printed
    assert f"lab/model@1; operating point youden; {RESEARCH_NOTICE}" in " ".join(printed.split())
    assert "\x1b" not in printed


def prediction(path: str) -> dict:
    targets = {"viral": {"probability": 0.71, "decision": "above", "threshold": 0.5}}
    return {
        "path": path,
        "probabilities": {"normal": 0.29},
        "operating_point": "youden",
        "targets": targets,
        "model": "lab/model@1",
        "warnings": [],
        "note": RESEARCH_NOTICE,
    }


@pytest.mark.parametrize("width", [30, 60, 120])
def test_no_width_of_a_terminal_hides_a_figure(monkeypatch, width):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", stream)
    with open_writer(None, "table") as writer:
        writer.write([prediction("a-long-folder/a-long-name.png"), prediction("b.png")])
    printed = stream.getvalue()
    assert "…" not in printed
    assert printed.count("0.710") == printed.count("0.500") == 2
    assert ("viral: 0.710 (above 0.500)\n" in printed) == (width == 30)
    assert RESEARCH_NOTICE in " ".join(printed.split())


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1", "'=1"])
def test_no_cell_of_csv_is_a_formula(tmp_path, name):
    """Nor is a column's name, which a checkpoint's labels give; a resumed run knows the paths all the same."""
    output = tmp_path / "out.csv"
    made = {"path": name, "score": {name: -0.5}, name: [name], "model": name}
    for resume in (False, True):
        with open_writer(output, "csv", resume) as writer:
            writer.write([made])
    rows = list(csv.reader(io.StringIO(output.read_text())))
    assert [cell[0] for row in rows for cell in row if cell[0] in "=+-@\t" and cell != "-0.5"] == []
    assert rows[1][1] == "-0.5" and len(rows) == 3
    assert finished(output, "csv", name) == {name}


def test_a_terminal_is_shown_no_escape_sequence(monkeypatch):
    """Of file names and of a checkpoint's labels, whatever the format."""
    odd = "\x1b[31m"
    made = {"path": odd, "probabilities": {odd: 0.5}, "model": odd, "population": odd, "warnings": [odd]}
    for kind in ("table", "csv", "jsonl"):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr("sys.stdout", stream)
        with open_writer(None, kind) as writer:
            writer.write([made])
        assert "[31m" in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_table_has_one_verdict():
    targets = {name: {"probability": 0.7, "decision": "above", "threshold": 0.5} for name in ("ill", "normal")}
    assert writers.table_row({"path": "a.png", "probabilities": {"normal": 0.3}, "targets": targets}) == {
        "path": "a.png",
        "normal": "0.300",
        "verdict ill": "0.700 (above 0.500)",
    }


def test_cells_say_what_they_are():
    record = {
        "path": "a.png",
        "fills": {"noise": {"masked": 0.5, "error": 0.1}},
        "lung_area": {"total": 0.3, "image_left": 0.1},
        "embedding": [3.0, 4.0],
    }
    assert writers.table_row(record) == {
        "path": "a.png",
        "noise": "masked 0.500, error 0.100",
        "lung_area total": "0.300",
        "lung_area image_left": "0.100",
        "embedding": "2 values, L2 norm 5.000",
    }


@pytest.mark.parametrize(
    ("output", "stated", "terminal", "expected"),
    [
        (None, None, True, "table"),
        (None, None, False, "jsonl"),
        ("a.CSV", None, True, "csv"),
        ("a.dat", "parquet", True, "parquet"),
        ("a.safetensors", None, False, "safetensors"),
    ],
)
def test_formats(output, stated, terminal, expected):
    assert choose_format(output and Path(output), stated, terminal) == expected


@pytest.mark.parametrize(
    ("output", "stated", "complaint"),
    [(None, "parquet", "--output FILE"), ("a.dat", None, "names no format"), (None, "xml", "no format 'xml'")],
)
def test_formats_that_are_refused(output, stated, complaint):
    with pytest.raises(SpcxrError, match=complaint):
        choose_format(output and Path(output), stated)


def test_nothing_is_destroyed_by_chance(tmp_path):
    (tmp_path / "out.csv").write_text("precious")
    for output, resume, overwrite, complaint in (
        (tmp_path / "out.csv", False, False, "already exists; --resume continues it"),
        (tmp_path / "out.csv", True, True, "give one of them"),
        (None, True, False, "--resume continues a file"),
        (tmp_path, False, False, "a folder, and a file is needed"),
        (tmp_path / "missing" / "out.csv", False, False, "no such folder"),
    ):
        with pytest.raises(SpcxrError, match=complaint):
            check_output(output, resume, overwrite)
    check_output(tmp_path / "out.csv", False, True)


def test_what_may_not_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs this may be root, who may all
    with pytest.raises(SpcxrError, match=r"out\.parquet: may not be written"):
        check_output(tmp_path / "out.parquet", False, False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_record_is_told(tmp_path, kind):
    output = tmp_path / f"out.{kind}"
    output.write_text("no record\n1\n")
    with pytest.raises(SpcxrError, match=f"out.{kind}"):
        finished(output, kind, "m")


def test_pictures_carry_the_note(tmp_path):
    write_png(Image.new("L", (3, 2)), tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").text["Comment"] == RESEARCH_NOTICE
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
