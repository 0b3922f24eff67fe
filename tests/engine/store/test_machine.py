"""Any sequence of operations on a store, against a dictionary as model."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from obstore.store import MemoryStore

from logitcask.engine.errors import ConfigError, StoreError
from logitcask.engine.store import Store
from logitcask.engine.store.log import pending
from logitcask.engine.store.log.snapshot import Listed, Snapshot
from logitcask.engine.store.merge import merge
from logitcask.engine.store.retention import delete, gc, tag, untag
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on
from logitcask.engine.store.verify import verify
from tests.engine.store.made import commit_rollouts, commit_scores, encode_once, key, leave_pending

SEEDS = st.integers(0, 5)
NAMES = st.sampled_from(["a", "b"])
TAGS = st.sampled_from(["x", "y"])


class Machine(RuleBasedStateMachine):
    """A store in an object store in memory; `model` is its expected visible contents.

    Units are known by (name, seed) for rollouts and (teacher, name, seed) for their scores.
    """

    forks = Bundle("forks")

    @initialize()
    def begin(self) -> None:
        self.storage = ObjectStorage("memory://cask", MemoryStore())
        self.store = open_on(self.storage, create=True)
        self.model: dict[tuple[Any, ...], str] = {}
        self.snapshots: list[tuple[int, dict[tuple[Any, ...], str]]] = []
        """Snapshots that gc keeps, with their contents."""
        self.tags: dict[str, tuple[int, dict[tuple[Any, ...], str]]] = {}
        self.left: set[tuple[str, int]] = set()
        """Units of pending adds that dead writers left."""
        self.earlier = self.store.head()
        """The newest snapshot of an earlier step."""
        self.names: set[str] = set()
        """Names of rollouts that were ever in use."""

    def roll_into(self, store: Store, name: str, seed: int) -> str:
        return commit_rollouts(store, seed, key(name, seed), name=name, student=True).seg_id

    @rule(name=NAMES, seed=SEEDS)
    def roll(self, name: str, seed: int) -> None:
        before = self.store.head().number
        committed = self.roll_into(self.store, name, seed)
        self.names.add(name)
        self.left.discard((name, seed))
        assert self.model.setdefault((name, seed), committed) == committed
        self.take_left(before)

    @rule(name=NAMES, seed=SEEDS)
    def die_while_waiting(self, name: str, seed: int) -> None:
        """Leave the add of a dead writer, which the next writer publishes too."""
        if name in self.names and not {(name, seed)} & (self.model.keys() | self.left):
            unit_key = key(name, seed)
            leave_pending(self.store, seed, unit_key=unit_key, name=name, student=True)
            self.left.add((name, seed))

    def take_left(self, before: int) -> None:
        """Expect the units that dead writers left, where a segment was published since."""
        if any(segment.number > before for segment in self.store.head().segments):
            found = {s.unit_key: s.seg_id for s in self.store.head().segments}
            self.model |= {k: found[key(*k)] for k in self.left}
            self.left.clear()

    @rule(teacher=NAMES, name=NAMES, seed=SEEDS)
    def score(self, teacher: str, name: str, seed: int) -> None:
        if (name, seed) not in self.model:
            return
        base = next(s for s in self.store.head().rollouts(name) if s.unit_key == key(name, seed))
        unit = (teacher, name, seed)
        shared = {k for k in self.model if len(k) == 3 and k[0] == teacher and k[2] == seed}
        if shared - {unit}:
            return  # The same rollouts under another name: a teacher scores content, not names.
        before = self.store.head().number
        committed = commit_scores(self.store, base, seed, unit_key=key(*unit), name=teacher).seg_id
        assert self.model.setdefault(unit, committed) == committed
        self.take_left(before)

    @rule(name=NAMES)
    def delete_rollouts(self, name: str) -> None:
        mine = [k for k in self.model if len(k) == 2 and k[0] == name]
        if not mine:
            with pytest.raises(ConfigError):
                delete(self.store, rollouts=name)
            return
        delete(self.store, rollouts=name)
        left = {k[1] for k in self.model if len(k) == 2 and k not in mine}
        gone = {k[1] for k in mine} - left
        # Content with another visible name keeps its scores.
        for k in [k for k in self.model if k in mine or (len(k) == 3 and k[2] in gone)]:
            del self.model[k]

    @rule(teacher=NAMES)
    def delete_teacher(self, teacher: str) -> None:
        mine = [k for k in self.model if len(k) == 3 and k[0] == teacher]
        if mine:
            delete(self.store, teacher=teacher)
        for k in mine:
            del self.model[k]

    @rule(name=TAGS)
    def mark(self, name: str) -> None:
        snapshot = self.store.head()
        taken = name in self.tags and self.tags[name][0] != snapshot.number
        if snapshot.number < 0 or taken:
            with pytest.raises(StoreError):
                tag(self.store, name)
            return
        self.tags[name] = (tag(self.store, name), dict(self.model))

    @rule(name=TAGS)
    def unmark(self, name: str) -> None:
        if name in self.tags:
            untag(self.store, name)
            del self.tags[name]

    @rule()
    def take_a_snapshot(self) -> None:
        self.snapshots.append((self.store.head().number, dict(self.model)))

    @rule()
    def collect_and_keep_recent_snapshots(self) -> None:
        gc(self.store, keep_days=1, lease_hours=0)
        self.left.clear()

    @rule()
    def collect_all(self) -> None:
        self.snapshots.clear()
        gc(self.store, keep_days=0, lease_hours=0)
        self.left.clear()

    @rule()
    def reopen(self) -> None:
        self.store = open_on(self.storage)

    @rule(target=forks)
    def fork(self) -> tuple[Store, dict[tuple[Any, ...], str]]:
        other = open_on(ObjectStorage("memory://fork", MemoryStore()), create=True)
        merge(other, self.store)
        assert shown(other) == set(self.model.values())
        return other, dict(self.model)

    @rule(fork=forks, seed=SEEDS)
    def merge_back(self, fork: tuple[Store, dict[tuple[Any, ...], str]], seed: int) -> None:
        other, contents = fork
        contents[("a", seed)] = self.roll_into(other, "a", seed)
        before, number = set(self.model.values()), self.store.head().number
        merged = merge(self.store, other)
        # Units stay; new units of the other store come with their bases.
        assert before <= shown(self.store)
        self.names.add("a")
        self.left -= {k for k in self.left if k in contents}
        self.take_left(number)
        self.model |= {k: v for k, v in contents.items() if v in shown(self.store)}
        assert merged.added <= len(contents)
        assert ("a", seed) in self.model

    @invariant()
    def visible_contents_are_those_of_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        assert shown(self.store) == set(self.model.values())
        units = {s.unit_key for s in self.store.head().segments}
        assert units == {key(*k) for k in self.model}
        for number, model in [*self.snapshots, *self.tags.values()]:
            snapshot = self.store.snapshot(number)
            assert {s.unit_key for s in snapshot.segments} == {key(*k) for k in model}
            for segment in snapshot.segments:
                self.store.read_object(segment)

    @invariant()
    def every_snapshot_answers_from_its_segments(self) -> None:
        """Compare the newest one, which answers from what the log keeps, and an earlier one."""
        if not hasattr(self, "model"):
            return
        newest, earlier = self.store.head(), self.earlier
        for each in (newest, earlier):
            listed = Snapshot(number=each.number, sha256="", state=Listed(each.segments))
            assert each.unit_keys() == listed.unit_keys()
            for name in ("a", "b"):
                assert each.rollouts(name) == listed.rollouts(name)
                assert list(each.scores(name).items()) == list(listed.scores(name).items())
        changes = newest.changes(earlier)
        if changes is not None:
            left = [s for s in earlier.segments if s not in changes.deleted]
            assert (*left, *changes.added) == newest.segments
            assert set(changes.deleted) <= set(earlier.segments)
        if changes is None or newest.number % 3 == 0:
            self.earlier = newest

    def teardown(self) -> None:
        if hasattr(self, "store"):
            fresh = open_on(self.storage)
            verify(fresh)
            for number in range(-1, self.store.head().number + 1):
                assert self.store.snapshot(number).segments == fresh.snapshot(number).segments


def shown(store: Store) -> set[str]:
    return {s.seg_id for s in store.head().segments}


@pytest.mark.timeout(3600)
def test_any_sequence(monkeypatch: pytest.MonkeyPatch, counts: Any) -> None:
    encode_once(monkeypatch)
    monkeypatch.setattr(pending, "PATIENCE_S", 0.0)
    monkeypatch.setattr(pending, "_RANK_S", 0.0)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=counts(60, 500),
            stateful_step_count=counts(20, 50),
            deadline=None,
            derandomize=True,
        ),
    )
