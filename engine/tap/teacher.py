"""Identity of the teacher behind the tap: a card and a fingerprint, never a URL.

Each teacher has a folder of its own among the answers, with `teacher.json`. A server is a known
teacher if its card is equal and the log-probs of a fixed probe are within the tolerance.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.backends.logprob_diff import fingerprint
from logitcask.engine.backends.server import Limits, ServerScorer
from logitcask.engine.backends.server.capabilities import ServerInfo
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.errors import AnswerError, ConfigError, IdentityError, StoreError
from logitcask.engine.models.digests import read_json, write_json
from logitcask.engine.models.fingerprint import (
    compare_records,
    fingerprint_distance,
    fingerprint_of,
)
from logitcask.engine.models.identity import digest, from_config, read_config
from logitcask.engine.teachers.remote import (
    check_declared,
    check_padding,
    check_tokenizer,
    remote_model_ref,
)
from logitcask.engine.teachers.verified import CONTROL_K, VerifiedTeacher
from logitcask.engine.types import ModelRef

PROBING = Limits(requests=8, attempts=2, connect_s=5.0, read_s=30.0, wait_s=2.0, poll_s=0.5)
"""Limits of the tap's own requests: clients wait meanwhile."""
CARD = "teacher.json"
_REMOVE = "remove its folder: its records are then requested from the teacher again"
Describe = Callable[[Teacher, str, str, str | None], ModelRef]
"""(section, served name, source, API key) -> identity of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A teacher, as its folder records it."""

    name: str
    """Of its scores in the store; of its folder too."""
    model: Mapping[str, Any]
    """Provenance, as `score` records it."""
    card: Mapping[str, Any]
    """Served name, source, parent adapter and context."""
    fingerprint: Mapping[str, Any]
    """Log-probs of the probe, and its tolerance."""
    backend: Mapping[str, Any]
    """Engine, versions and flags, for the provenance."""
    models: Any
    """/v1/models, which clients request although the teacher is off."""
    tempered: bool
    """Its prompt log-probs depend on the temperature."""
    has_key: bool
    """It answers no request without an API key."""
    changed_by: str = ""
    """Request through the tap after which it counts as another teacher."""

    @property
    def n_vocab(self) -> int:
        return int(self.model["n_vocab"])

    @property
    def served(self) -> str:
        return str(self.card["served"])

    @property
    def names(self) -> frozenset[str]:
        """Return the served names of these weights."""
        cards = self.models.get("data", []) if isinstance(self.models, dict) else []
        same = [
            each["id"]
            for each in cards
            if isinstance(each, dict)
            and not each.get("parent")
            and each.get("root")
            and each["root"] == self.card["root"]
            and isinstance(each.get("id"), str)
        ]
        return frozenset({self.served, *([] if self.card["parent"] else same)})


def describe(teacher: Teacher, served: str, key: str | None) -> ModelRef:
    """Return the identity of the model that a server declares, with its tokenizer checked.

    It imports transformers, so the tap calls it in a process of its own. Raises ModelError and
    IdentityError as `remote_model_ref`, `check_declared`, `check_tokenizer` and `check_padding`.
    """
    with _connect(teacher, served, key) as server:
        check_declared(teacher.revision, server.info.fingerprint)
        model = remote_model_ref(
            server.info.served,
            server.info.root,
            tokenizer=teacher.tokenizer,
            revision=teacher.revision,
            chat_template=False,  # the prompts are those of any client
        )
        check_tokenizer(model, server.tokenize)
        server.n_vocab = model.n_vocab
        head = from_config(read_config(model.path), "vocab_size")
        check_padding(server, model.n_vocab, head)
    return model


def _connect(teacher: Teacher, served: str, key: str | None) -> ServerScorer:
    engine, urls = teacher.server, [teacher.model]
    return ServerScorer(urls, served=served, engine=engine, key=key, limits=PROBING)


