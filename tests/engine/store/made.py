"""Small rollouts and scores made from a seed."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from logitcask.engine.store import Segment, Store, commit
from logitcask.engine.store.format import segment as segments
from logitcask.engine.store.format.entry import SegmentBody, sha256
from logitcask.engine.store.format.schema import read_alone
from logitcask.engine.store.log import bundles, pending, record
from logitcask.engine.store.log.body import encode_body
from logitcask.engine.types import LENGTH, STOP, Array, Draws, Prompt, Rollouts, Scores

ROLLOUT_PROVENANCE = {"set": {"digest": "sha256:set"}, "student": {"base_weights": "sha256:root"}}
SCORE_PROVENANCE = {
    "teacher": {"weights": "sha256:teacher"},
    "teacher_kind": "teacher",
    "context": "",
}

ALONE = read_alone("plain")


def key(*parts: object) -> str:
    return "sha256:" + hashlib.sha256(repr(parts).encode()).hexdigest()


def ragged(rng: np.random.Generator, cnt: Array, vocab: int, levels: int) -> tuple[Array, Array]:
    """Make entries of P rows: distinct ids, best first, lower id first, `levels` values a nat."""
    ids, lp = [], []
    for k in cnt:
        row = rng.choice(vocab, size=int(k), replace=False).astype(np.uint32)
        value = -np.round(rng.exponential(3.0, int(k)) * levels) / levels
        # Differences that float32 keeps and float16 does not.
        value = (value - 1.0 - rng.integers(0, 3, int(k)) * 1e-5).astype(np.float32)
        order = np.lexsort((row, -value))
        ids.append(row[order])
        lp.append(value[order])
    empty = (np.zeros(0, np.uint32), np.zeros(0, np.float32))
    return np.concatenate([empty[0], *ids]), np.concatenate([empty[1], *lp])


def make_draws(seed: int, rows: int, draws: int = 6) -> Draws:
    """Draw `draws` ids of 50 in every row."""
    rng = np.random.default_rng([seed, 1])
    counts = [np.unique(rng.integers(0, 50, draws), return_counts=True) for _ in range(rows)]
    none = np.zeros(0, np.int64)
    ids = np.concatenate([none, *(each for each, _ in counts)])
    return Draws(
        cnt=np.asarray([len(each) for each, _ in counts], np.uint16),
        ids=ids.astype(np.uint32),
        mult=np.concatenate([none, *(each for _, each in counts)]).astype(np.uint16),
        lp=-rng.exponential(3.0, len(ids)).astype(np.float32),
    )


def make_rollouts(
    seed: int,
    *,
    sequences: int = 6,
    student: bool = True,
    draws: bool = False,
    reward: bool = False,
) -> Rollouts:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, sequences)
    off = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = int(off[-1])
    prompts = tuple(
        Prompt(
            id=f"p{seed}-{i}",
            token_ids=tuple(rng.integers(0, 50, 1 + i).tolist()),
            answer=None if i else "42",
            extra={"level": i, "tags": ["ä", None, {"x": 1.5}]},
        )
        for i in range(max(1, sequences // 2))
    )
    scores = None
    if student:
        cnt = rng.integers(0, 6, rows).astype(np.uint16)
        ids, lp = ragged(rng, cnt, 50, 4)
        lp_row, entropy, tail = -np.abs(rng.normal(-3, 1, (3, rows))).astype(np.float32)
        scores = Scores(lp=lp_row, entropy=-entropy, log_tail=tail, cnt=cnt, ids=ids, entry_lp=lp)
    return Rollouts(
        prompts=prompts,
        seq_prompt=rng.integers(0, len(prompts), sequences).astype(np.uint32),
        seq_off=off,
        tokens=rng.integers(0, 50, rows).astype(np.uint32),
        loss_mask=rng.integers(0, 2, rows).astype(np.uint16),
        b_lp=-np.abs(rng.normal(-2, 1, rows)).astype(np.float32),
        finish=rng.choice([STOP, LENGTH], sequences).astype(np.uint16),
        version_start=rng.integers(0, 5, sequences).astype(np.int64),
        version_end=rng.integers(5, 9, sequences).astype(np.int64),
        student=scores,
        draws=make_draws(seed, rows) if draws else None,
        reward=rng.random(sequences, np.float32) if reward else None,
    )


def make_scores(seed: int, rollouts: Rollouts) -> Scores:
    """Make scores of a teacher, with log-probs at the student's ids if there are any."""
    rng = np.random.default_rng(seed)
    rows = rollouts.positions
    lp_row, entropy, tail = -np.abs(rng.normal(-3, 1, (3, rows))).astype(np.float32)
    if rollouts.student is None:
        cnt = rng.integers(0, 6, rows).astype(np.uint16)
        ids, lp = ragged(rng, cnt, 50, 4)
        return Scores(lp=lp_row, entropy=-entropy, log_tail=tail, cnt=cnt, ids=ids, entry_lp=lp)
    ends = np.cumsum(rollouts.student.cnt, dtype=np.int64)
    cnt, kept_ids, kept_lp, at = [], [], [], []
    for end, k in zip(ends, rollouts.student.cnt, strict=True):
        ids, lp = ragged(rng, np.asarray([50]), 50, 4)
        keep = int(rng.integers(0, 8))
        cnt.append(keep)
        kept_ids.append(ids[:keep])
        kept_lp.append(lp[:keep])
        place = np.argsort(ids)
        at.append(lp[place[rollouts.student.ids[end - k : end]]])
    none = np.zeros(0, np.float32)
    return Scores(
        lp=lp_row,
        entropy=-entropy,
        log_tail=tail,
        cnt=np.asarray(cnt, np.uint16),
        ids=np.concatenate([none.astype(np.uint32), *kept_ids]),
        entry_lp=np.concatenate([none, *kept_lp]),
        at_lp=np.concatenate([none, *at]),
    )


