"""The HTTP side of a tap: scoring requests are answered from records, all others pass unchanged."""

import asyncio
import json
import os
import resource
from collections.abc import Callable

import numpy as np
from aiohttp import web

from logitcask.engine.backends.returned import check_answer
from logitcask.engine.backends.server.client import normalize_url
from logitcask.engine.backends.server.protocol import COMPLETIONS, GENERATE, RequestBody
from logitcask.engine.backends.server.scorer import read_key
from logitcask.engine.backends.server.sglang import SGLANG
from logitcask.engine.config.tap import TapConfig
from logitcask.engine.errors import AnswerError
from logitcask.engine.events import EventHandler
from logitcask.engine.tap import forms
from logitcask.engine.tap.record import Record, key_of
from logitcask.engine.tap.recorder import Call, Recorder, in_process
from logitcask.engine.tap.teacher import Identity
from logitcask.engine.tap.upstream import Rejected, Upstream, rejected
from logitcask.engine.types import Array

HARMLESS = {
    *("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/tokenize"),
    *(
        "/v1/tokenize",
        "/v1/detokenize",
        "/detokenize",
        "/generate",
        "/inference/v1/generate",
        "/score",
        "/v1/score",
        "/rerank",
    ),
    *("/pooling", "/classify", "/ping", "/abort_request", "/flush_cache", "/reset_prefix_cache"),
    *("/sleep", "/wake_up", "/pause", "/resume", "/start_profile", "/stop_profile", "/invocations"),
}
"""Paths of requests that do not change the teacher. Others, as those that update or load weights,
end its identity: the change may be smaller than the tolerance of a check.
"""
MOST_BODY = 1 << 30
LARGE_BODY = 1 << 18
"""Bytes from which a body is parsed in another thread."""


