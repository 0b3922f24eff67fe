"""Responses over a vocabulary of 150,000 ids fit into a page, and it says how many."""

from pathlib import Path

from logitcask.engine.report.viewer.data import MOST_BYTES, viewer_data
from logitcask.engine.report.viewer.sources import Source
from tests.engine.report.viewer.unpack import unpack
from tests.engine.report.viewer.wide import wide_store

LIMIT = MOST_BYTES // 2


def test_wide_lists_of_long_responses_are_cut_to_what_fits(tmp_path: Path) -> None:
    """Give 32 responses of 512 tokens; half of the positions have wide lists of random ids."""
    store = wide_store(tmp_path / "s", sequences=32, length=512)
    data = viewer_data([Source(name="wide", store=store, snapshot=store.head())], most_bytes=LIMIT)
    header, columns = unpack(data)
    tokens = sum(each["length"] for each in header["sequences"])
    assert LIMIT // 2 < len(data["data"]) <= LIMIT
    assert len(data["data"]) / tokens < 40
    assert len(header["texts"]) > 10_000
    assert f"{data['count']} of 32 chosen responses fit into the page" in data["notes"]
    assert columns["student_count"].max() <= header["cut"]["most"] == 3
