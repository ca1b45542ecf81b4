"""Figures of merit, the bootstrap and the reports: worked examples, other implementations, edges, refusals."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn import metrics as sklearn_metrics

from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation.bootstrap import bootstrap, bootstrap_draws, bootstrap_interval, patient_groups
from spcxr_hf.evaluation.metrics import (
    _Ranking,
    auroc,
    average_precision,
    brier_score,
    classification_report,
    dice,
    expected_calibration_error,
    hausdorff95,
    iou,
    multilabel_report,
    segmentation_report,
    sensitivity_at_specificity,
)
from spcxr_hf.files import write_json


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[character == "#" for character in row] for row in rows])


def test_worked_example():
    prediction, target = mask("##..", "##.."), mask(".##.", ".##.")
    assert dice(prediction, target).item() == pytest.approx(2 * 2 / 8)
    assert iou(prediction, target).item() == pytest.approx(2 / 6)


def test_edges():
    full, empty = mask("##", "##"), mask("..", "..")
    assert dice(full, full) == iou(full, full) == 1
    assert dice(full, empty) == iou(full, empty) == 0
    assert dice(empty, empty) == iou(empty, empty) == 1


def test_a_figure_per_mask():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 3, 5, 8, 8, generator=generator) > 0.5
    together = dice(prediction, target)
    assert together.shape == (3, 5)
    assert together[1, 2] == dice(prediction[1, 2], target[1, 2])
    assert torch.allclose(iou(prediction, target), together / (2 - together))
    assert torch.equal(together, dice(target, prediction))


def test_large_masks_are_counted_exactly():
    full = torch.ones(5000, 5000, dtype=torch.bool)
    almost = full.clone()
    almost[0, 0] = False
    assert dice(full, almost).item() == pytest.approx(1 - 1 / (2 * 5000**2 - 1), abs=1e-15)


@pytest.mark.parametrize("measure", [dice, iou])
def test_masks_refused(measure):
    with pytest.raises(SpcxrError, match=r"one shape; got \(2, 2\) and \(1, 2\)"):
        measure(mask("##", "##"), mask("##"))
    with pytest.raises(SpcxrError, match="must be boolean; got torch.float32"):
        measure(mask("##").float(), mask("##"))


def test_interval_of_a_known_distribution():
    values = np.random.default_rng(1).normal(0.9, 0.1, 400)
    low, high = bootstrap_interval(values)
    standard_error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.15 * standard_error)
    assert high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.15 * standard_error)
    assert bootstrap_interval(values) == (low, high)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_patients_are_drawn_together():
    """Ten copies of each value tell no more than one."""
    values = np.random.default_rng(2).uniform(0, 1, 30)
    copies, patients = np.repeat(values, 10), [f"patient {index // 10}" for index in range(300)]
    width = np.diff(bootstrap_interval(values))
    assert np.diff(bootstrap_interval(copies, patients)) == pytest.approx(width, rel=1e-9)
    assert np.diff(bootstrap_interval(copies)) < width / 2


def test_one_value_has_no_width():
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "at least one number"),
        ({"values": [0.5, float("nan")]}, "finite"),
        ({"values": [0.5, 0.6], "groups": ["a"]}, "1 groups for 2 values"),
        ({"values": [0.5], "confidence": 1.0}, "confidence must lie in"),
        ({"values": [0.5], "resamples": 0}, "resamples be at least 1"),
    ],
)
def test_bootstrap_refusals(arguments, message):
    with pytest.raises(SpcxrError, match=message):
        bootstrap_interval(**arguments)


# ---- surface distance ----------------------------------------------------------------------------------------------


def square(top: int, left: int, side: int = 10, size: int = 40) -> np.ndarray:
    canvas = np.zeros((size, size), dtype=bool)
    canvas[top : top + side, left : left + side] = True
    return canvas


def slow_hausdorff95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float]) -> float:
    """From every surface pixel to every other, without SciPy's transform or morphology."""

    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        return np.argwhere(mask & ~inner) * np.array(spacing)

    distances = np.linalg.norm(surface(a)[:, None] - surface(b)[None], axis=-1)
    return max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))


