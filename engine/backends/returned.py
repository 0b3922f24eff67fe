"""Engines that tell log-probs of some ids and never all logits: from their answers to scores.

An engine such as vLLM answers for one sequence at a time: its best ids on every row, the sampled
token, and ids that it was asked at. What no model can have computed is refused here, before it can
reach a store. What such an engine does not say, the rest of the vocabulary, is bounded:

  t        = 1 - sum of the masses of all known ids of the row, in float64. Where that is less than
             RESOLVED it is rounding, and t is from 0 to the lesser of RESOLVED and (V - n) m
  log_tail = log of the largest t, plus the known ids that are not kept
  entropy  in [H + t max(-log t, -log m), H - t log t + t log(V - n)], H = - sum p log p over the n
             known ids, m the smallest of the best ids: what is not among them is not likelier
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from logitcask.engine.errors import AnswerError
from logitcask.engine.store.format import ragged
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores

RESOLVED = 1e-6
"""Mass: what float32 log-probs leave open in 1 - sum of their masses."""
PADDING = 1e-6
"""Mass of a row: more at ids of a padded head, and log-probs are of another law than they say."""
ROUNDING = 1e-3
"""Of a mass, and nats of a log-prob above 0: what an engine's own arithmetic may be off by."""
AGREE = 1e-3
"""Nats, beside as much of the value: how far apart two log-probs of one id in one answer may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an engine says of one sequence's R response rows."""

    lp: Array
    """[R] float32, log-prob of the sampled token."""
    ids: Array
    """[R, K] integers, its best ids, best first."""
    top_lp: Array
    """[R, K] float32, their log-probs."""
    at: Array | None = None
    """[A] float32, flat, at the ids of `ResponseAssembler.asked`; None where there are none."""


