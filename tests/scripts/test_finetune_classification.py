"""Fine-tuning and evaluation of classifiers on a few made-up radiographs, and the arithmetic inside both scripts."""

import csv
import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import PartialState
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForImageClassification, SpcxrForPreTraining
from spcxr_hf.data.batches import BalancedSet, StepPlan, draw_rows, strata
from spcxr_hf.data.table import open_image, read_table
from spcxr_hf.evaluation.predict import load_classifier
from spcxr_hf.hub.publish import check_card
from spcxr_hf.modeling.configuration_spcxr import SIZES
from spcxr_hf.models import loading as loading_module
from spcxr_hf.training import engine as run_module
from spcxr_hf.training.classifiers import Pixels, add_adapters, build_classifier, classifier_groups
from spcxr_hf.training.losses import class_weights, classification_loss
from spcxr_hf.transforms.augment import mix
from tests.made_up import CLASSES, SMALL_PRESET, break_rows, write_set
from tests.processes import finish, start_group
from training_scripts import evaluate, finetune_classification
from training_scripts.finetune_classification import Arguments

pytestmark = pytest.mark.slow  # many starts of a second each

SCRIPTS = Path(finetune_classification.__file__).parent
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SPLITS = ["train"] * 13 + ["val"] * 6 + ["test"] * 8
COLUMNS = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split"]
BRIEF = ["--image_size", "32", "--stored_size", "40", "--steps", "4", "--batch_size", "6", "--save_every", "2"]
BRIEF += ["--warmup_steps", "1", "--micro_batch_size", "3", "--log_every", "1"]
# What a resumed run has most to get right: micro-batches, averaged weights, mixed images, classes that take turns.
HARD = ["--ema_decay", "0.9", "--mixup", "0.4", "--cutmix", "1", "--balance", "sampling", "--label_smoothing", "0.1"]


@pytest.fixture(scope="module", autouse=True)
def small_and_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setitem(SIZES, "tiny", SMALL_PRESET)
        yield


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", SPLITS))


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """The same set with labels that hold together: as a list, null in every sixth row, and as a struct."""
    path = write_set(tmp_path_factory.mktemp("findings") / "set.parquet", SPLITS)
    lists, structs = [], []
    for row in range(len(SPLITS)):
        names = [name for name, every in (("effusion", 2), ("oedema", 3)) if row % every == 0]
        lists.append(None if row % 6 == 5 else names)
        structs.append({"effusion": row % 2 == 0 if row % 5 else None, "oedema": row % 3 == 0})
    with_columns(path, findings=lists, known=structs)
    return str(path)


def with_columns(path: Path, **columns: list) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(100)  # not that of a run, whose weights from scratch would be these
    folder = tmp_path_factory.mktemp("pretrained")
    SpcxrForPreTraining(SpcxrConfig(**TINY, image_size=48, drop_path_rate=0.2)).save_pretrained(folder)
    return str(folder)


def run(shard: str, output: Path, *flags: str) -> Path:
    finetune_classification.main(["--data", shard, "--output", str(output), *COLUMNS, *BRIEF, *flags])
    return output


@pytest.fixture(scope="module")
def finished(shard, pretrained, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return run(shard, tmp_path_factory.mktemp("run"), "--init_from", pretrained)


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Checkpoints of other families by name."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("peers")
    vision = {**TINY, "image_size": 48, "patch_size": 16}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**vision, num_labels=7)).save_pretrained(folder / "vit")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder / "vit")
    Dinov2Model(Dinov2Config(**vision)).save_pretrained(folder / "dinov2")
    ViTMAEForPreTraining(ViTMAEConfig(**vision, **decoder, decoder_intermediate_size=64)).save_pretrained(
        folder / "vit_mae"
    )
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]).save_pretrained(folder / "resnet")
    BertConfig().save_pretrained(folder / "bert")
    return folder


def contents(output: Path) -> dict[str, bytes]:
    """All that a run's last checkpoint and its final model hold, but for how long it took."""
    names = [
        "checkpoint-4/model.safetensors",
        "checkpoint-4/optimizer.safetensors",
        "final/model.safetensors",
        "log.csv",
    ]
    names += [f"checkpoint-4/{path.name}" for path in (output / "checkpoint-4").glob("average.safetensors")]
    return {name: (output / name).read_bytes() for name in names}