def test_shifted_square():
    """Moved by 4 columns: the 36 pixels of the rim lie 0 .. 4 from the other's; the tenth of them that is the far side
    lies 4 away, and so the 95th percentile does."""
    assert hausdorff95(square(5, 5), square(5, 9)) == 4
    assert hausdorff95(square(5, 5), square(5, 9), spacing=(7.0, 0.25)) == 1
    assert hausdorff95(torch.from_numpy(square(5, 5)), square(5, 5)) == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.9)])
def test_surface_distance_by_hand(spacing):
    generator = np.random.default_rng(3)
    for _ in range(5):
        a, b = ndimage.gaussian_filter(generator.normal(size=(2, 30, 24)), (0, 2, 2)) > 0.05
        expected = slow_hausdorff95(a, b, spacing)
        assert expected > 0
        assert hausdorff95(a, b, spacing) == pytest.approx(expected)
        assert hausdorff95(b, a, spacing) == hausdorff95(a, b, spacing)


def test_a_speck_is_forgiven_and_a_lobe_is_not():
    speck, lobe = square(5, 5) | square(35, 35, side=1), square(5, 5) | square(25, 25, side=5)
    assert hausdorff95(speck, square(5, 5)) == 0
    assert hausdorff95(lobe, square(5, 5)) > 15


def test_empty_masks_have_no_surface():
    empty = np.zeros((40, 40), dtype=bool)
    assert hausdorff95(empty, empty) == 0
    assert hausdorff95(empty, square(5, 5)) == hausdorff95(square(5, 5), empty) == math.inf


@pytest.mark.parametrize(
    ("other", "spacing", "message"),
    [
        (square(0, 0, size=41), (1, 1), r"one shape; got \(40, 40\) bool and \(41, 41\) bool"),
        (square(0, 0).astype(float), (1, 1), "float64"),
        (square(0, 0), (1, 0), "both positive; got"),
        (square(0, 0), (1,), "height and the width"),
    ],
)
def test_surface_refusals(other, spacing, message):
    with pytest.raises(SpcxrError, match=message):
        hausdorff95(square(0, 0), other, spacing)


# ---- one label -----------------------------------------------------------------------------------------------------


