"""After `import spcxr_hf` the Auto classes and the pipelines know the family; no remote code is asked for."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, pipeline

from spcxr_hf import (
    SpcxrBackbone,
    SpcxrConfig,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
    SpcxrImageProcessorPil,
    SpcxrModel,
)
from spcxr_hf.errors import SpcxrError
from spcxr_hf.hub.folder import read_checkpoint, write_code
from spcxr_hf.modeling.configuration_spcxr import AUTO_MAP
from spcxr_hf.models.auto import MODEL_CLASSES, register
from spcxr_hf.models.loading import load_checkpoint
from tests.common import SIDE, WIDTH, answer_for_the_hub, assert_same, assert_same_weights, build, pixels, tiny_config

EXPECTED = {
    "AutoModel": SpcxrModel,
    "AutoModelForPreTraining": SpcxrForPreTraining,
    "AutoModelForMaskedImageModeling": SpcxrForPreTraining,
    "AutoModelForImageClassification": SpcxrForImageClassification,
    "AutoModelForSemanticSegmentation": SpcxrForSemanticSegmentation,
    "AutoBackbone": SpcxrBackbone,
}
NAMES = {0: "Atelectasis", 1: "Cardiomegaly", 2: "Effusion"}


def labelled_config() -> SpcxrConfig:
    return tiny_config(id2label=NAMES, label2id={name: index for index, name in NAMES.items()})


def processor() -> SpcxrImageProcessor:
    return SpcxrImageProcessor(size={"height": SIDE, "width": SIDE})


def radiograph() -> Image.Image:
    """60 x 50 pixels, grey, brighter towards the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, 50, dtype=np.uint8), (60, 1)))


def saved(model_class, folder) -> str:
    build(model_class, labelled_config()).save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def test_the_two_tables_agree():
    assert {auto.__name__: model_class for auto, model_class in MODEL_CLASSES.items()} == EXPECTED
    assert {name: code.split(".")[-1] for name, code in AUTO_MAP.items() if name != "AutoConfig"} == {
        name: model_class.__name__ for name, model_class in EXPECTED.items()
    }


def test_registering_again_does_no_harm():
    register()
    assert type(AutoConfig.for_model("spcxr")) is SpcxrConfig


@pytest.mark.parametrize("auto", EXPECTED)
def test_from_config(auto):
    assert type(getattr(transformers, auto).from_config(tiny_config())) is EXPECTED[auto]


@pytest.mark.parametrize("auto", EXPECTED)
def test_from_folder(auto, tmp_path, monkeypatch):
    answer_for_the_hub(monkeypatch)
    model = build(EXPECTED[auto])
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is EXPECTED[auto]
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_config_from_folder(tmp_path):
    tiny_config(pooling="cls").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SpcxrConfig
    assert config.pooling == "cls"
    assert (tmp_path / "configuration_spcxr.py").is_file()  # the configuration alone loads elsewhere, too


@pytest.mark.parametrize(
    ("backend", "expected"), [("torchvision", SpcxrImageProcessor), ("pil", SpcxrImageProcessorPil)]
)
def test_image_processor_from_folder(backend, expected, tmp_path):
    folder = saved(SpcxrModel, tmp_path)
    loaded = AutoImageProcessor.from_pretrained(folder, backend=backend)
    assert type(loaded) is expected
    assert (loaded.size["height"], loaded.size["width"]) == (SIDE, SIDE)


def test_every_class_from_a_pretraining_checkpoint(tmp_path, monkeypatch):
    answer_for_the_hub(monkeypatch)
    folder = saved(SpcxrForPreTraining, tmp_path)
    for auto, model_class in EXPECTED.items():
        assert type(getattr(transformers, auto).from_pretrained(folder)) is model_class
    backbone = AutoBackbone.from_pretrained(folder, out_indices=[1, 3])
    images = pixels()
    states = AutoModel.from_pretrained(folder)(images, output_hidden_states=True).hidden_states
    maps = backbone(images).feature_maps
    assert len(maps) == 2
    assert_same(maps[1].flatten(2).transpose(1, 2).detach(), backbone.layernorm(states[3])[:, 1:].detach())


