"""A run with --push_to_hub: its checkpoints and its final model arrive, and a Hub that is down costs nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spcxr_hf import SpcxrError
from spcxr_hf.training import engine, push
from tests.hub_server import Fault, HubServer
from tests.made_up import write_set
from training_scripts import finetune_classification, pretrain
from training_scripts.finetune_classification import arguments_of_runs

ROOT = Path(__file__).resolve().parents[2]
BRIEF = ["--size", "tiny", "--image_size", "32", "--stored_size", "40", "--batch_size", "4", "--warmup_steps", "1"]
BRIEF += ["--micro_batch_size", "4", "--steps", "4", "--save_every", "2", "--log_every", "1"]
BRIEF += ["--push_to_hub", "me/model"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that runs and the processes that push for them talk to."""
    with HubServer() as server:
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": server.add_token("me"),
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "ACCELERATE_USE_CPU": "true",
        }.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def words(tmp_path):
    shard = write_set(tmp_path / "set.parquet", ["train"] * 10)
    return ["--data", str(shard), "--output", str(tmp_path / "run"), *BRIEF]


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_its_final_model(hub, words, tmp_path):
    pretrain.main(words)
    repository = hub.repositories["me/model"]
    titles = [commit.title for commit in repository.commits.values()]
    assert titles[0] == "initial commit" and titles[-1] == "Training: the final model"
    assert set(titles) <= {"initial commit", "Training: step 2", "Training: step 4", "Training: the final model"}
    # What a user loads, and nothing that only this run needs.
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml"} <= set(repository.head.files)
    assert not set(push.LEFT_OUT) & set(repository.head.files)
    pushed = hub.objects[repository.head.files["model.safetensors"].sha256]
    assert pushed == (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "run").glob(f"{push.SNAPSHOT}*")] == []


@pytest.mark.slow
def test_a_run_whose_hub_is_down_ends_as_others_do(hub, words, tmp_path, monkeypatch, capsys):
    hub.faults = [Fault("status", status=503)]
    monkeypatch.setattr(engine, "WAIT_AT_THE_END", 3.0)
    pretrain.main(words)
    output = tmp_path / "run"
    state = json.loads((output / "checkpoint-4" / "training_state.json").read_text())
    assert state["step"] == 4 and state["skipped"] == 0
    said = capsys.readouterr().out
    assert f"saved {output / 'final'}" in said
    assert "the final model was not pushed to me/model (nothing has been pushed)" in said
    assert said.rstrip().endswith(f"hf upload me/model {output / 'final'} .")
    assert (output / "final" / "model.safetensors").is_file()


# Not forked from this process: after some other tests (an ONNX export) torch computes no gradients in a fork.
ASKED_TO_END = """
import json, signal, sys
from spcxr_hf.training import engine
from training_scripts import pretrain

steps, engine.WAIT_WHEN_ASKED = engine.Run.update, 1.0

def update(self, *rates):
    if self.state["step"] == 1:
        signal.raise_signal(signal.SIGTERM)
    return steps(self, *rates)

engine.Run.update = update
pretrain.main(json.loads(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_does_not_wait_long_for_the_hub(hub, words):
    hub.faults = [Fault("slow", seconds=600)]
    command = [sys.executable, "-c", ASKED_TO_END, json.dumps([*words, "--steps", "40"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert re.search(r"step \d was not pushed to me/model", said)
    assert "run the same command to resume" in said


def test_what_cannot_be_pushed_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SpcxrError, match="a/b/c: not the id of a Hub repository"):
        pretrain.main(["--data", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--push_to_hub", "a/b/c"])


def test_each_seed_has_its_repository():
    asked = finetune_classification.Arguments("data", "runs/seeds", seeds=[0, 2], push_to_hub="me/model")
    assert [one.push_to_hub for one in arguments_of_runs(asked)] == ["me/model-seed-0", "me/model-seed-2"]
    asked.push_to_hub = None
    assert [one.push_to_hub for one in arguments_of_runs(asked)] == [None, None]
