"""Puts the checkpoints that lie in the tree into the local cache of the Hub, so that their ids load with no network.

install_checkpoints -> _read_checkpoint  checks a folder and hashes its files
                    -> _install          copies them into the cache, then points `main` at them

What is written is the cache's own layout, so that every library of the Hub finds it, in offline mode or not:

    models--spcxr--base/
        blobs/<sha256 of a file>          the content, a copy: it outlives the tree it came from
        snapshots/<revision>/<file>       a link to it (the file itself, where links cannot be made)
        refs/main                         the revision that `from_pretrained("spcxr/base")` loads
        .no_exist/<revision>/<file>       empty: says that the checkpoint has no such file

The revision is a hash of all names and contents. So the same checkpoint is the same revision on every machine, and
installing it again changes nothing; another content is another revision, and `main` moves on to it. The one before
stays and can be pinned (`from_pretrained("spcxr/base", revision="<its 40 digits>")`) until `hf cache prune` removes it.
And a revision that is not the hash of its content was downloaded, not installed here: `main` is not taken from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from .errors import SpcxrError

BUNDLED = Path(__file__).resolve().parent.parent / "model_cards"
WEIGHTS = "model.safetensors"
REQUIRED = ("config.json", WEIGHTS)
# Formats that are pickles, or may hold one: loading them can run code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# Optional files. Where the cache says that they do not exist, nobody spends a minute on a Hub that cannot be reached.
OPTIONAL = ("adapter_config.json", "processor_config.json")


class Installed(NamedTuple):
    """A checkpoint in the local cache: its id, revision (40 hex digits) and folder, and whether `main` moved to it."""

    repo_id: str
    revision: str
    path: Path
    is_new: bool


@dataclass(frozen=True)
class _Checkpoint:
    """A folder that may be installed: `hashes` has the sha256 of each file by its path in the folder."""

    repo_id: str
    folder: Path
    hashes: dict[str, str]

    @property
    def revision(self) -> str:
        return _revision(self.hashes)


def bundled_checkpoints() -> Path:
    """The folder `model_cards/` of the source tree that this package was installed from.

    Raises:
        SpcxrError: the package stands alone, as it does where it was installed from a wheel.
    """
    if not BUNDLED.is_dir():
        raise SpcxrError(
            "no checkpoints lie beside the installed package. They are in the folder model_cards of its source tree: "
            "clone that and install from it (pip install -e .), or name the folder with --checkpoints FOLDER"
        )
    return BUNDLED


def install_checkpoints(
    folder: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    namespace: str = "spcxr",
    force: bool = False,
) -> list[Installed]:
    """Put every checkpoint of a folder into the local Hub cache, where `from_pretrained("spcxr/<name>")` finds it.

    In offline mode (`HF_HUB_OFFLINE=1`), with `local_files_only=True`, and without a connection. As long as the id is
    not on the Hub and the Hub is there to say so, models load without any of these, but image processors do not.

    All checkpoints are checked before the first is copied; the folder is not needed afterwards.

    Args:
        folder: holds one folder per checkpoint, each with `config.json` and `model.safetensors`; hidden files are left
            out. By default the source tree's `model_cards`.
        cache_dir: the cache; by default the Hub's own, which follows `HF_HOME` and `HF_HUB_CACHE`.
        namespace: what stands before the `/` of the ids.
        force: point `main` at the checkpoint even where it stands at a revision that was downloaded from the Hub.

    Returns:
        One entry per checkpoint, by name.

    Raises:
        SpcxrError: the folder has no checkpoints; one of them lacks a file, is damaged, holds a pickle, or has a name
            that is no Hub id; the cache has that id from the Hub; or it cannot be written.
    """
    folder = bundled_checkpoints() if folder is None else Path(folder)
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    checkpoints = [_read_checkpoint(path, namespace) for path in _checkpoint_folders(folder)]
    try:
        if not force:
            for checkpoint in checkpoints:
                _refuse_downloaded(checkpoint, _repository(cache, checkpoint.repo_id))
        return [_install(checkpoint, _repository(cache, checkpoint.repo_id)) for checkpoint in checkpoints]
    except OSError as error:
        cause = f"{error.strerror or type(error).__name__}: {error.filename}"
        raise SpcxrError(
            f"the checkpoints cannot be put into the Hub cache ({cause}); HF_HOME moves the cache elsewhere"
        ) from error


# ---- the folder of a checkpoint ----------------------------------------------------------------------------------


def _checkpoint_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SpcxrError(f"{folder}: no such folder")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path))
    if (folder / "config.json").is_file():
        raise SpcxrError(f"{folder}: a checkpoint itself; give the folder that it lies in")
    if not folders:
        raise SpcxrError(f"{folder}: holds no checkpoints; each is a folder with {' and '.join(REQUIRED)}")
    return folders


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__pycache__"


def _read_checkpoint(folder: Path, namespace: str) -> _Checkpoint:
    """Check the folder and hash what is in it."""
    try:
        validate_repo_id(f"{namespace}/{folder.name}")
    except HFValidationError as error:
        raise SpcxrError(f"{folder}: its name makes no Hub id: {error}") from error
    try:
        names = _file_names(folder)
        _check_files(folder, names)
        hashes = {name: _sha256(folder / name) for name in names}
    except OSError as error:
        raise SpcxrError(f"{error.filename}: {error.strerror or type(error).__name__}") from error
    return _Checkpoint(f"{namespace}/{folder.name}", folder, hashes)


def _file_names(folder: Path) -> list[str]:
    """Every file that is not hidden, by its path in the folder, `/` between the parts."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.as_posix() for path in paths if not any(_is_hidden(Path(part)) for part in path.parts)]