def test_image_classification_pipeline(tmp_path):
    classify = pipeline("image-classification", model=saved(SpcxrForImageClassification, tmp_path))
    assert type(classify.model) is SpcxrForImageClassification
    found = classify(radiograph(), top_k=3)
    assert {one["label"] for one in found} == set(NAMES.values())
    values = processor()(radiograph(), return_tensors="pt").pixel_values
    scores = classify.model(values).logits.softmax(dim=-1)[0]
    for one in found:
        assert one["score"] == pytest.approx(scores[classify.model.config.label2id[one["label"]]].item(), abs=1e-5)


def test_image_segmentation_pipeline(tmp_path):
    segment = pipeline("image-segmentation", model=saved(SpcxrForSemanticSegmentation, tmp_path))
    assert type(segment.model) is SpcxrForSemanticSegmentation
    found = segment(radiograph())
    assert found
    assert {one["label"] for one in found} <= set(NAMES.values())
    masks = np.stack([np.asarray(one["mask"]) > 0 for one in found])
    assert masks.shape == (len(found), 60, 50)  # the picture's own size
    assert (masks.sum(axis=0) == 1).all()  # each pixel has one label


def test_image_feature_extraction_pipeline(tmp_path):
    extract = pipeline("image-feature-extraction", model=saved(SpcxrModel, tmp_path))
    assert type(extract.model) is SpcxrModel
    values = processor()(radiograph(), return_tensors="pt").pixel_values
    expected = extract.model(values)
    assert np.asarray(extract(radiograph())).shape == (1, 17, WIDTH)
    assert_same(extract(radiograph(), return_tensors=True), expected.last_hidden_state.detach(), rtol=0, atol=1e-5)
    pooled = np.asarray(extract(radiograph(), pool=True))
    np.testing.assert_allclose(pooled, expected.pooler_output.detach().numpy(), rtol=0, atol=1e-5)


# ---- what is not loaded --------------------------------------------------------------------------------------------


