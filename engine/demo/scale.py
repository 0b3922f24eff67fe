"""Sizes of the two demos: the full one of a few minutes, and a faster one."""

from dataclasses import dataclass

from logitcask.engine.demo.models import Size


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes, rates and counts of a demo, chosen together."""

    digits: int
    teacher: Size
    teacher_batch: int
    teacher_lr: float
    teacher_slide: int
    """Steps of the final decay of its learning rate; more give a higher accuracy."""
    student: Size
    student_batch: int
    student_lr: float
    exam: int
    """Validation problems in pretraining."""
    evaluation: int
    """Problems of the reported accuracies."""
    prompts: int
    """Prompts of the training rollouts."""
    n: int
    """Responses per prompt."""
    heldout: int
    unit_prompts: int
    pack_length: int
    accumulation: int


FULL = Scale(
    digits=3,
    teacher=Size(192, 3, 576, 6),
    teacher_batch=64,
    teacher_lr=2e-3,
    teacher_slide=100,
    student=Size(96, 3, 288, 3),
    student_batch=64,
    student_lr=3e-3,
    exam=500,
    evaluation=1000,
    prompts=15_360,
    n=1,
    heldout=256,
    unit_prompts=1280,
    pack_length=544,
    accumulation=4,
)
FAST = Scale(
    digits=2,
    teacher=Size(128, 2, 384, 4),
    teacher_batch=48,
    teacher_lr=3e-3,
    teacher_slide=50,
    student=Size(96, 2, 288, 3),
    student_batch=48,
    student_lr=4e-3,
    exam=300,
    evaluation=500,
    prompts=1500,
    n=3,
    heldout=100,
    unit_prompts=150,
    pack_length=400,
    accumulation=4,
)
