"""Scores from returned top-k log-probs: engines such as vLLM never return all logits.

Such an engine returns, for each row of a sequence, its best ids, the sampled token and chosen ids.
An answer that no model can have computed is rejected here, before it reaches a store. The mass of
the other ids is unknown, so it is bounded:

  t        = 1 - sum of the masses of all known ids of the row, in float64. If that is less than
             RESOLVED it is rounding, and t is from 0 to the lesser of RESOLVED and (V - n) m
  log_tail = log of the largest t, plus the known ids that are not kept
  entropy  in [H + t max(-log t, -log m), H - t log t + t log(V - n)], H = - sum p log p over the n
             known ids, m the smallest of the best ids: no other id is likelier
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from logitcask.engine.errors import AnswerError
from logitcask.engine.store.format import ragged
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores

RESOLVED = 1e-6
"""Mass: resolution of 1 - sum of the masses of float32 log-probs."""
PADDING = 1e-6
"""Mass of a row at ids of a padded head; above it the log-probs are not of this vocabulary."""
ROUNDING = 1e-3
"""Rounding of the engine: of a mass, and nats of a log-prob above 0."""
AGREE = 1e-3
"""Nats, plus as much of the value: tolerance between two log-probs of one id in one answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReturnedTopK:
    """Log-probs that an engine returned for the R response rows of one sequence."""

    lp: Array
    """[R] float32, log-prob of the sampled token."""
    ids: Array
    """[R, K] integers, best ids, best first."""
    top_lp: Array
    """[R, K] float32, their log-probs."""
    at: Array | None = None
    """[A] float32, flat, at `ResponseAssembler.extra_ids`; None without extra ids."""
    rank: Array | None = None
    """[R] integers, rank of the sampled token from 1; 0, or None for all = unknown."""


