"""The page of a report, live: served on this machine alone, and made again when a run moves.

The server listens on 127.0.0.1. A random token in the URL keeps out other users of the machine, and
a check of the Host header keeps out pages of the web whose name resolves to this address (DNS
rebinding). Runs and stores are read and never written, and no lock of theirs is taken.
"""

import getpass
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from logitcask.engine.errors import ConfigError, LogitcaskError
from logitcask.engine.events import EventHandler
from logitcask.engine.report.page import page, report_json
from logitcask.engine.report.panels import Report
from logitcask.engine.report.watch import Watch

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost")
"""Names of the Host header. Any port: behind a tunnel it is the port of its other end."""
STATE = "Logitcask-State"
"""Header of an answer: `running`, `finished` or `stopped`, as of `run_state`."""
EVERY_S = 2.0
"""Seconds between two reports, and between two requests of a page."""
REST = 4
"""Times the seconds of a build that pass before the next: a run may need the processors itself."""
STOP_S = 0.1
"""Seconds between two looks for the end."""
JSON_PATH = "report.json"


class Answer(NamedTuple):
    """A report as it is sent."""

    report: Report
    body: bytes
    """Its JSON."""
    etag: str
    state: str


class LiveReport:
    """A report that is built again when its runs or stores have moved.

    That is every `every_s` at most, and less often where a build takes long.
    """

    def __init__(
        self,
        build: Callable[[], Report],
        watch: Watch,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Build the first report. Raises as `build`."""
        self._build, self._watch, self._every_s, self._clock = build, watch, every_s, clock
        self._lock = threading.Lock()
        """Of this process: requests come from several threads."""
        self._etag, self._took_s = "", 0.0
        self._answer = self._built()
        self._checked_at = clock()

    def answer(self) -> Answer:
        """Return the newest report. Raises as `build`, and builds again at the next call then."""
        with self._lock:
            now = self._clock()
            if now - self._checked_at >= max(self._every_s, REST * self._took_s) or not self._etag:
                self._checked_at, self._etag = now, ""
                if self._watch.state() != self._answer.etag:
                    self._answer = self._built()
                self._etag = self._answer.etag
            return self._answer

    def _built(self) -> Answer:
        # First, so that what moves while the report is built is seen at the next look.
        etag, begun_s = self._watch.state(), self._clock()
        report = self._build()
        self._etag, self._took_s = etag, self._clock() - begun_s
        body = report_json(report).encode()
        return Answer(report=report, body=body, etag=etag, state=self._watch.run_state())


@dataclass(frozen=True, slots=True)
class Served:
    """A server that has begun to listen."""

    url: str
    """With the token."""
    tunnel: str
    """Command for another machine; '' where this one has a screen."""


class Server(ThreadingHTTPServer):
    """A server with a thread for each request."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error of a request, but not that a browser closed its page meanwhile."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def serve(
    build: Callable[[], Report],
    places: Sequence[str | Path],
    *,
    stop: threading.Event,
    port: int = 0,
    every_s: float = EVERY_S,
    on_event: EventHandler = lambda line: None,
    on_start: Callable[[Served], None] = lambda served: None,
) -> None:
    """Serve the report that `build` returns until `stop` is set.

    places: the folders of runs and the stores that the report is about. port: 0 = a free one.
    every_s: seconds between two looks at them. Raises as `build` before the first page, and
    ConfigError where the port is not free.
    """
    live = LiveReport(build, Watch(places), every_s=every_s)
    token = secrets.token_urlsafe(24)
    handler = _handler(live, token, every_s)
    try:
        server = Server((ADDRESS, port), handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {ADDRESS}:{port}: {getattr(error, 'strerror', None) or error}",
            hint="give another --port, or none for a free one",
        ) from error
    number = server.server_address[1]
    served = Served(
        url=f"http://{ADDRESS}:{number}/?token={token}", tunnel=tunnel(number, os.environ)
    )
    thread = threading.Thread(
        target=server.serve_forever, args=(STOP_S,), name="logitcask-report", daemon=True
    )
    thread.start()
    try:
        on_event(f"live report: {served.url}")
        if served.tunnel:
            on_event(f"from your own machine first: {served.tunnel}")
        on_start(served)
        stop.wait()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def tunnel(port: int, environment: Any) -> str:
    if not (environment.get("SSH_CONNECTION") or environment.get("SSH_TTY")):
        return ""
    return f"ssh -L {port}:{ADDRESS}:{port} {getpass.getuser()}@{socket.gethostname()}"


def _handler(live: LiveReport, token: str, every_s: float) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET / and GET /report.json, with the token alone."""

        # A connection that is kept would be answered after the end of the server.
        protocol_version = "HTTP/1.0"
        server_version, sys_version = "logitcask", ""
        timeout = 60

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if (refused := self._refused(query)) is not None:
                self._send(*refused)
                return
            name = path.removeprefix("/")
            if name not in ("", JSON_PATH):
                self._send(
                    HTTPStatus.NOT_FOUND, b"there is only / and /report.json\n", "text/plain"
                )
                return
            try:
                answer = live.answer()
            except LogitcaskError as error:
                body = json.dumps({"error": error.cause, "hint": error.hint}).encode()
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, body, "application/json")
                return
            if name == "":
                text = page(answer.report, live=f"{JSON_PATH}?token={token}#{answer.etag}")
                self._send(HTTPStatus.OK, text.encode(), "text/html; charset=utf-8")
                return
            headers = {"ETag": f'"{answer.etag}"', STATE: answer.state}
            if self.headers.get("If-None-Match") == headers["ETag"]:
                self._send(HTTPStatus.NOT_MODIFIED, b"", "application/json", headers)
                return
            self._send(HTTPStatus.OK, answer.body, "application/json", headers)

        def _refused(self, query: str) -> tuple[HTTPStatus, bytes, str] | None:
            host = self.headers.get("Host", "").rsplit(":", 1)[0]
            if host not in HOSTS:
                text = f"this server answers to {' and '.join(HOSTS)} alone\n"
                return HTTPStatus.FORBIDDEN, text.encode(), "text/plain"
            given = parse_qs(query).get("token", [""])[0]
            if not hmac.compare_digest(given.encode(), token.encode()):
                text = "wrong or no token: open the URL that `logitcask report --serve` printed\n"
                return HTTPStatus.FORBIDDEN, text.encode(), "text/plain"
            return None

        def _send(
            self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            fixed = {
                "Content-Type": kind,
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
                # The page has its own policy, with a nonce; this part holds in headers alone.
                "Content-Security-Policy": "frame-ancestors 'none'",
            }
            for name, value in {**fixed, **(headers or {})}.items():
                self.send_header(name, value)
            if status != HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing: the lines would hold the token."""

    return Handler
