"""What `rollout --watch` and `score --watch` share: how a worker is stopped, and how it ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich_click as click

from logitcask.cli.output import print_result, progress_bar

Watch = Callable[..., Any]
"""(job, *, stop, progress, notice) -> WorkReport."""


def run_watch(watch: Watch, job: Any, form: str) -> None:
    """Works until SIGTERM, or as long as the job says, and prints what was done.

    Raises IncompleteError where units failed.
    """
    from logitcask.engine.workers.worker import check_failed

    with stop_at_sigterm() as stop, progress_bar() as progress:
        report = watch(
            job, stop=stop, progress=progress, on_event=lambda line: click.echo(line, err=True)
        )
    print_result(report, form)
    check_failed(report, job.store.url)


@contextmanager
def stop_at_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of ending the process."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
