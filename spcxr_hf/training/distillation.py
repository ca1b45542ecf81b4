"""Distillation beside GMML: the student predicts the features of a frozen network from films processed in another way.

teacher_targets            the teacher's features of every image as it is: principal components, of the map and pooled
SpcxrForDistillation       GMML on some images of a batch, the teacher's features on the others
draw_student_views         whole films, mirrored by half, with their processing changed
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import MaskedImageModelingOutput

from spcxr_hf.data.table import RadiographTable, cache_key
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_file
from spcxr_hf.modeling.modeling_spcxr import SpcxrForPreTraining
from spcxr_hf.models.encoders import Encoder, load_encoder
from spcxr_hf.transforms.augment import normalise, resize
from spcxr_hf.transforms.processing import ProcessingChanges

PCA_IMAGES = 2400  # images that the principal components are computed from
LOCAL, POOLED = "teacher_local", "teacher_pooled"  # columns of the set


class Components(NamedTuple):
    """Principal components of features: `mean` (D,) and `projection` (D, K)."""

    mean: torch.Tensor
    projection: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, count: int) -> Components:
        """The first components of features (n, D), scaled half-way to unit variance, to a mean variance of 1.

        Unscaled, the first few would be the whole loss; at unit variance, noise would be most of it.
        """
        if count > features.shape[1]:
            raise SpcxrError(f"the teacher's features have {features.shape[1]} dimensions; {count} components are more")
        mean = features.double().mean(dim=0)
        variances, directions = torch.linalg.eigh(torch.cov((features.double() - mean).T))
        variances, directions = variances.flip(0)[:count].clamp(min=1e-12), directions.flip(1)[:, :count]
        scale = variances**-0.25
        scale = scale / (variances * scale**2).mean().sqrt()
        return cls(mean.float(), (directions * scale).float())

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) @ self.projection


def teacher_targets(
    model: str,
    table: RadiographTable,
    images: torch.Tensor,
    components: int,
    cache: str | os.PathLike | None = None,
    device: str = "cpu",
    batch_size: int = 32,
) -> dict[str, torch.Tensor]:
    """The teacher's features of whole images, as columns of a set.

    Args:
        model: What `load_encoder` takes.
        table: The set that the images are of; the cache is named by it.
        images: (n, 1, S, S) uint8.
        components: K, principal components of the map's features and, by themselves, of the pooled ones.
        cache: A folder to keep the targets in.

    Returns:
        `teacher_local` (n, N, K) float16, row by row, and `teacher_pooled` (n, K) float32.
    """
    key = hashlib.sha256(f"{model} {components} {len(images)}".encode()).hexdigest()[:12]
    files = {
        name: None if cache is None else Path(cache) / f"{cache_key(table)}-{key}-{name}.npy"
        for name in (LOCAL, POOLED)
    }
    if all(file is not None and file.is_file() for file in files.values()):
        return {name: torch.from_numpy(np.load(file, mmap_mode="c")) for name, file in files.items() if file}
    teacher = load_encoder(model, device=device)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:PCA_IMAGES].sort().values
    maps = torch.cat([_features(teacher, images[rows]) for rows in chosen.split(batch_size)])
    local = Components.of(maps[:, ::2].flatten(0, 1), components)
    pooled = Components.of(maps.mean(dim=1), components)
    targets = {
        LOCAL: torch.empty(len(images), maps.shape[1], components, dtype=torch.float16),
        POOLED: torch.empty(len(images), components),
    }
    for rows in tqdm(torch.arange(len(images)).split(batch_size), desc="teacher"):
        features = _features(teacher, images[rows])
        targets[LOCAL][rows] = local(features).half()
        targets[POOLED][rows] = pooled(features.mean(dim=1))
    for name, file in files.items():
        if file is not None:
            with atomic_file(file) as path, path.open("wb") as stream:
                np.save(stream, targets[name].numpy())
    return targets


def _features(teacher: Encoder, images: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, D) of stored images (B, 1, S, S) uint8."""
    return teacher.patch_tokens(resize(images, teacher.image_size).round().clamp(0, 255).to(torch.uint8))


class SpcxrForDistillation(SpcxrForPreTraining):
    """GMML with a second task: the teacher's features of clean images, from `views` of them.

    Both heads are linear, so that the features are linearly there in the tokens and in their mean.
    `config.teacher_components` is their width.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.local_head = nn.Linear(config.hidden_size, config.teacher_components)
        self.pooled_head = nn.Linear(config.hidden_size, config.teacher_components)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        views: torch.Tensor | None = None,
        local: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        teacher_weight: float = 1.0,
    ) -> MaskedImageModelingOutput:
        """As `SpcxrForPreTraining.forward`; with `views` (b, 1, H, W) the loss has the distillation added.

        Args:
            pixel_values: (B, C, H, W), corrupted.
            bool_masked_pos, labels: As in `SpcxrForPreTraining`.
            views: Of other images, normalised.
            local: (b, N, K) the teacher's map of them, on the grid of the patches.
            pooled: (b, K) its pooled features.
            teacher_weight: Of the distillation's loss relative to the reconstruction's.
        """
        outputs = super().forward(pixel_values, bool_masked_pos, labels)
        if views is None or local is None or pooled is None:
            return outputs
        tokens = self.spcxr(views).last_hidden_state[:, 1:]
        loss = nn.functional.smooth_l1_loss(self.local_head(tokens).float(), local)
        loss = loss + nn.functional.smooth_l1_loss(self.pooled_head(tokens.mean(dim=1)).float(), pooled)
        outputs.loss = outputs.loss + teacher_weight * loss
        return outputs

    def without_heads(self) -> SpcxrForPreTraining:
        """The model that is kept: the encoder and the reconstruction's head, without the teacher's."""
        config: Any = type(self.config).from_dict(self.config.to_dict())
        del config.teacher_components
        plain = SpcxrForPreTraining(config)
        kept = {name: value for name, value in self.state_dict().items() if name in plain.state_dict()}
        plain.load_state_dict(kept)
        return plain


def draw_student_views(
    images: torch.Tensor,
    columns: dict[str, torch.Tensor],
    size: int,
    patch_size: int,
    changes: ProcessingChanges | None,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """What `SpcxrForDistillation` takes of stored images (B, 1, S, S): `views`, `local` and `pooled`.

    The views show the whole film, since the targets are of the whole film; half of them are mirrored, and the
    teacher's map with them.
    """
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    films = torch.where(mirrored.reshape(-1, 1, 1, 1), images.flip(3), images).float() / 255
    if changes is not None:
        films = changes(films, generator)
    local = columns[LOCAL].float().transpose(1, 2)  # (B, K, N)
    side = int(local.shape[2] ** 0.5)
    maps = local.unflatten(2, (side, side))
    maps = torch.where(mirrored.reshape(-1, 1, 1, 1), maps.flip(3), maps)
    grid = size // patch_size
    if grid != side:
        maps = nn.functional.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)
    return {
        "views": normalise(resize(films, size)),
        "local": maps.flatten(2).transpose(1, 2),
        "pooled": columns[POOLED].float(),
    }
