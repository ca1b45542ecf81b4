"""Calibration: temperature scaling, Platt scaling and operating points, fitted on `val` and stored in the model.

A classifier's logits are mapped to `scale * logits + bias`. Classes that exclude each other share one scale, which is
1 / temperature (Guo et al., ICML 2017, arXiv 1706.04599, section 4.2), and have no bias, so the most probable class
stays the same. Labels that may hold together have a scale and a bias each (Platt, Advances in Large Margin Classifiers,
1999), so the order of the images stays the same within each label. Both maps are linear, so `fold_into_head` puts them
into the last layer: softmax or sigmoid of the logits is the calibrated probability for every user of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from spcxr_hf.errors import SpcxrError

HOTTEST = 1000.0  # a temperature is between 1 / this and this
POINTS = ("youden", "sensitivity 0.90", "specificity 0.90")
WANTED = 0.90
JOIN = " + "  # between the labels of a target whose probabilities are added


@dataclass(frozen=True)
class Calibration:
    """A map of logits (n, classes) to `scale * logits + bias`; `scale` and `bias` are (classes,) float64."""

    scale: torch.Tensor
    bias: torch.Tensor

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated logits (n, classes) float64."""
        return logits.double() * self.scale + self.bias


def to_probabilities(logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    """Logits (n, classes) -> probabilities (n, classes) float64, by sigmoid for labels and softmax for classes."""
    return logits.double().sigmoid() if multi_label else logits.double().softmax(dim=1)


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor, multi_label: bool = False) -> float:
    """The number to divide logits by: temperature scaling (Guo et al., ICML 2017, arXiv 1706.04599, section 4.2).

    It has the least cross-entropy on these rows, which is convex in its inverse, whose slope is bisected.

    Args:
        logits: (n, classes).
        targets: (n, classes) in 0 .. 1, NaN where a label is missing.
        multi_label: One temperature for all labels then, each under its own sigmoid; `fit_calibration` fits them apart.

    Returns:
        Between 1 / 1000 and 1000: one of them where the cross-entropy has no least value, as where every row is right.
    """
    values, known = _checked(logits, targets)
    wanted = torch.where(known, targets.double(), 0.0)
    low, high = -math.log(HOTTEST), math.log(HOTTEST)
    for _ in range(60):
        middle = (low + high) / 2
        probabilities = to_probabilities(values * math.exp(middle), multi_label)
        slope = ((probabilities - wanted) * values * known).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def fit_calibration(logits: torch.Tensor, targets: torch.Tensor, multi_label: bool) -> Calibration:
    """The calibration with the least cross-entropy on these rows (`val`, as a rule).

    Args:
        logits: (n, classes).
        targets: (n, classes): 1, 0, or NaN where a label is missing.
        multi_label: A temperature and a bias for each label then, else one temperature for all classes. A label without
            both sides on these rows is left as it is.
    """
    values, known = _checked(logits, targets)
    scale, bias = torch.ones(values.shape[1], dtype=torch.float64), torch.zeros(values.shape[1], dtype=torch.float64)
    if not multi_label:
        return Calibration(scale / fit_temperature(logits, targets), bias)
    for label in range(values.shape[1]):
        rows = known[:, label]
        truth = targets[rows, label].double()
        if 0 < truth.sum() < len(truth):
            scale[label], bias[label] = _fit_label(values[rows, label], truth)
    return Calibration(scale, bias)


