"""Fully sharded data parallelism (FSDP): every process keeps its share of weights, gradients, moments and average.

By torch's own `fully_shard` (FSDP2, the per-parameter form of arXiv 2304.11277) on processes that accelerate starts as
plain data-parallel ones, not by accelerate's FSDP plugin: the plugin needs a GPU, while this also runs over gloo on a
CPU, where tests compare its losses with those of one process.

Checkpoints are those of any other run: they are written from, and read into, an ordinary model and its AdamW (`whole`),
whose tensors exist at these moments only. A run may continue with another number of processes, or without sharding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from spcxr_hf.errors import SpcxrError


class Shards:
    """A model and its optimiser, divided among all processes.

    Attributes:
        model: The sharded model: a process has all weights of a block only during the block's pass.
        optimizer: AdamW of this process's shares.
        whole: The given model. It has its weights between `fill` and `empty` only, on every process.
        is_filled: Whether `whole` has its weights.
    """

    def __init__(self, whole: PreTrainedModel, optimizer: torch.optim.AdamW, device: torch.device):
        """Shard `whole` and the moments of `optimizer`, whose groups hold its parameters, and empty both."""
        if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise SpcxrError(f"fsdp: torch {torch.__version__} shards on GPUs only; on a CPU it takes a newer one")
        self.whole, self._whole_optimizer, self._device = whole, optimizer, device
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        self.model: nn.Module = divide(_moved(copy.deepcopy(whole), device), mesh)
        self._shares = dict(self.model.named_parameters())
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in whole.named_parameters()}
        groups = [
            {**group, "params": [self._shares[names[parameter]] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        # Each group keeps its own rates and betas.
        self.optimizer = torch.optim.AdamW(groups, fused=optimizer.defaults["fused"])
        for parameter, state in optimizer.state.items():
            share = self._shares[names[parameter]]
            self.optimizer.state[share] = {
                key: value.to(device) if key == "step" else self._share_of(value, share) for key, value in state.items()
            }
        self.is_filled = True
        self.empty()
        _moved(whole, device)

    def _share_of(self, value: torch.Tensor, like: nn.Parameter) -> DTensor:
        assert isinstance(like, DTensor)
        return distribute_tensor(value.to(self._device), like.device_mesh, like.placements)

    def divide(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by parameter name, each of its parameter's shape, divided as the parameters are."""
        return {name: self._share_of(value, self._shares[name]) for name, value in values.items()}

    @torch.no_grad()
    def fill(self) -> None:
        """Give `whole` the weights, on every process; all processes must call it."""
        if self.is_filled:
            return
        for name, parameter in self.whole.named_parameters():
            parameter.data = whole_tensor(self._shares[name])
        buffers = dict(self.model.named_buffers())
        for name, buffer in self.whole.named_buffers():
            buffer.copy_(buffers[name])
        self.is_filled = True

    def empty(self) -> None:
        """Free the memory of the weights and moments of `whole` and its optimiser."""
        if not self.is_filled:
            return
        for parameter in self.whole.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)
        self._whole_optimizer.state.clear()
        self.is_filled = False

    @torch.no_grad()
    def gather_optimizer(self, keep: bool) -> torch.optim.AdamW:
        """The optimiser of `whole` with all moments, on the CPU, where `keep`; all processes must call it."""
        for name, parameter in self.whole.named_parameters():
            for key, value in self.optimizer.state.get(self._shares[name], {}).items():
                gathered = whole_tensor(value)
                if keep:
                    self._whole_optimizer.state[parameter][key] = gathered.cpu()
        return self._whole_optimizer


def divide(model: PreTrainedModel, mesh: DeviceMesh) -> nn.Module:
    """Shard the blocks of a model, then its other parameters, over all processes of a mesh.

    The blocks are the members of module lists whose class is in the model's `_no_split_modules`. Weights stay float32
    under autocast, so that the losses are those of data parallelism in any precision.
    """
    for tensor in [*model.parameters(), *model.buffers()]:  # all start from the first process's model, as in DDP
        distributed.broadcast(tensor.data, 0)
    # gloo cannot average. Where gradients are reduced in float64, FSDP does the division.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64 if mesh.device_type == "cpu" else None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    for block in (block for blocks in lists for block in blocks if type(block).__name__ in unsplit):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    nn.Module.to(model, device)
    return model


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which this process has a share (a collective call), or the tensor itself."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_share(value: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor, in the same memory; call it where gradients are off."""
    return value.to_local() if isinstance(value, DTensor) else value
