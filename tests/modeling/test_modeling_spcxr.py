"""The model family: the contract of transformers for each class, and what is particular to it."""

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from spcxr_hf.modeling.modeling_spcxr import (
    SpcxrBackbone,
    SpcxrDropPath,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrModel,
)
from tests.common import (
    BATCH,
    LAYERS,
    SIDE,
    TOKENS,
    WIDTH,
    ModelContract,
    assert_same,
    assert_same_weights,
    build,
    encoder_of,
    gradients,
    pixels,
    tiny_config,
)

NAN = float("nan")


def patch_mask(seed: int = 0) -> torch.Tensor:
    """(B, 16) booleans, about half of them set."""
    return torch.rand(BATCH, TOKENS - 1, generator=torch.Generator().manual_seed(seed)) < 0.5


def pixel_mask(patches: torch.Tensor) -> torch.Tensor:
    """(B, 16) -> (B, 32, 32): every patch is 8 x 8 pixels."""
    return torch.kron(patches.reshape(BATCH, 4, 4).int(), torch.ones(1, 8, 8, dtype=torch.int)).bool()


class TestSpcxrModel(ModelContract):
    model_class = SpcxrModel

    def output_shapes(self):
        return {"last_hidden_state": (BATCH, TOKENS, WIDTH), "pooler_output": (BATCH, WIDTH)}

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_pooling(self, pooling):
        output = self.run(build(SpcxrModel, tiny_config(pooling=pooling)), output_hidden_states=True)
        assert_same(output.cls_token, output.last_hidden_state[:, 0])
        assert_same(output.patch_tokens, output.last_hidden_state[:, 1:])
        assert_same(output.pooler_output, output.cls_token if pooling == "cls" else output.patch_tokens.mean(dim=1))
        assert not torch.allclose(output.cls_token, output.patch_tokens.mean(dim=1))

    def test_last_hidden_state_is_normalised(self):
        model = build(SpcxrModel)
        output = self.run(model, output_hidden_states=True)
        assert_same(output.last_hidden_state, model.layernorm(output.hidden_states[-1]).detach())
        assert not torch.allclose(output.last_hidden_state, output.hidden_states[-1])

    def test_patches_are_taken_row_by_row(self):
        model = build(SpcxrModel)
        changed = pixels()
        changed[:, :, 8:16, 24:32] += 1  # second row, fourth column of 4 x 4
        before = self.run(model, output_hidden_states=True).hidden_states[0]
        after = self.run(model, output_hidden_states=True, pixel_values=changed).hidden_states[0]
        moved = (before != after).any(dim=-1)
        assert moved.nonzero().tolist() == [[0, 1 + 4 + 3], [1, 1 + 4 + 3]]

    def test_three_channels(self):
        output = self.run(build(SpcxrModel, tiny_config(num_channels=3)), pixel_values=pixels(channels=3))
        assert output.last_hidden_state.shape == (BATCH, TOKENS, WIDTH)

    def test_without_qkv_bias(self):
        names = SpcxrModel(tiny_config(qkv_bias=False)).state_dict().keys()
        assert len(SpcxrModel(tiny_config()).state_dict().keys() - names) == LAYERS
        assert not any(name.endswith("qkv.bias") for name in names)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((1, 1, 32, 36), "32 x 36 pixels; height and width must be multiples of 8"),
            ((1, 1, 28, 32), "28 x 32 pixels; height and width must be multiples of 8"),
            ((1, 1, 0, 32), "0 x 32 pixels"),
            ((1, 3, 32, 32), "3 channels; this model takes 1"),
        ],
    )
    def test_refused_images(self, shape, message):
        with pytest.raises(ValueError, match=message):
            SpcxrModel(tiny_config())(torch.zeros(shape))

    def test_half_precision_model_takes_float32_pixels(self):
        output = self.run(build(SpcxrModel).to(torch.bfloat16), pixel_values=pixels().float())
        assert output.last_hidden_state.dtype == torch.bfloat16


def test_block_agrees_with_torch():
    """The pre-norm block of torch, given the same weights: this also fixes what our tensors' layout means."""
    model = build(SpcxrModel)
    theirs = nn.TransformerEncoderLayer(
        WIDTH, nhead=2, dim_feedforward=64, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
        batch_first=True, norm_first=True,
    )  # fmt: skip
    names = {
        "attention.qkv.weight": "self_attn.in_proj_weight",
        "attention.qkv.bias": "self_attn.in_proj_bias",
        "attention.projection.": "self_attn.out_proj.",
        "mlp.fc1.": "linear1.",
        "mlp.fc2.": "linear2.",
    }
    weights = model.encoder.layers[0].state_dict()
    for ours, torchs in names.items():
        weights = {name.replace(ours, torchs): tensor for name, tensor in weights.items()}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        states = model(pixels(), output_hidden_states=True).hidden_states
        assert_same(states[1], theirs(states[0]), rtol=1e-4, atol=1e-5)


