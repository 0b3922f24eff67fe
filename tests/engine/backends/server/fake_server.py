"""A server with the two scoring endpoints of vLLM, log-probs of a tiny model, and faults on demand.

It runs in a thread, on loopback.
"""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from aiohttp import web

Fault = Callable[["FakeServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse | None]]
"""Return another response, or change the reply in place (None), or do neither (None)."""


@dataclass
class Seen:
    """Requests that reached the server."""

    requests: list[tuple[str, str]] = field(default_factory=list)
    """(path, status or "fault")."""
    in_flight: int = 0
    most_in_flight: int = 0
    gone: int = 0
    """Requests whose client disconnected."""
    auth: set[str] = field(default_factory=set)
    bodies: list[dict[str, Any]] = field(default_factory=list)


class FakeServer:
    """`with FakeServer(model) as server: server.url`."""

    def __init__(
        self,
        model: Any,
        *,
        served: str = "teacher",
        root: str = "org/teacher",
        generate: bool = True,
        at_ids: bool = True,
        max_logprobs: int = 128,
        max_model_len: int = 256,
        key: str | None = None,
        tokenizer: Any = None,
        port: int = 0,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.served, self.root = model, served, root
        self.generate, self.at_ids = generate, at_ids
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.key, self.tokenizer, self.temperature = key, tokenizer, temperature
        self.parent: str | None = None
        self.cards: Any = None
        """Entries of /v1/models, if not the one model."""
        self.called: str | None = None
        """Name of the model in replies, if not that of the request."""
        self.fingerprint = "vllm-0.32.0-0123abcd"
        self.delay_s = 0.0
        self.faults: list[Fault] = []
        """Faults of the next scoring requests, one each."""
        self.seen = Seen()
        self.port = port
        self._lock = threading.Lock()
        self._transports: set[asyncio.BaseTransport] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeServer":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._start())
            started.set()
            self._loop.run_forever()
            # Connections whose client disconnected during the accept are still tasks.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(asyncio.sleep(0.02))

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        self._add_routes(app)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_get("/version", self._version)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/inference/v1/generate", self._generate)

    async def _stop(self) -> None:
        await asyncio.sleep(0.02)  # a connection that was just accepted gets its transport
        assert self._runner.server is not None
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                self._transports.add(connection.transport)
        await self._runner.cleanup()
        for transport in self._transports:
            transport.abort()
        # They close in the next iterations of the loop.
        await asyncio.sleep(0.05)

    # Endpoints.

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if (refused := self._refused(request)) is not None:
            return refused
        if isinstance(self.cards, bytes):
            return web.Response(body=self.cards)
        if self.cards is not None:
            return web.json_response({"data": self.cards})
        return web.json_response({"data": [self._card() | {"max_model_len": self.max_model_len}]})

    def _card(self) -> dict[str, Any]:
        return {"id": self.served, "root": self.root, "parent": self.parent, "owned_by": "vllm"}

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        if self.tokenizer is None:
            return web.json_response({"error": "Not Found"}, status=404)
        body = await request.json()
        ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        return web.json_response({"tokens": ids, "count": len(ids)})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._score(request, "prompt", lambda body: body)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not self.generate:
            return web.json_response({"error": {"message": "--enable-scale-out"}}, status=403)
        return await self._score(request, "token_ids", lambda body: body["sampling_params"])

    async def _score(
        self, request: web.Request, key: str, params: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> web.StreamResponse:
        if (refused := self._refused(request)) is not None:
            return refused
        if request.transport is not None:
            self._transports.add(request.transport)
        body = await request.json()
        seen = self.seen
        seen.bodies.append(body)
        seen.in_flight += 1
        seen.most_in_flight = max(seen.most_in_flight, seen.in_flight)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            reply = self._reply(body, body[key], params(body))
            is_probe = len(body[key]) == 3
            if not is_probe and self.faults:
                done = await self.faults.pop(0)(self, request, reply)
                if done is not None:
                    seen.requests.append((request.path, "fault"))
                    return done
            status = reply.pop("status", 200)
            seen.requests.append((request.path, str(status)))
            return web.Response(
                text=json.dumps(reply), status=status, content_type="application/json"
            )
        except asyncio.CancelledError:
            seen.gone += 1
            raise
        finally:
            seen.in_flight -= 1

    def _refused(self, request: web.Request) -> web.Response | None:
        self.seen.auth.add(request.headers.get("Authorization", ""))
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return None

    # Replies.

    def log_probs(self, ids: list[int]) -> np.ndarray:
        with self._lock, torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0].float()
        found: np.ndarray = (logits / self.temperature).log_softmax(-1).numpy()
        return found

    def _reply(self, body: dict[str, Any], ids: list[int], sampling: dict[str, Any]) -> Any:
        k = sampling.get("prompt_logprobs")
        listed = self.cards or [{"id": self.served}]
        if body.get("model") not in (None, *(card["id"] for card in listed)):
            return {"status": 404, "error": {"message": f"no model {body['model']}"}}
        if k is not None and k > self.max_logprobs:
            words = f"prompt logprobs of {k}, which is greater than max allowed"
            return {"status": 400, "error": {"message": words}}
        if len(ids) + 1 > self.max_model_len:
            return {"status": 400, "error": {"message": "longer than max_model_len"}}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        reply: dict[str, Any] = {"choices": [choice]}
        lp = self.log_probs(ids)
        if k is not None:
            rows_topk = [None, *(self._row(lp[i - 1], ids[i], k) for i in range(1, len(ids)))]
            (reply if "token_ids" in body else choice)["prompt_logprobs"] = rows_topk
        if "prompt" in body:
            reply |= {"model": body["model"], "system_fingerprint": self.fingerprint}
            reply["usage"] = {"prompt_tokens": len(ids)}
        if self.called is not None:
            reply["model"] = self.called
        extra_ids = sampling.get("prompt_logprob_token_ids")
        if extra_ids is not None:
            if not self.at_ids:
                return {"status": 400, "error": {"message": "requires the V2 model runner"}}
            start = sampling["prompt_logprob_start"]
            id_matrix = np.array(extra_ids)
            if (count := id_matrix.shape[1]) > self.max_logprobs:
                words = (
                    f"Requested {count} token ids per row in prompt_logprob_token_ids, which is "
                    f"greater than max allowed: {self.max_logprobs}. Set max_logprobs "
                    f"(--max-logprobs) to at least {count}."
                )
                return {"status": 400, "error": {"message": words}}
            if (largest_id := int(id_matrix.max())) >= lp.shape[1]:
                words = f"token id {largest_id} is out of the vocabulary"
                return {"status": 400, "error": {"message": words}}
            assert len(id_matrix) == len(ids) - 1 - start
            rows = np.take_along_axis(lp[start:-1], np.maximum(id_matrix, 0), 1)
            reply["prompt_token_id_logprobs"] = packed(np.where(id_matrix < 0, -np.inf, rows))
        return reply

    @staticmethod
    def _row(lp: np.ndarray, token: int, k: int) -> dict[str, Any]:
        order = np.argsort(-lp, kind="stable")
        listed_ids = order[:k].tolist()
        listed_ids += [] if token in listed_ids else [token]
        return {
            str(i): {
                "logprob": float(max(lp[i], -9999.0)),
                "rank": int(np.flatnonzero(order == i)[0]) + 1,
            }
            for i in listed_ids
        }


def packed(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array.astype("<f4"))
    return base64.b64encode(stream.getvalue()).decode()
