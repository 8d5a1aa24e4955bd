"""The Hub over loopback HTTP: what huggingface-hub calls to push, list, look at and download.

One file without dependencies, by what was seen on the wire (huggingface-hub 2.4). It knows no Xet,
no pull requests and no redirects. It can refuse, and hang up in the middle of an upload.

Test files ask for its fixture with `pytest_plugins = ["hub_stub"]` and import the rest.
PYTEST_DONT_REWRITE, because they do the latter before pytest sees the former.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

TOKEN, READ_TOKEN = "hf_stub_writes_0123456789", "hf_stub_reads_0123456789"
PART = 30_000
"""A file in the large storage that is longer goes up in parts of so many bytes."""


@dataclass(frozen=True)
class Blob:
    """A file's content; `large` is what git-lfs would keep outside the repository."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


Files = dict[str, Blob]


@dataclass
class Repo:
    """The commits of one branch, oldest first, and tags on them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        return self.commits[self.head]

    def commit(self, files: Files) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = {"main": self.head, **self.tags}.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass(frozen=True)
class Refusal:
    """An error that the Hub answers to all requests of one kind."""

    method: str
    path: str
    status: int
    message: str = "no"
    code: str = ""


class Hub(ThreadingHTTPServer):
    """All repositories, and what was asked of them.

    Attributes:
        repos: By id.
        large: Content of the large file storage by SHA-256; nothing is ever dropped from it.
        parts: What came of uploads in parts, by SHA-256 and number.
        refusals: In force.
        cut: The line is cut halfway through uploads to the large storage with such a path.
        asked: Method and path of every request.
        meanwhile: Done before every answer, as by somebody else.
        served: Bytes of files that were sent.
        received: Files and parts that went into the large storage, in that order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.refusals: list[Refusal] = []
        self.cut: str | None = None
        self.asked: list[tuple[str, str]] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self.served = 0
        self.received: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repo: str, files: dict[str, bytes]) -> Repo:
        """A repository with these files, as somebody else has pushed it."""
        made = self.repos.setdefault(repo, Repo())
        for content in files.values():
            self.large[hashlib.sha256(content).hexdigest()] = content
        made.commit({name: Blob(content, is_large(name)) for name, content in files.items()})
        return made

    def put_folder(self, repo: str, folder: Path) -> Repo:
        """A repository with all files of a folder."""
        files = (path for path in folder.rglob("*") if path.is_file())
        return self.put(repo, {f.relative_to(folder).as_posix(): f.read_bytes() for f in files})

    def calls(self, method: str, path: str = "*") -> int:
        """How many requests of a kind there were."""
        return sum(m == method and fnmatch(p, path) for m, p in self.asked)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line that was cut is no news."""


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".pt", ".png"))


class Handler(BaseHTTPRequestHandler):
    """One request; the table at the end of the class says which method answers it."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        """The tests' output is their own."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.asked.append((self.command, path))
            self.hub.meanwhile()
        self.query = parse_qs(urlsplit(self.path).query)
        for refusal in self.hub.refusals:
            if refusal.method == self.command and fnmatch(path, refusal.path):
                self.body()
                code = {"X_Error_Code": refusal.code} if refusal.code else {}
                return self.tell(refusal.status, {"error": refusal.message}, **code)
        for method, pattern, act in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return act(self, **match.groupdict())
        self.body()
        self.tell(404, {"error": f"{self.command} {path} is not known here"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        """All that was sent, chunked or at once."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def tell(self, status: int, obj: Any = None, **headers: str) -> None:
        content = b"" if obj is None else json.dumps(obj).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if isinstance(obj, dict) and "error" in obj:
            self.send_header("X-Error-Message", str(obj["error"]))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        if self.token() == TOKEN:
            return True
        if self.token() == READ_TOKEN:
            self.tell(403, {"error": "this token may only read"})
        else:
            self.tell(401, {"error": "Invalid username or password."})
        return False

    def repo(self, name: str) -> Repo | None:
        """The repository, if there is one for whoever asks."""
        if self.token() not in ("", TOKEN, READ_TOKEN):
            self.tell(401, {"error": "Invalid credentials in Authorization header"})
            return None
        found = self.hub.repos.get(name)
        if found is None or (found.private and not self.token()):
            self.tell(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def at(self, name: str, revision: str) -> tuple[str, Files] | None:
        """Commit and files of a revision."""
        if (repo := self.repo(name)) is None:
            return None
        if (oid := repo.resolve(revision)) is None:
            self.tell(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            return None
        return oid, repo.commits[oid]

    def create(self) -> None:
        asked = json.loads(self.body())
        if not self.may_write():
            return None
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repos:
            return self.tell(409, {"error": "You already created this model repo"})
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        self.hub.repos[name].commit({})
        self.tell(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def check_card(self) -> None:
        self.body()
        self.tell(200, {"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        if (found := self.at(name, revision)) is None:
            return
        oid, files = found
        self.tell(
            200,
            {
                "id": name,
                "sha": oid,
                "private": self.hub.repos[name].private,
                "siblings": [{"rfilename": path} for path in files],
                "tags": [],
            },
        )

    def tree(self, name: str, revision: str) -> None:
        if (found := self.at(name, revision)) is None:
            return
        entries = []
        for path, blob in found[1].items():
            size = len(blob.content)
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": size}
            if blob.large:
                # The oid is then that of a pointer, which nobody looks at here.
                entry |= {"oid": "0" * 40}
                entry["lfs"] = {"oid": blob.oid, "size": size, "pointerSize": 127}
            entries.append(entry)
        self.tell(200, entries)

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())
        if not self.may_write() or (found := self.at(name, revision)) is None:
            return
        files = found[1]
        told = [
            {
                "path": path,
                "uploadMode": "lfs" if is_large(path) else "regular",
                "shouldIgnore": False,
                "oid": files[path].oid if path in files else None,
            }
            for path in (file["path"] for file in asked["files"])
        ]
        self.tell(200, {"files": told})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body())
        if not self.may_write() or self.repo(name) is None:
            return
        objects = []
        for entry in asked["objects"]:
            oid, size, store = entry["oid"], entry["size"], f"{self.hub.url}/store"
            told: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.large:
                upload: dict[str, Any] = {"href": f"{store}/{oid}"}
                if size > PART:
                    parts = range(1, -(-size // PART) + 1)
                    upload["header"] = {f"{i:05}": f"{store}/{oid}/{i}" for i in parts}
                    upload["header"]["chunk_size"] = str(PART)
                told["actions"] = {"upload": upload, "verify": {"href": f"{store}/{oid}/verify"}}
            objects.append(told)
        self.tell(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str, part: str | None = None) -> None:
        """A whole file, or one part of one; the line may be cut halfway."""
        if self.hub.cut and fnmatch(self.path, self.hub.cut):
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        with self.hub.lock:
            self.hub.received.append(oid)
            if part is None:
                assert hashlib.sha256(content).hexdigest() == oid
                self.hub.large[oid] = content
            else:
                self.hub.parts[oid, int(part)] = content
        self.tell(200, ETag=f'"{oid[:8]}-{part}"')

    def complete(self, oid: str) -> None:
        numbers = [entry["partNumber"] for entry in json.loads(self.body())["parts"]]
        content = b"".join(self.hub.parts[oid, number] for number in numbers)
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self.tell(200, {})

    def verify(self, oid: str) -> None:
        asked = json.loads(self.body())
        whole = len(self.hub.large.get(oid, b"")) == asked["size"]
        self.tell(200 if whole else 404, {})

    def commit(self, name: str, revision: str) -> None:
        header, *changes = [json.loads(line) for line in self.body().splitlines()]
        if not self.may_write() or (found := self.at(name, revision)) is None:
            return None
        repo, files = self.hub.repos[name], dict(found[1])
        if header["value"].get("parentCommit", repo.head) != repo.head:
            return self.tell(412, {"error": "A commit has happened since"})
        for change in changes:
            kind, value = change["key"], change["value"]
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self.hub.large[value["oid"]], large=True)
            else:
                del files[value["path"]]
        oid = repo.commit(files)
        self.tell(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def tag(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())
        if not self.may_write() or (found := self.at(name, revision)) is None:
            return None
        tags = self.hub.repos[name].tags
        if asked["tag"] in tags:
            return self.tell(409, {"error": "Tag reference exists already"})
        tags[asked["tag"]] = found[0]
        self.tell(200, {})

    def refs(self, name: str) -> None:
        if (repo := self.repo(name)) is None:
            return
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid}
            for tag, oid in repo.tags.items()
        ]
        self.tell(200, {"branches": [branch], "tags": tags, "converts": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        """A file or a range of it."""
        if (found := self.at(name, revision)) is None:
            return None
        oid, files = found
        if path not in files:
            return self.tell(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        blob, status, extra = files[path], 200, {}
        content, total = blob.content, len(blob.content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(asked[1])
            content = content[start : int(asked[2]) + 1 if asked[2] else None]
            status = 206
            extra["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        self.send_response(status)
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{blob.oid}"',
            "X-Linked-Size": str(total),
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content)),
            **extra,
        }
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            with self.hub.lock:
                self.hub.served += len(content)
            self.wfile.write(content)


_MODEL, _REVISION = r"/api/models/(?P<name>[^/]+/[^/]+)", r"(?P<revision>.+)"
_STORE = r"/store/(?P<oid>[0-9a-f]{64})"
_FILE = r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.check_card),
    ("GET", _MODEL, Handler.info),
    ("GET", rf"{_MODEL}/revision/{_REVISION}", Handler.info),
    ("GET", rf"{_MODEL}/tree/{_REVISION}", Handler.tree),
    ("GET", rf"{_MODEL}/refs", Handler.refs),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", Handler.commit),
    ("POST", rf"{_MODEL}/tag/{_REVISION}", Handler.tag),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", _STORE, Handler.store),
    ("PUT", rf"{_STORE}/(?P<part>\d+)", Handler.store),
    ("POST", _STORE, Handler.complete),
    ("POST", rf"{_STORE}/verify", Handler.verify),
    ("HEAD", _FILE, Handler.resolve),
    ("GET", _FILE, Handler.resolve),
)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of its own, which huggingface-hub takes for the only one; logged in, its cache empty.

    huggingface-hub reads its environment when it is imported, hence the constants; what it calls
    again after a failure it calls at once.
    """
    hub = Hub()
    serving = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    serving.start()
    home = tmp_path / "hf-home"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)
    close_session()
    yield hub
    close_session()
    hub.shutdown()
    hub.server_close()
    serving.join()
