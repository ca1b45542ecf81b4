"""Publishing against a Hub that speaks the real protocol: what is sent, what is refused, and every request cut."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from spcxr_hf import (
    SpcxrConfig,
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrImageProcessor,
)
from spcxr_hf.cli import app
from spcxr_hf.hub import publish as flow
from spcxr_hf.hub.expected_outputs import check_outputs, record_outputs
from spcxr_hf.hub.folder import CODE
from spcxr_hf.hub.publish import SECRETS, find_unwanted, in_namespace, publish
from tests.common import TINY
from tests.hub_server import Fault, HubServer

pytestmark = pytest.mark.slow  # many starts of a second each

ROOT = Path(__file__).resolve().parents[2]
CARD = """---
library_name: transformers
pipeline_tag: {task}
license: apache-2.0
{more}tags:
- chest-x-ray
---

# spcxr/{name}

Not for clinical use. `AutoModel.from_pretrained("spcxr/{name}")`, made like [spcxr/base](https://huggingface.co/spcxr/base).
"""


def make_cards(folder: Path) -> Path:
    """Two tiny checkpoints as `prepare_checkpoint.py` leaves them: `base` and a classifier that names it."""
    torch.manual_seed(0)
    for name, model_class, task, more in (
        ("base", SpcxrForPreTraining, "image-feature-extraction", ""),
        ("findings", SpcxrForImageClassification, "image-classification", "base_model: spcxr/base\n"),
    ):
        model_class(SpcxrConfig(**TINY)).save_pretrained(folder / name)
        SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)
        (folder / name / "README.md").write_text(CARD.format(name=name, task=task, more=more))
        (folder / name / "results").mkdir()
        (folder / name / "results" / "probe.json").write_text('{"auroc": 0.75}')
        record_outputs(folder / name)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_cards(tmp_path_factory.mktemp("made") / "cards")


@pytest.fixture
def cards(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cards"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client talks to, with no token lying about, no Xet and no waiting between tries."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the suite's own way is offline
        yield server


@pytest.fixture
def token(hub) -> str:
    return hub.add_token("me", namespaces=("spcxr",))


@pytest.fixture
def unchecked(monkeypatch):
    """Without the outputs' check, where it is not what the test is about."""
    monkeypatch.setattr(flow, "check_outputs", lambda folder: 0.0)


def change(folder: Path) -> None:
    """Other weights, and what they give."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.25 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    record_outputs(folder)


# ---- what is sent --------------------------------------------------------------------------------------------------


def test_a_first_publish_makes_every_repository(hub, token, cards):
    base, findings = publish(cards, token=token)
    assert (base.repo_id, findings.repo_id, base.is_new) == ("spcxr/base", "spcxr/findings", True)
    for name in ("base", "findings"):
        repository = hub.repositories[f"spcxr/{name}"]
        assert not repository.private
        assert len(repository.commits) == 2  # the Hub's own first one, and ours
        there = [path for path in (cards / name).rglob("*") if path.is_file()]
        files = {path.relative_to(cards / name).as_posix(): path for path in there} | CODE
        assert repository.head.files.keys() == files.keys() | {".gitattributes"}
        for path, file in files.items():
            blob = repository.head.files[path]
            assert (hub.objects[blob.sha256] if blob.sha256 else blob.content) == file.read_bytes()
        assert repository.tags == {flow._default_tag(): repository.head.sha}
    assert base.commit == hub.repositories["spcxr/base"].head.sha
    assert findings.size == sum(path.stat().st_size for path in files.values())


def test_the_same_again_sends_nothing(hub, token, cards, unchecked):
    publish(cards, token=token)
    hub.forget_requests()
    again = publish(cards, token=token)
    assert [one.changed for one in again] == [(), ()]
    assert [one.tag for one in again] == [None, None]
    assert [line for line in hub.requests if not line.startswith("GET") and "validate" not in line] == []


def test_only_what_changed_is_sent(hub, token, cards, unchecked):
    publish(cards, token=token, only=["base"])
    (cards / "base" / "results" / "probe.json").unlink()
    (cards / "base" / "results" / "leaks.json").write_text("{}")
    (cards / "base" / "README.md").write_text((cards / "base" / "README.md").read_text() + "More.\n")
    hub.forget_requests()
    (one,) = publish(cards, token=token, only=["base"])
    assert (one.added, one.updated) == (("results/leaks.json",), ("README.md",))
    assert one.deleted == ("results/probe.json",)
    assert "model.safetensors" in one.unchanged
    assert hub.uploaded < 20_000
    assert not any(line.startswith("PUT") for line in hub.requests)
    assert "results/probe.json" not in hub.repositories["spcxr/base"].head.files
    assert ".gitattributes" in hub.repositories["spcxr/base"].head.files


def test_weights_alone_are_one_commit(hub, token, cards):
    publish(cards, token=token, only=["base"])
    change(cards / "base")
    (one,) = publish(cards, token=token, only=["base"])
    assert set(one.updated) == {"model.safetensors", "expected_outputs.json"}
    assert len(hub.repositories["spcxr/base"].commits) == 3


def test_long_trees_and_uploads_in_parts(hub, token, cards, unchecked):
    hub.page, hub.part = 3, 20_000
    publish(cards, token=token, only=["base"])
    assert sum("/parts/" in line for line in hub.requests) > 1
    (again,) = publish(cards, token=token, only=["base"])
    assert again.changed == ()


def test_dry_run_sends_nothing(hub, token, cards, unchecked):
    (plan, other) = publish(cards, token=token, dry_run=True)
    assert plan.is_new and other.is_new
    assert "model.safetensors" in plan.added
    assert "+ model.safetensors" in plan.describe()
    assert hub.repositories == {}
    publish(cards, token=token)
    (cards / "base" / "README.md").write_text((cards / "base" / "README.md").read_text() + "More.\n")
    plan, other = publish(cards, token=token, dry_run=True)
    assert (plan.updated, other.changed) == (("README.md",), ())
    assert len(hub.repositories["spcxr/base"].commits) == 2
    assert plan.tag == f"{flow._default_tag()}-2"


def test_private_and_another_namespace(hub, token, cards, unchecked):
    publish(cards, namespace="me", private=True, token=token)
    repository = hub.repositories["me/findings"]
    assert repository.private
    card = repository.head.files["README.md"].content.decode()
    assert "spcxr/" not in card
    assert "base_model: me/base" in card and "https://huggingface.co/me/base" in card and "# me/findings" in card
    assert "spcxr/base" in (cards / "findings" / "README.md").read_text()
    assert publish(cards, namespace="me", token=token)[1].changed == ()


def test_ids_that_are_not_published_keep_their_namespace():
    card = (
        "base_model: spcxr/base, `spcxr/findings`, model_cards/base, a/spcxr/base, spcxr/base-large, hf.co/spcxr/base."
    )
    assert in_namespace(card, "me", ["base"]) == (
        "base_model: me/base, `spcxr/findings`, model_cards/base, a/spcxr/base, spcxr/base-large, hf.co/me/base."
    )


# ---- tags ----------------------------------------------------------------------------------------------------------


def test_a_tag_never_moves(hub, token, cards, unchecked):
    version = flow._default_tag()
    (first,) = publish(cards, token=token, only=["base"])
    change(cards / "base")
    (second,) = publish(cards, token=token, only=["base"])
    (named,) = publish(cards, token=token, only=["base"], tag="paper")
    tags = hub.repositories["spcxr/base"].tags
    assert tags == {version: first.commit, f"{version}-2": second.commit, "paper": second.commit}
    assert named.commit == second.commit
    change(cards / "base")
    before = hub.uploaded
    with pytest.raises(SpcxrError, match=f"the tag paper points to another commit, {second.commit}"):
        publish(cards, token=token, only=["base"], tag="paper")
    assert hub.uploaded - before < 5000  # the card's text alone, to be validated


# ---- what is refused -----------------------------------------------------------------------------------------------

SECRET = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("notes.md", f"use\ntoken {SECRET}", r"notes\.md, line 2: holds a Hugging Face token"),
        ("notes.md", "AKIA" + "A1" * 8, "holds an AWS key"),
        ("key.txt", "-----BEGIN OPENSSH " + "PRIVATE KEY-----", "holds a private key"),
        ("results/probe.json", '{"data": "/' + "home" + '/someone/shards"}', "holds an absolute path"),
        ("recipe.yaml", "data: C:" + r"\Users\someone", "holds an absolute path"),
        ("weights.bin", "x", "can be a pickle"),
        ("data.txt", b"\x80\x04\x95pickle", "can be a pickle"),
        ("README.md", None, r"README\.md: missing"),
        ("README.md", "# no front matter. Not for clinical use.", "no license"),
        ("README.md", "---\nlicense: [\n---\n", "front matter not valid"),
        ("README.md", CARD.format(name="base", task="x", more="base_model: a/b/c\n"), "base_model 'a/b/c' is no id"),
        ("README.md", CARD.format(name="base", task="x", more="").replace("Not for clinical use", ""), "clinical use"),
        ("README.md", CARD.format(name="base", task="no-such-task", more=""), "no-such-task"),
        ("modeling_spcxr.py", "import os", r"modeling_spcxr\.py: not the installed package's"),
        ("config.json", '{"auto_map": {"AutoModel": "me/other--modeling_spcxr.SpcxrModel"}}', "is not in the folder"),
        ("expected_outputs.json", None, r"expected_outputs\.json: missing"),
        ("expected_outputs.json", "[]", "not a record of outputs"),
        ("preprocessor_config.json", None, r"preprocessor_config\.json: missing"),
    ],
)
def test_a_bad_folder_is_refused_before_anything_is_sent(hub, token, cards, name, content, complaint):
    """The good folder beside it is not sent either."""
    path = cards / "findings" / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpcxrError, match=complaint) as caught:
        publish(cards, token=token)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hub.repositories == {}


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_other_weights_than_were_recorded_are_refused(hub, token, cards, factor):
    weights = load_file(cards / "base" / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    name = (
        name if name in weights else next(key for key in weights if key.endswith("mlp.fc2.weight") or "weight" in key)
    )
    weights[name] = weights[name] * factor
    save_file(weights, cards / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpcxrError, match=r"expected_outputs\.json: .* is not what was recorded"):
        publish(cards, token=token)
    assert hub.repositories == {}


def test_weights_that_lack_a_tensor_are_refused(cards):
    weights = load_file(cards / "findings" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    assert len(kept) < len(weights)
    save_file(kept, cards / "findings" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpcxrError, match="no weights for 2 parameters of SpcxrForImageClassification: classifier"):
        check_outputs(cards / "findings")


def test_the_token_in_use_is_looked_for(cards, tmp_path):
    (tmp_path / "log.txt").write_text("a\nb oddly_shaped_secret")
    assert list(find_unwanted(tmp_path / "log.txt", "oddly_shaped_secret")) == [(2, "the token that is in use")]
    assert list(find_unwanted(tmp_path / "log.txt", None)) == []
    (tmp_path / "log.txt").write_text("oddly_shaped_secret")
    assert list(find_unwanted(tmp_path / "log.txt", "oddly_shaped_secret")) == [(1, "the token that is in use")]


# Put together here, so that no scanner takes them for real ones.
UNWANTED = {
    "a Hugging Face token": "hf_" + 34 * "a",
    "an AWS key": "AKIA" + 16 * "B",
    "an AWS secret": "aws_secret_access_key = " + 40 * "c",
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a GitHub token": "ghp_" + 36 * "d",
    "a GitLab token": "glpat-" + 20 * "d",
    "a Google key": "AIza" + 35 * "e",
    "an Azure key": "AccountKey=" + 44 * "E" + "==",
    "a Slack token": "xoxb-" + 12 * "1",
    "a secret key": "sk-" + 32 * "f",
    "a token of a package registry": "npm_" + 36 * "g",
    "a token of a cloud": "dapi" + 32 * "1",
    "a JSON web token": ".".join(("eyJ" + 12 * "h", "eyJ" + 12 * "i", 20 * "j")),
    "a password in an address": "https://me:" + "word@example.com/x",
    "an authorisation header": "Authorization: Bearer " + 12 * "k.",
    "a secret by its name": 'WANDB_API_KEY="' + 20 * "1a" + '"',
    "a login of .netrc": "machine api.example.com login user " + "password x",
}
INNOCENT = (
    "tokens: 196 of 384 numbers; pad_token: null; token: the_name_of_a_token_without_a_number",
    "a risk-adjusted-and-very-long-hyphenated-word-in-english, sk_learn_model_selection_of_many",
    "https://huggingface.co/spcxr/base@main, git@github.com:owner/name, http://127.0.0.1:7860/?a=b@c",
    '{"mask_token": "encoder.layers.0.attention", "sha256": "' + 32 * "0a" + '"}',
)


@pytest.mark.parametrize("kind", UNWANTED)
def test_every_kind_of_secret_is_found(tmp_path, kind):
    (tmp_path / "notes.txt").write_text(f"a\nkept: {UNWANTED[kind]}\n")
    assert list(find_unwanted(tmp_path / "notes.txt")) == [(2, kind)]
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors", {"notes": UNWANTED[kind].replace("\n", " ")})
    assert [found for _, found in find_unwanted(tmp_path / "x.safetensors")] == [kind]
    assert set(UNWANTED) == set(SECRETS)


@pytest.mark.parametrize("words", INNOCENT)
def test_what_only_looks_like_a_secret(tmp_path, words):
    (tmp_path / "notes.txt").write_text(words)
    assert list(find_unwanted(tmp_path / "notes.txt")) == []


@pytest.mark.parametrize("folder", ["home/me", "root", "workspace", "mnt", "tmp", "data", "scratch"])
def test_every_place_of_a_machine_is_found(tmp_path, folder):
    (tmp_path / "notes.txt").write_text(f"see /{folder}/runs\n")
    assert list(find_unwanted(tmp_path / "notes.txt")) == [(1, "an absolute path")]


def test_the_real_cards_hold_nothing_unwanted():
    files = [path for path in (ROOT / "model_cards").rglob("*") if path.is_file()]
    assert files
    assert [(path.name, found) for path in files for found in find_unwanted(path)] == []


def test_others_repositories_stay_as_they_are(hub, token, cards, unchecked):
    api = HfApi(token=token)
    api.create_repo("spcxr/base")
    api.create_commit("spcxr/base", [CommitOperationAdd("config.json", b'{"model_type": "vit"}')], commit_message="x")
    with pytest.raises(SpcxrError, match="spcxr/base: holds a model of type 'vit'"):
        publish(cards, token=token)
    publish(cards, token=token, only=["findings"])
    with pytest.raises(SpcxrError, match="public on the Hub, and --private was asked for"):
        publish(cards, token=token, only=["findings"], private=True)
    with pytest.raises(SpcxrError, match="no checkpoint nobody; there are base, findings"):
        publish(cards, token=token, only=["nobody"])


def test_a_change_meanwhile_is_not_written_over(hub, token, cards, unchecked, monkeypatch):
    publish(cards, token=token, only=["base"])
    change(cards / "base")
    real = HfApi.create_commit

    def late(api, repo_id, *args, **kwargs):
        monkeypatch.setattr(HfApi, "create_commit", real)
        api.create_commit(repo_id, [CommitOperationAdd("theirs.txt", b"theirs")], commit_message="theirs")
        return api.create_commit(repo_id, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(SpcxrError, match=r"changed meanwhile: run the same command again \(412: A commit has happened"):
        publish(cards, token=token, only=["base"])
    assert hub.repositories["spcxr/base"].head.title == "theirs"
    publish(cards, token=token, only=["base"])


# ---- the Hub refuses, or is in trouble -----------------------------------------------------------------------------


def test_no_token(hub, cards):
    with pytest.raises(SpcxrError, match="no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"):
        publish(cards)


@pytest.mark.parametrize("wrong", ["unknown", "expired", "read-only", "another namespace"])
def test_a_token_that_may_not(hub, cards, unchecked, wrong):
    token = hub.add_token("me", () if wrong == "another namespace" else ("spcxr",))
    if wrong == "unknown":
        token = "hf_" + "x" * 34
    elif wrong == "expired":
        hub.tokens[token].expired = True
    elif wrong == "read-only":
        hub.tokens[token].role = "read"
    with pytest.raises(
        SpcxrError, match="missing, wrong or expired" if wrong in ("unknown", "expired") else "403"
    ) as e:
        publish(cards, token=token)
    assert token not in str(e.value)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("status", "words", "where"),
    [
        (403, "Private repository storage limit reached, please upgrade your plan", "/info/lfs"),
        (413, "Payload Too Large", "/commit/"),
        (429, "Too Many Requests", "/commit/"),
        (500, "Internal Error", "PUT /storage"),
        (503, "Service Unavailable", "/preupload/"),
    ],
)
def test_the_hubs_own_words(hub, token, cards, unchecked, status, words, where):
    hub.faults = [Fault("status", where=where, status=status, message=words)]
    with pytest.raises(SpcxrError, match=rf"spcxr/base: .*\({status}: .*{words}") as caught:
        publish(cards, token=token, only=["base"])
    assert "\n" not in str(caught.value)
    assert len(hub.repositories["spcxr/base"].commits) == 1
    hub.faults = []
    (one,) = publish(cards, token=token, only=["base"])
    assert one.commit == hub.repositories["spcxr/base"].head.sha


def test_a_hiccup_is_got_over(hub, token, cards, unchecked):
    hub.faults = [Fault("status", where="PUT /storage", first=1, last=12), Fault("slow", where="/refs", seconds=0.3)]
    publish(cards, token=token, only=["base"])
    assert len(hub.repositories["spcxr/base"].commits) == 2


def state_of(hub: HubServer) -> str | None:
    repository = hub.repositories.get("spcxr/base")
    return None if repository is None else repository.head.sha


UPDATE, FIRST = 10, 13  # how many requests each has; the test below counts


def test_the_number_of_requests(hub, token, cards, unchecked):
    publish(cards, token=token, only=["base"])
    assert len(hub.requests) == FIRST
    change(cards / "base")
    hub.forget_requests()
    publish(cards, token=token, only=["base"])
    assert len(hub.requests) == UPDATE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "cut_upload", "cut_answer", "status"])
@pytest.mark.parametrize("number", range(1, UPDATE + 1))
def test_an_update_cut_at_any_request(hub, token, cards, unchecked, number, kind):
    """The repository is at its old or its new commit, never between, and the same command finishes."""
    publish(cards, token=token, only=["base"])
    old = hub.repositories["spcxr/base"].head
    change(cards / "base")
    weights = (cards / "base" / "model.safetensors").read_bytes()
    hub.forget_requests()
    hub.faults = [Fault(kind, first=number)]
    ends = "run the same command again|nothing was sent"
    with pytest.raises(SpcxrError, match=rf"^spcxr/base: .* ({ends})$") as caught:
        publish(cards, token=token, only=["base"])
    assert "\n" not in str(caught.value)
    repository = hub.repositories["spcxr/base"]
    assert repository.head is old or "nothing was sent" not in str(caught.value)
    if repository.head is not old:
        assert hub.objects[repository.head.files["model.safetensors"].sha256] == weights
        assert repository.head.parent == old.sha
    hub.faults = []
    publish(cards, token=token, only=["base"])
    assert len(repository.commits) == 3
    assert hub.objects[repository.head.files["model.safetensors"].sha256] == weights
    assert repository.tags[f"{flow._default_tag()}-2"] == repository.head.sha
    assert len(repository.tags) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "cut_answer"])
@pytest.mark.parametrize("number", range(1, FIRST + 1))
def test_a_first_publish_cut_at_any_request(hub, token, cards, unchecked, number, kind):
    hub.faults = [Fault(kind, first=number)]
    with pytest.raises(SpcxrError, match=r"^spcxr/base: "):
        publish(cards, token=token, only=["base"])
    if "spcxr/base" in hub.repositories:
        files = len([path for path in (cards / "base").rglob("*") if path.is_file() and path.name not in CODE])
        assert len(hub.repositories["spcxr/base"].head.files) in (1, 1 + files + len(CODE))
    hub.faults = []
    publish(cards, token=token, only=["base"])
    repository = hub.repositories["spcxr/base"]
    assert len(repository.commits) == 2
    assert repository.tags == {flow._default_tag(): repository.head.sha}


# ---- the command, and its token ------------------------------------------------------------------------------------


def test_the_command(hub, token, cards, unchecked, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    command = ["publish", "base", "--checkpoints", str(cards)]
    done = CliRunner().invoke(app, [*command, "--dry-run"])
    assert "spcxr/base: new repository" in done.output
    assert hub.repositories == {}
    done = CliRunner().invoke(app, [*command, "--namespace", "me", "--private", "--tag", "first"])
    assert hub.repositories["me/base"].tags.keys() == {"first"}
    assert token not in done.output
    assert CliRunner().invoke(app, [*command, "--token", token]).exit_code == 2  # it would stand in the shell's history


def files_that_hold(folder: Path, words: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and words.encode() in path.read_bytes()]


SLOW = [pytest.param(words, marks=pytest.mark.slow) for words in ("none", "no Hub")]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["the Hub repeats it", *SLOW])
def test_the_token_reaches_no_log_output_or_file(cards, tmp_path, trouble):
    """In a separate process with debug logs; a Hub, or a proxy, may repeat the token in its answers."""
    with HubServer() as hub:
        token = hub.add_token("me", ("spcxr",))
        if trouble == "the Hub repeats it":
            hub.faults = [Fault("status", where="/commit/", status=400, message=f"bad header: Bearer {token}")]
        url = "http://127.0.0.1:9" if trouble == "no Hub" else hub.url
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        talkative = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_HUB_DISABLE_XET": "1"}
        place = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url, "HF_TOKEN": token}
        place |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-X", "dev", "-W", "ignore", "-m", "spcxr_hf.cli"]
        done = subprocess.run(
            [*command, "publish", "base", "--checkpoints", str(cards)],
            env={**ours, **talkative, **place, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if trouble == "none" else 1), done.stderr
        assert any("/commit/" in line for line in hub.requests) == (trouble != "no Hub")
        stored = json.dumps([str(blob) for repo in hub.repositories.values() for blob in repo.head.files.items()])
    assert token not in done.stdout + done.stderr
    assert files_that_hold(tmp_path, token) == []
    assert token not in stored
    if trouble != "none":
        assert re.fullmatch(r"error: spcxr/base: .*", done.stderr.splitlines()[-1])
