"""The linear head that fine-tuning may start with: beside scikit-learn, and in a model."""

import numpy as np
import pytest
import torch

from spcxr_hf import SpcxrError, SpcxrForImageClassification
from spcxr_hf.training.classifiers import choose_linear_head, final_layer, fit_linear_head, head_input, put_head
from tests.common import tiny_config

ONES = torch.ones(3)


def features(count: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, 5) of unequal scale, and the class 0 .. 2 that mostly follows from them, one-hot."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 1.0, 3.0]) + 4
    scores = (values - 4) @ torch.randn(5, 3, generator=torch.Generator().manual_seed(9)) * 0.3
    noisy = scores + torch.randn(count, 3, generator=generator)
    return values, torch.eye(3)[noisy.argmax(dim=1)]


def test_agrees_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    values, targets = features()
    head = fit_linear_head(values, targets, False, ONES, penalty=0.01)
    standard = ((values - values.mean(dim=0)) / values.std(dim=0, unbiased=False)).numpy()
    peer = linear_model.LogisticRegression(C=1 / (0.01 * len(values)), max_iter=1000).fit(standard, targets.argmax(1))
    ours = head(values).softmax(dim=1).numpy()
    assert np.abs(ours - peer.predict_proba(standard)).max() < 1e-3


def test_labels_are_fitted_apart_and_missing_ones_ignored():
    values, targets = features()
    holes = targets.clone()
    holes[::3, 1] = torch.nan
    whole, with_holes = (fit_linear_head(values, one, True, ONES, penalty=0.01) for one in (targets, holes))
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[::3] = False
    alone = fit_linear_head(values[kept], targets[kept], True, ONES, penalty=0.01)
    assert with_holes.weight.isfinite().all()
    assert not torch.allclose(with_holes.weight[1], whole.weight[1], atol=1e-3)
    # Beside a fit on the rows that are known; standardised by other rows, so alike but not the same.
    similarity = torch.nn.functional.cosine_similarity(with_holes.weight[1], alone.weight[1], dim=0)
    assert similarity > 0.98


def test_the_penalty_is_chosen_on_val():
    values, targets = features(30)
    noise = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))  # much to learn by heart
    unseen, truth = features(400, seed=5)
    unseen_noise = torch.randn(400, 40, generator=torch.Generator().manual_seed(2))
    training = torch.cat((values, noise), dim=1), targets
    validation = torch.cat((unseen, unseen_noise), dim=1), truth

    def loss(head):
        return torch.nn.functional.cross_entropy(head(validation[0]), truth).item()

    chosen = choose_linear_head(training, validation, False, ONES)
    free = fit_linear_head(*training, False, ONES, penalty=1e-4)
    assert loss(chosen) < loss(free)


def test_a_model_answers_by_its_new_head():
    model = SpcxrForImageClassification(tiny_config(num_labels=3)).eval()
    pixel_values = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    before = head_input(model, pixel_values)
    head = fit_linear_head(before, torch.eye(3)[[0, 1, 2, 0, 1, 2]], False, ONES, penalty=0.1)
    put_head(model, head)
    with torch.no_grad():
        assert torch.allclose(model(pixel_values).logits, head(before), atol=1e-5)
    assert not final_layer(model)._forward_pre_hooks  # nothing is left behind


def test_a_model_without_a_head_is_refused():
    model = SpcxrForImageClassification(tiny_config(num_labels=3))
    model.classifier = torch.nn.Identity()
    with pytest.raises(SpcxrError, match="0 linear layers"):
        final_layer(model)
