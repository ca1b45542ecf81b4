"""Checkpoints that survive what happens to disks and runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from spcxr_hf import SpcxrConfig, SpcxrModel
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_folder
from spcxr_hf.training.checkpoints import list_checkpoints, resume, save_checkpoint
from spcxr_hf.training.optim import parameter_groups

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}


def make(seed: int = 0, **overrides) -> tuple[SpcxrModel, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = SpcxrModel(SpcxrConfig(**{**TINY, **overrides}))
    return model, torch.optim.AdamW(parameter_groups(model), lr=1e-2)


def step(model: SpcxrModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    pixels = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(number))
    model(pixels).last_hidden_state.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    model, optimizer = make()
    for number in range(5):
        if number == 3:
            save_checkpoint(tmp_path, 3, model, optimizer, {"images_seen": 6})
        step(model, optimizer, number)

    other, other_optimizer = make(seed=1)
    state = resume(tmp_path, other, other_optimizer)
    assert state == ({"step": 3, "images_seen": 6}, None)
    for number in range(3, 5):
        step(other, other_optimizer, number)
    assert equal(model, other)


def test_a_checkpoint_is_a_model(tmp_path):
    model, optimizer = make()
    step(model, optimizer, 0)
    checkpoint = save_checkpoint(tmp_path, 1, model, optimizer, {})
    assert equal(model, SpcxrModel.from_pretrained(checkpoint))


def test_the_newest_are_kept_in_the_order_of_their_steps(tmp_path):
    model, optimizer = make()
    step(model, optimizer, 0)
    (tmp_path / "checkpoint-best").mkdir()  # somebody else's
    for number in (8, 9, 10, 11):
        save_checkpoint(tmp_path, number, model, optimizer, {}, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert (tmp_path / "checkpoint-best").is_dir()
    save_checkpoint(tmp_path, 11, model, optimizer, {"again": True}, keep=3)
    assert json.loads((tmp_path / "checkpoint-11" / "training_state.json").read_text())["again"]


def test_nothing_to_resume(tmp_path):
    assert resume(tmp_path / "new", *make()) is None


@pytest.fixture
def two_checkpoints(tmp_path):
    model, optimizer = make()
    for number in (1, 2):
        step(model, optimizer, number)
        save_checkpoint(tmp_path, number, model, optimizer, {})
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "training_state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_newest_is_named_and_passed_over(two_checkpoints, capsys, name, damage):
    file = two_checkpoints / "checkpoint-2" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:10])
    model, optimizer = make(seed=1)
    assert resume(two_checkpoints, model, optimizer) == ({"step": 1}, None)
    assert equal(model, SpcxrModel.from_pretrained(two_checkpoints / "checkpoint-1"))
    assert "checkpoint-2: damaged checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("sums", ["{}", "[]", '"text"', "null", '{"training_state.json": "0"}'])
def test_a_checkpoint_without_its_checksums_is_damaged(two_checkpoints, capsys, sums):
    (two_checkpoints / "checkpoint-2" / "checksums.json").write_text(sums)
    assert resume(two_checkpoints, *make(seed=1)) == ({"step": 1}, None)
    assert "checkpoint-2: damaged checkpoint" in capsys.readouterr().out


def test_a_half_written_one_is_no_checkpoint(two_checkpoints):
    shutil.copytree(two_checkpoints / "checkpoint-2", two_checkpoints / ".checkpoint-3.partial")
    assert [path.name for path in list_checkpoints(two_checkpoints)] == ["checkpoint-1", "checkpoint-2"]


def test_another_models_folder_is_refused(two_checkpoints):
    """Not passed over: a run that started anew would write over the other's checkpoints."""
    with pytest.raises(SpcxrError, match="checkpoint-2: holds another model than this run's"):
        resume(two_checkpoints, *make(hidden_size=32))


def test_a_full_disk_leaves_the_earlier_ones(two_checkpoints, monkeypatch):
    model, optimizer = make()
    step(model, optimizer, 0)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spcxr_hf.training.checkpoints.save_file", full)
    with pytest.raises(SpcxrError, match=r"checkpoint-3: .*No space left on device.*earlier ones are untouched"):
        save_checkpoint(two_checkpoints, 3, model, optimizer, {})
    assert sorted(path.name for path in two_checkpoints.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert resume(two_checkpoints, *make()) == ({"step": 2}, None)


@pytest.mark.parametrize("left_over", [False, True])
def test_a_folder_that_cannot_be_put_in_place_leaves_the_one_before(tmp_path, monkeypatch, left_over):
    target, rename = tmp_path / "best", Path.rename
    with atomic_folder(target) as folder:
        (folder / "model").write_text("old")
    if left_over:  # killed between the two renames
        target.rename(tmp_path / ".best.previous")

    def refused(path, to):
        if path.name.endswith(".partial"):
            raise OSError(39, "Directory not empty")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(SpcxrError, match="best: the model could not be written"), atomic_folder(target) as folder:
        (folder / "model").write_text("new")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (target / "model").read_text() == "old"
    with atomic_folder(target) as folder:
        (folder / "model").write_text("new")
    assert (target / "model").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_was_just_written_is_never_deleted(two_checkpoints):
    """A damaged one that a run went back from has a higher number."""
    model, optimizer = make()
    (two_checkpoints / "checkpoint-2").rename(two_checkpoints / "checkpoint-9")
    save_checkpoint(two_checkpoints, 3, model, optimizer, {}, keep=1)
    assert [path.name for path in list_checkpoints(two_checkpoints)] == ["checkpoint-3", "checkpoint-9"]
