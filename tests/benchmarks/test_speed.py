"""The measurements run and are kept; the tables and the page on scale follow from the results files alone."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForPreTraining
from spcxr_hf.models.loading import has_fast_bf16
from tests.made_up import write_set
from training_scripts.benchmarks import scale, speed
from training_scripts.benchmarks.lib import baselines, timing

SCRIPTS = Path(speed.__file__).parents[1]
RECIPES = sorted((SCRIPTS / "recipes" / "accelerate").glob("*.yaml"))
MACHINE = {"machine": "x86_64, 2 cores, 2 threads", "torch": "2.6.0", "threads": 2, "quick": False}


def results(device="cpu", rate=4.0, mfu=None):
    """A results file in which everything was measured."""
    step = {"batch_size": 256, "ours": {"images_per_s": rate}, "ratio": 1.5, "outside_share": 0.021, "mfu": mfu}
    passes = {"ours_images_per_s": 9.0, "ratio_vit_mae": 1.05, "ratio_timm": 1.02}
    rows = {"1024": {"start_s": 0.5, "peak_mb": 700.0}, "102400": {"start_s": 0.6, "peak_mb": 710.0}}
    return {
        **MACHINE,
        "device": device,
        "corruption": {"batch_size": 128, "image_size": 224, "at_once_ms": 57.0, "ratio": 6.5},
        "step": {"bf16": step | {"end_to_end": {"ours_images_per_s": rate / 2, "ratio": 4.2}}},
        "encoder": {"bf16": {"forward": passes, "forward_backward": passes}},
        "memory": {"ours": {"peak_mb": 1200.0}, "vit_mae": {"peak_mb": 900.0}, "vit_mae_all_tokens": "not measured"},
        "growth": {
            "image_size": {"112": {"images_per_s": 40.0, "peak_mb": 800.0}},
            "processes": {"1": {"images_per_s": 10.0, "peak_mb": 800.0}, "2": "not measured"},
            "rows": rows,
        },
        "runs": {"step": {**MACHINE, "device": device}},
    }


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# ---- the parts run ---------------------------------------------------------------------------------------------


def test_a_smoke_run_and_what_it_keeps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "probe", lambda arguments, name, processes=1, **changes: {"probed": name})
    output = tmp_path / "benchmark_cpu.json"
    output.write_text(json.dumps({"encoder": {"fp32": "earlier"}, "memory": "earlier", "runs": {"memory": "earlier"}}))
    flags = ["--quick", "true", "--output", str(output), "--precision", "fp32"]
    speed.main([*flags, "--only", "corruption", "step", "growth"])
    kept = json.loads(output.read_text())
    assert kept["encoder"] == {"fp32": "earlier"} and kept["memory"] == "earlier"
    assert kept["runs"]["memory"] == "earlier" and kept["runs"]["step"]["quick"]
    assert kept["corruption"]["ratio"] > 0 and kept["corruption"]["batch_size"] == 4
    step = kept["step"]["fp32"]
    assert set(step["phases_ms"]) == {"views", "corruption", "forward", "backward", "optimiser"}
    assert 0 < step["product_share"] < 1
    assert 0 < step["outside_share"] < 1 and step["ours"]["images_per_s"] > 0
    assert step["release"] == "not measured" and step["mfu"] is None
    assert kept["growth"]["image_size"] == {"32": {"probed": "step"}}
    assert set(kept["growth"]["rows"]) == {"64", "128"}
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[:3]] == ["corruption", "step", "growth"]
    assert str(tmp_path) not in output.read_text()  # no path of the machine


def test_encoders_have_equal_tokens_and_are_timed():
    arguments = speed.Arguments(**speed.QUICK, precision=["fp32"], attention="eager")
    measured = speed.measure_encoder(arguments)["fp32"]
    assert measured["tokens"] == 1 + (32 // 16) ** 2
    for passes in ("forward", "forward_backward"):
        assert measured[passes]["ours_images_per_s"] > 0
        assert measured[passes]["ratio_vit_mae"] > 0 and measured[passes]["ratio_timm"] > 0


FAKE_RELEASE = {
    "vision_transformer.py": """
import torch
class Encoder(torch.nn.Linear):
    embed_dim = 3
def vit_tiny(img_size):
    assert img_size == [32]
    return Encoder(3, 3)
class RECHead(torch.nn.Linear):
    def __init__(self, width, in_chans, patch_size):
        super().__init__(width, in_chans)
""",
    "utils.py": """
is_main_process = None
def get_params_groups(model):
    return [{'params': list(model.parameters())}]
""",
    "datasets/datasets_utils.py": """
import torch
def GMML_drop_rand_patches(image, max_replace, drop_type, align):
    assert image.shape == (3, 32, 32)
    return image * 0, torch.ones_like(image)
