"""What must not reach the Hub: secrets, places of a machine, code that was not tested, a card that cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .checkpoint_folder import file_names, header_size
from .errors import SpcxrError
from .modeling import configuration_spcxr

CODE = Path(configuration_spcxr.__file__).parent
CARD = "README.md"

SECRETS = {
    "a Hugging Face token": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "an AWS key": rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret": rb"(?i)aws_?secret_?(access_?)?key['\"]?\s*[=:]\s*['\"]?[A-Za-z0-9/+]{40}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a GitHub token": rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22})",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"\bxox[abprs]-[0-9A-Za-z-]{10}",
    "a secret key": rb"\bsk-[A-Za-z0-9_-]{32}",
}
# Folders at a machine's root, not within an address (https://host/home) or a longer path; drives; file addresses.
PLACES = re.compile(
    rb"(?<![\w.:/~>-])/(home|root|Users|work|workspace|mnt|media|tmp|var|opt|srv|scratch|data|content|private|etc)/[\w.-]"
    rb"|\b[A-Z]:\\{1,2}[A-Za-z_]\w+\\"
    rb"|\bfile://"
)


def check_publishable(folder: Path, token: str | None = None) -> None:
    """Refuse a checkpoint's folder that should not be shown to others.

    Args:
        token: The token in use, which is looked for too.

    Raises:
        SpcxrError: a file holds a secret or an absolute path; its code is not the installed package's; `auto_map`
            leads out of the folder; the card is missing or its front matter not valid. A secret is not repeated.
    """
    names = file_names(folder)
    for name in names:
        for line, words in find_unwanted(folder / name, token):
            raise SpcxrError(f"{folder / name}, line {line}: holds {words}; nothing was sent")
    check_code(folder, names)
    if CARD not in names:
        raise SpcxrError(f"{folder / CARD}: missing; a repository has a card")
    check_card(folder / CARD)


def find_unwanted(path: Path, token: str | None = None) -> Iterator[tuple[int, str]]:
    """The line and the kind of each secret in a file, and of each absolute path where it is text."""
    content = _searched_part(path)
    for words, pattern in SECRETS.items():
        for match in re.finditer(pattern, content):
            yield content.count(b"\n", 0, match.start()) + 1, words
    if token and (place := content.find(token.encode())) >= 0:
        yield content.count(b"\n", 0, place) + 1, "the token that is in use"
    if b"\0" not in content:
        for match in PLACES.finditer(content):
            yield content.count(b"\n", 0, match.start()) + 1, "an absolute path"


def _searched_part(path: Path) -> bytes:
    """Of weights the header: the rest is numbers."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(8 + header_size(path))[8:]


def check_code(folder: Path, names: list[str]) -> None:
    """Refuse code for `trust_remote_code` that is not what the installed package runs, or that is not all there.

    Raises:
        SpcxrError: it is so; the message names the file.
    """
    for source in sorted(CODE.glob("*_spcxr.py")):
        if source.name not in names or (folder / source.name).read_bytes() != source.read_bytes():
            raise SpcxrError(
                f"{folder / source.name}: missing or not the installed package's; renew it with "
                f"training_scripts/prepare_checkpoint.py --name {folder.name} --card_only true"
            )
    for config in ("config.json", "preprocessor_config.json"):
        if config not in names:
            raise SpcxrError(f"{folder / config}: missing")
        classes = json.loads((folder / config).read_text(encoding="utf-8")).get("auto_map") or {}
        if not classes:
            raise SpcxrError(f"{folder / config}: no auto_map, so it does not load without the package")
        for reference in _leaves(classes):
            if not re.fullmatch(r"\w+\.\w+", reference) or f"{reference.split('.')[0]}.py" not in names:
                raise SpcxrError(f"{folder / config}: auto_map names {reference!r}, which is not in the folder")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif value is not None:
        yield str(value)


def check_card(path: Path) -> None:
    """Refuse a card whose front matter the Hub would not take, as far as that can be told without it.

    Raises:
        SpcxrError: the front matter cannot be read or lacks what a model's card has; or the text does not say that the
            model is not for clinical use.
    """
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise SpcxrError(f"{path}: front matter not valid ({' '.join(str(error).split())})") from error
    data = card.data.to_dict()
    if wrong := list(_complaints(data)):
        raise SpcxrError(f"{path}: front matter not valid ({'; '.join(wrong)})")
    if "not for clinical use" not in " ".join(card.text.lower().split()):
        raise SpcxrError(f"{path}: does not say that the model is not for clinical use")


def _complaints(data: dict[str, Any]) -> Iterator[str]:
    needed = ["license", "library_name", "pipeline_tag"]
    if data.get("license") == "other":
        needed += ["license_name", "license_link"]
    for name in needed:
        if not isinstance(data.get(name), str):
            yield f"no {name}"
    if not all(isinstance(tag, str) for tag in data.get("tags") or []):
        yield "tags are words"
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            validate_repo_id(base)
        except HFValidationError:
            yield f"base_model {base!r} is no id"
