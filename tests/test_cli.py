"""The command line: what it prints, and one line instead of a traceback."""

import sys

import pytest
from huggingface_hub import constants
from test_hub import make_checkpoint
from typer.testing import CliRunner

import spcxr_hf
from spcxr_hf import cli


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def run_main(monkeypatch, *arguments) -> int:
    """The exit status of `spcxr ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["spcxr", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_version():
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"spcxr {spcxr_hf.__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--help", ["demo", "install", "--version"]),
        ("demo", ["IMAGE", "--output", "--checkpoints"]),
        ("install", ["--force"]),
    ],
)
def test_help_names_everything(command, words):
    found = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200)
    assert found.exit_code == 0
    assert [word for word in words if word not in found.output] == []


def test_install_says_what_is_where(tmp_path, cache, monkeypatch, capsys):
    make_checkpoint(tmp_path / "model_cards" / "base")
    for state in ("installed", "already there"):
        assert run_main(monkeypatch, "install", "--checkpoints", tmp_path / "model_cards") == 0
        revision = (cache / "models--spcxr--base" / "refs" / "main").read_text()
        assert capsys.readouterr().out == f"spcxr/base  revision {revision}  {state}\n"


def test_install_forces_only_when_told(tmp_path, cache, monkeypatch, capsys):
    make_checkpoint(tmp_path / "model_cards" / "base")
    main = cache / "models--spcxr--base" / "refs" / "main"
    make_checkpoint(main.parent.parent / "snapshots" / ("0" * 40), value=2.0)
    main.parent.mkdir()
    main.write_text("0" * 40)
    install = ["install", "--checkpoints", tmp_path / "model_cards"]
    assert run_main(monkeypatch, *install) == 1
    assert main.read_text() == "0" * 40
    assert "spcxr install --force" in capsys.readouterr().err
    assert run_main(monkeypatch, *install, "--force") == 0
    assert main.read_text() != "0" * 40


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.png", None, "No such file"),
        ("text.png", b"no picture", "not a PNG, JPEG, TIFF, WebP, BMP or DICOM file"),
        ("cut.png", b"\x89PNG\r\n\x1a\n", "damaged or cut short"),
        ("cut.dcm", b"\0" * 128 + b"DICM", "DICOM file"),
    ],
)
def test_a_bad_file_is_one_line_on_stderr(tmp_path, monkeypatch, capsys, name, content, complaint):
    pytest.importorskip("pydicom")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run_main(monkeypatch, "demo", tmp_path / name, "--output", tmp_path / "out.png") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"error: {tmp_path / name}: ")
    assert complaint in printed.err
    assert not (tmp_path / "out.png").exists()


def test_demo_hands_everything_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("spcxr_hf.demo.run_demo", lambda *given: calls.append(given))
    cards, output = tmp_path / "cards", tmp_path / "out.png"
    assert run_main(monkeypatch, "demo", tmp_path / "in.png", "--output", output, "--checkpoints", cards) == 0
    assert calls == [(tmp_path / "in.png", output, cards)]
