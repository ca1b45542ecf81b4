"""LP-FT: fine-tuning starts with a linear head that was fitted to the frozen encoder's features.

The gradients of a random head distort good features while it learns, and with few steps the encoder does not recover
(Kumar et al., ICLR 2022, arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from spcxr_hf.errors import SpcxrError
from spcxr_hf.training.losses import classification_loss

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # one of them is chosen by the cross-entropy on val


class LinearHead(NamedTuple):
    """logits = features @ weight.T + bias: `weight` (classes, D) and `bias` (classes,), float32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features (n, D) -> logits (n, classes)."""
        return features @ self.weight.T + self.bias


def final_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that gives the logits."""
    inside = {id(module) for module in model.base_model.modules()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module) not in inside and module.out_features == model.config.num_labels
    ]
    if len(layers) != 1:
        raise SpcxrError(f"{type(model).__name__} has {len(layers)} linear layers that could give its logits, not one")
    return layers[0]


@torch.no_grad()
def head_input(model: PreTrainedModel, pixel_values: torch.Tensor, **options: object) -> torch.Tensor:
    """Input of the final layer for these images: (B, C, H, W) -> (B, D) float32 on the CPU."""
    caught: list[torch.Tensor] = []
    hook = final_layer(model).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        model(pixel_values, **options)
    finally:
        hook.remove()
    return caught[0].float().cpu()


def fit_linear_head(
    features: torch.Tensor,
    targets: torch.Tensor,
    multi_label: bool,
    class_weights: torch.Tensor,
    penalty: float,
    steps: int = 200,
) -> LinearHead:
    """Logistic regression on standardised features: mean loss + `penalty` / 2 x squared norm of the weights.

    Args:
        features: (n, D), finite.
        targets: (n, classes) in 0 .. 1; NaN where a label is missing (`multi_label`).
        multi_label: A sigmoid for each label instead of one softmax.
        class_weights: (classes,), of `losses.class_weights`.
        penalty: At least 0.
        steps: At most so many iterations of L-BFGS.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0, unbiased=False).clamp(min=1e-6)
    standard = (features - mean) / deviation
    weight = torch.zeros(targets.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = standard @ weight.T + bias
        cost = classification_loss(logits, targets, multi_label, class_weights)
        cost = cost + penalty / 2 * weight.square().sum()
        cost.backward()
        return cost

    optimizer.step(loss)
    folded = weight.detach() / deviation
    return LinearHead(folded, bias.detach() - folded @ mean)


def choose_linear_head(
    training: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    multi_label: bool,
    class_weights: torch.Tensor,
    penalties: Sequence[float] = PENALTIES,
) -> LinearHead:
    """The head whose penalty gives the least loss on val. Both sets are features (n, D) and targets (n, classes)."""
    heads = [fit_linear_head(*training, multi_label, class_weights, penalty) for penalty in penalties]
    features, targets = validation

    def loss(head: LinearHead) -> float:
        return classification_loss(head(features), targets, multi_label, class_weights).item()

    return min(heads, key=loss)


@torch.no_grad()
def put_head(model: PreTrainedModel, head: LinearHead) -> None:
    """Give the final layer these weights."""
    layer = final_layer(model)
    layer.weight.copy_(head.weight)
    layer.bias.copy_(head.bias)
