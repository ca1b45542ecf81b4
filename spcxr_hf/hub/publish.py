"""Publishes the checkpoints of a folder, each as a repository on the Hub.

publish -> check_publishable, check_outputs  every folder, before anything is sent
        -> _compare                          with the repository's files: what would change
        -> _send                             creates the repository where there is none; one commit; then a tag

Nothing is sent before every folder has passed. A commit is one request, so a repository is at its old or its new
commit whatever fails; running the same command again sends only what is missing.

* The repository becomes what the folder is, and the installed package's code: files that the folder has no longer are
  deleted (and stay in its history), `.gitattributes` and other hidden ones left alone. A repository of another model
  type is refused.
* The tag is `v<version of this package>`. Where that one points to another commit, the next is `v<version>-2`, and so
  on: tags are never moved. A given tag that points elsewhere is refused before anything is sent.
* With another namespace the card's `spcxr/<name>` become `<namespace>/<name>`, in front matter and text, for every
  checkpoint that is published by the same command; those left out keep their ids.
* A repository that exists keeps its visibility; `private` refuses one that is public.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.files import sha256
from spcxr_hf.hub.expected_outputs import check_outputs
from spcxr_hf.hub.folder import (
    CODE,
    Checkpoint,
    checkpoint_folders,
    given_or_bundled,
    header_size,
    is_hidden,
    read_checkpoint,
)
from spcxr_hf.modeling.configuration_spcxr import SpcxrConfig

NAMESPACE = "spcxr"
CARD = "README.md"
# What the client raises: huggingface_hub 1.x uses httpx, 2.x httpx2, so the base class is looked up, not imported.
HUB_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError, ValueError, RuntimeError)
REASONS = {
    401: "the token is missing, wrong or expired: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not do this, or a quota is used up",
    409: "something of this name is there already, or another change is under way: run the same command again",
    412: "the repository has changed meanwhile: run the same command again",
    413: "it is too large, or a quota is used up",
    429: "too many requests: wait, then run the same command again",
}


@dataclass(frozen=True)
class Publication:
    """Changes of a repository by publishing a checkpoint.

    Attributes:
        repo_id: The repository.
        is_new: Whether the repository is created.
        added: Files that it did not have; `updated`: had with another content; `deleted`: has no longer.
        unchanged: Files that are not sent.
        size: Bytes in the files that are added and updated.
        tag: The name of the version; None where the commit carries one already.
        commit: The commit that `main` points to afterwards, 40 hex digits; None where nothing was sent (a dry run).
    """

    repo_id: str
    is_new: bool
    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    size: int = 0
    tag: str | None = None
    commit: str | None = None

    @property
    def changed(self) -> tuple[str, ...]:
        """The files that a commit would touch."""
        return (*self.added, *self.updated, *self.deleted)

    def describe(self) -> str:
        """What changes, a line per file."""
        marks = (("+", self.added), ("~", self.updated), ("-", self.deleted))
        files = [f"  {mark} {name}" for mark, names in marks for name in names]
        what = "new repository" if self.is_new else "changed" if files else "nothing to send"
        counted = f"{len(self.unchanged)} files unchanged, {self.size / 1e6:.1f} MB to send"
        ends = [f"tag {self.tag}"] if self.tag else []
        ends += [f"commit {self.commit}"] if self.commit else []
        return "\n".join([f"{self.repo_id}: {what}; " + ", ".join([counted, *ends]), *files])


def publish(
    folder: str | PathLike | None = None,
    namespace: str = NAMESPACE,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    tag: str | None = None,
    only: Sequence[str] | None = None,
) -> list[Publication]:
    """Create or update a Hub repository for every checkpoint in a folder; see the module's text for the rules.

    Args:
        folder: Holds one folder per checkpoint; by default the source tree's `model_cards`.
        namespace: The user or organisation that the repositories belong to.
        private: Create repositories that only the namespace's members see.
        dry_run: Check everything and say what would change; send nothing but the card's text for validation.
        token: By default the one of `hf auth login` or `HF_TOKEN`, which keeps it out of command lines and logs.
        tag: The name of this version; by default `v<version of this package>`.
        only: The names of the checkpoints to publish; by default all.

    Returns:
        One entry per checkpoint, by name.

    Raises:
        SpcxrError: a folder does not pass a check, a tag is taken, or the Hub refuses or cannot be reached.
    """
    token = token or get_token()
    if token is None and not dry_run:
        raise SpcxrError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
    folders = checkpoint_folders(given_or_bundled(folder))
    if unknown := set(only or ()) - {path.name for path in folders}:
        raise SpcxrError(f"no checkpoint {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in folders)}")
    folders = [path for path in folders if not only or path.name in only]
    names = [path.name for path in folders]
    api = HfApi(token=token or False, library_name="spcxr-hf")
    with tempfile.TemporaryDirectory() as cards:
        checkpoints, plans, published = [], [], []
        for path in folders:
            checkpoint = read_checkpoint(path, namespace)
            check_publishable(checkpoint, token)
            check_outputs(path)
            if namespace != NAMESPACE:
                card = Path(cards) / path.name
                card.write_text(in_namespace((path / CARD).read_text("utf-8"), namespace, names), encoding="utf-8")
                files, hashes = checkpoint.files | {CARD: card}, checkpoint.hashes | {CARD: sha256(card)}
                checkpoint = replace(checkpoint, files=files, hashes=hashes)
            checkpoints.append(checkpoint)
        for checkpoint in checkpoints:
            with hub_errors(checkpoint.repo_id, token, "Every folder passed the checks here; nothing was sent"):
                _validate_card(api, checkpoint)
                plans.append(_compare(api, checkpoint, tag, private))
        if dry_run:
            return [plan for plan, _ in plans]
        for checkpoint, (plan, head) in zip(checkpoints, plans, strict=True):
            with hub_errors(plan.repo_id, token):
                published.append(_send(api, checkpoint, plan, head, tag, private))
    return published


def in_namespace(card: str, namespace: str, names: Sequence[str]) -> str:
    """A card with `spcxr/<name>` as `<namespace>/<name>` for these names, where it is an id and not part of a path."""
    ids = "|".join(re.escape(name) for name in names)
    begins = r"(?:(?<![\w./-])|(?<=huggingface\.co/)|(?<=hf\.co/))"
    return re.sub(rf"{begins}{NAMESPACE}/({ids})(?![\w-])", rf"{namespace}/\1", card)


# ---- the repository ------------------------------------------------------------------------------------------------


def _validate_card(api: HfApi, checkpoint: Checkpoint) -> None:
    """Let the Hub read the front matter, as it does again at the commit, before a repository is made for it.

    `ModelCard.validate` would do, but in huggingface_hub 1.x it asks huggingface.co whatever `HF_ENDPOINT` says.
    """
    body = {"repoType": "model", "content": checkpoint.files[CARD].read_text("utf-8")}
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=body)
    if response.status_code == 400:
        said = "; ".join(str(error.get("message")) for error in response.json().get("errors", []))
        raise SpcxrError(f"{checkpoint.folder / CARD}: the Hub refuses its front matter ({one_line(said)})")
    hf_raise_for_status(response)


def _compare(api: HfApi, checkpoint: Checkpoint, tag: str | None, private: bool) -> tuple[Publication, str | None]:
    """What would change, and the commit that this was compared with; None where there is no repository."""
    repo_id, files = checkpoint.repo_id, checkpoint.files
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        size = sum(path.stat().st_size for path in files.values())
        return Publication(repo_id, True, added=tuple(sorted(files)), size=size, tag=tag or _default_tag()), None
    if private and info.private is False:
        raise SpcxrError(f"{repo_id}: public on the Hub, and --private was asked for; change that there first")
    model_type = (info.config or {}).get("model_type", SpcxrConfig.model_type)
    if model_type != SpcxrConfig.model_type:
        raise SpcxrError(f"{repo_id}: holds a model of type {model_type!r} on the Hub; it stays as it is")
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    same = {name for name in files.keys() & there.keys() if _is_same(checkpoint, name, there[name])}
    plan = Publication(
        repo_id,
        False,
        added=tuple(sorted(files.keys() - there.keys())),
        updated=tuple(sorted((files.keys() & there.keys()) - same)),
        deleted=tuple(sorted(name for name in there.keys() - files.keys() if not is_hidden(name))),
        unchanged=tuple(sorted(same)),
        size=sum(path.stat().st_size for name, path in files.items() if name not in same),
    )
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    return replace(plan, tag=_free_tag(repo_id, tag, tags, None if plan.changed else info.sha)), info.sha


def _is_same(checkpoint: Checkpoint, name: str, remote: RepoFile) -> bool:
    """Whether the Hub has this very file: large ones are known by SHA-256, small ones by git's id."""
    if remote.lfs is not None:
        return remote.lfs.sha256 == checkpoint.hashes[name]
    content = checkpoint.files[name].read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _default_tag() -> str:
    try:
        return f"v{version('spcxr-hf')}"
    except PackageNotFoundError:
        raise SpcxrError("the package is not installed, so it has no version: name the tag with --tag") from None


