"""A teacher that is served: who it is, as far as a server can say, and whether it stays the same.

A server has no weights to digest. Its teacher is what it says that it serves, the revision that is
declared, and how it behaves: log-probs of a fixed probe, which are kept with the scores, and
compared when scoring begins and after every unit.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from logitcask.engine import identity
from logitcask.engine.backends.base import Scorer
from logitcask.engine.backends.parity import (
    Behaviour,
    Parity,
    behaviour,
    behaviour_of,
    control,
    control_at_work,
    distance,
    probe_request,
    probe_rollouts,
    tolerance,
)
from logitcask.engine.errors import ConfigError, IdentityError, ModelError
from logitcask.engine.prompts import load_tokenizer
from logitcask.engine.store import Pin
from logitcask.engine.types import IdLists, ModelRef, Rollouts, ScoreRequest, Scores

URL = re.compile(r"https?://", re.IGNORECASE)
DECLARED = re.compile(r"(?:^|;)rev=([^;]*)")
"""Where an operator says the revision in a server's fingerprint (--fingerprint-mode custom)."""
CONTROL_SEQUENCES = 8
CONTROL_K = 16
CONTROL_ROWS = 2048
"""Of a run's first unit that are scored twice; at least one sequence."""
PROBE_TEXT = "Ünïcode 你好 12345  two spaces\n\ttab <|im_start|>user a_b-c.d 0.5e-3"


def is_served(model: str) -> bool:
    """Whether a model's name is the URL of a server."""
    return URL.match(model) is not None


def urls_of(model: str) -> list[str]:
    """The servers of one teacher. Raises ConfigError for what is no list of URLs."""
    urls = [each.strip().rstrip("/") for each in model.split(",") if each.strip()]
    strangers = [place for place, each in enumerate(urls, 1) if not is_served(each)]
    if strangers:
        # A comma in a password parts it, so that with an @ anywhere none of them is safe to show.
        what = f"number {strangers[0]}" if "@" in model else repr(urls[strangers[0] - 1])
        raise ConfigError(
            f"{what} among the servers of a teacher is no URL",
            remedy="Give http://HOST:PORT, several divided by commas.",
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
            remedy="Give --tokenizer: a folder or hub id that holds the teacher's tokenizer and "
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
            remedy="Serve that revision, or give the one that is served with --revision.",
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
            remedy="Give the served model's own tokenizer with --tokenizer.",
        )
    return True


def _at(ids: list[int], place: int) -> str:
    return f"id {ids[place]}" if place < len(ids) else "none"


class SameTeacher:
    """A scorer of a served teacher, which is asked for its behaviour again after every unit, before
    what it said is believed: one short sequence beside thousands.
    """

    def __init__(self, scorer: Scorer, n_vocab: int, close: Callable[[], None]) -> None:
        """close: ends the scorer. Scores the control and the probe."""
        self._scorer, self._n_vocab, self.close = scorer, n_vocab, close
        self.capabilities = scorer.capabilities
        self._control = probe_request(n_vocab, CONTROL_K)
        self.parity: Parity = control(
            scorer, probe_rollouts(n_vocab, CONTROL_SEQUENCES), self._control
        )
        self.tolerance = tolerance(self.parity.largest)
        self.at_work: Parity | None = None
        """The control on the first unit that is scored."""
        self.behaviour: Behaviour = behaviour(scorer, n_vocab)

    def score(self, rollouts: Rollouts, request: ScoreRequest, at: IdLists | None = None) -> Scores:
        """Raises IdentityError, in place of scores, from a teacher that has changed, or one so
        unsteady on the first of these that it could not be told from another.
        """
        scores = self._scorer.score(rollouts, request, at)
        if self.at_work is None and rollouts.positions:
            self.at_work = control_at_work(
                self._scorer, rollouts, scores, self._control, CONTROL_ROWS
            )
            self.tolerance = max(self.tolerance, tolerance(self.at_work.largest))
        self.check(self.behaviour, "this run")
        return scores

    def describe(self) -> dict[str, str]:
        return self._scorer.describe()

    def lineage(self) -> dict[str, Any]:
        """What a segment records of how its teacher behaved."""
        return {"behaviour": {**self.behaviour.record(), "control_nats": self.parity.largest}}

    def check_name(self, pin: Pin, name: str) -> None:
        """IdentityError where the scores of this name were begun by one that behaved otherwise."""
        for chain in pin.scores(name).values():
            record: Mapping[str, Any] = chain[0].lineage.get("behaviour", {})
            if record:
                self.check(behaviour_of(record), f"the scores named {name!r}")
                return

    def check(self, expected: Behaviour, what: str) -> None:
        found = distance(expected, behaviour(self._scorer, self._n_vocab))
        if found > self.tolerance:
            raise IdentityError(
                f"the teacher is not the one that began {what}: log-probs of a fixed probe differ "
                f"by {found:.3g} nats, and {self.tolerance:.3g} is what one model may differ by "
                f"(its own spread is {self.parity.largest:.2g})",
                remedy="Other weights, another revision, an adapter, quantisation or a temperature "
                "is served: serve what was served, or score under another --teacher name.",
            )
