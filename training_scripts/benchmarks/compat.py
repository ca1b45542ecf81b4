"""Run tests on the oldest and the newest supported versions, each in its own environment.

    python -m training_scripts.benchmarks.compat --environments oldest newest
    python -m training_scripts.benchmarks.compat --render CONTRIBUTING.md

uv makes the environments in `.compat/` (some GB each: torch for Linux carries CUDA; `UV_TORCH_BACKEND=cpu` takes the
small one) and keeps them for the next time:

    oldest  the oldest Python; every direct dependency, those of the extras too, at the lower bound in `pyproject.toml`
    hub1    the newest Python; the newest of everything, but huggingface_hub below 2
    newest  the newest Python; the newest of everything, looked up anew each time

The tests are the quick suite whole and, of the modules in HUB, the slow ones too: publishing cut at any request, the
round trip through a Hub in fresh processes, remote code, and what other libraries do with the model. `--suite hub` runs
these modules alone. Each environment has its own entry in the results file, so they can be run one by one. Exit
status 1 if a test failed. `--render` runs nothing and writes the table of the results between `<!-- compat -->` and
`<!-- /compat -->`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from spcxr_hf import SpcxrError
from spcxr_hf.files import read_json, write_json
from spcxr_hf.training.arguments import parse_arguments, run_script
from training_scripts.benchmarks.lib.timing import replace_block

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "training_scripts" / "benchmarks" / "results" / "compat.json"
OLDEST_PYTHON, NEWEST_PYTHON = "3.10", "3.13"
HUB = [
    f"tests/{name}.py"
    for name in (
        "hub/test_hub_roundtrip",
        "hub/test_install",
        "hub/test_publish",
        "modeling/test_configuration_spcxr",
        "modeling/test_ecosystem",
        "modeling/test_image_processing_spcxr",
        "modeling/test_modeling_spcxr",
        "modeling/test_remote_code",
        "models/test_auto",
        "training/test_engine_push",
        "training/test_push",
    )
]
# Arguments of pytest, run by run.
SUITES = {"quick": (["tests", "-m", "not slow"], [*HUB, "-m", "slow"]), "hub": (HUB,)}
TOLD = ("torch", "torchvision", "transformers", "huggingface_hub", "numpy")
# The suite's own way (see the Makefile): no network, one core for each of the two workers.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
HEAD = (
    "| environment | Python | torch | transformers | huggingface_hub | numpy | tests |\n|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Setup:
    """What an environment is made of: its Python, and options of uv's resolver."""

    python: str
    options: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()


def setups() -> dict[str, Setup]:
    """The environments by name."""
    # Left to itself, uv holds other lower bounds first and then has to take a newer huggingface_hub.
    oldest_hub = f"huggingface_hub=={lower_bound('huggingface_hub')}"
    return {
        "oldest": Setup(OLDEST_PYTHON, ("--resolution", "lowest-direct"), (oldest_hub,)),
        "hub1": Setup(NEWEST_PYTHON, ("--upgrade",), ("huggingface_hub<2",)),
        "newest": Setup(NEWEST_PYTHON, ("--upgrade",)),
    }


