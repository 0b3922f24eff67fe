"""Exactness of each preset on a cache, and combinations that a cache cannot serve."""

import math
from dataclasses import replace

import pytest
import torch

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import (
    PRESETS,
    Bounds,
    CacheInfo,
    Objective,
    check_exactness,
    exceeded,
    parse_objective,
    row_objective,
    served,
    warnings,
)
from logitcask.engine.objectives.bounds import bounded_metric, rows_to_skip
from logitcask.engine.objectives.exactness import Served
from logitcask.engine.objectives.presets import ROW_PRESETS
from logitcask.kernels.sparse_kl import sparse_kl_reference
from tests.engine.objectives.full_rows import make_full, run

CACHE = CacheInfo(
    student_k=16,
    k_min=16,
    k_max=64,
    at_student=True,
    versions=(0,),
    student_version=0,
    same_base_weights=True,
    same_template=True,
    n_vocab=151_669,
    mc_draws=8,
    at_mc=True,
    base=True,
)
SAMPLED = replace(CACHE, q_draws=50)
"""Scores of sampled ids."""


def cache_for(name: str) -> CacheInfo:
    if name == "full_vocab":
        return replace(CACHE, n_vocab=16)
    return SAMPLED if name == "rs_kd" else CACHE


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_exactness_of_every_preset(name: str) -> None:
    exact = ("overlap", "teacher_topk", "full_vocab", "veto", "mixed_kl", "kd", "sft")
    coarse = ("forward_kl", "gkd", "skew_kl", "skew_reverse_kl", "alpha_divergence")
    kinds = {
        **dict.fromkeys(exact, Served.EXACT),
        **dict.fromkeys(coarse, Served.COARSENED),
        "forward_kl_topk": Served.CUT,
        **dict.fromkeys(("union", "non_overlap"), Served.UNCACHED),
        **dict.fromkeys(("opd", "opd_released", "prune_opd"), Served.FROZEN),
        **dict.fromkeys(("async_mc", "rs_kd"), Served.ANY_AGE),
        "fixed_advantage": Served.CONTROL,
        "reopold": Served.FLOOR,
    }
    kind = served(PRESETS[name].objective)
    assert kind is kinds.get(name, Served.ON_POLICY)
    new = check_exactness(PRESETS[name], cache_for(name))
    old = check_exactness(PRESETS[name], replace(cache_for(name), student_version=9))
    assert ("coarsened" in new.scores) == (kind is Served.COARSENED)
    assert ("cut to its top-16" in new.scores) == (kind is Served.CUT)
    assert ("at temperature 2" in new.scores) == (name == "kd")
    assert ("left out" in new.support) == (kind is Served.UNCACHED)
    assert new.support.startswith("frozen") == (PRESETS[name].objective.support == "student")
    assert ("by the floor" in new.estimator) == (kind is Served.FLOOR)
    assert ("unbiased" in new.estimator) == (kind in (Served.ON_POLICY, Served.ANY_AGE))
    assert ("unbiased" in old.estimator) == (kind is Served.ANY_AGE)
    deterministic = PRESETS[name].objective.support not in ("sampled", "mc", "teacher_mc")
    assert new.estimator.startswith("deterministic") == deterministic


def test_lines_of_a_report() -> None:
    assert check_exactness(PRESETS["opd"], CACHE).lines() == [
        "scores: exact: the teacher scored the student's ids",
        "support: frozen: the top-16 of the behaviour policy (version 0); the current one may "
        "differ, see cache/uncached_mass",
        "estimator: deterministic",
        "prefixes: version 0",
    ]


def test_a_bare_objective_has_the_labels_without_the_presets_note() -> None:
    preset = PRESETS["lightning"]
    assert "Teacher consistency" in check_exactness(preset, CACHE).notes[0]
    assert check_exactness(preset.objective, CACHE).notes == ()
    assert (
        check_exactness(preset.objective, CACHE).estimator
        == check_exactness(preset, CACHE).estimator
    )


