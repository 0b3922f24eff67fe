"""Nothing here cuts the power, so writers in the test's own process do not wait for the disk."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
