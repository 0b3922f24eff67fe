"""A cheap look at runs and stores: has anything moved since the last one?"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from logitcask.engine.config.runner import TIMELINE
from logitcask.engine.errors import StoreError
from logitcask.engine.report.runs import find_runs
from logitcask.engine.report.sections.state import FINISHED, RUNNING, STOPPED, run_state
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.log.claims import CLAIMS
from logitcask.engine.training.run_dir.files import (
    EVALUATIONS,
    LEDGER,
    LOCK,
    METADATA,
    METRICS,
    RUN,
)

FILES = (RUN, METRICS, LEDGER, EVALUATIONS, METADATA, LOCK)


class Watch:
    """The places of a report: folders of runs, of several runs, and stores."""

    def __init__(self, places: Sequence[str | Path]) -> None:
        self._places = [str(place) for place in places]
        self._stores: dict[str, Store] = {}

    def state(self) -> str:
        """Return a digest that changes with the files of the runs and with their stores.

        It reads the sizes and times of files, the new records of a log, and the names of claims.
        Raises IntegrityError for a damaged log.
        """
        found = hashlib.sha256()
        urls = []
        for place in self._places:
            runs = find_runs(place)
            for run in runs:
                found.update(_files(run).encode())
            urls += [url for run in runs if (url := _store_url(run))] if runs else [place]
        for url in dict.fromkeys(urls):
            if (store := self._store(url)) is not None:
                names = sorted(each.name for each in store.storage.files(CLAIMS))
                found.update(f"{url} {store.head().number} {names}".encode())
        # A run that ended without a word, as one that was killed, touches no file.
        found.update(self.run_state().encode())
        return found.hexdigest()

    def run_state(self) -> str:
        """Return RUNNING while one of the runs does; a store alone may always grow."""
        states = [run_state(run).name for place in self._places for run in find_runs(place)]
        if not states:
            return RUNNING
        return next(name for name in (RUNNING, STOPPED, FINISHED) if name in states)

    def _store(self, url: str) -> Store | None:
        """Return an open store, whose next look reads new records alone; None where none is."""
        if url not in self._stores:
            try:
                self._stores[url] = open_store(url)
            except StoreError:
                return None  # as the report writes; a loop that begins makes it later
        return self._stores[url]


def _files(run: Path) -> str:
    """Return name, size and time of the files that a report reads."""
    parts = []
    for file in (*(run / name for name in FILES), *sorted((run / TIMELINE).glob("*.jsonl"))):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        parts.append(f"{file} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(parts)


def _store_url(run: Path) -> str:
    """Return the store of a run, '' where its record names none."""
    try:
        url = json.loads((run / RUN).read_bytes())["config"]["store"]["url"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""  # the report raises what is wrong with it
    return url if isinstance(url, str) else ""
