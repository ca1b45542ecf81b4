"""Classification loss with missing labels, class weights, and the metrics that choose a model."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from spcxr_hf.evaluation.metrics import auroc, average_precision

RANKING = {"auroc": auroc, "average_precision": average_precision}  # means over the classes, each against the rest
METRICS = ("auroc", "average_precision", "balanced_accuracy", "accuracy", "loss")
MULTI_LABEL_METRICS = ("auroc", "average_precision", "loss")


def class_weights(targets: torch.Tensor, balanced: bool, multi_label: bool) -> torch.Tensor:
    """Weight of each class, (classes,), or of each label's positives (multi-label); 1 unless balanced.

    Balanced, a class has the weight images / (classes * images of it), as in scikit-learn; a label's positives have
    negatives / positives. `targets` are (n, classes) of the whole set, with a 1 in every column.
    """
    positives, known = (targets == 1).sum(dim=0), (~targets.isnan()).sum(dim=0)
    if not balanced:
        return torch.ones(targets.shape[1])
    if multi_label:
        return (known - positives) / positives
    return known / (len(positives) * positives)


def classification_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    multi_label: bool,
    weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    known_share: float | None = None,
) -> torch.Tensor:
    """Cross-entropy with softmax, or of every label with sigmoid.

    Args:
        logits: (B, classes).
        targets: (B, classes) in 0 .. 1; the rows of single-label targets sum to 1; a multi-label NaN is missing and
            does not count.
        multi_label: Whether several labels may hold at once.
        weights: (classes,) of each class, or of each label's positives.
        label_smoothing: Share of a target that is spread over all classes (arXiv 1512.00567, section 7).
        known_share: Share of the whole set's labels that is known (multi-label). With it every known label has the
            same weight in any micro-batch; without it, the mean is over the known labels here.

    Returns:
        The mean over the images, or over the labels that are known; 0 where none is.
    """
    logits = logits.float()
    if not multi_label:  # mean over images, not over weights, so that micro-batches add up
        return nn.functional.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing)
    known = ~targets.isnan()
    wanted = torch.where(known, targets * (1 - label_smoothing) + label_smoothing / 2, 0.0)
    each = nn.functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="none")
    count = known.sum().clamp(min=1) if known_share is None else known.numel() * known_share
    return torch.where(known, each, 0.0).sum() / count


def measure(logits: torch.Tensor, targets: torch.Tensor, multi_label: bool) -> dict[str, float]:
    """The figures of METRICS, or of MULTI_LABEL_METRICS; NaN where one is not defined.

    AUROC and average precision are means over the classes that have both sides, each class against the rest.
    """
    probabilities = logits.sigmoid() if multi_label else logits.softmax(dim=1)
    figures = {}
    for name, figure in RANKING.items():
        each = [figure(p, y) for p, y in zip(probabilities.T, targets.T, strict=True)]
        defined = [value for value in each if not math.isnan(value)]
        figures[name] = float(np.mean(defined)) if defined else math.nan
    if not multi_label:
        truth = targets.argmax(dim=1)
        hits = (logits.argmax(dim=1) == truth).double()
        recalls = [hits[truth == number].mean() for number in truth.unique()]
        figures["balanced_accuracy"] = torch.stack(recalls).mean().item()
        figures["accuracy"] = hits.mean().item()
    figures["loss"] = classification_loss(logits, targets, multi_label).item()
    return figures
