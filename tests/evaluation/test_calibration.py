"""Calibration: what is fitted is the optimum, folding changes nothing else, thresholds do what they are called."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForImageClassification
from spcxr_hf.evaluation.calibration import (
    POINTS,
    Calibration,
    decision_figures,
    fit_calibration,
    fit_temperature,
    fold_into_head,
    operating_points,
    reliability_bins,
    set_operating_points,
    target_values,
    thresholds,
    to_probabilities,
)
from spcxr_hf.evaluation.metrics import expected_calibration_error
from tests.common import build, pixels, tiny_config

NAMES = ["normal", "bacterial", "viral"]
JOINED = "bacterial + viral"


def one_hot(labels: torch.Tensor, classes: int = 3) -> torch.Tensor:
    return nn.functional.one_hot(labels, classes).float()


def drawn(seed: int, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose softmax is the true distribution of the classes drawn with it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(count, 3, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator).flatten()


@pytest.mark.parametrize("hotter", [0.25, 1.0, 4.0])
def test_the_temperature_undoes_what_was_done(hotter):
    logits, labels = drawn(0)
    assert fit_temperature(hotter * logits, one_hot(labels)) == pytest.approx(hotter, rel=0.05)


def test_the_temperature_has_the_least_cross_entropy():
    logits, labels = drawn(1, 60)

    def cost(temperature: float) -> float:
        return nn.functional.cross_entropy(logits.double() / temperature, labels).item()

    found = fit_temperature(logits, one_hot(labels))
    assert cost(found) < min(cost(found * 1.02), cost(found / 1.02))


def test_a_temperature_passes_over_missing_labels():
    logits, labels = drawn(2, 50)
    targets = one_hot(labels)
    more = torch.cat([targets, torch.full((5, 3), math.nan)])
    others = torch.cat([logits, torch.full((5, 3), 9.0)])
    assert fit_temperature(others, more) == pytest.approx(fit_temperature(logits, targets))


def test_everything_right_is_as_cold_as_can_be():
    assert fit_temperature(torch.eye(3), torch.eye(3)) == pytest.approx(1e-3)


def test_labels_are_calibrated_apart():
    generator = torch.Generator().manual_seed(3)
    true = torch.randn(6000, 2, generator=generator, dtype=torch.float64) * 2 - 1
    targets = torch.bernoulli(true.sigmoid(), generator=generator)
    scale, bias = torch.tensor([0.5, 3.0], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = fit_calibration((true - bias) / scale, targets, multi_label=True)
    torch.testing.assert_close(found.scale, scale, rtol=0.08, atol=0)
    torch.testing.assert_close(found.bias, bias, rtol=0.1, atol=0.1)


def test_a_label_has_the_least_cost_by_platt():
    """His targets by hand: of 3 positives 4/5, of 8 negatives 1/10; and the prior on the logarithm of the scale."""
    logits = torch.tensor([2.0, -0.5, 1.0, -1.0, 0.3, -2.0, -1.5, 0.1, -0.7, -3.0, 0.6], dtype=torch.float64)
    truth = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    wanted = torch.where(truth > 0, 0.8, 0.1).double()

    def cost(scale: float, bias: float) -> float:
        mapped = scale * logits + bias
        told = nn.functional.binary_cross_entropy_with_logits(mapped, wanted, reduction="sum").item()
        return told + math.log(scale) ** 2 / 2

    found = fit_calibration(logits[:, None], truth[:, None], multi_label=True)
    scale, bias = found.scale.item(), found.bias.item()
    others = [(scale * 1.003, bias), (scale / 1.003, bias), (scale, bias + 0.003), (scale, bias - 0.003)]
    assert cost(scale, bias) < min(cost(*one) for one in others)


def test_a_label_keeps_its_order_even_where_it_is_the_wrong_one():
    logits = torch.linspace(-2, 2, 40)[:, None]
    backwards = (logits < 0).float()
    found = fit_calibration(logits, backwards, multi_label=True)
    assert 0 < found.scale.item() < 0.5


def test_a_label_without_both_sides_stays_as_it_is():
    logits, targets = torch.randn(20, 2), torch.zeros(20, 2)
    targets[:5, 1], targets[5:9, 1], targets[3, 0] = 1, math.nan, math.nan
    found = fit_calibration(logits, targets, multi_label=True)
    assert (found.scale[0], found.bias[0]) == (1, 0)
    assert found.bias[1] != 0


def test_few_positives_told_without_error_stay_finite():
    logits = torch.cat([torch.full((30, 1), -3.0), torch.full((2, 1), 3.0)])
    found = fit_calibration(logits, (logits > 0).float(), multi_label=True)
    probabilities = found(logits).sigmoid()
    assert 0.001 < probabilities.min() < 0.1 and 0.6 < probabilities.max() < 0.999


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), r"\(4, 3\), \(4, 2\)"),
        (torch.zeros(4), torch.zeros(4), r"must be \(n, classes\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "must be"),
        (torch.full((2, 2), math.nan), torch.eye(2), "not a finite"),
    ],
)
def test_what_cannot_be_fitted(logits, targets, message):
    with pytest.raises(SpcxrError, match=message):
        fit_calibration(logits, targets, multi_label=True)


@pytest.mark.parametrize("multi_label", [False, True])
def test_folded_is_the_same_as_mapped(multi_label, tmp_path):
    problem = "multi_label_classification" if multi_label else "single_label_classification"
    model = build(SpcxrForImageClassification, tiny_config(problem_type=problem))
    images = pixels(batch=5)
    with torch.no_grad():
        plain = model(images).logits
    calibration = fit_calibration(plain, one_hot(torch.tensor([0, 1, 2, 0, 1])), multi_label)
    assert not torch.equal(calibration.scale, torch.ones(3))
    fold_into_head(model, calibration)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        folded = SpcxrForImageClassification.from_pretrained(tmp_path)(images).logits
    torch.testing.assert_close(folded, calibration(plain).float(), rtol=1e-5, atol=1e-5)
    assert multi_label or torch.equal(folded.argmax(dim=1), plain.argmax(dim=1))


def test_what_cannot_be_folded():
    model = build(SpcxrForImageClassification)
    with pytest.raises(SpcxrError, match="a calibration of 2 classes for a head of 3"):
        fold_into_head(model, Calibration(torch.ones(2), torch.zeros(2)))
    model.classifier = nn.Linear(4, 3, bias=False)
    with pytest.raises(SpcxrError, match="SpcxrForImageClassification: its `classifier` is no linear layer"):
        fold_into_head(model, Calibration(torch.ones(3), torch.zeros(3)))


# ---- thresholds ----------------------------------------------------------------------------------------------------


def test_thresholds_by_hand():
    scores = np.array([0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    truth = np.array([1, 1, 1, 0, 1, 0, 0, 1, 0, 0])
    found = thresholds(scores, truth)
    # Over 0.75 and over 0.55 the sum is 1.6: of equals the more sensitive.
    assert found == pytest.approx({"youden": 0.55, "sensitivity 0.90": 0.25, "specificity 0.90": 0.75})


def test_a_tenth_may_be_on_the_wrong_side():
    """Ten of each: a negative above the threshold leaves a specificity of 0.90, a positive below it a sensitivity."""
    negatives, positives = np.arange(10) / 20, np.arange(10) / 20 + 0.325  # 0 .. 0.45 and 0.325 .. 0.775
    scores, truth = np.concatenate([negatives, positives]), np.repeat([0, 1], 10)
    found = thresholds(scores, truth)
    assert (negatives >= found["specificity 0.90"]).sum() == 1
    assert (positives >= found["sensitivity 0.90"]).sum() == 9
    assert found["specificity 0.90"] == pytest.approx((0.4 + 0.425) / 2)
    assert found["sensitivity 0.90"] == pytest.approx((0.375 + 0.35) / 2)


def test_of_equally_good_cuts_the_more_sensitive_is_taken():
    scores, truth = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert thresholds(scores, truth)["youden"] == pytest.approx(0.65)


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_do_what_they_are_called(seed):
    generator = np.random.default_rng(seed)
    truth = np.append(generator.random(60) < 0.3, [True, False]).astype(float)
    scores = (0.3 * truth + 0.7 * generator.random(62)).round(1 + seed % 2)  # with ties
    reached = {name: decision_figures(scores, truth, value) for name, value in thresholds(scores, truth).items()}
    every = np.array([decision_figures(scores, truth, cut) for cut in [*np.unique(scores), 1.1]])
    assert reached["youden"][:2].sum() == pytest.approx(every[:, :2].sum(axis=1).max())
    assert reached["sensitivity 0.90"][1] == pytest.approx(every[every[:, 0] >= 0.9, 1].max())
    assert reached["specificity 0.90"][0] == pytest.approx(every[every[:, 1] >= 0.9, 0].max())


def test_scores_of_1_are_above_every_threshold():
    truth = np.array([0, 0, 1, 0, 1])
    with pytest.raises(SpcxrError, match=r"67% of the negatives score 1: no threshold has a specificity of 0\.9"):
        thresholds(np.array([1, 1, 1, 0.2, 0.1]), truth)
    scores = np.array([0.2, 0.4, 1, 0.6, 1])
    found = thresholds(scores, truth)
    assert found["specificity 0.90"] == pytest.approx(0.8)
    assert decision_figures(scores, truth, found["specificity 0.90"]).tolist() == [1, 1, 1]


def test_decision_figures_by_hand():
    found = decision_figures(np.array([0.9, 0.5, 0.4, 0.1]), np.array([1, 0, 1, 0]), 0.5)
    assert found.tolist() == [0.5, 0.5, 0.5]
    assert decision_figures(np.array([0.9, 0.2]), np.ones(2), 0.5)[[0, 2]].tolist() == [0.5, 0.5]
    assert math.isnan(decision_figures(np.array([0.9]), np.ones(1), 0.5)[1])


@pytest.mark.parametrize("score", [0.0, 0.5])
def test_scores_that_are_all_equal_give_thresholds_in_range(score):
    found = thresholds(np.full(4, score), np.array([1, 0, 1, 0]))
    assert tuple(found) == POINTS and all(0 <= value <= 1 for value in found.values())


def test_operating_points_of_labels_and_sums():
    logits, labels = drawn(4, 300)
    probabilities, targets = to_probabilities(logits, False).numpy(), one_hot(labels).numpy()
    found = operating_points(probabilities, targets, NAMES, [JOINED])
    assert list(found) == [*NAMES, JOINED]
    assert found[JOINED] == pytest.approx(thresholds(1 - probabilities[:, 0], 1 - targets[:, 0]))
    config = SpcxrConfig(id2label=dict(enumerate(NAMES)))
    set_operating_points(config, found, "youden")
    assert config.operating_points == found and config.operating_point == "youden"


def test_a_target_without_both_sides_has_no_thresholds():
    targets = np.array([[1.0, 0.0], [0.0, math.nan], [0.0, 0.0]])
    assert list(operating_points(np.full((3, 2), 0.5), targets, ["a", "b"])) == ["a"]
    config = SpcxrConfig(id2label={0: "a", 1: "b"})
    set_operating_points(config, {}, "youden")
    assert config.operating_points is None and config.operating_point is None


def test_a_target_of_unknown_labels_is_refused():
    with pytest.raises(SpcxrError, match="'fungal' is no label; there are normal, bacterial, viral"):
        target_values(np.zeros((1, 3)), "bacterial + fungal", NAMES)
    with pytest.raises(SpcxrError, match="got 'spine'"):
        set_operating_points(SpcxrConfig(id2label={0: "a", 1: "b"}), {"spine": {"youden": 0.5}}, None)


def test_the_bins_are_those_of_the_calibration_error():
    logits, labels = drawn(5, 500)
    probabilities = to_probabilities(3 * logits, False).numpy()
    hits = (probabilities.argmax(axis=1) == labels.numpy()).astype(float)
    hits[7] = math.nan
    found = reliability_bins(probabilities.max(axis=1), hits)
    assert sum(one["images"] for one in found) == 499
    gap = sum(one["images"] * abs(one["confidence"] - one["share"]) for one in found) / 499
    assert gap == pytest.approx(expected_calibration_error(probabilities.max(axis=1), hits))
