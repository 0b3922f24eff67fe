"""One server: rejected URLs and keys, and error messages without secrets."""

import asyncio
import base64
import json
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web

from logitcask.engine.backends.server import ServerScorer
from logitcask.engine.backends.server.client import (
    MOST_MESSAGE,
    ServerClient,
    error_message,
    redirect_target,
    retry_after_s,
)
from logitcask.engine.errors import AnswerError, ConfigError, LogitcaskError, ServerError
from logitcask.engine.teachers.remote import urls_of
from logitcask.engine.types import Rollouts, ScoreParams
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer

PARAMS = ScoreParams(k_min=3, k_max=12)
KEY = "sk-canary-5f3a"
Connect = Callable[..., ServerScorer]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"object": "error", "message": "old"}', "old"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html><p class=x>bad &amp; gateway</html>", "  bad & gateway "),
        (b'{"detail": [{"loc": 1}]}', '{"detail": [{"loc": 1}]}'),
        (b'{"error": ' * 5_000, '{"error": ' * 5_000),
        (b"\xff[[", "�[["),
        (b"", ""),
    ],
)
def test_the_message_of_an_error_is_read_in_each_format(body: bytes, message: str) -> None:
    assert error_message(body) == message


def test_a_truncated_message_shows_no_part_of_the_key(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, key=KEY)
    for cut in range(3, len(KEY) + 1):
        fake.faults = [text(400, "x" * (MOST_MESSAGE - cut) + KEY)] * 100
        with pytest.raises(ServerError, match="answers 400: xxx") as caught:
            server.score(rolled, PARAMS)
        assert KEY[:3] not in caught.value.cause


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ('{"error": {"message": "engine is dead"}}', "with an error: engine is dead"),
        ('{"object": "error", "message": "over quota"}', "with an error: over quota"),
        ("<html><h1>Sign in</h1> first</html>", "that are not complete JSON: Sign in first"),
        ("x" * 10_000, "that are not complete JSON: xxx"),
    ],
)
def test_an_error_with_status_200_is_shown_in_the_servers_own_words(
    fake: FakeServer, connect: Connect, rolled: Rollouts, answer: str, words: str
) -> None:
    server = connect(fake, key=KEY)
    fake.faults = [text(200, answer)] * 100
    with pytest.raises(AnswerError, match=words) as caught:
        server.score(rolled, PARAMS)
    assert len(caught.value.cause) < 600


@pytest.mark.parametrize("key", [KEY, "a/b+c?d=e&f~1", "abc"])
def test_a_key_is_redacted_in_every_form(key: str) -> None:
    client = ServerClient("http://host", key, QUICK)
    for before, after in product(("", "Bearer ", "{'x': '"), ("", "'", " and more")):
        plain = (before + key + after).encode()
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(plain).decode()
            assert len(key) < 5 or "(key)" in client.redact(encoded), encoded
        assert key not in client.redact(plain.decode())
        assert "(key)" in client.redact(f"got {quote(plain)}, {json.dumps(plain.decode())}")
    assert client.redact("nothing secret") == "nothing secret"


def test_a_page_in_place_of_the_list_of_models_is_shown(fake: FakeServer, connect: Connect) -> None:
    fake.cards = b"<html>Welcome to nginx</html>"
    with pytest.raises(ServerError, match="models answers with an error: Welcome to nginx"):
        connect(fake)


def test_retry_after_is_seconds_or_nothing() -> None:
    assert [retry_after_s(t) for t in ("7", "", "-1", "Wed, 21 Oct 2026 07:28:00 GMT")] == [
        7,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    "url", ["http://host:99999", "http://host:port", f"http://me:{KEY}@[::1", f"me:{KEY}@host"]
)
def test_a_malformed_url_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match="is not a server's URL") as caught:
        ServerScorer([url])
    assert KEY not in str(caught.value)


def test_a_rejected_url_leaves_no_thread() -> None:
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(ConfigError):
            ServerScorer(["http://127.0.0.1:1", f"http://me:{KEY}@host"])
    assert threading.active_count() == before


