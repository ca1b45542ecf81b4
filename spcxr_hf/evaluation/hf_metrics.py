"""The figures of merit as metrics of the `evaluate` library, which collects predictions batch by batch.

    from spcxr_hf.evaluation.hf_metrics import Auroc

    metric = Auroc()
    for batch in loader:
        metric.add_batch(predictions=probabilities, references=targets)
    metric.compute()  # {"auroc": 0.91, "auroc_per_label": [0.93, None, 0.89]}

The classes are used as they are: `evaluate.load` would fetch a script from the Hub. Collected values are kept in a file
under `cache_dir` (by default that of `evaluate`) until `compute`; `Auroc(keep_in_memory=True)` makes no file.

Every `compute` takes `resamples` (by default 0) and `patients`: with `resamples=2000` a bootstrap interval,
`<figure>_ci95`, is added, whole patients drawn together. Nothing else in the package imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import numpy as np

from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation import metrics
from spcxr_hf.evaluation.bootstrap import bootstrap, patient_groups

try:
    import datasets
    from evaluate import Metric, MetricInfo
except ImportError as missing:
    raise ImportError('spcxr_hf.evaluation.hf_metrics needs evaluate: pip install "spcxr-hf[train]"') from missing

Figure = Callable[[np.ndarray], float]  # of the rows with these numbers

NUMBER, CLASS = datasets.Value("float64"), datasets.Value("int64")
NUMBERS, MASK = datasets.Sequence(NUMBER), datasets.Sequence(datasets.Sequence(datasets.Value("bool")))
LABELS = [(NUMBERS, NUMBERS), (NUMBERS, CLASS), (NUMBER, NUMBER)]  # the first pair that fits is taken

PREDICTED_CLASSES = """
Args:
    predictions: (n,) class numbers.
    references: (n,) class numbers.
"""
PROBABILITIES = """
Args:
    predictions: (n,) or (n, labels) probabilities of labels, or (n, classes) of classes that exclude each other.
    references: (n,) or (n, labels) 0, 1 or NaN where the label is missing; (n,) class numbers for classes.
        Of several labels the figure is the mean over those in which it is defined, and `<figure>_per_label` has each.
"""
MASKS = """
Args:
    predictions: (H, W) booleans for each image; the images may have different sizes.
    references: (H, W) booleans for each image.
"""
INTERVAL = """    resamples: Draws of the bootstrap interval; 0 for none.
    patients: (n,) whose image each row is, over all batches; None where unknown. By default every row is its own.
    seed: Of the bootstrap.
