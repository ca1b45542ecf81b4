"""Maps: they lie on what decides the class, obey their definitions, leave the model alone, and refuse nonsense."""

import json

import pytest
import torch

from spcxr_hf import (
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
    SpcxrModel,
)
from spcxr_hf.inference.explain import (
    draw_explanation,
    explain,
    outline,
    share_inside,
    target_probability,
    upsample,
)
from tests.common import build, pixels, tiny_config
from tests.made_up import write_set
from training_scripts.benchmarks import explanations
from training_scripts.benchmarks.lib.faithfulness import deletion_insertion

SQUARE = 16  # patches; one of them is bright in class 1


def squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, with one bright patch in every second image: images, classes and the number of the bright patch."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, 32, 32, generator=generator)  # around the grey that deletion paints
    classes, places = torch.arange(count) % 2, torch.randint(SQUARE, (count,), generator=generator)
    for number in range(1, count, 2):
        row, column = divmod(int(places[number]), 4)
        images[number, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 2.5
    return images, classes, places


@pytest.fixture(scope="module", params=["mean", "cls"])
def trained(request):
    torch.manual_seed(1)
    config = tiny_config(num_labels=2, pooling=request.param, problem_type="single_label_classification")
    model = SpcxrForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(90):
        images, classes, _ = squares(32, step)
        optimizer.zero_grad()
        model(images, labels=classes).loss.backward()
        optimizer.step()
    images, classes, _ = squares(64, 1000)
    assert (model.eval()(images).logits.argmax(dim=1) == classes).float().mean() > 0.95
    return model


@pytest.mark.parametrize("method", ["relevance", "rollout"])
def test_a_map_lies_on_what_decides_the_class(trained, method):
    images, _, places = (values[1::2] for values in squares(64, 2000))
    found = explain(trained, images, 1, method)
    assert (found.flatten(1).argmax(dim=1) == places).float().mean() > 0.9
    mass = found.flatten(1).gather(1, places[:, None]).mean()
    assert mass > 2.5 / SQUARE  # of 1 / SQUARE that a map without any preference would put there

    curves = deletion_insertion(trained, images, found, 1, steps=8)
    generator = torch.Generator().manual_seed(0)
    random = deletion_insertion(trained, images, torch.rand(found.shape, generator=generator), 1, steps=8)
    worst = deletion_insertion(trained, images, -found, 1, steps=8)
    assert curves.deletion_auc.mean() < random.deletion_auc.mean() - 0.1 < worst.deletion_auc.mean() - 0.2


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_relevance_by_its_definition(pooling, size):
    """Equations 5 and 6 of arXiv 2103.15679, spelled out, with the gradient along the simplex of attention."""
    model = build(SpcxrForImageClassification, tiny_config(pooling=pooling, num_labels=3))
    images = pixels(height=size[0], width=size[1])
    found = explain(model, images, [2, 0])
    assert found.shape == (2, size[0] // 8, size[1] // 8)
    for number, label in enumerate((2, 0)):
        outputs = model(images[number : number + 1], output_attentions=True)
        log_probability = outputs.logits.log_softmax(dim=1)[0, label]
        score = log_probability - torch.log1p(-log_probability.exp())  # the log-odds
        gradients = torch.autograd.grad(score, outputs.attentions)
        relevance = torch.eye(outputs.attentions[0].shape[-1])
        for attention, gradient in zip(outputs.attentions, gradients, strict=True):
            along = gradient @ (torch.eye(gradient.shape[-1]) - 1 / gradient.shape[-1])  # projected on the simplex
            relevance = relevance + (along * attention)[0].clamp(min=0).mean(dim=0) @ relevance
        row = relevance[0, 1:]
        if pooling == "mean":  # one more layer of attention, with the same weight for each patch
            tokens = model.spcxr(images[number : number + 1]).patch_tokens[0]
            pooled = tokens.mean(dim=0).detach().requires_grad_()
            log_probability = model.classifier(pooled).log_softmax(dim=0)[label]
            slopes = tokens @ torch.autograd.grad(log_probability - torch.log1p(-log_probability.exp()), pooled)[0]
            row = (slopes - slopes.mean()).clamp(min=0) @ (relevance - torch.eye(len(relevance)))[1:, 1:]
        torch.testing.assert_close(found[number].flatten(), (row / row.sum()).detach(), rtol=1e-4, atol=1e-6)


def test_rollout_by_its_definition():
    model = build(SpcxrModel, tiny_config(pooling="cls"))
    attentions = model(pixels(), output_attentions=True).attentions
    rolled = torch.eye(17)
    for attention in attentions:
        rolled = (0.5 * attention.mean(dim=1) + 0.5 * torch.eye(17)) @ rolled
    expected = rolled[:, 0, 1:] / rolled[:, 0, 1:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(explain(model, pixels(), method="rollout").flatten(1), expected.detach())


@pytest.mark.parametrize(
    "model_class", [SpcxrModel, SpcxrForImageClassification, SpcxrForPreTraining, SpcxrForSemanticSegmentation]
)
@pytest.mark.parametrize("method", ["relevance", "rollout"])
def test_an_embedding_is_explained_too(model_class, method):
    found = explain(build(model_class), pixels(), method=method)
    assert found.shape == (2, 4, 4)
    assert (found >= 0).all() and found.std() > 0
    torch.testing.assert_close(found.sum(dim=(1, 2)), torch.ones(2))


def test_the_same_number_on_all_logits_changes_nothing():
    model = build(SpcxrForImageClassification)
    expected = explain(model, pixels(), 1)
    with torch.no_grad():
        model.classifier.weight.add_(torch.randn(1, 32))
    torch.testing.assert_close(explain(model, pixels(), 1), expected, rtol=1e-3, atol=1e-5)


def test_batches_and_targets():
    names = {0: "normal", 1: "bacterial", 2: "viral"}
    model = build(SpcxrForImageClassification, tiny_config(id2label=names, label2id={v: k for k, v in names.items()}))
    images = pixels(batch=3)
    together = explain(model, images, torch.tensor([2, 0, 1]))
    for number, name in enumerate(["viral", "normal", "bacterial"]):
        torch.testing.assert_close(explain(model, images[number : number + 1], name)[0], together[number])
    # What is for one side is against the other: the sum of two classes is the third turned round.
    both = explain(model, images, "bacterial + viral")
    assert not torch.allclose(both, explain(model, images, "bacterial"), atol=1e-4)
    logits = torch.randn(4, 3)
    wanted = torch.tensor([[False, True, True]]).expand(4, 3)
    torch.testing.assert_close(target_probability(model, logits, wanted), 1 - logits.softmax(dim=1)[:, 0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_is_left_behind(mode):
    model = build(SpcxrForImageClassification, tiny_config(hidden_dropout_prob=0.5, attn_implementation="sdpa"))
    expected = explain(model, pixels(), 0)
    model.train()
    model.spcxr.encoder.layers[1].eval()  # a part that was frozen
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    with mode():
        images = pixels()
        found = explain(model, images, 0)
    torch.testing.assert_close(found, expected)  # dropout is off, and frozen parameters are no obstacle
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == "sdpa" and not model.config.output_attentions
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not images.requires_grad and not found.requires_grad


def test_half_precision():
    model = build(SpcxrForImageClassification)
    expected = explain(model, pixels(), 0)
    found = explain(model.to(torch.bfloat16), pixels(), 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.3)


@pytest.mark.parametrize(
    ("target", "method", "size", "message"),
    [
        (0, "gradcam", 32, "method must be"),
        (3, "relevance", 32, "no label 3"),
        ("covid", "relevance", 32, "no label 'covid'"),
        ([0], "relevance", 32, "1 targets for 2 images"),
        ("LABEL_0 + LABEL_1 + LABEL_2", "relevance", 32, "holds every class"),
        (0, "relevance", 30, "multiples of 8"),
    ],
)
def test_refusals(target, method, size, message):
    with pytest.raises(SpcxrError, match=message):
        explain(build(SpcxrForImageClassification), pixels(height=size), target, method)


def test_an_encoder_has_no_labels():
    with pytest.raises(SpcxrError, match="no classifier"):
        explain(build(SpcxrModel), pixels(), 0)


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_share_inside():
    relevance = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:20, 20:] = True
    assert share_inside(relevance, mask) == pytest.approx(0.25)
    assert share_inside(relevance, torch.ones(7, 9, dtype=torch.bool)) == pytest.approx(1)
    assert share_inside(torch.ones(2, 2), mask) == pytest.approx(mask.float().mean().item())
    assert torch.tensor(share_inside(torch.zeros(2, 2), mask)).isnan()
    with pytest.raises(SpcxrError, match="must be"):
        share_inside(relevance[0], mask)


def test_a_map_over_a_radiograph():
    grey, relevance = torch.full((64, 96), 0.5), torch.zeros(4, 6)
    relevance[1, 4] = 1
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[8:24, 8:16] = True
    assert upsample(relevance, (64, 96)).argmax() in range(96 * 16, 96 * 32)
    picture = draw_explanation(grey, relevance, mask)
    assert picture.shape == (64, 96, 3) and picture.min() >= 0 and picture.max() <= 1
    assert torch.equal(picture[60, 2], torch.full((3,), 0.5))  # nothing there
    assert picture[24, 72, 0] > picture[24, 72, 2] + 0.3  # warm where it is relevant
    edge = outline(mask, (64, 96))
    assert edge[16, 20] and not edge[32, 24] and not edge[15, 20]
    assert picture[16, 20, 2] > picture[16, 20, 0]
    whole = outline(torch.ones(4, 4, dtype=torch.bool), (20, 20))
    assert whole[0].all() and not whole[10, 10]
    assert torch.equal(draw_explanation(grey, torch.zeros(4, 6)), grey.unsqueeze(-1).expand(-1, -1, 3))


# ---- deletion and insertion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, 1])
def test_curves_begin_and_end_where_they_must(target):
    model, images = build(SpcxrForImageClassification), pixels(height=48)
    curves = deletion_insertion(model, images, torch.rand(2, 6, 4), target, steps=5, batch_size=1)
    assert curves.fractions.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert curves.deletion.shape == curves.insertion.shape == (2, 6)
    torch.testing.assert_close(curves.deletion[:, 0], curves.insertion[:, -1])  # both the whole picture
    if target is None:
        torch.testing.assert_close(curves.deletion[:, 0], torch.ones(2))
    else:
        torch.testing.assert_close(curves.deletion[:, 0], model(images).logits.softmax(dim=1)[:, 1].detach())
        grey = model(torch.zeros(2, 1, 48, 32)).logits.softmax(dim=1)[:, 1]
        torch.testing.assert_close(curves.deletion[:, -1], grey.detach())
    flat = torch.trapezoid(curves.deletion[0], curves.fractions)
    assert curves.deletion_auc[0] == pytest.approx(flat.item())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [((2, 3, 3), {}, "the maps have shape"), ((2, 4, 4), {"steps": 0}, "steps"), ((2, 4, 4), {"blur": 0.0}, "blur")],
)
def test_curves_refuse(shape, options, message):
    with pytest.raises(SpcxrError, match=message):
        deletion_insertion(build(SpcxrForImageClassification), pixels(), torch.rand(shape), 0, **options)


@pytest.mark.slow
def test_the_script(tmp_path, capsys):
    names = {0: "normal", 1: "bacterial", 2: "viral"}
    config = tiny_config(id2label=names, label2id={v: k for k, v in names.items()})
    build(SpcxrForImageClassification, config).save_pretrained(tmp_path / "model")
    lungs = tiny_config(num_labels=2, id2label={0: "background", 1: "lung"}, label2id={"background": 0, "lung": 1})
    build(SpcxrForSemanticSegmentation, lungs).save_pretrained(tmp_path / "lungs")
    for folder in ("model", "lungs"):
        SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / folder)
    data = write_set(tmp_path / "set.parquet", ["test"] * 7)
    output = tmp_path / "result.json"
    words = ["--model", str(tmp_path / "model"), "--lungs", str(tmp_path / "lungs"), "--data", str(data)]
    words += ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split", "--images", "5", "--steps", "4"]
    words += ["--random_maps", "2", "--resamples", "50", "--batch_size", "3"]
    result = explanations.main([*words, "--output", str(output), "--pictures", str(tmp_path / "pictures")])
    assert json.loads(output.read_text()) == {"model": json.loads(json.dumps(result))}
    assert result["images"] == 5
    assert set(result["deletion_auc"]) == {"relevance", "rollout", "relevance of another image", "random"}
    difference = result["against"]["relevance against random"]["deletion"]
    assert difference["ci95"][0] <= difference["mean"] <= difference["ci95"][1]
    means = {name: figure["mean"] for name, figure in result["deletion_auc"].items()}
    assert difference["mean"] == pytest.approx(means["random"] - means["relevance"], abs=1e-6)
    assert 0 <= result["lungs"]["share of relevance"]["mean"] <= 1
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"curves.png", "maps.png"}
    capsys.readouterr()
    with pytest.raises(SpcxrError, match="images must be at least 2"):
        explanations.main([*words, "--images", "1"])
    with pytest.raises(SpcxrError, match="give --model and --data to measure, or --render PAGE"):
        explanations.main([])

    # Columns come from the recipe beside the weights; another model's entry is kept; the tables are the results'.
    recipe = "label_column: pneumonia_label\nsplit_column: pneumonia_split\ndata: elsewhere\n"
    (tmp_path / "model" / "recipe.yaml").write_text(recipe)
    (tmp_path / "model").rename(tmp_path / "other")
    less = [word for word in words if not word.startswith(("--label", "--split", "pneumonia_"))]
    again = explanations.main([*less, "--model", str(tmp_path / "other"), "--output", str(output)])
    assert again["deletion_auc"] == result["deletion_auc"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- explain -->\nold\n<!-- /explain -->\nafter\n")
    explanations.main(["--output", str(output), "--render", str(page)])
    table = page.read_text()
    assert (
        "old" not in table and table.count("| `model` (5 of `test`) |") == table.count("| `other` (5 of `test`) |") == 4
    )
    assert f"| {difference['mean']:+.3f} [{difference['ci95'][0]:+.3f}, {difference['ci95'][1]:+.3f}] |" in table


@pytest.mark.parametrize(
    ("deletion", "insertion", "words"),
    [
        ((0.1, 0.2), (0.1, 0.3), "better in both"),
        ((-0.1, 0.2), (-0.1, 0.3), "no difference"),
        ((-0.3, -0.2), (-0.1, 0.3), "worse in deletion, no difference in insertion"),
        ((0.1, 0.2), (-0.3, -0.1), "better in deletion, worse in insertion"),
    ],
)
def test_an_interval_around_nothing_is_no_difference(deletion, insertion, words):
    mean = {"mean": 0.15, "ci95": [0.1, 0.2], "images": 5}
    pair = {"deletion": {**mean, "ci95": deletion}, "insertion": {**mean, "ci95": insertion}}
    tables = explanations.tables_of(
        {"a": {"images": 5, "split": "test", "against": {"relevance against random": pair}}}
    )
    assert tables.splitlines()[2].endswith(f"| {words} |")


def test_insertion_begins_with_a_blurred_picture(trained):
    """By a Gaussian of a tenth of the side: grey patches in its place would have edges."""
    images, _, _ = squares(4, 5)
    shown = []
    hook = trained.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    curves = deletion_insertion(trained, images, torch.zeros(4, 4, 4), 1, steps=1)
    hook.remove()
    weights = torch.exp(-(torch.arange(-6.0, 7) ** 2) / (2 * 3.2**2))  # it reaches two standard deviations
    kernel = weights.outer(weights) / weights.sum() ** 2
    blurred = torch.nn.functional.conv2d(torch.nn.functional.pad(images, [6] * 4, mode="reflect"), kernel[None, None])
    torch.testing.assert_close(shown[1], blurred, rtol=1e-4, atol=1e-4)  # behind the whole picture, nothing deleted
    with torch.no_grad():
        start, end = (trained(given).logits.softmax(dim=1)[:, 1] for given in (blurred, images))
    torch.testing.assert_close(curves.insertion, torch.stack([start, end], dim=1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curves.insertion_auc, (start + end) / 2, rtol=1e-3, atol=1e-4)


def test_labels_that_hold_together_are_explained_one_by_one():
    """By a sigmoid for each: the other labels' logits take no part."""
    model = build(SpcxrForImageClassification, tiny_config(num_labels=3, problem_type="multi_label_classification"))
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    wanted = torch.tensor([[True, False, False]])
    assert target_probability(model, logits, wanted).tolist() == pytest.approx([torch.sigmoid(logits[0, 0]).item()])
    found = explain(model, pixels(1), 0)
    with torch.no_grad():
        model.classifier.weight[1:] = 7 * torch.randn_like(model.classifier.weight[1:])
    torch.testing.assert_close(explain(model, pixels(1), 0), found)


def test_the_share_inside_a_mask_of_another_shape():
    relevance = torch.zeros(2, 4)
    relevance[0, 3] = 1  # top right
    mask = torch.zeros(40, 80, dtype=torch.bool)
    mask[:20, 60:] = True
    assert share_inside(relevance, mask) == 1
    assert share_inside(relevance, mask.flip(1)) == 0
    assert share_inside(relevance.flip(0), mask) == 0


def test_an_even_map_colours_nothing():
    grey = torch.rand(32, 32)
    assert torch.equal(draw_explanation(grey, torch.ones(4, 4)), grey.unsqueeze(-1).expand(-1, -1, 3))
