"""The folder of a checkpoint: its files, checked before it is installed or published, and the code that goes with them.

The code that loads the weights without the package is kept once, in `modeling/`. `read_checkpoint` adds it to the files
of a folder; `python -m spcxr_hf.hub.folder [FOLDER]` (`make cards`) writes it beside the weights of every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_file, sha256
from spcxr_hf.modeling import configuration_spcxr
from spcxr_hf.modeling.modeling_spcxr import check_weight_files

BUNDLED = Path(__file__).resolve().parents[2] / "model_cards"
CODE = {
    name: Path(configuration_spcxr.__file__).with_name(name)
    for name in ("configuration_spcxr.py", "handler.py", "image_processing_spcxr.py", "modeling_spcxr.py")
}
REQUIRED = ("config.json", "model.safetensors")
# Formats that are or may contain pickles or other code, which runs when they are loaded.
PICKLES = (
    *(".bin", ".pt", ".pt2", ".pte", ".pth", ".ptl", ".ckpt", ".distcp", ".mar", ".nemo", ".tar", ".zip", ".pkl"),
    *(".pickle", ".dill", ".joblib", ".skops", ".npy", ".npz", ".h5", ".hdf5", ".keras", ".pb", ".msgpack", ".pyc"),
)
# How the binary files begin that a checkpoint may hold besides safetensors: PNG, JPEG, WebP, PDF, Parquet.
BINARY_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"%PDF", b"PAR1")
# The header of a ViT-L with a head has 60,000 bytes; a reader allocates what a header claims.
LARGEST_HEADER = 10_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder.

    Attributes:
        repo_id: The Hub id.
        folder: The folder.
        files: Each file by its path in the repository: those of the folder, and the installed package's code.
        hashes: The SHA-256 (64 hex digits) of each.
    """

    repo_id: str
    folder: Path
    files: dict[str, Path]
    hashes: dict[str, str]

    @property
    def revision(self) -> str:
        """The name of this content; see `content_revision`."""
        return content_revision(self.hashes)


def read_checkpoint(folder: Path, namespace: str) -> Checkpoint:
    """Check a folder, add the code, and hash all files; those whose name begins with a dot are left out.

    Args:
        folder: Its name is the last part of the id.
        namespace: User or organisation, the part of the id before the `/`.

    Raises:
        SpcxrError: the name makes no Hub id, a file is missing, damaged, a link, or may hold a pickle.
    """
    try:
        validate_repo_id(f"{namespace}/{folder.name}")
    except HFValidationError as error:
        raise SpcxrError(f"{folder}: its name makes no Hub id: {error}") from error
    try:
        names = file_names(folder)
        check_files(folder, names)
        files = {name: folder / name for name in names} | CODE
        hashes = {name: sha256(path) for name, path in files.items()}
    except OSError as error:
        raise SpcxrError(f"{error.filename}: {error.strerror or type(error).__name__}") from error
    return Checkpoint(f"{namespace}/{folder.name}", folder, files, hashes)


def content_revision(hashes: dict[str, str]) -> str:
    """The name of a folder's content: 40 hex digits, as a commit's has, which is what the Hub's cache asks for."""
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(listing.encode()).hexdigest()[:40]


def write_code(folder: Path) -> None:
    """Write the installed package's code beside the weights, for `trust_remote_code=True` and Inference Endpoints."""
    for name, source in CODE.items():
        with atomic_file(folder / name) as partial:
            partial.write_bytes(source.read_bytes())