def bounded(seed: int, scores: Scores) -> Scores:
    """Add entropy bounds, as of a teacher that returns its top ids only; some have no width."""
    width = np.random.default_rng([seed, 2]).random(len(scores.entropy), np.float32)
    return replace(scores, entropy_hi=scores.entropy + np.where(width < 0.3, 0, width))


def commit_rollouts(store: Store, seed: int, unit_key: str = "", **other: object) -> Segment:
    draws = bool(other.pop("draws", False))
    student = bool(other.pop("student", False)) or draws
    reward = bool(other.pop("reward", False))
    arguments = {
        "name": "main",
        "unit_key": unit_key or key("rollout", seed),
        "unit": {"version": 0, "first": seed},
        "provenance": ROLLOUT_PROVENANCE,
    }
    return store.commit_rollouts(
        make_rollouts(seed, student=student, draws=draws, reward=reward), **(arguments | other)
    )


def commit_scores(store: Store, base: Segment, seed: int, **other: object) -> Segment:
    scores = other.pop("scores", None) or make_scores(seed, store.read_rollouts(base))
    arguments = {
        "base": base,
        "name": "teacher",
        "unit_key": key("score", base.seg_id, seed),
        "unit": {"rollouts": base.seg_id},
        "provenance": SCORE_PROVENANCE,
    }
    return store.commit_scores(scores, **(arguments | other))


def forged(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """Return a record with a change of (head, body) and its right digests.

    The fields of an add are named, as in a Segment.
    """
    head, body = map(json.loads, record.split(data, ""))
    head["adds"] = [dict(zip(record.ADD, add, strict=True)) for add in head["adds"]]
    change(head, body)
    if isinstance(head["adds"], list):
        head["adds"] = [list(add.values()) if add else add for add in head["adds"]]
    return record.encode_record(head, body)


def long_log(store: Store, count: int) -> None:
    """Add `count` records, each with a segment whose object does not exist, to an empty store."""
    prev = store.log.prev()
    for number in range(count):
        seg = hashlib.sha256(b"%d" % number).hexdigest()
        new = Segment(
            kind="rollout",
            seg_id=seg[:32],
            unit_key=key("long", number),
            name="main",
            layout="plain",
            profile="default",
            counts={"M": 2, "N": 6, "P": 20 + number % 7, "T": 9, "J": 80},
            size=9000,
            sha256=f"sha256:{seg}",
            tokens_sha256=key("tokens", number),
            first=number,
            source=SegmentBody(
                unit={"version": 0, "first": number},
                provenance=ROLLOUT_PROVENANCE,
                entries=dict.fromkeys(ALONE, (0, 9, key("entry"))),
            ),
        )
        head = {"n": number, "prev": prev, "time": "2026-01-01T00:00:00+00:00", "tags": {}}
        head |= {"adds": [record.encode_add(new)], "deletes": [], "removes": []}
        body = {"commit_id": "", "writer": {}, "adds": [encode_body(new)]}
        data = record.encode_record(head, body)
        store.storage.create(f"log/{record.file_name(number)}", data)
        bundles.write(store.storage, number + 1)
        prev = sha256(record.split(data, "")[0])


class Dead(BaseException):
    """The end of a writer."""


def leave_pending(store: Store, seed: int, *arguments: Any, **other: Any) -> str:
    """Let a writer of rollouts lose a race, leave its pending add and die.

    Of scores where arguments are (base,). Return the name of the add if it is new.
    """
    before = set(store.storage.names("log"))
    with (
        mock.patch.object(pending._Writer, "_publish", return_value=False),
        mock.patch.object(pending._Writer, "_wait", side_effect=Dead),
        mock.patch.object(pending._Writer, "leave"),
        suppress(Dead),
    ):
        if arguments:
            commit_scores(store, *arguments, seed, **other)
        else:
            commit_rollouts(store, seed, **other)
    return next(iter(set(store.storage.names("log")) - before), "")


def encode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode each unit once and skip the check of its decoding, for tests of other things."""
    real, memo = segments.encode, {}

    def encode(arrays: Any, **options: Any) -> dict[str, bytes]:
        name = (options["layout"], options["attributes"]["base"], *map(bytes, arrays.values()))
        if name not in memo:
            memo[name] = real(arrays, **options)
        return memo[name]

    monkeypatch.setattr(commit.segments, "encode", encode)
    monkeypatch.setattr(commit.segments, "check_decodes", lambda *_, **__: None)
