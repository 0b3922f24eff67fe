"""From a configuration's names to the models of a stage."""

from pathlib import Path

import pytest

from logitcask.engine.commands.load_teacher import live_backend, open_teacher
from logitcask.engine.commands.resolve import rendered, student_of
from logitcask.engine.config.sections import Run, Student
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.events import CancelToken
from logitcask.engine.models.identity import model_ref
from tests.engine.cached import make_store, make_unit
from tests.engine.tiny import make_model, save_folder


@pytest.mark.parametrize("chat_template", [False, True])
def test_rollouts_of_the_library_say_how_they_were_rendered(
    tmp_path: Path, chat_template: bool
) -> None:
    """`rollout` called from Python records digests, not the flag of the command line."""
    folder = str(save_folder(tmp_path / "student"))
    student = model_ref(folder, chat_template=chat_template)
    unit = make_unit(0, prompts=1, vocab=99, lengths=[3, 2])
    snapshot = make_store(tmp_path / "store", [unit], student=student).head()
    assert "chat_template" not in snapshot.rollouts("main")[0].lineage
    assert student_of(Student(model=folder), snapshot, "main") == student
    teacher = open_teacher(
        Teacher(model=folder, name="big"),
        Run(),
        snapshot.rollouts("main")[0].lineage["student"],
        template=rendered(snapshot, "main"),
        exact=True,
        k_max=16,
        cancel=CancelToken(),
    )
    assert (teacher.notes, teacher.shared) == ((), None)
    assert teacher.model.template_digest == student.template_digest


def test_a_student_in_training_samples_where_its_weights_are(tmp_path: Path) -> None:
    """Whatever backend a teacher has: another engine would hold a copy of old weights."""
    ref = model_ref(str(save_folder(tmp_path)), chat_template=False)
    network = make_model()
    assert live_backend(network, ref, Run(backend="vllm")).model is network