class DataAugmentationSiT:
    def __init__(self, options):
        self.size = options.img_size
    def __call__(self, picture):
        return [[torch.zeros(3, self.size, self.size)] * 2] * 3
""",
    "main.py": """
import torch, utils
import vision_transformer as vits
from datasets import load_dataset, datasets_utils
from vision_transformer import RECHead
steps = []
class FullpiplineSiT(torch.nn.Sequential):
    pass
def train_one_epoch(model, loader, optimizer, rates, decays, epoch, scaler, options):
    ((crops, _),) = loader
    clean, corrupted, masks = [torch.cat([crop.cuda(non_blocking=True) for crop in two]) for two in crops]
    with torch.cuda.amp.autocast(scaler is not None):
        product = model(corrupted.mean(dim=(2, 3)))
    steps.append((len(clean), product.dtype))
    product.sum().backward()
    optimizer.step()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_beside_a_release(tmp_path, monkeypatch, precision, dtype):
    """The fake checkout gets as many views in the same precision, and leaves no modules imported."""
    (tmp_path / "datasets").mkdir()
    for name, source in FAKE_RELEASE.items():
        (tmp_path / name).write_text(source)
    released = []
    train = baselines.ReleaseStep.train
    monkeypatch.setattr(
        baselines.ReleaseStep,
        "train",
        lambda step, crops: (train(step, crops), released.append(step.release.main.steps)),
    )
    modules, path = set(sys.modules), list(sys.path)
    arguments = speed.Arguments(**speed.QUICK, gmml_release=str(tmp_path), precision=[precision])
    measured = speed.measure_step(dataclasses.replace(arguments, attention="eager"))[precision]
    assert set(released[-1]) == {(4, dtype)}
    is_fair = precision == "fp32" or has_fast_bf16("cpu")  # or else theirs, which does next to nothing, is far ahead
    if is_fair:
        assert measured["ratio"] > 0 and measured["end_to_end"]["ratio"] > 0
    assert measured["release"]["step_ms"] == pytest.approx(
        measured["release"]["corruption_ms"] + measured["release"]["training_ms"], abs=0.1
    )
    assert sys.path == path and not {"main", "utils", "vision_transformer"} & (set(sys.modules) - modules)


@pytest.mark.parametrize("name", ["step", "memory_ours", "memory_vit_mae", "rows"])
def test_probes(name, tmp_path, capsys):
    arguments = speed.prepare(speed.Arguments(**speed.QUICK, quick=True, probe=name, stream=str(tmp_path / "stream")))
    (tmp_path / "stream").mkdir()
    speed.write_shard(arguments, tmp_path / "stream" / "0.parquet")
    speed.PROBES[name](arguments)
    figures = json.loads(capsys.readouterr().out)
    assert figures["peak_mb"] > 1
    assert figures.get("before_mb", 0) <= figures["peak_mb"]
    assert all(value >= 0 for value in figures.values())


@pytest.mark.slow
def test_two_processes_share_a_step():
    arguments = speed.prepare(speed.Arguments(quick=True, precision=["fp32"]))
    assert speed.probe(arguments, "step", processes=2)["images_per_s"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "speed"], "the parts are corruption, step"),
        (["--precision", "fp8"], "fp8"),
        (["--step_batch_size", "5"], "must be even"),
        (["--gmml_release", "no/such/folder", "--quick", "true", "--only", "step"], "no/such/folder.*datasets_utils"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(SpcxrError, match=message):
        speed.main(flags)


@pytest.mark.slow  # importing transformers once more
def test_as_a_command():
    command = [sys.executable, "-m", speed.__name__, "--quick", "true", "--only", "corruption", "--precision", "fp8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=timing.ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --precision")


# ---- what they are made of -------------------------------------------------------------------------------------


def test_ratios_are_medians_of_pairs():
    assert timing.paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0  # of 2, 3 and 1; of the medians 1.33
    assert timing.median_ms([0.3, 0.1, 0.2]) == 200.0
    assert timing.per_second(8, [2.0, 4.0, 6.0]) == 2.0


def test_each_function_is_measured_in_turn():
    calls = []
    seconds = timing.in_turn([lambda: calls.append("a"), lambda: calls.append("b")], repeats=3)
    assert "".join(calls) == "ab" * 4  # the warm-up first
    assert [len(measured) for measured in seconds] == [3, 3]


def test_training_flops_beside_the_counter_of_torch():
    from torch.utils.flop_counter import FlopCounterMode

    config = SpcxrConfig.from_size("tiny", image_size=64, num_hidden_layers=2)
    model = SpcxrForPreTraining(config).train()
    model.set_attn_implementation("eager")
    images = torch.randn(3, 1, 64, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(images, bool_masked_pos=torch.ones(3, 16, dtype=torch.bool)).loss.backward()
    parameters = timing.matrix_parameters(model)
    flops = timing.training_flops(parameters, 17, layers=2, width=192)
    # The formula lets CLS through the patch projection and the head too: one token of 17, of a part of the weights.
    assert flops == pytest.approx(counter.get_total_flops() / 3, rel=0.03)
    assert flops == 6 * parameters * 17 + 12 * 2 * 17**2 * 192


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("Tesla T4", None)],
)
def test_peaks(card, peak):
    assert timing.bf16_peak(card) == peak


