"""The training engine: killed runs end as others do, two processes do as one, and what is not finite does no harm."""

import csv
import functools
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spcxr_hf import SpcxrError
from spcxr_hf.files import locked
from spcxr_hf.modeling.configuration_spcxr import SIZES
from spcxr_hf.models import loading
from spcxr_hf.training import checkpoints, engine
from spcxr_hf.training.arguments import PretrainingArguments, check_run, run_script
from spcxr_hf.training.checkpoints import list_checkpoints
from tests.made_up import SMALL_PRESET, write_set
from tests.processes import finish, start, start_group, with_small_models
from training_scripts import pretrain

BRIEF = ["--size", "tiny", "--image_size", "32", "--stored_size", "40", "--batch_size", "4", "--warmup_steps", "2"]
BRIEF += ["--micro_batch_size", "2", "--save_every", "2", "--log_every", "1"]
# What a resumed run has most to get right: accumulated gradients and averaged weights, and epochs of 2.5 batches.
HARD = [*BRIEF, "--steps", "40", "--ema_decay", "0.9"]


@pytest.fixture(scope="module", autouse=True)
def small_and_on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setitem(SIZES, "tiny", SMALL_PRESET)
        yield


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return str(write_set(tmp_path_factory.mktemp("set") / "set.parquet", ["train"] * 10))


def words(shard: str, output: Path, *flags: str) -> list[str]:
    return ["--data", shard, "--output", str(output), *flags]


