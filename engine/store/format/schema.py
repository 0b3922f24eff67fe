"""The schema of segments: array names, dtypes, lengths, chunks, files. Format version 2.

Lengths are named by letters (`counts` of a record):
  M prompts, N sequences, P positions, T prompt tokens, J bytes of prompt_json,
  E stored entries of ragged rows (the student's top-k in a rollout segment, a teacher's in a score
  segment), D ids that the student drew, S entries of the base's student lists, R scored positions
  of a score segment of some positions (S: of their lists),
  Q tokens of a teacher with another tokenizer, G spans, U different ids of that teacher, B bytes of
  these.

Every name inside a segment follows from (kind, layout, counts), so no path is taken from data.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

FORMAT = "logitcask"
FORMAT_VERSION = 2

ROLLOUT, SCORE = "rollout", "score"
KINDS = (ROLLOUT, SCORE)
"""Kinds of segments, also their folders below seg/."""

STUDENT, PLAIN, MC = "student", "plain", "mc"
"""Layouts of a rollout segment: with the student's own scores, without them, or with them and with
ids that the student drew."""
REWARD = "+reward"
"""Suffix of these layouts where every sequence has a reward."""
DEDUP, FULL, SAMPLED, EXTENSION = "dedup", "full", "sampled", "extension"
"""Layouts of a score segment: without the ids of the student's list, a teacher's list alone, drawn
ids with multiplicities, and additions to the earlier segments of the same teacher on the same
rollouts."""
BOUNDS = "+bounds"
"""Suffix of the first two for a teacher that returns its top ids only: every position then has a
lower and an upper bound of the entropy."""
PARTIAL = "+rows"
"""Suffix of all of these but the last where a segment has the scores of some positions only."""
SPANS, SPAN_STARTS, SPAN_ENDS = "spans", "spans+starts", "spans+ends"
"""Layouts of a teacher with another tokenizer: log-probs of its own tokens and the spans of both,
and with its best ids at the first or the last row of each span."""
SPAN_LAYOUTS = (SPANS, SPAN_STARTS, SPAN_ENDS)
_REWARDED = (STUDENT, PLAIN, MC)
_BOUNDED = (DEDUP, FULL)
_FIRST = (DEDUP, FULL, SAMPLED, *(layout + BOUNDS for layout in _BOUNDED))
LAYOUTS = {
    ROLLOUT: (*_REWARDED, *(layout + REWARD for layout in _REWARDED)),
    SCORE: (*_FIRST, EXTENSION, *(layout + PARTIAL for layout in _FIRST), *SPAN_LAYOUTS),
}

POSITION_CHUNK = 32768
ENTRY_CHUNK = 131072
"""Elements of an inner chunk. Larger ones decode a little faster, smaller ones much slower."""

MAX_COUNT = {
    "M": 1 << 24,
    "N": 1 << 26,
    "P": 1 << 26,
    "R": 1 << 26,
    "T": 1 << 28,
    "J": 1 << 26,
    "E": 1 << 30,
    "D": 1 << 30,
    "S": 1 << 30,
    "Q": 1 << 26,
    "G": 1 << 26,
    "U": 1 << 24,
    "B": 1 << 28,
}
"""Larger counts of a record are refused before any file is read."""
MAX_SEGMENT_BYTES = 2 << 30
"""All arrays of a segment, decoded. A few bytes on a disk can decode to gigabytes."""
MAX_K = 4096
"""Entries of one row in one segment."""
MAX_ROW = 4 * MAX_K
"""Entries of one row in all of a teacher's segments on some rollouts: ranks fit uint16."""
MAX_JSON_VALUES = 1 << 22
"""Lists, objects and their members in prompt_json: three bytes of text can become a hundred."""
MAX_RECORD_BYTES = 8 << 20
MAX_RECORD_VALUES = 300_000
"""As many as the files of segments make of that size."""
MAX_HEADS_BYTES = 64 << 20
MAX_BUNDLE_BYTES = 256 << 20
"""Of a bundle of records, whose heads are read at once; larger ones are not written."""
MAX_FORMAT_BYTES = 4096
MAX_META_BYTES = 65536
"""A zarr.json is about a kilobyte."""

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
SEG_ID = re.compile(r"[0-9a-f]{32}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

ENTRY = "entry"
"""Placeholder for the dtype of stored entry log-probs, which the profile decides."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One array of a segment."""

    dtype: str
    """numpy name, or ENTRY."""
    count: str
    """Letter of its length."""
    plus: int = 0
    """Added to that length (1 for offsets)."""
    chunk: int = POSITION_CHUNK

    def length(self, counts: Mapping[str, int]) -> int:
        return counts[self.count] + self.plus


_ROLLOUT = {
    "prompt_offsets": Spec("int64", "M", 1),
    "prompt_tokens": Spec("uint32", "T", chunk=ENTRY_CHUNK),
    "prompt_json": Spec("uint8", "J", chunk=ENTRY_CHUNK),
    "prompt_index": Spec("uint32", "N"),
    "response_offsets": Spec("int64", "N", 1),
    "response_tokens": Spec("uint32", "P"),
    "loss_mask": Spec("uint16", "P"),
    "behavior_logprobs": Spec("float32", "P"),
    "finish_reason": Spec("uint16", "N"),
    "policy_version_start": Spec("int64", "N"),
    "policy_version_end": Spec("int64", "N"),
}
_STUDENT = {
    "student_logprobs": Spec("float32", "P"),
    "student_entropy": Spec("float32", "P"),
    "student_tail": Spec("float32", "P"),
    "student_topk_counts": Spec("uint16", "P"),
    "student_topk_ids": Spec("uint32", "E", chunk=ENTRY_CHUNK),
    "student_topk_logprobs": Spec(ENTRY, "E", chunk=ENTRY_CHUNK),
}
_MC = {
    "mc_counts": Spec("uint16", "P"),
    "mc_ids": Spec("uint32", "D", chunk=ENTRY_CHUNK),
    "mc_multiplicities": Spec("uint16", "D", chunk=ENTRY_CHUNK),
    "mc_logprobs": Spec("float32", "D", chunk=ENTRY_CHUNK),
}
_ENTRIES = {
    "log_tail": Spec("float32", "P"),
    "topk_counts": Spec("uint16", "P"),
    "topk_ids": Spec("uint32", "E", chunk=ENTRY_CHUNK),
    "topk_logprobs": Spec(ENTRY, "E", chunk=ENTRY_CHUNK),
}
_FULL = {"teacher_logprobs": Spec("float32", "P"), "entropy": Spec("float32", "P"), **_ENTRIES}
_KEPT = {"n_kept": Spec("uint16", "P")}
_SPECS = {
    STUDENT: _ROLLOUT | _STUDENT,
    PLAIN: _ROLLOUT,
    MC: _ROLLOUT | _STUDENT | _MC,
    FULL: _FULL,
    SAMPLED: _FULL | {"multiplicities": Spec("uint16", "E", chunk=ENTRY_CHUNK)},
    DEDUP: _FULL
    | _KEPT
    | {
        "at_student_logprobs": Spec(ENTRY, "S", chunk=ENTRY_CHUNK),
        "at_student_rank_fix": Spec("uint16", "S", chunk=ENTRY_CHUNK),
    },
    EXTENSION: _ENTRIES | _KEPT | {"rank_fix": Spec("uint16", "E", chunk=ENTRY_CHUNK)},
}
_SPECS |= {
    layout + REWARD: _SPECS[layout] | {"reward": Spec("float32", "N")} for layout in _REWARDED
}
_SPECS |= {
    layout + BOUNDS: _SPECS[layout] | {"entropy_upper": Spec("float32", "P")} for layout in _BOUNDED
}
_SPECS |= {
    layout + PARTIAL: {"scored": Spec("uint16", "P")}
    | {
        name: replace(spec, count="R") if spec.count == "P" else spec
        for name, spec in _SPECS[layout].items()
    }
    for layout in _FIRST
}
_SPAN_ROWS = {
    name: replace(spec, count="G") if spec.count == "P" else spec
    for name, spec in ({"entropy": Spec("float32", "P")} | _ENTRIES | _KEPT).items()
}
_SPECS[SPANS] = {
    "teacher_offsets": Spec("int64", "N", 1),
    "teacher_tokens": Spec("uint32", "Q"),
    "teacher_logprobs": Spec("float32", "Q"),
    "teacher_marks": Spec("uint8", "Q"),
    "student_marks": Spec("uint8", "P"),
    "text_digests": Spec("int64", "N"),
    "piece_ids": Spec("uint32", "U"),
    "piece_twins": Spec("int64", "U"),
    "piece_lengths": Spec("uint16", "U"),
    "piece_bytes": Spec("uint8", "B", chunk=ENTRY_CHUNK),
}
_SPECS |= dict.fromkeys((SPAN_STARTS, SPAN_ENDS), _SPECS[SPANS] | _SPAN_ROWS)
COUNTS = {
    STUDENT: ("M", "N", "P", "T", "J", "E"),
    PLAIN: ("M", "N", "P", "T", "J"),
    MC: ("M", "N", "P", "T", "J", "E", "D"),
    DEDUP: ("N", "P", "E", "S"),
    **dict.fromkeys((FULL, SAMPLED, EXTENSION), ("N", "P", "E")),
}
COUNTS[SPANS] = ("N", "P", "Q", "U", "B")
COUNTS |= dict.fromkeys((SPAN_STARTS, SPAN_ENDS), (*COUNTS[SPANS], "G", "E"))
COUNTS |= {layout + REWARD: COUNTS[layout] for layout in _REWARDED}
COUNTS |= {layout + BOUNDS: COUNTS[layout] for layout in _BOUNDED}
COUNTS |= {layout + PARTIAL: (*COUNTS[layout], "R") for layout in _FIRST}
"""Layout -> the counts in its record."""


@cache
def relations(layout: str) -> tuple[tuple[str, tuple[str, ...], int], ...]:
    """Return (count, others, most) of a layout: the count is at most `most` x the others' sum."""
    spans = layout in SPAN_LAYOUTS
    every = (
        *(("R", ("P",), 1), ("S", ("P",), MAX_K), ("E", ("G" if spans else "P",), MAX_K)),
        *(("G", ("P",), 1), ("G", ("Q",), 1), ("U", ("Q", "E"), 1), ("B", ("U",), 0xFFFF)),
    )
    counts = COUNTS[layout]
    return tuple(
        (count, tuple(other for other in others if other in counts), most)
        for count, others, most in every
        if count in counts
    )


READ_ALONE = frozenset(
    {
        *("prompt_json", "prompt_offsets", "prompt_index", "prompt_tokens", "response_offsets"),
        *("reward", "student_topk_counts", "student_topk_ids", "scored"),
    }
)
"""Arrays that are read without the others: lengths, prompts, rewards, the student's lists, marks. A
record has their places in the object, and their digests."""


def read_alone(layout: str) -> list[str]:
    """Return the arrays of a layout that are read alone, sorted."""
    return sorted(READ_ALONE.intersection(specs(layout)))


def specs(layout: str) -> dict[str, Spec]:
    """Return the arrays of a layout."""
    return _SPECS[layout]


def chunk_shape(spec: Spec, length: int) -> tuple[int, int]:
    """Return (inner chunk, shard): the shard is the array rounded up, so an array is one file."""
    chunk = max(1, min(length, spec.chunk))
    return chunk, max(1, -(-length // chunk)) * chunk


def file_names(layout: str, counts: Mapping[str, int]) -> set[str]:
    """Return the files in the object of a segment; an empty array has no data file."""
    names = {"zarr.json"}
    for name, spec in specs(layout).items():
        names.add(f"{name}/zarr.json")
        if spec.length(counts):
            names.add(f"{name}/c/0")
    return names
