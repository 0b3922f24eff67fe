"""One configured stage: from the names in a configuration to the objects that the stage works on.

The command line and the loop start their stages here, so that one configuration means the same
everywhere. The stages themselves never see a configuration.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from logitcask.engine import identity
from logitcask.engine.backends.base import open_backend
from logitcask.engine.batches import planned
from logitcask.engine.config import (
    EstimateJob,
    Eval,
    ProbeJob,
    Prompts,
    Rollout,
    RolloutJob,
    Run,
    ScoreJob,
    Student,
    Teacher,
    Train,
    TrainJob,
)
from logitcask.engine.course import TrainReport, TrainSettings
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.estimate import Estimate, estimate
from logitcask.engine.evaluate import EvalPlan
from logitcask.engine.given import read_ids
from logitcask.engine.grade import Decode, Grading, open_grader
from logitcask.engine.held_out import HeldOutSet, hold_out
from logitcask.engine.objectives import PRESETS, Bounds, Preset, find_preset, warnings
from logitcask.engine.privileged import read_template, templated
from logitcask.engine.probes.metrics import Bin, probe
from logitcask.engine.prompts import chat_template_for, load_tokenizer, read_prompts
from logitcask.engine.rollout import RolloutReport, rollout
from logitcask.engine.score import ScoreReport, score
from logitcask.engine.store import Pin, Store, open_store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.store.view import choose
from logitcask.engine.student import inner_model, load_student, quiet
from logitcask.engine.teachers import check_identity
from logitcask.engine.train import Notice, check, train
from logitcask.engine.types import ModelRef, Progress, Prompt, silent


def run_rollout(job: RolloutJob, *, progress: Progress = silent) -> RolloutReport:
    """`logitcask rollout`. Prompts are read and checked before any weight is loaded."""
    model, prompts, template = student_and_prompts(job.student, job.prompts, job.rollout)
    grading = grading_of(job.rollout, model, prompts)
    store = open_store(job.store.url, create=True)
    return rollout(
        store,
        model=model,
        sampler=backend(model, job.run),
        prompts=prompts,
        sampling=job.rollout.sampling(),
        name=job.store.rollouts,
        seed=job.run.seed,
        student_k=job.rollout.student_k,
        mc_draws=job.rollout.mc_draws,
        grading=grading,
        unit_prompts=job.rollout.unit_prompts or None,
        profile=job.store.profile,
        lineage_extra={"chat_template": template},
        progress=progress,
    )


def run_score(job: ScoreJob, *, progress: Progress = silent) -> ScoreReport:
    """`logitcask score`."""
    store = open_store(job.store.url)
    pin = store.head()
    model = teacher_of(job.teacher, pin, job.store.rollouts)
    context = _context(job, store, model, pin) if job.score.role == "context" else None
    ids = job.score.ids_file()
    return score(
        store,
        model=model,
        scorer=backend(model, job.run),
        teacher_name=job.teacher.name,
        rollouts_name=job.store.rollouts,
        request=job.score.request(job.run.seed),
        role=job.score.role,
        context=context,
        at=job.score.asked_at() if ids is None else read_ids(ids, model.n_vocab),
        profile=job.store.profile,
        progress=progress,
    )


def _context(job: ScoreJob, store: Store, model: ModelRef, pin: Pin) -> dict[str, Prompt]:
    """The other prompts by id, rendered as those of the rollouts were; each leaves room for the
    longest response.
    """
    segments = pin.rollouts(job.store.rollouts)
    longest = int(segments[0].lineage["set"]["max_new_tokens"])
    tokenizer = load_tokenizer(model.path)
    told: dict[str, Any] = {
        "chat_template": _rendered(pin, job.store.rollouts),
        "max_prompt_tokens": identity.context_length(model.path) - longest,
    }
    if job.score.context is not None:
        return {each.id: each for each in read_prompts(job.score.context, tokenizer, **told)}
    assert job.score.prompt_template is not None, "role = context has one of them"
    assert job.score.prompts is not None, "a template has prompts"
    template = read_template(job.score.prompt_template)
    stored = (prompt for segment in segments for prompt in store.read_prompts(segment))
    return templated(job.score.prompts, template, stored, tokenizer, **told)


def run_estimate(job: EstimateJob, *, progress: Progress = silent) -> Estimate:
    """`logitcask store estimate`."""
    model, prompts, template = student_and_prompts(job.student, job.prompts, job.rollout)
    teacher = identity.model_ref(
        job.teacher.model, revision=job.teacher.revision, chat_template=template
    )
    check_identity(model.lineage(), teacher)
    return estimate(
        grading=grading_of(job.rollout, model, prompts),
        teacher=backend(teacher, job.run),
        student=backend(model, job.run),
        prompts=prompts,
        sampling=job.rollout.sampling(),
        sample=job.estimate.sample,
        student_k=job.rollout.student_k,
        mc_draws=job.rollout.mc_draws,
        k_min=job.score.k_min,
        seed=job.run.seed,
        progress=progress,
    )


def run_train(
    job: TrainJob,
    *,
    cache: UnitCache | None = None,
    progress: Progress = silent,
    notice: Notice = lambda line: None,
) -> TrainReport:
    """`logitcask train`. What the cache serves of the objective is given to `notice` first."""
    store, pin, task = _train_task(job)
    report = train(
        store,
        **task,
        out=job.run.out,
        pin=None if job.train.pin is None else pin,
        overwrite=job.run.overwrite,
        device=job.run.device,
        evaluation=eval_plan(job.eval, job.run, task["model"], _rendered(pin, job.store.rollouts)),
        held_out=held_out_set(job.eval, job.store.url, job.train.base),
        cache=cache,
        config=job.model_dump(mode="json"),
        notice=notice,
        progress=progress,
    )
    for line in warnings(task["objective"].objective, report.last):
        notice(f"warning: {line}")
    return report


def check_train(job: TrainJob) -> None:
    """Raises what would stop `run_train` before its first update."""
    store, pin, task = _train_task(job)
    check(store, **task, pin=pin)
    eval_plan(job.eval, job.run, task["model"], _rendered(pin, job.store.rollouts))
    held = held_out_set(job.eval, job.store.url, job.train.base)
    if held is not None:
        hold_out(held, task["model"], task["objective"], job.train.tokens_per_batch)


def scoring_seconds(job: TrainJob) -> float | None:
    """What the teacher took for one pass over what `run_train` reads; None where the store does not
    say so of every unit.
    """
    _, pin, task = _train_task(job)
    chains = pin.scores(task["teacher"])
    read = [chains[s.seg_id] for s in pin.rollouts(task["rollouts"]) if s.seg_id in chains]
    took = [segment.seconds for chain in read for segment in chain]
    known = [each for each in took if each is not None]
    return sum(known) if len(known) == len(took) else None


def _train_task(job: TrainJob) -> tuple[Store, Pin, dict[str, Any]]:
    """The store, its state, and what is to be learned by whom."""
    preset = find_objective(job.train)
    store = open_store(job.store.url)
    pin = store.head() if job.train.pin is None else pin_of(store, job.train.pin)
    where = "the store" if job.train.pin is None else f"the store at log number {pin.number}"
    bases = [n for n in pin.names("score") if pin.role(n) == "base"]
    # Who is not asked for a base does not mean one.
    teachers = [n for n in pin.names("score") if n not in bases or n == job.train.teacher]
    task = {
        "model": student_of(job.student, pin, job.store.rollouts),
        "teacher": choose(teachers, job.train.teacher, what="teacher", where=where),
        "base": job.train.base and choose(bases, job.train.base, what="base", where=where),
        "rollouts": job.store.rollouts,
        "objective": preset,
        "settings": train_settings(job.train, job.run),
        "partial": job.train.partial,
        "foreign_student": job.train.foreign_student,
    }
    return store, pin, task


def run_probe(
    job: ProbeJob, objectives: Sequence[str] = (), *, progress: Progress = silent
) -> list[Bin]:
    """`logitcask probe metrics`; `objectives` as --objective takes them; bin 0 is all rows."""
    found = {text: find_preset(text).objective for text in objectives}
    store = open_store(job.store.url)
    pin = store.head() if job.probe.pin is None else pin_of(store, job.probe.pin)
    teachers = [n for n in pin.names("score") if pin.role(n) != "base" or n == job.probe.teacher]
    teacher = choose(teachers, job.probe.teacher, what="teacher")
    model = student_of(job.student, pin, job.store.rollouts)
    rows = planned(
        store,
        pin=pin,
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


def pin_of(store: Store, text: str) -> Pin:
    """The pin that a person names: a log number, or a tag."""
    return store.pin(int(text) if text.isdecimal() else text)


def student_and_prompts(
    student: Student, prompts: Prompts, rollout: Rollout
) -> tuple[ModelRef, list[Prompt], bool]:
    """The student's reference, its prompts, and whether the chat template rendered them.

    Every prompt leaves room for max_new_tokens in the student's context.
    """
    path = identity.resolve_model(student.model, student.revision)
    tokenizer = load_tokenizer(path)
    template = chat_template_for(prompts.file, tokenizer, prompts.chat_template)
    model = identity.model_ref(
        student.model, revision=student.revision, chat_template=template, tokenizer=tokenizer
    )
    read = _read(prompts.file, tokenizer, path, template, rollout.max_new_tokens)
    return model, read, template


def eval_plan(settings: Eval, run: Run, model: ModelRef, template: bool) -> EvalPlan | None:
    """What [eval] asks of students with the tokenizer of `model`; None where it names no prompts.

    Raises PromptError, and ConfigError for a grader that is not there.
    """
    if settings.prompts is None:
        return None
    tokenizer = load_tokenizer(model.path)
    prompts = _read(
        settings.prompts, tokenizer, model.path, template, settings.max_new_tokens, "eval."
    )
    return EvalPlan(
        prompts=prompts,
        sampling=settings.sampling(),
        grader=open_grader(settings.grader, prompts),
        grader_name=settings.grader,
        decode=_decoder(tokenizer),
        sampler=lambda student: live_backend(student, model, run),
        seed=run.seed,
        every=settings.every,
    )


def held_out_set(settings: Eval, url: str, base: str | None = None) -> HeldOutSet | None:
    """The rows that [eval] names; None where it names none. `url` is the store that is trained on,
    `base` the scores of a base model that are looked at there, and here where they have that name.

    Raises ConfigError where the choice is not clear, IncompleteError where there is none.
    """
    named = (settings.store, settings.rollouts, settings.teacher, settings.pin)
    if all(each is None for each in named):
        return None
    store = open_store(settings.store or url)
    pin = store.head() if settings.pin is None else pin_of(store, settings.pin)
    names = pin.names("score")
    teachers = [n for n in names if pin.role(n) != "base" or n == settings.teacher]
    return HeldOutSet(
        store=store,
        rollouts=choose(
            pin.names("rollout"), settings.rollouts, what="eval-rollouts", where=store.url
        ),
        teacher=choose(teachers, settings.teacher, what="eval-teacher", where=store.url),
        base=base if base in names else None,
        pin=None if settings.pin is None else pin,
        every=settings.every,
    )


def grading_of(rollout: Rollout, model: ModelRef, prompts: Sequence[Prompt]) -> Grading | None:
    """Who gives responses their rewards, as [rollout] says; None where it names nobody.

    Raises as open_grader does.
    """
    if not rollout.grader:
        return None
    grader = open_grader(rollout.grader, prompts)
    decode = _decoder(load_tokenizer(model.path))
    return Grading(name=rollout.grader, grader=grader, decode=decode)


def _decoder(tokenizer: Any) -> Decode:
    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    return decode


def _read(
    file: Path, tokenizer: Any, folder: Path, template: bool, max_new_tokens: int, of: str = ""
) -> list[Prompt]:
    """Prompts that leave room for the response in the context of the model in `folder`; `of` is the
    prefix of the key that says how long it gets.
    """
    context = identity.context_length(folder)
    if max_new_tokens >= context:
        raise ConfigError(
            f"{of}max_new_tokens = {max_new_tokens}: the student's context of {context} tokens "
            "leaves no room for a prompt",
            remedy=f"give --{of.replace('.', '-')}max-new-tokens less than {context}",
        )
    return read_prompts(
        file, tokenizer, chat_template=template, max_prompt_tokens=context - max_new_tokens
    )


def teacher_of(teacher: Teacher, pin: Pin, rollouts: str) -> ModelRef:
    """The teacher's reference; its template is judged in the way the rollouts were rendered."""
    return identity.model_ref(
        teacher.model, revision=teacher.revision, chat_template=_rendered(pin, rollouts)
    )


