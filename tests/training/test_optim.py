"""Schedules, parameter groups, the log, and checkpoints that survive what happens to disks and runs."""

import csv

import pytest
import torch

from spcxr_hf import SpcxrConfig, SpcxrForSemanticSegmentation, SpcxrModel
from spcxr_hf.errors import SpcxrError
from spcxr_hf.training.optim import CosineSchedule, StepLog, layerwise_groups, parameter_groups, set_schedule

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


# Schedules


def test_cosine_with_warm_up():
    schedule = CosineSchedule(peak=1.0, final=0.1, warmup_steps=4, total_steps=24)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(4) == 1.0
    assert schedule(14) == pytest.approx(0.55)
    assert schedule(24) == schedule(99) == pytest.approx(0.1)
    values = [schedule(step) for step in range(4, 25)]
    assert values == sorted(values, reverse=True)


def test_a_schedule_may_rise_and_may_be_all_warm_up():
    rising = CosineSchedule(peak=0.04, final=0.4, warmup_steps=0, total_steps=10)
    assert rising(0) == pytest.approx(0.04)
    assert rising(10) == pytest.approx(0.4)
    assert CosineSchedule(1.0, 0.0, 5, 5)(4) == 1.0


# Groups


def test_what_decays():
    model, _ = make()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[id(parameter)] for parameter in group["params"]} for group in parameter_groups(model))
    assert decayed | plain == set(names.values())
    assert not decayed & plain
    assert {"embeddings.cls_token", "embeddings.position_embeddings", "layernorm.weight"} <= plain
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)


def test_frozen_parameters_are_in_no_group():
    model, _ = make()
    model.embeddings.requires_grad_(False)
    for groups in (parameter_groups(model), layerwise_groups(model, 0.5)):
        assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_layers_learn_more_slowly_the_deeper_they_lie():
    model = SpcxrForSemanticSegmentation(SpcxrConfig(**TINY, segmentation_hidden_size=32))
    groups = layerwise_groups(model, 0.5)
    scale = {id(parameter): group["scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    encoder = model.spcxr.encoder.layers
    for module, expected in (
        (model.spcxr.embeddings, 0.125),
        (encoder[0], 0.25),
        (encoder[1], 0.5),
        (model.spcxr.layernorm, 1.0),
        (model.decoder, 1.0),
    ):
        assert {scale[id(parameter)] for parameter in module.parameters()} == {expected}
    decays = {id(parameter): group["decays"] for group in groups for parameter in group["params"]}
    assert decays == {id(p): group["decays"] for group in parameter_groups(model) for p in group["params"]}


def test_groups_without_a_head_and_without_decay():
    model, _ = make()
    assert {group["scale"] for group in layerwise_groups(model, 1.0)} == {1.0}
    assert {group["scale"] for group in layerwise_groups(model, 0.5)} == {0.125, 0.25, 0.5, 1.0}


def test_a_head_of_its_own_learning_rate():
    model = SpcxrForSemanticSegmentation(SpcxrConfig(**TINY))
    groups = layerwise_groups(model, 0.5, head_scale=10)
    head = {id(parameter) for parameter in model.decoder.parameters()}
    for group in groups:
        assert {id(parameter) in head for parameter in group["params"]} == {group["scale"] == 10}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("layer_decay", [0, -0.5, 1.5])
def test_layer_decay_refused(layer_decay):
    with pytest.raises(SpcxrError, match="layer_decay must lie in"):
        layerwise_groups(make()[0], layer_decay)


def test_the_schedule_reaches_every_group():
    model, _ = make()
    optimizer = torch.optim.AdamW(layerwise_groups(model, 0.5))
    set_schedule(optimizer, 0.8, 0.3)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.8 * group["scale"])
        assert group["weight_decay"] == (0.3 if group["decays"] else 0.0)


# The log


def test_the_log_drops_what_a_resumed_run_does_again(tmp_path):
    log = StepLog(tmp_path / "log.csv", 0)
    for number in (1, 2, 3):
        log.add(step=number, loss=1 / number, dice="" if number < 3 else 0.5)
    again = StepLog(tmp_path / "log.csv", 2)
    again.add(step=3, loss=0.25, dice=0.75)
    with (tmp_path / "log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert rows[-1] == {"step": "3", "loss": "0.25", "dice": "0.75"}
    again.draw(tmp_path / "loss.png", {"loss": "loss", "Dice": "dice"})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_run_starts_a_new_log(tmp_path):
    StepLog(tmp_path / "log.csv", 0).add(step=1, loss=1.0)
    assert StepLog(tmp_path / "log.csv", 0).rows == []
