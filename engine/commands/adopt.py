"""`logitcask import`: rollouts and texts of other programs become rollouts of a student."""

from pathlib import Path

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.load_teacher import backend
from logitcask.engine.config.sections import ImportConfig
from logitcask.engine.errors import PromptError
from logitcask.engine.events import EventHandler
from logitcask.engine.exchange.adopt import ImportReport, adopt, survey
from logitcask.engine.exchange.adopt_recorded import adopt_recorded
from logitcask.engine.exchange.files import TEXT, Files
from logitcask.engine.exchange.recorded import TAP, survey_recorded
from logitcask.engine.exchange.scored.files import AXOLOTL
from logitcask.engine.exchange.scored.rows import TeacherScores
from logitcask.engine.models import identity
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.prompts.templates import Rendering
from logitcask.engine.store import open_store
from logitcask.engine.types import Progress, no_progress


def run_import(
    config: ImportConfig,
    *,
    progress: Progress = no_progress,
    on_event: EventHandler = lambda line: None,
) -> ImportReport:
    """Check all files, let the student score their sequences, and commit what is missing.

    Every line is checked before a weight is read. Raises PromptError at the first invalid line, and
    as `survey` and `adopt` do, with the store of a tap as `survey_recorded` and `adopt_recorded`.
    """
    settings = config.imported
    if settings.format == TAP:
        return _import_recorded(config, progress, on_event)
    path = identity.resolve_model(config.student.model, config.student.revision)
    tokenizer, is_text = load_tokenizer(path), settings.format in (TEXT, AXOLOTL)
    n_vocab, stop_ids = identity.vocabulary(path, identity.read_config(path), tokenizer)
    paths = [Path(each) for each in settings.files]
    files = Files(paths, settings.format, tokenizer, stop_ids, last=settings.turns == "last")
    contents = survey(
        files,
        n_vocab=n_vocab,
        context=identity.context_length(path),
        unit_positions=settings.unit_positions,
        rewards=settings.rewards,
    )
    if not contents.sequences:
        raise PromptError(
            f"{paths[0]} holds no sequence with a token that counts in a loss",
            hint="give the program that wrote it with --from",
        )
    if files.left_out:
        on_event(f"left out: {files.left_out} sequences without a token that counts in a loss")
    if not contents.behavior:
        on_event(
            "the files do not have the log-prob of every token that counts, so the distribution "
            "of the draws is unknown: objectives that rest on draws will be refused"
        )
    for text in [] if contents.teacher is None else contents.teacher.lines():
        on_event(text)
    rendering = Rendering(chat_template=is_text and bool(tokenizer.chat_template))
    model = identity.model_ref(
        config.student.model,
        revision=config.student.revision,
        chat_template=rendering.chat_template,
        tokenizer=tokenizer,
    )
    source = {"format": settings.format, "file": paths[0].name, "text": is_text}
    teacher = None
    if settings.teacher is not None and contents.teacher is not None:
        teacher = TeacherScores(
            name=settings.teacher,
            files=contents.digest,
            student=model,
            counts=contents.teacher,
            source=source,
        )
    # Only now: a rejected file leaves no empty store behind.
    store, scorer = open_store(config.store.url, create=True), backend(model, config.run)
    try:
        return adopt(
            files,
            contents,
            store,
            scorer,
            model,
            name=config.store.rollouts,
            student_k=settings.student_topk,
            unit_positions=settings.unit_positions,
            profile=config.store.profile,
            source=source,
            extra=rendering.record(),
            teacher=teacher,
            progress=progress,
        )
    finally:
        close_backend(scorer)


def _import_recorded(
    config: ImportConfig, progress: Progress, on_event: EventHandler
) -> ImportReport:
    """Take the rollouts of a tap's store over, with the teacher's scores."""
    settings, rendering = config.imported, Rendering(chat_template=False)
    source = open_store(settings.files[0])
    model = identity.model_ref(
        config.student.model, revision=config.student.revision, chat_template=False
    )
    recorded = survey_recorded(
        source,
        settings.tap_rollouts,
        model,
        context=identity.context_length(model.path),
        after_ids=settings.after,
        foreign_eos=settings.foreign_eos,
    )
    if recorded.unknown:
        on_event(
            f"left out: {recorded.unknown} sequences of which it is unknown where the response "
            "begins (--after)"
        )
    if recorded.repeated:
        on_event(f"left out: {recorded.repeated} sequences that earlier segments have too")
    if recorded.unscored:
        on_event(f"{recorded.unscored} segments have no scores yet: import again after the tap")
    store, scorer = open_store(config.store.url, create=True), backend(model, config.run)
    try:
        return adopt_recorded(
            source,
            recorded,
            store,
            scorer,
            model,
            name=config.store.rollouts,
            student_k=settings.student_topk,
            profile=config.store.profile,
            extra=rendering.record(),
            progress=progress,
        )
    finally:
        close_backend(scorer)