class TestPositionEmbeddings:
    def embeddings(self):
        return build(SpcxrModel).embeddings

    def test_identity_at_the_native_size(self):
        embeddings = self.embeddings()
        assert embeddings.interpolate_position_embeddings(4, 4) is embeddings.position_embeddings

    @pytest.mark.parametrize(("height", "width"), [(4, 6), (8, 8), (3, 2), (2, 8)])
    def test_rows_stay_rows_and_cls_stays(self, height, width):
        """Positions that know only their row: so they do on any other grid, rising from the top to the bottom."""
        embeddings = self.embeddings()
        grid = embeddings.position_embeddings.data[:, 1:].unflatten(1, (4, 4))
        grid[:] = torch.arange(4.0)[None, :, None, None]
        resized = embeddings.interpolate_position_embeddings(height, width).detach()
        assert resized.shape == (1, 1 + height * width, WIDTH)
        assert_same(resized[:, 0], embeddings.position_embeddings[:, 0].detach())
        rows = resized[:, 1:].unflatten(1, (height, width))
        assert_same(rows, rows[:, :, :1, :1].expand_as(rows), rtol=0, atol=1e-5)
        assert (rows[0, :, 0, 0].diff() > 0).all()

    def test_bicubic(self):
        embeddings = self.embeddings()
        grid = embeddings.position_embeddings[:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
        expected = (
            nn.functional.interpolate(grid, size=(6, 5), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 30, WIDTH)
        )
        assert_same(embeddings.interpolate_position_embeddings(6, 5)[:, 1:].detach(), expected.detach())

    def test_resizing_beforehand_is_the_same(self):
        """A model of one native size on images of another is the model whose positions were resized beforehand."""
        model, other = build(SpcxrModel), build(SpcxrModel, tiny_config(image_size=48))
        weights = model.state_dict()
        weights["embeddings.position_embeddings"] = model.embeddings.interpolate_position_embeddings(6, 6).detach()
        other.load_state_dict(weights)
        images = pixels(height=48, width=48)
        with torch.no_grad():
            assert_same(other(images), model(images))


class TestDropPath:
    def test_rates_rise_linearly(self):
        layers = SpcxrModel(tiny_config(drop_path_rate=0.3)).encoder.layers
        assert [layer.drop_path.rate for layer in layers] == pytest.approx([0, 0.1, 0.2, 0.3])
        (only,) = SpcxrModel(tiny_config(num_hidden_layers=1, drop_path_rate=0.3)).encoder.layers
        assert only.drop_path.rate == 0

    def test_whole_images_are_dropped_and_the_mean_stays(self):
        torch.manual_seed(0)
        branch = torch.ones(4000, 3, 2)
        kept = SpcxrDropPath(0.25).train()(branch)
        assert_same(kept, kept[:, :1, :1].expand_as(kept))
        assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
        assert kept.mean().item() == pytest.approx(1, abs=0.03)

    @pytest.mark.parametrize(("rate", "training"), [(0.25, False), (0.0, True)])
    def test_inactive(self, rate, training):
        branch = torch.ones(4, 3, 2)
        assert SpcxrDropPath(rate).train(training)(branch) is branch


class TestSpcxrForPreTraining(ModelContract):
    model_class = SpcxrForPreTraining

    def labels(self, config):
        return {"bool_masked_pos": pixel_mask(patch_mask()), "labels": pixels(seed=2)}

    def output_shapes(self):
        return {"reconstruction": (BATCH, 1, SIDE, SIDE)}

    @pytest.mark.parametrize("channels", [1, 3])
    def test_loss_is_l1_over_corrupted_pixels(self, channels):
        model, mask = build(SpcxrForPreTraining, tiny_config(num_channels=channels)), pixel_mask(patch_mask())
        labels = pixels(channels=channels, seed=2)
        output = self.run(model, pixel_values=pixels(channels=channels), labels=labels, bool_masked_pos=mask)
        errors = [(output.reconstruction - labels)[:, channel][mask].abs() for channel in range(channels)]
        assert_same(output.loss, torch.cat(errors).mean(), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("anything", [1e30, float("inf"), NAN])
    def test_uncorrupted_pixels_take_no_part(self, anything):
        mask = pixel_mask(patch_mask())
        found = []
        for labels in (pixels(seed=2), pixels(seed=2).masked_fill(~mask.unsqueeze(1), anything)):
            model = build(SpcxrForPreTraining)
            loss = model(pixels(), bool_masked_pos=mask, labels=labels).loss
            loss.backward()
            found.append({"loss": loss.detach(), **gradients(model)})
        assert_same(found[1], found[0])

    def test_corrupted_pixels_take_part(self):
        mask = pixel_mask(patch_mask())
        model = build(SpcxrForPreTraining)
        changed = pixels(seed=2).masked_fill(mask.unsqueeze(1), 9.0)
        assert self.run(model, labels=changed).loss > self.run(model).loss + 5

    def test_patch_mask_equals_pixel_mask(self):
        model, patches = build(SpcxrForPreTraining), patch_mask()
        assert 0 < patches.sum() < patches.numel()
        expected = self.run(model, bool_masked_pos=pixel_mask(patches))
        assert_same(self.run(model, bool_masked_pos=patches), expected)
        assert_same(self.run(model, bool_masked_pos=pixel_mask(patches).unsqueeze(1)), expected)
        assert_same(self.run(model, bool_masked_pos=patches.long()), expected)

    def test_patch_mask_of_an_oblong_image(self):
        """2 x 3 patches: the fifth is the middle of the second row."""
        model, images = build(SpcxrForPreTraining), pixels(batch=1, height=16, width=24)
        patches = torch.tensor([[False, False, False, False, True, False]])
        in_pixels = torch.zeros(1, 16, 24, dtype=torch.bool)
        in_pixels[:, 8:16, 8:16] = True
        with torch.no_grad():
            assert_same(model(images, bool_masked_pos=patches), model(images, bool_masked_pos=in_pixels))

    def test_without_labels_the_model_fills_the_patches(self):
        """The convention of the library's masked-image-modelling scripts."""
        model, patches, images = build(SpcxrForPreTraining), patch_mask(), pixels()
        untouched = images.clone()
        corrupted = images.masked_fill(pixel_mask(patches).unsqueeze(1), 0.0)
        expected = self.run(model, pixel_values=corrupted, bool_masked_pos=patches, labels=images)
        assert_same(self.run(model, pixel_values=images, bool_masked_pos=patches, labels=None), expected)
        assert_same(images, untouched)

    def test_without_mask(self):
        model = build(SpcxrForPreTraining)
        output = self.run(model, bool_masked_pos=None)
        assert_same(output.loss, (output.reconstruction - pixels(seed=2)).abs().mean())
        output = self.run(model, bool_masked_pos=None, labels=None)
        assert "loss" not in output

    def test_nothing_corrupted(self):
        model = build(SpcxrForPreTraining)
        loss = model(**self.inputs(bool_masked_pos=torch.zeros(BATCH, 16, dtype=torch.bool))).loss
        loss.backward()
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients(model).values())

    def test_reconstruction_reads_the_layers_named(self):
        model = build(SpcxrForPreTraining, tiny_config(reconstruction_layers=[1, 2]))
        before = self.run(model).reconstruction
        with torch.no_grad():
            for parameter in model.spcxr.encoder.layers[2:].parameters():
                parameter.mul_(2)
        assert_same(self.run(model).reconstruction, before)
        model.config.reconstruction_layers = [1, 3]
        assert not torch.allclose(self.run(model).reconstruction, before)

    def test_a_patch_is_reconstructed_in_its_place(self):
        """Each token makes its own 8 x 8 pixels."""
        head = build(SpcxrForPreTraining).reconstruction_head
        tokens = torch.zeros(1, 6, WIDTH)
        changed = tokens.clone()
        changed[:, 4] = 1
        moved = (head(changed, (2, 3)) != head(tokens, (2, 3)))[0, 0]
        assert moved[8:16, 8:16].all()
        assert moved.sum() == 64

    def test_the_projection_is_given_contiguous_memory(self):
        """A compiled step on a GPU ends with an error otherwise: cuDNN's gradient has other strides than expected."""
        head = build(SpcxrForPreTraining).reconstruction_head
        given = []
        head.projection.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].is_contiguous()))
        head(torch.randn(2, 6, WIDTH), (2, 3))
        assert given == [True]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"bool_masked_pos": torch.ones(BATCH, 9, dtype=torch.bool)}, r"bool_masked_pos has shape \(2, 9\)"),
            ({"bool_masked_pos": torch.ones(BATCH, 1, 16, dtype=torch.bool)}, r"expected \(2, 32, 32\) for pixels"),
            ({"labels": torch.zeros(BATCH, SIDE, SIDE)}, r"labels has shape \(2, 32, 32\); expected \(2, 1, 32, 32\)"),
        ],
    )
    def test_refused_shapes(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            self.run(build(SpcxrForPreTraining), **wrong)


@pytest.mark.parametrize("model_class", [SpcxrForImageClassification, SpcxrForSemanticSegmentation, SpcxrBackbone])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 1, SIDE, SIDE), r"B at least 1; got \(0, 1, 32, 32\)"),
        ((1, SIDE, SIDE), r"must be \(B, C, H, W\)"),
        ((1, 3, SIDE, SIDE), "takes 1. The checkpoint's image processor"),
    ],
)
def test_pixels_that_are_refused(model_class, shape, message):
    with pytest.raises(ValueError, match=message):
        build(model_class)(torch.zeros(shape))


