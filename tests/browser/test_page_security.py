"""Hostile texts in a page stay texts."""

from dataclasses import replace

import pytest

from logitcask.engine.report.page import page
from tests.browser.hostile import STRINGS
from tests.browser.reports import NO_VALUE, panels, report, with_panels

pytestmark = pytest.mark.needs("chromium")

SHOWN = """() => report.sections[0].panels.every(panel => {
    const figure = document.getElementById(`panel-${panel.id}`);
    const how = figure.querySelector(".how").textContent;
    return figure.querySelector("h3").textContent === panel.title
        && [panel.how, panel.how.replaceAll("`", "")].includes(how);
})"""


def hostile_report():
    """Return a report with each hostile text in a table and in one of the kinds of charts."""
    made = []
    for number, text in enumerate(STRINGS):
        *charts, table = panels(text)
        for panel in (charts[number % len(charts)], table):
            made.append(replace(panel, id=f"{panel.id}-{number}"))
    everything = " ".join(STRINGS)
    return replace(
        report(everything, runs=(everything, STRINGS[0])),
        sections=with_panels(*made).sections,
    )


def test_hostile_texts_stay_texts(open_page) -> None:
    assert len(STRINGS) >= 30
    text = page(hostile_report())
    opened = open_page(text)
    assert opened.evaluate("window.pwned") is None
    assert opened.evaluate(SHOWN)
    assert opened.evaluate("document.querySelector('h1').textContent === report.title")
    texts = {number: text for number, text in enumerate(STRINGS) if "\ud800" not in text}
    found = opened.evaluate(
        """numbers => numbers.map(number => {
            const figure = document.getElementById(`panel-table-${number}`);
            return [figure.querySelector("h3"), figure.querySelector("tr:nth-child(3) td")]
                .map(node => node.textContent);
        })""",
        list(texts),
    )
    assert found == [[f"Table of {text}", text] for text in texts.values()]
    # Names of series and groups go through the charts into legends.
    legend = opened.locator("#panel-bars-2 .legend").evaluate("node => node.textContent")
    assert STRINGS[2] in legend


@pytest.mark.parametrize("policy", [False, True])
def test_the_texts_would_run_without_escapes_and_policy(browser, tmp_path, policy) -> None:
    """Show that the test above can fail, and that either of the two defences is enough."""
    text = page(report(STRINGS[0])).replace("\\u003c", "<").replace("\\u003e", ">")
    if not policy:
        text = text.replace("Content-Security-Policy", "X-Nothing")
    file = tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    opened = browser.new_page()
    opened.goto(file.as_uri())
    assert opened.evaluate("window.pwned") == (None if policy else 1)
    opened.close()


def test_numbers_that_json_lacks_are_shown_as_such(open_page) -> None:
    values = (float("nan"), float("inf"), -0.5, None, 0.0)
    lines, _, _, _, table = panels()
    series = (replace(lines.series[0], y=values),)
    rows = (("a", 1.0, None, float("nan")), ("b", 2.0, None, float("-inf")))
    opened = open_page(page(with_panels(replace(lines, series=series), replace(table, rows=rows))))
    assert opened.locator("#panel-table td:last-child").all_inner_texts() == ["NaN", "-Infinity"]
    opened.locator("#panel-lines summary").click()
    shown = opened.locator("#panel-lines tbody td:last-child").all_inner_texts()
    assert shown == ["NaN", "Infinity", "-0.5", NO_VALUE, "0"]
