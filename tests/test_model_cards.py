"""The checkpoints in the tree: whole, loadable, half precision, and every figure on their cards from their results."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

import spcxr_hf
from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining, SpcxrImageProcessor
from spcxr_hf.hub.expected_outputs import check_outputs
from spcxr_hf.hub.folder import CODE, read_checkpoint
from spcxr_hf.hub.publish import check_publishable
from tests.made_up import write_set
from tests.phantom import draw_chest
from training_scripts import prepare_checkpoint
from training_scripts.benchmarks import count_sources

CARDS = Path(__file__).parent.parent / "model_cards"
FOLDERS = sorted(path for path in CARDS.iterdir() if path.is_dir())
CLASSIFIERS = ("pneumonia", "screening", "covid")


def test_the_first_checkpoints_are_there():
    assert {"base", "lung-segmentation", "anatomy"} <= {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestCheckpoint:
    def test_is_ready_to_upload(self, folder):
        names = {path.name for path in folder.iterdir()}
        assert {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", "recipe.yaml"} <= names
        assert any((folder / "results").glob("*.json"))
        assert (folder / "model.safetensors").stat().st_size < 50e6
        check_publishable(read_checkpoint(folder, "spcxr"))

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

    def test_gives_the_outputs_that_were_recorded_with_its_weights(self, folder):
        """A change of the network that loads the weights all the same would make every figure on the card another's."""
        assert check_outputs(folder) < 1e-2

    def test_every_figure_on_the_card_comes_from_the_results(self, folder):
        assert (folder / "README.md").read_text() == prepare_checkpoint.render_card(folder.name, folder)

    def test_card_is_complete(self, folder):
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag and card.data.library_name == "transformers" and card.data.license
        # The Hub has no widget for features.
        assert card.data.pipeline_tag == "image-feature-extraction" or card.data.widget
        assert card.data.base_model or folder.name == "base"
        assert card.data.datasets and card.data.metrics and card.data.eval_results
        for said in (
            "esearch use only, not for clinical use", "## Intended use", "must not be used", "## Figures",
            "## Data and licence", "## Limits and groups under-represented", "## How it was made", "## Citation",
        ):  # fmt: skip
            assert said in card.text, said
        pictures = re.findall(r"\]\((pictures/[^)]+)\)", card.text)
        assert pictures and all((folder / picture).is_file() for picture in pictures)

    def test_recipe_names_no_place_of_a_machine(self, folder):
        recipe = prepare_checkpoint.read_recipe(folder / "recipe.yaml")
        assert recipe and not set(recipe) & set(prepare_checkpoint.MACHINE_KEYS)


def test_the_call_that_the_screening_card_names_shows_all_labels():
    count = int(re.search(r"top_k=(\d+)` shows all labels", (CARDS / "screening" / "README.md").read_text())[1])
    classify = pipeline("image-classification", model=str(CARDS / "screening"), device="cpu")
    found = classify(draw_chest(128), top_k=count)
    assert {one["label"] for one in found} == set(classify.model.config.label2id)


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
    assert {path.name for path in folder.glob("*.py")} == CODE.keys()
    loaded = SpcxrForPreTraining.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name

    use = {"population": "adults", "ages": [18, None], "views": ["PA"]}
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"intended_use": use}))
    prepare_checkpoint.main([*flags, "--model", str(source)])  # new weights: whom they are for stays
    assert SpcxrConfig.from_pretrained(folder).intended_use == use
    trained.config.intended_use = use | {"population": "children"}
    trained.save_pretrained(source)
    prepare_checkpoint.main([*flags, "--model", str(source)])
    assert SpcxrConfig.from_pretrained(folder).intended_use["population"] == "children"

    (tmp_path / "toy.md").write_text("{{ probe/auroc | .1f }}, {{ probe/ci | .0% }}, {{ probe/a / b/c }}")
    (tmp_path / "probe.json").write_text(json.dumps({"auroc": 0.75, "ci": [0.7, 0.8], "a / b": {"c": 3}, "none": None}))
    (tmp_path / "roc.png").write_bytes(b"png")
    renew = [*flags, "--card_only", "true", "--results", str(tmp_path / "probe.json")]
    prepare_checkpoint.main([*renew, "--pictures", str(tmp_path / "roc.png")])
    assert (folder / "README.md").read_text() == "0.8, 70%–80%, 3"
    assert (folder / "pictures" / "roc.png").read_bytes() == b"png"
    with pytest.raises(SpcxrError, match="missing.json: no such file"):
        prepare_checkpoint.main([*flags, "--card_only", "true", "--results", str(tmp_path / "missing.json")])

    (tmp_path / "toy.md").write_text("{{ probe/auroc | >=0.75 }}, {{ probe/auroc | >=0.751 }}")
    prepare_checkpoint.main([*flags, "--card_only", "true"])
    assert (folder / "README.md").read_text() == "reached, missed"

    (tmp_path / "toy.md").write_text("{{ probe/none }}")
    with pytest.raises(SpcxrError, match="no figure in the result 'probe/none'"):
        prepare_checkpoint.main([*flags, "--card_only", "true"])
    (tmp_path / "toy.md").write_text("{{ probe/accuracy }}")
    with pytest.raises(SpcxrError, match="no result 'probe/accuracy'"):
        prepare_checkpoint.main([*flags, "--card_only", "true"])
    with pytest.raises(SpcxrError, match="--model is needed"):
        prepare_checkpoint.main(flags)


