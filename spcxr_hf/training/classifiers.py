"""Classifiers to fine-tune: SPCXR or another family, pretrained or new, whole, frozen or with LoRA; their input."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig

from spcxr_hf.errors import SpcxrError, needs
from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig
from spcxr_hf.modeling.image_processing_spcxr import SpcxrImageProcessor
from spcxr_hf.modeling.modeling_spcxr import SpcxrForImageClassification
from spcxr_hf.models.convert import change_image_size
from spcxr_hf.models.loading import (
    forward_options,
    load_config,
    load_network,
    load_processor,
    loading_errors,
    set_attention,
)
from spcxr_hf.training.arguments import FineTuningArguments, flag
from spcxr_hf.training.losses import classification_loss
from spcxr_hf.training.optim import layerwise_groups, new_config, parameter_groups

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of a fitted head; the least cross-entropy on val chooses
LORA_ALPHA = 16.0  # adapters are scaled by this / rank


@dataclass
class ClassifierArguments(FineTuningArguments):
    """Flags of a classifier."""

    init_from: str | None = flag(
        None,
        "checkpoint to start from: SPCXR of any task and image size, or another family's folder or "
        "Hub id that AutoModelForImageClassification loads",
    )
    multi_label: bool = flag(False, "several labels may hold at once, and null is a missing one")
    freeze_encoder: bool = flag(False, "train the head alone")
    lora_rank: int = flag(0, "rank of LoRA adapters in every linear layer of the encoder; 0: none")


# ---- models ----------------------------------------------------------------------------------------------------


def build_classifier(arguments: ClassifierArguments, labels: list[str]) -> PreTrainedModel:
    """The pretrained encoder, or a new one, under a new head, with everything that is not trained frozen.

    Args:
        labels: Names of the classes, in the order of the logits.

    Raises:
        SpcxrError: it is no such model, lacks weights, or has nothing to train; the message names it.
    """
    torch.manual_seed(arguments.seed)
    source, size = arguments.init_from, arguments.image_size
    values: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "multi_label_classification" if arguments.multi_label else "single_label_classification",
    }
    own_values = {**values, "drop_path_rate": arguments.drop_path_rate}
    model: PreTrainedModel
    if source is None:
        model = SpcxrForImageClassification(new_config(arguments.size, image_size=size, **own_values))
    else:
        config = load_config(source)
        if config.model_type != SpcxrConfig.model_type:
            model = _build_other(arguments, source, config, values)
        elif arguments.from_scratch:
            model = SpcxrForImageClassification(load_config(source, image_size=size, **own_values))
        else:
            model, _ = load_network(SpcxrForImageClassification, source, new="head", dtype=torch.float32, **own_values)
            change_image_size(cast(SpcxrForImageClassification, model), size)
    set_attention(model, arguments.attention)
    if arguments.freeze_encoder or arguments.lora_rank:
        in_encoder = {id(parameter) for parameter in model.base_model.parameters()}
        head = [parameter for parameter in model.parameters() if id(parameter) not in in_encoder]
        if not head:
            raise SpcxrError(f"{type(model).__name__} has no head apart from its encoder: nothing would be trained")
        model.base_model.requires_grad_(False)
        if arguments.lora_rank:
            add_adapters(model, arguments.lora_rank, LORA_ALPHA)
        for parameter in head:
            parameter.requires_grad_(True)
    return set_training(model, arguments.freeze_encoder)


def _build_other(arguments: ClassifierArguments, source: str, config: Any, values: dict[str, Any]) -> PreTrainedModel:
    """A classifier of another family."""
    if config.model_type == "vit_mae":  # a ViT: its encoder is fine-tuned under a ViT's classifier (arXiv 2111.06377)
        shared = ViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        config = ViTConfig(**{name: value for name, value in config.to_dict().items() if name in shared})
    if hasattr(config, "drop_path_rate"):
        values["drop_path_rate"] = arguments.drop_path_rate
    if arguments.from_scratch and hasattr(config, "image_size"):
        values["image_size"] = arguments.image_size
    config.update(values)
    auto_class = AutoModelForImageClassification
    with loading_errors(source, "no classifier can be made of it"):
        if arguments.from_scratch:
            model = auto_class.from_config(config, trust_remote_code=False)
        else:
            model, _ = load_network(auto_class, source, new="head", config=config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):  # used in pretraining only; data parallelism would wait for its gradient
            parameter.requires_grad_(False)
    # Checkpoints keep the module's own names; the library would write those of its former releases.
    cast(Any, model).save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


def add_adapters(model: PreTrainedModel, rank: int, alpha: float) -> None:
    """Put LoRA (arXiv 2106.09685) into every linear layer of the encoder, as QLoRA (arXiv 2305.14314) found it best.

    The model is changed in place; an adapter's output is scaled by `alpha` / `rank`.
    """
    with needs("train", "peft"):
        from peft import LoraConfig, inject_adapter_in_model
    names = [
        f"{model.base_model_prefix}.{name}"
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not names:
        raise SpcxrError(f"{type(model).__name__} has no linear layer in its encoder to adapt")
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=names)
    inject_adapter_in_model(config, model)  # in place, and the model stays of its class


def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter to the weight that it adapts, and leave plain layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def set_training(model: PreTrainedModel, freeze_encoder: bool) -> PreTrainedModel:
    """Training mode; a frozen encoder stays in evaluation mode, or its running means (ResNet) would change."""
    model.train()
    if freeze_encoder:
        model.base_model.eval()
    return model


def classifier_groups(model: PreTrainedModel, layer_decay: float) -> list[dict]:
    """AdamW's parameter groups, with layer-wise decay where the blocks are `layer(s).<n>` or `encoder.layer(s).<n>`."""
    blocks = re.compile(rf"^{model.base_model_prefix}\.(?:encoder\.)?layers?\.(\d+)\.")
    if not any(blocks.search(name) for name, _ in model.named_parameters()):
        return parameter_groups(model)
    return layerwise_groups(model, layer_decay, lambda name: blocks.sub(r"encoder.layers.\1.", name))


