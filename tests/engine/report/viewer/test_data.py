"""The viewer shows the store's own numbers, the worst responses, and a note of what is left out."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitcask.engine.errors import ConfigError
from logitcask.engine.exchange import positions as stored_positions
from logitcask.engine.exchange.positions import positions
from logitcask.engine.models.identity import digest
from logitcask.engine.report.viewer.choose import choose, halves
from logitcask.engine.report.viewer.data import viewer_data
from logitcask.engine.report.viewer.rows import IN_STUDENT, IN_TEACHER, IS_SCORED, LOSS
from logitcask.engine.report.viewer.sources import Response, Source, load
from logitcask.engine.store import Store, open_store
from tests.engine.cached import make_graded_unit, make_store, make_unit
from tests.engine.report.viewer.unpack import positions_of, unpack


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(
        tmp_path_factory.mktemp("store") / "s", [make_graded_unit(seed) for seed in range(3)]
    )


def source(store: Store, **changes: object) -> Source:
    return replace(Source(name="run", store=store, snapshot=store.head()), **changes)


def test_numbers_are_those_of_the_store(store: Store) -> None:
    header, columns = unpack(viewer_data([source(store)]))
    shown = {(each["sequence"], each["position"]): each for each in positions_of(header, columns)}
    rows = list(positions(store, rollouts="main", teacher="big"))
    assert len(shown) == len(rows) > 50
    for row in rows:
        found = shown[row["sequence"], row["position"]]
        assert found["token"] == row["token"]
        assert bool(found["flags"] & LOSS) == row["loss_mask"]
        p, q = (
            dict(zip(row[f"{of}_ids"], row[f"{of}_logprobs"], strict=True))
            for of in ("student_topk", "teacher")
        )
        common = p.keys() & set(row["teacher_ids"][:4])
        by_hand = {
            "student_surprise": -row["student_logprob"],
            "teacher_surprise": -row["teacher_logprob"],
            "student_entropy": row["student_entropy"],
            "teacher_entropy": row["teacher_entropy"],
            "reverse_kl": row["reverse_kl"],
            "forward_kl": row["forward_kl"],
            "student_tail": math.exp(row["student_log_tail"]),
            "teacher_tail": math.exp(row["teacher_log_tail"]),
            "overlap_ratio": len(common) / 4,
            "overlap_mass_student": sum(math.exp(p[each]) for each in common),
            "overlap_mass_teacher": sum(math.exp(q[each]) for each in common),
            "coverage": sum(math.exp(p[each]) for each in p.keys() & q.keys()),
        }
        assert {name: found[name] for name in by_hand} == pytest.approx(by_hand, abs=6e-4)
        # The sampled token has numbers of its own; the lists have the others.
        p.pop(row["token"], None)
        assert found["student"] == pytest.approx(p, abs=3e-3)
        assert found["at_student"] == pytest.approx(
            [q.get(each, math.nan) for each in found["student"]], abs=3e-3, nan_ok=True
        )
        first = {each: q[each] for each in row["teacher_ids"][:8]}
        mass = np.cumsum([0, *np.exp(list(first.values()))])[:-1]
        own = [each for each, before in zip(first, mass, strict=True) if before < 0.99]
        assert list(found["own"]) == [x for x in own if x not in p and x != row["token"]]
        assert bool(found["flags"] & IN_STUDENT) == (row["token"] in row["student_topk_ids"])
        assert found["teacher_flags"] == IS_SCORED + IN_TEACHER * (row["token"] in q)


def test_the_worst_responses_are_always_shown(store: Store) -> None:
    """Show a few of 18: the worst by its mean KL, worked out from the rows, and a reward of 0."""
    means: dict[int, list[float]] = {}
    for row in positions(store, rollouts="main", teacher="big"):
        if row["loss_mask"] and row["reverse_kl"] is not None:
            means.setdefault(row["sequence"], []).append(row["reverse_kl"])
    worst = max(means, key=lambda each: np.mean(means[each]))
    data = viewer_data([source(store)], sequences=4)
    shown = unpack(data)[0]["sequences"]
    assert data["count"] == len(shown) == 4
    assert worst in [each["number"] for each in shown]
    assert 0 in [each["reward"] for each in shown]
    assert any("4 of 15 responses were chosen" in note for note in data["notes"])


def response(i: int, prompt: str, version: int = 0, kl: float | None = None) -> Response:
    return Response(
        part=0,
        start=i,
        end=i + 1,
        number=i,
        prompt=prompt,
        reward=None,
        finish="stop",
        versions=(version, version),
        mean_kl=kl,
    )


def test_prompts_are_spread_and_come_in_pairs_of_versions() -> None:
    assert halves(6) == [0, 4, 2, 1, 5, 3]
    found = [response(3 * i + version, f"p{i}", version) for i in range(64) for version in range(3)]
    chosen = [found[i] for i in choose(found, 8)]
    assert [(each.prompt, each.versions[0]) for each in chosen] == [
        (prompt, version) for prompt in ("p0", "p32", "p16", "p48") for version in (0, 2)
    ]
    assert sorted(choose(found, 1000)) == list(range(len(found)))


def test_a_part_of_the_segments_is_read_and_the_page_says_so(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [make_unit(seed, lengths=[8] * 6) for seed in range(9)])
    found = load(source(store), most=3 * 48)
    assert found is not None
    assert [each.number // 6 for each in found.responses[::6]] == [0, 4, 8]
    assert (found.read, found.positions) == (3 * 48, 9 * 48)


def test_a_large_segment_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read blocks of 10 rows of responses of 8: what is cut at the end of a block is left out."""
    monkeypatch.setattr(stored_positions, "ROWS", 10)
    store = make_store(tmp_path / "s", [make_unit(0, lengths=[8] * 6)])
    found = load(source(store), most=15)
    assert found is not None
    assert (found.read, [(each.start, each.end) for each in found.responses]) == (
        20,
        [(0, 8), (8, 16)],
    )
    long = make_store(tmp_path / "long", [make_unit(0, lengths=[30, 18, 0, 0, 0, 0])])
    found = load(source(long), most=15)
    assert found is not None
    assert [each.end for each in found.responses] == [30]


