"""`logitcask probe regions`, `k` and `drift`: what the stored ids hold, and for how long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.commands.resolve import snapshot_of, student_of
from logitcask.engine.config.probes import (
    DriftProbeConfig,
    RegionProbeConfig,
    StoredScores,
    TopkProbeConfig,
)
from logitcask.engine.config.sections import Run, StoreSection, Student
from logitcask.engine.errors import ConfigError, IdentityError, ObjectiveError
from logitcask.engine.metrics.metrics import METRIC_K
from logitcask.engine.models.load import load_student, quiet
from logitcask.engine.objectives import CacheInfo, Objective, check_exactness, parse_objective
from logitcask.engine.objectives.bounds import Bounds
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.plan import default_pack_length
from logitcask.engine.packing.source import PackSource
from logitcask.engine.probes import figures
from logitcask.engine.probes.drift import (
    SAMPLER,
    Drift,
    DriftReport,
    drift_report,
    row_versions,
    sampler_drift,
    student_drift,
)
from logitcask.engine.probes.topk.estimators import EstimatorReport
from logitcask.engine.probes.topk.mass import TopKReport, powers, topk_report
from logitcask.engine.probes.topk.regions import RELEASED, RegionReport, region_report
from logitcask.engine.probes.topk.sample import measure_estimators, sample_rows
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.store.inspect import choose_teacher
from logitcask.engine.store.spans.views import check_tokens
from logitcask.engine.training.cache_info import cache_info
from logitcask.engine.training.evaluation.versions import published
from logitcask.engine.types import ModelRef, Progress, no_progress, stage_named

ESTIMATOR_K = 64
"""Largest k, and most draws, of the estimators: that of the paper's Fig. 15."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    store: Store
    snapshot: Snapshot
    source: PackSource
    cache: CacheInfo

    @property
    def stored_k(self) -> int:
        """Return the largest k at which the top-k of both models is stored for every row."""
        return min(self.cache.student_k, self.cache.k_min, self.cache.n_vocab)

    def packs(self, pack_length: int | None = None) -> PlannedPacks:
        """Return the packs of the snapshot; None = as long as the longest sequence needs."""
        if pack_length is None:
            # Without a forward pass a long sequence costs no more than its rows.
            lengths = self.source.lengths()
            longest = max(int((each.prompt + each.response).max(initial=1)) for each in lengths)
            pack_length = max(longest, default_pack_length(lengths))
        plan = self.source.plan(seed=0, epochs=1, pack_length=pack_length)
        return PlannedPacks(plan, self.source)


def run_region_probe(
    config: RegionProbeConfig, figure: Path | None = None, *, progress: Progress = no_progress
) -> RegionReport:
    """Measure mass and gradient of each region of ids.

    figure: file for the bars. Raises ObjectiveError where the store lacks what Eq. 5 needs.
    """
    opened = _open(config.store, config.regions, figure)
    k = config.regions.k or max(2, min(METRIC_K, opened.stored_k))
    objectives = {name: _served(name, k, opened) for name in ("opd", RELEASED)}
    overlap = _served("overlap", k, opened)
    report = region_report(opened.packs(), objectives, overlap, k=k, progress=progress)
    if figure is not None:
        figures.draw_regions(figure, report.regions, k)
    return report


def run_topk_probe(
    config: TopkProbeConfig, figure: Path | None = None, *, progress: Progress = no_progress
) -> tuple[TopKReport, EstimatorReport | None]:
    """Measure the mass of each top-k, and with both models the estimators of the gradient.

    figure: file for the curves. Raises ObjectiveError where the store lacks the student's ids,
    ConfigError for one model without the other, IdentityError for one of another tokenizer.
    """
    chosen = config.topk
    if (chosen.model is None) != (chosen.teacher_model is None):
        raise ConfigError(
            "bias and variance need all logits of both models, and one of them is given",
            hint="give --model and --teacher-model, or neither",
        )
    opened = _open(config.store, chosen, figure)
    _served(RELEASED, opened.stored_k, opened)
    report = topk_report(opened.packs(), powers(opened.stored_k), progress=progress)
    estimators = None
    if chosen.model is not None and chosen.teacher_model is not None:
        models = [
            _student(name, opened, config.store.rollouts)
            for name in (chosen.model, chosen.teacher_model)
        ]
        estimators = _estimators(models, opened, config, progress)
    if figure is not None:
        figures.draw_topk(figure, report.table, estimators.table if estimators else ())
    return report, estimators


