"""The estimate of objects and requests against those of a real store in memory."""

from collections import Counter
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from logitcask.engine.estimate.requests import store_requests
from logitcask.engine.store.storage.object_store import ObjectStorage
from logitcask.engine.store.store import open_on
from tests.engine.store.made import commit_rollouts, commit_scores, encode_once


def test_requests_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the requests of 20 units: objects and puts exactly, lists and gets within a quarter."""
    encode_once(monkeypatch)
    storage, units = ObjectStorage("memory://cask", MemoryStore()), 20
    store = open_on(storage, create=True)
    done: Counter[str] = Counter()

    def counted(name: str) -> Any:
        real = getattr(obstore, name)

        def call(*arguments: Any, **options: Any) -> Any:
            done[name] += 1
            return real(*arguments, **options)

        return call

    for name in ("put", "list", "get"):
        monkeypatch.setattr(obstore, name, counted(name))
    segments = [commit_rollouts(store, unit) for unit in range(units)]
    for segment in segments:
        commit_scores(store, segment, 1)
    expected = store_requests(units)
    assert len(storage.files("")) == expected["objects"]
    assert done["put"] == expected["put_requests"] - 1, "without format.json"
    for name in ("list", "get"):
        assert done[name] == pytest.approx(expected[f"{name}_requests"], rel=0.25), done
    done.clear()
    for segment in store.head().segments:
        store.read_object(segment)
    assert done["get"] == expected["get_requests_per_epoch"]