def test_fewer_responses_where_they_do_not_fit(tmp_path: Path) -> None:
    units = [make_unit(seed, lengths=[60] * 6, vocab=400, student_k=16) for seed in range(2)]
    store = make_store(tmp_path / "s", units)
    whole = viewer_data([source(store)])
    limit = len(whole["data"]) // 3
    less = viewer_data([source(store)], most_bytes=limit)
    assert whole["count"] == 12
    assert 1 <= less["count"] < 12
    assert len(less["data"]) <= limit
    assert f"{less['count']} of 12 chosen responses fit into the page" in less["notes"]
    assert unpack(less)[0]["cut"]["most"] < unpack(whole)[0]["cut"]["most"]


def test_two_teachers_and_two_runs_are_side_by_side(tmp_path: Path) -> None:
    units = [make_unit(seed, lengths=[4] * 6) for seed in range(2)]
    store = make_store(tmp_path / "a", units, scored=1)
    first, second = store.head().rollouts("main")
    other = make_unit(7, lengths=[4] * 6)
    store.commit_scores(
        replace(units[0].scores, lp=other.scores.lp),
        base=first,
        name="small",
        unit_key=digest("small"),
        unit=dict(first.unit),
        provenance={
            **dict(store.head().scores("big")[first.seg_id][0].provenance),
            "teacher": {"weights": digest("other")},
        },
    )
    again = make_store(tmp_path / "b", units[:1])
    header, columns = unpack(viewer_data([source(store), source(again, name="again")]))
    assert [each["name"] for each in header["teachers"]] == ["big", "small"]
    assert header["sources"] == ["run", "again"]
    # Segments without scores are read only where there are no others.
    assert [each["teachers"] for each in header["sequences"]] == [["big", "small"]] * 6 + [
        ["big"]
    ] * 6
    assert columns["1.teacher_surprise"].tolist() == pytest.approx(
        (-other.scores.lp[:24]).tolist(), abs=6e-4
    )
    assert not np.array_equal(columns["0.teacher_surprise"][:24], columns["1.teacher_surprise"])
    twice = viewer_data([source(store), source(store, name="same rollouts")])
    assert unpack(twice)[0]["sources"] == ["run"]
    assert second.seg_id != first.seg_id


def test_rollouts_without_scores_and_stores_without_rollouts(tmp_path: Path) -> None:
    bare = make_store(tmp_path / "bare", [make_unit(0, lengths=[4] * 6)], scored=0)
    header, columns = unpack(viewer_data([source(bare)]))
    assert {each["id"] for each in header["measures"]} == {"student_surprise", "student_entropy"}
    assert header["teachers"] == []
    assert len(columns["token"]) == 24
    empty = open_store(tmp_path / "empty", create=True)
    assert viewer_data([source(empty)]) is None
    with pytest.raises(ConfigError, match="--rollouts nothing: the store has main"):
        viewer_data([source(bare, rollouts="nothing", teachers=("big",))])


def test_another_version_of_the_prompt_follows_a_bad_response() -> None:
    found = [response(i, f"p{i // 3}", i % 3, kl=0.1) for i in range(30)]
    found[16] = response(16, "p5", 1, kl=3.0)
    chosen = choose(found, 4)
    assert chosen[1:3] == [16, 15]
