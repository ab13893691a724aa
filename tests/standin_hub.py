"""A stand-in for the hub: as much of its HTTP interface as huggingface_hub's own client asks for to read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

COMMIT = "0" * 40

Run = Callable[..., subprocess.CompletedProcess[str]]  # ``optima`` with these arguments and environment


class StandInHub(ThreadingHTTPServer):
    """Serves on a free port of this machine; ``repos`` holds the files of each repository.

    Data sets are called ``datasets/owner/name``.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[StandInHub]:
    """A hub that answers."""
    with StandInHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def environment_of(hub: StandInHub, place: Path) -> dict[str, str]:
    """Of a process that takes ``hub`` for the hub, its cache in ``place``."""
    return os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(place / "home"),
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip


def command_with(hub: StandInHub, place: Path) -> Run:
    """The command line in ``place``, its cache there, in processes of their own: this one is offline for good."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = environment_of(hub, place) | settings
        command = [sys.executable, "-m", "optima", *arguments]
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)

    return run


def _repo(path: str) -> str:
    """Of an address of the interface: ``/api/models/owner/name/...``."""
    kind, repo = path.split("/")[2], "/".join(path.split("/")[3:5])
    return repo if kind == "models" else f"{kind}/{repo}"


def _listed(files: dict[str, bytes], names: Iterable[str]) -> list[dict[str, Any]]:
    """Files, and the directories among ``names``."""
    found: list[dict[str, Any]] = []
    for name in names:
        if name in files:
            oid = hashlib.sha1(files[name]).hexdigest()
            found.append({"type": "file", "path": name, "size": len(files[name]), "oid": oid})
        elif any(file.startswith(f"{name}/") for file in files):
            found.append({"type": "directory", "path": name, "oid": "0"})
    return found


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(("/api/models/", "/api/datasets/")):
            repo = _repo(path)
            files = self.server.repos.get(repo)
            if files is None:
                self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                below = path.partition("/tree/")[2].partition("/")[2]
                start = f"{below}/" if below else ""
                names = [name for name in files if name.startswith(start)]
                if "recursive=false" in self.path.lower():
                    names = list(dict.fromkeys(start + name.removeprefix(start).partition("/")[0] for name in names))
                self._answer(_listed(files, names)) if names else self._missing()
            else:
                siblings = [{"rfilename": name} for name in files]
                self._answer({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})
        elif "/resolve/" in path:
            repo, _, rest = path[1:].partition("/resolve/")
            self._file(self.server.repos.get(repo, {}).get(unquote(rest.partition("/")[2])))
        else:
            self._missing()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """Which of some paths there are: what ``datasets`` asks."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._answer(_listed(self.server.repos[_repo(self.path)], parse_qs(body).get("paths", [])))

    def _missing(self) -> None:
        self._answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _file(self, content: bytes | None) -> None:
        if content is None:
            self._missing()
        else:
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(number) if number else None for number in asked.groups()) if asked else (0, None)
            part = content[first : None if last is None else last + 1]
            if asked:
                headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            self._answer(part, 206 if asked else 200, headers)

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