# ---- runs ------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(finished):
    names = {path.name for path in finished.iterdir()}
    expected = {
        ".lock",
        "best",
        "checkpoint-2",
        "checkpoint-4",
        "final",
        "log.csv",
        "loss.png",
        "recipe.yaml",
        "results.json",
    } | {"report.md"}
    assert names == expected
    assert (finished / "final" / "recipe.yaml").read_text() == (finished / "recipe.yaml").read_text()
    lines = [line.split(",") for line in (finished / "log.csv").read_text().splitlines()]
    assert lines[0][:4] == ["step", "loss", "learning_rate", "val_auroc"]
    assert [line[0] for line in lines[1:] if line[3]] == ["2", "4"]
    result = json.loads((finished / "results.json").read_text())
    assert result["train_images_by_class"] == {"bacterial": 4, "normal": 5, "viral": 4}
    logged = {line[0]: line for line in lines}[str(result["step"])]
    for name, text in zip(lines[0][3:], logged[3:], strict=True):
        assert float(text) == pytest.approx(result["val"][name.removeprefix("val_")], abs=1e-5)
    # A model card to fill in: it cannot be published before its licence is named.
    card = finished / "final" / "README.md"
    text = card.read_text()
    with pytest.raises(SpcxrError, match="front matter not valid .no license"):
        check_card(card)
    (finished.parent / "card.md").write_text(text.replace("---\n", "---\nlicense: mit\n", 1))
    check_card(finished.parent / "card.md")
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.library_name, data.base_model) == ("image-classification", "transformers", None)
    assert "| train | 13 |" in text and "| val | 6 |" in text and "| train: bacterial | 4 |" in text
    assert f"| auroc | {result['val']['auroc']:.5g} |" in text
    assert all(f"## {part}" in text for part in ("Population", "Thresholds", "Limits", "Licence"))
    assert str(finished.parent) not in text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_end_near_float32(shard, finished, pretrained, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(loading_module, "has_fast_bf16", lambda kind: True)
    output = run(shard, tmp_path, "--init_from", pretrained, "--mixed_precision", precision)
    losses = [
        [float(row["loss"]) for row in csv.DictReader((folder / "log.csv").open())] for folder in (output, finished)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)
    assert losses[0] != losses[1]
    weights = load_file(output / "final" / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_the_final_model_loads_and_classifies(finished):
    model = AutoModelForImageClassification.from_pretrained(finished / "final")
    processor = AutoImageProcessor.from_pretrained(finished / "final")
    assert model.config.id2label == {0: "bacterial", 1: "normal", 2: "viral"}
    assert model.config.problem_type == "single_label_classification"
    assert model.config.image_size == 32
    inputs = processor(np.zeros((50, 60), np.uint8), return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 1, 32, 32)
    assert model(**inputs).logits.shape == (1, 3)


@pytest.mark.parametrize(("metric", "sign"), [("loss", -1), ("auroc", 1), ("balanced_accuracy", 1)])
def test_the_best_on_val_becomes_the_final_one(shard, pretrained, tmp_path, metric, sign):
    flags = ["--metric", metric, "--save_every", "1", "--keep_checkpoints", "4", "--learning_rate", "0.01"]
    run(shard, tmp_path, "--init_from", pretrained, *flags)
    rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    values = [sign * float(row[rows[0].index(f"val_{metric}")]) for row in rows[1:]]
    assert len(set(values)) > 1 or metric != "loss"
    best = f"checkpoint-{1 + values.index(max(values))}"
    assert (tmp_path / "final/model.safetensors").read_bytes() == (tmp_path / best / "model.safetensors").read_bytes()


def test_a_run_ends_when_val_gets_no_better(shard, pretrained, tmp_path):
    """With no learning rate, the second value is no better than the first."""
    flags = ["--save_every", "1", "--patience", "1", "--learning_rate", "0"]
    run(shard, tmp_path, "--init_from", pretrained, *flags)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((tmp_path / "results.json").read_text())["step"] == 1


@pytest.mark.slow
def test_from_scratch_takes_the_config_alone(shard, pretrained, tmp_path):
    before = SpcxrForPreTraining.from_pretrained(pretrained).spcxr.state_dict()
    still = [
        "--steps",
        "1",
        "--learning_rate",
        "0",
        "--image_size",
        "48",
        "--stored_size",
        "48",
    ]
    for name, flags, same in (("a", [], True), ("b", ["--from_scratch", "true"], False)):
        model = SpcxrForImageClassification.from_pretrained(
            run(shard, tmp_path / name, "--init_from", pretrained, *still, *flags) / "final"
        )
        assert (
            torch.equal(model.spcxr.encoder.layers[1].mlp.fc1.weight, before["encoder.layers.1.mlp.fc1.weight"]) == same
        )
        assert model.config.hidden_size == 32


def killed_and_started_again(shard: str, output: Path, monkeypatch, *flags: str) -> None:
    save = run_module.save_checkpoint

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(shard, output, *flags)
    assert not (output / "final").exists()
    run(shard, output, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "lora", "vit"])
def test_a_killed_run_goes_on_to_the_same_weights(shard, pretrained, peers, tmp_path, monkeypatch, kind):
    flags = {
        "hard": ["--init_from", pretrained, *HARD],
        "lora": ["--init_from", pretrained, "--lora_rank", "2"],
        "vit": ["--init_from", str(peers / "vit")],
    }[kind]
    run(shard, tmp_path / "whole", *flags)
    killed_and_started_again(shard, tmp_path / "killed", monkeypatch, *flags)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_run_only_writes_its_final_model_again(shard, pretrained, finished):
    before = contents(finished), (finished / "results.json").read_text()
    run(shard, finished, "--init_from", pretrained)
    assert (contents(finished), (finished / "results.json").read_text()) == before


def test_training_never_opens_what_it_is_reported_on(tmp_path, pretrained):
    shard = write_set(tmp_path / "set.parquet", [*SPLITS, "shift"], unreadable=["test", "shift"])
    assert (run(str(shard), tmp_path / "run", "--init_from", pretrained, "--steps", "1") / "final").is_dir()


@pytest.mark.slow
def test_seeds(shard, pretrained, tmp_path):
    flags = ["--init_from", pretrained, "--label_fraction", "0.7", "--steps", "2"]
    run(shard, tmp_path / "all", *flags, "--seeds", "3", "4")
    run(shard, tmp_path / "one", *flags, "--seed", "4")
    summary = json.loads((tmp_path / "all" / "results.json").read_text())
    of_four = json.loads((tmp_path / "one" / "results.json").read_text())
    assert summary["seeds"]["4"] == of_four == json.loads((tmp_path / "all/seed-4/results.json").read_text())
    losses = [summary["seeds"][seed]["val"]["loss"] for seed in ("3", "4")]
    assert losses[0] != losses[1]
    assert summary["val"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert summary["val"]["loss"]["sd"] == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
    assert summary["images"] == {"train": 10, "val": 6}  # 4 of 5 and twice 3 of 4
    assert (tmp_path / "all/seed-4/final/model.safetensors").read_bytes() == (
        tmp_path / "one/final/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("column", ["findings", "known"])
def test_labels_that_hold_together(findings, pretrained, tmp_path, column, capsys):
    flags = [
        "--init_from",
        pretrained,
        "--multi_label",
        "true",
        "--label_column",
        column,
        "--balance",
        "loss",
    ]
    result = json.loads((run(findings, tmp_path, *flags) / "results.json").read_text())
    bar = capsys.readouterr().err
    assert re.search(r"val_auroc=[\d.]", bar) and not re.search(r"=[,\]]", bar)  # no fields of steps without figures
    assert set(result["val"]) == {"auroc", "average_precision", "loss"}
    expected = {"findings": {"effusion": 7, "oedema": 5}, "known": {"effusion": 5, "oedema": 5}}
    assert result["train_images_by_class"] == expected[column]
    assert result["images"] == {"train": 11 if column == "findings" else 13, "val": 5 if column == "findings" else 6}
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "final").config
    assert config.problem_type == "multi_label_classification"
    assert config.id2label == {0: "effusion", 1: "oedema"}
    words = ["--model", str(tmp_path / "final"), "--data", findings, *COLUMNS, "--label_column", column]
    words += ["--splits", "test", "--resamples", "20", "--temperature_from", "val"]
    report = evaluate.main(words)["splits"]["test"]
    assert list(report["labels"]) == ["effusion", "oedema"]
    assert report["labels"]["effusion"]["missing"] == (0 if column == "findings" else 2)  # rows 20 and 25
    assert report["left_out"] == (1 if column == "findings" else 0)  # row 23


def test_as_a_command_with_the_smoke_recipe(shard, tmp_path, monkeypatch):
    script = SCRIPTS / "finetune_classification.py"
    recipe = str(SCRIPTS / "recipes/finetune_classification_smoke.yaml")
    words = [str(script), recipe, "--data", shard, "--output", str(tmp_path), *BRIEF, "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--label_column", "no"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert str(stop.value.code).startswith("error: set.parquet[pneumonia_split=train]: no column 'no'")  # exits with 1
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(script), run_name="__main__")
    assert (
        AutoModelForImageClassification.from_pretrained(tmp_path / "final").config.hidden_size == 32
    )  # the preset tiny, which is small here


# ---- what is trained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["spcxr", "resnet"])
def test_a_frozen_encoder_stays_as_it_was(shard, pretrained, peers, tmp_path, model):
    """Running means of a ResNet included."""
    flags = ["--freeze_encoder", "true", "--save_every", "1", "--keep_checkpoints", "4", "--seed", "5"]
    source = ["--init_from", pretrained if model == "spcxr" else str(peers / model)]
    source += [] if model == "spcxr" else ["--from_scratch", "true"]
    run(shard, tmp_path, *source, *flags)
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 4))
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if name.startswith("classifier.")}
    moments = load_file(tmp_path / "checkpoint-4" / "optimizer.safetensors")
    assert {name.split("/")[0] for name in moments} == changed