def _fit_label(logits: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Scale and bias of one label, (n,) logits and 0 or 1.

    Platt's targets keep the probabilities off 0 and 1 where the classes are separable. The scale is fitted as
    exp(a), so that it cannot reverse the order of the images, with a standard normal prior on a, which matters only
    where there are a handful of positives.
    """
    positives = float(truth.sum())
    negatives = len(truth) - positives
    wanted = torch.where(truth > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mapped = parameters[0].exp() * logits + parameters[1]
        cost = nn.functional.binary_cross_entropy_with_logits(mapped, wanted, reduction="sum")
        cost = cost + parameters[0] ** 2 / 2
        cost.backward()
        return cost

    optimizer.step(loss)
    return math.exp(parameters[0].item()), parameters[1].item()


def _checked(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as float64, and where a label is known."""
    if logits.dim() != 2 or logits.shape != targets.shape or not len(logits):
        raise SpcxrError(f"logits and targets must be (n, classes); got {tuple(logits.shape)}, {tuple(targets.shape)}")
    if not logits.isfinite().all():
        raise SpcxrError("a logit is not a finite number")
    return logits.double(), ~targets.isnan()


@torch.no_grad()
def fold_into_head(model: Any, calibration: Calibration) -> None:
    """Change the classifier's last layer, in place, so that its logits are the calibrated ones.

    The model's `classifier` is a linear layer with a bias: SPCXR's, ViT's, DeiT's, DINOv2's, ...
    """
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise SpcxrError(f"{type(model).__name__}: its `classifier` is no linear layer with a bias to fold into")
    if head.out_features != len(calibration.scale):
        raise SpcxrError(f"a calibration of {len(calibration.scale)} classes for a head of {head.out_features}")
    scale, bias = (values.to(head.weight.device) for values in (calibration.scale, calibration.bias))
    head.weight.copy_(head.weight.double() * scale[:, None])
    head.bias.copy_(head.bias.double() * scale + bias)


# ---- thresholds ----------------------------------------------------------------------------------------------------


def target_columns(target: str, names: Sequence[str]) -> list[int]:
    """The columns of a target: a label, or labels joined by " + "."""
    parts = [target] if target in names else target.split(JOIN)
    unknown = [part for part in parts if part not in names]
    if unknown:
        raise SpcxrError(f"{target!r}: {unknown[0]!r} is no label; there are {', '.join(names)}")
    return [list(names).index(part) for part in parts]


def target_values(values: np.ndarray, target: str, names: Sequence[str]) -> np.ndarray:
    """(n, classes) probabilities, or 0, 1 and NaN -> (n,) of a target; those of joined labels are added."""
    return np.asarray(values, dtype=np.float64)[:, target_columns(target, names)].sum(axis=1).clip(max=1.0)


def operating_points(
    probabilities: np.ndarray, targets: np.ndarray, names: Sequence[str], sums: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Thresholds for every label and every sum of labels, chosen on these rows (`val`, as a rule).

    Args:
        probabilities: (n, classes) in 0 .. 1, calibrated.
        targets: (n, classes): 1, 0, or NaN where a label is missing.
        names: What the classes are called.
        sums: Targets of several labels of one softmax, as "bacterial pneumonia + viral pneumonia".

    Returns:
        Target -> name -> threshold, as `SpcxrConfig.operating_points`; a target without both sides is left out.
    """
    found = {}
    for target in (*names, *sums):
        scores, truth = (target_values(values, target, names) for values in (probabilities, targets))
        known = ~np.isnan(truth)
        if np.unique(truth[known]).size == 2:
            found[target] = thresholds(scores[known], truth[known])
    return found


def count_cases(targets: np.ndarray, target: str, names: Sequence[str]) -> tuple[int, int]:
    """Positives and negatives of a target among (n, classes) of 1, 0 and NaN."""
    truth = target_values(targets, target, names)
    return int((truth > 0.5).sum()), int((truth <= 0.5).sum())


def thresholds(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The three operating points of one target; a score at or above the threshold is positive.

    * "youden": the greatest sensitivity + specificity - 1 (Youden, Cancer 3, 1950); of equals the most sensitive.
    * "sensitivity 0.90": the highest threshold whose sensitivity is at least 0.90 (to rule out).
    * "specificity 0.90": the lowest threshold whose specificity is at least 0.90 (to rule in).

    A threshold is half-way between the two neighbouring scores that it separates. `scores` are (n,) in 0 .. 1, `truth`
    (n,) 0 or 1, both there.

    Raises:
        SpcxrError: more than a tenth of the negatives score 1, so that no threshold separates them from the rest.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], truth[order] > 0.5
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # equal scores are on the same side
    sensitivity = np.append(0.0, positive.cumsum()[ends] / positive.sum())
    specificity = 1 - np.append(0.0, (~positive).cumsum()[ends] / (~positive).sum())
    distinct = ranked[ends]
    cuts = (np.append(1.0, distinct) + np.append(distinct, 0.0)) / 2  # cut i has the i highest distinct scores over it
    if distinct[0] >= 1:  # a score of 1 is at or above every threshold
        cuts, sensitivity, specificity = cuts[1:], sensitivity[1:], specificity[1:]
        if specificity[0] < WANTED - 1e-12:
            raise SpcxrError(
                f"{1 - specificity[0]:.0%} of the negatives score 1: no threshold has a specificity of {WANTED}"
            )
    gain = (sensitivity + specificity).round(12)
    chosen = (
        int(np.flatnonzero(gain == gain.max())[-1]),
        int(np.flatnonzero(sensitivity >= WANTED - 1e-12)[0]),
        int(np.flatnonzero(specificity >= WANTED - 1e-12)[-1]),
    )
    return {name: float(cuts[cut]) for name, cut in zip(POINTS, chosen, strict=True)}


def decision_figures(scores: np.ndarray, truth: np.ndarray, threshold: float) -> np.ndarray:
    """Sensitivity, specificity and accuracy (3,) of (n,) scores against 0 or 1; NaN where there is no such side."""
    positive, said = truth > 0.5, scores >= threshold
    right = said == positive
    sides = ((right[side].sum(), side.sum()) for side in (positive, ~positive, np.ones_like(positive)))
    return np.array([hits / total if total else math.nan for hits, total in sides])


def reliability_bins(confidence: np.ndarray, hits: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """The points of a reliability diagram: bins of equal width ((m - 1) / bins, m / bins], the empty ones left out.

    Args:
        confidence: (n,) probability of the label, or of the most probable class.
        hits: (n,) whether the label holds, or that class is right; NaN where the label is missing.

    Returns:
        "low" and "high" (the bin's ends), "images", "confidence" (mean) and "share" (of hits) for each bin.
    """
    known = ~np.isnan(hits)
    confidence, hits = confidence[known], hits[known]
    edges = np.linspace(0, 1, bins + 1)
    number = np.searchsorted(edges[1:-1], confidence)
    return [
        {
            "low": float(edges[one]),
            "high": float(edges[one + 1]),
            "images": int((number == one).sum()),
            "confidence": float(confidence[number == one].mean()),
            "share": float(hits[number == one].mean()),
        }
        for one in np.unique(number)
    ]


def set_operating_points(config: Any, points: Mapping[str, Mapping[str, float]], default: str | None) -> None:
    """Put thresholds, as of `operating_points`, into a configuration; that of SPCXR checks them."""
    config.operating_points = {target: dict(values) for target, values in points.items()} or None
    config.operating_point = default if points else None
    try:
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        raise SpcxrError(str(error.__cause__ or error)) from error
