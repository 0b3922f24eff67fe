"""The parts of a sequence by several teachers, as the loss reads them."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from logitcask.engine.packing.mixture import mix
from logitcask.engine.packing.teacher_weights import weights_of_rows
from logitcask.engine.packing.teachers import Source, Teachers
from logitcask.engine.store import ScoreSegments, Segment
from logitcask.engine.store.decoded_unit import with_spans
from logitcask.engine.types import Array


def combined(
    parts: Sequence[dict[str, Array]], teachers: Teachers, of_prompt: Array | None
) -> list[dict[str, Array]]:
    """Return the parts of one sequence as the loss reads them, with `share` [R] or as one mixture.

    parts: of each teacher, as of `DecodedUnit.sequence`. of_prompt: see `weights_of_rows`.
    """
    if not teachers.mixed:
        return list(parts)
    weights = weights_of_rows(teachers, parts, of_prompt)
    if teachers.mix.mixture != "sum":
        return [mix(parts, weights, teachers.mix.mixture)]
    return [{**part, "share": share} for part, share in zip(parts, weights, strict=True)]


def alike(
    parts: Sequence[dict[str, Array]], bounded: bool, has_spans: bool
) -> list[dict[str, Array]]:
    """Return parts that have the same arrays.

    All units of one name have the same, but some may hold an exact entropy where another has an
    interval (`bounded`), and of several teachers one may have another tokenizer (`has_spans`).
    """
    if bounded:
        parts = [{"q_entropy_hi": part["q_entropy"], **part} for part in parts]
    return [with_spans(part) if has_spans else part for part in parts]


def count_rows(
    origins: Sequence[tuple[Segment, ScoreSegments, ScoreSegments]],
    parts: Sequence[Mapping[str, Array]],
) -> dict[Source, int]:
    """Return the rows with a weight of each origin.

    origins: of each part its rollout segment, its scores and those of a base model.
    """
    found: Counter[Source] = Counter()
    for (segment, scores, base), part in zip(origins, parts, strict=True):
        if rows := int(np.count_nonzero(part["weight"])):
            # A sequence has one version.
            origin = Source(
                rollouts=segment.seg_id,
                version=int(part["version"][0]),
                teacher=scores[0].name,
                scores=tuple(each.seg_id for each in scores),
                base=tuple(each.seg_id for each in base),
            )
            found[origin] += rows
    return dict(found)
