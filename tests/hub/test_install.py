"""The bundled checkpoints in the local Hub cache: its real layout, and ids that load with no network."""

import bz2
import gzip
import io
import json
import lzma
import marshal
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, scan_cache_dir, try_to_load_from_cache
from safetensors.numpy import save_file

from spcxr_hf import (
    SpcxrConfig,
    SpcxrError,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
)
from spcxr_hf.hub import folder, install
from spcxr_hf.hub.folder import CODE, write_code
from spcxr_hf.hub.install import install_checkpoints

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "segmentation_hidden_size": 32,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_stand_ins(folder: Path) -> Path:
    """The two checkpoints of the demo, tiny and untrained."""
    torch.manual_seed(0)
    labels = {"id2label": {0: "background", 1: "lung"}, "label2id": {"background": 0, "lung": 1}}
    SpcxrForPreTraining(SpcxrConfig(**TINY)).save_pretrained(folder / "base")
    SpcxrForSemanticSegmentation(SpcxrConfig(**TINY, **labels)).save_pretrained(folder / "lung-segmentation")
    for name in ("base", "lung-segmentation"):
        SpcxrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / name)
    return folder


def make_checkpoint(folder: Path, value: float = 0.0) -> Path:
    """What the cache takes for a checkpoint; no model is in it."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "spcxr"}')
    (folder / "pictures" / "masks.png").write_bytes(b"a picture")
    (folder / ".DS_Store").write_bytes(b"hidden")
    save_file({"weight": np.full(8, value, dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def cards(tmp_path) -> Path:
    make_checkpoint(tmp_path / "model_cards" / "base")
    return tmp_path / "model_cards"


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def listing(folder: Path) -> dict[str, int]:
    """Every path below and when it was changed last."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# What is written


def test_the_cache_has_its_real_layout(cards, cache):
    (one,) = install_checkpoints(cards, cache)
    repository = cache / "models--spcxr--base"
    assert (one.repo_id, one.is_new) == ("spcxr/base", True)
    assert one.path == repository / "snapshots" / one.revision
    assert (repository / "refs" / "main").read_bytes() == one.revision.encode()
    assert len(one.revision) == 40
    assert int(one.revision, 16)
    assert {path.name for path in repository.iterdir()} == {".no_exist", "blobs", "refs", "snapshots"}
    files = {path.relative_to(one.path).as_posix() for path in one.path.rglob("*") if path.is_file()}
    assert files == {"config.json", "model.safetensors", "pictures/masks.png"} | CODE.keys()
    for name in files:
        assert (one.path / name).read_bytes() == CODE.get(name, cards / "base" / name).read_bytes()
        link = (one.path / name).readlink()
        assert not link.is_absolute()
        assert len(link.name) == 64


def test_the_hub_library_reads_it(cards, cache):
    (one,) = install_checkpoints(cards, cache)
    scan = scan_cache_dir(cache)
    assert scan.warnings == []
    (repository,) = scan.repos
    (revision,) = repository.revisions
    assert (repository.repo_id, revision.commit_hash, set(revision.refs)) == ("spcxr/base", one.revision, {"main"})
    found = hf_hub_download("spcxr/base", "pictures/masks.png", cache_dir=cache, local_files_only=True)
    assert Path(found).read_bytes() == b"a picture"


@pytest.mark.parametrize("name", install.OPTIONAL)
def test_what_a_checkpoint_lacks_is_known_to_be_missing(cards, cache, name):
    (one,) = install_checkpoints(cards, cache)
    assert try_to_load_from_cache("spcxr/base", name, cache) is _CACHED_NO_EXIST
    (cards / "base" / name).write_text("{}")
    if name == "adapter_config.json":
        with pytest.raises(SpcxrError, match="adapters of another model"):
            install_checkpoints(cards, cache)
        return
    (two,) = install_checkpoints(cards, cache)
    assert try_to_load_from_cache("spcxr/base", name, cache) == str(two.path / name)
    assert try_to_load_from_cache("spcxr/base", name, cache, revision=one.revision) is _CACHED_NO_EXIST


