"""Metrics with confidence intervals: for classes, for labels that may be missing, and for masks.

Three reports (`classification_report`, `multilabel_report`, `segmentation_report`) hold every figure with its 95 %
bootstrap interval (`bootstrap`), by patient where patients are known. The single figures are public too.
AUROC, average precision and the ROC curve are scikit-learn's, surface distances use SciPy's distance transform; a
resample is counted rather than sorted, which gives the same numbers in a fraction of the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from spcxr_hf.errors import SpcxrError, needs
from spcxr_hf.evaluation.bootstrap import bootstrap_draws, patient_groups, percentiles

Values = Sequence | np.ndarray | torch.Tensor
Mask = np.ndarray | torch.Tensor

RANKING = ("auroc", "average_precision", "sensitivity_at_specificity")
CALIBRATION = ("brier", "ece")
OVERALL = ("accuracy", "balanced_accuracy", *(f"macro_{name}" for name in RANKING), *CALIBRATION)
SURFACE = ("dice", "iou", "hausdorff95", "boundary_distance", "dice_tenth_percentile")
SPECIFICITY, BINS = 0.90, 15  # of sensitivity at a specificity, and of the expected calibration error
ROW_SUM_TOLERANCE = 0.01  # a softmax in bfloat16 misses 1 by up to 0.004


# ---- masks -----------------------------------------------------------------------------------------------------


def dice(prediction: Mask, target: Mask) -> torch.Tensor:
    """Dice coefficient of each mask, 2 |A and B| / (|A| + |B|) (Dice, Ecology 26, 1945).

    Both are (..., H, W) booleans. The result is (...) float64 in 0 .. 1; 1 where both masks are empty.
    """
    overlap, size, _ = _areas(prediction, target)
    return torch.where(size > 0, 2 * overlap / size.clamp(min=1), 1.0)


def iou(prediction: Mask, target: Mask) -> torch.Tensor:
    """Intersection over union of each mask, |A and B| / |A or B| (Jaccard, New Phytologist 11, 1912), as `dice`."""
    overlap, _, union = _areas(prediction, target)
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


def _areas(prediction: Mask, target: Mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels in both masks, the sum of their pixels, and pixels in either; (...) float64 each."""
    prediction, target = torch.as_tensor(prediction), torch.as_tensor(target)
    if prediction.shape != target.shape or prediction.dim() < 2:
        raise SpcxrError(
            f"masks must be (..., H, W) of one shape; got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if prediction.dtype != torch.bool or target.dtype != torch.bool:
        raise SpcxrError(f"masks must be boolean; got {prediction.dtype} and {target.dtype}")
    overlap = (prediction & target).sum(dim=(-2, -1)).double()
    size = prediction.sum(dim=(-2, -1)).double() + target.sum(dim=(-2, -1))
    return overlap, size, size - overlap


def hausdorff95(prediction: Mask, target: Mask, spacing: Sequence[float] = (1.0, 1.0)) -> float:
    """95 % Hausdorff distance of two masks: the larger of the two directed 95th percentiles of surface distances.

    The surface of a mask: its pixels that have one of their four neighbours outside it, or outside the picture. From
    each of them the distance to the nearest surface pixel of the other mask is taken, between the pixels' centres.
    (Huttenlocher et al., IEEE TPAMI 15, 1993, section II, with the 95th percentile in the place of the maximum.
    Programs that pool both directions first give a smaller one as a rule.)

    Args:
        prediction, target: (H, W) booleans, one shape.
        spacing: Height and width of a pixel, in mm as a rule; by default the distance is in pixels.

    Returns:
        In the unit of `spacing`. 0 where both masks are empty, infinity where one is.

    Raises:
        SpcxrError: the shapes differ, a mask is not boolean, a side of a pixel is not positive, or SciPy is missing.
    """
    return _surface_distances(prediction, target, spacing)[0]


def boundary_distance(
    prediction: np.ndarray | torch.Tensor, target: np.ndarray | torch.Tensor, spacing: Sequence[float] = (1.0, 1.0)
) -> float:
    """Mean boundary distance of two masks: as `hausdorff95`, but the mean of the two directed mean distances.

    (Van Ginneken et al., Medical Image Analysis 10, 2006, section 5.1.)
    """
    return _surface_distances(prediction, target, spacing)[1]


def _surface_distances(prediction: Any, target: Any, spacing: Sequence[float]) -> tuple[float, float]:
    """95 % Hausdorff distance and mean boundary distance."""
    a, b = _array(prediction), _array(target)
    if a.ndim != 2 or a.shape != b.shape or a.dtype != bool or b.dtype != bool:
        raise SpcxrError(f"masks must be (H, W) booleans of one shape; got {_kind(a)} and {_kind(b)}")
    if len(spacing) != 2 or not all(math.isfinite(side) and side > 0 for side in spacing):
        raise SpcxrError(f"spacing must be the height and the width of a pixel, both positive; got {spacing}")
    if not a.any() or not b.any():
        return (0.0, 0.0) if a.any() == b.any() else (math.inf, math.inf)
    with needs("train", "SciPy"):
        from scipy import ndimage
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]  # nothing outside it matters
    surfaces = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (a, b)]
    directed = [
        ndimage.distance_transform_edt(~there, sampling=spacing)[here] for here, there in (surfaces, surfaces[::-1])
    ]
    return (
        float(max(np.percentile(distances, 95) for distances in directed)),
        float(np.mean([distances.mean() for distances in directed])),
    )


