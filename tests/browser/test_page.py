"""The page of a report in a browser: what it draws, and what it must not do."""

import pytest

from logitcask.engine.report.page import page
from tests.browser.reports import report

pytestmark = pytest.mark.needs("chromium")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_kind_of_panel_is_drawn(open_page, shoot, theme) -> None:
    opened = open_page(page(report()), theme=theme)
    shoot(opened, f"panels-{theme}")
    assert opened.locator("h1").inner_text() == "Report of loss"
    for kind in ("lines", "heat", "bars", "timeline"):
        assert opened.locator(f"#panel-{kind} .chart svg").count(), kind
    assert opened.locator("#panel-table tbody tr").count() == 3
