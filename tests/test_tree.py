"""What may lie in the tree: nothing of one machine, no pickles, nothing huge, one version."""

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 2**20

# In pieces, so that this file holds none of them.
MACHINE_PATHS = [b"/" + folder + b"/" for folder in (b"root", b"home", b"work", b"Users", b"mnt")] + [
    b"C:" + rb"\Users"
]
REGISTRY_HOSTS = [
    b".".join(parts)
    for parts in (
        (b"pypi", b"org"),
        (b"pythonhosted", b"org"),
        (b"npmjs", b"org"),
        (b"yarnpkg", b"com"),
        (b"anaconda", b"org"),
        (b"debian", b"org"),
    )
]
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}


def holds(text: bytes, words: list[bytes]) -> list[str]:
    """Which of these stand in the text on their own; `https://host/home/` is no machine's path."""
    present = [word for word in words if word in text]  # at once, where a look behind each byte of weights takes long
    return [word.decode() for word in present if re.search(rb"(?<![\w.-])" + re.escape(word), text)]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("words", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_speaks_of_no_machine(files, words):
    found = {str(path.relative_to(ROOT)): held for path in files if (held := holds(path.read_bytes(), words))}
    assert found == {}


def test_machine_paths_are_seen():
    assert holds(b"cd " + MACHINE_PATHS[0] + b"x", MACHINE_PATHS)
    assert holds(b"https://files." + REGISTRY_HOSTS[1], [b"files." + REGISTRY_HOSTS[1]])
    assert not holds(b"https://example.com" + MACHINE_PATHS[1], MACHINE_PATHS)


def test_every_script_reports_errors_without_a_traceback(files):
    scripts = [path for path in files if path.is_relative_to(ROOT / "training_scripts") and path.suffix == ".py"]
    started = {path.name: text for path in scripts if "__main__" in (text := path.read_text(encoding="utf-8"))}
    assert len(started) > 20
    different = [name for name, text in started.items() if not text.endswith("    run_script(main)\n")]
    assert different == []


def test_weights_are_safetensors(files):
    assert [path.name for path in files if path.suffix in PICKLES] == []


def test_code_is_kept_once(files):
    assert [path.parent.name for path in files if path.suffix == ".py" and "model_cards" in path.parts] == []


def test_nothing_is_huge(files):
    assert [path.name for path in files if path.stat().st_size > 50 * MEBIBYTE] == []


def test_no_lock_file(files):
    assert [path.name for path in files if path.name.endswith((".lock", "-lock.json"))] == []


def test_one_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert declared
    assert newest[1] == declared[1] == version("spcxr-hf")