# ---- one label: 0, 1 or missing ----------------------------------------------------------------------------------


def auroc(scores: Values, targets: Values) -> float:
    """Area under the receiver operating characteristic curve (Hanley and McNeil, Radiology 143, 1982).

    The chance that a positive scores higher than a negative, a tie counting half; scikit-learn's `roc_auc_score`.

    Args:
        scores: (n,) finite numbers, the higher the more positive.
        targets: (n,) 0 or 1, NaN where the label is missing; those rows are left out.

    Returns:
        In 0 .. 1, or NaN where the labels hold one class only.

    Raises:
        SpcxrError: the lengths differ, a score is not finite, a target is none of these, or scikit-learn is missing.
    """
    known_scores, known = _known(scores, targets)
    return float(_sklearn().roc_auc_score(known, known_scores)) if _both(known) else math.nan


def average_precision(scores: Values, targets: Values) -> float:
    """Average precision: the precision at each threshold, weighted by the recall that it adds (no interpolation).

    scikit-learn's `average_precision_score`. Constant scores give the share of positives. Arguments are those of
    `auroc`, the result is in 0 .. 1 or NaN.
    """
    known_scores, known = _known(scores, targets)
    return float(_sklearn().average_precision_score(known, known_scores)) if _both(known) else math.nan


def sensitivity_at_specificity(scores: Values, targets: Values, specificity: float = SPECIFICITY) -> float:
    """The highest sensitivity of any threshold whose specificity is at least the one asked for.

    A row is called positive where its score reaches the threshold, which is chosen on the very rows that are measured:
    the figure says what the ranking allows, not what a threshold fixed beforehand reaches. Arguments are those of
    `auroc` and a specificity in 0 .. 1; the result is in 0 .. 1 or NaN.
    """
    if not 0 <= specificity <= 1:
        raise SpcxrError(f"specificity must lie in 0 .. 1; got {specificity}")
    known_scores, known = _known(scores, targets)
    if not _both(known):
        return math.nan
    false_rate, true_rate, _ = _sklearn().roc_curve(known, known_scores, drop_intermediate=False)
    return float(true_rate[false_rate <= _false_rate(specificity)].max())


def brier_score(probabilities: Values, targets: Values) -> float:
    """Brier score, the mean squared error of probabilities (Brier, Monthly Weather Review 78, 1950, section 2).

    Args:
        probabilities: (n,) of the label, or (n, classes) whose rows sum to 1.
        targets: (n,) 0, 1 or NaN (missing, left out) for a label; (n,) class numbers for classes.

    Returns:
        The mean of (p - y)^2 for a label and for two classes, in 0 .. 1; for more classes Brier's own form, the sum of
        the squares over the classes, in 0 .. 2. Lower is better. NaN where every target is missing.
    """
    return _calibration(probabilities, targets, BINS).figures()[0]


