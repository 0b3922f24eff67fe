"""Teachers of a run: one, one for each value of a field of the prompts, or several on every row.

    NAME                     the scores of one teacher
    VALUE=NAME,VALUE=NAME    of the teacher that is named for the prompt's value of a field
    NAME=WEIGHT,NAME=WEIGHT  of all of them: the loss is the mean of their losses by weight
    NAME+NAME                of all of them, with equal weights

With a field, a row has the scores of the teacher of its prompt and of no other, so a unit needs the
scores of those teachers alone that its prompts name (MOPD, arXiv 2601.02780).

With weights a row comes once for each teacher, L = sum_i w_i D(p, q_i), w normalised (MAD-OPD,
arXiv 2605.01347, Eq.8, with fixed weights). Every D is as exact as with one teacher, which the
divergence from a mixture would not be: a mixture is known only at ids that all of them scored. Its
gradient is that of a mixture where all have one support S:

    KL(p~ || q_i~)    of the normalised geometric mean on S: log q = sum_i w_i log q_i~ - log Z
    KL(q_i || p)      of the mean sum_i w_i q_i
    -A log p(y)       of the geometric mean, up to a baseline log Z of the prefix

Weights that are computed from the store are in teacher_weights.py, and mixtures in place of this
sum in mixture.py.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.errors import ConfigError

NO_MIX = TeacherMix()


class Source(NamedTuple):
    """Origin of rows: a rollout segment, the version that sampled them, and one teacher's scores.

    Segments are named by seg_id.
    """

    rollouts: str
    version: int
    teacher: str
    """Name of the scores."""
    scores: tuple[str, ...]
    """The first, then its extensions."""
    base: tuple[str, ...] = ()
    """Scores of the teacher's base model, for objectives that need them."""
    teacher_version: int | None = None
    """Version of the student at the refresh of a teacher that follows it; None for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Teachers:
    """The names of scores, with their values of the prompt field or their weights."""

    names: tuple[str, ...]
    """Distinct, in order."""
    field: str = ""
    """Key of the prompts file; empty without routes."""
    routes: Mapping[str, str]
    """Value of the field -> name."""
    weights: tuple[float, ...] = (1.0,)
    """Of the names, their sum is 1; (1,) for routes, because a row has one teacher."""
    mix: TeacherMix = NO_MIX

    def __post_init__(self) -> None:
        _check_mix(self)

    @classmethod
    def parse(
        cls, text: str | None, field: str | None = None, mix: TeacherMix = NO_MIX
    ) -> "Teachers":
        """Parse the text of `--teacher` and `--teacher-field`. Raises ConfigError."""
        if not text:
            raise ConfigError(
                f"--teacher-field {field} without --teacher",
                hint="give --teacher VALUE=NAME,VALUE=NAME with the values of that key",
            )
        if "=" not in text and "+" in text and field is None:
            text = ",".join(f"{name}=1" for name in text.split("+"))
        if "=" not in text:
            if field is not None:
                raise ConfigError(
                    f"--teacher-field {field} with --teacher {text}: one teacher is for all values",
                    hint=f"give --teacher VALUE=NAME,VALUE=NAME with the values of {field!r}, or "
                    "leave --teacher-field out",
                )
            return cls(names=(text,), routes={}, mix=mix)
        pairs: dict[str, str] = {}
        for part in text.split(","):
            left, equals, right = (each.strip() for each in part.partition("="))
            if not (left and equals and right):
                raise ConfigError(
                    f"--teacher {text}: {part!r} is not VALUE=NAME or NAME=WEIGHT",
                    hint="e.g. --teacher code=qwen-coder,math=qwen-math --teacher-field domain",
                )
            if left in pairs:
                raise ConfigError(
                    f"--teacher {text}: {left!r} comes twice", hint="give each of them once"
                )
            pairs[left] = right
        if field is None:
            return cls(names=tuple(pairs), routes={}, weights=_weights(text, pairs), mix=mix)
        names = tuple(dict.fromkeys(pairs.values()))
        return cls(names=names, field=field, routes=pairs, mix=mix)

    @property
    def mixed(self) -> bool:
        """Return whether every row has several teachers."""
        return len(self.weights) > 1

    def of_prompts(self, ids: Sequence[str], extras: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the teacher of each prompt by `routes`, from its id and its other keys.

        Raises ConfigError for a prompt without the field, or with a value that has no teacher.
        """
        found = []
        for name, extra in zip(ids, extras, strict=True):
            if self.field not in extra:
                raise ConfigError(
                    f"prompt {name!r} has no key {self.field!r}, and --teacher-field names it",
                    hint=f"its keys are: {', '.join(extra) or 'none'}; sample from prompts that "
                    "have it, or name another",
                )
            value = extra[self.field]
            if not isinstance(value, str) or value not in self.routes:
                raise ConfigError(
                    f"prompt {name!r} has {self.field} = {value!r}, and no teacher is for it",
                    hint=f"--teacher has one for {', '.join(self.routes)}; add VALUE=NAME, or "
                    "sample these prompts under another name",
                )
            found.append(self.routes[value])
        return found

    def __str__(self) -> str:
        """Return the text that a plan and run.json record."""
        if self.mixed:
            pairs = zip(self.names, self.weights, strict=True)
            return ",".join(f"{name}={weight:.6g}" for name, weight in pairs)
        if not self.routes:
            return self.names[0]
        return ",".join(f"{value}={name}" for value, name in self.routes.items())

    def record(self) -> dict[str, Any]:
        """Return the entries of run.json; those of one teacher are as in earlier runs."""
        mix = settings_of(self.mix)
        return {
            "teacher": str(self),
            **({"teacher_field": self.field} if self.field else {}),
            **({"teacher_mix": mix} if mix else {}),
        }

    def key(self) -> str:
        """Return the text that tells plans of other teachers, or of another mix, apart."""
        mix = settings_of(self.mix)
        return str(self) + (f" {json.dumps(mix, sort_keys=True)}" if mix else "")


