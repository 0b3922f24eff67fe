"""A teacher behind servers as a Scorer: every sequence of a unit is one request, many at once."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from logitcask.engine.backends.answers import AnswerSheet
from logitcask.engine.backends.scoring import asked_ids
from logitcask.engine.backends.server.budget import Limits
from logitcask.engine.backends.server.fleet import Fleet
from logitcask.engine.backends.server.link import Link, Refused, Transient
from logitcask.engine.backends.server.probe import (
    ServerFacts,
    check_card,
    check_same,
    facts_of,
    hosts,
    tokens_of,
)
from logitcask.engine.backends.server.wire import Question
from logitcask.engine.errors import (
    AnswerError,
    ConfigError,
    LogitcaskError,
    ServerError,
)
from logitcask.engine.types import IdLists, Rollouts, ScoreRequest, Scores

KEY = "LOGITCASK_API_KEY"
T = TypeVar("T")


def read_key(file: Path | None = None) -> str | None:
    """The API key: the file's first line, else the environment's LOGITCASK_API_KEY, else none."""
    if file is None:
        return os.environ.get(KEY, "").strip() or None
    try:
        lines = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the API key's file {file} cannot be read: {type(error).__name__}",
            remedy="Give a file that holds the key alone.",
        ) from error
    if len(lines) != 1:
        raise ConfigError(
            f"the API key's file {file} holds {len(lines)} words",
            remedy="Give a file that holds the key alone.",
        )
    return lines[0]


class Server:
    """Scorer over vLLM servers of one teacher. `close` it, or use it as a context.

    Scores are of the best ids that the servers tell: entropy is an interval, and the tail is one
    less their mass (`backends.answers`).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        served: str = "",
        key: str | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        """served: the servers' name for the teacher; empty for the only one that they serve.

        Raises ServerError where one cannot be reached within limits.wait_s or refuses, and
        IdentityError where they do not serve one and the same teacher.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        links = [Link(url, key, limits) for url in urls]
        self._fleet = Fleet(links, limits, self._back)
        self._limits = limits
        self.n_vocab = 0
        """Ids that both tokenizers know: set before anything is scored."""
        try:
            self.facts: ServerFacts = self._run(self._begin(served))
        except BaseException:
            self.close()
            raise
        self.capabilities = frozenset(
            {"top", "entropy", "tail", "bounds", *(["at_ids"] if self.facts.at_ids else [])}
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Connections and the thread that keeps them; twice does no harm."""
        if not self._loop.is_closed():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def describe(self) -> dict[str, str]:
        return {
            "name": "server",
            "dtype": "unknown",
            "engine": f"vllm {self.facts.version}" if self.facts.version else "unknown",
            "fingerprint": self.facts.fingerprint,
            "path": self.facts.path,
            "hosts": hosts([link.url for link in self._fleet.links]),
        }

    @property
    def received(self) -> int:
        """Bytes of all answers so far."""
        return sum(link.received for link in self._fleet.links)

    @property
    def most_in_flight(self) -> tuple[int, int]:
        """(requests, bytes expected), the most that there were at once."""
        return self._fleet.budget.most_requests, self._fleet.budget.most_bytes

    @property
    def window(self) -> float:
        """Requests that may be in flight now: fewer after servers said that they are busy."""
        return self._fleet.budget.window

    def tokenize(self, text: str) -> list[int] | None:
        """A text's ids without special tokens around them; None where the server does not tell."""
        return self._run(tokens_of(self._fleet.links[0], text, self.facts.served))

    def score(self, rollouts: Rollouts, request: ScoreRequest, at: IdLists | None = None) -> Scores:
        """Raises as `asked_ids`, ConfigError where more is asked than the servers can answer,
        ServerError and AnswerError as `Fleet.ask`.
        """
        if self.n_vocab < 1:
            raise ConfigError(
                "n_vocab of a served teacher is not set", remedy="Set it from its tokenizer."
            )
        # A server samples one token more than it is asked about.
        context = self.facts.max_model_len - 1 if self.facts.max_model_len else 1 << 62
        at = asked_ids(rollouts, request, at, n_vocab=self.n_vocab, context=context)
        if request.entry_kind == "sampled":
            raise ConfigError(
                "a server cannot give ids drawn from the teacher's whole law",
                remedy="Use the backend hf, or --entry-kind topp.",
            )
        if at is not None and not self.facts.at_ids:
            raise ConfigError(
                f"{self._fleet.links[0].url} cannot answer at chosen ids: {self.facts.why}",
                remedy="Serve with vLLM 0.31 or newer on a GPU with --enable-scale-out, use the "
                "backend hf, or score without (at_student=False).",
            )
        self._run(self._recheck())
        sheet = AnswerSheet(rollouts, request, at, n_vocab=self.n_vocab)
        self._run(self._score(rollouts, sheet, min(request.k_max, self.n_vocab)))
        return sheet.scores()

    async def _score(self, rollouts: Rollouts, sheet: AnswerSheet, k: int) -> None:
        lengths = rollouts.lengths()

        async def one(sequence: int) -> None:
            prompt = rollouts.prompts[int(rollouts.seq_prompt[sequence])]
            response = sheet.tokens[sheet.rows(sequence)].tolist()
            question = Question(
                ids=[*prompt.token_ids, *response],
                rows=len(response),
                k=k,
                at=sheet.asked(sequence),
            )
            try:
                await self._fleet.ask(
                    question,
                    self.facts.path,
                    self.facts.served,
                    check=lambda answer: sheet.write(sequence, answer),
                )
            except Refused as refusal:
                raise self._too_much(refusal, k) from refusal
            except LogitcaskError as error:
                raise type(error)(
                    f"prompt {prompt.id!r}, sequence {sequence}: {error.cause}", remedy=error.remedy
                ) from error

        async with asyncio.TaskGroup() as group:
            for sequence in range(len(lengths)):
                if lengths[sequence] > 0:
                    group.create_task(one(sequence))

    @staticmethod
    def _too_much(refusal: Refused, k: int) -> LogitcaskError:
        """vLLM caps log-probs a position, at 20 unless told otherwise, and says so in words."""
        said = refusal.cause.lower()
        if refusal.status == 400 and "logprobs" in said and "max" in said:
            return ConfigError(
                f"k_max = {k} is more than the server allows: {refusal.cause}",
                remedy=f"Start it with --max-logprobs {k} or more, or score with --k-max 20 (and "
                "--k-min 16 or less) if that is its cap.",
            )
        return refusal

    # The loop's thread.

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        except (KeyboardInterrupt, SystemExit):
            # Cancelled requests close their sockets, and the server drops what nobody waits for.
            future.cancel()
            raise

    async def _begin(self, served: str) -> ServerFacts:
        known: ServerFacts | None = None
        for link in self._fleet.links:
            found = await self._facts(link, served)
            if known is not None:
                check_same(known, found, link.url)
            known = found
        if known is None:
            raise ConfigError("a teacher without servers", remedy="Give a URL.")
        return known

    async def _facts(self, link: Link, served: str) -> ServerFacts:
        """Waits for a server that is not up yet."""
        deadline = self._loop.time() + self._limits.wait_s
        while True:
            try:
                return await facts_of(link, served)
            except Transient as fault:
                if self._loop.time() >= deadline:
                    raise ServerError(
                        f"{link.url} does not answer: {fault}",
                        remedy="Check the URL and that the server is up; --server-wait sets how "
                        "long it is waited for.",
                    ) from fault
            except AnswerError as error:
                raise ServerError(f"{link.url}: {error.cause}", remedy=error.remedy) from error
            await asyncio.sleep(self._limits.poll_s)

    async def _recheck(self) -> None:
        """A server that was started anew between two units lost no request."""
        for link in self._fleet.links:
            try:
                await check_card(link, self.facts)
            except Transient as fault:
                link.up = not fault.lost  # the fleet waits for it, and looks at it then

    async def _back(self, link: Link) -> None:
        check_same(self.facts, await facts_of(link, self.facts.served), link.url)

    async def _end(self) -> None:
        for link in self._fleet.links:
            await link.close()
        # Connections say goodbye in the loop's next turn.
        await asyncio.sleep(0)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of several faults at once; that the others were cancelled says nothing."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
