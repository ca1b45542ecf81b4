"""Saliency maps over the patches.

`rollout` (Abnar and Zuidema, ACL 2020, arXiv 2005.00928, section 3) multiplies attention through the blocks and is the
same for every class. `relevance` (Chefer, Gur and Wolf, ICCV 2021, arXiv 2103.15679, section 3) weighs attention by the
gradient of the answer, so it is a map of one class. A map shows what a model used, not where a disease is.

Shapes: B images, T = 1 + N tokens (CLS, then N = rows x columns patches), L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from spcxr_hf.drawing import OUTLINE, outline
from spcxr_hf.errors import SpcxrError
from spcxr_hf.models.loading import is_multi_label, label_names, probabilities

METHODS = ("relevance", "rollout")

# A label by number or name, several labels as one ("bacterial + viral"), one of these for each image, or None for the
# embedding.
Target = int | str | Sequence[int | str] | torch.Tensor | None

HEAT = ((0.835, 0.369, 0.0), (0.941, 0.894, 0.259))  # vermillion to yellow (Okabe and Ito): brighter, not only redder
MOST_OPAQUE = 0.8


# ---- maps --------------------------------------------------------------------------------------------------------


def explain(
    model: PreTrainedModel, pixel_values: torch.Tensor, target: Target = None, method: str = "relevance"
) -> torch.Tensor:
    """Saliency map: the share of each patch in the model's answer.

    Relevance (arXiv 2103.15679, equations 5 and 6): R begins as the identity, and every block adds A' R to it, where A'
    is the mean over the heads of the positive part of (gradient of the score) x (attention). R[i, j] is then how much
    of token i's final state comes from patch j. Rollout (arXiv 2005.00928) multiplies (mean attention + identity) / 2
    over the blocks instead, and takes no target.

    Two things differ from the paper. The score is the log-odds of the target: the same number on
    all logits changes it no more than the probability. And each row of attention sums to 1, so of its gradient only the
    part along that simplex counts, its projection: the row's mean is taken off. With the raw gradient, a bias of the
    values would make every patch relevant.

    The paper reads the row of CLS. With `pooling="mean"` the head sees p, the mean of the N patch tokens: a last layer
    of attention whose weights are all 1 / N, and to which the same rule applies. So each row of R counts by how much
    its token speaks for the target: the gradient of the score by p times the token, less the mean over the tokens,
    where positive. The identity that R begins with is left out: it would give each token's say to its own patch,
    wherever the token has it from (for CLS it falls on CLS itself).

    Weights of attention are computed eagerly for this call, whatever the model's attention implementation, which stays
    as it is; so do the modes of its modules, its parameters and their gradients, and `pixel_values`. Works inside
    `torch.no_grad` and `torch.inference_mode` too.

    Args:
        model: An SPCXR model of any task.
        pixel_values: (B, C, H, W), normalised; H and W multiples of the patch size.
        target: For a classifier: a label's number or name, names joined by " + " (their sum), or a sequence or tensor
            (B,) of those, one for each image. None: the image's embedding, whose score is its length along its own
            direction (the cosine with itself is 1 and has no gradient).
        method: "relevance" or "rollout".

    Returns:
        (B, rows, columns) float32 on the model's device, each value in 0 .. 1, an image's values summing to 1: the
        share of each patch. All 0 where no patch supports the target.

    Raises:
        SpcxrError: the model is of another family, has no such label, or the method or the images are refused.
    """
    if method not in METHODS:
        raise SpcxrError(f"method must be relevance or rollout; got {method!r}")
    check_model(model, pixel_values)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        # A leaf with a gradient, so that there is a graph even where the parameters are frozen.
        pixels = pixel_values.to(model.device).detach().clone().requires_grad_(method == "relevance")
        if method == "rollout":
            with torch.no_grad():
                patches = _rollout(_run(model.base_model, pixels).attentions, _pools_by_mean(model))
        else:
            patches = _relevance(*_score(model, pixels, target), _pools_by_mean(model))
    total = patches.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, patches / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return shares.unflatten(1, grid_of(model, pixel_values)).detach()


def grid_of(model: PreTrainedModel, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches in images (B, C, H, W)."""
    height, width = pixel_values.shape[-2:]
    return height // model.config.patch_size, width // model.config.patch_size


