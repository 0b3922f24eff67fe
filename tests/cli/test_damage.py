"""A damaged store: no verb believes it, and each says which file and what to do."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ROLL, SCORE, TRAIN, World

FLIPS = 20


def files_of(store: Path) -> list[Path]:
    return sorted(f for f in store.rglob("*") if f.is_file())


def hurt(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "cut":
        file.write_bytes(data[:-1])
    elif how == "gone":
        file.unlink()
    elif how == "link":
        other = file.with_name("other")
        file.rename(other)
        file.symlink_to(other)
    else:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("seed", range(FLIPS))
def test_a_flipped_bit_is_found_and_named(world: World, call: Any, seed: int) -> None:
    store = world.store()
    rng = random.Random(seed)
    # The first flips hit each kind of file; the others fall where they fall.
    chosen = ["format.json", "log/*", "seg/rollout/*/*/zarr.json", "seg/score/*/*/c/*"]
    pattern = chosen[seed] if seed < len(chosen) else "**/*"
    file = rng.choice(sorted(f for f in world.at(store).glob(pattern) if f.is_file()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    call(f"store verify {store}").refused(4, str(file), "restore")


@pytest.mark.parametrize("how", ["cut", "gone", "link", "flip"])
@pytest.mark.parametrize(
    ("pattern", "commands"),
    [
        ("format.json", ["store info", ROLL, SCORE, TRAIN]),
        ("log/0000000000.json", ["store ls", ROLL, SCORE, TRAIN]),
        ("seg/rollout/*/s_ids/c/0", ["store show", TRAIN]),
        ("seg/score/*/ids/c/0", ["store show", TRAIN]),
    ],
)
def test_every_verb_that_reads_a_damaged_file_stops(
    world: World, call: Any, pattern: str, commands: list[str], how: str
) -> None:
    store = world.store()
    hurt_files = sorted(world.at(store).glob(pattern))
    for file in hurt_files:
        hurt(file, how)
    for command in commands:
        if command == TRAIN:
            store += f" --out {world.new('out')}"
        done = call(f"{command} {store}")
        done.refused(4, "", "restore")
        assert any(str(file) in done.err for file in hurt_files), done.err


def test_an_undamaged_copy_passes_and_strays_are_named(world: World, call: Any) -> None:
    store = world.store(6)
    (world.at(store) / "staging" / "left-over").mkdir()
    report = call(f"store verify {store} --format json").json
    assert report["segments"] == 6
    assert len(report["orphans"]) == 3, "two segments without a record, one folder in staging"


def test_a_store_of_a_newer_format_asks_for_an_upgrade(world: World, call: Any) -> None:
    from logitcask.engine.store.log.record import decode_record, encode_record

    store = world.store()
    file = world.at(store) / "format.json"
    body, _ = decode_record(file.read_bytes(), str(file))
    file.write_bytes(encode_record(body | {"version": 99}))
    call(f"store info {store}").refused(1, "format version 99", "upgrade")
