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

"""Configuration of the SPCXR vision transformer."""

import math
from typing import Any, Literal

from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig, strict
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The three sizes of the family. Their widths, depths and heads are those of DeiT (arXiv 2012.12877, Table 1), which the
# GMML literature keeps; SPCXR (arXiv 2211.12944) uses "small".
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}

# A checkpoint of any task names every class, so that each Auto class loads it by remote code: on save, transformers
# adds only the class that is being saved.
AUTO_MAP: dict[str, str] = {
    "AutoConfig": "configuration_spcxr.SpcxrConfig",
    "AutoModel": "modeling_spcxr.SpcxrModel",
    "AutoModelForPreTraining": "modeling_spcxr.SpcxrForPreTraining",
    "AutoModelForMaskedImageModeling": "modeling_spcxr.SpcxrForPreTraining",
    "AutoModelForImageClassification": "modeling_spcxr.SpcxrForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_spcxr.SpcxrForSemanticSegmentation",
    "AutoBackbone": "modeling_spcxr.SpcxrBackbone",
}

# Sizes that are at least 1.
POSITIVE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "segmentation_hidden_size",
)
# A damaged or hostile configuration is refused before memory is taken for its model.
MAX_LAYERS = 1_000
MAX_LABELS = 100_000
MAX_PARAMETERS = 5_000_000_000
# Fields that define the label space, and fields that are valid for one label space only.
LABEL_SPACE = ("num_labels", "id2label", "label2id")
OF_A_HEAD = ("operating_points", "operating_point", "intended_use")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@strict
class SpcxrConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of [`SpcxrModel`] and its heads; the defaults are ViT-S/16 at 224 px on one grey channel.

    Args:
        hidden_size (`int`, defaults to 384): Width of the tokens; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 6): Attention heads per block.
        intermediate_size (`int`, defaults to 1536): Width of the MLP inside a block.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP and of the reconstruction head.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after the embeddings, the attention and the MLP.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout on the attention weights.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth of the last block, in [0, 1); it rises linearly from
            0 in the first block (arXiv 1603.09382). Active in training only.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every LayerNorm.
        image_size (`int`, defaults to 224): Native side of the (square) image in pixels, a multiple of `patch_size`.
            Images of other sizes, square or not, are taken too: the position embeddings are interpolated.
        patch_size (`int`, defaults to 16): Side of a patch in pixels.
        num_channels (`int`, defaults to 1): 1 (grey) or 3.
        qkv_bias (`bool`, defaults to `True`): Whether queries, keys and values have a bias.
        pooling (`"mean"` or `"cls"`, defaults to `"mean"`): What `pooler_output` is: the mean of the patch tokens, or
            the CLS token. The GMML loss never touches CLS, hence "mean".
        reconstruction_layers (`list[int]`, *optional*): Blocks, counted from 1, from whose mean output the image is
            reconstructed. By default four, evenly spread over the second half of the network: 6, 8, 10, 12 of 12.
        reconstruction_depth (`int`, defaults to 3): Number of (Linear + activation) layers of the reconstruction head.
        segmentation_layers (`list[int]`, *optional*): Blocks, counted from 1, that the segmentation decoder reads.
            By default four of them, evenly spread over the network: 3, 6, 9, 12 of 12.
        segmentation_hidden_size (`int`, defaults to 128): Width of the segmentation decoder, a multiple of
            `8 * 2 ** segmentation_doublings`.
        segmentation_doublings (`int`, defaults to 2): How often the decoder doubles the grid of patches, 1 to 4; each
            halves its width.
        semantic_loss_ignore_index (`int`, defaults to 255): Pixels with this label are left out of the loss.
        apply_layernorm (`bool`, defaults to `True`): Whether [`SpcxrBackbone`] normalises its feature maps.
        operating_points (`dict[str, dict[str, float]]`, *optional*): Decision thresholds of a classifier, in [0, 1], by
            target and name, as `{"pneumonia": {"youden": 0.41, "sensitivity 0.90": 0.2}}`. A target is a label, or
            labels of one softmax joined by `" + "`, whose probabilities are added. A probability at or above the
            threshold is positive. Loading with other labels (`num_labels`, `id2label`) drops them.
        operating_point (`str`, *optional*): The name that is used by default; every target has it.
        intended_use (`dict[str, Any]`, *optional*): The images that a head was made for: `"population"` (a few words),
            `"ages"` (`[youngest, oldest]` in years, both included; `None` leaves an end open) and `"views"` (values of
            DICOM's View Position, as `["PA", "AP"]`), each of them optional. Loading with other labels drops it.
        out_features, out_indices: Which blocks [`SpcxrBackbone`] returns: `"stem"`, `"stage1"`, ... or their indices.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: a value of the wrong type or out of range; the message names the
            field, and the cause is a `TypeError` or `ValueError`.
        ValueError: `out_features` or `out_indices` names no block.

    Example:

    ```python
    >>> from spcxr_hf import SpcxrConfig, SpcxrModel

    >>> model = SpcxrModel(SpcxrConfig.from_size("small", image_size=112))
    >>> model.config.hidden_size
    384
    ```"""

    model_type = "spcxr"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 1
    qkv_bias: bool = True
    pooling: Literal["mean", "cls"] = "mean"
    reconstruction_layers: list[int] | None = None
    reconstruction_depth: int = 3
    segmentation_layers: list[int] | None = None
    segmentation_hidden_size: int = 128
    segmentation_doublings: int = 2
    semantic_loss_ignore_index: int = 255
    apply_layernorm: bool = True
    operating_points: dict[str, dict[str, float]] | None = None
    operating_point: str | None = None
    intended_use: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        depth = self.num_hidden_layers
        labels = kwargs.get("num_labels")
        if (isinstance(depth, int) and depth > MAX_LAYERS) or (isinstance(labels, int) and labels > MAX_LABELS):
            raise ValueError(
                f"num_hidden_layers may be at most {MAX_LAYERS} and num_labels {MAX_LABELS}; got {depth} and {labels}"
            )
        if self.id2label is not None:
            self.id2label = _by_number(self.id2label)
        if self.reconstruction_layers is None:
            self.reconstruction_layers = _spread_layers(first=depth / 2, last=depth)
        if self.segmentation_layers is None:
            self.segmentation_layers = _spread_layers(first=depth / 4, last=depth)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, depth + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, size: Literal["tiny", "small", "base"], **overrides: Any) -> "SpcxrConfig":
        """The preset of that name: "tiny" (192 wide, 5.4 M parameters), "small" (384, 21.5 M) or "base" (768, 85.4 M).

        Raises:
            ValueError: `size` is none of the three.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
        return cls(**{**SIZES[size], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`; where the labels change, thresholds of the old head are dropped."""
        if kwargs.get("id2label") is not None:
            kwargs["id2label"] = _by_number(kwargs["id2label"])
        if any(kwargs.get(name) is not None for name in LABEL_SPACE):
            config_dict = {name: value for name, value in config_dict.items() if name not in OF_A_HEAD}
        return super().from_dict(config_dict, **kwargs)

    def settle_labels(self) -> None:
        """What was set by hand: keys of `id2label` become numbers, as JSON has them as text, and thresholds that name a
        label which is no longer there (`config.num_labels = 2`) are dropped with a warning.
        """
        if self.id2label is not None:
            self.id2label = _by_number(self.id2label)
        try:
            for target in self.operating_points or {}:
                self._validate_target(target)
        except ValueError as error:
            logger.warning(f"{error}; thresholds belong to a head, and are dropped with its labels")
            self.operating_points = self.operating_point = None

    @property
    def num_patches(self) -> int:
        """Number of patch tokens at the native image size."""
        return (self.image_size // self.patch_size) ** 2

    # Methods named validate_* are run by @strict after the fields' types have been checked.

    def validate_geometry(self) -> None:
        for name in POSITIVE:  # first: the rest divides by them
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.reconstruction_depth < 0:
            raise ValueError(f"reconstruction_depth must be at least 0; got {self.reconstruction_depth}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 (grey) or 3; got {self.num_channels}")
        if not 1 <= self.segmentation_doublings <= 4:
            raise ValueError(f"segmentation_doublings must be 1 to 4; got {self.segmentation_doublings}")
        if self.segmentation_hidden_size % (multiple := 8 * 2**self.segmentation_doublings):
            raise ValueError(
                f"segmentation_hidden_size must be a multiple of {multiple}; got {self.segmentation_hidden_size}"
            )
        width, decoder = self.hidden_size, self.segmentation_hidden_size
        block = 4 * width**2 + 2 * width * self.intermediate_size
        heads = self.reconstruction_depth * width**2 + 4 * width * decoder + 4 * decoder**2
        pixels = 2 * width * self.num_channels * self.patch_size**2
        count = self.num_hidden_layers * block + heads + pixels + self.num_patches * width
        if count > MAX_PARAMETERS:
            raise ValueError(f"a model of these sizes has {count:.2g} parameters; it may have {MAX_PARAMETERS:.2g}")

    def validate_rates(self) -> None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite; got {getattr(self, name)}")

    def validate_names(self) -> None:
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}; got {self.hidden_act!r}")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}; got {self.problem_type!r}")

    def validate_operating_points(self) -> None:
        points = self.operating_points or {}
        for target, thresholds in points.items():
            self._validate_target(target)
            if not thresholds:
                raise ValueError(f"operating_points has no threshold for {target!r}")
            for name, threshold in thresholds.items():
                if not 0 <= threshold <= 1:
                    raise ValueError(f"operating_points must lie in [0, 1]; got {threshold} for {target!r}, {name!r}")
        default = self.operating_point
        if default is not None and (not points or any(default not in thresholds for thresholds in points.values())):
            raise ValueError(
                f"operating_point must be a name that all targets of operating_points have; got {default!r}"
            )

    def validate_intended_use(self) -> None:
        use = self.intended_use or {}
        if unknown := sorted(set(use) - {"population", "ages", "views"}):
            raise ValueError(f"intended_use may have population, ages and views; got {unknown[0]!r}")
        if not isinstance(use.get("population", ""), str):
            raise ValueError(f"intended_use: population must be text; got {use['population']!r}")
        ages = use.get("ages", [None, None])
        ends = [end for end in ages if end is not None] if isinstance(ages, (list, tuple)) and len(ages) == 2 else [-1]
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) and 0 <= end <= 150 for end in ends)
        if not numbers or ends != sorted(ends):
            raise ValueError(f"intended_use: ages must be [youngest, oldest] in years, from 0 to 150; got {ages!r}")
        views = use.get("views", ["PA"])
        named = isinstance(views, (list, tuple)) and all(isinstance(view, str) and view for view in views)
        if not named or not views:
            raise ValueError(f"intended_use: views must be names such as PA and AP; got {views!r}")

    def _validate_target(self, target: str) -> None:
        labels = list((self.id2label or {}).values())
        parts = target.split(" + ")
        if target in labels:
            return
        if any(part not in labels for part in parts) or len(set(parts)) < len(parts):
            raise ValueError(
                f'operating_points must be of labels, or of different labels joined by " + "; got {target!r}, '
                f"and the labels are {', '.join(map(str, labels))}"
            )
        if self.problem_type == "multi_label_classification":
            raise ValueError(
                f"operating_points must be of single labels where they may hold together, since their probabilities do "
                f"not add up; got {target!r}"
            )

    def validate_layers(self) -> None:
        for name in ("reconstruction_layers", "segmentation_layers"):
            layers = getattr(self, name)
            rising = bool(layers) and layers == sorted(set(layers))
            if not (rising and layers[0] >= 1 and layers[-1] <= self.num_hidden_layers):
                raise ValueError(
                    f"{name} must be rising block numbers between 1 and num_hidden_layers ({self.num_hidden_layers}); "
                    f"got {layers}"
                )


def _by_number(id2label: dict[Any, str]) -> dict[int, str]:
    """The same with the numbers of the labels as keys."""
    try:
        return {int(number): label for number, label in id2label.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"id2label maps numbers to labels, as {{0: 'normal'}}; got {id2label}") from error


def _spread_layers(first: float, last: int, count: int = 4) -> list[int]:
    """Up to `count` distinct block numbers, evenly spread from `first` to `last`."""
    step = (last - first) / (count - 1)
    return sorted({max(1, round(first + index * step)) for index in range(count)})


__all__ = ["SpcxrConfig"]
