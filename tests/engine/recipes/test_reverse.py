"""Reverse distillation: what changes places, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.config.parse.toml import read_toml, to_toml
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import ConfigError
from logitcask.engine.recipes.reverse import reverse


def loop(**teacher: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": "org/student", "revision": "a1"},
            "teacher": {"model": "org/teacher", "revision": "b2", "name": "big", **teacher},
            "prompts": {"file": "/p.jsonl"},
            "store": {"url": "/store"},
            "train": {"learning_rate": 3e-5},
            "loop": {"rounds": 2, "prompts_per_round": 4},
            "run": {"out": "/runs/first"},
        }
    )


def test_student_and_teacher_change_places_and_nothing_else(tmp_path: Path) -> None:
    before, after = loop(), reverse(loop())
    assert (after.student.model, after.student.revision) == ("org/teacher", "b2")
    assert (after.teacher.model, after.teacher.revision) == ("org/student", "a1")
    assert (after.teacher.name, after.store.rollouts) == ("big-reverse", "main-reverse")
    assert after.run.out == Path("/runs/first-reverse")
    again = reverse(after)
    assert (again.student, again.train, again.loop) == (before.student, before.train, before.loop)
    (tmp_path / "r.toml").write_text(to_toml(after))
    assert read_toml(tmp_path / "r.toml") == after


@pytest.mark.parametrize(
    ("teacher", "cause"),
    [
        ({"model": "http://a:1"}, "behind a server cannot be trained"),
        ({"model": "", "revision": "", "follow": "student"}, "the teacher is the student"),
        ({"student_tokenizer": "org/student"}, "has no reverse"),
        ({"model": "org/student", "revision": "a1"}, "nothing would change"),
    ],
)
def test_a_teacher_that_cannot_be_the_student_is_refused(
    teacher: dict[str, str], cause: str
) -> None:
    with pytest.raises(ConfigError, match=cause):
        reverse(loop(**teacher))
