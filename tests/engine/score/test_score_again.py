"""Repeated requests, several teachers, other prompts, drawn ids: nothing is scored twice."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.config.sections import Run
from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    ObjectiveError,
    PromptError,
)
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import open_store
from logitcask.engine.store.format.layouts import kept_lists, ranked
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.verify import verify
from logitcask.engine.training.train import train
from logitcask.engine.types import ModelRef, Prompt, ScoreParams, Scores
from tests.engine.score.scored import PROMPTS, REQUEST, FailingScorer, ref, run
from tests.engine.tiny import make_model, save_folder

WIDE = replace(REQUEST, top_p=0.99, k_min=12, k_max=30)


def test_a_wider_request_adds_missing_ids_and_reads_like_a_single_request(
    store: Path, tmp_path: Path, stored_rollouts: Path, teacher: ModelRef, scorer: HF
) -> None:
    run(store, teacher, scorer)
    assert run(store, teacher, scorer, params=WIDE).units_new == 2
    at_once = shutil.copytree(stored_rollouts, tmp_path / "at-once")
    run(at_once, teacher, scorer, params=WIDE)
    ours, theirs = open_store(store), open_store(at_once)
    a, b = ours.head().scores("big"), theirs.head().scores("big")
    assert [each.layout for each in next(iter(a.values()))] == ["dedup", "extension"]
    for base, chain in a.items():
        stepwise, direct = ours.read_scores(chain), theirs.read_scores(b[base])
        assert np.array_equal(stepwise.kept, direct.kept)
        assert np.array_equal(kept_lists(stepwise)[0], kept_lists(direct)[0])
        np.testing.assert_allclose(stepwise.log_tail, direct.log_tail, atol=1e-5)
        # Together they store no entry that one scoring would not.
        entries = sum(each.counts["E"] for each in chain)
        assert entries == b[base][0].counts["E"]
    verify(ours, deep=True)


def test_a_request_that_the_store_serves_is_not_scored(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    run(store, teacher, scorer, params=WIDE)
    idle = FailingScorer(scorer, 0)
    for smaller in (WIDE, REQUEST, replace(WIDE, k_max=20), replace(WIDE, at_student=False)):
        assert run(store, teacher, idle, params=smaller).units_new == 0
    with pytest.raises(KeyboardInterrupt):
        run(store, teacher, idle, params=replace(WIDE, k_max=31))
    with pytest.raises(KeyboardInterrupt):
        run(store, teacher, idle, params=replace(WIDE, top_p=0.999))


def test_a_teacher_can_score_the_students_ids_later(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    run(store, teacher, scorer, params=replace(REQUEST, at_student=False))
    opened = open_store(store)
    before = opened.head().scores("big")
    assert all(chain[0].layout == "full" for chain in before.values())
    run(store, teacher, scorer)
    for base, chain in opened.head().scores("big").items():
        rollouts = opened.read_rollouts(opened.log.rollouts(base))
        stored = opened.read_scores(chain, base=rollouts)
        assert np.array_equal(stored.s_ids, rollouts.student.ids)
        direct = scorer.score(rollouts, REQUEST)
        np.testing.assert_allclose(stored.s_lp, direct.at_lp, rtol=2e-3)
        assert np.array_equal(stored.kept, direct.cnt)


def test_a_teacher_scores_the_ids_of_a_later_student(
    store: Path, teacher: ModelRef, student: ModelRef, scorer: HF, tmp_path: Path
) -> None:
    later = ref(save_folder(tmp_path / "later", make_model(seed=7)))
    with pytest.raises(IncompleteError, match="no scores of 'later'"):
        run(store, teacher, scorer, extra_ids="later")
    own = ScoreParams(entry_kind="topk", top_p=1.0, k_min=8, k_max=8, at_student=False)
    run(store, later, HF(later), teacher_name="later", params=own)
    run(store, teacher, scorer)
    assert run(store, teacher, scorer, extra_ids="later").units_new == 2
    assert run(store, teacher, FailingScorer(scorer, 0), extra_ids="later").units_new == 0
    opened = open_store(store)
    snapshot = opened.head()
    for base, chain in snapshot.scores("big").items():
        stored = ranked(opened.read_scores(chain))
        expected = ranked(opened.read_scores(snapshot.scores("later")[base]))
        rows = np.split(stored.ids, np.cumsum(stored.cnt)[:-1])
        requested = np.split(expected.ids, np.cumsum(expected.cnt)[:-1])
        assert all(set(a) <= set(b) for a, b in zip(requested, rows, strict=True))
        exact = scorer.score(opened.read_rollouts(opened.log.rollouts(base)), ALL)
        place = [e.tolist() for e in np.split(exact.ids, len(exact.cnt))]
        lps = np.split(exact.entry_lp, len(exact.cnt))
        mine = np.split(stored.lp, np.cumsum(stored.cnt)[:-1])
        for ids, lp, order, full in zip(rows, mine, place, lps, strict=True):
            np.testing.assert_allclose(lp, [full[order.index(i)] for i in ids], rtol=2e-3)


class CountingScorer(HF):
    """A scorer that counts its calls."""

    calls = 0

    def score(self, *args: Any, **keys: Any) -> Scores:
        self.calls += 1
        return super().score(*args, **keys)


@pytest.mark.parametrize("first", [False, True], ids=["at-once", "later"])
def test_a_teacher_scores_the_draws_of_the_student(
    drawn: Path, teacher: ModelRef, first: bool
) -> None:
    """Serve both requests in one pass, and read the teacher's log-probs in float32."""
    scorer = CountingScorer(teacher)
    if first:
        run(drawn, teacher, scorer)
    assert run(drawn, teacher, scorer, extra_ids="mc").units_new == 2
    for once, wider in open_store(drawn).head().scores("big").values():
        assert once.seconds
        assert bool(wider.seconds) == first, "one pass over both is counted once"
    assert scorer.calls == (4 if first else 2)
    assert run(drawn, teacher, FailingScorer(scorer, 0), extra_ids="mc").units_new == 0
    assert run(drawn, teacher, FailingScorer(scorer, 0)).units_new == 0
    opened = open_store(drawn)
    chains = opened.head().scores("big")
    source = PackSource(opened, opened.head(), "main", "big")
    for ordinal, (segment, chain) in enumerate(source.pairs):
        assert [(s.layout, s.profile) for s in chain] == [
            ("dedup", "default"),
            ("extension", "raw32"),
        ]
        rollouts = opened.read_rollouts(segment)
        plain = scorer.score(rollouts, REQUEST)
        alone = opened.read_scores(chain[:1])
        assert np.array_equal(alone.kept, plain.cnt)
        np.testing.assert_allclose(np.exp(alone.log_tail), np.exp(plain.log_tail), atol=2e-6)
        exact = scorer.score(rollouts, ALL)
        lp = np.full((rollouts.positions, 99), np.nan)
        lp[np.repeat(np.arange(rollouts.positions), exact.cnt), exact.ids] = exact.entry_lp
        members = np.stack([np.full(4, ordinal), np.arange(4)], 1)
        targets = source.pack(members).targets
        assert targets.mc_count is not None
        row, column = (targets.mc_count > 0).nonzero().T.numpy()
        assert targets.cached.numpy()[row, column].all(), "cached at every drawn id"
        got = targets.q_log_p.numpy()[row, column]
        np.testing.assert_allclose(got, lp[row, targets.ids.numpy()[row, column]], rtol=1e-3)
        stored = ranked(opened.read_scores(chains[segment.seg_id]))
        tail = np.log1p(-np.add.reduceat(np.exp(stored.lp.astype(float)), starts(stored.cnt)[:-1]))
        log_tail = opened.read_scores(chain).log_tail
        np.testing.assert_allclose(np.exp(log_tail), np.exp(tail), atol=2e-3)
        added = opened.read_arrays(chain[1])
        at_row = np.repeat(np.arange(rollouts.positions), added["topk_counts"])
        np.testing.assert_allclose(added["topk_logprobs"], lp[at_row, added["topk_ids"]], atol=1e-5)
    verify(opened, deep=True)


