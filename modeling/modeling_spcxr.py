# Copyright 2026 The SPCXR on the Hub authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The SPCXR vision transformer: embeddings, block, encoder, and the heads over it, read from top to bottom.

The encoder is the ViT of arXiv 2010.11929 in the pre-norm form of DeiT (arXiv 2012.12877). What is particular to SPCXR
(arXiv 2211.12944) is how it learns: `SpcxrForPreTraining` sees a radiograph of which groups of neighbouring patches
were corrupted in pixel space (GMML, arXiv 2205.14986) and reconstructs the pixels. Every patch, corrupted or not, goes
through the encoder, and no mask token exists. The corruption is an input here, so every forward is deterministic in
evaluation.

Shapes: B images, C channels, H x W pixels, N = (H / patch_size) * (W / patch_size) patches, D = hidden_size.
"""

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_spcxr import AUTO_MAP, SpcxrConfig

FEATURE_STATISTICS = "feature_statistics.safetensors"  # of a classifier's training images, beside its weights


@dataclass
class SpcxrModelOutput(BaseModelOutputWithPooling):
    """Output of [`SpcxrModel`].

    Attributes:
        last_hidden_state: (B, 1 + N, D), after the final LayerNorm; first CLS, then the patches row by row.
        pooler_output: (B, D), the image's embedding: mean of the patch tokens or CLS, as `config.pooling` says.
        hidden_states: `num_hidden_layers + 1` tensors (B, 1 + N, D): the embeddings, then every block's output, before
            the final LayerNorm. Only with `output_hidden_states=True`.
        attentions: `num_hidden_layers` tensors (B, heads, 1 + N, 1 + N), rows summing to 1. Only with
            `output_attentions=True`.
    """

    @property
    def cls_token(self) -> torch.Tensor:
        """(B, D): the CLS token. GMML does not train it; use it only after fine-tuning with `pooling="cls"`."""
        return self.last_hidden_state[:, 0]

    @property
    def patch_tokens(self) -> torch.Tensor:
        """(B, N, D): the patch tokens, row by row from the top left of the image."""
        return self.last_hidden_state[:, 1:]


class SpcxrEmbeddings(nn.Module):
    """(B, C, H, W) pixels -> (B, 1 + N, D) tokens: patch projection, CLS in front, position embeddings added."""

    def __init__(self, config: SpcxrConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        self.grid_size = config.image_size // config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_position_embeddings(self, height: int, width: int) -> torch.Tensor:
        """The position embeddings for a grid of height x width patches, (1, 1 + height * width, D).

        The identity at the native grid; elsewhere the patch positions are resized bicubically and CLS keeps its own.
        """
        # Resizing to the native grid changes no bit; a trace would keep this branch for images of all sizes.
        if height == self.grid_size and width == self.grid_size and not torch.jit.is_tracing():
            return self.position_embeddings
        cls_position, patch_positions = self.position_embeddings.split([1, self.grid_size**2], dim=1)
        grid = patch_positions.unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)  # (1, D, grid, grid)
        # float32: bicubic weights in half precision shift the positions visibly.
        grid = nn.functional.interpolate(grid.float(), size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([cls_position, grid.flatten(2).transpose(1, 2).to(cls_position.dtype)], dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dim() != 4 or not pixel_values.shape[0]:
            raise ValueError(f"pixel_values must be (B, C, H, W), B at least 1; got {tuple(pixel_values.shape)}")
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(
                f"pixel_values has {channels} channels; this model takes {self.num_channels}. The checkpoint's image "
                f"processor (AutoImageProcessor) makes them of grey and colour pictures"
            )
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"pixel_values is {height} x {width} pixels; height and width must be multiples of {self.patch_size}"
            )
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # (B, D, H / patch, W / patch)
        positions = self.interpolate_position_embeddings(*patches.shape[-2:])
        tokens = patches.flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.dropout(tokens + positions)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, spelled out, and the only one to return its weights. Inputs (B, heads, 1 + N, D / heads)."""
    weights = (query @ key.transpose(-2, -1)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class SpcxrAttention(nn.Module):
    """Multi-head self-attention over (B, 1 + N, D), by whichever implementation the configuration names."""

    def __init__(self, config: SpcxrConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        # One matrix for queries, keys and values: a single large product is faster than three on every device.
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, need_weights: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_size))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, 1 + N, D / heads)

        attend: Callable = eager_attention_forward
        # The fused implementations never hold the weights: a request for them goes eager. (`get_interface` would do the
        # same, but breaks the graph under torch.compile of torch 2.6.)
        # trf-ignore: TRF051
        if not need_weights and self.config._attn_implementation not in (None, "eager"):
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        context, weights = attend(
            self, query, key, value, None, scaling=self.scaling, dropout=self.dropout if self.training else 0.0
        )  # context (B, 1 + N, heads, D / heads)
        return self.projection(context.flatten(2)), weights


class SpcxrMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: SpcxrConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SpcxrDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, an image skips the residual branch with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < keep
        return branch * kept.to(branch.dtype) / keep  # divided, so that the expectation stays

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class SpcxrLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block, (B, 1 + N, D) -> (B, 1 + N, D)."""

    def __init__(self, config: SpcxrConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SpcxrAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SpcxrMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = SpcxrDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, attentions: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Where a list is given, the attention weights (B, heads, 1 + N, 1 + N) are appended to it."""
        context, attention = self.attention(self.norm1(hidden_states), attentions is not None)
        if attentions is not None:
            attentions.append(attention)
        hidden_states = hidden_states + self.drop_path(self.dropout(context))
        return hidden_states + self.drop_path(self.dropout(self.mlp(self.norm2(hidden_states))))


class SpcxrEncoder(nn.Module):
    """The stack of blocks: the hidden states before the first and after each, and each block's attention if needed."""

    def __init__(self, config: SpcxrConfig):
        super().__init__()
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(
            SpcxrLayer(config, config.drop_path_rate * index / max(depth - 1, 1)) for index in range(depth)
        )

    def forward(
        self, hidden_states: torch.Tensor, need_weights: bool = False
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        all_hidden_states: list[torch.Tensor] = [hidden_states]
        attentions: list[torch.Tensor] = []
        for layer in self.layers:
            hidden_states = layer(hidden_states, attentions if need_weights else None)
            all_hidden_states.append(hidden_states)
        # What gradient checkpointing appends when it computes a block again is not in the tuple.
        return tuple(all_hidden_states), tuple(attentions)


LARGEST_HEADER = 100_000_000  # bytes of a safetensors header; as the library that reads it
NEW_PARAMETERS = 100_000_000  # newly initialised parameters that are always allowed; the largest head has 1,000,000


def check_weight_files(folder: Path) -> None:
    """Refuse a folder whose weights would be read from elsewhere, or from anything but safetensors files.

    Looked at are the symbolic links, the indices of divided weights, `transformers_weights` in `config.json`, and
    `adapter_config.json`, which names a base model anywhere. Links of the Hub's cache are good: they lead from a
    snapshot to the blobs of the same repository.

    Raises:
        ValueError: it is so, or an index cannot be read; the message names the file.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: adapters of another model; load that one, then these with peft")
    stated = None
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stated = config.get("transformers_weights") if isinstance(config, dict) else None
    files = [*folder.glob("*.safetensors"), *folder.glob("*.index*.json")]
    if stated is not None:
        files.append(folder / str(stated))
    for file in sorted(files):
        _check_weight_file(file, folder)
        if not file.name.endswith(".safetensors"):
            for part in _parts_of_index(file):
                _check_weight_file(folder / part, folder)  # the library looks here, wherever the index is
                if not part.endswith(".safetensors"):
                    raise ValueError(f"{file}: names {part!r}; only safetensors are loaded")


def _check_weight_file(file: Path, folder: Path) -> None:
    """Raise ValueError where the file, after following links, is outside the folder."""
    root, real = folder.resolve(), file.resolve()
    if file.is_symlink() and root.parent.name == "snapshots" and root in (file.parent.resolve() / "-").parents:
        # One step alone: what the blobs of a cache are linked to is the cache's affair.
        blob = Path(os.path.normpath(file.parent.resolve() / file.readlink()))
        real = root / file.name if blob.parent == root.parent.parent / "blobs" else real
    if root not in real.parents:
        raise ValueError(f"{file}: outside the checkpoint folder {folder}")


def _parts_of_index(index: Path) -> list[str]:
    """The files that an index of divided weights names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(os.fspath(name) for name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: no index of weights ({type(error).__name__})") from error


def check_stored_weights(model: PreTrainedModel, files: list[str], is_quantized: bool) -> None:
    """Refuse weights that a model cannot take, by the files' headers, before memory is taken.

    Raises:
        ValueError: weights are stored as whole numbers without being quantised, are position embeddings of another
            image size, or are few beside the parameters that would be newly initialised.
    """
    stored: dict[str, dict] = {}
    for file in files:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > LARGEST_HEADER:
                return  # reading it fails with the library's own words
            try:
                stored |= json.loads(stream.read(size))
            except (ValueError, TypeError):
                return
    stored = {name: entry for name, entry in stored.items() if name != "__metadata__"}
    for name, entry in stored.items():
        if entry["dtype"][:1] in "IUB" and entry["dtype"] != "BF16" and not is_quantized:
            raise ValueError(f"{name} is stored as {entry['dtype']}; weights are floating-point numbers")
    parts = {name.removeprefix(f"{model.base_model_prefix}."): entry["shape"] for name, entry in stored.items()}
    found = new = 0
    for name, parameter in model.named_parameters():
        shape = parts.get(name.removeprefix(f"{model.base_model_prefix}."))
        is_stored = shape == list(parameter.shape)
        found, new = found + is_stored * parameter.numel(), new + (not is_stored) * parameter.numel()
        if name.endswith("position_embeddings") and shape is not None and not is_stored and len(shape) == 3:
            side = round((shape[1] - 1) ** 0.5) * model.config.patch_size
            raise ValueError(
                f"image_size is {model.config.image_size}, and the position embeddings are stored for {side}. Pass no "
                "image_size: images of other sizes are taken as they are, the positions being interpolated"
            )
    if not is_quantized and new > max(found, NEW_PARAMETERS):
        raise ValueError(f"the weights hold {found:,} of the configuration's parameters and lack {new:,} of them")


class SpcxrPreTrainedModel(PreTrainedModel):
    """What all classes of the family share: configuration, initialisation, capabilities."""

    config_class = SpcxrConfig
    base_model_prefix = "spcxr"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpcxrEmbeddings", "SpcxrLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The losses are means over their own batch. Seeing `**kwargs`, Trainer would believe that they divide by the number
    # of labels over all micro-batches of a step, and would not divide them itself.
    accepts_loss_kwargs = False
    # One checkpoint starts every class: the head of another task is left aside without a warning. A head that this
    # class has and the checkpoint lacks is reported all the same.
    _keys_to_ignore_on_load_unexpected = [r"^reconstruction_head\.", r"^classifier\.", r"^decoder\."]

    def post_init(self) -> None:
        """What every class does when its parts are there: thresholds of labels that are gone go, weights are drawn."""
        self.config.settle_labels()
        super().post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the library guesses it from the text of this file, in which it misses `get_interface`

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # linear, convolution and norm layers
        if isinstance(module, SpcxrEmbeddings):  # its bare parameters belong to no layer
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        if isinstance(module, SpcxrHeadLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        if isinstance(module, SpcxrReconstructionLayer):
            # No residual and no norm carries the signal through these layers: at initializer_range each would shrink it
            # five times, and the head would learn nothing but the mean of a patch for a long time (arXiv 1502.01852).
            init.normal_(module.weight, std=(2 / module.weight.shape[1]) ** 0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args, **kwargs):
        """Load a checkpoint, from safetensors alone: a pickle can run code.

        Raises:
            ValueError: `use_safetensors=False`, or weights lie outside the folder or in another format.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(f"{pretrained_model_name_or_path}: only safetensors are loaded; a pickle can run code")
        if pretrained_model_name_or_path is not None:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if folder.is_dir():
                check_weight_files(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **{**kwargs, "use_safetensors": True})

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """The library's own, from where it knows which files to read (of a Hub id, it does so only here)."""
        for file in checkpoint_files or []:
            below = str(file).replace(os.sep, "/").partition("/snapshots/")[2].split("/")
            if not str(file).endswith(".safetensors") or ".." in below:
                raise ValueError(f"{file}: weights are read from safetensors files in their own folder alone")
        check_stored_weights(model, checkpoint_files or [], load_config.hf_quantizer is not None)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save weights, configuration and code, so that the folder can be loaded with `trust_remote_code=True`."""
        # What came from the Hub names its code "user/repository--file.Class"; from here on it is the code saved beside.
        self.config.auto_map = dict(AUTO_MAP)
        self.config.settle_labels()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _requested(self, name: str, value: bool | None) -> bool:
        """A per-call flag, or else the configuration's (`output_hidden_states`, `output_attentions`)."""
        return bool(getattr(self.config, name, False) if value is None else value)


class SpcxrModel(SpcxrPreTrainedModel):
    """The encoder: grey radiographs in, CLS, patch tokens and one pooled embedding per image out."""

    def __init__(self, config: SpcxrConfig):
        super().__init__(config)
        self.embeddings = SpcxrEmbeddings(config)
        self.encoder = SpcxrEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    # trf-ignore: TRF045 (written out, so that they are seen; and a request for attentions switches to eager)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SpcxrModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), normalised by the image processor; H and W multiples of `patch_size`.
            output_hidden_states: Whether to return every block's output.
            output_attentions: Whether to return every block's attention weights; computed eagerly then.

        Raises:
            ValueError: `pixel_values` is empty or not (B, C, H, W), the number of channels is not `num_channels`, or H
                or W is not a multiple of `patch_size`.
        """
        output_attentions = self._requested("output_attentions", output_attentions)
        hidden_states, attentions = self.encoder(self.embeddings(pixel_values), output_attentions)
        last_hidden_state = self.layernorm(hidden_states[-1])
        # CODEPATH: "mean" in whatever GMML alone has trained; "cls" where fine-tuning has given CLS a meaning.
        by_mean = self.config.pooling == "mean"
        return SpcxrModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state[:, 1:].mean(dim=1) if by_mean else last_hidden_state[:, 0],
            hidden_states=hidden_states if self._requested("output_hidden_states", output_hidden_states) else None,
            attentions=attentions if output_attentions else None,
        )


class SpcxrHeadLinear(nn.Module):
    """A linear layer of a head.

    No subclass of `nn.Linear`: tools that quantise or adapt all linear layers of a model leave a head as it is.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        layer = nn.Linear(in_features, out_features)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(features, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


class SpcxrReconstructionLayer(SpcxrHeadLinear):
    """A layer of the reconstruction head, for `_init_weights`: it sees modules that own parameters themselves."""


class SpcxrReconstructionHead(nn.Module):
    """(B, N, D) tokens -> (B, C, H, W) pixels: (Linear + activation) layers, then one transposed convolution."""

    def __init__(self, config: SpcxrConfig):
        super().__init__()
        width = config.hidden_size
        self.layers = nn.ModuleList(SpcxrReconstructionLayer(width, width) for _ in range(config.reconstruction_depth))
        self.activation = ACT2FN[config.hidden_act]
        self.projection = nn.ConvTranspose2d(
            width, config.num_channels, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, patch_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        for layer in self.layers:
            patch_tokens = self.activation(layer(patch_tokens))
        # Contiguous: for a transposed view torch.compile expects other strides of the gradient than cuDNN gives.
        return self.projection(patch_tokens.transpose(1, 2).contiguous().unflatten(2, grid))


class SpcxrForPreTraining(SpcxrPreTrainedModel):
    """Group-masked pretraining (GMML, arXiv 2205.14986): reconstruct a radiograph from its corrupted version.

    Also serves as `AutoModelForMaskedImageModeling`.
    """

    def __init__(self, config: SpcxrConfig):
        super().__init__(config)
        self.spcxr = SpcxrModel(config)
        self.reconstruction_head = SpcxrReconstructionHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.reconstruction_head.projection

    # trf-ignore: TRF045 (written out, so that they are seen; and a request for attentions switches to eager)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> MaskedImageModelingOutput:
        """Reconstruct images.

        Two ways of use. With `labels`, `pixel_values` is already corrupted (`GroupMasking` does it) and
        `bool_masked_pos` says where. Without `labels`, `pixel_values` is clean, the patches in `bool_masked_pos` are
        filled with zeros (mid-grey) here, and the loss compares with `pixel_values`: the convention of the masked image
        modelling scripts of transformers.

        Args:
            pixel_values: (B, C, H, W).
            bool_masked_pos: what was corrupted: pixels (B, H, W) or (B, 1, H, W), or whole patches (B, N). Boolean.
            labels: (B, C, H, W), the clean image, normalised like `pixel_values`.

        Returns:
            `loss`: the L1 distance averaged over the corrupted pixels alone (over all, if nothing says which), where
            `labels` or `bool_masked_pos` is given. `reconstruction`: (B, C, H, W), on the scale of `pixel_values`.

        Raises:
            ValueError: `bool_masked_pos` or `labels` has another shape.
        """
        output_hidden_states = self._requested("output_hidden_states", output_hidden_states)
        mask = None if bool_masked_pos is None else self._pixel_mask(bool_masked_pos, pixel_values)
        if labels is None and mask is not None:
            labels, pixel_values = pixel_values, pixel_values.masked_fill(mask, 0.0)

        outputs = self.spcxr(
            pixel_values,
            output_hidden_states=True,
            output_attentions=self._requested("output_attentions", output_attentions),
            return_dict=True,
        )
        blocks = [outputs.hidden_states[layer] for layer in self.config.reconstruction_layers]
        tokens = self.spcxr.layernorm(torch.stack(blocks).mean(dim=0))[:, 1:]
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        reconstruction = self.reconstruction_head(tokens, grid)

        return MaskedImageModelingOutput(
            loss=None if labels is None else self._reconstruction_loss(reconstruction, labels, mask),
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )

    def _pixel_mask(self, mask: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, N) patches or (B, [1,] H, W) pixels -> (B, 1, H, W) booleans."""
        batch, _, height, width = pixel_values.shape
        patch = self.config.patch_size
        mask = mask.to(torch.bool)
        if mask.shape == (batch, (height // patch) * (width // patch)):
            mask = mask.reshape(batch, 1, height // patch, width // patch)
            return mask.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
        if mask.shape in ((batch, height, width), (batch, 1, height, width)):
            return mask.reshape(batch, 1, height, width)
        raise ValueError(
            f"bool_masked_pos has shape {tuple(mask.shape)}; expected ({batch}, {height}, {width}) for pixels "
            f"or ({batch}, {(height // patch) * (width // patch)}) for patches"
        )

    @staticmethod
    def _reconstruction_loss(
        reconstruction: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if labels.shape != reconstruction.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(reconstruction.shape)}")
        error = (reconstruction.float() - labels.float()).abs()
        if mask is None:
            return error.mean()
        count = mask.sum() * error.shape[1]
        # where, not a product: values at uncorrupted pixels, infinite or NaN, must not change the loss.
        return torch.where(mask, error, 0.0).sum() / count.clamp(min=1)


class SpcxrForImageClassification(SpcxrPreTrainedModel):
    """A linear classifier over the pooled embedding."""

    def __init__(self, config: SpcxrConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.spcxr = SpcxrModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, which quantisation and adapters of all linear layers leave alone."""
        return self.classifier

    @staticmethod
    def training_distance(embeddings: torch.Tensor, statistics: dict[str, torch.Tensor]) -> torch.Tensor:
        """Squared Mahalanobis distance to the nearest class mean of the training images (arXiv 1807.03888), (B,).

        Args:
            embeddings: (B, D), the pooled embeddings of `self.spcxr`.
            statistics: Of the checkpoint's `feature_statistics.safetensors`: `means` (classes, D), `precision` (D, D).
        """
        offsets = embeddings.double().cpu().unsqueeze(1) - statistics["means"].double()  # (B, classes, D)
        return ((offsets @ statistics["precision"].double()) * offsets).sum(dim=-1).amin(dim=-1)

    @classmethod
    def unlike_training(cls, embeddings: torch.Tensor, statistics: dict[str, torch.Tensor]) -> torch.Tensor:
        """How unlike the training images: the share of the validation images that lie nearer to them, (B,) in 0 .. 1.

        Args:
            embeddings: As of `training_distance`.
            statistics: As of `training_distance`, and `distances` (n), those of the validation images, ascending.
        """
        distances = statistics["distances"].double()
        return torch.searchsorted(distances, cls.training_distance(embeddings, statistics)) / len(distances)

    # trf-ignore: TRF045 (written out, so that they are seen; and a request for attentions switches to eager)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W).
            labels: (B,) class indices for `problem_type="single_label_classification"`; (B, num_labels) in [0, 1] for
                "multi_label_classification"; (B,) or (B, num_labels) values for "regression". A missing label is NaN in
                the last two and -100 in the first, and takes no part in the loss: missing is not negative. Where
                `config.problem_type` is unset it follows from `num_labels` and the labels' dtype (one label:
                regression, floating point: multi-label) and is set to that.

        Returns:
            `loss` where `labels` is given (0 if every label is missing), `logits` (B, num_labels).

        Raises:
            ValueError: `labels` does not fit the logits' shape, or a label is out of range; or `pixel_values` is not
                (B, C, H, W), or empty.
        """
        outputs = self.spcxr(
            pixel_values,
            output_hidden_states=self._requested("output_hidden_states", output_hidden_states),
            output_attentions=self._requested("output_attentions", output_attentions),
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutput(
            loss=None if labels is None else self._classification_loss(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        problem_type = self.config.problem_type or self._infer_problem_type(labels)
        if self.config.problem_type is None and not torch.compiler.is_compiling():
            # As the library's heads do. What the head is trained as is saved with it: its logits are read by that.
            self.config.problem_type = problem_type
        if problem_type == "single_label_classification":
            _check_class_indices(labels, (len(logits),), self.num_labels, ignored=-100)
            loss = nn.functional.cross_entropy(logits, labels.long(), ignore_index=-100, reduction="sum")
            return loss / (labels != -100).sum().clamp(min=1)
        if problem_type == "regression" and labels.dim() == 1:
            labels = labels.unsqueeze(-1)
        targets, known = _known_targets(labels, logits, problem_type)
        if problem_type == "multi_label_classification":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        else:
            if not torch.compiler.is_compiling() and not targets.isfinite().all():
                raise ValueError("labels must be finite, a missing one being NaN")
            loss = nn.functional.mse_loss(logits, targets, reduction="none")
        return torch.where(known, loss, 0.0).sum() / known.sum().clamp(min=1)

    def _infer_problem_type(self, labels: torch.Tensor) -> str:
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _check_class_indices(labels: torch.Tensor, shape: tuple[int, ...], num_labels: int, ignored: int) -> None:
    """Raises ValueError unless `labels` holds class indices, or `ignored`, in this shape."""
    if labels.shape != shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected {tuple(shape)}, the indices of classes")
    if labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers, the indices of the classes; got {labels.dtype}")
    if torch.compiler.is_compiling():
        return
    wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= num_labels))]
    if len(wrong):
        raise ValueError(
            f"labels must lie in 0 .. {num_labels - 1}, or be {ignored} where missing; got {wrong[0].item()}"
        )


def _known_targets(labels: torch.Tensor, logits: torch.Tensor, problem_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of the logits' shape with 0 for NaN, and where they are known. ValueError where they do not fit."""
    if labels.shape != logits.shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; {problem_type} expects {tuple(logits.shape)}")
    known = ~labels.isnan() if labels.is_floating_point() else torch.ones_like(labels, dtype=torch.bool)
    targets = torch.where(known, labels, 0).to(logits.dtype)
    if problem_type == "multi_label_classification" and not torch.compiler.is_compiling():
        wrong = targets[(targets < 0) | (targets > 1)]
        if len(wrong):
            raise ValueError(f"labels must lie in [0, 1], a missing one being NaN; got {wrong[0].item():g}")
    return targets, known


class SpcxrSegmentationDecoder(nn.Module):
    """Several blocks' tokens -> (B, num_labels, s H / patch, s W / patch) logits, s = 2 ** `segmentation_doublings`.

    Each block's tokens are projected to the decoder's width and summed (as in a feature pyramid), then doubled in size
    by transposed convolutions, each followed by a 3 x 3 convolution. GroupNorm, so that an image's mask does not
    depend on its batch.
    """

    def __init__(self, config: SpcxrConfig):
        super().__init__()
        width = config.segmentation_hidden_size
        self.projections = nn.ModuleList(SpcxrHeadLinear(config.hidden_size, width) for _ in config.segmentation_layers)
        widths = [width // 2**doubling for doubling in range(config.segmentation_doublings + 1)]
        layers = [layer for pair in itertools.pairwise(widths) for layer in self._doubling(*pair)]
        self.upsampling = nn.ModuleList(layers)
        self.classifier = nn.Conv2d(widths[-1], config.num_labels, kernel_size=1)

    @staticmethod
    def _doubling(width_in: int, width_out: int) -> list[nn.Module]:
        return [
            nn.ConvTranspose2d(width_in, width_out, kernel_size=2, stride=2),
            nn.GroupNorm(8, width_out),
            nn.GELU(),
            nn.Conv2d(width_out, width_out, kernel_size=3, padding=1),
            nn.GroupNorm(8, width_out),
            nn.GELU(),
        ]

    def forward(self, blocks: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        tokens = sum(projection(block) for projection, block in zip(self.projections, blocks, strict=True))
        features = tokens.transpose(1, 2).unflatten(2, grid)  # (B, width, H / patch, W / patch)
        for layer in self.upsampling:
            features = layer(features)
        return self.classifier(features)


class SpcxrForSemanticSegmentation(SpcxrPreTrainedModel):
    """A light decoder over several blocks; the logits have the input's resolution."""

    def __init__(self, config: SpcxrConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.spcxr = SpcxrModel(config)
        self.decoder = SpcxrSegmentationDecoder(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.classifier

    # trf-ignore: TRF045 (written out, so that they are seen; and a request for attentions switches to eager)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput:
        """Segment images.

        Args:
            pixel_values: (B, C, H, W).
            labels: (B, H, W) class indices; `config.semantic_loss_ignore_index` marks pixels to leave out. With
                `config.problem_type` "multi_label_classification", labels that may overlap: (B, num_labels, H, W) in
                [0, 1]; NaN marks what to leave out.

        Returns:
            `loss` where `labels` is given: cross-entropy (of a softmax, or of a sigmoid for each label) plus soft Dice
            loss (arXiv 1606.04797), equally weighted.
            `logits`: (B, num_labels, H, W), the input's resolution, in float32.

        Raises:
            ValueError: `labels` has another shape, or holds what is neither a class nor ignored.
        """
        output_hidden_states = self._requested("output_hidden_states", output_hidden_states)
        outputs = self.spcxr(
            pixel_values,
            output_hidden_states=True,
            output_attentions=self._requested("output_attentions", output_attentions),
            return_dict=True,
        )
        layers = self.config.segmentation_layers
        blocks = [self.spcxr.layernorm(outputs.hidden_states[layer])[:, 1:] for layer in layers]
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        logits = self.decoder(blocks, grid)
        logits = nn.functional.interpolate(
            logits.float(), size=pixel_values.shape[-2:], mode="bilinear", align_corners=False
        )
        return SemanticSegmenterOutput(
            loss=None if labels is None else self._segmentation_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )

    def _segmentation_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type == "multi_label_classification":
            targets, known = _known_targets(labels, logits, self.config.problem_type)
            cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            probabilities = logits.sigmoid()
        else:
            ignored = self.config.semantic_loss_ignore_index
            _check_class_indices(labels, (logits.shape[0], *logits.shape[-2:]), self.num_labels, ignored)
            labels = labels.long()
            known = labels != ignored
            classes = torch.where(known, labels, 0)
            cross_entropy = nn.functional.cross_entropy(logits, classes, reduction="none")
            probabilities = logits.softmax(dim=1)
            targets = nn.functional.one_hot(classes, self.num_labels).movedim(-1, 1)
        cross_entropy = (cross_entropy * known).sum() / known.sum().clamp(min=1)
        if known.dim() == 3:
            known = known.unsqueeze(1)
        probabilities, targets = probabilities * known, targets * known
        overlap = (probabilities * targets).sum(dim=(0, 2, 3))
        size = (probabilities + targets).sum(dim=(0, 2, 3))
        dice = (2 * overlap + 1) / (size + 1)  # + 1: a class absent from the batch counts as found
        return cross_entropy + 1 - dice.mean()


class SpcxrBackbone(BackboneMixin, SpcxrPreTrainedModel):
    """Feature maps for the dense predictors of transformers (UperNet, Mask2Former, ...)."""

    def __init__(self, config: SpcxrConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = SpcxrEmbeddings(config)
        self.encoder = SpcxrEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    # trf-ignore: TRF045 (written out, so that they are seen; and a request for attentions switches to eager)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Encode images into one feature map per requested stage.

        Returns:
            `feature_maps`: a tuple of (B, D, H / patch_size, W / patch_size), one per name in `config.out_features`,
            normalised by the final LayerNorm if `config.apply_layernorm`.
        """
        output_attentions = self._requested("output_attentions", output_attentions)
        hidden_states, attentions = self.encoder(self.embeddings(pixel_values), output_attentions)
        grid = tuple(side // self.config.patch_size for side in pixel_values.shape[-2:])
        feature_maps = []
        for stage, tokens in zip(self.stage_names, hidden_states, strict=True):
            if stage in self.out_features:
                # CODEPATH: every checkpoint normalises; False is for predictors that apply a norm of their own.
                tokens = self.layernorm(tokens) if self.config.apply_layernorm else tokens
                feature_maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous())
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=hidden_states if self._requested("output_hidden_states", output_hidden_states) else None,
            attentions=attentions if output_attentions else None,
        )


__all__ = [
    "SpcxrBackbone",
    "SpcxrForImageClassification",
    "SpcxrForPreTraining",
    "SpcxrForSemanticSegmentation",
    "SpcxrModel",
    "SpcxrPreTrainedModel",
]
