"""Stored predictions of trainings, and paired comparisons of their metrics.

Several trainings (seeds) of several kinds (with and without pretraining, another pretext) are evaluated on the same
rows. A resample draws patients with replacement, the same for every training, and, where there are several seeds, seeds
with replacement too, the same for both sides of a difference: a seed is the same draw of labels on both sides. A
figure is the mean over the seeds drawn of what each reaches on the patients drawn (a bootstrap of two crossed factors,
Owen, Annals of Applied Statistics 1, 2007); the interval holds the middle 95 % of the resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from spcxr_hf.data.table import RadiographTable
from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation.bootstrap import patient_groups
from spcxr_hf.evaluation.metrics import weighted_auroc
from spcxr_hf.files import atomic_file
from spcxr_hf.models.loading import forward, load_checkpoint, set_attention
from spcxr_hf.transforms.augment import resize

METHOD = (
    "95 % intervals: percentile bootstrap of patients (the same draws for all trainings) and, where there are several "
    "seeds, of seeds, crossed; a figure is the mean over the seeds. Differences are paired by patient and seed."
)


# ---- reports ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """Rows to evaluate a classifier on, and their classes.

    Attributes:
        label_column, split_column, split: Where the rows are and what they are called.
        classes: The model's class -> the labels of the rows that count as it; rows of other labels are left out.
        negative: Evaluate this class against all others together: rows may then name the others in other words, as
            `abnormal` for any pneumonia. None: every class separately.
        recall: Classes whose recall is reported separately, as where nearly all rows are of one class.
        within: A column and two classes: their AUROC among the images of each value of the column that has both.
    """

    label_column: str
    split_column: str
    split: str
    classes: Mapping[str, Sequence[str]]
    negative: str | None = None
    recall: Sequence[str] = ()
    within: Sequence[str] = ()

    def select(self, table: RadiographTable) -> tuple[RadiographTable, np.ndarray]:
        """The rows that have a label, and their class numbers (n,); with `negative`, 0 for it and 1 for all else.

        Args:
            table: The whole set.

        Raises:
            SpcxrError: there is no such column or split, or no row is left.
        """
        rows = table.where(self.split_column, self.split)
        number = {label: self._number(name) for name, labels in self.classes.items() for label in labels}
        found = [number.get(_word(cell) or "", -1) for cell in rows.column(self.label_column)]
        kept = [one >= 0 for one in found]
        if not any(kept):
            raise SpcxrError(f"{rows.name}: no row has a label in {self.label_column} that is one of the classes")
        chosen = RadiographTable(rows.rows.filter(pa.array(kept)), rows.name)
        return chosen, np.array(found)[np.array(kept)]

    def _number(self, name: str) -> int:
        return list(self.classes).index(name) if self.negative is None else int(name != self.negative)


def _word(cell: Any) -> str | None:
    """A label as a word; a list of findings counts as normal where it is empty, else as abnormal."""
    if isinstance(cell, list):
        return "abnormal" if cell else "normal"
    return None if cell is None else str(cell)


# ---- predictions -------------------------------------------------------------------------------------------------


@dataclass
class Predictions:
    """Predictions of a classifier on the rows of a report.

    Attributes:
        ids: (n,) names of the rows.
        patients: (n,) whose image each row is, None where unknown.
        groups: (n,) the value of the report's column `within`, None where it has none.
        labels: (n,) class numbers.
        probabilities: (n, classes) float64; with `negative` (n, 2).
    """

    ids: list[str]
    patients: list[str | None]
    groups: list[str | None]
    labels: np.ndarray
    probabilities: np.ndarray


def load_classifier(folder: str, device: str = "cpu", attention: str = "sdpa") -> tuple[Any, Any]:
    """A classifier in evaluation mode on its device, and its image processor.

    Raises:
        SpcxrError: the folder holds none.
    """
    loaded = load_checkpoint("classification", folder, device, any_family=True)
    set_attention(loaded.model, attention)
    return loaded.model, loaded.processor


@torch.no_grad()
def predict(model: Any, processor: Any, images: torch.Tensor, bf16: bool = False, batch_size: int = 64) -> np.ndarray:
    """Probabilities (n, classes) float64 of stored images (n, 1, S, S) uint8, resized as in training.

    Args:
        model: A classifier of one or three channels.
        processor: Its image processor, which says size, mean and deviation.
        images: Grey.
        bf16: Run in bfloat16 autocast.
        batch_size: Images per forward pass.
    """
    device, channels = model.device, getattr(model.config, "num_channels", 3)
    mean, std = (
        torch.tensor(values).float().reshape(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std)
    )
    found = []
    for part in images.split(batch_size):
        grey = resize(part.to(device).float() / 255, processor.size["height"]).expand(-1, channels, -1, -1)
        logits = forward(model, (grey - mean.to(device)) / std.to(device), bf16).logits
        found.append(logits.double().softmax(dim=1).cpu())
    return torch.cat(found).numpy()


def as_reported(probabilities: np.ndarray, classes: Sequence[str], report: Report) -> np.ndarray:
    """Probabilities (n, model's classes) in the report's order; with `negative` (n, 2), the others summed.

    Raises:
        SpcxrError: the model has no class that the report names.
    """
    if report.negative is not None:
        if report.negative not in classes:
            raise SpcxrError(f"the model has no class {report.negative!r}; it has {', '.join(classes)}")
        negative = probabilities[:, classes.index(report.negative)]
        return np.stack([negative, 1 - negative], axis=1)
    missing = sorted(set(report.classes) - set(classes))
    if missing:
        raise SpcxrError(f"the model has no class {missing[0]!r}; it has {', '.join(classes)}")
    return probabilities[:, [classes.index(name) for name in report.classes]]


def write_predictions(path: Path, reports: Mapping[str, Predictions]) -> None:
    """Keep the predictions of every report in one Parquet file, atomically."""
    tables = [
        pa.table(
            {
                "report": [name] * len(found.ids),
                "id": found.ids,
                "patient": pa.array(_as_text(found.patients), pa.string()),
                "group": pa.array(_as_text(found.groups), pa.string()),
                "label": found.labels.astype(np.int64),
                "probabilities": pa.array(found.probabilities.tolist(), pa.list_(pa.float64())),
            }
        )
        for name, found in reports.items()
    ]
    with atomic_file(path) as partial:
        pq.write_table(pa.concat_tables(tables), partial, compression="zstd")


def _as_text(values: Sequence[Any] | None) -> list[str | None] | None:
    """Patients may have numbers."""
    return None if values is None else [None if value is None else str(value) for value in values]


def read_predictions(path: Path) -> dict[str, Predictions]:
    """What `write_predictions` kept, by report.

    Raises:
        SpcxrError: the file is missing or damaged.
    """
    try:
        table = pq.read_table(path).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise SpcxrError(f"{path}: no predictions ({error})") from error
    found = {}
    for name in dict.fromkeys(table["report"]):
        rows = [row for row, report in enumerate(table["report"]) if report == name]
        ids, patients, groups, labels, probabilities = (
            [table[column][row] for row in rows] for column in ("id", "patient", "group", "label", "probabilities")
        )
        found[name] = Predictions(ids, patients, groups, np.array(labels), np.array(probabilities))
    return found


# ---- figures -----------------------------------------------------------------------------------------------------


def figures(found: Predictions, report: Report, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of merit of weighted rows, of many weightings at once.

    Args:
        found: n rows.
        report: What to tell.
        weights: (resamples, n) how often each row was drawn.

    Returns:
        "accuracy", "balanced_accuracy" (mean recall of the classes that there are), "auroc" (of two classes that of
        the second, of more the mean over the classes that have rows, each against the rest), "recall_<class>" for
        those asked for, and "within_auroc" (the mean over the values of the column that have both classes):
        (resamples,) float64 each, NaN where a resample holds no row of a class that is needed.
    """
    names = list(report.classes) if report.negative is None else [report.negative, "other"]
    hits = (found.probabilities.argmax(axis=1) == found.labels).astype(np.float64)
    present = [number for number in range(len(names)) if (found.labels == number).any()]
    recalls = {number: _share(weights, hits, found.labels == number) for number in present}
    result = {
        "accuracy": _share(weights, hits, np.ones(len(hits), bool)),
        "balanced_accuracy": np.mean(list(recalls.values()), axis=0),
    }
    positive = [1] if len(names) == 2 else present
    if len(present) > 1:
        ranked = [weighted_auroc(found.probabilities[:, one], found.labels == one, weights) for one in positive]
        result["auroc"] = np.mean(ranked, axis=0)
    for name in report.recall:
        result[f"recall_{name}"] = recalls[names.index(name)]
    if report.within:
        result["within_auroc"] = _within(found, [names.index(name) for name in report.within[1:]], weights)
    return result


def _share(weights: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The weighted mean of the values over some of the rows, NaN where none of them was drawn."""
    total = weights[:, rows].sum(axis=1)
    return np.where(total > 0, weights[:, rows] @ values[rows] / np.maximum(total, 1), np.nan)


def _within(found: Predictions, classes: Sequence[int], weights: np.ndarray) -> np.ndarray:
    """AUROC of the second class against the first, the mean over the groups that have both.

    The score is the second's share of the two probabilities.
    """
    first, second = classes
    pair = found.probabilities[:, [first, second]]
    score = pair[:, 1] / pair.sum(axis=1).clip(1e-300)
    groups = np.array([str(group) for group in found.groups])
    each = []
    for group in np.unique(groups):
        rows = (groups == group) & np.isin(found.labels, classes)
        if len(np.unique(found.labels[rows])) == 2:
            each.append(weighted_auroc(score[rows], found.labels[rows] == second, weights[:, rows]))
    return np.mean(each, axis=0) if each else np.full(len(weights), np.nan)


# ---- resamples ---------------------------------------------------------------------------------------------------


def patient_weights(patients: Sequence[str | None], resamples: int, seed: int = 0) -> np.ndarray:
    """How often each row is drawn, (resamples + 1, n): first the set as it is, then patients with replacement."""
    groups = patient_groups(list(patients), len(patients))
    index = np.unique([str(group) for group in groups or ()], return_inverse=True)[1]
    generator, number = np.random.default_rng(seed), index.max() + 1
    counts = [np.bincount(generator.integers(0, number, number), minlength=number) for _ in range(resamples)]
    return np.stack([np.ones(len(index)), *(count[index] for count in counts)]).astype(np.float64)


def seed_draws(seeds: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Which seeds each resample holds, (resamples, seeds)."""
    return np.random.default_rng([seed, seeds]).integers(0, seeds, (resamples, seeds))


Summary = dict[str, Any]


def summarise(runs: Mapping[int, Mapping[str, np.ndarray]], confidence: float = 0.95) -> dict[str, Summary]:
    """Each figure over the seeds.

    Args:
        runs: Seed -> figures (resamples + 1,), the first of the set as it is.
        confidence: Of the interval.

    Returns:
        Figure -> "mean", "sd" (n - 1 in the denominator, None of one seed), "ci95" and "seeds", seed -> value.
    """
    names = next(iter(runs.values()))
    return {name: _summary({seed: one[name] for seed, one in runs.items()}, confidence) for name in names}


def compare(
    ours: Mapping[int, Mapping[str, np.ndarray]],
    theirs: Mapping[int, Mapping[str, np.ndarray]],
    confidence: float = 0.95,
) -> dict[str, Summary]:
    """Each figure of ours less theirs, over the seeds that both have; as `summarise`. Empty where they share none."""
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        return {}
    return {
        name: _summary({seed: ours[seed][name] - theirs[seed][name] for seed in shared}, confidence)
        for name in ours[shared[0]]
    }


def _summary(values: Mapping[int, np.ndarray], confidence: float) -> Summary:
    table = np.stack([values[seed] for seed in sorted(values)])  # (seeds, resamples + 1)
    points, drawn = table[:, 0], table[:, 1:]
    picked = seed_draws(len(table), drawn.shape[1])
    means = np.take_along_axis(drawn, picked.T, axis=0).mean(axis=0)
    means = means[~np.isnan(means)]
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    return {
        "mean": float(points.mean()),
        "sd": float(points.std(ddof=1)) if len(points) > 1 else None,
        "ci95": [float(end) for end in np.quantile(means, ends)] if means.size else None,
        "seeds": {str(seed): float(values[seed][0]) for seed in sorted(values)},
    }
