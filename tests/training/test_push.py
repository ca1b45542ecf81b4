"""Pushing in the background: training never waits for the Hub, and its last state arrives when the Hub is there."""

import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from spcxr_hf import SpcxrError
from spcxr_hf.training import push
from spcxr_hf.training.push import HubPusher
from tests.hub_server import Fault, HubServer

pytestmark = pytest.mark.slow  # many starts of a second each

QUICK = 2.0  # seconds: much less than these Hubs take, and enough on a busy machine


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that the pushing processes talk to; the token is in this process's environment alone."""
    with HubServer() as server:
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": server.add_token("me"),
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",  # the suite's own way is offline
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }.items():
            monkeypatch.setenv(name, value)
        yield server


def save(folder: Path, step: int) -> Path:
    """A checkpoint as `save_checkpoint` leaves it."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(f'{{"step": {step}}}')
    (checkpoint / "model.safetensors").write_bytes(bytes([step % 256]) * 50_000)
    (checkpoint / "optimizer.safetensors").write_bytes(b"moments" * 50_000)
    return checkpoint


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def quickly(action, *arguments):
    start = time.perf_counter()
    result = action(*arguments)
    assert time.perf_counter() - start < QUICK
    return result


def weights_on(hub: HubServer) -> bytes:
    return hub.objects[hub.repositories["me/model"].head.files["model.safetensors"].sha256]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(f"{push.SNAPSHOT}*")]


def has_pushed(pusher: HubPusher, name: str) -> bool:
    pusher._collect()
    return pusher.pushed == name


def test_each_state_arrives_and_checkpoints_may_go(hub, tmp_path):
    pusher = HubPusher("me/model", private=True)
    checkpoint = save(tmp_path / "run", 1)
    quickly(pusher.push, checkpoint, "step 1")
    shutil.rmtree(checkpoint)
    wait_for(lambda: has_pushed(pusher, "step 1"))
    repository = hub.repositories["me/model"]
    assert repository.private
    assert set(repository.head.files) == {".gitattributes", "config.json", "model.safetensors"}
    assert weights_on(hub) == b"\x01" * 50_000
    assert repository.head.title == "Training: step 1"
    pusher.push(save(tmp_path / "run", 2), "step 2")
    assert pusher.close(wait=60)
    assert weights_on(hub) == b"\x02" * 50_000
    assert leftovers(tmp_path / "run") == []
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors").is_file()


@pytest.mark.slow
def test_the_newest_state_wins(hub, tmp_path):
    hub.faults = [Fault("slow", where="/repos/create", seconds=4.0)]
    pusher = HubPusher("me/model")
    for step in range(1, 6):
        quickly(pusher.push, save(tmp_path / "run", step), f"step {step}")
        if step == 1:
            wait_for(lambda: hub.requests)
    assert pusher.close(wait=60)
    assert pusher.pushed == "step 5"
    assert weights_on(hub) == b"\x05" * 50_000
    titles = [commit.title for commit in hub.repositories["me/model"].commits.values()]
    assert titles == ["initial commit", "Training: step 1", "Training: step 5"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=503),
        pytest.param(Fault("cut"), marks=pytest.mark.slow),
        pytest.param(Fault("cut_upload", where="PUT /storage"), marks=pytest.mark.slow),
        pytest.param(Fault("slow", seconds=600), marks=pytest.mark.slow),
    ],
    ids=lambda fault: fault.kind,
)
def test_a_hub_in_trouble_does_not_matter_and_the_last_state_follows(hub, tmp_path, caplog, capsys, fault):
    caplog.set_level(logging.WARNING, logger="spcxr_hf.training.push")
    hub.faults = [fault]
    pusher = HubPusher("me/model", timeout=8.0, retry_after=0.2)
    for step in (1, 2, 3):
        quickly(pusher.push, save(tmp_path / "run", step), f"step {step}")
        wait_for(lambda: pusher._collect() or caplog.records)
    assert len(caplog.records) == 1
    assert "not pushed to me/model" in caplog.text and "Training continues" in caplog.text
    hub.faults, pusher._timeout = [], 90.0  # a client that starts on a busy machine takes more than 8 s
    assert pusher.close(wait=90)
    assert weights_on(hub) == b"\x03" * 50_000
    assert "works again: step 3 is there" in caplog.text
    assert leftovers(tmp_path / "run") == []
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_what_was_not_pushed_is_kept_and_named(hub, tmp_path, capsys, caplog, monkeypatch):
    """The printed command pushes it later; the token is in nothing that was said or written."""
    token = next(iter(hub.tokens))
    hub.faults = [Fault("status", status=500, message=f"internal error, your header was Bearer {token}")]
    pusher = HubPusher("me/model", retry_after=0.2)
    pusher.push(save(tmp_path / "run", 7), "step 7")
    start = time.monotonic()
    assert not pusher.close(wait=4)
    assert time.monotonic() - start < 12
    said = capsys.readouterr()
    assert "step 7 was not pushed to me/model (nothing has been pushed); push it later with" in said.out
    saved = tmp_path / "run" / "checkpoint-7"
    assert f"    hf upload me/model {saved} . --exclude optimizer.safetensors\n" in said.out
    assert (saved / "model.safetensors").read_bytes() == b"\x07" * 50_000
    assert leftovers(tmp_path / "run") == []
    assert token not in said.out + said.err + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(token.encode() in path.read_bytes() for path in files)

    hub.faults = []
    printed = next(line.split() for line in said.out.splitlines() if line.startswith("    hf upload"))
    subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", *printed[1:]], check=True, capture_output=True)
    repository = hub.repositories["me/model"]
    assert set(repository.head.files) == {".gitattributes", "config.json", "model.safetensors"}
    assert weights_on(hub) == b"\x07" * 50_000


def test_a_push_under_way_is_ended_in_time(hub, tmp_path):
    hub.faults = [Fault("slow", seconds=600)]
    pusher = HubPusher("me/model")
    pusher.push(save(tmp_path / "run", 1), "step 1")
    wait_for(lambda: hub.requests)
    start = time.monotonic()
    assert not pusher.close(wait=0.5)
    assert time.monotonic() - start < 8
    assert pusher._process.poll() is not None
    assert leftovers(tmp_path / "run") == []


def test_a_disk_without_links_and_a_folder_that_is_gone(tmp_path, monkeypatch, hub, caplog):
    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(push.os, "link", refuse)
    checkpoint = save(tmp_path / "run", 1)
    (checkpoint / "results").mkdir()
    (checkpoint / "results" / "a.json").write_text("{}")
    (tmp_path / "run" / push.SNAPSHOT).mkdir()  # of a run that was killed
    (tmp_path / "run" / push.SNAPSHOT / "old.json").touch()
    snapshot = push.take_snapshot(checkpoint)
    assert sorted(path.name for path in snapshot.rglob("*") if path.is_file()) == [
        "a.json",
        "config.json",
        "model.safetensors",
    ]
    pusher = HubPusher("me/model")
    pusher.push(tmp_path / "nowhere" / "checkpoint", "step 1")
    assert "nowhere/checkpoint: No such file or directory" in caplog.text
    assert not pusher.close(wait=1)
    assert hub.requests == []


def test_what_cannot_work_is_told_before_training(hub, monkeypatch, tmp_path):
    with pytest.raises(SpcxrError, match="a/b/c: not the id of a Hub repository"):
        HubPusher("a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(SpcxrError, match="no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"):
        HubPusher("me/model")
