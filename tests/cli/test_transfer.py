"""`store push`, `store pull`, and commands on a store of the Hub."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.conftest import ROLL, SCORE, TRAIN, UNITS, World
from tests.engine.store.hub_server import Hub, hub_server

URL = "hf://datasets/org/set"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as found:
        yield found


def test_train_from_the_hub_as_from_the_disk(world: World, call: Any, hub: Hub) -> None:
    pushed = call(f"store push @st {URL} --license mit --format json")
    assert pushed.code == 0, pushed.err
    assert (pushed.json["segments"], pushed.json["card"]) == (2 * UNITS, "written")
    here, there = world.new("run"), world.new("run")
    assert call(f"{TRAIN} @st --out {here}").code == 0
    trained = call(f"{TRAIN} {URL} --out {there}")
    assert trained.code == 0, trained.err
    weights = [(world.at(run) / "model.safetensors").read_bytes() for run in (here, there)]
    assert weights[0] == weights[1]
    copy = world.new("copy")
    pulled = call(f"store pull {URL} {copy} --format json")
    assert pulled.code == 0, pulled.err
    assert pulled.json["sha256"] == pushed.json["sha256"]
    assert call(f"store pull {URL} {copy} --format json").json["segments"] == 0
    same = [call(f"store info {place} --format json").json for place in ("@st", copy, URL)]
    assert same[0] == same[1] == same[2]
    backup = world.new("backup")
    assert call(f"store push {copy} {backup} --snapshot 3 --format json").json["newest"] == 3


def test_errors_of_transfers(world: World, call: Any, hub: Hub) -> None:
    call(f"store pull {URL} {world.new('x')}").assert_error(1, "no such dataset", "hf auth login")
    call(f"store push @st {URL} --license MIT!").assert_error(2, "license identifier", "cc-by-4.0")
    assert call(f"store push @st {URL}").code == 0
    for verb in (f"{ROLL} {URL}", f"{SCORE} {URL}"):
        call(verb).assert_error(1, "is only read", f"store pull {URL} FOLDER")
    for verb in (f"store tag {URL} x", f"store delete {URL} --teacher big"):
        call(verb).assert_error(1, "is only read", f"store pull {URL} FOLDER")
    usage = call(f"store pull @st {URL}"), call(f"store push @st {world.new('y')} --private")
    assert [each.code for each in usage] == [2, 2]
    assert "store push" in usage[0].err
    assert "hf://" in usage[1].err