class ResponseAssembler:
    """The scores of P rows, filled one sequence after another, in any order."""

    def __init__(
        self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None, *, n_vocab: int
    ) -> None:
        assert request.entry_kind != "sampled", "who draws needs all logits"
        rows = rollouts.positions
        self.request, self.n_vocab = request, n_vocab
        self.tokens = rollouts.tokens.astype(np.int64)
        self.seq_off = rollouts.seq_off
        self.lp, self.entropy, self.entropy_hi = (np.empty(rows, np.float32) for _ in range(3))
        self.log_tail = np.empty(rows, np.float32)
        self.cnt = np.zeros(rows, np.uint16)
        self.ids = np.zeros((rows, request.k_max), np.uint32)
        self.entry_lp = np.zeros((rows, request.k_max), np.float32)
        self.at_cnt = None if at is None else at.cnt.astype(np.int64)
        self.at_off = None if at is None else ragged.starts(at.cnt)
        self.at_ids = None if at is None else at.ids.astype(np.uint32)
        self.at = None if at is None else np.empty(len(at.ids), np.float32)

    def rows(self, sequence: int) -> slice:
        return slice(int(self.seq_off[sequence]), int(self.seq_off[sequence + 1]))

    def asked(self, sequence: int) -> IdLists | None:
        """The ids that this sequence's rows are asked at."""
        if self.at_cnt is None or self.at_off is None or self.at_ids is None:
            return None
        rows = self.rows(sequence)
        flat = slice(int(self.at_off[rows.start]), int(self.at_off[rows.stop]))
        return IdLists(cnt=self.at_cnt[rows], ids=self.at_ids[flat])

    def write(self, sequence: int, answer: Answer) -> None:
        """Raises AnswerError, saying what is wrong, and writes nothing then."""
        rows, asked = self.rows(sequence), self.asked(sequence)
        tokens = self.tokens[rows]
        check_answer(answer, tokens, asked, k=self.request.k_max, n_vocab=self.n_vocab)
        # Ids of a padded head, or that the student does not know, are next to impossible to a model
        # that does not use them.
        lp, own = np.minimum(answer.lp, 0.0), answer.ids < self.n_vocab
        ids, top_lp = best_first(answer.ids, np.minimum(answer.top_lp, 0.0), own)
        beyond = float(np.exp(answer.top_lp, dtype=np.float64)[~own].sum()) if len(own) else 0.0
        if beyond > PADDING * max(len(own), 1):
            wrong(
                f"ids from {self.n_vocab} on, which not both tokenizers have, with the mass "
                f"{beyond / len(own):.2g} a row, so its log-probs are not of the {self.n_vocab}",
                hint="Take a teacher with the student's tokenizer and a trained head, or load it "
                "here (--model FOLDER), where its law can be cut to these ids.",
            )
        least = min(self.request.k_min, self.n_vocab)
        if len(own) and int(own.sum(1).min()) < least:
            wrong(
                f"{int(own.sum(1).min())} best ids of a row that both tokenizers have, and "
                f"k_min = {least}: ids of its padded head take the other places",
                hint="Ask for a smaller --teacher-topk-min than --teacher-topk-max (with "
                "--selection top-p), so that "
                "enough are left.",
            )
        width = min(ids.shape[1], self.request.k_max)
        valid = np.arange(ids.shape[1]) < own.sum(1)[:, None]
        mass = np.where(valid, np.exp(top_lp, dtype=np.float64), 0.0)
        cnt = valid[:, :width].sum(1)
        if self.request.entry_kind == "topp" and self.request.top_p < 1.0:
            wanted = (np.cumsum(mass, 1) < self.request.top_p).sum(1) + 1
            cnt = np.minimum(cnt, np.maximum(wanted, self.request.k_min))
        kept = np.arange(ids.shape[1]) < cnt[:, None]

        known = [(top_lp[valid], np.nonzero(valid)[0], kept[valid])]
        top = IdLists(cnt=valid.sum(1), ids=ids[valid].astype(np.uint32))
        if asked is not None and answer.at is not None:
            at_lp = np.minimum(answer.at, 0.0)
            new = ragged.find(top.ids, top.cnt, asked.ids, asked.cnt) < 0
            at_row = ragged.rows(asked.cnt)
            known.append((at_lp[new], at_row[new], np.ones(int(new.sum()), bool)))
            # An id that was asked at is inside, whether the row keeps it or not.
            again = ragged.find(asked.ids, asked.cnt, top.ids, top.cnt) >= 0
            known[0] = (known[0][0], known[0][1], known[0][2] | again)
        alone = in_no_list(tokens, top, asked)
        known.append((lp[alone], np.nonzero(alone)[0], np.zeros(int(alone.sum()), bool)))
        entry_lp, row, inside = (np.concatenate(each) for each in zip(*known, strict=True))

        smallest = np.where(valid, top_lp, np.inf).min(1, initial=0.0)
        check_law(entry_lp, row, smallest, self.n_vocab)
        log_tail, low, high = bounds(entry_lp, row, inside, smallest, self.n_vocab)
        self.lp[rows], self.cnt[rows], self.log_tail[rows] = lp, cnt, log_tail
        self.entropy[rows], self.entropy_hi[rows] = low, high
        self.ids[rows, :width], self.entry_lp[rows, :width] = ids[:, :width], top_lp[:, :width]
        if self.at is not None and self.at_off is not None and answer.at is not None:
            flat = slice(int(self.at_off[rows.start]), int(self.at_off[rows.stop]))
            self.at[flat] = np.minimum(answer.at, 0.0)

    def scores(self) -> Scores:
        kept = np.arange(self.ids.shape[1]) < self.cnt[:, None]
        return Scores(
            lp=self.lp,
            entropy=self.entropy,
            entropy_hi=self.entropy_hi,
            log_tail=self.log_tail,
            cnt=self.cnt,
            ids=self.ids[kept],
            entry_lp=self.entry_lp[kept],
            at_lp=self.at,
        )


def bounds(
    entry_lp: Array, row: Array, inside: Array, smallest: Array, n_vocab: int
) -> tuple[Array, Array, Array]:
    """(log_tail, least entropy, most entropy), [R] each, as the file's head says.

    entry_lp, row, inside: [n] log-probs of distinct known ids, whose row, and whether they belong
    to what the tail is outside of; smallest: [R] the least log-prob of the best ids.
    """
    count = len(smallest)
    value = entry_lp.astype(np.float64)
    mass = np.exp(value)
    unknown = np.maximum(1.0 - np.bincount(row, weights=mass, minlength=count), 0.0)
    number = np.bincount(row, minlength=count)
    finite = np.where(np.isfinite(value), value, 0.0)
    entropy = -np.bincount(row, weights=mass * finite, minlength=count)
    left = np.maximum(n_vocab - number, 0)
    open_ = np.minimum(left * np.exp(smallest, dtype=np.float64), RESOLVED)
    most = np.where(unknown < RESOLVED, open_, unknown)
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


def check_law(entry_lp: Array, row: Array, smallest: Array, n_vocab: int) -> None:
    """Raises AnswerError where the ids that are not told could not hold what is left of a mass of
    one, for none is likelier than the last of the best; arguments as of `bounds`.
    """
    known = np.bincount(row, np.exp(entry_lp, dtype=np.float64), minlength=len(smallest))
    others = np.maximum(n_vocab - np.bincount(row, minlength=len(smallest)), 0)
    most = known + others * np.exp(smallest, dtype=np.float64)
    if len(most) and most.min() < 1 - ROUNDING:
        wrong(
            f"log-probs of a row that add up to {most.min():.3g} at most",
            hint="They are of no law: serve with --logprobs-mode raw_logprobs, vLLM's default.",
        )


