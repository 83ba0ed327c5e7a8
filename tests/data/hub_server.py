"""A small Hugging Face hub on loopback: serves the datasets of a folder as far as `datasets` and `huggingface_hub` ask.

Written after the requests that these clients send. A dataset is a folder `owner/name` of files. Trouble is made on purpose:
`drops` closes the connection in the middle of a file, `hangs` never answers, `gated` asks for a log-in.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "cafe"  # one for all: nothing here changes
REPOSITORY = r"/datasets/(?P<repo>[^/]+/[^/]+)"
ROUTES = [(re.compile(pattern), name) for pattern, name in (
    (rf"/api{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "describe"),
    (rf"/api{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    (rf"/api{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)]


class Hub(ThreadingHTTPServer):
    """Serves `folder` until `close()`; `endpoint` is for HF_ENDPOINT.

    drops: by a file's path in its dataset, for each request whether the connection is closed half-way (an iterator).
    hangs: what is never answered, as beginnings of paths.
    gated: datasets whose files need a log-in.
    requests: what was asked, one line each.
    """

    daemon_threads = True  # one that hangs does not keep the tests from ending

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.endpoint = folder, f"http://127.0.0.1:{self.server_port}"
        self.drops, self.hangs, self.gated, self.requests = {}, set(), set(), []
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news: those that read only part of a file do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if url.path.startswith(tuple(self.server.hangs)):
            self.server.closing.wait()
            self.close_connection = True
            return
        for pattern, name in ROUTES:
            if match := pattern.fullmatch(unquote(url.path)):
                parts = match.groupdict()
                repo = self.server.folder / parts.pop("repo")
                if not repo.is_dir():
                    return self._missing("RepoNotFound")
                if parts.pop("revision") not in (None, "main", COMMIT):
                    return self._missing("RevisionNotFound")
                return getattr(self, f"_{name}")(repo, **parts)
        return self._missing()

    do_HEAD = do_POST = do_GET

    def _describe(self, repo: Path):
        files = [dict(rfilename=p.relative_to(repo).as_posix()) for p in sorted(repo.rglob("*")) if p.is_file()]
        self._json(dict(_id="0" * 24, id=f"{repo.parent.name}/{repo.name}", sha=COMMIT, private=False, gated=False,
                        disabled=False, downloads=0, likes=0, tags=[], siblings=files))

    def _tree(self, repo: Path, path: str | None):
        folder = repo / (path or "")
        if not folder.is_dir():
            return self._missing("EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
        self._json([_entry(repo, p) for p in sorted(folder.rglob("*") if recursive else folder.iterdir())])

    def _paths_info(self, repo: Path):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        paths = parse_qs(body).get("paths", []) if form else json.loads(body)["paths"]
        self._json([_entry(repo, repo / path) for path in paths if path and (repo / path).exists()])

    def _resolve(self, repo: Path, path: str):
        if f"{repo.parent.name}/{repo.name}" in self.server.gated:
            return self._answer(401, b'{"error": "log in"}', {"X-Error-Code": "GatedRepo"})
        if not (repo / path).is_file():
            return self._missing("EntryNotFound")
        content = (repo / path).read_bytes()
        begin, end, status = 0, len(content), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, status = int(wanted[1]), 206
            end = min(int(wanted[2]) + 1, end) if wanted[2] else end
            if begin >= len(content):
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        drop = self.command == "GET" and next(self.server.drops.get(path, iter(())), False)
        headers = {"ETag": f'"{_digest(repo / path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self._answer(status, content[begin:end], headers, half=drop)

    def _missing(self, code: str = ""):
        self._answer(404, b'{"error": "not here"}', {"X-Error-Code": code} if code else {})

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict, half: bool = False):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:len(content) // 2] if half else content)
        self.close_connection |= half

    def log_message(self, *args) -> None:
        """Not to the terminal of the tests: `Hub.requests` has it."""


def _entry(repo: Path, path: Path) -> dict:
    entry = dict(path=path.relative_to(repo).as_posix(), oid=_digest(path))
    return entry | (dict(type="directory", size=0) if path.is_dir() else dict(type="file", size=path.stat().st_size))


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes() if path.is_file() else path.name.encode()).hexdigest()
