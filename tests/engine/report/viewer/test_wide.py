"""Responses over a vocabulary of 150,000 ids fit into a page, and it says how many."""

from pathlib import Path

from logitcask.engine.report.viewer.data import MOST_BYTES, viewer_data
from logitcask.engine.report.viewer.sources import Source
from tests.engine.report.viewer.unpack import unpack
from tests.engine.report.viewer.wide import wide_store


def test_wide_lists_of_long_responses_are_cut_to_what_fits(tmp_path: Path) -> None:
    """Give 64 responses of 512 tokens; half of the positions have wide lists of random ids."""
    store = wide_store(tmp_path / "s", sequences=64, length=512)
    data = viewer_data([Source(name="wide", store=store, snapshot=store.head())])
    header, columns = unpack(data)
    tokens = sum(each["length"] for each in header["sequences"])
    assert MOST_BYTES // 2 < len(data["data"]) <= MOST_BYTES
    assert len(data["data"]) / tokens < 40
    assert len(header["texts"]) > 20_000
    assert f"{data['count']} of 64 chosen responses fit into the page" in data["notes"]
    assert columns["student_count"].max() <= header["cut"]["most"] == 3
