"""A teacher that is served: who it is, as far as a server can say.

A server has no weights to digest. Its teacher is what it says that it serves, the revision that is
declared, a tokenizer that reads text as the server does, a head whose padding is next to nothing;
and how it behaves (`same_teacher`).
"""

import re
from collections.abc import Callable

import numpy as np

from logitcask.engine.backends.base import Served
from logitcask.engine.backends.logprob_diff import PROBE_ROWS, probe_request, probe_rollouts
from logitcask.engine.backends.returned import PADDING
from logitcask.engine.errors import ConfigError, IdentityError, ModelError, ServerError
from logitcask.engine.models import identity
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.types import IdLists, ModelRef

URL = re.compile(r"https?://", re.IGNORECASE)
DECLARED = re.compile(r"(?:^|;)rev=([^;]*)")
"""Where an operator says the revision in a server's fingerprint (--fingerprint-mode custom)."""
PADS = 16
"""Ids of a padded head that a row of the probe is asked at."""
PROBE_TEXT = "Ünïcode 你好 12345  two spaces\n\ttab <|im_start|>user a_b-c.d 0.5e-3"


def is_remote(model: str) -> bool:
    """Whether a model's name is the URL of a server."""
    return URL.match(model) is not None


def urls_of(model: str) -> list[str]:
    """The servers of one teacher. Raises ConfigError for what is no list of URLs."""
    urls = [each.strip().rstrip("/") for each in model.split(",") if each.strip()]
    strangers = [place for place, each in enumerate(urls, 1) if not is_remote(each)]
    if strangers:
        # A comma in a password parts it, so that with an @ anywhere none of them is safe to show.
        what = f"number {strangers[0]}" if "@" in model else repr(urls[strangers[0] - 1])
        raise ConfigError(
            f"{what} among the servers of a teacher is no URL",
            hint="Give http://HOST:PORT, several divided by commas.",
        )
    return urls


def served_ref(
    served: str, root: str, *, tokenizer: str = "", revision: str = "", chat_template: bool
) -> ModelRef:
    """Who a served teacher is. served, root: its name and what it was loaded from, as the server
    says; tokenizer: a folder or hub id with its tokenizer and config.json, if not root.

    Raises ModelError where those cannot be found or read.
    """
    source = tokenizer or root
    try:
        path = identity.resolve_model(source, "" if tokenizer else revision, weights=False)
    except ModelError as error:
        raise ModelError(
            f"the tokenizer of {served!r}, {source}: {error.cause}",
            hint="Give --tokenizer: a folder or hub id that holds the teacher's tokenizer and "
            "config.json.",
        ) from error
    loaded = load_tokenizer(path)
    n_vocab, stop_ids = identity.vocabulary(path, identity.read_config(path), loaded)
    weights = identity.digest({"served": root or served, "revision": revision})
    return ModelRef(
        name=served,
        path=path,
        revision=revision,
        digest=weights,
        tokenizer_digest=identity.tokenizer_digest(loaded),
        template_digest=identity.template_digest(loaded, chat_template),
        n_vocab=n_vocab,
        stop_ids=stop_ids,
        version=0,
        root=weights,
    )


def check_declared(revision: str, fingerprint: str) -> None:
    """IdentityError where a server declares another revision than is expected of it."""
    declared = DECLARED.search(fingerprint)
    if revision and declared is not None and declared[1] != revision:
        raise IdentityError(
            f"the server declares revision {declared[1]!r}, and {revision!r} was asked for",
            hint="Serve that revision, or give the one that is served with --revision.",
        )


def check_tokenizer(model: ModelRef, tokenize: Callable[[str], list[int] | None]) -> bool:
    """Whether the server could be asked. Raises IdentityError where it reads a fixed text otherwise
    than the tokenizer in `model.path`.
    """
    theirs = tokenize(PROBE_TEXT)
    if theirs is None:
        return False
    ours = load_tokenizer(model.path)(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        raise IdentityError(
            f"the server reads a text as other ids than the tokenizer in {model.path}: token {at} "
            f"is {_at(theirs, at)} there and {_at(ours, at)} here",
            hint="Give the served model's own tokenizer with --tokenizer.",
        )
    return True


def _at(ids: list[int], place: int) -> str:
    return f"id {ids[place]}" if place < len(ids) else "none"


def check_padding(server: Served, n_vocab: int, head: int, k_max: int = PADS) -> str:
    """What is to be said of the ids [n_vocab, head), which its tokenizer has not; "" = nothing.

    k_max: log-probs per position that it can be asked for.
    Raises IdentityError where they hold a mass that the log-probs of the others lack.
    """
    pads = np.arange(n_vocab, head)
    if not len(pads):
        return ""
    if "at_ids" not in server.capabilities:
        return f"{len(pads)} ids of its padded head cannot be looked at; a trained one's are nil"
    rollouts = probe_rollouts(n_vocab)
    each = min(PADS, k_max, len(pads))
    spread = np.linspace(0, len(pads) - 1, each * PROBE_ROWS).astype(np.int64)
    # Distinct in a row, and all over the padding in all rows.
    asked = np.sort(pads[spread].reshape(each, PROBE_ROWS).T, axis=1)
    distinct = [np.unique(row) for row in asked]
    at = IdLists(
        cnt=np.array([len(row) for row in distinct], np.uint16),
        ids=np.concatenate(distinct).astype(np.uint32),
    )
    server.n_vocab = head
    try:
        found = server.score(rollouts, probe_request(head), at).at_lp
    except ServerError as error:
        # Its head may end where another copy of its configuration says that it does not.
        if error.status != 400:
            raise
        return f"{len(pads)} ids of its padded head could not be looked at: {error.cause}"
    finally:
        server.n_vocab = n_vocab
    assert found is not None, "it was asked at ids"
    mass = float(np.exp(found, dtype=np.float64).mean()) * len(pads)
    if mass > PADDING:
        raise IdentityError(
            f"the {len(pads)} ids of its padded head hold a mass of {mass:.2g} a row, so its "
            f"log-probs are not of the {n_vocab} ids that its tokenizer has",
            hint="Load it here (--model FOLDER), where its law is cut to its own ids, or train "
            "the head so that padding is next to impossible.",
        )
    return ""
