"""Areas of lung masks: the two lungs as the largest connected regions.

measure_lungs -> connected_regions -> _join_runs
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SMALLEST_LUNG = 0.1  # of the larger one; a second region below that is no lung but an island


class LungAreas(NamedTuple):
    """Shares of the image, 0..1: all that is lung, and the two lungs by the side of the image that they lie on."""

    total: float
    image_left: float
    image_right: float


def measure_lungs(mask: np.ndarray) -> LungAreas:
    """The area of the mask (height, width), boolean, and of the two lungs in it.

    The lungs are the two largest connected regions. Where there is one, or the second is a mere island, as when the two
    have grown together, the column through the mask's centre of mass parts them instead.
    """
    total = int(mask.sum())
    if total == 0:
        return LungAreas(0.0, 0.0, 0.0)
    areas, centres = connected_regions(mask)
    largest = np.argsort(areas)[::-1][:2]
    if len(largest) == 2 and areas[largest[1]] >= SMALLEST_LUNG * areas[largest[0]]:
        first, second = sorted(largest, key=lambda region: centres[region])
        left, right = areas[first], areas[second]
    else:
        middle = round((mask.sum(axis=0) * (np.arange(mask.shape[1]) + 0.5)).sum() / total)
        left, right = mask[:, :middle].sum(), mask[:, middle:].sum()
    return LungAreas(total / mask.size, float(left) / mask.size, float(right) / mask.size)


def connected_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area in pixels and mean column of each region of a boolean mask (height, width) whose pixels touch by a side.

    Row by row: a row is a few runs of true pixels, and a run belongs to the regions of the runs that it touches in the
    row above.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]  # exclusive; in the same order
    regions = _join_runs(rows.tolist(), starts.tolist(), ends.tolist())
    _, region = np.unique(regions, return_inverse=True)
    lengths = ends - starts
    areas = np.bincount(region, weights=lengths)
    return areas, np.bincount(region, weights=lengths * (starts + ends) / 2) / areas


def _join_runs(rows: list[int], starts: list[int], ends: list[int]) -> list[int]:
    """For each run, sorted by row and start, the index of a run that stands for its region."""
    parents = list(range(len(rows)))

    def representative(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    above = 0  # the first run of the row above that is not wholly left of this one
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[run]):
            above += 1
        touching = above
        while rows[touching] == row - 1 and starts[touching] < ends[run]:
            parents[representative(touching)] = representative(run)
            touching += 1
    return [representative(run) for run in range(len(rows))]
