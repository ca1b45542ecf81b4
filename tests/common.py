"""The model contract: what transformers expects of any model, as small mixins over one tiny configuration.

A test class takes `ModelContract` and says which class it is about, what its labels look like and what its outputs are.
The tests have the names that they have in the library's own common tests, where they are there too.
"""

import copy
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import auto_factory

from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig
from spcxr_hf.modeling.modeling_spcxr import SpcxrMLP

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "segmentation_hidden_size": 32,
    "num_labels": 3,
}
BATCH, SIDE, LAYERS, HEADS, TOKENS, WIDTH = 2, 32, 4, 2, 17, 32
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def tiny_config(**overrides: Any) -> SpcxrConfig:
    return SpcxrConfig(**{**TINY, **overrides})


def pixels(batch: int = BATCH, channels: int = 1, height: int = SIDE, width: int = SIDE, seed: int = 0) -> torch.Tensor:
    """Normalised pixel values; another seed, other pictures."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def build(model_class: type[PreTrainedModel], config: SpcxrConfig | None = None) -> Any:
    """A model in evaluation whose every tensor is unlike its initial value, so that nothing is equal by chance."""
    torch.manual_seed(0)
    model = model_class(tiny_config() if config is None else copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


def flatten(output: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """The tensors of an output by name, those inside tuples too."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return {key: tensor for part, value in items for key, tensor in flatten(value, f"{name}.{part}").items()}


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    assert actual
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            **(tolerance or {"rtol": 0, "atol": 0}),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class Case:
    """What the mixins need to know about a class."""

    model_class: ClassVar[type[PreTrainedModel]]
    float32_output = False  # whether the first output stays in float32 in a model of half precision

    def labels(self, config: SpcxrConfig) -> dict[str, torch.Tensor]:
        """What the class takes beside `pixel_values` to give a loss; nothing, if it gives none."""
        return {}

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the outputs for the tiny configuration, without loss."""
        raise NotImplementedError

    def inputs(self, **kwargs: Any) -> dict[str, Any]:
        return {"pixel_values": pixels(), **self.labels(tiny_config()), **kwargs}

    def run(self, model: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(**self.inputs(**kwargs))

    def loss(self, model: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the class, or what stands in for it: how far the features are from 1, block by block."""
        output = model(**self.inputs(output_hidden_states=True, **kwargs))
        if "loss" in output:
            return output.loss
        return sum((tensor - 1).square().mean() for tensor in flatten(output).values())


