"""The metrics of the `evaluate` library: same figures as the plain functions, offline, nothing left behind."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

pytest.importorskip("evaluate")

from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation import hf_metrics, metrics
from spcxr_hf.evaluation.hf_metrics import (
    Auroc,
    AveragePrecision,
    BalancedAccuracy,
    BrierScore,
    ClassAccuracy,
    DiceScore,
    ExpectedCalibrationError,
    Hausdorff95,
    IouScore,
    SensitivityAtSpecificity,
)

ROOT = Path(__file__).resolve().parents[2]
OF_LABELS = {
    Auroc: ("auroc", metrics.auroc),
    AveragePrecision: ("average_precision", metrics.average_precision),
    SensitivityAtSpecificity: ("sensitivity_at_specificity", metrics.sensitivity_at_specificity),
    BrierScore: ("brier", metrics.brier_score),
    ExpectedCalibrationError: ("ece", metrics.expected_calibration_error),
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Build a metric that keeps its files in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    return lambda kind: kind(cache_dir=str(tmp_path), experiment_id="test")


def labels(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(count, 3) probabilities and targets, a fifth of which is missing."""
    generator = np.random.default_rng(0)
    targets = (generator.random((count, 3)) < 0.4).astype(float)
    probabilities = np.clip(generator.normal(0.4 + 0.2 * targets, 0.2), 0, 1)
    targets[generator.random(targets.shape) < 0.2] = np.nan
    return probabilities, targets


