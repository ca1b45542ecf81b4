"""The pretraining script on a few made-up radiographs: it runs, learns, resumes exactly, writes what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from spcxr_hf import SpcxrError, SpcxrForPreTraining
from spcxr_hf.modeling.configuration_spcxr import SIZES
from spcxr_hf.training.arguments import RunArguments
from spcxr_hf.training.engine import Run
from spcxr_hf.transforms.augment import Views
from spcxr_hf.transforms.group_masking import as_pixels, normalise_patches
from tests.common import tiny_config
from tests.made_up import SMALL_PRESET, picture, write_set
from tests.processes import free_port
from training_scripts import pretrain

pytestmark = pytest.mark.slow  # many starts of a second each

SCRIPT = Path(pretrain.__file__)
SMOKE = str(SCRIPT.parent / "recipes" / "pretrain_smoke.yaml")
BRIEF = ["--size", "tiny", "--image_size", "32", "--stored_size", "40", "--batch_size", "4", "--warmup_steps", "1"]
BRIEF += ["--steps", "4", "--save_every", "2", "--log_every", "1"]


@pytest.fixture(scope="module", autouse=True)
def small_and_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setitem(SIZES, "tiny", SMALL_PRESET)
        yield


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 10 + ["val"] * 3))


@pytest.fixture(scope="module")
def finished(shard, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        pretrain.main(["--data", shard, "--output", str(output), *BRIEF])
    return output


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_what_a_run_leaves_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        ".lock",
        "checkpoint-2",
        "checkpoint-4",
        "final",
        "log.csv",
        "loss.png",
        "reconstruction.png",
        "recipe.yaml",
        "report.md",
    }
    assert (finished / "final" / "recipe.yaml").read_text() == (finished / "recipe.yaml").read_text()
    assert len((finished / "log.csv").read_text().splitlines()) == 1 + 4
    assert Image.open(finished / "reconstruction.png").size == (4 * 32 + 3 * 4, 4 * 32 + 3 * 4)


@pytest.mark.slow
def test_targets_relative_to_their_patches(shard, tmp_path, monkeypatch):
    asked = []
    forward = SpcxrForPreTraining.forward

    def watched(self, *args, **named):
        asked.append(named)
        return forward(self, *args, **named)

    monkeypatch.setattr(SpcxrForPreTraining, "forward", watched)
    pretrain.main(["--data", shard, "--output", str(tmp_path / "run"), *BRIEF, "--norm_pix_loss", "true"])
    targets = [named["labels"] for named in asked if "labels" in named]
    assert len(targets) == 4  # steps
    patches = targets[0].unfold(2, 16, 16).unfold(3, 16, 16)
    assert patches.mean(dim=(4, 5)).abs().max() < 1e-4 and (patches.std(dim=(4, 5)) - 1).abs().max() < 1e-2
    assert AutoModelForPreTraining.from_pretrained(tmp_path / "run" / "final").config.norm_pix_loss is True
    onward = ["--init_from", str(tmp_path / "run" / "final"), *BRIEF, "--output", str(tmp_path / "onward")]
    pretrain.main(["--data", shard, *onward])
    assert AutoModelForPreTraining.from_pretrained(tmp_path / "onward" / "final").config.norm_pix_loss is False


def test_relative_targets_map_back_to_pixels():
    clean = torch.randn(2, 1, 32, 48)
    clean[0, :, :16, :16] = 0.7  # one grey
    relative = normalise_patches(clean, 16)
    assert relative[0, 0, :16, :16].abs().max() < 1e-3
    config = tiny_config(patch_size=16)
    assert as_pixels(config, relative, clean) is relative
    config.norm_pix_loss = True
    assert (as_pixels(config, relative, clean) - clean).abs().max() < 1e-5
    assert as_pixels(config, relative, clean[:1]).shape == clean.shape  # one image for all


def test_the_final_model_loads(finished):
    model = AutoModelForPreTraining.from_pretrained(finished / "final")
    assert model.config.images_seen == 4 * 4
    assert model.config.image_size == 32
    processor = AutoImageProcessor.from_pretrained(finished / "final")
    inputs = processor(Image.new("L", (50, 60)), return_tensors="pt")
    assert model(**inputs).reconstruction.shape == (1, 1, 32, 32)
    assert AutoModel.from_pretrained(finished / "final")(**inputs).pooler_output.shape == (1, 32)


def test_only_the_rows_for_pretraining_are_read(tmp_path):
    shard = write_set(tmp_path / "set.parquet", ["train"] * 8 + ["test"] * 4, unreadable=["test"])
    pretrain.main(["--data", str(shard), "--output", str(tmp_path / "run"), *BRIEF, "--steps", "1"])
    with pytest.raises(SpcxrError, match=r"set\.parquet.*row-8"):
        pretrain.main(["--data", str(shard), "--output", str(tmp_path / "all"), *BRIEF, "--pretrain_only", "false"])


def test_a_killed_run_goes_on_to_the_same_weights(shard, finished, tmp_path, monkeypatch):
    steps = 0
    draw_views = pretrain.draw_views

    def killed_in_the_fourth_step(*arguments):
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return draw_views(*arguments)

    command = ["--data", shard, "--output", str(tmp_path), *BRIEF]
    monkeypatch.setattr(pretrain, "draw_views", killed_in_the_fourth_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(command)
    assert not (tmp_path / "final").exists()
    monkeypatch.setattr(pretrain, "draw_views", draw_views)
    pretrain.main(command)
    assert weights(tmp_path / "final") == weights(finished / "final")
    assert (tmp_path / "log.csv").read_text() == (finished / "log.csv").read_text()
    state = json.loads((tmp_path / "checkpoint-4" / "training_state.json").read_text())
    assert state["step"] == 4 and state["images_seen"] == 16


def test_another_image_size_goes_on_from_a_checkpoint(shard, finished, tmp_path):
    flags = ["--init_from", str(finished / "final"), *BRIEF, "--image_size", "48", "--stored_size", "48"]
    pretrain.main(["--data", shard, "--output", str(tmp_path), *flags])
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "final")
    assert model.config.image_size == 48
    assert model.config.images_seen == 32  # the checkpoint's and these
    assert model.spcxr.embeddings.position_embeddings.shape == (1, 1 + 9, 32)


@pytest.mark.slow
def test_it_learns(shard, tmp_path):
    flags = [*BRIEF, "--steps", "60", "--save_every", "60", "--learning_rate", "1e-3", "--fill_modes", "zeros"]
    pretrain.main(["--data", shard, "--output", str(tmp_path), *flags])
    losses = [float(line.split(",")[1]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20  # means: four images a step make a noisy loss
    assert last < 0.95 * first


@pytest.mark.slow
def test_a_folder_of_pictures(tmp_path):
    """All of them, or those of some splits."""
    for number, place in enumerate(["train/normal"] * 4 + ["val/normal"] * 2 + ["test/normal"] * 2):
        (tmp_path / "pictures" / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)[0]).save(tmp_path / "pictures" / place / f"{number}.png")
    seen = {}
    for name, flags in {
        "all": ["--pretrain_only", "false"],
        "two": ["--splits", "train", "val"],
        "one": ["--splits", "train"],
    }.items():
        words = ["--data", str(tmp_path / "pictures"), "--output", str(tmp_path / name), *BRIEF, "--steps", "1", *flags]
        pretrain.main(words)
        card = (tmp_path / name / "final" / "README.md").read_text()
        seen[name] = int(re.search(r"\| train \| (\d+) \|", card)[1])
    assert seen == {"all": 8, "two": 6, "one": 4}
    with pytest.raises(SpcxrError, match="pictures: no row has split = 'valid'"):
        pretrain.main([*words, "--splits", "valid"])


def test_a_stream_of_one_split(shard, tmp_path):
    flags = ["--data", shard, *BRIEF, "--cache", "none", "--workers", "0", "--micro_batch_size", "2", "--steps", "1"]
    flags += ["--split_column", "lung_split", "--splits"]
    pretrain.main([*flags, "val", "--output", str(tmp_path), "--batch_size", "2"])
    assert "| train | 3 |" in (tmp_path / "final" / "README.md").read_text()
    with pytest.raises(SpcxrError, match="--cache none takes one of --splits only"):
        pretrain.main([*flags, "train", "val", "--output", str(tmp_path / "two")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "11"], "batch of 11 is larger than the set of 10"),
        (["--fill_modes", "blur"], "blur"),
        (["--image_size", "30"], "multiple of patch_size"),
        (["--init_from", "no/such/folder"], "no/such/folder"),
        (["--size", "huge"], "huge"),
        (["--mask_ratio", "0.5"], "mask_ratio takes two numbers"),
        (["--crop_scale", "0.5"], "crop_scale takes two numbers"),
    ],
)
def test_refusals(shard, tmp_path, flags, message):
    with pytest.raises((SpcxrError, OSError), match=message):
        pretrain.main(["--data", shard, "--output", str(tmp_path), *BRIEF, *flags])


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("spcxr_hf.training.engine.Accelerator", lambda **_: type("Alone", (), {"num_processes": 1}))
    with pytest.raises(SpcxrError, match="2 processes were started but each runs alone"):
        Run(RunArguments("data", "output"))


@pytest.mark.slow
def test_as_a_command_with_the_smoke_recipe(shard, tmp_path):
    command = [sys.executable, str(SCRIPT), SMOKE, "--output", str(tmp_path / "run"), *BRIEF, "--steps", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, "--data", shard], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "image/s" in done.stderr and "loss=" in done.stderr
    wrong = subprocess.run([*command, "--data", "no-such-set"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1] == "error: no-such-set: no such file or folder"


@pytest.mark.slow
def test_two_processes_report_an_error_once(shard, tmp_path):
    command = [sys.executable, "-m", "spcxr_hf.training.launch", "--multi_gpu", "--num_processes", "2"]
    command += [str(SCRIPT), "--data", shard, "--output", str(tmp_path / "run"), *BRIEF]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    wrong = subprocess.run([*command, "--stepz", "3"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and wrong.stderr.count("did you mean --steps?") == 1
    assert "Traceback" not in wrong.stderr and "ChildFailedError" not in wrong.stderr


@pytest.mark.slow
def test_two_machines(shard, tmp_path):
    """Two launchers on this machine, one process each, as `recipes/accelerate/two_machines_cpu.yaml` starts them."""
    config = SCRIPT.parent / "recipes" / "accelerate" / "two_machines_cpu.yaml"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    port = str(free_port())
    launchers = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        command += ["--num_processes", "2", str(SCRIPT), "--data", shard, "--output", str(tmp_path / "run"), *BRIEF]
        log = (tmp_path / rank).open("w")
        launchers.append(
            subprocess.Popen([*command, "--micro_batch_size", "2"], stdout=log, stderr=log, env=environment)
        )
    assert [launcher.wait(300) for launcher in launchers] == [0, 0], (tmp_path / "0").read_text()
    # One main process, not two that run alone.
    assert ["saved " in (tmp_path / rank).read_text() for rank in ("0", "1")] == [True, False]
    assert "| processes | 2 |" in (tmp_path / "run" / "report.md").read_text()
    assert torch.isfinite(AutoModel.from_pretrained(tmp_path / "run" / "final").layernorm.weight).all()


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_broken_files_are_skipped_and_listed(tmp_path, cache, capsys):
    """In a stream a step may be smaller, and the list grows with the checkpoints."""
    shard = write_set(tmp_path / "set.parquet", ["train", "train", "val", "train"] * 3, unreadable=["val"])
    flags = ["--data", str(shard), "--output", str(tmp_path / "run"), *BRIEF, "--pretrain_only", "false"]
    flags += ["--cache", cache, "--workers", "0", "--micro_batch_size", "4"]
    with pytest.raises(SpcxrError, match="row-"):
        pretrain.main(flags)
    pretrain.main([*flags, "--on_error", "skip"])
    lines = (tmp_path / "run" / "skipped.csv").read_text().splitlines()
    assert {line.partition(",")[0] for line in lines} == {"id", "row-2", "row-6", "row-10"}
    assert f"skipped 3 broken files, listed in {tmp_path / 'run' / 'skipped.csv'}" in capsys.readouterr().out


def test_views_are_as_mild_as_they_were():
    arguments = pretrain.Arguments(data="", output="")
    assert arguments.views(32) == Views(32, (0.25, 1.0))  # the defaults of `Views` are pretraining's
    with pytest.raises(SpcxrError, match="crop_scale is the least and the largest area"):
        pretrain.Arguments(data="", output="", crop_scale=[0.5]).views(32)
