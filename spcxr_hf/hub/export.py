"""Common parts of the exports (`ExportSource`), and the export as a plain ViT of transformers; see also `export_onnx`.

The ViT's weights are written under the names that every release of the library reads, `encoder.layer.0.attention.
attention.query.weight` and so on; releases of late 5.x have other names inside and convert these on loading.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE, atomic_folder, read_json
from spcxr_hf.modeling.image_processing_spcxr import RADIOGRAPH_MEAN, RADIOGRAPH_STD
from spcxr_hf.modeling.modeling_spcxr import (
    SpcxrForImageClassification,
    SpcxrForSemanticSegmentation,
    SpcxrModel,
)
from spcxr_hf.models.loading import is_multi_label, label_names, load_config, load_network, load_processor

TOLERANCE = 1e-5  # of float32 sums in another order, relative to the largest output above 1
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as the image processor makes RGB grey
TASKS: dict[str, tuple[str, Any]] = {
    "SpcxrForImageClassification": ("classification", SpcxrForImageClassification),
    "SpcxrForSemanticSegmentation": ("segmentation", SpcxrForSemanticSegmentation),
}

# Our names of a block's parts -> the ViT's; queries, keys and values are split apart from one matrix.
PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.projection": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


@dataclass(frozen=True)
class ExportSource:
    """What is exported: the model in evaluation mode, float32, on the CPU, and how its image processor makes its input.

    Attributes:
        name: What to call it in messages.
        task: "embedding", "classification" or "segmentation".
        size: (height, width) in pixels.
        mean, std: Grey level that is taken off, and what is divided by, on the scale 0..1.
    """

    name: str
    model: PreTrainedModel
    task: str
    size: tuple[int, int]
    mean: float
    std: float


def load_source(model: str | os.PathLike | PreTrainedModel, processor: Any = None) -> ExportSource:
    """The model to export, with its image processor; of a pretraining checkpoint, its encoder.

    A model in memory is put into evaluation mode and must be on the CPU, in float32. The image processor is
    by default the checkpoint's, or one of the model's native size.

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


# ---- a ViT of transformers ---------------------------------------------------------------------------------------


def export_vit(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    num_channels: int = 3,
    processor: Any = None,
) -> Path:
    """Write a folder that `AutoModel`, `AutoModelForImageClassification` and `pipeline` of transformers load as ViT.

    A classifier with CLS pooling becomes a `ViTForImageClassification`, anything else a `ViTModel`:
    `last_hidden_state` is that of the original. `pooler_output` is too with CLS pooling (its dense layer is the
    identity); with mean pooling no ViT can compute it, and it is all zeros: take `last_hidden_state[:,
    1:].mean(dim=1)`. The decoder or reconstruction head of another task is left out. Other image sizes than the native
    one need `interpolate_pos_encoding=True` in the call.

    Args:
        model: Folder or Hub id of a checkpoint of this family, or a model in memory (float32, CPU).
        output: The folder to write: config.json, model.safetensors, preprocessor_config.json. One that is there already
            is replaced if it is an earlier export or empty.
        num_channels: 3, for RGB pictures, as pipelines and other tools hand them over (exact: each channel is weighed
            by its share of the luminance); or 1, for pictures of mode L given to the image processor itself.
        processor: Image processor of a model in memory; by default one of its native size.

    Raises:
        SpcxrError: it is a classifier with mean pooling (the message says what to do instead); it cannot be loaded or
            written; or the exported model, which is read again, does not compute the same within 1e-5.
    """
    source = load_source(model, processor)
    check_channels(source, num_channels)
    if source.task == "classification" and source.model.config.pooling == "mean":
        raise SpcxrError(
            f"{source.name}: a classifier over the mean of the patch tokens cannot be a ViTForImageClassification, "
            "which reads CLS alone. Export the encoder (its .base_model) and apply the classifier to "
            "last_hidden_state[:, 1:].mean(dim=1), export ONNX, or fine-tune with pooling cls"
        )
    target = Path(output)
    check_target(target, ("config.json", "preprocessor_config.json", "model.safetensors"))
    with atomic_folder(target) as partial:
        save_file(vit_state_dict(source, num_channels), partial / "model.safetensors", metadata={"format": "pt"})
        is_classifier = source.task == "classification"
        config = plain_config(
            source,
            num_channels,
            architectures=["ViTForImageClassification" if is_classifier else "ViTModel"],
            pooler_output_size=source.model.config.hidden_size,
            pooler_act="linear",
        )
        config.dtype = torch.float32
        config.save_pretrained(partial)
        picture_processor(source, num_channels).save_pretrained(partial)
        _compare(source, partial, num_channels)
    return target


