"""A local page to try trained models: `python -m scripts.serve`, then open the address that it prints.

    GET  /          the page, serve.html
    GET  /models    {"models": [{"tag": "d4", "steps": [100, 200]}, ...], "chosen": {"tag", "step"}, "sampling": {...}}
    POST /generate  {"prompt", "model_tag", "step", "max_tokens", "temperature", "top_k", "seed"}, all optional -> a line of JSON
                    for each event: {"waiting": 2}, {"token": {...}}, and at the end {"done": {...}} or {"error": "..."}

One text is generated at a time; other requests wait in the order in which they came. When the reader goes away, its text ends.
By default only this machine can connect.
"""

import json
import re
import socket
import sys
import traceback
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import list_steps, list_tags, runs_dir
from nanochat.cli.program import cli
from nanochat.common import UserError
from nanochat.serving import Busy, Generator, Request
from scripts.sample import ModelFlags, SamplingFlags

PAGE = Path(__file__).with_name("serve.html")
LARGEST_BODY = 2**20    # bytes of a request: far more than the context of a model here
LARGEST_DRAIN = 2**25   # bytes of a request that is too large which are read, so that its sender gets to see the answer
SILENCE = 30.0          # seconds that a client may take to send, or to receive, the next bytes
LOOPBACK_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Security-Policy":
           "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"}


@dataclass
class ServeFlags:
    """The page"""
    host: str = flag("127.0.0.1", "address to listen on; any but a loopback address lets other machines use the models")
    port: int = flag(8000, "port to listen on; 0 takes a free one", low=0, high=2**16 - 1)


class Refused(Exception):
    """A request that is answered by an HTTP status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def read_request(body: bytes, defaults: SamplingFlags) -> Request:
    """The body of POST /generate. Raises: UserError, one line that says what is wrong."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise UserError(f"the request is not JSON: {e}") from None
    names = [f.name for f in fields(SamplingFlags)]
    if not isinstance(values, dict):
        raise UserError("the request must be a JSON object")
    if unknown := [key for key in values if key not in ("prompt", "model_tag", "step", *names)]:
        raise UserError(f"unknown field {unknown[0][:50]!r}: there are prompt, model_tag, step, {', '.join(names)}")
    values = {key: value for key, value in values.items() if value is not None}
    if wrong := [key for key in values if key in names and isinstance(values[key], (bool, list, dict))]:
        raise UserError(f"{wrong[0]} must be a number")
    prompt, tag, step = values.get("prompt", ""), values.get("model_tag"), values.get("step")
    if not isinstance(prompt, str):
        raise UserError("prompt must be text")
    if tag is not None and tag not in list_tags(runs_dir()):
        raise UserError(f"there is no trained run {str(tag)[:50]!r}: reload the page")
    if step is not None and tag is None:
        raise UserError("a step is one of a run: give model_tag too")
    if step is not None and (type(step) is not int or step not in list_steps(runs_dir() / tag)):
        raise UserError(f"run {tag} has no checkpoint of step {str(step)[:50]!r}: reload the page")
    try:
        sampling, = parse([SamplingFlags], [f"--{name.replace('_', '-')}={values.get(name, getattr(defaults, name))}"
                                            for name in names])
    except UserError as e:
        raise UserError(" ".join(str(e).replace("--", "").split())) from None
    return Request(prompt, tag, step, sampling.kwargs())