def test_the_default_is_the_hubs_own_cache(cards, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert install_checkpoints(cards)[0].path.is_relative_to(cache)


def test_the_copy_outlives_the_tree(cards, cache):
    (one,) = install_checkpoints(cards, cache)
    shutil.rmtree(cards)
    assert json.loads((one.path / "config.json").read_text()) == {"model_type": "spcxr"}


def test_installing_twice_changes_nothing(cards, cache):
    (first,) = install_checkpoints(cards, cache)
    before = listing(cache)
    (second,) = install_checkpoints(cards, cache)
    assert second == first._replace(is_new=False)
    assert listing(cache) == before


def test_the_revision_follows_from_the_content_alone(cards, tmp_path):
    make_checkpoint(tmp_path / "elsewhere" / "base")
    (here,), (there,) = (
        install_checkpoints(cards, tmp_path / "a"),
        install_checkpoints(tmp_path / "elsewhere", tmp_path / "b"),
    )
    assert here.revision == there.revision


def test_code_in_the_folder_changes_nothing(cards, cache):
    """None, that of `make cards`, or an older one that was left there: what is installed is the package's."""
    (one,) = install_checkpoints(cards, cache)
    assert not list(cards.rglob("*.py"))
    write_code(cards / "base")
    assert install_checkpoints(cards, cache) == [one._replace(is_new=False)]
    (cards / "base" / "modeling_spcxr.py").write_text("old = True")
    assert install_checkpoints(cards, cache) == [one._replace(is_new=False)]


def test_new_content_is_a_new_revision_and_the_old_one_stays(cards, cache):
    (old,) = install_checkpoints(cards, cache)
    make_checkpoint(cards / "base", value=1.0)
    (new,) = install_checkpoints(cards, cache)
    assert new.is_new
    assert new.revision != old.revision
    assert (cache / "models--spcxr--base" / "refs" / "main").read_text() == new.revision
    latest, pinned = (
        hf_hub_download("spcxr/base", "model.safetensors", cache_dir=cache, local_files_only=True, revision=revision)
        for revision in (None, old.revision)
    )
    assert Path(latest).parent == new.path
    assert Path(pinned).parent == old.path
    assert Path(latest).read_bytes() != Path(pinned).read_bytes()


@pytest.mark.parametrize("lost", ["snapshots", "blobs"])
def test_what_is_lost_is_put_back(cards, cache, lost):
    (one,) = install_checkpoints(cards, cache)
    shutil.rmtree(cache / "models--spcxr--base" / lost)
    install_checkpoints(cards, cache)
    assert (one.path / "model.safetensors").read_bytes() == (cards / "base" / "model.safetensors").read_bytes()


def test_a_file_cut_short_in_the_cache_is_replaced(cards, cache):
    (one,) = install_checkpoints(cards, cache)
    (one.path / "model.safetensors").resolve().write_bytes(b"half")
    install_checkpoints(cards, cache)
    assert (one.path / "model.safetensors").read_bytes() == (cards / "base" / "model.safetensors").read_bytes()


def test_without_links_the_snapshot_has_the_files(cards, cache, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1314, "a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (one,) = install_checkpoints(cards, cache)
    assert not (one.path / "config.json").is_symlink()
    assert hf_hub_download("spcxr/base", "config.json", cache_dir=cache, local_files_only=True)
    assert scan_cache_dir(cache).warnings == []
    before = listing(cache)
    install_checkpoints(cards, cache)
    assert listing(cache) == before


# What came from the Hub


@pytest.fixture
def downloaded(cache) -> Path:
    """`spcxr/base` in the cache as a download leaves it."""
    repository = cache / "models--spcxr--base"
    make_checkpoint(repository / "snapshots" / COMMIT, value=9.0)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def test_a_downloaded_repository_is_left_alone(cards, cache, downloaded):
    make_checkpoint(cards / "another")
    before = listing(cache)
    with pytest.raises(SpcxrError, match=rf"spcxr/base from the Hub already, at revision {COMMIT}.*--force"):
        install_checkpoints(cards, cache)
    assert listing(cache) == before


def test_force_moves_main_and_removes_nothing(cards, cache, downloaded):
    (one,) = install_checkpoints(cards, cache, force=True)
    assert (downloaded / "refs" / "main").read_text() == one.revision
    assert (downloaded / "snapshots" / COMMIT / "model.safetensors").is_file()


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", None, "no checkpoint, config.json missing"),
        ("model.safetensors", None, "no checkpoint, model.safetensors missing"),
        ("config.json", b"{'model_type'", "config.json: not valid JSON"),
        ("config.json", b'{"transformers_weights": "../base/model.safetensors"}', "outside the checkpoint folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x.bin"}}', r"names 'x\.bin'; only safetensors"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "model.safetensors: damaged"),
        ("model.safetensors", b"", "model.safetensors: damaged"),
        ("pytorch_model.bin", b"pickle", r"pytorch_model\.bin can be a pickle; a checkpoint holds safetensors"),
        ("extra/optimizer.PT", b"pickle", r"extra/optimizer\.PT can be a pickle"),
        ("weights.dat", b"\x80\x04\x95renamed", r"weights\.dat can be a pickle"),
        ("weights.dat", b"PK\x03\x04renamed", r"weights\.dat can be a pickle"),
        ("model.safetensors", (10**8).to_bytes(8, "little") + b"{}", r"a header of 100000000 bytes; at most 10000000"),
        ("more.safetensors", (2).to_bytes(8, "little") + b"[]", r"more\.safetensors: damaged"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(cards, cache, name, content, complaint):
    bad = make_checkpoint(cards / "worse")
    if content is None:
        (bad / name).unlink()
    else:
        (bad / name).parent.mkdir(exist_ok=True)
        (bad / name).write_bytes(content)
    with pytest.raises(SpcxrError, match=rf"worse.*{complaint}"):
        install_checkpoints(cards, cache)
    assert not cache.exists()  # the good one beside it neither


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "results"])
def test_links_are_refused(cards, cache, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    link = cards / "base" / name
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "outside" / ("" if name == "results" else "config.json"))
    with pytest.raises(SpcxrError, match=rf"{name}: a symbolic link"):
        install_checkpoints(cards, cache)
    assert not cache.exists()


