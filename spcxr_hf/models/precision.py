"""bfloat16 where the hardware multiplies in it.

A CPU that does not (x86 without AVX-512, Arm without BF16) runs bfloat16 all the same, many times as slowly as float32:
`training_scripts/benchmarks/speed.py --precision fp32 bf16` shows by how much.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


def bf16_autocast(device: torch.device | str, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16; on a CPU that has no fast matrix product in it, float32 as it is, and a warning, once.

    Args:
        device: Where the model runs.
        enabled: Whether bfloat16 is asked for.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=enabled and has_fast_bf16(kind))


@cache
def has_fast_bf16(kind: str) -> bool:
    """Whether a kind of device ("cpu", "cuda", ...) computes in bfloat16 at least as fast as in float32.

    Non-CPU devices are assumed to support it.
    """
    if kind != "cpu" or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True
    logger.warning("this CPU has no fast bfloat16: computing in float32, which is faster here")
    return False
