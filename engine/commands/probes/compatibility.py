"""`logitcask probe compatibility`: try a student and candidate teachers before paying.

The student samples a few prompts into a store, each teacher scores these responses and, with a
grader, samples the same prompts itself; the student then scores the teachers' responses. All of it
is done by the stages `rollout` and `score`, so the same command resumes, and other probes read the
same store.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from logitcask.engine.backends.base import close_backend
from logitcask.engine.backends.sampling import check_room
from logitcask.engine.commands.load_teacher import open_teacher
from logitcask.engine.commands.resolve import grader_of, student_and_prompts
from logitcask.engine.commands.rollout import rollout_request
from logitcask.engine.commands.score import score_request
from logitcask.engine.config.probes import CompatibilityConfig
from logitcask.engine.config.section import NAME
from logitcask.engine.config.sections import RolloutConfig, ScoreConfig
from logitcask.engine.config.teacher import Score, Teacher
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.estimate.left import (
    Approve,
    WorkLeft,
    combined,
    refuse_full_disk,
    sampling_left,
    scoring_left,
)
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.models import identity
from logitcask.engine.probes import figures
from logitcask.engine.probes.candidates.agreement import agreement
from logitcask.engine.probes.candidates.compatibility import (
    CompatibilityReport,
    TeacherReport,
    accuracies,
    compare,
    teacher_report,
)
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import score
from logitcask.engine.store import Store
from logitcask.engine.teachers.checks import check_identity
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.types import ModelRef, Progress, Prompt, no_progress

STUDENT = "student"
"""Name of the student's scores of the teachers' responses."""
LISTED = 64
"""Ids of the teacher's own top-k that a row of its own responses keeps, so that next to no mass is
left out of a novelty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The prompts of a probe, and how each model answers them."""

    config: CompatibilityConfig
    model: ModelRef
    """The student."""
    prompts: Sequence[Prompt]
    rendering: Rendering
    grader: Grader | None

    @property
    def k(self) -> int:
        return self.config.compatibility.k

    def own_text(self, teacher: str) -> str:
        """Return the name of the rollouts that a teacher sampled."""
        return f"{self.config.store.rollouts}-by-{teacher}"


def run_compatibility_probe(
    config: CompatibilityConfig,
    figure: Path | None = None,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    approve: Approve = refuse_full_disk,
) -> CompatibilityReport:
    """Sample, score and compare; what the store holds already is not repeated.

    figure: file for the picture. Before anything is sampled it raises ConfigError for names, k and
    figures that cannot be, IdentityError for a teacher with another tokenizer or without a stop id
    of the student, PromptError for prompts that the grader or a context cannot take.
    """
    if figure is not None:
        figures.check_file(figure)
    candidates = candidates_of(config.compatibility.teacher_models)
    model, prompts, rendering = student_and_prompts(
        config.student, config.prompts, config.rollout, on_event
    )
    grader = grader_of(config.rollout, model, prompts)
    sample = Sample(config=config, model=model, prompts=prompts, rendering=rendering, grader=grader)
    if sample.k >= model.n_vocab:
        raise ConfigError(
            f"k = {sample.k}, and the vocabulary has {model.n_vocab} ids",
            hint="give a smaller --k: at this one each list holds every id",
        )
    cancel = CancelToken(on_event)
    for teacher in candidates.values():
        _check(sample, teacher, cancel)
    approve(_left(sample, candidates))
    store = _sample_student(sample, progress)
    for name, teacher in candidates.items():
        _ask_teacher(sample, store, name, teacher, cancel, progress)
    graded = [n for n, each in candidates.items() if grader is not None and not is_remote(each)]
    _score_own_texts(sample, store, graded, cancel, progress)
    report = _compare(sample, store, candidates)
    if figure is not None:
        figures.draw_compatibility(figure, report)
    return report


def _left(sample: Sample, candidates: Mapping[str, str]) -> WorkLeft:
    """Return what is left of the rollouts and scores of all models."""
    config, rollout = sample.config, sample.config.rollout
    sequences, most = len(sample.prompts) * rollout.n, rollout.max_new_tokens
    sampling = partial(sampling_left, sequences=sequences, max_new_tokens=most)
    scoring = partial(scoring_left, sequences=sequences, max_new_tokens=most)
    url, rollouts = config.store.url, config.store.rollouts
    parts = [sampling(url, rollouts)]
    for name, teacher in candidates.items():
        remote = is_remote(teacher)
        parts.append(scoring(url, rollouts, name, remote=remote))
        if sample.grader is not None and not remote:
            own = sample.own_text(name)
            parts.append(sampling(url, own))
            parts.append(scoring(url, own, STUDENT))
    return combined("probe compatibility", parts)


def candidates_of(models: Sequence[str]) -> dict[str, str]:
    """Return name -> model of MODEL or NAME=MODEL; by default a name is the end of the model's.

    Raises ConfigError for two of one name, and for a name that scores cannot have.
    """
    found: dict[str, str] = {}
    for each in models:
        given, divided, model = each.partition("=")
        named = bool(divided) and re.fullmatch(NAME, given) is not None
        last = each.rstrip("/").rpartition("/")[2]
        name = given if named else re.sub(r"[^a-z0-9._-]+", "-", last.lower()).lstrip("._-")
        if not re.fullmatch(NAME, name) or name == STUDENT or name in found:
            cause = "is taken" if name in found or name == STUDENT else "is no name of scores"
            raise ConfigError(
                f"teacher {each!r}: the name {name!r} {cause}",
                hint="name it: --teacher-model NAME=MODEL, in small letters, digits, '.', '_', '-'",
            )
        found[name] = model if named else each
    return found


def _check(sample: Sample, teacher: str, cancel: CancelToken) -> None:
    """Check a teacher before anything is sampled; its weights are not loaded."""
    student, config = sample.model.provenance(), sample.config
    template = sample.rendering.chat_template
    if is_remote(teacher):
        open_teacher(
            _teacher(sample, "checked", teacher),
            config.run,
            student,
            template=template,
            exact=False,
            k_max=_score(sample, teacher).teacher_topk_max,
            cancel=cancel,
        ).close()
        return
    model = identity.model_ref(teacher, chat_template=template)
    if model.tokenizer_digest != student["tokenizer"]:
        raise IdentityError(
            f"{teacher} has another tokenizer than the student, and this probe compares ids",
            hint=f"`logitcask doctor tokenizers {config.student.model} {teacher} --texts FILE` "
            "shows how the two divide texts; `score` takes such a teacher, and `probe reward` "
            "reads its scores",
        )
    check_identity(student, model)
    if config.compatibility.foreign_eos == "refuse" and not (
        set(sample.model.stop_ids) & set(model.stop_ids)
    ):
        raise IdentityError(
            f"the student stops at the ids {list(sample.model.stop_ids)}, and {teacher} at "
            f"{list(model.stop_ids)} only",
            hint="keep the rows of these ids with --foreign-eos keep, or add the student's "
            "eos_token_id to the teacher's config.json",
        )
    check_room(sample.prompts, config.rollout.max_new_tokens, identity.context_length(model.path))


def _teacher(sample: Sample, name: str, model: str) -> Teacher:
    tokenizer = sample.config.compatibility.tokenizer if is_remote(model) else ""
    return Teacher(model=model, name=name, tokenizer=tokenizer)


def _score(sample: Sample, teacher: str) -> Score:
    least = max(Score().teacher_topk_min, sample.k)
    # A server returns few ids by default.
    most = least if is_remote(teacher) else max(LISTED, least)
    return Score(
        teacher_topk_min=least,
        teacher_topk_max=most,
        foreign_eos=sample.config.compatibility.foreign_eos,
    )


def _sample_student(sample: Sample, progress: Progress) -> Store:
    config = sample.config
    request = rollout_request(
        RolloutConfig(
            student=config.student,
            prompts=config.prompts,
            store=config.store,
            rollout=config.rollout.model_copy(
                update={"student_topk": max(config.rollout.student_topk, sample.k)}
            ),
            run=config.run,
        ),
        sample.model,
        sample.prompts,
        sample.rendering,
        sample.grader,
    )
    try:
        rollout(request, progress=progress)
        return request.store
    finally:
        close_backend(request.sampler)


def _ask_teacher(
    sample: Sample,
    store: Store,
    name: str,
    teacher: str,
    cancel: CancelToken,
    progress: Progress,
) -> None:
    """Score the student's responses with a teacher, and let it sample where it can."""
    config = sample.config
    request = score_request(
        ScoreConfig(
            teacher=_teacher(sample, name, teacher),
            store=config.store,
            score=_score(sample, teacher),
            run=config.run,
        ),
        store,
        store.head(),
        cancel,
    )
    try:
        score(request, progress=progress)
        if sample.grader is None or is_remote(teacher):
            return
        # The same token ids: it reads the student's prompts when it scores, too.
        own = RolloutRequest(
            store=store,
            model=request.model,
            sampler=request.scorer,  # type: ignore[arg-type]  # an embedded backend does both
            prompts=sample.prompts,
            sampling=config.rollout,
            name=sample.own_text(name),
            seed=config.run.seed,
            student_k=min(max(LISTED, sample.k), sample.model.n_vocab),
            grader=sample.grader,
            unit_prompts=config.rollout.unit_prompts or None,
            profile=config.store.profile,
            provenance_extra=sample.rendering.record(),
        )
        rollout(own, progress=progress)
    finally:
        close_backend(request.scorer)