class Tap:
    """A proxy before one teacher server. Its methods run in one event loop."""

    def __init__(self, config: TapConfig, on_event: EventHandler, call: Call = in_process) -> None:
        """Prepare; `start` connects. Raises ConfigError as `Recorder` and for an invalid URL."""
        self.config = config
        self.upstream = Upstream(
            normalize_url(config.teacher.model), read_key(config.teacher.api_key_file)
        )
        self.recorder = Recorder(config, self.upstream.details, on_event, call)
        self.upstream.on_lost = self.recorder.doubt
        self._flights: dict[tuple[int, bytes], tuple[int, asyncio.Task[Record]]] = {}
        """(epoch, key of the ids) -> (k, the request to the teacher that is in flight)."""
        self._slots = asyncio.Semaphore(config.tap.in_flight)
        self._renders = asyncio.Semaphore(max(2, os.cpu_count() or 1))

    async def start(self) -> None:
        """Connect to the teacher, and watch it. Raises as `Recorder.start`."""
        await self.recorder.start()
        self._watch = asyncio.create_task(self.recorder.watch())

    async def close(self) -> None:
        """Finish the requests in flight, and seal."""
        if hasattr(self, "_watch"):
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        flights = [task for _, task in self._flights.values()]
        await asyncio.gather(*flights, return_exceptions=True)
        try:
            await self.recorder.close()
        finally:
            await self.upstream.close()

    def application(self) -> web.Application:
        """Return the routes."""
        app = web.Application(client_max_size=MOST_BODY)
        app.router.add_get("/_tap", self._show)
        app.router.add_route("*", "/{path:.*}", self._route)
        return app

    async def _route(self, request: web.Request) -> web.StreamResponse:
        marker: list[int] = []
        path = request.path
        if found := forms.AFTER.match(path):
            marker, path = [int(each) for each in found[1].split(",")], path[found.end() :]
        if request.method == "POST" and path in (COMPLETIONS, GENERATE, SGLANG):
            return await self._score(request, path, marker)
        if request.method == "GET" and path in ("/health", "/v1/models"):
            await self.recorder.refresh()
            if not self.recorder.online and self.recorder.identity is not None:
                return await self._show_offline(request, path)
        if request.method in ("GET", "HEAD", "OPTIONS") or path.rstrip("/") in HARMLESS:
            return await self.upstream.forward(request, path, None)
        # The records before it are verified, as far as they can be.
        await self.recorder.check()
        status = 0
        try:
            response = await self.upstream.forward(request, path, None)
            status = response.status
            return response
        finally:
            if status < 400:
                await self.recorder.end_identity(f"{request.method} {path}"[:100])

    # Scoring requests.

    async def _score(
        self, request: web.Request, path: str, marker: list[int]
    ) -> web.StreamResponse:
        raw = await request.read()
        await self.recorder.refresh()
        identity, counts = self.recorder.identity, self.recorder.counts
        try:
            question = await self._parse(path, raw, identity)
        except forms.Passed as reason:
            self.recorder.count_passed(f"{path}: {reason}")
            return await self.upstream.forward(request, path, raw)
        assert identity is not None
        starts = forms.boundaries(question, marker, request.headers.get(forms.START, ""))
        try:
            await self.upstream.check_key(request, identity)
            found = await asyncio.gather(
                *(
                    self._record(ids, start, question.k, identity, request)
                    for ids, start in zip(question.sequences, starts, strict=True)
                )
            )
        except Rejected as error:
            counts["rejected"] += 1
            return error.response()
        records, sources = [each[0] for each in found], {each[1] for each in found}
        source = sources.pop() if len(sources) == 1 else "mixed"
        model = question.model or identity.served
        fingerprint = str(identity.backend.get("fingerprint", ""))
        parts = forms.parts(path, question, records, model, fingerprint)
        return await self._send(request, parts, source)

    async def _parse(
        self, path: str, raw: bytes, identity: Identity | None
    ) -> forms.ScoringRequest:
        """Raise Passed for a request that no record of this teacher can answer."""

        def parse() -> forms.ScoringRequest:
            try:
                body = json.loads(raw)
            except (ValueError, RecursionError):
                raise forms.Passed("no JSON") from None
            return forms.parse(path, body, self.config.tap.lenient)

        found = await asyncio.to_thread(parse) if len(raw) > LARGE_BODY else parse()
        if identity is None:
            raise forms.Passed("the teacher is not identified")
        if found.model is not None and found.model not in identity.names:
            raise forms.Passed("another model")
        if identity.tempered and found.temperature not in (0.0, 1.0):
            raise forms.Passed("a temperature that changes this server's log-probs")
        if found.k > identity.n_vocab:
            raise forms.Passed("more log-probs than ids")
        highest = max(int(ids.max()) for ids in found.sequences)
        if highest >= identity.n_vocab:
            raise forms.Passed("an id that the tokenizer lacks")
        return found

    async def _record(
        self, ids: Array, start: int, k: int, identity: Identity, request: web.Request
    ) -> tuple[Record, str]:
        """Return the record of some ids, and where it is from. Raises Rejected."""
        recorder = self.recorder
        journal = recorder.journal
        if journal is not None:
            known = await asyncio.to_thread(journal.get, ids, k)
            if known is not None:
                recorder.counts["hits"] += 1
                return known, "hit"
        key = recorder.epoch, key_of(ids)
        width, flight = self._flights.get(key, (-1, None))
        source = "joined"
        if flight is None or width < k:
            source = "new"
            width = min(max(k, self.config.tap.topk), identity.n_vocab)
            headers = {"Authorization": request.headers.get("Authorization", "")}
            headers = {name: value for name, value in headers.items() if value}
            flight = asyncio.create_task(self._fetch(ids, start, width, identity, headers))
            self._flights[key] = width, flight
            flight.add_done_callback(lambda done: self._land(key, done))
        # A client that leaves does not end the request: its answer is kept.
        record = await asyncio.shield(flight)
        recorder.counts[source] += 1
        return record, source

    def _land(self, key: tuple[int, bytes], done: asyncio.Task[Record]) -> None:
        if self._flights.get(key, (0, None))[1] is done:
            del self._flights[key]
        if not done.cancelled():
            done.exception()  # of a client that left: read, so that it is not reported

    async def _fetch(
        self, ids: Array, start: int, k: int, identity: Identity, headers: dict[str, str]
    ) -> Record:
        """Request the log-probs of some ids from the teacher, check and keep them."""
        epoch = self.recorder.epoch
        body = RequestBody(ids=ids.tolist(), rows=len(ids) - 1, k=k, server_order=True)
        path = str(identity.backend["path"])
        async with self._slots:
            sent = body.to_json(path, identity.served)
            data = await self.upstream.ask("POST", path, sent, headers, body.most_bytes(path))

            def read() -> Record:
                found = body.read(path, identity.names, data)
                check_answer(found, ids[1:].astype(np.int64), None, k=k, n_vocab=1 << 32)
                rank = np.zeros(len(found.lp)) if found.rank is None else found.rank
                return Record(
                    ids=ids,
                    boundary=start,
                    lp=np.minimum(found.lp, 0.0),
                    rank=rank.astype(np.uint32),
                    top=found.ids.astype(np.uint32),
                    top_lp=np.minimum(found.top_lp, 0.0),
                )

            try:
                record = await asyncio.to_thread(read)
            except AnswerError as error:
                self.recorder.counts["invalid"] += 1
                self.recorder.doubt()
                raise rejected(502, f"an invalid answer of the teacher: {error.cause}") from error
        await self.recorder.keep(record, epoch)
        return record

    # Of the tap itself.

    async def _send(
        self, request: web.Request, parts: list[Callable[[], bytes]], source: str
    ) -> web.StreamResponse:
        """Render the parts in threads and send each when it is ready."""
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "X-Logitcask": source}
        )
        rendered: list[bytes] = []
        if len(parts) <= 3:
            async with self._renders:
                rendered = [await asyncio.to_thread(lambda: b"".join(part() for part in parts))]
            response.content_length = len(rendered[0])
        await response.prepare(request)
        for part in rendered:
            await response.write(part)
        if not rendered:
            for render in parts:
                async with self._renders:
                    data = await asyncio.to_thread(render)
                await response.write(data)
        await response.write_eof()
        return response

    async def _show_offline(self, request: web.Request, path: str) -> web.StreamResponse:
        identity = self.recorder.identity
        assert identity is not None
        if path == "/health":
            return web.Response()
        try:
            await self.upstream.check_key(request, identity)
        except Rejected as error:
            return error.response()
        return web.json_response(identity.models)

    async def _show(self, _: web.Request) -> web.Response:
        recorder = self.recorder
        journal, identity = recorder.journal, recorder.identity
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return web.json_response(
            {
                "teacher": None if identity is None else identity.name,
                "online": recorder.online,
                "sequences": 0 if journal is None else len(journal),
                "damaged": 0 if journal is None else journal.damaged,
                "unsealed_positions": 0 if journal is None else journal.unsealed_rows,
                "counts": dict(recorder.counts),
                "passed": dict(recorder.passed),
                "faults": {part: str(error) for part, error in recorder.faults.items()},
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
            }
        )