def expected_calibration_error(probabilities: Values, targets: Values, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal width (Guo et al., ICML 2017, arXiv 1706.04599, section 2).

    The gap between mean confidence and share of hits in each bin ((m - 1) / bins, m / bins], weighted by its rows.
    Sampling noise adds to the gaps, so few rows overestimate it, and resamples do so again: its bootstrap interval is
    high.

    Args:
        probabilities: As for `brier_score`.
        targets: As for `brier_score`.
        bins: Number of bins.

    Returns:
        In 0 .. 1; NaN where every target is missing. For classes the confidence is that of the top class and a hit is a
        right top class (Guo et al.); for a label it is the label's probability, and a hit is a positive
        (Naeini et al., AAAI 2015).
    """
    return _calibration(probabilities, targets, bins).figures()[1]


def check_packages() -> None:
    """Refuse, before work that may take hours, what `auroc` and `average_precision` would refuse after it."""
    _sklearn()


def _sklearn() -> Any:
    with needs("train", "scikit-learn"):
        from sklearn import metrics
    return metrics


def _known(scores: Values, targets: Values) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have a label."""
    values, truth = _numbers(scores, "scores"), _numbers(targets, "targets")
    if values.ndim != 1 or values.shape != truth.shape:
        raise SpcxrError(f"scores and targets must be (n,) both; got {values.shape} and {truth.shape}")
    if not np.isfinite(values).all():
        row = np.flatnonzero(~np.isfinite(values))[0]
        raise SpcxrError(f"scores must be finite; row {row} holds {values[row]}")
    _check_targets(truth, "targets")
    known = ~np.isnan(truth)
    return values[known], truth[known]


def _both(targets: np.ndarray) -> bool:
    return bool((targets == 0).any() and (targets == 1).any())


def _false_rate(specificity: float) -> float:
    """The share of negatives that may be called positive; 1 - 0.9 is less than a tenth by a rounding error."""
    return 1 - specificity + 1e-9


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`auroc` of rows with many weightings at once: (resamples,), NaN where a side has no weight.

    `scores` is (n,), `positive` (n,) booleans and `weights` (resamples, n), at least 0.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-math.inf))  # where a new score begins
    won, lost = (np.add.reduceat((weights * side)[:, order], starts, axis=1) for side in (positive, ~positive))
    below = lost.cumsum(axis=1) - lost / 2
    pairs = won.sum(axis=1) * lost.sum(axis=1)
    return np.where(pairs > 0, (won * below).sum(axis=1) / np.where(pairs > 0, pairs, 1), np.nan)


