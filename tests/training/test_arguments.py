"""Command lines: recipes, flags over them, refusals, and every recipe that lies in the tree."""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import yaml

from spcxr_hf import cli
from spcxr_hf.errors import SpcxrError
from spcxr_hf.training.arguments import check_values, parse_arguments, read_recipe, run_script, save_recipe
from spcxr_hf.training.launch import find_recipe, list_recipes

SCRIPTS = Path(__file__).resolve().parents[2] / "training_scripts"
# What begins with `evidence` is a grid of many runs, which `evidence.py` reads.
RECIPES = sorted(path for path in (SCRIPTS / "recipes").glob("*.yaml") if not path.name.startswith("evidence"))


@dataclass
class Arguments:
    """Try things."""

    data: str = field(metadata={"help": "what to read"})
    steps: int = 10
    rate: float = 0.5
    fast: bool = False
    start: str | None = None
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flags_alone():
    assert parse_arguments(Arguments, ["--data", "x", "--steps", "3"]) == Arguments("x", steps=3)


def test_a_recipe_fills_in_and_flags_win(recipe):
    path = recipe("data: here\nsteps: 20\nrate: 1.0e-3\nfast: true\nscale: [0.1, 0.3]\nstart: null\n")
    assert parse_arguments(Arguments, [path]) == Arguments("here", 20, 1e-3, True, None, [0.1, 0.3])
    flags = [path, "--steps", "30", "--fast", "false", "--scale", "0.5", "0.75", "--start", "there"]
    assert parse_arguments(Arguments, flags) == Arguments("here", 30, 1e-3, False, "there", [0.5, 0.75])


def test_what_is_required_may_stand_in_the_recipe_and_a_list_may_end_it(recipe):
    assert parse_arguments(Arguments, [recipe("data: here\nscale: [0.1, 0.3]\n")]) == Arguments(
        "here", scale=[0.1, 0.3]
    )


def test_a_recipe_behind_the_flags_is_refused(recipe):
    """Not passed over: its values would be missing."""
    with pytest.raises((SystemExit, ValueError)):
        parse_arguments(Arguments, ["--data", "x", "--steps", "3", recipe("rate: 0.25\n")])


def test_the_process_command_line_is_the_default(recipe, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", recipe("steps: 20\n"), "--data", "x"])
    assert parse_arguments(Arguments) == Arguments("x", steps=20)


def test_unknown_keys_are_refused_by_name(recipe):
    with pytest.raises(
        SpcxrError, match=r"recipe\.yaml: unknown key 'stepz' \(did you mean steps\?\); known keys: data, fast, "
    ):
        parse_arguments(Arguments, [recipe("stepz: 3\n"), "--data", "x"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz (did you mean --steps?)\n"),
        (["--token=hf_secret", "--stepz=3"], "unrecognized arguments: --token, --stepz (did you mean --steps?)\n"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'\n"),
    ],
)
def test_wrong_flags_are_refused(flags, message, capsys):
    """By name, the nearest one beside it; a value of an unknown flag may be a secret and is not repeated."""
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--data", "x", *flags])
    assert capsys.readouterr().err.endswith(message)


@dataclass
class Training:
    """Train."""

    learning_rate: float = 1e-3
    steps: int = 1000
    warmup_steps: int = 100
    batch_size: int = 8
    init_from: str | None = None


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("--epochs", "--steps"),
        ("--num-train-epochs", "--steps"),
        ("--per_device_train_batch_size", "--batch-size"),
        ("--model", "--init-from"),
        ("--batchsize", "--batch-size"),
    ],
)
def test_flags_of_other_libraries_are_known_by_their_meaning(flag, meant, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Training, [flag, "3"])
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {flag} (did you mean {meant}?)\n")