def _free_tag(repo_id: str, tag: str | None, tags: dict[str, str], head: str | None) -> str | None:
    """The tag to set, or None where `head` carries one already; `head` is None where a commit is about to follow."""
    if tag is not None:
        if tag in tags and tags[tag] != head:
            raise SpcxrError(f"{repo_id}: the tag {tag} points to another commit, {tags[tag]}; tags are never moved")
        return None if tag in tags else tag
    first = _default_tag()
    number, name = 1, first
    while name in tags:
        if tags[name] == head:
            return None
        number += 1
        name = f"{first}-{number}"
    return name


def _send(
    api: HfApi, checkpoint: Checkpoint, plan: Publication, head: str | None, tag: str | None, private: bool
) -> Publication:
    """Create the repository if there is none, commit what differs, set the tag."""
    is_new = plan.is_new
    if is_new:
        api.create_repo(plan.repo_id, private=private, exist_ok=True)
        plan, head = _compare(api, checkpoint, tag, private)  # with what the Hub has put into it
    commit = head
    if plan.changed:
        operations: list[Any] = [
            *(CommitOperationAdd(name, str(checkpoint.files[name])) for name in (*plan.added, *plan.updated)),
            *(CommitOperationDelete(name, is_folder=False) for name in plan.deleted),
        ]
        # With the parent named, a concurrent change is refused, not overwritten.
        commit = api.create_commit(
            plan.repo_id, operations, commit_message=f"Publish {tag or plan.tag}", parent_commit=head
        ).oid
    if plan.tag:
        api.create_tag(plan.repo_id, tag=plan.tag, revision=commit)
    return replace(plan, is_new=is_new, commit=commit)


