"""Say what long work will cost before it begins, and ask on a terminal where it is much."""

import sys

import rich_click as click

from logitcask.cli.output import print_event, visible
from logitcask.cli.progress import paused
from logitcask.engine.errors import ConfigError
from logitcask.engine.estimate.left import Approve, WorkLeft
from logitcask.engine.quantities import data_size, duration

ASK_BYTES, ASK_SECONDS, ASK_REQUESTS = 10e9, 4 * 3600.0, 10_000
"""Limits of work without a question: more fills a small disk, takes half a working day, or shows on
the bill of a server."""


yes_option = click.option(
    "--yes",
    is_flag=True,
    help="Begin long work without a question, and on a disk that looks too small. Without a "
    "terminal there is no question; the estimate is printed.",
)


def approve_with(yes: bool) -> Approve:
    """Return a function that prints the estimate, and on a terminal asks for more than ASK_...

    yes: do not ask. It raises StoreError where the disk cannot hold the work, and ConfigError where
    the answer is no.
    """

    def approve(left: WorkLeft) -> None:
        if not left.positions:
            return
        print_event(text(left))
        if not left.fits:
            print_event(f"warning: the disk of {left.where} may not hold it")
        if yes:
            return
        left.check_disk()
        if is_much(left) and sys.stdin.isatty() and sys.stderr.isatty():
            with paused():
                begin = click.confirm("begin?", default=False, err=True)
            if not begin:
                raise ConfigError(
                    f"{left.stage} did not begin, as the answer was no",
                    hint="give fewer prompts, responses or tokens, or --yes to begin at once",
                )

    return approve


def is_much(left: WorkLeft) -> bool:
    """Return whether a user should be asked before."""
    return (
        left.bytes > ASK_BYTES
        or (left.seconds or 0.0) > ASK_SECONDS
        or left.requests > ASK_REQUESTS
        or not left.fits
    )


def text(left: WorkLeft) -> str:
    """Return the estimate as a line: what is left, positions, bytes, requests, time."""
    most = "at most " if left.at_most else ""
    of = "measured" if left.measured else "assumed"
    free = "" if left.free_bytes is None else f"; {left.free_bytes / 1e9:,.3g} GB free"
    parts = [
        f"{left.total - left.done:,} of {left.total:,} {left.noun} left",
        f"{most}{left.positions:,.0f} positions",
        f"{most}{data_size(left.bytes)} ({of}{free})",
        *([f"{left.requests:,} requests to the server"] if left.requests else []),
        f"time of {left.timed} not known yet"
        if left.seconds is None
        else f"about {duration(left.seconds)} of {left.timed} at the measured rate",
    ]
    return visible(f"estimate: {left.stage}: {', '.join(parts)}")
