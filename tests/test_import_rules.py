"""Who may import whom: read from the source, so that no import is needed to find out.

Four floors, every import pointing down, and nothing installed that `pyproject.toml` does not name:

* `modeling/` travels to the Hub by itself, so it knows the standard library, torch, transformers and its
  siblings, the latter in the one form that the Hub follows: `from .sibling import name`.
* Any other module imports lower floors, and its own floor where that makes no circle.
* Training scripts never import each other; only tests import scripts or tests.
* A package that only an extra brings (datasets, evaluate, pydicom, ...) is imported inside a function, or
  guarded by `except ImportError` or `if TYPE_CHECKING`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
OURS = "spcxr_hf"
SCRIPTS = "training_scripts"
PACKAGES = {OURS, f"{OURS}.modeling"}

# A new module gets its floor here.
FLOORS = {
    1: {"decoding", "labels", "bootstrap", "metrics", "evaluate_metrics", "results", "errors"},
    2: {"radiograph", "dicom", "plausibility"}
    | {"curves", "explain", "figures"}
    | {"writers", "lungs", "dicom_seg"}
    | {
        "calibration",
        "bias_correction",
        "centring",
        "shortcuts",
        "corruption",
        "augment",
        "classification",
        "mixing",
        "probing",
        "recipe",
        "auto",
        "convert",
        "pictures",
        "report",
        "encoders",
        "precision",
        "targets",
    },
    3: {"inference", "tasks", "jobs"}
    | {
        "data",
        "masks",
        "sampling",
        "segmenter",
        "sets",
        "splits",
        "leaks",
        "audit",
        "manifests",
        "archive_rows",
        "archives",
        "archives_classes",
        "archives_findings",
        "xrv",
        "shards",
        "streaming",
        "checkpoints",
        "classifiers",
        "predicting",
        "training",
        "checkpoint_folder",
        "hub",
        "publishing",
        "publishing_checks",
        "pushing",
        "recorded_outputs",
        "run",
        "launch",
        "sharding",
        "benchmarking",
        "peers",
        "export",
        "export_onnx",
        "export_vit",
        "evidence",
        "evidence_results",
        "evidence_tables",
        "evaluation_report",
        "neighbours",
        "grid",
    },
    4: {"cli", "demo"} | {"app", "app_answers", "app_html", "space.app"},
}
GROUND, DOORS = 1, 4
MODELING_MAY_IMPORT = {"torch", "transformers"} | sys.stdlib_module_names
IMPORT_NAME = {"pillow": "PIL", "pyyaml": "yaml"}


# ---- reading imports -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported module. `name` is what `from module import name` takes from it; `level` counts leading dots."""

    module: str
    name: str | None
    level: int
    line: int
    needed: bool  # without it, the importing module cannot be imported


