"""Only combinations with a meaning can be made, and every preset says where it comes from."""

from dataclasses import replace
from itertools import product

import pytest

from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives import PRESETS, Objective, find_preset
from logitcask.engine.objectives.divergences import DIVERGENCES
from logitcask.engine.objectives.objective import CELLS, FORMS, OUTSIDES
from logitcask.engine.objectives.row_objective import OUTSIDE
from logitcask.engine.objectives.supports import SUPPORTS

EQ5 = PRESETS["opd"].objective


def test_every_combination_is_a_cell_or_refused() -> None:
    made, refused = set(), set()
    for cell in product(SUPPORTS, DIVERGENCES, OUTSIDES, FORMS):
        support, divergence, outside, form = cell
        k = 1 if support == "sampled" else 4
        try:
            Objective(support=support, divergence=divergence, outside=outside, form=form, k=k)
            made.add(cell)
        except ObjectiveError:
            refused.add(cell)
    assert made == CELLS
    assert (len(made), len(refused)) == (16, 32)
    assert set(OUTSIDE) == set(OUTSIDES)


@pytest.mark.parametrize(
    ("change", "says", "way_out"),
    [
        ({"support": "parent"}, "unknown support 'parent'", "teacher, student, overlap, sampled"),
        ({"divergence": "kl"}, "unknown divergence 'kl'", "reverse_kl, forward_kl"),
        ({"outside": "drop"}, "unknown outside 'drop'", "renormalize, tail, ignore"),
        ({"form": "reward"}, "unknown form 'reward'", "divergence, advantage"),
        ({"support": ""}, "unknown support ''", "known:"),
        ({"support": "sampled", "k": 1}, "one id is no distribution", "form 'advantage'"),
        ({"outside": "ignore"}, "loss would fall", "'renormalize' or 'tail'"),
        ({"form": "advantage"}, "raw log-ratio", "outside 'ignore'"),
        (
            {"form": "advantage", "outside": "ignore", "divergence": "forward_kl"},
            "divergence 'forward_kl'",
            "'reverse_kl'",
        ),
        ({"k": 1}, "k = 1 with outside 'renormalize'", "--k 2 or more"),
        ({"k": 0, "outside": "tail"}, "k = 0 must be 1 or more", "--k 1 or more"),
        (
            {"support": "sampled", "form": "advantage", "outside": "ignore"},
            "k = 16 with support 'sampled'",
            "leave --k out",
        ),
    ],
)
def test_a_refusal_gives_value_rule_and_way_out(
    change: dict[str, str | int], says: str, way_out: str
) -> None:
    with pytest.raises(ObjectiveError) as caught:
        replace(EQ5, **change)  # type: ignore[arg-type]
    assert says in caught.value.cause
    assert way_out in caught.value.remedy


def test_presets_are_what_their_papers_say() -> None:
    rows = {
        name: (o.support, o.divergence, o.outside, o.form, o.k)
        for name, o in ((name, preset.objective) for name, preset in PRESETS.items())
    }
    sampled = ("sampled", "reverse_kl", "ignore", "advantage", 1)
    assert rows == {
        "overlap": ("overlap", "reverse_kl", "renormalize", "divergence", 16),
        "opd": ("student", "reverse_kl", "renormalize", "divergence", 16),
        "opd_released": ("student", "reverse_kl", "ignore", "advantage", 16),
        "teacher_topk": ("teacher", "reverse_kl", "renormalize", "divergence", 16),
        "forward_kl": ("teacher", "forward_kl", "tail", "divergence", 64),
        "sampled_token": sampled,
        "lightning": sampled,
    }
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert all((preset.source, preset.formula, preset.needs, preset.staleness))


def test_a_preset_is_found_by_name_and_k() -> None:
    assert find_preset("opd") is PRESETS["opd"]
    assert find_preset("opd", k=32).objective == replace(EQ5, k=32)
    assert find_preset("opd", k=32).source == PRESETS["opd"].source
    with pytest.raises(ObjectiveError) as caught:
        find_preset("odp")
    assert "unknown objective 'odp'" in caught.value.cause
    assert "overlap, opd, opd_released" in caught.value.remedy
    with pytest.raises(ObjectiveError, match="k = 8 with support 'sampled'"):
        find_preset("lightning", k=8)