@pytest.fixture(scope="module")
def adapted(shard, pretrained, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        flags = ["--init_from", pretrained, "--lora_rank", "2", "--save_every", "4", "--learning_rate", "0.02"]
        return run(shard, tmp_path_factory.mktemp("adapted"), *flags)


def test_merged_adapters_compute_what_they_did_before(adapted, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # the final model asks for no such package
    merged = AutoModelForImageClassification.from_pretrained(adapted / "final").eval()
    monkeypatch.undo()
    plain = SpcxrForImageClassification(merged.config)
    add_adapters(plain, rank=2, alpha=16.0)
    weights = load_file(adapted / "checkpoint-4" / "model.safetensors")
    plain.load_state_dict(weights)
    pixels = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        before = plain.eval()(pixels).logits
        assert torch.allclose(merged(pixels).logits, before, atol=1e-5)
        for name, value in weights.items():
            if "lora_B" in name:
                value.zero_()
        plain.load_state_dict(weights)
        assert not torch.allclose(plain(pixels).logits, before, atol=1e-3)  # the adapters had learned something
    assert not any("lora" in name for name in load_file(adapted / "final" / "model.safetensors"))


def test_only_adapters_and_the_head_are_trained(adapted, pretrained):
    weights = load_file(adapted / "checkpoint-4" / "model.safetensors")
    before = SpcxrForPreTraining.from_pretrained(pretrained).state_dict()
    name = "spcxr.encoder.layers.0.attention.qkv"
    assert torch.equal(weights[f"{name}.base_layer.weight"], before[f"{name}.weight"])
    trained = {key.split("/")[0] for key in load_file(adapted / "checkpoint-4" / "optimizer.safetensors")}
    assert trained == {key for key in weights if "lora_" in key or key.startswith("classifier.")}
    assert (
        sum("lora_A" in key for key in trained) == 2 * 4
    )  # queries with keys and values, projection, and two of the MLP


@pytest.mark.parametrize("name", ["vit", "dinov2", "vit_mae"])
def test_another_family_stands_in(shard, peers, tmp_path, name):
    run(shard, tmp_path, "--init_from", str(peers / name), "--steps", "2")
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "final").config
    assert config.model_type == name.removesuffix("_mae")
    assert config.num_labels == 3
    flags = ["--model", str(tmp_path / "final"), "--data", shard, *COLUMNS, "--resamples", "20"]
    report = evaluate.main(flags)["splits"]["val"]
    result = json.loads((tmp_path / "results.json").read_text())
    # The script sees stored images, the evaluation the files: nearly the same pixels.
    assert report["macro_auroc"] == pytest.approx(result["val"]["auroc"], abs=0.2)


@pytest.mark.parametrize(("name", "block"), [("vit", "vit.layers"), ("dinov2", "dinov2.encoder.layer")])
def test_layer_wise_decay_of_other_families(peers, name, block):
    arguments = Arguments(data="", output="", init_from=str(peers / name), image_size=48, layer_decay=0.5)
    model = build_classifier(arguments, ["a", "b"])
    groups = classifier_groups(model, arguments.layer_decay)
    scale = {id(parameter): group["scale"] for group in groups for parameter in group["params"]}
    found = {key: scale[id(value)] for key, value in model.named_parameters() if value.requires_grad}
    assert {found[key] for key in found if key.startswith(f"{block}.1.")} == {0.5}
    assert {found[key] for key in found if key.startswith(f"{block}.0.")} == {0.25}
    assert {found[key] for key in found if ".embeddings." in key} == {0.125}
    assert found["classifier.weight"] == 1


def test_pixels_are_those_of_the_models_processor(peers, tmp_path):
    arguments = Arguments(data="", output="", init_from=str(peers / "vit"), image_size=32)
    pixels = Pixels.of(arguments, build_classifier(arguments, ["a", "b"]))
    grey = torch.rand(1, 1, 32, 32)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    assert torch.allclose(pixels.normalise(grey), (grey.expand(-1, 3, -1, -1) - mean) / std)
    pixels.processor().save_pretrained(tmp_path)
    byte = torch.randint(0, 256, (32, 32), dtype=torch.uint8)
    seen = AutoImageProcessor.from_pretrained(tmp_path)(byte.numpy(), return_tensors="pt").pixel_values
    assert torch.allclose(seen, pixels.normalise(byte[None, None] / 255), atol=1e-5)
    assert pixels.options == {"interpolate_pos_encoding": True}


# ---- labels ----------------------------------------------------------------------------------------------------


def test_classes_may_join_labels(shard, pretrained, tmp_path):
    run(shard, tmp_path, "--init_from", pretrained, "--classes", "normal", "ill=bacterial+viral", "--steps", "1")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["train_images_by_class"] == {"normal": 5, "ill": 8}
    flags = ["--model", str(tmp_path / "final"), "--data", shard, *COLUMNS, "--resamples", "20"]
    with pytest.raises(SpcxrError, match="holds bacterial, viral, which the model does not know"):
        evaluate.main(flags)
    report = evaluate.main([*flags, "--classes", "ill=bacterial+viral", "normal"])
    assert list(report["classes"]) == ["normal", "ill"]
    assert report["splits"]["val"]["classes"]["ill"]["images"] == 4


def test_few_labels_are_drawn_in_proportion():
    targets = torch.eye(3)[torch.tensor([0] * 100 + [1] * 200 + [2] * 30)]
    rows = draw_rows(targets, 0.1, seed=0)
    assert targets[rows].sum(dim=0).tolist() == [10, 20, 3]
    assert len(rows.unique()) == 33
    assert torch.equal(rows, draw_rows(targets, 0.1, seed=0))
    assert not torch.equal(rows, draw_rows(targets, 0.1, seed=1))


def test_an_image_counts_as_its_rarest_label():
    targets = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, math.nan], [1, 0, 1], [0, 1, 0.0]])
    assert strata(targets).tolist() == [1, 0, 3, 0, 2, 1]


