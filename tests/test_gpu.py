"""What only a GPU shows: compiled training steps, sets that are kept on the device, heads that are fitted first."""

import pytest
import torch

from spcxr_hf.transforms.group_masking import GroupMasking
from tests.made_up import write_set
from training_scripts import finetune_classification, finetune_segmentation, pretrain
from training_scripts.benchmarks import pretrain_mae

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that CUDA finds"),
]
BRIEF = ["--size", "tiny", "--image_size", "32", "--stored_size", "40", "--batch_size", "4", "--warmup_steps", "1"]
BRIEF += ["--steps", "4", "--save_every", "2", "--log_every", "1", "--cache", "device", "--mixed_precision", "bf16"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 13 + ["val"] * 6))


@pytest.mark.parametrize("script", [pretrain, pretrain_mae], ids=["gmml", "mae"])
def test_a_compiled_pretraining(script, shard, tmp_path):
    script.main(["--data", shard, "--output", str(tmp_path), *BRIEF, "--compile", "true"])
    page = (tmp_path / "report.md").read_text()
    assert torch.cuda.get_device_name() in page and "| steps skipped, loss not finite | 0 |" in page


def test_a_head_that_is_fitted_first(shard, tmp_path):
    words = ["--data", shard, "--output", str(tmp_path), "--from_scratch", "true", *BRIEF]
    words += ["--label_column", "pneumonia_label", "--split_column", "pneumonia_split"]
    finetune_classification.main([*words, "--head_from_probe", "true", "--balance", "loss"])
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_lungs(tmp_path):
    shard = write_set(tmp_path / "set.parquet", ["train"] * 8 + ["val"] * 4)
    words = ["--data", str(shard), "--output", str(tmp_path / "run"), "--from_scratch", "true", *BRIEF]
    finetune_segmentation.main(words)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_groups_cover_what_they_are_asked_to():
    masking = GroupMasking(fill_modes=("noise", "block", "replace"), mask_ratio=(0.6, 0.6), replace_ratio=0.6)
    images = torch.randn(256, 1, 112, 112, device="cuda")
    corrupted = masking(images, torch.Generator("cuda").manual_seed(0))
    covered = corrupted.mask.float().mean(dim=(1, 2, 3))
    assert covered.mean().item() == pytest.approx(0.62, abs=0.03)  # the last group goes a little beyond
    assert corrupted.pixel_values[~corrupted.mask].equal(images[~corrupted.mask])