def test_peak_memory_sees_what_was_let_go():
    before = timing.peak_memory("cpu")
    block = torch.ones(100_000_000, dtype=torch.uint8)
    block = None
    assert block is None
    assert timing.peak_memory("cpu") >= before
    assert before > 50e6


def test_a_measurement_elsewhere_that_fails_is_named():
    assert timing.measure_elsewhere([sys.executable, "-c", "print('x'); print('{\"a\": 1}')"], 1) == {"a": 1}
    with pytest.raises(SpcxrError, match="status 3: too bad"):
        timing.measure_elsewhere([sys.executable, "-c", "import sys; print('too bad'); sys.exit(3)"], 1)


# ---- the table -------------------------------------------------------------------------------------------------


def test_the_table_in_a_page(tmp_path):
    folder = write(tmp_path, benchmark_cpu=results())
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- performance -->\nold\n<!-- /performance -->\nafter\n")
    speed.main(["--render", str(page), "--results", str(folder)])
    text = page.read_text()
    assert text.startswith("before\n<!-- performance -->\n| |") and text.endswith("\n<!-- /performance -->\nafter\n")
    assert "old" not in text
    assert "57.0 ms for 128 images at 224 px, 6.5 times as fast |" in text
    assert "4.0 images/s, 1.50 times as fast" in text and "2.0 images/s, 4.20 times as fast" in text
    assert "| 2.1 % |" in text and "utilisation" not in text  # which needs a peak
    assert "9.0 images/s, 1.05 / 1.02 times as fast" in text
    assert "1: 10.0 images/s, 0.80 GB; 2: not measured" in text
    assert "1,024: 0.50 s, 700 MB; 102,400: 0.60 s, 710 MB" in text
    speed.main(["--render", str(page), "--results", str(folder)])
    assert page.read_text() == text


def test_the_gpu_column_names_the_card():
    table = timing.performance_table(results(), results("NVIDIA H200", 9000.0, mfu=0.412))
    header, *rows = table.splitlines()
    assert "GPU: NVIDIA H200" in header
    assert any("| not measured | 41.2 % |" in row for row in rows)
    assert all(row.count("|") == 4 for row in rows)


def test_a_device_without_results_has_no_column():
    table = timing.performance_table(results(), {})
    assert {row.count("|") for row in table.splitlines()} == {3} and "GPU" not in table


def test_what_was_not_measured_is_said_once():
    partly = results()
    partly["step"] = {name: {**step, "ratio": "not measured"} for name, step in partly["step"].items()}
    partly["encoder"] = {
        name: {which: {**one, "ratio_timm": "not measured"} for which, one in passes.items()}
        for name, passes in partly["encoder"].items()
    }
    table = timing.performance_table(partly, {})
    assert "4.0 images/s, not measured |" in table
    assert "9.0 images/s, 1.05 / not measured times as fast |" in table


def test_a_smoke_run_is_no_result():
    smoke = results()
    smoke["runs"]["step"]["quick"] = True
    with pytest.raises(SpcxrError, match="smoke run"):
        timing.performance_table(smoke, {})


@pytest.mark.parametrize("text", ["none", "<!-- /performance --><!-- performance -->", "<!-- performance -->" * 2])
def test_a_page_without_the_place_is_left_alone(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SpcxrError, match=r"page\.md: must hold"):
        timing.replace_block(page, "performance", "table")
    assert page.read_text() == text


# ---- scale -----------------------------------------------------------------------------------------------------

RADIOGRAPH = {"radiographs": 50, "mean_bytes": 10_000.0, "decode_ms": 2.0, "parameters": 20_000_000}


def figures(tmp_path, **files):
    return scale.read_figures(write(tmp_path, scale=RADIOGRAPH, **files))


def test_the_page_in_the_tree_follows_from_its_results():
    assert scale.render(scale.read_figures(SCRIPTS / "benchmarks" / "results")) == (
        SCRIPTS / "benchmarks" / "SCALE.md"
    ).read_text(encoding="utf-8")


