"""Objectives: only meaningful combinations are allowed, and every preset names its source."""

import json
from dataclasses import replace
from itertools import product

import pytest

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import PRESETS, Objective, parse_objective
from logitcask.engine.objectives.divergences import DIVERGENCES, PARAMETERS
from logitcask.engine.objectives.modifiers import (
    AdaptiveTarget,
    Baseline,
    Clip,
    Extrapolate,
    Floor,
    Importance,
    KeepEntropy,
    Prune,
    Stepwise,
)
from logitcask.engine.objectives.objective import ALLOWED_COMBINATIONS, ESTIMATORS
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.engine.objectives.supports import SAMPLED_SUPPORTS, SUPPORTS
from logitcask.engine.objectives.tail import TAILS

EQ5 = PRESETS["opd"].objective


def test_every_combination_is_a_cell_or_refused() -> None:
    made, refused = set(), set()
    for cell in product(SUPPORTS, DIVERGENCES, TAILS, ESTIMATORS):
        support, divergence, tail, estimator = cell
        try:
            Objective(
                support=support,
                divergence=divergence,
                tail=tail,
                estimator=estimator,
                k=1 if support in SAMPLED_SUPPORTS else 4,
                parameter=0.5 if divergence in PARAMETERS else None,
            )
            made.add(cell)
        except ObjectiveError:
            refused.add(cell)
    assert made == ALLOWED_COMBINATIONS
    assert (len(made), len(refused)) == (87, 585)


