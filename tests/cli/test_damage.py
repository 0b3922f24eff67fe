"""A damaged store: every command stops with the path of the file and a hint."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import ROLL, SCORE, TRAIN, World

FLIPS = 20


def all_files(store: Path) -> list[Path]:
    return sorted(f for f in store.rglob("*") if f.is_file())


def damage(file: Path, kind: str) -> None:
    data = file.read_bytes()
    if kind == "cut":
        file.write_bytes(data[:-1])
    elif kind == "gone":
        file.unlink()
    elif kind == "link":
        other = file.with_name("other")
        file.rename(other)
        file.symlink_to(other)
    else:
        file.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize("seed", range(FLIPS))
def test_verify_finds_a_flipped_bit(world: World, call: Any, seed: int) -> None:
    store = world.store()
    rng = random.Random(seed)
    # The first flips hit each kind of file; the others hit a random file.
    chosen = ["format.json", "log/*", "seg/rollout/*/*", "seg/score/*/*"]
    pattern = chosen[seed] if seed < len(chosen) else "**/*"
    file = rng.choice(sorted(f for f in world.at(store).glob(pattern) if f.is_file()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    call(f"store verify {store}").assert_error(4, str(file), "restore")


@pytest.mark.parametrize("kind", ["cut", "gone", "link", "flip"])
@pytest.mark.parametrize(
    ("pattern", "commands"),
    [
        ("format.json", ["store info", ROLL, SCORE, TRAIN]),
        ("log/0000000000.json", ["store ls", ROLL, SCORE, TRAIN]),
        ("seg/rollout/*/*.zip", ["store show", TRAIN]),
        ("seg/score/*/*.zip", ["store show", TRAIN]),
    ],
)
def test_every_command_that_reads_a_damaged_file_stops(
    world: World, call: Any, pattern: str, commands: list[str], kind: str
) -> None:
    store = world.store()
    damaged = sorted(world.at(store).glob(pattern))
    for file in damaged:
        damage(file, kind)
    for command in commands:
        if command == TRAIN:
            store += f" --out {world.new('out')}"
        result = call(f"{command} {store}")
        result.assert_error(4, "", "restore")
        assert any(str(file) in result.err for file in damaged), result.err


def test_verify_passes_a_sound_copy_and_counts_orphans(world: World, call: Any) -> None:
    store = world.store(6)
    (world.at(store) / "staging" / "left-over").touch()
    report = call(f"store verify {store} --format json").json
    assert report["segments"] == 6
    assert len(report["orphans"]) == 3, "two segments without a record, one file in staging"


def test_a_newer_format_version_is_an_error(world: World, call: Any) -> None:
    from logitcask.engine.store.log.lines import decode_sealed, encode_sealed

    store = world.store()
    file = world.at(store) / "format.json"
    body, _ = decode_sealed(file.read_bytes(), str(file))
    file.write_bytes(encode_sealed(body | {"version": 99}))
    call(f"store info {store}").assert_error(1, "format version 99", "upgrade")
