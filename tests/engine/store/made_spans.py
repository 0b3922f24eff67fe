"""Scores of spans made from a seed, and their join with the student in plain Python."""

from typing import Any

import numpy as np

from logitcask.engine.alignment.span_scores import END, ENDS, GAP, NONE, PATCHED, STARTS, SpanScores
from logitcask.engine.store import Segment, Store
from logitcask.engine.store.decoded_unit import UNMAPPED
from logitcask.engine.types import Array, Rollouts
from tests.engine.store.made import SCORE_PROVENANCE, key, ragged

VOCAB = 60
"""Ids of the teacher; the student has 50."""


def alignment(rows: str) -> dict[str, str]:
    return {"student": key("student"), "teacher": key("table"), "rows": rows}


def _tokens(rng: np.random.Generator, marks: list[int], size: int) -> None:
    """Add the marks of the tokens of one span."""
    for i in range(size):
        patched = PATCHED if rng.random() < 0.2 else 0
        marks.append(patched | (END if i == size - 1 else 0))


def make_span_scores(seed: int, rollouts: Rollouts, rows: str = STARTS) -> SpanScores:
    """Cut each response into spans of one to three tokens, and gaps, on both sides."""
    rng = np.random.default_rng([seed, 7])
    ours: list[int] = []
    theirs: list[int] = []
    offsets = [0]
    for left in np.diff(rollouts.seq_off).tolist():
        while left > 0:
            if rng.random() < 0.15:
                ours.append(GAP)
                theirs += [GAP] * int(rng.integers(0, 3))
                left -= 1
                continue
            size = min(left, int(rng.integers(1, 4)))
            _tokens(rng, ours, size)
            _tokens(rng, theirs, int(rng.integers(1, 4)))
            left -= size
        offsets.append(len(theirs))
    spans = sum(1 for mark in theirs if mark & END)
    tokens = rng.integers(0, VOCAB, len(theirs)).astype(np.uint32)
    cnt = rng.integers(0, 9, spans if rows != NONE else 0).astype(np.uint16)
    ids, lp = ragged(rng, cnt, VOCAB, 4)
    last = np.flatnonzero(np.asarray(theirs, np.uint8) & END)
    for g, entry in enumerate(np.cumsum(cnt, dtype=int) - 1):
        # The best ids of a row mostly have the token that came.
        row = slice(entry + 1 - int(cnt[g]), entry + 1)
        if cnt[g] and tokens[last[g]] not in ids[row] and rng.random() < 0.7:
            ids[entry] = tokens[last[g]]
    pieces = np.unique(np.concatenate([tokens, ids]))
    # Some have no twin, and some share one.
    twins = np.where(rng.random(len(pieces)) < 0.25, -1, rng.integers(0, 50, len(pieces)))
    lengths = rng.integers(0, 5, len(pieces)).astype(np.uint16)
    entropy, tail = np.abs(rng.normal(3, 1, (2, len(cnt)))).astype(np.float32)
    return SpanScores(
        offsets=np.asarray(offsets, np.int64),
        tokens=tokens,
        log_probs=-rng.exponential(3.0, len(theirs)).astype(np.float32),
        marks=np.asarray(theirs, np.uint8),
        student_marks=np.asarray(ours, np.uint8),
        texts=rng.integers(-(2**63), 2**63 - 1, len(offsets) - 1),
        piece_ids=pieces.astype(np.uint32),
        piece_twins=twins.astype(np.int64),
        piece_lengths=lengths,
        piece_bytes=rng.integers(0, 256, int(lengths.sum())).astype(np.uint8),
        rows=rows,
        entropy=entropy,
        log_tail=-tail,
        kept=(cnt * rng.random(len(cnt))).astype(np.uint16),
        cnt=cnt,
        ids=ids,
        entry_lp=lp,
    )


