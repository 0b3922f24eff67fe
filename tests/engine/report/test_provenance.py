"""Tables of what was run: settings that differ from the defaults, and keys that differ in runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from logitcask.engine.config.sections import RunConfig, TrainConfig
from logitcask.engine.report.panels import Section, Table
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.provenance import defaults_of, plain, provenance
from tests.engine.cached import make_store, make_unit
from tests.engine.report.made import facts_of

DIGEST = "sha256:" + "0123456789abcdef" * 4


def run_of(name: str, **train: Any) -> RunFacts:
    config = TrainConfig.model_validate(
        {"student": {"model": "m"}, "store": {"url": "st"}, "train": train}
    )
    record = {
        "config": config.model_dump(mode="json"),
        "objective": {"k": 8, "form": "divergence", "modifiers": []},
        "preset": "opd",
        "plan": f"{DIGEST}{name}",
        "student": {"weights": DIGEST, "version": 3},
        "exactness": {"scores": "exact", "notes": ["a note"]},
    }
    return replace(facts_of(None, Path(name), record=record), store_missing="gone")


def table(section: Section, name: str) -> dict[str, tuple[Any, ...]]:
    (found,) = (each for each in section.panels if each.id == f"provenance-{name}")
    assert isinstance(found, Table)
    return {str(row[0]): row[1:] for row in found.rows}


def test_one_run_in_words():
    section = provenance([run_of("a", learning_rate=2e-3, adam_beta2=0.999)])
    items = table(section, "run")
    assert items["student"] == ("m, version 3, sha256:0123456789ab...",)
    assert items["loss"][0].startswith("KL(p~ || q~) on S = S(p)")
    assert items["fields"] == ("k 8, estimator divergence",)
    assert (items["scores"], items["note"]) == (("exact",), ("a note",))
    assert items["result"] == ("not saved yet",)
    # adam_beta2 has the default.
    settings = table(section, "settings")
    assert settings == {
        "student.model": ("m", "must be given"),
        "store.url": ("st", "must be given"),
        "train.learning_rate": ("0.002", "1e-06"),
    }
    assert table(section, "digests")["student.weights"] == (DIGEST,)
    assert [(each.title, each.why) for each in section.absent] == [
        ("Contents of the store", "gone")
    ]


def test_only_what_differs_is_compared():
    runs = [run_of("a"), run_of("b", learning_rate=2e-3), run_of("c", objective="sft")]
    found = table(provenance(runs), "differences")
    assert found == {
        "train.learning_rate": ("1e-06", "0.002", "1e-06"),
        "train.objective": ("overlap", "overlap", "sft"),
    }


def test_the_names_of_a_store(tmp_path: Path):
    store = make_store(tmp_path / "st", [make_unit(0), make_unit(1)])
    found = table(provenance([facts_of(store)]), "stored")
    positions = sum(s.rows for s in store.head().rollouts("main"))
    assert found["rollouts"][0] == "main"
    assert found["rollouts"][4:] == (2.0, float(positions))


def test_every_default_is_found_and_equals_its_json():
    kinds = {"train": TrainConfig, "loop": RunConfig}
    for section, kind in kinds.items():
        assert defaults_of(kind, section)
    whole = TrainConfig.model_validate({"student": {"model": "m"}, "store": {"url": "st"}})
    for section, values in whole.model_dump(mode="json").items():
        defaults = defaults_of(TrainConfig, section)
        changed = [key for key in defaults if plain(defaults[key]) != plain(values[key])]
        assert not changed, section
    assert defaults_of(TrainConfig, "of an older version") == {}
