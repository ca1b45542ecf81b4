"""What each request does to the small Hub of the tests; `hub_server.py` puts it on a port.

Models alone. It is strict where the real one is: an LFS object must have the SHA-256 of its name before a commit may
point at it, a commit with a parent must stand on the branch's head, a signed storage URL refuses an Authorization
header. It advertises no Xet.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_store import Answer, Blob, Commit, Refused, Repository, Request, Token, git_hash

LFS_NAMES = re.compile(r"\.(safetensors|bin|pt|onnx|h5|msgpack|parquet|png|jpg|gz|zip)$", re.IGNORECASE)
LARGEST_REGULAR = 10_000_000
TASKS = {"image-feature-extraction", "image-segmentation", "image-classification", "mask-generation"}

REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"
Handler = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    def keep(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return keep


class Hub:
    """The state, and what each request does to it. `page` entries make a page of a tree; parts of `part` bytes an
    upload (None: one part)."""

    def __init__(self) -> None:
        self.url = ""
        self.storage_url = ""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens: dict[str, Token] = {}
        self.page = 1000
        self.part: int | None = None
        self.lock = threading.RLock()

    def add_token(self, user: str, namespaces: tuple[str, ...] = (), role: str = "write") -> str:
        """A new secret that this user may write to these namespaces with."""
        name = "hf_" + secrets.token_hex(17)
        self.tokens[name] = Token(user, (user, *namespaces), role)
        return name

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        parts = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        try:
            for wanted, pattern, handler in ROUTES:
                if (wanted == method or (wanted, method) == ("GET", "HEAD")) and (m := pattern.fullmatch(parts.path)):
                    token = None if parts.path.startswith("/storage/") else self.token_of(headers)
                    request = Request(method, parts.path, query, headers, body, token)
                    return handler(self, request, **{key: unquote(value or "") for key, value in m.groupdict().items()})
            raise Refused(404, "", f"no such page: {method} {parts.path}")
        except Refused as refused:
            return refused.answer

    def token_of(self, headers: dict[str, str]) -> Token | None:
        words = headers.get("authorization", "").split()
        if not words:
            return None
        token = self.tokens.get(words[-1])
        if token is None or words[0] != "Bearer":
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if token.expired:
            raise Refused(401, "", f'User Access Token of "{token.user}" is expired')
        return token

    def find(self, request: Request, repo: str, write: bool = False) -> Repository:
        """The repository, if this user may see it, and write to it where `write`."""
        found, token = self.repositories.get(repo), request.token
        member = token is not None and repo.split("/")[0] in token.namespaces
        if found is None or (found.private and not member):
            raise Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if write and not member:
            raise Refused(401 if token is None else 403, "", "You don't have the rights to write to this repository")
        if write and token is not None and token.role != "write":
            raise Refused(403, "", "Your token is read-only: it needs the role write")
        return found


@route("GET", r"/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Answer:
    token = request.token
    if token is None:
        raise Refused(401, "", "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in token.namespaces if name != token.user]
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": token.role}}
    return Answer.of({"type": "user", "name": token.user, "fullname": token.user, "orgs": orgs, "auth": access})


@route("POST", r"/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Answer:
    errors = complaints(request.json["content"])
    return Answer.of({"errors": [{"message": words} for words in errors], "warnings": []}, 400 if errors else 200)


def complaints(card: str) -> list[str]:
    """What is wrong with a card's front matter; a part of the real rules."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"bad indentation or syntax: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    found = []
    if data.get("pipeline_tag") not in {None, *TASKS}:
        found.append(f'"pipeline_tag" must be one of the known tasks, not {data["pipeline_tag"]}')
    if not all(isinstance(tag, str) for tag in data.get("tags") or []):
        found.append('"tags" must be strings')
    if data.get("license") == "other" and not data.get("license_name"):
        found.append('"license_name" is required where "license" is other')
    return found


