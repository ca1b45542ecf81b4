"""The masked autoencoder that SPCXR is compared with: same shape, exact resumption, as long as the other, loadable."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTMAEForPreTraining

from spcxr_hf import SpcxrError
from spcxr_hf.modeling.configuration_spcxr import SIZES
from spcxr_hf.models.encoders import load_encoder
from spcxr_hf.training.arguments import parse_arguments
from spcxr_hf.training.optim import new_config
from tests.made_up import SMALL_PRESET, write_set
from training_scripts import finetune_classification, linear_probe
from training_scripts.benchmarks import pretrain_mae

pytestmark = pytest.mark.slow  # many starts of a second each

RECIPES = Path(pretrain_mae.__file__).parents[1] / "recipes"
BRIEF = ["--size", "tiny", "--image_size", "32", "--stored_size", "40", "--batch_size", "4", "--warmup_steps", "1"]
BRIEF += ["--steps", "4", "--save_every", "2", "--log_every", "1", "--micro_batch_size", "2"]
BRIEF += ["--decoder_width", "32", "--decoder_depth", "1", "--decoder_heads", "2", "--attention", "eager"]
COLUMNS = ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split"]


@pytest.fixture(scope="module", autouse=True)
def small_and_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setitem(SIZES, "tiny", SMALL_PRESET)
        yield


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    splits = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", splits))


@pytest.fixture(scope="module")
def finished(shard, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain_mae.main(["--data", shard, "--output", str(output), *BRIEF])
    return output


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_encoder_has_our_shape(finished):
    config, ours = ViTMAEForPreTraining.from_pretrained(finished / "final").config, new_config("tiny", image_size=32)
    for name in (*pretrain_mae.SHAPE, "num_channels", "image_size", "layer_norm_eps"):
        assert getattr(config, name) == getattr(ours, name)
    assert config.mask_ratio == 0.75 and config.norm_pix_loss
    assert config.images_seen == 16
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoint-2",
        "checkpoint-4",
        "final",
        "log.csv",
        "loss.png",
        "recipe.yaml",
        "report.md",
        ".lock",
    }


def test_patches_have_positions(finished):
    """transformers 5.23 leaves them at zero in a new model, which then learns nothing."""
    grid = pretrain_mae.position_embeddings(3, 16)
    assert grid.shape == (1, 10, 16) and not grid[0, 0].any()
    assert len(torch.unique(grid[0], dim=0)) == 10
    assert torch.equal(grid[0, 1 : 1 + 3, 8:], grid[0, 1:2, 8:].repeat(3, 1))  # of one row: the second half is alike
    weights = load_file(finished / "final" / "model.safetensors")
    found = [value for name, value in weights.items() if name.endswith(("position_embeddings", "decoder_pos_embed"))]
    assert len(found) == 2
    for value in found:
        assert torch.equal(value, pretrain_mae.position_embeddings(2, value.shape[-1]))


@pytest.mark.slow
def test_it_learns(shard, tmp_path):
    flags = [*BRIEF, "--steps", "60", "--save_every", "60", "--learning_rate", "1e-3", "--norm_pix_loss", "false"]
    flags += [
        "--image_size",
        "64",
        "--stored_size",
        "64",
        "--mask_ratio",
        "0.5",
        "--crop_scale",
        "0.95",
        "1",
        "--batch_size",
        "12",
    ]
    flags += ["--micro_batch_size", "12", "--decoder_width", "64", "--decoder_depth", "2"]
    pretrain_mae.main(["--data", shard, "--output", str(tmp_path), *flags])
    losses = [float(line.split(",")[1]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:5]) / 5


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(shard, finished, tmp_path, monkeypatch):
    calls = 0
    draw_views = pretrain_mae.draw_views

    def killed_in_the_fourth_step(*arguments):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return draw_views(*arguments)

    command = ["--data", shard, "--output", str(tmp_path), *BRIEF]
    monkeypatch.setattr(pretrain_mae, "draw_views", killed_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain_mae.main(command)
    assert not (tmp_path / "final").exists()
    monkeypatch.setattr(pretrain_mae, "draw_views", draw_views)
    pretrain_mae.main(command)
    assert weights(tmp_path / "final") == weights(finished / "final")
    assert (tmp_path / "log.csv").read_text() == (finished / "log.csv").read_text()


def test_other_scripts_take_it_as_a_model_of_another_family(shard, finished, tmp_path):
    encoder = load_encoder(str(finished / "final"))
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    assert encoder.embed(images, "mean").shape == (2, 32)
    probe = ["--model", str(finished / "final"), "--data", shard, "--pooling", "mean", "--method", "knn"]
    found = linear_probe.main([*probe, "--seeds", "0", "--label_fraction", "1", "--resamples", "4"])
    assert set(found["tasks"]) == {"pneumonia", "three_way"}
    brief = ["--steps", "2", "--batch_size", "4", "--image_size", "32", "--stored_size", "40", "--warmup_steps", "1"]
    flags = ["--init_from", str(finished / "final"), *COLUMNS, *brief]
    finetune_classification.main(["--data", shard, "--output", str(tmp_path), *flags])
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "final")
    assert tuned.config.model_type == "vit" and tuned.config.num_channels == 1 and tuned.config.num_labels == 3


@pytest.mark.slow
def test_as_many_steps_as_the_minutes_allow(shard, tmp_path, caplog):
    timed = [*BRIEF, "--max_minutes", "0.05", "--images_per_second", "8"]  # 3 seconds, 24 images, 6 steps
    pretrain_mae.main(["--data", shard, "--output", str(tmp_path), *timed])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan == {"max_minutes": 0.05, "batch_size": 4, "images_per_second": 8, "steps": 6}
    assert "steps: 6\n" in (tmp_path / "recipe.yaml").read_text()
    assert (tmp_path / "log.csv").read_text().splitlines()[-1].startswith("6,")
    with pytest.raises(SpcxrError, match=r"plan\.json: the run was planned for 0\.05 minutes"):
        pretrain_mae.main(["--data", shard, "--output", str(tmp_path), *BRIEF, "--max_minutes", "2"])
    timed[-1] = "1000"  # a rate of today changes no plan
    caplog.clear()
    pretrain_mae.main(["--data", shard, "--output", str(tmp_path), *timed, "--images_per_second", "8"])
    assert not [record for record in caplog.records if record.name == "spcxr_hf.training.arguments"]  # "another recipe"
    pretrain_mae.main(["--data", shard, "--output", str(tmp_path), *timed])
    assert (tmp_path / "log.csv").read_text().splitlines()[-1].startswith("6,")


def test_the_rate_is_measured(shard, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_mae, "train", lambda *arguments: None)
    monkeypatch.setattr(pretrain_mae, "finish", lambda *arguments: None)
    pretrain_mae.main(["--data", shard, "--output", str(tmp_path), *BRIEF, "--max_minutes", "1"])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["images_per_second"] > 0
    assert plan["steps"] == pytest.approx(60 * plan["images_per_second"] / 4, abs=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache", "none"], "cache must be memory or device"),
        (["--init_from", "somewhere"], "leave --init_from out"),
        (["--drop_path_rate", "0.1"], "no stochastic depth: drop_path_rate must be 0"),
        (["--mask_ratio", "1"], "mask_ratio must lie in .0, 1."),
        (["--max_minutes", "0"], "max_minutes must be above 0"),
        (["--decoder_heads", "5"], "decoder_width 32 must be a multiple"),
    ],
)
def test_refusals(shard, tmp_path, flags, message):
    with pytest.raises(SpcxrError, match=message):
        pretrain_mae.main(["--data", shard, "--output", str(tmp_path), *BRIEF, *flags])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("pretrain_mae_*.yaml")), ids=lambda path: path.stem)
def test_recipes_differ_from_ours_in_the_pretext_alone(path, tmp_path):
    from training_scripts import pretrain

    def read(module, recipe):
        return vars(parse_arguments(module.Arguments, [str(recipe), "--data", "x", "--output", "y"]))

    ours = read(pretrain, RECIPES / path.name.replace("_mae", ""))
    theirs = read(pretrain_mae, path)
    of_the_pretext = {"norm_pix_loss", "mask_ratio"}
    same = set(ours) & set(theirs) - {"output", "steps", "drop_path_rate"} - of_the_pretext
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
