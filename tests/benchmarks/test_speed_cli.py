"""The benchmark of the command line: what it measures, what it keeps, and its table."""

import pytest

from spcxr_hf import SpcxrError
from spcxr_hf.files import read_json
from training_scripts.benchmarks import speed_cli

SMALL = ["--size", "tiny", "--image_size", "32", "--batch_size", "8", "--rounds", "1", "--device", "cpu"]


@pytest.mark.slow
def test_what_is_left_out_keeps_its_figures(tmp_path, capsys):
    output, page = tmp_path / "cli.json", tmp_path / "page.md"
    words = [*SMALL, "--output", str(output)]
    first = speed_cli.main([*words, "--images", "16", "--memory_images", "0"])
    assert set(first) == {"throughput", "start_up"}
    assert first["throughput"]["images"] == 16
    rates = first["throughput"]["images_per_second"]
    assert first["throughput"]["flow_to_bare"] == pytest.approx(rates["flow"] / rates["bare"], rel=0.01, abs=0.001)
    assert 0 < first["start_up"]["help_seconds"] < 5  # it does not import torch; a busy machine is slow
    second = speed_cli.main([*words, "--images", "0", "--memory_images", "40"])
    memory = second["memory"]
    assert set(second) == {"memory"}
    assert (memory["tenth"]["images"], memory["all"]["images"]) == (4, 40)
    assert memory["tenth"]["peak_mib"] <= memory["all"]["peak_mib"]
    assert read_json(output) == first | second

    page.write_text("before\n<!-- cli -->\n<!-- /cli -->\n")
    speed_cli.main(["--output", str(output), "--render", str(page)])
    assert f"| {rates['flow']} images/s beside {rates['bare']}: " in page.read_text()
    assert f"MiB after 4 files, {memory['all']['peak_mib']:.0f} after 40 |" in page.read_text()


def test_nothing_measured_is_said():
    assert speed_cli.table_of({}) == "Not measured."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "rounds and batch_size must be at least 1"),
        (["--memory_images", "5"], "memory_images at least 20 or 0"),
        (["--images", "4"], "images must be a batch at least, or 0"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(SpcxrError, match=message):
        speed_cli.main([*SMALL, *flags])
