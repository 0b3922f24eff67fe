"""One rollout segment and what a teacher says of it, decoded and laid out to be read by sequence.

All arrays are flat, with the offsets that cut out a sequence. They may be memory, or files mapped
into it.
"""

from collections.abc import Mapping

import numpy as np

from logitcask.engine.errors import IncompleteError
from logitcask.engine.store.pin import Chain
from logitcask.engine.store.ragged import starts
from logitcask.engine.store.segment import Segment
from logitcask.engine.types import Array, CachedScores, Rollouts

ROW = {
    "token": "uint32",
    "weight": "uint16",
    "b_lp": "float32",
    "s_lp": "float32",
    "s_entropy": "float32",
    "q_token_lp": "float32",
    "q_entropy": "float32",
    "q_log_tail": "float32",
    "kept": "uint16",
    "s_cnt": "uint16",
    "t_cnt": "uint16",
}
"""Arrays [P]; names as in Targets."""
LISTED = {"s_ids": "uint32", "s_q": "float32", "s_rank": "uint16"}
"""Arrays [S], ids of the student's list that the teacher's log-prob is known at."""
OTHERS = {"t_ids": "uint32", "t_q": "float32", "t_rank": "uint16"}
"""Arrays [E], the other ids."""
SEQUENCE = {"seq_prompt": "uint32", "version": "int64"}
"""Arrays [N]."""
OFFSETS = {"seq_off": "N", "prompt_off": "M", "s_off": "P", "t_off": "P"}
"""Arrays int64, one longer than what they cut."""
DTYPES = {
    **ROW,
    **LISTED,
    **OTHERS,
    **SEQUENCE,
    **dict.fromkeys(OFFSETS, "int64"),
    "prompt_tokens": "uint32",
}


class Unit:
    """The arrays of DTYPES, by name."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays

    @property
    def size_bytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays.values())

    def sequence(self, index: int) -> dict[str, Array]:
        """Every array of one sequence; ragged ones flat; and its tokens, prompt first."""
        of = self.arrays
        a, b = (int(x) for x in of["seq_off"][index : index + 2])
        prompt = int(of["seq_prompt"][index])
        start, end = (int(x) for x in of["prompt_off"][prompt : prompt + 2])
        part = {name: of[name][a:b] for name in ROW}
        for group, offsets in ((LISTED, of["s_off"]), (OTHERS, of["t_off"])):
            part |= {name: of[name][int(offsets[a]) : int(offsets[b])] for name in group}
        tokens = of["prompt_tokens"][start:end]
        return part | {
            "version": np.full(b - a, of["version"][index], np.int64),
            "input_ids": np.concatenate([tokens, part["token"]]).astype(np.int64),
            # The last prompt token predicts response token 0.
            "predict_at": end - start - 1 + np.arange(b - a),
        }


def unit_of(seg_id: str, rollouts: Rollouts, scores: CachedScores) -> Unit:
    """Raises IncompleteError for rollouts that their own student has not scored."""
    student = rollouts.student
    if student is None:
        raise IncompleteError(
            f"rollout segment {seg_id} has no scores by its own student",
            remedy="sample again with `logitcask rollout`: every sampler of ours scores itself",
        )
    prompts = [np.asarray(p.token_ids, np.uint32) for p in rollouts.prompts]
    arrays = {
        "token": rollouts.tokens,
        "weight": rollouts.loss_mask,
        "b_lp": rollouts.b_lp,
        "s_lp": student.lp,
        "s_entropy": student.entropy,
        "q_token_lp": scores.lp,
        "q_entropy": scores.entropy,
        "q_log_tail": scores.log_tail,
        "kept": scores.kept,
        "s_cnt": scores.s_cnt,
        "t_cnt": scores.cnt,
        "s_ids": scores.s_ids,
        "s_q": scores.s_lp,
        "s_rank": scores.s_rank,
        "t_ids": scores.ids,
        "t_q": scores.entry_lp,
        "t_rank": scores.rank,
        "seq_prompt": rollouts.seq_prompt,
        "version": rollouts.version_start,
        "seq_off": rollouts.seq_off,
        "prompt_off": starts(np.asarray([len(p) for p in prompts], np.int64)),
        "s_off": starts(scores.s_cnt),
        "t_off": starts(scores.cnt),
        "prompt_tokens": np.concatenate([np.zeros(0, np.uint32), *prompts]),
    }
    return Unit({name: np.ascontiguousarray(a, DTYPES[name]) for name, a in arrays.items()})


def lengths_of(rollout: Segment, chain: Chain) -> dict[str, int]:
    """Name -> elements at most, from what the log says alone."""
    counts = rollout.counts
    listed = chain[0].counts.get("S", counts.get("E", 0))
    others = sum(each.counts["E"] for each in chain)
    return {
        **dict.fromkeys(ROW, counts["P"]),
        **dict.fromkeys(LISTED, listed),
        **dict.fromkeys(OTHERS, others),
        **dict.fromkeys(SEQUENCE, counts["N"]),
        **{name: counts[of] + 1 for name, of in OFFSETS.items()},
        "prompt_tokens": counts["T"],
    }


def size_of(rollout: Segment, chain: Chain) -> int:
    """Bytes at most of a unit in memory, from what the log says alone."""
    lengths = lengths_of(rollout, chain)
    return sum(lengths[name] * np.dtype(DTYPES[name]).itemsize for name in DTYPES)