def run_drift_probe(
    config: DriftProbeConfig,
    models: Sequence[str] = (),
    run: Path | None = None,
    figure: Path | None = None,
    *,
    progress: Progress = no_progress,
) -> DriftReport:
    """Measure how far students are from the rollouts of a store.

    models: folders or hub ids; run: folder of a run, whose versions and final student are added;
    figure: file for the curves. Without any the student that sampled is measured, by version.
    Raises IdentityError for a student of other base weights, ConfigError for a run without a
    student.
    """
    opened = _open(config.store, config.drift, figure)
    names = [*models, *_published(run)]
    refs = [_student(name, opened, config.store.rollouts, own=True) for name in names]
    packs, lines = opened.packs(config.drift.pack_length), list[Drift]()
    if opened.cache.at_student and not opened.cache.q_draws:
        k = min(METRIC_K, opened.stored_k)
        lines += sampler_drift(packs, k, progress=progress)
    elif not refs:
        _served(RELEASED, 1, opened)
    versions = row_versions(packs)
    for ref in refs:
        with quiet():
            student = load_student(ref, length=packs.plan.longest)
        lines += student_drift(
            student,
            packs,
            versions,
            name=ref.name,
            version=ref.version,
            n_vocab=ref.n_vocab,
            device=_device(config.run),
            progress=stage_named(progress, "drift"),
        )
    report = drift_report(lines, Bounds())
    if figure is not None:
        samplers = [each for each in report.lines if each.student == SAMPLER]
        students = [each for each in report.lines if each.student != SAMPLER]
        figures.draw_drift(figure, students, samplers, Bounds())
    return report


def _open(store: StoreSection, chosen: StoredScores, figure: Path | None) -> _Opened:
    if figure is not None:
        figures.check_file(figure)
    opened = open_store(store.url)
    snapshot = snapshot_of(opened, chosen.snapshot)
    teacher = choose_teacher(snapshot, chosen.teacher)
    check_tokens(snapshot, teacher)
    source = PackSource(opened, snapshot, store.rollouts, teacher)
    cache = cache_info(None, source, allow_off_lineage=True)
    return _Opened(store=opened, snapshot=snapshot, source=source, cache=cache)


def _served(name: str, k: int, opened: _Opened) -> Objective:
    """Return the objective at k. Raises ObjectiveError unless the store has what it needs."""
    most = opened.stored_k
    if k > most:
        raise ObjectiveError(
            f"k = {k}, and the store has the top {most} ids of both models for every row",
            hint=f"give --k {most}, or sample with --student-topk {k} and score with "
            f"--teacher-topk-min {k}",
        )
    preset = parse_objective(name, k=k)
    check_exactness(preset, opened.cache)
    return preset.objective


def _student(name: str, opened: _Opened, rollouts: str, *, own: bool = False) -> ModelRef:
    """Return a model over the tokenizer of the rollouts; own: with the base weights of the student
    that sampled, so that their versions can be compared.
    """
    model = student_of(Student(model=name), opened.snapshot, rollouts)
    cache = cache_info(model, opened.source, allow_off_lineage=True)
    if own and not cache.same_base_weights:
        raise IdentityError(
            f"{name} has other base weights than the student that sampled, so there are no updates "
            "between both",
            hint="measure it by `logitcask probe metrics`",
        )
    return model


def _estimators(
    models: Sequence[ModelRef], opened: _Opened, config: TopkProbeConfig, progress: Progress
) -> EstimatorReport:
    """Load both models, student first, and measure the estimators on sampled rows."""
    # Both over the ids that the rollouts know; a head may be padded beyond them.
    n_vocab = min(each.n_vocab for each in models)
    loaded = []
    try:
        for each in models:
            model = replace(each, n_vocab=n_vocab)
            loaded.append(backend(model, config.run, tokenizer_vocab=each.n_vocab))
        student, teacher = loaded
        ks = powers(min(ESTIMATOR_K, n_vocab))
        segments = [segment for segment, _ in opened.source.pairs]
        return measure_estimators(
            teacher,
            student,
            sample_rows(opened.store, segments, config.topk.positions, config.run.seed),
            ks=ks,
            draws=[k for k in ks if k > 1],
            positions=config.topk.positions,
            progress=progress,
        )
    finally:
        for each in loaded:
            close_backend(each)


def _published(run: Path | None) -> list[str]:
    """Return the folders of the versions of a run, and of its final student."""
    if run is None:
        return []
    found = published(run)
    if not found:
        raise ConfigError(
            f"{run} holds no student: neither a finished run nor one with versions",
            hint="give the folder of a run (--out), or models by --model",
        )
    return [str(found[version]) for version in sorted(found)]


def _device(run: Run) -> str:
    if run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return run.device
