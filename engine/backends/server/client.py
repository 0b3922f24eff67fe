"""One server: one HTTP exchange at a time, and what each of its faults means.

A fault is Transient (asked again is likely to help) or it is raised as it is: what a server refuses
for good is its operator's or the caller's to mend, and is never asked twice.
"""

import json
import time
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp

from logitcask.engine.backends.server.budget import Limits
from logitcask.engine.errors import ConfigError, ServerError

KEEP_ALIVE_S = 4.0
"""Uvicorn closes a connection that was idle for 5 s, and who then uses it loses the request."""
BUSY = (429, 503)
ILL = (500, 502, 503, 504)
"""So a server, or a proxy before it, answers for an engine that is dead or still loads too."""
TRANSIENT = (408, 425, 429, *ILL)
MOST_MESSAGE = 400
ERROR_BYTES = 1 << 16

HINTS = {
    401: "Give the server's key in LOGITCASK_API_KEY or with --api-key-file.",
    403: "The key may not do this, or the server lacks a flag (--enable-scale-out for "
    "/inference/v1/generate).",
    404: "Check the URL and --served; vLLM older than 0.31 lacks endpoints that are needed.",
}


class Transient(Exception):
    """A fault that asking again may mend."""

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
        """The connection is gone, and the server may be too."""
        self.late = late
        """No answer came in time."""
        self.busy = status in BUSY
        """It takes no more now: nothing is wrong with the request."""
        self.ill = status in ILL
        self.after_s = after_s
        """The server asked for so long a pause."""


