"""Is a server fit to be a teacher? Every check by what it answers, each with what to change."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from logitcask.engine.backends.base import open_backend
from logitcask.engine.backends.logprob_diff import (
    compare,
    control,
    probe_request,
    probe_rollouts,
    tolerance,
)
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.models import identity
from logitcask.engine.models.fingerprint import (
    MAX_SPREAD,
)
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.teachers.remote import (
    check_declared,
    check_padding,
    check_tokenizer,
    served_ref,
    urls_of,
)
from logitcask.engine.teachers.token_maps import (
    shared_vocabulary,
)
from logitcask.engine.teachers.verified import CONTROL_K, CONTROL_SEQUENCES, VerifiedTeacher
from logitcask.engine.types import ModelRef

State = Literal["ok", "note", "fault"]
FLAGS = "--enable-scale-out --generation-config vllm --max-logprobs 256"
"""Of `vllm serve`, for a teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check."""

    check: str
    state: State
    """note: it works, and something is missing; fault: nothing should be scored."""
    said: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCheck:
    """What is asked about a server."""

    url: str
    served: str = ""
    tokenizer: str = ""
    revision: str = ""
    api_key_file: Path | None = None
    student: str = ""
    """A model folder or hub id of the student whose rollouts it is to score."""
    against: str = ""
    """A model folder or hub id whose weights the server is said to serve."""
    dtype: str = "auto"
    """... in which they are computed with here."""
    k_max: int = 64
    wait_s: float = 10.0


def examine(asked: ServerCheck) -> Iterator[Finding]:
    """Findings one by one; after a fault that hides the rest, none follows."""
    open_backend("server")  # says which package is missing
    from logitcask.engine.backends.server import Limits, Server, read_key

    try:
        server = Server(
            urls_of(asked.url),
            served=asked.served,
            key=read_key(asked.api_key_file),
            limits=Limits(wait_s=asked.wait_s),
        )
    except LogitcaskError as error:
        yield fault("server", error)
        return
    with closing(server):
        yield from _facts(server.facts)
        try:
            check_declared(asked.revision, server.facts.fingerprint)
            model = served_ref(
                server.facts.served,
                server.facts.root,
                tokenizer=asked.tokenizer or asked.against,
                revision=asked.revision,
                chat_template=False,
            )
        except LogitcaskError as error:
            yield fault("identity", error)
            return
        server.n_vocab = model.n_vocab
        yield _tried("tokenizer", lambda: _tokenizer(model, server))
        yield _tried("padding", lambda: _padding(server, model, asked.k_max))
        if asked.student:
            yield from _student(model, asked.student, server)
        yield _tried("log-probs", lambda: _log_probs(server, asked.k_max))
        yield _tried("repeats", lambda: _repeats(server, asked.k_max))
        if asked.against:
            yield _tried("parity", lambda: _parity(server, model, asked))


def fault(check: str, error: LogitcaskError) -> Finding:
    return Finding(check=check, state="fault", said=error.cause, hint=error.hint)


def _tried(check: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except LogitcaskError as error:
        return fault(check, error)


def _facts(facts: Any) -> Iterator[Finding]:
    version = f"vLLM {facts.version}" if facts.version else "does not say its version"
    yield Finding(check="server", state="ok", said=f"{version}, {facts.fingerprint or 'unnamed'}")
    adapter = f", an adapter of {facts.parent}" if facts.parent else ""
    yield Finding(
        check="model",
        state="note" if adapter or not facts.root else "ok",
        said=f"{facts.served}, loaded from {facts.root or 'it does not say where'}{adapter}",
        hint="Its scores are those of the adapter." if adapter else "",
    )
    most = facts.max_model_len
    yield Finding(
        check="context",
        state="ok" if most else "note",
        said=f"prompt and response of {most - 1} tokens at most" if most else "it does not say",
    )
    if facts.at_ids:
        yield Finding(check="chosen ids", state="ok", said="answered, at every row its own")
    else:
        yield Finding(
            check="chosen ids",
            state="note",
            said=facts.why,
            hint="Objectives on the student's ids need them: vLLM 0.31 or newer on a GPU, with "
            f"{FLAGS}.",
        )


def _tokenizer(model: ModelRef, server: Any) -> Finding:
    if check_tokenizer(model, server.tokenize):
        return Finding(check="tokenizer", state="ok", said=f"reads text as {model.path} does")
    return Finding(
        check="tokenizer",
        state="note",
        said=f"the server does not tokenize, so that of {model.path} is taken on word",
    )


def _padding(server: Any, model: ModelRef, k_max: int) -> Finding:
    head = identity.from_config(identity.read_config(model.path), "vocab_size")
    if head == model.n_vocab:
        return Finding(check="padding", state="ok", said="none: the head ends with the tokenizer")
    said = check_padding(server, model.n_vocab, head, k_max)
    return Finding(
        check="padding",
        state="note" if said else "ok",
        said=said
        or f"{head - model.n_vocab} ids of the head that no token has, next to impossible",
    )


def _student(model: ModelRef, name: str, server: Any) -> Iterator[Finding]:
    """What student and teacher are to each other, without the weights of either. The server is then
    asked over the ids that both know.
    """
    try:
        path = identity.resolve_model(name, weights=False)
        ours, theirs = load_tokenizer(path), load_tokenizer(model.path)
        n_vocab, stops = identity.vocabulary(path, identity.read_config(path), ours)
    except LogitcaskError as error:
        yield fault("ids", error)
        return
    told = {"tokenizer": identity.tokenizer_digest(ours), "n_vocab": n_vocab}
    yield _tried("ids", lambda: _ids(told, model, name, server))
    foreign = sorted(set(stops) - set(model.stop_ids))
    yield Finding(
        check="stop ids",
        state="note" if foreign else "ok",
        said=f"the student stops at {list(stops)}, the teacher at {list(model.stop_ids)}",
        hint="Responses that end in one of the others are refused, unless with --foreign-eos keep."
        if foreign
        else "",
    )
    yield _tried("prompts", lambda: _prompts(ours, theirs))


def _ids(student: dict[str, Any], model: ModelRef, name: str, server: Any) -> Finding:
    shared = shared_vocabulary(student, model, name)
    if shared is None:
        return Finding(check="ids", state="ok", said=f"{student['n_vocab']}, the student's own")
    server.n_vocab = shared.n_vocab
    return Finding(
        check="ids",
        state="note",
        said=shared.note(model.name),
        hint=f"Score with --student-tokenizer {name}.",
    )


def _prompts(ours: Any, theirs: Any) -> Finding:
    if _template(ours) == _template(theirs):
        return Finding(check="prompts", state="ok", said="rendered alike by both templates")
    return Finding(
        check="prompts",
        state="note",
        said="rendered differently by the teacher's template",
        hint="It is shown the student's rendering, which may be foreign to it.",
    )


def _template(tokenizer: Any) -> str | None:
    if tokenizer.chat_template is None:
        return None
    return identity.template_digest(tokenizer, True)


def _log_probs(server: Any, k_max: int) -> Finding:
    request = probe_request(server.n_vocab, k_max)
    server.score(probe_rollouts(server.n_vocab), request)
    return Finding(
        check="log-probs", state="ok", said=f"{request.k_max} best ids of every position"
    )


def _repeats(server: Any, k_max: int) -> Finding:
    same = VerifiedTeacher(server, server.n_vocab, server.close, k_max)
    several = len(server.members())
    return Finding(
        check="repeats",
        state="ok",
        said=f"to {same.parity.largest:.2g} nats in another order and batch; "
        f"{same.tolerance:.2g} is allowed to another engine"
        + (f", and the {several} servers are within that" if several > 1 else ""),
    )


def _parity(server: Any, model: ModelRef, asked: ServerCheck) -> Finding:
    rollouts = probe_rollouts(model.n_vocab, CONTROL_SEQUENCES)
    request = probe_request(model.n_vocab, min(CONTROL_K, asked.k_max))
    spread = control(server, rollouts, request).largest
    theirs = server.score(rollouts, request)
    here = open_backend("hf")(
        identity.model_ref(asked.against, chat_template=False), dtype=asked.dtype
    )
    ours = here.score(rollouts, request)
    half = here.describe()["dtype"] != "float32"
    allowed = max(tolerance(spread), MAX_SPREAD if half else 0.0)
    found = compare(theirs, ours)
    same = found.largest <= allowed
    return Finding(
        check="parity",
        state="ok" if same else "fault",
        said=f"log-probs differ from those of {asked.against} by {found.largest:.2g} nats at most, "
        f"{found.mean:.2g} on the mean of {found.compared}; {allowed:.2g} is allowed",
        hint=""
        if same
        else "Other weights, a revision, an adapter, quantisation or a temperature is served. If "
        "the server computes in bfloat16, give --dtype bfloat16 here too.",
    )