def test_a_block_returns_a_tensor():
    """What hooks of Captum and Grad-CAM expect."""
    found = []
    model = build(SpcxrForImageClassification)
    model.spcxr.encoder.layers[1].register_forward_hook(lambda *arguments: found.append(arguments[2]))
    states = model(pixels(), output_hidden_states=True).hidden_states
    assert_same(found[0], states[2])


@pytest.mark.parametrize("model_class", [SpcxrModel, SpcxrForImageClassification, SpcxrForSemanticSegmentation])
def test_a_trace_is_exact_at_other_sizes(model_class):
    model = build(model_class)
    model.config.return_dict = False
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, pixels(), strict=False, check_trace=False)
        for size in ((SIDE, SIDE), (SIDE + 16, SIDE), (SIDE, 2 * SIDE)):
            images = pixels(batch=3, height=size[0], width=size[1])
            assert_same(traced(images)[0], model(images)[0])


def test_an_image_size_needs_not_be_given(tmp_path):
    build(SpcxrModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_size is 64, and .* stored for 32\. Pass no image_size"):
        SpcxrModel.from_pretrained(tmp_path, image_size=64)


def test_weights_stored_as_integers_are_refused(tmp_path):
    build(SpcxrModel).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for dtype, name in ((torch.int64, "I64"), (torch.uint8, "U8"), (torch.bool, "BOOL")):
        weights["layernorm.weight"] = torch.ones(WIDTH, dtype=dtype)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"layernorm.weight is stored as {name}; weights are floating-point"):
            SpcxrModel.from_pretrained(tmp_path)


