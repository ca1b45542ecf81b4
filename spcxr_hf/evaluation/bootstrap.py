"""Bootstrap confidence intervals, resampled by patient where patients are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from spcxr_hf.errors import SpcxrError


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).

    `values` (n,) has one finite figure per image; the other arguments, and the draws, are those of `bootstrap`.
    """
    figures = np.asarray(values, dtype=np.float64)
    if figures.ndim != 1 or not figures.size or not np.isfinite(figures).all():
        raise SpcxrError("values must be a list of at least one number, all of them finite")
    _check_bootstrap(len(figures), groups, resamples, "values", confidence)
    index = _group_index(range(len(figures)) if groups is None else groups)
    sums, counts = np.bincount(index, weights=figures), np.bincount(index)  # a mean needs no more of a group
    draws = _draw_groups(len(sums), resamples, seed)
    return percentiles(np.array([sums[drawn].sum() / counts[drawn].sum() for drawn in draws]), confidence)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    count: int,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of any statistic (Efron and Tibshirani, 1993, ch. 13).

    Args:
        statistic: Given row numbers, drawn with replacement, its value on these rows; NaN where it is not defined, as
            an AUROC of one class is not. Those resamples are skipped; `bootstrap_draws` shows how many there are.
        count: Number of rows.
        groups: (count,) what is drawn together, as a rule the patient: images of one patient are not independent. By
            default every row is its own group.
        confidence: Coverage, in (0, 1).
        resamples: Number of draws, at least 1.
        seed: The draws follow from it.

    Returns:
        Lower and upper end; NaN both where no resample defines the statistic.

    Raises:
        SpcxrError: no rows, groups of another length, or a number out of range.
    """
    _check_bootstrap(count, groups, resamples, "rows", confidence)
    return percentiles(bootstrap_draws(statistic, count, groups, resamples, seed), confidence)


def bootstrap_draws(
    statistic: Callable[[np.ndarray], float | np.ndarray],
    count: int,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """The statistic on each resample, from which `bootstrap` reads its interval; arguments are those of `bootstrap`.

    A statistic of several figures, an array, is drawn for all of them at once, on the same rows. The result is
    (resamples, ...) float64, NaN where the statistic is not defined.
    """
    _check_bootstrap(count, groups, resamples, "rows")
    # One draw at a time: all at once would take count x resamples of memory.
    return np.array([statistic(rows) for rows in _draw_rows(count, groups, resamples, seed)], dtype=np.float64)


def patient_groups(patients: Sequence[Hashable] | None, count: int) -> list[Hashable] | None:
    """Groups (count,) for `bootstrap`: the rows of one patient, and each row of an unknown patient as a group of one.

    `patients` (count,) names them by anything; None, NaN or "" where unknown. None altogether gives None.
    """
    if patients is None:
        return None
    if len(patients) != count:
        raise SpcxrError(f"{len(patients)} patients for {count} rows")
    known = [patient is not None and patient == patient and patient != "" for patient in patients]
    return [
        patient if is_known else ("row", row)
        for row, (patient, is_known) in enumerate(zip(patients, known, strict=True))
    ]


def _check_bootstrap(count: int, groups: Sequence | None, resamples: int, what: str, confidence: float = 0.95) -> None:
    if count < 1:
        raise SpcxrError(f"there are no {what} to draw from")
    if groups is not None and len(groups) != count:
        raise SpcxrError(f"{len(groups)} groups for {count} {what}")
    if not 0 < confidence < 1 or resamples < 1:
        raise SpcxrError(f"confidence must lie in (0, 1) and resamples be at least 1; got {confidence}, {resamples}")


def _draw_rows(count: int, groups: Sequence[Hashable] | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Row numbers of each resample; all rows of a drawn group are included."""
    if groups is None:
        yield from _draw_groups(count, resamples, seed)
        return
    index = _group_index(groups)
    order, sizes = np.argsort(index, kind="stable"), np.bincount(index)
    first = sizes.cumsum() - sizes  # where in `order` a group's rows begin
    for drawn in _draw_groups(len(sizes), resamples, seed):
        lengths = sizes[drawn]
        begins = lengths.cumsum() - lengths  # where in the resample they begin
        yield order[np.repeat(first[drawn] - begins, lengths) + np.arange(lengths.sum())]


def _draw_groups(number: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(number,) numbers of the groups of each resample."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(0, number, number)


def _group_index(groups: Sequence[Hashable]) -> np.ndarray:
    """(n,) number of each row's group, groups in the order of their first member."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(group, len(number)) for group in groups])


def percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    """The interval that holds this share of the draws which are not NaN."""
    defined = draws[~np.isnan(draws)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
