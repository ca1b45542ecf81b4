"""Lung areas: the two largest regions, and regions as a flood fill finds them."""

import numpy as np
import pytest

from spcxr_hf.models.lungs import LungAreas, connected_regions, measure_lungs


def draw_mask(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """100 x 80 pixels, true in the boxes (top, bottom, left, right)."""
    mask = np.zeros((100, 80), dtype=bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("boxes", "total", "left", "right"),
    [
        ([], 0, 0, 0),
        ([(10, 60, 45, 65), (10, 50, 10, 30)], 1800, 800, 1000),  # two lungs
        ([(10, 60, 45, 65), (10, 50, 10, 30), (90, 92, 0, 5)], 1810, 800, 1000),  # and an island
        ([(10, 60, 10, 70)], 3000, 1500, 1500),  # grown together
        ([(10, 60, 10, 70), (90, 92, 0, 5)], 3010, 1510, 1500),  # and an island
    ],
)
def test_lung_areas(boxes, total, left, right):
    found = measure_lungs(draw_mask(*boxes))
    assert found == pytest.approx(LungAreas(total / 8000, left / 8000, right / 8000))


def flood_fill(mask: np.ndarray) -> list[tuple[int, float]]:
    """Area and mean column of every region, pixel by pixel."""
    left, found = {tuple(pixel) for pixel in np.argwhere(mask).tolist()}, []
    while left:
        stack, region = [left.pop()], []
        while stack:
            row, column = stack.pop()
            region.append(column)
            for neighbour in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    stack.append(neighbour)
        found.append((len(region), sum(region) / len(region) + 0.5))
    return sorted(found)


@pytest.mark.parametrize("seed", range(8))
def test_connected_regions_are_those_of_a_flood_fill(seed):
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 40, 2)) < random.uniform(0.1, 0.9)
    if not mask.any():
        mask[0, 0] = True
    areas, centres = connected_regions(mask)
    found = sorted(zip(areas.tolist(), centres.tolist(), strict=True))
    assert np.allclose(found, flood_fill(mask))
