"""Masks by a segmentation model: of a batch of images, lungs of a decoded set, and their areas.

segment_structures -> segment_lungs    pixel values -> masks by label, or lungs, each at its image's own size
load_segmenter -> Segmenter.find       decoded images (n, 1, S, S) -> lungs (n, S, S)
find_lungs -> Segmenter.find           the same, kept in a folder for the next start
measure_lungs                          areas of the two lungs
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from spcxr_hf.data.table import Decoded, cache_key, read_cache, write_cache
from spcxr_hf.errors import SpcxrError
from spcxr_hf.models.loading import Loaded, forward, label_names, load_checkpoint, to_pixel_values

BOTH_LUNGS = ("left lung", "right lung")


def segment_structures(
    loaded: Loaded, pixel_values: torch.Tensor, sizes: Sequence[tuple[int, int]], bf16: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Where each label is: label -> booleans (height, width) of each image itself, on the CPU.

    The one place where the logits of a segmentation model are read: by the most probable label of each pixel, or label
    by label where they may overlap.

    Args:
        loaded: A segmentation model.
        pixel_values: (B, C, H, W), of the model's image processor.
        sizes: (height, width) of each image before the image processor.
        bf16: Run the model in bfloat16 autocast.
    """
    config = loaded.model.config
    names = dict(config.id2label or {})
    with torch.no_grad():
        outputs = forward(loaded.model, pixel_values, bf16)
        if config.problem_type == "multi_label_classification":
            found = loaded.processor.post_process_overlapping_segmentation(outputs, target_sizes=list(sizes))
        else:
            maps = loaded.processor.post_process_semantic_segmentation(outputs, target_sizes=list(sizes))
            found = [{number: labels == number for number in names} for labels in maps]
    return [{label: masks[number].cpu() for number, label in names.items()} for masks in found]


def segment_lungs(
    loaded: Loaded, pixel_values: torch.Tensor, sizes: Sequence[tuple[int, int]], bf16: bool = False
) -> list[torch.Tensor]:
    """True where lung is, as `segment_structures` has it: booleans (height, width) of each image.

    Raises:
        SpcxrError: the model has no label "lung", and not "left lung" and "right lung".
    """
    check_lungs(loaded)
    return [lungs_of(masks) for masks in segment_structures(loaded, pixel_values, sizes, bf16)]


def check_lungs(loaded: Loaded) -> None:
    """Refuse a segmentation model that does not know lungs."""
    labels = label_names(loaded.model.config)
    if "lung" not in labels and not {*BOTH_LUNGS} <= {*labels}:
        raise SpcxrError(f"{loaded.name}: its labels are {', '.join(labels)}; there is no 'lung' among them")


def lungs_of(masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The lungs among the masks of an image."""
    return masks["lung"] if "lung" in masks else masks[BOTH_LUNGS[0]] | masks[BOTH_LUNGS[1]]


@dataclass(frozen=True)
class Segmenter:
    """A model that knows lungs, and its image processor."""

    loaded: Loaded

    def find(self, images: torch.Tensor, batch_size: int = 32, bf16: bool = False) -> torch.Tensor:
        """The lungs of whole radiographs (n, 1, S, S) uint8: (n, S, S) booleans on the CPU."""
        found = []
        for part in tqdm(images.split(batch_size), desc="lungs", unit="batch"):
            pictures = [Image.fromarray(image[0].numpy()) for image in part.cpu()]
            pixel_values = to_pixel_values(self.loaded.processor, pictures)
            found += segment_lungs(self.loaded, pixel_values, [tuple(part.shape[-2:])] * len(part), bf16)
        return torch.stack(found)

    def digest(self) -> str:
        """Eight digits that name the weights and the size of the input."""
        digest = hashlib.sha256(str(self.loaded.processor.size).encode())
        for name, values in sorted(self.loaded.model.state_dict().items()):
            digest.update(name.encode() + values.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:8]


def load_segmenter(source: str, device: torch.device | str = "cpu") -> Segmenter:
    """A segmentation model of any family by its folder or Hub id."""
    loaded = load_checkpoint("segmentation", source, device, any_family=True)
    check_lungs(loaded)
    return Segmenter(loaded)


def find_lungs(
    segmenter: Segmenter, decoded: Decoded, cache: str | os.PathLike | None = None, bf16: bool = False
) -> torch.Tensor:
    """The lungs of a decoded set: (n, S, S) booleans.

    Args:
        cache: A folder to keep them in, for the next start with the same rows and the same weights; 8 kB an image
            of 256 x 256.
        bf16: Run the model in bfloat16 autocast.
    """
    shape = (len(decoded.images), *decoded.images.shape[-2:])
    file = None
    if cache is not None:
        file = Path(cache) / f"{cache_key(decoded.table)}-lungs-{segmenter.digest()}-{shape[-1]}.npy"
        if (kept := read_cache(file, [-(-math.prod(shape) // 8)])) is not None:
            return torch.from_numpy(np.unpackbits(kept[0], count=math.prod(shape)).reshape(shape).astype(bool))
    lungs = segmenter.find(decoded.images, bf16=bf16)
    if file is not None:
        write_cache(file, np.packbits(lungs.numpy()))
    return lungs


SMALLEST_LUNG = 0.1  # of the larger one; a second region below that is no lung but an island


class LungAreas(NamedTuple):
    """Shares of the image, 0..1: all that is lung, and the two lungs by the side of the image that they lie on."""

    total: float
    image_left: float
    image_right: float


def measure_lungs(mask: np.ndarray) -> LungAreas:
    """The area of the mask (height, width), boolean, and of the two lungs in it.

    The lungs are the two largest connected regions. Where there is one, or the second is a mere island, as when the two
    have grown together, the column through the mask's centre of mass parts them instead.
    """
    total = int(mask.sum())
    if total == 0:
        return LungAreas(0.0, 0.0, 0.0)
    areas, centres = connected_regions(mask)
    largest = np.argsort(areas)[::-1][:2]
    if len(largest) == 2 and areas[largest[1]] >= SMALLEST_LUNG * areas[largest[0]]:
        first, second = sorted(largest, key=lambda region: centres[region])
        left, right = areas[first], areas[second]
    else:
        middle = round((mask.sum(axis=0) * (np.arange(mask.shape[1]) + 0.5)).sum() / total)
        left, right = mask[:, :middle].sum(), mask[:, middle:].sum()
    return LungAreas(total / mask.size, float(left) / mask.size, float(right) / mask.size)


def connected_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area in pixels and mean column of each region of a boolean mask (height, width) whose pixels touch by a side.

    Row by row: a row is a few runs of true pixels, and a run joins the regions of the runs that it touches in the
    row above.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]  # exclusive; in the same order
    regions = _join_runs(rows.tolist(), starts.tolist(), ends.tolist())
    _, region = np.unique(regions, return_inverse=True)
    lengths = ends - starts
    areas = np.bincount(region, weights=lengths)
    return areas, np.bincount(region, weights=lengths * (starts + ends) / 2) / areas


def _join_runs(rows: list[int], starts: list[int], ends: list[int]) -> list[int]:
    """For each run, sorted by row and start, the index of the run that represents its region."""
    parents = list(range(len(rows)))

    def representative(run: int) -> int:
        while parents[run] != run:
            parents[run] = run = parents[parents[run]]
        return run

    above = 0  # the first run of the row above that is not wholly left of this one
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[run]):
            above += 1
        touching = above
        while rows[touching] == row - 1 and starts[touching] < ends[run]:
            parents[representative(touching)] = representative(run)
            touching += 1
    return [representative(run) for run in range(len(rows))]
