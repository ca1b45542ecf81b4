"""Nearest neighbours in a model's feature space: an exact index on disk.

The index holds features and ids, no pictures. Features can identify a patient as images can: protect an index
like the images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional
from tqdm.auto import tqdm

from spcxr_hf.data.table import RadiographTable, open_image
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_file
from spcxr_hf.models.encoders import Encoder

FORMAT = "spcxr-neighbors-1"
EMBEDDED = {"path", "model", "note"}  # the keys that `spcxr embed` writes into a header
QUERIES = 256  # at once: their similarities to a million images take 1 GB


class Neighbor(NamedTuple):
    """An image of the index and its cosine similarity to the query, -1 .. 1."""

    id: str
    similarity: float


@dataclass(frozen=True)
class NeighborIndex:
    """Features of a set of images, searched exactly by cosine similarity.

    Attributes:
        features: (n, D) float32, each row of length 1. Build the index by `from_features`, which sees to that.
        ids: (n) what to call each image, each once.
        model: What made the features, for messages and checks; "" where unknown.
    """

    features: torch.Tensor
    ids: tuple[str, ...]
    model: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_features(cls, features: torch.Tensor, ids: Sequence[str], model: str = "") -> NeighborIndex:
        """An index of features (n, D), not yet normalised.

        Raises:
            SpcxrError: there are none, their number is not that of the ids, an id is a duplicate, or a feature
                vector is 0 or not finite, so that it has no direction.
        """
        _check(features, ids)
        return cls(_directions(features, ids), tuple(ids), model)

    def search(
        self, features: torch.Tensor, k: int = 5, exclude: Sequence[str | None] | None = None
    ) -> list[list[Neighbor]]:
        """The nearest images of each query, the nearest first; of equal ones the first in the index.

        Args:
            features: (queries, D).
            k: How many; fewer come back where the index holds no more.
            exclude: An id for each query that is not to be found, its own as a rule; None excludes nothing.
        """
        if k < 1:
            raise SpcxrError(f"k must be at least 1; got {k}")
        if features.dim() != 2 or features.shape[1] != self.features.shape[1]:
            raise SpcxrError(f"queries must be (n, {self.features.shape[1]}); got {tuple(features.shape)}")
        excluded = [None] * len(features) if exclude is None else list(exclude)
        if len(excluded) != len(features):
            raise SpcxrError(f"{len(excluded)} ids to exclude for {len(features)} queries")
        queries = _directions(features, [f"query {row}" for row in range(len(features))])
        found: list[list[Neighbor]] = []
        for start in range(0, len(queries), QUERIES):
            similarities = queries[start : start + QUERIES] @ self.features.T
            found += [self._best(*pair, k) for pair in zip(similarities, excluded[start:], strict=False)]
        return found

    def neighbors_of(self, name: str, k: int = 5) -> list[Neighbor]:
        """The nearest images of one that is in the index, without itself."""
        if name not in self.ids:
            raise SpcxrError(f"{name!r} is not in this index of {len(self)} images")
        row = self.ids.index(name)
        return self.search(self.features[row : row + 1], k, [name])[0]

    def _best(self, similarities: torch.Tensor, excluded: str | None, k: int) -> list[Neighbor]:
        order = similarities.sort(descending=True, stable=True).indices[: k + 1].tolist()
        kept = [row for row in order if self.ids[row] != excluded][:k]
        return [Neighbor(self.ids[row], max(-1.0, min(1.0, similarities[row].item()))) for row in kept]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically: the features, and ids and model as JSON in its header."""
        header = {"format": FORMAT, "ids": json.dumps(list(self.ids)), "model": self.model}
        try:
            with atomic_file(path) as partial:
                save_file({"features": self.features.contiguous()}, partial, metadata=header)
        except SafetensorError as error:
            raise SpcxrError(f"{path}: the index could not be written ({error})") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> NeighborIndex:
        """Read what `save` wrote, or `spcxr embed --output FILE.safetensors`, whose ids are the paths of its images.

        Raises:
            SpcxrError: the file is missing, damaged, or no such index.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.keys() >= EMBEDDED:
                    ids, models = (json.loads(header[name]) for name in ("path", "model"))
                    return cls.from_features(file.get_tensor("embeddings"), ids, str(models[0]))
                if header.get("format") != FORMAT:
                    raise SpcxrError(f"{path}: no index of neighbors ({FORMAT})")
                features, ids = file.get_tensor("features"), json.loads(header["ids"])
        except SpcxrError as error:
            raise SpcxrError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise SpcxrError(f"{path}: the index cannot be read ({error})") from error
        try:
            _check(features, ids)
        except SpcxrError as error:
            raise SpcxrError(f"{path}: {error}") from error
        if not ((features.norm(dim=1) - 1).abs() < 1e-3).all():  # NaN too
            raise SpcxrError(f"{path}: holds features that are not of length 1")
        return cls(features, tuple(ids), header.get("model", ""))


def build_index(
    encoder: Encoder,
    table: RadiographTable,
    model: str = "",
    batch_size: int = 32,
    pooling: str = "model",
    image_size: int | None = None,
) -> NeighborIndex:
    """Encode every image of a set; a few are decoded at a time.

    Args:
        encoder: As `encoders.load_encoder` gives it.
        table: As `data.read_table` reads a folder or shards; its ids name the images. Rows of a folder of pictures
            are named by the column `id` where there is one, else by their file.
        model: What to call the encoder in the index.
        batch_size: Images per forward pass.
        pooling: As of `Encoder.embed`.
        image_size: Side of the input in pixels; by default the encoder's own.
    """
    size = image_size or encoder.image_size
    parts = []
    for start in tqdm(range(0, len(table), batch_size), desc=f"encoding {table.name}", unit="batch"):
        part = RadiographTable(table.rows.slice(start, batch_size), table.name)
        parts.append(encoder.embed(_decode(part, size), pooling))
    return NeighborIndex.from_features(torch.cat(parts), image_names(table), model)


def image_names(table: RadiographTable) -> list[str]:
    """What to call the images of a set: the column `id`, else their files, else their row's number."""
    if "id" in table.rows.column_names:
        return table.ids
    paths = [cell["path"] for cell in table.column("image")]
    return [str(path) for path in paths] if all(paths) else table.ids


def _decode(part: RadiographTable, size: int) -> torch.Tensor:
    """(n, 1, size, size) uint8, without the progress bar that `decode_images` would show for each batch."""
    pictures = []
    for cell, name in zip(part.column("image"), part.ids, strict=True):
        image = open_image(cell, f"{part.name}: {name}")
        pictures.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(pictures)).unsqueeze(1)


def _check(features: torch.Tensor, ids: Sequence[str]) -> None:
    if features.dim() != 2 or not features.numel() or len(features) != len(ids):
        raise SpcxrError(f"an index needs (n, D) features and n ids; got {tuple(features.shape)} and {len(ids)} ids")
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise SpcxrError(f"an index names each image once; {name!r} appears twice")
        seen.add(name)


def _directions(features: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Each row at length 1, float32 on the CPU."""
    vectors = features.detach().float().cpu()
    lost = ~vectors.isfinite().all(dim=1) | (vectors.norm(dim=1) == 0)
    if lost.any():
        raise SpcxrError(f"{names[int(lost.nonzero()[0])]}: its features are 0 or not finite")
    return functional.normalize(vectors, dim=1)