def _pools_by_mean(model: PreTrainedModel) -> bool:
    return model.config.pooling == "mean"


def _relevance(score: torch.Tensor, encoded: Any, by_mean: bool) -> torch.Tensor:
    """(B, N): what the blocks add to the identity, as pooling (or CLS) sees it."""
    *gradients, direction = torch.autograd.grad(score.sum(), (*encoded.attentions, encoded.pooler_output))
    identity = _identity(encoded.attentions)
    relevance = identity.expand(len(score), -1, -1)
    for attention, gradient in zip(encoded.attentions, gradients, strict=True):
        relevance = relevance + _along_simplex(attention.detach(), gradient).mean(dim=1) @ relevance
    if not by_mean:
        return relevance[:, 0, 1:]
    tokens = encoded.patch_tokens.detach().float()  # (B, N, D)
    alike = torch.full(tokens.shape[:2], 1 / tokens.shape[1], device=tokens.device)
    pooling = _along_simplex(alike, (tokens @ direction.float().unsqueeze(2)).squeeze(2))
    return (pooling.unsqueeze(1) @ (relevance - identity)[:, 1:, 1:]).squeeze(1)


def _along_simplex(weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The positive part of weights x gradient (..., T), of the gradient what lies along the simplex of the weights."""
    slopes = gradient.float()
    return (weights.float() * (slopes - slopes.mean(dim=-1, keepdim=True))).clamp(min=0)


def _rollout(attentions: Sequence[torch.Tensor], by_mean: bool) -> torch.Tensor:
    """(B, N); half of each block's output is its input, by the residual connection."""
    identity = _identity(attentions)
    rolled = identity
    for attention in attentions:
        rolled = (attention.float().mean(dim=1) + identity) / 2 @ rolled
    return rolled[:, 1:, 1:].mean(dim=1) if by_mean else rolled[:, 0, 1:]


def _identity(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.eye(attentions[0].shape[-1], device=attentions[0].device)


# ---- targets ----------------------------------------------------------------------------------------------------


def _score(model: PreTrainedModel, pixels: torch.Tensor, target: Target) -> tuple[torch.Tensor, Any]:
    """The number (B,) whose gradient is asked for, and what the encoder gave, attention weights too, in its graph."""
    encoded = _run(model.base_model, pixels)
    if target is None:
        pooled = encoded.pooler_output.float()
        return (pooled * functional.normalize(pooled.detach(), dim=1)).sum(dim=1), encoded
    wanted = target_matrix(model, target, len(pixels))
    logits = model.get_submodule("classifier")(encoded.pooler_output).float()
    inside = logits.masked_fill(~wanted, -torch.inf).logsumexp(dim=1)
    if _is_independent(model):
        return inside, encoded
    return inside - logits.masked_fill(wanted, -torch.inf).logsumexp(dim=1), encoded


def target_matrix(model: PreTrainedModel, target: Target, batch: int) -> torch.Tensor:
    """The target labels of each image: (B, L) booleans on the model's device.

    Raises:
        SpcxrError: the model is no classifier, has no such label, or there is not one target for each image; or the
            target holds every class of classes that exclude each other, whose probability is always 1.
    """
    if not hasattr(model, "classifier"):
        raise SpcxrError(f"{type(model).__name__} is no classifier: its target is None, its own embedding")
    if isinstance(target, torch.Tensor):
        target = [int(number) for number in target.reshape(-1).tolist()]
    targets = [target] * batch if isinstance(target, int | str) else list(target or [])
    if len(targets) != batch:
        raise SpcxrError(f"{len(targets)} targets for {batch} images")
    names = label_names(model.config)
    matrix = torch.zeros(batch, len(names), dtype=torch.bool)
    for row, one in enumerate(targets):
        if isinstance(one, int):
            if not 0 <= one < len(names):
                raise SpcxrError(f"the model has no label {one}; it has {len(names)}")
            matrix[row, one] = True
            continue
        for word in [one] if one in names else one.split(" + "):
            if word not in names:
                raise SpcxrError(f"the model has no label {word!r}; it has {', '.join(names)}")
            matrix[row, names.index(word)] = True
    if not _is_independent(model) and matrix.all(dim=1).any():
        raise SpcxrError(f"the target {targets[0]!r} holds every class: its probability is always 1")
    return matrix.to(model.device)


def _is_independent(model: PreTrainedModel) -> bool:
    """Whether each output has a meaning of its own, unlike those of classes that exclude each other."""
    return model.config.problem_type == "regression" or is_multi_label(model.config)


def target_probability(model: PreTrainedModel, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The probability (B,) of what `target_matrix` says, from logits (B, L); of several labels the sum, at most 1."""
    return (probabilities(model.config, logits) * wanted).sum(dim=1).clamp(max=1)


def _run(model: torch.nn.Module, pixels: torch.Tensor) -> Any:
    # A request for the weights makes the blocks go eager, in this call alone.
    return model(pixels, output_attentions=True, return_dict=True)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards: a frozen part may be in another than the rest."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_model(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    """Refuse a model of another family, and images that it does not take."""
    if getattr(model.config, "model_type", None) != "spcxr" or not hasattr(model.base_model, "encoder"):
        raise SpcxrError(f"{type(model).__name__} is no SPCXR model with an encoder")
    patch, channels = model.config.patch_size, model.config.num_channels
    shape = tuple(pixel_values.shape)
    fits = len(shape) == 4 and shape[1] == channels and all(side and side % patch == 0 for side in shape[2:])
    if not fits or not pixel_values.is_floating_point():
        raise SpcxrError(
            f"pixel_values must be floating point (B, {channels}, H, W), H and W multiples of {patch}; "
            f"got {pixel_values.dtype} {shape}"
        )


# ---- over the radiograph -----------------------------------------------------------------------------------------


def upsample(relevance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map (rows, columns) at `size` (height, width) pixels, bilinear, its largest patch at 1: 0 .. 1."""
    heat = functional.interpolate(relevance.float()[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return (heat / relevance.max().clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)


def share_inside(relevance: torch.Tensor, mask: torch.Tensor) -> float:
    """The share of a map's relevance that lies inside a mask, each patch's spread evenly over its pixels.

    Args:
        relevance: (rows, columns), not negative.
        mask: (height, width) booleans, of any size, over the same picture: the lungs.

    Returns:
        0 .. 1; NaN for a map that is all 0. The mask's own share of the picture is what a map without any preference
        would give.
    """
    if relevance.dim() != 2 or mask.dim() != 2 or not mask.numel():
        raise SpcxrError(f"map and mask must be (rows, columns); got {tuple(relevance.shape)}, {tuple(mask.shape)}")
    rows, columns = relevance.shape
    inside = functional.adaptive_avg_pool2d(mask.float()[None, None].to(relevance.device), (rows, columns))[0, 0]
    total = relevance.sum()
    return float((relevance * inside).sum() / total) if total > 0 else float("nan")


def draw_explanation(grey: torch.Tensor, relevance: torch.Tensor, lungs: torch.Tensor | None = None) -> torch.Tensor:
    """A map over the radiograph it is of, the lungs outlined.

    Args:
        grey: (H, W) in 0 .. 1.
        relevance: (rows, columns), as `explain` gives it.
        lungs: (h, w) booleans of any size over the same picture, as a segmentation model gives them.

    Returns:
        (H, W, 3) in 0 .. 1 on the CPU: what has more than an even share is coloured, the brighter and the less
        transparent the more it has, from vermillion to yellow; the outline in sky blue.
    """
    if grey.dim() != 2:
        raise SpcxrError(f"the radiograph must be (H, W); got {tuple(grey.shape)}")
    above = (relevance.cpu() - relevance.mean().cpu()).clamp(min=0)  # else an even map would tint the whole picture
    heat = upsample(above, (grey.shape[0], grey.shape[1])).unsqueeze(-1)
    low, high = (torch.tensor(colour) for colour in HEAT)
    opacity = MOST_OPAQUE * heat
    picture = (1 - opacity) * grey.cpu().float().unsqueeze(-1) + opacity * ((1 - heat) * low + heat * high)
    if lungs is None:
        return picture
    return torch.where(outline(lungs, (grey.shape[0], grey.shape[1])).unsqueeze(-1), torch.tensor(OUTLINE), picture)
