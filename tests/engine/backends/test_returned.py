"""Scores from returned log-probs: against full distributions in float64, and rejected replies."""

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
from tests.engine.training.returned_topk import returned_topk

ULP = 2.0**-24
"""Relative rounding error of float32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Full distributions of P rows, their rollouts, and a request."""

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
            tokens, extra_ids = self.rollouts.tokens[rows], assembler.extra_ids(sequence)
            assembler.write(
                sequence, returned_topk(self.log_p[rows], tokens, extra_ids, self.request.k_max)
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
def cases(draw: st.DrawFn) -> Case:
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
    logits[:, vocab:] = -200.0  # padding is improbable, as in trained heads
    with np.errstate(divide="ignore"):
        shifted = logits - logits.max(1, initial=-np.inf, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    # Round the distribution to float32 first, so that rounding by the engine is no error here.
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
    return Case(
        log_p=log_p,
        rollouts=rollouts_of(tokens, lengths),
        at=at,
        request=request,
        n_vocab=vocab,
    )


def lists(cnt: Array, flat: Array) -> list[list[float]]:
    return [part.tolist() for part in np.split(flat, np.cumsum(cnt.astype(np.int64))[:-1])]


def expected_ids(row: Array, request: ScoreParams, n_vocab: int) -> list[int]:
    """Return the ids that a row must keep: those of its top k that are no padding, cut at top_p."""
    best = sorted(range(len(row)), key=lambda v: (-row[v], v))[: request.k_max]
    real_ids = [v for v in best if v < n_vocab]
    if request.entry_kind == "topk" or request.top_p == 1.0:
        return real_ids
    mass = 0.0
    for count, v in enumerate(real_ids, 1):
        mass += math.exp(row[v])
        if mass >= request.top_p:
            return real_ids[: max(count, request.k_min)]
    return real_ids


def term(log_p: float) -> float:
    return 0.0 if log_p == -math.inf else -math.exp(log_p) * log_p


@settings(derandomize=True, deadline=None, max_examples=300)
@given(case=cases())
def test_scores_against_the_full_distribution(case: Case) -> None:
    rows, head = case.log_p.shape
    order = np.argsort(-case.log_p, 1, kind="stable")[:, : case.request.k_max]
    needed = min(case.request.k_min, case.n_vocab)
    if rows and ((order < case.n_vocab).sum(1) < needed).any():
        with pytest.raises(AnswerError, match="the other places hold ids of its padded head"):
            case.scores()
        return
    found, tokens = case.scores(), case.rollouts.tokens.astype(int)
    assert found.entropy_hi is not None
    all_rows = np.arange(rows)
    assert np.array_equal(found.lp, case.log_p[all_rows, tokens].astype(np.float32))
    ids = lists(found.cnt, found.ids) if rows else []
    values = lists(found.cnt, found.entry_lp) if rows else []
    extra_ids: list[list[float]] = [[] for _ in all_rows]
    if case.at is not None and rows:
        extra_ids = lists(case.at.cnt, case.at.ids)
        at = np.repeat(all_rows, case.at.cnt)
        assert found.at_lp is not None
        assert np.array_equal(found.at_lp, case.log_p[at, case.at.ids].astype(np.float32))
    for r in range(rows):
        distribution = case.log_p[r]
        kept = expected_ids(distribution, case.request, case.n_vocab)
        assert ids[r] == kept
        assert values[r] == distribution[kept].tolist()
        best = sorted(range(head), key=lambda v: (-distribution[v], v))[: case.request.k_max]
        returned = {v for v in best if v < case.n_vocab} | {*map(int, extra_ids[r]), int(tokens[r])}
        inside = {*kept, *map(int, extra_ids[r])}
        not_returned = [v for v in range(head) if v not in returned]
        t = math.fsum(np.exp(distribution[not_returned]))
        # A float32 distribution does not sum to 1; `off` is that difference.
        off = abs(1.0 - math.fsum(np.exp(distribution))) + 1e-12
        outside_mass = t + math.fsum(np.exp(distribution[[v for v in returned if v not in inside]]))
        tail = math.exp(float(found.log_tail[r]))
        slack = off + outside_mass * 8 * ULP * (1 + abs(math.log(outside_mass or 1.0)))
        padded = math.fsum(np.exp(distribution[[v for v in not_returned if v >= case.n_vocab]]))
        # Mass of padding below the rounding is not counted.
        assert tail >= outside_mass - slack - (padded if t < RESOLVED + off else 0.0)
        # Padding ids outside the top k are not counted; they are less likely than the top k.
        n_not_returned = case.n_vocab - len(returned)
        if t > RESOLVED + off:
            assert tail == pytest.approx(outside_mass, abs=slack)
        elif n_not_returned == 0:
            assert tail <= outside_mass + slack
        else:
            assert tail <= outside_mass + RESOLVED + slack
        low, high = float(found.entropy[r]), float(found.entropy_hi[r])
        rounding = off * (3 + math.log(head / max(t, RESOLVED))) + 1e-12
        rounding += 4 * ULP * (1 + high)
        assert low <= high
        exact = math.fsum(map(term, distribution))
        if padded < 1e-30:  # the distribution is over the ids alone
            assert low - rounding <= exact <= high + rounding
            if n_not_returned == 0:
                assert high - low <= rounding
        # The interval of section 6, from the top k alone.
        best_ids = [v for v in best if v < case.n_vocab]
        rest = max(1.0 - math.fsum(np.exp(distribution[best_ids])), 0.0)
        interval = rest * math.log(max(case.n_vocab - len(best_ids), 1))
        unresolved = RESOLVED * (1 + math.log(case.n_vocab / RESOLVED))
        assert high - low <= interval + unresolved + rounding


def scores_of_row(probs: list[float], k: int, **request: int) -> Scores:
    """Return scores of one row whose sampled token is id 0."""
    with np.errstate(divide="ignore"):
        log_p = np.log(np.asarray([probs]))
    case = Case(
        log_p=log_p,
        rollouts=rollouts_of(np.zeros(1, np.int64), [1]),
        at=None,
        request=ScoreParams(entry_kind="topk", k_min=k, k_max=k, at_student=False, **request),
        n_vocab=len(probs),
    )
    return case.scores()


def test_a_row_computed_by_hand() -> None:
    found = scores_of_row([0.5, 0.25, 0.125, 0.0625, 0.0625], 2)
    assert found.entropy_hi is not None
    entropy_of_top_2 = 0.5 * math.log(2) + 0.25 * math.log(4)
    # Mass 1/4 remains for three ids: the entropy is least on one id and largest if uniform.
    assert found.entropy.tolist() == pytest.approx(
        [entropy_of_top_2 + 0.25 * math.log(4)], rel=1e-6
    )
    assert found.entropy_hi.tolist() == pytest.approx(
        [entropy_of_top_2 + 0.25 * math.log(12)], rel=1e-6
    )
    assert found.log_tail.tolist() == pytest.approx([math.log(0.25)], rel=1e-6)


def test_ids_that_are_not_returned_are_no_likelier_than_the_returned_ones() -> None:
    # Eight of ten ids of 0.1 are not returned: 0.8 in all, none above 0.1.
    found = scores_of_row([0.1] * 10, 2)
    assert found.entropy.tolist() == pytest.approx([math.log(10)], rel=1e-6)
    assert found.entropy_hi is not None
    assert found.entropy_hi.tolist() == pytest.approx([math.log(10)], rel=1e-6)


def test_a_remaining_mass_below_rounding_is_bounded_by_the_last_returned_id() -> None:
    # Two ids remain with at most 2e-12, though 1 - mass is about 1e-8 by rounding.
    found = scores_of_row([1 - 3e-12, 1e-12, 1e-12, 1e-12], 2)
    assert found.log_tail.tolist() == pytest.approx([math.log(2e-12)], rel=1e-6)
    # Here the remaining ids may hold more than the resolution.
    found = scores_of_row([1 - 2e-7 - 1e-5, 1e-5, 1e-7, 1e-7], 2)
    assert found.log_tail.tolist() == pytest.approx([math.log(RESOLVED)], rel=1e-6)
    # A returned id has probability 0, and so have the remaining ids.
    found = scores_of_row([0.7, 0.3, 0.0, 0.0, 0.0], 3)
    assert found.log_tail.tolist() == [-math.inf]
    assert found.entropy_hi is not None
    assert found.entropy.tolist() == found.entropy_hi.tolist()


def test_mass_on_padding_ids_is_an_error() -> None:
    def case(padding: float) -> Case:
        with np.errstate(divide="ignore"):
            log_p = np.log(np.asarray([[0.6, 0.3, 0.1 - padding, padding]]))
        return Case(
            log_p=log_p,
            rollouts=rollouts_of(np.zeros(1, np.int64), [1]),
            at=None,
            request=ScoreParams(entry_kind="topk", k_min=4, k_max=4, at_student=False),
            n_vocab=3,
        )

    assert case(1e-7).scores().ids.tolist() == [0, 1, 2]
    with pytest.raises(AnswerError, match="ids from 3 on, which not both .* mass 0.0001 a row"):
        case(1e-4).scores()


def test_padding_within_the_topk_leaves_k_min_ids_or_is_an_error() -> None:
    """Reject a row with fewer than k_min ids, because training relies on k_min ids."""

    def case(k_min: int) -> Case:
        with np.errstate(divide="ignore"):
            log_p = np.log(np.asarray([[1 - 5.5e-8, 1e-8, 5e-9, 2e-8, 2e-8]]))
        return Case(
            log_p=log_p,
            rollouts=rollouts_of(np.zeros(1, np.int64), [1]),
            at=None,
            request=ScoreParams(k_min=k_min, k_max=4, at_student=False, top_p=1.0),
            n_vocab=3,
        )

    assert len(case(2).scores().ids) == 2
    with pytest.raises(AnswerError, match="2 best ids of a row .* k_min = 3") as caught:
        case(3).scores()
    assert "--teacher-topk-min" in caught.value.hint


@pytest.mark.parametrize("vocab", [40, 150_000])
def test_unnormalized_log_probs_are_an_error(vocab: int) -> None:
    """Reject log-probs that differ by a constant, as raw logits do."""
    logits = np.random.default_rng(0).normal(0, 3, (2, vocab))
    distribution = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    request = ScoreParams(entry_kind="topk", k_min=20, k_max=20, at_student=False)
    case = Case(
        log_p=distribution,
        rollouts=rollouts_of(np.array([3, 4]), [2]),
        at=None,
        request=request,
        n_vocab=vocab,
    )
    case.scores()
    with pytest.raises(AnswerError, match="add up to .* at most") as caught:
        replace(case, log_p=distribution - 7.0).scores()
    assert "--logprobs-mode" in caught.value.hint
    with pytest.raises(AnswerError, match="a log-prob of"):
        replace(case, log_p=distribution + 7.0).scores()


# Rejected replies.

TOKENS = np.asarray([1, 5])
EXTRA_IDS = IdLists(cnt=np.asarray([2, 1]), ids=np.asarray([0, 6, 7], np.uint32))
PROBS = np.asarray(
    [
        [0.4, 0.3, 0.15, 0.1, 0.02, 0.015, 0.01, 0.005],
        [0.02, 0.3, 0.4, 0.1, 0.15, 0.015, 0.01, 0.005],
    ]
)
GOOD = returned_topk(np.log(PROBS), TOKENS, EXTRA_IDS, 4)


def check(answer: ReturnedTopK) -> None:
    check_answer(answer, TOKENS, EXTRA_IDS, k=4, n_vocab=8)


def with_value(values: Array | None, at: int | tuple[int, int], value: float) -> Array:
    assert values is not None
    changed = values.copy()
    changed[at] = value
    return changed


REJECTED: dict[str, tuple[Callable[[ReturnedTopK], ReturnedTopK], str]] = {
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
    "nothing at extra ids": (lambda a: replace(a, at=None), "None log-probs at 3 chosen ids"),
    "too few at extra ids": (lambda a: replace(a, at=GOOD.lp), r"\(2,\) log-probs at 3 chosen ids"),
    "a token of NaN": (
        lambda a: replace(a, lp=with_value(a.lp, 0, np.nan)),
        "nan at the sampled token",
    ),
    "a best id of NaN": (
        lambda a: replace(a, top_lp=with_value(a.top_lp, (0, 1), np.nan)),
        "nan at a best id",
    ),
    "an extra id of NaN": (
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
    "another value of an extra id": (
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
    "an extra id that is better than the last": (
        lambda a: replace(a, at=with_value(a.at, 1, math.log(0.2))),
        "at a chosen id above that of the last",
    ),
}


def test_an_unchanged_reply_passes() -> None:
    check(GOOD)


@pytest.mark.parametrize("name", REJECTED)
def test_an_impossible_reply_is_an_error(name: str) -> None:
    change, words = REJECTED[name]
    with pytest.raises(AnswerError, match=words) as caught:
        check(change(GOOD))
    assert "nothing of this answer was stored" in caught.value.hint


@pytest.mark.parametrize("token_lp", [-math.inf, -3.0])
def test_a_token_with_probability_zero_must_agree_with_the_topk(token_lp: float) -> None:
    """Give the last id of the top k -inf; the token is the same id, with -inf or not."""
    answer = ReturnedTopK(
        lp=np.asarray([token_lp], np.float32),
        ids=np.asarray([[0, 1]]),
        top_lp=np.asarray([[0.0, -np.inf]], np.float32),
    )
    if token_lp == -math.inf:
        check_answer(answer, np.asarray([1]), None, k=2, n_vocab=9)
        return
    with pytest.raises(AnswerError, match="two log-probs of one id"):
        check_answer(answer, np.asarray([1]), None, k=2, n_vocab=9)


def test_a_rejected_reply_leaves_the_assembler_unchanged() -> None:
    request = ScoreParams(entry_kind="topk", k_min=4, k_max=4)
    assembler = ResponseAssembler(rollouts_of(TOKENS, [2]), request, EXTRA_IDS, n_vocab=8)
    assembler.write(0, GOOD)
    before = assembler.scores()
    with pytest.raises(AnswerError):
        assembler.write(0, replace(GOOD, lp=GOOD.lp + 0.1))
    after = assembler.scores()
    for name in ("lp", "entropy", "entropy_hi", "log_tail", "ids", "entry_lp", "at_lp"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name


def test_a_reply_without_rows_passes() -> None:
    none = ReturnedTopK(lp=np.zeros(0), ids=np.zeros((0, 4), np.int64), top_lp=np.zeros((0, 4)))
    check_answer(none, np.zeros(0, np.int64), None, k=4, n_vocab=8)
