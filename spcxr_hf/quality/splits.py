"""Splits by patient, stratified by label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from spcxr_hf.data.table import RadiographTable
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import note
from spcxr_hf.quality.duplicates import known_patients

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def split_by_patient(
    table: RadiographTable,
    shares: Mapping[str, float] = SHARES,
    label_columns: str | Sequence[str] = (),
    *,
    seed: int = 0,
    patient_column: str = "patient",
) -> list[str]:
    """Divide the rows of a set, each patient into one split, with the same label proportions in all.

    Iterative stratification (Sechidis et al., ECML PKDD 2011, algorithm 1) with patients in place of examples: the
    rarest label that is still to be shared out is dealt with first, those with most images of it first, each to the
    split that lacks most of it. The same rows, shares and seed always give the same splits.

    Args:
        table: The set. A row without a patient counts as a patient of its own.
        shares: Split -> its share of the images; above 0, adding up to 1.
        label_columns: Columns to balance. A list counts each of its entries, an empty list as a label of its own, and a
            missing value as none.
        seed: Decides between patients, and between splits, that are as good as each other.
        patient_column: Where the patients are. Without such a column every row counts as a patient.

    Returns:
        The split of each row.

    Raises:
        SpcxrError: the shares do not add up to 1 or are not above 0, the set is empty, there is no such column of
            labels, a label is neither a word, a number nor a list of them, or there are fewer patients than splits.
    """
    _check_shares(shares)
    columns = [label_columns] if isinstance(label_columns, str) else list(label_columns)
    patients = number_patients(table, patient_column)
    count = int(patients.max()) + 1 if len(patients) else 0
    if count < len(shares):
        raise SpcxrError(f"{table.name}: {count} patients cannot be shared out among {len(shares)} splits")
    labels = _label_counts(table, columns)  # (n, L)
    weights = np.zeros((count, labels.shape[1]), dtype=np.int64)
    np.add.at(weights, patients, labels)
    images = np.bincount(patients, minlength=count)
    sides = _stratify(weights, images, np.array([float(share) for share in shares.values()]), seed)
    names = list(shares)
    return [names[side] for side in sides[patients]]


def with_splits(table: RadiographTable, column: str, seed: int = 0) -> RadiographTable:
    """The set with a column of splits: its own, else its column `split`, else one that `split_by_patient` draws.

    The same set always gets the same splits; a drawn split is reported in one line.
    """
    if column in table.rows.column_names:
        return table
    splits = table.column("split") if "split" in table.rows.column_names else []
    if not any(splits):
        splits = split_by_patient(table, seed=seed)
        shares = ", ".join(f"{splits.count(name)} {name}" for name in SHARES)
        note(f"{table.name}: has no splits; drawn by patient: {shares}")
    return RadiographTable(table.rows.append_column(column, pa.array(splits, pa.string())), table.name)


def number_patients(table: RadiographTable, column: str = "patient") -> np.ndarray:
    """The number of each row's patient (n,), from 0 in order of appearance; an unknown patient has a number of its own.

    Numbers of the same rows are the same, whatever the names are.
    """
    names = known_patients(table, column)
    keys: list[Any] = [("row", row) if name is None else name for row, name in enumerate(names)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _check_shares(shares: Mapping[str, float]) -> None:
    if not shares:
        raise SpcxrError("no shares: name at least one split")
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise SpcxrError(f"the share of {name!r} must be above 0 and at most 1; got {share!r}")
    if abs(math.fsum(shares.values()) - 1) > 1e-6:
        raise SpcxrError(f"the shares must add up to 1; these add up to {math.fsum(shares.values()):g}")


def _label_counts(table: RadiographTable, columns: Sequence[str]) -> np.ndarray:
    """How often each row has each label: (n, L), one column for every value of every label column."""
    found: dict[tuple[str, str], int] = {}
    places = [
        (row, found.setdefault((column, label), len(found)))
        for column in columns
        for row, value in enumerate(table.column(column))
        for label in _labels_of(value, f"{table.name}: {column}")
    ]
    counts = np.zeros((len(table), len(found)), dtype=np.int64)
    for row, label in places:
        counts[row, label] += 1
    return counts


def _labels_of(value: Any, name: str) -> list[str]:
    """The labels in one cell as words; [] where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, list):
        return sorted({label for one in value for label in _labels_of(one, name)}) or ["(empty list)"]
    if not isinstance(value, (str, int, float)):
        raise SpcxrError(f"{name} holds a {type(value).__name__}; labels are words, numbers or lists of them")
    return [str(value)]


def _stratify(weights: np.ndarray, images: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """The split (P,) of each patient.

    Args:
        weights: (P, L) images of each label that a patient has.
        images: (P,) images of each patient.
        shares: (S,) share of each split, adding up to 1.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))  # decides between equals
    wanted = shares[:, None] * weights.sum(axis=0)  # (S, L) images that each split still lacks
    room = shares * images.sum()
    sides = np.full(len(images), -1)
    while True:
        left = order[sides[order] < 0]
        remaining = weights[left].sum(axis=0)
        if not len(left):
            break
        if remaining.any():
            rarest = int(np.where(remaining > 0, remaining, np.iinfo(np.int64).max).argmin())
            members = left[weights[left, rarest] > 0]
            members = members[np.argsort(-weights[members, rarest], kind="stable")]
        else:
            rarest, members = -1, left[np.argsort(-images[left], kind="stable")]
        for patient in members:
            lacking = room if rarest < 0 else wanted[:, rarest]
            side = _neediest(lacking, room, generator)
            sides[patient] = side
            wanted[side] -= weights[patient]
            room[side] -= images[patient]
    return _fill_empty(sides, images, len(shares))


def _neediest(lacking: np.ndarray, room: np.ndarray, generator: np.random.Generator) -> int:
    """The split that lacks most of a label; of equals the one with most room; of these, any."""
    best = np.flatnonzero(lacking >= lacking.max() - 1e-9)
    best = best[room[best] >= room[best].max() - 1e-9]
    return int(best[0] if len(best) == 1 else generator.choice(best))


def _fill_empty(sides: np.ndarray, images: np.ndarray, count: int) -> np.ndarray:
    """Give an empty split the patient with fewest images from the split that has most patients."""
    for side in range(count):
        if not (sides == side).any():
            largest = np.bincount(sides, minlength=count).argmax()
            members = np.flatnonzero(sides == largest)
            sides[members[images[members].argmin()]] = side
    return sides
