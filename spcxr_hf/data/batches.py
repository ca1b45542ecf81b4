"""Batches of a set: which images make up each optimiser step, subsets of the labels, balanced classes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from spcxr_hf.errors import SpcxrError


def step_seed(seed: int, step: int, micro_batch: int = 0) -> int:
    """The seed of all random numbers of a micro-batch, so that a resumed run needs no generator state."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


@dataclass(frozen=True)
class StepPlan:
    """Which images make up every optimiser step, and which process works on them.

    A step is a batch over all processes, cut into micro-batches that go through the model one by one. Number m
    belongs to process m mod `processes`. Views, corruption and stochastic depth are seeded per micro-batch, so the same
    plan gives the same losses on any number of processes.

    Attributes:
        batch_size: Images per optimiser step.
        micro_batch_size: Images per forward pass; more than a batch counts as a batch.
        seed: The order of the images follows from it.
        process: This process's number, in 0 .. processes - 1.

    Raises:
        SpcxrError: the batch is no whole number of micro-batches, or these do not share out among the processes.
    """

    batch_size: int
    micro_batch_size: int
    seed: int = 0
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_size, self.micro_batch_size) < 1:
            raise SpcxrError(f"sizes must be at least 1; got {self.batch_size} and {self.micro_batch_size}")
        object.__setattr__(self, "micro_batch_size", min(self.batch_size, self.micro_batch_size))
        if self.batch_size % self.micro_batch_size:
            raise SpcxrError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.batch_size % self.processes:
            raise SpcxrError(f"batch_size {self.batch_size} does not share out among {self.processes} processes")
        if self.micro_batches % self.processes:
            raise SpcxrError(
                f"{self.micro_batches} micro-batches of {self.micro_batch_size} images do not share out among "
                f"{self.processes} processes; choose a micro_batch_size of {self.batch_size // self.processes} or a "
                "divisor of it"
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step, over all processes."""
        return self.batch_size // self.micro_batch_size

    @property
    def own_micro_batches(self) -> range:
        """The numbers of this process's micro-batches."""
        return range(self.process, self.micro_batches, self.processes)


class MicroBatch(NamedTuple):
    """What goes through the model at once.

    `images` (B, 1, S, S) uint8; `ids` their names; `columns` what belongs to them, (B, ...) each; `seed` for all that
    is random about them.
    """

    images: torch.Tensor
    ids: list[str]
    columns: dict[str, torch.Tensor]
    seed: int


@dataclass
class RadiographSet:
    """A decoded set: `images` (n, 1, S, S) uint8, `ids` their names, `columns` what belongs to them, (n, ...) each."""

    images: torch.Tensor
    ids: list[str]
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> RadiographSet:
        """The set on another device."""
        columns = {name: values.to(device) for name, values in self.columns.items()}
        return RadiographSet(self.images.to(device), self.ids, columns)

    def steps(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of every step from `first_step` up to `last_step` (excluded)."""
        for step, rows in enumerate(self._batches(plan, first_step, last_step), first_step):
            parts = rows.split(plan.micro_batch_size)
            yield [
                self._micro_batch(parts[number], step_seed(plan.seed, step, number))
                for number in plan.own_micro_batches
            ]

    def _batches(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[torch.Tensor]:
        return batches(len(self), plan.batch_size, plan.seed, first_step, last_step)

    def _micro_batch(self, rows: torch.Tensor, seed: int) -> MicroBatch:
        on_device = rows.to(self.images.device)
        return MicroBatch(
            self.images[on_device],
            [self.ids[row] for row in rows.tolist()],
            {name: values[on_device] for name, values in self.columns.items()},
            seed,
        )


def batches(count: int, batch_size: int, seed: int, first_step: int, last_step: int) -> Iterator[torch.Tensor]:
    """Row numbers of each step's batch, (batch_size,), from `first_step` up to `last_step` (excluded).

    Every epoch is a new permutation of 0 .. count - 1 that follows from the seed and the epoch alone; its incomplete
    last batch is dropped.
    """
    per_epoch = count // batch_size
    if per_epoch == 0:
        raise SpcxrError(f"a batch of {batch_size} is larger than the set of {count} images")
    epoch, order = -1, torch.empty(0)
    for step in range(first_step, last_step):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(seed, -1 - epoch)))
        start = (step % per_epoch) * batch_size
        yield order[start : start + batch_size]


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
    """Row numbers, rising: a share `fraction` in (0, 1] of the images, as large of each class (`strata`), rounded.

    `targets` are (n, classes): 1, 0, or NaN where a label is missing.
    """
    generator = np.random.default_rng(seed)
    groups = strata(targets).numpy()
    drawn = [
        generator.permutation(rows)[: round(fraction * len(rows))]
        for rows in (np.flatnonzero(groups == group) for group in np.unique(groups))
    ]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


@dataclass
class BalancedSet(RadiographSet):
    """A set whose classes take turns: a batch holds as many of each, to within one.

    The column `targets` (n, classes) says what each image counts as (`strata`). Within a class no image comes again
    before all have come. Image number i of the run (batches one behind another) is of class i mod the number of
    classes, so that a resumed run needs no other state.
    """

    def _batches(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[torch.Tensor]:
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
            yield torch.tensor([row(step * plan.batch_size + slot) for slot in range(plan.batch_size)])
