"""From an engine's answers to scores: against full laws in float64, and what is refused."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.backends.returned import (
    RESOLVED,
    ResponseAssembler,
    ReturnedTopK,
    check_answer,
)
from logitcask.engine.errors import AnswerError
from logitcask.engine.store.format import ragged
from logitcask.engine.types import Array, IdLists, Rollouts, ScoreParams, Scores
from tests.engine.training.returned_topk import answer_of

ULP = 2.0**-24
"""Half of a float32's last place, as a share of it."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """P rows of full laws, the sequences that they are of, and what is asked."""

    log_p: Array
    """[P, V'] float64 over the head; ids from n_vocab on are padding."""
    rollouts: Rollouts
    at: IdLists | None
    request: ScoreParams
    n_vocab: int

    def scores(self) -> Scores:
        assembler = ResponseAssembler(self.rollouts, self.request, self.at, n_vocab=self.n_vocab)
        for sequence in reversed(range(len(self.rollouts.seq_prompt))):
            rows = assembler.rows(sequence)
            tokens, asked = self.rollouts.tokens[rows], assembler.extra_ids(sequence)
            assembler.write(
                sequence, answer_of(self.log_p[rows], tokens, asked, self.request.k_max)
            )
        return assembler.scores()


def rollouts_of(tokens: Array, lengths: list[int]) -> Rollouts:
    rows, none = len(tokens), np.zeros(len(lengths), np.int64)
    return Rollouts(
        prompts=(),
        seq_prompt=none,
        seq_off=ragged.starts(np.asarray(lengths, np.int64)),
        tokens=tokens.astype(np.uint32),
        loss_mask=np.ones(rows, np.uint16),
        b_lp=np.zeros(rows, np.float32),
        finish=none,
        version_start=none,
        version_end=none,
    )