def test_a_shorter_run_has_a_shorter_warm_up(recipe, capsys):
    assert parse_arguments(Training, ["--steps", "50"]).warmup_steps == 5
    assert "warmup_steps 100 -> 5, in proportion to steps 1000 -> 50; --warmup-steps N" in capsys.readouterr().err
    path = recipe("steps: 200\nwarmup_steps: 40\n")
    assert parse_arguments(Training, [path, "--steps", "100"]).warmup_steps == 20
    for words in ([path], [path, "--steps", "400"], [path, "--steps", "100", "--warmup-steps", "40"]):
        assert parse_arguments(Training, words).warmup_steps == 40  # a longer run may be one that goes on


def test_help_shows_hyphens_and_underscores_are_accepted(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Training, ["--help"])
    shown = capsys.readouterr().out
    assert "--learning-rate" in shown and "--learning_rate" not in shown
    words = [["--learning-rate", "0.5"], ["--learning_rate", "0.5"]]
    assert [parse_arguments(Training, one).learning_rate for one in words] == [0.5, 0.5]


def test_values_of_flags():
    arguments = Arguments("x", steps=3, rate=1.0, scale=[0.0, 2.0], start=None)
    check_values(arguments, {"data": ("x", "y"), "start": ("a", "b")}, {"steps": "[3, inf)", "rate": "(0, 1]"})
    for choices, ranges, message in (
        ({"data": ("a", "b", "c")}, {}, "data must be a, b or c; got 'x'"),
        ({}, {"steps": "[4, inf)"}, "steps must be at least 4; got 3"),
        ({}, {"steps": "(3, inf)"}, "steps must be above 3; got 3"),
        ({}, {"rate": "[0, 1)"}, r"rate must lie in \[0, 1\); got 1.0"),
        ({}, {"scale": "(0, 1]"}, r"scale must lie in \(0, 1\]; got 0.0"),
    ):
        with pytest.raises(SpcxrError, match=f"^{message}$"):
            check_values(arguments, choices, ranges)
    arguments.rate = float("nan")
    with pytest.raises(SpcxrError, match="rate"):
        check_values(arguments, ranges={"rate": "[0, 1]"})


def test_how_scripts_end(capsys):
    def fail():
        raise SpcxrError("set.parquet: no such file")

    def stop():
        raise KeyboardInterrupt

    for main, code in ((fail, "error: set.parquet: no such file"), (stop, 130), (lambda: 3, 3)):
        with pytest.raises(SystemExit) as end:
            run_script(main)
        assert end.value.code == code
    assert capsys.readouterr().err == "stopped; run the same command to resume from what was saved\n"
    run_script(lambda: {"a result": 1})