def one_label(seed: int, count: int = 300, levels: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Scores of few levels, so that many tie, and targets that go with them."""
    generator = np.random.default_rng(seed)
    targets = (generator.random(count) < 0.3).astype(float)
    scores = np.clip(generator.normal(0.4 + 0.2 * targets, 0.2), 0, 1)
    return np.round(scores * levels) / levels, targets


def test_ranking_against_pairs():
    scores, targets = one_label(0)
    won = np.sign(scores[targets == 1][:, None] - scores[targets == 0][None]) / 2 + 0.5
    assert auroc(scores, targets) == pytest.approx(won.mean())
    thresholds = np.append(np.unique(scores), 2)
    reached = [
        (scores[targets == 1] >= threshold).mean()
        for threshold in thresholds
        if (scores[targets == 0] < threshold).mean() >= 0.8
    ]
    assert sensitivity_at_specificity(scores, targets, 0.8) == max(reached)
    assert 0 < max(reached) < 1


def test_specificity_is_met_exactly():
    """One of ten negatives may be called positive at 0.9: 1 - 0.9 is a little less than 1 / 10."""
    scores, targets = np.arange(12.0), np.array([0.0] * 9 + [1, 0, 1])
    assert sensitivity_at_specificity(scores, targets, 0.9) == 1
    assert sensitivity_at_specificity(scores, targets, 0.91) == 0.5
    with pytest.raises(SpcxrError, match="specificity must lie in 0 .. 1; got 90"):
        sensitivity_at_specificity(scores, targets, 90)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_counted_resamples_are_scikit_learns(seed, levels):
    """Of drawn rows, ties and all, the quick form gives what scikit-learn does."""
    scores, targets = one_label(seed, levels=levels)
    rows = np.random.default_rng(seed).integers(0, len(scores), len(scores))
    targets[::7] = np.nan
    expected = _Ranking(scores[rows], targets[rows], 0.85).figures()
    assert _Ranking(scores, targets, 0.85).resampled(rows) == pytest.approx(expected, abs=1e-12)
    known = rows[~np.isnan(targets[rows])]
    assert expected[0] == pytest.approx(sklearn_metrics.roc_auc_score(targets[known], scores[known]))
    assert expected[1] == pytest.approx(sklearn_metrics.average_precision_score(targets[known], scores[known]))


def test_constant_scores_rank_nothing():
    scores, targets = np.full(10, 0.3), np.array([1.0] * 4 + [0] * 6)
    for figures in (_Ranking(scores, targets, 0.9).figures(), _Ranking(scores, targets, 0.9).resampled(np.arange(10))):
        assert figures == pytest.approx([0.5, 0.4, 0.0])


@pytest.mark.parametrize("measure", [auroc, average_precision, sensitivity_at_specificity])
def test_one_class_has_no_ranking(measure):
    assert math.isnan(measure([0.1, 0.2], [1, 1]))
    assert math.isnan(measure([0.1, 0.2, 0.3], [0, np.nan, 0]))
    assert measure(torch.tensor([0.1, 0.9, 0.5]), [0, 1, None]) == 1


def test_brier_score():
    scores, targets = one_label(1)
    assert brier_score(scores, targets) == pytest.approx(sklearn_metrics.brier_score_loss(targets, scores))
    two = np.stack([1 - scores, scores], axis=1)
    assert brier_score(two, targets.astype(int)) == pytest.approx(brier_score(scores, targets))
    # Three classes, by hand: 0.09 + 0.04 + 0.01, and 0.25 + 0.64 + 0.09.
    assert brier_score([[0.7, 0.2, 0.1], [0.5, 0.2, 0.3]], [0, 1]) == pytest.approx((0.14 + 0.98) / 2)
    assert brier_score([0.5, 0.9], [1, np.nan]) == 0.25
    assert math.isnan(brier_score([0.5], [np.nan]))


def test_calibration_by_hand():
    """Bins (0, 0.2], (0.2, 0.4], ...: 0.2 lies in the first, 0.21 in the second."""
    probabilities, targets = [0.1, 0.2, 0.21, 0.9, 0.9], [0, 1, 0, 1, 0]
    gaps = [abs(0.1 + 0.2 - 1), 0.21, abs(1.8 - 1)]
    assert expected_calibration_error(probabilities, targets, bins=5) == pytest.approx(sum(gaps) / 5)
    # Of classes: the top one's probability, and whether it is right.
    rows = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]]
    assert expected_calibration_error(rows, [0, 0, 2], bins=5) == pytest.approx((abs(1.2 - 2) + 0.7) / 3)
    with pytest.raises(SpcxrError, match="bins must be at least 1"):
        expected_calibration_error(rows, [0, 0, 2], bins=0)


def test_calibration_of_a_calibrated_sample():
    generator = np.random.default_rng(4)
    probabilities = generator.random(100_000)
    targets = (generator.random(100_000) < probabilities).astype(float)
    assert expected_calibration_error(probabilities, targets) < 0.01
    assert expected_calibration_error(probabilities**2, targets) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)


# ---- bootstrap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, [f"patient {index % 17}" for index in range(60)]])
def test_any_statistic_has_the_draws_of_the_mean(groups):
    values = np.random.default_rng(5).normal(size=60)
    interval = bootstrap(lambda rows: values[rows].mean(), 60, groups, resamples=300)
    assert interval == pytest.approx(bootstrap_interval(values, groups, resamples=300), abs=1e-12)


def test_a_drawn_patient_brings_every_image():
    patients = ["a", "b", "a", "c", "b", "a"]
    drawn = bootstrap_draws(lambda rows: np.bincount(rows, minlength=6), 6, patients, resamples=200)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 0] == drawn[:, 5]).all()
    assert (drawn[:, 1] == drawn[:, 4]).all()
    assert (drawn[:, 0] + drawn[:, 1] + drawn[:, 3] == 3).all()  # as many patients as there are
    assert drawn.sum(axis=1).std() > 0


def test_undefined_resamples_are_skipped():
    targets = np.array([1.0, 0, 0, 0])
    undefined = np.isnan(bootstrap_draws(lambda rows: auroc(targets[rows], targets[rows]), 4, resamples=500))
    assert undefined.mean() == pytest.approx((3 / 4) ** 4 + (1 / 4) ** 4, abs=0.07)
    assert bootstrap(lambda rows: 1.0 if targets[rows].any() else math.nan, 4) == (1.0, 1.0)
    assert np.isnan(bootstrap(lambda rows: math.nan, 4)).all()


def test_intervals_cover_the_truth():
    """The AUROC of two normal distributions one standard deviation apart, from 60 sets of 120 patients with four images
    each: by patient the interval covers it about as often as it says; by image it does not."""
    truth = 0.5 * (1 + math.erf(1 / 2))
    covered = {"patient": 0, "image": 0}
    for seed in range(60):
        generator = np.random.default_rng(seed)
        targets = np.repeat((np.arange(120) % 2).astype(float), 4)
        scores = np.repeat(generator.normal(targets[::4]), 4) + generator.normal(0, 1e-3, 480)
        ranking, patients = _Ranking(scores, targets, 0.9), np.repeat(np.arange(120), 4).tolist()
        for name, groups in (("patient", patients), ("image", None)):
            low, high = bootstrap(lambda rows, ranking=ranking: ranking.resampled(rows)[0], 480, groups, resamples=200)
            covered[name] += low <= truth <= high
    assert covered["patient"] >= 52
    assert covered["image"] <= 48


def test_unknown_patients_are_their_own():
    groups = patient_groups(["a", None, "a", float("nan"), "", np.str_("b")], 6)
    assert groups is not None
    assert groups[0] == groups[2]
    assert len(set(groups)) == 5
    assert patient_groups(None, 3) is None
    with pytest.raises(SpcxrError, match="2 patients for 3 rows"):
        patient_groups(["a", "b"], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "no rows"),
        ({"count": 2, "groups": ["a"]}, "1 groups for 2 rows"),
        ({"count": 2, "confidence": 0}, "confidence must lie in"),
        ({"count": 2, "resamples": 0}, "resamples be at least 1"),
    ],
)
def test_bootstrap_of_a_statistic_refusals(arguments, message):
    with pytest.raises(SpcxrError, match=message):
        bootstrap(lambda rows: 0.0, **arguments)


# ---- reports -------------------------------------------------------------------------------------------------------


def three_classes(seed: int = 0, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, count, p=[0.5, 0.3, 0.2])
    probabilities = 0.6 * generator.dirichlet(np.ones(3), count) + 0.4 * np.eye(3)[generator.permutation(labels)]
    return 0.5 * probabilities + 0.5 * generator.dirichlet(np.ones(3), count) * 0.4 + 0.3 * np.eye(3)[labels], labels


def assert_intervals(entry: dict) -> None:
    """Every figure has an interval that holds it, the calibration error aside, whose resamples lean high."""
    ends = {name: value for name, value in entry.items() if name.endswith("_ci95")}
    assert ends
    for name, (low, high) in ends.items():
        figure = entry[name.removesuffix("_ci95")]
        assert 0 <= low < high
        assert low <= figure <= high or name.endswith("ece_ci95")
        assert high - low < 0.5 * max(1, figure)


def test_classification_report():
    probabilities, labels = three_classes()
    names = ["normal", "bacterial", "viral"]
    patients = [f"patient {index // 2}" for index in range(200)]
    report = classification_report(torch.from_numpy(probabilities), labels, names, patients, resamples=300)
    predicted = probabilities.argmax(axis=1)
    assert report["images"] == 200
    assert report["patients"] == 100
    assert report["accuracy"] == pytest.approx((predicted == labels).mean())
    assert report["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    rest = {"multi_class": "ovr", "average": "macro"}
    assert report["macro_auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, probabilities, **rest))
    assert report["brier"] == brier_score(probabilities, labels)
    assert report["ece"] == expected_calibration_error(probabilities, labels)
    recalls = sklearn_metrics.recall_score(labels, predicted, average=None)
    assert [entry["accuracy"] for entry in report["classes"].values()] == pytest.approx(list(recalls))
    viral = report["classes"]["viral"]
    assert viral["images"] == (labels == 2).sum()
    assert viral["sensitivity_at_specificity"] == sensitivity_at_specificity(probabilities[:, 2], labels == 2)
    for entry in (report, *report["classes"].values()):
        assert entry["undefined_resamples"] == {}
        assert_intervals(entry)
    assert json.loads(json.dumps(report)) == report


def test_reported_intervals_are_the_bootstraps():
    probabilities, labels = three_classes()
    patients = [f"patient {index // 2}" for index in range(200)]
    report = classification_report(probabilities, labels, ["a", "b", "c"], patients, resamples=100, seed=3)
    truth = (labels == 1).astype(float)
    expected = bootstrap(lambda rows: auroc(probabilities[rows, 1], truth[rows]), 200, patients, resamples=100, seed=3)
    assert report["classes"]["b"]["auroc_ci95"] == pytest.approx(expected)


def test_a_class_without_images():
    probabilities, labels = three_classes()
    present = labels != 2
    report = classification_report(probabilities[present], labels[present], ["a", "b", "c"], resamples=50)
    empty = report["classes"]["c"]
    assert empty["images"] == 0
    assert {empty[name] for name in ("accuracy", "accuracy_ci95", "auroc", "auroc_ci95")} == {None}
    others = [report["classes"][name]["accuracy"] for name in "ab"]
    assert report["balanced_accuracy"] == pytest.approx(np.mean(others))
    assert report["balanced_accuracy_ci95"] is not None


def test_one_class_only():
    report = classification_report([[0.9, 0.1], [0.4, 0.6]], [0, 0], ["a", "b"], resamples=20)
    assert report["accuracy"] == report["balanced_accuracy"] == 0.5
    assert report["macro_auroc"] is None
    assert report["classes"]["a"]["auroc"] is None


def some_labels(count: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """Three labels of which a fifth is missing; one that nobody has; one that only the first has."""
    columns = [one_label(seed, count, levels=50) for seed in range(5)]
    probabilities, targets = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
    targets[np.random.default_rng(9).random(targets.shape) < 0.2] = np.nan
    targets[:, 3:] = 0
    targets[0, 4] = 1
    return probabilities, targets


def test_multilabel_report():
    probabilities, targets = some_labels()
    names = ["Edema", "Mass", "Nodule", "Hernia", "Fracture"]
    patients = [None if index % 5 == 0 else f"patient {index // 2}" for index in range(240)]
    report = multilabel_report(probabilities, targets, names, patients, resamples=300)
    for number, name in enumerate(names[:3]):
        known = ~np.isnan(targets[:, number])
        truth, scores, entry = targets[known, number], probabilities[known, number], report["labels"][name]
        assert entry["missing"] == (~known).sum() > 20
        assert entry["positives"] == truth.sum()
        assert entry["positives"] + entry["negatives"] + entry["missing"] == 240
        assert entry["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, scores))
        assert entry["average_precision"] == pytest.approx(sklearn_metrics.average_precision_score(truth, scores))
        assert entry["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(truth, scores))
        assert entry["ece"] == expected_calibration_error(scores, truth)
        assert_intervals(entry)
    assert report["labels_in_mean"] == ["Edema", "Mass", "Nodule", "Fracture"]
    means = [report["labels"][name]["auroc"] for name in report["labels_in_mean"]]
    assert report["mean_auroc"] == pytest.approx(np.mean(means))
    assert report["images"] == 240
    assert report["patients"] == len(set(patient_groups(patients, 240)))


def test_a_label_with_one_class_is_none():
    probabilities, targets = some_labels()
    report = multilabel_report(probabilities, targets, list("abcde"), resamples=300)
    none, rare = report["labels"]["d"], report["labels"]["e"]
    assert (none["positives"], none["negatives"], none["missing"]) == (0, 240, 0)
    assert none["auroc"] is none["auroc_ci95"] is none["average_precision"] is None
    assert none["sensitivity_at_specificity"] is None
    assert none["undefined_resamples"] == {}
    assert none["brier"] == pytest.approx((probabilities[:, 3] ** 2).mean())
    # The one positive is missing from 1 / e of the resamples; where it is missing, so is the mean.
    skipped = rare["undefined_resamples"]["auroc"]
    assert skipped == pytest.approx(300 / math.e, abs=30)
    assert report["undefined_resamples"]["mean_auroc"] == skipped
    assert "brier" not in rare["undefined_resamples"]


def test_all_labels_missing():
    report = multilabel_report([[0.5], [0.6]], [[np.nan], [np.nan]], ["a"], resamples=5)
    assert report["labels"]["a"]["missing"] == 2
    assert report["labels"]["a"]["brier"] is report["mean_auroc"] is report["mean_auroc_ci95"] is None
    assert report["labels_in_mean"] == []


def changed(values: np.ndarray, place, value) -> np.ndarray:
    copy = values.copy()
    copy[place] = value
    return copy


CLASS_PROBABILITIES, CLASS_LABELS = three_classes(count=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": changed(CLASS_PROBABILITIES, (4, 1), np.nan)}, "of 'b' must lie in 0 .. 1; row 4 holds nan"),
        ({"probabilities": changed(CLASS_PROBABILITIES, (0, 2), 1.5)}, "of 'c' must lie in 0 .. 1; row 0 holds 1.5"),
        ({"probabilities": CLASS_PROBABILITIES / 2}, "row 0 sums to 0.5"),
        ({"probabilities": CLASS_PROBABILITIES[:, :2]}, r"must be \(n, 3\), a column for each name; got \(20, 2\)"),
        ({"probabilities": "x"}, "array of numbers"),
        ({"probabilities": np.empty((0, 3))}, "probabilities are empty"),
        ({"labels": CLASS_LABELS[:19]}, r"labels must be \(20,\) whole numbers; got \(19,\)"),
        ({"labels": CLASS_LABELS.astype(float)}, "whole numbers; got .* float64"),
        ({"labels": changed(CLASS_LABELS, 7, 3)}, "labels must lie in 0 .. 2; row 7 holds 3"),
        ({"labels": changed(CLASS_LABELS, 7, -1)}, "row 7 holds -1"),
        ({"class_names": ["a", "b", "b"]}, "two names are the same: a, b, b"),
        ({"patients": ["a"]}, "1 patients for 20 rows"),
        ({"resamples": 0}, "resamples be at least 1"),
    ],
)
def test_classification_refusals(change, message):
    good = {"probabilities": CLASS_PROBABILITIES, "labels": CLASS_LABELS, "class_names": ["a", "b", "c"]}
    with pytest.raises(SpcxrError, match=message):
        classification_report(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": [[0, 1], [1, -1]]}, "targets of 'b' must be 0, 1 or NaN .missing.; row 1 holds -1"),
        ({"targets": [[0, 1]]}, r"one shape; got \(2, 2\) and \(1, 2\)"),
        ({"probabilities": [[0.1, 0.2], [-0.1, 0.5]]}, "probabilities of 'a' must lie in 0 .. 1; row 1 holds -0.1"),
        ({"probabilities": [[0.1, 0.2], [0.5, np.nan]]}, "probabilities of 'b' .* row 1 holds nan"),
        ({"names": ["a"]}, r"must be \(n, 1\)"),
    ],
)
def test_multilabel_refusals(change, message):
    good = {"probabilities": [[0.1, 0.2], [0.3, 0.4]], "targets": [[0, 1], [1, np.nan]], "names": ["a", "b"]}
    with pytest.raises(SpcxrError, match=message):
        multilabel_report(**(good | change))


@pytest.mark.parametrize(
    ("measure", "scores", "targets", "message"),
    [
        (auroc, [0.1, np.inf], [0, 1], "scores must be finite; row 1 holds inf"),
        (auroc, [0.1, 0.2], [0, 1, 1], r"got \(2,\) and \(3,\)"),
        (average_precision, [0.1, 0.2], [0, 2], "row 1 holds 2"),
        (brier_score, [0.1, 1.2], [0, 1], "probabilities must lie in 0 .. 1; row 1 holds 1.2"),
        (expected_calibration_error, [0.1, 0.2], [0, 0.5], "row 1 holds 0.5"),
        (expected_calibration_error, [0.1, 0.2], [0], r"got \(2,\) and \(1,\)"),
    ],
)
def test_label_refusals(measure, scores, targets, message):
    with pytest.raises(SpcxrError, match=message):
        measure(scores, targets)


def test_segmentation_report():
    targets = [square(5, 5), torch.from_numpy(square(8, 8, size=50)), square(5, 5), square(2, 2)]
    predictions = (mask for mask in [square(5, 9), square(8, 8, size=50), np.zeros((40, 40), bool), square(2, 4)])
    report = segmentation_report(predictions, targets, ["a", "b", "b", None], resamples=200)
    assert report["dice"] == pytest.approx((0.6 + 1 + 0 + 0.8) / 4)
    assert report["iou"] == pytest.approx((60 / 140 + 1 + 0 + 80 / 120) / 4)
    assert report["hausdorff95"] == pytest.approx((4 + 0 + 2) / 3)
    assert report["hausdorff95_infinite"] == 1
    assert report["dice_tenth_percentile"] == pytest.approx(0.18)
    assert report["patients"] == 3
    assert report["dice_ci95"] == pytest.approx(bootstrap_interval([0.6, 1, 0, 0.8], list("abbc"), resamples=200))
    assert report["hausdorff95_ci95"][0] < 2 < report["hausdorff95_ci95"][1]


def test_segmentation_spacing_of_each_image():
    masks = [square(5, 5), square(5, 9)], [square(5, 9), square(5, 5)]
    assert segmentation_report(*masks, spacing=(1, 0.5), resamples=2)["hausdorff95"] == 2
    assert segmentation_report(*masks, spacing=[(1, 0.5), (1, 2)], resamples=2)["hausdorff95"] == (2 + 8) / 2


@pytest.mark.parametrize(
    ("predictions", "targets", "options", "message"),
    [
        ([], [], {}, "no rows"),
        ([square(0, 0)] * 2, [square(0, 0)], {}, "as many predictions as targets; one of them ends after 1"),
        ([square(0, 0)] * 2, [square(0, 0), square(0, 0, size=41)], {}, "image 1: masks must be"),
        ([square(0, 0)] * 2, [square(0, 0)] * 2, {"spacing": [(1, 1)]}, "image 1: spacing"),
        ([square(0, 0)] * 2, [square(0, 0)] * 2, {"patients": ["a"]}, "1 patients for 2 rows"),
    ],
)
def test_segmentation_refusals(predictions, targets, options, message):
    with pytest.raises(SpcxrError, match=message):
        segmentation_report(predictions, targets, **options)


@pytest.mark.parametrize(
    ("module", "call"),
    [("sklearn", lambda: auroc([0.1, 0.2], [0, 1])), ("scipy", lambda: hausdorff95(square(0, 0), square(0, 1)))],
)
def test_a_missing_package_is_named(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SpcxrError, match=r'is missing: pip install "spcxr-hf\[train\]"'):
        call()


# ---- results -------------------------------------------------------------------------------------------------------


def test_results_are_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    result = {
        "name": "é",
        "figure": np.float32(0.5),
        "undefined": [math.nan, -math.inf, np.nan],
        "array": np.array([1.0, np.nan]),
        "tensor": torch.tensor([1, 2]),
        "count": np.int64(3),
        "nested": ({"true": True},),
    }
    write_json(path, {"old": 1})
    write_json(path, result)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {
        "name": "é",
        "figure": 0.5,
        "undefined": [None, None, None],
        "array": [1.0, None],
        "tensor": [1, 2],
        "count": 3,
        "nested": [{"true": True}],
    }
    assert text.startswith('{\n  "name"')
    assert text.endswith("}\n")
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_unwritable_results(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(SpcxrError, match="file/results.json: cannot be written"):
        write_json(file / "results.json", {})
    with pytest.raises(SpcxrError, match="file: the results cannot be written as JSON"):
        write_json(file, {"object": object()})
    (tmp_path / "folder").mkdir()
    with pytest.raises(SpcxrError, match="folder: cannot be written"):
        write_json(tmp_path / "folder", {})
    assert file.read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
