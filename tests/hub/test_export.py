"""Exports compute what the model does: a plain ViT of transformers, and ONNX at any size, in float32 and 8 bits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTModel, pipeline
from transformers.modeling_outputs import ImageClassifierOutput

from spcxr_hf import (
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
    SpcxrModel,
)
from spcxr_hf.data.table import open_image, read_table
from spcxr_hf.files import RESEARCH_NOTICE
from spcxr_hf.hub.export import export_vit, load_source, patch_weight, problem_type
from spcxr_hf.hub.export_onnx import EXACT_SUMS, TORCH_EXPORTS
from spcxr_hf.models.loading import probabilities
from tests.common import LAYERS, SIDE, build, pixels, tiny_config
from tests.made_up import picture

TREE = Path(__file__).parents[2]
DATA = TREE.parent / "shared" / "data"
PROCESSOR = SpcxrImageProcessor(size={"height": SIDE, "width": SIDE})
LABELS = {"id2label": {0: "normal", 1: "bacterial pneumonia", 2: "viral pneumonia"}}
POINTS = {"viral pneumonia": {"youden": 0.4}}
USE = {"population": "children of 1 to 5 years", "ages": [1, 5]}


def grey_picture(size: int = 50) -> Image.Image:
    return Image.fromarray(picture(1, size)[0])


def luminance(colours: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    return (colours * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(dim=1, keepdim=True)


# ---- a plain ViT -------------------------------------------------------------------------------------------------


class TestViT:
    @pytest.mark.parametrize("num_channels", [1, 3])
    @pytest.mark.parametrize("model_class", [SpcxrModel, SpcxrForPreTraining, SpcxrForSemanticSegmentation])
    def test_encoder(self, tmp_path, model_class, num_channels):
        model = build(model_class, tiny_config(qkv_bias=num_channels == 1))
        vit = AutoModel.from_pretrained(export_vit(model, tmp_path / "vit", num_channels))
        assert type(vit) is ViTModel
        with torch.no_grad():
            expected = model.base_model(pixels(), output_hidden_states=True)
            found = vit(pixels().expand(-1, num_channels, -1, -1), output_hidden_states=True)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)
        pooled = found.last_hidden_state[:, 1:].mean(dim=1)
        torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=1e-5)
        assert (found.pooler_output == 0).all()  # rather than something that looks like an embedding
        for one, other in zip(found.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    def test_cls_pooling_has_a_pooler_output(self, tmp_path):
        model = build(SpcxrModel, tiny_config(pooling="cls"))
        vit = AutoModel.from_pretrained(export_vit(model, tmp_path / "vit", 1))
        with torch.no_grad():
            torch.testing.assert_close(vit(pixels()).pooler_output, model(pixels()).pooler_output, rtol=0, atol=1e-5)

    def test_another_size(self, tmp_path):
        model = build(SpcxrModel)
        vit = AutoModel.from_pretrained(export_vit(model, tmp_path / "vit", 1))
        wide = pixels(height=24, width=48)
        with torch.no_grad():
            found = vit(wide, interpolate_pos_encoding=True).last_hidden_state
            torch.testing.assert_close(found, model(wide).last_hidden_state, rtol=0, atol=1e-5)

    def test_classifier(self, tmp_path):
        config = tiny_config(
            pooling="cls",
            problem_type="single_label_classification",
            operating_points=POINTS,
            operating_point="youden",
            intended_use=USE,
            **LABELS,
        )
        model = build(SpcxrForImageClassification, config)
        folder = export_vit(model, tmp_path / "vit", processor=PROCESSOR)
        vit = AutoModelForImageClassification.from_pretrained(folder)
        colours = pixels(channels=3)
        with torch.no_grad():
            torch.testing.assert_close(vit(colours).logits, model(luminance(colours)).logits, rtol=0, atol=1e-5)
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert (saved["model_type"], saved["architectures"]) == ("vit", ["ViTForImageClassification"])
        assert (vit.config.id2label, saved["operating_points"]) == (LABELS["id2label"], POINTS)
        assert (saved["operating_point"], saved["problem_type"]) == ("youden", "single_label_classification")
        assert saved["notice"] == RESEARCH_NOTICE
        assert saved["intended_use"] == USE
        assert "auto_map" not in saved
        assert not list(folder.glob("*.py"))

    def test_pipeline(self, tmp_path):
        model = build(SpcxrForImageClassification, tiny_config(pooling="cls", **LABELS))
        folder = export_vit(model, tmp_path / "vit", processor=PROCESSOR)
        found = pipeline("image-classification", model=str(folder), device="cpu")(grey_picture(), top_k=3)
        with torch.no_grad():
            expected = model(**PROCESSOR(grey_picture(), return_tensors="pt")).logits[0].softmax(dim=0)
        scores = {entry["label"]: entry["score"] for entry in found}
        # Not 1e-5: the library's processor rounds to 8 bits after resizing.
        assert scores == pytest.approx(dict(zip(LABELS["id2label"].values(), expected.tolist(), strict=True)), abs=0.02)

    @pytest.mark.parametrize("num_channels", [1, 3])
    def test_image_processor(self, tmp_path, num_channels):
        folder = export_vit(build(SpcxrModel), tmp_path / "vit", num_channels, processor=PROCESSOR)
        processor = AutoImageProcessor.from_pretrained(folder)
        found = processor(grey_picture(), return_tensors="pt").pixel_values
        expected = PROCESSOR(grey_picture(), return_tensors="pt").pixel_values
        assert found.shape == (1, num_channels, SIDE, SIDE)
        assert (found - expected).abs().max() <= 1 / 255 / 0.2479 + 1e-6

    def test_one_channel_refuses_colours(self, tmp_path):
        folder = export_vit(build(SpcxrModel), tmp_path / "vit", 1, processor=PROCESSOR)
        values = AutoImageProcessor.from_pretrained(folder)(grey_picture().convert("RGB"), return_tensors="pt")
        with pytest.raises(ValueError, match="channel dimension"):
            AutoModel.from_pretrained(folder)(**values)

    @pytest.mark.slow
    def test_it_loads_without_the_package(self, tmp_path):
        model = build(SpcxrModel)
        model.save_pretrained(tmp_path / "ours")
        folder = export_vit(tmp_path / "ours", tmp_path / "vit", 1)
        program = """
