"""Feature statistics of a classifier's training images, which say how unlike them another image is.

The distance of an image is the Mahalanobis distance of its embedding to the nearest class mean, with one covariance for
all classes (arXiv 1807.03888). It is reported as `unlike_training`, its rank among those of the validation images.
"""

from __future__ import annotations

from typing import Any

import torch

from spcxr_hf.errors import SpcxrError
from spcxr_hf.modeling.modeling_spcxr import SpcxrForImageClassification
from spcxr_hf.models.loading import Statistics, forward

UNLIKE = 0.99  # above this share an answer gets a warning, and `--abstain` leaves it empty


def fit_statistics(embeddings: torch.Tensor, targets: torch.Tensor, validation: torch.Tensor) -> Statistics:
    """Class means, the inverse of the shared covariance, and the distances of the validation images.

    Args:
        embeddings: (n, D) of training images.
        targets: (n, labels) of 0 and 1, NaN where missing; images with equal targets are one class.
        validation: (m, D) of the images that another image's distance is ranked among.

    Returns:
        `means` (classes, D), `precision` (D, D) and `distances` (m), ascending; float32.

    Raises:
        SpcxrError: there are fewer than two images.
    """
    from sklearn.covariance import LedoitWolf  # shrinkage: there may be fewer images than dimensions

    if len(embeddings) < 2 or not len(validation):
        raise SpcxrError(f"feature statistics need two training images and one of validation; got {len(embeddings)}")
    values = embeddings.double()
    _, classes = torch.unique(targets.nan_to_num(-1.0), dim=0, return_inverse=True)
    means = torch.stack([values[classes == index].mean(dim=0) for index in range(int(classes.max()) + 1)])
    precision = LedoitWolf(assume_centered=True).fit((values - means[classes]).numpy()).precision_
    found = {"means": means.float(), "precision": torch.from_numpy(precision).float()}
    distances = SpcxrForImageClassification.training_distance(validation, found)
    return found | {"distances": distances.sort().values.float()}


def embed_and_classify(model: Any, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, D) and logits (B, labels) of one forward pass; pixel values (B, C, H, W)."""
    embeddings = forward(model.spcxr, pixel_values).pooler_output
    return embeddings, model.classifier(embeddings)
