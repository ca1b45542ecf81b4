"""What the flags of the training scripts say reaches what they are for: corruption, loss, optimiser, validation."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining, SpcxrForSemanticSegmentation
from spcxr_hf.modeling.configuration_spcxr import SIZES
from spcxr_hf.training.engine import Run
from spcxr_hf.transforms.augment import RADIOGRAPH_MEAN, RADIOGRAPH_STD
from spcxr_hf.transforms.group_masking import GroupMasking
from tests.made_up import SMALL_PRESET, write_set
from training_scripts import finetune_classification, finetune_segmentation, linear_probe, pretrain

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
BRIEF = ["--image_size", "32", "--stored_size", "40", "--batch_size", "4", "--warmup_steps", "0", "--log_every", "1"]
BRIEF += ["--steps", "2", "--save_every", "2"]
COLUMNS = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split"]


@pytest.fixture(scope="module", autouse=True)
def small_and_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setitem(SIZES, "tiny", SMALL_PRESET)
        yield


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 10 + ["val"] * 6))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained")
    SpcxrForPreTraining(SpcxrConfig(**TINY, segmentation_hidden_size=32)).save_pretrained(folder)
    return str(folder)


class Updates:
    """What the optimiser was told at every step of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[dict]] = []
        self.clipped_to: list[float] = []
        update, clip = Run.update, nn.utils.clip_grad_norm_

        def updated(run: Run, learning_rate: float, weight_decay: float) -> None:
            update(run, learning_rate, weight_decay)
            self.groups.append([dict(group, params=len(group["params"])) for group in run.optimizer.param_groups])

        def clipped(parameters: Any, max_norm: float, *more: Any, **named: Any) -> torch.Tensor:
            self.clipped_to.append(max_norm)
            return clip(parameters, max_norm, *more, **named)

        monkeypatch.setattr(Run, "update", updated)
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)

    def decays(self) -> list[float]:
        """The largest weight decay of every step; biases and norms have none."""
        return [max(group["weight_decay"] for group in groups) for groups in self.groups]


# ---- pretraining -----------------------------------------------------------------------------------------------


def test_corruption_is_the_one_that_was_asked_for(shard, tmp_path, monkeypatch):
    made: list[dict] = []
    monkeypatch.setattr(pretrain, "GroupMasking", lambda **named: made.append(named) or GroupMasking(**named))
    flags = ["--fill_modes", "zeros", "--mask_ratio", "0.1", "0.2", "--replace_ratio", "0.25"]
    flags += ["--max_block_size", "0.4", "--align", "8", "--size", "tiny"]
    pretrain.main(["--data", shard, "--output", str(tmp_path), *BRIEF, *flags])
    asked = {"fill_modes": ("zeros",), "mask_ratio": (0.1, 0.2), "replace_ratio": 0.25, "max_block_size": 0.4}
    asked["align"] = 8
    assert made and all(named == asked for named in made)


