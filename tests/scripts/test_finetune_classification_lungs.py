"""Fine-tuning with --lungs: some views show the lungs alone, and val is measured on both kinds of images."""

import json

import pytest
import torch

from spcxr_hf import SpcxrError, SpcxrForSemanticSegmentation, SpcxrImageProcessor
from spcxr_hf.data.batches import MicroBatch
from spcxr_hf.modeling.configuration_spcxr import SIZES
from spcxr_hf.models.lungs import Segmenter
from spcxr_hf.training.classifiers import Pixels
from tests.common import build, tiny_config
from tests.made_up import SMALL_PRESET, write_set
from tests.scripts.test_finetune_classification import SPLITS, contents, killed_and_started_again, run
from training_scripts.finetune_classification import Arguments, draw_views

LUNGS = {"id2label": {0: "background", 1: "lung"}, "label2id": {"background": 0, "lung": 1}}


@pytest.fixture(scope="module", autouse=True)
def small_and_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setitem(SIZES, "tiny", SMALL_PRESET)
        yield


@pytest.fixture(autouse=True)
def dark_is_lung(monkeypatch):
    """The made-up lungs are darker than all else; a tiny random network would not find them."""
    monkeypatch.setattr(Segmenter, "find", lambda self, images, **_: images[:, 0] < 140)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", SPLITS))


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lungs")
    build(SpcxrForSemanticSegmentation, tiny_config(num_labels=2, **LUNGS)).save_pretrained(folder)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return ["--from_scratch", "true", "--size", "tiny", "--lungs", str(folder), "--lung_only_prob", "0.5"]


@pytest.mark.slow
def test_the_model_is_chosen_by_both_versions_of_val(shard, flags, tmp_path):
    run(shard, tmp_path, *flags, "--save_every", "1", "--metric", "loss", "--learning_rate", "0.003")
    lines = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    whole, lungs = (
        [float(line[lines[0].index(name)]) for line in lines[1:]] for name in ("val_loss", "val_lungs_loss")
    )
    assert whole != lungs
    means = [(one + other) / 2 for one, other in zip(whole, lungs, strict=True)]
    result = json.loads((tmp_path / "results.json").read_text())
    best = means.index(min(means))
    assert result["step"] == best + 1
    assert result["val"]["loss"] == pytest.approx(whole[best], abs=1e-5)
    assert result["val_lungs"]["loss"] == pytest.approx(lungs[best], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(shard, flags, tmp_path, monkeypatch):
    flags = [*flags, "--cache_folder", str(tmp_path / "cache"), "--head_from_probe", "true"]
    run(shard, tmp_path / "whole", *flags)
    killed_and_started_again(shard, tmp_path / "killed", monkeypatch, *flags)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert list((tmp_path / "cache").glob("*-lungs-*.npy"))


def test_what_lies_outside_is_hidden_in_the_views():
    """The frames of two images differ, their lungs do not: with every view filled, no view tells them apart."""
    images = torch.full((2, 1, 40, 40), 100, dtype=torch.uint8)
    images[0, :, :4], images[1, :, -4:] = 250, 250
    lungs = torch.zeros(2, 40, 40, dtype=torch.bool)
    lungs[:, 10:30, 10:30] = True
    arguments = Arguments(output="-", data="-", lungs="-", lung_only_prob=1.0, image_size=32, flip=0.0, blur=0.0)
    arguments.crop_scale, arguments.brightness, arguments.contrast = [1.0, 1.0], 0.0, 0.0
    pixels = Pixels(32, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), {})

    def views(fill: float) -> torch.Tensor:
        arguments.lung_only_prob = fill
        batch = MicroBatch(images, ["a", "b"], {"targets": torch.eye(2), "lungs": lungs}, seed=0)
        return draw_views(arguments, pixels, batch, torch.device("cpu"))[0]

    assert views(0.0)[0, 0, 0, 16] > views(0.0)[1, 0, 0, 16] + 0.4
    assert views(1.0)[0, 0, 0, 16] == pytest.approx(views(1.0)[1, 0, 0, 16])
    assert views(1.0)[0, 0, 16, 16] == pytest.approx(100 / 255, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lung_only_prob", "0.5"], "go together"),
        (["--lungs", "somewhere"], "go together"),
        (["--lungs", "somewhere", "--lung_only_prob", "1.5"], r"lung_only_prob must lie in \[0, 1\]; got 1.5"),
        (["--lungs", "nowhere", "--lung_only_prob", "1"], "nowhere: is not in the local Hub cache"),
    ],
)
def test_refusals(shard, tmp_path, words, message):
    with pytest.raises(SpcxrError, match=message):
        run(shard, tmp_path, "--from_scratch", "true", "--size", "tiny", *words)