def check_target(target: Path, written: Collection[str]) -> None:
    """Refuse to replace anything but an earlier export, which consists of the files `written`.

    Raises:
        SpcxrError: a file is there, or a folder that holds something else.
    """
    if target.is_dir():
        names = {path.name for path in target.iterdir()}
        if not names or (names <= set(written) and "notice" in read_json(target / "config.json")):
            return
    elif not target.exists():
        return
    raise SpcxrError(f"{target}: is there already and is no such export; it would be replaced, so name another folder")


@torch.no_grad()
def vit_state_dict(source: ExportSource, num_channels: int) -> dict[str, torch.Tensor]:
    """The weights under the names of `ViTModel`, or of `ViTForImageClassification` for a classifier."""
    ours = source.model.base_model.state_dict()
    weights = {
        "embeddings.cls_token": ours["embeddings.cls_token"],
        "embeddings.position_embeddings": ours["embeddings.position_embeddings"],
        "embeddings.patch_embeddings.projection.weight": patch_weight(source, num_channels),
        "embeddings.patch_embeddings.projection.bias": ours["embeddings.projection.bias"],
        "layernorm.weight": ours["layernorm.weight"],
        "layernorm.bias": ours["layernorm.bias"],
    }
    for index in range(source.model.config.num_hidden_layers):
        weights |= _block(ours, index)
    if source.task == "classification":
        head = {f"classifier.{name}": tensor for name, tensor in source.model.classifier.state_dict().items()}  # type: ignore[union-attr]
        weights = {f"vit.{name}": tensor for name, tensor in weights.items()} | head
    else:
        width = source.model.config.hidden_size
        by_cls = source.model.config.pooling == "cls"
        weights["pooler.dense.weight"] = torch.eye(width) if by_cls else torch.zeros(width, width)
        weights["pooler.dense.bias"] = torch.zeros(width)
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


def _block(ours: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    here, there = f"encoder.layers.{index}", f"encoder.layer.{index}"
    weights: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        for mine, theirs in PARTS.items():
            weights[f"{there}.{theirs}.{kind}"] = ours[f"{here}.{mine}.{kind}"]
        fused = ours.get(f"{here}.attention.qkv.{kind}")  # (3 D, D) or (3 D); no bias without qkv_bias
        if fused is not None:
            for name, part in zip(("query", "key", "value"), fused.chunk(3), strict=True):
                weights[f"{there}.attention.attention.{name}.{kind}"] = part
    return weights


@torch.no_grad()
def _compare(source: ExportSource, folder: Path, num_channels: int) -> None:
    """Load the folder by the library's own class and compare it with the original."""
    vit_class: Any = ViTForImageClassification if source.task == "classification" else ViTModel
    vit, loading = vit_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    lost = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if lost:
        raise SpcxrError(f"{source.name}: this release of transformers has other names: {', '.join(sorted(lost)[:4])}")
    side = source.model.config.image_size
    pixels = torch.randn(2, source.model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    is_classifier = source.task == "classification"
    name, original = ("logits", source.model) if is_classifier else ("last_hidden_state", source.model.base_model)
    expected = original(pixels)[name]
    found = vit.eval()(pixels.expand(-1, num_channels, -1, -1))[name]
    apart = (found - expected).abs().max().item()
    if not apart <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise SpcxrError(f"{source.name}: the exported ViT is {apart:.2g} apart from the model; nothing was written")