def test_missing_draws_are_refused(store: Path, teacher: ModelRef, scorer: HF) -> None:
    with pytest.raises(IncompleteError, match="hold no ids that the student drew"):
        run(store, teacher, FailingScorer(scorer, 0), extra_ids="mc")


ALL = ScoreParams(entry_kind="topk", top_p=1.0, k_min=99, k_max=99, at_student=False)


def test_another_dtype_extends_within_its_tolerance(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    run(store, teacher, scorer)
    coarse = HF(teacher, dtype="bfloat16")
    report_of = lambda: run(store, teacher, coarse, params=WIDE)  # noqa: E731
    # bfloat16 moves these log-probs by more than float32 may move, and less than bfloat16 may.
    assert report_of().units_new == 2

    class Wrong:
        capabilities, describe = scorer.capabilities, scorer.describe

        def score(self, rollouts: Any, request: Any, at: Any = None, **_: Any) -> Any:
            scores = scorer.score(rollouts, request, at)
            return replace(scores, at_lp=scores.at_lp - 0.5)

    with pytest.raises(IdentityError, match="now, .* is stored"):
        run(store, teacher, Wrong(), params=replace(WIDE, k_max=40))


def test_base_models_and_contexts_are_separate_scores(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    """Score with a teacher context: the teacher sees more than the student."""
    run(store, teacher, scorer)
    hints = {p.id: Prompt(id=p.id, token_ids=(5, 6, *p.token_ids)) for p in PROMPTS}
    assert run(store, teacher, scorer, teacher_name="hinted", context=hints).units_new == 2
    assert run(store, teacher, scorer, teacher_name="base", role="base").units_new == 2
    opened = open_store(store)
    snapshot = opened.head()
    for segment in snapshot.rollouts("main"):
        plain, hinted, base = (
            opened.read_scores(snapshot.scores(name)[segment.seg_id])
            for name in ("big", "hinted", "base")
        )
        rollouts = opened.read_rollouts(segment)
        shown = replace(rollouts, prompts=tuple(hints[p.id] for p in rollouts.prompts))
        np.testing.assert_allclose(hinted.lp, scorer.score(shown, REQUEST).lp, atol=1e-6)
        assert np.abs(hinted.lp - plain.lp).max() > 0.01
        np.testing.assert_array_equal(base.lp, plain.lp)
    assert snapshot.scores("hinted")[segment.seg_id][0].provenance["context"].startswith("sha256:")
    assert snapshot.scores("base")[segment.seg_id][0].provenance["teacher_kind"] == "base"
    other = {p.id: Prompt(id=p.id, token_ids=(7, *p.token_ids)) for p in PROMPTS}
    with pytest.raises(IdentityError, match="'hinted' stands for context"):
        run(store, teacher, FailingScorer(scorer, 0), teacher_name="hinted", context=other)
    del hints[PROMPTS[0].id]
    with pytest.raises(PromptError, match="no prompt 'p0'"):
        run(store, teacher, FailingScorer(scorer, 0), teacher_name="third", context=hints)


DRAWN = ScoreParams(entry_kind="sampled", draws=400, at_student=False, seed=3)


def test_ids_are_drawn_from_the_teachers_distribution(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    """Check RS-KD: counts / draws is an unbiased estimate of q, and the tail has the other ids."""
    run(store, teacher, scorer, teacher_name="drawn", params=DRAWN)
    opened = open_store(store)
    snapshot = opened.head()
    for segment in snapshot.rollouts("main"):
        rollouts = opened.read_rollouts(segment)
        (segment_of_draws,) = snapshot.scores("drawn")[segment.seg_id]
        assert segment_of_draws.layout == "sampled"
        stored = opened.read_scores((segment_of_draws,))
        exact = scorer.score(rollouts, ALL)
        rows = np.split(stored.ids, np.cumsum(stored.cnt)[:-1])
        mult = np.split(stored.mult, np.cumsum(stored.cnt)[:-1])
        order = [e.tolist() for e in np.split(exact.ids, len(exact.cnt))]
        lps = np.split(exact.entry_lp, len(exact.cnt))
        for r, (ids, m) in enumerate(zip(rows, mult, strict=True)):
            assert m.sum() == DRAWN.draws
            assert len(set(ids)) == len(ids)
            q = np.exp([lps[r][order[r].index(i)] for i in range(99)])
            share = np.zeros(99)
            share[ids] = m / DRAWN.draws
            # Four standard errors of a binomial share, and room for the rarest.
            assert (np.abs(share - q) < 4.5 * np.sqrt(q * (1 - q) / DRAWN.draws) + 0.006).all()
            outside = np.setdiff1d(np.arange(99), ids)
            np.testing.assert_allclose(np.exp(stored.log_tail[r]), q[outside].sum(), atol=1e-5)
    # Other draws need another name; the error is raised before the teacher scores.
    other = replace(DRAWN, seed=4)
    with pytest.raises(IdentityError, match="holds draws of these rollouts of another"):
        run(store, teacher, FailingScorer(scorer, 0), teacher_name="drawn", params=other)
    again = scorer.score(rollouts, DRAWN)
    assert np.array_equal(again.ids, stored.ids), "the draws depend on the seed and the tokens"
    assert not np.array_equal(scorer.score(rollouts, replace(DRAWN, seed=4)).ids, stored.ids)


def test_draws_do_not_depend_on_the_batch(store: Path, scorer: HF, teacher: ModelRef) -> None:
    opened = open_store(store)
    rollouts = opened.read_rollouts(opened.head().rollouts("main")[0])
    narrow = HF(teacher, batch_tokens=1)
    a, b = scorer.score(rollouts, DRAWN), narrow.score(rollouts, DRAWN)
    assert (a.mult.sum(), b.mult.sum()) == (400 * rollouts.positions,) * 2
    assert np.mean(a.cnt == b.cnt) > 0.9, "rounding rarely moves a boundary"


@pytest.mark.parametrize(
    "wrong",
    [
        {"entry_kind": "sampled"},
        {"draws": 3},
        {"entry_kind": "sampled", "draws": 3},
        {"entry_kind": "topk", "k_min": 3, "k_max": 4},
    ],
)
def test_requests_that_contradict_themselves(
    store: Path, teacher: ModelRef, scorer: HF, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="entry_kind = "):
        run(store, teacher, FailingScorer(scorer, 0), params=replace(ScoreParams(), **wrong))


def test_training_refuses_unusable_scores(
    store: Path, student: ModelRef, teacher: ModelRef, scorer: HF, tmp_path: Path
) -> None:
    def train_on(name: str, objective: str, k: int) -> None:
        train(
            open_store(store),
            model=student,
            run=Run(out=tmp_path / f"run-{name}"),
            teacher=name,
            objective=parse_objective(objective, k=k),
        )

    run(store, teacher, scorer, teacher_name="drawn", params=DRAWN)
    with pytest.raises(ObjectiveError, match="drawn from the teacher"):
        train_on("drawn", "overlap", 4)
    # One unit extended and one not: a plan mixes both, and the smaller k_min holds.
    run(store, teacher, scorer)
    with pytest.raises(KeyboardInterrupt):
        run(store, teacher, FailingScorer(scorer, 1), params=WIDE)
    with pytest.raises(ObjectiveError, match="k = 5 is more than k_min = 4"):
        train_on("big", "overlap", 5)
    run(store, teacher, scorer, params=WIDE)
    train_on("big", "overlap", 5)
