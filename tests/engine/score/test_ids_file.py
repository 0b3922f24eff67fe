"""A file of ids: what is read of it is what it says, and what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import PromptError
from logitcask.engine.score.ids_file import MAX_IDS, read_ids_file
from logitcask.engine.store.format.rollouts import Extent

V = 1100


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(ids: Any, prompt: Any = "a", sample: Any = 0) -> dict[str, Any]:
    return {"prompt": prompt, "sample": sample, "ids": ids}


def extent(prompts: dict[str, list[int]]) -> Extent:
    """Of prompts and the lengths of their responses."""
    return Extent(
        prompt_ids=tuple(prompts),
        prompt=np.ones(len(prompts), np.int64),
        seq_prompt=np.repeat(np.arange(len(prompts)), [len(each) for each in prompts.values()]),
        response=np.asarray([n for each in prompts.values() for n in each], np.int64),
    )


ROWS = st.lists(st.lists(st.integers(0, V - 1), unique=True, max_size=5), max_size=4)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(sequences=st.lists(ROWS, min_size=1, max_size=6), data=st.data())
def test_lists_come_in_the_order_of_the_rollouts(
    sequences: list[list[list[int]]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two samples of a prompt in a segment, and lines in any order."""
    keys = [(f"p{i // 2}", i % 2) for i in range(len(sequences))]
    lines = [line(s, *key) for s, key in zip(sequences, keys, strict=True)]
    file = written(tmp_path_factory.mktemp("given") / "ids", *data.draw(st.permutations(lines)))
    prompts: dict[str, list[int]] = {}
    for (prompt, _), rows in zip(keys, sequences, strict=True):
        prompts.setdefault(prompt, []).append(len(rows))
    found = read_ids_file(file, V).lists({"s": extent(prompts)})["s"]
    rows = [row for sequence in sequences for row in sequence]
    assert found.cnt.tolist() == [len(row) for row in rows]
    assert found.ids.tolist() == [token for row in rows for token in row]


def test_samples_of_a_prompt_are_counted_on_from_one_segment_to_the_next(tmp_path: Path) -> None:
    file = written(tmp_path / "ids", line([[5]], sample=1), line([[3], [4]]))
    found = read_ids_file(file, V).lists(
        {"first": extent({"a": [2]}), "second": extent({"a": [1]})}
    )
    assert {name: lists.ids.tolist() for name, lists in found.items()} == {
        "first": [3, 4],
        "second": [5],
    }


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    one, two, other = (
        read_ids_file(written(tmp_path / name, line([[token]])), V).label
        for name, token in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two != other
    assert one.startswith("ids:sha256:")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (line([[V]]), f'field "ids\\[0\\]": {V} is no id in \\[0, {V}\\)'),
        (line([[], [-1]]), 'field "ids\\[1\\]": -1 is no id'),
        (line([[True]]), "True is no id"),
        (line([[1.0]]), "1.0 is no id"),
        (line([[7, 8, 7]]), "7 is there twice"),
        (line([list(range(MAX_IDS + 1))]), "1025 ids, at most 1024"),
        (line([3]), 'field "ids\\[0\\]": 3 is a number, not a list'),
        (line({}), 'field "ids": {} is an object, not a list'),
        (line([], sample=-1), 'field "sample": -1'),
        (line([], sample=True), 'field "sample": True'),
        (line([], prompt=4), 'field "prompt": 4 is a number'),
        ({"prompt": "a", "ids": []}, 'field "sample" is missing'),
        (line([]) | {"idz": 1}, 'field "idz" is not known'),
        ([], "a list, not an object"),
        (line([], prompt="first"), "'first' is already in line 1"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path: Path, bad: Any, words: str) -> None:
    file = written(tmp_path / "ids", line([], prompt="first"), bad)
    with pytest.raises(PromptError, match=f"ids, line 2: .*{words}"):
        read_ids_file(file, V)


def test_the_most_ids_of_a_position_are_read(tmp_path: Path) -> None:
    found = read_ids_file(written(tmp_path / "ids", line([list(range(MAX_IDS))])), V)
    assert found.sequences["a", 0].cnt.tolist() == [MAX_IDS]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"a": [2]}, "line 1: field \"ids\": 1 lists, and sample 0 of prompt 'a' has 2 tokens"),
        ({"a": [1, 1]}, "no line for sample 1 of prompt 'a'"),
        ({"b": [1]}, "no line for sample 0 of prompt 'b'"),
        ({}, "line 1: field \"sample\": 0 of prompt 'a', of which the rollouts hold 0"),
    ],
)
def test_lines_and_sequences_are_one_to_one(
    tmp_path: Path, prompts: dict[str, list[int]], words: str
) -> None:
    found = read_ids_file(written(tmp_path / "ids", line([[1]])), V)
    with pytest.raises(PromptError, match=words):
        found.lists({"s": extent(prompts)})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_ids_file(tmp_path / "absent", V)
