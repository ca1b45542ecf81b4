"""Import rules between the folders, checked on the source.

`ORDER` is the rule: a folder of `spcxr_hf/` imports only what stands before it in the list, and itself. `modeling/`
goes to the Hub alone. The package imports no script, and scripts do not import each other, except that a script of
`benchmarks/` uses `benchmarks/lib/`. What only an extra installs is imported inside the function that needs it.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ORDER = [  # names on one line do not import each other
    {"modeling"},
    {"errors", "drawing"},
    {"files"},
    {"images", "transforms"},
    {"data"},
    {"models", "quality"},
    {"evaluation", "hub"},
    {"training", "inference"},
    {"app"},
    {"space", "__init__"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
IMPORT_NAME = {"pillow": "PIL", "pyyaml": "yaml"}


def imports(source: str) -> Iterator[tuple[str, str, bool]]:
    """Each import as (module, name or "", whether it runs when the module is imported)."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name, at_import) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import and not is_optional(node, child))

    def is_optional(node: ast.AST, child: ast.AST) -> bool:
        if isinstance(node, ast.Try):
            caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
            return child in node.body and bool(re.search("ImportError|ModuleNotFoundError", caught))
        return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )

    return walk(ast.parse(source), True)


def complaint(file: str, module: str, name: str, at_import: bool, installed: set[str]) -> str | None:
    """What is wrong with one import of the file at this path of the tree, or None."""
    parts, top = Path(file).with_suffix("").parts, module.partition(".")[0]
    if parts[0] == "modeling":
        return modeling_complaint(module, name)
    if module.startswith(".") and parts[0] != "spcxr_hf":
        return "scripts are imported by their whole name"
    if top == "training_scripts":
        within = parts[:2] == ("training_scripts", "benchmarks") and module.startswith(
            "training_scripts.benchmarks.lib"
        )
        return None if within else "only benchmarks import scripts, and of these `benchmarks.lib` alone"
    if top in ("tests", "common", "modeling"):
        return f"nothing outside the tests imports {top!r}"
    if top == "spcxr_hf" and parts[0] == "spcxr_hf":
        there, here = [*module.split("."), name][1], parts[1]
        there = there if there in RANK else "__init__"
        return None if there == here or RANK[there] < RANK[here] else f"'{there}' does not stand before '{here}'"
    known = top in ("", "spcxr_hf") or not at_import or top in sys.stdlib_module_names or top in installed
    return None if known else f"'{top}' may be missing: import it inside the function that needs it"


def modeling_complaint(module: str, name: str) -> str | None:
    if module.startswith("."):
        good = re.fullmatch(r"\.\w+", module) and name != "*"
        return None if good else "the Hub copies only what `from .sibling import name` names"
    top = module.partition(".")[0]
    return (  # transformers needs safetensors itself
        None
        if top in {"torch", "transformers", "safetensors"} | sys.stdlib_module_names
        else f"'{top}': only torch and transformers"
    )


def complaints(file: str, source: str, installed: set[str]) -> list[str]:
    found = [(module, complaint(file, module, name, now, installed)) for module, name, now in imports(source)]
    return [f"{file}: {module}: {what}" for module, what in found if what]


@pytest.fixture(scope="module")
def installed() -> set[str]:
    """The top-level names that the dependencies, not the extras, install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in project["dependencies"]}
    return {IMPORT_NAME.get(name, name.replace("-", "_")) for name in names}


def test_every_import_keeps_the_rules(installed):
    files = [path for folder in ("modeling", "spcxr_hf", "training_scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    found = [
        what
        for path in files
        for what in complaints(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"), installed)
    ]
    assert found == []


def test_every_folder_has_its_place():
    parts = {path.stem for path in (ROOT / "spcxr_hf").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts - {"__pycache__"} == RANK.keys() - {"modeling"}


def test_no_circles():
    """Inside a folder the list does not decide."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "spcxr_hf").rglob("*.py")}
    graph = {
        name: {target for module, what, _ in imports(path.read_text(encoding="utf-8"))
               for target in (module, f"{module}.{what}") if target in files}
        for name, path in files.items()
    }  # fmt: skip
    while leaves := [name for name, targets in graph.items() if not targets]:
        for name in leaves:
            del graph[name]
        graph = {name: targets - set(leaves) for name, targets in graph.items()}
    assert sorted(graph) == []


def test_tests_import_no_top_level_modeling():
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    assert [
        name for name, text in sources.items() for module, *_ in imports(text) if module.startswith("modeling")
    ] == []


MODELING, DATA, SCRIPT = "modeling/modeling_spcxr.py", "spcxr_hf/data/table.py", "training_scripts/pretrain.py"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (MODELING, "import math\nimport torch.nn as nn\nfrom transformers.utils import logging"),
        (MODELING, "from .configuration_spcxr import SpcxrConfig"),
        (DATA, "from spcxr_hf.images.reader import read_radiograph\nfrom spcxr_hf.data import labels\nimport numpy"),
        (DATA, "def load():\n    from datasets import Dataset\n    return Dataset"),
        (DATA, "try:\n    import pydicom\nexcept ImportError:\n    pydicom = None"),
        (DATA, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets"),
        (SCRIPT, "from spcxr_hf import SpcxrError\nfrom spcxr_hf.cli import main"),
        ("training_scripts/benchmarks/speed.py", "from training_scripts.benchmarks.lib.timing import clock"),
        ("spcxr_hf/cli.py", "from spcxr_hf import __version__, app"),
    ],
)
def test_good_imports_pass(file, source):
    assert complaints(file, source, {"numpy"}) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (MODELING, "from . import configuration_spcxr", "from .sibling import name"),
        (MODELING, "from .configuration_spcxr import *", "from .sibling import name"),
        (MODELING, "from ..data import labels", "from .sibling import name"),
        (MODELING, "from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig", "only torch and transformers"),
        (MODELING, "def f():\n    import numpy", "only torch and transformers"),
        (DATA, "from spcxr_hf.models.encoders import Encoder", "'models' does not stand before 'data'"),
        (DATA, "from spcxr_hf import SpcxrModel", "'__init__' does not stand before 'data'"),
        (DATA, "def f():\n    import spcxr_hf.cli", "'cli' does not stand before 'data'"),
        ("spcxr_hf/training/engine.py", "from spcxr_hf.inference import demo", "'inference' does not stand"),
        (DATA, "import training_scripts.pretrain", "only benchmarks import scripts"),
        (SCRIPT, "from training_scripts.evaluate import main", "only benchmarks import scripts"),
        (SCRIPT, "from .evaluate import main", "by their whole name"),
        ("training_scripts/benchmarks/speed.py", "from training_scripts.benchmarks import compat", "benchmarks.lib"),
        (DATA, "from tests.common import tiny", "nothing outside the tests imports 'tests'"),
        (DATA, "from modeling.modeling_spcxr import SpcxrModel", "nothing outside the tests imports 'modeling'"),
        (DATA, "import datasets", "'datasets' may be missing"),
        (DATA, "try:\n    import pydicom\nexcept ValueError:\n    pass", "'pydicom' may be missing"),
    ],
)
def test_bad_imports_are_found(file, source, expected):
    assert expected in "\n".join(complaints(file, source, {"numpy"}))
