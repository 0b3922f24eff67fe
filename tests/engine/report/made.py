"""Facts of runs over stores of known distributions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.report.runs import RunFacts
from logitcask.engine.store import Store


def facts_of(
    store: Store | None,
    path: Path = Path("run"),
    *,
    record: Mapping[str, Any] | None = None,
    metrics: tuple[Mapping[str, Any], ...] = (),
) -> RunFacts:
    """Return the facts of a run that read this store; without a record those of a store alone."""
    return RunFacts(
        path=path,
        name=path.name,
        record={} if record is None else record,
        metrics=metrics,
        store=store,
        snapshot=None if store is None else store.head(),
        store_missing="" if store is not None else "no store at st",
    )