def module_name(path: Path) -> str:
    """The name by which a file of the tree is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = (OURS, *parts) if parts[0] == "modeling" else parts
    return ".".join(parts).removesuffix(".__init__")


def read_imports(source: str) -> list[Import]:
    return list(_walk(ast.parse(source), needed=True))


def _walk(node: ast.AST, needed: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, None, 0, node.lineno, needed) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (Import(node.module or "", alias.name, node.level, node.lineno, needed) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, needed and not _is_optional(node, child))


def _is_optional(node: ast.AST, child: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return True
    if isinstance(node, ast.Try):
        caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type)
        return child in node.body and bool(re.search("ImportError|ModuleNotFoundError", caught))
    return isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in ast.unparse(node.test)


# ---- the rules -------------------------------------------------------------------------------------------------


def floor_of(module: str) -> int | None:
    """The floor a module of ours lies on, or None for one that the table does not know."""
    if module == f"{OURS}.modeling" or module.startswith(f"{OURS}.modeling."):
        return GROUND
    if module == OURS or module.startswith(f"{SCRIPTS}."):
        return DOORS
    return next((floor for floor, names in FLOORS.items() if module.removeprefix(f"{OURS}.") in names), None)


def target_of(imported: Import, importer: str, modules: dict[str, str]) -> str:
    """The module behind an import, absolute: a submodule where `from package import name` means one."""
    base = imported.module
    if imported.level:
        package = importer if importer in PACKAGES else importer.rpartition(".")[0]
        above = package.split(".")[: len(package.split(".")) - imported.level + 1]
        base = ".".join([*above, *([base] if base else [])])
    submodule = f"{base}.{imported.name}"
    return submodule if submodule in modules else base


def modeling_complaint(imported: Import) -> str | None:
    if imported.level:
        is_sibling = imported.level == 1 and imported.module and "." not in imported.module and imported.name != "*"
        return None if is_sibling else "the Hub follows only `from .sibling import name`"
    top = imported.module.partition(".")[0]
    return None if top in MODELING_MAY_IMPORT else f"modeling/ knows no '{top}', only torch and transformers"


def home_complaint(importer: str, target: str, modules: dict[str, str]) -> str | None:
    """What is wrong with a module outside `modeling/` importing this one."""
    top = target.partition(".")[0]
    scripts = {name.partition(".")[2] for name in modules if name.startswith(f"{SCRIPTS}.")}
    if top == "modeling":
        return f"no package is called 'modeling'; say {OURS}.modeling"
    # The package `evaluate` has the name of a script, but our library is not imported from the scripts' folder.
    scripts -= {"evaluate"} if importer.startswith(OURS) else set()
    if top == SCRIPTS or top in scripts or (top == "" and importer.startswith(SCRIPTS)):
        return "only tests import training scripts"
    if top in {"tests", "common", "conftest"}:
        return "only tests import tests"
    if top != OURS:
        return None
    here, there = floor_of(importer), floor_of(target)
    if there is None:
        return f"'{target}' is not in FLOORS"
    return f"'{target}' lies on floor {there}, above floor {here}" if here is not None and there > here else None


def dependency_complaint(imported: Import, installed: set[str]) -> str | None:
    top = imported.module.partition(".")[0]
    known = imported.level or not imported.needed or top in sys.stdlib_module_names or top in installed
    return None if known else f"'{top}' may be missing: import it inside the function that needs it"


def complaints(modules: dict[str, str], installed: set[str]) -> list[str]:
    """Everything wrong with the imports of these modules, given as name -> source."""
    found = []
    for importer, source in modules.items():
        if floor_of(importer) is None:
            found.append(f"{importer}: a new module; give it a floor in FLOORS ({Path(__file__).name})")
        for imported in read_imports(source):
            complaint = _complaint_about(imported, importer, modules, installed)
            found += [f"{importer}, line {imported.line}: {complaint}"] if complaint else []
    return found + [f"{' -> '.join(circle)}: a circle" for circle in circles(modules)]


def _complaint_about(imported: Import, importer: str, modules: dict[str, str], installed: set[str]) -> str | None:
    if importer.startswith(f"{OURS}.modeling"):
        return modeling_complaint(imported)
    wrong_way = home_complaint(importer, target_of(imported, importer, modules), modules)
    return wrong_way or dependency_complaint(imported, installed | {OURS})


def circles(modules: dict[str, str]) -> list[list[str]]:
    """The circles in the imports, those inside functions included."""
    graph = {
        importer: {target_of(imported, importer, modules) for imported in read_imports(source)} & modules.keys()
        for importer, source in modules.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph[module] - {module}):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


# ---- the tree holds them ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    files = [path for folder in ("modeling", OURS, SCRIPTS) for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(path): path.read_text(encoding="utf-8") for path in files}


@pytest.fixture(scope="module")
def installed() -> set[str]:
    """The top-level names that the dependencies (not the extras) bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in project["dependencies"]}
    return {IMPORT_NAME.get(name, name.replace("-", "_")) for name in names}


def test_every_import_keeps_the_rules(modules, installed):
    assert complaints(modules, installed) == []