@pytest.mark.parametrize("processes", [1, 2])
def test_balanced_sampling(processes):
    targets = torch.eye(3)[torch.tensor([0] * 10 + [1] * 4 + [2] * 2)]
    images = BalancedSet(torch.zeros(16, 1, 2, 2), [str(row) for row in range(16)], {"targets": targets})
    shares = [list(images.steps(StepPlan(8, 4, 7, process, processes), 0, 12)) for process in range(processes)]
    steps = [
        [name for processes in step for share in processes for name in share.ids] for step in zip(*shares, strict=True)
    ]
    drawn = np.array([[int(name) for name in step] for step in steps])
    counts = np.array([np.bincount(targets[row].argmax(dim=1), minlength=3) for row in drawn])
    assert counts.max() == 3
    assert counts.min() == 2
    assert counts.sum(axis=0).tolist() == [32, 32, 32]
    each = np.bincount(drawn.flatten(), minlength=16)
    assert each.tolist()[10:] == [8] * 4 + [16] * 2  # no image comes again before all have come
    assert set(each[:10]) == {3, 4}
    later = list(images.steps(StepPlan(8, 4, 7, 0, processes), 5, 12))  # a resumed run
    assert [part.ids for step in later for part in step] == [part.ids for step in shares[0][5:] for part in step]


