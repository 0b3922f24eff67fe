"""Checks of a server as a teacher, each by its answers and with a hint."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from logitcask.engine.backends.base import open_backend
from logitcask.engine.backends.logprob_diff import (
    compare_scores,
    probe_request,
    probe_rollouts,
    self_consistency,
    tolerance,
)
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.findings import Finding, fault
from logitcask.engine.models import identity
from logitcask.engine.models.fingerprint import (
    MAX_SPREAD,
)
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.teachers.remote import (
    check_declared,
    check_padding,
    check_tokenizer,
    remote_model_ref,
    urls_of,
)
from logitcask.engine.teachers.token_maps import OtherVocabulary, shared_vocabulary
from logitcask.engine.teachers.verified import CONTROL_K, CONTROL_SEQUENCES, VerifiedTeacher
from logitcask.engine.types import ModelRef


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCheck:
    """Settings of `logitcask doctor teacher`."""

    url: str
    served: str = ""
    server: Literal["auto", "vllm", "sglang"] = "auto"
    tokenizer: str = ""
    revision: str = ""
    api_key_file: Path | None = None
    student: str = ""
    """Model folder or hub id of the student."""
    against: str = ""
    """Model folder or hub id of the weights that the server should serve."""
    dtype: str = "auto"
    """Compute type of `against`."""
    k_max: int = 64
    wait_s: float = 10.0


def check_server(settings: ServerCheck) -> Generator[Finding, None, None]:
    """Yield findings; a fault that prevents the other checks is the last one."""
    open_backend("server")  # raises for a missing package
    from logitcask.engine.backends.server import Limits, ServerScorer, read_key

    try:
        server = ServerScorer(
            urls_of(settings.url),
            served=settings.served,
            engine=settings.server,
            key=read_key(settings.api_key_file),
            limits=Limits(wait_s=settings.wait_s),
        )
    except LogitcaskError as error:
        yield fault("server", error)
        return
    with closing(server):
        yield from _server_info(server.info)
        try:
            check_declared(settings.revision, server.info.fingerprint)
            model = remote_model_ref(
                server.info.served,
                server.info.root,
                tokenizer=settings.tokenizer or settings.against,
                revision=settings.revision,
                chat_template=False,
            )
        except LogitcaskError as error:
            yield fault("identity", error)
            return
        server.n_vocab = model.n_vocab
        yield _try("tokenizer", lambda: _tokenizer(model, server))
        yield _try("padding", lambda: _padding(server, model, settings.k_max))
        if settings.student:
            yield from _student(model, settings.student, server)
        yield _try("log-probs", lambda: _log_probs(server, settings.k_max))
        yield _try("repeats", lambda: _repeats(server, settings.k_max))
        if settings.against:
            yield _try("parity", lambda: _parity(server, model, settings))


def _try(check: str, run: Callable[[], Finding]) -> Finding:
    """Run a check; an error is a fault."""
    try:
        return run()
    except LogitcaskError as error:
        return fault(check, error)


def _server_info(info: Any) -> Iterator[Finding]:
    name = {"vllm": "vLLM", "sglang": "SGLang"}[info.engine]
    version = f"{name} {info.version}" if info.version else f"{name}, unknown version"
    yield Finding(
        check="server", state="ok", message=f"{version}, {info.fingerprint or 'no fingerprint'}"
    )
    adapter = f", an adapter of {info.parent}" if info.parent else ""
    yield Finding(
        check="model",
        state="note" if adapter or not info.root else "ok",
        message=f"{info.served}, loaded from {info.root or 'an unknown source'}{adapter}",
        hint="its scores are those of the adapter" if adapter else "",
    )
    most = info.max_model_len
    yield Finding(
        check="context",
        state="ok" if most else "note",
        message=f"prompt and response of {most - 1} tokens at most" if most else "unknown",
    )
    if info.at_ids:
        parts = ", in several requests a sequence" if info.engine == "sglang" else ""
        message = f"supported, different in every row{parts}"
        yield Finding(check="chosen ids", state="ok", message=message)
    else:
        yield Finding(
            check="chosen ids",
            state="note",
            message=info.why,
            hint=f"{info.at_ids_hint}, for objectives on the student's ids",
        )


def _tokenizer(model: ModelRef, server: Any) -> Finding:
    if check_tokenizer(model, server.tokenize):
        return Finding(
            check="tokenizer", state="ok", message=f"gives the ids of the one in {model.path}"
        )
    return Finding(
        check="tokenizer",
        state="note",
        message=f"the server does not tokenize, so the one in {model.path} could not be checked",
    )


def _padding(server: Any, model: ModelRef, k_max: int) -> Finding:
    head = identity.from_config(identity.read_config(model.path), "vocab_size")
    if head == model.n_vocab:
        return Finding(
            check="padding", state="ok", message="none: the head ends with the tokenizer"
        )
    note = check_padding(server, model.n_vocab, head, k_max)
    return Finding(
        check="padding",
        state="note" if note else "ok",
        message=note or f"{head - model.n_vocab} padded ids of the head, with next to no mass",
    )


def _student(model: ModelRef, name: str, server: Any) -> Iterator[Finding]:
    """Compare student and teacher without their weights; restrict the server to shared ids."""
    try:
        path = identity.resolve_model(name, weights=False)
        ours, theirs = load_tokenizer(path), load_tokenizer(model.path)
        n_vocab, stops = identity.vocabulary(path, identity.read_config(path), ours)
    except LogitcaskError as error:
        yield fault("ids", error)
        return
    student = {"tokenizer": identity.tokenizer_digest(ours), "n_vocab": n_vocab}
    yield _try("ids", lambda: _ids(student, model, name, server))
    others = sorted(set(stops) - set(model.stop_ids))
    yield Finding(
        check="stop ids",
        state="note" if others else "ok",
        message=f"the student stops at {list(stops)}, the teacher at {list(model.stop_ids)}",
        hint="give --foreign-eos keep for responses that end in one of the others"
        if others
        else "",
    )
    yield _try("prompts", lambda: _prompts(ours, theirs))


def _ids(student: dict[str, Any], model: ModelRef, name: str, server: Any) -> Finding:
    try:
        shared = shared_vocabulary(student, model, name)
    except OtherVocabulary as other:
        return Finding(
            check="ids",
            state="note",
            message=f"{other.cause}, so its scores are of spans",
            hint=f"score with --student-tokenizer {name}, and train with an objective over spans, "
            "which `logitcask objectives` lists",
        )
    if shared is None:
        return Finding(check="ids", state="ok", message=f"{student['n_vocab']}, the student's own")
    server.n_vocab = shared.n_vocab
    return Finding(
        check="ids",
        state="note",
        message=shared.note(model.name),
        hint=f"score with --student-tokenizer {name}",
    )


def _prompts(ours: Any, theirs: Any) -> Finding:
    if _template(ours) == _template(theirs):
        return Finding(check="prompts", state="ok", message="the same in both templates")
    return Finding(
        check="prompts",
        state="note",
        message="different in the teacher's template",
        hint="check that the teacher understands the student's rendering, which it will score",
    )


def _template(tokenizer: Any) -> str | None:
    if tokenizer.chat_template is None:
        return None
    return identity.template_digest(tokenizer, True)


def _log_probs(server: Any, k_max: int) -> Finding:
    request = probe_request(server.n_vocab, k_max)
    server.score(probe_rollouts(server.n_vocab), request)
    return Finding(
        check="log-probs", state="ok", message=f"{request.k_max} best ids of every position"
    )


def _repeats(server: Any, k_max: int) -> Finding:
    verified = VerifiedTeacher(server, server.n_vocab, server.close, k_max)
    several = len(server.replicas())
    return Finding(
        check="repeats",
        state="ok",
        message=f"to {verified.self_diff.largest:.2g} nats in another order and batch; "
        f"{verified.tolerance:.2g} is allowed to another engine"
        + (f", and the {several} servers are within that" if several > 1 else ""),
    )


def _parity(server: Any, model: ModelRef, settings: ServerCheck) -> Finding:
    rollouts = probe_rollouts(model.n_vocab, CONTROL_SEQUENCES)
    request = probe_request(model.n_vocab, min(CONTROL_K, settings.k_max))
    spread = self_consistency(server, rollouts, request).largest
    theirs = server.score(rollouts, request)
    local = open_backend("hf")(
        identity.model_ref(settings.against, chat_template=False), dtype=settings.dtype
    )
    ours = local.score(rollouts, request)
    half = local.describe()["dtype"] != "float32"
    allowed = max(tolerance(spread), MAX_SPREAD if half else 0.0)
    found = compare_scores(theirs, ours)
    same = found.largest <= allowed
    return Finding(
        check="parity",
        state="ok" if same else "fault",
        message=f"log-probs differ from those of {settings.against} by {found.largest:.2g} nats at "
        f"most, {found.mean:.2g} on the mean of {found.compared}; {allowed:.2g} is allowed",
        hint=""
        if same
        else "serve the same weights, revision and dtype, without adapter, quantisation or "
        "temperature; if the server computes in bfloat16, give --dtype bfloat16 here too",
    )
