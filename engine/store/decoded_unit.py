"""One rollout segment and a teacher's scores of it, decoded for reading by sequence.

All arrays are flat, with the offsets of each sequence. They lie in memory or are memory-mapped.
"""

from collections.abc import Mapping

import numpy as np

import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import IncompleteError
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.format.layouts import ranked
from logitcask.engine.store.format.ragged import find, starts
from logitcask.engine.store.log.snapshot import ScoreSegments, are_partial
from logitcask.engine.types import Array, CachedScores, Rollouts, Scores

ROW = {
    "token": "uint32",
    "weight": "uint16",
    "b_lp": "float32",
    "s_lp": "float32",
    "s_entropy": "float32",
    "q_token_lp": "float32",
    "q_entropy": "float32",
    "q_entropy_hi": "float32",
    "q_log_tail": "float32",
    "kept": "uint16",
    "s_cnt": "uint16",
    "t_cnt": "uint16",
    "mc_cnt": "uint16",
    "base_token_lp": "float32",
    "span": "int32",
    "span_q": "float32",
    "span_row_q": "float32",
    "span_tokens": "uint16",
}
"""Arrays [P]; names as in Targets. Those of spans exist for a teacher with another tokenizer:
`span` counts in the sequence, -1 = in none."""
UNMAPPED = 0xFFFFFFFF
"""In place of an id of `t_ids`: the student has no token of the same bytes. The sentinel is never a
token: a vocabulary ends before it."""
SPAN_ARRAYS = {"span", "span_q", "span_row_q", "span_tokens"}
SCORED = "scored"
"""Array uint16 [P] of a unit of which some rows have no score: 1 = this row has one. A sequence has
no row without a score, and no token after its last one."""
LISTED = {
    "s_ids": "uint32",
    "s_q": "float32",
    "s_rank": "uint16",
    "s_p": "float32",
    "s_base": "float32",
}
"""Arrays [S], ids of the student's list at which the teacher's log-prob is known: the id, the
teacher's log-prob and its rank, the student's and the base model's log-prob."""
OTHERS = {
    "t_ids": "uint32",
    "t_q": "float32",
    "t_rank": "uint16",
    "t_mult": "uint16",
    "t_base": "float32",
}
"""Arrays [E], the teacher's other ids."""
DRAWN = {"mc_ids": "uint32", "mc_mult": "uint16", "mc_lp": "float32"}
"""Arrays [D], ids that the student drew, in these lists or not."""
SEQUENCE = {"seq_prompt": "uint32", "version": "int64", "reward": "float32"}
"""Arrays [N]."""
REWARDS = ("reward", "reward_mean", "reward_std")
"""Arrays [P] of a sequence: its reward, and mean and sample standard deviation of the rewards of
all responses to its prompt. A unit holds all responses to its prompts."""
OFFSETS = {"seq_off": "N", "prompt_off": "M", "s_off": "P", "t_off": "P", "mc_off": "P"}
"""Arrays int64; their length is the count plus 1."""
DTYPES = {
    **ROW,
    **LISTED,
    **OTHERS,
    **DRAWN,
    **SEQUENCE,
    **dict.fromkeys(OFFSETS, "int64"),
    SCORED: "uint16",
    "prompt_tokens": "uint32",
}


