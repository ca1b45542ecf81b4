"""Sharded runs (FSDP) over gloo: the losses, metrics and checkpoints of others, and half of the memory."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining
from spcxr_hf.training.arguments import RunArguments, check_launch, check_run
from spcxr_hf.training.checkpoints import list_checkpoints
from spcxr_hf.training.optim import parameter_groups
from spcxr_hf.training.sharding import Shards, own_share
from tests.made_up import write_set
from tests.processes import finish, start, start_group, with_small_models
from training_scripts import finetune_segmentation, pretrain

PRETRAIN, SEGMENT = with_small_models(pretrain.main), with_small_models(finetune_segmentation.main)
pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"torch {torch.__version__} shards on GPUs only"
)

# Sums in another order differ in the last digit. Where a pixel is hit that exactly, the L1 loss's gradient changes its
# sign by it, and from there on the runs are apart by this much: less than a hundredth of what random weights are apart.
KINK = 1e-3
BRIEF = ["--size", "tiny", "--image_size", "32", "--stored_size", "40", "--batch_size", "8", "--warmup_steps", "2"]
BRIEF += ["--micro_batch_size", "2", "--save_every", "4", "--log_every", "1", "--ema_decay", "0.9"]
# Any step may be the last: the schedules do not look at it.
OPEN = [*BRIEF, "--decay_steps", "0", "--final_weight_decay", "0.04"]
SHARD = ["--fsdp", "true"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 10))


def words(shard: str, output: Path, *flags: str) -> list[str]:
    return ["--data", shard, "--output", str(output), *flags]


def column(output: Path, name: str) -> list[float]:
    with (output / "log.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds, and the final model."""
    return read_all([*sorted(list_checkpoints(output)[-1].glob("*.safetensors")), output / "final/model.safetensors"])


def read_all(files: list[Path]) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{file.stem}/{name}": value for file in files for name, value in load_file(file).items()
    }


def assert_close(one: Path, other: Path, atol: float = 0.0) -> None:
    here, there = tensors(one), tensors(other)
    assert here.keys() == there.keys()
    different = [name for name, value in here.items() if not torch.allclose(value, there[name], rtol=0, atol=atol)]
    assert different == []


def assert_same_losses(one: Path, other: Path) -> None:
    here, there = column(one, "loss"), column(other, "loss")
    assert len(here) == 20
    assert here[:16] == pytest.approx(there[:16], abs=1e-5)
    assert here == pytest.approx(there, abs=KINK)


@pytest.fixture(scope="module")
def one(shard, tmp_path_factory):
    """A run of 20 steps in one process."""
    output = tmp_path_factory.mktemp("one")
    process = start(PRETRAIN, words(shard, output, *OPEN, "--steps", "20"), output / "console")
    assert finish([process]) == [0], (output / "console").read_text()
    return output


@pytest.fixture(scope="module")
def sharded(shard, tmp_path_factory):
    """The same run in two processes, sharded."""
    output = tmp_path_factory.mktemp("sharded")
    command = words(shard, output, *OPEN, *SHARD, "--steps", "20")
    assert finish(start_group(PRETRAIN, command, output / "console")) == [0, 0], console(output)
    return output


def console(output: Path) -> str:
    return "\n".join(file.read_text() for file in output.glob("console*"))


@pytest.mark.slow
def test_the_losses_of_one_process(one, sharded):
    assert_same_losses(one, sharded)
    assert "| processes | 2, sharded |" in (sharded / "report.md").read_text()