# ---- arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0])])
def test_loss_of_classes(smoothing, weights):
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 2, 2])
    found = classification_loss(logits, torch.eye(3)[labels], False, weights, smoothing)
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for number, value in enumerate(row):
            target = (1 - smoothing) * (number == label) + smoothing / 3
            expected += target * (1.0 if weights is None else weights[number].item()) * (log_sum - value) / 5
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_missing_labels_give_no_gradient():
    logits = torch.randn(4, 2, requires_grad=True)
    targets = torch.tensor([[1.0, math.nan], [0.0, 1.0], [math.nan, math.nan], [1.0, 0.0]])
    weights = torch.tensor([1.0, 2.0])
    loss = classification_loss(logits, targets, True, weights, 0.1)
    loss.backward()
    assert ((logits.grad == 0) == targets.isnan()).all()
    expected = []
    for row, column in torch.nonzero(~targets.isnan()).tolist():
        p, y = logits[row, column].sigmoid().item(), targets[row, column].item() * 0.9 + 0.05
        expected.append(-weights[column].item() * y * math.log(p) - (1 - y) * math.log(1 - p))
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)
    nothing = classification_loss(logits, torch.full((4, 2), math.nan), True)
    assert nothing.item() == 0


def test_a_known_label_weighs_the_same_in_any_micro_batch():
    targets = torch.tensor([[1.0, math.nan], [math.nan, math.nan], [0.0, 1.0], [1.0, 0.0]])
    logits = torch.randn(4, 2, requires_grad=True)
    share = 1 - targets.isnan().float().mean().item()
    (whole,) = torch.autograd.grad(classification_loss(logits, targets, True), logits)
    parts = zip(logits.split(2), targets.split(2), strict=True)
    halves = sum(classification_loss(part, wanted, True, known_share=share) / 2 for part, wanted in parts)
    torch.testing.assert_close(torch.autograd.grad(halves, logits)[0], whole)


def test_balanced_class_weights():
    targets = torch.eye(3)[torch.tensor([0, 0, 0, 1, 2, 2])]
    assert class_weights(targets, balanced=True, multi_label=False).tolist() == pytest.approx([6 / 9, 2.0, 1.0])
    assert class_weights(targets, balanced=False, multi_label=False).tolist() == [1, 1, 1]
    targets = torch.tensor([[1, 0], [0, math.nan], [0, 1], [0, 0.0]])
    assert class_weights(targets, balanced=True, multi_label=True).tolist() == [3, 2]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)])
def test_mixing_follows_the_seed(mixup, cutmix):
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 1, 8, 8)
    targets = torch.eye(6)
    found = [mix(images, targets, mixup, cutmix, seed) for seed in (1, 1, 2, 3, 4, 5, 6)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert len({tuple(mixed.flatten().tolist()) for mixed, _ in found}) == 6
    for mixed, weights in found:
        assert torch.allclose(weights.sum(dim=1), torch.ones(6))
        # The mean grey value of a mixed image is that of its parts, as their targets weigh them.
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), weights @ torch.arange(6.0), atol=1e-5)
    whole = [torch.equal(mixed, mixed.round()) for mixed, _ in found[1:]]  # pasted pixels stay what they are
    assert all(whole) if not mixup else not any(whole) if not cutmix else len(set(whole)) == 2


