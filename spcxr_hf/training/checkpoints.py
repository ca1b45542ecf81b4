"""Atomic, checksummed checkpoints of a training run.

A checkpoint is a folder `checkpoint-<step>` that `from_pretrained` loads, with the optimiser's state (and the averaged
weights, if the run keeps an average) beside the weights, all in safetensors, and the SHA-256 of each file. It is
written under another name and renamed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_folder, sha256
from spcxr_hf.training.optim import named_trainable

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "training_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
CHECKSUM_FILE = "checksums.json"


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int = 2,
    average: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write `folder/checkpoint-<step>`, atomically, then delete all but the newest `keep`.

    Args:
        state: What else a resumed run needs, as JSON; `step` is added.
        average: Averaged weights by parameter name.

    Raises:
        SpcxrError: the disk is full or not writable; earlier checkpoints stay as they are.
    """
    target = folder / f"checkpoint-{step}"
    with atomic_folder(target) as partial:
        model.save_pretrained(partial)
        if not (partial / WEIGHTS_FILE).is_file():
            raise OSError("the model wrote no weights; is another process writing to the same folder?")
        save_file(_optimizer_tensors(model, optimizer), partial / OPTIMIZER_FILE)
        if average is not None:
            save_file({name: value.cpu().contiguous() for name, value in average.items()}, partial / AVERAGE_FILE)
        (partial / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        sums = {file.name: sha256(file) for file in sorted(partial.iterdir())}
        (partial / CHECKSUM_FILE).write_text(json.dumps(sums, indent=2), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        if old != target:  # a damaged one that a run went back from has a higher number
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


def resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict, dict[str, torch.Tensor] | None] | None:
    """Load the newest intact checkpoint of a folder into model and optimiser; None if the folder has no checkpoints.

    A damaged one is named on the console and the one before it is used.

    Returns:
        The state, and the averaged weights if the run keeps them.

    Raises:
        SpcxrError: all checkpoints are damaged, or an intact one is of another model: a new run must not overwrite
            them.
    """
    checkpoints = list_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        try:
            sums = json.loads((checkpoint / CHECKSUM_FILE).read_text(encoding="utf-8"))
            if missing := {WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE} - set(sums):
                raise ValueError(f"{CHECKSUM_FILE} lacks {', '.join(sorted(missing))}")
            for name, expected in sums.items():
                if sha256(checkpoint / name) != expected:
                    raise ValueError(f"{name} is not what was written")
            state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            weights = load_file(checkpoint / WEIGHTS_FILE)
            moments = load_file(checkpoint / OPTIMIZER_FILE)
            average = load_file(checkpoint / AVERAGE_FILE) if AVERAGE_FILE in sums else None
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
            print(f"{checkpoint}: damaged checkpoint ({error}); trying the one before it", flush=True)
            continue
        try:
            model.load_state_dict(weights)
            _restore_optimizer(model, optimizer, moments)
        except (RuntimeError, KeyError) as error:
            raise SpcxrError(f"{checkpoint}: holds another model than this run's ({error})") from error
        return state, average
    if checkpoints:
        raise SpcxrError(f"{folder}: all of its checkpoints are damaged; remove it, or train into another folder")
    return None


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts by parameter name, since safetensors holds named tensors and nothing else."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in named_trainable(model)
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in named_trainable(model):
        if f"{name}/step" not in tensors:  # it has had no gradient yet
            continue
        # Copies: the loaded tensors are mapped from the file and would change with it.
        moments = {key: tensors[f"{name}/{key}"].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
        on_device = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}
        if optimizer.defaults.get("fused"):  # the fused AdamW counts its steps on the device
            on_device["step"] = moments["step"].to(parameter.device)
        optimizer.state[parameter] = on_device
