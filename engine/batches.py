"""Pinned store -> packed rows: what a training step reads.

A *row source* turns one planned row into tensors. It decodes whole segments and keeps them in a
cache bounded in bytes: reading single samples from compressed chunks would decode each many times.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch

from logitcask.engine.errors import IncompleteError, StoreError
from logitcask.engine.identity import digest
from logitcask.engine.plan import Lengths, Plan, PlanKey, make_plan
from logitcask.engine.store import Extent, Pin, Segment, Store
from logitcask.engine.targets import BEYOND, Targets
from logitcask.engine.types import Array, Rollouts, Scores


class Rows(Protocol):
    """Where a trainer gets its rows from: a plan, or a loop that makes them just in time."""

    def prepare(self, step: int) -> None:
        """Called once before the rows of optimizer update `step` (from 0) are read; may wait."""

    def row(self, index: int) -> "PackedRow":
        """Row `index` of the run; an update reads consecutive indices, split over the processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """Whole sequences laid end to end in one forward pass of L tokens, and their P rows."""

    input_ids: torch.Tensor
    """[1, L] int64."""
    position_ids: torch.Tensor
    """[1, L] int64, from 0 in every sequence: that is what keeps packed sequences apart."""
    predict_at: torch.Tensor
    """[P] int64, index into L of the hidden state that predicts each row: prompt_len + r - 1."""
    targets: Targets

    def to(self, device: torch.device | str) -> "PackedRow":
        return PackedRow(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class RowSource:
    """Reads planned rows of one set of rollouts and one teacher's scores of it."""

    def __init__(
        self,
        store: Store,
        pin: Pin,
        rollouts_name: str,
        teacher: str,
        *,
        partial: bool = False,
        only: Callable[[Segment], bool] = lambda segment: True,
        cache_bytes: int = 1 << 30,
    ) -> None:
        """`only` picks among the rollout segments of the name.

        Raises StoreError if the names hold nothing, IncompleteError if units are missing and
        `partial` does not allow that. `cache_bytes` bounds the decoded segments that are kept.
        """
        self._store = store
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[int, _Decoded] = OrderedDict()
        scores = pin.scores(teacher)
        segments = tuple(s for s in pin.rollouts(rollouts_name) if only(s))
        if not partial:
            check_complete(store, segments, scores, rollouts_name, teacher)
        self.pairs: tuple[tuple[Segment, Segment], ...] = tuple(
            (segment, scores[segment.seg_id]) for segment in segments if segment.seg_id in scores
        )
        """(rollout segment, its scores): the ordinals of a plan."""
        if not self.pairs:
            raise StoreError(
                f"{store.path} has no rollouts {rollouts_name!r} with scores of {teacher!r} at log "
                f"number {pin.number}",
                remedy=f"it has rollouts {pin.names('rollout')} and scores {pin.names('score')}",
            )

    def lengths(self) -> list[Lengths]:
        """Of every segment, in the ordinals of a plan."""
        return [_lengths(s.seg_id, self._store.read_extent(s)) for s, _ in self.pairs]

    def row(self, members: Array) -> PackedRow:
        """The packed row of [n, 2] (segment ordinal, sequence); no members give a row of one token
        and no targets, whose loss is zero.
        """
        parts = [self._decoded(int(o)).sequence(int(s)) for o, s in members] or [_NOTHING]
        flat = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        tokens = [len(part["input_ids"]) for part in parts]
        starts = np.cumsum([0, *tokens[:-1]])
        predict_at = np.concatenate(
            [part["predict_at"] + start for part, start in zip(parts, starts, strict=True)]
        )
        position_ids = np.concatenate([np.arange(n) for n in tokens])
        return PackedRow(
            input_ids=_tensor(flat["input_ids"])[None],
            position_ids=_tensor(position_ids)[None],
            predict_at=_tensor(predict_at),
            targets=_targets(flat),
        )

    def _decoded(self, ordinal: int) -> "_Decoded":
        if ordinal in self._cache:
            self._cache.move_to_end(ordinal)
            return self._cache[ordinal]
        rollout, score = self.pairs[ordinal]
        rollouts = self._store.read_rollouts(rollout)
        scores = self._store.read_scores(score, base=rollouts)
        decoded = _Decoded(rollout.seg_id, rollouts, scores)
        self._cache[ordinal] = decoded
        held = sum(entry.size_bytes for entry in self._cache.values())
        while held > self._cache_bytes and len(self._cache) > 1:
            held -= self._cache.popitem(last=False)[1].size_bytes
        return decoded


class PlannedRows:
    """`Rows` of a plan: nothing to prepare, everything is in the store."""

    def __init__(self, plan: Plan, source: RowSource) -> None:
        self._plan = plan
        self._source = source

    def prepare(self, step: int) -> None:
        """All rows exist before training starts."""

    def row(self, index: int) -> PackedRow:
        return self._source.row(self._plan.row(index))


def batches(
    store: Store,
    *,
    pin: Pin,
    rollouts: str,
    teacher: str,
    tokens_per_batch: int = 16384,
    seed: int = 0,
    epochs: int = 1,
) -> Iterator[PackedRow]:
    """Packed rows for a training loop of one's own, `epochs` times through the pinned data."""
    source = RowSource(store, pin, rollouts, teacher)
    key = PlanKey(
        pin=pin.number,
        pin_sha256=pin.sha256,
        rollouts=rollouts,
        teacher=teacher,
        seed=seed,
        epochs=epochs,
        tokens_per_batch=tokens_per_batch,
    )
    plan = make_plan(key, source.lengths())
    return (source.row(plan.row(index)) for index in range(len(plan)))


def check_complete(
    store: Store,
    segments: Sequence[Segment],
    scores: Mapping[str, Segment],
    rollouts_name: str,
    teacher: str,
) -> None:
    """IncompleteError if planned rollout units or scores of committed ones are missing."""
    # One sampler's units: what it left out is no other's.
    of = {(s.unit["version"], digest(s.lineage["student"])): s.lineage for s in segments}
    planned = sum(int(lineage["set"]["units"]) for lineage in of.values())
    if planned > len(segments):
        raise IncompleteError(
            f"{planned - len(segments)} of {planned} units of rollouts {rollouts_name!r} are "
            "missing",
            remedy=f"go on with `logitcask rollout --store {store.path} --rollouts {rollouts_name}`"
            " as it was called first, or train on what is there with --partial",
        )
    missing = sum(segment.seg_id not in scores for segment in segments)
    if missing:
        raise IncompleteError(
            f"{missing} of {len(segments)} units of rollouts {rollouts_name!r} have no scores of "
            f"{teacher!r}",
            remedy=f"run `logitcask score --model TEACHER --store {store.path} "
            f"--rollouts {rollouts_name} --teacher {teacher}`, or train on what is scored with "
            "--partial",
        )


class _Decoded:
    """One segment's arrays, with the offsets that cut out a sequence."""

    def __init__(self, seg_id: str, rollouts: Rollouts, scores: Scores) -> None:
        student = rollouts.student
        if student is None:
            raise IncompleteError(
                f"rollout segment {seg_id} has no scores by its own student",
                remedy="sample again with `logitcask rollout`: every sampler of ours scores itself",
            )
        self._prompt_off = _offsets(
            np.array([len(p.token_ids) for p in rollouts.prompts], np.int64)
        )
        self._prompt_tokens = np.array(
            [t for p in rollouts.prompts for t in p.token_ids], dtype=np.int64
        )
        self._seq_prompt, self._seq_off = rollouts.seq_prompt, rollouts.seq_off
        self._version = rollouts.version_start
        self._at_row = {
            "token": rollouts.tokens,
            "weight": rollouts.loss_mask,
            "b_lp": rollouts.b_lp,
            "s_lp": student.lp,
            "s_entropy": student.entropy,
            "s_cnt": student.cnt,
            "q_token_lp": scores.lp,
            "q_entropy": scores.entropy,
            "q_log_tail": scores.log_tail,
            "t_cnt": scores.cnt,
        }
        self._s_off, self._t_off = _offsets(student.cnt), _offsets(scores.cnt)
        self._at_student = {"s_ids": student.ids}
        if scores.at_student is not None:
            self._at_student["s_q"] = scores.at_student
        self._at_teacher = {"t_ids": scores.ids, "t_q": scores.entry_lp}
        groups = (self._at_row, self._at_student, self._at_teacher)
        self.size_bytes = sum(int(a.nbytes) for group in groups for a in group.values())

    def sequence(self, index: int) -> dict[str, Array]:
        """Every array of one sequence; ragged ones flat."""
        a, b = self._seq_off[index], self._seq_off[index + 1]
        prompt = int(self._seq_prompt[index])
        tokens = self._prompt_tokens[self._prompt_off[prompt] : self._prompt_off[prompt + 1]]
        part = {name: array[a:b] for name, array in self._at_row.items()}
        part |= {k: v[self._s_off[a] : self._s_off[b]] for k, v in self._at_student.items()}
        part |= {k: v[self._t_off[a] : self._t_off[b]] for k, v in self._at_teacher.items()}
        return part | {
            "version": np.full(b - a, self._version[index], np.int64),
            "input_ids": np.concatenate([tokens, part["token"].astype(np.int64)]),
            # The last prompt token predicts response token 0.
            "predict_at": len(tokens) - 1 + np.arange(b - a),
        }


def _lengths(seg_id: str, extent: Extent) -> Lengths:
    return Lengths(
        seg_id=seg_id,
        prompt_ids=extent.prompt_ids,
        seq_prompt=extent.seq_prompt,
        prompt=extent.prompt[extent.seq_prompt],
        response=extent.response,
    )


def _offsets(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _tensor(array: Array, dtype: Any = np.int64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype))


_NOTHING: dict[str, Array] = {
    **dict.fromkeys(
        ("token", "weight", "b_lp", "s_lp", "s_entropy", "s_cnt", "q_token_lp", "q_entropy"),
        np.zeros(0),
    ),
    **dict.fromkeys(("q_log_tail", "s_q", "t_q"), np.zeros(0)),
    **dict.fromkeys(("t_cnt", "s_ids", "t_ids", "version", "predict_at"), np.zeros(0, np.int64)),
    "input_ids": np.zeros(1, np.int64),
}


def _targets(flat: Mapping[str, Array]) -> Targets:
    """Columns of P rows: the student's stored ids, the teacher's other kept ids, then the sampled
    token where it is in neither list.

    Where the teacher was not asked at the student's ids (no `s_q`), only those of them that it kept
    are columns: nothing is known of the others.
    """
    token = flat["token"].astype(np.int64)
    rows = len(token)
    s_ids, s_in = _matrix(flat["s_ids"].astype(np.int64), flat["s_cnt"], -1)
    t_ids, t_in = _matrix(flat["t_ids"].astype(np.int64), flat["t_cnt"], -2)
    t_q, _ = _matrix(flat["t_q"], flat["t_cnt"], -np.inf)
    s_rank = np.full(s_ids.shape, BEYOND, np.int64)
    only_t = t_in.copy()
    for s_col in range(s_ids.shape[1]):
        hit = t_ids == s_ids[:, s_col : s_col + 1]
        s_rank[hit.any(1), s_col] = hit.argmax(1)[hit.any(1)]
        only_t &= ~hit
    if "s_q" in flat:
        s_q, _ = _matrix(flat["s_q"], flat["s_cnt"], -np.inf)
    else:
        s_in = s_rank < BEYOND
        s_q = np.full(s_ids.shape, -np.inf)
        at = np.nonzero(s_in)
        s_q[at] = t_q[at[0], s_rank[at]]
    listed = ((s_ids == token[:, None]) & s_in).any(1) | (t_ids == token[:, None]).any(1)

    keep = np.concatenate([s_in, only_t, ~listed[:, None]], 1)
    row, source = np.nonzero(keep)
    column = (np.cumsum(keep, 1) - 1)[row, source]
    width = int(keep.sum(1).max(initial=0))

    def place(parts: list[Array], pad: Any, dtype: Any) -> Array:
        out = np.full((rows, width), pad, dtype)
        out[row, column] = np.concatenate(parts, 1)[row, source]
        return out

    t_rank = np.broadcast_to(np.arange(t_ids.shape[1]), t_ids.shape)
    q_token = flat["q_token_lp"].astype(np.float32)
    ids = place([s_ids, t_ids, token[:, None]], -1, np.int64)
    q_log_p = place([s_q, t_q, q_token[:, None]], -np.inf, np.float32)
    token_col = (ids == token[:, None]).argmax(1) if width else np.zeros(0, np.int64)
    # The sampled token's own value is stored in full precision; entries may be rounded.
    q_log_p[np.arange(rows), token_col] = q_token
    beyond = np.full((rows, 1), BEYOND, np.int64)
    in_student = [np.ones_like(s_in), np.zeros_like(t_in), np.zeros((rows, 1), bool)]
    cached = [np.ones_like(s_in), np.ones_like(t_in), np.zeros((rows, 1), bool)]
    floats = ("weight", "q_log_tail", "q_entropy", "s_entropy", "s_lp", "b_lp")
    return Targets(
        token=_tensor(token),
        ids=_tensor(ids),
        q_log_p=_tensor(q_log_p, np.float32),
        q_rank=_tensor(place([s_rank, t_rank, beyond], BEYOND, np.int64)),
        in_student=_tensor(place(in_student, False, bool), bool),
        cached=_tensor(place(cached, False, bool), bool),
        token_col=_tensor(token_col),
        kept=_tensor(flat["t_cnt"]),
        q_token_lp=_tensor(q_token, np.float32),
        version=_tensor(flat["version"]),
        **{name: _tensor(flat[name], np.float32) for name in floats},
    )


def _matrix(flat: Array, counts: Array, pad: float) -> tuple[Array, Array]:
    """Ragged rows as ([P, K], [P, K] bool: an entry, not padding)."""
    width = int(counts.max(initial=0))
    valid = np.arange(width) < counts.astype(np.int64)[:, None]
    out = np.full(valid.shape, pad, np.result_type(flat.dtype, type(pad)))
    out[valid] = flat
    return out, valid
