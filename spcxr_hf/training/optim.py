"""Optimisation: model presets, schedules, parameter groups, and the log of a run."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from spcxr_hf.drawing import save_curves
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_file, os_errors
from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig


def new_config(size: str, **overrides: Any) -> SpcxrConfig:
    """The preset of that name with other values."""
    try:
        return SpcxrConfig.from_size(cast(Any, size), **overrides)
    except (StrictDataclassError, ValueError) as error:
        raise SpcxrError(str(error.__cause__ or error)) from error


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from 0 to `peak`, which is held, then a cosine down (or up) to `final` at `total_steps`.

    `decay_steps` is the length of the cosine; None, all of the steps after the warm-up. A run of unknown length holds
    its peak and decays over the last steps only, so that it can be made longer from any checkpoint before the decay.
    """

    peak: float
    final: float
    warmup_steps: int
    total_steps: int
    decay_steps: int | None = None

    def __call__(self, step: int) -> float:
        """The value for the optimiser step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        longest = max(1, self.total_steps - self.warmup_steps)
        decay_steps = longest if self.decay_steps is None else min(self.decay_steps, longest)
        progress = 1 - (self.total_steps - step) / decay_steps if decay_steps else 0.0
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups for AdamW: weights, which decay, and biases, norms, CLS and positions, which do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named_trainable(model):
        (decayed if _decays(name, parameter) else plain).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]


def layerwise_groups(
    model: PreTrainedModel,
    layer_decay: float,
    rename: Callable[[str], str] | None = None,
    head_scale: float = 1.0,
) -> list[dict]:
    """The groups of `parameter_groups`, split by depth: a block's learning rate is `layer_decay` times that of the one
    above.

    Layer-wise learning-rate decay as BEiT (arXiv 2106.08254) fine-tunes with it. The final norm and the head have the
    scale 1, block i of L has `layer_decay ** (L - i)` for i = 0 .. L - 1, the embeddings `layer_decay ** (L + 1)`:
    each group's "scale", which `set_schedule` multiplies the learning rate by.

    `rename` maps a parameter's name of another family to its name here, `encoder.layers.<n>.` for blocks. `head_scale`
    is the head's scale in the place of 1: a large head that is new learns faster than the encoder.
    """
    if not 0 < layer_decay <= 1:
        raise SpcxrError(f"layer_decay must lie in (0, 1]; got {layer_decay}")
    depth = model.config.num_hidden_layers
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in named_trainable(model):
        own_name = name if rename is None else rename(name)
        if block := re.search(r"(?:^|\.)encoder\.layers\.(\d+)\.", own_name):
            below_head = depth - int(block[1])
        else:
            below_head = depth + 1 if re.search(r"(?:^|\.)embeddings\.", own_name) else 0
        decays, scale = _decays(name, parameter), layer_decay**below_head
        if not name.startswith(f"{model.base_model_prefix}."):
            scale *= head_scale
        group = {"params": [], "decays": decays, "scale": scale}
        if not decays:
            group["weight_decay"] = 0.0
        groups.setdefault((scale, decays), group)["params"].append(parameter)
    return list(groups.values())


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and not name.endswith(("cls_token", "position_embeddings"))


def set_schedule(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Give every group the step's learning rate, times the group's "scale", and the decayed ones the weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)
        if group["decays"]:
            group["weight_decay"] = weight_decay


class StepLog:
    """A CSV file with a row per logged step, and curves of its columns. On resume, later rows are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows: list[dict] = []
        if path.is_file() and step:
            with path.open(newline="", encoding="utf-8") as stream:
                self.rows = [row for row in csv.DictReader(stream) if int(row["step"]) <= step]

    def add(self, **row) -> None:
        """Add a row; the first one, `step` among it, names the columns."""
        self.rows.append(row)
        with atomic_file(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self, path: Path, curves: Mapping[str, str], y_label: str = "loss") -> None:
        """Write a PNG of columns over the steps; `curves` maps what a curve is called to its column."""
        points = {
            label: [(int(row["step"]), float(row[column])) for row in self.rows if row[column] not in ("", None)]
            for label, column in curves.items()
        }
        with os_errors(path):
            save_curves(points, path, "step", y_label)


def named_trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters that learn, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