@pytest.mark.parametrize("suffix", folder.PICKLES)
def test_formats_that_can_hold_a_pickle_are_refused(tmp_path, suffix):
    (tmp_path / f"part-00001{suffix.upper()}").write_text("nothing much")
    assert folder.may_be_pickle(tmp_path / f"part-00001{suffix.upper()}")


class Call:
    """A pickle of it names a function, which whoever loads it calls."""

    def __reduce__(self):
        return os.getcwd, ()


def packed(content: bytes, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=stream, mode="w") as archive:
            entry = tarfile.TarInfo("data.pkl")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    else:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("data.pkl", content)
    return stream.getvalue()


def as_numpy(value) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([value], dtype=object), allow_pickle=True)
    return stream.getvalue()


HIDDEN = {
    **{f"protocol {number}": pickle.dumps(Call(), protocol=number) for number in range(pickle.HIGHEST_PROTOCOL + 1)},
    **{kind: packed(pickle.dumps(Call()), kind) for kind in ("tar", "zip")},
    **{module.__name__: module.compress(pickle.dumps(Call(), protocol=0)) for module in (bz2, gzip, lzma, zlib)},
    "numpy": as_numpy(Call()),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "Python's own": marshal.dumps(compile("1", "x", "eval")),
}


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("name", ["notes.txt", "weights", "config.json"])
def test_a_pickle_is_seen_whatever_its_name(tmp_path, kind, name):
    (tmp_path / name).write_bytes(HIDDEN[kind])
    assert folder.may_be_pickle(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"", b".", b"cos\nand sin\n", b"# card\n", b'{"a": 1}', "Gerät, 20 °C".encode() * 400, b"N.", b"(lp0\n."],
)
def test_text_is_no_pickle(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    assert not folder.may_be_pickle(tmp_path / "notes")


def test_weights_cut_short_are_refused(cards, cache):
    weights = cards / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(SpcxrError, match=r"model\.safetensors: damaged, cut short"):
        install_checkpoints(cards, cache)


def test_a_name_that_is_no_id_is_refused(cards, cache):
    make_checkpoint(cards / "lung segmentation")
    with pytest.raises(SpcxrError, match="lung segmentation: its name makes no Hub id"):
        install_checkpoints(cards, cache)


def test_a_folder_without_checkpoints_is_refused(cards, cache, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, complaint in (
        (tmp_path / "empty", "holds no checkpoints"),
        (tmp_path / "missing", "no such folder"),
        (cards / "base", "a checkpoint itself; give its parent folder"),
    ):
        with pytest.raises(SpcxrError, match=complaint):
            install_checkpoints(place, cache)


def test_without_the_source_tree_the_error_says_what_to_do(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "BUNDLED", tmp_path / "site-packages" / "model_cards")
    with pytest.raises(SpcxrError, match="clone that and install from it.*--checkpoints FOLDER"):
        install_checkpoints(cache_dir=cache)


def test_a_cache_that_cannot_be_written(cards, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SpcxrError, match="cannot be put into the Hub cache.*HF_HOME moves the cache"):
        install_checkpoints(cards, tmp_path / "file")


# That very line

LINE = """
import spcxr_hf
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("spcxr/base")
processor = AutoImageProcessor.from_pretrained("spcxr/base")
print(type(model).__module__, type(model).__name__, type(processor).__name__, float(model.layernorm.weight.sum()))
"""


def run_that_line(folder: Path, home: Path) -> str:
    """Install, take the folder away, and load by id in a fresh process, offline; returns what it prints."""
    install_checkpoints(folder, home / "hub")
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", LINE],
        env={**ours, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_auto_model_loads_the_id_offline_in_a_fresh_process(tmp_path):
    cards = make_stand_ins(tmp_path / "model_cards")
    moved = shutil.move(cards, tmp_path / "moved")
    printed = run_that_line(Path(moved), tmp_path)
    assert printed == "spcxr_hf.modeling.modeling_spcxr SpcxrModel SpcxrImageProcessor 48.0"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "model_cards" / "base").is_dir(), reason="the tree has no trained checkpoint yet")
def test_auto_model_loads_the_bundled_base_offline_in_a_fresh_process(tmp_path):
    assert run_that_line(ROOT / "model_cards", tmp_path).startswith("spcxr_hf.modeling.modeling_spcxr SpcxrModel")
