"""A checkpoint as a plain ViT of transformers: it loads with no code of ours and computes the same.

The weights are written under the names that every release of the library reads, `encoder.layer.0.attention.attention.
query.weight` and so on; releases of late 5.x have other names inside and convert these on loading.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, ViTForImageClassification, ViTModel

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_folder, read_json
from spcxr_hf.hub.export import (
    ExportSource,
    check_channels,
    load_source,
    patch_weight,
    picture_processor,
    plain_config,
)

TOLERANCE = 1e-5  # of float32 sums in another order, relative to the largest output above 1

# Our names of a block's parts -> the ViT's; queries, keys and values are split apart from one matrix.
PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.projection": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def export_vit(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    num_channels: int = 3,
    processor: Any = None,
) -> Path:
    """Write a folder that `AutoModel`, `AutoModelForImageClassification` and `pipeline` of transformers load as ViT.

    A classifier with CLS pooling becomes a `ViTForImageClassification`, anything else a `ViTModel`:
    `last_hidden_state` is that of the original. `pooler_output` is too with CLS pooling (its dense layer is the
    identity); with mean pooling no ViT can compute it, and it is all zeros rather than something that looks like it:
    take `last_hidden_state[:, 1:].mean(dim=1)`. The decoder or reconstruction head of another task is left out.

    Other image sizes than the native one need `interpolate_pos_encoding=True` in the call. Stochastic depth is training
    only and is not exported. The folder is read again, and its outputs compared, before it takes its place.

    Args:
        model: Folder or Hub id of a checkpoint of this family, or a model in memory (float32, CPU).
        output: The folder to write: config.json, model.safetensors, preprocessor_config.json. One that is there already
            is replaced if it is an earlier export or empty.
        num_channels: 3, or 1 for a grey model as it is. Pipelines, widgets and other tools hand over RGB pictures: with
            3, each channel is weighed by its share of the luminance, which is exact. With 1, give pictures of mode L to
            the image processor itself; pipelines make every picture RGB and do not work then.
        processor: Image processor of a model in memory; by default one of its native size.

    Returns:
        The folder.

    Raises:
        SpcxrError: it is a classifier with mean pooling (see the message for what to do instead); it cannot be loaded
            or written; or the exported model does not compute the same within 1e-5.

    Example:

    ```python
    >>> from spcxr_hf.hub.export_vit import export_vit

    >>> export_vit("spcxr/base", "base-vit")
    >>> vit = transformers.AutoModel.from_pretrained("base-vit")  # with or without spcxr_hf
    ```"""
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
    """Refuse to replace anything but an earlier export of the same kind: a checkpoint, the model's own folder, user
    files.

    Args:
        written: What an export writes into its folder.

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


__all__ = ["check_target", "export_vit", "vit_state_dict"]
