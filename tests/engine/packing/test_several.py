"""Several teachers of one row: computed weights, and mixtures in place of the sum of losses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.config.teacher import TeacherMix
from logitcask.engine.config.training import Train
from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    LogitcaskError,
    ObjectiveError,
)
from logitcask.engine.models.identity import digest
from logitcask.engine.objectives import loss_weights, parse_objective
from logitcask.engine.packing.kinds import check_same_kind
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.packing.teacher_weights import mean_divergences, softmax_weights
from logitcask.engine.packing.teachers import Teachers
from logitcask.engine.store import Store
from logitcask.engine.store.format.schema import BOUNDS, DEDUP, SAMPLED, SPAN_STARTS, SPANS
from logitcask.engine.training.cache_info import check_objective
from logitcask.engine.training.pack_loss import pack_loss
from logitcask.engine.training.run_dir.files import check_same
from logitcask.engine.types import ModelRef
from tests.engine.cached import Unit, make_store, make_unit
from tests.engine.packing.test_teachers import other_teacher, score

CONFIDENCE = [{"big": 90, "coder": 60, "third": 0}, {"big": 0, "coder": 60, "third": 30}]
STUDENT = ModelRef(
    name="student",
    path=Path("student"),
    revision="",
    digest=digest("weights"),
    tokenizer_digest=digest("tokenizer"),
    template_digest=digest("template"),
    n_vocab=40,
    stop_ids=(0,),
    version=0,
    base_weights=digest("weights"),
)
MEMBERS = np.asarray([(0, 4), (0, 0)])
LENGTHS = [3, 1, 4, 2, 5, 2]


def with_extras(unit: Unit) -> Unit:
    extras = [{"sure": CONFIDENCE[0]}, {"sure": CONFIDENCE[1]}, {"sure": CONFIDENCE[0]}]
    prompts = tuple(
        replace(prompt, extra=extra)
        for prompt, extra in zip(unit.rollouts.prompts, extras, strict=True)
    )
    return replace(unit, rollouts=replace(unit.rollouts, prompts=prompts))


def grade(store: Store, unit: Unit, name: str, rewards: list[float]) -> None:
    """Commit rollouts of a teacher itself on the prompts of a unit, with a reward of each."""
    rollouts = replace(unit.rollouts, reward=np.asarray(rewards, np.float32))
    store.commit_rollouts(
        rollouts,
        name=name,
        unit_key=digest({name: 0}),
        unit={"version": 0, "first": 0},
        provenance=dict(store.head().rollouts("main")[0].provenance),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return one unit with scores of three teachers, two of which have graded rollouts."""
    unit = with_extras(make_unit(0, lengths=LENGTHS))
    store = make_store(tmp_path_factory.mktemp("several") / "s", [unit], student=STUDENT)
    score(store, 0, other_teacher(unit, 7))
    score(store, 0, other_teacher(unit, 8), "third")
    grade(store, unit, "of-big", [1, 1, 0, 0.5, 1, 0])
    grade(store, unit, "of-coder", [0, 1, 1, 1, 0, 0])
    return store


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return one unit with every id of the vocabulary scored by two teachers."""
    sizes = {"k_min": 40, "k_max": 40}
    unit = make_unit(0, lengths=LENGTHS, **sizes)
    store = make_store(tmp_path_factory.mktemp("whole") / "s", [unit])
    score(store, 0, other_teacher(unit, 7, **sizes))
    return store


def source(store: Store, teacher: str = "big+coder", **mix: Any) -> PackSource:
    return PackSource(store, store.head(), "main", teacher, mix=TeacherMix(**mix))


def shares(pack: Pack, teachers: int = 2) -> np.ndarray[Any, Any]:
    """Return [T, R] the shares of the rows of MEMBERS, sequence after sequence."""
    share = pack.targets.require("share").numpy()
    long, short = share[: 5 * teachers], share[5 * teachers :]
    return np.concatenate([long.reshape(teachers, 5), short.reshape(teachers, 3)], 1)


def test_weights_by_entropy_are_of_each_position(store: Store) -> None:
    alone = [source(store, name).pack(MEMBERS).targets.q_entropy for name in ("big", "coder")]
    expected = torch.softmax(-torch.stack(alone) / 0.5, 0).numpy()
    mix = {"teacher_weighting": "entropy", "teacher_weighting_temperature": 0.5}
    pack = source(store, **mix).pack(MEMBERS)
    np.testing.assert_allclose(shares(pack), expected, rtol=1e-5)
    assert len(np.unique(shares(pack)[0])) == 8


def test_weights_by_confidence_and_accuracy_are_of_the_prompt(store: Store) -> None:
    mix = {"teacher_weighting": "confidence", "teacher_confidence": "sure"}
    found = shares(source(store, **mix).pack(MEMBERS))
    # MAD-OPD, confidences 90 and 60: both sequences are of prompts with these.
    np.testing.assert_allclose(found, [[0.574443] * 8, [0.425557] * 8], atol=1e-6)
    pack = source(store, **mix).pack(np.asarray([(0, 2), (0, 3)]))
    assert pack.targets.require("share")[:4].tolist() == pytest.approx([1 / (1 + np.exp(0.6))] * 4)

    mix = {"teacher_weighting": "accuracy", "teacher_rollouts": "coder=of-coder,big=of-big"}
    found = shares(source(store, **mix).pack(MEMBERS))
    # Sequence 4 is of the last prompt, 0 of the first: accuracies (.5, 0) and (1, .5).
    by_half = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(found[0], [by_half] * 8, atol=1e-6)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)


def test_weights_by_agreement_leave_out_the_teacher_that_stands_alone(store: Store) -> None:
    """Check the divergence by hand, and that it moves the weights of a response."""
    p, q = np.array([0.5, 0.3]), np.array([0.1, 0.2])  # of ids 3 and 7, with tails .2 and .7
    sides = np.append(p, 0.2), np.append(q, 0.7)
    mean = (sides[0] + sides[1]) / 2
    expected = sum((side * np.log(side / mean)).sum() / 2 for side in sides)

    def part(values: Any) -> dict[str, Any]:
        one = np.ones(1, np.uint16)
        ids = np.array([3, 7], np.uint32)
        return {
            "token": np.array([9]),
            "weight": one,
            "kept": one * 2,
            "s_cnt": one * 0,
            "t_cnt": one * 2,
            "q_token_lp": np.log([0.01]),
            "q_log_tail": np.log1p(-values.sum(keepdims=True)),
            "t_ids": ids,
            "t_q": np.log(values),
            "t_rank": np.arange(2),
            **{name: np.zeros(0, np.uint32) for name in ("s_ids", "s_q", "s_rank", "s_p")},
        }

    found = mean_divergences([part(p), part(p), part(q)])
    np.testing.assert_allclose(found, [expected / 2, expected / 2, expected], rtol=1e-6)
    weights = softmax_weights(-found[:, None], 0.01)
    assert weights[2, 0] < 1e-3 < weights[0, 0] == weights[1, 0]
    got = shares(source(store, "big+coder+third", teacher_weighting="agreement").pack(MEMBERS), 3)
    assert len(np.unique(got[0])) == 2, "one weight of each response"
    np.testing.assert_allclose(got.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean", "sequence-sum"])
def test_a_position_counts_once_whatever_its_weights(store: Store, aggregation: str) -> None:
    """Compare the sums over teachers of the rows' weights with those of one teacher."""
    objective = parse_objective("overlap+stepwise").objective
    one = source(store, "big").pack(MEMBERS).targets
    several = source(store, teacher_weighting="entropy").pack(MEMBERS)
    plain = replace(objective, modifiers=())
    (expected,), divisor = loss_weights(plain, [one], aggregation)
    (found,), other = loss_weights(plain, [several.targets], aggregation)
    both = torch.cat([found[:10].reshape(2, 5).sum(0), found[10:].reshape(2, 3).sum(0)])
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(other, divisor)
    # A weight by steps is of the teacher's own gaps, not of its shares.
    (alone,), _ = loss_weights(objective, [one], "token-mean")
    (mixed,), _ = loss_weights(objective, [several.targets], "token-mean")
    share = several.targets.require("share")
    torch.testing.assert_close((mixed / share)[:5], alone[:5])


