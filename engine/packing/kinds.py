"""The kinds of scores that one run can read together."""

from collections.abc import Callable, Sequence

from logitcask.engine.errors import ConfigError
from logitcask.engine.packing.teachers import Teachers
from logitcask.engine.store import ScoreSegments
from logitcask.engine.store.decoded_unit import has_spans
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
    its top ids, for spans with a base model, or if teachers with weights have scored different
    positions. Scores of spans go with others, which are of spans of one token.
    """
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
    for unit in units if teachers.mixed else []:
        if any(map(are_partial, unit)):
            marks = [read_marks(each) for each in unit]
            if len({None if each is None else each.tobytes() for each in marks}) > 1:
                raise ConfigError(
                    f"--teacher {teachers}: one has scored positions that another has not",
                    hint="repeat `logitcask score` with --positions all, or with the same "
                    "positions for each of them",
                )
