"""The shared part of `rollout --worker` and `score --worker`: how a worker is stopped and ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from logitcask.cli.output import print_event, print_result
from logitcask.cli.progress import progress_bar

Watch = Callable[..., Any]
"""(job, *, stop, progress, on_event) -> WorkReport."""


def run_until_stopped(watch: Watch, job: Any, form: str) -> None:
    """Work until SIGTERM or the job's own end, and print the report.

    Raises IncompleteError where units failed.
    """
    from logitcask.engine.workers.worker import check_failed

    with stop_at_sigterm() as stop, progress_bar() as progress:
        report = watch(job, stop=stop, progress=progress, on_event=print_event)
    print_result(report, form)
    check_failed(report.failed, report.first_error, job.store.url)


@contextmanager
def stop_at_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, in place of ending the process."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