def _check_files(folder: Path, names: list[str]) -> None:
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        raise SpcxrError(f"{folder}: only safetensors are installed, and {', '.join(pickles)} can be a pickle")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise SpcxrError(f"{folder}: no checkpoint, {' and '.join(missing)} missing")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpcxrError(f"{folder / 'config.json'}: not valid JSON ({error})") from error
    try:
        with safe_open(folder / WEIGHTS, framework="numpy"):  # reads the header and compares the file's size with it
            pass
    except SafetensorError as error:
        raise SpcxrError(f"{folder / WEIGHTS}: damaged, cut short or no safetensors file ({error})") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _revision(hashes: dict[str, str]) -> str:
    """The name of this content: 40 hex digits, as a commit's has, which is what the cache asks for."""
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(listing.encode()).hexdigest()[:40]


# ---- the cache ---------------------------------------------------------------------------------------------------


def _repository(cache: Path, repo_id: str) -> Path:
    return cache / repo_folder_name(repo_id=repo_id, repo_type="model")


def _main(repository: Path) -> str | None:
    """The revision that `main` stands at, if there is one."""
    path = repository / "refs" / "main"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _refuse_downloaded(checkpoint: _Checkpoint, repository: Path) -> None:
    """Refuse where `main` stands at a revision that is not the hash of its content."""
    main = _main(repository)
    if main is None or main == checkpoint.revision:
        return
    snapshot = repository / "snapshots" / main
    if main != _revision({name: _sha256(snapshot / name) for name in _file_names(snapshot)}):
        raise SpcxrError(
            f"the Hub cache has {checkpoint.repo_id} from the Hub already, at revision {main}; it stays as it is. "
            "To load the bundled one under this id instead: spcxr install --force (files are added, none is removed)"
        )


def _install(checkpoint: _Checkpoint, repository: Path) -> Installed:
    """Copy what is missing. `main` moves last, so a reader never meets a revision that is not whole."""
    snapshot = repository / "snapshots" / checkpoint.revision
    for name, digest in checkpoint.hashes.items():
        _add_file(checkpoint.folder / name, repository / "blobs" / digest, snapshot / name)
    for name in set(OPTIONAL) - checkpoint.hashes.keys():
        absent = repository / ".no_exist" / checkpoint.revision / name
        absent.parent.mkdir(parents=True, exist_ok=True)
        if not absent.exists():
            absent.touch()
    is_new = _main(repository) != checkpoint.revision
    if is_new:
        (repository / "refs").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=repository) as aside:
            main = Path(aside) / "main"
            main.write_text(checkpoint.revision, encoding="utf-8")
            main.replace(repository / "refs" / "main")
    return Installed(checkpoint.repo_id, checkpoint.revision, snapshot, is_new)


def _add_file(source: Path, blob: Path, pointer: Path) -> None:
    """Copy `source` to `blob` and link `pointer` to it, unless a file of that size is there already.

    Both are made under another name first: an interruption, or a second process, leaves no half file.
    """
    size = source.stat().st_size
    if _has_size(pointer, size):
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    pointer.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=blob.parent.parent) as aside:
        copy, link = Path(aside) / "copy", Path(aside) / "link"
        if not _has_size(blob, size):
            shutil.copyfile(source, copy)
            copy.replace(blob)
        try:
            link.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # Windows, without the right to make links: the cache then keeps the file itself there
            blob.replace(pointer)
        else:
            link.replace(pointer)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


__all__ = ["Installed", "bundled_checkpoints", "install_checkpoints"]