def test_tests_import_no_top_level_modeling():
    tests = {path: read_imports(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    wrong = [path.name for path, found in tests.items() if any(one.module.split(".")[0] == "modeling" for one in found)]
    assert wrong == []


def test_extras_are_not_dependencies(installed):
    assert installed.isdisjoint({"datasets", "evaluate", "pydicom", "sklearn", "timm", "matplotlib"})


# ---- and the rules can fail ------------------------------------------------------------------------------------

MODELING, LABELS, DATA = f"{OURS}.modeling.modeling_spcxr", f"{OURS}.labels", f"{OURS}.data"
SCRIPT = f"{SCRIPTS}.pretrain"
SMALL_TREE = {
    OURS: "",
    f"{OURS}.modeling": "",
    f"{OURS}.modeling.configuration_spcxr": "",
    f"{OURS}.cli": "",
    f"{OURS}.augment": "from .corruption import mask",
    f"{OURS}.corruption": "",
    MODELING: "",
    LABELS: "",
    DATA: "",
    SCRIPT: "",
    f"{SCRIPTS}.evaluate_model": "",
}


def judge(importer: str, source: str) -> list[str]:
    return complaints({**SMALL_TREE, importer: source}, {"torch", "transformers", "numpy"})


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        (MODELING, "import math\nimport torch.nn as nn\nfrom transformers.utils import logging"),
        (MODELING, "from .configuration_spcxr import SpcxrConfig"),
        (DATA, f"from .labels import LABELS\nfrom {OURS}.modeling import configuration_spcxr\nimport numpy as np"),
        (DATA, "def load():\n    from datasets import Dataset\n    return Dataset"),
        (DATA, "try:\n    import pydicom\nexcept ImportError:\n    pydicom = None"),
        (DATA, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import datasets"),
        (SCRIPT, f"from {OURS} import data\nfrom {OURS}.data import load\nimport {OURS}"),
        (OURS, "from .data import load\nfrom . import labels"),
    ],
)
def test_good_imports_pass(importer, source):
    assert judge(importer, source) == []


@pytest.mark.parametrize(
    ("importer", "source", "complaint"),
    [
        (MODELING, "from . import configuration_spcxr", "only `from .sibling import name`"),
        (MODELING, "from .configuration_spcxr import *", "only `from .sibling import name`"),
        (MODELING, "from ..labels import LABELS", "only `from .sibling import name`"),
        (MODELING, "from .sub.module import name", "only `from .sibling import name`"),
        (MODELING, f"from {OURS}.modeling.configuration_spcxr import SpcxrConfig", f"knows no '{OURS}'"),
        (MODELING, "def f():\n    import numpy", "knows no 'numpy'"),
        (LABELS, "from .data import load", "floor 3, above floor 1"),
        (LABELS, f"from {OURS} import data", "floor 3, above floor 1"),
        (LABELS, f"def f():\n    import {OURS}.cli", "floor 4, above floor 1"),
        (DATA, f"from {OURS} import __version__", "floor 4, above floor 3"),
        (DATA, f"import {SCRIPT}", "only tests import training scripts"),
        (DATA, "from tests.common import tiny", "only tests import tests"),
        (DATA, "from modeling.modeling_spcxr import SpcxrModel", "no package is called 'modeling'"),
        (DATA, "from .unheard import of", "is not in FLOORS"),
        (DATA, "import datasets", "'datasets' may be missing"),
        (DATA, "if True:\n    import evaluate", "'evaluate' may be missing"),
        (DATA, "try:\n    import pydicom\nexcept ValueError:\n    pass", "'pydicom' may be missing"),
        (SCRIPT, f"from {SCRIPTS}.evaluate_model import main", "only tests import training scripts"),
        (SCRIPT, "from evaluate_model import main", "only tests import training scripts"),
        (SCRIPT, "from .evaluate_model import main", "only tests import training scripts"),
        (f"{OURS}.newcomer", "", "a new module; give it a floor"),
        (f"{OURS}.corruption", "def f():\n    from .augment import views", "a circle"),
    ],
)
def test_bad_imports_are_found(importer, source, complaint):
    found = judge(importer, source)
    assert found
    assert complaint in "\n".join(found)
