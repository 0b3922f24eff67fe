"""The timeline: a span in two lines, and files that kills have cut."""

import json
import math
from pathlib import Path

import pytest

from logitcask.engine.workers import timeline
from logitcask.engine.workers.timeline import read_timeline, span, timeline_file


def test_spans_are_read_as_they_were_made(tmp_path: Path) -> None:
    rollout, train = (
        timeline_file(tmp_path, "rollout", "0"),
        timeline_file(tmp_path, "train", "a-7"),
    )
    with span(rollout, "unit", round=3, version=2):
        pass
    with span(train, "wait", round=3), span(rollout, "load", version=3):
        pass
    with pytest.raises(ZeroDivisionError), span(train, "update", round=3):
        raise ZeroDivisionError
    with span(None, "unit"):
        pass
    found = read_timeline(tmp_path)
    assert [(each.role, each.process, each.kind, each.round, each.version) for each in found] == [
        ("rollout", "0", "unit", 3, 2),
        ("train", "a-7", "wait", 3, None),
        ("rollout", "0", "load", None, 3),
        ("train", "a-7", "update", 3, None),
    ]
    assert all(each.end is not None and each.start <= each.end for each in found)
    assert found[1].end >= found[2].end, "one holds the other"


def test_a_kill_leaves_a_span_without_end_and_at_most_one_cut_line(tmp_path: Path) -> None:
    file = timeline_file(tmp_path, "score", "1")
    for _ in range(2):
        with span(file, "unit", round=0):
            pass
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {}
    for cut in {len(lines[0]), len(lines[0] + lines[1]) + 9, *range(0, len(whole), 17), len(whole)}:
        file.write_bytes(whole[:cut])
        with span(file, "unit", round=1):
            pass
        rounds = [(each.round, each.end is None) for each in read_timeline(tmp_path)]
        assert rounds[-1] == (1, False)
        kept[cut] = rounds[:-1]
    assert kept[len(lines[0])] == [(0, True)]
    assert kept[len(lines[0] + lines[1]) + 9] == [(0, False)]
    assert kept[len(whole)] == [(0, False)] * 2
    assert read_timeline(tmp_path / "no run") == []


def test_lines_of_other_content_are_left_out(tmp_path: Path) -> None:
    file = timeline_file(tmp_path, "score", "0")
    with span(file, "unit", round=4):
        pass
    line = json.loads(file.read_bytes().splitlines()[-1])
    changes: list[dict[str, object]] = [
        *({"start": bad} for bad in ([], {}, "1", None, True, -1.0, math.nan, math.inf)),
        *({"end": bad} for bad in ("2", [3], line["start"] - 1, math.inf)),
        *({"pid": bad} for bad in ([], "7", None, 7.0)),
        *({key: 3} for key in ("role", "process", "kind", "host", "more")),
        *({key: "3"} for key in ("round", "version")),
    ]
    others = [json.dumps(line | change) for change in changes]
    others += ["", "5", "[]", "null", "[" * 100_000, '"text"', "{}", "\x00"]
    with file.open("a") as opened:
        opened.write("\n".join(others) + "\n")
    assert [each.round for each in read_timeline(tmp_path)] == [4]


def test_of_a_long_file_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = timeline_file(tmp_path, "score", "0")
    for number in range(40):
        with span(file, "unit", round=number):
            pass
    monkeypatch.setattr(timeline, "MAX_BYTES", file.stat().st_size // 4)
    found = [each.round for each in read_timeline(tmp_path)]
    assert 8 <= len(found) <= 10
    assert found == list(range(40))[-len(found) :]
