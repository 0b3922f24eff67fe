"""The kinds of scores that one run can read together."""

from collections.abc import Callable, Sequence

from logitcask.engine.errors import ConfigError
from logitcask.engine.packing.teachers import Teachers
from logitcask.engine.store import ScoreSegments
from logitcask.engine.store.decoded_unit import has_spans, is_bounded
from logitcask.engine.store.format.schema import SAMPLED
from logitcask.engine.store.log.snapshot import are_partial
from logitcask.engine.types import Array


def check_same_kind(
    teachers: Teachers,
    units: Sequence[Sequence[ScoreSegments]],
    bases: Sequence[ScoreSegments],
    read_marks: Callable[[ScoreSegments], Array | None],
) -> None:
    """Check that scores can be read together.

    units: of each rollout segment the scores of every teacher of it; bases: those of a base model;
    read_marks: see Reader. Raises ConfigError if one teacher's scores are its draws and another's
    its top ids, for spans or a mixture with a base model, for scores that a mix cannot read, or if
    teachers with weights have scored different positions. Scores of spans go with others, which are
    of spans of one token.
    """
    if bases and teachers.mix.mixture != "sum":
        raise ConfigError(
            f"mixture = {teachers.mix.mixture} with --base {bases[0][0].name}: the base model has "
            "no score at some ids of a mixture",
            hint="use --mixture sum, or leave --base out",
        )
    every = [scores for unit in units for scores in unit]
    if len({scores[0].layout.startswith(SAMPLED) for scores in every}) > 1:
        raise ConfigError(
            f"--teacher {teachers}: the scores of one are drawn ids, of another top ids",
            hint="name teachers that were scored with the same --selection",
        )
    if bases and any(map(has_spans, [*every, *bases])):
        raise ConfigError(
            f"--teacher {teachers} --base {bases[0][0].name}: one of them has another tokenizer "
            "than the student, and its scores are of spans",
            hint="leave --base out: no objective over spans reads a base model",
        )
    for scores in every:
        _check_readable(teachers, scores)
    for unit in units if teachers.mixed else []:
        if any(map(are_partial, unit)):
            marks = [read_marks(each) for each in unit]
            if len({None if each is None else each.tobytes() for each in marks}) > 1:
                raise ConfigError(
                    f"--teacher {teachers}: one has scored positions that another has not",
                    hint="repeat `logitcask score` with --positions all, or with the same "
                    "positions for each of them",
                )


def _check_readable(teachers: Teachers, scores: ScoreSegments) -> None:
    """Raise ConfigError for scores that a mixture, or weights computed from scores, cannot read."""
    mix, name = teachers.mix, scores[0].name
    kind = mix.teacher_weighting
    by_ids = mix.mixture != "sum" or kind == "agreement"
    setting = f"mixture = {mix.mixture}" if mix.mixture != "sum" else f"teacher_weighting = {kind}"
    if (by_ids or kind == "entropy") and has_spans(scores):
        raise ConfigError(
            f"{setting} with teacher {name!r} of another tokenizer, whose scores are of spans and "
            "not of the student's tokens",
            hint="use --mixture sum with fixed weights, or by accuracy or confidence",
        )
    if by_ids and scores[0].layout.startswith(SAMPLED):
        raise ConfigError(
            f"{setting} with teacher {name!r}, whose scores are drawn ids and no top ids",
            hint="use --mixture sum, or score again, under another name, without --draws",
        )
    if kind == "entropy" and is_bounded(scores):
        raise ConfigError(
            f"teacher_weighting = entropy with teacher {name!r}, which returned only top-k "
            "log-probs: its entropy is an interval",
            hint="score again, under another name, with --exact or --backend hf, or choose "
            "another --teacher-weighting",
        )