def test_nothing_is_mixed_by_default():
    images, targets = torch.rand(3, 1, 4, 4), torch.eye(3)
    mixed = mix(images, targets, Arguments.mixup, Arguments.cutmix, 0)
    assert mixed[0] is images
    assert mixed[1] is targets


@pytest.mark.parametrize("multi_label", [False, True])
def test_temperature_has_the_least_cross_entropy(multi_label):
    from scipy.optimize import minimize_scalar

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 3, generator=generator)
    classes = torch.distributions.Categorical(logits=logits / 2.5)
    torch.manual_seed(1)
    targets = (torch.rand(200, 3) < (logits / 2.5).sigmoid()).float() if multi_label else torch.eye(3)[classes.sample()]
    if multi_label:
        targets[:20, 1] = math.nan

    def loss(temperature: float) -> float:
        return classification_loss(logits / temperature, targets, multi_label).item()

    expected = minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x
    found = evaluate.fit_temperature(logits, targets, multi_label)
    assert found == pytest.approx(expected, rel=0.01)
    assert 1.5 < found < 4


# ---- evaluation ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(shard, finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "results.json"
    words = ["--model", str(finished / "final"), "--data", shard, *COLUMNS, "--splits", "val", "test"]
    return [*words, "--temperature_from", "val", "--resamples", "50", "--batch_size", "3"], path


def test_evaluation_agrees_with_scikit_learn(shard, finished, reported):
    from sklearn import metrics

    words, path = reported
    result = evaluate.main([*words, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert result["model"] == "final"
    assert list(result["splits"]) == ["val", "test"]
    model = AutoModelForImageClassification.from_pretrained(finished / "final").eval()
    processor = AutoImageProcessor.from_pretrained(finished / "final")
    rows = read_table(shard).where("pneumonia_split", "test")
    truth = [sorted(CLASSES).index(label) for label in rows.column("pneumonia_label")]
    images = [open_image(cell, "") for cell in rows.column("image")]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    fitted = read_table(shard).where("pneumonia_split", "val")
    names = torch.tensor([sorted(CLASSES).index(label) for label in fitted.column("pneumonia_label")])
    with torch.no_grad():
        inputs = processor([open_image(cell, "") for cell in fitted.column("image")], return_tensors="pt")
        temperature = evaluate.fit_temperature(model(**inputs).logits, torch.eye(3)[names])
    assert result["temperature"]["value"] == pytest.approx(temperature, rel=1e-4)
    p = (logits / temperature).softmax(dim=1).double().numpy()
    entry = result["splits"]["test"]
    assert entry["images"] == 8
    assert entry["accuracy"] == pytest.approx(metrics.accuracy_score(truth, p.argmax(axis=1)))
    assert entry["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, p.argmax(axis=1)))
    ranked = p / p.sum(axis=1, keepdims=True)
    assert entry["macro_auroc"] == pytest.approx(metrics.roc_auc_score(truth, ranked, multi_class="ovr"))
    assert entry["brier"] == pytest.approx(((p - np.eye(3)[truth]) ** 2).sum(axis=1).mean(), rel=1e-4)
    plain = logits.softmax(dim=1).numpy()
    without = ((plain - np.eye(3)[truth]) ** 2).sum(axis=1).mean()
    assert entry["without_temperature"]["brier"] == pytest.approx(without, rel=1e-4)
    assert entry["accuracy_ci95"][0] <= entry["accuracy"] <= entry["accuracy_ci95"][1]


@pytest.mark.slow
def test_two_processes_report_what_one_does(reported, tmp_path):
    """Images do not share out evenly: none is counted twice."""
    words, _ = reported
    alone = evaluate.main([*words, "--splits", "val", "test", "--output", str(tmp_path / "one.json")])
    group = start_group(evaluate.main, [*words, "--output", str(tmp_path / "two.json")], tmp_path / "console")
    assert finish(group) == [0, 0], (tmp_path / "console.0").read_text()
    assert set(tmp_path.glob("*.json")) == {tmp_path / "one.json", tmp_path / "two.json"}
    assert close(json.loads((tmp_path / "two.json").read_text()), json.loads(json.dumps(alone)))


def close(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-4) if isinstance(one, float) else one == other


@pytest.mark.slow
def test_training_by_two_processes(shard, pretrained, tmp_path):
    """Two seeds, one after the other, with the processes still together."""
    flags = [*COLUMNS, *BRIEF, *HARD, "--init_from", pretrained, "--seeds", "0", "1", "--steps", "2"]
    words = ["--data", shard, "--output", str(tmp_path / "two"), *flags]
    assert finish(start_group(finetune_classification.main, words, tmp_path / "console")) == [0, 0], (
        tmp_path / "console.0"
    ).read_text()
    run(shard, tmp_path / "one", *flags)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert close(one, two)


# ---- leaks and broken files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    """Row 2 of train stands among the rows test too, under another name and of an unknown patient."""
    path = write_set(tmp_path_factory.mktemp("leaking") / "set.parquet", SPLITS)
    table = pq.read_table(path)
    copy = table.slice(2, 1).to_pylist()[0] | {"id": "copy", "patient": None, "pneumonia_split": "test"}
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([copy], table.schema)]), path)
    return str(path)


