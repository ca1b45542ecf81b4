"""The page of a run: it holds its figures and pictures, and no place of anybody's machine."""

import html
import re

import pytest

from spcxr_hf.errors import SpcxrError
from spcxr_hf.training.run_report import write_report


def test_a_page(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"")
    recipe = {"data": "somebody/xrays", "output": "/scratch/run", "steps": 4, "init_from": None, "fill_modes": ["a|b"]}
    text = write_report(
        tmp_path, "A run", {"loss": 0.123456789, "steps": 4}, recipe, ["loss.png", "no.png"]
    ).read_text()
    assert text.startswith("# A run\n")
    assert "| loss | 0.12346 |" in text and "| steps | 4 |" in text
    assert "![loss](loss.png)" in text and "no.png" not in text
    assert "somebody" not in text and "scratch" not in text and "init_from" not in text
    assert "['a\\|b']" in text  # a bar would end the cell


def test_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SpcxrError, match=r"report\.md: cannot be written"):
        write_report(tmp_path / "file", "A run", {}, {})


def test_names_from_files_are_text(tmp_path):
    """Labels and names of archives are shown as they are, neither as HTML nor as links or pictures."""
    for words in (
        "<img src=x onerror=alert(1)>",
        "![x](http://a.example/x.png)",
        "\\[x](http://a.example)",
        "a|b\n# c",
    ):
        text = write_report(tmp_path, "A run", {words: words}, {"classes": words}).read_text()
        assert html.unescape(re.sub(r"\\(.)", r"\1", text)).count(words.replace("\n", " ")) == 3
        assert "<img" not in text and "](" not in text and "\n# c" not in text