def classes(count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(count, 3) probabilities and (count,) class numbers."""
    generator = np.random.default_rng(1)
    numbers = generator.integers(0, 3, count)
    return 0.6 * generator.dirichlet(np.ones(3), count) + 0.4 * np.eye(3)[generator.permutation(numbers)], numbers


@pytest.mark.parametrize("kind", OF_LABELS)
def test_several_labels(make, kind):
    key, function = OF_LABELS[kind]
    probabilities, targets = labels()
    result = make(kind).compute(predictions=probabilities, references=targets)
    expected = [function(probabilities[:, one], targets[:, one]) for one in range(3)]
    assert result == {key: pytest.approx(np.mean(expected)), f"{key}_per_label": expected}


@pytest.mark.parametrize("kind", OF_LABELS)
def test_one_label(make, kind):
    key, function = OF_LABELS[kind]
    probabilities, targets = labels()
    result = make(kind).compute(predictions=torch.from_numpy(probabilities[:, 0]), references=targets[:, 0].tolist())
    assert result == {key: function(probabilities[:, 0], targets[:, 0])}


@pytest.mark.parametrize("kind", OF_LABELS)
def test_classes_that_exclude_each_other(make, kind):
    key, function = OF_LABELS[kind]
    probabilities, numbers = classes()
    result = make(kind).compute(predictions=probabilities, references=numbers)
    if kind in (BrierScore, ExpectedCalibrationError):
        assert result == {key: function(probabilities, numbers)}
    else:
        assert result[key] == pytest.approx(
            np.mean([function(probabilities[:, one], numbers == one) for one in range(3)])
        )


@pytest.mark.parametrize("kind", OF_LABELS)
def test_batch_by_batch(make, kind):
    probabilities, targets = labels()
    metric = make(kind)
    for part in np.array_split(np.arange(len(targets)), 4):
        metric.add_batch(predictions=probabilities[part], references=targets[part])
    together = metric.compute()
    assert together == make(kind).compute(predictions=probabilities, references=targets)
    metric.add(prediction=probabilities[0], reference=np.ones(3))  # and it can be used again
    metric.add(prediction=probabilities[1], reference=np.zeros(3))
    assert metric.compute() != together


def test_scores_keep_their_digits(make):
    """In float32 these two would tie."""
    assert make(Auroc).compute(predictions=[0.5, 0.5 + 1e-12], references=[0, 1]) == {"auroc": 1.0}


def test_a_label_with_one_class(make):
    result = make(Auroc).compute(predictions=[[0.2, 0.3], [0.8, 0.4]], references=[[0, None], [1, 1]])
    assert result == {"auroc": 1.0, "auroc_per_label": [1.0, None]}
    assert make(Auroc).compute(predictions=[0.2, 0.8], references=[1, 1]) == {"auroc": None}


def test_options(make):
    probabilities, targets = labels()
    scores, truth = probabilities[:, 0], targets[:, 0]
    found = make(SensitivityAtSpecificity).compute(predictions=scores, references=truth, specificity=0.5)
    assert found == {"sensitivity_at_specificity": metrics.sensitivity_at_specificity(scores, truth, 0.5)}
    ece = make(ExpectedCalibrationError).compute(predictions=scores, references=truth, bins=3)
    assert ece == {"ece": metrics.expected_calibration_error(scores, truth, 3)}
    assert ece != make(ExpectedCalibrationError).compute(predictions=scores, references=truth)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_predicted_classes(make):
    probabilities, truth = classes()
    predicted = probabilities.argmax(axis=1)
    accuracy = make(ClassAccuracy).compute(predictions=predicted, references=truth)
    assert accuracy == {
        "accuracy": pytest.approx((predicted == truth).mean()),
        "accuracy_per_class": pytest.approx(list(sklearn_metrics.recall_score(truth, predicted, average=None))),
    }
    balanced = make(BalancedAccuracy).compute(predictions=predicted, references=truth)
    assert balanced["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, predicted))
    # A class that only predictions hold.
    assert make(BalancedAccuracy).compute(predictions=[0, 2, 1], references=[0, 0, 1]) == {"balanced_accuracy": 0.75}
    few = make(ClassAccuracy).compute(predictions=[0, 2, 1], references=[0, 0, 1])
    assert few["accuracy_per_class"] == [0.5, 1.0, None]


def masks() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two images of different sizes; the squares of the first lie two columns apart."""
    first, moved = np.zeros((2, 20, 24), dtype=bool)
    first[5:15, 5:15] = moved[5:15, 7:17] = True
    return [first, np.ones((7, 9), dtype=bool)], [moved, np.ones((7, 9), dtype=bool)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (DiceScore, {"dice": (0.8 + 1) / 2}),
        (IouScore, {"iou": (80 / 120 + 1) / 2}),
        (Hausdorff95, {"hausdorff95": 1.0, "hausdorff95_infinite": 0}),
    ],
)
def test_masks(make, kind, expected):
    predictions, targets = masks()
    assert make(kind).compute(predictions=predictions, references=targets) == pytest.approx(expected)
    metric = make(kind)
    for prediction, target in zip(predictions, targets, strict=True):
        metric.add_batch(predictions=torch.from_numpy(prediction[None]), references=torch.from_numpy(target[None]))
    assert metric.compute() == pytest.approx(expected)


def test_masks_of_one_size(make):
    """Arrow gives these back as one array."""
    generator = np.random.default_rng(2)
    predictions, targets = generator.random((2, 3, 8, 8)) > 0.5
    expected = metrics.dice(torch.from_numpy(predictions), torch.from_numpy(targets)).mean().item()
    assert make(DiceScore).compute(predictions=predictions, references=targets)["dice"] == pytest.approx(expected)


def test_distances_without_end(make):
    predictions, targets = masks()
    predictions[1] = ~predictions[1]
    metric = make(Hausdorff95)
    result = metric.compute(predictions=predictions, references=targets, spacing=(1.0, 0.5))
    assert result == {"hausdorff95": 1.0, "hausdorff95_infinite": 1}
    nothing = metric.compute(predictions=predictions[1:], references=targets[1:], resamples=3)
    assert nothing == {"hausdorff95": None, "hausdorff95_infinite": 1, "hausdorff95_ci95": None}


