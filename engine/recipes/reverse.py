"""The control of reverse distillation: the teacher's model learns from the student's.

arXiv 2604.13016, section 3.3 and Fig. 5: a student after RL that learns from its own weights before
RL, or from a larger model of that stage, falls back to about its level before RL. A pipeline in
which this does not happen does not measure what the teacher gives.
"""

from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import ConfigError
from logitcask.engine.teachers.remote import is_remote

ENDING = "-reverse"
"""Added to the names of rollouts and scores and to the output folder: those of the first run stay
as they are."""


def reverse(config: RunConfig) -> RunConfig:
    """Return a loop in which student and teacher have changed places.

    Raises ConfigError for a teacher that cannot be trained here (at a URL, or the student itself),
    and for one whose ids are mapped to the student's.
    """
    teacher = config.teacher
    if teacher.follow:
        raise ConfigError(
            f"teacher.follow = {teacher.follow}: the teacher is the student, so nothing would "
            "change",
            hint="reverse a loop with a teacher.model of its own",
        )
    if is_remote(teacher.model):
        raise ConfigError(
            f"teacher.model = {teacher.model}: the weights behind a server cannot be trained",
            hint="give the folder or hub id of the teacher with --set teacher.model=FOLDER, and "
            "leave keys of servers out",
        )
    if teacher.student_tokenizer:
        raise ConfigError(
            f"teacher.student_tokenizer = {teacher.student_tokenizer}: its map leads from the "
            "teacher's ids to the student's and has no reverse",
            hint="take two models with one tokenizer",
        )
    if (teacher.model, teacher.revision) == (config.student.model, config.student.revision):
        raise ConfigError(
            f"student.model = teacher.model = {teacher.model}: nothing would change",
            hint="give two models",
        )
    values = config.model_dump()
    values["student"] = {"model": teacher.model, "revision": teacher.revision}
    values["teacher"] |= {
        "model": config.student.model,
        "revision": config.student.revision,
        "name": teacher.name + ENDING,
    }
    values["store"]["rollouts"] += ENDING
    values["run"]["out"] = f"{config.run.out}{ENDING}"
    return validate(RunConfig, values, source="the reversed configuration")