@pytest.mark.slow
def test_a_leaking_split_is_refused(leaking, pretrained, tmp_path):
    with pytest.raises(SpcxrError, match=r"pneumonia_split leaks: 1 nearly equal image pair\(s\): .*'copy'") as told:
        run(leaking, tmp_path / "run", "--init_from", pretrained)
    assert "--exclude FILE" in str(told.value) and "--split pneumonia_split --copies-list" in str(told.value)
    assert "--allow_leaks images" in str(told.value) and "\n" not in str(told.value)
    (tmp_path / "copies.txt").write_text("# 1 copy\nrow-2\n")
    for name, flags in (("without", ["--exclude", str(tmp_path / "copies.txt")]), ("all", ["--allow_leaks", "images"])):
        run(leaking, tmp_path / name, "--init_from", pretrained, "--steps", "1", *flags)
    found = [json.loads((tmp_path / name / "results.json").read_text())["images"] for name in ("without", "all")]
    assert [images["train"] for images in found] == [12, 13]


def test_a_patient_on_two_sides_is_refused(pretrained, tmp_path):
    path = write_set(tmp_path / "set.parquet", SPLITS)
    table = pq.read_table(path)
    patients = ["one" if row in (0, 25) else None for row in range(len(table))]
    place = table.column_names.index("patient")
    pq.write_table(table.set_column(place, "patient", pa.array(patients)), path)
    with pytest.raises(SpcxrError, match=r"1 patient\(s\) on several sides: patient 'one'.*--allow_leaks patients"):
        run(str(path), tmp_path / "run", "--init_from", pretrained)
    with pytest.warns(UserWarning, match="patient 'one'"):
        run(str(path), tmp_path / "run", "--init_from", pretrained, "--steps", "1", "--allow_leaks", "patients")


@pytest.mark.slow
def test_broken_files_are_skipped_and_listed_or_stop_the_run(pretrained, tmp_path, capsys):
    shard = break_rows(write_set(tmp_path / "set.parquet", SPLITS), {3, 14, 20})
    flags = ["--init_from", pretrained, "--steps", "2", "--cache_folder", str(tmp_path / "cache")]
    with pytest.raises(SpcxrError, match=r"row-3: the picture is damaged or cut short"):
        run(shard, tmp_path / "stopped", *flags)
    for _ in range(2):  # the second time from the cache
        output = run(shard, tmp_path / "run", *flags, "--on_error", "skip")
        assert f"skipped 2 broken files, listed in {output / 'skipped.csv'}" in capsys.readouterr().out.splitlines()
        lines = (output / "skipped.csv").read_text().splitlines()
        assert [line.partition(",")[0] for line in lines] == ["id", "row-14", "row-3"]
        assert "[pneumonia_split=train]: row-3: the picture is damaged or cut short" in lines[2]
        result = json.loads((output / "results.json").read_text())
        assert result["images"] == {"train": 12, "val": 5}
        assert result["train_images_by_class"] == {"bacterial": 4, "normal": 4, "viral": 4}  # row 3 was normal
    words = ["--model", str(output / "final"), "--data", shard, *COLUMNS, "--splits", "val", "test"]
    words += ["--resamples", "20"]
    with pytest.raises(SpcxrError, match="row-14"):
        evaluate.main(words)
    words += ["--on_error", "skip", "--output", str(tmp_path / "report" / "results.json")]
    report = evaluate.main(words)["splits"]
    assert [(report[split]["images"], report[split]["broken"]) for split in ("val", "test")] == [(5, 1), (7, 1)]
    listed = (tmp_path / "report" / "skipped.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in listed] == ["id", "row-14", "row-20"]


def test_a_set_that_is_more_than_half_broken_stops_in_any_case(pretrained, tmp_path):
    shard = break_rows(write_set(tmp_path / "set.parquet", SPLITS), set(range(7)))
    with pytest.raises(SpcxrError, match="7 of 13 files are broken, more than half; the first: .*row-0"):
        run(shard, tmp_path / "run", "--init_from", pretrained, "--on_error", "skip")
    assert not (tmp_path / "run" / "skipped.csv").exists()


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from_scratch", "false"], "give --init-from CHECKPOINT"),
        (["--label_column", "no"], r"pneumonia_split=train\]: no column 'no'; there are image, "),
        (["--split_column", "no"], "set.parquet: no column 'no'"),
        (["--classes", "normal"], "holds one class only: normal"),
        (["--classes", "normal", "normal"], "a class appears twice"),
        (["--classes", "normal", "covid"], "the rows train have no images of covid"),
        (["--label_fraction", "0.1"], "label_fraction 0.1 leaves no images of bacterial, "),
        (["--label_fraction", "0"], r"label_fraction must lie in \(0, 1\]; got 0.0"),
        (["--label_fraction", "0.3"], "a batch of 6 is larger than the set of "),
        (["--batch_size", "15"], "a batch of 15 is larger than the set of 13 images"),
        (["--batch_size", "15", "--balance", "sampling"], "a batch of 15 is larger than the set of 13 images"),
        (["--metric", "f1"], "metric must be auroc, average_precision, .* or loss; got 'f1'"),
        (["--metric", "accuracy", "--multi_label", "true"], "metric must be auroc, average_precision or loss"),
        (["--multi_label", "true"], "multi_label needs lists or structs in the column of labels; it holds '"),
        (["--cache", "none"], "cache must be memory or device"),
        (["--balance", "yes"], "balance must be none, loss or sampling; got 'yes'"),
        (["--freeze_encoder", "true", "--lora_rank", "2"], "freeze_encoder and lora_rank exclude each other"),
        (["--label_smoothing", "1"], r"label_smoothing must lie in \[0, 1\)"),
        (["--mixup", "-1"], "mixup must be at least 0"),
        (["--crop_scale", "0.5"], "crop_scale is the least and the largest area"),
        (["--seeds", "1", "1"], "a seed appears twice"),
    ],
)
def test_refusals(shard, tmp_path, flags, message):
    with pytest.raises(SpcxrError, match=message) as refusal:
        run(shard, tmp_path, "--from_scratch", "true", "--size", "tiny", *flags)
    assert "\n" not in str(refusal.value)