@pytest.mark.slow
def test_the_checkpoints_of_one_process(one, sharded):
    """The same files, tensors and values: weights, moments, average and the final model."""
    names = [sorted(file.name for file in list_checkpoints(output)[-1].iterdir()) for output in (one, sharded)]
    assert names[0] == names[1]
    earlier = [read_all(sorted(list_checkpoints(output)[0].glob("*.safetensors"))) for output in (one, sharded)]
    assert {name.split("/")[0] for name in earlier[0]} == {"checkpoint-16"} and earlier[0].keys() == earlier[1].keys()
    assert all(torch.allclose(value, earlier[1][name], rtol=0, atol=1e-5) for name, value in earlier[0].items())
    assert_close(one, sharded, atol=KINK)
    configs = [json.loads((output / "final" / "config.json").read_text()) for output in (one, sharded)]
    assert configs[0] == configs[1]
    assert SpcxrForPreTraining.from_pretrained(sharded / "final").config.images_seen == 160


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(shard, sharded, tmp_path):
    command = words(shard, tmp_path, *OPEN, *SHARD, "--steps", "20")
    processes = start_group(PRETRAIN, command, tmp_path / "console")
    while processes[0].is_alive() and not list_checkpoints(tmp_path):
        time.sleep(0.01)
    for process in processes:
        process.kill()
    assert finish(processes) == [-signal.SIGKILL] * 2
    assert int(list_checkpoints(tmp_path)[-1].name.split("-")[1]) < 20
    assert finish(start_group(PRETRAIN, command, tmp_path / "console")) == [0, 0], console(tmp_path)
    assert_close(tmp_path, sharded)
    assert column(tmp_path, "loss") == column(sharded, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("before_is_sharded", [True, False])
def test_a_run_goes_on_with_another_number_of_processes(shard, one, tmp_path, before_is_sharded):
    for steps, is_sharded in (("9", before_is_sharded), ("20", not before_is_sharded)):
        command = words(shard, tmp_path, *OPEN, "--steps", steps, *(SHARD if is_sharded else []))
        processes = start_group(PRETRAIN, command, tmp_path / "console", 2 if is_sharded else 1)
        assert set(finish(processes)) == {0}, console(tmp_path)
    assert_same_losses(tmp_path, one)
    assert_close(tmp_path, one, atol=KINK)


@pytest.mark.slow
def test_a_run_that_is_over_writes_its_final_model_again(shard, sharded, tmp_path):
    before = load_file(sharded / "final" / "model.safetensors")
    (sharded / "final" / "model.safetensors").unlink()
    command = words(shard, sharded, *OPEN, *SHARD, "--steps", "20")
    assert finish(start_group(PRETRAIN, command, tmp_path / "console")) == [0, 0], console(tmp_path)
    after = load_file(sharded / "final" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves(shard, sharded, tmp_path):
    command = words(shard, tmp_path, *OPEN, *SHARD, "--steps", "20", "--save_every", "100")
    processes = start_group(PRETRAIN, command, tmp_path / "console")
    while processes[0].is_alive() and not (tmp_path / "log.csv").is_file():
        time.sleep(0.01)
    processes[1].terminate()  # one of them, and not the one that writes
    assert finish(processes) == [0, 0], console(tmp_path)
    assert "stopped by SIGTERM" in console(tmp_path)
    assert finish(start_group(PRETRAIN, command, tmp_path / "console")) == [0, 0], console(tmp_path)
    assert_close(tmp_path, sharded)


@pytest.mark.slow
def test_fine_tuning_has_the_metrics_of_one_process(tmp_path):
    """Validation on all processes, the best checkpoint and a decoder that is no block."""
    data = str(write_set(tmp_path / "set.parquet", ["train"] * 8 + ["val"] * 3))
    flags = ["--from_scratch", "true", *BRIEF, "--steps", "8", "--drop_path_rate", "0.1", "--patience", "5"]
    first = start(SEGMENT, words(data, tmp_path / "one", *flags), tmp_path / "console-one")
    both = start_group(SEGMENT, words(data, tmp_path / "two", *flags, *SHARD), tmp_path / "console")
    assert finish([first, *both]) == [0, 0, 0], console(tmp_path)
    for name in ("loss", "val_dice"):
        assert column(tmp_path / "one", name) == pytest.approx(column(tmp_path / "two", name), abs=1e-5)
    best = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(value, best[1][name], atol=1e-5) for name, value in best[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--mixed_precision", "bf16"], ["--mixed_precision", "fp16"]])
def test_other_precisions(shard, tmp_path, flags):
    for name, more in (("plain", []), ("sharded", SHARD)):
        command = words(shard, tmp_path / name, *BRIEF, "--steps", "6", *flags, *more)
        assert finish(start_group(PRETRAIN, command, tmp_path / f"console-{name}")) == [0, 0], console(tmp_path)
    assert column(tmp_path / "plain", "loss") == pytest.approx(column(tmp_path / "sharded", "loss"), abs=1e-3)


def test_one_process_has_nothing_to_share(shard, tmp_path):
    process = start(PRETRAIN, words(shard, tmp_path, *BRIEF, *SHARD, "--steps", "1"), tmp_path / "console")
    assert finish([process]) == [0], console(tmp_path)
    assert "| processes | 1 |" in (tmp_path / "report.md").read_text()


# What a process holds


def weigh(argv: list[str]) -> None:
    """Print the shares of parameters, gradients and moments that this process holds after a step."""
    distributed.init_process_group("gloo")
    torch.manual_seed(distributed.get_rank())  # the model of the first process is everybody's
    model = SpcxrForPreTraining(SpcxrConfig.from_size("tiny", image_size=32, drop_path_rate=0.0))
    total = sum(parameter.numel() for parameter in model.parameters())
    shards = Shards(model, torch.optim.AdamW(parameter_groups(model), fused=True), torch.device("cpu"))
    pixels = torch.ones(2, 1, 32, 32)
    shards.model(pixels, labels=pixels).loss.backward()
    shards.optimizer.step()
    parameters = list(shards.model.parameters())
    kinds = {
        "parameters": parameters,
        "gradients": [parameter.grad for parameter in parameters],
        "moments": [shards.optimizer.state[parameter]["exp_avg"] for parameter in parameters],
        "whole": list(model.parameters()),
    }
    with torch.no_grad():
        print(json.dumps({name: sum(own_share(t).numel() for t in each) / total for name, each in kinds.items()}))
    shards.fill()
    digest = sum(parameter.double().sum().item() for parameter in model.parameters())
    print(json.dumps({"filled": sum(parameter.numel() for parameter in model.parameters()) / total, "digest": digest}))


@pytest.mark.slow
def test_a_process_holds_half(tmp_path):
    assert finish(start_group(weigh, [], tmp_path / "console")) == [0, 0], console(tmp_path)
    told = [
        [json.loads(line) for line in (tmp_path / f"console.{rank}").read_text().splitlines() if line[0] == "{"]
        for rank in (0, 1)
    ]
    for held, filled in told:
        assert held.pop("whole") == 0
        assert all(0.49 < share < 0.51 for share in held.values()), held
        assert filled["filled"] == 1
    assert told[0][1]["digest"] == told[1][1]["digest"]


# What is refused


def test_accelerates_own_way_is_refused_by_name(shard, tmp_path):
    process = start(
        PRETRAIN, words(shard, tmp_path, *BRIEF, "--steps", "1"), tmp_path / "console", ACCELERATE_USE_FSDP="true"
    )
    assert finish([process]) == [1]
    assert "configured to divide the model itself (FSDP)" in console(tmp_path)
    assert "--fsdp true" in console(tmp_path)


def test_other_ways_are_refused_by_name(monkeypatch):
    from accelerate import DistributedType

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    accelerator = type("Other", (), {"num_processes": 1, "distributed_type": DistributedType.DEEPSPEED})()
    with pytest.raises(SpcxrError, match=r"\(DEEPSPEED\)"):
        check_launch(accelerator)


def test_compiled_models_are_not_sharded():
    with pytest.raises(SpcxrError, match="fsdp and compile exclude each other"):
        check_run(RunArguments("data", "output", fsdp=True, compile=True))