import sys
sys.modules["spcxr_hf"] = None
import torch, transformers
from safetensors.torch import save_file
vit = transformers.AutoModel.from_pretrained(sys.argv[1])
values = torch.arange(32 * 32).reshape(1, 1, 32, 32) / 1024
with torch.no_grad():
    save_file({"tokens": vit(values).last_hidden_state}, sys.argv[1] + "/found.safetensors")
"""
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        with torch.no_grad():
            expected = model(torch.arange(32 * 32).reshape(1, 1, 32, 32) / 1024).last_hidden_state
        found = load_file(folder / "found.safetensors")["tokens"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_scores_are_read_as_the_model_says(self, tmp_path):
        """In the configuration, which pipelines obey; a single label has a sigmoid."""
        values = torch.tensor([[2.0, -1.0, 0.5]])
        for given, labels, expected in (
            (None, 3, "single_label_classification"),
            (None, 1, "multi_label_classification"),
            ("multi_label_classification", 3, "multi_label_classification"),
            ("regression", 1, "regression"),
        ):
            config = tiny_config(pooling="cls", problem_type=given, num_labels=labels)
            folder = export_vit(build(SpcxrForImageClassification, config), tmp_path / "vit", processor=PROCESSOR)
            assert json.loads((folder / "config.json").read_text())["problem_type"] == expected == problem_type(config)
            if expected != "regression":
                classify = pipeline("image-classification", model=str(folder), device="cpu")
                given = classify.postprocess(ImageClassifierOutput(logits=values[:, :labels]), top_k=labels)
                found = sorted((one["score"] for one in given), reverse=True)
                wanted = probabilities(config, values[:, :labels])[0].sort(descending=True).values
                assert found == pytest.approx(wanted.tolist(), abs=1e-6)

    def test_mean_pooling_is_no_vit_classifier(self, tmp_path):
        with pytest.raises(SpcxrError, match=r"reads CLS alone.*\.mean\(dim=1\), export ONNX") as caught:
            export_vit(build(SpcxrForImageClassification), tmp_path / "vit")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "vit").exists()

    def test_refusals(self, tmp_path):
        with pytest.raises(SpcxrError, match="no config.json"):
            export_vit(tmp_path, tmp_path / "vit")
        with pytest.raises(SpcxrError, match="num_channels must be 1 or 3; got 2"):
            export_vit(build(SpcxrModel), tmp_path / "vit", 2)
        with pytest.raises(SpcxrError, match="num_channels must be 3 or 3; got 1"):
            export_vit(build(SpcxrModel, tiny_config(num_channels=3)), tmp_path / "vit", 1)
        with pytest.raises(SpcxrError, match=r"give it as model\.float\(\)"):
            export_vit(build(SpcxrModel).half(), tmp_path / "vit")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
        with pytest.raises(SpcxrError, match="is no such export"):
            export_vit(build(SpcxrModel), tmp_path / "mine")
        assert (tmp_path / "mine" / "thesis.txt").is_file()
        plain = export_vit(build(SpcxrModel), tmp_path / "vit")
        with pytest.raises(SpcxrError, match="a model of the type vit, not an SPCXR checkpoint"):
            load_source(plain)
        export_vit(build(SpcxrModel), tmp_path / "vit")  # an earlier export is replaced
        (tmp_path / "vit" / "notes.txt").write_text("mine")
        build(SpcxrModel).save_pretrained(tmp_path / "own")
        before = sorted((tmp_path / "own").iterdir())
        for model, folder in ((build(SpcxrModel), "vit"), (tmp_path / "own", "own")):
            with pytest.raises(SpcxrError, match="is no such export"):
                export_vit(model, tmp_path / folder)
        assert (tmp_path / "vit" / "notes.txt").is_file() and sorted((tmp_path / "own").iterdir()) == before

    def test_what_is_apart_is_not_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr("spcxr_hf.hub.export.patch_weight", lambda *args: 1.01 * patch_weight(*args))
        with pytest.raises(SpcxrError, match="apart from the model; nothing was written"):
            export_vit(build(SpcxrModel), tmp_path / "vit")
        assert not (tmp_path / "vit").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["base", "lung-segmentation"])
    def test_bundled_checkpoints(self, tmp_path, name):
        vit = AutoModel.from_pretrained(export_vit(TREE / "model_cards" / name, tmp_path / "vit"))
        model = SpcxrModel.from_pretrained(TREE / "model_cards" / name)
        values = pixels(height=model.config.image_size, width=model.config.image_size)
        with torch.no_grad():
            found = vit(values.expand(-1, 3, -1, -1)).last_hidden_state
            torch.testing.assert_close(found, model(values).last_hidden_state, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["pneumonia", "screening", "covid"])
    def test_bundled_classifiers_say_why_not(self, tmp_path, name):
        assert json.loads((TREE / "model_cards" / name / "config.json").read_text())["pooling"] == "mean"
        with pytest.raises(SpcxrError, match=r"reads CLS alone.*export ONNX"):
            export_vit(TREE / "model_cards" / name, tmp_path / "vit")


# ---- ONNX --------------------------------------------------------------------------------------------------------

ONNX = {
    "embedding": (SpcxrModel, {}, 3),
    "classification": (SpcxrForImageClassification, {"operating_points": POINTS, "intended_use": USE, **LABELS}, 3),
    "segmentation": (SpcxrForSemanticSegmentation, {}, 1),
}
SIZES = [(1, 32, 32), (3, 32, 32), (2, 24, 48), (1, 64, 40), (2, 8, 8)]


@pytest.fixture(scope="module", params=ONNX)
def exported(request, tmp_path_factory):
    """Task, channels, the model, and the ONNX file that a fresh export wrote; torch's exporter takes its time."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    if not TORCH_EXPORTS:
        pytest.skip(f"the exporter of torch {torch.__version__} cannot write it")
    from spcxr_hf.hub.export_onnx import export_onnx

    model_class, settings, num_channels = ONNX[request.param]
    model = build(model_class, tiny_config(**settings))
    folder = tmp_path_factory.mktemp(request.param) / "onnx"
    return (
        request.param,
        num_channels,
        model,
        export_onnx(model, folder, num_channels=num_channels, processor=PROCESSOR),
    )


