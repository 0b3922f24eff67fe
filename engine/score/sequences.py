"""Some sequences of rollouts."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from logitcask.engine.types import Array, Rollouts


def cut(rollouts: Rollouts, sequences: Sequence[int]) -> tuple[Rollouts, Array]:
    """Return some sequences without scores, and the marks [P] bool of their rows.

    sequences: ascending.
    """
    places, lengths = np.asarray(sequences, np.int64), rollouts.lengths()
    chosen = np.zeros(len(lengths), bool)
    chosen[places] = True
    rows = np.repeat(chosen, lengths)
    used, of_prompt = np.unique(rollouts.seq_prompt[places], return_inverse=True)
    part = replace(
        rollouts,
        prompts=tuple(rollouts.prompts[each] for each in used.tolist()),
        seq_prompt=of_prompt.astype(np.uint32),
        seq_off=np.cumsum([0, *lengths[places]], dtype=np.int64),
        tokens=rollouts.tokens[rows],
        loss_mask=rollouts.loss_mask[rows],
        b_lp=rollouts.b_lp[rows],
        finish=rollouts.finish[places],
        version_start=rollouts.version_start[places],
        version_end=rollouts.version_end[places],
        student=None,
        draws=None,
        reward=None if rollouts.reward is None else rollouts.reward[places],
        segment="",
    )
    return part, rows
