"""Deletion and insertion curves of saliency maps, as RISE measures whether a map is faithful.

The answer falls fast when the patches that a map ranks first are deleted, and rises fast when they are inserted
(Petsiuk, Das and Saenko, BMVC 2018, arXiv 1806.07421, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur
from transformers import PreTrainedModel

from spcxr_hf.errors import SpcxrError
from spcxr_hf.evaluation.plots import FONT_SIZE, panel_grid, styles
from spcxr_hf.inference.explain import Target, check_model, evaluating, grid_of, target_matrix, target_probability

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PerturbationCurves:
    """How the answer changes while patches are taken away, or put back, in the order of a map.

    Attributes:
        fractions: (steps + 1,) share of the patches that were deleted or inserted, 0 .. 1.
        deletion: (B, steps + 1) the answer, 0 .. 1 for a class: it falls fast where the map is right.
        insertion: (B, steps + 1): it rises fast where the map is right.
    """

    fractions: torch.Tensor
    deletion: torch.Tensor
    insertion: torch.Tensor

    @property
    def deletion_auc(self) -> torch.Tensor:
        """(B,) area under the deletion curve, by trapezia; lower is better."""
        return torch.trapezoid(self.deletion, self.fractions)

    @property
    def insertion_auc(self) -> torch.Tensor:
        """(B,) area under the insertion curve, by trapezia; higher is better."""
        return torch.trapezoid(self.insertion, self.fractions)


@torch.no_grad()
def deletion_insertion(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    relevance: torch.Tensor,
    target: Target = None,
    steps: int = 16,
    blur: float = 0.1,
    batch_size: int = 64,
) -> PerturbationCurves:
    """Deletion and insertion curves of maps (arXiv 1806.07421, section 4.1), by whole patches.

    Deletion paints patches grey (0, the mean after normalisation), the most relevant first. Insertion begins with a
    blurred picture, which has no edges that a grey patch would make, and puts the sharp patches back.

    Args:
        model: As for `explain`.
        pixel_values: (B, C, H, W).
        relevance: (B, rows, columns) maps; any other ranking of patches too. Equal values go row by row.
        target: As for `explain`; of None the answer is the cosine of the embedding with that of the whole picture.
        steps: Number of steps from nothing to everything, at least 1; more than there are patches is of no use.
        blur: Standard deviation of the Gaussian blur as a share of the longer side.
        batch_size: Images per forward pass.

    Returns:
        The curves, float32 on the CPU; the answer for a class is its probability.

    Raises:
        SpcxrError: as `explain`; or the maps do not fit the images, or a number is out of range.
    """
    check_model(model, pixel_values)
    batch, _, height, width = pixel_values.shape
    if tuple(relevance.shape) != (expected := (batch, *grid_of(model, pixel_values))):
        raise SpcxrError(f"the maps have shape {tuple(relevance.shape)}; expected {expected}")
    if steps < 1 or blur <= 0:
        raise SpcxrError(f"steps must be at least 1 and blur above 0; got {steps}, {blur}")
    pixels = pixel_values.to(model.device)
    sigma = blur * max(height, width)
    reach = max(1, min(round(2 * sigma), min(height, width) - 1))  # at most the pixels that can be reflected
    blurred = gaussian_blur(pixels, kernel_size=[2 * reach + 1, 2 * reach + 1], sigma=[sigma, sigma])
    ranks = relevance.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0: the most relevant
    fractions = torch.linspace(0, 1, steps + 1)
    counts = (fractions * ranks.shape[1]).round()
    with evaluating(model):
        answer = _answerer(model, pixels, target, batch_size)
        deletion, insertion = [], []
        for count in counts.tolist():
            chosen = (ranks < count).reshape(batch, 1, *grid_of(model, pixels)).to(pixels)
            chosen = functional.interpolate(chosen, size=(height, width), mode="nearest").bool()
            deletion.append(answer(pixels.masked_fill(chosen, 0.0)))
            insertion.append(answer(torch.where(chosen, pixels, blurred)))
    return PerturbationCurves(fractions, torch.stack(deletion, dim=1), torch.stack(insertion, dim=1))


def _answerer(
    model: PreTrainedModel, pixels: torch.Tensor, target: Target, batch_size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from images (B, C, H, W), perturbed ones of `pixels`, to the answers (B,)."""
    if target is not None:
        wanted = target_matrix(model, target, len(pixels)).split(batch_size)
        return lambda images: torch.cat([
            target_probability(model, model(part).logits, rows).cpu()
            for part, rows in zip(images.split(batch_size), wanted, strict=True)
        ])  # fmt: skip

    def embed(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([model.base_model(part).pooler_output.float().cpu() for part in images.split(batch_size)])

    whole = embed(pixels)
    return lambda images: functional.cosine_similarity(embed(images), whole, dim=1)


def draw_perturbation(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], fractions: np.ndarray) -> Figure:
    """Deletion and insertion curves, the mean over the images, one line for each kind of map.

    Args:
        curves: Name -> mean deletion and mean insertion curve, (steps + 1,) each.
        fractions: (steps + 1,) share of the patches.
    """
    figure, grid = panel_grid(
        ["deletion (lower is better)", "insertion (higher is better)"], side=3.6, extra_height=-0.3
    )
    for number, axes in enumerate(grid):
        for style, (name, pair) in zip(styles(len(curves)), curves.items(), strict=True):
            axes.plot(fractions, pair[number], color=style.colour, linestyle=style.line, marker=style.marker,
                      markersize=4, linewidth=1.5, label=name)  # fmt: skip
        axes.set_xlabel(f"share of the patches that are {('deleted', 'inserted')[number]}", fontsize=FONT_SIZE)
        axes.set_ylabel("probability of the target", fontsize=FONT_SIZE)
        axes.set_ylim(-0.02, 1.02)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, framealpha=0.85, handlelength=3)
    return figure
