"""Several teachers: each row has the scores of the teacher of its prompt."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.models.identity import digest
from logitcask.engine.objectives import Objective, loss_weights, parse_objective
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.teachers import Teachers
from logitcask.engine.store import Store
from logitcask.engine.store.cache import UnitCache
from logitcask.engine.training.pack_loss import pack_loss
from tests.engine.cached import Unit, make_store, make_unit
from tests.engine.objectives.full_rows import make_full, run

ROUTED = "code=coder,math=big"
DOMAINS = (["code", "math", "code"], ["math", "math", "math"])
"""Of the three prompts of each unit; each has two responses."""


def unit_of(seed: int, domains: list[str]) -> Unit:
    unit = make_unit(seed, lengths=[3, 1, 4, 2, 5, 2])
    prompts = tuple(
        replace(prompt, extra={"domain": domain})
        for prompt, domain in zip(unit.rollouts.prompts, domains, strict=True)
    )
    return replace(unit, rollouts=replace(unit.rollouts, prompts=prompts))


def score(store: Store, ordinal: int, other: Unit, name: str = "coder") -> None:
    """Commit the scores of another teacher of one unit."""
    segment = store.head().rollouts("main")[ordinal]
    store.commit_scores(
        other.scores,
        base=segment,
        name=name,
        unit_key=digest({name: ordinal}),
        unit=dict(segment.unit),
        provenance={
            "teacher": {"weights": digest(name)},
            "teacher_kind": "teacher",
            "context": "",
            "request": {
                "teacher_top_p": 0.6,
                "teacher_topk_min": 4,
                "teacher_topk_max": 7,
                "at_student": True,
            },
        },
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return two units with scores of `big`, and the first with scores of `coder`."""
    tmp_path = tmp_path_factory.mktemp("teachers")
    units = [unit_of(seed, domains) for seed, domains in enumerate(DOMAINS)]
    store = make_store(tmp_path / "s", units)
    score(store, 0, other_teacher(units[0], 7))
    return store


def other_teacher(unit: Unit, seed: int, **sizes: int) -> Unit:
    """Return the same tokens and lists of the student under another teacher."""
    other = make_unit(seed, lengths=[3, 1, 4, 2, 5, 2], **sizes)
    student = unit.rollouts.student
    assert student is not None
    row, outside = np.repeat(np.arange(17), student.cnt), np.ones(other.log_q.shape, bool)
    outside[row, student.ids] = False
    outside[np.repeat(np.arange(17), other.scores.cnt), other.scores.ids] = False
    with np.errstate(divide="ignore"):
        tail = np.log((np.exp(other.log_q) * outside).sum(1))
    scores = replace(
        other.scores,
        lp=other.log_q[np.arange(17), unit.rollouts.tokens].astype(np.float32),
        at_lp=other.log_q[row, student.ids].astype(np.float32),
        log_tail=tail.astype(np.float32),
    )
    return replace(other, scores=scores)


def source(store: Store, teacher: str = ROUTED, field: str | None = "domain") -> PackSource:
    return PackSource(store, store.head(), "main", teacher, teacher_field=field)


