"""Scores of some positions: what is scored, stored and read, and what a training makes of it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import ConfigError, IncompleteError, StoreError
from logitcask.engine.objectives import parse_objective
from logitcask.engine.objectives.loss_weights import AGGREGATIONS, loss_weights
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.score.positions import chosen_rows, shortened
from logitcask.engine.store import open_store
from logitcask.engine.store.format.layouts import kept_lists, ranked
from logitcask.engine.store.format.rows import last_marked, scores_at
from logitcask.engine.store.inspect import show_sequence, summary
from logitcask.engine.store.merge import merge
from logitcask.engine.store.retention import delete
from logitcask.engine.store.verify import verify
from logitcask.engine.training.pack_loss import pack_loss
from logitcask.engine.types import CachedScores, IdLists, ModelRef, Scores
from tests.engine.cached import make_store, make_unit
from tests.engine.score.scored import REQUEST, FailingScorer, run
from tests.engine.tiny import make_model

FORMS = ("first:2", "every:3", "entropy-top:0.4")


class Watched(HF):
    """A scorer that counts the tokens of its forward passes and the rows of its head."""

    tokens = rows = 0

    def hidden(self, ids: Tensor, *rest: Any) -> Tensor:
        self.tokens += ids.numel()
        return super().hidden(ids, *rest)

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows += len(hidden)
        return super().logits(hidden)


class Whole:
    """A scorer of all rows alone, as a server is."""

    def __init__(self, hf: HF) -> None:
        self.hf, self.describe = hf, hf.describe
        self.capabilities = hf.capabilities - {"rows"}

    def score(self, *given: Any, **keys: Any) -> Scores:
        assert "rows" not in keys
        return self.hf.score(*given, **keys)


def test_the_rows_of_each_form() -> None:
    rollouts = make_unit(3, lengths=[4, 0, 7, 1, 2, 3]).rollouts
    assert chosen_rows(rollouts, "all").all()
    index = np.concatenate([np.arange(n) for n in (4, 0, 7, 1, 2, 3)])
    assert (chosen_rows(rollouts, "first:2") == (index < 2)).all()
    assert (chosen_rows(rollouts, "every:3") == (index % 3 == 0)).all()
    mask = rollouts.loss_mask.copy()
    mask[rollouts.student.entropy.argmax()] = 0
    masked = replace(rollouts, loss_mask=mask)
    for share in (0.05, 0.4, 1.0):
        rows = chosen_rows(masked, f"entropy-top:{share}")
        assert rows.sum() == np.ceil(share * 16)
        entropy = np.where(mask, rollouts.student.entropy, -1)
        assert entropy[rows].min() >= entropy[~rows].max()
    with pytest.raises(IncompleteError, match="no entropies"):
        chosen_rows(replace(rollouts, student=None), "entropy-top:0.5")
    assert last_marked(index == 2, rollouts.lengths()).tolist() == [3, 0, 3, 0, 0, 3]
    cut, kept = shortened(rollouts, np.array([3, 0, 3, 0, 0, 3]))
    assert cut.tokens.tolist() == rollouts.tokens[kept].tolist()
    assert cut.student.cnt.sum() == len(cut.student.ids) == rollouts.student.cnt[kept].sum()


def rows_of(cached: CachedScores, rows: np.ndarray) -> list[np.ndarray]:
    """Return all that scores hold at these rows, best first."""
    u = ranked(cached)
    ids, lp = (each[np.repeat(rows, u.cnt)] for each in (u.ids, u.lp))
    per_row = (cached.lp, cached.entropy, cached.log_tail, cached.kept, u.cnt)
    return [*(each[rows] for each in per_row), ids, lp]


@pytest.mark.parametrize(
    ("positions", "at_student"), [(FORMS[0], True), (FORMS[1], True), (FORMS[2], False)]
)
def test_scored_rows_read_as_of_a_whole_scoring_and_others_are_added_later(
    store: Path,
    tmp_path: Path,
    stored_rollouts: Path,
    teacher: ModelRef,
    scorer: HF,
    positions: str,
    at_student: bool,
) -> None:
    params = replace(REQUEST, at_student=at_student)
    whole = shutil.copytree(stored_rollouts, tmp_path / "whole")
    run(whole, teacher, scorer, params=params)
    engine = Whole(scorer) if positions == "every:3" else scorer
    first = run(store, teacher, engine, params=params, positions=positions)
    assert run(store, teacher, FailingScorer(scorer, 0), params=params, positions=positions)
    ours, theirs = open_store(store), open_store(whole)
    expected = theirs.head().scores("big")
    for base, chain in ours.head().scores("big").items():
        rollouts = ours.read_rollouts(ours.log.rollouts(base))
        rows = chosen_rows(rollouts, positions)
        part = ours.read_scores(chain)
        assert (part.scored == rows).all()
        assert 0 < rows.sum() == chain[0].rows < len(rows)
        full = theirs.read_scores(expected[base])
        for a, b in zip(rows_of(part, rows), rows_of(full, rows), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
        assert not ranked(part).cnt[~rows].any()
        if at_student:
            # Exactly the ids of the whole scoring at these rows, and no more.
            assert chain[0].counts["S"] == rollouts.student.cnt[rows].sum()
    verify(ours, deep=True)
    second = run(store, teacher, engine, params=params)
    total = summary(ours)["positions"]
    assert (first.units_new, second.units_new) == (2, 2)
    assert first.positions + second.positions == total
    assert summary(ours)["teachers"] == {"big": total}
    for base, chain in ours.head().scores("big").items():
        assert [each.is_partial for each in chain] == [True, True]
        assert chain[1].extends == chain[0].seg_id
        joined, full = ours.read_scores(chain), theirs.read_scores(expected[base])
        assert joined.scored is None
        every = np.ones(len(joined.cnt), bool)
        for a, b in zip(rows_of(joined, every), rows_of(full, every), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
    verify(ours, deep=True)
    # Complete scores are extended by ids, and copied and deleted as a chain.
    run(store, teacher, scorer, params=replace(params, top_p=0.99, k_min=12, k_max=30))
    copy = shutil.copytree(stored_rollouts, tmp_path / "copy")
    report = merge(open_store(copy), ours)
    assert (report.added, report.left_out) == (6, 0)
    verify(open_store(copy), deep=True)
    base, chain = next(iter(ours.head().scores("big").items()))
    kept = kept_lists(ours.read_scores(chain))[0]
    assert (kept_lists(open_store(copy).read_scores(chain))[0] == kept).all()
    assert len(delete(ours, segment=chain[0].seg_id)) == 3
    assert base not in ours.head().scores("big")


def test_drawn_ids_at_some_positions(store: Path, teacher: ModelRef, scorer: HF) -> None:
    drawn = replace(REQUEST, entry_kind="sampled", draws=6, seed=3, at_student=False)
    run(store, teacher, scorer, params=drawn, positions="first:2")
    opened = open_store(store)
    for chain in opened.head().scores("big").values():
        stored = opened.read_scores(chain)
        of_row = np.add.reduceat(stored.mult, np.flatnonzero(np.diff(np.r_[-1, row_of(stored)])))
        assert (of_row == 6).all()
        assert len(of_row) == stored.scored.sum()
    verify(opened, deep=True)


def row_of(stored: CachedScores) -> np.ndarray:
    return np.repeat(np.arange(len(stored.cnt)), stored.cnt)


def test_requests_add_up_in_any_order(store: Path, teacher: ModelRef, scorer: HF) -> None:
    done = [
        run(store, teacher, scorer, positions=each).positions
        for each in ("first:4", "first:2", "every:5", "first:4", "all", "every:2")
    ]
    opened = open_store(store)
    rollouts = [opened.read_rollouts(each) for each in opened.head().rollouts("main")]
    index = np.concatenate([np.arange(n) for each in rollouts for n in each.lengths()])
    late, fifth = index >= 4, index % 5 == 0
    assert done == [(~late).sum(), 0, (late & fifth).sum(), 0, (late & ~fifth).sum(), 0]
    verify(opened, deep=True)
    stored = opened.head().scores("big").values()
    assert {tuple(e.rows > 0 for e in chain) for chain in stored} == {(True, False, True, True)}


def test_a_scorer_computes_no_more_than_it_must(store: Path, teacher: ModelRef) -> None:
    rollouts = open_store(store).head().rollouts("main")
    rows = sum(each.counts["P"] for each in rollouts)
    work = {}
    for positions in ("all", "first:2", "every:3"):
        scorer = Watched(teacher)
        before = scorer.tokens, scorer.rows  # of the checks of the model
        run(store, teacher, scorer, teacher_name=positions.replace(":", "-"), positions=positions)
        work[positions] = scorer.tokens - before[0], scorer.rows - before[1]
    assert work["all"][1] - work["first:2"][1] == rows - 2 * sum(s.counts["N"] for s in rollouts)
    assert work["every:3"][1] == work["first:2"][1]
    assert work["first:2"][0] < work["every:3"][0] < work["all"][0]


def test_refusals(store: Path, teacher: ModelRef, scorer: HF) -> None:
    run(store, teacher, scorer, positions="first:2")
    wider = replace(REQUEST, k_max=20)
    for keys in ({"params": wider}, {"extra_ids": "big"}):
        with pytest.raises(ConfigError, match="scores of some positions|some positions only"):
            run(store, teacher, scorer, **keys)
    with pytest.raises(ConfigError, match="of some positions only"):
        run(store, teacher, scorer, teacher_name="other", extra_ids="big")
    opened = open_store(store)
    (base, chain), *_ = opened.head().scores("big").items()
    rollouts = opened.read_rollouts(opened.log.rollouts(base))
    rows = chosen_rows(rollouts, "first:1")
    at = IdLists(cnt=rollouts.student.cnt, ids=rollouts.student.ids)
    scores = scores_at(scorer.score(rollouts, REQUEST), rows, at)
    again: dict[str, Any] = {"base": opened.log.rollouts(base), "name": "big", "unit": {}}
    again |= {"unit_key": "sha256:" + "0" * 64, "provenance": chain[0].provenance}
    with pytest.raises(StoreError, match="have a score of this teacher already"):
        opened.commit_scores(scores, rows=rows, **again)
    run(store, teacher, scorer)
    with pytest.raises(ConfigError, match="has scores of all, of fewer ids"):
        run(store, teacher, scorer, params=wider, positions="first:2")


def test_bytes_follow_the_share_of_the_positions(tmp_path: Path) -> None:
    unit = make_unit(1, lengths=[2000] * 6)
    lists = IdLists(cnt=unit.rollouts.student.cnt, ids=unit.rollouts.student.ids)
    store = make_store(tmp_path / "s", [unit])
    (whole,) = store.head().scores("big").popitem()[1]
    of: dict[str, Any] = {"rollouts": None, "sequence": 0, "top": 1}
    assert "scored_positions" not in show_sequence(store, teacher="big", **of)
    sizes = {}
    for positions in ("first:600", "every:3", "entropy-top:0.3"):
        rows = chosen_rows(unit.rollouts, positions)
        segment = store.commit_scores(
            scores_at(unit.scores, rows, lists),
            base=store.head().rollouts("main")[0],
            name=positions.replace(":", "-"),
            unit_key=f"sha256:{len(sizes):064x}",
            unit={},
            provenance={**whole.provenance, "positions": positions},
            rows=rows,
        )
        sizes[positions] = (segment.size - 20_000) / (rows.mean() * whole.size)
    assert all(0.7 < share < 1.1 for share in sizes.values()), sizes
    shown = show_sequence(store, teacher="first-600", **of)
    assert shown["scored_positions"] == "600 of 2000"
    assert shown["rows"][600]["teacher_lp"] is None
    assert shown["rows"][599]["teacher_lp"] == pytest.approx(float(unit.scores.lp[599]))


@pytest.mark.parametrize("positions", FORMS)
def test_loss_and_gradient_are_those_of_whole_scores_with_a_mask(
    tmp_path: Path, positions: str
) -> None:
    units = [make_unit(seed, lengths=[5, 9, 1, 7, 0, 6], mc_draws=3) for seed in (1, 2)]
    rows = [chosen_rows(unit.rollouts, positions) for unit in units]
    masked = [
        replace(u, rollouts=replace(u.rollouts, loss_mask=r.astype(np.uint16)))
        for u, r in zip(units, rows, strict=True)
    ]
    whole = make_store(tmp_path / "whole", masked)
    part = make_store(tmp_path / "part", units, scored=0)
    for i, (unit, marks) in enumerate(zip(units, rows, strict=True)):
        lists = IdLists(cnt=unit.rollouts.student.cnt, ids=unit.rollouts.student.ids)
        (first,) = whole.head().scores("big")[whole.head().rollouts("main")[i].seg_id]
        part.commit_scores(
            scores_at(unit.scores, marks, lists),
            base=part.head().rollouts("main")[i],
            name="big",
            unit_key=first.unit_key,
            unit={},
            provenance=first.provenance,
            rows=marks,
        )
    source = PackSource(part, part.head(), "main", "big")
    share = f"{100 * np.concatenate(rows).mean():.3g} % of the positions"
    assert source.coverage() == share
    # Sequences end with their last scored row, and those without one are in no plan.
    lengths = [each.response.tolist() for each in source.lengths()]
    reach = [
        last_marked(marks, unit.rollouts.lengths()).tolist()
        for marks, unit in zip(rows, units, strict=True)
    ]
    assert lengths == reach
    members = np.array([[u, s] for u in (0, 1) for s in range(6) if reach[u][s]])
    packs = [PackSource(s, s.head(), "main", "big").pack(members) for s in (whole, part)]
    assert packs[1].targets.weight.sum() == len(packs[1].targets) == np.concatenate(rows).sum()
    assert packs[1].input_ids.shape[1] == sum(map(sum, reach)) + sum(
        len(units[u].rollouts.prompts[units[u].rollouts.seq_prompt[s]].token_ids)
        for u, s in members
    )
    counted = packs[0].targets.weight > 0
    modified = parse_objective("overlap+keep_entropy(share=0.5)").objective
    for aggregation in AGGREGATIONS:
        of_whole, of_part = (loss_weights(modified, [p.targets], aggregation) for p in packs)
        torch.testing.assert_close(of_whole.weights[0][counted], of_part.weights[0])
        assert of_whole.divisor == of_part.divisor
    model = make_model(vocab_size=40)
    for name in ("overlap", "opd", "sampled_token", "forward_kl", "gkd", "overlap+ce"):
        found = [loss_of(model, name, pack) for pack in packs]
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5), name
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def loss_of(model: Any, objective: str, pack: Pack) -> tuple[float, Tensor]:
    """Return the loss of a pack and its gradient by all parameters, flat."""
    inputs = {"input_ids": pack.input_ids, "position_ids": pack.position_ids}
    states = model.model(**inputs, use_cache=False)
    found = pack_loss(
        parse_objective(objective).objective,
        states.last_hidden_state[0, pack.predict_at],
        model.get_output_embeddings().weight,
        pack.targets,
        n_vocab=40,
    )
    model.zero_grad()
    found.loss.backward()
    grads = [each.grad.flatten() for each in model.parameters() if each.grad is not None]
    return found.loss.item(), torch.cat(grads)
