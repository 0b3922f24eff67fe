"""Errors of the system and of programs: a message with a hint, or a report of a bug."""

import errno
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from logitcask.cli.main import main
from logitcask.engine.store import inspect

TITLE = "\x1b]0;owned\x07\x1b[2J"
"""Sets the title of a terminal and clears it."""


@pytest.mark.parametrize(
    ("error", "cause", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space", "make room"),
        (OSError(errno.EFBIG, "File too large", "/a/b"), "/a/b: File too large", "ulimit -f"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/w"), "/a/w: Perm", "the right to"),
        (ConnectionError("refused\nby the peer"), "ConnectionError: refused", "network"),
        (MemoryError(), "out of memory", "--batch-tokens"),
        (RuntimeError("CUDA out of memory. Tried 2 GiB"), "CUDA out of memory", "--batch-tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "can't alloc", "memory"),
        (OSError(errno.EIO, "bad", f"/a/{TITLE}"), "\\x1b]0;owned", "check that path"),
    ],
)
def test_an_error_of_the_system_has_a_cause_and_a_hint(
    call: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str, hint: str
) -> None:
    def raising(store: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "summary", raising)
    result = call("store info @st")
    result.assert_error(1, cause, hint)
    assert len(result.err.splitlines()) == 2
    assert call("--debug store info @st").err.startswith("Traceback")


def test_any_other_error_is_called_a_bug(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(store: object) -> None:
        raise KeyError(f"x{TITLE}")

    monkeypatch.setattr(inspect, "summary", raising)
    result = call("store info @st")
    assert result.code == 1
    assert result.err.startswith("Traceback (most recent call last):")
    assert result.err.splitlines()[-1].startswith("bug: ")
    assert result.err.isascii()
    assert "\x1b" not in result.err


@pytest.fixture
def logs() -> Iterator[None]:
    factory = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(factory)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("logs")
def test_logs_of_libraries_cannot_drive_a_terminal(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    logger = logging.getLogger("a library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.warning("tensor %s\nof 2", TITLE)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"file {TITLE}", stacklevel=1)
    err = capfd.readouterr().err
    assert "tensor \\x1b]0;owned\\x07\\x1b[2J\nof 2" in err
    assert "file \\x1b]0;owned" in caplog.text, "the logger of warnings has no handler of its own"
    assert "\x1b" not in err + caplog.text
