"""`logitcask probe`: measurements from stored scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from logitcask.engine.commands.resolve import rendering_of, snapshot_of, student_of
from logitcask.engine.config.probes import (
    CorrectnessProbeConfig,
    PositionProbeConfig,
    ProbeConfig,
    RewardProbeConfig,
)
from logitcask.engine.errors import ConfigError, IdentityError, StoreError
from logitcask.engine.events import EventHandler
from logitcask.engine.models.digests import replace_text
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import load_student, quiet
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import planned
from logitcask.engine.probes import figures
from logitcask.engine.probes.correctness import CorrectnessReport, correctness_report
from logitcask.engine.probes.metrics import Bin, means_by_position, measure
from logitcask.engine.probes.positions import PositionReport, position_report
from logitcask.engine.probes.reward import RewardReport, reward_report, sequence_rewards
from logitcask.engine.probes.sequences import (
    Comparison,
    compare,
    read_sequences,
    sequence_lines,
    sum_sequences,
)
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.inspect import choose_teacher
from logitcask.engine.teachers.checks import check_identity
from logitcask.engine.types import Array, ModelRef, Progress, no_progress


def run_probe(
    config: ProbeConfig,
    objectives: Sequence[str] = (),
    *,
    per_sequence: Path | None = None,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> list[Bin]:
    """Measure a student; `objectives` as --objective takes them. Bin 0 is all rows.

    per_sequence: file for the sums of each sequence. on_event: takes notes about the teacher.
    Raises IdentityError for a teacher of another tokenizer or vocabulary.
    """
    if per_sequence is not None and not per_sequence.parent.is_dir():
        raise ConfigError(
            f"there is no folder {per_sequence.parent}", hint="make it, or write elsewhere"
        )
    chosen = {text: parse_objective(text).objective for text in objectives}
    store = open_store(config.store.url)
    snapshot = snapshot_of(store, config.probe.snapshot)
    teacher = choose_teacher(snapshot, config.probe.teacher)
    model = student_of(config.student, snapshot, config.store.rollouts)
    other = _teacher_of(config, snapshot, model, teacher, on_event)
    packs = planned(
        store,
        snapshot=snapshot,
        rollouts=config.store.rollouts,
        teacher=teacher,
        pack_length=config.probe.pack_length,
    )
    device = config.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet():
        student = load_student(model, length=packs.plan.longest)
        teachers = [load_student(each, length=packs.plan.longest) for each in other]
    for each in (student, *teachers):
        each.to(device).eval()
    found = measure(
        student,
        packs,
        range(len(packs)),
        objectives=chosen,
        n_vocab=model.n_vocab,
        device=device,
        teacher=teachers[0] if teachers else None,
        progress=progress,
    )
    bins = means_by_position(found, config.probe.bins)
    if per_sequence is not None:
        source = {
            "model": model.name,
            "weights": model.digest,
            "store": store.uuid,
            "snapshot": snapshot.number,
            "snapshot_sha256": snapshot.sha256,
            "rollouts": config.store.rollouts,
            "teacher": teacher,
            "teacher_weights": other[0].digest if other else None,
        }
        prompt, number = _numbered(store, snapshot, config.store.rollouts, packs.plan.members)
        sums = sum_sequences(found, prompt=prompt, number=number, source=source)
        try:
            replace_text(per_sequence, "".join(sequence_lines(sums)))
        except OSError as error:
            raise StoreError(
                f"cannot write {per_sequence}: {error.strerror or error}",
                hint="make room on that disk or give another file, then run the command again",
            ) from error
    return bins


def _teacher_of(
    config: ProbeConfig, snapshot: Snapshot, student: ModelRef, name: str, on_event: EventHandler
) -> list[ModelRef]:
    """Return the teacher that the configuration names as a model; none without one.

    Raises IdentityError for one of another tokenizer or vocabulary than the student's.
    """
    if config.probe.teacher_model is None:
        if config.probe.teacher_revision:
            raise ConfigError(
                f"teacher_revision = {config.probe.teacher_revision!r} without a teacher_model",
                hint="give --teacher-model too, or leave it out",
            )
        return []
    model = model_ref(
        config.probe.teacher_model,
        revision=config.probe.teacher_revision,
        chat_template=rendering_of(snapshot, config.store.rollouts).chat_template,
    )
    if (student.tokenizer_digest, student.n_vocab) != (model.tokenizer_digest, model.n_vocab):
        raise IdentityError(
            f"{model.name} has another tokenizer than the student: {model.n_vocab} ids, "
            f"{model.tokenizer_digest}, not {student.n_vocab} ids, {student.tokenizer_digest}",
            hint="take a teacher with the student's tokenizer, or leave --teacher-model out: the "
            "stored scores give lower bounds",
        )
    for note in check_identity(student.provenance(), model):
        on_event(f"note: {note}")
    scored = next(iter(snapshot.scores(name).values()))[0].provenance.get("teacher", {})
    if scored.get("weights") != model.digest:
        on_event(
            f"note: the scores {name!r} are not recorded as those of the weights in {model.name}: "
            "kl/forward and kl/reverse are of the model, all others of the scores"
        )
    return [model]


def _numbered(
    store: Store, snapshot: Snapshot, rollouts: str, members: Array
) -> tuple[tuple[str, ...], Array]:
    """Return prompt id and number of each member [N, 2] (segment, sequence) of a plan."""
    extents = [store.read_extent(each) for each in snapshot.rollouts(rollouts)]
    first = starts(np.array([len(each.seq_prompt) for each in extents], np.int64))
    prompts = tuple(extents[o].prompt_ids[extents[o].seq_prompt[s]] for o, s in members.tolist())
    return prompts, first[members[:, 0]] + members[:, 1]


def run_compare(first: Path, second: Path) -> Comparison:
    """Compare two models by their sums of each sequence; raises as read_sequences and compare."""
    return compare(read_sequences(first), read_sequences(second))


def run_reward_probe(config: RewardProbeConfig, figure: Path | None = None) -> RewardReport:
    """Compare the teacher's mean reward of correct and incorrect responses.

    figure: file for the two distributions. Raises as `sequence_rewards` and `reward_report`.
    """
    if figure is not None:
        figures.check_file(figure)
    store, chosen = open_store(config.store.url), config.reward
    snapshot = snapshot_of(store, chosen.snapshot)
    found = sequence_rewards(
        store, snapshot, rollouts=config.store.rollouts, teacher=chosen.teacher
    )
    report = reward_report(found, correct_from=chosen.correct_from)
    if figure is not None:
        is_correct = found.reward >= chosen.correct_from
        figures.draw_rewards(
            figure,
            {"correct": found.mean[is_correct], "incorrect": found.mean[~is_correct]},
            title=f"AUROC {report.auroc:.3f} ± {report.auroc_se:.3f}",
        )
    return report


def run_position_probe(config: PositionProbeConfig, figure: Path | None = None) -> PositionReport:
    """Measure teacher and sampling student by position; raises as `position_report`.

    figure: file for the curves, and for a map of positions and versions where there are several.
    """
    if figure is not None:
        figures.check_file(figure)
    store, chosen = open_store(config.store.url), config.positions
    snapshot = snapshot_of(store, chosen.snapshot)
    report = position_report(
        store,
        snapshot,
        rollouts=config.store.rollouts,
        teacher=chosen.teacher,
        bins=chosen.bins,
    )
    if figure is not None:
        figures.draw_positions(figure, report.ranges, report.versions)
    return report


def run_correctness_probe(
    config: CorrectnessProbeConfig, figure: Path | None = None
) -> CorrectnessReport:
    """Compare teacher and student on correct and incorrect responses; raises as
    `correctness_report`.

    figure: file for the means of both groups with their standard errors.
    """
    if figure is not None:
        figures.check_file(figure)
    store, chosen = open_store(config.store.url), config.correctness
    snapshot = snapshot_of(store, chosen.snapshot)
    report = correctness_report(
        store,
        snapshot,
        rollouts=config.store.rollouts,
        teacher=chosen.teacher,
        correct_from=chosen.correct_from,
    )
    if figure is not None:
        figures.draw_correctness(figure, report.measures)
    return report
