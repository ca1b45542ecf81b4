"""The script that measures exports: each part renewed by itself, the recipe's columns, and the tables it writes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spcxr_hf import (
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
)
from tests.common import SIDE, build, tiny_config
from tests.made_up import CLASSES, write_set
from training_scripts.benchmarks import speed_onnx as script

KINDS = {
    "classifier": (SpcxrForImageClassification, CLASSES),
    "lungs": (SpcxrForSemanticSegmentation, ("background", "lung")),
}


def prepare(folder: Path, kind: str) -> list[str]:
    """A model and a set to measure it on; the words of the command, less its parts."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime")
    model_class, names = KINDS[kind]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    build(model_class, tiny_config(num_labels=len(names), **labels)).save_pretrained(folder / kind)
    SpcxrImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / kind)
    (folder / kind / "recipe.yaml").write_text("label_column: pneumonia_label\nsplit_column: pneumonia_split\n")
    data = write_set(folder / "set.parquet", ["train", "val", "val", "val", "val", "val"])
    words = ["--model", str(folder / kind), "--output", str(folder / "onnx.json"), "--repeats", "1", "--threads", "1"]
    return [*words, "--data", str(data)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_part_by_itself(tmp_path, monkeypatch, kind):
    words = prepare(tmp_path, kind)
    folder, output = tmp_path / kind, tmp_path / "onnx.json"
    monkeypatch.setattr(script, "lacks_vnni", lambda: False)
    script.main([*words, "--parts", "accuracy"])
    assert "accuracy without VNNI" not in json.loads(output.read_text())[kind]
    accuracy = json.loads(output.read_text())[kind]["accuracy"]
    assert accuracy["rows"] == 5
    assert accuracy["largest_difference_of_outputs"]["float"] < 1e-4 < accuracy["largest_difference_of_outputs"]["int8"]
    assert set(accuracy["figures"]) == ({"dice"} if kind == "lungs" else {"auroc", "accuracy", "decisions kept"})

    weights = load_file(folder / "model.safetensors")
    script.main([*words, "--batch_sizes", "1", "2", "--parts", "speed"])
    found = json.loads(output.read_text())[kind]
    assert found["accuracy"] == accuracy
    assert found["speed"]["threads"] == 1 and found["speed"]["batch 2"]["times_as_fast"].keys() == {"float", "int8"}
    page = tmp_path / "page.md"
    page.write_text("<!-- onnx -->\n<!-- /onnx -->\n")
    script.main(["--output", str(output), "--render", str(page)])
    assert f"| `{kind}` | {'dice' if kind == 'lungs' else 'auroc'} (5 images) |" in page.read_text()
    assert "(batch 1), " in page.read_text()

    if kind == "classifier":  # other weights, other figures: nothing is taken from the file
        save_file(
            {name: -one if name == "classifier.weight" else one for name, one in weights.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        script.main([*words, "--parts", "accuracy", "--alternatives", "true"])
        again = json.loads(output.read_text())[kind]["accuracy"]
        assert again["figures"]["auroc"]["int8"] != accuracy["figures"]["auroc"]["int8"]
        assert {"dynamic", "static"} <= again["largest_difference_of_outputs"].keys()


@pytest.mark.slow
def test_what_other_processors_give_is_kept_beside(tmp_path, monkeypatch):
    words = [*prepare(tmp_path, "classifier"), "--parts", "accuracy"]
    monkeypatch.setattr(script, "lacks_vnni", lambda: True)
    script.main(words)
    script.main([*words, "--reduce_range", "true"])
    found = json.loads((tmp_path / "onnx.json").read_text())["classifier"]
    eight, without, seven = (found[part] for part in ("accuracy", "accuracy without VNNI", "accuracy in 7 bits"))
    assert eight["figures"]["auroc"]["float"] == without["figures"]["auroc"]["float"]
    assert seven["largest_difference_of_outputs"]["int8"] != eight["largest_difference_of_outputs"]["int8"]
    lost = [part["points_lost"]["auroc"]["int8"] for part in (eight, without, seven)]
    assert " | ".join(["", *(f"{each:.2f}" for each in lost), ""]) in script.table_of({"classifier": found})


def test_what_cannot_be_measured_is_told(tmp_path: Path):
    with pytest.raises(SpcxrError, match="give --model to measure, or --render PAGE"):
        script.main([])
    with pytest.raises(SpcxrError, match="no part size; there are accuracy, speed"):
        script.main(["--model", str(tmp_path), "--parts", "size"])
    with pytest.raises(SpcxrError, match="--reduce_range goes with --parts accuracy"):
        script.main(["--model", str(tmp_path), "--reduce_range", "true"])
    with pytest.raises(SpcxrError, match="must be at least 1"):
        script.main(["--model", str(tmp_path), "--threads", "0"])