def run_onnx(file: Path, values: torch.Tensor) -> dict[str, np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT_SUMS)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixel_values": values.numpy()}), strict=True))


def test_a_torch_that_cannot_export_is_told(tmp_path, monkeypatch):
    from spcxr_hf.hub import export_onnx

    pytest.importorskip("onnx", reason="the extra onnx is not installed")

    def fail(*_):
        raise RuntimeError("no symbolic sizes")

    monkeypatch.setattr(export_onnx, "_trace", fail)
    for exports, hint in ((False, "; torch 2.7 is the first that can"), (True, "")):
        monkeypatch.setattr(export_onnx, "TORCH_EXPORTS", exports)
        message = re.escape(f"torch {torch.__version__} cannot export it (no symbolic sizes){hint}") + "$"
        with pytest.raises(SpcxrError, match=message):
            export_onnx.export_onnx(build(SpcxrForImageClassification), tmp_path / "out", num_channels=1)


@pytest.mark.slow
class TestOnnx:
    @pytest.mark.parametrize(("batch", "height", "width"), SIZES)
    def test_any_size(self, exported, batch, height, width):
        task, num_channels, model, file = exported
        values = pixels(batch, num_channels, height, width)
        with torch.no_grad():
            expected = model(luminance(values) if num_channels == 3 else values)
        found = run_onnx(file, values)
        assert set(found) == ({"last_hidden_state", "pooler_output"} if task == "embedding" else {"logits"})
        for name, array in found.items():
            assert np.abs(array - expected[name].numpy()).max() < 1e-4, name

    def test_eight_bits(self, exported):
        from spcxr_hf.hub.export_onnx import quantize_int8, read_metadata

        _, num_channels, _, file = exported
        quantised = quantize_int8(file)
        assert quantised.name == "model_quantized.onnx"
        values = pixels(2, num_channels, 24, 48)
        exact, rounded = run_onnx(file, values), run_onnx(quantised, values)
        for name in exact:
            apart = np.abs(exact[name] - rounded[name])
            assert 0 < apart.mean() < 0.1 * exact[name].std(), name
        assert read_metadata(quantised) == read_metadata(file)

    def test_eight_bits_do_not_overflow(self, tmp_path):
        """Sums that pass 16 bits in pairs, as they do on a processor without VNNI unless the session sums exactly."""
        onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
        pytest.importorskip("onnxruntime")
        from onnxruntime.quantization import QuantType, quantize_dynamic

        weights = np.full((64, 8), 1.0, np.float32)
        node = onnx.helper.make_node("MatMul", ["pixel_values", "weights"], ["sums"])
        sides = [("pixel_values", [2, 64]), ("sums", [2, 8])]
        values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in sides]
        graph = onnx.helper.make_graph([node], "sums", values[:1], values[1:],
                                       [onnx.numpy_helper.from_array(weights, "weights")])  # fmt: skip
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / "sums.onnx")
        quantize_dynamic(tmp_path / "sums.onnx", tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
        found = run_onnx(tmp_path / "int8.onnx", torch.ones(2, 64))["sums"]
        assert np.abs(found - 64).max() < 0.64

    def test_eight_bits_leave_the_head_alone(self, exported):
        """In 8 bits the classifier alone costs most of what all of the encoder's layers do."""
        import onnx

        from spcxr_hf.hub.export_onnx import quantize_int8

        task, _, model, file = exported
        rounded = onnx.load(quantize_int8(file)).graph.node
        # Queries, keys and values, projection, and two of the MLP, in each block; one for each block that is decoded.
        decoded = len(model.config.segmentation_layers) if task == "segmentation" else 0
        assert sum(node.op_type == "MatMulInteger" for node in rounded) == 4 * LAYERS + decoded

    def test_hidden_units_are_centred_and_nothing_changes(self, exported, tmp_path):
        import onnx

        from spcxr_hf.hub.export_onnx import centre_hidden_units

        _, num_channels, model, file = exported
        proto = onnx.load(file)
        assert centre_hidden_units(proto) == LAYERS
        onnx.checker.check_model(proto)
        onnx.save(proto, tmp_path / "centred.onnx")
        values = pixels(2, num_channels, 24, 48)
        expected, found = run_onnx(file, values), run_onnx(tmp_path / "centred.onnx", values)
        for name in expected:
            assert np.abs(found[name] - expected[name]).max() < 1e-5, name
        # What was taken off is the mean of what the layer reads, where the norm gives normally distributed values.
        layer = model.base_model.encoder.layers[0]
        with torch.no_grad():
            given = torch.randn(20_000, layer.norm2.weight.numel()) * layer.norm2.weight + layer.norm2.bias
            hidden = layer.mlp.activation(layer.mlp.fc1(given)).mean(dim=0).numpy()
        centre = next(one for one in proto.graph.initializer if one.name.endswith("_centre"))
        apart = np.abs(onnx.numpy_helper.to_array(centre) - hidden)
        assert apart.max() < 0.02 < np.abs(hidden).max()

    def test_bias_makes_up_for_what_rounding_adds_to_every_image(self, exported, tmp_path):
        import onnx

        from spcxr_hf.hub.export_onnx import IMAGES, correct_bias, quantize_int8, smooth_noise

        task, num_channels, _, file = exported
        images = torch.from_numpy(smooth_noise(IMAGES, num_channels, (SIDE, SIDE)))
        rounded = onnx.load(quantize_int8(file))
        if task != "classification":
            assert correct_bias(rounded, file, (SIDE, SIDE)) is None
            return
        # It is corrected already: nothing is left, until the bias is moved again.
        assert np.abs(correct_bias(rounded, file, (SIDE, SIDE))).max() < 1e-5
        bias = next(one for one in rounded.graph.initializer if one.name in rounded.graph.node[-1].input)
        exact = onnx.numpy_helper.to_array(bias)
        wrong = exact + np.arange(len(exact), dtype=np.float32)
        bias.CopyFrom(onnx.numpy_helper.from_array(wrong, bias.name))
        assert correct_bias(rounded, file, (SIDE, SIDE)) == pytest.approx(np.arange(len(exact)), abs=1e-5)
        onnx.save(rounded, tmp_path / "corrected.onnx")
        means = [
            np.mean([run_onnx(path, image[None])["logits"] for image in images], axis=0)
            for path in (file, tmp_path / "corrected.onnx")
        ]
        assert np.abs(means[0] - means[1]).max() < 1e-5

    def test_metadata(self, exported):
        from spcxr_hf.hub.export_onnx import read_metadata

        task, num_channels, model, file = exported
        found = read_metadata(file)
        assert found["task"] == task
        assert found["notice"] == "research use only, not for clinical use"
        assert found["image_size"] == [SIDE, SIDE]
        assert (found["image_mean"], found["image_std"]) == ([0.5136] * num_channels, [0.2479] * num_channels)
        assert found.get("labels", []) == ([] if task == "embedding" else list(model.config.id2label.values()))
        assert found.get("operating_points") == (POINTS if task == "classification" else None)
        assert found.get("intended_use") == (USE if task == "classification" else None)
        assert found.get("problem_type") == ("single_label_classification" if task == "classification" else None)

    def test_layout(self, exported):
        task, num_channels, _, file = exported
        folder = file.parent.parent
        assert file.relative_to(folder).as_posix() == "onnx/model.onnx"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == ("spcxr" if task == "segmentation" else "vit")
        assert len(json.loads((folder / "preprocessor_config.json").read_text())["image_mean"]) == num_channels


@pytest.mark.slow
def test_made_up_images_are_clouds():
    from spcxr_hf.hub.export_onnx import smooth_noise

    clouds = smooth_noise(3, 3, (32, 48))
    assert clouds.shape == (3, 3, 32, 48) and clouds.dtype == np.float32
    assert np.abs(clouds.mean(axis=(2, 3))).max() < 1e-5 and np.abs(clouds.std(axis=(2, 3)) - 1).max() < 1e-4
    assert (clouds[:, 0] == clouds[:, 2]).all() and np.abs(clouds[0] - clouds[1]).max() > 0.1
    steps = np.abs(np.diff(clouds, axis=3)).mean()
    assert steps < 0.25 * np.abs(clouds).mean()  # neighbours are alike
    assert (clouds == smooth_noise(3, 3, (32, 48))).all()


@pytest.mark.slow
def test_onnx_of_a_fixed_size(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from spcxr_hf.hub.export_onnx import export_onnx

    model = build(SpcxrModel, tiny_config(num_hidden_layers=1))
    file = export_onnx(model, tmp_path / "onnx", opset=20, dynamic=False, num_channels=1)
    with torch.no_grad():
        expected = model(pixels(1)).pooler_output.numpy()
    assert np.abs(run_onnx(file, pixels(1))["pooler_output"] - expected).max() < 1e-4
    with pytest.raises(Exception, match="invalid dimensions"):
        run_onnx(file, pixels(2))


def test_onnx_refusals(tmp_path, monkeypatch):
    from spcxr_hf.hub.export_onnx import export_onnx, quantize_int8, read_metadata

    with pytest.raises(SpcxrError, match="opset must be at least 18; got 11"):
        export_onnx(build(SpcxrModel), tmp_path / "onnx", opset=11)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(SpcxrError, match=r"broken\.onnx: no ONNX file"):
        read_metadata(tmp_path / "broken.onnx")
    with pytest.raises(SpcxrError, match=r"missing\.onnx: no ONNX file"):
        quantize_int8(tmp_path / "missing.onnx")
    onnxscript = pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    monkeypatch.setattr(onnxscript, "__version__", "0.7.0")
    with pytest.raises(SpcxrError, match=r"onnxscript 0\.7\.0 is too old: before 0\.7\.1 .*spcxr-hf\[onnx\]"):
        export_onnx(build(SpcxrModel), tmp_path / "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SpcxrError, match=r'onnxscript is missing: pip install "spcxr-hf\[onnx\]"'):
        export_onnx(build(SpcxrModel), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_processor_without_vnni(monkeypatch):
    """By torch's account of the processor too, where it gives one; elsewhere than on x86 nothing is known."""
    from spcxr_hf.hub.export_onnx import lacks_vnni

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") == "x86_64" and Path("/proc/cpuinfo").is_file():
        assert lacks_vnni() == (not (capabilities["avx512_vnni"] or capabilities["avx_vnni"]))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not lacks_vnni()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the development radiographs are not beside the checkout")
@pytest.mark.parametrize("name", ["base", "lung-segmentation", "covid"])  # one of each head
def test_onnx_on_real_radiographs(tmp_path, name):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    from spcxr_hf.hub.export_onnx import export_onnx, quantize_int8

    folder = TREE / "model_cards" / name
    file = export_onnx(folder, tmp_path / "onnx")
    source = load_source(folder)
    table = read_table(DATA / "kermany-00.parquet").where("lung_split", "val")
    images = [open_image(cell, "kermany") for cell in table.column("image")[:6]]
    processor = AutoImageProcessor.from_pretrained(folder)
    for size in (112, 224):
        values = processor(images, return_tensors="pt", size={"height": size, "width": size}).pixel_values
        with torch.no_grad():
            expected = source.model(values)
        found = run_onnx(file, values.expand(-1, 3, -1, -1))
        for output, array in found.items():
            assert np.abs(array - expected[output].numpy()).max() < 1e-4, output
    if name == "base":
        return
    rounded = run_onnx(quantize_int8(file), values.expand(-1, 3, -1, -1))["logits"]
    if name == "lung-segmentation":
        assert (rounded.argmax(axis=1) == expected.logits.argmax(dim=1).numpy()).mean() > 0.995
    else:
        apart = np.abs(rounded - expected.logits.numpy())
        assert 0 < apart.max() < 0.3
