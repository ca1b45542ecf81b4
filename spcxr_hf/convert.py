"""Weights from elsewhere, and for elsewhere: other image sizes, three channels to one, timm and GMML-release state dicts."""

from __future__ import annotations

import torch
from torch import nn

from .errors import SpcxrError
from .modeling.modeling_spcxr import SpcxrPreTrainedModel


@torch.no_grad()
def change_image_size(model: SpcxrPreTrainedModel, image_size: int) -> None:
    """Make `image_size` (pixels) the model's native size: its position embeddings are interpolated once, for good.

    Raises:
        SpcxrError: `image_size` is no multiple of the patch size.
    """
    if image_size % model.config.patch_size:
        raise SpcxrError(f"image_size ({image_size}) must be a multiple of patch_size ({model.config.patch_size})")
    embeddings = model.base_model.embeddings
    grid = image_size // model.config.patch_size
    positions = embeddings.interpolate_position_embeddings(grid, grid)
    embeddings.position_embeddings = nn.Parameter(positions.detach().clone())
    embeddings.grid_size = grid
    model.config.image_size = image_size
