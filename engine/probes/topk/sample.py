"""A sample of rows of a store, scored by both models, for the estimators of estimators.py."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from logitcask.engine.backends.logprob_diff import select_sequences
from logitcask.engine.backends.scoring import paired_logits
from logitcask.engine.errors import IncompleteError
from logitcask.engine.probes.topk.estimators import EstimatorReport, EstimatorSums
from logitcask.engine.store import Segment, Store
from logitcask.engine.types import Array, Detail, Progress, Rollouts, no_progress

SEQUENCES = 64
"""Sequences of a sample at most: rows of one response resemble each other."""


def sample_rows(
    store: Store, segments: Sequence[Segment], positions: int, seed: int
) -> Iterator[tuple[Rollouts, Array, Array]]:
    """Yield sequences of a segment, [P] bool: a sampled row, and [P] the number of its prompt.

    About `positions` rows that count in a loss, of up to SEQUENCES sequences, at random. Raises
    IncompleteError where no sequence has a token.
    """
    rng = np.random.default_rng(seed)
    extents = [store.read_extent(each) for each in segments]
    every = [(at, int(i)) for at, each in enumerate(extents) for i in np.flatnonzero(each.response)]
    if not every:
        raise IncompleteError(
            "these rollouts hold no response token", hint="probe rollouts that hold sampled tokens"
        )
    order = rng.permutation(len(every))[: min(SEQUENCES, positions)].tolist()
    each_rows = -(-positions // len(order))
    number_of: dict[str, int] = {}
    for at in sorted({every[i][0] for i in order}):
        data = store.read_rollouts(segments[at])
        chosen = select_sequences(data, sorted(every[i][1] for i in order if every[i][0] == at))
        only = np.zeros(chosen.positions, bool)
        for start, end in zip(chosen.seq_off[:-1], chosen.seq_off[1:], strict=True):
            counted = start + np.flatnonzero(chosen.loss_mask[start:end])
            only[rng.permutation(counted)[:each_rows]] = True
        names = [each.id for each in data.prompts]
        numbers = np.array([number_of.setdefault(name, len(number_of)) for name in names], np.int64)
        yield chosen, only, np.repeat(numbers[chosen.seq_prompt], chosen.lengths())


def measure_estimators(
    teacher: Any,
    student: Any,
    sample: Iterator[tuple[Rollouts, Array, Array]],
    *,
    ks: Sequence[int],
    draws: Sequence[int],
    positions: int,
    progress: Progress = no_progress,
) -> EstimatorReport:
    """Measure the estimators on sampled rows.

    teacher, student: backends with all logits over one vocabulary; sample: of `sample_rows`. Raises
    as EstimatorSums and `paired_logits`.
    """
    sums, done = EstimatorSums(ks=ks, draws=draws), 0
    for rollouts, only, prompt in sample:
        for rows, p, q in paired_logits(student, teacher, rollouts, only=only):
            sums.add(p, q.to(p.device), prompt[rows])
            done += len(rows)
            progress("k", done, max(done, positions), Detail(done))
    return sums.report()
