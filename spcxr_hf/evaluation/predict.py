"""Evaluation of a classifier on a split: its labelled rows, and the logits of its images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spcxr_hf.data.labels import targets_of
from spcxr_hf.data.table import OnError, RadiographTable, decode_set, open_image
from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation.metrics import check_packages
from spcxr_hf.models.loading import forward, load_checkpoint, to_pixel_values
from spcxr_hf.models.typicality import embed_and_classify

# ---- rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a split that have a label.

    Attributes:
        table: Their images and columns.
        targets: (n, classes) float32: 1, 0, or NaN where a label is missing.
        patients: (n) whose image each row is, None where unknown; None altogether where the set does not tell.
    """

    table: RadiographTable
    targets: torch.Tensor
    patients: list | None

    def __len__(self) -> int:
        return len(self.table)

    def where(self, kept: Sequence[bool] | np.ndarray) -> LabelledRows:
        """Those of these rows for which `kept` (n) is true."""
        rows = np.flatnonzero(kept)
        table = RadiographTable(self.table.rows.take(pa.array(rows)), self.table.name)
        patients = None if self.patients is None else [self.patients[row] for row in rows]
        return LabelledRows(table, self.targets[torch.from_numpy(rows)], patients)


def select_rows(
    table: RadiographTable,
    label_column: str,
    split_column: str,
    split: str,
    classes: Mapping[str, Sequence[str]],
    multi_label: bool,
) -> LabelledRows:
    """The rows of a split that have a label.

    Args:
        label_column: Its cells are as `labels.targets_of` takes them.
        classes: Class -> the labels that count as it, as of `labels.parse_classes`. A label may count as several, as
            where `abnormal` is any of the findings that are classes themselves.
        multi_label: Whether labels may hold together.
    """
    rows = table.where(split_column, split)
    targets = torch.tensor([targets_of(cell, classes, multi_label) for cell in rows.column(label_column)])
    known = ~targets.isnan().all(dim=1)
    if not known.any():
        raise SpcxrError(f"{rows.name}: no row has a label in {label_column} that is one of {', '.join(classes)}")
    patients = rows.column("patient") if "patient" in rows.rows.column_names else None
    return LabelledRows(rows, targets, patients).where(known.numpy())


def leave_out_broken(
    splits: Mapping[str, LabelledRows], on_error: OnError
) -> tuple[dict[str, LabelledRows], dict[str, str]]:
    """With "skip" every image is decoded once, and the rows whose image cannot be are left out.

    Returns:
        The rows that are left of each split, and id -> cause of the others; with "stop" all of them, unread.
    """
    if on_error == "stop":
        return dict(splits), {}
    left: dict[str, LabelledRows] = {}
    skipped: dict[str, str] = {}
    for name, rows in splits.items():
        decoded = decode_set(rows.table, 16, on_error=on_error)
        left[name] = rows.where(np.isin(np.arange(len(rows)), decoded.rows.numpy()))
        skipped |= decoded.skipped
    return left, skipped


def open_images(table: RadiographTable) -> Iterator[Image.Image]:
    """The pictures of these rows, one by one."""
    names = table.ids
    for row, cell in enumerate(table.rows["image"]):
        yield open_image(cell.as_py(), f"{table.name}: {names[row]}")


# ---- the model -----------------------------------------------------------------------------------------------------


def load_classifier(source: str, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, Any]:
    """A classifier of any family, in evaluation mode on its device, and its image processor.

    Raises:
        SpcxrError: as `load_checkpoint`; it is for regression; or scikit-learn, which the metrics need, is missing.
    """
    check_packages()
    loaded = load_checkpoint("classification", source, device, any_family=True)
    if loaded.model.config.problem_type == "regression":
        raise SpcxrError(f"{source}: a regression model gives no probabilities")
    return loaded.model, loaded.processor


def match_classes(source: str, names: Sequence[str], given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Class -> the labels of the data that count as it, in the model's order; by default a class is its own label.

    `names` are the model's classes, `given` those of `labels.parse_classes`; empty for the default.
    """
    given = given or {name: [name] for name in names}
    if sorted(given) != sorted(names):
        raise SpcxrError(f"{source}: its classes are {', '.join(names)}; --classes names {', '.join(given)}")
    return {name: list(given[name]) for name in names}


def predict_logits(
    model: PreTrainedModel,
    processor: Any,
    images: Iterable[Image.Image],
    batch_size: int = 32,
    bf16: bool = False,
    name: str = "predicting",
) -> torch.Tensor:
    """Logits (n, classes) float32 of pictures of any sizes, grey of 8 or 16 bits.

    They are read as they are needed, and take the way through the image processor that a user's do. `name` is what the
    progress bar says.
    """
    parts = tqdm(_batches(images, batch_size), desc=name, unit="batch")
    with torch.no_grad():
        found = [forward(model, to_pixel_values(processor, part), bf16).logits.float().cpu() for part in parts]
    return torch.cat(found)


def predict_embeddings(
    model: PreTrainedModel, processor: Any, images: Iterable[Image.Image], name: str = "embedding"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (n, D) and logits (n, classes), float32, of pictures; as `predict_logits`, of an SPCXR model."""
    parts = tqdm(_batches(images, 32), desc=name, unit="batch")
    with torch.no_grad():
        found = [embed_and_classify(model, to_pixel_values(processor, part)) for part in parts]
    embeddings, logits = (torch.cat(values).float().cpu() for values in zip(*found, strict=True))
    return embeddings, logits


def _batches(images: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    pictures = iter(images)
    return iter(lambda: list(itertools.islice(pictures, size)), [])
