"""Workers on real models: new rollouts appear, and students get new weights."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.commands.worker import watch_rollouts, watch_scores
from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import RolloutConfig, ScoreConfig
from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    ModelError,
    StoreError,
)
from logitcask.engine.models.identity import write_metadata
from logitcask.engine.packing.missing import check_planned
from logitcask.engine.store import open_store
from logitcask.engine.store.retention import delete
from logitcask.engine.types import ModelRef
from tests.engine.score.scored import ref
from tests.engine.tiny import make_model, save_folder

UNITS = 2


class Then(threading.Event):
    """A stop event: each wait runs the next action, and the wait after the last one stops."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        super().__init__()
        self.actions = list(actions)

    def wait(self, timeout: float | None = None) -> bool:
        if self.actions:
            self.actions.pop(0)()
        else:
            self.set()
        return self.is_set()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_folder(tmp_path / "student")
    save_folder(tmp_path / "teacher", make_model(seed=1))
    lines = [json.dumps({"id": f"p{n}", "prompt": f"{n} ="}) for n in range(2 * UNITS)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    return tmp_path


def rolls(
    here: Path, store: str = "s", name: str = "main", seed: int = 0, **work: object
) -> RolloutConfig:
    values = {
        "student": {"model": str(here / "student")},
        "prompts": {"file": here / "p.jsonl", "chat_template": False},
        "store": {"url": str(here / store), "rollouts": name},
        "rollout": {"n": 2, "max_new_tokens": 4, "student_topk": 4, "unit_prompts": 2},
        "work": {"worker": True, "worker_name": "w", **work},
        "run": {"device": "cpu", "seed": seed},
    }
    return validate(RolloutConfig, values, source="test")


def scores(
    here: Path, store: str = "s", model: str = "teacher", extra_ids: str = "", idle: float = 0.0
) -> ScoreConfig:
    values = {
        "teacher": {"model": str(here / model), "name": model},
        "store": {"url": str(here / store)},
        "score": {"teacher_topk_min": 4, "teacher_topk_max": 8, "extra_ids": extra_ids},
        "work": {"worker": True, "worker_name": "w", "idle_exit": idle},
        "run": {"device": "cpu"},
    }
    return validate(ScoreConfig, values, source="test")


def moved(here: Path, version: int, seed: int, root: ModelRef, metadata: bool = True) -> None:
    """Replace the weights in the student's folder as a save does, with the metadata last."""
    save_folder(here / "new", make_model(seed=seed))
    shutil.copyfile(here / "new/model.safetensors", here / "student/model.safetensors")
    if metadata:
        write_metadata(
            here / "student",
            base_weights=root.base_weights,
            parent=root.digest,
            version=version,
            pin=None,
            plan="",
            objective="",
        )


def test_a_waiting_teacher_stores_the_same_scores_as_a_later_one(here: Path) -> None:
    messages: list[str] = []
    counts: list[tuple[str, int, int]] = []
    root = ref(here / "student")

    def later_version() -> None:
        moved(here, 5, 7, root)
        watch_rollouts(rolls(here), stop=Then())

    stop = Then(
        lambda: None,
        lambda: run_rollout(rolls(here, name="other", seed=1)),
        lambda: None,
        lambda: run_rollout(rolls(here)),
        later_version,
    )
    report = watch_scores(
        scores(here),
        stop=stop,
        on_event=messages.append,
        progress=lambda *each: counts.append(each),
    )
    assert messages == [
        f"waiting for a store at {here / 's'}",
        f"waiting for rollouts named 'main' in {here / 's'}",
    ]
    assert list(dict.fromkeys(each[1:3] for each in counts)) == [
        (0, 2),
        (1, 2),
        (2, 2),
        (2, 4),
        (3, 4),
        (4, 4),
    ]
    assert (report.units, report.failed) == (2 * UNITS, 0)

    copy = here / "later"
    store = open_store(shutil.copytree(here / "s", copy))
    watched = {(s.unit_key, s.seg_id) for s in store.head().segments if s.base}
    delete(store, teacher="teacher")
    inline = run_score(scores(here, "later"))
    assert (inline.units_new, inline.positions) == (2 * UNITS, report.positions)
    assert {(s.unit_key, s.seg_id) for s in store.head().segments if s.base} == watched


def test_scores_at_another_models_ids_wait_for_those(here: Path) -> None:
    run_rollout(rolls(here))
    run_score(scores(here))
    store = open_store(here / "s")
    delete(store, segment=store.head().segments[-1].seg_id)
    begun: list[int] = []

    def the_rest() -> None:
        begun.append(len(store.head().scores("student")))
        run_score(scores(here))

    other = scores(here, model="student", extra_ids="teacher")
    assert watch_scores(other, stop=Then(the_rest)).units == UNITS
    assert begun == [1]


def test_a_teacher_stops_waiting_after_idle_exit(here: Path) -> None:
    job = scores(here, idle=1e-9)
    with pytest.raises(StoreError, match="is not a logitcask store"):
        watch_scores(job, stop=Then())
    open_store(here / "s", create=True)
    with pytest.raises(IncompleteError, match="no rollouts named 'main'"):
        watch_scores(job, stop=Then())
    assert watch_scores(scores(here), stop=Then()).units == 0


def test_a_request_about_all_rollouts_at_once_is_refused_in_a_worker(here: Path) -> None:
    config = scores(here)
    kind = {"teacher_kind": "context", "prompt_template": here / "hint.txt"}
    with pytest.raises(ConfigError, match="about all rollouts at once"):
        watch_scores(
            config.model_copy(update={"score": config.score.model_copy(update=kind)}), stop=Then()
        )


def test_a_student_with_new_weights_is_sampled_again(here: Path) -> None:
    root, messages = ref(here / "student"), list[str]()
    stop = Then(
        lambda: None,
        # New weights without new metadata: nothing to sample yet.
        lambda: moved(here, 5, 7, root, metadata=False),
        lambda: moved(here, 5, 7, root),
        lambda: None,
    )
    report = watch_rollouts(rolls(here), stop=stop, on_event=messages.append)
    assert report.units == 2 * UNITS
    assert messages == [f"student version 5 of {here / 'student'}"]
    segments = open_store(here / "s").head().rollouts("main")
    assert [s.unit["version"] for s in segments] == [0, 0, 5, 5]
    weights = {s.unit["version"]: s.provenance["student"]["weights"] for s in segments}
    assert weights == {0: root.digest, 5: ref(here / "student").digest}
    assert {s.provenance["student"]["base_weights"] for s in segments} == {root.digest}


def test_every_student_and_teacher_is_closed_once(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, opened, closed = ref(here / "student"), list[HF](), list[HF]()

    def opens(self: HF, *model: Any, **more: Any) -> None:
        begins(self, *model, **more)
        opened.append(self)
        if len(opened) == 2:
            moved(here, 6, 8, root)  # saved again while it was being read

    begins = HF.__init__
    monkeypatch.setattr(HF, "__init__", opens)
    monkeypatch.setattr(HF, "close", lambda self: closed.append(self), raising=False)
    stop = Then(lambda: moved(here, 5, 7, root), lambda: None, lambda: None)
    assert watch_rollouts(rolls(here), stop=stop).units == 2 * UNITS
    segments = open_store(here / "s").head().rollouts("main")
    assert [s.unit["version"] for s in segments] == [0, 0, 6, 6]
    assert len(opened) == 3
    assert closed == opened

    monkeypatch.setattr(HF, "capabilities", frozenset())
    with pytest.raises(ConfigError, match="the backend hf cannot give entropy"):
        watch_scores(scores(here), stop=Then())
    assert len(opened) == 4
    assert closed == opened


def test_a_backend_that_can_reload_stays_open(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, loads, closed, messages = ref(here / "student"), list[int](), list[HF](), list[str]()

    def reload(self: HF, model: ModelRef, on_event: Callable[[str], None]) -> None:
        loads.append(model.version)
        if model.version == 6:
            raise ModelError("no such model", hint="save it")
        self.model = HF(model).model
        on_event("loaded")

    monkeypatch.setattr(HF, "reload", reload, raising=False)
    monkeypatch.setattr(HF, "close", lambda self: closed.append(self), raising=False)
    stop = Then(lambda: moved(here, 5, 7, root), lambda: moved(here, 6, 8, root), lambda: None)
    # A folder that cannot be loaded may be in the middle of a save: it is opened at the next look.
    assert watch_rollouts(rolls(here), stop=stop, on_event=messages.append).units == 3 * UNITS
    assert loads == [5, 6]
    student = f"of {here / 'student'}"
    assert messages == ["loaded", f"student version 5 {student}", f"student version 6 {student}"]
    assert len(closed) == 2
    store = open_store(here / "s")
    segments = store.head().rollouts("main")
    assert [s.unit["version"] for s in segments] == [0, 0, 5, 5, 6, 6]
    run_rollout(rolls(here, "again"))
    again = open_store(here / "again")
    for ours, expected in zip(segments[4:], again.head().rollouts("main"), strict=True):
        found = store.read_rollouts(ours).b_lp
        np.testing.assert_array_equal(found, again.read_rollouts(expected).b_lp)


def test_another_model_in_the_folder_ends_the_worker(here: Path) -> None:
    root = ref(here / "student")
    stop = Then(lambda: moved(here, 5, 7, root, metadata=False), lambda: None)
    with pytest.raises(IdentityError, match="held version 0 of .* and now holds version 0 of"):
        watch_rollouts(rolls(here), stop=stop)
    assert len(open_store(here / "s").head().segments) == UNITS


def test_rollouts_wait_for_scores(here: Path) -> None:
    messages: list[str] = []
    stop = Then(lambda: None, lambda: run_score(scores(here)))
    report = watch_rollouts(rolls(here, max_unscored=1), stop=stop, on_event=messages.append)
    # Two unscored units are one more than allowed; after their scores no unit is missing.
    assert report.units == UNITS
    assert messages == ["2 units wait for scores, more than 1: none is begun"]

    root = ref(here / "student")
    moved(here, 5, 7, root)
    begun: list[int] = []

    def count() -> None:
        begun.append(len(open_store(here / "s").head().rollouts("main")))

    stop = Then(count, lambda: run_score(scores(here)))
    assert watch_rollouts(rolls(here, max_unscored=1), stop=stop).units == UNITS
    assert begun == [2 * UNITS]


def units_of(here: Path) -> list[tuple[int, int, int]]:
    """Return (version, first prompt, prompts) of each unit, in the order of the commits."""
    segments = open_store(here / "s").head().segments
    return [(s.version, s.unit["first"], s.unit["count"]) for s in segments]


def test_each_version_samples_the_next_prompts(here: Path) -> None:
    root, part = ref(here / "student"), {"prompts_per_version": 3}
    stop = Then(lambda: moved(here, 5, 7, root), lambda: moved(here, 6, 8, root))
    report = watch_rollouts(rolls(here, **part), stop=stop)
    # Of four prompts: 0 to 2, then 3, 0 and 1, then 2, 3 and 0, in units of two at most.
    parts = {0: {(0, 2), (2, 1)}, 5: {(3, 1), (0, 2)}, 6: {(2, 2), (0, 1)}}
    found = units_of(here)
    assert {(v, *unit) for v, units in parts.items() for unit in units} == set(found)
    assert report.units == len(found) == 6
    # Another worker finds nothing to do: the store has the prompts of this version.
    assert watch_rollouts(rolls(here, worker_name="x", **part), stop=Then()).units == 0
    provenance = open_store(here / "s").head().rollouts("main")[-1].provenance
    assert provenance["prompt_range"] == {"first": 2, "count": 3}
    assert provenance["set"]["units"] == 2
    with pytest.raises(ConfigError, match="prompts_per_version = 5: the file has 4 prompts"):
        watch_rollouts(rolls(here, prompts_per_version=5), stop=Then())


def test_a_later_version_ends_the_units_of_the_one_before(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, messages, generate = ref(here / "student"), list[str](), HF.generate

    def generates(self: HF, *arguments: Any, **keys: Any) -> Any:
        if not units:
            moved(here, 5, 7, root)
        units.append(keys["version"])
        return generate(self, *arguments, **keys)

    units: list[int] = []
    monkeypatch.setattr(HF, "generate", generates)
    whole = rolls(here, prompts_per_version=4)
    assert watch_rollouts(whole, stop=Then(), on_event=messages.append).units == 3
    assert units == [0, 5, 5], "the second unit of version 0 is left"
    assert messages == [f"student version 5 of {here / 'student'}"]
    segments = open_store(here / "s").head().rollouts("main")
    check_planned(open_store(here / "s"), segments, "main")
    with pytest.raises(IncompleteError, match="1 of 2 units of rollouts 'main' are missing"):
        check_planned(open_store(here / "s"), segments[:-1], "main")

    # By default each version is sampled whole, and only then the next one.
    units.clear()
    shutil.rmtree(here / "s")
    save_folder(here / "student")
    (here / "student/logitcask.json").unlink()
    assert watch_rollouts(rolls(here), stop=Then(lambda: None)).units == 4
    assert units == [0, 0, 5, 5]
