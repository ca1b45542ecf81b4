"""The segmentation and probe scripts on a few made-up radiographs: they run, resume exactly, keep their promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining, SpcxrImageProcessor
from spcxr_hf.data.table import open_mask, structure_masks
from spcxr_hf.modeling.configuration_spcxr import SIZES
from spcxr_hf.training import engine as run_module
from tests.made_up import SMALL_PRESET, encoded, picture, write_set
from training_scripts import evaluate, finetune_segmentation, linear_probe

pytestmark = pytest.mark.slow  # many starts of a second each

SCRIPTS = Path(finetune_segmentation.__file__).parent
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 48}
SPLITS = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
BRIEF = ["--image_size", "32", "--stored_size", "40", "--steps", "4", "--batch_size", "5", "--save_every", "2"]


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
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained")
    SpcxrForPreTraining(SpcxrConfig(**TINY, segmentation_hidden_size=32, drop_path_rate=0.2)).save_pretrained(folder)
    return str(folder)


def run(shard: str, output: Path, *flags: str) -> None:
    finetune_segmentation.main(["--data", shard, "--output", str(output), *BRIEF, *flags])


@pytest.fixture(scope="module")
def finished(shard, pretrained, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run(shard, output, "--init_from", pretrained)
    return output


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# Fine-tuning


def test_what_a_run_leaves_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        ".lock",
        "best",
        "checkpoint-2",
        "checkpoint-4",
        "final",
        "log.csv",
        "loss.png",
        "masks.png",
        "recipe.yaml",
    } | {"report.md"}
    assert (finished / "final" / "recipe.yaml").read_text() == (finished / "recipe.yaml").read_text()
    lines = (finished / "log.csv").read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate,val_dice"
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "4"]
    assert Image.open(finished / "masks.png").width == 3 * 40 + 2 * 4


def test_the_final_model_loads_and_segments(finished):
    model = AutoModelForSemanticSegmentation.from_pretrained(finished / "final")
    processor = AutoImageProcessor.from_pretrained(finished / "final")
    assert model.config.id2label == {0: "background", 1: "lung"}
    assert model.config.image_size == 32
    inputs = processor(Image.new("L", (50, 60)), return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 1, 32, 32)
    assert model(**inputs).logits.shape == (1, 2, 32, 32)


def test_the_best_on_val_becomes_the_final_one(finished):
    state = json.loads((finished / "checkpoint-4" / "training_state.json").read_text())
    rows = [line.split(",") for line in (finished / "log.csv").read_text().splitlines()[1:]]
    assert state["best"] == max(float(row[3]) for row in rows)
    assert weights(finished / "final") == weights(finished / f"checkpoint-{state['best_step']}")


@pytest.mark.slow
def test_the_encoder_comes_from_the_checkpoint(pretrained, shard, tmp_path):
    """Without a step that matters, the encoder is the pretrained one; from scratch it is not."""
    run(
        shard,
        tmp_path / "a",
        "--init_from",
        pretrained,
        "--image_size",
        "48",
        "--stored_size",
        "48",
        "--steps",
        "1",
        "--learning_rate",
        "0",
    )
    run(shard, tmp_path / "b", "--init_from", pretrained, "--from_scratch", "true", "--steps", "1")
    before = SpcxrForPreTraining.from_pretrained(pretrained).spcxr.state_dict()
    for name, same in (("a", True), ("b", False)):
        model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / name / "checkpoint-1")
        assert model.config.hidden_size == 32
        found = torch.equal(model.spcxr.encoder.layers[1].mlp.fc1.weight, before["encoder.layers.1.mlp.fc1.weight"])
        assert found == same


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(shard, pretrained, finished, tmp_path, monkeypatch):
    save = run_module.save_checkpoint

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(shard, tmp_path, "--init_from", pretrained)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not (tmp_path / "final").exists()
    run(shard, tmp_path, "--init_from", pretrained)
    for name in ("checkpoint-4", "final"):
        assert weights(tmp_path / name) == weights(finished / name)
    optimizers = [folder / "checkpoint-4" / "optimizer.safetensors" for folder in (tmp_path, finished)]
    assert optimizers[0].read_bytes() == optimizers[1].read_bytes()


def test_a_finished_run_only_writes_its_final_model_again(shard, pretrained, finished):
    before = weights(finished / "checkpoint-4"), (finished / "log.csv").read_text()
    run(shard, finished, "--init_from", pretrained)
    assert (weights(finished / "checkpoint-4"), (finished / "log.csv").read_text()) == before


def test_training_never_opens_what_it_is_reported_on(tmp_path, pretrained):
    shard = write_set(tmp_path / "set.parquet", [*SPLITS, "shift"], unreadable=["test", "shift"])
    run(str(shard), tmp_path / "run", "--init_from", pretrained, "--steps", "1")
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --init-from CHECKPOINT"),
        (["--from_scratch", "true", "--mixed_precision", "fp8"], "mixed_precision must be no, bf16 or fp16"),
        (["--from_scratch", "true", "--batch_size", "13"], "a batch of 13 is larger than the set of 12"),
    ],
)
def test_refusals(shard, tmp_path, flags, message):
    with pytest.raises(SpcxrError, match=message):
        run(shard, tmp_path, *flags)


@pytest.mark.slow
def test_as_a_command_with_the_smoke_recipe(shard, tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "finetune_segmentation.py"),
        str(SCRIPTS / "recipes/finetune_segmentation_smoke.yaml"),
    ]
    flags = ["--data", shard, "--output", str(tmp_path / "run"), "--mixed_precision", "bf16", *BRIEF, "--steps", "2"]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}
    )
    assert done.returncode == 0, done.stderr
    assert "image/s" in done.stderr
    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run" / "final").config
    assert config.hidden_size == 192


@pytest.mark.slow
def test_two_processes(shard, pretrained, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(SCRIPTS / "finetune_segmentation.py"), "--data", shard, "--output", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--init_from", pretrained, *BRIEF, "--batch_size", "4", "--micro_batch_size", "2"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


# Evaluation


def test_report(shard, finished, tmp_path):
    flags = ["--model", str(finished / "final"), "--data", shard, "--output", str(tmp_path / "results.json")]
    result = evaluate.main([*flags, "--splits", "val", "test"])
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert result["model"] == "final"
    assert list(result["splits"]) == ["val", "test"]
    for entry in result["splits"].values():
        assert entry["images"] == 6
        for figures in (entry["model"], entry["mean_training_mask"]):
            assert figures["dice_ci95"][0] <= figures["dice"] <= figures["dice_ci95"][1]
            assert 0 <= figures["iou"] <= figures["dice"] <= 1
            low, high = figures["hausdorff95_ci95"]
            assert 0 <= low <= figures["hausdorff95"] <= high < 1.5  # of the image's height
        assert entry["mean_training_mask"]["dice"] > 0.8  # the made-up lungs hardly move


def test_a_model_that_draws_the_human_masks_has_dice_1(shard, finished, monkeypatch):
    def human_masks(arguments, loaded, table):
        for cell in table.column("lung_mask"):
            yield {"lung": torch.from_numpy(np.array(open_mask(cell, ""))) > 127}

    monkeypatch.setattr(evaluate, "predict_masks", human_masks)
    result = evaluate.main(["--model", str(finished / "final"), "--data", shard, "--baseline", "false"])
    assert result["splits"]["val"]["model"]["dice"] == 1
    assert result["splits"]["val"]["model"]["iou"] == 1
    assert result["splits"]["val"]["model"]["hausdorff95"] == 0
    assert "mean_training_mask" not in result["splits"]["val"]


def test_a_model_without_lungs_is_refused(shard, pretrained, finished, tmp_path):
    model = AutoModelForSemanticSegmentation.from_pretrained(finished / "final")
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model.save_pretrained(tmp_path)
    SpcxrImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(SpcxrError, match="there is no 'lung' among them"):
        evaluate.main(["--model", str(tmp_path), "--data", shard])


# Structures that overlap

STRUCTURES = ["left lung", "right lung", "heart"]


@pytest.fixture(scope="module")
def anatomy_shard(tmp_path_factory):
    """Lungs cut in the middle of the image, and a heart that overlaps both; folds without `val`."""
    path = write_set(tmp_path_factory.mktemp("anatomy") / "set.parquet", ["train"] * 8 + ["test"] * 4)
    table = pq.read_table(path)
    cells = []
    for cell in table["lung_mask"].to_pylist():
        lungs = np.array(open_mask(cell, "")) > 127
        y, x = np.mgrid[: len(lungs), : len(lungs)] / len(lungs) - 0.5
        heart = (x / 0.15) ** 2 + ((y - 0.15) / 0.12) ** 2 < 1
        bits = (lungs & (x > 0)) * 1 + (lungs & (x <= 0)) * 2 + heart * 4
        cells.append(encoded(bits.astype(np.uint8)))
    table = table.append_column("anatomy_mask", pa.array(cells, table.schema.field("lung_mask").type))
    table = table.append_column("anatomy_split", table["lung_split"])
    pq.write_table(table.drop_columns(["lung_mask", "lung_split"]), path)
    return str(path)


@pytest.fixture(scope="module")
def anatomy(anatomy_shard, pretrained, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    flags = ["--init_from", pretrained, "--mask_column", "anatomy_mask", "--split_column", "anatomy_split"]
    flags += ["--structures", *STRUCTURES, "--flip", "0", "--head_scale", "10", "--frozen_blocks", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run(anatomy_shard, output, *flags, "--steps", "40", "--learning_rate", "1e-3", "--warmup_steps", "0")
    return output


def test_structures(anatomy, anatomy_shard, pretrained):
    model = AutoModelForSemanticSegmentation.from_pretrained(anatomy / "final")
    assert model.config.id2label == dict(enumerate(STRUCTURES))
    assert model.config.problem_type == "multi_label_classification"
    assert AutoImageProcessor.from_pretrained(anatomy / "final").overlapping_labels
    before = SpcxrForPreTraining.from_pretrained(pretrained).spcxr.encoder.layers
    layers = model.spcxr.encoder.layers
    assert torch.equal(layers[0].mlp.fc1.weight, before[0].mlp.fc1.weight)  # frozen
    assert not torch.equal(layers[1].mlp.fc1.weight, before[1].mlp.fc1.weight)
    assert weights(anatomy / "final") == weights(anatomy / "checkpoint-40")  # there is no val to choose on
    result = evaluate.main(
        ["--model", str(anatomy / "final"), "--data", anatomy_shard, "--splits", "test", "--image_height", "358.4"]
    )
    entry = result["splits"]["test"]
    assert list(entry["structures"]) == ["lungs", *STRUCTURES]
    for figures in entry["structures"].values():
        for report in figures.values():
            assert 0 <= report["iou_ci95"][0] <= report["iou"] <= report["iou_ci95"][1] <= 1
            assert 0 <= report["boundary_distance"] <= report["hausdorff95"] or report["hausdorff95_infinite"]
    assert entry["structures"]["heart"]["mean_training_mask"]["iou"] > 0.95  # it does not move
    first, last = (float(line.split(",")[1]) for line in (anatomy / "log.csv").read_text().splitlines()[1::19][:2])
    assert last < 0.8 * first


def test_masks_as_drawn_have_the_drawn_ratio(anatomy, anatomy_shard, monkeypatch):
    def drawn(arguments, loaded, table):
        for cell in table.column("anatomy_mask"):
            masks = structure_masks(torch.from_numpy(np.array(open_mask(cell, "", 3))), 3)
            yield dict(zip(STRUCTURES, masks, strict=True))

    monkeypatch.setattr(evaluate, "predict_masks", drawn)
    arguments = ["--model", str(anatomy / "final"), "--data", anatomy_shard, "--splits", "test", "--baseline", "false"]
    entry = evaluate.main(arguments)["splits"]["test"]
    assert {name: figures["model"]["iou"] for name, figures in entry["structures"].items()} == dict.fromkeys(
        ["lungs", *STRUCTURES], 1
    )
    ratio = entry["cardiothoracic_ratio"]
    assert ratio["mean_absolute_error"] == 0 and ratio["not_measured"] == 0
    assert 0.2 < ratio["mean_drawn"] == ratio["mean_model"] < 0.6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--structures", "left lung", "heart"], "a flip exchanges left and right.* add --flip 0"),
        (["--structures", "heart", "heart"], "at most 8 different names"),
    ],
)
def test_refused_structures(flags, message, anatomy_shard, tmp_path):
    with pytest.raises(SpcxrError, match=message):
        run(anatomy_shard, tmp_path / "run", *flags)


# Linear probe


PROBE = ["--label_fraction", "0.5", "1.0", "--seeds", "0", "1", "--c_values", "0.01", "1.0", "--image_size", "32"]


@pytest.mark.parametrize("random_init", ["false", "true"])
def test_probe(shard, pretrained, tmp_path, random_init):
    flags = ["--model", pretrained, "--data", shard, "--output", str(tmp_path / "probe.json")]
    result = linear_probe.main([*flags, *PROBE, "--random_init", random_init])
    assert json.loads((tmp_path / "probe.json").read_text()) == result
    assert result["images"] == {"train": 12, "val": 6, "test": 6}
    assert result["features"] == 32
    assert set(result["tasks"]) == {"pneumonia", "three_way"}
    half, whole = result["tasks"]["pneumonia"]["label_fraction"].values()
    assert half["labels"] == 6
    assert whole["labels"] == 12
    assert len(half["seeds"]) == 2
    assert len(whole["seeds"]) == (2 if random_init == "true" else 1)  # all labels: no draw, but other random weights
    assert half["test"]["sd"] is not None
    assert whole["test"]["mean"] > 0.7  # pneumonia is brighter here
    assert linear_probe.main([*flags, *PROBE, "--random_init", random_init]) == result


def test_probe_of_another_model_of_the_library(shard, tmp_path):
    from transformers import ViTConfig, ViTModel

    config = {name: value for name, value in TINY.items() if name != "image_size"}
    ViTModel(ViTConfig(**config, image_size=64)).save_pretrained(tmp_path)  # three channels, and no image processor
    result = linear_probe.main(["--model", str(tmp_path), "--data", shard, *PROBE, "--pooling", "cls", "--layer", "1"])
    assert result["features"] == 32
    assert result["layer"] == 1


def test_labels_are_drawn_in_proportion():
    classes = np.repeat([0, 1, 2], [100, 200, 3])
    rows = linear_probe.draw_labels(classes, 0.1, seed=0)
    assert np.bincount(classes[rows]).tolist() == [10, 20, 2]
    assert len(set(rows)) == 32
    assert (rows == linear_probe.draw_labels(classes, 0.1, seed=0)).all()
    assert (rows != linear_probe.draw_labels(classes, 0.1, seed=1)).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pooling", "max"], "pooling must be model, mean or cls"),
        (["--layer", "1"], "--layer needs --pooling mean or cls"),
        (["--label_fraction", "0"], "label_fraction must lie in"),
    ],
)
def test_probe_refusals(shard, pretrained, flags, message):
    with pytest.raises(SpcxrError, match=message):
        linear_probe.main(["--model", pretrained, "--data", shard, *flags])


@pytest.mark.slow
def test_broken_files_are_skipped_and_a_leak_is_refused(tmp_path, pretrained):
    path = write_set(tmp_path / "set.parquet", SPLITS)
    rows = pq.read_table(path).to_pylist()
    rows[1]["lung_mask"] = None
    rows[13]["image"] = rows[19]["image"] = {"bytes": b"no picture", "path": None}
    rows.append(rows[4] | {"id": "copy", "patient": None, "lung_split": "test"})
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)
    flags = ["--init_from", pretrained, "--steps", "1"]
    with pytest.raises(
        SpcxrError,
        match=r"lung_split leaks: 1 nearly .*audit SET --split lung_split --copies-list",
    ):
        run(str(path), tmp_path / "run", *flags)
    (tmp_path / "copies.txt").write_text("row-4\n")
    flags += ["--exclude", str(tmp_path / "copies.txt")]
    with pytest.raises(SpcxrError, match="row-1: no mask"):
        run(str(path), tmp_path / "run", *flags)
    run(str(path), tmp_path / "run", *flags, "--on_error", "skip")
    listed = (tmp_path / "run" / "skipped.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in listed] == ["id", "row-1", "row-13"]
    words = ["--model", str(tmp_path / "run" / "final"), "--data", str(path), "--splits", "test", "--on_error", "skip"]
    report = evaluate.main([*words, "--output", str(tmp_path / "report" / "results.json")])
    assert report["splits"]["test"]["images"] == 6  # seven, of which one is broken
    listed = (tmp_path / "report" / "skipped.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in listed] == ["id", "row-1", "row-19"]


@pytest.mark.slow
def test_a_folder_of_images_and_masks_in_one_command(tmp_path, capsys):
    for seed in range(12):
        for kind, pixels in zip(("images", "masks"), picture(seed), strict=True):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set" / kind / f"{seed}.png")
    flags = ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "run"), "--from_scratch", "true", *BRIEF]
    finetune_segmentation.main([*flags, "--batch_size", "2"])
    assert "set: has no splits; drawn by patient: 10 train, 1 val, 1 test" in capsys.readouterr().err
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    report = ["--model", str(tmp_path / "run" / "final"), "--data", str(tmp_path / "set"), "--splits", "val", "test"]
    splits = evaluate.main([*report, "--resamples", "5"])["splits"]
    assert [splits[name]["images"] for name in ("val", "test")] == [1, 1]
