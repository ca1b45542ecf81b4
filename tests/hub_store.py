"""What the small Hub of the tests holds: repositories, commits, files, users; and a request's and an answer's form."""

import hashlib
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blob:
    """A file in a commit: its git id and size; of an LFS file the SHA-256, of another the content."""

    oid: str
    size: int
    sha256: str | None = None
    content: bytes = b""

    @classmethod
    def regular(cls, content: bytes) -> "Blob":
        return cls(git_hash(content), len(content), None, content)

    @classmethod
    def large(cls, sha256: str, size: int) -> "Blob":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(git_hash(pointer), size, sha256)

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.sha256 else {}
        return {"type": "file", "oid": self.oid, "size": self.size, "path": path, **lfs}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]

    def commit(self, title: str, files: dict[str, Blob], branch: str = "main") -> Commit:
        parent = self.branches.get(branch)
        text = f"{parent} {title} {len(self.commits)}" + "".join(f"{path}{blob.oid}" for path, blob in files.items())
        new = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, dict(sorted(files.items())))
        self.commits[new.sha] = new
        self.branches[branch] = new.sha
        return new

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]


@dataclass
class Token:
    user: str
    namespaces: tuple[str, ...]
    role: str = "write"
    expired: bool = False


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    token: Token | None

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, status: int = 200, **headers: str) -> "Answer":
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        self.answer = Answer.of({"error": message}, status, **{"X-Error-Message": message, **headers})
        if code:
            self.answer.headers["X-Error-Code"] = code


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