class DecodedUnit:
    """The arrays of a unit, by the names of `dtypes_of`."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays

    @property
    def size_bytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays.values())

    def sequence(self, index: int) -> dict[str, Array]:
        """Return the arrays of one sequence, ragged ones flat, and its tokens, prompt first.

        Rows without a score are left out, and so are the tokens after the last row.
        """
        of = self.arrays
        a, b = (int(x) for x in of["seq_off"][index : index + 2])
        prompt = int(of["seq_prompt"][index])
        start, end = (int(x) for x in of["prompt_off"][prompt : prompt + 2])
        part = {name: of[name][a:b] for name in ROW if name in of}
        for group, offset in ((LISTED, "s_off"), (OTHERS, "t_off"), (DRAWN, "mc_off")):
            if offset in of:
                cut = slice(int(of[offset][a]), int(of[offset][b]))
                part |= {name: of[name][cut] for name in group if name in of}
        if "reward" in of:
            group = of["reward"][of["seq_prompt"] == prompt].astype(np.float64)
            std = group.std(ddof=1) if len(group) > 1 else 0.0
            values = (of["reward"][index], group.mean(), std)
            part |= {
                name: np.full(b - a, value, np.float32)
                for name, value in zip(REWARDS, values, strict=True)
            }
        tokens, position = of["prompt_tokens"][start:end], np.arange(b - a)
        response = part["token"]
        if SCORED in of:
            marks = of[SCORED][a:b] == 1
            part = _rows_of(part, marks)
            position = position[marks]
            response = response[: int(position.max(initial=-1)) + 1]
        return part | {
            "version": np.full(len(position), of["version"][index], np.int64),
            "position": position,
            "input_ids": np.concatenate([tokens, response]).astype(np.int64),
            # The last prompt token predicts response token 0.
            "predict_at": end - start - 1 + position,
        }


def _rows_of(part: Mapping[str, Array], marks: Array) -> dict[str, Array]:
    """Return the arrays of a sequence at its marked rows [n] bool."""
    of = {
        **dict.fromkeys((*ROW, *REWARDS), marks),
        **dict.fromkeys(LISTED, np.repeat(marks, part["s_cnt"])),
        **dict.fromkeys(OTHERS, np.repeat(marks, part["t_cnt"])),
    }
    if "mc_cnt" in part:
        of |= dict.fromkeys(DRAWN, np.repeat(marks, part["mc_cnt"]))
    return {name: array[of[name]] for name, array in part.items()}


def is_bounded(score_segments: ScoreSegments) -> bool:
    """Return whether a teacher's entropies are intervals, as of one that returns top ids only."""
    return "entropy_upper" in schema.specs(score_segments[0].layout)


