"""Sizes of the page are those of the log and of the objects."""

import io
import zipfile
from pathlib import Path

import pytest

from logitcask.engine.report.panels import Bars, Table
from logitcask.engine.report.sections import sizes
from logitcask.engine.report.sections.sizes import array_bytes, store_section
from logitcask.engine.store import Store
from logitcask.engine.store.inspect import list_segments, summary
from tests.engine.cached import make_store, make_unit
from tests.engine.report.made import facts_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    units = [make_unit(seed, version=seed) for seed in range(4)]
    return make_store(tmp_path_factory.mktemp("store") / "s", units, scored=3, seconds=[2.5] * 3)


def test_totals_are_those_of_store_info(store: Store) -> None:
    (totals, names, _, _, segments) = store_section([facts_of(store)]).panels
    info = summary(store)
    assert isinstance(totals, Table)
    found = dict(totals.rows)
    assert found["bytes"] == info["bytes"]
    assert found["response positions"] == info["positions"]
    assert found["responses"] == info["sequences"] == 24
    assert found["rollout segments without scores"] == info["unscored_segments"] == 1
    per = info["bytes_per_position"]
    assert found["bytes of scores per position"] == round(per["score"], 2)
    # S and E of the log: 4 ids of the student in each row, and the rest of the teacher's lists.
    scores = [each.counts for each in store.head().segments if each.kind == "score"]
    shared = sum(each["S"] for each in scores)
    assert shared == 4 * sum(each["P"] for each in scores)
    share = shared / (shared + sum(each["E"] for each in scores))
    assert found["share of the teacher's ids that are stored once with the student's"] == (
        f"{share:.1%}"
    )
    assert isinstance(names, Table)
    assert [row[:3] for row in names.rows] == [
        ("rollout", "main", 4),
        ("scores (teacher)", "big", 3),
    ]
    assert isinstance(segments, Table)
    listed = list_segments(store)[::-1]
    assert [row[0] for row in segments.rows] == [each["log"] for each in listed]
    assert [row[9] for row in segments.rows] == [each["bytes_per_position"] for each in listed]
    seconds = {row[2]: row[10] for row in segments.rows}
    assert seconds == {"rollout": None, "score": 2.5}


def test_arrays_have_all_bytes_of_the_objects(store: Store) -> None:
    snapshot = store.head()
    (_, _, arrays, position, _) = store_section([facts_of(store)]).panels
    assert isinstance(arrays, Bars)
    assert sum(bar.value for bar in arrays.bars) == pytest.approx(summary(store)["bytes"])
    (first, *_) = snapshot.rollouts("main")
    found = array_bytes(store, [first])
    with zipfile.ZipFile(io.BytesIO(store.read_object(first))) as archive:
        assert found["student_topk_ids"] == archive.getinfo("student_topk_ids/c/0").file_size
    assert sum(found.values()) == first.size
    assert isinstance(position, Bars)
    per = summary(store)["bytes_per_position"]
    for kind in ("rollout", "score"):
        of = [bar.value for bar in position.bars if bar.name.startswith(kind)]
        assert sum(of) == pytest.approx(per[kind])


def test_a_share_of_a_large_store_stands_for_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "MOST_SEGMENTS", 3)
    (_, _, arrays, _, segments) = store_section([facts_of(store)], most=1).panels
    assert isinstance(arrays, Bars)
    assert "Estimated from some" in arrays.how
    assert sum(bar.value for bar in arrays.bars) == pytest.approx(summary(store)["bytes"])
    assert isinstance(segments, Table)
    assert len(segments.rows) == 3
    assert "4 older ones are not shown" in segments.how


def test_a_damaged_object_is_named(store: Store, tmp_path: Path) -> None:
    broken = make_store(tmp_path / "s", [make_unit(0)])
    (which, _) = broken.head().segments
    file = tmp_path / "s" / which.path
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1])
    section = store_section([facts_of(broken), facts_of(None)])
    first, second = section.absent
    assert (first.title, second.title) == ("Store of run", "Bytes by array")
    assert first.why == "no store at st"
    assert which.seg_id in second.why
    assert [panel.id for panel in section.panels] == [
        "store-totals",
        "store-names",
        "store-segments",
    ]
