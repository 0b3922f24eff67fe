"""Packs as tensors, from the units of a store.

A source decodes whole units and keeps them in memory up to a number of bytes: to read single
sequences from compressed chunks would decode each chunk many times. A thread decodes the units that
are needed next. A source can be pickled for another process (`spawn`), which opens the store again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any

import numpy as np
import torch

from logitcask.engine.errors import IncompleteError, StoreError
from logitcask.engine.models.identity import digest
from logitcask.engine.packing.plan import (
    WINDOW_BYTES,
    Lengths,
    PackPlan,
    PlanKey,
    default_pack_length,
    make_plan,
)
from logitcask.engine.packing.targets import Targets, empty_sequence, make_targets, tensor
from logitcask.engine.store import ScoreSegments, Segment, Snapshot, Store
from logitcask.engine.store.cache import UnitCache, read_unit
from logitcask.engine.store.decoded_unit import DecodedUnit, dtypes_of, is_bounded, size_of
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

    def to(self, device: torch.device | str) -> "Pack":
        return Pack(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class PackSource:
    """Source of packs: one set of rollouts and one teacher's scores of it."""

    def __init__(
        self,
        store: Store,
        snapshot: Snapshot,
        rollouts_name: str,
        teacher: str,
        *,
        base: str | None = None,
        partial: bool = False,
        only: Callable[[Segment], bool] | None = None,
        memory_bytes: int = WINDOW_BYTES,
        cache: UnitCache | None = None,
    ) -> None:
        """Match rollout segments and scores at a snapshot.

        base: name of the scores of the teacher's base model. only: filter of the rollout segments.
        memory_bytes: limit of the decoded units in memory, without those being decoded ahead; with
        a `cache` they are files, and the page cache of the system decides.

        Raises StoreError if the names hold nothing, IncompleteError if units are missing and
        `partial` is False.
        """
        self._store = store
        self._cache = cache
        self._memory_bytes = memory_bytes
        self._init_threads()
        self._names = (snapshot.number, snapshot.sha256, rollouts_name, teacher)
        scores = snapshot.scores(teacher)
        self.base = base
        of_base = {} if base is None else snapshot.scores(base)
        segments = tuple(s for s in snapshot.rollouts(rollouts_name) if only is None or only(s))
        if not partial:
            check_complete(store, segments, scores, rollouts_name, teacher)
            if base is not None:
                check_complete(
                    store, segments, of_base, rollouts_name, base, flag=" --teacher-kind base"
                )
        self.pairs: tuple[tuple[Segment, ScoreSegments], ...] = tuple(
            (segment, scores[segment.seg_id])
            for segment in segments
            if segment.seg_id in scores and (base is None or segment.seg_id in of_base)
        )
        """(rollout segment, its scores), by the ordinals of a plan."""
        self._bases: tuple[ScoreSegments, ...] = tuple(
            of_base.get(s.seg_id, ()) for s, _ in self.pairs
        )
        self.bounded = any(is_bounded(scores) for _, scores in self.pairs)
        """True if the teacher's entropies are intervals in at least one unit."""
        if not self.pairs:
            raise StoreError(
                f"{store.url} has no rollouts {rollouts_name!r} with scores of {teacher!r}"
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
        for (segment, scores), base in zip(self.pairs, self._bases, strict=True):
            extent = self._store.read_extent(segment)
            found.append(
                Lengths(
                    seg_id=segment.seg_id,
                    prompt_ids=extent.prompt_ids,
                    seq_prompt=extent.seq_prompt,
                    prompt=extent.prompt[extent.seq_prompt],
                    response=extent.response,
                    size_bytes=size_of(segment, scores, base),
                )
            )
        return found

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
        parts = [self._unit(int(o)).sequence(int(s)) for o, s in members]
        # All units of one name have the same arrays, but some may hold an exact entropy.
        parts = parts or [empty_sequence(dtypes_of(*self.pairs[0], self._bases[0]))]
        if self.bounded:
            parts = [{"q_entropy_hi": part["q_entropy"], **part} for part in parts]
        flat = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        tokens = [len(part["input_ids"]) for part in parts]
        first = np.cumsum([0, *tokens[:-1]])
        rows = [len(part["token"]) for part in parts]
        flat["sequence"] = np.repeat(np.arange(len(parts)), rows)
        predict_at = [part["predict_at"] + at for part, at in zip(parts, first, strict=True)]
        return Pack(
            input_ids=tensor(flat["input_ids"])[None],
            position_ids=tensor(np.concatenate([np.arange(n) for n in tokens]))[None],
            predict_at=tensor(np.concatenate(predict_at)),
            targets=make_targets(flat),
        )

    def decode_ahead(self, ordinals: Iterable[int]) -> None:
        """Decode units in a thread, in this order, while others are read."""
        if self._decoder is None:
            self._decoder = ThreadPoolExecutor(1, "logitcask-decode")
        with self._lock:
            for ordinal in ordinals:
                if ordinal not in self._units and ordinal not in self._futures:
                    self._futures[ordinal] = self._decoder.submit(self._read, ordinal)

    def _unit(self, ordinal: int) -> DecodedUnit:
        with self._lock:
            if ordinal in self._units:
                self._units.move_to_end(ordinal)
                return self._units[ordinal]
            future = self._futures.pop(ordinal, None)
        unit = self._read(ordinal) if future is None else future.result()
        with self._lock:
            self._units[ordinal] = unit
            size = sum(each.size_bytes for each in self._units.values())
            while self._cache is None and size > self._memory_bytes and len(self._units) > 1:
                size -= self._units.popitem(last=False)[1].size_bytes
        return unit

    def _read(self, ordinal: int) -> DecodedUnit:
        read = read_unit if self._cache is None else self._cache.unit
        return read(self._store, *self.pairs[ordinal], self._bases[ordinal])


def check_complete(
    store: Store,
    segments: Sequence[Segment],
    scores: Mapping[str, ScoreSegments],
    rollouts_name: str,
    teacher: str,
    *,
    flag: str = "",
) -> None:
    """Raise IncompleteError if planned rollout units, or scores of committed units, are missing.

    flag: the flag of `logitcask score` that makes such scores.
    """
    # Each version of the student has its own number of planned units.
    of = {(s.unit["version"], digest(s.provenance["student"])): s.provenance for s in segments}
    if not all("units" in provenance["set"] for provenance in of.values()):
        raise IncompleteError(
            f"rollouts {rollouts_name!r} do not record how many units were planned (set.units)",
            hint="train on the committed units with --partial, or commit them with that number",
        )
    planned_units = sum(provenance["set"]["units"] for provenance in of.values())
    if planned_units > len(segments):
        raise IncompleteError(
            f"{planned_units - len(segments)} of {planned_units} units of rollouts "
            f"{rollouts_name!r} are missing",
            hint=f"repeat the first `logitcask rollout --store {store.url} --rollouts "
            f"{rollouts_name}`, or train on the committed units with --partial",
        )
    missing = sum(segment.seg_id not in scores for segment in segments)
    if missing:
        raise IncompleteError(
            f"{missing} of {len(segments)} units of rollouts {rollouts_name!r} have no scores of "
            f"{teacher!r}",
            hint=f"run `logitcask score --model TEACHER --store {store.url} "
            f"--rollouts {rollouts_name} --teacher {teacher}{flag}`, or train on the scored units "
            "with --partial",
        )
