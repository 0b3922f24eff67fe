"""Answers for verl from a store, in its layout; nothing here imports verl.

verl (0.9.1, `extract_prompt_logprobs` in workers/rollout/vllm_rollout/utils.py) wants one row a
token: row i is about token i + 1, and the last row is a dummy of zeros. Its losses read the rows
that predict the response (`no_padding_2_padding` in workers/utils/padding.py) and no others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from logitcask.engine.errors import ConfigError, IdentityError, StoreError
from logitcask.engine.integrations.sequences import StoredSequence, StoredSequences
from logitcask.engine.models.fingerprint import MAX_SPREAD
from logitcask.engine.types import Array

KEY = "logitcask"
"""The key of verl's `data` section that holds the settings."""


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Settings, `+data.logitcask.store=PATH` and so on in verl's command."""

    store: str
    rollouts: str | None = None
    teacher: str | None = None
    snapshot: int | str | None = None
    on_missing: str = "error"
    """For a sequence that is not in the store: "error", or "teacher" = ask verl's own teacher."""

    @staticmethod
    def of(data: Mapping[str, Any]) -> "StoreSettings":
        """Return the settings in verl's `data` section. Raises ConfigError for wrong ones."""
        given = dict(data.get(KEY) or {})
        known = [field.name for field in fields(StoreSettings)]
        if "store" not in given or not set(given) <= set(known):
            raise ConfigError(
                f"data.{KEY} has the keys {sorted(map(str, given))}",
                hint=f"give +data.{KEY}.store=PATH; the others are {', '.join(known[1:])}",
            )
        if given.get("on_missing", "error") not in ("error", "teacher"):
            raise ConfigError(
                f"data.{KEY}.on_missing is {given['on_missing']!r}", hint='"error" or "teacher"'
            )
        return StoreSettings(**given)

    def open(self, k: int) -> StoredSequences:
        """Return the sequences of the store, the same object each time in a process.

        k: as StoredSequences, whose errors are raised.
        """
        return _open(self.store, k, self.rollouts, self.teacher, self.snapshot)


@lru_cache(maxsize=4)
def _open(
    store: str, k: int, rollouts: str | None, teacher: str | None, snapshot: int | str | None
) -> StoredSequences:
    return StoredSequences(store, k=k, rollouts=rollouts, teacher=teacher, snapshot=snapshot)


def teacher_rows(found: StoredSequence, prompt: int, k: int) -> tuple[Array, Array]:
    """Return verl's `teacher_ids` int32 and `teacher_logprobs` float32, [L, K] for L tokens.

    prompt: tokens that verl takes for the prompt. k: 0 = the token itself, and then K is 1; else K
    is k. Raises StoreError where verl's response begins before the stored one, whose rows have no
    scores.
    """
    if prompt < found.prompt:
        raise StoreError(
            f"verl's response begins at token {prompt}, and the stored one at {found.prompt}",
            hint="give verl the prompts that the rollouts were sampled from",
        )
    ids = np.zeros((len(found.ids), max(k, 1)), np.int32)
    logprobs = np.zeros(ids.shape, np.float32)
    rows = slice(found.prompt - 1, len(found.ids) - 1)
    ids[rows] = found.topk_ids if k else found.ids[found.prompt :, None]
    logprobs[rows] = found.topk_logprobs if k else found.teacher_logprobs[:, None]
    return ids, logprobs


def check_same_teacher(stored: Array, live: Array, found: StoredSequence) -> None:
    """Raise IdentityError where a live teacher is not the one whose scores are stored.

    stored, live: log-probs [L, K] of one sequence, in the layout of `teacher_rows`; best first.
    The mean difference of the first column may be what one model's largest may: MAX_SPREAD.
    """
    rows = slice(found.prompt - 1, len(found.ids) - 1)
    diff = float(np.abs(stored[rows, 0] - live[rows, 0]).mean())
    if not diff <= MAX_SPREAD:
        raise IdentityError(
            f"the live teacher's best log-probs differ from the stored ones by {diff:.2g} nats on "
            f"average, and {MAX_SPREAD} is allowed",
            hint="serve the teacher that scored the store, or name its scores with "
            f"data.{KEY}.teacher",
        )
