"""A classifier and the rows that it is judged on: a split with its labels, and the logits on its images."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from spcxr_hf.data.labels import targets_of
from spcxr_hf.data.table import OnError, RadiographTable, decode_set, open_image
from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.evaluation.metrics import check_packages
from spcxr_hf.images.reader import to_8_bit
from spcxr_hf.models.encoders import LOADING_ERRORS
from spcxr_hf.models.precision import bf16_autocast

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
        table: The whole set.
        label_column: Its cells are as `labels.targets_of` takes them.
        split_column: Where the split's name stands.
        split: Its name.
        classes: Class -> the labels that count as it, as of `labels.parse_classes`. A label may count as several, as
            where `abnormal` is any of the findings that are classes themselves.
        multi_label: Whether labels may hold together.

    Raises:
        SpcxrError: there is no such column, no such row, or none with a label that is one of the classes.
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

    Raises:
        SpcxrError: more than half of a split's images cannot be read.
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
    """The pictures of these rows, one by one.

    Raises:
        SpcxrError: one cannot be read; the message names its row.
    """
    names = table.ids
    for row, cell in enumerate(table.rows["image"]):
        yield open_image(cell.as_py(), f"{table.name}: {names[row]}")


# ---- the model -----------------------------------------------------------------------------------------------------


def load_judged(source: str, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, Any]:
    """A classifier of any family, in evaluation mode on its device, and its image processor.

    Raises:
        SpcxrError: it is no classifier, has no weights for a part of it, or has no image processor; or what it is to be
            judged with, scikit-learn, is missing.
    """
    check_packages()
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(source)
    except LOADING_ERRORS as error:
        raise SpcxrError(f"{source}: no classifier with its image processor ({one_line(error)})") from error
    lost = sorted(name for name in loading["missing_keys"] if not name.endswith("mask_token"))
    if lost:
        raise SpcxrError(f"{source}: no trained classifier, since there are no weights for {', '.join(lost[:4])}")
    return model.to(device).eval(), processor


def is_multi_label(model: PreTrainedModel) -> bool:
    """Whether the model's labels may hold together."""
    return model.config.problem_type == "multi_label_classification"


def class_names(model: PreTrainedModel) -> list[str]:
    """What the model's outputs are called, in their order."""
    return [str(name) for _, name in sorted(dict(model.config.id2label or {}).items())]


def match_classes(source: str, names: Sequence[str], given: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Class -> the labels of the data that count as it, in the model's order; by default a class is its own label.

    Args:
        source: The model, for messages.
        names: Its classes.
        given: As of `labels.parse_classes`; empty for the default.

    Raises:
        SpcxrError: the classes that are given are not the model's.
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

    Args:
        model: As of `load_judged`.
        processor: Its image processor: the pictures take the way that a user's do.
        images: Read as they are needed.
        batch_size: Images per forward pass.
        bf16: Compute in bfloat16 autocast.
        name: What the progress bar says.
    """
    parts = tqdm(_batches(images, batch_size), desc=name, unit="batch")
    return torch.cat([forward(model, processor, part, bf16) for part in parts])


@torch.no_grad()
def forward(
    model: PreTrainedModel,
    processor: Any,
    images: list[Image.Image],
    bf16: bool = False,
    image_size: int | None = None,
) -> torch.Tensor:
    """Logits (B, classes) float32, on the CPU, of one batch; see `predict_logits`.

    Args:
        image_size: Side of the input in pixels; by default the image processor's.
    """
    if not hasattr(processor, "num_output_channels"):  # of another family: 8 bits and 3 channels
        images = [_in_colour(image) for image in images]
    options = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
    inputs = processor(images, return_tensors="pt", **options).to(model.device)
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    asked = {"interpolate_pos_encoding": True} if interpolates else {}
    with bf16_autocast(model.device, bf16):
        return model(pixel_values=inputs["pixel_values"], **asked).logits.float().cpu()


def _batches(images: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    part: list[Image.Image] = []
    for image in images:
        part.append(image)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _in_colour(image: Image.Image) -> Image.Image:
    return to_8_bit(image).convert("RGB")