@pytest.mark.parametrize(
    ("change", "estimator"),
    [
        ({"student_version": 7}, "biased: off policy (age 7) and not importance-weighted"),
        ({"versions": (2, 5), "student_version": 5}, "biased: off policy (age 3, 0)"),
        ({"same_base_weights": False}, "biased: off policy (age unknown)"),
        (
            {"plain_sampling": False},
            "biased: off policy (age 0, from a tempered or truncated distribution)",
        ),
        ({"versions": ()}, "off policy after the first update of a round"),
    ],
)
def test_a_sampled_token_is_unbiased_on_policy_only(
    change: dict[str, object], estimator: str
) -> None:
    cache = replace(CACHE, **change)  # type: ignore[arg-type]
    assert estimator in check_exactness(PRESETS["sampled_token"], cache).estimator
    # Deterministic estimators do not change.
    assert check_exactness(PRESETS["teacher_topk"], cache).estimator == "deterministic"


def test_prefixes_name_the_versions_of_the_rollouts() -> None:
    mixed = replace(CACHE, versions=(3, 0, 8))
    assert check_exactness(PRESETS["overlap"], mixed).prefixes == "versions 0 to 8"
    off_lineage = replace(CACHE, same_base_weights=False)
    assert (
        check_exactness(PRESETS["overlap"], off_lineage).prefixes
        == "version 0 of other base weights"
    )
    assert any(
        "Off-lineage student" in note
        for note in check_exactness(PRESETS["overlap"], off_lineage).notes
    )
    loop = replace(CACHE, versions=())
    assert (
        check_exactness(PRESETS["opd"], loop).prefixes
        == "of the current student, new in every round"
    )
    other = replace(CACHE, same_template=False)
    assert any("chat template" in note for note in check_exactness(PRESETS["overlap"], other).notes)


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_a_teacher_of_returned_topk_alone_is_labelled(name: str) -> None:
    cache = replace(cache_for(name), entropy_bounds=True)
    interval = check_exactness(PRESETS[name], cache)
    plain = check_exactness(PRESETS[name], cache_for(name))
    (note,) = set(interval.notes) - set(plain.notes)
    assert "its entropy is an interval" in note
    assert "resolved to 1e-06" in note
    added = interval.scores.removeprefix(plain.scores)
    assert (interval.support, interval.estimator) == (plain.support, plain.estimator)
    tail = PRESETS[name].objective.tail == "bucket"
    assert ("the bucket is resolved to 1e-06" in added) == tail
    assert ("its term in the loss to 0.004" in added) == (name == "alpha_divergence")
    assert ("the gate opens where the lower end" in added) == (name == "eopd")
    assert ("which affects only the variance" in added) == (name == "vopd_cached")
    assert bool(added) == (tail or name in ("eopd", "vopd_cached"))


