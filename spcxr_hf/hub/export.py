"""Common parts of the exports: the model with its image processor, and grey weights for RGB input.

load_source           folder, id or model -> `ExportSource`: model in float32, task, image processor
patch_weight          the patch projection for 1 or 3 channels, equal in what it computes
picture_processor     the library's own ViT image processor with the same size, mean and deviation
plain_config          the ViT configuration that describes the encoder to tools that run no code of ours

The formats themselves are in `export_vit` and `export_onnx`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, ViTConfig, ViTImageProcessor

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE
from spcxr_hf.modeling.image_processing_spcxr import RADIOGRAPH_MEAN, RADIOGRAPH_STD
from spcxr_hf.modeling.modeling_spcxr import (
    SpcxrForImageClassification,
    SpcxrForSemanticSegmentation,
    SpcxrModel,
)
from spcxr_hf.models.loading import is_multi_label, label_names, load_config, load_network, load_processor

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as the image processor makes RGB grey
TASKS: dict[str, tuple[str, Any]] = {
    "SpcxrForImageClassification": ("classification", SpcxrForImageClassification),
    "SpcxrForSemanticSegmentation": ("segmentation", SpcxrForSemanticSegmentation),
}


@dataclass(frozen=True)
class ExportSource:
    """A model to export.

    Attributes:
        name: What to call it in messages.
        model: In evaluation mode, float32, on the CPU.
        task: "embedding", "classification" or "segmentation".
        size: (height, width) in pixels that the image processor makes.
        mean: Grey level that it takes off, on the scale 0..1.
        std: What it divides by.
    """

    name: str
    model: PreTrainedModel
    task: str
    size: tuple[int, int]
    mean: float
    std: float


def load_source(model: str | os.PathLike | PreTrainedModel, processor: Any = None) -> ExportSource:
    """The model to export, with its image processor; of a pretraining checkpoint, its encoder.

    Args:
        model: A folder or Hub id of a checkpoint of this family, or a model in memory. That one is put into evaluation
            mode and must be on the CPU, in float32.
        processor: Its image processor; by default the checkpoint's, or one of the model's native size.

    Raises:
        SpcxrError: it is none of ours, lacks weights, or has an image processor that treats channels unlike each other.
    """
    if isinstance(model, PreTrainedModel):
        name, network = type(model).__name__, model
    else:
        name = str(model)
        config = load_config(name, any_family=False)
        _, model_class = TASKS.get((config.architectures or [""])[0], ("embedding", SpcxrModel))
        network, _ = load_network(model_class, name, dtype=torch.float32)
        processor = processor or load_processor(name, required=False)
    if network.config.model_type != "spcxr":
        raise SpcxrError(f"{name}: a {network.config.model_type} model; only models of this family are exported")
    task, _ = TASKS.get(type(network).__name__, ("embedding", None))
    network = network if task != "embedding" else cast(PreTrainedModel, network.base_model)
    if network.device.type != "cpu" or network.dtype != torch.float32:
        raise SpcxrError(f"{name}: is on {network.device} in {network.dtype}; give it as model.float().cpu()")
    side = network.config.image_size
    size = (processor.size["height"], processor.size["width"]) if processor else (side, side)
    means, stds = (processor.image_mean, processor.image_std) if processor else (RADIOGRAPH_MEAN, RADIOGRAPH_STD)
    return ExportSource(name, network.eval(), task, size, _one_value(means, name), _one_value(stds, name))


def _one_value(values: Any, name: str) -> float:
    found = {float(value) for value in (values if isinstance(values, list | tuple) else [values])}
    if len(found) != 1:
        raise SpcxrError(f"{name}: its image processor treats the channels unlike each other ({values})")
    return found.pop()


def check_channels(source: ExportSource, num_channels: int) -> None:
    """Refuse a number of channels that the exported model cannot have."""
    if num_channels not in (1, 3) or num_channels < source.model.config.num_channels:
        raise SpcxrError(
            f"{source.name}: num_channels must be {source.model.config.num_channels} or 3; got {num_channels}"
        )


@torch.no_grad()
def patch_weight(source: ExportSource, num_channels: int) -> torch.Tensor:
    """The patch projection (D, num_channels, patch, patch).

    For three channels of a grey model: each is weighed by its share of the luminance. All channels share one mean and
    one deviation and the shares sum to 1, so a normalised RGB picture gives exactly what its normalised grey one does.
    """
    weight = cast(Any, source.model.base_model).embeddings.projection.weight.detach()
    if weight.shape[1] == num_channels:
        return weight.clone()
    return weight * weight.new_tensor(LUMINANCE).reshape(1, 3, 1, 1)


def picture_processor(source: ExportSource, num_channels: int) -> ViTImageProcessor:
    """The library's image processor that does the same: RGB for three channels; one channel asks for mode L pictures.

    It rounds to 8 bits after resizing, which ours does not: up to 1/255 of the grey range apart, before normalising.
    """
    height, width = source.size
    return ViTImageProcessor(
        size={"height": height, "width": width},
        resample=2,
        do_convert_rgb=num_channels == 3,
        image_mean=[source.mean] * num_channels,
        image_std=[source.std] * num_channels,
    )


def plain_config(source: ExportSource, num_channels: int, **others: Any) -> ViTConfig:
    """The configuration of the library's ViT for this encoder and, of a classifier, its labels and thresholds."""
    ours = source.model.config
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias",
            "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "image_size",
            "patch_size")  # fmt: skip
    fields = {name: getattr(ours, name) for name in same}
    if source.task == "classification":
        labels = dict(enumerate(label_names(ours)))
        numbers = {label: index for index, label in labels.items()}
        fields |= {"id2label": labels, "label2id": numbers, "problem_type": problem_type(ours)}
        for name in ("operating_points", "operating_point", "intended_use"):
            if getattr(ours, name, None) is not None:
                fields[name] = getattr(ours, name)
    # All as one dictionary: a configuration keeps fields that its class does not declare, too.
    return ViTConfig(**{**fields, "num_channels": num_channels, "notice": RESEARCH_NOTICE, **others})


def problem_type(config: Any) -> str:
    """How the logits of a classifier are read.

    Returns:
        "multi_label_classification" (a sigmoid each, that of a single label too), "single_label_classification" (a
        softmax over all) or "regression" (as they are).
    """
    if config.problem_type == "regression":
        return "regression"
    return f"{'multi' if is_multi_label(config) else 'single'}_label_classification"


__all__ = [
    "ExportSource",
    "check_channels",
    "load_source",
    "patch_weight",
    "picture_processor",
    "plain_config",
    "problem_type",
]
