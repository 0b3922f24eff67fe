"""Refreshes of a teacher that follows the student: published by the trainer, loaded by scorers.

A refresh is the student's version itself, or the average of its weights in a folder of its own. Old
ones stay while a scorer may need them, or a trainer that resumes from one of its checkpoints. So an
average survives a kill: it is made again from the one before it and the student's version.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from logitcask.engine.commands.load_teacher import LoadedTeacher, backend
from logitcask.engine.distill.setup import LoopInput, LoopSetup
from logitcask.engine.distill.teacher.average import write_average
from logitcask.engine.distill.versions import (
    AVERAGE,
    STUDENT,
    publish,
    read_version,
    remove_others,
    remove_version,
    version_folder,
    whole_copy,
)
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.digests import difference
from logitcask.engine.models.identity import read_metadata, write_metadata
from logitcask.engine.training.processes import on_first
from logitcask.engine.training.run_dir.checkpoints import checkpoint_steps
from logitcask.engine.training.run_dir.files import writing
from logitcask.engine.types import ModelRef


def read_refresh(inputs: LoopInput, version: int) -> ModelRef | None:
    """Return the teacher of a refresh, None before it is published."""
    config = inputs.config
    kind = AVERAGE if config.teacher.follow == "ema" else STUDENT
    return read_version(config.run.out, inputs.model, version, kind)


class Publisher:
    """Publishes the student of a loop, and the refreshes of its teacher."""

    def __init__(self, loop: LoopSetup, student: nn.Module) -> None:
        self._loop, self._student = loop, student
        self._proved = False
        """A version was loaded again: to do so every time would take as long as to save it."""
        self._checked = -1
        """Last average whose files are as they were written."""

    def publish(self, number: int) -> str:
        """Publish the student as a version, and return its digest. Every process calls this."""
        loop, inputs = self._loop, self._loop.inputs
        config, out = inputs.config, inputs.config.run.out
        whole = whole_copy(self._student, inputs.model, config.lora, config.run.seed)

        def save() -> str:
            assert whole is not None, "the first process has it"
            metadata = {"plan": loop.plan, "objective": inputs.preset.objective.record()}
            digest = publish(out, whole, inputs.model, number, metadata, check=not self._proved)
            self._proved = True
            averaged = config.teacher.follow == "ema"
            if averaged and inputs.policy.is_refresh(number):
                self._average(number, digest)
            remove_others(out, number, needed=needed(inputs, number))
            if averaged:
                remove_others(out, number, AVERAGE, needed=needed(inputs, number))
            return digest

        return on_first(save)

    def _average(self, number: int, student: str) -> None:
        """Write the average of a refresh, unless the folder has it already."""
        inputs = self._loop.inputs
        config, out, first = inputs.config, inputs.config.run.out, inputs.model
        before = None
        if number > first.version:
            before = version_folder(out, inputs.policy.refresh_before(number), AVERAGE)
            self._check(inputs.policy.refresh_before(number))
        folder = version_folder(out, number, AVERAGE)
        staging = folder.with_name(f".{folder.name}.saving")
        shutil.rmtree(staging, ignore_errors=True)
        with writing(folder):
            staging.mkdir()
            write_average(before, version_folder(out, number), staging, config.teacher.ema_decay)
            write_metadata(
                staging,
                base_weights=first.base_weights,
                parent=student,
                version=number,
                pin=None,
                plan=self._loop.plan,
                objective=inputs.preset.objective.record(),
            )
            made, found = read_metadata(staging), read_version(out, first, number, AVERAGE)
            assert made is not None, "it was written"
            if found is not None and found.digest == made["weights"]:
                shutil.rmtree(staging)
            else:
                remove_version(out, number, AVERAGE)
                staging.rename(folder)
        self._checked = number

    def _check(self, number: int) -> None:
        """Raise IntegrityError for an average of an earlier call that is lost or damaged."""
        if self._checked == number:
            return
        folder = version_folder(self._loop.inputs.config.run.out, number, AVERAGE)
        metadata = read_metadata(folder)
        if metadata is None:
            damage = "it is missing, and the average goes on from it"
        else:
            damage = difference(folder, metadata.get("files") or {})
        if damage:
            raise IntegrityError(
                f"{folder}: {damage}",
                hint="restore it from a copy, or start the loop again in a new folder",
            )


def needed(inputs: LoopInput, now: int) -> Callable[[int], bool]:
    """Return a function that is True for the refreshes that a scorer needs, or a trainer that
    resumes; now: the version of the trainer.
    """
    policy, first = inputs.policy, inputs.model.version
    if not policy.follow_every:
        return lambda number: False
    saved = [first + step for step in checkpoint_steps(inputs.config.run.out)]
    ranges = [range(policy.oldest_refresh(each), each + 1) for each in (now, *saved)]
    return lambda number: policy.is_refresh(number) and any(number in each for each in ranges)


class InlineTeacher:
    """The teacher of each round in one process, with the weights of its refresh."""

    def __init__(self, loop: LoopSetup, student: nn.Module, live: LoadedTeacher) -> None:
        """live: the student in training itself, as a teacher."""
        self._loop, self._live = loop, live
        self._publisher = Publisher(loop, student)
        self._loaded: LoadedTeacher | None = None

    def at(self, number: int, current: ModelRef) -> LoadedTeacher:
        """Return the teacher of a round; current: the student in training, at its start."""
        inputs = self._loop.inputs
        config, policy = inputs.config, inputs.policy
        version = policy.teacher_version(number)
        assert version is not None, "the teacher moves"
        if config.teacher.follow == "student" and policy.follow_every == policy.updates_per_round:
            return replace(self._live, model=current)
        if policy.is_refresh(current.version):
            self._publisher.publish(current.version)
        if self._loaded is None or self._loaded.model.version != version:
            self._loaded = None  # two teachers need not fit side by side
            if (found := read_refresh(inputs, version)) is None:
                raise IntegrityError(
                    f"{config.run.out} has no version {version} of the teacher, which scores round "
                    f"{number}",
                    hint="restore it from a copy, or start the loop again in a new folder",
                )
            self._loaded = replace(self._live, model=found, scorer=backend(found, config.run))
        return self._loaded
