"""Dice, IoU and the bootstrap: worked examples, edges, refusals."""

import numpy as np
import pytest
import torch

from spcxr_hf.errors import SpcxrError
from spcxr_hf.metrics import bootstrap_interval, dice, iou


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
