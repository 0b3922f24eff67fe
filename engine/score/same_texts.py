"""Log-probs of texts that a teacher with another tokenizer has scored before.

A teacher reads prompt and response in its own ids, whatever tokens the student has. So a second
student's tokens of the same texts need new spans, but no new log-probs: they are taken from scores
that are stored under another name. Only the teacher's log-probs of its own tokens are; its best ids
lie at rows that depend on the student's tokens.
"""

from collections.abc import Callable

import numpy as np

from logitcask.engine.alignment.aligned_rollouts import text_digests
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.score.sequences import cut
from logitcask.engine.store import Segment, Snapshot, Store
from logitcask.engine.store.decoded_unit import has_spans
from logitcask.engine.types import Array, ModelRef, Rollouts, Scores

Score = Callable[[Rollouts], tuple[Scores, float]]
"""Scores a teacher's rollouts; returns the scores and their seconds."""


class SameTexts:
    """Texts with scores over spans of one name, found by the digest of the teacher's input."""

    def __init__(
        self, store: Store, snapshot: Snapshot, name: str, model: ModelRef, dtype: str
    ) -> None:
        """Read which texts the scores of a name are of.

        model, dtype: of the teacher that scores now. Raises ConfigError where the name holds no
        scores over spans, IdentityError for those of another model or dtype.
        """
        self._store = store
        self._places: dict[int, tuple[Segment, int]] = {}
        self._read: tuple[str, dict[str, Array]] = ("", {})
        found = snapshot.scores(name)
        if not found or not all(map(has_spans, found.values())):
            raise ConfigError(
                f"same_texts = {name}: the store has no scores over spans of this name",
                hint=f"it has scores: {', '.join(snapshot.names('score')) or 'none'}",
            )
        for (segment,) in found.values():
            theirs = segment.provenance["teacher"]["weights"], segment.provenance["backend"]
            if (theirs[0], theirs[1].get("dtype")) != (model.digest, dtype):
                raise IdentityError(
                    f"same_texts = {name}: these scores are of {theirs[0]} in "
                    f"{theirs[1].get('dtype')}, and this teacher is {model.digest} in {dtype}",
                    hint="take scores of the same teacher, with the same --dtype",
                )
            texts = self._arrays(segment)["text_digests"].tolist()
            self._places |= {text: (segment, i) for i, text in enumerate(texts)}

    def score(self, rollouts: Rollouts, score: Score) -> tuple[Scores, float]:
        """Return log-probs of a teacher's rollouts: the known ones, and of the others by `score`.

        Entropies are 0, tails are empty and no ids are kept.
        """
        lp = np.zeros(rollouts.positions, np.float32)
        new: list[int] = []
        for i, text in enumerate(text_digests(rollouts).tolist()):
            rows = slice(int(rollouts.seq_off[i]), int(rollouts.seq_off[i + 1]))
            known = self._known(text, rollouts.tokens[rows])
            if known is None:
                new.append(i)
            else:
                lp[rows] = known
        took_s = 0.0
        if new:
            part, rows_of_part = cut(rollouts, new)
            scores, took_s = score(part)
            lp[rows_of_part] = scores.lp
        nothing, none = np.zeros(len(lp), np.float32), np.zeros(0, np.float32)
        return Scores(
            lp=lp,
            entropy=nothing,
            log_tail=nothing,
            cnt=np.zeros(len(lp), np.uint16),
            ids=np.zeros(0, np.uint32),
            entry_lp=none,
        ), took_s

    def _known(self, text: int, tokens: Array) -> Array | None:
        """Return the log-probs of a response, None where its text has no scores."""
        place = self._places.get(text)
        if place is None:
            return None
        arrays = self._arrays(place[0])
        start, end = arrays["teacher_offsets"][place[1] : place[1] + 2]
        same = np.array_equal(arrays["teacher_tokens"][start:end], tokens)
        return arrays["teacher_logprobs"][start:end] if same else None

    def _arrays(self, segment: Segment) -> dict[str, Array]:
        """Read a segment; the last one is kept, for responses come in the order of the texts."""
        if self._read[0] != segment.seg_id:
            self._read = (segment.seg_id, self._store.read_arrays(segment))
        return self._read[1]
