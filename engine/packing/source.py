"""Packs as tensors, from the units of a store.

A source decodes whole units and keeps them in memory up to a number of bytes: to read single
sequences from compressed chunks would decode each chunk many times. A thread decodes the units that
are needed next. A source can be pickled for another process (`spawn`), which opens the store again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
import torch

from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.errors import StoreError
from logitcask.engine.events import counted
from logitcask.engine.packing.kinds import check_same_kind
from logitcask.engine.packing.missing import check_planned, check_scored
from logitcask.engine.packing.plan import (
    WINDOW_BYTES,
    Lengths,
    PackPlan,
    PlanKey,
    default_pack_length,
    make_plan,
)
from logitcask.engine.packing.several import alike, combined, count_rows
from logitcask.engine.packing.targets import Targets, empty_sequence, make_targets, tensor
from logitcask.engine.packing.teacher_weights import scores_of_prompts
from logitcask.engine.packing.teachers import NO_MIX, Source, Teachers
from logitcask.engine.store import ScoreSegments, Segment, Snapshot, Store
from logitcask.engine.store.cache import UnitCache, read_unit
from logitcask.engine.store.decoded_unit import (
    DecodedUnit,
    dtypes_of,
    has_spans,
    is_bounded,
    size_of,
)
from logitcask.engine.store.format.rows import last_marked
from logitcask.engine.store.log.snapshot import are_partial
from logitcask.engine.types import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Whole sequences laid end to end in one forward pass of L tokens, and their P rows."""

    input_ids: torch.Tensor
    """[1, L] int64."""
    position_ids: torch.Tensor
    """[1, L] int64, from 0 in every sequence, which separates the sequences of a pack."""
    predict_at: torch.Tensor
    """[P] int64, index into L of the hidden state that predicts each row: prompt_len + r - 1."""
    targets: Targets
    lengths: tuple[int, ...]
    """Tokens of each sequence, on the host: no layer waits for a GPU to cut the pack."""
    sources: Mapping[Source, int] = field(default_factory=dict)
    """Origin -> its rows with a weight, for the ledger of a run."""

    def to(self, device: torch.device | str) -> "Pack":
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            predict_at=self.predict_at.to(device),
            targets=self.targets.to(device),
        )