@pytest.mark.parametrize(
    ("change", "cause", "hint"),
    [
        (
            {"support": "parent"},
            "unknown support 'parent'",
            "teacher, student, overlap, union, non_overlap, sampled, mc, teacher_mc",
        ),
        ({"divergence": "kl"}, "unknown divergence 'kl'", "reverse_kl, forward_kl, jsd, skew"),
        ({"tail": "drop"}, "unknown tail 'drop'", "renormalize, bucket, zero, ignore"),
        ({"estimator": "reward"}, "unknown estimator 'reward'", "divergence, policy_gradient"),
        ({"support": ""}, "unknown support ''", "known:"),
        (
            {"support": "sampled", "k": 1},
            "a drawn id is no distribution",
            "estimator 'policy_gradient'",
        ),
        ({"tail": "ignore"}, "where mass has left the support", "'renormalize' or 'bucket'"),
        ({"tail": "zero"}, "infinite where the student has mass", "forward_kl, skew,"),
        (
            {"tail": "ignore", "divergence": "skew_reverse", "parameter": 0.1},
            "not least at the teacher",
            "divergence 'forward_kl'",
        ),
        (
            {"tail": "ignore", "divergence": "forward_kl"},
            "support 'student' with tail 'ignore': the student would give up",
            "use support 'teacher'",
        ),
        (
            {"tail": "bucket", "temperature": 2.0},
            "temperature = 2.0 with tail 'bucket' and estimator 'divergence'",
            "use tail 'renormalize'",
        ),
        ({"temperature": 0.0}, "temperature = 0.0 is not in (0, inf)", "give a value"),
        ({"estimator": "policy_gradient"}, "raw log-ratio", "tail 'ignore'"),
        (
            {"estimator": "policy_gradient", "tail": "ignore", "divergence": "forward_kl"},
            "divergence 'forward_kl'",
            "'reverse_kl'",
        ),
        ({"k": 1}, "k = 1 with tail 'renormalize'", "--loss-topk 2 or more"),
        ({"k": 0, "tail": "bucket"}, "k = 0 must be 1 or more", "--loss-topk 1 or more"),
        (
            {"support": "sampled", "estimator": "policy_gradient", "tail": "ignore"},
            "k = 16 with support 'sampled'",
            "leave --loss-topk out",
        ),
        ({"support": "mc", "k": 1}, "draws of p give no sum over p", "estimator 'policy_gradient'"),
        ({"support": "teacher_mc", "k": 1}, "an average over q", "tail 'ignore'"),
        ({"divergence": "jsd"}, "beta = None of divergence 'jsd'", "e.g. 0.5"),
        ({"divergence": "skew", "parameter": 1.0}, "alpha = 1.0", "in it"),
        ({"parameter": 0.5}, "parameter = 0.5 with divergence 'reverse_kl'", "jsd, skew"),
        ({"weights": "mine"}, "unknown weights 'mine'", "student_p, teacher_p, none"),
        ({"weights": "none"}, "only a policy gradient on a top-k", "leave weights out"),
        (
            {"modifiers": (Floor(),)},
            "'floor' with estimator 'divergence'",
            "estimator 'policy_gradient'",
        ),
        ({"modifiers": (Importance(),)}, "not drawn from the student", "'sampled' or 'mc'"),
        ({"modifiers": (Baseline(),)}, "a top-k is not drawn", "'sampled' or 'mc'"),
        ({"modifiers": (Clip(),)}, "no advantage", "estimator 'policy_gradient'"),
        (
            {"modifiers": (AdaptiveTarget(),), "estimator": "policy_gradient", "tail": "ignore"},
            "must be a distribution",
            "estimator 'divergence'",
        ),
        (
            {"modifiers": (Extrapolate(),), "tail": "bucket"},
            "outside the support is not known",
            "tail 'renormalize'",
        ),
        (
            {
                "modifiers": (Clip(),),
                "estimator": "policy_gradient",
                "tail": "ignore",
                "support": "union",
            },
            "stored at its own ids",
            "'sampled' or 'student'",
        ),
        ({"modifiers": (KeepEntropy(0.0),)}, "share = 0.0 is not in (0, 1]", "give share"),
        ({"modifiers": (Prune(drop=2.0),)}, "drop = 2.0 is not in (0, 1]", "give drop"),
        ({"modifiers": (Stepwise(tokens=0),)}, "tokens = 0 is not in [1, inf)", "give tokens"),
    ],
)
def test_an_error_has_value_rule_and_hint(
    change: dict[str, str | int], cause: str, hint: str
) -> None:
    with pytest.raises(ObjectiveError) as caught:
        replace(EQ5, **change)  # type: ignore[arg-type]
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_presets_are_those_of_their_papers() -> None:
    rows = {
        name: (o.support, o.divergence, o.tail, o.estimator, o.k)
        for name, o in ((name, preset.objective) for name, preset in ROW_PRESETS.items())
    }
    sampled = ("sampled", "reverse_kl", "ignore", "policy_gradient", 1)
    drawn = ("sampled_token", "lightning", "exopd", "vopd", "vopd_cached", "eopd", "reopold", "sod")
    assert rows == {
        **dict.fromkeys((*drawn, "fixed_advantage", "sft"), sampled),
        "minillm": ("student", "reverse_kl", "renormalize", "divergence", 16),
        "overlap": ("overlap", "reverse_kl", "renormalize", "divergence", 16),
        "opd": ("student", "reverse_kl", "renormalize", "divergence", 16),
        "opd_released": ("student", "reverse_kl", "ignore", "policy_gradient", 16),
        "teacher_topk": ("teacher", "reverse_kl", "renormalize", "divergence", 16),
        "forward_kl": ("teacher", "forward_kl", "bucket", "divergence", 64),
        "non_overlap": ("non_overlap", "reverse_kl", "renormalize", "divergence", 16),
        "union": ("union", "reverse_kl", "renormalize", "divergence", 16),
        "gkd": ("teacher", "jsd", "bucket", "divergence", 64),
        "full_vocab": ("teacher", "reverse_kl", "renormalize", "divergence", 65535),
        "veto": ("teacher", "reverse_kl", "renormalize", "divergence", 16),
        "prune_opd": ("student", "reverse_kl", "ignore", "policy_gradient", 16),
        "forward_kl_topk": ("teacher", "forward_kl", "ignore", "divergence", 16),
        "mixed_kl": ("teacher", "mixed_kl", "renormalize", "divergence", 16),
        "kd": ("teacher", "forward_kl", "renormalize", "divergence", 16),
        "skew_kl": ("teacher", "skew", "bucket", "divergence", 64),
        "skew_reverse_kl": ("teacher", "skew_reverse", "bucket", "divergence", 64),
        "alpha_divergence": ("teacher", "alpha", "bucket", "divergence", 64),
        "async_mc": ("mc", "reverse_kl", "ignore", "policy_gradient", 1),
        "rs_kd": ("teacher_mc", "forward_kl", "ignore", "divergence", 1),
    }
    assert {
        name: [m.name for m in preset.objective.modifiers]
        for name, preset in ROW_PRESETS.items()
        if preset.objective.modifiers
    } == {
        "exopd": ["extrapolate"],
        "vopd": ["baseline"],
        "vopd_cached": ["baseline"],
        "eopd": ["clip", "entropy_gate"],
        "veto": ["adaptive_target"],
        "reopold": ["floor", "keep_entropy"],
        "prune_opd": ["prune"],
        "sod": ["stepwise"],
        "async_mc": ["importance"],
        "minillm": ["return_to_go"],
        "fixed_advantage": ["fixed"],
        "sft": ["fixed", "ce"],
    }
    for name, preset in ROW_PRESETS.items():
        assert preset.name == name
        assert all((preset.source, preset.formula, preset.needs, preset.staleness))


