"""Every code block of the pages: Python is run, commands are parsed by what they start, and the short ones are run.

The pages are read unchanged, in a folder that has what they name (`chest.dcm`, `scans/`, `my_images/`, ...), with
the checkpoints of the tree in a cache of its own, offline. A classifier that is not in the tree yet has a stand-in.
"""

import csv
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
from accelerate.commands.launch import launch_command_parser

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForImageClassification, SpcxrImageProcessor, cli
from spcxr_hf.hub.install import install_checkpoints
from spcxr_hf.training.arguments import check_run, parse_arguments, read_recipe
from spcxr_hf.training.launch import launch_command
from tests.common import TINY
from tests.made_up import picture
from tests.phantom import draw_chest
from training_scripts.benchmarks import checkpoint_table, compat, evidence, explanations, speed, speed_cli, speed_onnx

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
README, GUIDES = ROOT / "README.md", ROOT / "training_scripts" / "GUIDES.md"
BENCHMARKS, CONTRIBUTING = ROOT / "training_scripts" / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, GUIDES, CONTRIBUTING, BENCHMARKS, *sorted(CARDS.glob("*/README.md"))]
CLASSIFIERS = {
    "pneumonia": ["normal", "bacterial pneumonia", "viral pneumonia"],
    "screening": ["abnormal", "opacity"],
    "covid": ["normal", "pneumonia", "covid-19"],
}
IDS = {f"spcxr/{name}" for name in checkpoint_table.ROWS}
# Kinds of blocks that are neither run nor parsed as commands, and why.
NOT_RUN = {"text": "a picture of folders", "csv": "a file of the reader's: its rows are counted",
           "bibtex": "a citation"}  # fmt: skip
# First words of commands that are not ours, and why they are not run.
NOT_OURS = {
    "hf": "the Hub's own command; it needs a login",
    "git": "clones the project",
    "cd": "for the shell",
    "export": "for the shell",
    "unset": "for the shell",
}
# A few steps of a small input: that a command works, not that it learns.
BRIEF = "--steps 2 --warmup_steps 1 --save_every 2 --batch_size 4 --micro_batch_size 2 --image_size 32 --stored_size 48"
BRIEF += " --mixed_precision no --allow_leaks all"


class Block(NamedTuple):
    """A fenced block: its page, the number of its first line, its kind and its text."""

    page: Path
    line: int
    kind: str
    text: str


def blocks(page: Path, *kinds: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    every = [Block(page, text.count("\n", 0, one.start()) + 2, one[1].strip(), one[2]) for one in found]
    return [block for block in every if not kinds or block.kind in kinds]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- commands --------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, with the block's own variables in them; any other variable is "0"."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if one := re.fullmatch(r"(\w+)=(?:\$\(.*\)|\"([^\"]*)\"|(\S*))", line):
            variables[one[1]] = one[2] or one[3] or "0"
            continue
        filled = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], "0"), line)
        words = shlex.split(filled, comments=True)
        yield words[: words.index("|")] if "|" in words else words