"""


class _Metric(Metric):
    """What the metrics share; a subclass says what its figure is on some of the rows."""

    key: ClassVar[str]  # what `compute` calls the figure
    figure: ClassVar[Callable[..., Any]]  # of predictions and references, one label or one image at a time
    inputs: ClassVar[list[tuple]]  # forms that (predictions, references) may have
    inputs_text: ClassVar[str]
    options_text: ClassVar[str] = ""
    collected_as: ClassVar[str | None] = None  # None: lists

    def _info(self) -> MetricInfo:
        forms = [datasets.Features({"predictions": one, "references": other}) for one, other in self.inputs]
        info = MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=self.inputs_text + self.options_text + INTERVAL,
            features=forms if len(forms) > 1 else forms[0],
        )
        info.format = self.collected_as  # afterwards: when it is made, it takes "numpy" for single numbers only
        return info

    def _compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        patients: Sequence[Hashable] | None = None,
        resamples: int = 0,
        seed: int = 0,
        **options: Any,
    ) -> dict:
        groups = patient_groups(patients, len(predictions))
        figure, result = self._judge(predictions, references, **options)
        value = figure(np.arange(len(predictions)))
        result = {self.key: _or_none(value)} | result
        if resamples:
            ends = bootstrap(figure, len(predictions), groups, resamples=resamples, seed=seed)
            undefined = math.isnan(value) or math.isnan(ends[0])
            result[f"{self.key}_ci95"] = None if undefined else list(ends)
        return result

    def _judge(self, predictions: Any, references: Any) -> tuple[Figure, dict]:
        """The figure of some of the rows, and what else `compute` tells."""
        raise NotImplementedError


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """NaN of nothing, and where a value is NaN."""
    return float(np.mean(values)) if len(values) else math.nan


# ---- classes -----------------------------------------------------------------------------------------------------


class _ClassMetric(_Metric):
    inputs = [(CLASS, CLASS)]
    inputs_text = PREDICTED_CLASSES


class ClassAccuracy(_ClassMetric):
    """`accuracy`, and `accuracy_per_class`: the share of its rows predicted right, None for a class without rows."""

    key = "accuracy"

    def _judge(self, predictions: Any, references: Any) -> tuple[Figure, dict]:
        predicted, truth, count = _class_numbers(predictions, references)
        recalls = metrics.class_accuracies(predicted, truth, count)
        hits = predicted == truth
        return lambda rows: float(hits[rows].mean()), {"accuracy_per_class": [_or_none(value) for value in recalls]}


class BalancedAccuracy(_ClassMetric):
    """`balanced_accuracy`: the mean over the classes that occur of the share of right predictions."""

    key = "balanced_accuracy"

    def _judge(self, predictions: Any, references: Any) -> tuple[Figure, dict]:
        predicted, truth, count = _class_numbers(predictions, references)
        occurring = np.unique(truth)
        return lambda rows: _mean(metrics.class_accuracies(predicted[rows], truth[rows], count)[occurring]), {}


def _class_numbers(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """(n,) integers both, and how many classes there are."""
    predicted, truth = np.asarray(predictions), np.asarray(references)
    for name, numbers in (("predictions", predicted), ("references", truth)):
        if numbers.dtype.kind != "i" or numbers.min() < 0:
            raise SpcxrError(f"{name} must be class numbers, 0 or more; none may be missing")
    return predicted, truth, 1 + int(max(predicted.max(), truth.max()))


# ---- labels and their probabilities --------------------------------------------------------------------------------


class _LabelMetric(_Metric):
    inputs = LABELS
    inputs_text = PROBABILITIES
    over_classes: ClassVar[bool] = False  # the metric has a separate definition for mutually exclusive classes

    def _judge(self, predictions: Any, references: Any, **options: Any) -> tuple[Figure, dict]:
        scores, truth = _stacked(predictions, "predictions"), _stacked(references, "references")
        if scores.ndim == 2 and truth.ndim == 1:
            truth = truth.astype(np.int64) if self.over_classes else _one_against_rest(truth, scores.shape[1])
        if scores.ndim == 1 or truth.ndim == 1:
            self.figure(scores, truth, **options)
            return lambda rows: self.figure(scores[rows], truth[rows], **options), {}
        if scores.shape != truth.shape:
            raise SpcxrError(f"predictions and references differ: {scores.shape} and {truth.shape}")
        per_label = [self.figure(p, y, **options) for p, y in zip(scores.T, truth.T, strict=True)]
        kept = np.flatnonzero(~np.isnan(per_label))

        def mean(rows: np.ndarray) -> float:
            return _mean([self.figure(scores[rows, one], truth[rows, one], **options) for one in kept])

        return mean, {f"{self.key}_per_label": [_or_none(value) for value in per_label]}


class Auroc(_LabelMetric):
    """`auroc`: area under the ROC curve of a label, of each of several, or of each class against the rest."""

    key = "auroc"
    figure = staticmethod(metrics.auroc)


class AveragePrecision(_LabelMetric):
    """`average_precision` of a label, of each of several, or of each class against the rest."""

    key = "average_precision"
    figure = staticmethod(metrics.average_precision)


class SensitivityAtSpecificity(_LabelMetric):
    """`sensitivity_at_specificity`: the highest sensitivity at a specificity of at least `specificity`."""

    key = "sensitivity_at_specificity"
    options_text = "    specificity: In 0 .. 1, by default 0.90.\n"
    figure = staticmethod(metrics.sensitivity_at_specificity)


class BrierScore(_LabelMetric):
    """`brier`: Brier score of a label, of each of several, or of classes that exclude each other."""

    key = "brier"
    over_classes = True
    figure = staticmethod(metrics.brier_score)


class ExpectedCalibrationError(_LabelMetric):
    """`ece`: expected calibration error of a label, of each of several, or of the top class of classes."""

    key = "ece"
    over_classes = True
    options_text = "    bins: Number of bins of equal width, by default 15.\n"
    figure = staticmethod(metrics.expected_calibration_error)


def _stacked(values: Any, what: str) -> np.ndarray:
    """(n,) or (n, labels) float64; a missing label is NaN."""
    try:
        return np.array(values, dtype=np.float64)
    except ValueError as error:
        raise SpcxrError(f"{what}: every row must be as long as the first") from error


def _one_against_rest(labels: np.ndarray, classes: int) -> np.ndarray:
    """(n,) class numbers -> (n, classes) zeros and ones."""
    if labels.min() < 0 or labels.max() >= classes:
        raise SpcxrError(f"references must be class numbers in 0 .. {classes - 1}")
    return (labels[:, None] == np.arange(classes)).astype(np.float64)


# ---- masks -------------------------------------------------------------------------------------------------------


class _MaskMetric(_Metric):
    inputs = [(MASK, MASK)]
    inputs_text = MASKS
    collected_as = "numpy"  # a list of lists of booleans takes sixty times the memory

    def _judge(self, predictions: Any, references: Any, **options: Any) -> tuple[Figure, dict]:
        pairs = ([np.array(rows, dtype=bool) for rows in pair] for pair in zip(predictions, references, strict=True))
        figures = np.array([float(self.figure(*pair, **options)) for pair in pairs])
        finite = np.isfinite(figures)
        extra = {"hausdorff95_infinite": int((~finite).sum())} if self.key == "hausdorff95" else {}
        return lambda rows: _mean(figures[rows][finite[rows]]), extra


class DiceScore(_MaskMetric):
    """Dice coefficient, the mean over the images; 1 where both masks are empty. `compute` returns "dice"."""

    key = "dice"
    figure = staticmethod(metrics.dice)


class IouScore(_MaskMetric):
    """Intersection over union, the mean over the images; 1 where both masks are empty. `compute` returns "iou"."""

    key = "iou"
    figure = staticmethod(metrics.iou)


class Hausdorff95(_MaskMetric):
    """`hausdorff95`: 95 % Hausdorff distance, the mean over the images where it is finite.

    `hausdorff95_infinite` is how many images have one empty mask of the two.
    """

    key = "hausdorff95"
    figure = staticmethod(metrics.hausdorff95)
    options_text = "    spacing: Height and width of a pixel of every image; by default the distance is in pixels.\n"