def log_rows(output: Path) -> list[dict]:
    with (output / "log.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def contents(output: Path) -> dict[str, bytes]:
    """All that a run's last checkpoint and its final model hold, but for how long it took."""
    checkpoint = list_checkpoints(output)[-1]
    files = [*checkpoint.glob("*.safetensors"), output / "final" / "model.safetensors", output / "log.csv"]
    return {f"{file.parent.name}/{file.name}" if file.suffix != ".csv" else "log": file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(shard, tmp_path_factory):
    """A run that was never killed."""
    output = tmp_path_factory.mktemp("whole")
    process = start(pretrain.main, words(shard, output, *HARD), output / "console")
    assert finish([process]) == [0], (output / "console").read_text()
    return output


# Exact resume


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_weights(shard, whole, tmp_path):
    moments, steps_at_death = random.Random(0), []
    for _ in range(20):
        process = start(pretrain.main, words(shard, tmp_path, *HARD), tmp_path / "console")
        # Some steps on, and somewhere within a step: its forward, its backward, the writing of log and checkpoint.
        wait_for_rows(tmp_path, moments.randint(0, 3), process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert finish([process]) == [-signal.SIGKILL]
        steps_at_death += [int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)[-1:]]
    assert len(set(steps_at_death)) >= 5  # they died at different places
    assert finish([start(pretrain.main, words(shard, tmp_path, *HARD), tmp_path / "console")]) == [0]
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_a_stream_that_is_killed_goes_on(shard, tmp_path):
    """Read by workers on the way, in the middle of an epoch."""
    flags = [*BRIEF, "--steps", "9", "--cache", "none", "--workers", "2"]
    process = start(pretrain.main, words(shard, tmp_path / "cut", *flags), tmp_path / "console")
    (tmp_path / "cut").mkdir()
    wait_for_rows(tmp_path / "cut", 3, process)
    process.kill()
    assert finish([process]) == [-signal.SIGKILL]
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] != ["checkpoint-9"]
    runs = [
        start(pretrain.main, words(shard, tmp_path / name, *flags), tmp_path / f"console-{name}")
        for name in ("cut", "not")
    ]
    assert finish(runs) == [0, 0], (tmp_path / "console-not").read_text()
    assert contents(tmp_path / "cut") == contents(tmp_path / "not")


def wait_for_rows(output: Path, more: int, process) -> None:
    """Until the log of a run has grown by `more` rows since its last checkpoint, or the run is over."""
    newest = [int(path.name.split("-")[1]) for path in list_checkpoints(output)[-1:]] or [0]
    while process.is_alive():
        if not more or ((output / "log.csv").is_file() and int(log_rows(output)[-1]["step"]) >= newest[0] + more):
            return
        time.sleep(0.01)


def killed_in_writing(call: int, argv: list[str]) -> None:
    """Die instead of writing a checkpoint's safetensors file; `call` counts those that are written before."""
    save_file, calls = checkpoints.save_file, []

    def die(*args, **kwargs):
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return save_file(*args, **kwargs)

    checkpoints.save_file = die
    pretrain.main(argv)


@pytest.mark.slow
def test_a_run_killed_inside_the_writing_of_a_checkpoint(shard, tmp_path):
    """0 dies before the first file of a checkpoint, and so on."""
    main, steps = with_small_models(pretrain.main), ["--steps", "10"]
    assert finish([start(main, words(shard, tmp_path / "whole", *HARD, *steps), tmp_path / "console")]) == [0]
    for call in (0, 1, 2, 4):
        dying = with_small_models(functools.partial(killed_in_writing, call))
        command = words(shard, tmp_path / str(call), *HARD, *steps)
        assert finish([start(dying, command, tmp_path / "console")]) == [-signal.SIGKILL]
        assert list((tmp_path / str(call)).glob(".checkpoint-*.partial"))
        assert finish([start(main, command, tmp_path / "console")]) == [0]
        assert contents(tmp_path / str(call)) == contents(tmp_path / "whole")
        assert not list((tmp_path / str(call)).glob(".*partial"))


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_and_goes_on(shard, whole, tmp_path):
    process = start(pretrain.main, words(shard, tmp_path, *HARD, "--save_every", "1000"), tmp_path / "console")
    while not (tmp_path / "log.csv").is_file() and process.is_alive():
        time.sleep(0.01)
    process.terminate()
    assert finish([process]) == [0]
    console = (tmp_path / "console").read_text()
    assert "stopped by SIGTERM after step" in console
    (checkpoint,) = list_checkpoints(tmp_path)
    assert 0 < int(checkpoint.name.split("-")[1]) < 40
    assert finish([start(pretrain.main, words(shard, tmp_path, *HARD), tmp_path / "console")]) == [0]
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_a_tampered_checkpoint_is_named_and_passed_over(shard, whole, tmp_path):
    short = [*HARD, "--decay_steps", "20"]
    assert finish([start(pretrain.main, words(shard, tmp_path, *short, "--steps", "7"), tmp_path / "console")]) == [0]
    file = list_checkpoints(tmp_path)[-1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # one bit of one weight
    file.write_bytes(data)
    assert finish([start(pretrain.main, words(shard, tmp_path, *short, "--steps", "7"), tmp_path / "again")]) == [0]
    assert (
        "checkpoint-7: damaged checkpoint (model.safetensors is not what was written)"
        in (tmp_path / "again").read_text()
    )


def signalled_while_it_reads(sent: int, argv: list[str]) -> None:
    decode_set = pretrain.decode_set

    def send(*args, **kwargs):
        signal.raise_signal(sent)
        return decode_set(*args, **kwargs)

    pretrain.decode_set = send
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    run_script(functools.partial(pretrain.main, argv))


def test_a_run_stopped_before_its_first_step_ends_cleanly(shard, tmp_path):
    for sent, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        console = tmp_path / f"console-{code}"
        process = start(
            functools.partial(signalled_while_it_reads, sent), words(shard, tmp_path, *BRIEF, "--steps", "1"), console
        )
        assert finish([process]) == [code]
        said = console.read_text()
        assert said.startswith("stopped") and len(said.splitlines()) == 1
        assert list_checkpoints(tmp_path) == [] and not (tmp_path / ".lock-holder").exists()


def test_a_second_run_in_the_same_folder_is_refused(shard, tmp_path):
    with locked(tmp_path), pytest.raises(SpcxrError, match=rf"{tmp_path}: in use by process {os.getpid()} on .*since "):
        pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "1"))
    with locked(tmp_path):  # it is free again, also after an error within
        (tmp_path / ".lock-holder").unlink()
        with pytest.raises(SpcxrError, match=f"{tmp_path}: in use by another process"), locked(tmp_path):
            pass


