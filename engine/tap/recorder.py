"""The state of a tap: which teacher answers, its records, and when they may be kept.

A record is verified when the teacher was the same in the checks before and after it. Only verified
records go to the store; when another teacher is found, those since the last check are dropped, and
the next records get its own name.
"""

import asyncio
import fcntl
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from logitcask.engine.backends.server.scorer import read_key
from logitcask.engine.config.tap import TapConfig
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.errors import ConfigError, LogitcaskError, ServerError
from logitcask.engine.events import EventHandler
from logitcask.engine.store import open_store
from logitcask.engine.tap.journal import Journal
from logitcask.engine.tap.record import Record
from logitcask.engine.tap.seal import (
    as_job,
    rollouts_provenance,
    scores_provenance,
    seal_file,
)
from logitcask.engine.tap.teacher import (
    Identity,
    Probe,
    describe,
    identify,
    known_teachers,
    mark_newest,
)
from logitcask.engine.types import ModelRef

WATCH_S = 1.0
REPORT_S = 60.0
MOST_REASONS = 100


class Call(Protocol):
    """Calls a function that loads much, and returns its result."""

    def __call__(self, function: Callable[..., Any], /, *args: Any) -> Any: ...


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, so that this one stays small."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def answers_folder(config: TapConfig) -> Path:
    """Return the folder of the recorded answers."""
    if config.tap.answers is not None:
        return config.tap.answers
    if "://" in config.store.url:
        raise ConfigError(
            f"the store {config.store.url} is no folder, and --answers is missing",
            hint="give --answers, a folder on this machine for the recorded answers",
        )
    return Path(f"{config.store.url.rstrip('/')}-answers")