# ---- errors ---------------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(
    repo_id: str, token: str | None, state: str = "The repository is unchanged or complete; run the same command again"
) -> Iterator[None]:
    """Raise errors of the Hub or the connection as one line without the token, with the state of the repository.

    Raises:
        SpcxrError: for whatever the client raises.
    """
    try:
        yield
    except HUB_ERRORS as error:
        if isinstance(error, SpcxrError):
            raise
        words = without_token(f"{repo_id}: {_reason(error)}", token)
        # `from None`: a traceback would show the client's own words, the token among them if the Hub repeats it.
        raise SpcxrError(f"{words}. {state}") from None


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None or getattr(cause, "response", None) is None:
        return f"the Hub cannot be reached, or refuses: {type(error).__name__}: {one_line(str(error))}"
    status = cause.response.status_code
    said = one_line(cause.server_message or "")
    reason = REASONS.get(status, "the Hub is in trouble" if status >= 500 else "the Hub refuses")
    return f"{reason} ({status}{': ' if said else ''}{said})"


def without_token(words: str, token: str | None) -> str:
    """The text with this token, and anything that looks like one, removed."""
    if token:
        words = words.replace(token, "<token>")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "<token>", words)


# ---- checks ---------------------------------------------------------------------------------------------------------

# Token formats of common services, and long values whose name says that they are secret.
SECRETS = {
    "a Hugging Face token": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "an AWS key": rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret": rb"(?i)aws_?secret_?(access_?)?key\\?['\"]?\s*[=:]\s*\\?['\"]?[A-Za-z0-9/+]{40}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bAGE-SECRET-KEY-1|\bPuTTY-User-Key-File",
    "a GitHub token": rb"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22})",
    "a GitLab token": rb"\bgl(pat|dt|rt|cbt|ptt|soat)-[\w-]{20}",
    "a Google key": rb"\bAIza[0-9A-Za-z_-]{35}|\bya29\.[\w-]{20}|\bGOCSPX-[\w-]{20}",
    "an Azure key": rb"(?i)\b(AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40}|[?&]sig=[\w%]{40}",
    "a Slack token": rb"\bxox[abeprs]-[0-9A-Za-z-]{10}|\bxapp-\d-[\w-]{10}|hooks\.slack\.com/services/\w",
    "a secret key": rb"\bsk-[A-Za-z0-9_-]{32}|\b[prs]k_(live|test)_[A-Za-z0-9]{16}",
    "a token of a package registry": rb"\bnpm_[A-Za-z0-9]{36}|\bpypi-[A-Za-z0-9_-]{16}|\bdckr_pat_[\w-]{20}",
    "a token of a cloud": rb"\b(dapi[0-9a-f]{32}|dop_v1_[0-9a-f]{32}|r8_\w{30}|nvapi-[\w-]{30}|gsk_\w{30}|hvs\.\w{20})",
    "a JSON web token": rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password in an address": rb"://[^\s/:@'\"<>{}$]+:[^\s/:@'\"<>{}$]{3,}@[\w.-]",
    "an authorisation header": rb"(?i)\bauthorization\\?['\"]?\s*[=:]\s*\\?['\"]?(bearer|basic|token)\s+[\w.+/=-]{12}",
    "a secret by its name": (
        rb"(?i)(api_?key|access_?key|auth_?token|access_?token|client_?secret|(?<![a-z])passw(or)?d|(?<![a-z])secret|"
        rb"(?<![a-z_])token|wandb_?key)\\?['\"]?\s*[=:]\s*\\?['\"]?(?=[\w+/.-]*\d)(?=[\w+/.-]*[A-Za-z])[\w+/.-]{20,}"
    ),
    "a login of .netrc": rb"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S",
}
# Folders at a machine's root, not within an address (https://host/home) or a longer path; drives; file addresses.
PLACES = re.compile(
    rb"(?<![\w.:/~>-])/(home|root|Users|work|workspace|mnt|media|tmp|var|opt|srv|scratch|data|content|private|etc)/[\w.-]"
    rb"|\b[A-Z]:\\{1,2}[A-Za-z_]\w+\\"
    rb"|\bfile://"
)


def check_publishable(checkpoint: Checkpoint, token: str | None = None) -> None:
    """Refuse a checkpoint with secrets, machine paths or an invalid card.

    Args:
        token: The token in use, which is looked for too.

    Raises:
        SpcxrError: a file holds a secret or an absolute path; the folder has other code than the installed package;
            `auto_map` names code that is not there; the card is missing or its front matter not valid. A secret is not
            repeated.
    """
    folder = checkpoint.folder
    for name, path in checkpoint.files.items():
        for line, words in find_unwanted(path, token):
            raise SpcxrError(f"{folder / name}, line {line}: holds {words}; nothing was sent")
    for name, source in CODE.items():
        if (folder / name).is_file() and (folder / name).read_bytes() != source.read_bytes():
            raise SpcxrError(f"{folder / name}: not the installed package's, which is sent; delete it or `make cards`")
    for config in ("config.json", "preprocessor_config.json"):
        if config not in checkpoint.files:
            raise SpcxrError(f"{folder / config}: missing")
        classes = json.loads((folder / config).read_text(encoding="utf-8")).get("auto_map") or {}
        if not classes:
            raise SpcxrError(f"{folder / config}: no auto_map, so it does not load without the package")
        for reference in _leaves(classes):
            if not re.fullmatch(r"\w+\.\w+", reference) or f"{reference.split('.')[0]}.py" not in checkpoint.files:
                raise SpcxrError(f"{folder / config}: auto_map names {reference!r}, which is not in the folder")
    if CARD not in checkpoint.files:
        raise SpcxrError(f"{folder / CARD}: missing; a repository has a card")
    check_card(folder / CARD)


def find_unwanted(path: Path, token: str | None = None) -> Iterator[tuple[int, str]]:
    """The line and the kind of each secret in a file, and of each absolute path where it is text."""
    with path.open("rb") as file:  # of weights the header alone: the rest is numbers
        content = file.read(8 + header_size(path))[8:] if path.suffix == ".safetensors" else file.read()
    for words, pattern in SECRETS.items():
        for match in re.finditer(pattern, content):
            yield content.count(b"\n", 0, match.start()) + 1, words
    if token and (place := content.find(token.encode())) >= 0:
        yield content.count(b"\n", 0, place) + 1, "the token that is in use"
    if b"\0" not in content:
        for match in PLACES.finditer(content):
            yield content.count(b"\n", 0, match.start()) + 1, "an absolute path"


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    elif value is not None:
        yield str(value)


def check_card(path: Path) -> None:
    """Refuse a card whose front matter the Hub would reject, as far as can be checked offline.

    Raises:
        SpcxrError: the front matter cannot be read or lacks what a model's card has; or the text does not say that the
            model is not for clinical use.
    """
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise SpcxrError(f"{path}: front matter not valid ({' '.join(str(error).split())})") from error
    data = card.data.to_dict()
    needed = ["license", "library_name", "pipeline_tag"]
    if data.get("license") == "other":
        needed += ["license_name", "license_link"]
    wrong = [f"no {name}" for name in needed if not isinstance(data.get(name), str)]
    if not all(isinstance(tag, str) for tag in data.get("tags") or []):
        wrong.append("tags are words")
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            validate_repo_id(base)
        except HFValidationError:
            wrong.append(f"base_model {base!r} is no id")
    if wrong:
        raise SpcxrError(f"{path}: front matter not valid ({'; '.join(wrong)})")
    if "not for clinical use" not in " ".join(card.text.lower().split()):
        raise SpcxrError(f"{path}: does not say that the model is not for clinical use")