class ForwardContract(Case):
    def test_forward_signature(self):
        assert next(iter(inspect.signature(self.model_class.forward).parameters.values())).name == "self"
        assert list(inspect.signature(self.model_class.forward).parameters)[1] == "pixel_values"
        assert self.model_class.main_input_name == "pixel_values"

    def test_output_shapes(self):
        output = self.run(build(self.model_class))
        shapes = {name.removeprefix("output."): tuple(tensor.shape) for name, tensor in flatten(output).items()}
        loss = {"loss": ()} if self.labels(tiny_config()) else {}
        assert shapes == {**loss, **self.output_shapes()}

    def test_model_is_small(self):
        assert self.model_class(tiny_config()).num_parameters() < 100_000

    def test_determinism(self):
        model = build(self.model_class, tiny_config(hidden_dropout_prob=0.5, drop_path_rate=0.5))
        assert_same(self.run(model), self.run(model))

    def test_dropout_is_for_training(self):
        dropped = tiny_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, drop_path_rate=0.3)
        model = build(self.model_class, dropped)
        assert_same(self.run(model), self.run(build(self.model_class)))
        model.train()
        first, second = (flatten(self.run(model)) for _ in range(2))
        assert not any(torch.equal(first[name], second[name]) for name in first)

    def test_batching_equivalence(self):
        model, batch = build(self.model_class), pixels(batch=3)
        with torch.no_grad():
            together = flatten(model(batch))
            for index in range(len(batch)):
                alone = model(batch[index : index + 1])
                expected = {name: tensor[index : index + 1] for name, tensor in together.items()}
                assert_same(flatten(alone), expected, rtol=1e-5, atol=1e-5)

    def test_model_outputs_equivalence(self):
        model = build(self.model_class)
        kwargs = {"output_hidden_states": True, "output_attentions": True}
        as_dict = self.run(model, **kwargs)
        as_tuple = self.run(model, return_dict=False, **kwargs)
        assert isinstance(as_tuple, tuple)
        assert_same(as_tuple, as_dict.to_tuple())
        model.config.return_dict = False
        assert_same(self.run(model, **kwargs), as_dict.to_tuple())

    @pytest.mark.parametrize("asked_by", ["argument", "config"])
    def test_hidden_states_output(self, asked_by):
        model = build(self.model_class)
        assert "hidden_states" not in self.run(model)
        model.config.output_hidden_states = asked_by == "config"
        output = self.run(model, **({"output_hidden_states": True} if asked_by == "argument" else {}))
        assert [tuple(states.shape) for states in output.hidden_states] == [(BATCH, TOKENS, WIDTH)] * (LAYERS + 1)
        assert not torch.equal(output.hidden_states[0], output.hidden_states[1])

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_outputs(self, implementation):
        model = build(self.model_class, tiny_config(attn_implementation=implementation))
        assert model.config._attn_implementation == implementation
        assert "attentions" not in self.run(model)
        attentions = self.run(model, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in attentions] == [(BATCH, HEADS, TOKENS, TOKENS)] * LAYERS
        for weights in attentions:
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(BATCH, HEADS, TOKENS))
            assert weights.std() > 1e-3

    def test_eager_matches_sdpa_inference(self):
        model = build(self.model_class)
        kwargs = {"output_hidden_states": True}
        assert model.config._attn_implementation == "sdpa"
        fused = self.run(model, **kwargs)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"  # the library only warns where it cannot
        assert_same(self.run(model, **kwargs), fused, rtol=1e-4, atol=1e-4)

    def test_retain_grad_hidden_states_attentions(self):
        model = build(self.model_class)
        output = model(**self.inputs(output_hidden_states=True, output_attentions=True))
        kept = [output.hidden_states[0], output.attentions[0]]
        for tensor in kept:
            tensor.retain_grad()
        output[0].sum().backward() if isinstance(output[0], torch.Tensor) else output[0][0].sum().backward()
        assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)

    def test_other_image_sizes(self):
        model = build(self.model_class)
        with torch.no_grad():
            wide = flatten(model(pixels(height=24, width=48), output_hidden_states=True))
        assert wide["output.hidden_states.4"].shape == (BATCH, 1 + 3 * 6, WIDTH)
        assert all(tensor.isfinite().all() for tensor in wide.values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        model = build(self.model_class)
        with torch.no_grad():
            full = next(iter(flatten(model(pixels(height=48))).values()))
            half = next(iter(flatten(model.to(dtype)(pixels(height=48))).values()))
        assert half.dtype == (torch.float32 if self.float32_output else dtype)
        tolerance = 0.25 if dtype == torch.bfloat16 else 0.05
        torch.testing.assert_close(half.float(), full, rtol=tolerance, atol=tolerance * full.std().item())

    @pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 cannot compile transformers' decorators whole, nor its ViT")
    def test_can_compile_without_graph_breaks(self):
        model = build(self.model_class)
        expected = self.run(model, output_hidden_states=True)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_same(self.run(compiled, output_hidden_states=True), expected, rtol=1e-5, atol=1e-5)


class TrainingContract(Case):
    def test_training(self):
        """A few steps lower the loss, and every parameter takes part (CLS too: the patches attend to it)."""
        model = build(self.model_class).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = self.loss(model)
            loss.backward()
            losses.append(loss.item())
            for name, gradient in gradients(model).items():
                assert gradient.isfinite().all(), name
                assert gradient.abs().sum() > 0, name
            optimizer.step()
        assert losses == sorted(losses, reverse=True)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_training_gradient_checkpointing(self, use_reentrant, monkeypatch):
        calls = count_calls(monkeypatch, SpcxrMLP)
        found = []
        for checkpointing in (False, True):
            calls.clear()
            model = build(self.model_class).train()
            if checkpointing:
                enable_checkpointing(model, {"use_reentrant": use_reentrant})
            self.loss(model).backward()
            found.append((len(calls), gradients(model)))
        (plain_calls, plain), (recomputed_calls, recomputed) = found
        assert (plain_calls, recomputed_calls) == (LAYERS, 2 * LAYERS)  # every block runs again on the way back
        assert_same(recomputed, plain, rtol=1e-5, atol=1e-6)


class InitialisationContract(Case):
    def test_initialization(self):
        torch.manual_seed(0)
        config = tiny_config(hidden_size=64, initializer_range=0.05)
        for name, module in self.model_class(config).named_modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                assert (module.weight == 1).all(), name
                assert (module.bias == 0).all(), name
            elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                own_std = (2 / 64) ** 0.5 if name.startswith("reconstruction_head.layers.") else 0.05
                assert module.weight.std().item() == pytest.approx(own_std, rel=0.25), name
                assert (module.bias == 0).all(), name
            for own in ("cls_token", "position_embeddings"):
                if hasattr(module, own) and isinstance(getattr(module, own), nn.Parameter):
                    assert getattr(module, own).std().item() == pytest.approx(0.05, rel=0.3), own

    def test_init_on_meta_device(self):
        real = self.model_class(tiny_config())
        with torch.device("meta"):
            model = self.model_class._from_config(tiny_config(drop_path_rate=0.1))
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in real.state_dict().items()}

    def test_model_get_set_embeddings(self):
        model = self.model_class(tiny_config())
        assert isinstance(model.get_input_embeddings(), nn.Conv2d)
        output = model.get_output_embeddings()  # quantisation, and adapters of all linear layers, leave it alone
        names = ("Classification", "Segmentation", "PreTraining")
        assert (output is not None) == any(name in self.model_class.__name__ for name in names)