def check_command(words: list[str]) -> None:
    """Parse a command by what it starts; nothing runs."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    for word in words:
        assert not re.fullmatch(r"spcxr/[\w-]+", word) or word in IDS, f"{word}: no such checkpoint"
    if words[:3] == ["srun", "bash", "-c"]:
        check_command(shlex.split(words[3]))
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or Path(launch.config_file).is_file(), launch.config_file
        check_script([*(["-m"] if launch.module else []), launch.training_script, *launch.training_script_args])
    elif words[0] == "python":
        check_script(words[1:])
    elif words[0] in ("spcxr", "make", "pip"):
        {"spcxr": check_spcxr, "make": check_make, "pip": check_pip}[words[0]](words[1:])
    else:
        assert words[0] in NOT_OURS, f"{words[0]}: a command that this test does not know"


def check_script(words: list[str]) -> None:
    """`SCRIPT.py ...`, or `-m MODULE ...`."""
    if words[0] == "-m":
        name, words = words[1].removeprefix("spcxr_hf."), words[1:]
        assert name.startswith("training_scripts.benchmarks.") or words[0].startswith("spcxr_hf."), name
    else:
        script = Path(words[0])
        assert script.is_file() and script.parent.name == "training_scripts", script
        name = f"training_scripts.{script.stem}"
    module = importlib.import_module(name)
    arguments = parse_arguments(module.Arguments, words[1:])
    if name.rpartition(".")[2].startswith(("pretrain", "finetune")):
        check_run(arguments)
        getattr(module, "check", bool)(arguments)


def check_spcxr(words: list[str]) -> None:
    command = typer.main.get_command(cli.app).get_command(None, words[0])
    assert command is not None, f"spcxr {words[0]}: no such command"
    context = command.make_context(words[0], words[1:])
    if words[0] in cli.SCRIPTS:
        start, _ = launch_command(cli.SCRIPTS[words[0]][0], context.args, **context.params)
        check_command(start)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name}\s*\?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), word


def check_pip(words: list[str]) -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    for name in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        for extra in name.split(","):
            assert re.search(rf"^{extra} = ", extras, re.MULTILINE), f"no extra {extra}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
class TestPage:
    def test_every_kind_of_block_is_dealt_with(self, page):
        unknown = [(block.line, block.kind) for block in blocks(page) if block.kind not in {"python", "bash", *NOT_RUN}]
        assert unknown == []
        assert page.read_text(encoding="utf-8").count("\n```") % 2 == 0  # none is left open

    def test_commands_fit_what_they_start(self, page, monkeypatch):
        monkeypatch.chdir(ROOT)
        for block in blocks(page, "bash"):
            for words in commands(block.text):
                try:
                    check_command(words)
                except (Exception, SystemExit) as error:
                    pytest.fail(f"{page.name}, block at line {block.line}: {shlex.join(words)}: {error!r}")

    def test_python_is_python(self, page):
        for block in blocks(page, "python"):
            compile(block.text, f"{page}:{block.line}", "exec")

    def test_tables_of_the_reader_have_whole_rows(self, page):
        for block in blocks(page, "csv"):
            rows = list(csv.reader(io.StringIO(block.text)))
            assert len({len(row) for row in rows}) == 1, block.line

    def test_links_lead_somewhere(self, page):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)
        }
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("#"):
                assert link[1:] in anchors, link
            elif "://" not in link:
                assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("spcxr segment scans/ --maks masks/", "maks"),
        ("spcxr divine scans/", "no such command"),
        ("python training_scripts/evaluate.py --model m --data d --spits val", "spits|2"),
        ("accelerate launch training_scripts/finetune.py", "finetune"),
        ("python training_scripts/finetune_segmentation.py --data d --output o", "give --init-from"),
        ("accelerate launch training_scripts/pretrain.py training_scripts/recipes/none.yaml --data d", "none.yaml"),
        ("spcxr embed a.png --model spcxr/large", "no such checkpoint"),
        ("spcxr finetune small_225 --data d", "small_225"),
        ("spcxr evaluate --model m --data d --spits val --processes 2", "spits|2"),
        ("make tea", "tea"),
        ('pip install "spcxr-hf[moon]"', "moon"),
        ("rm -r runs", "does not know"),
    ],
)
def test_wrong_commands_are_found(command, error, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BaseException, match=error):
        check_command(shlex.split(command))


# ---- tables that are rendered ------------------------------------------------------------------------------------


def test_tables_are_what_their_results_say(tmp_path):
    def rendered(original: Path, render: Callable[[Path], None]) -> None:
        page = tmp_path / original.name
        shutil.copyfile(original, page)
        render(page)
        assert page.read_text(encoding="utf-8") == original.read_text(encoding="utf-8"), "make tables"

    def benchmarks(page: Path) -> None:
        checkpoint_table.main(["--render", str(page)])
        speed.main(["--render", str(page), "--results", str(BENCHMARKS.parent / "results")])
        for results in sorted((BENCHMARKS.parent / "results").glob("evidence_*.json")):
            evidence.main(["--results", str(results), "--render", str(page)])

    def guides(page: Path) -> None:
        for script in (speed_onnx, speed_cli, explanations):
            script.main(["--render", str(page)])

    rendered(README, lambda page: checkpoint_table.main(["--render", str(page)]))
    rendered(BENCHMARKS, benchmarks)
    rendered(CONTRIBUTING, lambda page: compat.main(["--render", str(page)]))
    rendered(GUIDES, guides)


def test_the_readme_is_short_and_measured():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 200
    assert "not measured" not in text


def test_checkpoints_that_are_there_have_a_row(tmp_path):
    there = {folder.name for folder in CARDS.iterdir() if folder.is_dir()}
    assert there - checkpoint_table.ROWS.keys() <= {"covid"}  # an example of a shortcut, not for use
    for name in ("base", "lung-segmentation"):
        assert f"| [`spcxr/{name}`]" in checkpoint_table.checkpoint_table(CARDS)
    results = tmp_path / "screening" / "results"
    results.mkdir(parents=True)
    (results.parent / "model.safetensors").touch()
    figures = {"labels": {"abnormal": {"auroc": 0.9124, "auroc_ci95": [0.9, 0.92]}}}
    home = {"splits": {"test": figures, "nih_test": figures}}
    away = {"comparisons": {checkpoint_table.RSNA: {"auroc": 0.5, "auroc_ci95": [0.4, 0.6]}}}
    (results / "evaluation.json").write_text(json.dumps(home))
    (results / "elsewhere.json").write_text(json.dumps(away))
    rows = checkpoint_table.checkpoint_table(tmp_path).splitlines()
    assert len(rows) == 3
    assert rows[2].index("AUROC 0.500 [0.400, 0.600]") < rows[2].index("AUROC 0.912 [0.900, 0.920]")
    (results / "evaluation.json").write_text("{}")
    with pytest.raises(SpcxrError, match=r"evaluation\.json: no figure splits/test"):
        checkpoint_table.checkpoint_table(tmp_path)


def test_goals_stand_beside_what_was_found(tmp_path):
    results = tmp_path / "lung-segmentation" / "results"
    results.mkdir(parents=True)
    (results.parent / "model.safetensors").touch()

    def entry(dice: float) -> dict:
        return {"model": {"dice": dice, "dice_ci95": [dice - 0.01, dice + 0.01]}, "mean_training_mask": {"dice": 0.7}}

    figures = {"test": entry(0.9593), "shift": entry(0.92)}
    (results / "segmentation.json").write_text(json.dumps({"splits": figures}))
    lungs = "| `spcxr/lung-segmentation` |"
    assert checkpoint_table.goal_table(tmp_path).splitlines()[2:] == [
        f"{lungs} `test`, children, Dice | 0.96 | 0.9593 [0.949, 0.969] | mean mask 0.700 | missed |",
        f"{lungs} `shift`, adults, Dice | 0.92 | 0.9200 [0.910, 0.930] | mean mask 0.700 | reached |",
    ]
    del figures["shift"]["model"]["dice_ci95"]
    (results / "segmentation.json").write_text(json.dumps({"splits": figures}))
    with pytest.raises(SpcxrError, match=r"segmentation\.json: no figure splits/shift/model/dice_ci95"):
        checkpoint_table.goal_table(tmp_path)


# ---- the reader's folder -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the pages name."""
    folder = tmp_path_factory.mktemp("world")
    write_radiographs(folder)
    write_manifests(folder)
    cards = tmp_path_factory.mktemp("cards")
    shutil.copytree(CARDS, cards, dirs_exist_ok=True)
    for name, labels in CLASSIFIERS.items():
        if not (cards / name).is_dir():
            write_stand_in(cards / name, labels)
    install_checkpoints(cards, cache_dir=folder / "home" / "hub")
    return folder