class ResponseAssembler:
    """The scores of P rows, written sequence by sequence in any order."""

    def __init__(
        self, rollouts: Rollouts, request: ScoreParams, extra_ids: IdLists | None, *, n_vocab: int
    ) -> None:
        assert request.entry_kind != "sampled", "drawing needs all logits"
        rows = rollouts.positions
        self.request, self.n_vocab = request, n_vocab
        self.tokens = rollouts.tokens.astype(np.int64)
        self.seq_off = rollouts.seq_off
        self.lp, self.entropy, self.entropy_hi = (np.empty(rows, np.float32) for _ in range(3))
        self.log_tail = np.empty(rows, np.float32)
        self.cnt = np.zeros(rows, np.uint16)
        self.ids = np.zeros((rows, request.k_max), np.uint32)
        self.entry_lp = np.zeros((rows, request.k_max), np.float32)
        self.extra: IdLists | None = None
        if extra_ids is not None:
            self.extra = IdLists(
                cnt=extra_ids.cnt.astype(np.int64), ids=extra_ids.ids.astype(np.uint32)
            )
            self.extra_off = ragged.starts(extra_ids.cnt)
            self.extra_lp = np.empty(len(extra_ids.ids), np.float32)

    def rows(self, sequence: int) -> slice:
        """Return the rows of a sequence."""
        return slice(int(self.seq_off[sequence]), int(self.seq_off[sequence + 1]))

    @property
    def rows_written(self) -> int:
        """Return the number of rows that have scores."""
        return int(np.count_nonzero(self.cnt))

    def extra_ids(self, sequence: int) -> IdLists | None:
        """Return the chosen ids of a sequence's rows."""
        return self._extra_ids(self.rows(sequence))

    def _extra_ids(self, rows: slice) -> IdLists | None:
        if self.extra is None:
            return None
        return IdLists(cnt=self.extra.cnt[rows], ids=self.extra.ids[self._flat(rows)])

    def _flat(self, rows: slice) -> slice:
        return slice(int(self.extra_off[rows.start]), int(self.extra_off[rows.stop]))

    def write(self, sequence: int, answer: ReturnedTopK, part: slice | None = None) -> None:
        """Check and write the answer of one sequence; AnswerError writes nothing.

        part: its rows that are answered; None = all.
        """
        rows = self.rows(sequence)
        if part is not None:
            rows = slice(rows.start + part.start, rows.start + part.stop)
        extra = self._extra_ids(rows)
        tokens = self.tokens[rows]
        check_answer(answer, tokens, extra, k=self.request.k_max, n_vocab=self.n_vocab)
        # Ids of a padded head, or outside the student's vocabulary, must have next to no mass.
        lp, own = np.minimum(answer.lp, 0.0), answer.ids < self.n_vocab
        ids, top_lp = sort_best_first(answer.ids, np.minimum(answer.top_lp, 0.0), own)
        self._check_padding(answer, own)
        width = min(ids.shape[1], self.request.k_max)
        valid = np.arange(ids.shape[1]) < own.sum(1)[:, None]
        mass = np.where(valid, np.exp(top_lp, dtype=np.float64), 0.0)
        cnt = valid[:, :width].sum(1)
        if self.request.entry_kind == "topp" and self.request.top_p < 1.0:
            top_p_cnt = (np.cumsum(mass, 1) < self.request.top_p).sum(1) + 1
            cnt = np.minimum(cnt, np.maximum(top_p_cnt, self.request.k_min))
        kept = np.arange(ids.shape[1]) < cnt[:, None]

        known = [(top_lp[valid], np.nonzero(valid)[0], kept[valid])]
        top = IdLists(cnt=valid.sum(1), ids=ids[valid].astype(np.uint32))
        if extra is not None and answer.at is not None:
            extra_lp = np.minimum(answer.at, 0.0)
            new = ragged.find(top.ids, top.cnt, extra.ids, extra.cnt) < 0
            extra_row = ragged.row_of_entry(extra.cnt)
            known.append((extra_lp[new], extra_row[new], np.ones(int(new.sum()), bool)))
            # A chosen id never counts for the tail, kept or not.
            chosen = ragged.find(extra.ids, extra.cnt, top.ids, top.cnt) >= 0
            known[0] = (known[0][0], known[0][1], known[0][2] | chosen)
        alone = in_no_list(tokens, top, extra)
        known.append((lp[alone], np.nonzero(alone)[0], np.zeros(int(alone.sum()), bool)))
        entry_lp, row, inside = (np.concatenate(each) for each in zip(*known, strict=True))

        smallest = np.where(valid, top_lp, np.inf).min(1, initial=0.0)
        check_mass(entry_lp, row, smallest, self.n_vocab)
        log_tail, low, high = bounds(entry_lp, row, inside, smallest, self.n_vocab)
        self.lp[rows], self.cnt[rows], self.log_tail[rows] = lp, cnt, log_tail
        self.entropy[rows], self.entropy_hi[rows] = low, high
        self.ids[rows, :width], self.entry_lp[rows, :width] = ids[:, :width], top_lp[:, :width]
        if answer.at is not None:
            self.extra_lp[self._flat(rows)] = np.minimum(answer.at, 0.0)

    def _check_padding(self, answer: ReturnedTopK, own: Array) -> None:
        """Reject mass outside n_vocab, and rows with fewer than k_min ids inside."""
        rows = len(own)
        beyond = float(np.exp(answer.top_lp, dtype=np.float64)[~own].sum()) if rows else 0.0
        if beyond > PADDING * max(rows, 1):
            reject_answer(
                f"ids from {self.n_vocab} on, which not both tokenizers have, with the mass "
                f"{beyond / rows:.2g} a row, so its log-probs are not of the {self.n_vocab} ids",
                hint="take a teacher with the student's tokenizer and a trained head, or load it "
                "here (--model FOLDER), where its distribution can be restricted to these ids",
            )
        least = min(self.request.k_min, self.n_vocab)
        if rows and int(own.sum(1).min()) < least:
            reject_answer(
                f"{int(own.sum(1).min())} best ids of a row that both tokenizers have, and "
                f"k_min = {least}: the other places hold ids of its padded head",
                hint="give a smaller --teacher-topk-min than "
                "--teacher-topk-max (with --selection top-p), so that "
                "enough are left",
            )

    def scores(self) -> Scores:
        """Return the scores of all rows."""
        kept = np.arange(self.ids.shape[1]) < self.cnt[:, None]
        return Scores(
            lp=self.lp,
            entropy=self.entropy,
            entropy_hi=self.entropy_hi,
            log_tail=self.log_tail,
            cnt=self.cnt,
            ids=self.ids[kept],
            entry_lp=self.entry_lp[kept],
            at_lp=None if self.extra is None else self.extra_lp,
        )