@pytest.mark.slow
def test_a_full_disk_where_the_log_is_written(shard, tmp_path, monkeypatch):
    class Full(csv.DictWriter):
        def writerows(self, rows):
            if len(rows) == 3:
                raise OSError(28, "No space left on device")
            return super().writerows(rows)

    with monkeypatch.context() as patch:
        patch.setattr(csv, "DictWriter", Full)
        with pytest.raises(SpcxrError, match=r"log\.csv: cannot be written \(No space left on device\)"):
            pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "4"))
    assert [row["step"] for row in log_rows(tmp_path)] == ["1", "2"]
    pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "4"))
    assert [row["step"] for row in log_rows(tmp_path)] == ["1", "2", "3", "4"]
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_pretraining_goes_on_with_its_own_images_only(shard, tmp_path, cache):
    other = str(write_set(tmp_path / "other.parquet", ["train"] * 9))
    flags = [*BRIEF, "--cache", cache, "--workers", "0", "--micro_batch_size", "4", "--steps"]
    pretrain.main(words(shard, tmp_path / "run", *flags, "2"))
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(SpcxrError, match=r"run: its checkpoints were trained on other data: .*--allow-other-data true"):
        pretrain.main(words(other, tmp_path / "run", *flags, "4"))
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe
    pretrain.main(words(other, tmp_path / "run", *flags, "4", "--allow_other_data", "true"))
    assert (tmp_path / "run" / "checkpoint-4").is_dir()


def with_little_room(argv: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # bytes a file may have
    try:
        pretrain.main(argv)
    except SpcxrError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(3) from error


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(shard, tmp_path):
    short = [*BRIEF, "--steps", "2"]
    assert finish([start(pretrain.main, words(shard, tmp_path, *short), tmp_path / "console")]) == [0]
    before = (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes()
    longer = [*BRIEF, "--steps", "4"]
    assert finish([start(with_little_room, words(shard, tmp_path, *longer), tmp_path / "full")]) == [3]
    assert "checkpoint-4: the checkpoint could not be written" in (tmp_path / "full").read_text()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes() == before


# Several processes


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(shard, tmp_path):
    flags = [*BRIEF, "--steps", "20", "--log_every", "1"]
    main = with_small_models(pretrain.main)
    one = start(main, words(shard, tmp_path / "one", *flags), tmp_path / "console-one")
    two = start_group(main, words(shard, tmp_path / "two", *flags), tmp_path / "console-two")
    assert finish([one, *two]) == [0, 0, 0], (tmp_path / "console-two.0").read_text()
    losses = [[float(row["loss"]) for row in log_rows(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(value, weights[1][name], atol=1e-5) for name, value in weights[0].items())


@pytest.mark.slow
def test_two_processes_go_on_as_if_never_killed(shard, tmp_path):
    main = with_small_models(pretrain.main)
    for name, steps in (("cut", "5"), ("cut", "9"), ("not", "9")):  # the second finds the first one's checkpoint
        flags = [*BRIEF, "--steps", steps, "--decay_steps", "0", "--final_weight_decay", "0.04"]
        assert finish(start_group(main, words(shard, tmp_path / name, *flags), tmp_path / "console")) == [0, 0]
    assert contents(tmp_path / "cut") == contents(tmp_path / "not")


@pytest.mark.parametrize(("processes", "size", "message"), [(2, "4", "do not share out among 2"), (1, "3", "multiple")])
def test_micro_batches_that_do_not_share_out_are_refused(shard, tmp_path, processes, size, message):
    command = words(shard, tmp_path / "run", *BRIEF, "--steps", "1", "--micro_batch_size", size)
    codes = finish(start_group(pretrain.main, command, tmp_path / "console", processes))
    assert codes == [1] * processes
    assert message in (tmp_path / "console.0").read_text()


# Numbers that are not finite


def spoil(monkeypatch, steps: set[int]) -> None:
    """Make the images of these steps NaN."""
    draw_views, calls = pretrain.draw_views, []

    def spoiled(*args):
        clean, corrupted = draw_views(*args)
        calls.append(1)
        if (len(calls) - 1) // 2 in steps:  # two micro-batches a step
            clean = clean * float("nan")
        return clean, corrupted

    monkeypatch.setattr(pretrain, "draw_views", spoiled)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(shard, tmp_path, monkeypatch):
    spoil(monkeypatch, {1, 3})
    pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "6", "--max_nonfinite_steps", "2"))
    state = json.loads((tmp_path / "checkpoint-6" / "training_state.json").read_text())
    assert state["skipped"] == 2
    assert [row["loss"] == "nan" for row in log_rows(tmp_path)] == [False, True, False, True, False, False]
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in final.values())


def test_too_many_in_a_row_end_the_run_and_name_the_images(shard, tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4, 5})
    with pytest.raises(SpcxrError, match=r"step 6: .*not finite in 3 steps in a row; images of the last: row-\d"):
        pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "9", "--max_nonfinite_steps", "3"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