class ScoreLevels:
    """Rows by their level of score, so that a resample is counted rather than sorted; level 0 has the highest score.

    `scores` is (n,), `targets` (n,) 1, 0, or NaN where unknown, which leaves the row out.
    """

    def __init__(self, scores: np.ndarray, targets: np.ndarray):
        levels, level = np.unique(-scores, return_inverse=True)
        self.levels = len(levels)
        # Cells: negatives by level, then positives by level, then everything that has no label.
        self.cells = np.where(np.isnan(targets), 2 * self.levels, level + self.levels * (targets == 1))

    def cumulative(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Negatives and positives at or above each level, a 0 before them: (levels + 1,) both."""
        counts = np.bincount(self.cells[rows], minlength=2 * self.levels + 1)
        false, true = counts[: self.levels].cumsum(), counts[self.levels : 2 * self.levels].cumsum()
        return np.concatenate([[0], false]), np.concatenate([[0], true])


def areas(false: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision by the counts of `ScoreLevels.cumulative`; NaN both where a side is missing."""
    if not false[-1] or not true[-1]:
        return math.nan, math.nan
    found = np.diff(true)
    won = found @ (false[-1] - (false[1:] + false[:-1]) / 2)  # pairs in which the positive scores higher
    precision = true[1:] / np.maximum(true[1:] + false[1:], 1)
    return float(won / (true[-1] * false[-1])), float(found @ precision / true[-1])


class _Ranking:
    """AUROC, average precision and sensitivity at a specificity of one label, in the order of RANKING.

    Of the whole set they are scikit-learn's; a resample is counted.
    """

    def __init__(self, scores: np.ndarray, targets: np.ndarray, specificity: float = SPECIFICITY):
        self.scores, self.targets, self.specificity = scores, targets, specificity
        self.counts = ScoreLevels(scores, targets)

    def figures(self) -> list[float]:
        return [
            auroc(self.scores, self.targets),
            average_precision(self.scores, self.targets),
            sensitivity_at_specificity(self.scores, self.targets, self.specificity),
        ]

    def resampled(self, rows: np.ndarray) -> list[float]:
        false, true = self.counts.cumulative(rows)
        if not false[-1] or not true[-1]:
            return [math.nan] * len(RANKING)
        allowed = np.searchsorted(false, _false_rate(self.specificity) * false[-1], side="right") - 1
        return [*areas(false, true), true[allowed] / true[-1]]


class _Calibration:
    """Brier score and expected calibration error, in the order of CALIBRATION, of the rows that have a label."""

    def __init__(self, errors: np.ndarray, confidence: np.ndarray, hits: np.ndarray, bins: int):
        if bins < 1:
            raise SpcxrError(f"bins must be at least 1; got {bins}")
        self.known = ~np.isnan(errors)
        self.errors = np.where(self.known, errors, 0.0)
        self.gaps = np.where(self.known, confidence - hits, 0.0)
        self.bin = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)

    def figures(self) -> list[float]:
        return self.resampled(np.arange(len(self.errors)))

    def resampled(self, rows: np.ndarray) -> list[float]:
        count = self.known[rows].sum()
        if not count:
            return [math.nan] * len(CALIBRATION)
        gaps = np.bincount(self.bin[rows], weights=self.gaps[rows])
        return [float(self.errors[rows].sum() / count), float(np.abs(gaps).sum() / count)]


def _calibration(probabilities: Values, targets: Values, bins: int) -> _Calibration:
    """Of a label, (n,) probabilities, or of classes, (n, classes)."""
    values = _numbers(probabilities, "probabilities")
    if values.ndim == 2:
        return _class_calibration(*_class_inputs(values, targets, range(values.shape[1])), bins)
    truth = _numbers(targets, "targets")
    if values.ndim != 1 or values.shape != truth.shape:
        raise SpcxrError(f"probabilities and targets must be (n,) both; got {values.shape} and {truth.shape}")
    _check_probabilities(values, "probabilities")
    _check_targets(truth, "targets")
    return _label_calibration(values, truth, bins)


def _label_calibration(probabilities: np.ndarray, targets: np.ndarray, bins: int) -> _Calibration:
    return _Calibration((probabilities - targets) ** 2, probabilities, targets, bins)


def _class_calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> _Calibration:
    classes = probabilities.shape[1]
    errors = ((probabilities - np.eye(classes)[labels]) ** 2).sum(axis=1)
    hits = probabilities.argmax(axis=1) == labels
    return _Calibration(errors / 2 if classes == 2 else errors, probabilities.max(axis=1), hits, bins)