@pytest.mark.parametrize("cached", [False, True])
def test_each_row_has_the_scores_of_its_teacher(store: Store, tmp_path: Path, cached: bool) -> None:
    cache = UnitCache(tmp_path / "c") if cached else None
    routed = PackSource(store, store.head(), "main", ROUTED, teacher_field="domain", cache=cache)
    alone = {
        name: PackSource(store, store.head(), "main", name, partial=True)
        for name in ("big", "coder")
    }
    routed.decode_ahead([0, 1])
    members = [(0, 4), (1, 1), (0, 2), (0, 1), (1, 5)]
    found = routed.pack(np.asarray(members))
    for i, (ordinal, sequence) in enumerate(members):
        name = {"code": "coder", "math": "big"}[DOMAINS[ordinal][sequence // 2]]
        expected = alone[name].pack(np.asarray([(ordinal, sequence)]))
        rows = found.targets.at((found.targets.sequence == i).nonzero()[:, 0])
        width = expected.targets.ids.shape[1]
        for field in ("ids", "q_log_p", "q_rank", "cached"):
            got = getattr(rows, field)[:, :width]
            assert torch.equal(got, getattr(expected.targets, field)), (name, field)
        for field in ("token", "q_log_tail", "q_entropy", "teacher_logprobs", "n_kept"):
            assert torch.equal(getattr(rows, field), getattr(expected.targets, field)), field
    other = alone["big"].pack(np.asarray([(0, 4)])).targets.teacher_logprobs
    assert not torch.equal(found.targets.teacher_logprobs[: len(other)], other)


MIXED = "big=3,coder=1"
"""Weights 0.75 and 0.25."""
NAMES = (
    "opd(k=4)",
    "overlap(k=4)",
    "forward_kl",
    "sampled_token+ce",
    "prune_opd(k=4)+keep_entropy",
)


def test_with_weights_a_row_comes_once_for_each_teacher(store: Store) -> None:
    mixed = PackSource(store, store.head(), "main", MIXED, partial=True)
    assert len(mixed.lengths()) == 1, "one unit has the scores of both"
    members = np.asarray([(0, 4), (0, 0)])
    pack, empty = mixed.pack(members), mixed.pack(members[:0])
    alone = [
        PackSource(store, store.head(), "main", name, partial=True).pack(members)
        for name in ("big", "coder")
    ]
    assert torch.equal(pack.input_ids, alone[0].input_ids)
    assert pack.targets.sequence.tolist() == [0] * 5 + [1] * 5 + [2] * 3 + [3] * 3
    assert pack.targets.weight.tolist() == ([0.75] * 5 + [0.25] * 5) + [0.75] * 3 + [0.25] * 3
    for i, other in enumerate(alone):
        index = torch.cat([torch.arange(5) + 5 * i, 10 + torch.arange(3) + 3 * i])
        assert torch.equal(pack.predict_at[index], other.predict_at)
        for field in ("token", "teacher_logprobs", "q_log_tail", "n_kept", "position"):
            got = getattr(pack.targets, field)[index]
            assert torch.equal(got, getattr(other.targets, field)), field
    assert len(empty.targets) == 0
    assert empty.targets.require("share").shape == (0,)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sequence-sum"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_of_the_teachers_losses(
    store: Store, name: str, aggregation: str
) -> None:
    """Compare loss and gradient with those of each teacher alone; a row of one is masked."""
    objective = parse_objective(name).objective
    members = np.asarray([(0, 4), (0, 0), (0, 3)])
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    states = torch.randn(40, 8, generator=generator, dtype=torch.float64)

    def result(teacher: str) -> tuple[torch.Tensor, torch.Tensor]:
        source = PackSource(store, store.head(), "main", teacher, partial=True)
        pack = source.pack(members)
        mask = (pack.predict_at != pack.predict_at[0]).float()
        targets = replace(pack.targets, weight=pack.targets.weight * mask)
        (weights,), divisor = loss_weights(objective, [targets], aggregation)
        leaf = states.clone().requires_grad_()
        rows = leaf[pack.predict_at]
        weight = (weights / divisor).double()
        loss = pack_loss(objective, rows, head, targets, row_weight=weight, n_vocab=40).loss
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), grad

    (big, d_big), (coder, d_coder), (mean, d_mean) = map(result, ("big", "coder", MIXED))
    torch.testing.assert_close(mean, 0.75 * big + 0.25 * coder, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(d_mean, 0.75 * d_big + 0.25 * d_coder, rtol=1e-6, atol=1e-7)
    assert (d_big - d_coder).abs().max() > 1e-4


def test_the_gradient_is_that_of_a_mixture_on_one_support() -> None:
    """Compare in float64 with the divergence from the geometric and from the mean distribution."""
    generator = torch.Generator().manual_seed(1)
    live, one, other = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    log_q = [x.log_softmax(-1) for x in (one, other)]
    geometric = (0.75 * log_q[0] + 0.25 * log_q[1]).log_softmax(-1)
    mean = (0.75 * log_q[0].exp() + 0.25 * log_q[1].exp()).log()
    for name, mixture, tokens in (
        ("opd(k=7)", geometric, [0]),
        ("opd(k=3)", geometric, [0]),
        ("forward_kl", mean, [0]),
        ("sampled_token", geometric, range(7)),
    ):
        objective = parse_objective(name).objective

        def expected(
            teacher: torch.Tensor, o: Objective = objective, ys: Sequence[int] = tuple(tokens)
        ) -> torch.Tensor:
            fulls = [make_full(live, teacher, student_k=7, kept=7, token=y) for y in ys]
            p = live.softmax(-1)[:, list(ys)].T if len(ys) > 1 else torch.ones(1, 5).double()
            return sum(  # type: ignore[return-value]
                w[:, None] * run(o, full)[1] for w, full in zip(p, fulls, strict=True)
            )

        ours = 0.75 * expected(one) + 0.25 * expected(other)
        torch.testing.assert_close(ours, expected(mixture), rtol=1e-9, atol=1e-12, msg=name)


def test_a_unit_needs_the_teachers_of_its_prompts_alone(store: Store) -> None:
    routed = source(store)
    assert [len(segments) for _, segments in routed.pairs] == [1, 1, 1]
    assert len(routed.lengths()) == 2, "one for each unit"
    assert len(routed.plan(seed=0, epochs=1, pack_length=40).members) == 12
    swapped = "code=big,math=coder"
    with pytest.raises(IncompleteError, match="1 of 2 units of rollouts 'main' have no scores of"):
        source(store, swapped)
    partial = PackSource(store, store.head(), "main", swapped, teacher_field="domain", partial=True)
    assert len(partial.lengths()) == 1


def test_a_plan_is_of_its_teachers(store: Store) -> None:
    plans = [
        source(store, text, field).plan(seed=0, epochs=1, pack_length=40).digest
        for text, field in ((ROUTED, "domain"), ("code=big,math=big", "domain"), ("big", None))
    ]
    assert len(set(plans)) == 3
    assert Teachers.parse("big").record() == {"teacher": "big"}, "as in earlier runs"
    assert Teachers.parse("a=1,b=1,c=1").weights == pytest.approx([1 / 3] * 3)
    assert Teachers.parse("a+b") == Teachers.parse("a=1,b=1")
    text = str(Teachers.parse("a=1,b=2"))
    assert text == "a=0.333333,b=0.666667" == str(Teachers.parse(text))
    assert Teachers.parse(" code = a, math=b", "domain").record() == {
        "teacher": "code=a,math=b",
        "teacher_field": "domain",
    }


@pytest.mark.parametrize(
    ("teacher", "field", "cause", "hint"),
    [
        ("big+coder", "domain", "one teacher is for all values", "VALUE=NAME"),
        ("big+big", None, "'big' comes twice", "each of them once"),
        (ROUTED, None, "without --teacher-field", "--teacher-field domain"),
        ("big", "domain", "one teacher is for all values", "VALUE=NAME"),
        (None, "domain", "without --teacher", "VALUE=NAME"),
        ("code=,math=big", "domain", "'code=' is not VALUE=NAME", "e.g. --teacher code="),
        ("code=big,big", "domain", "'big' is not VALUE=NAME", "e.g. --teacher code="),
        ("code=big,code=coder", "domain", "'code' comes twice", "each of them once"),
        ("big=1,coder=0", None, "weight 0 of 'coder' is not in (0, inf)", "a positive weight"),
        ("big=nan,coder=1", None, "weight nan of 'big'", "a positive weight"),
        ("big=1,big=2", None, "'big' comes twice", "each of them once"),
    ],
)
def test_wrong_texts_are_rejected(
    teacher: str | None, field: str | None, cause: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Teachers.parse(teacher, field)
    assert cause in caught.value.cause
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("teacher", "field", "cause", "hint"),
    [
        (ROUTED, "topic", "'p0-0' has no key 'topic'", "its keys are: domain"),
        ("math=big", "domain", "'p0-0' has domain = 'code'", "has one for math; add VALUE=NAME"),
    ],
)
def test_a_prompt_without_a_teacher_is_rejected(
    store: Store, teacher: str, field: str, cause: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        source(store, teacher, field)
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_drawn_ids_and_top_ids_do_not_mix(store: Store) -> None:
    segment = store.head().rollouts("main")[0]
    unit = make_unit(7, lengths=[3, 1, 4, 2, 5, 2])
    count = np.ones(len(unit.scores.ids), np.uint16)
    drawn = replace(unit.scores, mult=count, at_lp=None, entropy_hi=None)
    store.commit_scores(
        drawn,
        base=segment,
        name="drawn",
        unit_key=digest({"drawn": 0}),
        unit=dict(segment.unit),
        provenance={"teacher": {"weights": digest("d")}, "teacher_kind": "teacher", "context": ""},
    )
    with pytest.raises(ConfigError, match="of one are drawn ids, of another top ids"):
        source(store, "code=drawn,math=big")
