"""What a cache serves of each preset, in its words, and what it refuses."""

from dataclasses import replace

import pytest

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import (
    PRESETS,
    Facts,
    Objective,
    find_preset,
    verdict,
    warnings,
)

FACTS = Facts(
    student_k=16,
    k_min=16,
    k_max=64,
    at_student=True,
    versions=(0,),
    student_version=0,
    same_root=True,
    same_template=True,
)

LABELS = {
    "overlap": (
        "exact: every row holds the teacher's top-16",
        "live: the student's top-16 of today within the teacher's, which never leaves what was "
        "scored",
        "deterministic",
    ),
    "opd": (
        "exact: the teacher was asked at the student's ids",
        "frozen: the top-16 of the student that sampled (version 0); today's may differ, see "
        "cache/miss_mass",
        "deterministic",
    ),
    "opd_released": (
        "exact: the teacher was asked at the student's ids",
        "frozen: the top-16 of the student that sampled (version 0); today's may differ, see "
        "cache/miss_mass",
        "deterministic, though not the gradient of a divergence",
    ),
    "teacher_topk": (
        "exact: every row holds the teacher's top-16",
        "fixed: the teacher's top-16",
        "deterministic",
    ),
    "forward_kl": (
        "exact for both models coarsened to the first 64 kept ids and one bucket: a lower bound of "
        "KL",
        "fixed: the teacher's top-64",
        "deterministic",
    ),
    "sampled_token": (
        "exact: the teacher's log-prob of the sampled id",
        "fixed: the sampled id",
        "one draw per position, unbiased for KL(p || q) at age 0, off policy after the first "
        "update",
    ),
    "lightning": (
        "exact: the teacher's log-prob of the sampled id",
        "fixed: the sampled id",
        "one draw per position, unbiased for KL(p || q) at age 0, off policy after the first "
        "update",
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_labels_of_a_one_shot_store(name: str) -> None:
    given = verdict(PRESETS[name], FACTS)
    assert (given.scores, given.support, given.estimator) == LABELS[name]
    assert given.prefixes == "version 0"
    assert given.lines()[0] == f"scores: {LABELS[name][0]}"
    assert given.lines()[3] == "prefixes: version 0"


def test_a_bare_objective_has_the_labels_without_the_presets_note() -> None:
    preset = PRESETS["lightning"]
    assert "Teacher consistency" in verdict(preset, FACTS).notes[0]
    assert verdict(preset.objective, FACTS).notes == ()
    assert verdict(preset.objective, FACTS).estimator == verdict(preset, FACTS).estimator


@pytest.mark.parametrize(
    ("change", "estimator"),
    [
        ({"student_version": 7}, "biased: off policy (age 7) and not importance-weighted"),
        ({"versions": (2, 5), "student_version": 5}, "biased: off policy (age 3, 0)"),
        ({"same_root": False}, "biased: off policy (age unknown)"),
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
    facts = replace(FACTS, **change)  # type: ignore[arg-type]
    assert estimator in verdict(PRESETS["sampled_token"], facts).estimator
    # Deterministic forms do not care.
    assert verdict(PRESETS["teacher_topk"], facts).estimator == "deterministic"


def test_prefixes_say_whose_rollouts_they_are() -> None:
    mixed = replace(FACTS, versions=(3, 0, 8))
    assert verdict(PRESETS["overlap"], mixed).prefixes == "versions 0 to 8"
    foreign = replace(FACTS, same_root=False)
    assert verdict(PRESETS["overlap"], foreign).prefixes == "version 0 of another root"
    assert any("Foreign student" in note for note in verdict(PRESETS["overlap"], foreign).notes)
    loop = replace(FACTS, versions=())
    assert verdict(PRESETS["opd"], loop).prefixes == "of the student itself, renewed every round"
    other = replace(FACTS, same_template=False)
    assert any("chat template" in note for note in verdict(PRESETS["overlap"], other).notes)


@pytest.mark.parametrize("name", ["overlap", "teacher_topk"])
def test_a_k_beyond_what_every_row_keeps_is_refused(name: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        verdict(find_preset(name, k=32), FACTS)
    assert "k = 32 is more than k_min = 16" in caught.value.cause
    assert caught.value.remedy == "score again with --k-min 32, or train with --k 16"
    with pytest.raises(ObjectiveError) as caught:
        verdict(find_preset(name, k=100), FACTS)
    assert "--k-min 100 --k-max 100" in caught.value.remedy
    assert verdict(find_preset(name, k=32), replace(FACTS, k_min=32))


def test_an_advantage_on_the_teachers_ids_needs_them_too() -> None:
    objective = Objective(
        support="teacher", divergence="reverse_kl", outside="ignore", form="advantage", k=17
    )
    with pytest.raises(ObjectiveError, match="k = 17 is more than k_min = 16"):
        verdict(objective, FACTS)


def test_with_a_tail_fewer_kept_ids_are_fine() -> None:
    assert verdict(find_preset("forward_kl", k=500), FACTS)


@pytest.mark.parametrize("name", ["opd", "opd_released"])
def test_student_supports_are_refused_where_they_are_not_served(name: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        verdict(find_preset(name, k=17), FACTS)
    assert "k = 17 is more than student_k = 16" in caught.value.cause
    assert "--student-k 17" in caught.value.remedy
    assert "--k 16" in caught.value.remedy
    with pytest.raises(ObjectiveError) as caught:
        verdict(PRESETS[name], replace(FACTS, at_student=False))
    assert "not asked at the student's ids" in caught.value.cause
    assert "--objective overlap" in caught.value.remedy


@pytest.mark.parametrize("name", PRESETS)
def test_a_foreign_student_needs_a_word_for_a_frozen_support_only(name: str) -> None:
    foreign = replace(FACTS, same_root=False)
    if PRESETS[name].objective.support != "student":
        assert verdict(PRESETS[name], foreign)
        return
    with pytest.raises(ObjectiveError) as caught:
        verdict(PRESETS[name], foreign)
    assert "foreign student" in caught.value.cause
    assert "version 0 of another root" in caught.value.cause
    assert "--foreign-student" in caught.value.remedy
    allowed = verdict(PRESETS[name], replace(foreign, allow_foreign=True))
    assert any("Foreign student" in note for note in allowed.notes)


def test_whole_scores_serve_everything_else() -> None:
    whole = replace(FACTS, at_student=False)
    served = [name for name in PRESETS if name not in ("opd", "opd_released")]
    assert [verdict(PRESETS[name], whole).scores for name in served] == [
        LABELS[name][0] for name in served
    ]


@pytest.mark.parametrize(
    ("name", "metrics", "words"),
    [
        ("overlap", {"cache/coverage": 0.94, "cache/drift_k3": 9.0}, "cache/coverage = 0.940"),
        ("opd", {"cache/coverage": 0.5}, "cache/coverage = 0.500"),
        ("sampled_token", {"cache/drift_k3": 0.06}, "cache/drift_k3 = 0.060 nats"),
    ],
)
def test_a_moved_student_is_warned_of(name: str, metrics: dict[str, float], words: str) -> None:
    (line,) = warnings(PRESETS[name], metrics)
    assert words in line
    assert "score" in line


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("overlap", {"cache/coverage": 0.96, "cache/drift_k3": 9.0}),
        ("forward_kl", {"cache/coverage": 0.1, "cache/drift_k3": 9.0}),
        ("lightning", {"cache/coverage": 0.1, "cache/drift_k3": 0.04}),
        ("overlap", {}),
    ],
)
def test_what_an_objective_does_not_mind_is_not_warned_of(
    name: str, metrics: dict[str, float]
) -> None:
    assert warnings(PRESETS[name], metrics) == []
