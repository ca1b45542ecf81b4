"""The main job: numbers printed, one picture written, nothing downloaded."""

import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from spcxr_hf.errors import SpcxrError
from spcxr_hf.inference import demo
from spcxr_hf.inference.demo import EXAMPLE, run_demo
from tests.hub.test_install import make_stand_ins


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    return make_stand_ins(tmp_path_factory.mktemp("model_cards"))


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """A cache of one's own, and every connection refused."""

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)


def picture(path: Path, size: tuple[int, int] = (90, 120), bits: int = 8) -> Path:
    """A smooth PNG of random blobs, (width, height)."""
    blobs = np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)
    grey = Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)
    if bits == 16:
        grey = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    grey.save(path)
    return path


# The whole of it


def check_picture(findings: demo.Findings, size: tuple[int, int]) -> None:
    width, height = size
    image = Image.open(findings.output)
    assert (image.format, image.text["Comment"]) == ("PNG", "research use only, not for clinical use")
    assert image.width == 5 * (demo.PANEL_WIDTH + 6) - 6
    assert image.height > demo.PANEL_WIDTH * height / width + 60  # titles above and the notice below
    assert len(findings.panels) == 5
    for title, panel in findings.panels.items():
        assert 0 <= panel.min() < panel.max() <= 1, title


def test_a_picture_of_ones_own(checkpoints, no_network, tmp_path, capsys):
    findings = run_demo(picture(tmp_path / "mine.png", bits=16), tmp_path / "out.png", checkpoints)
    check_picture(findings, (90, 120))
    assert findings.panels["radiograph"].shape == findings.panels["lung mask"].shape[:2] == (469, 352)
    assert findings.embedding.shape == (1, 48)
    assert findings.relevance.shape == (4, 4)
    assert findings.relevance.sum() == pytest.approx(1)
    assert 0.45 < findings.reconstructed.mask.float().mean() < 0.8
    printed = capsys.readouterr()
    assert printed.err == ""
    for line in (
        r"radiograph +mine\.png  PNG, 90 x 120 pixels, 16 bits",
        r"model +spcxr/base  SpcxrForPreTraining, 0\.\d M parameters, revision [0-9a-f]{12}",
        r"model +spcxr/lung-segmentation  SpcxrForSemanticSegmentation, .+",
        r"embedding +shape \(1, 48\), L2 norm \d+\.\d{3}",
        r"lung area +\d+\.\d\d% of the image",
        r"  image left +\d+\.\d\d% of the image, +\d+\.\d% of the lung area \(the patient's right in a frontal view\)",
        r"  image right +\d+\.\d\d% of the image, +\d+\.\d% of the lung area \(the patient's left in a frontal view\)",
        r"reconstruction +\d\d\.\d% of the pixels masked, mean absolute error 0\.\d{3} .+",
        r"picture +.+out\.png",
        r"time +.+ s",
        r"Research use only, not for clinical use\.",
    ):
        assert re.search(f"^{line}$", printed.out, re.MULTILINE), line


def test_the_example_is_a_real_chest_dicom(checkpoints, no_network, tmp_path, capsys):
    pytest.importorskip("data_store", reason="pydicom-data is not installed")
    findings = run_demo(None, tmp_path / "out.png", checkpoints)
    check_picture(findings, (1841, 1955))
    assert findings.file == f"{EXAMPLE}  DICOM MONOCHROME1, 1841 x 1955 pixels, 15 bits"
    assert findings.file in capsys.readouterr().out


def test_the_same_picture_gives_the_same_findings(checkpoints, no_network, tmp_path):
    path = picture(tmp_path / "mine.png")
    first, second = (run_demo(path, tmp_path / f"{run}.png", checkpoints) for run in (1, 2))
    assert first.lungs == second.lungs
    assert all(torch.equal(first.panels[title], second.panels[title]) for title in first.panels)


# What is refused


def test_a_bad_output_is_told_before_the_work(tmp_path):
    with pytest.raises(SpcxrError, match=r"out\.jpg: the picture is a PNG"):
        run_demo(tmp_path / "none.png", tmp_path / "out.jpg")
    with pytest.raises(SpcxrError, match=r"no such folder to write it to"):
        run_demo(tmp_path / "none.png", tmp_path / "missing" / "out.png")


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom.data", None)
    with pytest.raises(SpcxrError, match=r'needs pydicom: pip install "spcxr-hf\[demo\]"'):
        demo.example_radiograph()


def test_the_example_is_not_downloaded(monkeypatch):
    data = pytest.importorskip("pydicom.data")
    asked = []
    monkeypatch.setattr(data, "get_testdata_file", lambda name, download: asked.append((name, download)))
    with pytest.raises(SpcxrError, match="comes with pydicom-data"):
        demo.example_radiograph()
    assert asked == [(EXAMPLE, False)]


def test_checkpoints_that_do_not_serve(checkpoints, no_network, tmp_path):
    image = picture(tmp_path / "mine.png")
    for name in ("base", "lung-segmentation"):
        shutil.copytree(checkpoints / "lung-segmentation", tmp_path / "cards" / name)
    with pytest.raises(SpcxrError, match="spcxr/base: no weights for 8 parameters of SpcxrForPreTraining"):
        run_demo(image, tmp_path / "out.png", tmp_path / "cards")
    shutil.move(tmp_path / "cards" / "base", tmp_path / "cards" / "other")
    with pytest.raises(SpcxrError, match="spcxr/base; installed are spcxr/lung-segmentation, spcxr/other"):
        run_demo(image, tmp_path / "out.png", tmp_path / "cards")