@pytest.mark.parametrize(
    ("name", "mixture"),
    [("opd(k=40)", "geometric"), ("opd(k=4)", "geometric"), ("forward_kl", "arithmetic")],
)
def test_the_gradient_of_the_sum_is_that_of_the_mixture(
    whole: Store, name: str, mixture: str
) -> None:
    objective = parse_objective(name).objective
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    states = torch.randn(40, 8, generator=generator, dtype=torch.float64)

    def gradient(**mix: str) -> torch.Tensor:
        pack = source(whole, "big=3,coder=1", **mix).pack(MEMBERS)
        leaf = states.clone().requires_grad_()
        loss = pack_loss(objective, leaf[pack.predict_at], head, pack.targets, n_vocab=40).loss
        (grad,) = torch.autograd.grad(loss, leaf)
        return grad

    total = gradient()
    # Stored log-probs are rounded to float16.
    torch.testing.assert_close(gradient(mixture=mixture), total, rtol=2e-3, atol=2e-5)
    other = "arithmetic" if mixture == "geometric" else "geometric"
    assert (gradient(mixture=other) - total).abs().max() > 1e-3, "the tolerance tells them apart"


def test_a_mixture_is_one_teacher_of_each_row(store: Store) -> None:
    members = MEMBERS
    one = source(store, "big").pack(members)
    for mixture in ("arithmetic", "geometric"):
        mixed = source(store, mixture=mixture)
        pack, empty = mixed.pack(members), mixed.pack(members[:0])
        assert torch.equal(pack.input_ids, one.input_ids)
        assert torch.equal(pack.predict_at, one.predict_at)
        assert pack.targets.share is None
        student = pack.targets.ids[pack.targets.in_student]
        assert torch.equal(student, one.targets.ids[one.targets.in_student])
        assert {each.teacher for each in pack.sources} == {"big", "coder"}
        assert len(empty.targets) == 0
        result = pack_loss(
            parse_objective("overlap(k=4)").objective,
            torch.zeros(len(pack.targets), 8),
            torch.zeros(40, 8),
            pack.targets,
            n_vocab=40,
            metrics_fraction=1.0,
        )
        assert 0 < result.metrics["mixture/missing_mass"].mean() < 1
        assert result.metrics["mixture/width"].min() >= 0
    digests = {
        source(store, **mix).plan(seed=0, epochs=1, pack_length=40).digest
        for mix in ({}, {"mixture": "arithmetic"}, {"teacher_weighting": "entropy"})
    }
    assert len(digests) == 3, "the mix is a part of a plan"
    record = Teachers.parse("a+b", mix=TeacherMix(mixture="geometric")).record()
    assert record["teacher_mix"] == {"mixture": "geometric"}
    # A run without a mix that resumes one with it is refused by the name of the setting.
    with pytest.raises(IdentityError, match=r"teacher_mix\.mixture = 'geometric', not None"):
        check_same("run", record | {"plan": "1"}, {"teacher": record["teacher"], "plan": "2"})


