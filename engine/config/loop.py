"""Sections of a loop that have other keys than those of `score`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from logitcask.engine.config.teacher import Score, Teacher
from logitcask.engine.errors import ConfigError

FOLLOWING = ("model", "revision", "name", "follow", "follow_every", "ema_decay")
"""Keys of a teacher that follows the student."""


class LoopTeacher(Teacher):
    """The teacher of `distill`, which may be the student itself."""

    model: str = Field(
        "",
        description=f"{Teacher.model_fields['model'].description} Left out with teacher.follow, "
        "for it is the student.",
    )
    follow: Literal["", "student", "ema"] = Field(
        "",
        description="A teacher that moves: student = the student itself; ema = the moving average "
        "of its weights; empty = the weights of teacher.model, for all rounds. Mostly with "
        "score.teacher_kind = context: the teacher reads what the student does not.",
    )
    follow_every: int = Field(
        0,
        ge=0,
        description="With teacher.follow: updates from one refresh of the teacher to the next, a "
        "multiple of loop.updates_per_round; 0 = one round.",
    )
    ema_decay: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="With teacher.follow = ema: weight of the old teacher at each refresh, and "
        "1 - ema_decay that of the student: 1 - teacher_update_rate of TRL's SDFT and SDPO, once "
        "every teacher_sync_steps.",
    )

    @model_validator(mode="after")
    def _is_one_teacher(self) -> Self:
        """Refuse keys of a fixed teacher with one that follows, and the reverse."""
        given = list(self.model_dump(exclude={"model", "name"}, exclude_defaults=True))
        if not self.follow:
            if not self.model:
                raise ConfigError(
                    "teacher.model is missing",
                    hint="give teacher.model, or teacher.follow = student",
                )
            for key in ("follow_every", "ema_decay"):
                if key in given:
                    raise ConfigError(
                        f"teacher.{key} is set, and teacher.follow is empty",
                        hint=f"set teacher.follow, or leave teacher.{key} out",
                    )
        for key in given:
            if self.follow and key not in FOLLOWING:
                raise ConfigError(
                    f"teacher.{key} is set with teacher.follow = {self.follow}: the teacher is the "
                    "student",
                    hint=f"leave teacher.{key} out",
                )
        if self.follow == "student" and "ema_decay" in given:
            raise ConfigError(
                "teacher.ema_decay is set with teacher.follow = student, which has no average",
                hint="set teacher.follow = ema, or leave teacher.ema_decay out",
            )
        return self


class LoopScore(Score):
    """The scores of `distill`, whose prompts are those of the loop."""

    @field_validator("prompts")
    @classmethod
    def _fills_template(cls, prompts: Path | None, info: ValidationInfo) -> Path | None:
        if prompts is not None:
            raise ValueError("must be left out: a loop fills the template in from [prompts]")
        return prompts