def test_intervals_by_patient(make):
    probabilities, targets = labels()
    scores, truth = probabilities[:, 0], targets[:, 0]
    patients = [f"patient {index // 3}" for index in range(60)]
    inputs = {"predictions": scores, "references": truth, "resamples": 50}
    result = make(Auroc).compute(**inputs, patients=patients)
    report = metrics.multilabel_report(scores[:, None], truth[:, None], ["a"], patients, resamples=50)
    assert result["auroc_ci95"] == pytest.approx(report["labels"]["a"]["auroc_ci95"])
    assert result["auroc_ci95"] != make(Auroc).compute(**inputs)["auroc_ci95"]
    several = make(Auroc).compute(predictions=probabilities, references=targets, resamples=50)
    expected = metrics.multilabel_report(probabilities, targets, list("abc"), resamples=50)["mean_auroc_ci95"]
    assert several["auroc_ci95"] == pytest.approx(expected)
    predictions, references = classes()
    balanced = make(BalancedAccuracy).compute(
        predictions=predictions.argmax(axis=1), references=references, patients=patients, resamples=50
    )
    whole = metrics.classification_report(predictions, references, list("abc"), patients, resamples=50)
    assert balanced["balanced_accuracy_ci95"] == pytest.approx(whole["balanced_accuracy_ci95"])


@pytest.mark.parametrize(
    ("kind", "predictions", "references", "options", "message"),
    [
        (Auroc, [0.1, np.nan], [0, 1], {}, "scores must be finite; row 1 holds nan"),
        (BrierScore, [0.1, 1.5], [0, 1], {}, "must lie in 0 .. 1; row 1 holds 1.5"),
        (Auroc, [0.1, 0.2], [0, 2], {}, "must be 0, 1 or NaN"),
        (Auroc, [[0.1, 0.9]], [2], {}, "class numbers in 0 .. 1"),
        (Auroc, [[0.1, 0.9]], [[1.0]], {}, r"differ: \(1, 2\) and \(1, 1\)"),
        (Auroc, [[0.1, 0.9], [0.2]], [[1, 0], [0]], {}, "predictions: every row must be as long as the first"),
        (BrierScore, [[0.1, 0.2]], [0], {}, "row 0 sums to 0.3"),
        (ClassAccuracy, [0, -1], [0, 1], {}, "predictions must be class numbers"),
        (Auroc, [0.1, 0.9], [0, 1], {"patients": ["a"]}, "1 patients for 2 rows"),
        (DiceScore, [np.ones((2, 3), bool)], [np.ones((3, 3), bool)], {}, "masks must be"),
    ],
)
def test_refusals(make, kind, predictions, references, options, message):
    with pytest.raises(SpcxrError, match=message):
        make(kind).compute(predictions=predictions, references=references, **options)


def test_every_metric_says_what_it_wants(make):
    kinds = [*OF_LABELS, ClassAccuracy, BalancedAccuracy, DiceScore, IouScore, Hausdorff95]
    ours = [value for value in vars(hf_metrics).values() if getattr(value, "__module__", "").endswith("hf_metrics")]
    assert set(kinds) == {value for value in ours if hasattr(value, "compute") and value.__name__[0] != "_"}
    for kind in kinds:
        metric = make(kind)
        assert metric.description == kind.__doc__
        assert "predictions:" in metric.compute.__doc__
        assert "patients:" in metric.compute.__doc__


def test_nothing_is_left_behind(make, tmp_path):
    metric = make(Auroc)
    metric.add_batch(predictions=[0.1, 0.9], references=[0, 1])
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == [".arrow"]
    metric.compute()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_without_evaluate_the_import_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "spcxr_hf.evaluation.hf_metrics")
    monkeypatch.delattr("spcxr_hf.evaluation.hf_metrics")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r'needs evaluate: pip install "spcxr-hf\[train\]"'):
        import spcxr_hf.evaluation.hf_metrics  # noqa: F401


def test_nothing_else_needs_this_module():
    """Not at its top level, that is: the package imports without the extra."""
    for path in (ROOT / "spcxr_hf").glob("*.py"):
        tops = ast.parse(path.read_text(encoding="utf-8")).body
        imports = [ast.unparse(node) for node in tops if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("evaluate_metrics" in line for line in imports), path.name
