"""Which images of a labelled set are learned from, and how often: few labels, classes that take turns."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .data import MicroBatch, RadiographSet, StepPlan, step_seed


def select(images: RadiographSet, rows: torch.Tensor) -> RadiographSet:
    """These rows (numbers) of a set."""
    columns = {name: values[rows] for name, values in images.columns.items()}
    return RadiographSet(images.images[rows], [images.ids[row] for row in rows.tolist()], columns)


def strata(targets: torch.Tensor) -> torch.Tensor:
    """The class (n,) that each row (n, classes) counts as: its rarest, or the number of classes where it has none."""
    positive = targets == 1
    counts = positive.sum(dim=0).expand_as(positive)
    rarest = torch.where(positive, counts, torch.iinfo(counts.dtype).max).argmin(dim=1)
    return torch.where(positive.any(dim=1), rarest, targets.shape[1])


def draw_rows(targets: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Row numbers, rising: a share of the images, as large of each class (`strata`), rounded.

    Args:
        targets: (n, classes): 1, 0, or NaN where a label is missing.
        fraction: The share, in (0, 1].
        seed: The draw follows from it.
    """
    generator = np.random.default_rng(seed)
    groups = strata(targets).numpy()
    drawn = [
        generator.permutation(rows)[: round(fraction * len(rows))]
        for rows in (np.flatnonzero(groups == group) for group in np.unique(groups))
    ]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def balanced(images: RadiographSet) -> BalancedSet:
    """The same set, sampled in the balanced way."""
    return BalancedSet(images.images, images.ids, images.columns)


@dataclass
class BalancedSet(RadiographSet):
    """A set whose classes take turns: a batch holds as many of each, to within one.

    Within a class no image comes again before all have come. Image number i of the run (batches one behind another) is
    of class i mod the number of classes, so that a resumed run needs no other state.
    """

    def steps(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        """As `RadiographSet.steps`; the column `targets` (n, classes) says what each image counts as (`strata`)."""
        of_class = strata(self.columns["targets"].cpu())
        members = [torch.nonzero(of_class == number).flatten() for number in of_class.unique()]

        @functools.lru_cache(maxsize=2 * len(members))
        def order(number: int, epoch: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(step_seed(plan.seed, -1 - epoch, number))
            return members[number][torch.randperm(len(members[number]), generator=generator)]

        def row(image: int) -> int:
            turn, number = divmod(image, len(members))
            epoch, place = divmod(turn, len(members[number]))
            return int(order(number, epoch)[place])

        for step in range(first_step, last_step):
            rows = torch.tensor([row(step * plan.batch_size + slot) for slot in range(plan.batch_size)])
            lanes = rows.split(plan.lane_size)
            yield [self._micro_batch(lanes[lane], step_seed(plan.seed, step, lane)) for lane in plan.own_lanes]
