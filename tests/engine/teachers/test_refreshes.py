"""The names of the refreshes of a teacher."""

import re

import pytest

from logitcask.engine.config.section import NAME
from logitcask.engine.teachers.refreshes import LONGEST_NAME, refresh_name, refresh_version

DIGEST = "sha256:" + "0123456789abcdef" * 4


def test_a_refresh_has_its_version_and_its_weights_in_its_name() -> None:
    assert refresh_name("self", 12, DIGEST) == "self.v12-01234567"
    longest = refresh_name("a" * LONGEST_NAME, 10**9, DIGEST)
    assert re.fullmatch(NAME, longest)
    assert refresh_version("a" * LONGEST_NAME, longest) == 10**9


@pytest.mark.parametrize(
    "name",
    ["self", "self.v1", "self.v01-01234567", "self.v1-0123456", "self2.v1-01234567", "v1-01234567"],
)
def test_other_names_are_of_no_refresh(name: str) -> None:
    assert refresh_version("self", name) is None
