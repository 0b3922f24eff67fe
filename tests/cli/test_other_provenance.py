"""Segments of other writers: sound, with another provenance than ours. No command may fail on it
other than by an error that names segment and key.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.store import open_store
from logitcask.engine.store.format.entry import sha256
from logitcask.engine.store.log.body import provenance_sha256
from logitcask.engine.store.log.lines import decode_sealed
from logitcask.engine.store.log.record import split
from tests.cli.conftest import ROLL, SCORE, TRAIN, World
from tests.engine.store.made import forged


def rewritten(world: World, change: Callable[[dict[str, Any]], None]) -> str:
    """Return a store whose records have a provenance changed by `change`, and right digests."""
    name = world.store()
    prev = decode_sealed((world.at(name) / "format.json").read_bytes(), "")[1]

    def changed(head: dict[str, Any], body: dict[str, Any]) -> None:
        head["prev"] = prev
        for short, add in zip(head["adds"], body["adds"], strict=True):
            change(add["provenance"])
            short["provenance_sha256"] = provenance_sha256(add["provenance"])

    for file in sorted(world.at(name).glob("log/*.json")):
        file.write_bytes(forged(file.read_bytes(), changed))
        prev = sha256(split(file.read_bytes(), "")[0])
    return name


def paths_of(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all keys of objects inside an object."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += [(*path, key), *paths_of(inner, (*path, key))]
    return found


@pytest.fixture(scope="module")
def paths(world: World) -> list[tuple[str, ...]]:
    segments = open_store(world.at("@st")).head().segments
    return sorted({path for each in segments for path in paths_of(dict(each.provenance))})


def test_every_command_on_a_provenance_of_another_writer(
    world: World, call: Any, paths: list[tuple[str, ...]], counts: Callable[[int, int], int]
) -> None:
    """Remove a key, or replace its value, of all segments, and run every verb that reads them."""
    rng = random.Random(0)
    # First those that the stages rely on.
    ours = [path for path in paths if path[-1] in ("units", "student", "request", "n_vocab", "set")]
    for number in range(counts(8, 200)):
        *parents, last = ours[number] if number < len(ours) else rng.choice(paths)
        value = rng.choice([None, 5, "x", [5], {}, "remove"])

        def change(
            provenance: dict[str, Any], parents: Any = parents, last: str = last, value: Any = value
        ) -> None:
            for key in parents:
                provenance = provenance.get(key, {})
            if last in provenance:
                provenance[last] = value
                if value == "remove":
                    del provenance[last]

        store = rewritten(world, change)
        sound = call(f"store verify {store} --deep").code == 0
        assert sound or last == "n_vocab", "ids beyond the vocabulary are damage"
        for command in ("store ls", "store info", "store show", ROLL, SCORE, TRAIN):
            result = call(
                f"{command} {store}" + (f" --out {world.new('out')}" if command == TRAIN else "")
            )
            shown = (parents, last, value, command, result.err[-1000:])
            assert result.code in range(4 if sound else 5), shown
            assert "Traceback" not in result.err, shown
            if sound and command.startswith("store"):
                assert result.code == 0, shown


def test_rollouts_without_a_number_of_units_need_partial(world: World, call: Any) -> None:
    def change(provenance: dict[str, Any]) -> None:
        provenance.get("set", {}).pop("units", None)

    store = rewritten(world, change)
    train = f"{TRAIN} {store} --out {world.new('out')}"
    call(train).assert_error(3, "do not record how many units", "--partial")
    assert call(f"{train} --partial").code == 0


def test_a_missing_key_is_named_with_its_segment(world: World, call: Any) -> None:
    store = rewritten(world, lambda provenance: provenance.get("set", {}).pop("student_topk", None))
    segment = next(Path(world.at(store)).glob("seg/rollout/*/*.zip")).stem
    result = call(f"{TRAIN} {store} --out {world.new('out')}")
    result.assert_error(1, "records no 'student_topk'", "engine/store/README.md")
    assert segment in result.err or "of rollout 'main'" in result.err
