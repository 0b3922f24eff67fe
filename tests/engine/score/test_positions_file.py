"""Positions that a file lists: what it may hold, and the rows that are scored."""

import json
from pathlib import Path

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import ConfigError, PromptError
from logitcask.engine.packing.source import PackSource
from logitcask.engine.score.positions_file import PositionsFile, read_positions
from logitcask.engine.store import open_store
from logitcask.engine.store.verify import verify
from logitcask.engine.types import ModelRef
from tests.engine.score.scored import run


def write(file: Path, *lines: object) -> Path:
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return file


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"prompt": "a", "positions": [1], "positions": [2]}',
        [1],
        {"prompt": 1, "positions": [0]},
        {"prompt": "a", "positions": []},
        {"prompt": "a", "positions": [0, 0]},
        {"prompt": "a", "positions": [True]},
        {"prompt": "a", "positions": [-1]},
        {"prompt": "a", "positions": [2**40]},
        {"prompt": "a", "response": None, "positions": [0]},
        {"prompt": "a", "position": [0]},
        {"prompt": "b", "response": 0, "positions": [3]},
    ],
)
def test_an_invalid_line_is_refused_with_its_number(tmp_path: Path, line: object) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "b", "positions": [0]}, line)
    with pytest.raises(PromptError, match=r"p\.jsonl, line 2"):
        read_positions(file)


def test_files_without_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lists no position"):
        read_positions(write(tmp_path / "p.jsonl", ""))
    with pytest.raises(PromptError):
        read_positions(tmp_path / "none.jsonl")


def test_the_content_names_a_file(tmp_path: Path) -> None:
    one, two = (
        {"prompt": "a", "positions": [4, 1]},
        {"prompt": "a", "response": 1, "positions": [0]},
    )
    first = read_positions(write(tmp_path / "a.jsonl", one, two))
    again = read_positions(write(tmp_path / "b.jsonl", two, one | {"response": 0}))
    other = read_positions(write(tmp_path / "c.jsonl", one))
    assert first.name == again.name != other.name
    assert first.listed == {("a", 0): (1, 4), ("a", 1): (0,)}


def test_the_listed_rows_are_scored_and_the_others_later(
    store: Path, teacher: ModelRef, scorer: HF
) -> None:
    opened = open_store(store)
    segments = opened.head().rollouts("main")
    units = [opened.read_rollouts(each) for each in segments]
    assert len(units) > 1, "a unit is without a listed row"
    chosen = units[0]
    prompt = chosen.prompts[chosen.seq_prompt[-1]].id
    of_prompt = np.flatnonzero(chosen.seq_prompt == chosen.seq_prompt[-1])
    length = int(chosen.lengths()[of_prompt[-1]])
    listed = PositionsFile(listed={(prompt, len(of_prompt) - 1): (0, length - 1)})
    run(store, teacher, scorer, positions=listed.name, positions_file=listed)
    scores = open_store(store).head().scores("big")
    start = int(chosen.seq_off[of_prompt[-1]])
    for segment, unit in zip(segments, units, strict=True):
        scored = open_store(store).read_scores(scores[segment.seg_id]).scored
        expected = np.zeros(unit.positions, bool)
        if unit is chosen:
            expected[[start, start + length - 1]] = True
        assert (scored == expected).all()
    source = PackSource(open_store(store), open_store(store).head(), "main", "big")
    plan = source.plan(seed=0, epochs=1, pack_length=512)
    assert sum(len(source.pack(plan.pack(i)).targets) for i in range(len(plan))) == 2
    run(store, teacher, scorer)
    whole = open_store(store)
    assert all(
        whole.read_scores(chain).scored is None or whole.read_scores(chain).scored.all()
        for chain in whole.head().scores("big").values()
    )
    assert verify(whole, deep=True).decoded


def test_what_the_rollouts_lack_is_refused(store: Path, teacher: ModelRef, scorer: HF) -> None:
    opened = open_store(store)
    unit = opened.read_rollouts(opened.head().rollouts("main")[0])
    prompt = unit.prompts[0].id
    n = int((unit.seq_prompt == 0).sum())
    for key, positions, cause in (
        ((prompt, 0), (10_000,), "position 10000, and the response has"),
        ((prompt, n), (0,), f"there are {n} responses"),
    ):
        listed = PositionsFile(listed={key: positions})
        with pytest.raises(ConfigError, match=cause):
            run(store, teacher, scorer, positions=listed.name, positions_file=listed)
    with pytest.raises(ConfigError, match=r"1 of its prompts are not in the rollouts, .*'zz'"):
        PositionsFile(listed={("zz", 0): (0,)}).check_prompts([prompt])