@route("POST", r"/api/repos/create")
def create(hub: Hub, request: Request) -> Answer:
    asked, token = request.json, request.token
    if token is None:
        raise Refused(401, "", "Invalid username or password.")
    owner = asked.get("organization") or token.user
    name = f"{owner}/{asked['name']}"
    if owner not in token.namespaces or token.role != "write":
        raise Refused(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
    url = {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        return Answer.of({"error": "You already created this model repo", **url}, 409)
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    hub.repositories[name] = Repository(name, private)
    attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    hub.repositories[name].commit("initial commit", {".gitattributes": Blob.regular(attributes)})
    return Answer.of(url)


@route("GET", rf"{API}(/revision/(?P<revision>[^/]+))?")
def model_info(hub: Hub, request: Request, repo: str, revision: str) -> Answer:
    found = hub.find(request, repo)
    commit = found.at(revision or "main")
    card = commit.files.get("README.md", Blob("", 0)).content.decode()
    match = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    siblings = [
        {"rfilename": path} | ({"size": blob.size, "blobId": blob.oid} if request.query.get("blobs") else {})
        for path, blob in commit.files.items()
    ]
    info = {"_id": repo, "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.sha}
    info |= {"private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    info |= {"tags": data.get("tags", []), "cardData": data, "siblings": siblings, "lastModified": now()}
    if (config := commit.files.get("config.json")) is not None:
        info["config"] = {"model_type": json.loads(config.content).get("model_type")}
    info |= {key: data[key] for key in ("pipeline_tag", "library_name") if key in data}
    return Answer.of(info)


@route("GET", rf"{API}/refs")
def refs(hub: Hub, request: Request, repo: str) -> Answer:
    found = hub.find(request, repo)

    def listed(kind: str, names: dict[str, str]) -> list[dict]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

    return Answer.of({"branches": listed("heads", found.branches), "converts": [], "tags": listed("tags", found.tags)})


@route("GET", rf"{API}/commits/(?P<revision>[^/]+)")
def commits(hub: Hub, request: Request, repo: str, revision: str) -> Answer:
    found = hub.find(request, repo)
    commit: Commit | None = found.at(revision)
    listed = []
    while commit is not None:
        listed.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": now()})
        commit = found.commits[commit.parent] if commit.parent else None
    return Answer.of(listed)


@route("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def tree(hub: Hub, request: Request, repo: str, revision: str, folder: str) -> Answer:
    files = hub.find(request, repo).at(revision).files
    below = {path: blob for path, blob in files.items() if not folder or path.startswith(f"{folder}/")}
    if folder and not below:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist")
    cut = len(folder) + 1 if folder else 0
    recursive = request.query.get("recursive", "").lower() == "true"
    entries = [blob.entry(path) for path, blob in below.items() if recursive or "/" not in path[cut:]]
    folders = {path[: path.index("/", cut)] for path in below if "/" in path[cut:]}
    entries += [{"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name} for name in folders]
    start = int(request.query.get("cursor", 0))
    answer = Answer.of(entries[start : start + hub.page])
    if start + hub.page < len(entries):
        query = f"recursive={recursive}&cursor={start + hub.page}"
        answer.headers["Link"] = f'<{hub.url}{request.path}?{query}>; rel="next"'
    return answer


@route("POST", rf"{API}/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: Hub, request: Request, repo: str, revision: str) -> Answer:
    files = hub.find(request, repo).at(revision).files
    is_json = request.headers.get("content-type", "").startswith("application/json")
    paths = request.json["paths"] if is_json else parse_qs(request.body.decode())["paths"]
    return Answer.of([files[path].entry(path) for path in paths if path in files])


@route("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
def preupload(hub: Hub, request: Request, repo: str, revision: str) -> Answer:
    there = hub.find(request, repo, write=True).at(revision).files
    answers = []
    for asked in request.json["files"]:
        path, sample = asked["path"], base64.b64decode(asked["sample"])
        large = LFS_NAMES.search(path) or b"\0" in sample or asked["size"] > LARGEST_REGULAR
        known = there.get(path)
        oid = known and (known.sha256 or known.oid)
        answers.append(
            {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            | ({"oid": oid} if oid else {})
        )
    return Answer.of({"files": answers, "commitOid": hub.repositories[repo].at(revision).sha})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, repo: str) -> Answer:
    hub.find(request, repo, write=True)
    objects = []
    for asked in request.json["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
        if asked["oid"] not in hub.objects:
            verify = {"href": f"{hub.url}/{repo}.git/info/lfs/objects/verify", "header": {}}
            entry["actions"] = {"upload": upload_action(hub, asked["oid"], asked["size"]), "verify": verify}
        objects.append(entry)
    transfer = "multipart" if any("parts" in str(entry) for entry in objects) else "basic"
    return Answer.of({"transfer": transfer, "objects": objects})


def upload_action(hub: Hub, oid: str, size: int) -> dict:
    if hub.part is None or size <= hub.part:
        return {"href": f"{hub.storage_url}/storage/{oid}", "header": {}}
    hub.parts[oid] = {}
    numbers = range(1, -(-size // hub.part) + 1)
    header = {f"{number:05d}": f"{hub.storage_url}/storage/{oid}/parts/{number}" for number in numbers}
    return {"href": f"{hub.storage_url}/storage/{oid}/complete", "header": {"chunk_size": str(hub.part), **header}}


@route("PUT", r"/storage/(?P<oid>[0-9a-f]{64})(/parts/(?P<part>\d+))?")
def put_object(hub: Hub, request: Request, oid: str, part: str) -> Answer:
    refuse_authorization(request)
    if part:
        hub.parts[oid][int(part)] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
    return keep_object(hub, oid, request.body)


@route("POST", r"/storage/(?P<oid>[0-9a-f]{64})/complete")
def complete(hub: Hub, request: Request, oid: str) -> Answer:
    refuse_authorization(request)
    wanted = [part["partNumber"] for part in request.json["parts"]]
    return keep_object(hub, oid, b"".join(hub.parts[oid][number] for number in wanted))


def keep_object(hub: Hub, oid: str, content: bytes) -> Answer:
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, "", "BadDigest: the SHA-256 is not that of the object's name")
    hub.objects[oid] = content
    return Answer(headers={"ETag": f'"{oid}"'})


def refuse_authorization(request: Request) -> None:
    if "authorization" in request.headers:
        raise Refused(400, "", "Only one auth mechanism allowed: a signed URL needs no Authorization header")


@route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def verify(hub: Hub, request: Request, repo: str) -> Answer:
    hub.find(request, repo, write=True)
    content = hub.objects.get(request.json["oid"])
    if content is None or len(content) != request.json["size"]:
        raise Refused(404, "", "Object not found")
    return Answer.of({})


@route("POST", rf"{API}/commit/(?P<branch>[^/]+)")
def commit(hub: Hub, request: Request, repo: str, branch: str) -> Answer:
    found = hub.find(request, repo, write=True)
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = found.at(branch)
    if header.get("parentCommit") not in (None, head.sha):
        raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines:
        apply(hub, files, line["key"], line["value"])
    new = found.commit(header["summary"], files, branch)
    return Answer.of({"success": True, "commitOid": new.sha, "commitUrl": f"{hub.url}/{repo}/commit/{new.sha}"})


def apply(hub: Hub, files: dict[str, Blob], key: str, value: dict) -> None:
    """One line of a commit."""
    if key == "file":
        files[value["path"]] = Blob.regular(checked_content(value))
    elif key == "lfsFile":
        if value["oid"] not in hub.objects:
            raise Refused(400, "", f"the LFS object {value['oid']} was not uploaded")
        files[value["path"]] = Blob.large(value["oid"], len(hub.objects[value["oid"]]))
    elif key == "deletedFile":
        if value["path"] not in files:
            raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        del files[value["path"]]
    elif key == "deletedFolder":
        for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
            del files[path]


def checked_content(value: dict) -> bytes:
    content = base64.b64decode(value["content"])
    if value["path"] == "README.md" and (errors := complaints(content.decode())):
        raise Refused(400, "", f"Invalid metadata in README.md: {errors[0]}")
    return content


@route("POST", rf"{API}/tag/(?P<revision>[^/]+)")
def create_tag(hub: Hub, request: Request, repo: str, revision: str) -> Answer:
    found = hub.find(request, repo, write=True)
    name = request.json["tag"]
    if name in found.tags:
        raise Refused(409, "", "Tag reference exists already")
    found.tags[name] = found.at(revision).sha
    return Answer.of({})


@route("DELETE", rf"{API}/tag/(?P<name>[^/]+)")
def delete_tag(hub: Hub, request: Request, repo: str, name: str) -> Answer:
    if hub.find(request, repo, write=True).tags.pop(name, None) is None:
        raise Refused(404, "RevisionNotFound", f"no tag {name}")
    return Answer.of({})


@route("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: Hub, request: Request, repo: str, revision: str, path: str) -> Answer:
    found = hub.find(request, repo).at(revision)
    named = {"X-Repo-Commit": found.sha}
    blob = found.files.get(path)
    if blob is None:
        raise Refused(404, "EntryNotFound", "Entry not found", **named)
    if blob.sha256 is None:
        return in_range(Answer(200, blob.content, {"ETag": f'"{blob.oid}"', **named}), request)
    linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
    place = {"Location": f"{hub.storage_url}/storage/{blob.sha256}"}
    return Answer(302, b"", {"ETag": f'"{blob.oid}"', **named, **linked, **place})


@route("GET", r"/storage/(?P<oid>[0-9a-f]{64})")
def get_object(hub: Hub, request: Request, oid: str) -> Answer:
    refuse_authorization(request)
    if oid not in hub.objects:
        raise Refused(404, "", "NoSuchKey")
    return in_range(Answer(200, hub.objects[oid], {"ETag": f'"{oid}"'}), request)


def in_range(answer: Answer, request: Request) -> Answer:
    """The part of a file that is asked for, where one is: downloads are resumed so."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if match is None:
        return answer
    total, start = len(answer.body), int(match[1])
    end = min(int(match[2] or total - 1), total - 1)
    span = {"Content-Range": f"bytes {start}-{end}/{total}"}
    return Answer(206, answer.body[start : end + 1], {**answer.headers, **span})


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
