"""Nothing of a DICOM header reaches what the command line and the training scripts write, print or log."""

import logging
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open

from spcxr_hf import SpcxrForImageClassification, SpcxrForPreTraining, SpcxrForSemanticSegmentation, cli
from tests.common import SIDE
from tests.inference.test_pipeline import save_model
from tests.made_up import picture
from training_scripts import finetune_classification

pytest.importorskip("pydicom")
from tests.images.test_dicom import MARKS, dataset, raw, seeded, seeded_files

PATIENTS = 10


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Marked files: some that are read, and all ways to fail."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(PATIENTS):
        grey = picture(number, 48)[0]
        made = seeded(dataset(grey.copy(), 8, WindowCenter=128, WindowWidth=256))
        (folder / f"{number}.dcm").write_bytes(raw(made))
    for name, data in seeded_files().items():
        (folder / f"{name.replace(' ', '-')}.dcm").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    names = {0: "background", 1: "lung"}
    return {
        "classifier": save_model(SpcxrForImageClassification, tmp_path_factory.mktemp("classifier")),
        "segmenter": save_model(SpcxrForSemanticSegmentation, tmp_path_factory.mktemp("segmenter"), id2label=names),
        "encoder": save_model(SpcxrForPreTraining, tmp_path_factory.mktemp("encoder")),
    }


def text_of(path: Path) -> str:
    """All that a file holds: its bytes, and what lies compressed in it."""
    content = path.read_bytes()
    if path.suffix == ".png":  # compressed pixels may hold six equal bytes by chance
        content = re.sub(rb"IDAT.*IEND", b"", content, flags=re.DOTALL)
    said = content.decode("latin-1")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        said += repr(table.to_pylist()) + repr(table.schema.metadata)
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            said += repr(file.metadata())
    if path.suffix == ".png":
        with Image.open(path) as image:
            said += repr(image.info)
    return said


def marks_in(text: str) -> list[str]:
    """Those that stand there; 777777 is no part of 0.2777777778."""
    return [mark for mark in MARKS if re.search(rf"(?<![\d.]){re.escape(mark)}(?!\d)|{mark.encode().hex()}", text)]


def test_the_search_finds_what_is_compressed(tmp_path):
    pq.write_table(pa.table({"patient": [MARKS[0]] * 3}), tmp_path / "a.parquet", compression="zstd")
    assert marks_in(text_of(tmp_path / "a.parquet")) == [MARKS[0]]


COMMANDS = {
    "predict": ("classifier", ["--output", "records.csv"]),
    "embed": ("encoder", ["--output", "vectors.parquet"]),
    "segment": ("segmenter", ["--masks", "masks", "--output", "areas.jsonl"]),
    "explain": ("classifier", ["--pictures", "maps", "--lungs", "none", "--output", "shares.jsonl"]),
    "reconstruct": ("encoder", ["--pictures", "reconstructions", "--output", "errors.parquet"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, scans, models, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    model, options = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", ["spcxr", command, str(scans), "--model", str(models[model]), *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3  # some files are broken, and were told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= (1 if command in ("predict", "embed") else 1 + PATIENTS)
    said = "\n".join([*capfd.readouterr(), caplog.text, *map(text_of, written), *map(str, written)])
    assert "frames.dcm" in said
    assert marks_in(said) == []


def test_training(scans, models, tmp_path, monkeypatch, capfd, caplog):
    """A classifier learns from marked files, the broken ones being skipped and listed."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    lines = [f"{scans / f'{row}.dcm'},p{row},{'ab'[row % 2]},{split}" for row, split in enumerate(splits)]
    broken = ["frames", "cut", "wrong-PhotometricInterpretation"]
    lines += [f"{scans / name}.dcm,q{row},{'ab'[row % 2]},train" for row, name in enumerate(broken)]
    (tmp_path / "set.csv").write_text("path,patient,label,split\n" + "\n".join(lines) + "\n")
    folders = ["--output", str(tmp_path / "run"), "--cache_folder", str(tmp_path / "cache")]
    words = ["--data", str(tmp_path / "set.csv"), "--image_root", str(scans)]
    words += ["--init_from", str(models["encoder"]), *folders]
    words += ["--label_column", "label", "--split_column", "split", "--on_error", "skip", "--allow_leaks", "all"]
    words += ["--image_size", str(SIDE), "--stored_size", "40", "--steps", "2", "--batch_size", "4"]
    finetune_classification.main(words)
    written = [path for path in (*(tmp_path / "run").rglob("*"), *(tmp_path / "cache").rglob("*")) if path.is_file()]
    skipped = (tmp_path / "run" / "skipped.csv").read_text()
    assert all(f"{name}.dcm" in skipped for name in broken)
    assert any(path.suffix == ".safetensors" for path in written)
    said = "\n".join([*capfd.readouterr(), caplog.text, *map(text_of, written), *map(str, written)])
    assert marks_in(said) == []