class ServerClient:
    """A session with one server. Made and used within one event loop."""

    def __init__(self, url: str, key: str | None, limits: Limits) -> None:
        """Raises ConfigError for a URL that is none, or that holds a secret, and for a key that no
        header can hold."""
        self.url = checked(url)
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise ConfigError(
                f"the API key of {self.url} has characters that no header can hold",
                hint="Give the key alone, without a line's end or spaces around it.",
            )
        self._key, self._limits = key, limits
        self._session: aiohttp.ClientSession | None = None
        self.in_flight = 0
        """Questions that the fleet has for it."""
        self.names: set[str] = set()
        """What it may call the model in its answers, as it said when it was last looked at."""
        self.received = 0
        """Bytes of answers."""
        self._has_health = False
        self._ill_s = 0.0
        """When it was last found to be so, monotonic."""
        self.up = True
        self.looked_s = 0.0
        """When it was last looked at while it was away, monotonic."""

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, path: str, body: Any, *, most: int, expected: int, tokens: int) -> bytes:
        """The bytes of an answer. body: as JSON takes it, or already JSON; most, expected: bytes of
        the answer; tokens: that the server must read.

        Raises Transient, or ServerError for what it refuses.
        """
        limits = self._limits
        read_s = limits.read_s + expected / limits.bytes_per_s + tokens / limits.tokens_per_s
        return await self._exchange("POST", path, body, most, read_s)

    async def get(self, path: str, within_s: float = 0.0) -> Any:
        """A small JSON answer; None where it is empty. within_s: 0 = as long as a connection."""
        limit_s = within_s or self._limits.connect_s
        data = await self._exchange("GET", path, None, 1 << 20, limit_s)
        try:
            return json.loads(data) if data.strip() else None
        except (ValueError, RecursionError):
            return None

    async def look(self) -> None:
        """Raises Transient where it is not well."""
        try:
            await self.get("/health", self._limits.health_s)
        except ServerError as refusal:
            # A hosted endpoint may have no such path; that it answers is what was asked. Where it
            # once had one, what answers now is a proxy.
            if self._has_health:
                raise Transient(refusal.cause, lost=True) from None
            return
        self._has_health = True

    async def healthy(self) -> bool:
        try:
            await self.look()
        except Transient:
            self._ill_s = time.monotonic()
            return False
        return True

    async def _exchange(self, method: str, path: str, body: Any, most: int, read_s: float) -> bytes:
        asked_s = time.monotonic()
        try:
            return await self._once(method, path, body, most, read_s)
        except Refused as refusal:
            # A proxy that has lost its server says that there is nothing here; and may have it
            # back by now, where another found it ill since this was asked.
            if refusal.status != 404 or path == "/health":
                raise
            if await self.healthy() and self._ill_s < asked_s:
                raise
            raise Transient(refusal.cause, lost=True) from None

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
                data = await bounded(response, most if response.status == 200 else ERROR_BYTES)
                self.received += len(data)
                if response.status != 200:
                    self._refused(response, path, data)
                return data
        except Refused:
            raise  # an OSError, as those below are
        except aiohttp.ConnectionTimeoutError as error:
            raise Transient("no connection in time", lost=True) from error
        except TimeoutError as error:
            raise Transient(f"no answer within {read_s:.0f} s", late=True) from error
        except aiohttp.ClientSSLError as error:
            raise Refused(
                f"{self.url}: no secure connection: {error}",
                hint="Give a URL whose certificate this machine trusts (SSL_CERT_FILE adds one).",
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            # What is no HTTP is quoted in it, the key too where a server repeats what it was sent.
            said = self._redacted(f"{type(error).__name__}: {error}")
            raise Transient(said, lost=True) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def hidden(self, said: str) -> str:
        """Without the key, also as repr writes it."""
        if self._key is None:
            return said
        return said.replace(self._key, "(key)").replace(repr(self._key)[1:-1], "(key)")

    def _redacted(self, said: str) -> str:
        """One line, without the key, of which a part could be left if the line were cut first."""
        return self.hidden(" ".join(said.split()))[:MOST_MESSAGE]

    def _refused(self, response: aiohttp.ClientResponse, path: str, data: bytes) -> NoReturn:
        status = response.status
        moved = 300 <= status < 400 and pointed(response.headers.get("Location", ""))
        said = self._redacted(f"it has moved to {moved}" if moved else message(data))
        what = f"{self.url}{path} answers {status}: {said}"
        if status in TRANSIENT:
            raise Transient(
                what, status=status, after_s=seconds(response.headers.get("Retry-After", ""))
            )
        hint = "Check the server and what it is asked (`logitcask doctor teacher`)."
        if moved:
            hint = "Give the address where it is: redirects are not followed with a key."
        raise Refused(what, hint=HINTS.get(status, hint), status=status)


class Refused(ServerError):
    """A refusal, with its HTTP status."""

    def __init__(self, cause: str, *, hint: str, status: int = 0) -> None:
        super().__init__(cause, hint=hint)
        self.status = status


async def bounded(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body, of which more than `most` bytes are not read."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        parts.append(part)
        size += len(part)
        if size > most:
            response.close()
            raise Transient(f"an answer of more than {most} bytes")
    return b"".join(parts)


def message(data: bytes) -> str:
    """What an error's body says: vLLM's object, a plain string in its place, or any text."""
    text = data.decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    if isinstance(said, dict):
        said = said.get("error", said.get("message", said.get("detail", said)))
    if isinstance(said, dict):
        said = said.get("message", said)
    return str(said)


def pointed(location: str) -> str:
    """Where a redirect points, without what may be a secret in it."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return ""
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def seconds(text: str) -> float:
    """Of a Retry-After header; 0 for a date or nonsense, which the back-off then covers."""
    return float(text) if text.isascii() and text.isdecimal() else 0.0


def checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        sound = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number or too large
        sound = False
    if not sound:
        # A part of it may be a password.
        raise ConfigError(
            f"{url.partition(':')[0][:16]}:... is no server's URL", hint="Give http://HOST:PORT."
        )
    # An empty query or fragment, or an @ with nothing before it, is none to urlsplit.
    if set(url) & set("@?#"):
        raise ConfigError(
            f"the URL of {parts.hostname} holds more than scheme, host, port and path",
            hint="Give the key in LOGITCASK_API_KEY or with --api-key-file, never in a URL.",
        )
    # Who has the OpenAI form at hand gives /v1 with it.
    return url.rstrip("/").removesuffix("/v1")
