"""Exactness of losses over spans on a cache, and what is refused."""

from dataclasses import replace

import pytest

from logitcask.engine.alignment.span_scores import ENDS, NONE, STARTS
from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import (
    PRESETS,
    check_exactness,
    parse_objective,
    served,
    warnings,
)
from logitcask.engine.objectives.bounds import bounded_metric
from logitcask.engine.objectives.presets import ROW_PRESETS, SPAN_PRESETS
from logitcask.engine.objectives.report import CacheInfo, Served
from tests.engine.objectives.test_exactness import CACHE

SPANS = replace(CACHE, span_rows=STARTS)


def cache_of(name: str) -> CacheInfo:
    return replace(SPANS, span_rows=ENDS if name == "gold_bayesian" else STARTS)


@pytest.mark.parametrize("name", SPAN_PRESETS)
def test_exactness_of_every_preset_over_spans(name: str) -> None:
    preset = PRESETS[name]
    kinds = {"span_advantage": Served.ON_POLICY, "alm": Served.SURROGATE}
    kind = served(preset.objective)
    assert kind is kinds.get(name, Served.HEURISTIC)
    one, two = check_exactness(preset, CACHE), check_exactness(preset, cache_of(name))
    assert one.scores.startswith("exact: every span is one token")
    assert two.scores.startswith("span-exact: ")
    reads = kind is Served.HEURISTIC
    assert ("boundary-conditioned" in two.scores, "truncated" in two.scores) == (reads, reads)
    assert ("boundary-conditioned" in one.scores, "truncated" in one.scores) == (False, reads)
    assert ("last row" in two.scores) == (name == "gold_bayesian")
    assert two.support.startswith("current") == (name == "uld")
    drawn = name == "span_advantage"
    assert two.estimator.startswith("deterministic") == (not drawn)
    old = check_exactness(preset, replace(cache_of(name), student_version=9))
    assert ("biased: off policy (age 9)" in old.estimator) == drawn
    moved = warnings(preset.objective, {"cache/approx_kl": 0.3})
    assert len(moved) == drawn == (bounded_metric(preset.objective) == "cache/approx_kl")
    assert any("importance" in each for each in moved) == drawn
    assert served(parse_objective(f"{name}+reward").objective) is Served.ON_POLICY
    assert served(parse_objective(f"{name}+ce").objective) is kind


def test_a_teacher_that_writes_other_tokens_is_a_warning() -> None:
    for name, expected in (("x_token", 1), ("simct", 1), ("uld", 0)):
        found = [warnings(PRESETS[name].objective, {"span/unmapped": x}) for x in (0.6, 0.4, None)]
        assert [len(each) for each in found] == [expected, 0, 0]
        assert all("train with span_advantage or alm" in each for each in found[0])


def test_a_whole_return_is_that_of_responses() -> None:
    whole = parse_objective("span_advantage(parameter=1)")
    assert "unbiased for KL(p || q) over responses" in check_exactness(whole, SPANS).estimator
    own = check_exactness(PRESETS["span_advantage"], SPANS).estimator
    assert "of spans whose ends do not depend on later text" in own
    assert (
        "unbiased for KL(p || q) at age 0"
        in check_exactness(PRESETS["span_advantage"], CACHE).estimator
    )


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_losses_of_rows_are_refused_for_spans_unless_they_read_no_score(name: str) -> None:
    if name in ("sft", "fixed_advantage"):
        assert check_exactness(PRESETS[name], SPANS).scores.startswith("not read")
        return
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(PRESETS[name], replace(SPANS, q_draws=50 * (name == "rs_kd")))
    assert "the teacher has another tokenizer" in caught.value.cause
    assert caught.value.hint == (
        "train with --objective span_advantage or alm or uld or gold or simct or x_token"
    )


@pytest.mark.parametrize(
    ("name", "change", "cause", "hint"),
    [
        ("simct", {"span_rows": NONE}, "have them at no row", "with --span-topk starts"),
        ("uld", {"span_rows": ENDS}, "have them at the last row", "with --span-topk starts"),
        ("gold_bayesian", {}, "have them at the first row", "--span-topk ends"),
        ("gold", {"at_student": False}, "did not score the student's ids", "--objective simct"),
        ("x_token", {"q_draws": 9, "span_rows": None}, "9 ids drawn", "--objective rs_kd"),
        ("span_advantage", {"imported": "x", "known_draws": False}, "averages over draws", "draws"),
        (
            "span_advantage(parameter=1)",
            {"scored": "some"},
            "gamma = 1.0 looks at all",
            "parameter",
        ),
    ],
)
def test_what_a_cache_lacks_is_refused(
    name: str, change: dict[str, object], cause: str, hint: str
) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(parse_objective(name), replace(SPANS, **change))  # type: ignore[arg-type]
    assert cause in caught.value.cause
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("simct+clip", "only the losses of the sampled token 'ce' and 'reward'", "leave it out"),
        ("span_advantage+return_to_go", "'return_to_go' with a loss over spans", "parameter=1"),
        ("x_token(temperature=2)", "temperature = 2.0 with objective 'x_token'", "start from"),
        ("simct(k=4)", "k = 4 with divergence 'simct', which is no top-k", "--loss-topk"),
        ("alm(parameter=0)", "tau = 0.0 of divergence 'alm' is not in (0, inf]", "e.g. 100"),
        ("simct(parameter=1)", "which has none", "advantage, alm, gold"),
        ("opd(support=spans)", "support 'spans' with estimator 'divergence'", "together"),
        ("uld(weights=none)", "weights 'none' with a loss over spans", "leave weights out"),
    ],
)
def test_a_combination_without_meaning_is_refused(text: str, cause: str, hint: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        parse_objective(text)
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_a_record_of_an_infinite_tau_is_json() -> None:
    assert parse_objective("alm(parameter=inf)").objective.record()["parameter"] == "inf"
