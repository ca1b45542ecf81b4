"""What the training scripts share: parameter groups, schedules, logs, and checkpoints that a killed run goes on from.

A checkpoint is a folder `checkpoint-<step>` that `from_pretrained` loads, with the optimiser's state beside the
weights, in safetensors. It is written under another name and renamed, so that a folder of that name is always whole.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .errors import SpcxrError
from .modeling.configuration_spcxr import SpcxrConfig
from .pictures import save_curves

STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"


def start_accelerator(mixed_precision: str) -> Accelerator:
    """The processes that this run consists of.

    Raises:
        SpcxrError: several processes were started and do not know of each other: each would train on all the data and
            write over the others' checkpoints.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise SpcxrError(
            f"{started} processes were started but each runs alone; "
            "on a CPU start them by `accelerate launch --cpu --num_processes N`, or set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def new_config(size: str, **overrides: Any) -> SpcxrConfig:
    """The preset of that name with other values.

    Raises:
        SpcxrError: the size or a value is refused; the message names it.
    """
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
    for name, parameter in _named_trainable(model):
        (decayed if _decays(name, parameter) else plain).append(parameter)
    return [{"params": decayed, "decays": True}, {"params": plain, "decays": False, "weight_decay": 0.0}]


def layerwise_groups(model: PreTrainedModel, layer_decay: float) -> list[dict]:
    """The groups of `parameter_groups`, split by depth: a block learns `layer_decay` times as fast as the one above.

    Layer-wise learning-rate decay as BEiT (arXiv 2106.08254) fine-tunes with it. The final norm and the head have the
    scale 1, block i of L has `layer_decay ** (L - i)` for i = 0 .. L - 1, the embeddings `layer_decay ** (L + 1)`.

    Args:
        model: A model of the family, with or without a head.
        layer_decay: In (0, 1]; 1 is one learning rate for all.

    Returns:
        Groups for AdamW, each with its "scale", which `set_schedule` multiplies the learning rate by.

    Raises:
        SpcxrError: `layer_decay` is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise SpcxrError(f"layer_decay must lie in (0, 1]; got {layer_decay}")
    depth = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in _named_trainable(model):
        below_head, decays = depth + 1 - _level(name, depth), _decays(name, parameter)
        group = {"params": [], "decays": decays, "scale": layer_decay**below_head}
        if not decays:
            group["weight_decay"] = 0.0
        groups.setdefault((below_head, decays), group)["params"].append(parameter)
    return list(groups.values())


def _level(name: str, depth: int) -> int:
    """0 for the embeddings, 1 .. depth for the blocks, depth + 1 for what lies over them."""
    block = re.search(r"(?:^|\.)encoder\.layers\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.search(r"(?:^|\.)embeddings\.", name) else depth + 1


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
        with self.path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self, path: Path, curves: Mapping[str, str], y_label: str = "loss") -> None:
        """Write a PNG of columns over the steps; `curves` maps what a curve is called to its column."""
        points = {
            label: [(int(row["step"]), float(row[column])) for row in self.rows if row[column] not in ("", None)]
            for label, column in curves.items()
        }
        save_curves(points, path, "step", y_label)


def save_checkpoint(
    folder: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict, keep: int = 2
) -> Path:
    """Write `folder/checkpoint-<step>` whole or not at all, then delete all but the newest `keep`.

    Args:
        state: What else the run needs to go on, as JSON; `step` is added.

    Raises:
        SpcxrError: the disk is full or not writable; the checkpoints before it stay as they are.
    """
    target = folder / f"checkpoint-{step}"
    partial = folder / f".checkpoint-{step}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        if not (partial / "model.safetensors").is_file():
            raise OSError("the model wrote no weights; is another process writing to the same folder?")
        save_file(_optimizer_tensors(model, optimizer), partial / OPTIMIZER_FILE)
        (partial / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SpcxrError(
            f"{target}: the checkpoint could not be written ({error}); earlier ones are untouched"
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered)]


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Give model and optimiser the state that `save_checkpoint` wrote, and return the rest of it.

    Raises:
        SpcxrError: a file is missing or damaged, or belongs to another model; the message names it.
    """
    return _restore(checkpoint, _read_checkpoint(checkpoint), model, optimizer)


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Load the newest checkpoint of a folder that is whole; None where there is none to go on from.

    A damaged one is named on the console and the one before it is used.

    Raises:
        SpcxrError: a whole one belongs to another model: another run's folder, not one to write over.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            contents = _read_checkpoint(checkpoint)
        except SpcxrError as error:
            print(f"{error}; trying the one before it", flush=True)
            continue
        return _restore(checkpoint, contents, model, optimizer)
    return None


def _read_checkpoint(checkpoint: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state, the weights and the optimiser's moments."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return state, load_file(checkpoint / "model.safetensors"), load_file(checkpoint / OPTIMIZER_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise SpcxrError(f"{checkpoint}: damaged checkpoint ({error})") from error


def _restore(
    checkpoint: Path,
    contents: tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict:
    state, weights, moments = contents
    try:
        model.load_state_dict(weights)
        _restore_optimizer(model, optimizer, moments)
    except (RuntimeError, KeyError) as error:
        raise SpcxrError(f"{checkpoint}: holds another model than this run's ({error})") from error
    return state


def _named_trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts by parameter name, since safetensors holds named tensors and nothing else."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in _named_trainable(model)
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in _named_trainable(model):
        # A copy: a tensor that is mapped from the file would change when the file does.
        moments = {key: tensors[f"{name}/{key}"].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
        on_device = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}
        if optimizer.defaults.get("fused"):  # the fused AdamW counts its steps on the device
            on_device["step"] = moments["step"].to(parameter.device)
        optimizer.state[parameter] = on_device
