"""What a pretraining asks for at each pixel: the pixel itself, or its value relative to its patch.

By default it is the pixel (GMML, arXiv 2205.14986). With `norm_pix_loss`, named as in transformers' `ViTMAEConfig`,
each patch of the target has mean 0 and deviation 1 (masked autoencoders, arXiv 2111.06377, section 4.1): what counts is
the structure within a patch, not how bright it is. The configuration of such a checkpoint says so, and whoever draws
its reconstructions maps them back.
"""

from __future__ import annotations

from typing import Any

import torch

SMALLEST_VARIANCE = 1e-6  # as the masked autoencoder's; a patch of one grey has no structure to scale


def normalise_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images (B, C, H, W) with mean 0 and deviation 1 in each patch and channel; H and W are multiples of it."""
    mean, deviation = _statistics(images, patch_size)
    return (images.float() - mean) / deviation


def as_pixels(config: Any, reconstruction: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """A model's reconstruction on the scale of its `pixel_values`.

    Args:
        config: The model's configuration.
        reconstruction: (B, C, H, W) float32.
        clean: (B, C, H, W), or of one image for all of them. After a pretraining with `norm_pix_loss` each patch takes
            its mean and deviation from here, as pictures of masked autoencoders do.
    """
    if not getattr(config, "norm_pix_loss", False):
        return reconstruction
    mean, deviation = _statistics(clean.to(reconstruction.device), config.patch_size)
    return reconstruction * deviation + mean


def _statistics(images: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the patch that each pixel lies in, (B, C, H, W) float32."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.float().reshape(batch, channels, rows, patch_size, columns, patch_size)
    variance, mean = torch.var_mean(patches, dim=(3, 5), keepdim=True)
    deviation = (variance + SMALLEST_VARIANCE).sqrt()
    return mean.expand_as(patches).reshape(images.shape), deviation.expand_as(patches).reshape(images.shape)


__all__ = ["as_pixels", "normalise_patches"]
