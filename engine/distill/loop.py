"""The on-policy loop: in every round the current student samples, the teacher scores, and the
student is updated. All data pass through the store, so finished work is never repeated.

One call of the trainer spans all rounds, with one optimizer, schedule and metrics file. In one
process a round is made right before its first update. Its rollouts record the digest of the student
that sampled, so a loop that was killed finds its own rollouts again and, on a CPU, ends with the
same student.
"""

import os
from collections.abc import Callable

from torch import nn

from logitcask.engine.commands.load_teacher import LoadedTeacher
from logitcask.engine.commands.train import eval_plan, held_out_set
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.distill.checks import check_inline
from logitcask.engine.distill.on_policy_rows import OnPolicyRows
from logitcask.engine.distill.setup import LoopInput, LoopSetup, open_loop, read_input
from logitcask.engine.distill.teacher.facts import TeacherFacts, facts_of
from logitcask.engine.distill.teacher.open import open_loop_teacher
from logitcask.engine.errors import ConfigError
from logitcask.engine.events import CancelToken, EventHandler, warn_once
from logitcask.engine.objectives import warnings
from logitcask.engine.packing.batches import Packs
from logitcask.engine.store import open_store
from logitcask.engine.teachers.refreshes import FOLLOW
from logitcask.engine.training.evaluation.held_out import hold_out
from logitcask.engine.training.run import RunSpec, TrainReport, run_training
from logitcask.engine.training.run_dir.files import read_run
from logitcask.engine.training.run_dir.open import open_run_dir
from logitcask.engine.types import Progress, no_progress


def distill(
    config: RunConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> TrainReport:
    """Run the rounds of `config` in one process; the same call resumes.

    Raises ConfigError, IdentityError (another tokenizer; another run in the folder or under the
    name of the rollouts), and the errors of the stages.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: distill runs in one process",
            hint="start it without torchrun, or train in several processes: --role train",
        )
    check_inline(config)
    inputs = read_input(config, on_event)
    teacher = open_loop_teacher(inputs, CancelToken(on_event), on_event, live=True)
    try:
        # Every round scores, with the same notes.
        on_event = warn_once(on_event)
        return _inline(inputs, teacher, progress, on_event)
    finally:
        teacher.close()


def _inline(
    inputs: LoopInput, teacher: LoadedTeacher, progress: Progress, on_event: EventHandler
) -> TrainReport:
    facts, notes = facts_of(teacher, inputs.config)
    for line in notes:
        on_event(line)

    def packs(loop: LoopSetup, student: nn.Module, width: int) -> Packs:
        return OnPolicyRows(
            loop=loop,
            student=student,
            width=width,
            teacher=teacher,
            progress=progress,
            on_event=on_event,
        )

    return train_rounds(inputs, facts, packs, progress, on_event)


def train_rounds(
    inputs: LoopInput,
    facts: TeacherFacts,
    packs: Callable[[LoopSetup, nn.Module, int], Packs],
    progress: Progress,
    on_event: EventHandler,
) -> TrainReport:
    """Train on the rounds of `packs`, which gets the student and the packs of an update."""
    config, model, preset = inputs.config, inputs.model, inputs.preset
    exactness = inputs.exactness(facts.params, bounds=facts.bounds, span_rows=facts.span_rows)
    for line in exactness.lines():
        on_event(line)
    evaluation = eval_plan(config.eval, config.run, model, inputs.rendering, on_event)
    held_out = None
    if (data := held_out_set(config.eval, config.store.url, config.train)) is not None:
        earlier = None if config.run.overwrite else read_run(config.run.out)
        held_out = hold_out(data, model, preset, config.train.pack_length, earlier)
        for line in held_out.exactness.lines():
            on_event(f"held out: {line}")
    loop = open_loop(inputs, facts, open_store(config.store.url, create=True))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = -(-inputs.settings.gradient_accumulation_steps // processes)
    settings = inputs.settings.model_copy(update={"gradient_accumulation_steps": accumulation})
    with open_run_dir(model, settings, config.run, on_event) as run_dir:
        spec = RunSpec(
            model=model,
            packs=lambda student: packs(loop, student, accumulation * processes),
            updates=inputs.updates,
            longest=inputs.longest,
            objective=preset,
            known_ages=True,
            identity=loop.identity,
            plan=loop.plan,
            exactness=exactness,
            settings=settings,
            lora=config.lora,
            run=config.run,
            evaluation=evaluation,
            held_out=held_out,
            rows_per_update=(run_dir.earlier or {}).get(
                "rows_per_update", inputs.settings.gradient_accumulation_steps
            ),
            teachers={
                config.teacher.name: {
                    "name": inputs.teacher_model,
                    "revision": config.teacher.revision,
                    "weights": facts.digest,
                    **({FOLLOW: inputs.follow} if inputs.follow_every else {}),
                }
            },
        )
        report = run_training(
            spec,
            run_dir,
            config=config.model_dump(mode="json"),
            on_event=on_event,
            progress=progress,
        )
    for line in warnings(preset.objective, report.last):
        on_event(f"warning: {line}")
    return report
