"""The checkpoints in the tree: whole, loadable, half precision, and every figure on their cards from their results."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import spcxr_hf
from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining, SpcxrImageProcessor
from training_scripts import prepare_checkpoint

CARDS = Path(__file__).parent.parent / "model_cards"
FOLDERS = sorted(path for path in CARDS.iterdir() if path.is_dir())
CODE = {"configuration_spcxr.py", "image_processing_spcxr.py", "modeling_spcxr.py"}


def test_the_first_checkpoints_are_there():
    assert {"base", "lung-segmentation"} <= {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestCheckpoint:
    def test_is_ready_to_upload(self, folder):
        names = {path.name for path in folder.iterdir()}
        assert (
            CODE | {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", "recipe.yaml"} <= names
        )
        assert any((folder / "results").glob("*.json"))
        assert (folder / "model.safetensors").stat().st_size < 50e6
        for name in CODE:  # what travels is what was tested
            assert (folder / name).read_text() == (CARDS.parent / "modeling" / name).read_text(), name

    def test_weights_are_half_precision_and_finite(self, folder):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert all(tensor.isfinite().all() for tensor in tensors.values())

    def test_loads_completely_and_computes_in_float32(self, folder):
        config = AutoConfig.from_pretrained(folder)
        model_class = getattr(spcxr_hf, config.architectures[0])
        model, loading = model_class.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
        assert model.dtype == AutoModel.from_pretrained(folder).dtype == torch.float32
        size = config.image_size
        assert AutoImageProcessor.from_pretrained(folder).size == {"height": size, "width": size}

    def test_every_figure_on_the_card_comes_from_the_results(self, folder):
        assert (folder / "README.md").read_text() == prepare_checkpoint.render_card(folder.name, folder)

    def test_card_is_complete(self, folder):
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag and card.data.library_name == "transformers" and card.data.license
        for said in ("Not for clinical use", "## Data and licence", "## Limits", "## Citation"):
            assert said in card.text

    def test_recipe_names_no_place_of_a_machine(self, folder):
        recipe = prepare_checkpoint.read_recipe(folder / "recipe.yaml")
        assert recipe and not set(recipe) & set(prepare_checkpoint.MACHINE_KEYS)


def test_prepare(tmp_path, monkeypatch):
    source, cards = tmp_path / "final", tmp_path / "cards"
    config = SpcxrConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32
    )
    trained = SpcxrForPreTraining(config)
    trained.save_pretrained(source)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(source)
    (source / "recipe.yaml").write_text("data: somewhere\nsteps: 3\n")
    (tmp_path / "probe.json").write_text(json.dumps({"auroc": 0.75, "ci": [0.7, 0.8]}))
    (tmp_path / "toy.md").write_text("{{ probe/auroc }} ({{ probe/ci }}) after {{ recipe/steps }} steps")
    monkeypatch.setattr(prepare_checkpoint, "CARDS", tmp_path)
    flags = ["--name", "toy", "--cards", str(cards)]
    prepare_checkpoint.main([*flags, "--model", str(source), "--results", str(tmp_path / "probe.json")])

    folder = cards / "toy"
    assert (folder / "README.md").read_text() == "0.75 (0.7–0.8) after 3 steps"
    assert (folder / "recipe.yaml").read_text() == "steps: 3\n"
    assert {path.name for path in folder.glob("*.py")} == CODE
    loaded = SpcxrForPreTraining.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name

    (tmp_path / "toy.md").write_text("{{ probe/accuracy }}")
    with pytest.raises(SpcxrError, match="no result 'probe/accuracy'"):
        prepare_checkpoint.main([*flags, "--card_only", "true"])
    with pytest.raises(SpcxrError, match="--model is needed"):
        prepare_checkpoint.main(flags)
