"""`spcxr pretrain` and the like: the launcher's command, and recipes by name."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.elastic.multiprocessing import api, errors

from spcxr_hf import SpcxrError, cli
from spcxr_hf.data.sets import read_ids
from spcxr_hf.files import installed_recipe, recipe_folder
from spcxr_hf.training import launch
from spcxr_hf.training.arguments import parse_arguments, read_recipe
from spcxr_hf.training.launch import find_recipe, launch_command
from training_scripts import finetune_classification, finetune_segmentation

RECIPES = Path(__file__).resolve().parents[2] / "training_scripts" / "recipes"


@pytest.mark.parametrize(
    ("name", "script", "found"),
    [
        ("screening_cpu_112", "finetune_classification", "finetune_classification_screening_cpu_112.yaml"),
        ("finetune_segmentation_smoke", "finetune_segmentation", "finetune_segmentation_smoke.yaml"),
        ("linear_probe_knn.yaml", "linear_probe", "linear_probe_knn.yaml"),
        ("training_scripts/recipes/pretrain_smoke.yaml", "pretrain", "pretrain_smoke.yaml"),
    ],
)
def test_recipes_are_found_from_anywhere(name, script, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name, script).samefile(RECIPES / found)


def test_ones_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("finetune_classification_smoke.yaml")
    own.write_text("steps: 7\n")
    assert find_recipe(own.name, "finetune_classification") == own
    assert find_recipe("elsewhere/pretrain_smoke.yaml", "pretrain") == Path("elsewhere/pretrain_smoke.yaml")
    assert installed_recipe("elsewhere/covid_copies.txt") == Path("elsewhere/covid_copies.txt")
    assert read_ids("covid_copies.txt") == read_ids(RECIPES / "covid_copies.txt")
    assert read_ids("training_scripts/recipes/covid_copies.txt") == read_ids(RECIPES / "covid_copies.txt")


def test_a_name_means_the_scripts_own_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script in (finetune_classification, finetune_segmentation):
        arguments = parse_arguments(script.Arguments, ["smoke", "--data", "d"])
        assert arguments.output == f"runs/{script.__name__.rpartition('.')[2]}_smoke"
    with pytest.raises(SpcxrError, match="smok: cannot be read .*`spcxr recipes` lists the names"):
        parse_arguments(finetune_classification.Arguments, ["smok", "--data", "d"])


def launcher(*given, **named):
    words, variables = launch_command("evaluate", ["--data", "d", "--splits", "val"], *given, **named)
    assert words[:2] == ["accelerate", "launch"]
    parsed = launch_command_parser().parse_args(words[2:])
    assert parsed.module and parsed.training_script == "spcxr_hf.training_scripts.evaluate"
    assert parsed.training_script_args == ["--data", "d", "--splits", "val"]
    return parsed, variables


def test_the_launcher_s_command(monkeypatch, tmp_path):
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("spcxr_hf.training.launch.worker_count", lambda: 8)
    for processes in (None, 1):
        words, variables = launch_command("evaluate", ["--data", "d"], processes)
        assert words == ["python", "-m", "spcxr_hf.training_scripts.evaluate", "--data", "d"]
        assert variables == {"OMP_NUM_THREADS": "8"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    three, variables = launcher(3)
    assert (three.num_processes, three.multi_gpu) == (3, True)
    assert variables == {"OMP_NUM_THREADS": "2", "ACCELERATE_USE_CPU": "true"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert launcher(2)[1] == {"OMP_NUM_THREADS": "4"}
    monkeypatch.chdir(tmp_path)
    configured, _ = launcher(config_file="eight_gpus")
    assert Path(configured.config_file).samefile(RECIPES / "accelerate" / "eight_gpus.yaml")
    assert configured.num_processes is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launcher(4, config_file="mine.yaml")[1] == {}
    assert launcher(4, config_file="mine.yaml")[0].config_file == "mine.yaml"


def test_the_command_line_hands_all_words_on(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.append((words, environment)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = [
        "finetune",
        "smoke",
        "--data",
        "my images/",
        "--processes",
        "1",
        "--learning_rate=1e-3",
        "-x",
        "--seeds",
        "0",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["spcxr", *given])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    ((words, _),) = started
    assert words[:3] == [sys.executable, "-m", "spcxr_hf.training_scripts.finetune_classification"]
    assert words[3:] == ["smoke", "--data", "my images/", "--learning_rate=1e-3", "-x", "--seeds", "0", "1"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "python -m spcxr_hf.training_scripts.finetune_classification smoke --data 'my images/'" in printed.err


def test_recipes_are_listed_and_shown(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spcxr", "recipes", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    status, listed, _ = run()
    lines = listed.splitlines()
    assert status == 0 and len(lines) >= 20
    assert [line for line in lines if line.startswith("spcxr finetune screening_cpu_112 ")]
    assert not [line for line in lines if "_mae_" in line or "evidence" in line]
    shown = run("pneumonia_gpu_224")[1]
    assert shown == (RECIPES / "finetune_classification_pneumonia_gpu_224.yaml").read_text(encoding="utf-8")
    assert run("smoke")[1].count("# Command: ") == 3
    assert run("breakfast")[::2] == (1, "error: breakfast: no such recipe; `spcxr recipes` lists them\n")


def test_recipes_name_what_every_installation_has():
    """No path of the tree: a wheel has the lists of ids by name, the checkpoints by id."""
    for path in recipe_folder().glob("*.yaml"):
        values = json.dumps(read_recipe(path))
        assert path.name.startswith("evidence") or not any(place in values for place in ("model_cards/", "_scripts/"))


def test_how_the_launcher_ends(monkeypatch):
    """With the status of the first process that failed, or of the signal, and without a traceback of its own."""
    failed = errors.ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file="none")
    killed = errors.ProcessFailure(local_rank=1, pid=1, exitcode=-9, error_file="none")
    for ending, status in (
        (errors.ChildFailedError("pretrain", {1: failed}), 2),
        (errors.ChildFailedError("pretrain", {1: killed}), 137),
        (api.SignalException("stopped", signal.SIGINT), 130),
    ):

        def end(ending=ending):
            raise ending

        monkeypatch.setattr("accelerate.commands.launch.main", end)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            launch.main()
        signal.signal(signal.SIGINT, before)
        assert stop.value.code == status