def write_radiographs(folder: Path) -> None:
    chest = draw_chest(128)
    chest.save(folder / "chest.png")
    write_dicom(folder / "chest.dcm", np.asarray(chest))
    (folder / "scans").mkdir()
    for seed in range(3):
        draw_chest(96, seed).save(folder / "scans" / f"{seed}.png")
        write_dicom(folder / "scans" / f"study-{seed}.dcm", np.asarray(draw_chest(96, seed)))
    for split in ("train", "val", "test"):
        for number, label in enumerate(("normal", "pneumonia")):
            place = folder / "my_images" / split / label
            place.mkdir(parents=True)
            for seed in range(4):
                save(picture(10 * seed + number, opacity=60 * number)[0], place / f"{seed}.png")


def write_manifests(folder: Path) -> None:
    """`studies.csv` with DICOM files, `lungs.csv` with pictures and masks; two images of each patient."""
    for name in ("studies", "lungs", "lung_masks"):
        (folder / name).mkdir()
    studies, lungs = ["path,patient,label"], ["path,mask,patient"]
    for number in range(24):
        grey, mask = picture(number, opacity=60 * (number // 2 % 2))
        write_dicom(folder / "studies" / f"{number}.dcm", grey)
        studies.append(f"studies/{number}.dcm,p{number // 2},{('normal', 'pneumonia')[number // 2 % 2]}")
        save(grey, folder / "lungs" / f"{number}.png")
        save(mask, folder / "lung_masks" / f"{number}.png")
        lungs.append(f"lungs/{number}.png,lung_masks/{number}.png,p{number // 2}")
    (folder / "studies.csv").write_text("\n".join(studies))
    (folder / "lungs.csv").write_text("\n".join(lungs))


def save(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path)


def write_dicom(path: Path, grey: np.ndarray) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PhotometricInterpretation, file.SamplesPerPixel = "DX", "MONOCHROME2", 1
    file.Rows, file.Columns = grey.shape
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.PixelData = grey.tobytes()
    file.save_as(path, enforce_file_format=True)


def write_stand_in(folder: Path, labels: list[str]) -> None:
    config = SpcxrConfig(**{**TINY, "num_labels": len(labels)}, id2label=dict(enumerate(labels)))
    SpcxrForImageClassification(config).save_pretrained(folder)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def start(words: list[str], world: Path) -> str:
    """Run a command there, offline; what it wrote to standard output."""
    environment = {
        **os.environ,
        "HF_HOME": str(world / "home"),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT"):
        environment.pop(name, None)
    done = subprocess.run(words, cwd=world, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# ---- what runs ---------------------------------------------------------------------------------------------------

# One process for many blocks: importing torch and transformers takes longer than most of them.
RUN_BLOCKS = """
import json, sys, traceback
failed = {}
for page, line, text in json.loads(sys.argv[1]):
    try:
        exec(compile("\\n" * (line - 1) + text, page, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed[page] = failed.get(page, "") + traceback.format_exc()
print(json.dumps(failed))
"""
RUN_MAINS = """
import importlib, json, sys, traceback
failed = {}
for module, words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        importlib.import_module(module).main()
    except SystemExit as leave:
        if leave.code:
            failed[" ".join(words)] = repr(leave.code)
    except BaseException:
        failed[" ".join(words)] = traceback.format_exc()
print(json.dumps(failed))
"""


def run_in_one(runner: str, tasks: list, world: Path) -> dict[str, str]:
    """What failed, by page or command, with its cause."""
    return json.loads(start([sys.executable, "-c", runner, json.dumps(tasks)], world).splitlines()[-1])


@pytest.fixture(scope="module")
def failed_blocks(world) -> dict[str, str]:
    """The Python blocks of all pages, one behind the other, each with nothing but what it imports itself."""
    every = [block for page in PAGES for block in blocks(page, "python")]
    assert every
    return run_in_one(RUN_BLOCKS, [(name_of(block.page), block.line, block.text) for block in every], world)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(page, failed_blocks):
    assert failed_blocks.get(name_of(page), "") == ""


def found_commands(page: Path, beginning: str) -> list[list[str]]:
    every = [words for block in blocks(page, "bash") for words in commands(block.text)]
    return [words for words in every if shlex.join(words).startswith(beginning)]


@pytest.mark.slow
def test_the_command_line_runs(world):
    asked = [
        words
        for words in found_commands(README, "spcxr ")
        if words[1] not in ("install", "recipes", *cli.SCRIPTS) and "--serve" not in words
    ]
    assert {words[1] for words in asked} == {"predict", "segment", "embed", "explain", "reconstruct", "audit"}
    assert run_in_one(RUN_MAINS, [("spcxr_hf.cli", words) for words in asked], world) == {}
    for word in (word for words in asked for word in words):
        if re.search(r"\.(csv|parquet)$|^(masks|audit|by_label)/", word):
            assert (world / word).exists(), word


TRAININGS = [
    (README, "--data my_images/", "finetune"),
    (GUIDES, "--data my_set.parquet --label-column label --split-column split --on-error", "finetune"),
    (GUIDES, "--data my_lungs.parquet", "finetune-segmentation"),
]


@pytest.mark.slow
def test_training_runs(world, failed_blocks):
    """The first as a command, the others in one process, on the sets that the guides' blocks have made."""
    mains = []
    for number, (page, asked, command) in enumerate(TRAININGS):
        begun = f"spcxr {command} small_224"
        (words,) = [words for words in found_commands(page, begun) if asked in shlex.join(words)]
        words += [*BRIEF.split(), "--output", str(world / "runs" / str(number))]
        if number == 0:
            start([sys.executable, "-m", "spcxr_hf.cli", *words[1:]], world)
        else:
            mains.append((f"training_scripts.{cli.SCRIPTS[command][0]}", words[1:]))
    assert run_in_one(RUN_MAINS, mains, world) == {}
    for number in range(len(TRAININGS)):
        output = world / "runs" / str(number)
        assert (output / "final" / "model.safetensors").is_file()
        assert read_recipe(output / "recipe.yaml")["init_from"] == "spcxr/base"
