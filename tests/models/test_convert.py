"""Weights from elsewhere: names, channels, wrappers, refusals; and that converted models compute the same."""

import json
import logging
import re
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spcxr_hf import (
    SpcxrBackbone,
    SpcxrConfig,
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrModel,
)
from spcxr_hf.models.convert import change_image_size, load_vit_state_dict
from training_scripts.benchmarks import parity

WIDTH, DEPTH, HEADS, PATCH, GRID, MLP = 64, 2, 4, 8, 4, 128
LINEAR = ("weight", "bias")


def vit_weights(channels: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict as timm names it and as the GMML release names its encoder."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID**2, WIDTH),
        "patch_embed.proj.weight": (WIDTH, channels, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
        for layer, (out, into) in {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH),
                                   "mlp.fc1": (MLP, WIDTH), "mlp.fc2": (WIDTH, MLP)}.items():  # fmt: skip
            shapes |= {f"{block}.{layer}.weight": (out, into), f"{block}.{layer}.bias": (out,)}
    return random_weights(shapes, seed)


def release_weights(channels: int = 3) -> dict[str, torch.Tensor]:
    """Encoder and reconstruction head as the release's pretraining saves them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in (0, 2, 4):  # a GELU after each
        shapes |= {f"head_recons.mlp.{index}.weight": (WIDTH, WIDTH), f"head_recons.mlp.{index}.bias": (WIDTH,)}
    shapes |= {
        "head_recons.convTrans.weight": (WIDTH, channels, PATCH, PATCH),
        "head_recons.convTrans.bias": (channels,),
    }
    encoder = {f"backbone.{name}": weight for name, weight in vit_weights(channels).items()}
    return encoder | random_weights(shapes, seed=1)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load(source, **arguments) -> SpcxrForPreTraining:
    return load_vit_state_dict(source, num_attention_heads=HEADS, **arguments)


def without(weights, *names):
    return {name: weight for name, weight in weights.items() if name not in names}


@pytest.fixture
def images():
    return torch.randn(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(2))


# ---- names and shapes --------------------------------------------------------------------------------------------


def test_every_weight_of_the_release_has_its_place():
    weights = release_weights()
    model = load(weights)
    ours = model.state_dict()
    expected = {
        "spcxr.embeddings.cls_token": "backbone.cls_token",
        "spcxr.embeddings.position_embeddings": "backbone.pos_embed",
        "spcxr.embeddings.projection": "backbone.patch_embed.proj",
        "spcxr.layernorm": "backbone.norm",
        "reconstruction_head.layers.0": "head_recons.mlp.0",
        "reconstruction_head.layers.1": "head_recons.mlp.2",
        "reconstruction_head.layers.2": "head_recons.mlp.4",
        "reconstruction_head.projection": "head_recons.convTrans",
    }
    for index in range(DEPTH):
        for mine, theirs in {"norm1": "norm1", "norm2": "norm2", "attention.qkv": "attn.qkv", "mlp.fc1": "mlp.fc1",
                             "mlp.fc2": "mlp.fc2", "attention.projection": "attn.proj"}.items():  # fmt: skip
            expected[f"spcxr.encoder.layers.{index}.{mine}"] = f"backbone.blocks.{index}.{theirs}"
    parts = {mine + part: theirs + part for mine, theirs in expected.items() for part in ("", ".weight", ".bias")}
    names = {mine: theirs for mine, theirs in parts.items() if theirs in weights}
    assert names.keys() == ours.keys()
    assert set(names.values()) == weights.keys()
    for mine, theirs in names.items():
        assert torch.equal(ours[mine], weights[theirs]), mine
        assert ours[mine].data_ptr() != weights[theirs].data_ptr(), mine


def test_configuration_follows_from_the_shapes():
    config = load(release_weights(), drop_path_rate=0.1, pooling="cls").config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, DEPTH, HEADS)
    assert (config.patch_size, config.image_size, config.intermediate_size) == (PATCH, GRID * PATCH, MLP)
    assert (config.num_channels, config.reconstruction_depth, config.qkv_bias) == (3, 3, True)
    assert (config.drop_path_rate, config.pooling, config.layer_norm_eps) == (0.1, "cls", 1e-6)


def test_heads_are_64_wide_by_default():
    assert load_vit_state_dict(vit_weights()).config.num_attention_heads == 1


def test_without_qkv_bias():
    weights = without(vit_weights(), *(f"blocks.{index}.attn.qkv.bias" for index in range(DEPTH)))
    assert load(weights).config.qkv_bias is False


def test_half_precision_becomes_float32():
    model = load({name: weight.half() for name, weight in release_weights().items()})
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"SiT_model": weights, "optimizer": {"state": {}}, "epoch": 3},
        lambda weights: {"model": {f"module.{name}": weight for name, weight in weights.items()}, "args": None},
        lambda weights: {"student": {}, "teacher": {f"module.backbone.{name}": w for name, w in weights.items()}},
        lambda weights: {"state_dict": {f"_orig_mod.model.{name}": weight for name, weight in weights.items()}},
        lambda weights: {f"encoder.{name}": weight for name, weight in weights.items()},
        lambda weights: weights | {"head.weight": torch.zeros(5, WIDTH), "head.bias": torch.zeros(5)},
        lambda weights: weights | {"head.mlp.0.weight": torch.zeros(5), "head.last_layer.weight_g": torch.zeros(5)},
        lambda weights: weights | {"mask_token": torch.zeros(1), "decoder_blocks.0.norm1.weight": torch.zeros(1)},
    ],
    ids=["release", "distributed", "teacher", "compiled", "encoder", "classifier", "projection head", "decoder"],
)
def test_wrappers_and_what_is_left_out(wrap):
    plain, wrapped = load(vit_weights()).spcxr.state_dict(), load(wrap(vit_weights())).spcxr.state_dict()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_missing_head_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        load(release_weights())
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        load(vit_weights())
    assert "newly initialised" in caplog.text


# ---- files -------------------------------------------------------------------------------------------------------


def test_safetensors_file_and_back(tmp_path, images):
    save_file(release_weights(), tmp_path / "vit.safetensors")
    model = load(tmp_path / "vit.safetensors", num_channels=1)
    assert not model.training
    model.save_pretrained(tmp_path / "converted")
    again = SpcxrForPreTraining.from_pretrained(tmp_path / "converted")
    grey = images[:, :1]
    with torch.no_grad():
        assert torch.equal(again(grey).reconstruction, model(grey).reconstruction)
    for model_class in (SpcxrModel, SpcxrForImageClassification, SpcxrForSemanticSegmentation):
        other = model_class.from_pretrained(tmp_path / "converted")
        assert torch.equal(other.base_model.embeddings.cls_token, model.spcxr.embeddings.cls_token)


def test_path_may_be_a_string(tmp_path):
    save_file(vit_weights(), tmp_path / "vit.safetensors")
    assert load(str(tmp_path / "vit.safetensors")).config.hidden_size == WIDTH


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ""])
def test_pickles_are_refused(tmp_path, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(vit_weights(), path)
    with pytest.raises(SpcxrError, match=r"only \.safetensors.*weights_only=True.*load_vit_state_dict"):
        load(path)


def test_the_advice_for_pickles_works(tmp_path):
    from argparse import Namespace

    torch.save({"SiT_model": release_weights(), "epoch": 1, "args": Namespace(lr=1.0)}, tmp_path / "checkpoint.pth")
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(tmp_path / "checkpoint.pth", map_location="cpu", weights_only=True)
    assert load(checkpoint).config.reconstruction_depth == 3


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "vit.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpcxrError, match=f"{re.escape(str(path))}: cannot be read"):
        load(path)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "norm.bias"), r"missing: norm\.bias"),
        (lambda w: without(w, "blocks.1.mlp.fc2.weight"), r"missing: blocks\.1\.mlp\.fc2\.weight"),
        (lambda w: without(w, "cls_token"), "missing: cls_token"),
        (lambda w: without(w, "pos_embed"), "pos_embed is missing"),
        (lambda w: {}, r"patch_embed\.proj\.weight is missing"),
        (lambda w: w | {"blocks.0.ls1.gamma": torch.ones(WIDTH)}, r"unknown: blocks\.0\.ls1\.gamma"),
        (lambda w: w | {f"extra.{index}": torch.ones(1) for index in range(10)}, "extra.7 and 2 more"),
        (lambda w: w | {"blocks.0.mlp.fc2.bias": torch.ones(3)}, r"fc2\.bias \(3,\) instead of \(64,\)"),
        (lambda w: w | {"pos_embed": torch.zeros(1, 2 + GRID**2, WIDTH)}, "pos_embed has 18 positions"),
        (lambda w: w | {"pos_embed": torch.zeros(1, 1, WIDTH)}, "pos_embed has 1 positions"),
        (lambda w: w | {"patch_embed.proj.weight": torch.zeros(WIDTH, 3)}, "expected 4 dimensions"),
        (lambda w: w | {"patch_embed.proj.weight": torch.zeros(WIDTH, 2, PATCH, PATCH)}, "takes 2 channels"),
        (lambda w: w | {"patch_embed.proj.weight": torch.zeros(WIDTH, 3, PATCH, 4)}, "of another shape: patch_embed"),
        (lambda w: w | {"module.norm.bias": torch.zeros(WIDTH)}, "'norm.bias' too"),
        (lambda w: {"epoch": 3, "weights": w}, "'epoch' is a int"),
        (lambda w: {"model": {}}, "'model' is a dict"),
        (lambda w: w | {"head_recons.mlp.0.bias": torch.zeros(WIDTH)}, r"missing: head_recons\.convTrans\.weight"),
        (lambda w: list(w), "got list"),
    ],
)
def test_refused_by_name(change, message):
    with pytest.raises(SpcxrError, match=message):
        load(change(vit_weights()))


@pytest.mark.parametrize("channels", [None, 1])
def test_wrong_head_is_named(channels):
    weights = release_weights() | {"head_recons.convTrans.bias": torch.zeros(5)}
    with pytest.raises(SpcxrError, match=r"head_recons\.convTrans\.bias \(5,\) instead of"):
        load(weights, num_channels=channels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_channels": 2}, "3 cannot become 2"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": 64}, "hidden_size follows from the weights"),
        ({"drop_path": 0.1}, "drop_path is no field"),
        ({"drop_path_rate": 2.0}, "drop_path_rate"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(SpcxrError, match=message):
        load_vit_state_dict(vit_weights(), **arguments)


def test_odd_width_needs_the_heads():
    weights = {"patch_embed.proj.weight": torch.zeros(48, 1, PATCH, PATCH), "pos_embed": torch.zeros(1, 5, 48)}
    with pytest.raises(SpcxrError, match="say num_attention_heads"):
        load_vit_state_dict(weights)


def test_grey_stays_grey():
    assert load(vit_weights(channels=1), num_channels=1).config.num_channels == 1
    with pytest.raises(SpcxrError, match="1 cannot become 3"):
        load(vit_weights(channels=1), num_channels=3)


# ---- the same computation ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_channel_does_what_three_equal_ones_do(images):
    grey = images[:, :1]
    three, one = load(release_weights()), load(release_weights(), num_channels=1)
    repeated = grey.expand(-1, 3, -1, -1)
    tokens = three.spcxr(repeated).last_hidden_state
    assert (one.spcxr(grey).last_hidden_state - tokens).abs().max() <= parity.LIMIT
    reconstruction = three(repeated).reconstruction.mean(dim=1, keepdim=True)
    assert (one(grey).reconstruction - reconstruction).abs().max() <= parity.LIMIT
    # ... and colours do make a difference, so that there was something to sum.
    assert (one.spcxr(grey).last_hidden_state - three.spcxr(images).last_hidden_state).abs().max() > 0.01


@pytest.fixture
def tiny_timm():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=GRID * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5
    ).eval()
    parity.randomise(vit, torch.Generator().manual_seed(3))
    return vit


@torch.no_grad()
def test_tiny_timm(tiny_timm, images):
    converted = load(tiny_timm.state_dict(), pooling="cls").spcxr(images)
    theirs = tiny_timm.forward_features(images)
    assert (converted.last_hidden_state - theirs).abs().max() <= parity.LIMIT
    assert (converted.pooler_output - tiny_timm.forward_head(theirs, pre_logits=True)).abs().max() <= parity.LIMIT


@torch.no_grad()
@pytest.mark.parametrize("name", ["pos_embed", "norm.bias", "blocks.1.norm2.weight", "blocks.0.attn.qkv.bias"])
def test_a_wrong_weight_shows(tiny_timm, images, name):
    theirs = tiny_timm.forward_features(images)
    weights = tiny_timm.state_dict()
    weights[name] = weights[name].roll(1, dims=-1)
    assert (load(weights).spcxr(images).last_hidden_state - theirs).abs().max() > 100 * parity.LIMIT


def test_vit_small():
    pytest.importorskip("timm")
    generator = torch.Generator().manual_seed(0)
    differences = parity.compare_timm(torch.randn(1, 3, 224, 224, generator=generator), generator)
    assert len(differences) == 4
    assert all(one.difference <= parity.LIMIT for one in differences), differences
    assert all(one.value > 1 for one in differences), differences


# ---- the parity script -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("difference", "status"), [(0.0, 0), (1e-5, 0), (1.1e-5, 1), (float("nan"), 1)])
def test_parity_fails_above_the_limit(monkeypatch, tmp_path, capsys, difference, status):
    pytest.importorskip("timm")  # its version goes into the results
    monkeypatch.setattr(parity, "compare_timm", lambda *_: [parity.Difference("CLS", difference, 1.0)])
    monkeypatch.setattr(sys, "argv", ["parity.py", "--output", str(tmp_path / "parity.json")])
    assert parity.main() == status
    assert ("ABOVE" in capsys.readouterr().out) == bool(status)
    result = json.loads((tmp_path / "parity.json").read_text())
    assert result["limit"] == 1e-5
    assert [one["what"] for one in result["differences"]] == ["CLS"]


def test_no_checkout_of_the_release(tmp_path):
    with pytest.raises(SpcxrError, match=r"no checkout .* \(main\.py, utils\.py"), parity.import_release(tmp_path):
        pass


def test_importing_the_release_leaves_no_trace(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text("import utils\nfrom datasets import load_dataset, datasets_utils\n")
    (tmp_path / "utils.py").write_text("")
    (tmp_path / "vision_transformer.py").write_text("")
    monkeypatch.setitem(sys.modules, "datasets", json)  # any module will do
    path = list(sys.path)
    with parity.import_release(tmp_path) as release:
        assert release.utils.__file__ == str(tmp_path / "utils.py")
    assert sys.modules["datasets"] is json
    assert "utils" not in sys.modules
    assert sys.path == path


# ---- another image size ------------------------------------------------------------------------------------------


@pytest.fixture
def config():
    return SpcxrConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )


@torch.no_grad()
@pytest.mark.parametrize("model_class", [SpcxrModel, SpcxrForPreTraining, SpcxrForImageClassification, SpcxrBackbone])
def test_changed_size_equals_interpolating_on_the_way(config, model_class):
    model = model_class(config).eval()
    nn.init.normal_(model.base_model.embeddings.position_embeddings)
    images = torch.randn(1, 1, 48, 48)
    before = [output for output in model(images).to_tuple() if isinstance(output, torch.Tensor)]
    change_image_size(model, 48)
    after = [output for output in model(images).to_tuple() if isinstance(output, torch.Tensor)]
    assert model.base_model.embeddings.position_embeddings.shape == (1, 37, 32)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_same_size_is_the_identity(config):
    model = SpcxrModel(config)
    positions = model.embeddings.position_embeddings.detach().clone()
    change_image_size(model, 32)
    assert torch.equal(model.embeddings.position_embeddings, positions)


def test_changed_size_is_saved(config, tmp_path):
    model = SpcxrModel(config).eval()
    change_image_size(model, 48)
    model.save_pretrained(tmp_path)
    again = SpcxrModel.from_pretrained(tmp_path)
    assert again.config.image_size == 48
    assert torch.equal(again.embeddings.position_embeddings, model.embeddings.position_embeddings)


@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_positions_stay_frozen(config, trainable):
    model = SpcxrModel(config)
    model.requires_grad_(trainable)
    change_image_size(model, 48)
    assert model.embeddings.position_embeddings.requires_grad is trainable


@pytest.mark.parametrize("size", [0, -8, 44])
def test_impossible_sizes(config, size):
    with pytest.raises(SpcxrError, match=f"image_size \\({size}\\)"):
        change_image_size(SpcxrModel(config), size)
