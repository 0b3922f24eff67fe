"""The scored sequences of a store, for the trainers of others."""

from pathlib import Path

import numpy as np

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import open_store
from logitcask.engine.store.inspect import choose, choose_teacher
from logitcask.engine.store.spans.views import check_tokens
from logitcask.engine.types import Array


def open_stored(
    store: str | Path, rollouts: str | None, teacher: str | None, snapshot: int | str | None
) -> tuple[PackSource, Array]:
    """Return the source of a store's packs, and [n, 2] (unit, sequence) of all responses.

    store: folder or URL. rollouts, teacher: names, which may be None where the store has one.
    snapshot: log number or tag; None = the newest. Raises as `choose`, check_tokens and PackSource.
    """
    opened = open_store(store)
    at = opened.head() if snapshot is None else opened.snapshot(snapshot)
    rollouts = choose(at.names("rollout"), rollouts, what="rollouts")
    teacher = choose_teacher(at, teacher)
    check_tokens(at, teacher)
    source = PackSource(opened, at, rollouts, teacher)
    members = [
        (unit, sequence)
        for unit, lengths in enumerate(source.lengths())
        for sequence in np.flatnonzero(lengths.response)
    ]
    return source, np.array(members, np.int64).reshape(-1, 2)


def check_topk(source: PackSource, k: int) -> None:
    """Raise ObjectiveError where the scores have fewer of the teacher's ids than k."""
    requests = [scores[0].provenance["request"] for _, scores in source.pairs]
    least = min(int(request["teacher_topk_min"]) for request in requests)
    if k > least:
        raise ObjectiveError(
            f"k = {k}, and the scores have at least {least} of the teacher's ids",
            hint=f"ask the trainer for {least} ids or fewer, or score again with "
            f"--teacher-topk-min {k}",
        )
