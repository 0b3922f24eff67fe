"""`logitcask score`: a teacher scores stored rollouts."""

from collections.abc import Iterable
from pathlib import Path

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import open_teacher
from logitcask.engine.commands.resolve import columns_in, rendering_of
from logitcask.engine.config.sections import ScoreConfig
from logitcask.engine.config.teacher import FILE, Score, is_file
from logitcask.engine.estimate.left import Approve, WorkLeft, refuse_full_disk, units_left
from logitcask.engine.events import CancelToken, EventHandler
from logitcask.engine.models import identity
from logitcask.engine.prompts.encode import readable
from logitcask.engine.prompts.prompts import load_tokenizer, read_prompts
from logitcask.engine.prompts.source import Source, open_source
from logitcask.engine.prompts.teacher_context import read_template, templated
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.score.plan import ScoreReport, score
from logitcask.engine.score.planner import plan_scores
from logitcask.engine.score.positions_file import read_positions
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import Snapshot, Store, open_store
from logitcask.engine.teachers.remote import is_remote
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
    template = rendering_of(snapshot, config.store.rollouts).chat_template
    student = snapshot.rollouts(config.store.rollouts)[0].provenance["student"]
    teacher = open_teacher(
        config.teacher,
        config.run,
        student,
        template=template,
        exact=config.score.exact,
        k_max=config.score.teacher_topk_max,
        cancel=cancel,
    )
    try:
        model = teacher.model
        params, notes = teacher.score_params(config.score, config.run.seed)
        context, said = None, list[str]()
        if config.score.teacher_kind == "context":
            context = _context(config, store, model, snapshot, said.append)
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
            notes=(*teacher.notes, *notes, *said),
            provenance_extra=teacher.provenance_extra,
        )
    except BaseException:
        teacher.close()
        raise


def _context(
    config: ScoreConfig,
    store: Store,
    model: ModelRef,
    snapshot: Snapshot,
    on_event: EventHandler,
) -> dict[str, Prompt]:
    """Return the teacher's prompts by id for stored rollouts, as `teacher_context`."""
    segments = snapshot.rollouts(config.store.rollouts)
    rendering = rendering_of(snapshot, config.store.rollouts)
    source = None
    if config.score.prompts is not None:
        source = open_source(config.score.prompts, columns_in(rendering.source))
    return teacher_context(
        config.score,
        model,
        rendering,
        source=source,
        stored=(prompt for segment in segments for prompt in store.read_prompts(segment)),
        max_new_tokens=int(segments[0].provenance["set"]["max_new_tokens"]),
        on_event=on_event,
    )


def teacher_context(
    settings: Score,
    model: ModelRef,
    rendering: Rendering,
    *,
    source: Source | None,
    stored: Iterable[Prompt],
    max_new_tokens: int,
    on_event: EventHandler,
) -> dict[str, Prompt]:
    """Return the teacher's prompts by id, rendered as those of the rollouts were; each leaves room
    for the longest response.

    rendering, stored: of the rollouts; source: their prompts file, for a template. Notes on the
    rendering go to `on_event`.
    """
    tokenizer = load_tokenizer(model.path)
    rendering, unread = readable(tokenizer, rendering)
    for note in unread:
        on_event(f"{model.name}: {note}")
    most = identity.context_length(model.path) - max_new_tokens
    if settings.context is not None:
        read = read_prompts(
            settings.context,
            tokenizer,
            rendering,
            max_prompt_tokens=most,
            on_event=on_event,
        )
        return {each.id: each for each in read}
    assert settings.prompt_template is not None, "teacher_kind = context has one of them"
    assert source is not None, "a template has prompts"
    template = read_template(settings.prompt_template)
    return templated(source, template, stored, tokenizer, rendering, max_prompt_tokens=most)
