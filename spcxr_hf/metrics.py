"""Figures of merit for masks, and how sure they are: Dice, intersection over union, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch

from .errors import SpcxrError


def dice(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice coefficient of each mask, 2 |A and B| / (|A| + |B|) (Dice, Ecology 26, 1945).

    Args:
        prediction: (..., H, W) booleans.
        target: (..., H, W) booleans, the same shape.

    Returns:
        (...) float64 in 0 .. 1; 1 where both masks are empty.

    Raises:
        SpcxrError: the shapes differ, or a mask is not boolean.
    """
    overlap, size, _ = _areas(prediction, target)
    return torch.where(size > 0, 2 * overlap / size.clamp(min=1), 1.0)


def iou(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each mask, |A and B| / |A or B| (Jaccard, New Phytologist 11, 1912).

    Args:
        prediction: (..., H, W) booleans.
        target: (..., H, W) booleans, the same shape.

    Returns:
        (...) float64 in 0 .. 1; 1 where both masks are empty.

    Raises:
        SpcxrError: the shapes differ, or a mask is not boolean.
    """
    overlap, _, union = _areas(prediction, target)
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def _areas(prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels in both masks, the sum of their pixels, and pixels in either; (...) float64 each."""
    if prediction.shape != target.shape or prediction.dim() < 2:
        raise SpcxrError(
            f"masks must be (..., H, W) of one shape; got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if prediction.dtype != torch.bool or target.dtype != torch.bool:
        raise SpcxrError(f"masks must be boolean; got {prediction.dtype} and {target.dtype}")
    overlap = (prediction & target).sum(dim=(-2, -1)).double()
    size = prediction.sum(dim=(-2, -1)).double() + target.sum(dim=(-2, -1))
    return overlap, size, size - overlap


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).

    Args:
        values: (n,) one figure per image.
        groups: (n,) what is drawn together, as a rule the patient: images of one patient are not independent.
            By default every image is drawn by itself.
        confidence: Coverage, in (0, 1).
        resamples: Number of draws with replacement, at least 1.
        seed: The draws follow from it.

    Returns:
        Lower and upper end.

    Raises:
        SpcxrError: no values, a value that is not finite, groups of another length, or a number out of range.
    """
    figures = np.asarray(values, dtype=np.float64)
    if figures.ndim != 1 or not figures.size or not np.isfinite(figures).all():
        raise SpcxrError("values must be a list of at least one number, all of them finite")
    if groups is not None and len(groups) != len(figures):
        raise SpcxrError(f"{len(groups)} groups for {len(figures)} values")
    if not 0 < confidence < 1 or resamples < 1:
        raise SpcxrError(f"confidence must lie in (0, 1) and resamples be at least 1; got {confidence}, {resamples}")
    sums, counts = _group_sums(figures, range(len(figures)) if groups is None else groups)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for index in range(resamples):  # one draw at a time: all at once would take n x resamples of memory
        drawn = generator.integers(0, len(sums), len(sums))
        means[index] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _group_sums(figures: np.ndarray, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the figures in each group, groups in the order of their first member."""
    number: dict[Hashable, int] = {}
    index = np.array([number.setdefault(group, len(number)) for group in groups])
    return np.bincount(index, weights=figures), np.bincount(index)
