"""Encoders of several families: images in, features out, prefix tokens apart, masks off, refusals in one line."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining, SpcxrImageProcessor
from spcxr_hf.models.encoders import load_encoder

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
PATCHES = TINY | {"patch_size": 8}
MAE = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
CONFIGS = {  # family -> configuration, prefix tokens, patch tokens of a 32 px image, width
    "spcxr": (SpcxrConfig(**PATCHES), 1, 16, 32),
    "vit": (ViTConfig(**PATCHES), 1, 16, 32),
    "vit_mae": (ViTMAEConfig(**PATCHES, **MAE), 1, 16, 32),
    "dinov2": (Dinov2Config(**PATCHES), 1, 16, 32),
    "registers": (Dinov2WithRegistersConfig(**PATCHES, num_register_tokens=4), 5, 16, 32),
    "deit": (DeiTConfig(**PATCHES), 2, 16, 32),
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"), 0, 16, 16),
    "swin": (
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
        0,
        16,
        16,
    ),
    "clip": (CLIPConfig(vision_config=PATCHES, text_config=TEXT | {"bos_token_id": 1, "eos_token_id": 2}), 1, 16, 32),
}
IMAGES = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CONFIGS)
def family(request, tmp_path):
    """A folder with a configuration alone, and what to expect."""
    config, prefix, patches, width = CONFIGS[request.param]
    config.save_pretrained(tmp_path)
    return str(tmp_path), prefix, patches, width


def test_every_family_from_its_configuration(family):
    folder, prefix, patches, width = family
    encoder = load_encoder(folder, random_init=True)
    assert encoder.num_prefix_tokens == prefix
    assert encoder.model.dtype == torch.float32 and not encoder.model.training
    tokens = encoder.patch_tokens(IMAGES)
    assert tokens.shape == (2, patches, width)
    assert torch.allclose(encoder.embed(IMAGES, "mean"), tokens.mean(dim=1), atol=1e-6)
    assert encoder.patch_tokens(IMAGES, layer=1).shape[0] == 2
    assert not torch.allclose(tokens[0], tokens[1])
    if not prefix:
        with pytest.raises(SpcxrError, match="has no CLS token"):
            encoder.embed(IMAGES, "cls")


def test_random_weights_follow_from_the_seed(family):
    state = torch.random.get_rng_state()
    first, again, other = (load_encoder(family[0], random_init=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embed(IMAGES, "mean"), again.embed(IMAGES, "mean"))
    assert not torch.allclose(first.embed(IMAGES, "mean"), other.embed(IMAGES, "mean"))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("deit", 2), ("registers", 5)])
def test_pooling_leaves_prefix_tokens_out(tmp_path, name, prefix):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name][0]).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = model((IMAGES / 255).expand(-1, 3, -1, -1).sub(0.5136).div(0.2479), output_hidden_states=True)
    encoder = load_encoder(str(tmp_path))
    last, inner = outputs.last_hidden_state, outputs.hidden_states[1]
    for found, expected in (
        (encoder.embed(IMAGES), outputs.pooler_output),
        (encoder.embed(IMAGES, "cls"), last[:, 0]),
        (encoder.embed(IMAGES, "mean"), last[:, prefix:].mean(dim=1)),
        (encoder.embed(IMAGES, "mean", layer=1), inner[:, prefix:].mean(dim=1)),
        (encoder.embed(IMAGES, "cls", layer=1), inner[:, 0]),
    ):
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_feature_map_is_read_row_by_row(tmp_path):
    model = AutoModel.from_config(CONFIGS["resnet"][0]).eval()
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    with torch.no_grad():
        features = model(encoder.normalise(IMAGES)).last_hidden_state  # (2, 16, 4, 4)
    assert encoder.image_size == 224  # neither configuration nor processor names one
    assert torch.allclose(encoder.patch_tokens(IMAGES)[:, 4 * 1 + 2], features[:, :, 1, 2], atol=1e-6)
    assert torch.allclose(encoder.embed(IMAGES, "mean"), features.mean(dim=(2, 3)), atol=1e-6)


@pytest.mark.parametrize("size", [32, 48])
def test_a_masked_autoencoder_sees_all_patches_in_order(tmp_path, size):
    torch.manual_seed(0)
    mae = ViTMAEForPreTraining(CONFIGS["vit_mae"][0])
    mae.save_pretrained(tmp_path / "mae")
    plain = ViTModel(CONFIGS["vit"][0])
    lost = plain.load_state_dict(mae.vit.state_dict(), strict=False)
    assert not lost.unexpected_keys and all("pooler" in key for key in lost.missing_keys)
    plain.save_pretrained(tmp_path / "vit")
    image = torch.randint(0, 256, (3, 1, size, size), dtype=torch.uint8)
    ours, theirs = load_encoder(str(tmp_path / "mae")), load_encoder(str(tmp_path / "vit"))
    for layer in (None, 1):
        expected = theirs.patch_tokens(image, layer)
        assert expected.shape == (3, (size // 8) ** 2, 32)
        assert torch.allclose(ours.patch_tokens(image, layer), expected, atol=1e-5)
    with pytest.raises(SpcxrError, match="ViTMAEModel has no pooler_output"):
        ours.embed(image)


def test_pixels_are_normalised_as_the_image_processor_does(tmp_path):
    CONFIGS["vit"][0].save_pretrained(tmp_path)
    processor = ViTImageProcessor(
        size={"height": 40, "width": 40}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 0.2]
    )
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), random_init=True)
    assert encoder.image_size == 40
    grey = torch.full((1, 1, 40, 40), 51, dtype=torch.uint8)  # 0.2 on the scale 0..1
    assert encoder.normalise(grey)[0, :, 3, 5].tolist() == pytest.approx([0.2, 0.0, -0.5], abs=1e-6)
    seen = processor([grey[0].expand(3, -1, -1)], return_tensors="pt")["pixel_values"]
    assert torch.allclose(encoder.normalise(grey), seen, atol=1e-5)


def test_without_an_image_processor_ours_stands_in(tmp_path):
    SpcxrForPreTraining(SpcxrConfig(**PATCHES)).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.image_size == 32 and encoder.num_channels == 1
    assert encoder.mean.tolist() == pytest.approx(SpcxrImageProcessor().image_mean)
    assert encoder.std.tolist() == pytest.approx(SpcxrImageProcessor().image_std)
    again = load_encoder(str(tmp_path), attention="eager", bf16=True)
    assert again.embed(IMAGES).dtype == torch.float32
    assert torch.allclose(again.embed(IMAGES), encoder.embed(IMAGES), atol=0.1)


def test_a_processor_of_other_channels_is_refused(tmp_path):
    SpcxrConfig(**PATCHES).save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    with pytest.raises(SpcxrError, match="normalises 3 channels, the model takes 1"):
        load_encoder(str(tmp_path), random_init=True)


def test_a_pooler_without_weights_is_not_measured(tmp_path):
    ViTForImageClassification(CONFIGS["vit"][0]).save_pretrained(tmp_path)  # has no pooler; ViTModel adds a random one
    encoder = load_encoder(str(tmp_path))
    assert encoder.embed(IMAGES, "cls").shape == (2, 32)
    with pytest.raises(SpcxrError, match="no weights for its pooler"):
        encoder.embed(IMAGES)


def empty(folder):
    pass


def config_only(folder):
    CONFIGS["vit"][0].save_pretrained(folder)


def unknown_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))


def text_model(folder):
    BertModel(BertConfig(**TEXT)).save_pretrained(folder)


def impossible(folder):
    SpcxrConfig(**PATCHES).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text()) | {"patch_size": 7}
    (folder / "config.json").write_text(json.dumps(values))


def damaged(folder):
    config_only(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")


def other_weights(folder):
    ViTModel(CONFIGS["vit"][0]).save_pretrained(folder)
    ViTConfig(**(PATCHES | {"num_hidden_layers": 3})).save_pretrained(folder)


def pickled(folder):
    config_only(folder)
    torch.save(ViTModel(CONFIGS["vit"][0]).state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (empty, "no config.json in this folder"),
        (config_only, "no .safetensors weights in this folder"),
        (unknown_type, "no model that transformers loads"),
        (text_model, "BertModel takes input_ids, no images"),
        (impossible, "no model that transformers loads .*patch_size"),
        (damaged, "its weights cannot be loaded"),
        (other_weights, "no weights for .* parameters of ViTModel: .*2"),
        (pickled, "no .safetensors weights"),
    ],
)
def test_refusals_are_one_line_and_name_the_folder(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(SpcxrError, match=message) as refusal:
        load_encoder(str(tmp_path))
    assert str(refusal.value).startswith(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda encoder: encoder.embed(IMAGES, "max"), "pooling must be model, mean or cls"),
        (lambda encoder: encoder.embed(IMAGES, "model", 1), "a layer needs pooling mean or cls"),
        (lambda encoder: encoder.embed(IMAGES, "mean", 3), "ViTModel has no hidden state 3; it has 3"),
        (lambda encoder: encoder.embed(IMAGES.float()), "images must be .* uint8; got .* torch.float32"),
        (lambda encoder: encoder.embed(IMAGES.expand(-1, 3, -1, -1)), "images must be"),
    ],
)
def test_wrong_calls(tmp_path, call, message):
    config_only(tmp_path)
    with pytest.raises(SpcxrError, match=message):
        call(load_encoder(str(tmp_path), random_init=True))
