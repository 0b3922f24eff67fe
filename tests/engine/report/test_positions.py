"""Panels by position hold the means of the probe; what cannot be measured is said."""

from pathlib import Path

import pytest

from logitcask.engine.probes.positions import position_report
from logitcask.engine.report.panels import Heat, Lines
from logitcask.engine.report.sections.positions import LEAST_ROWS, positions_section
from logitcask.engine.report.sections.stored import names_of, stored_rows
from logitcask.engine.store import Store
from tests.engine.cached import make_store, make_unit
from tests.engine.report.made import facts_of

LENGTHS = [6, 6, 5, 2] * 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Make four units of versions 0 to 3, of which the last has no scores."""
    units = [
        make_unit(version, version=version, prompts=12, lengths=LENGTHS) for version in range(4)
    ]
    return make_store(tmp_path_factory.mktemp("store") / "s", units, scored=3)


def test_lines_and_maps_are_those_of_the_probe(store: Store) -> None:
    section = positions_section([facts_of(store)])
    assert not section.absent
    panels = {panel.id: panel for panel in section.panels}
    probe = position_report(store, stored_rows(facts_of(store)).snapshot, bins=6)
    entropy = panels["positions-entropy"]
    assert isinstance(entropy, Lines)
    for series in entropy.series:
        assert series.x == (0, 1, 2, 3, 4, 5)
        assert series.y == tuple(each.means[series.of] for each in probe.ranges)
    responses = panels["positions-responses"]
    assert isinstance(responses, Lines)
    # Three scored units, each with LENGTHS.
    counts = [3 * sum(length > at for length in LENGTHS) for at in range(6)]
    assert responses.series[0].y == tuple(counts) == (72, 72, 54, 54, 54, 36)
    heat = panels["positions-map-kl-reverse_bound"]
    assert isinstance(heat, Heat)
    assert (heat.ys, heat.xs) == (("0", "1", "2"), ("0", "1", "2", "3", "4", "5"))
    for version, row in zip(range(3), heat.values, strict=True):
        ranges = probe.versions[version]
        probed = [e.means["kl/reverse_bound"] if e.rows >= LEAST_ROWS else None for e in ranges]
        assert list(row) == probed
        # 12 responses of each version have a sixth token.
        assert (row[0] is None, row[5] is None) == (False, True)


def test_some_segments_are_chosen_evenly(store: Store) -> None:
    found = stored_rows(facts_of(store), most=2 * sum(LENGTHS))
    versions = [s.version for s in found.snapshot.segments if s.kind == "rollout"]
    assert (found.segments, found.segments_scored) == (2, 3)
    assert "2 of 3 scored segments" in found.note
    assert len(versions) == 2
    section = positions_section([facts_of(store)], most=2 * sum(LENGTHS))
    (entropy, *_, heat) = section.panels
    assert isinstance(heat, Heat)
    assert heat.ys == ("0", "2")
    assert found.note in entropy.how


def test_runs_of_the_same_rows_are_one_line(store: Store) -> None:
    run = facts_of(store, Path("b"), record={"rollouts": "main", "teacher": "big"})
    other = facts_of(store, Path("c"), record={"rollouts": "main", "teacher": "small"})
    section = positions_section([facts_of(store), run, other])
    entropy = section.panels[0]
    assert isinstance(entropy, Lines)
    assert {series.run for series in entropy.series} == {0}
    (absent,) = section.absent
    assert absent.title == "Positions of c"
    assert "no scores of rollouts 'main' by small" in absent.why


def test_a_run_without_a_store_says_so() -> None:
    section = positions_section([facts_of(None)])
    assert not section.panels
    assert "no store at st" in section.absent[0].why


def test_few_responses_do_not_stand_for_the_end(tmp_path: Path) -> None:
    """Take two responses of 40 tokens among 48: the end would rest on both alone."""
    unit = make_unit(0, prompts=24, lengths=[40] * 2 + [10] * 46)
    store = make_store(tmp_path / "s", [unit])
    probe = position_report(store, store.head(), bins=4)
    assert [each.rows for each in probe.ranges] == [480, 20, 20, 20]
    assert "at the end" in probe.reading
    kl = positions_section([facts_of(store)]).panels[1]
    assert isinstance(kl, Lines)
    assert kl.series[0].x[-1] < 10
    assert "Too few positions to compare the beginning with the end" in kl.how


def test_names_of_a_loop_and_of_a_mixture() -> None:
    assert names_of({"rollouts": "main", "teacher": "sha256:0", "teacher_name": "big"}) == (
        "main",
        ("big",),
    )
    assert names_of({"rollouts": "r", "teacher": "a=1,b=2"}) == ("r", ("a", "b"))
    assert names_of({}) == ("", ())


def test_a_store_of_several_names_says_which_were_measured(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [make_unit(0, prompts=12, lengths=LENGTHS)])
    (rollouts, scores) = store.head().segments
    store.commit_scores(
        make_unit(0, prompts=12, lengths=LENGTHS).scores,
        base=rollouts,
        name="other",
        unit_key="sha256:" + "0" * 64,
        unit=dict(scores.unit),
        provenance=dict(scores.provenance),
    )
    entropy = positions_section([facts_of(store)]).panels[0]
    assert "Rollouts 'main' with scores of 'big', of several." in entropy.how
    run = facts_of(store, record={"rollouts": "main", "teacher": "other"})
    assert "of several" not in positions_section([run]).panels[0].how


def test_of_a_large_segment_the_first_blocks_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "s", [make_unit(0, prompts=24, lengths=[4] * 48)])
    whole = position_report(store, store.head(), bins=4)
    for module in ("exchange.positions", "report.sections.positions"):
        monkeypatch.setattr(f"logitcask.engine.{module}.ROWS", 48)
    panels = positions_section([facts_of(store)], most=40).panels
    responses = panels[-1]
    assert isinstance(responses, Lines)
    # At least 2 * 40 of 192 rows, so two blocks of 48.
    assert responses.series[0].y == (24, 24, 24, 24)
    assert "Of each segment its first 96 positions." in responses.how
    again = position_report(store, store.head(), bins=4)
    assert again.ranges == whole.ranges, "blocks change nothing"


def test_a_store_of_few_tokens_has_no_lines(tmp_path: Path) -> None:
    """Take two responses of 4 tokens: each range has fewer tokens than a mean needs."""
    section = positions_section([facts_of(make_store(tmp_path / "s", [make_unit(0, prompts=1)]))])
    kl = section.panels[1]
    assert isinstance(kl, Lines)
    assert {y for series in kl.series for y in series.y} <= {None}
    assert "Too few positions to compare the beginning with the end" in kl.how