def test_a_configuration_far_larger_than_its_weights(tmp_path):
    """No memory is taken for it: on this model, 3 GB."""
    build(SpcxrForPreTraining).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 3_000_000}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="the weights hold .* and lack"):
        SpcxrForPreTraining.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


class TestSpcxrForImageClassification(ModelContract):
    model_class = SpcxrForImageClassification

    def labels(self, config):
        return {"labels": torch.tensor([2, 0])}

    def output_shapes(self):
        return {"logits": (BATCH, 3)}

    @pytest.mark.parametrize(
        ("num_labels", "problem_type", "labels", "loss"),
        [
            (3, "single_label_classification", torch.tensor([2, 0]), nn.CrossEntropyLoss()),
            (3, "multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0.3, 0]]), nn.BCEWithLogitsLoss()),
            (3, "multi_label_classification", torch.tensor([[0, 1, 1], [1, 0, 0]]), nn.BCEWithLogitsLoss()),
            (3, "regression", torch.tensor([[0.0, -1, 5], [1, 0.3, 0]]), nn.MSELoss()),
            (1, "regression", torch.tensor([[0.5], [3.0]]), nn.MSELoss()),
        ],
    )
    def test_problem_types(self, num_labels, problem_type, labels, loss):
        model = build(SpcxrForImageClassification, tiny_config(num_labels=num_labels, problem_type=problem_type))
        output = self.run(model, labels=labels)
        targets = labels if problem_type.startswith("single") else labels.float()
        assert_same(output.loss, loss(output.logits, targets), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("num_labels", "labels", "problem_type"),
        [
            (3, torch.tensor([2, 0]), "single_label_classification"),
            (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), "multi_label_classification"),
            (1, torch.tensor([0.5, 3.0]), "regression"),
        ],
    )
    def test_problem_type_follows_from_the_labels_and_is_kept(self, tmp_path, num_labels, labels, problem_type):
        """What reads the logits (pipelines, `spcxr predict`, the handler) knows how they were trained."""
        model = build(SpcxrForImageClassification, tiny_config(num_labels=num_labels))
        inferred = self.run(model, labels=labels).loss
        assert model.config.problem_type == problem_type
        assert_same(self.run(model, labels=labels).loss, inferred)
        model.save_pretrained(tmp_path)
        assert SpcxrForImageClassification.from_pretrained(tmp_path).config.problem_type == problem_type

    def test_regression_of_flat_labels(self):
        model = build(SpcxrForImageClassification, tiny_config(num_labels=1))
        flat = torch.tensor([0.5, 3.0])
        assert_same(self.run(model, labels=flat), self.run(model, labels=flat.unsqueeze(1)))

    @pytest.mark.parametrize(
        ("problem_type", "loss"),
        [("multi_label_classification", nn.BCEWithLogitsLoss()), ("regression", nn.MSELoss())],
    )
    def test_missing_labels_take_no_part(self, problem_type, loss):
        labels = torch.tensor([[0.0, NAN, 1.0], [NAN, NAN, 1.0]])
        model = build(SpcxrForImageClassification, tiny_config(problem_type=problem_type))
        output = model(pixels(), labels=labels)
        known = ~labels.isnan()
        expected = loss(output.logits[known], labels[known])
        assert_same(output.loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
        output.loss.backward(retain_graph=True)
        found = gradients(model)
        model.zero_grad()
        expected.backward()
        assert_same(found, gradients(model), rtol=1e-4, atol=1e-6)

    def test_missing_single_label_takes_no_part(self):
        model = build(SpcxrForImageClassification)
        output = self.run(model, labels=torch.tensor([-100, 1]))
        assert_same(output.loss, nn.functional.cross_entropy(output.logits[1:], torch.tensor([1])))

    @pytest.mark.parametrize(
        ("problem_type", "labels"),
        [
            ("single_label_classification", torch.full((BATCH,), -100)),
            ("multi_label_classification", torch.full((BATCH, 3), NAN)),
            ("regression", torch.full((BATCH, 3), NAN)),
        ],
    )
    def test_all_labels_missing(self, problem_type, labels):
        model = build(SpcxrForImageClassification, tiny_config(problem_type=problem_type))
        loss = model(pixels(), labels=labels).loss
        loss.backward()
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients(model).values())

    @pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
    def test_refused_labels(self, problem_type):
        model = build(SpcxrForImageClassification, tiny_config(problem_type=problem_type))
        with pytest.raises(ValueError, match=r"labels has shape \(2, 2\); .* expects \(2, 3\)"):
            self.run(model, labels=torch.zeros(2, 2))

    @pytest.mark.parametrize(
        ("problem_type", "labels", "message"),
        [
            ("multi_label_classification", [[0, 1, -1], [1, 0, 0]], r"must lie in \[0, 1\], .* NaN; got -1"),
            ("multi_label_classification", [[0, 1, -100.0], [1, NAN, 0]], "got -100"),
            ("multi_label_classification", [[0, 2.0, 0], [1, 0, 0]], "got 2"),
            ("multi_label_classification", [[0, float("inf"), 0], [1, 0, 0]], "got inf"),
            ("regression", [[0, float("-inf"), 0], [NAN, 0, 0]], "must be finite"),
            ("single_label_classification", [3, 0], r"must lie in 0 \.\. 2, or be -100 where missing; got 3"),
            ("single_label_classification", [-1, 0], "got -1"),
            ("single_label_classification", [[0, 1, 0], [1, 0, 0]], r"shape \(2, 3\); expected \(2,\)"),
            ("single_label_classification", [0.0, 1.0], "whole numbers"),
            ("single_label_classification", [0], r"shape \(1,\); expected \(2,\), the indices of classes"),
        ],
    )
    def test_labels_out_of_range(self, problem_type, labels, message):
        model = build(SpcxrForImageClassification, tiny_config(problem_type=problem_type))
        with pytest.raises(ValueError, match=message):
            self.run(model, labels=torch.tensor(labels))

    @pytest.mark.parametrize("pooling", ["mean", "cls"])
    def test_classifies_what_the_pooling_says(self, pooling):
        model = build(SpcxrForImageClassification, tiny_config(pooling=pooling))
        with torch.no_grad():
            pooled = model.spcxr(pixels()).pooler_output
            assert_same(self.run(model).logits, model.classifier(pooled))

    def test_another_number_of_labels(self, tmp_path):
        build(SpcxrForImageClassification).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            SpcxrForImageClassification.from_pretrained(tmp_path, num_labels=14)
        model, info = SpcxrForImageClassification.from_pretrained(
            tmp_path, num_labels=14, ignore_mismatched_sizes=True, output_loading_info=True
        )
        assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
        assert self.run(model, labels=None).logits.shape == (BATCH, 14)

    def test_labels_are_saved(self, tmp_path):
        """What is set by hand on the configuration comes back: names of the labels, kind of problem."""
        names = {0: "Atelectasis", 1: "Cardiomegaly", 2: "Effusion"}
        config = tiny_config(id2label=names, label2id={name: index for index, name in names.items()})
        config.problem_type = "multi_label_classification"
        build(SpcxrForImageClassification, config).save_pretrained(tmp_path)
        loaded = SpcxrForImageClassification.from_pretrained(tmp_path).config
        assert loaded.id2label == names
        assert loaded.problem_type == "multi_label_classification"


