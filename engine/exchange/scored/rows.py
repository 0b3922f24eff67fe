"""Log-probs of a teacher that come with a text: checked, and stored as scores of its rollouts.

A file has the teacher's best ids at each token. It does not have the entropy, nor the log-prob of a
token outside of these ids, so the entropy is stored as an interval and such a token has no score.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from logitcask.engine.backends.returned import ROUNDING, bounds
from logitcask.engine.errors import PromptError
from logitcask.engine.exchange.imported import Imported, TeacherRows
from logitcask.engine.models.identity import digest
from logitcask.engine.store import Segment, Store
from logitcask.engine.store.format.ragged import row_of_entry
from logitcask.engine.store.format.schema import MAX_K
from logitcask.engine.types import Array, ModelRef, ScoreParams, Scores

LOGPROB = "natural, temperature 1, ids [0, n_vocab)"
ROUNDED = 2e-2
"""Mass above 1 that log-probs of a lossy form may have: 16 exact bfloat16 and a fit of the rest."""
_NORMALIZED = 1e-5
"""Mass outside of the ids in no row above this: they were divided by their sum."""

Refuse = Callable[[str, str], NoReturn]
"""Raises PromptError with a cause and a hint, and names file and row."""


def teacher_rows(
    tokens: Array,
    ids: Array,
    logprobs: Array,
    refuse: Refuse,
    *,
    rounding: float = ROUNDING,
    most: int = MAX_K,
) -> TeacherRows:
    """Check the ids of R rows and their log-probs, and sort them best first.

    tokens: [R], the token of each row; ids: [R, K] int64; logprobs: [R, K] float64, nats, -inf for
    places without an id. rounding: mass by which a row may be above 1; such a row is divided by its
    sum. most: ids of a row that are kept. Calls `refuse` for log-probs of no distribution.
    """
    if ids.shape[1] > MAX_K:
        refuse(f"{ids.shape[1]} ids of a token, at most {MAX_K} are stored", "keep the best")

    def check(wrong: Any, cause: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            values = logprobs[row][np.isnan(logprobs[row]) | (logprobs[row] > 0)]
            value = f" {values[0]:g}" if len(values) and "log-prob" in cause else ""
            refuse(f"token {row} of the response: {cause}{value}", "write natural log-probs")

    check(np.isnan(logprobs).any(1), "a log-prob of")
    check((logprobs > rounding).any(1), "a log-prob of")
    there = np.isfinite(logprobs)
    check(~there.any(1), "no id with a probability")
    check(((ids < 0) & there).any(1), "an id below 0")
    check(((ids >= 2**32) & there).any(1), "an id of 2^32 or more")
    distinct = np.sort(np.where(there, ids, -1 - np.arange(ids.shape[1])), 1)
    check((np.diff(distinct, axis=1) == 0).any(1), "one id twice")
    mass = np.exp(logprobs).sum(1)
    check(mass > 1 + rounding, f"ids of a mass of {mass.max():.4f} together, which is above 1")
    over = mass > 1
    logprobs = np.minimum(logprobs - np.where(over, np.log(mass), 0.0)[:, None], 0.0)
    own = (ids == tokens[:, None]) & there
    lp = np.where(own, logprobs, -np.inf).max(1)
    order = np.lexsort((ids, -logprobs), axis=1)[:, :most]
    ids, logprobs, there = (np.take_along_axis(e, order, 1) for e in (ids, logprobs, there))
    return TeacherRows(
        lp=np.where(own.any(1), lp, np.nan).astype(np.float32),
        cnt=there.sum(1).astype(np.uint16),
        ids=ids[there].astype(np.uint32),
        entry_lp=logprobs[there].astype(np.float32),
        rescaled=int((mass > 1 + ROUNDING).sum()),
        exact=rounding <= ROUNDING,
    )


@dataclass
class TeacherCounts:
    """Counts of all rows of the files."""

    n_vocab: int
    """Ids of the student."""
    rows: int = 0
    unknown: int = 0
    """Rows whose token is not among the ids."""
    rescaled: int = 0
    least: int = MAX_K
    """Ids of the shortest row; `most`: of the longest."""
    most: int = 0
    outside: float = 0.0
    """The largest mass outside of the ids of a row."""
    exact: bool = True

    def add(self, found: Imported) -> None:
        """Count the rows of a sequence; PromptError for those that no model can have."""
        rows = found.teacher
        assert rows is not None, "a format with a teacher"
        cause, hint = "", "give the student whose tokenizer made these ids"
        mass = np.bincount(row_of_entry(rows.cnt), np.exp(rows.entry_lp.astype(np.float64)))
        least = np.minimum.reduceat(rows.entry_lp, np.cumsum(rows.cnt, dtype=np.int64) - rows.cnt)
        reach = mass + np.maximum(self.n_vocab - rows.cnt.astype(np.int64), 0) * np.exp(least)
        if int(rows.ids.max()) >= self.n_vocab:
            cause = f"the teacher's id {rows.ids.max()}, and the student's are below {self.n_vocab}"
        elif rows.exact and reach.min() < 1 - ROUNDING:
            cause = (
                f"log-probs that add up to {reach.min():.3g} at most, if all other ids had the "
                "least of them"
            )
            hint = "write natural log-probs over the whole vocabulary, at temperature 1"
        if cause:
            raise PromptError(f"prompt {found.id!r} has {cause}", hint=hint)
        self.rows += len(rows.cnt)
        self.unknown += int(np.isnan(rows.lp).sum())
        self.rescaled += rows.rescaled
        self.least, self.most = (
            min(self.least, int(rows.cnt.min())),
            max(self.most, int(rows.cnt.max())),
        )
        self.outside = max(self.outside, float((1 - mass).max()))
        self.exact &= rows.exact

    def check(self) -> None:
        """Raise PromptError where the log-probs were divided by their sum."""
        if self.rows and self.least < self.n_vocab and self.outside < _NORMALIZED:
            raise PromptError(
                f"the ids of each of {self.rows} tokens have a mass of 1 together: these log-probs "
                "were divided by their sum, so the mass of all other ids is unknown",
                hint="give the log-probs as the teacher returned them, before a trainer prepared "
                "them, or `logitcask score` the texts",
            )

    def lines(self) -> list[str]:
        """Return lines about what is not stored."""
        found = []
        if self.unknown:
            found.append(
                f"without a score: {self.unknown} of {self.rows} tokens, which are not among the "
                "teacher's ids, so their log-probs are unknown"
            )
        if self.rescaled:
            found.append(
                f"divided by their sum: the ids of {self.rescaled} of {self.rows} tokens, whose "
                "rounded probabilities add up to more than 1"
            )
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherScores:
    """The teacher of a file, as the user declares it."""

    name: str
    """Name of its scores."""
    files: str
    """Digest of the sequences."""
    student: ModelRef
    counts: TeacherCounts
    source: Mapping[str, Any] = field(default_factory=dict)

    def key(self, of_rollouts: str) -> str:
        """Return the unit_key of the scores of the rollouts with a unit_key."""
        return digest({"imported": self.files, "teacher": self.name, "rollouts": of_rollouts})

    def provenance(self, rollouts: str) -> dict[str, Any]:
        """Return the provenance of all scores; nothing is known of the model but its answers."""
        request = ScoreParams(
            entry_kind="topk",
            top_p=1.0,
            k_min=self.counts.least,
            k_max=self.counts.most,
            at_student=False,
        )
        weights = digest({"declared": self.name, "imported": self.files})
        return {
            "teacher": {
                **self.student.provenance(),
                "name": self.name,
                "revision": f"declared by the user, imported from {self.source.get('file', '')}",
                "weights": weights,
                "version": 0,
                "base_weights": weights,
            },
            "teacher_kind": "teacher",
            "context": "",
            "request": request.record(),
            "rollouts": rollouts,
            "backend": {
                "name": "imported",
                **{key: self.source[key] for key in ("format", "file") if key in self.source},
                "values": "exact" if self.counts.exact else "rounded by the format",
            },
            "logprob": LOGPROB,
            "at": "",
        }

    def commit(
        self,
        store: Store,
        base: Segment,
        sequences: Sequence[Imported],
        *,
        key: str,
        profile: str,
    ) -> None:
        """Commit the scores of a unit; rows whose token is not among the ids have none.

        key: unit_key of the rollouts.
        """
        rows = [each.teacher for each in sequences if each.teacher is not None]
        scores, scored = scores_of(rows, self.student.n_vocab)
        store.commit_scores(
            scores,
            base=base,
            name=self.name,
            unit_key=self.key(key),
            unit=dict(base.unit),
            provenance=self.provenance(base.name),
            profile=profile,
            rows=None if scored.all() else scored,
        )


def scores_of(found: Iterable[TeacherRows], n_vocab: int) -> tuple[Scores, Array]:
    """Return the scores of all rows with a known token, and [R] bool, which these are."""
    parts = list(found)
    lp, cnt, ids, entry_lp = (
        np.concatenate([getattr(each, name) for each in parts])
        for name in ("lp", "cnt", "ids", "entry_lp")
    )
    scored = ~np.isnan(lp)
    listed = np.repeat(scored, cnt)
    lp, cnt, ids, entry_lp = lp[scored], cnt[scored], ids[listed], entry_lp[listed]
    row = row_of_entry(cnt)
    smallest = np.full(len(cnt), np.inf, np.float32)
    np.minimum.at(smallest, row, entry_lp)
    log_tail, low, high = bounds(entry_lp, row, np.ones(len(row), bool), smallest, n_vocab)
    scores = Scores(
        lp=lp, entropy=low, entropy_hi=high, log_tail=log_tail, cnt=cnt, ids=ids, entry_lp=entry_lp
    )
    return scores, scored