def test_the_loss_is_of_corrupted_pixels_against_clean_views(shard, tmp_path, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    forward = SpcxrForPreTraining.forward

    def watched(self: Any, pixel_values: torch.Tensor, **named: Any) -> Any:
        if "labels" in named:
            seen.append({"pixel_values": pixel_values.clone(), **{k: v.clone() for k, v in named.items()}})
        return forward(self, pixel_values, **named)

    monkeypatch.setattr(SpcxrForPreTraining, "forward", watched)
    flags = ["--size", "tiny", "--fill_modes", "zeros"]
    pretrain.main(["--data", shard, "--output", str(tmp_path), *BRIEF, *flags])
    assert len(seen) == 2
    for step in seen:
        mask = step["bool_masked_pos"]
        assert 0.4 < mask.float().mean() < 0.8
        assert (step["pixel_values"][mask] == 0).all()  # the mean grey
        assert torch.equal(step["pixel_values"][~mask], step["labels"][~mask])
        grey = step["labels"] * RADIOGRAPH_STD[0] + RADIOGRAPH_MEAN[0]  # normalised, as the image processor does it
        assert grey.min() >= -1e-5 and grey.max() <= 1 + 1e-5 and grey.max() > 0.5
        assert step["labels"].min() < -0.5


def test_pretraining_s_optimiser(shard, tmp_path, monkeypatch):
    updates = Updates(monkeypatch)
    flags = ["--size", "tiny", "--weight_decay", "0.1", "--final_weight_decay", "0.5", "--max_grad_norm", "0.7"]
    flags += ["--adam_beta2", "0.9", "--drop_path_rate", "0.3", "--steps", "4", "--save_every", "4"]
    pretrain.main(["--data", shard, "--output", str(tmp_path), *BRIEF, *flags])
    assert updates.decays()[0] == pytest.approx(0.1)
    assert updates.decays() == sorted(set(updates.decays())) and updates.decays()[-1] > 0.3  # it rises with every step
    assert updates.clipped_to == [0.7] * 4
    assert {group["betas"] for groups in updates.groups for group in groups} == {(0.9, 0.9)}
    assert SpcxrConfig.from_pretrained(tmp_path / "final").drop_path_rate == 0.3


def test_pictures_of_relative_targets_are_of_pixels(shard, tmp_path, monkeypatch):
    mapped = []
    as_pixels = pretrain.as_pixels
    monkeypatch.setattr(pretrain, "as_pixels", lambda *given: mapped.append(as_pixels(*given)) or mapped[-1])
    shown = []
    monkeypatch.setattr(pretrain, "save_grid", lambda rows, path: shown.append(rows))
    flags = ["--size", "tiny", "--norm_pix_loss", "true"]
    pretrain.main(["--data", shard, "--output", str(tmp_path), *BRIEF, *flags])
    expected = pretrain.to_grey(mapped[-1], RADIOGRAPH_MEAN[0], RADIOGRAPH_STD[0])
    assert all(torch.equal(row[2], picture) for row, picture in zip(shown[-1], expected, strict=True))


# ---- classification --------------------------------------------------------------------------------------------


def classify(shard: str, output: Path, *flags: str) -> Path:
    finetune_classification.main(["--data", shard, "--output", str(output), *COLUMNS, *BRIEF, *flags])
    return output


def test_the_classifier_s_loss_optimiser_and_mixing(shard, pretrained, tmp_path, monkeypatch):
    updates = Updates(monkeypatch)
    losses: list[tuple] = []
    mixed: list[tuple] = []
    loss, mix = finetune_classification.classification_loss, finetune_classification.mix
    monkeypatch.setattr(
        finetune_classification, "classification_loss", lambda *given: losses.append(given) or loss(*given)
    )
    monkeypatch.setattr(finetune_classification, "mix", lambda *given: mixed.append(given[2:4]) or mix(*given))
    flags = ["--init_from", pretrained, "--label_smoothing", "0.2", "--balance", "loss", "--mixup", "0.3"]
    flags += ["--cutmix", "0.6", "--layer_decay", "0.5", "--drop_path_rate", "0.25", "--learning_rate", "1e-3"]
    classify(shard, tmp_path, *flags, "--weight_decay", "0.2", "--steps", "1", "--save_every", "1")
    assert mixed and set(mixed) == {(0.3, 0.6)}
    for _, targets, multi_label, weights, smoothing, known_share in losses:
        assert (multi_label, smoothing, known_share) == (False, 0.2, 1.0)
        assert len(set(weights.tolist())) > 1 and targets.shape[1] == len(weights)
    assert set(updates.decays()) == {0.2}
    rates = sorted({round(group["lr"], 9) for groups in updates.groups for group in groups})
    assert rates == pytest.approx([1e-3 / 8, 1e-3 / 4, 1e-3 / 2, 1e-3])  # embeddings, two blocks, head
    assert SpcxrConfig.from_pretrained(tmp_path / "final").drop_path_rate == 0.25


@pytest.mark.slow
def test_an_averaged_classifier_is_chosen_and_kept_by_its_average(shard, pretrained, tmp_path):
    flags = ["--init_from", pretrained, "--ema_decay", "0.9", "--learning_rate", "1e-2", "--metric", "loss"]
    output = classify(shard, tmp_path, *flags)
    average = load_file(output / "checkpoint-2" / "average.safetensors")
    trained = load_file(output / "checkpoint-2" / "model.safetensors")
    best = load_file(output / "best" / "model.safetensors")
    assert all(torch.equal(best[name], value) for name, value in average.items())
    assert any(not torch.equal(trained[name], value) for name, value in average.items())
    # What is told of val is the average's too: the same figures as by the final model, which is that average.
    told = json.loads((output / "results.json").read_text())["val"]["loss"]
    again = classify(shard, tmp_path / "again", "--init_from", str(output / "final"), "--learning_rate", "0",
                     "--steps", "1", "--save_every", "1")  # fmt: skip
    assert json.loads((again / "results.json").read_text())["val"]["loss"] == pytest.approx(told, rel=1e-4)


def test_missing_weights_are_refused(shard, pretrained, tmp_path):
    weights = load_file(Path(pretrained) / "model.safetensors")
    lost = next(name for name in weights if "encoder.layers.1" in name)
    shutil.copytree(pretrained, tmp_path / "holes")
    del weights[lost]
    save_file(weights, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpcxrError, match="holes: no weights for 1"):
        classify(shard, tmp_path / "run", "--init_from", str(tmp_path / "holes"))


# ---- segmentation ----------------------------------------------------------------------------------------------


def test_lungs_are_learned_from_normalised_views_and_judged_in_evaluation(shard, pretrained, tmp_path, monkeypatch):
    updates = Updates(monkeypatch)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    modes: list[bool] = []
    forward = SpcxrForSemanticSegmentation.forward

    def watched(self: Any, pixel_values: torch.Tensor, **named: Any) -> Any:
        if "labels" in named:
            seen.append((pixel_values, named["labels"]))
        else:
            modes.append(self.training)
        return forward(self, pixel_values, **named)

    monkeypatch.setattr(SpcxrForSemanticSegmentation, "forward", watched)
    flags = ["--init_from", pretrained, "--layer_decay", "0.5", "--learning_rate", "1e-3"]
    finetune_segmentation.main(["--data", shard, "--output", str(tmp_path), *BRIEF, *flags])
    assert modes and not any(modes)
    beside = 0.0
    for pixel_values, labels in seen:
        grey = pixel_values * RADIOGRAPH_STD[0] + RADIOGRAPH_MEAN[0]
        assert pixel_values.min() < -0.5 and grey.min() >= -1e-5 and grey.max() <= 1 + 1e-5
        inside, outside = (grey[labels.unsqueeze(1) == side].mean() for side in (1, 0))
        assert inside < outside  # the mask lies where the lungs lie: they are dark
        beside += float(grey[labels.flip(2).unsqueeze(1) == 1].mean() - inside)
    assert beside > 0.01  # and not where they would lie in a mirror
    assert len({group["lr"] for group in updates.groups[0]}) == 4


# ---- probes ----------------------------------------------------------------------------------------------------


def test_probes_are_chosen_on_val_from_a_share_of_the_labels():
    drawn = np.random.default_rng(0)
    classes = np.arange(200) % 2
    signal = np.stack([classes + 0.3 * drawn.normal(size=200), drawn.normal(size=200)], axis=1)

    def split(features: np.ndarray) -> Any:
        return type("Split", (), {"classes": classes, "features": features, "patients": np.arange(200)})()

    # On `test` the second feature tells all and the first nothing: what is chosen on it would differ.
    splits = {"train": split(signal), "val": split(signal), "test": split(signal[:, ::-1])}
    arguments = linear_probe.Arguments(model="m", data="d", c_values=[1e-6, 1.0], resamples=5)
    asked: list[np.ndarray] = []

    def classify_by_val(arguments, inputs, targets, queries):
        asked.append(inputs)
        for name, sign in (("right", 1), ("wrong", -1)):
            told = {"val": sign, "test": -sign}
            yield (
                {"setting": name},
                {key: np.stack([-told[key] * classes, told[key] * classes], axis=1) for key in queries},
            )

    task = linear_probe.TASKS["pediatric_pneumonia"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "classify_linearly", classify_by_val)
        found = linear_probe.probe(arguments, splits, task, 0.1, 3)
    assert found["setting"] == "right"
    assert np.array_equal(asked[0], signal[linear_probe.draw_labels(classes, 0.1, 3)])  # drawn anew for every seed
    assert len(asked[0]) == found["labels"] == 20


def test_linear_probes_standardise_and_weigh_the_classes():
    from sklearn.linear_model import LogisticRegression

    drawn = np.random.default_rng(0)
    targets = (drawn.random(300) < 0.1).astype(int)
    inputs = drawn.normal(size=(300, 3)) * [1, 100, 0.01] + [0, 50, 0] + targets[:, None] * [0.5, 30, 0.01]
    queries = {"val": inputs[:40] + 0.1}
    arguments = linear_probe.Arguments(model="m", data="d", c_values=[0.01])
    ((_, scores),) = linear_probe.classify_linearly(arguments, inputs, targets, queries)
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    expected = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
    expected.fit((inputs - mean) / deviation, targets)
    by_hand = expected.decision_function((queries["val"] - mean) / deviation)
    assert scores["val"][:, 1] == pytest.approx(by_hand, abs=1e-3)
    assert (scores["val"][:, 0] == 0).all()


# ---- another set in the same folder ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_never_goes_on_with_another_set_or_other_classes(shard, pretrained, tmp_path, capsys):
    flags = ["--init_from", pretrained]
    classify(shard, tmp_path / "run", *flags)
    kept = [tmp_path / "run" / name for name in ("final/config.json", "recipe.yaml")]
    before = [path.read_text() for path in kept]
    rows = pq.read_table(shard)
    other = str(tmp_path / "other.parquet")
    names = pa.array([f"other-{name}" for name in rows["id"].to_pylist()])
    pq.write_table(rows.set_column(rows.column_names.index("id"), "id", names), other)
    labels = rows["pneumonia_label"].to_pylist()
    changed = {
        "one-gone": rows.slice(1),
        "swapped": pa.concat_tables([rows.slice(1, 1), rows.slice(0, 1), rows.slice(2)]),
        "label": rows.set_column(
            rows.column_names.index("pneumonia_label"), "pneumonia_label", pa.array([labels[1], *labels[1:]])
        ),
        "val": rows.slice(0, 15),
    }
    for name, table in changed.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    for data, more, part in (
        (other, [], "train, val"),
        (shard, ["--classes", "well=normal", "bacterial", "viral"], "classes"),
        *((str(tmp_path / f"{name}.parquet"), [], "val" if name == "val" else "train") for name in changed),
    ):
        said = f"run: its checkpoints were trained on other data: rows of {part}, their order or their labels"
        with pytest.raises(SpcxrError, match=said):
            classify(data, tmp_path / "run", *flags, *more)
        assert [path.read_text() for path in kept] == before
    moved = tmp_path / "elsewhere.parquet"
    shutil.copy(shard, moved)
    capsys.readouterr()
    classify(str(moved), tmp_path / "run", *flags)
    assert "2 steps are done already, so nothing is trained" in capsys.readouterr().out
    for more in (["--allow_other_data", "true"], []):  # what was allowed once is the run's own data
        classify(other, tmp_path / "run", *flags, "--steps", "4", *more)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def test_a_set_without_the_column_for_pretraining_is_told_the_way_out(shard, tmp_path):
    pq.write_table(pq.read_table(shard).drop_columns(["pretrain"]), tmp_path / "mine.parquet")
    for more in ([], ["--cache", "none", "--workers", "0"]):
        words = ["--data", str(tmp_path / "mine.parquet"), "--output", str(tmp_path / "run"), *BRIEF, "--size", "tiny"]
        with pytest.raises(SpcxrError, match="no column 'pretrain'; .*--pretrain-only false every row"):
            pretrain.main([*words, *more])
