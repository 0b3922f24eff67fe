"""`logitcask score`: a teacher scores stored rollouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import open_teacher
from logitcask.engine.commands.resolve import columns_in, rendering_of
from logitcask.engine.config.sections import ScoreConfig
from logitcask.engine.config.teacher import FILE, is_file
from logitcask.engine.estimate.left import Approve, WorkLeft, refuse_full_disk, units_left
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.models import identity
from logitcask.engine.prompts.encode import readable
from logitcask.engine.prompts.prompts import load_tokenizer, read_prompts
from logitcask.engine.prompts.source import open_source
from logitcask.engine.prompts.teacher_context import read_template, templated
from logitcask.engine.score.plan import ScoreReport, score
from logitcask.engine.score.planner import plan_scores
from logitcask.engine.score.positions_file import read_positions
from logitcask.engine.score.same_texts import SameTexts
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.teachers.alignment import RolloutText
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.teachers.token_maps import student_tokenizer
from logitcask.engine.types import ModelRef, Progress, Prompt, no_progress


def run_score(
    config: ScoreConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
    approve: Approve = refuse_full_disk,
) -> ScoreReport:
    """Score what is missing; `approve` gets it before the first unit."""
    store = open_store(config.store.url)
    request = score_request(config, store, store.head(), CancelToken(on_event))
    try:
        approve(_left(config, request, store.head()))
        return score(request, progress=progress)
    finally:
        close_backend(request.scorer)


def _left(config: ScoreConfig, request: ScoreRequest, snapshot: Snapshot) -> WorkLeft:
    planned = plan_scores(request, snapshot)
    missing = [unit.segment for unit in planned.missing.values()]
    every = sum(each.counts["N"] for each in snapshot.rollouts(config.store.rollouts))
    return units_left(
        config.store.url,
        config.teacher.name,
        missing,
        done=every - sum(each.counts["N"] for each in missing),
        remote=is_remote(config.teacher.model),
    )


def score_request(
    config: ScoreConfig, store: Store, snapshot: Snapshot, cancel: CancelToken
) -> ScoreRequest:
    """Load the teacher and describe its scores; the caller closes the scorer."""
    store.storage.check_writable()
    positions, listed = config.score.positions, None
    if is_file(positions):
        listed = read_positions(Path(positions.removeprefix(FILE)))
        segments = snapshot.rollouts(config.store.rollouts)
        listed.check_prompts(p.id for each in segments for p in store.read_prompts(each))
        positions = listed.name
    said = list[str]()
    text = _text(config, store, snapshot, said.append)
    student = snapshot.rollouts(config.store.rollouts)[0].provenance["student"]
    teacher = open_teacher(
        config.teacher,
        config.run,
        student,
        template=text.has_template(config.teacher.model),
        exact=config.score.exact,
        k_max=config.score.teacher_topk_max,
        cancel=cancel,
        text=text,
    )
    try:
        model, alignment, context = teacher.model, teacher.alignment, None
        params, notes = teacher.score_params(config.score, config.run.seed)
        if config.score.teacher_kind == "context":
            source = student if alignment is not None else None
            context = teacher_context(text, model, source, named=config.teacher.student_tokenizer)
            if alignment is not None:
                alignment = replace(alignment, prompts=context)
        same_texts = None
        if config.score.same_texts:
            dtype = str(teacher.scorer.describe().get("dtype"))
            same_texts = SameTexts(store, snapshot, config.score.same_texts, model, dtype)
        return ScoreRequest(
            store=store,
            model=model,
            scorer=teacher.scorer,
            teacher_name=config.teacher.name,
            rollouts_name=config.store.rollouts,
            params=params,
            role=config.score.teacher_kind,
            context=context,
            extra_ids=config.score.extra_ids or None,
            positions=positions,
            positions_file=listed,
            profile=config.store.profile,
            eos_rows=config.score.foreign_eos,
            shared=teacher.shared,
            alignment=alignment,
            same_texts=same_texts,
            notes=(*teacher.notes, *notes, *said),
            provenance_extra=teacher.provenance_extra,
        )
    except BaseException:
        teacher.close()
        raise


def _text(
    config: ScoreConfig, store: Store, snapshot: Snapshot, on_event: EventHandler
) -> RolloutText:
    """Return the text of stored rollouts, for the teachers that read it."""
    segments = snapshot.rollouts(config.store.rollouts)
    rendering = rendering_of(snapshot, config.store.rollouts)
    source = None
    if config.score.prompts is not None:
        source = open_source(config.score.prompts, columns_in(rendering.source))
    return RolloutText(
        score=config.score,
        rendering=rendering,
        stored=lambda: (prompt for segment in segments for prompt in store.read_prompts(segment)),
        source=source,
        max_new_tokens=lambda: int(segments[0].provenance["set"]["max_new_tokens"]),
        on_event=on_event,
    )


def teacher_context(
    text: RolloutText, model: ModelRef, student: Mapping[str, Any] | None, *, named: str = ""
) -> dict[str, Prompt]:
    """Return the teacher's prompts by id, rendered as those of the rollouts were; each leaves room
    for the longest response.

    student: provenance of a student with another tokenizer, named: a folder or hub id with it;
    None = the tokenizers are equal. Notes on the rendering are events of `text`.
    """
    settings, tokenizer = text.score, load_tokenizer(model.path)
    rendering, unread = readable(tokenizer, text.rendering)
    for note in unread:
        text.on_event(f"{model.name}: {note}")
    most = identity.context_length(model.path) - text.max_new_tokens()
    if settings.context is not None:
        read = read_prompts(
            settings.context,
            tokenizer,
            rendering,
            max_prompt_tokens=most,
            on_event=text.on_event,
        )
        return {each.id: each for each in read}
    assert settings.prompt_template is not None, "teacher_kind = context has one of them"
    assert text.source is not None, "a template has prompts"
    return templated(
        text.source,
        read_template(settings.prompt_template),
        text.stored(),
        tokenizer,
        rendering,
        max_prompt_tokens=most,
        student=None if student is None else (student_tokenizer(student, named), text.rendering),
    )