# fp16


FP16 = [*BRIEF, "--mixed_precision", "fp16", "--decay_steps", "0", "--final_weight_decay", "0.04"]


def start_scale(monkeypatch, scale: float) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=scale))


def training_state(output: Path) -> dict:
    return json.loads((list_checkpoints(output)[-1] / "training_state.json").read_text())


@pytest.mark.slow
def test_fp16_computes_in_fp16(shard, tmp_path):
    """Also on a CPU, where Accelerate would go on in float32 without a word."""
    for name, flags in (("half", FP16), ("full", [*FP16, "--mixed_precision", "no"])):
        pretrain.main(words(shard, tmp_path / name, *flags, "--steps", "3"))
    half, full = ([float(row["loss"]) for row in log_rows(tmp_path / name)] for name in ("half", "full"))
    assert half == pytest.approx(full, abs=5e-3)
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("half", "full")]
    assert any(not torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert training_state(tmp_path / "half")["scaler"]["_growth_tracker"] == 3
    assert "| steps skipped, loss scale too high | 0 |" in (tmp_path / "half" / "report.md").read_text()


@pytest.mark.slow
def test_a_run_that_goes_on_by_another_recipe_says_so(shard, tmp_path, caplog):
    for flags in ([], ["--steps", "3", "--save_every", "3"], ["--steps", "3", "--learning_rate", "0.1"]):
        caplog.clear()
        pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "2", *flags))
        said = [record.message for record in caplog.records if record.name == "spcxr_hf.training.arguments"]
        if not flags:
            assert not said
        elif "--learning_rate" in flags:
            assert said == [
                f"{tmp_path} resumes from checkpoint-3, which was trained with another recipe "
                "(learning_rate 0.0005 -> 0.1); another --output starts a new run"
            ]
        else:
            assert len(said) == 1 and "(steps 2 -> 3)" in said[0]
    for cache, is_told in (("device", False), ("none", True)):  # a stream comes in another order
        caplog.clear()
        pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "3", "--learning_rate", "0.1", "--cache", cache))
        said = [record.message for record in caplog.records if record.name == "spcxr_hf.training.arguments"]
        assert len(said) == is_told and all("(cache device -> none)" in words for words in said)
    (tmp_path / "recipe.yaml").write_text("steps: [")
    caplog.clear()
    pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "3"))
    assert not [record for record in caplog.records if record.name == "spcxr_hf.training.arguments"]


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_float32_where_the_cpu_has_no_fast_bf16(shard, tmp_path, monkeypatch, fast):
    for module in (engine, loading):
        monkeypatch.setattr(module, "has_fast_bf16", lambda kind: fast)
    for name in ("bf16", "no"):
        pretrain.main(words(shard, tmp_path / name, *BRIEF, "--steps", "3", "--mixed_precision", name))
    half, full = ([float(row["loss"]) for row in log_rows(tmp_path / name)] for name in ("bf16", "no"))
    assert half == pytest.approx(full, abs=5e-2)
    assert (half == full) is not fast
    said = "| precision | float32: this CPU has no fast bf16 |"
    assert (said in (tmp_path / "bf16" / "report.md").read_text()) is not fast
    assert said not in (tmp_path / "no" / "report.md").read_text()