def bounds(
    entry_lp: Array, row: Array, inside: Array, smallest: Array, n_vocab: int
) -> tuple[Array, Array, Array]:
    """Return (log_tail, lower, upper bound of the entropy), [R] each; see the module's docstring.

    entry_lp, row, inside: [n] log-probs of distinct known ids, their rows, and False for ids that
    belong to the tail; smallest: [R] smallest log-prob of the best ids.
    """
    count = len(smallest)
    value = entry_lp.astype(np.float64)
    mass = np.exp(value)
    unknown = np.maximum(1.0 - np.bincount(row, weights=mass, minlength=count), 0.0)
    number = np.bincount(row, minlength=count)
    finite = np.where(np.isfinite(value), value, 0.0)
    entropy = -np.bincount(row, weights=mass * finite, minlength=count)
    left = np.maximum(n_vocab - number, 0)
    unresolved = np.minimum(left * np.exp(smallest, dtype=np.float64), RESOLVED)
    most = np.where(unknown < RESOLVED, unresolved, unknown)
    least = np.where(unknown < RESOLVED, 0.0, unknown)
    outside = np.bincount(row, weights=mass * ~inside, minlength=count)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_tail = np.log(most + outside)
        last = np.where(np.isfinite(smallest), smallest, 0.0).astype(np.float64)
        flattest = np.maximum(-np.log(least), -last)
        low = entropy + np.where(least > 0, least * flattest, 0.0)
        high = entropy + np.where(
            most > 0, most * (np.log(np.maximum(left, 1)) - np.log(most)), 0.0
        )
    low = np.minimum(low, high)
    return log_tail.astype(np.float32), low.astype(np.float32), high.astype(np.float32)


def check_mass(entry_lp: Array, row: Array, smallest: Array, n_vocab: int) -> None:
    """Reject rows with a total mass below one, even if each unknown id had the smallest log-prob
    of the best ids; arguments as of `bounds`.
    """
    known = np.bincount(row, np.exp(entry_lp, dtype=np.float64), minlength=len(smallest))
    others = np.maximum(n_vocab - np.bincount(row, minlength=len(smallest)), 0)
    most = known + others * np.exp(smallest, dtype=np.float64)
    if len(most) and most.min() < 1 - ROUNDING:
        reject_answer(
            f"log-probs of a row that add up to {most.min():.3g} at most",
            hint="serve with --logprobs-mode raw_logprobs, the default of vLLM: these are not "
            "log-probs of a distribution",
        )


def in_no_list(tokens: Array, *lists: IdLists | None) -> Array:
    """Return [R] bool: True for rows with a sampled token that is in none of the lists."""
    alone = np.ones(len(tokens), bool)
    for each in lists:
        if each is not None:
            one = np.ones(len(tokens), np.int64)
            alone &= ragged.find(each.ids, each.cnt, tokens.astype(np.uint32), one) < 0
    return alone