@pytest.mark.parametrize("password", [KEY, "sk,ca,nary"])
def test_an_error_about_a_list_of_urls_shows_no_password(password: str) -> None:
    with pytest.raises(ConfigError, match="number 2 among the servers of a teacher") as caught:
        urls_of(f"http://a:1,me:{password}@b:1")
    assert "b:1" not in caught.value.cause
    assert not any(part in caught.value.cause for part in password.split(","))


@pytest.mark.parametrize("url", ["http://h:1?", "http://h:1/#", "http://:@h:1", "http://@h:1"])
def test_a_url_with_empty_credentials_query_or_fragment_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match="the URL of h holds more than scheme"):
        ServerScorer([url])


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", f"{KEY}\x00", f"{KEY}é"])
def test_a_key_that_is_invalid_in_a_header_is_an_error(key: str) -> None:
    with pytest.raises(ConfigError, match="not valid in a header") as caught:
        ServerScorer(["http://127.0.0.1:1"], key=key)
    assert KEY not in str(caught.value)


def test_https_to_a_server_without_tls_fails_at_once(fake: FakeServer) -> None:
    with pytest.raises(ServerError, match="no secure connection"):
        ServerScorer([fake.url.replace("http", "https")], limits=replace(QUICK, wait_s=600))


def test_redirects_are_not_followed_with_a_key(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    with FakeServer(fake.model) as elsewhere:

        async def redirect(_: FakeServer, request: web.Request, reply: Any) -> web.Response:
            return web.Response(status=307, headers={"Location": elsewhere.url + request.path})

        server = connect(fake, key=KEY)
        fake.faults = [redirect] * 100
        with pytest.raises(
            ServerError, match=f"307: it has moved to {elsewhere.url}/inf"
        ) as caught:
            server.score(rolled, PARAMS)
        assert "give the new address" in caught.value.hint
        assert not elsewhere.seen.auth
        assert not elsewhere.seen.bodies


def test_a_redirect_target_is_shown_without_secrets() -> None:
    assert (
        redirect_target(f"https://me:{KEY}@h:1/v1/models?token={KEY}#{KEY}")
        == "https://h:1/v1/models"
    )
    assert [redirect_target(each) for each in ("/login?next=%2F", "http://[::1", "")] == [
        "/login",
        "",
        "",
    ]


def test_proxies_of_the_environment_are_not_used(
    fake: FakeServer, connect: Connect, rolled: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert connect(fake).score(rolled, PARAMS).at_lp is not None


def text(status: int, words: str) -> Any:
    async def answer(_: FakeServer, request: web.Request, reply: Any) -> web.Response:
        return web.Response(status=status, text=words)

    return answer


def echo(status: int) -> Any:
    """Return a fault that repeats the request headers in an error."""

    async def answer(_: FakeServer, request: web.Request, reply: Any) -> web.Response:
        return web.Response(status=status, text=str(dict(request.headers)), reason="no")

    return answer


async def raw(_: FakeServer, request: web.Request, reply: Any) -> web.Response:
    """Write bytes that are not HTTP and contain the key."""
    assert request.transport is not None
    request.transport.write(f"HTTP/1.1 {request.headers['Authorization']}\r\n\r\n".encode())
    await asyncio.sleep(0.05)
    request.transport.abort()
    return web.Response()


@pytest.mark.parametrize("fault", [*map(echo, (400, 401, 403, 404, 418, 422, 429, 500, 503)), raw])
def test_no_error_shows_the_key(
    fault: Any, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, key=KEY, limits=replace(QUICK, attempts=2, wait_s=0.05))
    fake.faults = [fault] * 1000
    with pytest.raises(LogitcaskError) as caught:
        server.score(rolled, PARAMS)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", [KEY, "sk-it's\\5f3a"])
def test_a_key_in_the_name_of_a_model_is_not_shown(
    key: str, fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, key=key)
    fake.called = key
    fake.fingerprint = f"vllm-{key}"
    for ask in (lambda: server.score(rolled, PARAMS), lambda: connect(fake, key=key)):
        with pytest.raises(LogitcaskError, match="as model .*key.*, and 'teacher' was") as caught:
            ask()
        shown = "".join(traceback.format_exception(caught.value))
        assert key not in shown
        assert repr(key)[1:-1] not in shown
    fake.called = None
    fake.root = f"org/{key}"
    info = connect(fake, key=key).info
    assert (info.fingerprint, info.root) == ("vllm-(key)", "org/(key)")