class TestOverlappingLabels:
    """`SpcxrForSemanticSegmentation` with a sigmoid for each label."""

    def model(self, **overrides):
        config = tiny_config(problem_type="multi_label_classification", num_labels=2, **overrides)
        return build(SpcxrForSemanticSegmentation, config)

    def labels(self):
        return (torch.rand(BATCH, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) > 0.5).float()

    def test_loss_is_binary_cross_entropy_and_dice(self):
        labels = self.labels()
        with torch.no_grad():
            output = self.model()(pixels(), labels=labels)
        found = output.logits.sigmoid()
        dice = [
            (2 * (found[:, i] * labels[:, i]).sum() + 1) / (found[:, i].sum() + labels[:, i].sum() + 1) for i in (0, 1)
        ]
        expected = nn.functional.binary_cross_entropy(found, labels) + 1 - torch.stack(dice).mean()
        assert_same(output.loss, expected, rtol=1e-5, atol=1e-6)

    def test_unknown_pixels_do_not_count(self):
        model, labels = self.model().eval(), self.labels()
        half = labels.clone()
        half[..., : SIDE // 2] = math.nan
        logits = model(pixels()).logits.detach()
        other = torch.where(half.isnan(), 9.0, logits)
        assert torch.isfinite(model._segmentation_loss(logits, half))
        assert_same(model._segmentation_loss(other, half), model._segmentation_loss(logits, half))
        cut = model._segmentation_loss(logits[..., SIDE // 2 :], labels[..., SIDE // 2 :])
        assert_same(model._segmentation_loss(logits, half), cut, rtol=1e-5, atol=1e-6)

    def test_gradient(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=generator).requires_grad_()
        labels = (torch.rand(2, 2, 3, 4, generator=generator) > 0.5).double()
        labels[0, 0, 0] = math.nan
        assert torch.autograd.gradcheck(lambda values: self.model()._segmentation_loss(values, labels), logits)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.zeros(BATCH, SIDE, SIDE, dtype=torch.long), "labels has shape .* multi_label_classification"),
            (torch.full((BATCH, 2, SIDE, SIDE), 255.0), r"must lie in \[0, 1\], a missing one being NaN; got 255"),
        ],
    )
    def test_refused_labels(self, labels, message):
        with pytest.raises(ValueError, match=message):
            self.model()(pixels(), labels=labels)

    @pytest.mark.parametrize("doublings", [1, 2, 3])
    def test_doublings_of_the_grid(self, doublings):
        model = self.model(segmentation_doublings=doublings, segmentation_hidden_size=64)
        seen = []
        model.decoder.classifier.register_forward_hook(lambda module, given, output: seen.append(output.shape))
        assert model(pixels()).logits.shape == (BATCH, 2, SIDE, SIDE)
        side = SIDE // model.config.patch_size * 2**doublings
        assert seen == [(BATCH, 2, side, side)]