def test_costs_by_hand(tmp_path):
    measured = figures(tmp_path, benchmark_cpu=results(), benchmark_cuda=results("NVIDIA H200", 10_000.0))
    assert measured.core_rate == 1.0  # 2 images/s from end to end on 2 threads
    assert measured.gpu_rate == 5000.0
    assert scale.core_hours(measured, 3_600_000) == 1000.0
    assert scale.gpu_hours(measured, 18_000_000) == 1.0
    assert scale.shards(measured, 1_000_000) == 40  # 10 GB in shards of 256 MB: 39.06
    assert scale.read_rate(measured, 64) == 8 * 5000 * 10_000
    assert scale.decoding_cores(measured) == 10.0
    assert scale.gradient_rate(measured, 8) == 0  # within a node
    assert scale.gradient_rate(measured, 64) == pytest.approx(2 * 7 / 8 * 80e6 * 5000 / 256)
    page = scale.render(measured)
    assert "| 1,000,000 | 100 | 100,000,000 | 27,778 | 6 | 5.6 | 0.7 | 0.1 |" in page
    assert "keep the images on the GPU" in page and "keep the images in memory" in page


def test_what_breaks_first(tmp_path):
    measured = figures(tmp_path, benchmark_cpu=results(), benchmark_cuda=results("NVIDIA H200", 10_000.0))
    slow = dataclasses.replace(measured, decode_s=0.02)  # 100 cores for one GPU
    ranked = scale.loads(slow, 100_000_000, 1)
    assert next(iter(ranked)) == "images kept on the GPU"
    assert scale.advice(ranked) == "stream; decoding while streaming breaks first"
    assert scale.advice(scale.loads(measured, 100_000_000, 1)) == "stream"


def test_a_gpu_s_rate_follows_from_a_training_at_another_size(tmp_path):
    """Twice the side: the blocks' FLOPs are more than four times as many, as attention grows with the square."""
    training = {"run": "a run", "device": "NVIDIA H200", "images_per_second": 20_000.0}
    training |= {"size": "small", "image_size": 112, "batch_size": 1024}
    write(tmp_path, scale={**RADIOGRAPH, "training": training}, benchmark_cpu=results())
    found = scale.read_figures(tmp_path)
    ratio = scale.flops("small", 112) / scale.flops("small", 224)
    assert 0.23 < ratio < 0.25
    assert found.gpu_rate == pytest.approx(20_000 * ratio) and found.gpu_batch == 1024
    page = scale.render(found)
    assert "computed from its 20,000 at 112 px" in page and "989 TFLOP/s" in page and "not measured" not in page
    training["device"] = "abacus"
    with pytest.raises(SpcxrError, match="peak of abacus is not known"):
        scale.read_figures(write(tmp_path, scale={**RADIOGRAPH, "training": training}))
    with pytest.raises(SpcxrError, match="no training on a GPU"):
        scale.read_figures(write(tmp_path, scale=RADIOGRAPH))


def test_radiographs_are_measured(tmp_path, capsys):
    shard = write_set(tmp_path / "set.parquet", ["train"] * 6)
    page = tmp_path / "page.md"
    write(tmp_path, benchmark_cpu=results(), benchmark_cuda=results("NVIDIA H200", 10_000.0))
    scale.main(["--data", str(shard), "--results", str(tmp_path), "--output", str(page), "--sample", "3"])
    kept = json.loads((tmp_path / "scale.json").read_text())
    sizes = [len(cell["bytes"]) for cell in scale.read_table(shard).column("image")]
    assert kept["mean_bytes"] == round(sum(sizes) / 6, 1) and kept["radiographs"] == 6
    assert kept["decode_ms"] > 0 and kept["parameters"] > 20_000_000
    assert str(tmp_path) not in (tmp_path / "scale.json").read_text() + page.read_text()


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(SpcxrError, match=r"scale\.json: no such results file"):
        scale.read_figures(tmp_path)
    (tmp_path / "scale.json").write_text("[1]")
    with pytest.raises(SpcxrError, match=r"scale\.json: not a results file"):
        scale.read_figures(tmp_path)


# ---- recipes ---------------------------------------------------------------------------------------------------


def test_every_recipe_is_there():
    names = {path.stem for path in RECIPES}
    assert names == {"single_gpu", "eight_gpus", "eight_nodes", "fsdp", "two_machines_cpu"}
    assert set(scale.GPUS.values()) < names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_accelerate_takes_the_recipe(path, monkeypatch):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = load_config_from_file(str(path))
    assert config.num_processes == written["num_processes"]
    flags = ["--config_file", str(path), "--main_process_ip", "node", "training_scripts/pretrain.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    assert arguments.mixed_precision == "bf16"
    # What starts a process per GPU, or per thread: everything but a plain `python`.
    assert arguments.multi_gpu == (config.num_processes > 1)
    assert config.num_processes % config.num_machines == 0


@pytest.mark.parametrize(("gpus", "name"), scale.GPUS.items())
def test_the_recipe_starts_as_many_processes_as_the_page_says(gpus, name):
    assert load_config_from_file(str(SCRIPTS / "recipes" / "accelerate" / f"{name}.yaml")).num_processes == gpus
