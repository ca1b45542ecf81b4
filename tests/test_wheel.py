"""From pip alone: the wheel in an environment without the tree, with the checkpoints on a Hub.

The environment has the wheel, installed by pip, and of the tests' own environment what the wheel and its extras `dicom`
and `train` require, nothing else.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from packaging.requirements import Requirement

from spcxr_hf.hub.publish import publish
from tests.hub_server import HubServer
from tests.test_documentation import BRIEF, README, blocks, write_radiographs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CHECKS = """
import importlib.util, sys
from pathlib import Path
import spcxr_hf
home = Path(spcxr_hf.__file__).parent
assert Path(sys.prefix) in home.parents, home
from spcxr_hf.hub.folder import BUNDLED
assert not BUNDLED.exists()
from spcxr_hf.data.sets import read_ids
assert len(read_ids("covid_copies.txt")) > 100
for name in ("training_scripts", "modeling", "tests", "gradio", "onnx", "highdicom", "pytest"):
    assert importlib.util.find_spec(name) is None, name
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copyfile(ROOT / name, tree / name)
    for name in ("spcxr_hf", "modeling", "training_scripts"):
        copytree(ROOT / name, tree / name, ignore=ignore_patterns("__pycache__", "results"))
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (file,) = tree.glob("*.whl")
    return file


def test_what_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    scripts = "spcxr_hf/training_scripts/"
    for folder in ("recipes", "recipes/accelerate", "cards"):
        for path in (ROOT / "training_scripts" / folder).glob("*.*"):
            assert f"{scripts}{folder}/{path.name}" in names
    assert {path.name for path in (ROOT / "training_scripts").glob("*.*")} <= {
        name.removeprefix(scripts) for name in names if name.startswith(scripts)
    }
    assert {name.split("/")[0] for name in names} == {"spcxr_hf", "spcxr_hf-0.1.0.dist-info"}
    assert not [name for name in names if "benchmarks" in name or name.endswith((".safetensors", ".parquet"))]
    assert wheel.stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The folder of a virtual environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for name in required("spcxr-hf", {"dicom", "train"}, set()) - {"spcxr-hf"}:
        one = distribution(name)
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(one.locate_file(top))
    return folder


def required(name: str, extras: set[str], seen: set[str]) -> set[str]:
    """The names of a distribution and of all that it requires, with some of its extras."""
    seen.add(name)
    for requirement in map(Requirement, distribution(name).requires or ()):
        wanted = [
            extra for extra in ("", *extras) if not requirement.marker or requirement.marker.evaluate({"extra": extra})
        ]
        if wanted and requirement.name not in seen:
            required(requirement.name, requirement.extras, seen)
    return seen


@pytest.fixture(scope="module")
def world(environment, tmp_path_factory):
    """A Hub with every checkpoint of the tree, and a folder with somebody's radiographs."""
    folder = tmp_path_factory.mktemp("world")
    write_radiographs(folder)
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        published = publish(ROOT / "model_cards", token=hub.add_token("spcxr", ("spcxr",)))
        assert len(published) >= 5
        yield SimpleNamespace(hub=hub, folder=folder, bin=environment / "bin", token=hub.add_token("me"))


def run(world: SimpleNamespace, words: list[str], home: str = "home", **variables: str) -> subprocess.CompletedProcess:
    """Run a program of the environment in the folder; nothing leads it to the tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "SPCXR"))}
    kept |= {"HF_HOME": str(world.folder / home), "HF_ENDPOINT": world.hub.url, "HF_TOKEN": world.token}
    kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    kept |= {"PATH": f"{world.bin}{os.pathsep}{os.environ['PATH']}", **variables}
    return subprocess.run(
        [str(world.bin / words[0]), *words[1:]], cwd=world.folder, env=kept, capture_output=True, text=True, timeout=600
    )


def test_from_pip_to_a_model_of_ones_own_on_the_hub(world):
    """Quickstart, predict, fine-tune and push, predict with what was pushed."""

    def done(command: str, home: str = "home") -> str:
        found = run(world, shlex.split(command), home)
        assert found.returncode == 0, f"{command}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
        return found.stdout + found.stderr

    quickstart = blocks(README, "python")[0].text
    (world.folder / "quickstart.py").write_text(CHECKS + quickstart)
    printed = done("python quickstart.py").splitlines()
    assert [line for line in printed if "384" in line or "lung" in line] == [
        "torch.Size([1, 384])",
        "torch.Size([1, 49, 384])",
        "['background', 'lung']",
    ]

    done("spcxr predict scans/ --model spcxr/screening --output predictions.csv")
    rows = (world.folder / "predictions.csv").read_text().splitlines()
    revision = world.hub.repositories["spcxr/screening"].head.sha[:12]
    assert len(rows) == 7 and all(f"spcxr/screening@{revision}" in row for row in rows[1:])

    assert re.search("^spcxr finetune small_224 ", done("spcxr recipes"), re.MULTILINE)
    learn = (
        "spcxr finetune small_224 --init-from spcxr/base --data my_images/ --label-column label --split-column split"
    )
    said = done(f"{learn} {BRIEF} --push-to-hub me/mine")
    assert "python -m spcxr_hf.training_scripts.finetune_classification small_224 " in said
    final = world.folder / "runs" / "finetune_classification" / "final"
    assert (final / "model.safetensors").is_file()
    pushed = world.hub.repositories["me/mine"]
    assert pushed.head.files["model.safetensors"].sha256

    done("spcxr predict scans/ --model me/mine --output mine.csv", home="another")
    rows = (world.folder / "mine.csv").read_text().splitlines()
    assert len(rows) == 7 and "pneumonia" in rows[0] and all("me/mine@" in row for row in rows[1:])


def test_without_the_repositories_the_message_names_both_ways(world):
    empty = HubServer()
    with empty:
        failed = run(world, ["spcxr", "embed", "chest.png"], home="empty", HF_ENDPOINT=empty.url)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    for way in ("spcxr install", "HF_ENDPOINT"):
        assert way in failed.stderr
