"""Conversion of weights and image sizes: timm and GMML-release state dicts, three channels to one.

The names below are facts about two file formats: the vision transformers of timm (`vit_*_patch*`), and the checkpoints
of the public GMML release, which keeps timm's names for the encoder under `backbone.` and adds `head_recons.`. Both
fuse queries, keys and values as `modeling/` does, so conversion is renaming; only a change of channels computes.
`training_scripts/benchmarks/parity.py` measures that the converted models compute the same.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from spcxr_hf.errors import SpcxrError
from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig
from spcxr_hf.modeling.modeling_spcxr import SpcxrEmbeddings, SpcxrForPreTraining, SpcxrPreTrainedModel

logger = logging.getLogger(__name__)

# Where training scripts keep the model among optimiser and schedule, in the order in which they are looked for.
CONTAINERS = ("SiT_model", "model", "state_dict", "teacher", "student")

# What wrappers put before a name: distributed training, torch.compile, and modules that hold the encoder.
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")

# Left out silently, since the encoder's output does not depend on it: classifiers and projection heads (timm,
# DINO, the release's second stage), timm's former pre-logits, and the decoder of MAE.
LEFT_OUT = ("head.", "head_class.", "head_data.", "pre_logits.", "mask_token", "decoder_")

HEAD = "head_recons."

# Our names -> theirs, one replacement after the other.
RENAMED = (
    ("spcxr.embeddings.cls_token", "cls_token"),
    ("spcxr.embeddings.position_embeddings", "pos_embed"),
    ("spcxr.embeddings.projection.", "patch_embed.proj."),
    ("spcxr.encoder.layers.", "blocks."),
    (".attention.qkv.", ".attn.qkv."),
    (".attention.projection.", ".attn.proj."),
    ("spcxr.layernorm.", "norm."),
    ("reconstruction_head.projection.", f"{HEAD}convTrans."),
)

# Read from the shapes, so no override may contradict them.
INFERRED = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_size", "patch_size", "qkv_bias",
            "reconstruction_depth")  # fmt: skip


@torch.no_grad()
def change_image_size(model: SpcxrPreTrainedModel, image_size: int) -> None:
    """Make `image_size` (pixels) the model's native size: its position embeddings are interpolated once, for good.

    Raises:
        SpcxrError: `image_size` is no positive multiple of the patch size.
    """
    if image_size < 1 or image_size % model.config.patch_size:
        raise SpcxrError(f"image_size ({image_size}) must be a multiple of patch_size ({model.config.patch_size})")
    # A cast, not isinstance: a model loaded by remote code has another class.
    embeddings = cast(SpcxrEmbeddings, model.base_model.embeddings)
    grid = image_size // model.config.patch_size
    trainable = embeddings.position_embeddings.requires_grad
    positions = embeddings.interpolate_position_embeddings(grid, grid)
    embeddings.position_embeddings = nn.Parameter(positions.detach().clone(), requires_grad=trainable)
    embeddings.grid_size = grid
    model.config.image_size = image_size


def load_vit_state_dict(
    source: Mapping[str, Any] | str | Path,
    num_channels: int | None = None,
    num_attention_heads: int | None = None,
    **config_overrides: Any,
) -> SpcxrForPreTraining:
    """A model with the weights of a timm ViT or of a checkpoint of the GMML release (arXiv 2205.14986).

    Width, depth, patch size, image size, channels and the depth of the reconstruction head are read from the shapes.
    The weights become float32 copies. A classifier and an MAE's decoder (`LEFT_OUT` names them all) are left out. Where
    the source has no reconstruction head, as timm's models, it is newly initialised and a warning says so.

    Args:
        source: A state dict, name -> tensor; or a whole checkpoint that holds one under "SiT_model" (the release),
            "model", "state_dict", "teacher" or "student", the first of them that is there; or a .safetensors file.
            Prefixes such as "module." and "backbone." are dropped.
        num_channels: 1 turns a three-channel file into a grey model; by default the file's number stays. The patch
            embedding is summed over its channels, so the grey model does with an image what the original does with the
            same image repeated three times. That holds for the *normalised* image: exact where all channels share one
            mean and standard deviation (timm's vit_small_patch16_224: 0.5 and 0.5; give the image processor the same),
            approximate where they differ (ImageNet's, in the GMML release), until fine-tuning has made up for it. The
            reconstruction is the mean over the original's channels.
        num_attention_heads: By default width / 64, as in every ViT of both sources; no shape tells it.
        config_overrides: Further fields of `SpcxrConfig`. `layer_norm_eps` is 1e-6 by default, as in both sources.
            timm's classifiers are trained on CLS: `pooling="cls"` keeps that; the GMML loss never touches it.

    Returns:
        A model in evaluation mode; `save_pretrained` writes it, and every other class of the family loads its encoder.

    Raises:
        SpcxrError: the file is no readable .safetensors file (pickles are refused: loading one can run code); weights
            are missing, unknown, or of a wrong shape, all of which are named; or the configuration is impossible.

    Example:

    ```python
    >>> import timm
    >>> from spcxr_hf.models.convert import load_vit_state_dict

    >>> vit = timm.create_model("vit_small_patch16_224", pretrained=True)
    >>> model = load_vit_state_dict(vit.state_dict(), num_channels=1, pooling="cls")
    >>> model.save_pretrained("small-from-timm")
    ```"""
    weights = _plain_state_dict(_read(source) if isinstance(source, str | Path) else source)
    config = _infer_config(weights, num_attention_heads, config_overrides)
    if num_channels is not None and num_channels != config.num_channels:
        if (config.num_channels, num_channels) != (3, 1):
            raise SpcxrError(f"num_channels: {config.num_channels} cannot become {num_channels}; 3 can become 1")
        weights, config.num_channels = _to_grey(weights), 1

    model = SpcxrForPreTraining(config)
    has_head = any(name.startswith(HEAD) for name in weights)
    wanted = model.state_dict() if has_head else model.spcxr.state_dict(prefix="spcxr.")
    names = {ours: _their_name(ours) for ours in wanted}
    _check(weights, {names[ours]: tuple(tensor.shape) for ours, tensor in wanted.items()})
    model.load_state_dict({ours: weights[theirs] for ours, theirs in names.items()}, strict=False)
    if not has_head:
        logger.warning("no reconstruction head (%s*) among the weights: it is newly initialised", HEAD)
    return model.eval()


def _read(path: str | Path) -> dict[str, torch.Tensor]:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise SpcxrError(
            f"{path}: only .safetensors files are read, since unpickling (.pth, .pt, .bin, ...) can run code. If you "
            "trust this file, `checkpoint = torch.load(path, map_location='cpu', weights_only=True)` reads its tensors "
            "(a checkpoint of the GMML release holds its command line too: `with torch.serialization.safe_globals("
            "[argparse.Namespace]):` around it); then load_vit_state_dict(checkpoint), and save_pretrained"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpcxrError(f"{path}: cannot be read ({error})") from error


def _plain_state_dict(source: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, without wrappers' prefixes and left-out weights."""
    if not isinstance(source, Mapping):
        raise SpcxrError(f"expected a state dict or the path of one; got {type(source).__name__}")
    while inner := next((source[name] for name in CONTAINERS if isinstance(source.get(name), Mapping)), None):
        source = inner
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in source.items():
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise SpcxrError(f"no state dict: {name!r} is a {kind}, and none of {', '.join(CONTAINERS)} holds weights")
        bare = str(name)
        while wrapper := next((wrapper for wrapper in WRAPPERS if bare.startswith(wrapper)), None):
            bare = bare.removeprefix(wrapper)
        if bare in weights:
            raise SpcxrError(f"{name}: another weight is called {bare!r} too, prefixes aside; pass one model's weights")
        if not bare.startswith(LEFT_OUT):
            weights[bare] = tensor.detach().float()
    return weights


def _infer_config(weights: Mapping[str, torch.Tensor], heads: int | None, overrides: Mapping[str, Any]) -> SpcxrConfig:
    """The configuration that the shapes tell, and the caller where they don't."""
    _check_overrides(overrides)
    width, channels, patch, _ = _shape(weights, "patch_embed.proj.weight", 4)
    positions = _shape(weights, "pos_embed", 3)[1]
    grid = math.isqrt(max(positions - 1, 0))
    if not grid or grid**2 != positions - 1:
        raise SpcxrError(f"pos_embed has {positions} positions; expected CLS and a square of patches, as 1 + 14 x 14")
    if channels not in (1, 3):
        raise SpcxrError(f"patch_embed.proj.weight takes {channels} channels; expected 1 or 3")
    if heads is None and width % 64:
        raise SpcxrError(f"a width of {width} is no multiple of 64: say num_attention_heads")
    inferred: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_attention_heads": width // 64 if heads is None else heads,
        "intermediate_size": _shape(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }
    if any(name.startswith(HEAD) for name in weights):
        linear = [name for name in weights if re.fullmatch(rf"{re.escape(HEAD)}mlp\.\d+\.weight", name)]
        inferred["reconstruction_depth"] = len(linear)
    try:
        return SpcxrConfig(**inferred, **overrides)
    except StrictDataclassError as error:
        raise SpcxrError(f"no SpcxrConfig fits: {' '.join(str(error).split())}") from error


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    # A configuration takes any word and keeps it; here a misspelt one would be ignored silently.
    known = {field.name for field in dataclasses.fields(SpcxrConfig)}
    for name in overrides:
        if name in INFERRED:
            raise SpcxrError(f"{name} follows from the weights and cannot be given")
        if name not in known:
            raise SpcxrError(f"{name} is no field of SpcxrConfig")


def _shape(weights: Mapping[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        raise SpcxrError(f"{name} is missing: these are not the weights of a timm or GMML-release ViT")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or not all(shape):
        raise SpcxrError(f"{name} has shape {shape}; expected {dimensions} dimensions")
    return shape


def _to_grey(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One channel in and out, where there were three."""
    grey = dict(weights)
    # (D, 3, patch, patch) -> (D, 1, patch, patch): on equal channels, the sum of products is the product of the sum.
    grey["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    # (D, 3, patch, patch) and (3,): the mean of the channels' reconstructions, these being linear in both.
    for name, dimension in ((f"{HEAD}convTrans.weight", 1), (f"{HEAD}convTrans.bias", 0)):
        # A tensor of another shape stays, and is named with all that do not fit.
        if name in weights and tuple(weights[name].shape[dimension : dimension + 1]) == (3,):
            grey[name] = weights[name].mean(dim=dimension, keepdim=True)
    return grey


def _their_name(ours: str) -> str:
    for mine, theirs in RENAMED:
        ours = ours.replace(mine, theirs)
    # Their head is a sequence in which every second module is an activation.
    return re.sub(r"^reconstruction_head\.layers\.(\d+)", lambda found: f"{HEAD}mlp.{2 * int(found[1])}", ours)


def _check(weights: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes, and name everything that does not fit."""
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    found = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        if names
    ]
    if found:
        raise SpcxrError(f"these weights do not fit a ViT of this family; {'; '.join(found)}")
