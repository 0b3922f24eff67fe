"""HTTP requests to one server, and the meaning of each fault.

A fault is Transient if a retry is likely to help. Every other fault is raised as it is and never
retried: the operator or the caller must change something.
"""

import base64
import json
import re
import time
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

import aiohttp

from logitcask.engine.backends.server.budget import Limits
from logitcask.engine.backends.server.protocol import error_message
from logitcask.engine.errors import ConfigError, ServerError

KEEP_ALIVE_S = 4.0
"""Uvicorn closes a connection that was idle for 5 s; a request sent on it would be lost."""
BUSY = (429, 503)
UNHEALTHY = (500, 502, 503, 504)
"""Also the answers of a server, or a proxy, for an engine that is dead or still loads."""
TRANSIENT = (408, 425, 429, *UNHEALTHY)
MOST_MESSAGE = 400
ERROR_BYTES = 1 << 16

HINTS = {
    401: "give the server's key in LOGITCASK_API_KEY or with --api-key-file",
    403: "check the permissions of the key, and the server's flags (--enable-scale-out for "
    "/inference/v1/generate)",
    404: "check the URL and --served; vLLM before 0.31 lacks required endpoints",
}


class Transient(Exception):
    """A fault that a retry may solve."""

    def __init__(
        self,
        what: str,
        *,
        lost: bool = False,
        late: bool = False,
        status: int = 0,
        after_s: float = 0.0,
    ) -> None:
        super().__init__(what)
        self.lost = lost
        """The connection is lost, and the server may be too."""
        self.late = late
        """Timeout."""
        self.busy = status in BUSY
        """The server accepts no more requests now; the request itself is correct."""
        self.unhealthy = status in UNHEALTHY
        self.after_s = after_s
        """Pause in the server's Retry-After."""