def test_of_several_processes_the_first_reports_an_error(recipe, monkeypatch, capsys):
    """The launcher ends the others while they wait; one that fails alone reports it after the wait."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def fail():
        raise SpcxrError("set.parquet: no such file")

    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match=r"error: set\.parquet: no such file"):
            run_script(fail)
        with pytest.raises(SystemExit):
            parse_arguments(Arguments, [recipe("data: x\n"), "--typo", "3"])
        assert capsys.readouterr().err.count("unrecognized arguments: --typo") == 1
        assert len(waited) == 2 * int(rank)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for another process")
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback():
    scripts = Path(__file__).parents[2] / "training_scripts"
    command = str(Path(sys.executable).with_name("spcxr"))
    for words in ([str(scripts / "calibrate.py"), "--help"], [command, "predict", "none.png", "--model", "none"]):
        watched = [sys.executable, "-X", "importtime", *words]
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        process = subprocess.Popen(
            watched, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heard
        )
        said = []
        for line in process.stderr:
            said.append(line)
            if line.rstrip().endswith((" numpy.exceptions", " typer.core")):
                process.send_signal(signal.SIGINT)
                break
        said += process.stderr.readlines()
        assert process.wait() == -signal.SIGINT and "Traceback" not in "".join(said), words


def test_wrong_types_in_a_recipe_are_refused_as_flags_are(recipe, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, [recipe("data: x\nsteps: many\n")])
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "found list"),
        ("", "found NoneType"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "not valid YAML .*aliases are not allowed"),
        ("a: &a\n  b: *a\n", "aliases are not allowed"),
        ("steps: 2024-13-45\n", "not valid YAML"),  # from here on what PyYAML raises is no YAMLError
        ("steps: 1" + 5000 * "0" + "\n", "not valid YAML"),
        ("steps: !!int many\n", "not valid YAML"),
        ("steps: !!bool many\n", "not valid YAML"),
        ("a: " + 2000 * "[" + "\n", "not valid YAML"),
        ("a: 12:x:60:60\n? [1]\n: 2\n? {b: 1}\n: 3\n", "not valid YAML"),
        (f"a: {1_000_001 * 'b'}\n", "cannot be read .the file is too large"),
    ],
    ids=lambda value: value[:12] if len(value) > 12 else value,
)
def test_what_is_no_recipe(recipe, text, message):
    with pytest.raises(SpcxrError, match=rf"recipe\.yaml: .*{message}") as refusal:
        read_recipe(Path(recipe(text)))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


@pytest.mark.parametrize("value", ["{a: 1}", "[[1, 2]]", "[1, {a: 2}]", "[--fast, 'true']"])
def test_values_that_no_flag_holds_are_refused(recipe, value):
    with pytest.raises(SpcxrError, match=r"recipe\.yaml: scale must be one value or a list of values; got"):
        parse_arguments(Arguments, [recipe(f"data: x\nscale: {value}\n")])


def test_a_value_that_begins_with_a_dash_is_no_flag(recipe):
    assert parse_arguments(Arguments, [recipe("data: -x\nrate: -0.5\nscale: [-1, 1]\n")]) == Arguments(
        "-x", rate=-0.5, scale=[-1.0, 1.0]
    )
    with pytest.raises(SpcxrError, match="data must be one value"):
        parse_arguments(Arguments, [recipe("data: --help\n")])


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(SpcxrError, match=r"missing\.yaml: cannot be read"):
        parse_arguments(Arguments, [str(tmp_path / "missing.yaml"), "--data", "x"])


def test_what_was_resolved_gives_itself_back(tmp_path):
    arguments = Arguments("x", 7, 1e-7, True, None, [0.25, 0.5])
    save_recipe(arguments, tmp_path / "resolved.yaml")
    assert parse_arguments(Arguments, [str(tmp_path / "resolved.yaml")]) == arguments


def script_of(recipe: Path) -> str:
    """`finetune_segmentation_smoke.yaml` belongs to the script whose name is the longest that it begins with."""
    scripts = [*SCRIPTS.glob("*.py"), *SCRIPTS.glob("benchmarks/*.py")]
    names = {script.stem: ".".join(script.relative_to(SCRIPTS.parent).with_suffix("").parts) for script in scripts
             if recipe.stem.startswith(script.stem)}  # fmt: skip
    assert names, f"{recipe.name} begins with no script's name"
    return names[max(names, key=len)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_script(recipe, tmp_path):
    arguments_class = importlib.import_module(script_of(recipe)).Arguments
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    required = [
        one.name
        for one in dataclasses.fields(arguments_class)
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    flags = [word for name in required if name not in values for word in (f"--{name}", "x")]
    arguments = parse_arguments(arguments_class, [str(recipe), *flags])
    for name, value in values.items():
        assert getattr(arguments, name) == value
        assert type(getattr(arguments, name)) is type(value), f"{name}: write {value!r} as the script declares it"
    save_recipe(arguments, tmp_path / "resolved.yaml")
    assert parse_arguments(arguments_class, [str(tmp_path / "resolved.yaml")]) == arguments


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_how_to_run_it(recipe):
    script = script_of(recipe)
    listed = [one for one in list_recipes() if one.path.samefile(recipe)]
    if script.startswith("training_scripts.benchmarks."):
        assert f"-m {script}" in recipe.read_text(encoding="utf-8")
        assert listed == []
    else:
        ((command, name, *_),) = listed
        assert script == f"training_scripts.{cli.SCRIPTS[command][0]}"
        assert find_recipe(name, cli.SCRIPTS[command][0]).samefile(recipe)


def test_help_is_written():
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Arguments, ["--help"])
    assert stop.value.code == 0