def student_of(student: Student, pin: Pin, rollouts: str) -> ModelRef:
    """The reference of a student to be trained on these rollouts."""
    return identity.model_ref(
        student.model, revision=student.revision, chat_template=_rendered(pin, rollouts)
    )


def _rendered(pin: Pin, rollouts: str) -> bool:
    segments = pin.rollouts(rollouts)
    if not segments:
        known = ", ".join(pin.names("rollout")) or "none"
        raise IncompleteError(
            f"the store holds no rollouts named {rollouts!r}; it has: {known}",
            remedy="run `logitcask rollout` first, or give --rollouts one of these",
        )
    # The digest says it of every sampler's rollouts; the plain word is only in those of our verbs.
    template: str = segments[0].lineage["student"]["template"]
    return template != identity.template_digest(None, False)


def find_objective(settings: Train) -> Preset:
    """The preset that [train] names; ConfigError names the nearest known one."""
    name = re.split(r"[(+]", settings.objective)[0].strip()
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--objective {settings.objective}: no preset of this name",
            remedy=f"the nearest is {near}; known: {', '.join(PRESETS)}",
        )
    return find_preset(settings.objective, k=settings.k)


def train_settings(settings: Train, run: Run) -> TrainSettings:
    """[train] and [run] as the trainer takes them."""
    return TrainSettings(
        lr=settings.lr,
        epochs=settings.epochs,
        tokens_per_batch=settings.tokens_per_batch,
        accumulation=settings.accumulation,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        seed=run.seed,
        dtype=run.dtype,
        lora_rank=settings.lora,
        metric_share=settings.metric_share,
        aggregation=settings.aggregation,
        bounds=Bounds(
            action=settings.hard_bound,
            min_coverage=settings.min_coverage,
            max_drift=settings.max_drift,
        ),
        save_steps=settings.save_steps,
    )


def backend(model: ModelRef, run: Run) -> Any:
    """The sampler and scorer that [run] names, with this model loaded."""
    return open_backend(run.backend)(
        model, device=run.device, dtype=run.dtype, batch_tokens=run.batch_tokens
    )


def live_backend(student: Any, model: ModelRef, run: Run) -> Any:
    """The same over a student in training: it samples with the weights of the moment."""
    return open_backend(run.backend)(
        model, dtype=run.dtype, batch_tokens=run.batch_tokens, network=inner_model(student)
    )
