"""`probe metrics --teacher-model`, `--per-sequence` and `probe compare` on the command line."""

from typing import Any

import pytest

from tests.cli.conftest import UNITS, N, World
from tests.cli.test_probe_store import panels_of


def test_a_comparison_has_the_means_of_both_probes(world: World, call: Any) -> None:
    files, tables = [world.new("sums"), world.new("sums")], []
    flags = "--store @st --device cpu --teacher-model @teacher --objective overlap --format json"
    for model, file in zip(("@student", "@stranger"), files, strict=True):
        result = call(f"probe metrics --model {model} {flags} --per-sequence {file}")
        assert (result.code, "note: " in result.err) == (0, False), result.err
        tables.append({row["metric"]: row["all"] for row in result.json})
        (means,) = panels_of(world, result.json)
        assert {row[0]: row[1] for row in means.rows} == tables[-1]
    for table in tables:
        for name in ("forward", "reverse"):
            assert 0 < table[f"kl/{name}_bound"] < table[f"kl/{name}"]
    report = call(f"probe compare {files[0]} {files[1]} --format json").json
    assert (report["sequences"], report["prompts"]) == (2 * UNITS * N, 2 * UNITS)
    assert report["tokens"] == tables[0]["rows"]
    (differences,) = panels_of(world, report)
    assert [row[3] for row in differences.rows] == [e["difference"] for e in report["differences"]]
    found = {each["metric"]: each for each in report["differences"]}
    assert {"kl/forward", "kl/reverse_bound", "top1/agreement", "loss/overlap"} <= found.keys()
    for name, each in found.items():
        assert [each["a"], each["b"]] == pytest.approx([t[name] for t in tables]), name
    assert found["entropy/teacher"]["difference"] == 0
    text = call(f"probe compare {files[0]} {files[1]}").out
    assert f"{2 * UNITS * N} sequences of {2 * UNITS} prompts" in text
    # A file of other scores is not of the same rows.
    other = call(
        f"probe metrics --model @student {flags} --teacher-model @other-teacher "
        f"--per-sequence {files[1]}"
    )
    assert "note: the scores 'big' are not recorded as those of the weights" in other.err
    call(f"probe compare {files[0]} {files[1]}").assert_error(
        1, "teacher_weights = 'sha256:", "same teacher"
    )
