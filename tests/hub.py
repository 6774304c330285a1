"""A stand-in for the API of the Hugging Face hub: repositories in memory, behind loopback."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """What was uploaded.

    Attributes:
        url: where it listens, for ``HF_ENDPOINT``.
        token: the token that may write.
        files: repository -> path -> content.
        commits: repository -> id of its last commit.
        private: whether each repository was created private.

    """

    url: str = ""
    token: str = "secret"
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that listens until the end of the block."""
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in the listing of a repository."""
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: Any, status: int = 200, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer({"error": "who are you?"}, 401)
            elif self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
                hub.files.setdefault(repo, {})
                is_private = asked.get("private") or asked.get("visibility") == "private"
                hub.private.setdefault(repo, bool(is_private))
                self.answer({"url": f"{hub.url}/{repo}", "id": repo, "name": repo})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                kept = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": one["path"], **kept} for one in files]})
            elif "/commit/" in self.path:
                repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                lines = [json.loads(line) for line in body.splitlines()]
                for line in lines:
                    if line["key"] == "file":
                        value = line["value"]
                        hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                hub.commits[repo] = hashlib.sha1(body).hexdigest()
                self.answer(
                    {
                        "success": True,
                        "commitOid": hub.commits[repo],
                        "commitUrl": f"{hub.url}/{repo}/commit/{hub.commits[repo]}",
                    }
                )
            else:
                self.answer({"error": self.path}, 404)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/"):
                organisation, name, asked, revision = (*path.split("/"), "revision", "main")[3:7]
                repo = f"{organisation}/{name}"
                if repo not in hub.files or revision not in ("main", hub.commits[repo]):
                    self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
                elif asked == "tree":
                    self.answer([entry(*file) for file in hub.files[repo].items()])
                else:
                    names = [{"rfilename": name} for name in hub.files[repo]]
                    self.answer({"id": repo, "sha": hub.commits[repo], "siblings": names})
                return
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            content = hub.files.get(repo, {}).get(rest.partition("/")[2])
            if content is None:
                self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
                return
            etag = hashlib.sha1(content).hexdigest()
            self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=hub.commits[repo])

        do_HEAD = do_GET

    return Handler