def class_accuracies(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The share of each class's rows that are predicted right, its recall: (classes,), NaN for a class without rows.

    `predictions` and `labels` are (n,) class numbers in 0 .. classes - 1. The mean is the balanced accuracy.
    """
    rows = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predictions == labels], minlength=classes)
    return np.where(rows > 0, hits / np.maximum(rows, 1), np.nan)


# ---- reports -----------------------------------------------------------------------------------------------------


def classification_report(
    probabilities: Values,
    labels: Values,
    class_names: Sequence[str],
    patients: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """Report a classifier of classes that exclude each other.

    Args:
        probabilities: (n, classes) in 0 .. 1, rows summing to 1.
        labels: (n,) class numbers.
        class_names: What to call each class.
        patients: (n,) whose image each row is; None, NaN or "" where unknown, then the row is a patient of its own.
        resamples, seed: Of the bootstrap.

    Returns:
        "images", "patients", "specificity", "resamples"; "accuracy", "balanced_accuracy", "macro_auroc",
        "macro_average_precision", "macro_sensitivity_at_specificity" (means over the classes, each against the rest),
        "brier", "ece"; and "classes", which maps each name to its "images", "accuracy" (its recall, where the most
        probable class is the answer), "auroc", "average_precision" and "sensitivity_at_specificity". Each `<figure>`
        has a `<figure>_ci95`, [low, high]. A figure that is not defined, as for a class with no image, is None and left
        out of the means. "undefined_resamples" counts, by figure, the resamples in which a class was missing.
    """
    values, truth = _class_inputs(probabilities, labels, class_names)
    groups = patient_groups(patients, len(values))
    judge = _Classes(values, truth)
    draws = bootstrap_draws(judge.resampled, len(values), groups, resamples, seed)
    overall, classes = judge.split(judge.figures())
    overall_draws, class_draws = judge.split(draws)

    report = _header(groups, len(values), resamples) | {"specificity": SPECIFICITY}
    report |= _described(OVERALL, overall, overall_draws)
    report["classes"] = {
        name: {"images": int(judge.images[number])}
        | _described(("accuracy", *RANKING), classes[number], class_draws[:, number])
        for number, name in enumerate(class_names)
    }
    return report


class _Classes:
    """The figures of a classification report as one row of numbers: those of OVERALL, then four of each class."""

    def __init__(self, probabilities: np.ndarray, labels: np.ndarray):
        classes = range(probabilities.shape[1])
        self.labels, self.predicted = labels, probabilities.argmax(axis=1)
        self.images = np.bincount(labels, minlength=len(classes))
        self.both = (self.images > 0) & (self.images < len(labels))  # there is something to tell the class from
        self.rankings = [_Ranking(probabilities[:, one], (labels == one).astype(float)) for one in classes]
        self.calibration = _class_calibration(probabilities, labels, BINS)

    def figures(self) -> np.ndarray:
        return self._row(np.arange(len(self.labels)), [ranking.figures() for ranking in self.rankings])

    def resampled(self, rows: np.ndarray) -> np.ndarray:
        return self._row(rows, [ranking.resampled(rows) for ranking in self.rankings])

    def split(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., figures) -> (..., overall figures) and (..., classes, 4)."""
        overall, classes = row[..., : len(OVERALL)], row[..., len(OVERALL) :]
        return overall, classes.reshape(*row.shape[:-1], len(self.images), 1 + len(RANKING))

    def _row(self, rows: np.ndarray, ranked: list[list[float]]) -> np.ndarray:
        accuracy = class_accuracies(self.predicted[rows], self.labels[rows], len(self.images))[:, None]
        means = [*_means(accuracy, self.images > 0), *_means(np.array(ranked), self.both)]
        overall = [(self.predicted[rows] == self.labels[rows]).mean(), *means, *self.calibration.resampled(rows)]
        return np.concatenate([overall, np.hstack([accuracy, ranked]).ravel()])


def multilabel_report(
    probabilities: Values,
    targets: Values,
    names: Sequence[str],
    patients: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """Report a classifier of labels that may hold together and may be missing.

    Args:
        probabilities: (n, labels) in 0 .. 1.
        targets: (n, labels) 0 or 1, NaN where the label is missing.
        names: What to call each label.
        patients, resamples, seed: As for `classification_report`.

    Returns:
        "images", "patients", "specificity", "resamples"; "labels_in_mean", the names of the labels that have both
        classes, and "mean_<figure>" over these; and "labels", which maps each name to its counts ("positives",
        "negatives", "missing") and its figures "auroc", "average_precision", "sensitivity_at_specificity", "brier" and
        "ece". Intervals, undefined figures and "undefined_resamples" as in `classification_report`.
    """
    values, truth = _label_inputs(probabilities, targets, names)
    groups = patient_groups(patients, len(values))
    columns = list(zip(values.T, truth.T, strict=True))
    judges = [(_Ranking(p, y), _label_calibration(p, y, BINS)) for p, y in columns]
    both = np.array([_both(y) for _, y in columns])

    point = np.array([ranking.figures() + calibration.figures() for ranking, calibration in judges])
    draws = bootstrap_draws(
        lambda rows: np.array(
            [ranking.resampled(rows) + calibration.resampled(rows) for ranking, calibration in judges]
        ),
        len(values),
        groups,
        resamples,
        seed,
    )
    figures = (*RANKING, *CALIBRATION)
    report = _header(groups, len(values), resamples) | {"specificity": SPECIFICITY}
    report["labels_in_mean"] = [name for name, kept in zip(names, both, strict=True) if kept]
    report |= _described([f"mean_{name}" for name in figures], _means(point, both), _means(draws, both))
    report["labels"] = {
        name: _label_counts(truth[:, number]) | _described(figures, point[number], draws[:, number])
        for number, name in enumerate(names)
    }
    return report


def segmentation_report(
    predictions: Iterable[Mask],
    targets: Iterable[Mask],
    patients: Sequence[Hashable] | None = None,
    spacing: Sequence[float] | Sequence[Sequence[float]] = (1.0, 1.0),
    resamples: int = 2000,
    seed: int = 0,
) -> dict:
    """Report masks of one structure, image by image, each at its own resolution.

    Args:
        predictions: (H, W) booleans for each image; read once, so a generator will do.
        targets: (H, W) booleans for each image.
        patients, resamples, seed: As for `classification_report`.
        spacing: Height and width of a pixel, for all images or one pair for each; see `hausdorff95`.

    Returns:
        "images", "patients", "resamples"; means over the images: "dice", "iou", "hausdorff95" and "boundary_distance",
        the distances over the images where they are finite, the others counted in "hausdorff95_infinite"; and
        "dice_tenth_percentile". Each `<figure>` has a `<figure>_ci95`, [low, high]; "undefined_resamples" as in the
        other reports.
    """
    figures = np.array(list(_mask_figures(predictions, targets, spacing))).reshape(-1, 4)
    groups = patient_groups(patients, len(figures))
    finite = np.where(np.isfinite(figures), figures, np.nan)

    def summary(rows: np.ndarray) -> np.ndarray:
        drawn = finite[rows]
        known = ~np.isnan(drawn[:, 2])
        distances = drawn[known, 2:].mean(axis=0) if known.any() else (math.nan, math.nan)
        return np.array([*drawn[:, :2].mean(axis=0), *distances, np.quantile(drawn[:, 0], 0.1)])

    draws = bootstrap_draws(summary, len(figures), groups, resamples, seed)
    report = _header(groups, len(figures), resamples)
    report |= _described(SURFACE, summary(np.arange(len(figures))), draws)
    report["hausdorff95_infinite"] = int(np.isinf(figures[:, 2]).sum())
    return report


def _mask_figures(predictions: Iterable, targets: Iterable, spacing: Sequence) -> Iterator[tuple[float, ...]]:
    """Dice, IoU, 95 % Hausdorff distance and mean boundary distance of each pair."""
    shared = len(spacing) > 0 and np.ndim(spacing[0]) == 0
    spacings = itertools.repeat(spacing) if shared else itertools.chain(spacing, itertools.repeat(()))
    for row, (prediction, target) in enumerate(itertools.zip_longest(predictions, targets)):
        if prediction is None or target is None:
            raise SpcxrError(f"there must be as many predictions as targets; one of them ends after {row}")
        a, b = _array(prediction), _array(target)
        try:
            distances = _surface_distances(a, b, next(spacings))
        except SpcxrError as error:
            raise SpcxrError(f"image {row}: {error}") from error
        yield dice(a, b).item(), iou(a, b).item(), *distances


def _header(groups: Sequence[Hashable] | None, images: int, resamples: int) -> dict:
    return {"images": images, "patients": None if groups is None else len(set(groups)), "resamples": resamples}


def _label_counts(targets: np.ndarray) -> dict[str, int]:
    positives, missing = int((targets == 1).sum()), int(np.isnan(targets).sum())
    return {"positives": positives, "negatives": len(targets) - positives - missing, "missing": missing}


def _means(tables: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(..., labels, figures) -> (..., figures) over the labels `kept`; NaN where one of them is, or none is kept."""
    if not kept.any():
        return np.full((*tables.shape[:-2], tables.shape[-1]), np.nan)
    return tables[..., kept, :].mean(axis=-2)


def _described(names: Sequence[str], values: np.ndarray, draws: np.ndarray) -> dict:
    """Figures (figures,), their intervals by draws (resamples, figures), and how many of these are undefined."""
    entry: dict = {}
    undefined: dict[str, int] = {}
    for name, value, drawn in zip(names, values, draws.T, strict=True):
        skipped = int(np.isnan(drawn).sum())
        defined = not math.isnan(value)
        entry[name] = float(value) if defined else None
        entry[f"{name}_ci95"] = list(percentiles(drawn, 0.95)) if defined and skipped < len(drawn) else None
        if defined and skipped:
            undefined[name] = skipped
    return entry | {"undefined_resamples": undefined}


# ---- input -------------------------------------------------------------------------------------------------------


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no bfloat16
    return np.asarray(values)


def _kind(array: np.ndarray) -> str:
    return f"{array.shape} {array.dtype}"


def _numbers(values: Values, what: str) -> np.ndarray:
    """As float64; None, as lists have it for a missing label, becomes NaN."""
    try:
        numbers = _array(values).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise SpcxrError(f"{what} must be an array of numbers ({error})") from error
    if not numbers.size:
        raise SpcxrError(f"{what} are empty")
    return numbers


def _check_probabilities(values: np.ndarray, what: str) -> None:
    """(n,) numbers of one label or class."""
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))  # NaN too
    if wrong.size:
        raise SpcxrError(f"{what} must lie in 0 .. 1; row {wrong[0]} holds {values[wrong[0]]:g}")


def _check_targets(values: np.ndarray, what: str) -> None:
    """(n,) targets of one label."""
    wrong = np.flatnonzero(~((values == 0) | (values == 1) | np.isnan(values)))
    if wrong.size:
        raise SpcxrError(f"{what} must be 0, 1 or NaN (missing); row {wrong[0]} holds {values[wrong[0]]:g}")


def _check_names(values: np.ndarray, names: Sequence) -> None:
    if values.ndim != 2 or values.shape[1] != len(names):
        raise SpcxrError(f"probabilities must be (n, {len(names)}), a column for each name; got {values.shape}")
    if len(set(names)) != len(names):
        raise SpcxrError(f"two names are the same: {', '.join(map(str, names))}")
    for column, name in zip(values.T, names, strict=True):
        _check_probabilities(column, f"probabilities of {name!r}")


def _class_inputs(probabilities: Values, labels: Values, names: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(n, classes) float64 and (n,) integers, checked."""
    values, truth = _numbers(probabilities, "probabilities"), _array(labels)
    _check_names(values, names)
    if len(names) < 2:
        raise SpcxrError(f"there must be at least two classes; got {len(names)}")
    wrong = np.flatnonzero(np.abs(values.sum(axis=1) - 1) > ROW_SUM_TOLERANCE)
    if wrong.size:
        raise SpcxrError(f"the probabilities of a row must sum to 1; row {wrong[0]} sums to {values[wrong[0]].sum():g}")
    if truth.shape != values.shape[:1] or truth.dtype.kind not in "iub":
        raise SpcxrError(f"labels must be ({len(values)},) whole numbers; got {_kind(truth)}")
    wrong = np.flatnonzero((truth < 0) | (truth >= len(names)))
    if wrong.size:
        raise SpcxrError(f"labels must lie in 0 .. {len(names) - 1}; row {wrong[0]} holds {truth[wrong[0]]}")
    return values, truth.astype(np.int64)


def _label_inputs(probabilities: Values, targets: Values, names: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """(n, labels) float64 both, checked."""
    values, truth = _numbers(probabilities, "probabilities"), _numbers(targets, "targets")
    _check_names(values, names)
    if truth.shape != values.shape:
        raise SpcxrError(f"probabilities and targets must have one shape; got {values.shape} and {truth.shape}")
    for column, name in zip(truth.T, names, strict=True):
        _check_targets(column, f"targets of {name!r}")
    return values, truth