@pytest.mark.parametrize("name", ["overlap", "teacher_topk", "forward_kl_topk"])
def test_a_k_above_the_kept_ids_of_every_row_is_refused(name: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(parse_objective(name, k=32), CACHE)
    assert "k = 32 is more than k_min = 16" in caught.value.cause
    assert (
        caught.value.hint == "score again with --teacher-topk-min 32, or train with --loss-topk 16"
    )
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(parse_objective(name, k=100), CACHE)
    assert "--teacher-topk-min 100 --teacher-topk-max 100" in caught.value.hint
    assert check_exactness(parse_objective(name, k=32), replace(CACHE, k_min=32))


def test_an_advantage_on_the_teachers_ids_needs_them_too() -> None:
    objective = Objective(
        support="teacher", divergence="reverse_kl", tail="ignore", estimator="policy_gradient", k=17
    )
    with pytest.raises(ObjectiveError, match="k = 17 is more than k_min = 16"):
        check_exactness(objective, CACHE)


def test_with_a_tail_fewer_kept_ids_are_fine() -> None:
    assert check_exactness(parse_objective("forward_kl", k=500), CACHE)


@pytest.mark.parametrize("name", ["opd", "opd_released", "prune_opd"])
def test_student_supports_are_refused_if_the_cache_lacks_them(name: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(parse_objective(name, k=17), CACHE)
    assert "k = 17 is more than student_k = 16" in caught.value.cause
    assert "--student-topk 17" in caught.value.hint
    assert "--loss-topk 16" in caught.value.hint
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(PRESETS[name], replace(CACHE, at_student=False))
    assert "lack the teacher's log-probs at the student's ids" in caught.value.cause
    assert "--objective overlap" in caught.value.hint


@pytest.mark.parametrize("name", ROW_PRESETS)
def test_an_off_lineage_student_needs_permission_for_a_frozen_support_only(name: str) -> None:
    off_lineage = replace(CACHE, same_base_weights=False)
    if PRESETS[name].objective.support != "student":
        assert check_exactness(PRESETS[name], replace(cache_for(name), same_base_weights=False))
        return
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(PRESETS[name], off_lineage)
    assert "off-lineage student" in caught.value.cause
    assert "version 0 of other base weights" in caught.value.cause
    assert "--allow-off-lineage" in caught.value.hint
    allowed = check_exactness(PRESETS[name], replace(off_lineage, allow_off_lineage=True))
    assert any("Off-lineage student" in note for note in allowed.notes)


def test_whole_scores_serve_everything_else() -> None:
    served = [name for name, preset in ROW_PRESETS.items() if preset.objective.support != "student"]
    assert len(served) == len(ROW_PRESETS) - 4
    for name in served:
        whole = replace(cache_for(name), at_student=False)
        scores = check_exactness(PRESETS[name], whole).scores
        assert scores.startswith("not read" if name in ("fixed_advantage", "sft") else "exact")


@pytest.mark.parametrize(
    ("name", "change", "cause", "hint"),
    [
        ("rs_kd", {}, "the teacher's top ids", "--selection sampled"),
        ("opd", {"q_draws": 50}, "50 ids drawn from the teacher", "--objective rs_kd"),
        ("async_mc", {"mc_draws": 0}, "are not in these rollouts", "--mc-draws 16"),
        ("async_mc", {"at_mc": False}, "have no score", "--extra-ids mc"),
        ("exopd", {"base": False}, "needs scores of a base model", "--base"),
        ("full_vocab", {}, "the whole vocabulary, 151669 ids", "--objective gkd"),
        ("union", {"k_min": 8}, "k = 16 is more than k_min = 8", "--loss-topk 8"),
        ("non_overlap", {"k_min": 8}, "k = 16 is more than k_min = 8", "--teacher-topk-min 16"),
    ],
)
def test_an_objective_that_a_cache_cannot_serve_is_refused_with_a_hint(
    name: str, change: dict[str, object], cause: str, hint: str
) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_exactness(PRESETS[name], replace(CACHE, **change))  # type: ignore[arg-type]
    assert cause in caught.value.cause
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "change", "estimator"),
    [
        ("sampled_token+importance", {"student_version": 7}, "importance-weighted: unbiased"),
        (
            "sampled_token+importance",
            {"plain_sampling": False},
            "biased: off policy (age 0, from a tempered or truncated distribution) and "
            "importance-weighted",
        ),
        ("async_mc", {"plain_sampling": False, "student_version": 9}, "unbiased for KL(p || q)"),
    ],
)
def test_importance_removes_the_bias_of_untruncated_sampling_only(
    name: str, change: dict[str, object], estimator: str
) -> None:
    cache = replace(CACHE, **change)  # type: ignore[arg-type]
    assert estimator in check_exactness(parse_objective(name), cache).estimator


