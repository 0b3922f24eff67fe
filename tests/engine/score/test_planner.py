"""Plans from look to look, over random histories of a log, against plans from nothing."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import LogitcaskError
from logitcask.engine.rollout.plan import RolloutPlanner, Unscored, plan_rollouts
from logitcask.engine.score.planner import ScorePlanner, plan_scores
from logitcask.engine.score.unit import ScoreRequest, unit_key
from logitcask.engine.store import Segment, Snapshot
from logitcask.engine.store.format.entry import SegmentBody
from logitcask.engine.store.format.schema import EXTENSION, PARTIAL
from logitcask.engine.store.log.body import provenance_sha256
from logitcask.engine.store.log.fold import Fold
from logitcask.engine.store.log.record import Record
from logitcask.engine.store.log.snapshot import are_partial
from logitcask.engine.types import ModelRef, ScoreParams
from tests.engine.store.made import key

SMALL, LARGE = (ScoreParams(k_min=k, k_max=k) for k in (4, 8))
MODEL = ModelRef(
    name="big",
    path=Path("/none"),
    revision="",
    digest="sha256:big",
    tokenizer_digest="sha256:tokenizer",
    template_digest="sha256:template",
    n_vocab=50,
    stop_ids=(1,),
    version=0,
    base_weights="sha256:big",
)
SCORER = SimpleNamespace(
    capabilities=frozenset({"top", "at_ids", "entropy", "tail"}),
    describe=lambda: {"name": "made", "dtype": "float32"},
)
SET = {"digest": "sha256:set"}


class History:
    """A log that grows by random operations."""

    def __init__(self) -> None:
        self.log = Fold("made", "sha256:genesis")
        self.store: Any = SimpleNamespace(url="made", check_name=lambda *_, **__: None)

    def request(self, **fields: Any) -> ScoreRequest:
        fields = {"store": self.store, "model": MODEL, "scorer": SCORER, "params": LARGE} | fields
        return ScoreRequest(teacher_name="big", **fields)

    def roll(self, name: str, unit: int, content: int) -> None:
        """Commit a unit; two units may have the same content."""
        student = MODEL.provenance() | {"version": unit % 2}
        student |= {"template": f"sha256:{'odd' if unit == 3 else 'template'}"}
        self._add(
            kind="rollout",
            seg_id=f"{content:032x}",
            unit_key=key(name, unit),
            name=name,
            layout="student",
            counts={"N": 1, "P": 10, "M": 1},
            version=unit % 2,
            first=unit // 2,
            provenance={"set": SET, "student": student},
        )

    def score(self, teacher: str, content: int, how: str) -> None:
        """Commit scores by the key of the plan, or (elsewhere) by another one."""
        base = self.log.base(f"{content:032x}")
        if base is None:
            return
        before = self.log.score_segments(teacher, base.seg_id)
        params = SMALL if how == "small" else LARGE
        provenance = replace(self.request(), params=params).provenance()
        of_plan = unit_key(base, MODEL, params, provenance)
        partial = before[0].is_partial if before else how == "partial"
        layout = "dedup" + PARTIAL if partial else EXTENSION if before else "dedup"
        digest = key("scores", teacher, content, len(self.log))
        self._add(
            kind="score",
            seg_id=digest[7:39],
            unit_key=of_plan if how in ("small", "plan") else digest,
            name=teacher,
            base=base.seg_id,
            extends=before[-1].seg_id if before else "",
            layout=layout,
            counts={"N": 1, "P": 10} | ({"R": 6 if before else 4} if partial else {}),
            profile="default" if content else "compact",
            provenance=provenance | {"backend": {"dtype": f"float{32 if content else 16}"}},
        )

    def delete(self, place: int) -> None:
        """Delete a segment, the scores of rollouts, and the extensions of any of them."""
        visible = self.log.snapshot(len(self.log) - 1).segments
        if not visible:
            return
        gone = [visible[-1 - place % len(visible)]]
        for each in visible:
            under = [s.seg_id for s in gone if s.kind == "rollout" or s.name == each.name]
            if each not in gone and (each.base in under or each.extends in under):
                gone.append(each)
        self._fold(deletes=tuple(each.unit_key for each in gone))

    def tag(self) -> None:
        self._fold(tags={f"t{len(self.log)}": 0})

    def _add(self, *, provenance: dict[str, Any], **fields: Any) -> None:
        if self.log.winner(fields["unit_key"]) is None:
            new: dict[str, Any] = {
                "tokens_sha256": fields["base" if fields.get("base") else "seg_id"]
            }
            new |= {"profile": "default", "number": len(self.log)} | fields
            new["provenance_sha256"] = provenance_sha256(provenance)
            body = SegmentBody(unit={}, provenance=provenance)
            self._fold(adds=(Segment(source=body, **new),))

    def _fold(self, **content: Any) -> None:
        empty: dict[str, Any] = {"adds": (), "deletes": (), "removes": (), "tags": {}, "body": None}
        number = len(self.log)
        self.log.fold(Record(number=number, sha256=key(number), time="", **(empty | content)))


NAMES, HOW = ("main", "other"), ("plan", "small", "partial", "elsewhere")
CONTENTS = st.integers(0, 2)
OPERATIONS = st.one_of(
    st.tuples(st.just("roll"), st.sampled_from(NAMES), st.integers(0, 5), CONTENTS),
    st.tuples(st.just("score"), st.sampled_from(["big", "hints"]), CONTENTS, st.sampled_from(HOW)),
    st.tuples(st.just("delete"), st.integers(0, 3)),
    st.tuples(st.just("tag")),
)


def outcome(plan: Any, *arguments: Any, **keys: Any) -> Any:
    """Return a plan with its order, or the error of one."""
    try:
        found = plan(*arguments, **keys)
    except LogitcaskError as error:
        return type(error)
    if isinstance(found, dict):
        return list(found.items())
    return found.total, list(found.missing.items()), found.notes


def without_scores(request: ScoreRequest, snapshot: Snapshot) -> set[str]:
    """Return the seg_ids of rollouts without scores that answer the request."""
    chains, found = snapshot.scores("big"), set()
    for segment in snapshot.rollouts("main"):
        chain = chains.get(segment.seg_id, ())
        done = unit_key(segment, MODEL, LARGE, request.provenance()) in snapshot.unit_keys()
        large = any(each.provenance["request"] == LARGE.record() for each in chain)
        if not done and not (large and not are_partial(chain)):
            found.add(segment.seg_id)
    return found


def test_a_kept_plan_is_the_one_from_nothing(counts: Any) -> None:
    seen: list[int] = []

    @settings(max_examples=counts(150, 5000), deadline=None, derandomize=True)
    @given(st.lists(st.tuples(OPERATIONS, st.integers(0, 2)), min_size=8, max_size=24))
    def check(operations: list[tuple[Any, int]]) -> None:
        history = History()
        requests = [history.request(), history.request(params=SMALL)]
        requests += [history.request(extra_ids="hints")]
        planners = [ScorePlanner(each, growing=True) for each in requests]
        units = {key("main", n): {"first": n // 2, "count": 1, "version": 0} for n in range(6)}
        sampled: Any = SimpleNamespace(
            units=units, name="main", model=MODEL, versions=True, provenance={"set": SET}
        )
        rollout_planner, unscored = RolloutPlanner(sampled), Unscored("main")
        for (name, *arguments), planned in operations:
            getattr(history, name)(*arguments)
            if not planned:
                continue
            snapshot = history.log.snapshot(len(history.log) - 1)
            for request, planner in zip(requests, planners, strict=True):
                found = outcome(planner.plan, snapshot)
                assert found == outcome(plan_scores, request, snapshot, growing=True)
                seen.append(len(found[1]) if isinstance(found, tuple) else -1)
            missing = outcome(rollout_planner.plan, snapshot)
            assert missing == outcome(plan_rollouts, sampled, snapshot)
            assert [k for k, _ in missing] == [k for k in units if k not in snapshot.unit_keys()]
            scored = {each.base for each in snapshot.segments}
            waiting = [s for s in snapshot.rollouts("main") if s.seg_id not in scored]
            assert unscored.count(snapshot) == len(waiting)
            first = outcome(planners[0].plan, snapshot)
            if isinstance(first, tuple):
                left = {unit.segment.seg_id for _, unit in first[1]}
                assert left == without_scores(requests[0], snapshot)

    check()
    assert {-1, 0, 1, 2} <= set(seen)


def test_a_plan_makes_the_keys_of_new_rollouts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def counted(segment: Segment, *arguments: Any) -> str:
        keys.append(segment.seg_id)
        return unit_key(segment, *arguments)

    monkeypatch.setattr("logitcask.engine.score.planner.unit_key", counted)
    history, made = History(), list[int]()
    planner = ScorePlanner(history.request(), growing=True)
    steps = [("roll", "main", 6, 6), ("score", "big", 0, "plan"), ("tag",), ("delete", 1)]
    for unit in range(6):
        history.roll("main", unit, unit)
    for name, *arguments in [("tag",), *steps]:
        getattr(history, name)(*arguments)
        planner.plan(history.log.snapshot(len(history.log) - 1))
        made.append(len(keys))
        keys.clear()
    # All six, the new one, the one with new scores, none, and none for the deleted rollouts.
    assert made == [6, 1, 1, 0, 0]