@pytest.mark.parametrize(
    ("teacher", "mix", "cause", "hint"),
    [
        ("big", {"teacher_weighting": "entropy"}, "a position has one teacher", "a+b"),
        ("big", {"mixture": "geometric"}, "mixture = geometric with --teacher big", "a+b"),
        ("big=3,coder=1", {"teacher_weighting": "entropy"}, "computes them", "big+coder"),
        ("big+coder", {"teacher_weighting": "agreement"}, "both weights are 1/2", "three or more"),
    ],
)
def test_a_mix_without_meaning_is_refused(
    teacher: str, mix: dict[str, Any], cause: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Teachers.parse(teacher, mix=TeacherMix(**mix))
    assert cause in caught.value.cause
    assert hint in caught.value.hint


ACCURACY = {"teacher_weighting": "accuracy"}


@pytest.mark.parametrize(
    ("mix", "error", "cause"),
    [
        (ACCURACY | {"teacher_rollouts": "big=of-big"}, ConfigError, "not one name of rollouts"),
        (
            ACCURACY | {"teacher_rollouts": "big=of-big,coder=main"},
            IncompleteError,
            "no rollouts 'main' with rewards, for the accuracy of 'coder'",
        ),
        (
            {"teacher_weighting": "confidence", "teacher_confidence": "trust"},
            ConfigError,
            "'p0-0' has trust = None: no number from 0 to 100 for teacher 'big'",
        ),
    ],
)
def test_weights_without_their_data_are_refused(
    store: Store, mix: dict[str, Any], error: type[LogitcaskError], cause: str
) -> None:
    with pytest.raises(error) as caught:
        source(store, **mix)
    assert cause in caught.value.cause


def test_a_prompt_without_an_accuracy_is_refused(tmp_path: Path) -> None:
    """Refuse a missing prompt, and another prompt of the same id."""
    unit = with_extras(make_unit(0, lengths=LENGTHS))
    store = make_store(tmp_path / "s", [unit])
    score(store, 0, other_teacher(unit, 7))
    grade(store, make_unit(3, lengths=LENGTHS), "elsewhere", [1.0] * 6)
    grade(store, make_unit(0, lengths=LENGTHS), "other", [1.0] * 6)
    for name, cause in (
        ("elsewhere", "no graded response to prompt 'p0-0'"),
        ("other", "other keys"),
    ):
        with pytest.raises(LogitcaskError) as caught:
            source(store, **ACCURACY, teacher_rollouts=f"big={name},coder={name}")
        assert cause in caught.value.cause


@pytest.mark.parametrize(
    ("layout", "mix", "cause", "hint"),
    [
        (SPAN_STARTS, {"mixture": "arithmetic"}, "of another tokenizer", "--mixture sum"),
        (SPANS, {"teacher_weighting": "entropy"}, "of another tokenizer", "confidence"),
        (SAMPLED, {"mixture": "geometric"}, "drawn ids and no top ids", "without --draws"),
        (DEDUP + BOUNDS, {"teacher_weighting": "entropy"}, "its entropy is an interval", "--exact"),
    ],
)
def test_scores_that_a_mix_cannot_read_are_refused(
    store: Store, layout: str, mix: dict[str, Any], cause: str, hint: str
) -> None:
    """Refuse them by layout; the sum with fixed weights reads all of them."""
    (scores,) = store.head().scores("coder").values()
    chain = (replace(scores[0], layout=layout),)

    def check(mix: TeacherMix) -> None:
        teachers = Teachers.parse("big+coder", mix=mix)
        check_same_kind(teachers, [[chain, chain]], [], store.read_marks)

    check(TeacherMix())
    with pytest.raises(ConfigError) as caught:
        check(TeacherMix(**mix))
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_a_mixture_with_a_base_model_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="mixture = arithmetic with --base third"):
        PackSource(
            *(store, store.head(), "main", "big+coder"),
            mix=TeacherMix(mixture="arithmetic"),
            base="third",
        )