class Recorder:
    """Records of the teacher behind a tap. Its methods run in one event loop."""

    def __init__(
        self,
        config: TapConfig,
        details: Callable[[Probe], Awaitable[dict[str, Any]]],
        on_event: EventHandler,
        call: Call = in_process,
    ) -> None:
        """Lock the folder of the answers.

        details: fetches /v1/models, and whether temperature and key matter; call: for functions
        that load much. Raises ConfigError where another tap uses the folder.
        """
        self.config, self._details, self._on_event, self._call = config, details, on_event, call
        self.key = read_key(config.teacher.api_key_file)
        self.answers = answers_folder(config)
        self.answers.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.answers / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(
                f"another tap uses {self.answers}", hint="give another --answers, or stop that tap"
            ) from error
        self.identity: Identity | None = None
        self.journal: Journal | None = None
        self.online = False
        self.epoch = 0
        """Increases when another teacher may have answered since the last check."""
        self.counts: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        """Requests that passed unrecorded, by reason."""
        self.faults: dict[str, Exception] = {}
        """Part of the work -> its lasting fault."""
        self._probe: Probe | None = None
        self._changed_by = ""
        """Request after which the teacher counts as another one, whatever a check finds."""
        self._models: dict[tuple[str, str], ModelRef] = {}
        """(served name, source) -> its identity, which takes seconds to find."""
        self._gate = asyncio.Lock()
        """Held by each check and each write: a check covers all records before it."""
        self._sealing = asyncio.Lock()
        self._checked_s = -1e9
        self._kept_s = time.monotonic()

    async def start(self) -> None:
        """Identify the teacher, or take the last known one while it is unavailable.

        Raises ServerError if there is neither, and IdentityError where names of the store belong to
        others.
        """
        await self.check()
        if self.identity is None:
            if "identity" in self.faults:
                raise self.faults["identity"]
            if not (known := known_teachers(self.answers)):
                raise ServerError(
                    f"no teacher answers at {self.config.teacher.model}, and none is recorded in "
                    f"{self.answers}",
                    hint="start the teacher's server first",
                )
            self.identity = known[-1]
            self.journal = await asyncio.to_thread(Journal, self.answers / known[-1].name)
        await asyncio.to_thread(self._check_names, self.identity)

    def _check_names(self, identity: Identity) -> None:
        """Raise IdentityError before anything is recorded that the store would refuse."""
        section = self.config.store
        store = open_store(section.url, create=True)
        store.check_name("rollout", section.rollouts, rollouts_provenance(), drawn=False)
        job = as_job(Path(), section.url, section.rollouts, section.profile, identity)
        store.check_name("score", identity.name, scores_provenance(job), drawn=False)

    async def refresh(self) -> None:
        """Check the teacher again if the last check is too old."""
        if time.monotonic() - self._checked_s > self.config.tap.check_seconds:
            await self.check()

    def doubt(self) -> None:
        """Let the next request check the teacher first: something has happened to it."""
        if self.online:
            self._checked_s = -1e9

    def count_passed(self, reason: str) -> None:
        """Count a request that passes unrecorded."""
        many = len(self.passed) >= MOST_REASONS and reason not in self.passed
        self.passed["other" if many else reason] += 1

    async def end_identity(self, request: str) -> None:
        """Give the next records a new name: a request may have changed the teacher."""
        async with self._gate:
            await self._end_identity(f"{request} may have changed the teacher")
            self._changed_by = request
            self._checked_s = -1e9

    async def check(self) -> None:
        """Compare the teacher with the one of the records."""
        async with self._gate:
            await self._check()

    async def _check(self) -> None:
        self._checked_s = time.monotonic()
        self.counts["checks"] += 1
        if self._probe is not None:
            try:
                is_same = await asyncio.to_thread(self._probe.is_same)
            except ServerError as error:
                self._set_offline(error)
                return
            if is_same:
                assert self.journal is not None
                await asyncio.to_thread(self.journal.mark_verified)
                self.online = True
                return
            await self._end_identity("another teacher answers at the same URL")
        await self._identify()

    async def _identify(self) -> None:
        teacher, topk = self.config.teacher, self.config.tap.topk
        try:
            probe = await asyncio.to_thread(Probe, teacher, self.key, self._describe, topk)
            try:
                details = await self._details(probe)
                found = identify(self.answers, teacher.name, probe, self._changed_by, **details)
            except BaseException:
                await asyncio.to_thread(probe.close)
                raise
        except ServerError as error:
            self._set_offline(error)
            if error.status:
                self._set_fault("identity", error)
            return
        except LogitcaskError as error:
            self._set_fault("identity", error)
            await self._end_identity("the teacher cannot be identified")
            return
        self._changed_by = ""
        probe.use(found)
        if self.identity is not None and self.identity.name != found.name:
            await self._end_identity(f"the teacher is {found.name} now")
        for other in known_teachers(self.answers):
            folder = self.answers / other.name
            if other.name != found.name and any(folder.glob("*.wal")):
                # Their teacher has been replaced since the last check.
                dropped = (await asyncio.to_thread(Journal, folder)).drop_unverified()
                self.counts["dropped"] += dropped
        if self.journal is None:
            self.journal = await asyncio.to_thread(Journal, self.answers / found.name)
        self._probe, self.identity, self.online = probe, found, True
        mark_newest(self.answers, found)
        await asyncio.to_thread(self.journal.mark_verified)
        self.faults.pop("identity", None)
        self._on_event(f"recording as {found.name} in {self.journal.folder}")

    def _describe(self, teacher: Teacher, served: str, root: str, key: str | None) -> ModelRef:
        if (served, root) not in self._models:
            self._models[served, root] = self._call(describe, teacher, served, key)
        return self._models[served, root]

    async def _end_identity(self, why: str) -> None:
        """Drop what the last check does not cover; nothing is recorded until `_identify`."""
        self.epoch += 1
        if self.journal is not None:
            dropped = await asyncio.to_thread(self.journal.drop_unverified)
            self.counts["dropped"] += dropped
            self._on_event(f"{why}: {dropped} records since the last check are dropped")
        if self._probe is not None:
            await asyncio.to_thread(self._probe.close)
        self._probe = self.identity = self.journal = None
        self.online = False

    def _set_offline(self, error: ServerError) -> None:
        if self.online:
            self._on_event(f"the teacher is unavailable, records are repeated: {error.cause}")
        self.online = False

    def _set_fault(self, part: str, error: Exception) -> None:
        if str(self.faults.get(part)) != str(error):
            cause = error.cause if isinstance(error, LogitcaskError) else str(error)
            self._on_event(f"fault: {part}: {cause}")
        self.faults[part] = error

    async def keep(self, record: Record, epoch: int) -> None:
        """Write a record whose request was sent in this epoch."""
        async with self._gate:
            if self.journal is None or epoch != self.epoch:
                self.counts["not_recorded"] += 1
                return
            try:
                await asyncio.to_thread(self.journal.put, record)
            except OSError as error:
                self.counts["not_recorded"] += 1
                self._set_fault("record", error)
                return
            self.faults.pop("record", None)
            self._kept_s = time.monotonic()
            self.counts["recorded"] += 1

    async def watch(self) -> None:
        """Check, seal and report until cancelled."""
        reported, reported_s = self.counts.copy(), time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            journal, now_s = self.journal, time.monotonic()
            if journal is not None and not journal.is_verified:
                await self.refresh()
            idle = now_s - self._kept_s > self.config.tap.idle_seconds
            rows = 0 if journal is None else journal.unsealed_rows
            if rows >= self.config.tap.unit_positions or (idle and rows):
                self._kept_s = now_s
                await self.seal()
            if now_s - reported_s > REPORT_S and self.counts != reported:
                self._on_event(self.summary())
                reported, reported_s = self.counts.copy(), now_s

    async def seal(self) -> None:
        """Commit all verified records to the store; a failure is a fault, and is tried again."""
        async with self._sealing:
            async with self._gate:
                await self._check()
                work = await asyncio.to_thread(self._unsealed)
            section = self.config.store
            for identity, journal, path in work:
                job = as_job(path, section.url, section.rollouts, section.profile, identity)
                try:
                    sealed = await asyncio.to_thread(self._call, seal_file, job)
                    journal.mark_sealed(path)
                except (LogitcaskError, OSError, RuntimeError) as error:
                    self._set_fault("store", error)
                    continue
                self.faults.pop("store", None)
                self.counts["sealed_sequences"] += sealed.sequences
                self.counts["sealed_positions"] += sealed.positions
                self._on_event(
                    f"{sealed.sequences} sequences, {sealed.positions} positions of "
                    f"{identity.name} are in {section.url}"
                )

    def _unsealed(self) -> list[tuple[Identity, Journal, Path]]:
        """Return the complete files that no store holds, also those of earlier teachers."""
        journals = (
            [] if self.identity is None or self.journal is None else [(self.identity, self.journal)]
        )
        for other in known_teachers(self.answers):
            folder = self.answers / other.name
            current = self.identity is not None and other.name == self.identity.name
            if not current and any(folder.glob("*.wal")):
                journals.append((other, Journal(folder)))
        return [
            (teacher, journal, path)
            for teacher, journal in journals
            for path in journal.close_files()
        ]

    async def close(self) -> None:
        """Seal what can be sealed, and release the folder."""
        try:
            if self.journal is not None and self.journal.unsealed_rows:
                await self.seal()
            if self.journal is not None and (left := self.journal.unsealed_rows):
                self._on_event(
                    f"{left} positions are recorded and not in the store yet: start the tap again "
                    "with the teacher"
                )
        finally:
            if self._probe is not None:
                await asyncio.to_thread(self._probe.close)
            os.close(self._lock)

    def summary(self) -> str:
        """Return one line of the counts."""
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()))
        reasons = ", ".join(f"{count:,} {why}" for why, count in self.passed.most_common(3))
        return counts + (f"; passed unrecorded: {reasons}" if reasons else "")
