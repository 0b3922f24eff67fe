"""Fingerprints of teachers: compared within the tolerance of one model, and checked before use."""

import math
from typing import Any

import numpy as np
import pytest

from logitcask.engine.errors import IdentityError, StoreError
from logitcask.engine.models.fingerprint import (
    MAX_SPREAD,
    MIN_TOLERANCE,
    SPREAD_FACTOR,
    ModelFingerprint,
    compare_records,
    fingerprint_of,
)
from logitcask.engine.store import Store, open_store
from tests.engine.store.made import SCORE_PROVENANCE, commit_rollouts, commit_scores, key

IDS = np.array([[3, 1], [2, 7]])


def record(off: float = 0.0, control: Any = 0.0) -> dict[str, Any]:
    fingerprint = ModelFingerprint(ids=IDS, lp=np.log([[0.6, 0.3], [0.5, 0.2]]) - off)
    return {**fingerprint.record(), "control_nats": control}


def test_the_tolerance_is_three_times_the_larger_control() -> None:
    assert compare_records(record(), record()) == (0.0, MIN_TOLERANCE)
    found, allowed = compare_records(record(), record(0.02, control=0.01))
    assert found == pytest.approx(0.02, abs=1e-5)
    assert allowed == pytest.approx(SPREAD_FACTOR * 0.01)
    assert compare_records(record(control=0.01), record())[1] == allowed
    # A record with a huge control does not hide another model.
    assert compare_records(record(), record(control=1e9))[1] == SPREAD_FACTOR * MAX_SPREAD


@pytest.mark.parametrize(
    "change",
    [
        {"ids": None},
        {"ids": [[1, 2], [3]]},
        {"ids": [1, 2]},
        {"ids": [], "lp": []},
        {"lp": [["a", "b"], ["c", "d"]]},
        {"lp": [[-1.0, math.nan], [-1.0, -2.0]]},
        {"lp": [[-1.0], [-1.0]]},
        {"ids": [[1, 2**70], [3, 4]]},
        {"control_nats": "0.1"},
        {"control_nats": math.nan},
        {"ids": [[1, 2]], "lp": [[-1.0, -2.0]]},
    ],
)
def test_invalid_records_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="not a valid fingerprint"):
        compare_records(record(), {**record(), **change})
    with pytest.raises(StoreError, match="KeyError"):
        fingerprint_of({"ids": [[1]]})


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return open_store(tmp_path / "s", create=True)


def test_a_name_is_bound_to_the_fingerprint_of_its_teacher(store: Store) -> None:
    bases = [commit_rollouts(store, seed, key("r", seed)) for seed in range(3)]

    def commit(n: int, fingerprint: dict[str, Any]) -> Any:
        provenance = {**SCORE_PROVENANCE, "fingerprint": fingerprint}
        return commit_scores(store, bases[n], n, provenance=provenance, unit_key=key("s", n))

    commit(0, record())
    commit(1, record(MIN_TOLERANCE / 2))
    with pytest.raises(IdentityError, match="not the one of the first scores named") as caught:
        commit(2, record(0.01))
    assert "--revision" in caught.value.hint
    commit(2, record(0.01, control=0.005))
