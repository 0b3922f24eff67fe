"""Scores of spans <-> the arrays of a score segment, in the teacher's own ids and rows.

Nothing of it depends on the tokenizers: the student's id of the same bytes, and the bytes, of each
of the teacher's ids that occur are stored with the scores.
"""

import numpy as np

import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
from logitcask.engine.alignment.span_scores import ENDS, NONE, STARTS, SpanScores
from logitcask.engine.types import Array

LAYOUT_OF = {NONE: schema.SPANS, STARTS: schema.SPAN_STARTS, ENDS: schema.SPAN_ENDS}
"""Rows that have the teacher's best ids -> layout."""

FIELDS = {
    "teacher_offsets": "offsets",
    "teacher_tokens": "tokens",
    "teacher_logprobs": "log_probs",
    "teacher_marks": "marks",
    "student_marks": "student_marks",
    "text_digests": "texts",
    "piece_ids": "piece_ids",
    "piece_twins": "piece_twins",
    "piece_lengths": "piece_lengths",
    "piece_bytes": "piece_bytes",
}
"""Array -> field of SpanScores, of every layout."""
ENTRY_FIELDS = {
    "entropy": "entropy",
    "log_tail": "log_tail",
    "n_kept": "kept",
    "topk_counts": "cnt",
    "topk_ids": "ids",
    "topk_logprobs": "entry_lp",
}
"""The same of the layouts with the teacher's best ids."""


def encode(scores: SpanScores, profile: codecs.Profile) -> dict[str, Array]:
    """Return the arrays of a segment of checked scores; the profile rounds entries alone."""
    arrays = {name: getattr(scores, field) for name, field in FIELDS.items()}
    if scores.rows != NONE:
        arrays |= {name: getattr(scores, field) for name, field in ENTRY_FIELDS.items()}
        arrays["topk_logprobs"] = codecs.to_entry(scores.entry_lp, profile)
    return arrays


def decode(arrays: dict[str, Array], layout: str, profile: codecs.Profile) -> SpanScores:
    """Invert `encode`, with entry log-probs in float32; the scores are not checked."""
    found = {field: arrays[name] for name, field in FIELDS.items()}
    for name, field in ENTRY_FIELDS.items():
        spec = schema.specs(schema.SPAN_STARTS)[name]
        dtype = "float32" if spec.dtype == schema.ENTRY else spec.dtype
        found[field] = arrays.get(name, np.zeros(0, dtype))
    if "topk_logprobs" in arrays:
        found["entry_lp"] = codecs.from_entry(arrays["topk_logprobs"], profile)
    rows = {layout: rows for rows, layout in LAYOUT_OF.items()}[layout]
    return SpanScores(**found, rows=rows)