def test_a_class_of_val_that_train_lacks(tmp_path):
    shard = write_set(tmp_path / "set.parquet", ["train", "train", "val"] * 3)  # viral in val alone
    with pytest.raises(SpcxrError, match="no image of viral, which pneumonia_label of val holds"):
        run(str(shard), tmp_path, "--from_scratch", "true")


def test_a_metric_that_val_leaves_undefined(tmp_path):
    shard = write_set(tmp_path / "set.parquet", ["train"] * 7 + ["val"])
    with pytest.raises(SpcxrError, match="auroc is not defined on it"):
        run(str(shard), tmp_path, "--from_scratch", "true")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere: there is no such folder"),
        ("bert", "bert: no .safetensors weights in this folder"),
        ("resnet", "resnet: no .safetensors weights in this folder"),  # a config without weights
    ],
)
def test_what_is_no_model_to_start_from(shard, peers, tmp_path, folder, message):
    with pytest.raises(SpcxrError, match=message) as refusal:
        run(shard, tmp_path, "--init_from", str(peers / folder))
    assert "\n" not in str(refusal.value)


def test_a_package_that_is_missing_is_told_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SpcxrError, match="scikit-learn is missing: pip install"):
        run("no-set-is-read", tmp_path, "--from_scratch", "true")


def test_a_model_folder_that_is_missing_is_called_so(tmp_path):
    with pytest.raises(SpcxrError, match="there is no such folder, and no Hub id is like that"):
        load_classifier(str(tmp_path / "runs" / "final"))


def test_adapters_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = SpcxrForImageClassification(SpcxrConfig(**TINY, image_size=32))
    with pytest.raises(SpcxrError, match="peft is missing: pip install"):
        add_adapters(model, rank=2, alpha=16.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "pretrained"], "no weights for .* of SpcxrForImageClassification: classifier.bias"),
        (["--label_column", "no"], "no column 'no'"),
        (["--splits", "elsewhere"], "no row has pneumonia_split = 'elsewhere'"),
        (["--classes", "normal", "ill"], "its classes are bacterial, normal, viral; --classes names normal, ill"),
        (["--label_column", "patient"], "which the model does not know"),
        (["--resamples", "0"], "resamples must be at least 1"),
    ],
)
def test_evaluation_refuses(shard, finished, pretrained, flags, message):
    flags = [pretrained if word == "pretrained" else word for word in flags]
    with pytest.raises(SpcxrError, match=message):
        evaluate.main(["--model", str(finished / "final"), "--data", shard, *COLUMNS, *flags])


def test_an_untrained_head_is_not_evaluated(shard, pretrained, finished, tmp_path):
    SpcxrForPreTraining.from_pretrained(pretrained).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(finished / "final").save_pretrained(tmp_path)
    with pytest.raises(SpcxrError, match="no weights for 2 parameters of .*: classifier.bias, classifier.weight"):
        evaluate.main(["--model", str(tmp_path), "--data", shard, *COLUMNS])


def test_processes_that_run_alone_are_refused(shard, finished, monkeypatch):
    PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpcxrError, match="2 processes were started but each runs alone"):
        evaluate.main(["--model", str(finished / "final"), "--data", shard, *COLUMNS])
