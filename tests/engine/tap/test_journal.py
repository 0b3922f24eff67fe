"""Records and their files: exact values, torn and damaged bytes, and checks of the teacher."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.tap.journal import Journal, records
from logitcask.engine.tap.record import Record


def make_record(seed: int, *, tokens: int = 0, k: int = 4) -> Record:
    rng = np.random.default_rng(seed)
    tokens = tokens or int(rng.integers(2, 30))
    ids = rng.integers(0, 1 << 32, tokens, np.uint32)
    top_lp = -np.sort(rng.exponential(2, (tokens - 1, k)).astype(np.float32), 1)
    return Record(
        ids=ids,
        boundary=int(rng.integers(0, tokens)),
        lp=-rng.exponential(3, tokens - 1).astype(np.float32),
        rank=rng.integers(0, 99, tokens - 1, np.uint32),
        top=rng.integers(0, 1 << 32, (tokens - 1, k), np.uint32),
        top_lp=top_lp,
    )


def check_equal(found: Record | None, expected: Record) -> None:
    assert found is not None
    assert found.boundary == expected.boundary
    for name in ("ids", "lp", "rank", "top", "top_lp"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    journal, written = Journal(tmp_path), [make_record(i, k=i % 5) for i in range(40)]
    for each in written:
        journal.put(each)
    for opened in (journal, Journal(tmp_path)):
        for each in written:
            check_equal(opened.get(each.ids, each.k), each)
            assert opened.get(each.ids, each.k + 1) is None
        assert opened.get(written[0].ids[:-1], 1) is None
        assert len(opened) == 40


def test_a_longer_list_replaces_a_shorter_one(tmp_path: Path) -> None:
    journal, short, long = Journal(tmp_path), make_record(1, k=2), make_record(1, k=9)
    journal.put(short)
    journal.put(long)
    check_equal(journal.get(short.ids, 2), long)
    check_equal(Journal(tmp_path).get(short.ids, 2), long)


def test_a_file_that_ends_anywhere_keeps_what_is_complete(tmp_path: Path) -> None:
    journal, written = Journal(tmp_path / "whole"), [make_record(i, tokens=6) for i in range(3)]
    for each in written:
        journal.put(each)
    (whole,) = (tmp_path / "whole").glob("*.wal")
    data, size = whole.read_bytes(), whole.stat().st_size // 3
    for end in range(len(data) + 1):
        folder = tmp_path / str(end)
        folder.mkdir()
        torn = folder / whole.name
        torn.write_bytes(data[:end])
        found = Journal(folder)
        assert len(found) == end // size
        assert torn.stat().st_size == end // size * size
        found.put(written[2])
        check_equal(Journal(folder).get(written[2].ids, 4), written[2])
        check_equal(found.get(written[0].ids, 4), written[0]) if end >= size else None


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Flip every third byte of a file of two records: a record is exact or absent."""
    journal, written = Journal(tmp_path), [make_record(i, tokens=4, k=2) for i in range(2)]
    for each in written:
        journal.put(each)
    (path,) = tmp_path.glob("*.wal")
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        for opened in (journal, Journal(tmp_path)):
            found = [opened.get(each.ids, 2) for each in written]
            assert None in found
            for record, expected in zip(found, written, strict=True):
                if record is not None:
                    check_equal(record, expected)
        path.write_bytes(data)
        journal = Journal(tmp_path)


def test_a_killed_process_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.engine.tap.test_journal import Journal, make_record\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for seed in range(10): journal.put(make_record(seed))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{root}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    journal = Journal(tmp_path)
    for seed in range(10):
        check_equal(journal.get(make_record(seed).ids, 4), make_record(seed))


def test_only_records_since_the_last_check_are_dropped(tmp_path: Path) -> None:
    journal, written = Journal(tmp_path), [make_record(i) for i in range(6)]
    for each in written[:3]:
        journal.put(each)
    journal.mark_verified()
    for each in written[3:]:
        journal.put(each)
    assert journal.close_files() == []
    for opened in (journal, Journal(tmp_path)):
        assert not opened.is_verified or opened is not journal
        opened.drop_unverified()
        kept = [opened.get(each.ids, 4) is not None for each in written]
        assert kept == [True] * 3 + [False] * 3
        (path,) = opened.close_files()
        assert [head.kind for head, _ in records(path)] == ["record"] * 3


def test_sealed_files_are_read_and_never_dropped(tmp_path: Path) -> None:
    journal, record = Journal(tmp_path), make_record(0)
    journal.put(record)
    journal.mark_verified()
    (path,) = journal.close_files()
    journal.mark_sealed(path)
    assert journal.close_files() == []
    assert journal.unsealed_rows == 0
    longer = make_record(0, k=9)
    journal.put(longer)
    assert journal.drop_unverified() == 0
    check_equal(journal.get(record.ids, 4), record)
    check_equal(Journal(tmp_path).get(record.ids, 4), record)
    journal.put(longer)
    (path,) = tmp_path.glob("*.wal")
    assert [head.repeated for head, _ in records(path)] == [True]


def test_a_full_disk_keeps_nothing_of_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, first, second = Journal(tmp_path), make_record(0), make_record(1)
    journal.put(first)
    (path,) = tmp_path.glob("*.wal")
    before = path.read_bytes()
    opened = Path.open

    def open_full(path: Path, *mode: Any, **kwargs: Any) -> Any:
        return Full(opened(path, *mode, **kwargs)) if mode == ("ab",) else opened(path, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(OSError, match="No space"):
            journal.put(second)
    assert path.read_bytes() == before
    assert journal.get(second.ids, 4) is None
    journal.put(second)
    for each in (first, second):
        check_equal(Journal(tmp_path).get(each.ids, 4), each)


class Full:
    """A file that takes 50 bytes of a write, and nothing after it."""

    def __init__(self, out: Any) -> None:
        self._out, self._left = out, 50

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def write(self, data: bytes) -> int:
        if not self._left:
            raise OSError(28, "No space left on device")
        written, self._left = self._out.write(data[: self._left]), 0
        return int(written)
