"""The numbers behind the figures of a report: curves with 95 % bands, reliability, confusion.

Bands are percentile bootstraps (Efron and Tibshirani, 1993, chapter 13), point by point, drawn by patient where
patients are known, as the intervals of `spcxr_hf.evaluation.metrics` are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation.bootstrap import bootstrap_draws, patient_groups
from spcxr_hf.evaluation.calibration import reliability_bins
from spcxr_hf.evaluation.metrics import ScoreLevels, areas, expected_calibration_error

GRID = np.linspace(0, 1, 101)  # where bands are drawn
WILSON = 1.959964  # the normal deviate of a two-sided 95 %


@dataclass(frozen=True)
class Curve:
    """A curve in the unit square and its band.

    Attributes:
        x, y: (points,) the curve of the whole set, in 0 .. 1.
        grid: (101,) where the band was drawn.
        low, high: (101,) its pointwise 95 % interval; NaN where no resample defines it.
        area: Under the curve: AUROC, or average precision.
        interval: The area's 95 % interval, low and high.
        base: What a score without information gives: 0.5 for AUROC, the share of positives for precision.
    """

    x: np.ndarray
    y: np.ndarray
    grid: np.ndarray
    low: np.ndarray
    high: np.ndarray
    area: float
    interval: tuple[float, float]
    base: float


def roc_curve(
    scores: Sequence[float] | np.ndarray,
    targets: Sequence[float] | np.ndarray,
    patients: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Curve:
    """Receiver operating characteristic: sensitivity over 1 - specificity (Fawcett 2006), with a vertical band.

    Args:
        scores: (n,) higher means more likely positive.
        targets: (n,) 1, 0, or NaN where unknown, which leaves the row out.
        patients: (n,) whose image each row is; None, NaN or "" where unknown, then the row is a patient of its own.
        resamples, seed: Of the bootstrap.

    Raises:
        SpcxrError: the lengths differ, or there are no positives or no negatives.
    """
    false, true, draws = _counted(_roc_row, scores, targets, patients, resamples, seed)
    return _curve(false / false[-1], true / true[-1], draws, areas(false, true)[0], base=0.5)


def precision_recall_curve(
    scores: Sequence[float] | np.ndarray,
    targets: Sequence[float] | np.ndarray,
    patients: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Curve:
    """Precision over recall, and the average precision, which does not interpolate (Davis and Goadrich, ICML 2006).

    Args and errors are those of `roc_curve`. Precision at a recall is that of the highest threshold that reaches it.
    """
    false, true, draws = _counted(_precision_row, scores, targets, patients, resamples, seed)
    precision, base = true[1:] / (true + false)[1:], float(true[-1] / (true[-1] + false[-1]))
    return _curve(true[1:] / true[-1], precision, draws, areas(false, true)[1], base)


def _counted(
    row: Callable[[np.ndarray, np.ndarray], np.ndarray],
    scores: Any,
    targets: Any,
    patients: Sequence[Hashable] | None,
    resamples: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negatives and positives at or above each score, of the labelled rows, and `row` of these in each resample."""
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if values.ndim != 1 or values.shape != truth.shape:
        raise SpcxrError(f"scores and targets must be (n,) both; got {values.shape} and {truth.shape}")
    groups = patient_groups(patients, len(values))
    known = np.nonzero(~np.isnan(truth))[0]
    if np.isnan(values[known]).any() or not set(np.unique(truth[known])) <= {0.0, 1.0}:
        raise SpcxrError("scores must be numbers, and targets 1, 0 or NaN")
    values, truth = values[known], truth[known]
    if not (truth == 1).any() or not (truth == 0).any():
        raise SpcxrError(f"a curve needs positives and negatives; of {len(truth)} rows {int(truth.sum())} are positive")
    counts = ScoreLevels(values, truth)
    groups = None if groups is None else [groups[number] for number in known]
    draws = bootstrap_draws(lambda rows: row(*counts.cumulative(rows)), len(known), groups, resamples, seed)
    return *counts.cumulative(np.arange(len(known))), draws


def _roc_row(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Sensitivity on the grid, then the area: (102,)."""
    if not false[-1] or not true[-1]:
        return np.full(len(GRID) + 1, np.nan)
    x, y = false / false[-1], true / true[-1]
    # Where the curve rises straight up, its upper end counts; the area is exact.
    last = np.append(np.diff(x) > 0, True)
    return np.append(np.interp(GRID, x[last], y[last]), areas(false, true)[0])


def _precision_row(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Precision on the grid of recalls, then the average precision: (102,)."""
    if not false[-1] or not true[-1]:
        return np.full(len(GRID) + 1, np.nan)
    precision = true[1:] / np.maximum((true + false)[1:], 1)
    reached = np.searchsorted(true[1:], np.maximum(GRID * true[-1] - 1e-9, 1e-9))
    return np.append(precision[reached], areas(false, true)[1])


def _curve(x: np.ndarray, y: np.ndarray, draws: np.ndarray, area: float, base: float) -> Curve:
    defined = draws[~np.isnan(draws[:, -1])]
    low, high = np.quantile(defined, [0.025, 0.975], axis=0) if len(defined) else np.full((2, len(GRID) + 1), np.nan)
    return Curve(x, y, GRID, low[:-1], high[:-1], area, (float(low[-1]), float(high[-1])), base)


# ---- calibration and confusion -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram; bins without rows are left out.

    Attributes:
        confidence: (bins,) mean probability of the bin's rows.
        observed: (bins,) share of them that are positive (of classes: right).
        low, high: (bins,) 95 % Wilson interval of `observed`, each image counted as independent.
        counts: (bins,) rows.
        error: Expected calibration error, 0 .. 1.
    """

    confidence: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray
    error: float


def reliability(
    probabilities: Sequence[float] | np.ndarray, targets: Sequence[float] | np.ndarray, bins: int = 10
) -> Reliability:
    """Compare probabilities with outcomes (Guo et al., ICML 2017, arXiv 1706.04599, section 2).

    The intervals are Wilson's (1927): unlike the bootstrap's they have a width where every row of a bin agrees.
    Arguments are those of `calibration.reliability_bins`.
    """
    error = expected_calibration_error(probabilities, targets, bins)
    values, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if np.isnan(truth).all():
        raise SpcxrError("a reliability diagram needs rows whose label is known")
    points = reliability_bins(values, truth, bins)
    confidence, observed, counts = (
        np.array([point[key] for point in points]) for key in ("confidence", "share", "images")
    )
    low, high = wilson_interval(observed, counts)
    return Reliability(confidence, observed, low, high, counts, error)


def wilson_interval(shares: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % Wilson score interval of shares of `counts` rows each; both (n,)."""
    square = WILSON**2
    centre = (shares + square / (2 * counts)) / (1 + square / counts)
    half = WILSON / (1 + square / counts) * np.sqrt(shares * (1 - shares) / counts + square / (4 * counts**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def confusion(truths: Sequence[int] | np.ndarray, predictions: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: row, the true class; column, the predicted one."""
    true, predicted = np.asarray(truths), np.asarray(predictions)
    if true.shape != predicted.shape or true.ndim != 1:
        raise SpcxrError(f"truths and predictions must be (n,) both; got {true.shape} and {predicted.shape}")
    both = np.concatenate([true, predicted])
    if both.size and not ((both >= 0) & (both < classes)).all():
        raise SpcxrError(f"classes are 0 .. {classes - 1}; got {both.min()} .. {both.max()}")
    cells = true.astype(int) * classes + predicted.astype(int)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)