# ---- the cards of classifiers ----------------------------------------------------------------------------------


def test_what_the_runs_took_is_counted(tmp_path):
    table = "| seconds | 90 |\n| optimiser steps | 3 |\n| images per step | 4 |\n| device | cpu |\n| processes | 1 |\n"
    (tmp_path / "report.md").write_text(table)
    prepare_checkpoint.count_cost([str(tmp_path), str(tmp_path)], tmp_path / "results")
    cost = json.loads((tmp_path / "results" / "training_cost.json").read_text())
    assert (cost["minutes"], cost["images"], cost["device"]) == (3.0, 24, "cpu")
    with pytest.raises(SpcxrError, match="nowhere: one of these runs has not ended"):
        prepare_checkpoint.count_cost([str(tmp_path / "nowhere")], tmp_path / "results")


def entries(name: str) -> list[str]:
    """What a template asks for."""
    text = (prepare_checkpoint.CARDS / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(r"\{\{ ([^{}|]+?)(?: \| [^{} ]+)? \}\}", text)


def made_up_results(name: str, folder: Path) -> dict[str, Any]:
    """A folder in which every entry is there."""
    results: dict[str, Any] = {"recipe": {}, "config": {}}
    for path in entries(name):
        *outer, last = re.split(r"(?<! )/(?! )", path)
        place = results
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = [0.25, 0.75] if last.endswith("_ci95") else 0.5
    write(results, folder)
    return results


def write(results: dict[str, Any], folder: Path) -> None:
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for name, values in results.items():
        place = folder / ("config.json" if name == "config" else f"results/{name}.json")
        place.write_text(json.dumps(values))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(results["recipe"]))
    (folder / "results" / "recipe.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_cards_of_classifiers_say_what_they_must(name, tmp_path):
    made_up_results(name, tmp_path)
    text = prepare_checkpoint.render_card(name, tmp_path)
    assert "{{" not in text and "0.500 (0.250–0.750)" in text
    (tmp_path / "README.md").write_text(text)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.pipeline_tag, card.data.base_model) == ("image-classification", "spcxr/base")
    assert card.data.datasets and card.data.metrics and card.data.license and card.data.widget
    assert {result.metric_value for result in card.data.eval_results} == {0.5}
    for said in (
        "Not for clinical use", "## Intended use", "must not be used", "## Figures",
        "## Calibration and operating points", "## Shortcuts",
        "## Data and licence", "## Limits and groups under-represented", "## How it was made",
        "## Citation", "arXiv 2211.12944", "pictures/roc.png", f'model="spcxr/{name}"',
    ):  # fmt: skip
        assert said in card.text, said


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_card_without_a_figure_is_not_rendered(name, tmp_path):
    for path in (
        entries(name)[0],
        next(path for path in entries(name) if "auroc" in path),
    ):
        results = made_up_results(name, tmp_path)
        *outer, last = re.split(r"(?<! )/(?! )", path)
        place = results
        for key in outer:
            place = place[key]
        del place[last]
        write(results, tmp_path)
        with pytest.raises(SpcxrError, match=re.escape(f"no result '{path}'")):
            prepare_checkpoint.render_card(name, tmp_path)


def test_sources_are_counted(tmp_path):
    path = write_set(tmp_path / "set.parquet", ["train"] * 4 + ["val"] * 2)
    table = pq.read_table(path)
    for column, values in {
        "source": ["a", "a", "b", "b", "a", "b"],
        "licence": ["CC BY 4.0", "CC BY 4.0", "terms", "CC0", "terms", "terms"],
        "licence_class": ["open", "open", "research", "open", "research", "research"],
        "view": ["AP", "PA", "PA", None, "AP", "AP"],
        "findings": [["x", "y"], [], ["x"], None, [], []],
    }.items():
        table = table.append_column(column, pa.array(values))
    pq.write_table(table, path)
    flags = ["--data", str(path), "--split_column", "pneumonia_split", "--splits", "train"]
    output = tmp_path / "counts.json"
    count_sources.main([*flags, "--output", str(output), "--label_column", "findings"])
    found = json.loads(output.read_text())["splits"]["train"]
    assert (found["images"], found["labels"]) == (3, {"no finding": 1, "x": 2, "y": 1})
    assert found["sources"]["b"] == {"images": 1, "licence": {"terms": 1}, "licence_class": {"research": 1}}
    assert found["licence_class"] == {"open": 2, "research": 1} and found["view"] == {"AP": 1, "PA": 2}
    assert found["images_of_unknown_patients"] == 1 and found["patients"] == 2
    whole = count_sources.main(["--data", str(path), "--split_column", "pretrain", "--splits", "true"])
    assert whole["splits"]["true"]["images"] == 4