def sort_best_first(ids: Array, lp: Array, own: Array) -> tuple[Array, Array]:
    """Sort [R, K] ids and log-probs: `own` first, likelier first, then the lower id."""
    order = np.lexsort((ids, -lp, ~own), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(lp, order, 1)


def check_answer(
    answer: ReturnedTopK, tokens: Array, extra_ids: IdLists | None, *, k: int, n_vocab: int
) -> None:
    """Raise AnswerError for an answer that no model can give for rows with these tokens."""
    rows, width = len(tokens), min(k, n_vocab)
    if answer.lp.shape != (rows,) or answer.ids.shape != answer.top_lp.shape:
        reject_answer(f"log-probs of {answer.lp.shape} tokens, and {rows} were requested")
    if answer.ids.ndim != 2 or answer.ids.shape[0] != rows or answer.ids.shape[1] < width:
        reject_answer(f"best ids of shape {answer.ids.shape}, and [{rows}, {width}] was requested")
    if (answer.at is None) != (extra_ids is None) or (
        answer.at is not None and extra_ids is not None and answer.at.shape != extra_ids.ids.shape
    ):
        shape = None if answer.at is None else answer.at.shape
        count = 0 if extra_ids is None else len(extra_ids.ids)
        reject_answer(f"{shape} log-probs at {count} chosen ids")
    named = [("the sampled token", answer.lp), ("a best id", answer.top_lp)]
    if answer.at is not None:
        named.append(("a chosen id", answer.at))
    for name, values in named:
        # NaN fails every comparison.
        if not (values <= ROUNDING).all():
            reject_answer(f"a log-prob of {values[~(values <= ROUNDING)][0]} at {name}")
    if rows == 0 or answer.ids.shape[1] == 0:
        return
    if int(answer.ids.min()) < 0:
        reject_answer(f"the id {int(answer.ids.min())}")
    if (np.diff(np.sort(answer.ids, 1), axis=1) == 0).any():
        reject_answer("one id twice among the best of a row")
    with np.errstate(invalid="ignore"):  # from -inf to -inf
        if (np.diff(answer.top_lp, axis=1) > ROUNDING).any():
            reject_answer("best ids that are not in the order of their log-probs")
    mass = np.exp(answer.top_lp, dtype=np.float64).sum(1)
    if not (mass <= 1 + ROUNDING).all():
        reject_answer(f"best ids of a row with the mass {float(mass.max()):.6f}")
    _check_duplicates(answer, tokens, extra_ids)


def _check_duplicates(answer: ReturnedTopK, tokens: Array, extra_ids: IdLists | None) -> None:
    """Reject two log-probs of one id, and an id outside the best ids that is likelier than them."""
    pairs = [("the sampled token", tokens, np.arange(len(tokens)), answer.lp)]
    if extra_ids is not None and answer.at is not None:
        rows = ragged.row_of_entry(extra_ids.cnt)
        pairs.append(("a chosen id", extra_ids.ids.astype(np.int64), rows, answer.at))
    for name, ids, rows, lp in pairs:
        for block in range(0, len(ids), 1 << 14):
            part = slice(block, block + (1 << 14))
            equal = answer.ids[rows[part]] == ids[part][:, None]
            listed = equal.any(1)
            listed_lp = answer.top_lp[rows[part], equal.argmax(1)]
            last = answer.top_lp[rows[part], -1]
            ours = lp[part]
            with np.errstate(invalid="ignore"):
                # The difference of two -inf is NaN, which does not count as off.
                size = np.where(np.isfinite(listed_lp), np.abs(listed_lp), 0.0)
                off = np.abs(ours - listed_lp) > AGREE + AGREE * size
            if (listed & off).any():
                i = int(np.flatnonzero(listed & off)[0])
                reject_answer(
                    f"two log-probs of one id, {listed_lp[i]} among the best and {ours[i]} "
                    f"at {name}"
                )
            if (~listed & (ours > last + AGREE)).any():
                reject_answer(f"a log-prob at {name} above that of the last of the best ids")


def reject_answer(what: str, hint: str = "") -> NoReturn:
    """Raise AnswerError for an answer with `what` in it."""
    raise AnswerError(
        f"the engine answered {what}",
        hint=hint
        or "check the engine's version and flags (`logitcask doctor teacher`), and run the same "
        "command again; nothing of this answer was stored",
    )
