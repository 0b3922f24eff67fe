"""A scripted teacher: vLLM's two endpoints and SGLang's, without a model; and a tap before it."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from logitcask.engine.config.sections import StoreSection
from logitcask.engine.config.tap import Tap as TapSection
from logitcask.engine.config.tap import TapConfig
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.tap.proxy import Tap
from logitcask.engine.tap.teacher import describe
from logitcask.engine.types import ModelRef
from tests.engine.backends.server.fake_server import FakeServer

N_VOCAB = 40
MODEL = ModelRef(
    name="teacher",
    path=Path(),
    revision="",
    digest="sha256:" + "1" * 64,
    tokenizer_digest="sha256:" + "2" * 64,
    template_digest="sha256:" + "3" * 64,
    n_vocab=N_VOCAB,
    stop_ids=(1,),
    version=0,
    base_weights="sha256:" + "1" * 64,
)


class ScriptedTeacher(FakeServer):
    """Log-probs that depend on all tokens before; an object's own token is its first key."""

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        super().__init__(None, generate=False, **settings)
        self.seed, self.heats, self.heat = seed, False, 1.0
        """heats: the temperature of a request changes its log-probs."""
        self.posts: list[tuple[str, bytes]] = []
        """Other requests."""

    def log_probs(self, ids: list[int]) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        table, head = rng.standard_normal((2, N_VOCAB, N_VOCAB))
        states = np.cumsum(table[ids], 0) / np.sqrt(np.arange(1, len(ids) + 1))[:, None]
        logits = states @ head / 3 / (self.heat or 1.0)
        lp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found: np.ndarray = lp.astype(np.float32)
        return found

    @staticmethod
    def _row(lp: np.ndarray, token: int, k: int) -> dict[str, Any]:
        order = np.argsort(-lp, kind="stable")
        rank = {int(each): place for place, each in enumerate(order, 1)}
        listed = [token, *(each for each in order[:k].tolist() if each != token)]
        return {
            str(each): {"logprob": float(lp[each]), "rank": rank[each], "decoded_token": "x"}
            for each in listed
        }

    def _reply(self, body: dict[str, Any], ids: list[Any], sampling: dict[str, Any]) -> Any:
        if ids and isinstance(ids[0], list):
            replies = [self._reply(body, each, sampling) for each in ids]
            choices = [each["choices"][0] | {"index": i} for i, each in enumerate(replies)]
            return replies[0] | {"choices": choices, "usage": {}}
        body.setdefault("model", self.served)
        self.heat = sampling.get("temperature", 1.0) if self.heats else 1.0
        if isinstance(ids, str):
            return {"choices": [{"text": ids[::-1]}]}
        return super()._reply(body, ids, sampling)

    async def _score(self, request: web.Request, *args: Any) -> web.StreamResponse:
        self.posts.append((request.path, await request.read()))
        return await super()._score(request, *args)


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call in this process, with the model of the scripted teacher."""
    return MODEL if function is describe else function(*args)


def in_this_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call in this process."""
    return function(*args)


@dataclass
class Client:
    tap: Tap
    url: str
    http: aiohttp.ClientSession
    events: list[str]

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, bytes, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **headers}
        async with self.http.post(self.url + path, data=data, headers=sent) as response:
            return response.status, await response.read(), response.headers.get("X-Logitcask", "")

    async def complete(self, ids: Any, k: int = 8, **fields: Any) -> tuple[int, bytes, str]:
        """Send what TRL's client sends."""
        body = {"model": "teacher", "prompt": ids, "max_tokens": 1, "temperature": 1.0}
        return await self.post("/v1/completions", {**body, "prompt_logprobs": k, **fields})

    async def counts(self) -> dict[str, Any]:
        async with self.http.get(self.url + "/_tap") as response:
            found: dict[str, Any] = await response.json()
            return found


@asynccontextmanager
async def open_tap(
    url: str, folder: Path, *, rollouts: str = "tap", tokenizer: str = "", **settings: Any
) -> AsyncIterator[Client]:
    """Run a tap in this event loop, and close it as SIGTERM does.

    tokenizer: folder of the teacher's; "" = the scripted one's.
    """
    events: list[str] = []
    config = TapConfig(
        teacher=Teacher(model=url, name="teacher", tokenizer=tokenizer),
        store=StoreSection(url=str(folder / "store"), rollouts=rollouts, profile="raw32"),
        tap=TapSection(**{"port": 0, **settings}),
    )
    tap = Tap(config, events.append, in_this_process if tokenizer else call)
    try:
        await tap.start()
        runner = web.AppRunner(tap.application(), handler_cancellation=True, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            async with aiohttp.ClientSession() as http:
                yield Client(tap, f"http://127.0.0.1:{runner.addresses[0][1]}", http, events)
        finally:
            await runner.cleanup()
    finally:
        await tap.close()


def rows_of(answer: bytes, choice: int = 0) -> list[Any]:
    """Return [(id, log-prob, rank), ...] of each position, in the order of the keys."""
    rows = json.loads(answer)["choices"][choice]["prompt_logprobs"]
    return [
        None if r is None else [(i, e["logprob"], e["rank"]) for i, e in r.items()] for r in rows
    ]