class SavingContract(Case):
    def test_save_load(self, tmp_path):
        model = build(self.model_class)
        model.save_pretrained(tmp_path)
        loaded, info = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert not loaded.training
        assert_same_weights(loaded.state_dict(), model.state_dict())
        assert_same(self.run(loaded), self.run(model))

    def test_no_reinitialisation(self, tmp_path):
        """Loading must leave alone what it has loaded, whatever `_init_weights` does."""
        build(self.model_class).save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        for kwargs in ({}, {"device_map": "cpu"}, {"dtype": "float32"}):
            assert_same_weights(self.model_class.from_pretrained(tmp_path, **kwargs).state_dict(), stored)

    def test_can_use_safetensors(self, tmp_path):
        model = build(self.model_class)
        model.save_pretrained(tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        code = {"configuration_spcxr.py", "modeling_spcxr.py"}
        assert names == {"config.json", "model.safetensors"} | code
        assert_same_weights(load_file(tmp_path / "model.safetensors"), model.state_dict())

    def test_save_load_in_shards(self, tmp_path):
        model = build(self.model_class)
        model.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert_same_weights(self.model_class.from_pretrained(tmp_path).state_dict(), model.state_dict())

    def test_load_in_another_dtype(self, tmp_path):
        build(self.model_class).save_pretrained(tmp_path)
        loaded = self.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert loaded.config.dtype == torch.bfloat16

    def test_load_with_missing_keys(self, tmp_path):
        """What is not in the file is initialised as in a new model, and everything else is loaded."""
        build(self.model_class, tiny_config(initializer_range=0.05)).save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        gone = [
            name for name in stored if name.endswith(("position_embeddings", "norm1.bias", "layers.2.mlp.fc1.weight"))
        ]
        assert len(gone) == 2 + LAYERS
        kept = {name: tensor for name, tensor in stored.items() if name not in gone}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == set(gone)
        weights = loaded.state_dict()
        assert_same_weights({name: weights[name] for name in kept}, kept)
        for name in gone:
            assert weights[name].std().item() == pytest.approx(0.0 if name.endswith("bias") else 0.05, rel=0.3), name

    @pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["", "ignored"])
    def test_load_with_mismatched_shapes(self, options, tmp_path):
        """Position embeddings of another native size are not drawn anew: the message says what to do."""
        build(self.model_class).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="image_size is 64, and the position embeddings are stored for"):
            self.model_class.from_pretrained(tmp_path, image_size=64, **options)

    def test_saved_code_is_named_locally(self, tmp_path):
        """A model from the Hub names its code `user/repository--file.Class`; what it saves stands by itself."""
        model = build(self.model_class)
        local = dict(model.config.auto_map)
        model.config.auto_map = {name: f"someone/else--{code}" for name, code in local.items()}
        model.save_pretrained(tmp_path)
        assert saved_config(tmp_path)["auto_map"] == local


class ModelContract(ForwardContract, TrainingContract, InitialisationContract, SavingContract):
    """Everything together."""


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def encoder_of(model: Any) -> Any:
    """The module that holds `embeddings`, `encoder` and `layernorm`: the model itself, or what a head stands on."""
    return getattr(model, model.base_model_prefix, model)


def answer_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """`AutoBackbone.from_pretrained` asks the Hub whether its repository exists, even for a folder; here it does."""
    monkeypatch.setattr(auto_factory, "hf_api", lambda: SimpleNamespace(repo_exists=lambda name: True))


def enable_checkpointing(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """By the name of today or, in earlier 5.x releases, the former one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def count_calls(monkeypatch: pytest.MonkeyPatch, module_class: type[nn.Module]) -> list[None]:
    """A list that grows by one with every forward of that class."""
    calls: list[None] = []
    forward = module_class.forward

    def counted(self, *args, **kwargs):
        calls.append(None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(module_class, "forward", counted)
    return calls
