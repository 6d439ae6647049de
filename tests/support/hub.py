"""A local stand-in for the HTTP interface of the Hugging Face Hub: the requests that uploading and loading make."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from huggingface_hub import ModelCard

TOKEN = "hf_" + "a" * 34


@dataclass
class Repo:
    """A repository: its files at the newest commit, and the number of commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class Hub:
    """The content of the hub, of which ``me`` is the only user.

    Attributes:
        repos: repositories by name.
        refusals: path → status and message with which requests there are refused.
        requests: methods and paths of all requests.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.url = ""

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, dict[str, str], object]:
        """Return status, headers and content."""
        self.requests.append(f"{method} {path}")
        for refused, (status, message) in self.refusals.items():
            if path.startswith(refused):
                return status, {"X-Error-Message": message}, {"error": message}
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if token != TOKEN:
            return 401, {}, {"error": "Invalid username or password."}
        content = json.loads(body) if body and not path.endswith(("/commit/main", "/resolve")) else {}
        if path == "/api/whoami-v2":
            return 200, {}, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            name = f"{content['organization'] or 'me'}/{content['name']}"
            if name in self.repos:
                return 409, {}, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repos[name] = Repo(content.get("visibility") == "private" or content.get("private", False))
            return 200, {}, {"url": f"{self.url}/{name}"}
        found = re.match(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(/.*)?$", path)
        name, rest = found[1], found[2] or ""
        if name not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        return self._of(name, self.repos[name], rest, content, body)

    def _of(self, name: str, repo: Repo, rest: str, content: dict, body: bytes) -> tuple[int, dict[str, str], object]:
        if not rest or rest.startswith("/revision"):
            about = {"id": name, "sha": repo.sha, "private": repo.private, "tags": []}
            about["siblings"] = [{"rfilename": file} for file in repo.files]
            if "README.md" in repo.files:
                about["cardData"] = ModelCard(repo.files["README.md"].decode()).data.to_dict()
            return 200, {}, about
        if rest == "/tree/main":
            files = [{"type": "file", "path": path, "size": len(data), "oid": ""} for path, data in repo.files.items()]
            return 200, {}, files
        if rest == "/preupload/main":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in content["files"]
            ]
            return 200, {}, {"files": modes}
        if rest == "/info/lfs/objects/batch":
            objects = [
                one | {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}} for one in content["objects"]
            ]
            return 200, {}, {"transfer": "basic", "objects": objects}
        if rest == "/commit/main":
            return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        file = re.sub(r"^/resolve/[^/]+/", "", rest)
        if file not in repo.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
        return (
            200,
            {"ETag": f'"{hashlib.sha1(repo.files[file]).hexdigest()}"', "X-Repo-Commit": repo.sha},
            repo.files[file],
        )

    def _commit(self, name: str, repo: Repo, lines: list[dict]) -> tuple[int, dict[str, str], object]:
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.sha:
            return 412, {}, {"error": "A commit has happened since. Please refresh and try again."}
        for line in lines[1:]:
            value = line["value"]
            content = self.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            repo.files[value["path"]] = content
        repo.commits += 1
        url = f"{self.url}/{name}/commit/{repo.sha}"
        return 200, {}, {"commitUrl": url, "commitOid": repo.sha}


@contextmanager
def serving():
    """Serve a hub on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, headers, content = hub.answer(self.command, self.path.partition("?")[0], token, body)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = do  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
