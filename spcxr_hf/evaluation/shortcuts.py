"""Shortcut tests: probes on low-resolution grey values and borders, and images with regions masked out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from spcxr_hf.errors import needs
from spcxr_hf.evaluation.metrics import auroc

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression
SMALLEST_LUNGS = 0.05  # share of the image below which lungs count as not found
Features = Callable[[torch.Tensor], np.ndarray]  # images (n, 1, S, S) uint8 -> (n, features)
Classify = Callable[[np.ndarray], np.ndarray]  # (n, features) -> probabilities (n, classes)

# ---- probes --------------------------------------------------------------------------------------------------------


def grey_means(images: torch.Tensor, side: int) -> np.ndarray:
    """Images (n, 1, S, S) uint8 -> mean grey values (n, side * side) in 0 .. 1."""
    parts = [
        torch.nn.functional.interpolate(part.float() / 255, size=(side, side), mode="area").flatten(1)
        for part in images.split(512)
    ]
    return torch.cat(parts).numpy()


def border(images: torch.Tensor) -> np.ndarray:
    """Images (n, 1, S, S) uint8 -> the outermost ring of their 16 x 16 thumbnail, (n, 60)."""
    ring = np.ones((16, 16), dtype=bool)
    ring[1:-1, 1:-1] = False
    return grey_means(images, 16)[:, ring.ravel()]


FEATURES: dict[str, Features] = {
    "thumbnail_16": lambda images: grey_means(images, 16),
    "thumbnail_32": lambda images: grey_means(images, 32),
    "border": border,
}


def choose_probe(
    features: Features, found: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], multi_label: bool
) -> Features:
    """Logistic regression fitted on `train`, with the strength that has the best mean AUROC on `val`.

    Args:
        features: Images -> features.
        found: The features (n, features) of the splits `train` and `val`.
        targets: (n, classes) of both: 1, 0, or NaN where a label is missing.
        multi_label: Whether labels may hold together; a regression for each then.

    Returns:
        From images (n, 1, S, S) uint8 to probabilities (n, classes).
    """
    mean, std = found["train"].mean(axis=0), found["train"].std(axis=0) + 1e-6
    scaled = {name: (values - mean) / std for name, values in found.items()}

    def quality(classify: Classify) -> float:
        probabilities = classify(scaled["val"])
        each = [auroc(p, y) for p, y in zip(probabilities.T, targets["val"].T, strict=True)]
        return float(np.nanmean(each)) if not np.isnan(each).all() else 0.0

    fitted = [fit_regression(scaled["train"], targets["train"], multi_label, strength) for strength in STRENGTHS]
    best = max(fitted, key=quality)
    return lambda images: best((features(images) - mean) / std)


def fit_regression(values: np.ndarray, targets: np.ndarray, multi_label: bool, strength: float) -> Classify:
    """Logistic regression from (n, features) to probabilities (n, classes): one of all classes, or one for each label.

    Classes have equal weight, so that the accuracy by which the most probable class is right is a balanced one.
    """
    with needs("train", "scikit-learn"):
        from sklearn.linear_model import LogisticRegression
    options: dict[str, Any] = {"C": strength, "max_iter": 1000, "class_weight": "balanced"}
    if not multi_label:
        labels = targets.argmax(axis=1)
        whole = LogisticRegression(**options).fit(values, labels)

        def classes(rows: np.ndarray) -> np.ndarray:
            probabilities = np.zeros((len(rows), targets.shape[1]))
            probabilities[:, whole.classes_] = whole.predict_proba(rows)
            return probabilities

        return classes

    def one(column: np.ndarray) -> Classify:
        known = ~np.isnan(column)
        if np.unique(column[known]).size < 2:
            return lambda rows: np.full(len(rows), 0.5)
        regression = LogisticRegression(**options).fit(values[known], column[known])
        return lambda rows: regression.predict_proba(rows)[:, 1]

    each = [one(column) for column in targets.T]
    return lambda rows: np.stack([label(rows) for label in each], axis=1)


# ---- masked images -------------------------------------------------------------------------------------------------


def boxes(masks: torch.Tensor) -> torch.Tensor:
    """Masks (n, S, S) -> the upright rectangles around them, (n, S, S)."""
    rows, columns = masks.any(dim=2), masks.any(dim=1)

    def span(line: torch.Tensor) -> torch.Tensor:  # true from the first true value to the last
        reached = line.cumsum(dim=1) > 0
        return reached & (line.flip(1).cumsum(dim=1) > 0).flip(1)

    return span(rows)[:, :, None] & span(columns)[:, None, :]


def filled(images: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Images (n, 1, S, S) uint8 with their own mean where `where` (n, S, S) is true."""
    mean = images.float().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8)
    return torch.where(where[:, None], mean, images)


def lungs_alone(
    images: torch.Tensor, lungs: torch.Tensor, share: float = 1.0, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Images (n, 1, S, S) uint8 with all but their lungs (n, S, S) filled with the image's mean, or as they are.

    Args:
        share: The probability that an image is filled. One whose lungs were not found stays as it is.
        generator: For the draw, on the images' device.
    """
    chosen = torch.rand(len(images), generator=generator, device=images.device) < share
    chosen &= lungs.float().mean(dim=(1, 2)) >= SMALLEST_LUNGS
    return filled(images, chosen[:, None, None] & ~lungs)