@pytest.mark.parametrize(
    "section",
    [
        lambda: Train(teacher_weighting="accuracy"),  # type: ignore[call-arg]
        lambda: Train(teacher_rollouts="a=b,c=d"),  # type: ignore[call-arg]
        lambda: Train(teacher_weighting_temperature=2.0),  # type: ignore[call-arg]
        lambda: Train(teacher_weighting="confidence"),  # type: ignore[call-arg]
    ],
)
def test_keys_of_a_mix_that_contradict_each_other_are_refused(
    section: Callable[[], Train],
) -> None:
    with pytest.raises(ValueError, match="must be"):
        section()


@pytest.mark.parametrize(
    ("objective", "cause"),
    [
        ("forward_kl", "tail 'bucket'"),
        ("opd_released", "multiplies the gradient of the support's mass"),
        ("sampled_token+floor", "modifier 'floor'"),
        ("sampled_token+return_to_go", "modifier 'return_to_go'"),
        ("sampled_token+importance(cap=5)", "modifier 'importance'"),
    ],
)
def test_a_geometric_mixture_refuses_what_needs_its_normaliser(
    store: Store, objective: str, cause: str
) -> None:
    def check(mixture: str) -> None:
        check_objective(
            parse_objective(objective, k=4 if "sampled" not in objective else None),
            store,
            snapshot=store.head(),
            rollouts="main",
            teacher="big+coder",
            mix=TeacherMix(mixture=mixture),  # type: ignore[arg-type]
        )

    check("arithmetic")
    with pytest.raises(ObjectiveError) as caught:
        check("geometric")
    assert cause in caught.value.cause
    assert "--mixture sum" in caught.value.hint


def test_the_note_says_where_a_mixture_is_exact(store: Store) -> None:
    report = check_objective(
        parse_objective("overlap", k=4),
        store,
        snapshot=store.head(),
        rollouts="main",
        teacher="big+coder",
        mix=TeacherMix(mixture="arithmetic", teacher_weighting="entropy"),
    )
    notes = "\n".join(report.notes)
    assert "The weights of big, coder are the softmax of minus their entropy" in notes
    assert "exact at ids that all of them scored, the student's stored ids" in notes
    assert "total variation is at most mixture/missing_mass" in notes
    assert report.scores.startswith("of the arithmetic mean of teachers")