@st.composite
def laws(draw: st.DrawFn) -> Made:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab = draw(st.integers(2, 200))
    padding = draw(st.sampled_from([0, 0, 5]))
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    rows = sum(lengths)
    logits = rng.normal(size=(rows, vocab + padding)) * draw(st.sampled_from([0.1, 1, 5, 30]))
    if draw(st.booleans()):  # ties
        logits = np.round(logits)
    if draw(st.booleans()):
        logits[rng.random(logits.shape) < draw(st.sampled_from([0.2, 0.9]))] = -np.inf
        logits[np.arange(rows), rng.integers(0, vocab, rows)] = 0.0
    logits[:, vocab:] = -200.0  # padding is next to impossible, as in heads that were trained
    with np.errstate(divide="ignore"):
        shifted = logits - logits.max(1, initial=-np.inf, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    # The law is what float32 can say, so that the engine's own rounding is none of ours.
    log_p = log_p.astype(np.float32).astype(np.float64)
    tokens = rng.integers(0, vocab, rows)
    at = None
    if draw(st.booleans()):
        cnt = rng.integers(0, min(vocab, 20) + 1, rows)
        ids = [rng.permutation(vocab)[:n] for n in cnt]
        flat = np.concatenate([np.zeros(0, np.int64), *ids])
        at = IdLists(cnt=cnt.astype(np.uint16), ids=flat.astype(np.uint32))
    k = draw(st.integers(1, 220))
    request = ScoreParams(
        entry_kind=draw(st.sampled_from(["topp", "topk"])),
        top_p=draw(st.sampled_from([0.5, 0.9, 1.0])),
        k_min=draw(st.integers(1, k)),
        k_max=k,
        at_student=at is not None,
    )
    return Made(
        log_p=log_p,
        rollouts=rollouts_of(tokens, lengths),
        at=at,
        request=request,
        n_vocab=vocab,
    )


def lists(cnt: Array, flat: Array) -> list[list[float]]:
    return [part.tolist() for part in np.split(flat, np.cumsum(cnt.astype(np.int64))[:-1])]


def kept_of(row: Array, request: ScoreParams, n_vocab: int) -> list[int]:
    """What the row must keep, from the whole law: of the engine's k best those that are ids."""
    best = sorted(range(len(row)), key=lambda v: (-row[v], v))[: request.k_max]
    own = [v for v in best if v < n_vocab]
    if request.entry_kind == "topk" or request.top_p == 1.0:
        return own
    mass = 0.0
    for count, v in enumerate(own, 1):
        mass += math.exp(row[v])
        if mass >= request.top_p:
            return own[: max(count, request.k_min)]
    return own


def term(log_p: float) -> float:
    return 0.0 if log_p == -math.inf else -math.exp(log_p) * log_p


@settings(derandomize=True, deadline=None, max_examples=300)
@given(made=laws())
def test_scores_against_the_whole_law(made: Made) -> None:
    rows, head = made.log_p.shape
    order = np.argsort(-made.log_p, 1, kind="stable")[:, : made.request.k_max]
    least = min(made.request.k_min, made.n_vocab)
    if rows and ((order < made.n_vocab).sum(1) < least).any():
        with pytest.raises(AnswerError, match="the other places hold ids of its padded head"):
            made.scores()
        return
    found, tokens = made.scores(), made.rollouts.tokens.astype(int)
    assert found.entropy_hi is not None
    every = np.arange(rows)
    assert np.array_equal(found.lp, made.log_p[every, tokens].astype(np.float32))
    ids = lists(found.cnt, found.ids) if rows else []
    values = lists(found.cnt, found.entry_lp) if rows else []
    asked: list[list[float]] = [[] for _ in every]
    if made.at is not None and rows:
        asked = lists(made.at.cnt, made.at.ids)
        at = np.repeat(every, made.at.cnt)
        assert found.at_lp is not None
        assert np.array_equal(found.at_lp, made.log_p[at, made.at.ids].astype(np.float32))
    for r in range(rows):
        distribution = made.log_p[r]
        kept = kept_of(distribution, made.request, made.n_vocab)
        assert ids[r] == kept
        assert values[r] == distribution[kept].tolist()
        best = sorted(range(head), key=lambda v: (-distribution[v], v))[: made.request.k_max]
        known = {v for v in best if v < made.n_vocab} | {*map(int, asked[r]), int(tokens[r])}
        inside = {*kept, *map(int, asked[r])}
        unknown = [v for v in range(head) if v not in known]
        t = math.fsum(np.exp(distribution[unknown]))
        # A float32 law does not add up to 1: what that is off by is the engine's.
        off = abs(1.0 - math.fsum(np.exp(distribution))) + 1e-12
        outside = t + math.fsum(np.exp(distribution[[v for v in known if v not in inside]]))
        tail = math.exp(float(found.log_tail[r]))
        slack = off + outside * 8 * ULP * (1 + abs(math.log(outside or 1.0)))
        padded = math.fsum(np.exp(distribution[[v for v in unknown if v >= made.n_vocab]]))
        # Of padding, which is nobody's, what rounding hides is not counted.
        assert tail >= outside - slack - (padded if t < RESOLVED + off else 0.0)
        # Ids of a padded head beyond the best are not counted, and are nowhere likelier.
        left = made.n_vocab - len(known)
        if t > RESOLVED + off:
            assert tail == pytest.approx(outside, abs=slack)
        elif left == 0:
            assert tail <= outside + slack
        else:
            assert tail <= outside + RESOLVED + slack
        low, high = float(found.entropy[r]), float(found.entropy_hi[r])
        rounding = off * (3 + math.log(head / max(t, RESOLVED))) + 1e-12
        rounding += 4 * ULP * (1 + high)
        assert low <= high
        exact = math.fsum(map(term, distribution))
        if padded < 1e-30:  # its law is over the ids alone
            assert low - rounding <= exact <= high + rounding
            if left == 0:
                assert high - low <= rounding
        # Section 6's interval, of the best ids alone.
        of_best = [v for v in best if v < made.n_vocab]
        rest = max(1.0 - math.fsum(np.exp(distribution[of_best])), 0.0)
        wide = rest * math.log(max(made.n_vocab - len(of_best), 1))
        unresolved = RESOLVED * (1 + math.log(made.n_vocab / RESOLVED))
        assert high - low <= wide + unresolved + rounding


def of_row(probs: list[float], k: int, **request: int) -> Scores:
    """One row that sampled id 0."""
    with np.errstate(divide="ignore"):
        log_p = np.log(np.asarray([probs]))
    made = Made(
        log_p=log_p,
        rollouts=rollouts_of(np.zeros(1, np.int64), [1]),
        at=None,
        request=ScoreParams(entry_kind="topk", k_min=k, k_max=k, at_student=False, **request),
        n_vocab=len(probs),
    )
    return made.scores()


def test_a_row_worked_by_hand() -> None:
    found = of_row([0.5, 0.25, 0.125, 0.0625, 0.0625], 2)
    assert found.entropy_hi is not None
    known = 0.5 * math.log(2) + 0.25 * math.log(4)
    # A quarter is left for three ids: at the least on one of them, at the most on each alike.
    assert found.entropy.tolist() == pytest.approx([known + 0.25 * math.log(4)], rel=1e-6)
    assert found.entropy_hi.tolist() == pytest.approx([known + 0.25 * math.log(12)], rel=1e-6)
    assert found.log_tail.tolist() == pytest.approx([math.log(0.25)], rel=1e-6)


def test_what_is_left_out_is_no_likelier_than_what_is_told() -> None:
    # Ten ids of 0.1: eight are left, 0.8 in all, none above 0.1. One of 0.8 is no such law.
    found = of_row([0.1] * 10, 2)
    assert found.entropy.tolist() == pytest.approx([math.log(10)], rel=1e-6)
    assert found.entropy_hi is not None
    assert found.entropy_hi.tolist() == pytest.approx([math.log(10)], rel=1e-6)


def test_an_unknown_mass_below_rounding_is_bounded_by_what_the_rest_can_hold() -> None:
    # Two ids are left and hold 2e-12 at most, though 1 - mass is some 1e-8 of rounding.
    found = of_row([1 - 3e-12, 1e-12, 1e-12, 1e-12], 2)
    assert found.log_tail.tolist() == pytest.approx([math.log(2e-12)], rel=1e-6)
    # Here they might hold more than can be seen.
    found = of_row([1 - 2e-7 - 1e-5, 1e-5, 1e-7, 1e-7], 2)
    assert found.log_tail.tolist() == pytest.approx([math.log(RESOLVED)], rel=1e-6)
    # An impossible id is told: the others are, too.
    found = of_row([0.7, 0.3, 0.0, 0.0, 0.0], 3)
    assert found.log_tail.tolist() == [-math.inf]
    assert found.entropy_hi is not None
    assert found.entropy.tolist() == found.entropy_hi.tolist()


def test_a_padded_head_with_mass_of_its_own_is_refused() -> None:
    def made(padding: float) -> Made:
        with np.errstate(divide="ignore"):
            log_p = np.log(np.asarray([[0.6, 0.3, 0.1 - padding, padding]]))
        return Made(
            log_p=log_p,
            rollouts=rollouts_of(np.zeros(1, np.int64), [1]),
            at=None,
            request=ScoreParams(entry_kind="topk", k_min=4, k_max=4, at_student=False),
            n_vocab=3,
        )

    assert made(1e-7).scores().ids.tolist() == [0, 1, 2]
    with pytest.raises(AnswerError, match="ids from 3 on, which not both .* mass 0.0001 a row"):
        made(1e-4).scores()


def test_padding_among_the_best_leaves_enough_or_is_refused() -> None:
    """Else a row would hold fewer than k_min, and training would promise k_min of the best."""

    def made(k_min: int) -> Made:
        with np.errstate(divide="ignore"):
            log_p = np.log(np.asarray([[1 - 5.5e-8, 1e-8, 5e-9, 2e-8, 2e-8]]))
        return Made(
            log_p=log_p,
            rollouts=rollouts_of(np.zeros(1, np.int64), [1]),
            at=None,
            request=ScoreParams(k_min=k_min, k_max=4, at_student=False, top_p=1.0),
            n_vocab=3,
        )

    assert len(made(2).scores().ids) == 2
    with pytest.raises(AnswerError, match="2 best ids of a row .* k_min = 3") as caught:
        made(3).scores()
    assert "--teacher-topk-min" in caught.value.hint


@pytest.mark.parametrize("vocab", [40, 150_000])
def test_log_probs_of_no_law_are_refused(vocab: int) -> None:
    """Raw logits, say: all are lower by a constant."""
    logits = np.random.default_rng(0).normal(0, 3, (2, vocab))
    distribution = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    request = ScoreParams(entry_kind="topk", k_min=20, k_max=20, at_student=False)
    made = Made(
        log_p=distribution,
        rollouts=rollouts_of(np.array([3, 4]), [2]),
        at=None,
        request=request,
        n_vocab=vocab,
    )
    made.scores()
    with pytest.raises(AnswerError, match="add up to .* at most") as caught:
        replace(made, log_p=distribution - 7.0).scores()
    assert "--logprobs-mode" in caught.value.hint
    with pytest.raises(AnswerError, match="a log-prob of"):
        replace(made, log_p=distribution + 7.0).scores()


# What is refused.

TOKENS = np.asarray([1, 5])
ASKED = IdLists(cnt=np.asarray([2, 1]), ids=np.asarray([0, 6, 7], np.uint32))
PROBS = np.asarray(
    [
        [0.4, 0.3, 0.15, 0.1, 0.02, 0.015, 0.01, 0.005],
        [0.02, 0.3, 0.4, 0.1, 0.15, 0.015, 0.01, 0.005],
    ]
)
GOOD = answer_of(np.log(PROBS), TOKENS, ASKED, 4)


def check(answer: ReturnedTopK) -> None:
    check_answer(answer, TOKENS, ASKED, k=4, n_vocab=8)


def with_value(values: Array | None, at: int | tuple[int, int], value: float) -> Array:
    assert values is not None
    changed = values.copy()
    changed[at] = value
    return changed


REFUSED: dict[str, tuple[Callable[[ReturnedTopK], ReturnedTopK], str]] = {
    "fewer tokens": (lambda a: replace(a, lp=a.lp[1:]), r"\(1,\) tokens, and 2 were requested"),
    "ids without log-probs": (lambda a: replace(a, top_lp=a.top_lp[:, 1:]), "log-probs of"),
    "fewer rows of ids": (
        lambda a: replace(a, ids=a.ids[1:], top_lp=a.top_lp[1:]),
        r"shape \(1, 4\), and \[2, 4\]",
    ),
    "fewer best ids": (
        lambda a: replace(a, ids=a.ids[:, :3], top_lp=a.top_lp[:, :3]),
        r"shape \(2, 3\), and \[2, 4\]",
    ),
    "flat ids": (
        lambda a: replace(a, ids=a.ids.ravel(), top_lp=a.top_lp.ravel()),
        r"shape \(8,\), and \[2, 4\]",
    ),
    "nothing at asked ids": (lambda a: replace(a, at=None), "None log-probs at 3 chosen ids"),
    "too few at asked ids": (lambda a: replace(a, at=GOOD.lp), r"\(2,\) log-probs at 3 chosen ids"),
    "a token of NaN": (
        lambda a: replace(a, lp=with_value(a.lp, 0, np.nan)),
        "nan at the sampled token",
    ),
    "a best id of NaN": (
        lambda a: replace(a, top_lp=with_value(a.top_lp, (0, 1), np.nan)),
        "nan at a best id",
    ),
    "an asked id of NaN": (
        lambda a: replace(a, at=with_value(a.at, 2, np.nan)),
        "nan at a chosen id",
    ),
    "+inf": (lambda a: replace(a, lp=with_value(a.lp, 1, np.inf)), "inf at the sampled token"),
    "a best id of +inf": (
        lambda a: replace(a, top_lp=with_value(a.top_lp, (1, 0), np.inf)),
        "inf at a best id",
    ),
    "all of them 0.1 too high": (
        lambda a: replace(a, lp=a.lp + 0.1, top_lp=a.top_lp + 0.1, at=np.add(a.at, 0.1)),
        "with the mass 1.0",
    ),
    "a negative id": (lambda a: replace(a, ids=with_value(a.ids, (0, 2), -1)), "the id -1"),
    "an id twice": (lambda a: replace(a, ids=with_value(a.ids, (1, 3), 2)), "one id twice"),
    "another order": (
        lambda a: replace(a, ids=a.ids[:, ::-1], top_lp=a.top_lp[:, ::-1]),
        "not in the order",
    ),
    "another value of the token": (
        lambda a: replace(a, lp=with_value(a.lp, 0, math.log(0.29))),
        "two log-probs of one id, .* at the sampled token",
    ),
    "another value of an asked id": (
        lambda a: replace(a, at=with_value(a.at, 0, math.log(0.41))),
        "two log-probs of one id, .* at a chosen id",
    ),
    "an impossible best id that is possible": (
        lambda a: replace(a, top_lp=with_value(a.top_lp, (0, 1), -np.inf), ids=a.ids),
        "not in the order|two log-probs",
    ),
    "a token that is better than the last": (
        lambda a: replace(a, lp=with_value(a.lp, 1, math.log(0.2))),
        "at the sampled token above that of the last",
    ),
    "an asked id that is better than the last": (
        lambda a: replace(a, at=with_value(a.at, 1, math.log(0.2))),
        "at a chosen id above that of the last",
    ),
}


def test_the_answer_as_it_is_passes() -> None:
    check(GOOD)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_can_have_said_is_refused(name: str) -> None:
    change, words = REFUSED[name]
    with pytest.raises(AnswerError, match=words) as caught:
        check(change(GOOD))
    assert "nothing of this answer was stored" in caught.value.hint


@pytest.mark.parametrize("ours", [-math.inf, -3.0])
def test_an_impossible_id_is_impossible_in_both_places(ours: float) -> None:
    """The last best id is -inf; the token, which is the same id, is or is not."""
    answer = ReturnedTopK(
        lp=np.asarray([ours], np.float32),
        ids=np.asarray([[0, 1]]),
        top_lp=np.asarray([[0.0, -np.inf]], np.float32),
    )
    if ours == -math.inf:
        check_answer(answer, np.asarray([1]), None, k=2, n_vocab=9)
        return
    with pytest.raises(AnswerError, match="two log-probs of one id"):
        check_answer(answer, np.asarray([1]), None, k=2, n_vocab=9)


def test_a_sheet_takes_nothing_of_a_refused_answer() -> None:
    request = ScoreParams(entry_kind="topk", k_min=4, k_max=4)
    assembler = ResponseAssembler(rollouts_of(TOKENS, [2]), request, ASKED, n_vocab=8)
    assembler.write(0, GOOD)
    before = assembler.scores()
    with pytest.raises(AnswerError):
        assembler.write(0, replace(GOOD, lp=GOOD.lp + 0.1))
    after = assembler.scores()
    for name in ("lp", "entropy", "entropy_hi", "log_tail", "ids", "entry_lp", "at_lp"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name


def test_an_answer_to_no_rows_is_an_answer() -> None:
    none = ReturnedTopK(lp=np.zeros(0), ids=np.zeros((0, 4), np.int64), top_lp=np.zeros((0, 4)))
    check_answer(none, np.zeros(0, np.int64), None, k=4, n_vocab=8)
