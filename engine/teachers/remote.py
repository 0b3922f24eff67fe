"""Identity of a remote teacher.

The weights of a server cannot be hashed. Its teacher is identified by the served name and source,
the declared revision, a tokenizer that gives the same ids as the server's, a head with next to no
mass at padded ids, and its fingerprint (`teachers.verified`).
"""

import re
from collections.abc import Callable

import numpy as np

from logitcask.engine.backends.base import RemoteScorer
from logitcask.engine.backends.logprob_diff import PROBE_ROWS, probe_request, probe_rollouts
from logitcask.engine.backends.returned import PADDING
from logitcask.engine.errors import ConfigError, IdentityError, ModelError, ServerError
from logitcask.engine.models import identity
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.types import IdLists, ModelRef

URL = re.compile(r"https?://", re.IGNORECASE)
DECLARED = re.compile(r"(?:^|;)rev=([^;]*)")
"""The revision in a server's custom fingerprint (--fingerprint-mode custom)."""
PADS = 16
"""Padded ids that a row of the probe requests."""
PROBE_TEXT = "Ünïcode 你好 12345  two spaces\n\ttab <|im_start|>user a_b-c.d 0.5e-3"


def is_remote(model: str) -> bool:
    """Return True if a model's name is the URL of a server."""
    return URL.match(model) is not None


def urls_of(model: str) -> list[str]:
    """Split the comma-separated URLs of one teacher; ConfigError for other text."""
    urls = [each.strip().rstrip("/") for each in model.split(",") if each.strip()]
    invalid = [place for place, each in enumerate(urls, 1) if not is_remote(each)]
    if invalid:
        # A password may hold a comma, so with an @ anywhere no part is safe to show.
        what = f"number {invalid[0]}" if "@" in model else repr(urls[invalid[0] - 1])
        raise ConfigError(
            f"{what} among the servers of a teacher is not a URL",
            hint="give http://HOST:PORT, several separated by commas",
        )
    return urls


def remote_model_ref(
    served: str, root: str, *, tokenizer: str = "", revision: str = "", chat_template: bool
) -> ModelRef:
    """Build the identity of a remote teacher.

    served, root: its name and source from the server; tokenizer: a folder or hub id with its
    tokenizer and config.json, if not root. Raises ModelError if those are not found or unreadable.
    """
    source = tokenizer or root
    try:
        path = identity.resolve_model(source, "" if tokenizer else revision, weights=False)
    except ModelError as error:
        raise ModelError(
            f"the tokenizer of {served!r}, {source}: {error.cause}",
            hint="give --tokenizer: a folder or hub id with its tokenizer and config.json",
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
        base_weights=weights,
    )


def check_declared(revision: str, fingerprint: str) -> None:
    """Raise IdentityError if a server declares another revision than the expected one."""
    declared = DECLARED.search(fingerprint)
    if revision and declared is not None and declared[1] != revision:
        raise IdentityError(
            f"the server declares revision {declared[1]!r}, and {revision!r} is expected",
            hint="serve that revision, or give the served one with --revision",
        )


def check_tokenizer(model: ModelRef, tokenize: Callable[[str], list[int] | None]) -> bool:
    """Compare the server's ids of a fixed text with those of the tokenizer in `model.path`.

    Returns False if the server cannot tokenize. Raises IdentityError for other ids.
    """
    theirs = tokenize(PROBE_TEXT)
    if theirs is None:
        return False
    ours = load_tokenizer(model.path)(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    if ours != theirs:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        raise IdentityError(
            f"the server gives other ids for a text than the tokenizer in {model.path}: token "
            f"{place} is {_id_at(theirs, place)} there and {_id_at(ours, place)} here",
            hint="give the tokenizer of the served model with --tokenizer",
        )
    return True


def _id_at(ids: list[int], place: int) -> str:
    return f"id {ids[place]}" if place < len(ids) else "none"


def check_padding(server: RemoteScorer, n_vocab: int, head: int, k_max: int = PADS) -> str:
    """Check the mass of the ids [n_vocab, head), which its tokenizer lacks; return a note or "".

    k_max: maximum number of log-probs per position. Raises IdentityError for a mass that the
    log-probs of the other ids lack.
    """
    pads = np.arange(n_vocab, head)
    if not len(pads):
        return ""
    if "at_ids" not in server.capabilities:
        return f"{len(pads)} ids of its padded head cannot be checked (a trained head: no mass)"
    rollouts = probe_rollouts(n_vocab)
    each = min(PADS, k_max, len(pads))
    spread = np.linspace(0, len(pads) - 1, each * PROBE_ROWS).astype(np.int64)
    # Distinct in a row, and spread over all padded ids.
    chosen = np.sort(pads[spread].reshape(each, PROBE_ROWS).T, axis=1)
    distinct = [np.unique(row) for row in chosen]
    extra_ids = IdLists(
        cnt=np.array([len(row) for row in distinct], np.uint16),
        ids=np.concatenate(distinct).astype(np.uint32),
    )
    server.n_vocab = head
    try:
        found = server.score(rollouts, probe_request(head), extra_ids).at_lp
    except ServerError as error:
        # The served head may be smaller than the one of this config.json.
        if error.status != 400:
            raise
        return f"{len(pads)} ids of its padded head could not be checked: {error.cause}"
    finally:
        server.n_vocab = n_vocab
    assert found is not None, "the request had extra ids"
    mass = float(np.exp(found, dtype=np.float64).mean()) * len(pads)
    if mass > PADDING:
        raise IdentityError(
            f"the {len(pads)} ids of its padded head hold a mass of {mass:.2g} a row, so its "
            f"log-probs are not of the {n_vocab} ids of its tokenizer",
            hint="load it here (--model FOLDER), where its distribution is restricted to these "
            "ids, or train the head so that padded ids have next to no mass",
        )
    return ""
