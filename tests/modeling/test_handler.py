"""The Inference Endpoints handler, beside the weights, where the package is not installed.

One other process that cannot import the package loads `handler.py` from each folder and answers every request.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spcxr_hf import (
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
)
from spcxr_hf.hub.folder import write_code
from tests.common import SIDE, build, tiny_config
from tests.made_up import picture

NOTICE = "research use only, not for clinical use"
LABELS = {"id2label": {0: "normal", 1: "bacterial pneumonia", 2: "viral pneumonia"}}
PNEUMONIA = "bacterial pneumonia + viral pneumonia"
POINTS = {PNEUMONIA: {"youden": 0.0, "specificity 0.90": 1.0}, "normal": {"youden": 0.3, "specificity 0.90": 0.6}}
PROCESSOR = SpcxrImageProcessor(size={"height": SIDE, "width": SIDE})
CHECKPOINTS = {
    "embedding": (SpcxrForPreTraining, {}),
    "softmax": (SpcxrForImageClassification, {"operating_points": POINTS, "operating_point": "youden", **LABELS}),
    "sigmoid": (
        SpcxrForImageClassification,
        {"problem_type": "multi_label_classification", "intended_use": {"ages": [18, None], "views": ["PA"]}, **LABELS},
    ),
    "one label": (SpcxrForImageClassification, {"num_labels": 1}),
    "segmentation": (SpcxrForSemanticSegmentation, {"id2label": {0: "background", 1: "lung"}}),
    "anatomy": (
        SpcxrForSemanticSegmentation,
        {
            "id2label": {0: "left lung", 1: "right lung", 2: "heart"},
            "problem_type": "multi_label_classification",
        },
    ),
}

pytestmark = pytest.mark.slow  # a process that imports everything
ELSEWHERE = '''
import base64, importlib.util, json, sys
from pathlib import Path


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("spcxr_hf", "modeling"):
            raise ImportError(f"{name} is not installed here")


sys.meta_path.insert(0, NotInstalled())
import httpx  # what the library would fetch with


def refuse(*args, **kwargs):
    raise AssertionError("something was fetched")


httpx.get = refuse
root = Path(sys.argv[1])


def revive(value):
    """Bytes travel as {"bytes": base64}."""
    if isinstance(value, dict):
        return base64.b64decode(value["bytes"]) if set(value) == {"bytes"} else {k: revive(v) for k, v in value.items()}
    return [revive(item) for item in value] if isinstance(value, list) else value


report = {}
for folder in (path for path in root.iterdir() if (path / "handler.py").is_file()):
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(str(folder))
    requests = json.loads((root / "requests.json").read_text())
    report[folder.name] = {name: handler(revive(request)) for name, request in requests.items()}
print(json.dumps(report))
'''


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def raw(content: bytes) -> dict[str, str]:
    return {"bytes": text(content)}


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


GREY = Image.fromarray(picture(2, 60)[0][:, :44])
DEEP = Image.fromarray(picture(2, 60)[0].astype(np.uint16) * 257)
PNG = encode(GREY)
GOOD: dict[str, Any] = {
    "bytes": raw(PNG),
    "inputs bytes": {"inputs": raw(PNG)},
    "base64": text(PNG),
    "inputs base64": {"inputs": text(PNG), "parameters": {}},
    "base64 in lines": base64.encodebytes(PNG).decode(),
    "data URI": {"inputs": f"data:image/png;base64,{text(PNG)}", "parameters": None},
}
# Each with what the one line must say.
BAD: dict[str, tuple[Any, str]] = {
    "URL": ("https://example.com/chest.png", "URLs are not fetched"),
    "inputs URL": ({"inputs": "http://127.0.0.1/chest.png"}, "URLs are not fetched"),
    "file URL": ({"inputs": "file:///etc/hostname"}, "URLs are not fetched"),
    "path": ({"inputs": "/etc/hostname"}, "not a readable PNG or JPEG|not base64"),
    "text": ("a chest radiograph!", "not base64"),
    "base64 of text": (text(b"a chest radiograph"), "not a readable PNG or JPEG"),
    "empty bytes": (raw(b""), "has 1 to"),
    "empty text": ("", "has 1 to"),
    "cut short": (raw(PNG[: len(PNG) // 2]), "cut short"),
    "GIF": (raw(encode(GREY, "GIF")), "not a readable PNG or JPEG"),
    "DICOM": (raw(b"\0" * 128 + b"DICM" + b"\0" * 64), r"DICOM.*pip install .spcxr-hf\[dicom\]"),
    "nothing": ({}, "no .inputs."),
    "null": (None, "got NoneType"),
    "number": ({"inputs": 3}, "got int"),
    "unknown parameter": ({"inputs": raw(PNG), "parameters": {"rm": "-rf"}}, "may hold operating_point, top_k"),
    "parameters as text": ({"inputs": raw(PNG), "parameters": "top_k"}, "may hold operating_point, top_k"),
    "top_k of zero": ({"inputs": raw(PNG), "parameters": {"top_k": 0}}, "at least 1"),
    "no pictures": ({"inputs": []}, "1 to 16 pictures; got 0"),
    "many pictures": ({"inputs": ["x"] * 17}, "1 to 16 pictures; got 17"),
}
OTHERS: dict[str, Any] = {
    "jpeg": raw(encode(GREY, "JPEG")),
    "16 bits": raw(encode(DEEP)),
    "colour": raw(encode(GREY.convert("RGB"))),
    "list": {"inputs": [raw(PNG), "https://example.com/chest.png"]},
    "top_k": {"inputs": raw(PNG), "parameters": {"top_k": 1}},
    "one point": {"inputs": raw(PNG), "parameters": {"operating_point": "youden"}},
    "no such point": {"inputs": raw(PNG), "parameters": {"operating_point": "luck"}},
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        name: build(model_class, tiny_config(**{**({"num_labels": 2} if name == "segmentation" else {}), **settings}))
        for name, (model_class, settings) in CHECKPOINTS.items()
    }


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("endpoints")
    for name, model in models.items():
        model.save_pretrained(root / name)
        PROCESSOR.save_pretrained(root / name)
        write_code(root / name)
    width = models["softmax"].config.hidden_size
    statistics = {"means": torch.zeros(1, width), "precision": torch.eye(width), "distances": torch.tensor([0.0, 1e9])}
    save_file(statistics, root / "softmax" / "feature_statistics.safetensors")
    requests = {**GOOD, **{name: request for name, (request, _) in BAD.items()}, **OTHERS}
    (root / "requests.json").write_text(json.dumps(requests))
    caches = {"HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(root)]
    done = subprocess.run(command, cwd=root, env={**os.environ, **caches}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(model: Any, image: Image.Image) -> Any:
    with torch.no_grad():
        return model(**PROCESSOR(image, return_tensors="pt"))


@pytest.mark.parametrize("request_name", GOOD)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_form_of_the_same_picture(answers, checkpoint, request_name):
    found = answers[checkpoint][request_name]
    assert found == answers[checkpoint]["bytes"]
    assert found["notice"] == NOTICE
    assert found["intended_use"] == CHECKPOINTS[checkpoint][1].get("intended_use")
    assert "error" not in found


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("request_name", BAD)
def test_garbage_is_told_in_one_line(answers, checkpoint, request_name):
    found = answers[checkpoint][request_name]
    assert list(found) == ["error"]
    assert "\n" not in found["error"]
    assert len(found["error"]) < 250
    assert "Traceback" not in found["error"]
    assert re.search(BAD[request_name][1], found["error"]), found["error"]


def test_embedding(answers, models):
    found = answers["embedding"]["bytes"]
    expected = run(models["embedding"].spcxr, GREY).pooler_output[0].tolist()
    assert (found["task"], found["pooling"]) == ("embedding", "mean")
    assert found["embedding"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("checkpoint", ["softmax", "sigmoid"])
def test_probabilities(answers, models, checkpoint):
    logits = run(models[checkpoint], GREY).logits[0].double()
    expected = (logits.softmax(dim=0) if checkpoint == "softmax" else logits.sigmoid()).tolist()
    found = answers[checkpoint]["bytes"]["labels"]
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
        dict(zip(LABELS["id2label"].values(), expected, strict=True)), abs=1e-6
    )
    scores = [entry["score"] for entry in found]
    assert scores == sorted(scores, reverse=True)
    assert answers[checkpoint]["top_k"]["labels"] == found[:1]


def test_how_unlike_the_training_images(answers):
    assert answers["softmax"]["bytes"]["unlike_training"] == 0.5  # farther than one of the two validation images
    assert answers["sigmoid"]["bytes"]["unlike_training"] is None


def test_a_single_label_has_a_probability_of_its_own(answers, models):
    logit = run(models["one label"], GREY).logits[0, 0]
    assert [entry["score"] for entry in answers["one label"]["bytes"]["labels"]] == pytest.approx(
        [logit.sigmoid().item()]
    )


def test_decisions(answers):
    found = answers["softmax"]["bytes"]
    scores = {entry["label"]: entry["score"] for entry in found["labels"]}
    decisions = {(entry["target"], entry["operating_point"]): entry for entry in found["decisions"]}
    assert set(decisions) == {(target, name) for target, thresholds in POINTS.items() for name in thresholds}
    joined = scores["bacterial pneumonia"] + scores["viral pneumonia"]
    for (target, name), entry in decisions.items():
        assert entry["threshold"] == POINTS[target][name]
        assert entry["score"] == pytest.approx(joined if target == PNEUMONIA else scores["normal"])
        assert entry["positive"] is (entry["score"] >= entry["threshold"])
    assert decisions[PNEUMONIA, "youden"]["positive"]
    assert not decisions[PNEUMONIA, "specificity 0.90"]["positive"]
    assert {entry["operating_point"] for entry in answers["softmax"]["one point"]["decisions"]} == {"youden"}
    assert answers["sigmoid"]["bytes"]["decisions"] == []


def test_unknown_operating_point(answers):
    assert "must be one of ['specificity 0.90', 'youden']; got 'luck'" in answers["softmax"]["no such point"]["error"]


def test_masks(answers, models):
    found = answers["segmentation"]["bytes"]
    assert (found["width"], found["height"]) == GREY.size
    outputs = run(models["segmentation"], GREY)
    expected = PROCESSOR.post_process_semantic_segmentation(outputs, [(GREY.height, GREY.width)])[0].numpy()
    assert [segment["label"] for segment in found["segments"]] == ["background", "lung"]
    for index, segment in enumerate(found["segments"]):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(segment["mask"]))))
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask == 255).mean() == pytest.approx(segment["share"])
        assert ((mask == 255) == (expected == index)).mean() > 0.999
    assert sum(segment["share"] for segment in found["segments"]) == pytest.approx(1)


def test_masks_that_overlap(answers, models):
    found = answers["anatomy"]["bytes"]
    expected = PROCESSOR.post_process_overlapping_segmentation(run(models["anatomy"], GREY), [GREY.size[::-1]])[0]
    assert [segment["label"] for segment in found["segments"]] == ["left lung", "right lung", "heart"]
    for segment, mask in zip(found["segments"], expected.numpy(), strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(segment["mask"])))) == 255
        assert (decoded == mask).mean() > 0.999
    by_name = dict(zip(("left lung", "right lung", "heart"), expected, strict=True))
    assert found["cardiothoracic_ratio"] == PROCESSOR.cardiothoracic_ratio(by_name)
    assert "cardiothoracic_ratio" not in answers["segmentation"]["bytes"]


def test_a_list_answers_each_by_itself(answers):
    first, second = answers["embedding"]["list"]
    assert first == answers["embedding"]["bytes"]
    assert "URLs are not fetched" in second["error"]


def test_depth_and_colour_are_kept(answers, models):
    deep = answers["embedding"]["16 bits"]["embedding"]
    assert deep == pytest.approx(run(models["embedding"].spcxr, DEEP).pooler_output[0].tolist(), abs=1e-5)
    assert answers["embedding"]["colour"]["embedding"] == pytest.approx(
        answers["embedding"]["bytes"]["embedding"], abs=1e-5
    )
    assert answers["embedding"]["jpeg"]["task"] == "embedding"


def test_pil_images_and_bombs():
    """What endpoints make of a request of type image/*; and a small file that is a huge picture."""
    from spcxr_hf.modeling import handler

    assert np.array_equal(np.asarray(handler.read_picture(GREY)), np.asarray(GREY))
    lying = GREY.copy()
    lying.getexif()[0x0112] = 6  # "turn by 90 degrees"
    assert lying.size == (44, 60) and handler.read_picture(lying).size == (60, 44)
    with pytest.raises(handler.RequestError, match="9000 x 9000 pixels"):
        handler.read_picture(Image.new("1", (9000, 9000)))
    huge = encode(Image.new("1", (9000, 9000)))
    assert len(huge) < 100_000
    with pytest.raises(handler.RequestError, match="9000 x 9000 pixels"):
        handler.read_picture(huge)


def test_the_schema_is_documented():
    from spcxr_hf.modeling import handler

    for word in ('"labels"', '"decisions"', '"embedding"', '"segments"', '"error"', '"parameters"', handler.NOTICE):
        assert word in handler.__doc__
    assert handler.NOTICE == NOTICE