def given_or_bundled(folder: str | os.PathLike | None) -> Path:
    """`folder`, or `model_cards/` of the source tree that this package was installed from."""
    if folder is not None:
        return Path(folder)
    if not BUNDLED.is_dir():
        raise SpcxrError(
            "no checkpoints lie beside the installed package. They are in the folder model_cards of its source tree: "
            "clone that and install from it (pip install -e .), or name the folder with --checkpoints FOLDER"
        )
    return BUNDLED


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders in `folder`, by name, hidden ones left out."""
    if not folder.is_dir():
        raise SpcxrError(f"{folder}: no such folder")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    if (folder / "config.json").is_file():
        raise SpcxrError(f"{folder}: a checkpoint itself; give its parent folder")
    if not folders:
        raise SpcxrError(f"{folder}: holds no checkpoints; each is a folder with {' and '.join(REQUIRED)}")
    return folders


def is_hidden(name: str) -> bool:
    """Whether a path in a checkpoint's folder is left out: a part of it begins with a dot, or is `__pycache__`."""
    return any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def file_names(folder: Path) -> list[str]:
    """Every file that is not hidden, by its path in the folder, `/` between the parts."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if not is_hidden(name)]


# ---- checks ------------------------------------------------------------------------------------------------------


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder that is no checkpoint, or not a safe one.

    Raises:
        SpcxrError: a link (it may lead out of the folder), a file that may hold a pickle, weights that would be read
            from elsewhere, `config.json` or the weights missing or damaged; the message names the file.
    """
    links = [path for path in [folder, *folder.rglob("*")] if path.is_symlink()]
    if links:
        raise SpcxrError(f"{links[0]}: a symbolic link; a checkpoint's files lie in its own folder")
    if pickles := [name for name in names if may_be_pickle(folder / name)]:
        raise SpcxrError(
            f"{folder}: {', '.join(pickles)} can be a pickle; a checkpoint holds safetensors, text (UTF-8) and pictures"
        )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise SpcxrError(f"{folder}: no checkpoint, {' and '.join(missing)} missing")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpcxrError(f"{folder / 'config.json'}: not valid JSON ({error})") from error
    try:
        check_weight_files(folder)
    except ValueError as error:
        raise SpcxrError(str(error)) from error
    for name in names:
        if name.endswith(".safetensors"):
            check_safetensors(folder / name)


def may_be_pickle(path: Path) -> bool:
    """Whether loading a file can run code, by its name or its content.

    Binary files have to be safetensors, ONNX, or one of `BINARY_STARTS`. Text is a pickle where all of it is one
    (protocol 0 is text) and it names something to call.
    """
    if path.name.lower().endswith(PICKLES):
        return True
    if path.suffix in (".safetensors", ".onnx"):
        return False
    with path.open("rb") as file:
        start = file.read(4096)
        if start.startswith(BINARY_STARTS):
            return False
        try:
            is_text = "\0" not in start.decode("utf-8") and not start.startswith(b"PK\x03\x04")  # a ZIP archive
        except UnicodeDecodeError as error:
            is_text = error.reason == "unexpected end of data"  # a letter of several bytes that was cut in two
        if not is_text:
            return True
        file.seek(0)
        try:
            operations = {operation.name for operation, _, _ in pickletools.genops(file)}  # parsed, never run
        except Exception:  # it raises many types on what is no pickle
            return False
    return bool(operations & {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})


def check_safetensors(path: Path) -> None:
    """Refuse a safetensors file whose header is oversized, malformed, or does not fit the file."""
    words = f"{path}: damaged, cut short or no safetensors file"
    size = header_size(path)
    if size > LARGEST_HEADER:
        raise SpcxrError(f"{words} (a header of {size} bytes; at most {LARGEST_HEADER} are read)")
    try:
        with safe_open(path, framework="numpy"):  # reads the header and compares it with the file's size
            pass
    except SafetensorError as error:
        raise SpcxrError(f"{words} ({error})") from error


def header_size(path: Path) -> int:
    """How many bytes a safetensors file says that its header has: its first 8 bytes, little-endian."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the code beside the weights of every checkpoint in a folder, by default `model_cards/`."""
    given = sys.argv[1:] if argv is None else argv
    for folder in checkpoint_folders(given_or_bundled(given[0] if given else None)):
        write_code(folder)
        print(f"{folder}: {', '.join(CODE)}")


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