class TestSpcxrForSemanticSegmentation(ModelContract):
    model_class = SpcxrForSemanticSegmentation
    float32_output = True

    def labels(self, config):
        generator = torch.Generator().manual_seed(3)
        return {"labels": torch.randint(config.num_labels, (BATCH, SIDE, SIDE), generator=generator)}

    def output_shapes(self):
        return {"logits": (BATCH, 3, SIDE, SIDE)}

    def test_logits_have_the_input_s_resolution(self):
        with torch.no_grad():
            logits = build(SpcxrForSemanticSegmentation)(pixels(height=24, width=40)).logits
        assert logits.shape == (BATCH, 3, 24, 40)

    def test_loss_is_cross_entropy_and_dice(self):
        output = self.run(build(SpcxrForSemanticSegmentation))
        labels = self.inputs()["labels"]
        one_hot = torch.stack([labels == index for index in range(3)], dim=1)
        probabilities = output.logits.softmax(dim=1)
        dice = [
            (2 * probabilities[:, index][one_hot[:, index]].sum() + 1)
            / (probabilities[:, index].sum() + one_hot[:, index].sum() + 1)
            for index in range(3)
        ]
        expected = nn.functional.cross_entropy(output.logits, labels) + 1 - torch.stack(dice).mean()
        assert_same(output.loss, expected, rtol=1e-5, atol=1e-6)

    def test_the_right_mask_has_the_lower_loss(self):
        model = build(SpcxrForSemanticSegmentation)
        predicted = self.run(model).logits.argmax(dim=1)
        right = self.run(model, labels=predicted).loss
        wrong = self.run(model, labels=(predicted + 1) % 3).loss
        assert 0 < right < wrong

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.full((BATCH, SIDE, SIDE), 3), r"must lie in 0 \.\. 2, or be 255 where missing; got 3"),
            (torch.full((BATCH, SIDE, SIDE), -100), "got -100"),
            (torch.zeros(BATCH, SIDE, SIDE), "whole numbers"),
            (torch.zeros(BATCH, 3, SIDE, SIDE, dtype=torch.long), r"shape \(2, 3, 32, 32\); expected \(2, 32, 32\)"),
        ],
    )
    def test_labels_out_of_range(self, labels, message):
        with pytest.raises(ValueError, match=message):
            self.run(build(SpcxrForSemanticSegmentation), labels=labels)

    @pytest.mark.parametrize("ignored", [255, 2])
    def test_ignored_pixels_take_no_part(self, ignored):
        """The loss is that of the known pixels alone: here, an image's left half."""
        config = tiny_config(semantic_loss_ignore_index=ignored)
        found = []
        for left_only in (False, True):
            model = build(SpcxrForSemanticSegmentation, config)
            logits = model(pixels()).logits
            labels = self.inputs()["labels"] % 2
            if left_only:
                logits, labels = logits[..., : SIDE // 2], labels[..., : SIDE // 2]
            else:
                labels[..., SIDE // 2 :] = ignored
            loss = model._segmentation_loss(logits, labels)
            loss.backward()
            found.append({"loss": loss.detach(), **gradients(model)})
        assert_same(found[1], found[0], rtol=1e-4, atol=1e-5)

    def test_all_pixels_ignored(self):
        model = build(SpcxrForSemanticSegmentation)
        loss = model(pixels(), labels=torch.full((BATCH, SIDE, SIDE), 255)).loss
        loss.backward()
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients(model).values())

    def test_labels_of_small_integer_types(self):
        model, labels = build(SpcxrForSemanticSegmentation), self.inputs()["labels"]
        labels[:, :4] = 255
        assert_same(self.run(model, labels=labels.to(torch.uint8)), self.run(model, labels=labels))

    def test_decoder_reads_the_layers_named(self):
        model = build(SpcxrForSemanticSegmentation, tiny_config(segmentation_layers=[1, 2]))
        before = self.run(model).logits
        with torch.no_grad():
            for parameter in model.spcxr.encoder.layers[2:].parameters():
                parameter.mul_(2)
        assert_same(self.run(model).logits, before)

    def test_masks_lie_where_the_image_is(self):
        """Through the decoder alone, a patch moves the logits around its own place, not its mirror image."""
        model = build(SpcxrForSemanticSegmentation, tiny_config(segmentation_layers=[4]))
        blocks = torch.zeros(1, 24, WIDTH)
        changed = blocks.clone()
        changed[:, 1 * 6 + 4] = 10  # second row, fifth column of 4 x 6
        with torch.no_grad():
            moved = (model.decoder([changed], (4, 6)) - model.decoder([blocks], (4, 6))).abs().sum(dim=(0, 1))
        assert moved.shape == (16, 24)
        by_patch = moved.unflatten(0, (4, 4)).unflatten(2, (6, 4)).mean(dim=(1, 3))
        assert by_patch.argmax() == 1 * 6 + 4

    @pytest.mark.parametrize("shape", [(BATCH, 1, SIDE, SIDE), (BATCH, 16, 16)])
    def test_refused_labels(self, shape):
        with pytest.raises(ValueError, match=r"labels has shape .*; expected \(2, 32, 32\)"):
            self.run(build(SpcxrForSemanticSegmentation), labels=torch.zeros(shape, dtype=torch.long))


class TestSpcxrBackbone(ModelContract):
    model_class = SpcxrBackbone

    def output_shapes(self):
        return {"feature_maps.0": (BATCH, WIDTH, 4, 4)}

    @pytest.mark.parametrize(
        "chosen", [{"out_features": ["stem", "stage2", "stage4"]}, {"out_indices": [0, 2, 4]}], ids=str
    )
    def test_feature_maps(self, chosen):
        model = build(SpcxrBackbone, tiny_config(**chosen))
        assert model.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
        assert (model.out_features, model.out_indices) == (["stem", "stage2", "stage4"], [0, 2, 4])
        assert model.channels == [WIDTH] * 3
        with torch.no_grad():
            output = model(pixels(height=24, width=40), output_hidden_states=True)
            for index, feature_map in zip((0, 2, 4), output.feature_maps, strict=True):
                assert feature_map.shape == (BATCH, WIDTH, 3, 5)
                tokens = model.layernorm(output.hidden_states[index])
                assert_same(feature_map[:, :, 1, 2], tokens[:, 1 + 1 * 5 + 2])

    def test_without_layernorm(self):
        model = build(SpcxrBackbone, tiny_config(apply_layernorm=False, out_indices=[1, 3]))
        output = self.run(model, output_hidden_states=True)
        for index, feature_map in zip((1, 3), output.feature_maps, strict=True):
            assert_same(feature_map.flatten(2).transpose(1, 2), output.hidden_states[index][:, 1:])

    def test_agrees_with_the_model(self):
        backbone, model = build(SpcxrBackbone), build(SpcxrModel)
        backbone.load_state_dict(model.state_dict())
        tokens = self.run(model).patch_tokens
        assert_same(self.run(backbone).feature_maps[0].flatten(2).transpose(1, 2), tokens)

    def test_inside_upernet(self):
        """A dense predictor of the library: one step forward, one backward, and round the disk."""
        config = UperNetConfig(
            backbone_config=tiny_config(out_indices=[1, 2, 3, 4]),
            hidden_size=16,
            pool_scales=[1, 2],
            auxiliary_in_channels=WIDTH,
            auxiliary_channels=8,
            num_labels=3,
        )
        model = UperNetForSemanticSegmentation(config).train()
        assert isinstance(model.backbone, SpcxrBackbone)
        labels = torch.zeros(BATCH, SIDE, SIDE, dtype=torch.long)
        output = model(pixels(), labels=labels)
        assert output.logits.shape == (BATCH, 3, SIDE, SIDE)
        output.loss.backward()
        for name, parameter in model.backbone.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


class TestOneCheckpointForAllClasses:
    """A checkpoint of the encoder or of pretraining starts every class, with exactly its weights."""

    NEW = {
        SpcxrModel: (),
        SpcxrForPreTraining: ("reconstruction_head.",),
        SpcxrForImageClassification: ("classifier.",),
        SpcxrForSemanticSegmentation: ("decoder.",),
        SpcxrBackbone: (),
    }

    @pytest.mark.parametrize("target", NEW, ids=lambda target: target.__name__)
    @pytest.mark.parametrize("source", NEW, ids=lambda source: source.__name__)
    def test_from_any_class_to_any_class(self, source, target, tmp_path):
        saved = build(source)
        saved.save_pretrained(tmp_path)
        loaded, info = target.from_pretrained(tmp_path, output_loading_info=True)
        assert_same_weights(self.encoder_weights(loaded), self.encoder_weights(saved))
        heads = () if source is target else self.NEW[target]
        own = {name for name in loaded.state_dict() if name.startswith(heads)} if heads else set()
        assert set(info["missing_keys"]) == own
        assert not info["unexpected_keys"]  # another task's head is left aside without a warning

    def test_a_weight_of_no_head_is_reported(self, tmp_path):
        saved = build(SpcxrModel)
        saved.save_pretrained(tmp_path)
        weights = {**saved.state_dict(), "encoder.layers.0.gate": torch.ones(1)}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        _, info = SpcxrModel.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["unexpected_keys"]) == {"encoder.layers.0.gate"}

    @staticmethod
    def encoder_weights(model):
        parts = ("embeddings.", "encoder.", "layernorm.")
        return {name: tensor for name, tensor in encoder_of(model).state_dict().items() if name.startswith(parts)}


