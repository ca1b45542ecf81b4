"""The script that measures exports: each part renewed by itself, the recipe's columns, and the tables it writes."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spcxr_hf import SpcxrError, SpcxrForImageClassification, SpcxrForSemanticSegmentation, SpcxrImageProcessor
from tests.common import SIDE, build, tiny_config
from tests.made_up import CLASSES, write_set
from training_scripts import benchmark_onnx as script

KINDS = {
    "classifier": (SpcxrForImageClassification, CLASSES),
    "lungs": (SpcxrForSemanticSegmentation, ("background", "lung")),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_part_by_itself(tmp_path, kind):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime")
    model_class, names = KINDS[kind]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    folder = tmp_path / kind
    build(model_class, tiny_config(num_labels=len(names), **labels)).save_pretrained(folder)
    SpcxrImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    (folder / "recipe.yaml").write_text("label_column: pneumonia_label\nsplit_column: pneumonia_split\n")
    data = write_set(tmp_path / "set.parquet", ["train", "val", "val", "val", "val", "val"])
    output = tmp_path / "onnx.json"
    words = ["--model", str(folder), "--output", str(output), "--repeats", "1", "--threads", "1"]
    script.main([*words, "--data", str(data), "--parts", "accuracy"])
    accuracy = json.loads(output.read_text())[kind]["accuracy"]
    assert accuracy["rows"] == 5
    assert accuracy["largest_difference_of_outputs"]["float"] < 1e-4 < accuracy["largest_difference_of_outputs"]["int8"]
    assert set(accuracy["figures"]) == ({"dice"} if kind == "lungs" else {"auroc", "accuracy", "decisions kept"})

    assert "accuracy in 7 bits" not in json.loads(output.read_text())[kind]
    script.main([*words, "--data", str(data), "--parts", "accuracy", "--reduce_range", "true"])
    found = json.loads(output.read_text())[kind]
    in_7_bits = found["accuracy in 7 bits"]
    assert found["accuracy"] == accuracy
    assert in_7_bits["largest_difference_of_outputs"]["int8"] != accuracy["largest_difference_of_outputs"]["int8"]

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
    figure, each = next(iter(in_7_bits["points_lost"].items()))
    lost = accuracy["points_lost"][figure]["int8"]
    assert f"| {lost:.2f} | {each['int8']:.2f} |" in page.read_text()

    if kind == "classifier":  # other weights, other figures: nothing is taken from the file
        save_file(
            {name: -one if name == "classifier.weight" else one for name, one in weights.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        script.main([*words, "--data", str(data), "--parts", "accuracy"])
        assert json.loads(output.read_text())[kind]["accuracy"]["figures"] != accuracy["figures"]


def test_what_cannot_be_measured_is_told(tmp_path: Path):
    with pytest.raises(SpcxrError, match="give --model to measure, or --render PAGE"):
        script.main([])
    with pytest.raises(SpcxrError, match="no part size; there are accuracy, speed"):
        script.main(["--model", str(tmp_path), "--parts", "size"])
    with pytest.raises(SpcxrError, match="--reduce_range goes with --parts accuracy"):
        script.main(["--model", str(tmp_path), "--reduce_range", "true"])
    with pytest.raises(SpcxrError, match="must be at least 1"):
        script.main(["--model", str(tmp_path), "--threads", "0"])
