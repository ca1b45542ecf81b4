"""The script that tries other versions: what it asks of uv, how it reads a report, and the table that it writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spcxr_hf import SpcxrError
from training_scripts.benchmarks import compat

ROOT = Path(__file__).resolve().parents[2]
FAILING = """
import pytest

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.skip("no reason")

@pytest.fixture
def broken(): raise RuntimeError

def test_cannot_begin(broken): pass
"""
ENTRY = {
    "suite": "quick",
    "versions": dict.fromkeys(["python", *compat.TOLD], "1.2"),
    "passed": 3,
    "failed": 0,
    "skipped": 1,
    "failures": [],
    "seconds": 5,
}


def test_the_hubs_modules_are_there():
    assert [name for name in compat.HUB if not (ROOT / name).is_file()] == []


@pytest.mark.slow
def test_the_runs_of_a_suite_are_counted_together(tmp_path, monkeypatch):
    (tmp_path / "test_made_up.py").write_text(FAILING)
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    one = ["test_made_up.py", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-k"]
    monkeypatch.setitem(compat.SUITES, "quick", ([*one, "passes or fails"], [*one, "skips or begin"]))
    found = compat.run_suite(Path(sys.executable), "quick", 1)
    assert {kind: found[kind] for kind in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["failures"] == ["test_made_up::test_cannot_begin", "test_made_up::test_fails"]
    monkeypatch.setitem(compat.SUITES, "quick", ([*one, "nothing_of_this_name"],))
    with pytest.raises(SpcxrError, match="pytest ended with status 5"):
        compat.run_suite(Path(sys.executable), "quick", 1)


def test_the_oldest_is_what_the_project_claims():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = compat.setups()["oldest"]
    assert f'requires-python = ">={oldest.python}"' in project
    assert f'"{oldest.constraints[0].replace("==", ">=")},<3"' in project
    with pytest.raises(SpcxrError, match="no lower bound for moon"):
        compat.lower_bound("moon")


def test_a_report_is_read(tmp_path):
    (tmp_path / "test_made_up.py").write_text(FAILING)
    words = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "--junitxml", str(tmp_path / "report.xml")]
    subprocess.run([sys.executable, "-m", "pytest", *words, str(tmp_path)], capture_output=True, cwd=tmp_path)
    found = compat.read_report(tmp_path / "report.xml")
    assert {kind: found[kind] for kind in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["failures"] == ["test_made_up::test_cannot_begin", "test_made_up::test_fails"]


def test_versions_of_an_environment():
    found = compat.read_versions(Path(sys.executable))
    assert found["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert found.keys() == {"python", *compat.TOLD}
    assert not any("+" in version for version in found.values())


def test_a_python_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    """As pyenv's own, which are on the PATH for versions that are not switched on."""
    shim = tmp_path / "python3.10"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert compat.find_python("3.10") == "3.10"
    place = tmp_path / "pyenv" / "versions" / "3.10.7" / "bin"
    place.mkdir(parents=True)
    (place / "python").symlink_to(sys.executable)
    assert compat.find_python("3.10") == str(place / "python")


def test_failures_set_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compat, "make_environment", lambda folder, setup: folder / "bin" / "python")
    failed = {**ENTRY, "failed": 2, "failures": ["tests.test_hub::test_one", "tests.test_hub::test_two"]}
    entries = {"newest": failed, "oldest": ENTRY}
    monkeypatch.setattr(compat, "run_suite", lambda python, suite, workers: entries[python.parent.parent.name])
    output = ["--output", str(tmp_path / "compat.json")]
    assert compat.main(["--environments", "newest", *output]) == 1
    assert "tests.test_hub::test_two" in capsys.readouterr().out
    assert compat.main(["--environments", "oldest", *output]) == 0  # and what was there stays
    assert list(json.loads((tmp_path / "compat.json").read_text())) == ["oldest", "newest"]
    (tmp_path / "page.md").write_text("<!-- compat -->\n<!-- /compat -->\n")
    compat.main(["--render", str(tmp_path / "page.md"), *output])
    rows = (tmp_path / "page.md").read_text().splitlines()[3:5]
    assert rows[0] == "| oldest | 1.2 | 1.2 | 1.2 | 1.2 | 1.2 | 3 passed, 1 skipped |"
    assert rows[1].endswith("| 3 passed, 2 failed, 1 skipped |")


def test_what_cannot_be_run_is_told(tmp_path, monkeypatch):
    with pytest.raises(SpcxrError, match="no environment moon; there are oldest, hub1, newest"):
        compat.main(["--environments", "moon"])
    monkeypatch.setattr(shutil, "which", lambda *words, **options: None)
    with pytest.raises(SpcxrError, match="uv is missing"):
        compat.make_environment(tmp_path, compat.Setup("3.10"))