def settings_of(mix: TeacherMix) -> dict[str, Any]:
    """Return the keys of a mix that are not at their defaults."""
    return {
        key: value
        for key in TeacherMix.model_fields
        if (value := getattr(mix, key)) != getattr(NO_MIX, key)
    }


def _check_mix(teachers: Teachers) -> None:
    """Raise ConfigError for settings of several teachers that these teachers cannot have."""
    mix, kind = teachers.mix, teachers.mix.teacher_weighting
    settings = settings_of(mix)
    if settings and not teachers.mixed:
        key, value = next(iter(settings.items()))
        raise ConfigError(
            f"{key} = {value} with --teacher {teachers}: a position has one teacher",
            hint="name several teachers of every position, as --teacher a+b, or leave it out",
        )
    if kind != "fixed" and len(set(teachers.weights)) > 1:
        raise ConfigError(
            f"--teacher {teachers} gives weights, and teacher_weighting = {kind} computes them",
            hint=f"give --teacher {'+'.join(teachers.names)}, or leave --teacher-weighting out",
        )
    if kind == "agreement" and len(teachers.names) < 3:
        raise ConfigError(
            "teacher_weighting = agreement with two teachers: each is as far from the other, so "
            "both weights are 1/2",
            hint="name three or more, or leave --teacher-weighting out",
        )


def _weights(text: str, pairs: Mapping[str, str]) -> tuple[float, ...]:
    """Return the weights divided by their sum. Raises ConfigError."""
    found = []
    for name, weight in pairs.items():
        try:
            value = float(weight)
        except ValueError:
            raise ConfigError(
                f"--teacher {text} without --teacher-field: {weight!r} is no weight of {name!r}",
                hint="name the key of the prompts file that holds these values, e.g. "
                "--teacher-field domain, or give NAME=WEIGHT",
            ) from None
        if not 0 < value < math.inf:
            raise ConfigError(
                f"--teacher {text}: the weight {weight} of {name!r} is not in (0, inf)",
                hint="give a positive weight, or leave that teacher out",
            )
        found.append(value)
    return tuple(value / sum(found) for value in found)