def test_a_preset_is_found_by_name_and_k() -> None:
    assert parse_objective("opd") is PRESETS["opd"]
    assert parse_objective("opd", k=32).objective == replace(EQ5, k=32)
    assert parse_objective("opd", k=32).source == PRESETS["opd"].source
    with pytest.raises(ObjectiveError) as caught:
        parse_objective("opdx")
    assert "unknown objective 'opdx'" in caught.value.cause
    assert "the nearest is opd" in caught.value.hint
    assert "overlap, opd, opd_released" in caught.value.hint
    with pytest.raises(ObjectiveError, match="k = 8 with support 'sampled'"):
        parse_objective("lightning", k=8)


def test_fields_and_modifiers_follow_the_name() -> None:
    gkd = parse_objective("gkd(parameter=0.1, k=8)")
    assert (gkd.objective.parameter, gkd.objective.k) == (0.1, 8)
    assert gkd.name == "gkd(parameter=0.1,k=8)"
    assert gkd.source == PRESETS["gkd"].source
    capped = parse_objective("sampled_token + importance(cap=5) + keep_entropy").objective
    assert capped.modifiers == (Importance(5.0), KeepEntropy())
    assert parse_objective("reopold+floor(nats=-2)").objective.modifiers == (
        Floor(-2.0),
        KeepEntropy(0.5),
    ), "an existing modifier is replaced, at its place"
    assert parse_objective("opd_released(weights=teacher_p)").objective.weights == "teacher_p"
    assert parse_objective("opd(k=4)", k=8).objective.k == 8


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        (
            "teacher_topk(divergence=alpha,tail=bucket)",
            "sum [alpha q + (1 - alpha) p - q^alpha p^(1 - alpha)] / (alpha (1 - alpha)), "
            "alpha 0.5, on S = S(q) and a bucket",
        ),
        (
            "overlap(divergence=skew_reverse,parameter=0.2)",
            "KL(p~ || alpha p~ + (1 - alpha) q~), alpha 0.2, on S = S(p) & S(q)",
        ),
        ("forward_kl_topk(tail=zero)", "KL(q~ || p), on S = S(q), q~ is 0 elsewhere"),
        ("kd(temperature=4)", "T^2 KL(q~ || p~), on S = S(q), both at p^(1 / T), T = 4"),
        ("gkd(divergence=forward_kl,support=student)", "KL(q || p), on S = S(p) of the behaviour "),
        (
            "minillm(temperature=2)+ce",
            "T = 2  +  1 (-sg[R] log p(y), R of log q - log b over the later sampled ids)  +  0.1",
        ),
        ("veto(temperature=2)", "T = 2, with adaptive_target"),
    ],
)
def test_fields_that_change_a_formula_change_its_text(text: str, formula: str) -> None:
    preset = parse_objective(text)
    assert formula in preset.formula
    assert preset.note == ""
    bucket, student = preset.objective.tail == "bucket", preset.objective.support == "student"
    assert ("tail" in preset.needs) == (bucket and not student)
    assert ("student's stored ids" in preset.needs) == student


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("opd_released(support=union)", "support = union with objective 'opd_released'", "start"),
        ("forward_kl(temperature=2)", "temperature = 2.0 with tail 'bucket'", "'renormalize'"),
        ("opd(", "'opd(' is no NAME", "opd(k=32)"),
        ("opd(k=x)", "k = 'x' is not of type int", "give k such a value"),
        ("opd(q=1)", "unknown key 'q'", "k, parameter, weights"),
        ("opd+clop", "unknown modifier 'clop'", "the nearest is clip"),
        ("opd_released+clip(width=1)", "unknown key 'width'", "epsilon, dual"),
        ("opd_released+clip(epsilon=1)", "epsilon = 1.0 is not in (0, 1)", "give epsilon a value"),
        ("", "'' is no NAME", "write e.g."),
    ],
)
def test_syntax_errors_are_explained(text: str, cause: str, hint: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        parse_objective(text)
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_a_record_has_a_temperature_only_where_there_is_one() -> None:
    assert "temperature" not in parse_objective("opd").objective.record()
    assert parse_objective("kd(temperature=3)").objective.record()["temperature"] == 3


def test_a_record_distinguishes_two_objectives() -> None:
    one, other = (
        parse_objective(f"sampled_token+importance(cap={cap})").objective for cap in (2, 3)
    )
    assert one.record() != other.record()
    assert json.loads(json.dumps(one.record())) == one.record()