def as_a_pickle(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def as_a_pickle_by_another_name(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, folder / "model.safetensors")


def through_a_link(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def through_an_index(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_a_pickle_in_an_index(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    as_a_pickle(folder, weights)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def state_weights(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))


def as_a_pickle_in_the_configuration(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    as_a_pickle(folder, weights)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")  # the one such name that the library takes
    state_weights(folder, "adapter_model.bin")


def through_an_index_in_a_subfolder(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """From the index the name leads into the folder; from the folder, where the library begins, out of it."""
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "a").mkdir()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../elsewhere.safetensors")}
    (folder / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    state_weights(folder, "a/model.safetensors.index.json")


def through_a_linked_subfolder(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "model.safetensors").rename(folder.parent / "elsewhere" / "model.safetensors")
    (folder / "a").symlink_to(folder.parent / "elsewhere")
    state_weights(folder, "a/model.safetensors")


def as_an_adapter(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    torch.save({}, folder / "adapter_model.bin")


def with_a_broken_index(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def with_an_oversized_header(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + content[8:])


def with_a_malformed_header(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:8] + b"not JSON" + content[16:])


REFUSED = {
    as_a_pickle: (OSError, "no file named model.safetensors"),
    as_a_pickle_by_another_name: (SafetensorError, "header"),
    through_a_link: (ValueError, r"model\.safetensors: outside the checkpoint folder"),
    through_an_index: (
        ValueError,
        r"elsewhere\.safetensors: outside the checkpoint folder",
    ),
    as_a_pickle_in_an_index: (ValueError, r"index\.json: names 'pytorch_model\.bin'; only safetensors are loaded"),
    as_a_pickle_in_the_configuration: (ValueError, r"adapter_model\.bin: no index of weights"),
    through_an_index_in_a_subfolder: (ValueError, r"elsewhere\.safetensors: outside the checkpoint folder"),
    through_a_linked_subfolder: (ValueError, r"a/model\.safetensors: outside the checkpoint folder"),
    as_an_adapter: (ValueError, "adapters of another model"),
    with_a_broken_index: (ValueError, r"index\.json: no index of weights \(TypeError\)"),
    with_an_oversized_header: (SafetensorError, "header too large"),
    with_a_malformed_header: (SafetensorError, "invalid JSON in header"),
}


@pytest.fixture(scope="module")
def unsafe(tmp_path_factory) -> Path:
    """A folder `NAME/model` for each of these."""
    root = tmp_path_factory.mktemp("unsafe")
    for spoil in REFUSED:
        folder = root / spoil.__name__ / "model"
        saved(SpcxrModel, folder)
        write_code(folder)
        spoil(folder, build(SpcxrModel, labelled_config()).state_dict())
    return root


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__.replace("_", " "))
def test_unsafe_weights_are_refused(unsafe, spoil):
    folder = unsafe / spoil.__name__ / "model"
    error, words = REFUSED[spoil]
    for auto in (SpcxrModel, AutoModel):
        with pytest.raises(error, match=words):
            auto.from_pretrained(str(folder))
    with pytest.raises(SpcxrError):
        load_checkpoint("embedding", folder)
    with pytest.raises(SpcxrError):
        read_checkpoint(folder, "spcxr")  # as `spcxr install` and `spcxr publish` do


ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path

sys.modules["spcxr_hf"] = None
import transformers


def said(load, folder):
    try:
        load(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def as_remote_code(folder):
    transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)


def through_the_handler(folder):
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EndpointHandler(str(folder))


root = Path(sys.argv[1])
folders = {path.name: path / "model" for path in root.iterdir() if (path / "model").is_dir()}
print(json.dumps({name: [said(load, folder) for load in (as_remote_code, through_the_handler)]
                  for name, folder in folders.items()}))
"""


@pytest.mark.slow
def test_unsafe_weights_are_refused_without_the_package(unsafe):
    caches = {"HF_HOME": str(unsafe / "home"), "HF_MODULES_CACHE": str(unsafe / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(unsafe)],
        env={**os.environ, **caches}, cwd=unsafe, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {spoil.__name__ for spoil in REFUSED}
    for spoil, (_, words) in REFUSED.items():
        assert all(said and re.search(words, said) for said in found[spoil.__name__]), (spoil, found[spoil.__name__])


@pytest.mark.parametrize("model_type", ["spcxr", "strange"])
def test_code_of_a_checkpoint_is_not_run(tmp_path, model_type):
    """Of this family or another: nobody is asked whether to run it, and it is not run."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    saved(SpcxrModel, folder)
    code = "modeling_strange.SpcxrModel"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": dict.fromkeys(("AutoConfig", "AutoModel"), code)}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["auto_map"] = {"AutoImageProcessor": code}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for path in (*folder.glob("*.py"), folder / "modeling_strange.py"):
        path.write_text(f"open({str(ran)!r}, 'w')\nclass SpcxrModel: ...\n")
    if model_type == "spcxr":
        assert type(load_checkpoint("embedding", folder).model) is SpcxrModel
    else:
        with pytest.raises(SpcxrError):
            load_checkpoint("embedding", folder, any_family=True)
    assert not ran.exists()


def test_adapters_come_from_safetensors(tmp_path):
    peft = pytest.importorskip("peft", reason="the extra train is not installed")
    adapted = peft.get_peft_model(build(SpcxrModel), peft.LoraConfig(target_modules=["qkv"]))
    adapted.save_pretrained(tmp_path)
    build(SpcxrModel).load_adapter(str(tmp_path))
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(
        (ValueError, OSError), match=r"adapter_model\."
    ):  # it looks for the safetensors, or ours refuses
        build(SpcxrModel).load_adapter(str(tmp_path))


def test_a_pickle_is_not_loaded_on_request(tmp_path):
    saved(SpcxrModel, tmp_path)
    as_a_pickle(tmp_path, build(SpcxrModel, labelled_config()).state_dict())
    with pytest.raises(ValueError, match="only safetensors are loaded; a pickle can run code"):
        AutoModel.from_pretrained(tmp_path, use_safetensors=False)


def test_divided_weights_and_links_of_a_cache_are_loaded(tmp_path):
    model = build(SpcxrModel)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    model.save_pretrained(blobs, max_shard_size="50KB")
    assert (blobs / "model.safetensors.index.json").is_file()
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    for folder in (blobs, snapshot):
        assert_same_weights(AutoModel.from_pretrained(folder).state_dict(), model.state_dict())