@pytest.mark.parametrize(
    ("name", "metric", "good", "bad"),
    [
        ("opd", "cache/coverage", 0.81, 0.79),
        ("union", "cache/coverage", 0.81, 0.79),
        ("sampled_token", "cache/approx_kl", 0.19, 0.21),
        ("vopd", "cache/approx_kl", 0.19, 0.21),
    ],
)
def test_a_bound_skips_rows_or_stops_a_run(name: str, metric: str, good: float, bad: float) -> None:
    objective = PRESETS[name].objective
    rows = {metric: torch.tensor([good, bad, math.nan])}
    skip = rows_to_skip(objective, rows, Bounds(action="skip"))
    assert skip is not None
    assert skip.tolist() == [False, True, False]
    assert rows_to_skip(objective, rows, Bounds(action="stop")) is None
    assert rows_to_skip(objective, rows, Bounds()) is None
    assert exceeded(objective, {metric: good}, Bounds(action="stop")) is None
    assert f"{metric} = {bad:.3f}" in (
        exceeded(objective, {metric: bad}, Bounds(action="stop")) or ""
    )
    assert exceeded(objective, {metric: bad}, Bounds(action="skip")) is None


@pytest.mark.parametrize("name", ["teacher_topk", "forward_kl", "gkd", "rs_kd", "async_mc", "veto"])
def test_an_objective_that_is_exact_at_any_age_has_no_bound(name: str) -> None:
    objective = PRESETS[name].objective
    assert bounded_metric(objective) is None
    assert (
        exceeded(objective, {"cache/coverage": 0.0, "cache/approx_kl": 9.0}, Bounds(action="stop"))
        is None
    )


def test_skipped_rows_have_no_loss_and_no_gradient_and_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    live, old = torch.randn(2, 40, 30, generator=generator, dtype=torch.float64) * 2
    full = make_full(live, old, old=old, student_k=4, kept=4)
    objective = parse_objective("opd", k=4).objective
    plain = run(objective, full)
    bounds = Bounds(action="skip", min_coverage=0.15)
    objective_fn = row_objective(objective, full.targets, bounds=bounds)
    ours, dz = sparse_kl_reference(full.live, full.targets.ids, objective_fn, k=16)
    skip = plain[0].metrics["cache/coverage"] < 0.15
    assert 5 < skip.sum() < 35
    assert torch.equal(ours.metrics["cache/skipped_share"], skip.double())
    assert ours.row_loss[skip].abs().max() == dz[skip].abs().max() == 0.0
    assert torch.equal(dz[~skip], plain[1][~skip])
    assert torch.equal(ours.row_loss[~skip], plain[0].row_loss[~skip])


@pytest.mark.parametrize(
    ("name", "metrics", "words"),
    [
        ("overlap", {"cache/coverage": 0.94, "cache/approx_kl": 9.0}, "cache/coverage = 0.940"),
        ("opd", {"cache/coverage": 0.5}, "cache/coverage = 0.500"),
        ("sampled_token", {"cache/approx_kl": 0.06}, "cache/approx_kl = 0.060 nats"),
        ("teacher_topk", {"cache/skipped_share": 0.25}, "cache/skipped_share = 0.250"),
    ],
)
def test_drift_of_the_student_gives_a_warning(
    name: str, metrics: dict[str, float], words: str
) -> None:
    (line,) = warnings(PRESETS[name].objective, metrics)
    assert words in line
    assert "score" in line


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("overlap", {"cache/coverage": 0.96, "cache/approx_kl": 9.0}),
        ("forward_kl", {"cache/coverage": 0.1, "cache/approx_kl": 9.0}),
        ("lightning", {"cache/coverage": 0.1, "cache/approx_kl": 0.04}),
        ("overlap", {}),
    ],
)
def test_metrics_that_do_not_affect_an_objective_give_no_warning(
    name: str, metrics: dict[str, float]
) -> None:
    assert warnings(PRESETS[name].objective, metrics) == []


def test_a_report_names_the_coverage_and_refuses_what_needs_all_positions() -> None:
    info = replace(CACHE, scored="30 % of the positions")
    report = check_exactness(parse_objective("overlap"), info)
    assert "note: The cache serves 30 % of the positions: the others have" in str(report.lines())
    for name in ("overlap+stepwise", "overlap+prune", "full_vocab+return_to_go"):
        objective = replace(parse_objective(name).objective, k=4)
        check_exactness(objective, CACHE)
        with pytest.raises(ObjectiveError, match="the teacher has scored 30 % of the positions"):
            check_exactness(objective, info)
