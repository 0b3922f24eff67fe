"""Samplers and scorers of a configuration, with their models loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from logitcask.engine.alignment.alignment import Alignment
from logitcask.engine.alignment.span_scores import NONE
from logitcask.engine.backends.base import close_backend, open_backend
from logitcask.engine.config.sections import Run
from logitcask.engine.config.teacher import Score, Teacher
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.events import CancelToken
from logitcask.engine.models import identity
from logitcask.engine.models.forward import inner_model
from logitcask.engine.teachers.alignment import RolloutText
from logitcask.engine.teachers.checks import check_identity
from logitcask.engine.teachers.remote import (
    check_declared,
    check_padding,
    check_tokenizer,
    is_remote,
    remote_model_ref,
    urls_of,
)
from logitcask.engine.teachers.token_maps import (
    OtherVocabulary,
    SharedVocabulary,
    compare_tokenizers,
    shared_vocabulary,
)
from logitcask.engine.teachers.verified import VerifiedTeacher
from logitcask.engine.types import ModelRef, Prompt, ScoreParams


def backend(
    model: ModelRef, run: Run, *, exact: bool = True, tokenizer_vocab: int | None = None
) -> Any:
    """Load the model into the backend that [run] names. exact: scores from all logits, where the
    backend has a choice; tokenizer_vocab: number of ids of its tokenizer, if
    more than model.n_vocab.
    """
    name = _embedded(run)
    choice = {"exact": exact} if name == "vllm" else {}
    return open_backend(name)(
        model,
        device=run.device,
        dtype=run.dtype,
        batch_tokens=run.batch_tokens,
        tokenizer_vocab=tokenizer_vocab,
        **choice,
    )


def live_backend(student: Any, model: ModelRef, run: Run) -> Any:
    """Return a backend over a student in training, which samples with its current weights. It is
    transformers, which holds them.
    """
    return open_backend("hf")(
        model, dtype=run.dtype, batch_tokens=run.batch_tokens, network=inner_model(student)
    )


def _embedded(run: Run) -> str:
    if run.backend == "server":
        raise ConfigError(
            "backend = server, and this model is not at a URL",
            hint="use the backend hf or vllm; only a teacher can be at a URL, http://HOST:PORT",
        )
    return "hf" if run.backend == "auto" else run.backend


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTeacher:
    """A teacher that is ready to score. Close it after use."""

    model: ModelRef
    scorer: Any
    shared: SharedVocabulary | None
    """Map between its tokenizer and the student's; None = they are equal."""
    alignment: Alignment | None = None
    """Of a teacher with another tokenizer, which scores spans; None = its ids are the student's."""
    notes: tuple[str, ...] = ()
    """Lines about it for the user."""
    provenance_extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields that every segment of its scores records."""
    context: Mapping[str, Prompt] | None = None
    """Prompt id -> the prompt that it reads; None = that of the student."""

    def close(self) -> None:
        close_backend(self.scorer)

    def score_params(self, settings: Score, seed: int) -> tuple[ScoreParams, tuple[str, ...]]:
        """Return the parameters of [score], and notes on those that it cannot serve. Raises
        ConfigError if nothing useful is left.
        """
        request = settings.params(seed)
        if self.alignment is not None and self.alignment.rows == NONE:
            # Log-probs of its own tokens alone: a server returns one id at least.
            least = ScoreParams(entry_kind="topk", top_p=1.0, k_min=1, k_max=1, at_student=False)
            return least, ()
        if "at_ids" in self.scorer.capabilities or not request.at_student:
            return request, ()
        if settings.extra_ids:
            raise ConfigError(
                f"extra_ids = {settings.extra_ids}, and {self.model.name} cannot "
                f"score chosen ids here",
                hint="serve it with SGLang, or with vLLM 0.32 or newer on a GPU and "
                "--enable-scale-out, or use the backend hf",
            )
        return replace(request, at_student=False), (
            f"{self.model.name} cannot score chosen ids here, so only its own top-k is "
            "stored: objectives on the student's ids will be refused",
        )


def open_teacher(
    teacher: Teacher,
    run: Run,
    student: Mapping[str, Any],
    *,
    template: bool,
    exact: bool,
    k_max: int,
    cancel: CancelToken,
    text: RolloutText | None = None,
) -> LoadedTeacher:
    """Load a teacher, or connect to one at a URL. student: provenance of the model that sampled the
    rollouts; template: prompts are rendered by the chat template; k_max: largest top-k per position
    of the requests; cancel: ends waits for unavailable servers; text: of the rollouts, for a
    teacher with another tokenizer; None = it is refused.

    Raises ConfigError for settings that have no meaning for such a teacher; IdentityError for a
    tokenizer that is not the student's and cannot be compared with it, and for a server that serves
    another revision, reads text otherwise than the tokenizer that is given, or is not the teacher
    of the other servers.
    """
    if is_remote(teacher.model):
        if exact:
            raise ConfigError(
                "exact, and the teacher is at a URL: a server does not show its hidden states",
                hint="leave --exact out, or give a model folder or hub id with --backend vllm",
            )
        return _open_served(teacher, run, student, template, k_max, cancel, text)
    for key in ("served", "tokenizer", "server", "api_key_file"):
        value = getattr(teacher, key)
        if value and value != Teacher.model_fields[key].default:
            raise ConfigError(
                f"{key} = {value}, and the teacher is not at a URL",
                hint=f"leave --{key.replace('_', '-')} out, or give --model http://HOST:PORT",
            )
    own = identity.model_ref(teacher.model, revision=teacher.revision, chat_template=template)
    found = _compared(own, student, teacher, text)
    scorer = backend(found.model, run, exact=exact, tokenizer_vocab=own.n_vocab)
    return replace(found, scorer=scorer)


def _open_served(
    teacher: Teacher,
    run: Run,
    student: Mapping[str, Any],
    template: bool,
    k_max: int,
    cancel: CancelToken,
    text: RolloutText | None,
) -> LoadedTeacher:
    if run.backend not in ("auto", "server"):
        raise ConfigError(
            f"backend = {run.backend}, and the teacher is at a URL",
            hint="leave --backend out, or give a model folder or hub id",
        )
    open_backend("server")  # raises if its package is missing
    from logitcask.engine.backends.server import Limits, ServerScorer, read_key

    server = ServerScorer(
        urls_of(teacher.model),
        served=teacher.served,
        engine=teacher.server,
        key=read_key(teacher.api_key_file),
        limits=Limits(wait_s=teacher.server_wait),
        cancel=cancel,
    )
    try:
        check_declared(teacher.revision, server.info.fingerprint)
        model = remote_model_ref(
            server.info.served,
            server.info.root,
            tokenizer=teacher.tokenizer,
            revision=teacher.revision,
            chat_template=template,
        )
        checked = check_tokenizer(model, server.tokenize)
        server.n_vocab = own = model.n_vocab
        found = _compared(model, student, teacher, text)
        model, notes = found.model, [*found.notes]
        if not checked:
            notes.append(f"{model.name}: the server does not tokenize, so its map is taken on word")
        head = identity.from_config(identity.read_config(model.path), "vocab_size")
        if said := check_padding(server, own, head, k_max):
            notes.append(f"{model.name}: {said}")
        server.n_vocab = model.n_vocab
        same = VerifiedTeacher(server, model.n_vocab, server.close, k_max)
    except BaseException:
        server.close()
        raise
    return replace(found, scorer=same, notes=tuple(notes), provenance_extra=same.provenance())


def _compared(
    model: ModelRef, student: Mapping[str, Any], teacher: Teacher, text: RolloutText | None
) -> LoadedTeacher:
    """Return the teacher without a scorer: over the ids that the student has too, or aligned with
    it; raises before its weights are loaded.
    """
    source, shared, alignment = teacher.student_tokenizer, None, None
    is_same = student["tokenizer"] == model.tokenizer_digest
    if is_same or text is None:
        shared = shared_vocabulary(student, model, source)
    elif teacher.by_spans or (shared := _of_family(student, model, source)) is None:
        alignment = text.align(model, student, source)
    if alignment is None and text is not None:
        text.check_unused(f"{model.name} has the student's tokenizer", by_spans=teacher.by_spans)
    if shared is not None:
        model = replace(model, n_vocab=shared.n_vocab)
    notes = check_identity(student, model, shared, alignment)
    return LoadedTeacher(
        model=model, scorer=None, shared=shared, alignment=alignment, notes=tuple(notes)
    )


def _of_family(student: Mapping[str, Any], model: ModelRef, source: str) -> SharedVocabulary | None:
    """Return the shared vocabulary of tokenizers that agree on half of all ids; None for others.

    Scores by id and over spans serve other objectives, so the choice is the user's. Raises
    IdentityError where neither --student-tokenizer nor --by-spans makes it.
    """
    try:
        shared = compare_tokenizers(student, model, source)
    except OtherVocabulary:
        return None
    if not source:
        raise IdentityError(
            f"{model.name} and the student have nearly the same tokenizer: "
            f"{len(shared.differing)} ids differ: {shared.format_ids(shared.differing)}",
            hint="compare ids, where these do not occur: --student-tokenizer with the student's "
            "folder or hub id; or score spans of equal bytes, for objectives over spans: "
            "--by-spans",
        )
    return shared
