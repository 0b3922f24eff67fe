"""`logitcask probe`: measurements from stored scores."""

from collections.abc import Sequence
from pathlib import Path

import torch

from logitcask.engine.commands.resolve import snapshot_of, student_of
from logitcask.engine.config.probes import PositionProbeConfig, ProbeConfig, RewardProbeConfig
from logitcask.engine.models.load import load_student, quiet
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import planned
from logitcask.engine.probes import figures
from logitcask.engine.probes.metrics import Bin, probe
from logitcask.engine.probes.positions import PositionReport, position_report
from logitcask.engine.probes.reward import RewardReport, reward_report, sequence_rewards
from logitcask.engine.store import open_store
from logitcask.engine.store.inspect import choose_teacher
from logitcask.engine.types import Progress, no_progress


def run_probe(
    config: ProbeConfig, objectives: Sequence[str] = (), *, progress: Progress = no_progress
) -> list[Bin]:
    """Measure a student; `objectives` as --objective takes them. Bin 0 is all rows."""
    found = {text: parse_objective(text).objective for text in objectives}
    store = open_store(config.store.url)
    snapshot = snapshot_of(store, config.probe.snapshot)
    teacher = choose_teacher(snapshot, config.probe.teacher)
    model = student_of(config.student, snapshot, config.store.rollouts)
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
    return probe(
        student,
        packs,
        objectives=found,
        n_vocab=model.n_vocab,
        bins=config.probe.bins,
        device=device,
        progress=progress,
    )


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
