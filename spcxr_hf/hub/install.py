"""Installs the checkpoints of the source tree into the local Hub cache, so that their ids load without network.

The layout is the cache's own, so that every library of the Hub finds it, in offline mode or not:

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

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_file, sha256
from spcxr_hf.hub.folder import (
    Checkpoint,
    checkpoint_folders,
    content_revision,
    file_names,
    given_or_bundled,
    read_checkpoint,
)

# Optional files. Marked as absent in the cache, since looking for them on an unreachable Hub takes a minute.
OPTIONAL = ("adapter_config.json", "processor_config.json")


class Installed(NamedTuple):
    """A checkpoint in the local cache: its id, revision (40 hex digits) and folder, and whether `main` moved to it."""

    repo_id: str
    revision: str
    path: Path
    is_new: bool


def install_checkpoints(
    folder: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    namespace: str = "spcxr",
    force: bool = False,
) -> list[Installed]:
    """Put every checkpoint of a folder into the local Hub cache, where `from_pretrained("spcxr/<name>")` finds it.

    In offline mode (`HF_HUB_OFFLINE=1`), with `local_files_only=True`, and without a connection. All checkpoints are
    checked before the first is copied; the folder is not needed afterwards. The code beside the weights is the
    installed package's, whether or not the folder has a copy of it.

    Args:
        folder: Holds one folder per checkpoint, each with `config.json` and `model.safetensors`; hidden files are left
            out. By default the source tree's `model_cards`.
        cache_dir: The cache; by default the Hub's own, which follows `HF_HOME` and `HF_HUB_CACHE`.
        namespace: User or organisation, the part of the ids before the `/`.
        force: Point `main` at the checkpoint even where it points to a revision that was downloaded from the Hub.

    Raises:
        SpcxrError: the folder has no checkpoints; one of them lacks a file, is damaged, holds a pickle, or has a name
            that is no Hub id; the cache has that id from the Hub; or it cannot be written.
    """
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    checkpoints = [
        (checkpoint, cache / repo_folder_name(repo_id=checkpoint.repo_id, repo_type="model"))
        for checkpoint in (read_checkpoint(path, namespace) for path in checkpoint_folders(given_or_bundled(folder)))
    ]
    for checkpoint, repository in checkpoints:
        main = _main(repository)
        if not force and main is not None and main != checkpoint.revision:
            snapshot = repository / "snapshots" / main
            if main != content_revision({name: sha256(snapshot / name) for name in file_names(snapshot)}):
                raise SpcxrError(
                    f"the Hub cache has {checkpoint.repo_id} from the Hub already, at revision {main}; it stays as it "
                    "is. To load the bundled one under this id instead: spcxr install --force (files are added, none "
                    "is removed)"
                )
    try:
        return [_install(checkpoint, repository) for checkpoint, repository in checkpoints]
    except (OSError, SpcxrError) as error:
        raise SpcxrError(
            f"the checkpoints cannot be put into the Hub cache ({error}); HF_HOME moves the cache elsewhere"
        ) from error


def _main(repository: Path) -> str | None:
    """The revision that `main` points to, if there is one."""
    path = repository / "refs" / "main"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _install(checkpoint: Checkpoint, repository: Path) -> Installed:
    """Copy what is missing. `main` moves last, so a reader never meets a revision that is not whole."""
    snapshot = repository / "snapshots" / checkpoint.revision
    for name, digest in checkpoint.hashes.items():
        _add_file(checkpoint.files[name], repository / "blobs" / digest, snapshot / name)
    for name in set(OPTIONAL) - checkpoint.hashes.keys():
        absent = repository / ".no_exist" / checkpoint.revision / name
        absent.parent.mkdir(parents=True, exist_ok=True)
        if not absent.exists():
            absent.touch()
    is_new = _main(repository) != checkpoint.revision
    if is_new:
        with atomic_file(repository / "refs" / "main") as partial:
            partial.write_text(checkpoint.revision, encoding="utf-8")
    return Installed(checkpoint.repo_id, checkpoint.revision, snapshot, is_new)


def _add_file(source: Path, blob: Path, pointer: Path) -> None:
    """Copy `source` to `blob` and link `pointer` to it, unless a file of that size is there already."""

    def is_there(path: Path) -> bool:
        return path.is_file() and path.stat().st_size == source.stat().st_size

    if is_there(pointer):
        return
    if not is_there(blob):
        with atomic_file(blob) as partial:
            shutil.copyfile(source, partial)
    with atomic_file(pointer) as partial:
        try:
            partial.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # Windows, without the right to make links: the cache then keeps the file itself there
            blob.replace(partial)