def in_no_list(tokens: Array, *lists: IdLists | None) -> Array:
    """[R] bool: rows whose sampled token stands in none of the lists."""
    alone = np.ones(len(tokens), bool)
    for each in lists:
        if each is not None:
            one = np.ones(len(tokens), np.int64)
            alone &= ragged.find(each.ids, each.cnt, tokens.astype(np.uint32), one) < 0
    return alone


def best_first(ids: Array, lp: Array, own: Array) -> tuple[Array, Array]:
    """[R, K] each: ids of `own` before others, the likelier first, the lower id among equals."""
    order = np.lexsort((ids, -lp, ~own), axis=1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(lp, order, 1)


def check_answer(
    answer: Answer, tokens: Array, asked: IdLists | None, *, k: int, n_vocab: int
) -> None:
    """Raises AnswerError unless a model can have said this of rows that sampled `tokens`."""
    rows, width = len(tokens), min(k, n_vocab)
    if answer.lp.shape != (rows,) or answer.ids.shape != answer.top_lp.shape:
        wrong(f"log-probs of {answer.lp.shape} tokens, and {rows} were asked for")
    if answer.ids.ndim != 2 or answer.ids.shape[0] != rows or answer.ids.shape[1] < width:
        wrong(f"best ids of shape {answer.ids.shape}, and [{rows}, {width}] were asked for")
    if (answer.at is None) != (asked is None) or (
        answer.at is not None and asked is not None and answer.at.shape != asked.ids.shape
    ):
        said = None if answer.at is None else answer.at.shape
        wrong(f"{said} log-probs at {0 if asked is None else len(asked.ids)} ids that were asked")
    for name, values in (("the sampled token", answer.lp), ("a best id", answer.top_lp)):
        # NaN fails every comparison.
        if not (values <= ROUNDING).all():
            wrong(f"a log-prob of {values[~(values <= ROUNDING)][0]} at {name}")
    if answer.at is not None and not (answer.at <= ROUNDING).all():
        wrong(f"a log-prob of {answer.at[~(answer.at <= ROUNDING)][0]} at an id that was asked")
    if rows == 0:
        return
    if int(answer.ids.min()) < 0:
        wrong(f"the id {int(answer.ids.min())}")
    if (np.diff(np.sort(answer.ids, 1), axis=1) == 0).any():
        wrong("one id twice among the best of a row")
    with np.errstate(invalid="ignore"):  # from -inf to -inf
        if (np.diff(answer.top_lp, axis=1) > ROUNDING).any():
            wrong("best ids that are not in the order of their log-probs")
    mass = np.exp(answer.top_lp, dtype=np.float64).sum(1)
    if not (mass <= 1 + ROUNDING).all():
        wrong(f"best ids of a row with the mass {float(mass.max()):.6f}")
    _check_twins(answer, tokens, asked)


def _check_twins(answer: Answer, tokens: Array, asked: IdLists | None) -> None:
    """An id that an answer names twice has one log-prob, and one that it leaves out is no better
    than those that it names."""
    pairs = [("the sampled token", tokens, np.arange(len(tokens)), answer.lp)]
    if asked is not None and answer.at is not None:
        rows = ragged.rows(asked.cnt)
        pairs.append(("an id that was asked", asked.ids.astype(np.int64), rows, answer.at))
    for name, ids, rows, lp in pairs:
        for block in range(0, len(ids), 1 << 14):
            part = slice(block, block + (1 << 14))
            top = answer.ids[rows[part]]
            there = top == ids[part][:, None]
            listed = there.any(1)
            twin = answer.top_lp[rows[part], there.argmax(1)]
            last = answer.top_lp[rows[part], -1]
            ours = lp[part]
            with np.errstate(invalid="ignore"):
                # Two -inf are NaN apart, which is not off; one is, whatever the other is.
                size = np.where(np.isfinite(twin), np.abs(twin), 0.0)
                off = np.abs(ours - twin) > AGREE + AGREE * size
            if (listed & off).any():
                i = int(np.flatnonzero(listed & off)[0])
                wrong(f"two log-probs of one id, {twin[i]} among the best and {ours[i]} at {name}")
            if (~listed & (ours > last + AGREE)).any():
                wrong(f"a log-prob at {name} above that of the last of the best ids")


def wrong(what: str, hint: str = "") -> NoReturn:
    """Refuses an answer."""
    raise AnswerError(
        f"the engine answered {what}",
        hint=hint
        or "Nothing of it was stored. Check the engine's version and flags "
        "(`logitcask doctor teacher`), and run the same command again.",
    )
