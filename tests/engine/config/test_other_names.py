"""Suggestions for unknown names: keys of ours, found by each name of another library."""

from logitcask.engine.config.parse.other_names import OTHER_NAMES, keys_named, suggest
from logitcask.engine.config.parse.toml import keys_of
from logitcask.engine.config.sections import RolloutConfig, RunConfig, ScoreConfig
from logitcask.engine.objectives import PRESETS
from logitcask.engine.objectives.parse import OTHER_NAMES as OF_OBJECTIVES
from logitcask.engine.objectives.parse import preset_hint


def test_every_other_name_leads_to_a_key_or_preset() -> None:
    keys = {key for kind in (RolloutConfig, RunConfig, ScoreConfig) for key in keys_of(kind)}
    assert OTHER_NAMES.keys() <= keys
    for key, others in OTHER_NAMES.items():
        assert others.split()
        assert key.rpartition(".")[2] not in others.split()
        assert all(key in keys_named(name.replace("_", "-")) for name in others.split())
    assert {preset for presets in OF_OBJECTIVES for preset in presets} <= PRESETS.keys()
    assert not {name for names in OF_OBJECTIVES.values() for name in names.split()} & PRESETS.keys()


def test_a_bad_match_is_no_suggestion() -> None:
    assert suggest("overlop", PRESETS) == "the nearest is overlap"
    assert suggest("zzz", PRESETS) == ""
    assert suggest("x", ["opd"], ["other"]) == ""
    assert suggest("x", ["opd", "gkd"], ["gkd", "other", "opd"]) == "x is gkd or opd here"


def test_objectives_are_found_by_the_fields_names() -> None:
    """Reverse KL has three presets: on the student's top-k, of the sampled id, of all ids."""
    assert preset_hint("reverse_kl").startswith("reverse_kl is opd or sampled_token or full_vocab")
    assert preset_hint("JSD").startswith("JSD is gkd here; known: overlap, opd,")
    assert preset_hint("Forward-KL").startswith("Forward-KL is forward_kl here;")
    assert preset_hint("zzz").startswith("known: overlap, opd,")