def lower_bound(package: str) -> str:
    """The oldest version that `pyproject.toml` allows."""
    found = re.search(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise SpcxrError(f"pyproject.toml: no lower bound for {package}")
    return found[1]


@dataclass
class Arguments:
    """Run tests on the oldest and the newest versions."""

    environments: list[str] = field(
        default_factory=lambda: ["oldest", "hub1", "newest"], metadata={"help": "which to run: oldest, hub1, newest"}
    )
    suite: Literal["quick", "hub"] = field(
        default="quick", metadata={"help": "the quick suite with the slow tests of the Hub, or the Hub's modules alone"}
    )
    folder: str = field(default=str(ROOT / ".compat"), metadata={"help": "where the environments are kept"})
    workers: int = field(default=2, metadata={"help": "processes that run tests"})
    output: str = field(default=str(RESULTS), metadata={"help": "JSON file to write, and to render from"})
    render: str | None = field(default=None, metadata={"help": "run nothing; rewrite the table in this page"})


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a test failed."""
    arguments = parse_arguments(Arguments, argv)
    path = Path(arguments.output)
    if arguments.render:
        replace_block(Path(arguments.render), "compat", table_of(read_json(path)))
        return 0
    known = setups()
    if unknown := set(arguments.environments) - known.keys():
        raise SpcxrError(f"no environment {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    entries: dict[str, Any] = {}
    try:
        for name in arguments.environments:
            python = make_environment(Path(arguments.folder) / name, known[name])
            entries[name] = entry = run_suite(python, arguments.suite, arguments.workers)
            print("\n".join([f"{name}: {json.dumps(entry['versions'])}", f"  {in_words(entry)}", *entry["failures"]]))
    finally:  # and no sooner: a test of the suites compares the page's table with this file
        found = {**read_json(path), **entries}
        results = {each: found[each] for each in known if each in found}
        write_json(path, results)
    print(table_of(results))
    return int(any(entry["failed"] for entry in entries.values()))


# ---- the environment ---------------------------------------------------------------------------------------------


def make_environment(folder: Path, setup: Setup) -> Path:
    """Create or update an environment; returns its interpreter.

    Raises:
        SpcxrError: uv is missing, or there is no such Python, or no versions that fit together.
    """
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise SpcxrError("uv is missing: pip install uv")
    python = folder / "bin" / "python"
    if not python.is_file():
        call([uv, "venv", "--quiet", "--python", find_python(setup.python), str(folder)])
    with tempfile.TemporaryDirectory() as place:
        constraints = Path(place) / "constraints.txt"
        constraints.write_text("\n".join(setup.constraints), encoding="utf-8")
        words = ["--quiet", "--python", str(python), *setup.options, "--constraints", str(constraints)]
        call([uv, "pip", "install", *words, "--editable", f"{ROOT}[test]"])
    return python


def find_python(version: str) -> str:
    """An interpreter of this version: of the PATH, of pyenv, or the version itself, for uv to find or to fetch."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)):
        # What pyenv puts on the PATH is there for every version and fails for those that are not switched on.
        if python and not subprocess.run([python, "--version"], capture_output=True).returncode:
            return str(python)
    return version


def call(command: Sequence[str]) -> None:
    """Run a command with its output shown.

    Raises:
        SpcxrError: it failed.
    """
    print("--", " ".join(Path(word).name if Path(word).is_absolute() else word for word in command), file=sys.stderr)
    if status := subprocess.run(command, cwd=ROOT).returncode:
        raise SpcxrError(f"{' '.join(command[1:3])} failed with status {status}")


# ---- the tests ---------------------------------------------------------------------------------------------------


def run_suite(python: Path, suite: str, workers: int) -> dict[str, Any]:
    """Versions, and how the tests went: passed, failed, skipped, the names of the failures, seconds.

    Raises:
        SpcxrError: pytest did not come to its end.
    """
    begun = time.perf_counter()
    runs = [run_pytest(python, words, workers) for words in SUITES[suite]]
    return {
        "suite": suite,
        "versions": read_versions(python),
        **{kind: sum(run[kind] for run in runs) for kind in ("passed", "failed", "skipped")},
        "failures": sorted(name for run in runs for name in run["failures"]),
        "seconds": round(time.perf_counter() - begun),
    }


def run_pytest(python: Path, selected: Sequence[str], workers: int) -> dict[str, Any]:
    """Counts and failures of one run of pytest."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        words = ["-q", "-n", str(workers), "--dist", "loadfile", "--junitxml", str(report), *selected]
        done = subprocess.run([str(python), "-m", "pytest", *words], cwd=ROOT, env={**os.environ, **OFFLINE})
        if done.returncode not in (0, 1):
            raise SpcxrError(f"pytest ended with status {done.returncode} on {python.parent.parent.name}")
        return read_report(report)


def read_versions(python: Path) -> dict[str, str]:
    """The versions of Python and of what the table tells; torch's without its build."""
    code = "import platform, sys; from importlib.metadata import version; import json; "
    code += "print(json.dumps({'python': platform.python_version(), **{name: version(name) for name in sys.argv[1:]}}))"
    done = subprocess.run([str(python), "-c", code, *TOLD], capture_output=True, text=True, check=True)
    return {name: version.partition("+")[0] for name, version in json.loads(done.stdout).items()}


def read_report(path: Path) -> dict[str, Any]:
    """Counts, and the names of what failed, of a JUnit report."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "failures": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failures),
    }


# ---- the table ---------------------------------------------------------------------------------------------------


def table_of(results: Mapping[str, Any]) -> str:
    """A row for each environment that was run, in Markdown."""
    lines = [HEAD]
    for name, entry in results.items():
        versions = entry["versions"]
        shown = [versions[key] for key in ("python", "torch", "transformers", "huggingface_hub", "numpy")]
        lines.append(f"| {name} | {' | '.join(shown)} | {in_words(entry)} |")
    return "\n".join(lines)


def in_words(entry: Mapping[str, Any]) -> str:
    """How the tests went, in a few words."""
    counts = [f"{entry[kind]} {kind}" for kind in ("passed", "failed", "skipped") if entry[kind] or kind == "passed"]
    return ", ".join(counts) + (" (of the Hub)" if entry["suite"] == "hub" else "")


if __name__ == "__main__":
    run_script(main)
