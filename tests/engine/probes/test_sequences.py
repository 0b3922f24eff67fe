"""Sums of each sequence, and the paired comparison of two models."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.errors import ConfigError, IdentityError
from logitcask.engine.probes.metrics import Measured
from logitcask.engine.probes.sequences import (
    SequenceSums,
    compare,
    ratio_and_error,
    read_sequences,
    sequence_lines,
    sum_sequences,
)

SOURCE = {
    **{"store": "s", "snapshot": 3, "snapshot_sha256": "x", "rollouts": "main", "teacher": "big"},
    **{"teacher_weights": None, "model": "m", "weights": "w"},
}


def made(values: list[float], tokens: list[float], prompts: str, **source: Any) -> SequenceSums:
    return SequenceSums(
        source=SOURCE | source,
        prompt=tuple(prompts),
        number=np.arange(len(tokens)),
        tokens=np.array(tokens, float),
        sums={"kl": np.array(values, float)},
    )


def written(file: Path, found: SequenceSums) -> Path:
    file.write_text("".join(sequence_lines(found)))
    return file


def test_rows_become_sums_of_their_sequences() -> None:
    """Leave out rows that do not count, sequences without one, and released metrics."""
    value = np.array([1.0, 2.0, math.nan, 4.0, 8.0, math.inf])
    one = np.ones(6)
    found = Measured(
        {"kl": (value, one), "overlap/advantage_released": (value, one)},
        weight=np.array([1.0, 1, 0, 0.5, 1, 1]),
        position=np.arange(6.0),
        sequence=np.array([0, 0, 0, 1, 3, 4]),
    )
    sums = sum_sequences(
        found, prompt=tuple("abcde"), number=np.array([9, 7, 8, 6, 5]), source=SOURCE
    )
    assert sums.prompt == ("e", "d", "b", "a")
    assert sums.number.tolist() == [5, 6, 7, 9]
    assert sums.tokens.tolist() == [1, 1, 0.5, 2]
    assert list(sums.sums) == ["kl"]
    np.testing.assert_array_equal(sums.sums["kl"], [math.nan, 8, 2, 3])


def test_a_comparison_by_hand() -> None:
    """Take two prompts: a has 6 nats of 6 tokens and 2 of 2, b has 2 nats of each."""
    a = made([4, 2, 2], [3, 3, 2], "ppq")
    b = made([1, 1, 2], [3, 3, 2], "ppq", model="n")
    report = compare(a, b)
    (found,) = report.differences
    assert (report.sequences, report.prompts, report.tokens) == (3, 2, 8)
    assert (report.a["model"], report.b["model"]) == ("m", "n")
    assert (found.metric, found.a, found.b, found.ratio) == ("kl", 1.0, 0.5, 0.5)
    assert found.difference == -0.5
    # Residuals of the prompts: -4 + 0.5 x 6 = -1 and 0 + 0.5 x 2 = 1.
    error = math.sqrt(2 / 1 * (1 + 1)) / 8
    assert found.se == pytest.approx(error)
    assert found.z == pytest.approx(-0.5 / error)


def test_one_prompt_has_no_error_and_one_model_no_difference() -> None:
    a = made([4, 2], [3, 3], "pp")
    (found,) = compare(a, made([1, 1], [3, 3], "pp")).differences
    assert (found.difference, found.se, found.z) == (pytest.approx(-4 / 6), None, None)
    (same,) = compare(a, a).differences
    assert (same.difference, same.ratio, same.z) == (0, 1, None)
    (unknown,) = compare(a, made([1, math.nan], [3, 3], "pp")).differences
    assert (unknown.a, unknown.b, unknown.difference) == (1.0, None, None)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 12))
def test_the_error_of_a_ratio(seed: int, n: int) -> None:
    """Equal numbers of tokens give the mean of clusters; a shift by a constant has no error."""
    rng = np.random.default_rng(seed)
    sums, tokens, cluster = rng.normal(size=n), rng.integers(1, 9, n) * 1.0, np.arange(n)
    mean, error = ratio_and_error(sums, np.full(n, 4.0), cluster)
    assert mean == pytest.approx(sums.mean() / 4)
    assert error == pytest.approx(sums.std(ddof=1) / math.sqrt(n) / 4)
    mean, error = ratio_and_error(0.7 * tokens, tokens, cluster)
    assert (mean, error) == (pytest.approx(0.7), pytest.approx(0, abs=1e-12))
    # Each cluster twice: the same error, not that of twice as many.
    twice = np.tile(sums, 2), np.tile(tokens, 2), np.tile(cluster, 2)
    assert ratio_and_error(*twice) == pytest.approx(ratio_and_error(sums, tokens, cluster))


def test_files_are_read_as_written_in_any_order(tmp_path: Path) -> None:
    found = made([4, math.nan, 2], [3, 3, 2], "ppq")
    file = written(tmp_path / "a.jsonl", found)
    again = read_sequences(file)
    assert again.source == found.source
    assert (again.prompt, again.number.tolist()) == (found.prompt, [0, 1, 2])
    np.testing.assert_array_equal(again.sums["kl"], found.sums["kl"])
    b = written(tmp_path / "b.jsonl", made([1, 1, 2], [3, 3, 2], "ppq"))
    b.write_text("".join(reversed(b.read_text().splitlines(keepends=True))))
    (pair,) = compare(
        read_sequences(written(file, made([4, 2, 2], [3, 3, 2], "ppq"))), read_sequences(b)
    ).differences
    assert pair.difference == -0.5


LINE = {**SOURCE, "prompt": "p", "sequence": 0, "tokens": 2.0, "sums": {"kl": 1.0}}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "holds no sequence"),
        ("{", "line 1: "),
        ('"1"', "line 1: it is no JSON object"),
        (json.dumps({**LINE, "tokens": "2"}), "line 1: tokens = '2'"),
        (json.dumps({**LINE, "tokens": 0}), "out of range"),
        (json.dumps({**LINE, "tokens": 10**400}), "digits"),
        (json.dumps({**LINE, "sequence": True}), "sequence = True"),
        (json.dumps({**LINE, "sequence": 10**100}), "out of range"),
        (json.dumps({**LINE, "prompt": None}), "prompt = None"),
        (json.dumps({**LINE, "sums": {"kl": "x"}}), "is no number"),
        (json.dumps({**LINE, "sums": {"kl": 10**100}}), "out of range"),
        (json.dumps({**LINE, "sums": {"kl": math.nan}}), "NaN is not JSON"),
        (json.dumps({k: v for k, v in LINE.items() if k != "teacher"}), "no key 'teacher'"),
        ("\n".join([json.dumps(LINE)] * 2), "a sequence twice"),
        (json.dumps(LINE) + "\n" + json.dumps({**LINE, "sums": {}}), "line 2: it is of another"),
        (json.dumps(LINE) + "\n" + json.dumps({**LINE, "model": "n"}), "line 2: it is of another"),
        (json.dumps({**LINE, "sums": [[[]]]}), "sums = [[[]]]"),
        ('{"sums": ' + "[" * 100_000, "nested"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, cause: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_sequences(file)
    assert cause in caught.value.cause
    assert "probe metrics --per-sequence" in caught.value.hint


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_sequences(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_sequences(tmp_path)


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        (made([1, 1], [3, 3], "pp", snapshot=4), "snapshot = 3 in the first file, 4"),
        (made([1, 1], [3, 3], "pp", teacher="small"), "teacher = 'big'"),
        (made([1, 1], [3, 2], "pp"), "other sequences"),
        (made([1, 1], [3, 3], "pq"), "other sequences"),
        (made([1], [3], "p"), "other sequences"),
    ],
)
def test_other_rows_are_refused(other: SequenceSums, cause: str) -> None:
    with pytest.raises(IdentityError) as caught:
        compare(made([4, 2], [3, 3], "pp"), other)
    assert cause in caught.value.cause
