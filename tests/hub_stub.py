"""A small Hub on the loopback: the HTTP API that huggingface-hub 2.4 uses to push and download.

It has no Xet, no multipart uploads, no pull requests and no redirects. It can refuse requests, and
break off in the middle of an upload.

Test files get the fixture with `pytest_plugins = ["hub_stub"]` and import the rest.
PYTEST_DONT_REWRITE: test files import this file before pytest registers it as a plugin.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

TOKEN, READ_TOKEN = "hf_stub_writes_0123456789", "hf_stub_reads_0123456789"


@dataclass(frozen=True)
class Blob:
    """The content of a file; git-lfs would keep a `large` one outside the repository."""

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
    """The commits of one branch, oldest first, and their tags."""

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
    """An error as the answer to all requests of one kind."""

    method: str
    path: str
    status: int
    message: str = "no"
    code: str = ""


class Hub(ThreadingHTTPServer):
    """All repositories, and a record of the requests.

    Attributes:
        repos: Repositories by id.
        large: Files of the large storage by SHA-256; nothing is ever removed.
        refusals: Errors for some kinds of requests.
        cut: Pattern of paths whose uploads break off halfway.
        asked: Method and path of every request.
        meanwhile: A function that is called before every answer.
        served: Bytes of files that were sent.
        received: Files that were uploaded to the large storage, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
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
        """Make a repository with these files, or a new commit of it."""
        made = self.repos.setdefault(repo, Repo())
        for content in files.values():
            self.large[hashlib.sha256(content).hexdigest()] = content
        made.commit({name: Blob(content, is_large(name)) for name, content in files.items()})
        return made

    def put_folder(self, repo: str, folder: Path) -> Repo:
        """Make a repository with all files of a folder."""
        files = (path for path in folder.rglob("*") if path.is_file())
        return self.put(repo, {f.relative_to(folder).as_posix(): f.read_bytes() for f in files})

    def calls(self, method: str, path: str = "*") -> int:
        """The number of requests with this method and path."""
        return sum(m == method and fnmatch(p, path) for m, p in self.asked)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections, which tests ask for."""


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".pt", ".png"))


class Error(Exception):
    """An error answer: status, message, and the code that huggingface-hub maps to an exception."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    """Answers one request; the table `ROUTES` below names the method for each path.

    Methods return JSON for the answer, or None when they have answered themselves.
    """

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.asked.append((self.command, path))
            self.hub.meanwhile()
        try:
            for refusal in self.hub.refusals:
                if refusal.method == self.command and fnmatch(path, refusal.path):
                    self.body()
                    raise Error(refusal.status, refusal.message, refusal.code)
            for method, pattern, act in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    if (table := act(self, **match.groupdict())) is not None:
                        self.send(200, json.dumps(table).encode())
                    return
            raise Error(404, f"{self.command} {path} is not known here")
        except Error as error:
            headers = {"X-Error-Message": error.message, "X-Error-Code": error.code}
            headers = {name: value for name, value in headers.items() if value}
            self.send(error.status, json.dumps({"error": error.message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        """The body of the request, chunked or not."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def json(self) -> Any:
        """The JSON of a request that writes; only a token with write access may send one."""
        content = self.body()
        if self.token != TOKEN:
            if self.token == READ_TOKEN:
                raise Error(403, "this token may only read")
            raise Error(401, "Invalid username or password.")
        return json.loads(content)

    def send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def repo(self, name: str) -> Repo:
        """The repository, if the token may see it."""
        if self.token not in ("", TOKEN, READ_TOKEN):
            raise Error(401, "Invalid credentials in Authorization header")
        found = self.hub.repos.get(name)
        if found is None or (found.private and not self.token):
            raise Error(404, "Repository not found", "RepoNotFound")
        return found

    def at(self, name: str, revision: str) -> tuple[str, Files]:
        """The commit and files of a revision."""
        repo = self.repo(name)
        if (oid := repo.resolve(revision)) is None:
            raise Error(404, "Revision not found", "RevisionNotFound")
        return oid, repo.commits[oid]

    def create(self) -> Any:
        table = self.json()
        name = f"{table.get('organization') or 'user'}/{table['name']}"
        if name in self.hub.repos:
            raise Error(409, "You already created this model repo")
        self.hub.repos[name] = Repo(private=table.get("visibility") == "private")
        self.hub.repos[name].commit({})
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def check_card(self) -> Any:
        self.body()
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str = "main") -> Any:
        oid, files = self.at(name, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repos[name].private
        return {"id": name, "sha": oid, "private": private, "siblings": siblings, "tags": []}

    def tree(self, name: str, revision: str) -> Any:
        entries = []
        for path, blob in self.at(name, revision)[1].items():
            size = len(blob.content)
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": size}
            if blob.large:
                # The outer oid is the one of a git-lfs pointer, which no test uses.
                entry |= {"oid": "0" * 40, "lfs": {"oid": blob.oid, "size": size, "pointerSize": 1}}
            entries.append(entry)
        return entries

    def preupload(self, name: str, revision: str) -> Any:
        paths = [file["path"] for file in self.json()["files"]]
        files = self.at(name, revision)[1]
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path) else "regular",
                    "shouldIgnore": False,
                    "oid": files[path].oid if path in files else None,
                }
                for path in paths
            ]
        }

    def batch(self, name: str) -> Any:
        objects = []
        for entry in self.json()["objects"]:
            url = f"{self.hub.url}/store/{entry['oid']}"
            item: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.large:
                item["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(item)
        self.repo(name)
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str) -> Any:
        """Receive a large file; the connection may break off halfway."""
        if self.hub.cut and fnmatch(self.path, self.hub.cut):
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.connection.close()
            return None
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        with self.hub.lock:
            self.hub.received.append(oid)
            self.hub.large[oid] = content
        return {}

    def verify(self, oid: str) -> Any:
        if len(self.hub.large.get(oid, b"")) != json.loads(self.body())["size"]:
            raise Error(404, "not uploaded")
        return {}

    def commit(self, name: str, revision: str) -> Any:
        content = self.body()
        header, *changes = [json.loads(line) for line in content.splitlines()]
        files = dict(self.at(name, revision)[1])
        repo = self.hub.repos[name]
        if header["value"].get("parentCommit", repo.head) != repo.head:
            raise Error(412, "A commit has happened since")
        for change in changes:
            kind, value = change["key"], change["value"]
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self.hub.large[value["oid"]], large=True)
            else:
                del files[value["path"]]
        oid = repo.commit(files)
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}

    def tag(self, name: str, revision: str) -> Any:
        tag, tags = self.json()["tag"], self.repo(name).tags
        if tag in tags:
            raise Error(409, "Tag reference exists already")
        tags[tag] = self.at(name, revision)[0]
        return {}

    def refs(self, name: str) -> Any:
        repo = self.repo(name)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}
        tags = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid}
            for tag, oid in repo.tags.items()
        ]
        return {"branches": [branch], "tags": tags, "converts": []}

    def resolve(self, name: str, revision: str, path: str) -> None:
        """Send a file or a range of it."""
        oid, files = self.at(name, revision)
        if path not in files:
            raise Error(404, "Entry not found", "EntryNotFound")
        content, total, status = files[path].content, len(files[path].content), 200
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{files[path].oid}"',
            "X-Linked-Size": str(total),
            "Accept-Ranges": "bytes",
        }
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(span[1])
            content = content[start : int(span[2]) + 1 if span[2] else None]
            status = 206
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        if self.command == "GET":
            with self.hub.lock:
                self.hub.served += len(content)
        self.send(status, content, headers)


_MODEL, _REVISION = r"/api/models/(?P<name>[^/]+/[^/]+)", r"(?P<revision>.+)"
_STORE = r"/store/(?P<oid>[0-9a-f]{64})"
_FILE = r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
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
    ("POST", rf"{_STORE}/verify", Handler.verify),
    ("HEAD", _FILE, Handler.resolve),
    ("GET", _FILE, Handler.resolve),
)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub for one test."""
    with served(tmp_path / "hf-home", monkeypatch) as hub:
        yield hub


@contextmanager
def served(home: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, as the only one that huggingface-hub knows; logged in, with no cache.

    The constants are patched because huggingface-hub reads its environment at import. Its waits
    between retries are skipped.

    Args:
        home: Folder of the cache and of the token.
        patch: Takes the changes back.
    """
    hub = Hub()
    serving = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    serving.start()
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setattr("time.sleep", lambda _: None)
    close_session()
    yield hub
    close_session()
    hub.shutdown()
    hub.server_close()
    serving.join()