def commit_span_scores(
    store: Store, base: Segment, seed: int, rows: str = STARTS, **other: Any
) -> Segment:
    scores = other.pop("scores", None) or make_span_scores(seed, store.read_rollouts(base), rows)
    arguments = {
        "base": base,
        "name": f"spans-{rows}",
        "unit_key": key("spans", base.seg_id, seed, rows),
        "unit": {"rollouts": base.seg_id},
        "provenance": SCORE_PROVENANCE | {"alignment": alignment(rows)},
    }
    return store.commit_span_scores(scores, **(arguments | other))


def spans_of(marks: Array, off: Array) -> list[list[list[int]]]:
    """Return for each sequence the indices of the tokens of each span."""
    every = []
    for start, end in zip(off[:-1].tolist(), off[1:].tolist(), strict=True):
        every.append([])
        current: list[int] = []
        for i in range(start, end):
            if marks[i] & GAP:
                continue
            current.append(i)
            if marks[i] & END:
                every[-1].append(current)
                current = []
    return every


def slow_rows(rollouts: Rollouts, scores: SpanScores) -> list[dict[str, Any]]:
    """Join scores with the student one row at a time, as the words of `SpanScores` say."""
    assert rollouts.student is not None
    twin_of = dict(zip(scores.piece_ids.tolist(), scores.piece_twins.tolist(), strict=True))
    none = {"span": -1, "span_q": np.nan, "span_row_q": np.nan, "span_tokens": 0}
    none |= {"q_token_lp": np.nan, "q_entropy": np.nan, "q_log_tail": 0.0, "kept": 0}
    rows = [none | {"s": [], "t": []} for _ in range(rollouts.positions)]
    student = np.concatenate([[0], np.cumsum(rollouts.student.cnt, dtype=int)])
    entries = np.concatenate([[0], np.cumsum(scores.cnt, dtype=int)])
    g = 0
    for ours, theirs in zip(
        spans_of(scores.student_marks, rollouts.seq_off),
        spans_of(scores.marks, scores.offsets),
        strict=True,
    ):
        for number, (own, of) in enumerate(zip(ours, theirs, strict=True)):
            q = float(np.float32(sum(float(scores.log_probs[j]) for j in of)))
            one = len(own) == len(of) == 1
            for r in own:
                rows[r] |= {"span": number, "span_q": q, "span_tokens": len(of)}
                row_token = of[-1] if scores.rows == ENDS else of[0]
                rows[r]["span_row_q"] = float(scores.log_probs[row_token])
                rows[r]["q_token_lp"] = q if one else np.nan
            if scores.rows != NONE:
                at = own[-1] if scores.rows == ENDS else own[0]
                row = rows[at] | {"kept": int(scores.kept[g])}
                row["q_entropy"] = float(scores.entropy[g])
                row["q_log_tail"] = float(scores.log_tail[g])
                listed = list(range(*entries[g : g + 2].tolist()))
                found: dict[int, int] = {}
                if one:
                    realised = [e for e in listed if scores.ids[e] == scores.tokens[of[0]]]
                    found |= {int(rollouts.tokens[at]): e for e in realised}
                for e in listed:
                    twin = twin_of[int(scores.ids[e])]
                    if twin >= 0 and e not in found.values():
                        found.setdefault(twin, e)
                for i in range(*student[at : at + 2].tolist()):
                    v = int(rollouts.student.ids[i])
                    e = found.get(v)
                    lp = -np.inf if e is None else float(scores.entry_lp[e])
                    rank = 0xFFFF if e is None else listed.index(e)
                    row["s"].append((v, lp, rank, float(rollouts.student.entry_lp[i])))
                used = {found.get(v) for v, *_ in row["s"]}
                name = {e: v for v, e in found.items()}
                row["t"] += [
                    (name.get(e, UNMAPPED), float(scores.entry_lp[e]), listed.index(e))
                    for e in listed
                    if e not in used
                ]
                rows[at] = row
            g += 1
    return rows