class PackSource:
    """Source of packs: one set of rollouts, and a teacher's scores of it or those of several."""

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        rollouts_name: str,
        teacher: str,
        *,
        teacher_field: str | None = None,
        mix: TeacherMix = NO_MIX,
        base: str | None = None,
        partial: bool = False,
        only: Callable[[Segment], bool] | None = None,
        scores: Mapping[str, ScoreSegments] | None = None,
        memory_bytes: int = WINDOW_BYTES,
        cache: UnitCache | None = None,
    ) -> None:
        """Match rollout segments and scores at a snapshot.

        teacher, teacher_field, mix: see teachers.py. base: name of the scores of the teacher's base
        model. only: filter of the rollout segments. scores: seg_id -> scores, in place of those of
        the one name `teacher`. memory_bytes: limit of the decoded units in memory, without those
        being decoded ahead; with a `cache` they are files, and the page cache of the system
        decides.

        Raises StoreError if the names hold nothing, IncompleteError if units are missing and
        `partial` is False, ConfigError for prompts without a teacher and for teachers whose scores
        are of two kinds.
        """
        self._store = store
        self._cache = cache
        self._memory_bytes = memory_bytes
        self._init_threads()
        self.teachers = Teachers.parse(teacher, teacher_field, mix)
        self._names = (snapshot.number, snapshot.sha256, rollouts_name, self.teachers.key())
        found = {n: snapshot.scores(n) if scores is None else scores for n in self.teachers.names}
        self.base = base
        of_base = {} if base is None else snapshot.scores(base)
        segments = tuple(s for s in snapshot.rollouts(rollouts_name) if only is None or only(s))
        routes = [self._routes(segment) for segment in segments]
        if not partial:
            check_planned(store, segments, rollouts_name)
            for name in self.teachers.names:
                needed = [
                    s for s, (names, _) in zip(segments, routes, strict=True) if name in names
                ]
                check_scored(store, needed, found[name], rollouts_name, name)
            if base is not None:
                flag = " --teacher-kind base"
                check_scored(store, segments, of_base, rollouts_name, base, flag=flag)
        pairs: list[tuple[Segment, ScoreSegments]] = []
        self._ranges: list[range] = []
        self._pair_of: list[Array] = []
        for segment, (names, index) in zip(segments, routes, strict=True):
            key = segment.seg_id
            if all(key in found[n] for n in names) and (base is None or key in of_base):
                self._ranges.append(range(len(pairs), len(pairs) + len(names)))
                self._pair_of.append(len(pairs) + index)
                pairs += [(segment, found[name][key]) for name in names]
        self.pairs = tuple(pairs)
        """(rollout segment, its scores) of every teacher that the segment needs, one after the
        other; for one teacher by the ordinals of a plan.
        """
        self._bases: tuple[ScoreSegments, ...] = tuple(
            of_base.get(s.seg_id, ()) for s, _ in self.pairs
        )
        check_same_kind(
            self.teachers,
            [[self.pairs[i][1] for i in indices] for indices in self._ranges],
            [each for each in self._bases if each],
            store.read_marks,
        )
        self._of_prompt = scores_of_prompts(
            store, snapshot, [self.pairs[each[0]][0] for each in self._ranges], self.teachers
        )
        self.bounded = any(is_bounded(scores) for _, scores in self.pairs)
        """True if the teacher's entropies are intervals in at least one unit."""
        self.has_spans = any(has_spans(scores) for _, scores in self.pairs)
        """True if a teacher has another tokenizer: then the targets of all of them have spans."""
        if not self.pairs:
            raise StoreError(
                f"{store.url} has no rollouts {rollouts_name!r} with scores of "
                f"{str(self.teachers)!r}"
                f"{'' if base is None else f' and {base!r}'} at log number {snapshot.number}",
                hint=f"it has rollouts {snapshot.names('rollout')} and scores "
                f"{snapshot.names('score')}",
            )

    def _init_threads(self) -> None:
        self._lock = Lock()
        self._units: OrderedDict[int, DecodedUnit] = OrderedDict()
        self._futures: dict[int, Future[DecodedUnit]] = {}
        self._decoder: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_units", "_futures", "_decoder")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._init_threads()

    def lengths(self) -> list[Lengths]:
        """Return the lengths of every unit, by the ordinals of a plan."""
        found = []
        ranges = counted("read lengths", self._ranges, len(self._ranges), "segments")
        for ordinal, indices in enumerate(ranges):
            segment = self.pairs[indices[0]][0]
            extent = self._store.read_extent(segment)
            reach = np.stack([self._reach(i, extent.response) for i in indices])
            if self.teachers.mixed:
                response = reach.max(0)
            else:
                of_sequence = self._pair_of[ordinal] - indices.start
                response = reach[of_sequence, np.arange(len(of_sequence))]
            found.append(
                Lengths(
                    seg_id=segment.seg_id,
                    prompt_ids=extent.prompt_ids,
                    seq_prompt=extent.seq_prompt,
                    prompt=extent.prompt[extent.seq_prompt],
                    response=response,
                    size_bytes=sum(size_of(*self.pairs[i], self._bases[i]) for i in indices),
                )
            )
        return found

    def _reach(self, index: int, lengths: Array) -> Array:
        """Return [N] the response tokens of each sequence that pair `index` has rows of."""
        chains = [each for each in (self.pairs[index][1], self._bases[index]) if each]
        marks = [self._store.read_marks(each) for each in chains]
        known = [each for each in marks if each is not None]
        return last_marked(np.logical_and.reduce(known), lengths) if known else lengths

    def coverage(self) -> str:
        """Return the share of the positions that have a score, as text; empty = all."""
        chains = [scores for _, scores in self.pairs] + [base for base in self._bases if base]
        if not any(map(are_partial, chains)):
            return ""
        scored = sum(each.rows for _, scores in self.pairs for each in scores)
        total = sum(segment.counts["P"] for segment, _ in self.pairs)
        return f"{100 * scored / max(1, total):.3g} % of the positions"

    def teacher_models(self) -> dict[str, Mapping[str, Any]]:
        """Return the recorded model of each name of scores."""
        firsts = {scores[0].name: scores[0] for _, scores in self.pairs}
        found = {name: each.provenance.get("teacher") for name, each in firsts.items()}
        return {name: model for name, model in found.items() if isinstance(model, Mapping)}

    def plan(
        self, *, seed: int, epochs: int, pack_length: int | None, window_bytes: int = WINDOW_BYTES
    ) -> PackPlan:
        """Plan the packs of all sequences; raises ConfigError for one longer than a pack.

        pack_length: None = default_pack_length.
        """
        lengths = self.lengths()
        number, sha256, rollouts, teacher = self._names
        key = PlanKey(
            snapshot=number,
            snapshot_sha256=sha256,
            rollouts=rollouts,
            teacher=teacher,
            seed=seed,
            epochs=epochs,
            pack_length=pack_length or default_pack_length(lengths),
            window_bytes=window_bytes,
        )
        return make_plan(key, lengths)

    def pack(self, members: Array) -> Pack:
        """Return the pack of [n, 2] (unit ordinal, sequence).

        Without members it has one token and no rows, so that its loss is zero.
        """
        # A sequence has a part for each of its teachers, one after the other, or one of their mix.
        made, ids, sources = self._made(members)
        parts = [part for each in made for part in each]
        flat = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        tokens = [len(each) for each in ids]
        first = np.repeat(np.cumsum([0, *tokens[:-1]]), [len(each) for each in made])
        rows = [len(part["token"]) for part in parts]
        flat["sequence"] = np.repeat(np.arange(len(parts)), rows)
        predict_at = [part["predict_at"] + at for part, at in zip(parts, first, strict=True)]
        return Pack(
            input_ids=tensor(np.concatenate(ids))[None],
            position_ids=tensor(np.concatenate([np.arange(n) for n in tokens]))[None],
            predict_at=tensor(np.concatenate(predict_at)),
            targets=make_targets(flat),
            lengths=tuple(tokens),
            sources=sources,
        )

    def _made(
        self, members: Array
    ) -> tuple[list[list[dict[str, Array]]], list[Array], dict[Source, int]]:
        """Return the parts of each sequence as the loss reads them, its tokens, and the origins.

        Without members they are those of one sequence without rows.
        """
        pairs = [list(self._pairs(ordinal, sequence)) for ordinal, sequence in members]
        read = [
            [self._unit(index).sequence(int(sequence)) for index in indices]
            for indices, (_, sequence) in zip(pairs, members, strict=True)
        ]
        sources = count_rows(
            [(*self.pairs[i], self._bases[i]) for indices in pairs for i in indices],
            [part for parts in read for part in parts],
        )
        if not read:
            empty = empty_sequence(dtypes_of(*self.pairs[0], self._bases[0]))
            read = [[empty] * len(self.teachers.weights)]
        read = [alike(parts, self.bounded, self.has_spans) for parts in read]
        # One teacher may have scored fewer positions, and its part then ends earlier.
        ids = [max((part["input_ids"] for part in parts), key=len) for parts in read]
        scores: Sequence[Array | None] = [None] * len(read)
        if self._of_prompt is not None:
            none = [np.zeros(len(self.teachers.weights))]
            scores = [self._of_prompt[o][:, s] for o, s in members] or none
        made = [
            combined(parts, self.teachers, of_prompt)
            for parts, of_prompt in zip(read, scores, strict=True)
        ]
        return made, ids, sources

    def decode_ahead(self, ordinals: Iterable[int]) -> None:
        """Decode units in a thread, in this order, while others are read."""
        if self._decoder is None:
            self._decoder = ThreadPoolExecutor(1, "logitcask-decode")
        with self._lock:
            for index in (i for ordinal in ordinals for i in self._ranges[ordinal]):
                if index not in self._units and index not in self._futures:
                    self._futures[index] = self._decoder.submit(self._read, index)

    def _pairs(self, ordinal: int, sequence: int) -> Iterable[int]:
        """Return the indices of the pairs that hold the scores of a sequence."""
        if self.teachers.mixed:
            return self._ranges[ordinal]
        return [int(self._pair_of[ordinal][sequence])]

    def _unit(self, index: int) -> DecodedUnit:
        """Return the unit of pair `index`."""
        with self._lock:
            if index in self._units:
                self._units.move_to_end(index)
                return self._units[index]
            future = self._futures.pop(index, None)
        unit = self._read(index) if future is None else future.result()
        with self._lock:
            self._units[index] = unit
            size = sum(each.size_bytes for each in self._units.values())
            while self._cache is None and size > self._memory_bytes and len(self._units) > 1:
                size -= self._units.popitem(last=False)[1].size_bytes
        return unit

    def _read(self, index: int) -> DecodedUnit:
        read = read_unit if self._cache is None else self._cache.unit
        return read(self._store, *self.pairs[index], self._bases[index])

    def _routes(self, segment: Segment) -> tuple[tuple[str, ...], Array]:
        """Return the teachers that a segment needs, and the index of that of each sequence [N]."""
        if not self.teachers.routes:
            return self.teachers.names, np.zeros(segment.counts["N"], np.int64)
        extent = self._store.read_extent(segment)
        of_prompt = self.teachers.of_prompts(extent.prompt_ids, extent.prompt_extra)
        names = tuple(name for name in self.teachers.names if name in of_prompt)
        index = np.asarray([names.index(name) for name in of_prompt], np.int64)
        return names, index[extent.seq_prompt]