# ---- pixels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """How a model's input is made of a grey image.

    Attributes:
        size: Side of the input in pixels.
        mean, std: (channels, 1, 1), on the scale of 0 to 1; those of the model's own image processor.
        options: Further arguments of the model's forward.
    """

    size: int
    mean: torch.Tensor
    std: torch.Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, arguments: ClassifierArguments, model: PreTrainedModel) -> Pixels:
        """Those of the image processor in the checkpoint; SPCXR's if there is none, or it does not normalise."""
        source = arguments.init_from
        processor: Any = load_processor(source, required=False) if source is not None else None
        if getattr(processor, "image_mean", None) is None:
            processor = SpcxrImageProcessor()
        channels = getattr(model.config, "num_channels", 3)
        mean, std = (
            torch.as_tensor(values).float().flatten() for values in (processor.image_mean, processor.image_std)
        )
        if not {len(mean), len(std)} <= {1, channels}:
            raise SpcxrError(f"the image processor normalises {len(mean)} channels, the model takes {channels}")
        mean, std = (values.expand(channels).reshape(-1, 1, 1) for values in (mean, std))
        return cls(arguments.image_size, mean, std, forward_options(model))

    def normalise(self, grey: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, S) in 0 .. 1 -> (B, channels, S, S)."""
        return (grey - self.mean.to(grey.device)) / self.std.to(grey.device)

    def processor(self) -> SpcxrImageProcessor:
        """The image processor that makes the same input of any picture."""
        size = {"height": self.size, "width": self.size}
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return SpcxrImageProcessor(size=size, image_mean=mean, image_std=std, num_output_channels=len(mean))


# ---- a fitted head -----------------------------------------------------------------------------------------------
# LP-FT: fine-tuning starts with a linear head that was fitted to the frozen encoder's features. The gradients of a
# random head distort good features while it learns (Kumar et al., ICLR 2022, arXiv 2202.10054).


class LinearHead(NamedTuple):
    """logits = features @ weight.T + bias: `weight` (classes, D) and `bias` (classes,), float32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features (n, D) -> logits (n, classes)."""
        return features @ self.weight.T + self.bias


def final_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that gives the logits."""
    inside = {id(module) for module in model.base_model.modules()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and module.out_features == model.config.num_labels
    ]
    if len(layers) != 1:
        raise SpcxrError(f"{type(model).__name__} has {len(layers)} linear layers that could give its logits, not one")
    return layers[0]


@torch.no_grad()
def head_input(model: PreTrainedModel, pixel_values: torch.Tensor, **options: object) -> torch.Tensor:
    """Input of the final layer for these images: (B, C, H, W) -> (B, D) float32 on the CPU."""
    caught: list[torch.Tensor] = []
    hook = final_layer(model).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        model(pixel_values, **options)
    finally:
        hook.remove()
    return caught[0].float().cpu()


def fit_linear_head(
    features: torch.Tensor,
    targets: torch.Tensor,
    multi_label: bool,
    class_weights: torch.Tensor,
    penalty: float,
    steps: int = 200,
) -> LinearHead:
    """Logistic regression on standardised features: mean loss + `penalty` / 2 x squared norm of the weights.

    `features` are (n, D), `targets` and `class_weights` as for `losses.classification_loss`; L-BFGS takes at most
    `steps` iterations.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0, unbiased=False).clamp(min=1e-6)
    standard = (features - mean) / deviation
    weight = torch.zeros(targets.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = standard @ weight.T + bias
        cost = classification_loss(logits, targets, multi_label, class_weights)
        cost = cost + penalty / 2 * weight.square().sum()
        cost.backward()
        return cost

    optimizer.step(loss)
    folded = weight.detach() / deviation
    return LinearHead(folded, bias.detach() - folded @ mean)


def choose_linear_head(
    training: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    multi_label: bool,
    class_weights: torch.Tensor,
    penalties: Sequence[float] = PENALTIES,
) -> LinearHead:
    """The head whose penalty gives the least loss on val. Both sets are features (n, D) and targets (n, classes)."""
    heads = [fit_linear_head(*training, multi_label, class_weights, penalty) for penalty in penalties]
    features, targets = validation

    def loss(head: LinearHead) -> float:
        return classification_loss(head(features), targets, multi_label, class_weights).item()

    return min(heads, key=loss)


@torch.no_grad()
def put_head(model: PreTrainedModel, head: LinearHead) -> None:
    """Give the final layer these weights."""
    layer = final_layer(model)
    layer.weight.copy_(head.weight)
    layer.bias.copy_(head.bias)
