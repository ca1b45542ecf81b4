"""Figures: the numbers behind them against scikit-learn, and what makes them readable in print and to everybody."""

import itertools
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from sklearn.metrics import roc_curve as reference_roc

from spcxr_hf import SpcxrError
from spcxr_hf.evaluation.bootstrap import bootstrap
from spcxr_hf.evaluation.curves import (
    GRID,
    confusion,
    precision_recall_curve,
    reliability,
    roc_curve,
    wilson_interval,
)
from spcxr_hf.evaluation.metrics import auroc, average_precision
from spcxr_hf.evaluation.plots import (
    FONT_SIZE,
    STYLES,
    draw_confusion,
    draw_contact_sheet,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    grey_picture,
    save_figure,
    to_png,
)
from training_scripts.benchmarks.lib.faithfulness import draw_perturbation


def scored(count=200, seed=0, digits=2):
    """Scores that say something, some of them equal, and their truth."""
    generator = np.random.default_rng(seed)
    truth = (generator.random(count) < 0.4).astype(float)
    return np.round(generator.normal(truth, 1.0), digits), truth


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_curves_are_scikit_learns(digits):
    scores, truth = scored(digits=digits)
    roc, precision_recall = roc_curve(scores, truth, resamples=20), precision_recall_curve(scores, truth, resamples=20)
    false, true, _ = reference_roc(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc.x, false)
    np.testing.assert_allclose(roc.y, true)
    assert roc.area == pytest.approx(roc_auc_score(truth, scores))
    assert precision_recall.area == pytest.approx(average_precision_score(truth, scores))
    assert precision_recall.base == pytest.approx(truth.mean())


@pytest.mark.parametrize(("build_curve", "figure"), [(roc_curve, auroc), (precision_recall_curve, average_precision)])
def test_bands_are_drawn_by_patient(build_curve, figure):
    scores, truth = scored(120)
    patients = [f"patient-{row // 6}" for row in range(120)]
    found = build_curve(scores, truth, patients, resamples=200, seed=3)
    expected = bootstrap(lambda rows: figure(scores[rows], truth[rows]), 120, patients, resamples=200, seed=3)
    assert found.interval == pytest.approx(expected)
    assert (found.low <= found.high + 1e-12).all()
    on_grid = np.interp(GRID, found.x, found.y)[10:-10]
    inside = (found.low[10:-10] - 0.05 <= on_grid) & (on_grid <= found.high[10:-10] + 0.05)
    assert inside.mean() > 0.9
    alone = build_curve(scores, truth, None, resamples=200, seed=3)
    assert alone.interval != found.interval


def test_missing_labels_are_left_out():
    scores, truth = scored(60)
    some = truth.copy()
    some[::4] = np.nan
    known = ~np.isnan(some)
    found = roc_curve(scores, some, [None] * 60, resamples=10)
    assert found.area == pytest.approx(roc_auc_score(truth[known], scores[known]))


@pytest.mark.parametrize(
    ("scores", "truth", "message"),
    [([0.1, 0.2], [1, 1], "positives and negatives"), ([0.1], [1, 0], "both"), ([np.nan, 1], [1, 0], "numbers"),
     ([0.1, 0.2], [2, 0], "targets 1, 0")],
)  # fmt: skip
def test_curves_refuse(scores, truth, message):
    with pytest.raises(SpcxrError, match=message):
        roc_curve(scores, truth)


def test_reliability():
    probabilities, truth = np.array([0.05, 0.05, 0.62, 0.68, 0.95]), np.array([0, 1, 1, 1, np.nan])
    found = reliability(probabilities, truth, bins=10)
    np.testing.assert_allclose(found.confidence, [0.05, 0.65])
    np.testing.assert_allclose(found.observed, [0.5, 1.0])
    assert found.counts.tolist() == [2, 2]
    assert found.error == pytest.approx((0.45 + 0.35) / 2)
    assert (found.low <= found.observed).all() and (found.observed <= found.high).all()
    with pytest.raises(SpcxrError, match="rows whose label is known"):
        reliability(probabilities, np.full(5, np.nan))


def test_wilson():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    low, high = wilson_interval(np.array([81 / 263, 0.0]), np.array([263, 20]))
    np.testing.assert_allclose(low, [0.2553, 0.0], atol=5e-5)
    np.testing.assert_allclose(high, [0.3662, 0.1611], atol=5e-5)


def test_confusion():
    truths, said = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 0, 2]
    np.testing.assert_array_equal(confusion(truths, said, 3), confusion_matrix(truths, said))
    with pytest.raises(SpcxrError, match="classes are 0"):
        confusion([0, 3], [0, 0], 3)
    with pytest.raises(SpcxrError, match="both"):
        confusion([0], [0, 0], 3)


# ---- readable ------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_lines_differ_in_more_than_hue():
    values = [luminance(style.colour) for style in STYLES]
    assert all(contrast(value, 1.0) >= 3 for value in values)  # against paper
    assert all(contrast(*pair) >= 1.25 for pair in itertools.pairwise(values))
    for place in range(3):
        assert len({str(style[place]) for style in STYLES}) == len(STYLES)


def all_figures():
    curves = {"val": roc_curve(*scored(), resamples=20), "test": roc_curve(*scored(seed=1), resamples=20)}
    yield draw_roc({"pneumonia": curves, "a finding with a rather long name + another": curves},
                   {"pneumonia": {"youden": (0.2, 0.8)}})  # fmt: skip
    yield draw_precision_recall({"pneumonia": {"val": precision_recall_curve(*scored(), resamples=20)}})
    yield draw_reliability({"val": reliability(np.linspace(0, 1, 40), np.arange(40) % 2)})
    yield draw_confusion({"val": (np.array([[5, 1], [0, 9]]), ("normal", "pneumonia"))})
    yield draw_perturbation({"relevance": (np.ones(3), np.ones(3))}, np.linspace(0, 1, 3))
    yield draw_contact_sheet([(np.zeros((20, 30)), "id\ntrue: a\nsaid: b")] * 5, title="worst")


@pytest.mark.parametrize("number", range(6))
def test_words_are_large_enough_and_inside(number):
    import matplotlib.text

    figure = list(all_figures())[number]
    picture = Image.open(BytesIO(to_png(figure)))
    assert picture.width > 300 and picture.height > 200
    words = [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]
    assert words and all(text.get_fontsize() >= 8 for text in words)
    drawn = figure.get_tightbbox()  # inches
    width, height = figure.get_size_inches()
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02 and drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02
    assert FONT_SIZE >= 8


def test_too_many_lines_and_no_panels():
    curve = roc_curve(*scored(20), resamples=2)
    with pytest.raises(SpcxrError, match="at most 5 lines"):
        draw_roc({"x": {str(number): curve for number in range(6)}})
    with pytest.raises(SpcxrError, match="at least one panel"):
        draw_roc({})
    with pytest.raises(SpcxrError, match="at least one picture"):
        draw_contact_sheet([])


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpcxrError, match="could not be written"):
        save_figure(draw_contact_sheet([(np.zeros((2, 2)), "")]), tmp_path / "file" / "x.png")


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_grey_pictures():
    deep = Image.fromarray(np.full((300, 600), 32768, dtype=np.uint16))
    found = grey_picture(deep, 100)
    assert found.shape == (50, 100) and found.mean() == pytest.approx(0.5, abs=1e-3)
    assert grey_picture(Image.new("L", (10, 20), 255)).min() == 1.0
