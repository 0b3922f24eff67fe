"""The teacher behind a tap: requests of its own to it, and others that pass unchanged."""

import hashlib
import hmac
import json
import os
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from logitcask.engine.backends.server.client import Transient, read_bounded
from logitcask.engine.backends.server.protocol import COMPLETIONS, RequestBody, parse
from logitcask.engine.errors import ServerError
from logitcask.engine.tap.forms import START
from logitcask.engine.tap.teacher import Identity, Probe
from logitcask.engine.types import Array

HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
    *("te", "trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect"),
}
"""Headers of one connection, which a proxy does not pass on."""
OWN = {START.lower()}
MOST_ERROR = 1 << 20
KEEP_ALIVE_S = 4.0
"""Servers close a connection that was idle for 5 s."""
CONNECT_S = 10.0
SAME = 1e-3
"""Probability by which two answers of a server may differ that ignores the temperature."""


class Rejected(Exception):
    """An answer of the teacher that is not 200, to be passed on."""

    def __init__(self, status: int, body: bytes, content_type: str) -> None:
        super().__init__(status)
        self.status, self.body, self.content_type = status, body, content_type

    def response(self) -> web.Response:
        """Return it as the tap's own answer."""
        headers = {"Content-Type": self.content_type}
        return web.Response(status=self.status, body=self.body, headers=headers)


def rejected(status: int, message: str) -> Rejected:
    """Return an error of the tap itself, in the form of vLLM's errors."""
    body = {"error": {"message": f"logitcask tap: {message}", "type": "tap", "code": status}}
    return Rejected(status, json.dumps(body).encode(), "application/json")


class Upstream:
    """A session with the teacher's server. Its methods run in one event loop."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url, self._key = url, key
        self._salt = os.urandom(32)
        self._accepted: set[bytes] = set()
        """Salted hashes of keys that the teacher accepts; a key itself is never kept."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called when a request finds no server."""
        self._http: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._http

    async def close(self) -> None:
        """Close the session."""
        if self._http is not None:
            await self._http.close()

    async def ask(
        self, method: str, path: str, body: Any, headers: dict[str, str], most: int
    ) -> bytes:
        """Return the body of an answer with the status 200. Raises Rejected for any other."""
        try:
            async with self._open().request(
                method,
                self.url + path,
                json=body,
                headers={**headers, "Accept-Encoding": "identity"},
                allow_redirects=False,
            ) as response:
                status = response.status
                data = await read_bounded(response, most if status == 200 else MOST_ERROR)
                if status != 200:
                    kind = response.headers.get("Content-Type", "application/json")
                    raise Rejected(status, data, kind)
                return data
        except Transient as fault:
            raise rejected(502, str(fault)) from fault
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.on_lost()
            raise rejected(
                503,
                f"the teacher does not answer ({type(error).__name__}), and these ids are not "
                "recorded",
            ) from None

    async def forward(
        self, request: web.Request, path: str, raw: bytes | None
    ) -> web.StreamResponse:
        """Pass a request and its answer on as they are, in pieces."""
        headers = [
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in HOP | OWN
        ]
        data: Any = raw
        if raw is None and request.can_read_body:
            data = await request.read()
        query = f"?{request.query_string}" if request.query_string else ""
        try:
            async with self._open().request(
                request.method,
                self.url + path + query,
                data=data,
                headers=headers,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                allow_redirects=False,
            ) as answer:
                response = web.StreamResponse(status=answer.status, reason=answer.reason)
                for name, value in answer.headers.items():
                    if name.lower() not in HOP:
                        response.headers.add(name, value)
                response.content_length = answer.content_length
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    await response.write(part)
                await response.write_eof()
                return response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.on_lost()
            what = f"the teacher does not answer ({type(error).__name__})"
            return rejected(502, what).response()

    async def check_key(self, request: web.Request, identity: Identity) -> None:
        """Raise Rejected for a client whose key the teacher does not accept."""
        if not identity.has_key:
            return
        sent = request.headers.get("Authorization", "")
        own = self._key
        if own is not None and hmac.compare_digest(sent.encode(), f"Bearer {own}".encode()):
            return
        mark = hashlib.blake2b(sent.encode(), key=self._salt).digest()
        if mark in self._accepted:
            return
        headers = {"Authorization": sent} if sent else {}
        await self.ask("GET", "/v1/models", None, headers, MOST_ERROR)
        if len(self._accepted) < 1024:
            self._accepted.add(mark)

    async def details(self, probe: Probe) -> dict[str, Any]:
        """Return what an identity has besides its fingerprint.

        Raises ServerError without an answer, AnswerError for an invalid one.
        """
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            data = await self.ask("GET", "/v1/models", None, headers, MOST_ERROR)
            models = dict(parse(data))
            temperatures = [await self._at(probe, headers, models, each) for each in (1.0, 2.0)]
        except Rejected as error:
            text = error.body[:200].decode("utf-8", "replace")
            raise ServerError(
                f"{self.url} answers {error.status}: {text}", hint="look at the server's log"
            ) from None
        has_key = False
        if self._key is not None:
            try:
                await self.ask("GET", "/v1/models", None, {}, MOST_ERROR)
            except Rejected:
                has_key = True
        tempered = bool(np.abs(temperatures[0] - temperatures[1]).max() > SAME)
        return {"models": models, "tempered": tempered, "has_key": has_key}

    async def _at(
        self, probe: Probe, headers: dict[str, str], models: Any, temperature: float
    ) -> Array:
        """Return the probabilities of some tokens in answers at a temperature."""
        ids, path = list(range(min(8, probe.model.n_vocab))), probe.info.path
        body = RequestBody(ids=ids, rows=len(ids) - 1, k=1)
        sent = body.to_json(path, probe.info.served)
        (sent if path == COMPLETIONS else sent["sampling_params"])["temperature"] = temperature
        data = await self.ask("POST", path, sent, headers, body.most_bytes(path))
        found: Array = body.read(path, {probe.info.served, *_names(models)}, data).lp
        return np.exp(found)


def _names(models: Any) -> set[str]:
    cards = models.get("data", []) if isinstance(models, dict) else []
    return {each["id"] for each in cards if isinstance(each, dict) and "id" in each}