class Handler(BaseHTTPRequestHandler):
    timeout = SILENCE
    disable_nagle_algorithm = True  # or small lines would be held back
    error_content_type, error_message_format = "text/plain; charset=utf-8", "%(message)s\n"

    def do_GET(self) -> None:
        self._answer({"/": self._page, "/models": self._models})

    def do_POST(self) -> None:
        self._answer({"/generate": self._generate})

    def _answer(self, places: dict) -> None:
        self.started = False
        try:
            self._check_sender()
            if (path := self.path.partition("?")[0]) not in places:
                raise Refused(404, f"there is nothing at {path[:50]}")
            places[path]()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the reader has gone
        except Refused as e:
            self._fail(e.status, str(e))
        except UserError as e:
            self._fail(503 if isinstance(e, Busy) else 400, str(e))
        except Exception as e:
            traceback.print_exc()
            self._fail(500, f"internal error, see the terminal: {type(e).__name__}")

    def _check_sender(self) -> None:
        """A page of another site must not reach this one through the reader's browser: neither under a name of its own that
        leads here (DNS rebinding), nor by a request across sites."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.is_loopback and not LOOPBACK_HOST.fullmatch(host):
            raise Refused(403, "this page is for this machine only: open it as 127.0.0.1 or localhost")
        if origin is not None and origin.partition("//")[2] != host:
            raise Refused(403, "requests from other pages are not answered")

    def _page(self) -> None:
        self._send(200, "text/html", PAGE.read_bytes())

    def _models(self) -> None:
        generator = self.server.generator
        models = [{"tag": tag, "steps": list_steps(runs_dir() / tag)} for tag in reversed(list_tags(runs_dir()))]
        self._send(200, "application/json", json.dumps({
            "models": models, "chosen": {"tag": generator.tag, "step": generator.step},
            "sampling": asdict(self.server.sampling)}).encode())

    def _generate(self) -> None:
        with closing(self.server.generator.events(read_request(self._body(), self.server.sampling))) as events:
            for event in events:
                if not self.started:  # not before: what is wrong with the request is found on the way to the first event
                    self._send(200, "application/x-ndjson")
                self._line(event)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", length):
            raise Refused(411, "the request must say its length (Content-Length)")
        if int(length) > LARGEST_BODY:
            for _ in range(min(int(length), LARGEST_DRAIN) // 2**16):
                self.rfile.read(2**16)
            raise Refused(413, f"the request has {int(length):,} bytes, more than {LARGEST_BODY:,}")
        return self.rfile.read(int(length))

    def _line(self, event: dict) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def _fail(self, status: int, message: str) -> None:
        try:
            if self.started:
                self._line({"error": message})
            else:
                self._send(status, "text/plain", f"{message}\n".encode(errors="replace"))
        except OSError:
            pass  # nobody reads it any more

    def _send(self, status: int, kind: str, content: bytes | None = None) -> None:
        """A whole answer, or its head: without `content` lines follow, and the end of the connection ends them."""
        self.started = True
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **HEADERS}.items():
            self.send_header(name, value)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content or b"")

    def version_string(self) -> str:
        return "nanochat"

    def log_message(self, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Listens from the start; answers once `generator` is set and `serve_forever` is called. Raises: UserError."""
    daemon_threads = True

    def __init__(self, flags: ServeFlags, sampling: SamplingFlags):
        self.address_family = socket.AF_INET6 if ":" in flags.host else socket.AF_INET
        self.sampling = sampling
        self.generator: Generator | None = None
        try:
            super().__init__((flags.host, flags.port), Handler)
        except (OSError, UnicodeError) as e:
            raise UserError(f"cannot listen on --host {flags.host} --port {flags.port}: {getattr(e, 'strerror', None) or e}. "
                            "Choose another") from None
        address, self.port = self.server_address[:2]
        self.is_loopback = ip_address(address).is_loopback
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{self.port}/"

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def main(argv: list[str] | None = None) -> int:
    serving, model_flags, sampling = parse([ServeFlags, ModelFlags, SamplingFlags], argv, prog="python -m scripts.serve",
                                           description="Try trained models on a local web page.")
    with Server(serving, sampling) as server:
        if not server.is_loopback:
            print(f"warning: --host {serving.host} lets everyone who can reach this machine use its models; there is no password",
                  file=sys.stderr)
        server.generator = Generator(lambda tag, step: replace(model_flags, model_tag=tag, step=step).load()[:3],
                                     model_flags.model_tag, model_flags.step)
        print(f"{server.generator.tag}, step {server.generator.step}: open {server.url}    (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli(main)
