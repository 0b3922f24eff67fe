"""Stages resolve the model names of a configuration."""

from pathlib import Path

import pytest

from logitcask.engine.commands.load_teacher import live_backend, open_teacher
from logitcask.engine.commands.resolve import rendering_of, student_of
from logitcask.engine.config.sections import Run, Student
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.events import CancelToken
from logitcask.engine.models.identity import model_ref
from tests.engine.cached import make_store, make_unit
from tests.engine.tiny import make_model, save_folder


@pytest.mark.parametrize("chat_template", [False, True])
def test_rollouts_from_python_record_the_chat_template(tmp_path: Path, chat_template: bool) -> None:
    """Check the recorded digests: `rollout` called from Python does not record the flag."""
    folder = str(save_folder(tmp_path / "student"))
    student = model_ref(folder, chat_template=chat_template)
    unit = make_unit(0, prompts=1, vocab=99, lengths=[3, 2])
    snapshot = make_store(tmp_path / "store", [unit], student=student).head()
    assert "chat_template" not in snapshot.rollouts("main")[0].provenance
    assert student_of(Student(model=folder), snapshot, "main") == student
    teacher = open_teacher(
        Teacher(model=folder, name="big"),
        Run(),
        snapshot.rollouts("main")[0].provenance["student"],
        template=rendering_of(snapshot, "main").chat_template,
        exact=True,
        k_max=16,
        cancel=CancelToken(),
    )
    assert (teacher.notes, teacher.shared) == ((), None)
    assert teacher.model.template_digest == student.template_digest


def test_a_student_in_training_samples_from_its_own_weights(tmp_path: Path) -> None:
    """Ignore the teacher's backend: another engine would hold a copy of old weights."""
    ref = model_ref(str(save_folder(tmp_path)), chat_template=False)
    network = make_model()
    assert live_backend(network, ref, Run(backend="vllm")).model is network