def with_spans(part: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays of a sequence with spans; those of one tokenizer are of one token each."""
    if "span" in part:
        return dict(part)
    q = part["q_token_lp"]
    spans = {"span": np.arange(len(q)), "span_q": q, "span_row_q": q}
    return {**part, **spans, "span_tokens": np.ones(len(q), np.uint16)}


def has_spans(score_segments: ScoreSegments) -> bool:
    """Return whether the teacher has another tokenizer, so that its scores are of spans."""
    return score_segments[0].layout in schema.SPAN_LAYOUTS


def has_lists(score_segments: ScoreSegments) -> bool:
    """Return whether positions have ids of the teacher; False for log-probs of spans alone."""
    return "E" in score_segments[0].counts


def dtypes_of(
    rollout: Segment, score_segments: ScoreSegments, base: ScoreSegments = ()
) -> dict[str, str]:
    """Return the arrays of a unit, name -> dtype, without reading the segments."""
    arrays = schema.specs(rollout.layout)
    absent: set[str] = set()
    for present, names in (
        ("mc_counts" in arrays, {"mc_cnt", "mc_off", *DRAWN}),
        ("reward" in arrays, {"reward"}),
        (score_segments[0].layout.startswith(schema.SAMPLED), {"t_mult"}),
        (any(are_partial(each) for each in (score_segments, base) if each), {SCORED}),
        (is_bounded(score_segments), {"q_entropy_hi"}),
        (bool(base), {"base_token_lp", "s_base", "t_base"}),
        (has_spans(score_segments), SPAN_ARRAYS),
    ):
        absent |= set() if present else names
    return {name: dtype for name, dtype in DTYPES.items() if name not in absent}


def decode_unit(
    seg_id: str, rollouts: Rollouts, scores: CachedScores, base: CachedScores | None = None
) -> DecodedUnit:
    """Build the unit of rollouts and their scores, and the scores of a `base` model if any.

    Raises IncompleteError for rollouts without the student's own scores.
    """
    student = student_of(seg_id, rollouts)
    arrays = {
        **rollout_arrays(rollouts, student),
        "q_token_lp": scores.lp,
        "q_entropy": scores.entropy,
        "q_log_tail": scores.log_tail,
        "kept": scores.kept,
        "s_cnt": scores.s_cnt,
        "t_cnt": scores.cnt,
        "s_ids": scores.s_ids,
        "s_q": scores.s_lp,
        "s_rank": scores.s_rank,
        "s_p": _at(student.cnt, student.ids, student.entry_lp, scores.s_cnt, scores.s_ids),
        "t_ids": scores.ids,
        "t_q": scores.entry_lp,
        "t_rank": scores.rank,
        "s_off": starts(scores.s_cnt),
        "t_off": starts(scores.cnt),
    }
    if scores.mult is not None:
        arrays["t_mult"] = scores.mult
    if scores.entropy_hi is not None:
        arrays["q_entropy_hi"] = scores.entropy_hi
    marks = [each.scored for each in (scores, base) if each and each.scored is not None]
    if marks:
        arrays[SCORED] = np.logical_and.reduce(marks)
    if base is not None:
        cached = ranked(base)
        arrays["base_token_lp"] = base.lp
        arrays["s_base"] = _at(*cached, scores.s_cnt, scores.s_ids)
        arrays["t_base"] = _at(*cached, scores.cnt, scores.ids)
    return unit_of(arrays)


def student_of(seg_id: str, rollouts: Rollouts) -> Scores:
    """Return the student's own scores of rollouts. Raises IncompleteError without them."""
    if rollouts.student is None:
        raise IncompleteError(
            f"rollout segment {seg_id} has no scores of its own student",
            hint="sample again with `logitcask rollout`, which always stores them",
        )
    return rollouts.student


def rollout_arrays(rollouts: Rollouts, student: Scores) -> dict[str, Array]:
    """Return the arrays of a unit that no teacher has a part in."""
    prompts = [np.asarray(p.token_ids, np.uint32) for p in rollouts.prompts]
    arrays = {
        "token": rollouts.tokens,
        "weight": rollouts.loss_mask,
        "b_lp": rollouts.b_lp,
        "s_lp": student.lp,
        "s_entropy": student.entropy,
        "seq_prompt": rollouts.seq_prompt,
        "version": rollouts.version_start,
        "seq_off": rollouts.seq_off,
        "prompt_off": starts(np.asarray([len(p) for p in prompts], np.int64)),
        "prompt_tokens": np.concatenate([np.zeros(0, np.uint32), *prompts]),
    }
    if (draws := rollouts.draws) is not None:
        arrays |= {"mc_cnt": draws.cnt, "mc_off": starts(draws.cnt)}
        arrays |= {"mc_ids": draws.ids, "mc_mult": draws.mult, "mc_lp": draws.lp}
    if rollouts.reward is not None:
        arrays["reward"] = rollouts.reward
    return arrays


def unit_of(arrays: Mapping[str, Array]) -> DecodedUnit:
    """Return the unit of arrays, each in its dtype."""
    return DecodedUnit({name: np.ascontiguousarray(a, DTYPES[name]) for name, a in arrays.items()})


def _at(cnt: Array, ids: Array, lp: Array, at_cnt: Array, at_ids: Array) -> Array:
    """Return the log-probs [A] of lists at other ids of the same rows; NaN where not listed."""
    if at_ids is ids:
        return lp
    index = find(ids.astype(np.uint32), cnt, at_ids, at_cnt)
    listed = index >= 0
    out = np.full(len(at_ids), np.nan, np.float32)
    out[listed] = lp[(np.repeat(starts(cnt)[:-1], at_cnt) + index)[listed]]
    return out


def size_of(rollout: Segment, score_segments: ScoreSegments, base: ScoreSegments = ()) -> int:
    """Return the bytes of a unit in memory, at most, without reading the segments."""
    counts = rollout.counts
    listed = sum(each.counts.get("S", 0) for each in score_segments)
    listed = listed if "S" in score_segments[0].counts else counts.get("E", 0)
    listed = listed if has_lists(score_segments) else 0
    others = sum(each.counts.get("E", 0) for each in score_segments)
    lengths = {
        **dict.fromkeys((*ROW, SCORED), counts["P"]),
        **dict.fromkeys(LISTED, listed),
        **dict.fromkeys(OTHERS, others),
        **dict.fromkeys(DRAWN, counts.get("D", 0)),
        **dict.fromkeys(SEQUENCE, counts["N"]),
        **{name: counts[of] + 1 for name, of in OFFSETS.items()},
        "prompt_tokens": counts["T"],
    }
    dtypes = dtypes_of(rollout, score_segments, base)
    return sum(lengths[name] * np.dtype(dtype).itemsize for name, dtype in dtypes.items())