@pytest.mark.parametrize(("rate", "per_layer", "once"), [("hidden_dropout_prob", 2, 1), ("drop_path_rate", 2, 0)])
def test_every_branch_is_dropped(rate, per_layer, once):
    """By hidden dropout the embeddings and both branches of a block, by stochastic depth the branches alone."""
    model = build(SpcxrModel, tiny_config(**{rate: 0.5})).train()
    dropped = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout | SpcxrDropPath) and (getattr(module, "p", 0) or getattr(module, "rate", 0)):
            module.register_forward_hook(lambda module, given, made, name=name: dropped.append((name, given[0], made)))
    model(pixels())
    layers = LAYERS if once else LAYERS - 1  # the first block's rate of stochastic depth is 0
    assert len(dropped) == once + per_layer * layers
    if once:  # in a batch of two a path may be kept by chance
        assert all((made == 0).any() and not torch.equal(given, made) for _, given, made in dropped)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_weights_are_dropped_in_training(attention):
    model = build(SpcxrModel, tiny_config(attention_probs_dropout_prob=0.5))
    model.set_attn_implementation(attention)
    expected = model(pixels()).last_hidden_state
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(pixels()).last_hidden_state, expected, atol=1e-3)


def test_losses_of_half_precision_are_computed_in_float32():
    labels = {
        SpcxrForImageClassification: {"labels": torch.tensor([0, 2])},
        SpcxrForPreTraining: {"labels": pixels(seed=3).bfloat16()},
        SpcxrForSemanticSegmentation: {"labels": torch.ones(BATCH, SIDE, SIDE, dtype=torch.long)},
    }
    for model_class, named in labels.items():
        assert build(model_class).bfloat16()(pixels().bfloat16(), **named).loss.dtype == torch.float32


def test_positions_of_half_precision_are_interpolated_in_float32():
    embeddings = build(SpcxrModel).bfloat16().embeddings
    found = embeddings.interpolate_position_embeddings(5, 7)
    expected = embeddings.float().interpolate_position_embeddings(5, 7)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
