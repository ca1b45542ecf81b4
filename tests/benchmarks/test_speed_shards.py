"""The measurement of shard readers on a small shard."""

import json

import pytest

from training_scripts.benchmarks import speed_shards


def test_three_readers(tmp_path):
    pytest.importorskip("webdataset")
    speed_shards.main(["--samples", "300", "--side", "16", "--output", str(tmp_path / "shards.json")])
    found = json.loads((tmp_path / "shards.json").read_text())
    assert "no header at byte" in found["tarfile"]["damaged"]
    assert found["webdataset"]["damaged"] == "150 samples, and no error"  # half of the shard is lost silently
    assert all(found[name]["samples_per_processor_second"] > 0 for name in ("tarfile", "webdataset", "parquet"))
