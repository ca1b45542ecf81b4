"""The notebooks run from beginning to end, on made images."""

import os
from pathlib import Path

import pytest

from spcxr_hf.hub.install import install_checkpoints
from tests.test_documentation import CARDS, ROOT, write_radiographs

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = {
    "quickstart": "IMAGE, FOLDER = 'chest.dcm', 'scans'",
    "finetune_with_trainer": "DATA, EPOCHS, BATCH_SIZE = 'my_images', 1, 4",
}
SAYS = {
    "quickstart": ["embedding: (1, 384) patches: (1, 49, 384)", "lungs: ", "opacity: ", "study-2.dcm"],
    "finetune_with_trainer": [
        "['normal', 'pneumonia']",
        "trainable params",
        "auroc_ci95 [",
        "balanced_accuracy",
        "pneumonia: ",
    ],
}


def read(path: Path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def text_of(notebook) -> str:
    return "".join(one.get("text", "") for cell in notebook.cells for one in cell.get("outputs", ()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept(path):
    """Outputs of the whole notebook, no warning of one machine, and no more than a page can bear."""
    notebook = read(path)
    assert path.stat().st_size < 300_000
    assert "git clone" in notebook.cells[1].source and "spcxr install" in notebook.cells[1].source
    assert [one for cell in notebook.cells for one in cell.get("outputs", ()) if one.get("name") == "stderr"] == []
    assert all(words in text_of(notebook) for words in SAYS[path.stem] if not words.endswith(".dcm"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    write_radiographs(tmp_path)
    install_checkpoints(CARDS, cache_dir=tmp_path / "home" / "hub")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    for name in ("HF_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    notebook = read(path)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = PARAMETERS[path.stem]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = text_of(notebook)
    assert [words for words in SAYS[path.stem] if words not in printed] == []
    if path.stem == "finetune_with_trainer":
        assert (tmp_path / "runs" / "merged" / "model.safetensors").is_file()
