"""The one loader: what it loads, what it refuses, and how it says so."""

import json
import logging.handlers
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForImageClassification, SpcxrImageProcessor
from spcxr_hf.models.loading import (
    forward,
    is_multi_label,
    label_names,
    load_checkpoint,
    load_network,
    probabilities,
    to_pixel_values,
)
from tests.common import SIDE, assert_same, build, tiny_config
from tests.made_up import picture

NAMES = {"id2label": {0: "normal", 1: "pneumonia"}, "label2id": {"normal": 0, "pneumonia": 1}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier as it is published."""
    target = tmp_path / "model"
    build(SpcxrForImageClassification, tiny_config(num_labels=2, **NAMES)).save_pretrained(target)
    SpcxrImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(target)
    return target


def test_a_picture_to_probabilities(folder):
    loaded = load_checkpoint("classification", folder, "cpu")
    assert (loaded.name, loaded.device.type) == (str(folder), "cpu") and not loaded.model.training
    image = Image.fromarray(picture(0, 50)[0])
    values = to_pixel_values(loaded.processor, [image, image])
    with torch.no_grad():
        found = probabilities(loaded.model.config, forward(loaded.model, values).logits)
        expected = loaded.model(loaded.processor(image, return_tensors="pt").pixel_values).logits.softmax(dim=-1)
    assert label_names(loaded.model.config) == ["normal", "pneumonia"]
    assert_same(found, expected.expand(2, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "sigmoid"),
    [
        ({"num_labels": 3}, False),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, True),
        ({"num_labels": 1}, True),
    ],
)
def test_how_logits_are_read(values, sigmoid):
    """As the pipelines of transformers read them."""
    config, logits = SpcxrConfig(**values), torch.tensor([[1.0, -1.0, 0.5][: values["num_labels"]]])
    assert is_multi_label(config) == sigmoid
    assert_same(probabilities(config, logits), logits.sigmoid() if sigmoid else logits.softmax(dim=-1))


def test_regression_has_no_probabilities():
    with pytest.raises(SpcxrError, match="a regression model gives no probabilities"):
        probabilities(SpcxrConfig(num_labels=1, problem_type="regression"), torch.zeros(1, 1))


def test_other_families_are_given_colour(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                       patch_size=8)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    loaded = load_checkpoint("classification", tmp_path, "cpu", any_family=True)
    values = to_pixel_values(loaded.processor, [Image.fromarray(picture(0, 50)[0])], image_size=64)
    assert values.shape == (1, 3, 64, 64)
    with torch.no_grad():
        assert forward(loaded.model, values).logits.shape == (1, 2)
    with pytest.raises(SpcxrError, match="a model of the type vit, not an SPCXR checkpoint"):
        load_checkpoint("classification", tmp_path, "cpu")


def test_a_new_head_is_allowed_and_a_new_encoder_is_not(folder):
    model, fresh = load_network(SpcxrForImageClassification, str(folder), new="head", num_labels=5)
    assert fresh == ["classifier.bias", "classifier.weight"] and model.config.num_labels == 5
    weights = load_file(folder / "model.safetensors")
    del weights["spcxr.layernorm.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpcxrError, match="no weights for 1 parameters of .*: spcxr.layernorm.bias"):
        load_network(SpcxrForImageClassification, str(folder), new="head")


# ---- damaged and hostile folders ---------------------------------------------------------------------------------


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(found))

    return change


def processor(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "preprocessor_config.json").read_text()) | values
        (folder / "preprocessor_config.json").write_text(json.dumps(found))

    return change


def text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = change(load_file(folder / "model.safetensors"))
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return apply


def pickled_part(folder: Path) -> None:
    """An index that names a pickle."""
    found = load_file(folder / "model.safetensors")
    torch.save(found, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"unused": torch.zeros(1)}, folder / "other.safetensors", {"format": "pt"})


def index_elsewhere(folder: Path) -> None:
    """`transformers_weights` names a subfolder's index, which names weights outside."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    save_file({"unused": torch.zeros(1)}, folder / "other.safetensors", {"format": "pt"})
    (folder / "sub").mkdir()
    index = {"metadata": {}, "weight_map": dict.fromkeys(found, "../../elsewhere.safetensors")}
    (folder / "sub" / "model.safetensors.index.json").write_text(json.dumps(index))
    config(transformers_weights="sub/model.safetensors.index.json")(folder)


def linked_subfolder(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "elsewhere" / "model.safetensors")
    save_file({"unused": torch.zeros(1)}, folder / "other.safetensors", {"format": "pt"})
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    config(transformers_weights="sub/model.safetensors")(folder)


def adapters(folder: Path) -> None:
    """They name a base model anywhere on the machine."""
    content = {"peft_type": "LORA", "base_model_name_or_path": str(folder.parent / "elsewhere")}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def integers_by_no_method(folder: Path) -> None:
    weights(lambda found: {name: value.to(torch.uint8) for name, value in found.items()})(folder)
    config(quantization_config={"quant_method": "no-such-method"})(folder)


HOSTILE = {
    "config is a list": text("config.json", b"[]"),
    "config is a number": text("config.json", b"7"),
    "config is cut short": text("config.json", b'{"model_type": "spcxr", '),
    "config is no text": text("config.json", b"\xff\xfe\x00{"),
    "config nests deeply": text("config.json", b"[" * 100_000),
    "config is empty": text("config.json", b""),
    "unknown type": config(model_type="no-such-model"),
    "code for an unknown type": config(model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"}),
    "type is a list": config(model_type=["spcxr"]),
    "width is text": config(hidden_size="wide"),
    "width is negative": config(hidden_size=-32),
    "no heads": config(num_attention_heads=0),
    "width of millions": config(hidden_size=8_000_000),
    "layers without end": config(num_hidden_layers=10**12),
    "labels without end": config(num_labels=10**12),
    "labels are a list": config(id2label=["normal"]),
    "labels by name": config(id2label={"normal": 0}),
    "unknown activation": config(hidden_act="__import__"),
    "dtype that is none": config(dtype="pickle"),
    "other layers than weights": config(num_hidden_layers=3),
    "more layers than weights": config(num_hidden_layers=9),
    "thresholds are text": config(operating_points="youden"),
    "intended for nobody": config(intended_use={"ages": [5, 1]}),
    "weights are empty": text("model.safetensors", b""),
    "weights are zeros": text("model.safetensors", bytes(4096)),
    "weights are a pickle": lambda folder: torch.save({}, folder / "model.safetensors"),
    "weights of another width": config(hidden_size=64),
    "weights are integers": weights(lambda found: {name: value.long() for name, value in found.items()}),
    "integers quantised by nothing": integers_by_no_method,
    "a weight is missing": weights(lambda found: dict(list(found.items())[1:])),
    "no weight at all": weights(lambda found: {"unused": torch.zeros(1)}),
    "an index names a pickle": pickled_part,
    "an index leads out": index_elsewhere,
    "a linked subfolder": linked_subfolder,
    "weights by a path": config(transformers_weights="../model.safetensors"),
    "adapters of another model": adapters,
    "no image processor": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "image processor is a list": text("preprocessor_config.json", b"[]"),
    "code of an image processor": processor(image_processor_type="Evil", auto_map={"AutoImageProcessor": "evil.Evil"}),
    "images of a million pixels a side": processor(size={"height": 10**6, "width": 10**6}),
    "images of no size": processor(size={"height": 0, "width": 0}),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_what_is_wrong_with_a_folder_is_one_line_that_names_it(folder, damage, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run the folder's code"))
    (folder / "evil.py").write_text("raise SystemExit('the code of the folder was run')")
    HOSTILE[damage](folder)
    said = logging.handlers.QueueHandler(queue.SimpleQueue())
    logging.getLogger("transformers").addHandler(said)
    with pytest.raises(SpcxrError) as refusal:
        load_checkpoint("classification", folder, "cpu")
    logging.getLogger("transformers").removeHandler(said)
    assert said.queue.empty()  # no table of missing weights before the line
    message = str(refusal.value)
    assert message.startswith(str(folder)) and "\n" not in message and len(message) < 600


def test_an_index_of_the_hub_cache_that_names_a_pickle(folder, tmp_path, monkeypatch):
    """Under an id there is no folder to look into before the library has found out what to read."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pickled_part(folder)
    place = tmp_path / "hub" / "models--some--one"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / ("0" * 40))
    with pytest.raises(SpcxrError, match="some/one: .*pytorch_model.bin"):
        load_checkpoint("classification", "some/one", "cpu")
    with pytest.raises(ValueError, match="safetensors files in their own folder alone"):
        SpcxrForImageClassification.from_pretrained("some/one", cache_dir=str(tmp_path / "hub"))
