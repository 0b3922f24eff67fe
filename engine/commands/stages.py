"""One configured stage.

The command line and the loop start their stages here, so that one configuration means the same
everywhere. The stages themselves never see a configuration.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend, open_teacher
from logitcask.engine.commands.resolve import (
    eval_plan,
    find_objective,
    grader_of,
    held_out_set,
    rendered,
    snapshot_of,
    student_and_prompts,
    student_of,
    train_settings,
)
from logitcask.engine.config.sections import (
    EstimateConfig,
    ProbeConfig,
    RolloutConfig,
    ScoreConfig,
    TrainConfig,
)
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.models import identity
from logitcask.engine.models.load import load_student, quiet
from logitcask.engine.objectives import parse_objective, warnings
from logitcask.engine.packing.batches import planned
from logitcask.engine.probes.estimate import Estimate, estimate
from logitcask.engine.probes.metrics import Bin, probe
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.prompts.prompts import load_tokenizer, read_prompts
from logitcask.engine.prompts.teacher_context import read_template, templated
from logitcask.engine.rollout.plan import RolloutReport, rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.ids_file import read_ids_file
from logitcask.engine.score.plan import ScoreReport, score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.store.inspect import choose, choose_teacher
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.training.held_out import hold_out
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.train import check, train
from logitcask.engine.types import ModelRef, Progress, Prompt, no_progress


def run_rollout(job: RolloutConfig, *, progress: Progress = no_progress) -> RolloutReport:
    """`logitcask rollout`. Prompts are read and checked before any weight is loaded."""
    model, prompts, template = student_and_prompts(job.student, job.prompts, job.rollout)
    grader = grader_of(job.rollout, model, prompts)
    asked = rolling(job, model, prompts, template, grader)
    try:
        return rollout(asked, progress=progress)
    finally:
        close_backend(asked.sampler)


def rolling(
    job: RolloutConfig,
    model: ModelRef,
    prompts: Sequence[Prompt],
    template: bool,
    grader: Grader | None,
    *,
    versions: bool = False,
) -> RolloutRequest:
    """Who samples what, with the student loaded; its sampler is to be closed."""
    sampler = backend(model, job.run)
    try:
        return RolloutRequest(
            # Only now: what is refused leaves no empty store behind.
            store=open_store(job.store.url, create=True),
            model=model,
            sampler=sampler,
            prompts=prompts,
            sampling=job.rollout.sampling(),
            name=job.store.rollouts,
            seed=job.run.seed,
            student_k=job.rollout.student_k,
            mc_draws=job.rollout.mc_draws,
            grader=grader,
            unit_prompts=job.rollout.unit_prompts or None,
            profile=job.store.profile,
            versions=versions,
            lineage_extra={"chat_template": template},
        )
    except BaseException:
        close_backend(sampler)
        raise


def run_score(
    job: ScoreConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> ScoreReport:
    """`logitcask score`."""
    store = open_store(job.store.url)
    asked = scoring(job, store, store.head(), CancelToken(on_event))
    try:
        return score(asked, progress=progress)
    finally:
        close_backend(asked.scorer)


def scoring(
    job: ScoreConfig, store: Store, snapshot: Snapshot, cancel: CancelToken
) -> ScoreRequest:
    """Who scores what, with the teacher loaded; its scorer is to be closed."""
    template = rendered(snapshot, job.store.rollouts)
    student = snapshot.rollouts(job.store.rollouts)[0].lineage["student"]
    teacher = open_teacher(
        job.teacher,
        job.run,
        student,
        template=template,
        exact=job.score.exact,
        k_max=job.score.k_max,
        cancel=cancel,
    )
    try:
        model = teacher.model
        params, notes = teacher.asked(job.score, job.run.seed)
        ids = job.score.ids_file()
        return ScoreRequest(
            store=store,
            model=model,
            scorer=teacher.scorer,
            teacher_name=job.teacher.name,
            rollouts_name=job.store.rollouts,
            params=params,
            role=job.score.role,
            context=_context(job, store, model, snapshot) if job.score.role == "context" else None,
            at=job.score.asked_at() if ids is None else read_ids_file(ids, model.n_vocab),
            profile=job.store.profile,
            eos_rows=job.score.eos_rows,
            shared=teacher.shared,
            notes=(*teacher.notes, *notes),
            lineage_extra=teacher.lineage_extra,
        )
    except BaseException:
        teacher.close()
        raise


def _context(
    job: ScoreConfig, store: Store, model: ModelRef, snapshot: Snapshot
) -> dict[str, Prompt]:
    """The other prompts by id, rendered as those of the rollouts were; each leaves room for the
    longest response.
    """
    segments = snapshot.rollouts(job.store.rollouts)
    longest = int(segments[0].lineage["set"]["max_new_tokens"])
    tokenizer = load_tokenizer(model.path)
    told: dict[str, Any] = {
        "chat_template": rendered(snapshot, job.store.rollouts),
        "max_prompt_tokens": identity.context_length(model.path) - longest,
    }
    if job.score.context is not None:
        return {each.id: each for each in read_prompts(job.score.context, tokenizer, **told)}
    assert job.score.prompt_template is not None, "role = context has one of them"
    assert job.score.prompts is not None, "a template has prompts"
    template = read_template(job.score.prompt_template)
    stored = (prompt for segment in segments for prompt in store.read_prompts(segment))
    return templated(job.score.prompts, template, stored, tokenizer, **told)


def run_estimate(
    job: EstimateConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> Estimate:
    """`logitcask store estimate`."""
    model, prompts, template = student_and_prompts(job.student, job.prompts, job.rollout)
    grader = grader_of(job.rollout, model, prompts)
    served = is_remote(job.teacher.model)
    teacher = open_teacher(
        job.teacher,
        job.run,
        model.lineage(),
        template=template,
        exact=not served,
        k_max=job.estimate.k_max,
        cancel=CancelToken(on_event),
    )
    try:
        # Both over the ids that both know, and the student here.
        own, model = model.n_vocab, replace(model, n_vocab=teacher.model.n_vocab)
        run = job.run.model_copy(update={"backend": "auto"}) if served else job.run
        student = backend(model, run, tokenizer_vocab=own)
        try:
            return estimate(
                grader=grader,
                teacher=teacher.scorer,
                student=student,
                prompts=prompts,
                sampling=job.rollout.sampling(),
                sample=job.estimate.sample,
                student_k=job.rollout.student_k,
                mc_draws=job.rollout.mc_draws,
                k_min=job.score.k_min,
                k_max=job.estimate.k_max,
                shared=teacher.shared,
                seed=job.run.seed,
                progress=progress,
            )
        finally:
            close_backend(student)
    finally:
        teacher.close()


def run_train(
    job: TrainConfig,
    *,
    cache: UnitCache | None = None,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> TrainReport:
    """`logitcask train`. What the cache serves of the objective is given to `on_event` first."""
    store, snapshot, task = _train_task(job)
    report = train(
        store,
        **task,
        out=job.run.out,
        snapshot=None if job.train.snapshot is None else snapshot,
        overwrite=job.run.overwrite,
        device=job.run.device,
        evaluation=eval_plan(
            job.eval, job.run, task["model"], rendered(snapshot, job.store.rollouts)
        ),
        held_out=held_out_set(job.eval, job.store.url, job.train.base),
        cache=cache,
        config=job.model_dump(mode="json"),
        on_event=on_event,
        progress=progress,
    )
    for line in warnings(task["objective"].objective, report.last):
        on_event(f"warning: {line}")
    return report


def check_train(job: TrainConfig) -> None:
    """Raises what would stop `run_train` before its first update."""
    store, snapshot, task = _train_task(job)
    check(store, **task, snapshot=snapshot)
    eval_plan(job.eval, job.run, task["model"], rendered(snapshot, job.store.rollouts))
    held = held_out_set(job.eval, job.store.url, job.train.base)
    if held is not None:
        hold_out(held, task["model"], task["objective"], job.train.tokens_per_batch)


def scoring_seconds(job: TrainConfig) -> float | None:
    """What the teacher took for one pass over what `run_train` reads; None where the store does not
    say so of every unit.
    """
    _, snapshot, task = _train_task(job)
    chains = snapshot.scores(task["teacher"])
    read = [chains[s.seg_id] for s in snapshot.rollouts(task["rollouts"]) if s.seg_id in chains]
    took = [segment.seconds for chain in read for segment in chain]
    known = [each for each in took if each is not None]
    return sum(known) if len(known) == len(took) else None


def _train_task(job: TrainConfig) -> tuple[Store, Snapshot, dict[str, Any]]:
    """The store, its state, and what is to be learned by whom."""
    preset = find_objective(job.train)
    store = open_store(job.store.url)
    snapshot = (
        store.head() if job.train.snapshot is None else snapshot_of(store, job.train.snapshot)
    )
    where = (
        "the store" if job.train.snapshot is None else f"the store at log number {snapshot.number}"
    )
    bases = [n for n in snapshot.names("score") if snapshot.role(n) == "base"]
    task = {
        "model": student_of(job.student, snapshot, job.store.rollouts),
        "teacher": choose_teacher(snapshot, job.train.teacher, where=where),
        "base": job.train.base and choose(bases, job.train.base, what="base", where=where),
        "rollouts": job.store.rollouts,
        "objective": preset,
        "settings": train_settings(job.train, job.run),
        "partial": job.train.partial,
        "allow_off_lineage": job.train.foreign_student,
    }
    return store, snapshot, task


def run_probe(
    job: ProbeConfig, objectives: Sequence[str] = (), *, progress: Progress = no_progress
) -> list[Bin]:
    """`logitcask probe metrics`; `objectives` as --objective takes them; bin 0 is all rows."""
    found = {text: parse_objective(text).objective for text in objectives}
    store = open_store(job.store.url)
    snapshot = (
        store.head() if job.probe.snapshot is None else snapshot_of(store, job.probe.snapshot)
    )
    teacher = choose_teacher(snapshot, job.probe.teacher)
    model = student_of(job.student, snapshot, job.store.rollouts)
    rows = planned(
        store,
        snapshot=snapshot,
        rollouts=job.store.rollouts,
        teacher=teacher,
        tokens_per_batch=job.probe.tokens_per_batch,
    )
    device = job.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet():
        student = load_student(model)
    return probe(
        student,
        rows,
        objectives=found,
        n_vocab=model.n_vocab,
        bins=job.probe.bins,
        device=device,
        progress=progress,
    )