def _score_own_texts(
    sample: Sample, store: Store, teachers: Sequence[str], cancel: CancelToken, progress: Progress
) -> None:
    """Score the teachers' responses with the student, whose weights are loaded once."""
    if not teachers:
        return
    config, least = sample.config, max(Score().teacher_topk_min, sample.k)
    settings = Score(
        selection="top-k", teacher_topk_min=least, teacher_topk_max=least, foreign_eos="keep"
    )
    request = score_request(
        ScoreConfig(
            teacher=Teacher(
                model=config.student.model, revision=config.student.revision, name=STUDENT
            ),
            store=config.store.model_copy(update={"rollouts": sample.own_text(teachers[0])}),
            score=settings,
            run=config.run,
        ),
        store,
        store.head(),
        cancel,
    )
    try:
        for name in teachers:
            score(replace(request, rollouts_name=sample.own_text(name)), progress=progress)
    finally:
        close_backend(request.scorer)


def _compare(sample: Sample, store: Store, candidates: Mapping[str, str]) -> CompatibilityReport:
    """Measure all candidates on what the store holds now."""
    snapshot, rollouts = store.head(), sample.config.store.rollouts
    least = sample.config.compatibility.correct_from
    student = accuracies(store, snapshot, rollouts=rollouts, correct_from=least)
    reports, rows = list[TeacherReport](), None
    for name, model in candidates.items():
        rows = agreement(store, snapshot, rollouts=rollouts, teacher=name, k=sample.k)
        own, right = None, dict[str, float]()
        if sample.grader is not None and not is_remote(model):
            text = sample.own_text(name)
            own = agreement(
                store, snapshot, rollouts=text, teacher=STUDENT, k=sample.k, swapped=True
            )
            right = accuracies(store, snapshot, rollouts=text, correct_from=least)
        reports.append(
            teacher_report(
                name, model, rows, own=own, student=student, teacher=right, correct_from=least
            )
        )
    assert rows is not None, "one candidate at least"
    return compare(
        reports,
        rows,
        k=sample.k,
        store=sample.config.store.url,
        rollouts=rollouts,
        student=student,
    )