@pytest.mark.slow
def test_a_scale_that_is_too_high_falls_and_is_no_fault_of_the_images(shard, tmp_path, monkeypatch):
    """And a run that is cut in between goes on to the same weights and scale."""
    start_scale(monkeypatch, 2.0**40)
    pretrain.main(words(shard, tmp_path / "whole", *FP16, "--steps", "30", "--max_nonfinite_steps", "2"))
    for steps in ("5", "30"):
        pretrain.main(words(shard, tmp_path / "cut", *FP16, "--steps", steps, "--max_nonfinite_steps", "2"))
    state = training_state(tmp_path / "whole")
    assert 5 < state["overflows"] < 30
    assert state["scaler"]["scale"] == 2.0 ** (40 - state["overflows"])
    assert state["skipped"] == 0
    again = training_state(tmp_path / "cut")
    assert (again["scaler"], again["overflows"]) == (state["scaler"], state["overflows"])
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_gradients_that_overflow_at_any_scale_end_the_run(shard, tmp_path, monkeypatch):
    def with_a_fault(arguments):
        model = build_model(arguments)
        model.spcxr.layernorm.weight.register_hook(lambda gradient: gradient * float("inf"))
        return model

    build_model = pretrain.build_model
    monkeypatch.setattr(pretrain, "build_model", with_a_fault)
    start_scale(monkeypatch, 4.0)  # two steps at 4 and 2 are the scale's, the three from 1 on are not
    with pytest.raises(SpcxrError, match=r"step 5: .*not finite in 3 steps in a row; images of the last: row-\d"):
        pretrain.main(words(shard, tmp_path, *FP16, "--steps", "9", "--max_nonfinite_steps", "3"))


def test_images_that_are_not_finite_are_a_fault_in_fp16_too(shard, tmp_path, monkeypatch):
    spoil(monkeypatch, {1, 2})
    pretrain.main(words(shard, tmp_path, *FP16, "--steps", "4", "--max_nonfinite_steps", "3"))
    state = training_state(tmp_path)
    assert (state["skipped"], state.get("overflows", 0)) == (2, 0)


# The rest


@pytest.mark.parametrize(("seconds", "drawn"), [(1e9, [2, 6]), (0.0, [2, 4, 6])])
def test_curves_are_drawn_now_and_then_and_with_the_last_step(shard, tmp_path, monkeypatch, seconds, drawn):
    """Each drawing shows the step of the checkpoint beside it."""
    steps = []
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_DRAWINGS", seconds)
    monkeypatch.setattr(engine.StepLog, "draw", lambda log, path, curves, y_label: steps.append(log.rows[-1]["step"]))
    pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "6"))
    assert steps == drawn


@pytest.mark.slow
def test_the_average_is_what_it_says(shard, tmp_path):
    """One step: average = decay * start + (1 - decay) * trained."""
    runs = {}
    for name, flags in {"none": [], "average": ["--ema_decay", "0.75"], "start": ["--learning_rate", "0"]}.items():
        pretrain.main(words(shard, tmp_path / name, *BRIEF, "--steps", "1", *flags))
        runs[name] = load_file(tmp_path / name / "final" / "model.safetensors")
    for key, start_value in runs["start"].items():
        expected = 0.75 * start_value + 0.25 * runs["none"][key]
        assert torch.allclose(runs["average"][key], expected, atol=1e-7), key
    trained = load_file(tmp_path / "average" / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(value, trained[key]) for key, value in runs["none"].items())


@pytest.mark.parametrize(("tracker", "trace"), [("tensorboard", "events.out.tfevents.*"), ("trackio", "spcxr.db")])
def test_a_tracker_gets_the_log(shard, tmp_path, monkeypatch, tracker, trace):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "2", "--trackers", tracker))
    assert list(tmp_path.rglob(trace))


def test_deterministic_mode(shard, tmp_path):
    try:
        pretrain.main(words(shard, tmp_path, *BRIEF, "--steps", "2", "--deterministic", "true"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache", "disk"),
        ("mixed_precision", "fp8"),
        ("steps", 0),
        ("keep_checkpoints", 0),
        ("ema_decay", 1.0),
        ("decay_steps", -5),
        ("stored_size", 112),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    arguments = PretrainingArguments("data", "output")
    setattr(arguments, name, value)
    with pytest.raises(SpcxrError, match=name):
        check_run(arguments)


def test_a_folder_that_cannot_be_written_to(shard, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpcxrError, match="file/run: cannot be written"):
        pretrain.main(words(shard, tmp_path / "file" / "run", *BRIEF, "--steps", "1"))
