"""Images of a micro-batch mixed with one another, and their targets likewise: mixup and CutMix."""

from __future__ import annotations

import math

import numpy as np
import torch


def mix(
    images: torch.Tensor, targets: torch.Tensor, mixup: float, cutmix: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899): every image with another of its micro-batch.

    Args:
        images: (B, C, S, S).
        targets: (B, classes); a label that either of two images lacks is missing (NaN) from both.
        mixup, cutmix: The alpha of each, 0 for none; with both, either has half of the micro-batches.
        seed: The draws follow from it.
    """
    drawn = np.random.default_rng(seed)
    cut = cutmix > 0 and (mixup == 0 or drawn.random() < 0.5)
    alpha = cutmix if cut else mixup
    if not alpha:
        return images, targets
    share = float(drawn.beta(alpha, alpha))
    partners = torch.from_numpy(drawn.permutation(len(images))).to(images.device)
    if cut:
        images, share = _paste(images, images[partners], share, drawn)
    else:
        images = share * images + (1 - share) * images[partners]
    return images, share * targets + (1 - share) * targets[partners]


def _paste(
    images: torch.Tensor, others: torch.Tensor, share: float, drawn: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Images (B, C, H, W) with a box of the others, about 1 - share of the area, and the share that they keep."""
    spans = []
    for side in images.shape[-2:]:
        length, centre = side * math.sqrt(1 - share), drawn.uniform(0, side)
        spans.append(slice(max(0, round(centre - length / 2)), min(side, round(centre + length / 2))))
    rows, columns = spans
    images = images.clone()
    images[..., rows, columns] = others[..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return images, 1 - area / (images.shape[-2] * images.shape[-1])