class ServerClient:
    """A session with one server. Made and used within one event loop."""

    def __init__(self, url: str, key: str | None, limits: Limits) -> None:
        """Check URL and key.

        Raises ConfigError for an invalid URL, a URL with a secret, or a key that is not valid in
        an HTTP header.
        """
        self.url = normalize_url(url)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise ConfigError(
                f"the API key of {self.url} has characters that are not valid in a header",
                hint="give the key only, without newline or spaces around it",
            )
        self._key, self._limits = key, limits
        self._echo = None if key is None else re.compile("|".join(map(re.escape, _forms(key))))
        self._session: aiohttp.ClientSession | None = None
        self.in_flight = 0
        """Requests of the pool to this server."""
        self.names: set[str] = set()
        """Valid model names in its answers, from its last /v1/models."""
        self.received = 0
        """Bytes of all answers."""
        self._has_health = False
        self._unhealthy_s = 0.0
        """Monotonic time of the last failed health check."""
        self.healthy = True
        self.checked_s = 0.0
        """Monotonic time of the last check while it was unavailable."""

    async def close(self) -> None:
        """Close the session."""
        if self._session is not None:
            await self._session.close()

    async def post(self, path: str, body: Any, *, most: int, expected: int, tokens: int) -> bytes:
        """Send a POST request and return the bytes of the answer.

        body: an object for JSON, or JSON bytes; most, expected: bytes of the answer; tokens:
        number of tokens that the server must process. Raises Transient, or ServerError for a
        rejected request.
        """
        limits = self._limits
        read_s = limits.read_s + expected / limits.bytes_per_s + tokens / limits.tokens_per_s
        return await self._exchange("POST", path, body, most, read_s)

    async def get(self, path: str, within_s: float = 0.0) -> Any:
        """Return a small JSON answer, None if it is empty, and an error object for another text.

        within_s: 0 = the connect timeout.
        """
        limit_s = within_s or self._limits.connect_s
        data = await self._exchange("GET", path, None, 1 << 20, limit_s)
        try:
            return json.loads(data) if data.strip() else None
        except (ValueError, RecursionError):
            return {"error": error_message(data)}

    async def check_health(self) -> None:
        """Raise Transient for a server that is not healthy."""
        try:
            await self.get("/health", self._limits.health_s)
        except ServerError as rejection:
            # A hosted endpoint may have no /health: any answer is enough. If it had one before,
            # the answer comes from a proxy that lost its server.
            if self._has_health:
                raise Transient(rejection.cause, lost=True) from None
            return
        self._has_health = True

    async def is_healthy(self) -> bool:
        """Return the result of a health check."""
        try:
            await self.check_health()
        except Transient:
            self._unhealthy_s = time.monotonic()
            return False
        return True

    async def _exchange(self, method: str, path: str, body: Any, most: int, read_s: float) -> bytes:
        sent_s = time.monotonic()
        try:
            return await self._once(method, path, body, most, read_s)
        except RequestRejected as rejection:
            # A proxy that has lost its server answers 404. The server may be back by now, so a
            # failed health check of another request since then counts too.
            if rejection.status != 404 or path == "/health":
                raise
            if await self.is_healthy() and self._unhealthy_s < sent_s:
                raise
            raise Transient(rejection.cause, lost=True) from None

    async def _once(self, method: str, path: str, body: Any, most: int, read_s: float) -> bytes:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        timeout = aiohttp.ClientTimeout(
            total=read_s, sock_connect=self._limits.connect_s, connect=self._limits.connect_s
        )
        try:
            async with self._open().request(
                method,
                self.url + path,
                data=body,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                data = await read_bounded(response, most if response.status == 200 else ERROR_BYTES)
                self.received += len(data)
                if response.status != 200:
                    self._raise_rejected(response, path, data)
                return data
        except RequestRejected:
            raise  # it is an OSError, like the errors below
        except aiohttp.ConnectionTimeoutError as error:
            raise Transient("no connection in time", lost=True) from error
        except TimeoutError as error:
            raise Transient(f"no answer within {read_s:.0f} s", late=True) from error
        except aiohttp.ClientSSLError as error:
            raise RequestRejected(
                f"{self.url}: no secure connection: {error}",
                hint="give a URL with a certificate that this machine trusts "
                "(SSL_CERT_FILE adds one)",
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            # An HTTP parse error quotes the answer, with the key if the server repeats it.
            text = self.one_line(f"{type(error).__name__}: {error}")
            raise Transient(text, lost=True) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def redact(self, text: str) -> str:
        """Remove the key from a text, also in the forms in which a server may repeat it."""
        return text if self._echo is None else self._echo.sub("(key)", text)

    def one_line(self, text: str) -> str:
        """Redact a text, then shorten it: the other order could leave a part of the key."""
        return self.redact(" ".join(text.split()))[:MOST_MESSAGE]

    def _raise_rejected(self, response: aiohttp.ClientResponse, path: str, data: bytes) -> NoReturn:
        status = response.status
        moved = 300 <= status < 400 and redirect_target(response.headers.get("Location", ""))
        text = self.one_line(f"it has moved to {moved}" if moved else error_message(data))
        what = f"{self.url}{path} answers {status}: {text}"
        if status in TRANSIENT:
            raise Transient(
                what, status=status, after_s=retry_after_s(response.headers.get("Retry-After", ""))
            )
        hint = "check the server and the request (`logitcask doctor teacher`)"
        if moved:
            hint = "give the new address: redirects are not followed with a key"
        raise RequestRejected(what, hint=HINTS.get(status, hint), status=status)


class RequestRejected(ServerError):
    """A rejected request, with its HTTP status."""

    def __init__(self, cause: str, *, hint: str, status: int = 0) -> None:
        super().__init__(cause, hint=hint)
        self.status = status


def _forms(key: str) -> list[str]:
    """Return the key as text, escaped, URL-encoded, hexadecimal and in base64, longest first."""
    data = key.encode()
    found = {repr(key)[1:-1], json.dumps(key)[1:-1], data.hex()}
    for quoted in (quote(key), quote(key, safe="")):
        found |= {quoted, re.sub("%..", lambda escape: escape[0].lower(), quoted)}
    for shift in range(3):
        # Within the base64 of a longer text: without the characters that depend on its other bytes.
        encoded = base64.b64encode(bytes(shift) + data).decode()
        inner = encoded[(0, 2, 3)[shift] : (shift + len(data)) * 8 // 6]
        found |= {inner, inner.translate(str.maketrans("+/", "-_"))}
    return sorted({key, *(each for each in found if len(each) > 5)}, key=len, reverse=True)


async def read_bounded(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Read the body; Transient for more than `most` bytes."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        parts.append(part)
        size += len(part)
        if size > most:
            response.close()
            raise Transient(f"an answer of more than {most} bytes")
    return b"".join(parts)


def redirect_target(location: str) -> str:
    """Return the target of a redirect without parts that may hold a secret."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def retry_after_s(text: str) -> float:
    """Return the seconds of a Retry-After header; 0 for a date or an invalid text."""
    return float(text) if text.isascii() and text.isdecimal() else 0.0


def normalize_url(url: str) -> str:
    """Return the URL without a trailing / or /v1; ConfigError for an invalid one."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # unclosed brackets, an invalid port
        sound = False
    if not sound:
        # A part of the URL may be a password, so only the scheme is shown.
        raise ConfigError(
            f"{url.partition(':')[0][:16]}:... is not a server's URL", hint="give http://HOST:PORT"
        )
    # urlsplit reports no query, fragment or user for an empty one, hence the search.
    if set(url) & set("@?#"):
        raise ConfigError(
            f"the URL of {parts.hostname} holds more than scheme, host, port and path",
            hint="give the key in LOGITCASK_API_KEY or with --api-key-file, never in a URL",
        )
    # The base URL of OpenAI clients ends in /v1.
    return url.rstrip("/").removesuffix("/v1")
