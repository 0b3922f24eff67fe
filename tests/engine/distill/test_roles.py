"""The roles of a loop: the same student as in one process, bounded ages, and kills."""

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import logitcask.engine.distill.follow_rows as follow_rows
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.distill.loop import distill
from logitcask.engine.distill.roles import Role, open_role, run_role, train_role
from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.events import EventHandler
from logitcask.engine.store import open_store
from logitcask.engine.store.log.claims import note_failure
from logitcask.engine.training.run import TrainReport
from logitcask.engine.types import Progress, no_progress
from logitcask.engine.workers.worker import Worker
from tests.engine.distill.small_loop import ROUNDS, TOML, UPDATES, configure, save_case
from tests.engine.store.made import key


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with student, teacher, prompts and d.toml; stores and runs are elsewhere."""
    path = save_case(tmp_path_factory.mktemp("models"))
    drawn = TOML.replace("overlap", "sampled_token").replace("loss_topk = 4", "")
    (path / "drawn.toml").write_text(drawn)
    return path


def units_of(into: Path) -> Counter[tuple[str, int, int]]:
    """Return (kind, round, first prompt) of each segment."""
    segments = open_store(into / "store").head().segments
    rounds = {s.seg_id: s.provenance["round"] for s in segments if s.kind == "rollout"}
    return Counter((s.kind, rounds[s.base or s.seg_id], s.unit["first"]) for s in segments)


def follow(
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    pause: Callable[[list[Worker[Any]]], None],
    roles: Sequence[Role] = ("score", "rollout"),
    on_event: EventHandler = lambda line: None,
    progress: Progress = no_progress,
) -> TrainReport:
    """Run the trainer in this thread; the other roles work in its pauses, as `pause` has them."""
    jobs = [open_role(config, role) for role in roles]
    workers = [Worker(job, config.work) for job in jobs]
    clock = SimpleNamespace(sleep=lambda _: pause(workers), monotonic=time.monotonic)
    monkeypatch.setattr(follow_rows, "time", clock)
    try:
        return train_role(config, progress=progress, on_event=on_event)
    finally:
        for job in jobs:
            job.close()


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("progress/seconds", "train/data_wait")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def one_each(workers: list[Worker[Any]]) -> None:
    for worker in workers:
        worker.do_one()


class Killed(Exception):
    pass


def test_without_age_the_roles_give_the_student_of_one_process(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = distill(configure(models, tmp_path / "inline"))
    config = configure(models, tmp_path / "roles")
    roles = follow(config, monkeypatch, one_each)
    outs = [tmp_path / name / "out" for name in ("inline", "roles")]
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
    stores = [open_store(tmp_path / name / "store") for name in ("inline", "roles")]
    segments = [Counter(s.unit_key for s in store.head().segments) for store in stores]
    assert segments[0] == segments[1], "one can go on where the other stopped"
    lines = [metrics(out) for out in outs]
    assert lines[0] == lines[1]
    assert (roles.updates, roles.version) == (inline.updates, inline.version)
    # Nothing is left for any role.
    assert (run_role(config, "rollout").units, run_role(config, "score").units) == (0, 0)
    assert train_role(config).resumed_at == ROUNDS * UPDATES


def test_roles_in_any_order_keep_the_bounds_and_do_every_unit_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = random.Random(0)

    def in_any_order(workers: list[Worker[Any]]) -> None:
        for worker in order.choices(workers, k=3):
            worker.do_one()

    config = configure(models, tmp_path / "a", "loop.max_age=4")
    follow(config, monkeypatch, in_any_order, ("score", "rollout", "rollout"))
    units = units_of(tmp_path / "a")
    # The second and the fourth round begin again at the first prompt.
    per_round = [2, 2, 2, 2]
    assert set(units.values()) == {1}
    assert [sum(r == n and kind == "rollout" for kind, r, _ in units) for n in range(ROUNDS)] == (
        per_round
    )
    assert sum(kind == "score" for kind, _, _ in units) == sum(per_round)
    ages = [line["cache/age"] for line in metrics(tmp_path / "a" / "out")][::UPDATES]
    assert max(ages) > 0, "the samplers ran ahead"
    assert max(ages) <= 4
    versions = {path.name for path in (tmp_path / "a" / "out" / "versions").iterdir()}
    assert versions == {"v4", "v6"}
    # The student follows from the store, also where its trainer dies on the way.
    shutil.copytree(tmp_path / "a" / "store", tmp_path / "b" / "store")
    (tmp_path / "b" / "out").mkdir()
    shutil.copy(tmp_path / "a" / "out" / "teacher.json", tmp_path / "b" / "out")
    again = configure(models, tmp_path / "b", "loop.max_age=4")

    def killed(stage: str, done: int, *_: Any) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        train_role(again, progress=killed)
    lines: list[str] = []
    assert train_role(again, on_event=lines.append).resumed_at == 4
    assert "prefixes: of a student at most 4 updates older, new in every round" in lines
    weights = [(tmp_path / n / "out" / "model.safetensors").read_bytes() for n in ("a", "b")]
    assert weights[0] == weights[1]


def test_units_beyond_the_drift_bound_are_sampled_again_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, into = random.Random(0), tmp_path / "a"
    bound = ["loop.max_age=4", "train.staleness_action=resample", "train.max_drift=0.0024"]
    config = configure(models, into, *bound, file="drawn.toml")

    def in_any_order(workers: list[Worker[Any]]) -> None:
        for worker in order.choices(workers, k=5):
            worker.do_one()

    events: list[str] = []

    def killed(line: str) -> None:
        if "sampled again" in line:
            events.append(line)
            if len(events) == 1:
                raise Killed

    with pytest.raises(Killed):  # after the deletion, before the new sample
        follow(config, monkeypatch, in_any_order, on_event=killed)
    follow(config, monkeypatch, in_any_order, on_event=killed)
    assert re.search(r"cache/approx_kl = \S+ nats is over --max-drift 0\.0024$", events[0])
    units = units_of(into)
    assert set(units.values()) == {1}
    assert len(units) == 4 * ROUNDS
    store = open_store(into / "store")
    store.head()
    deleted = [s for s in store.log.deleted_after(-1) if s.kind == "rollout"]
    assert len({s.unit_key for s in deleted}) == len(deleted), "no unit twice"
    ledger = [json.loads(line) for line in (into / "out/ledger.jsonl").read_text().splitlines()]
    resampled = [seg_id for line in ledger for seg_id in line.get("resampled", ())]
    assert sorted(resampled) == sorted(s.seg_id for s in deleted)
    lines = metrics(into / "out")
    assert sum(line["cache/resampled"] for line in lines) == len(deleted) > 1
    # Each deleted unit has another of the version that trained on it; others may be older.
    now = {s.unit_key: s for s in store.head().rollouts("main")}
    for segment in deleted:
        again = now[segment.unit_key]
        assert again.version == UPDATES * again.provenance["round"] > segment.version
    kept = [s for key, s in now.items() if key not in {s.unit_key for s in deleted}]
    assert any(s.version < UPDATES * s.provenance["round"] for s in kept)
    # Nothing is left for any role, and the student follows from the store.
    assert (run_role(config, "rollout").units, run_role(config, "score").units) == (0, 0)
    shutil.copytree(into / "store", tmp_path / "b" / "store")
    (tmp_path / "b" / "out").mkdir()
    shutil.copy(into / "out" / "teacher.json", tmp_path / "b" / "out")
    train_role(configure(models, tmp_path / "b", *bound, file="drawn.toml"))
    weights = [(tmp_path / n / "out" / "model.safetensors").read_bytes() for n in ("a", "b")]
    assert weights[0] == weights[1]


def test_a_trainer_tells_about_units_that_are_left_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(models, tmp_path)
    monkeypatch.setattr(follow_rows, "LONG_S", 0.0)
    events: list[str] = []

    def fail(workers: list[Worker[Any]]) -> None:
        if any("left out" in line for line in events):
            raise Killed
        storage = open_store(config.store.url).storage
        note_failure(storage, key("unit"), ZeroDivisionError("of a grader"), "a")

    with pytest.raises(Killed):
        follow(config, monkeypatch, fail, ("score",), on_event=events.append)
    found = [line for line in events if line.startswith("waiting for round 0: 0 of 2 units")]
    assert len(found) == 2, "again only where it differs"
    assert found[0].endswith("are sampled, 0 scored")
    assert f"1 units of the store failed too often and are left out: {key('unit')} " in found[1]
    assert "with ZeroDivisionError: of a grader; remove the cause, then: logitcask" in found[1]


@pytest.mark.parametrize(
    ("change", "run", "message"),
    [
        ("loop.max_age=1", train_role, "max_age = 1: a version is published every 2 updates"),
        ("loop.max_age=2", distill, "max_age = 2: one process samples with its newest student"),
        ("work.idle_exit=5", distill, "work.idle_exit = 5.0: distill does not take it"),
        ("run.overwrite=true", train_role, "with the role train: each start would lose the run"),
        ("lora.load_in_4bit=true", train_role, "weights in 4 bits are not published"),
    ],
    ids=["age below a round", "age in one process", "idle", "overwrite", "4 bits"],
)
def test_settings_that_a_role_cannot_serve_are_refused(
    models: Path, tmp_path: Path, change: str, run: Any, message: str
) -> None:
    changes = ["lora.r=2"] if "lora" in change else []
    with pytest.raises(ConfigError, match=message):
        run(configure(models, tmp_path, change, *changes))
    assert list(tmp_path.iterdir()) == []


def test_scores_of_another_teacher_are_refused(models: Path, tmp_path: Path) -> None:
    config = configure(models, tmp_path)
    open_role(config, "score").close()
    other = configure(models, tmp_path, f"teacher.model={models / 'student'}")
    with pytest.raises(IdentityError, match=r"out holds a run with teacher\.digest"):
        open_role(other, "score")