class Probe:
    """A connection that measures the teacher's fingerprint."""

    def __init__(self, teacher: Teacher, key: str | None, describe: Describe, k: int) -> None:
        """Connect and measure with k best ids. Raises ServerError without an answer, and as
        `describe`.
        """
        self.server = _connect(teacher, teacher.served, key)
        try:
            self.model = describe(teacher, self.info.served, self.info.root, key)
            self.server.n_vocab = self.model.n_vocab
            close, k_max = self.server.close, min(k, CONTROL_K)
            verified = VerifiedTeacher(self.server, self.model.n_vocab, close, k_max)
        except ConfigError as error:
            self.server.close()
            hint = f"start vLLM with --max-logprobs {k} or more, or give a smaller --topk"
            raise ConfigError(error.cause, hint=hint) from error
        except BaseException:
            self.server.close()
            raise
        self.record: dict[str, Any] = verified.provenance()["fingerprint"]
        self._known, self._tolerance = verified.fingerprint, verified.tolerance

    @property
    def info(self) -> ServerInfo:
        return self.server.info

    def card(self) -> dict[str, Any]:
        """Return the fields of /v1/models that must stay."""
        info = self.info
        return {
            "served": info.served,
            "root": info.root,
            "parent": info.parent,
            "max_model_len": info.max_model_len,
        }

    def use(self, known: Identity) -> None:
        """Compare later measurements with the first one of a known teacher."""
        self._known = fingerprint_of(known.fingerprint)
        self._tolerance = max(self._tolerance, compare_records(known.fingerprint, self.record)[1])

    def is_same(self) -> bool:
        """Measure again; return True for the same teacher. Raises ServerError without an answer."""
        try:
            found = fingerprint(self.server, self.model.n_vocab)
        except (IdentityError, AnswerError):
            return False
        return fingerprint_distance(self._known, found) <= self._tolerance

    def close(self) -> None:
        """Close the connection."""
        self.server.close()


def identify(
    answers: Path,
    base: str,
    probe: Probe,
    changed_by: str,
    *,
    models: Any,
    tempered: bool,
    has_key: bool,
) -> Identity:
    """Return the known teacher that a probe has measured, or record a new one under a new name.

    base: beginning of its name. changed_by: a request that makes it a new one in any case.
    """
    model, card = probe.model.provenance(), probe.card()
    for known in reversed(known_teachers(answers)):
        if known.card == card and known.model == model and known.tempered == tempered:
            distance, tolerance = compare_records(known.fingerprint, probe.record)
            if distance <= tolerance and not changed_by:
                return known
    new = {"model": model, "card": card, "fingerprint": probe.record, "tempered": tempered}
    mark = digest({**new, "changed_by": changed_by, "at": time.time() if changed_by else 0})
    found = Identity(
        name=f"{base}-{mark.removeprefix('sha256:')[:8]}",
        model=model,
        card=card,
        fingerprint=probe.record,
        backend=probe.server.describe(),
        models=models,
        tempered=tempered,
        has_key=has_key,
        changed_by=changed_by,
    )
    (answers / found.name).mkdir(parents=True, exist_ok=True)
    write_json(answers / found.name / CARD, asdict(found))
    return found


def known_teachers(answers: Path) -> list[Identity]:
    """Return the teachers with a folder, the one that was identified last at the end."""
    cards = [each for each in answers.glob(f"*/{CARD}") if not each.parent.name.startswith(".")]
    cards.sort(key=lambda each: each.stat().st_mtime_ns)
    try:
        return [Identity(**read_json(each, hint=_REMOVE)) for each in cards]
    except TypeError as error:
        raise StoreError(f"{answers}: a {CARD} with other keys: {error}", hint=_REMOVE) from error


def mark_newest(answers: Path, known: Identity) -> None:
    """Mark a teacher as the one that was identified last."""
    os.utime(answers / known.name / CARD)
