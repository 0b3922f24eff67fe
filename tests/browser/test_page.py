"""The page of a report in a browser: what it draws, for all readers, on screens and on paper."""

import re
from dataclasses import replace

import pytest
from axe_playwright_python.sync_playwright import Axe

from logitcask.engine.report.page import page, report_json
from tests.browser.reports import NO_VALUE, lines, panels, report, with_panels

pytestmark = pytest.mark.needs("chromium")

SERIES = 8
"""Colours of lines and bars in page.css."""


def serious(opened) -> list[str]:
    """Return the findings of axe-core that keep readers from the content."""
    found = Axe().run(opened).response["violations"]
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_kind_of_panel_is_drawn_for_all_readers(open_page, shoot, theme) -> None:
    opened = open_page(page(report()), theme=theme)
    shoot(opened, f"panels-{theme}")
    assert opened.locator("h1").inner_text() == "Report of loss"
    for kind in ("lines", "heat", "bars", "timeline"):
        assert opened.locator(f"#panel-{kind} .chart svg").count(), kind
        assert opened.get_by_role("figure", name=f"{kind.title()} of loss").is_visible()
    assert opened.locator("#panel-table tbody tr").count() == 3
    assert opened.locator("#panel-lines .how").inner_text() == "The loss should fall."
    assert "Accuracy of loss: No loss was evaluated." in opened.locator(".absent").inner_text()
    assert opened.locator("#summary li").all_text_contents() == [
        "✓good: The loss fell.",
        "!warning: The loss is old.",
    ]
    assert serious(opened) == []
    # Colours of lines have 3:1 to their card, and the check can fail: pale text is found.
    assert [ratio for ratio in contrasts(opened) if ratio < 3] == []
    opened.evaluate("document.querySelector('.how').style.color = 'rgb(128 128 128 / .3)'")
    assert any("color-contrast" in each for each in serious(opened))


def contrasts(opened) -> list[float]:
    """Return the contrast of each colour of lines to the card (WCAG 2.2, 1.4.11)."""
    names = ["--card", *(f"--series-{number}" for number in range(SERIES))]
    colours = opened.evaluate(
        """names => names.map(name => {
            const probe = document.createElement("i");
            probe.style.color = `var(${name})`;
            document.body.append(probe);
            const found = getComputedStyle(probe).color;
            probe.remove();
            return found.match(/\\d+/g).slice(0, 3).map(Number);
        })""",
        names,
    )
    card, *series = [luminance(colour) for colour in colours]
    return [(max(card, each) + 0.05) / (min(card, each) + 0.05) for each in series]


def luminance(colour: list[int]) -> float:
    """Return the relative luminance of an sRGB colour (WCAG 2.2)."""
    parts = [each / 255 for each in colour]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def cells(opened, panel: str) -> list[list[str]]:
    """Return the table of a panel, the one below a chart opened first."""
    if opened.locator(f"#panel-{panel} details").count():
        opened.locator(f"#panel-{panel} summary").click()
        opened.wait_for_selector(f"#panel-{panel} tbody tr")
    rows = opened.locator(f"#panel-{panel} tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def test_values_and_units_are_those_of_the_report(open_page) -> None:
    opened = open_page(page(report()))
    assert cells(opened, "lines")[:3] == [
        ["step", "loss (nats)", "loss of held-out rows (nats)"],
        ["1", "0.5", "0.75"],
        ["2", "0.25", NO_VALUE],
    ]
    assert cells(opened, "heat")[1] == ["loss", "0.1", "0.2", NO_VALUE]
    assert cells(opened, "bars") == [
        ["name", "group", "loss (MB)"],
        ["topk_ids", "score", "1.5"],
        ["topk_ids", "loss", "0.5"],
        ["loss", "score", "0.25"],
    ]
    assert cells(opened, "timeline")[1] == ["sampler", "rollout", "0", "2", "loss"]
    drawn = opened.locator("#panel-bars .chart").inner_text()
    assert "2 MB" in drawn
    assert "250 kB" in drawn
    assert opened.locator("#panel-heat .legend").inner_text() == "no value"
    opened.locator("#panel-lines .chart svg").first.hover(position={"x": 60, "y": 60})
    tip = opened.locator("#panel-lines [aria-label=tip]").evaluate("node => node.textContent")
    assert tip.split("\u200b")[1:] == [
        "step 1",
        "loss  0.5 nats",
        "loss of held-out rows  0.75 nats",
    ]


def test_tables_sort_and_show_the_whole_of_what_they_cut(open_page) -> None:
    opened = open_page(page(report()))
    assert cells(opened, "table")[:3] == [
        ["loss", "tokens", "size (MB)", "note"],
        ["b", "1,200", "2.5", "loss"],
        ["a", "30.5", "1", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822c"],
    ]
    head = opened.locator("#panel-table th", has_text="tokens")
    # Largest first, then smallest first; a row without a value stays last.
    for order, sort in ((["b", "a", "loss"], "descending"), (["a", "b", "loss"], "ascending")):
        head.locator("button").click()
        assert [row[0] for row in cells(opened, "table")[1:]] == order
        assert head.get_attribute("aria-sort") == sort
    digest = opened.locator("#panel-table .long")
    assert digest.get_attribute("title") == digest.inner_text()
    assert digest.evaluate("node => node.scrollWidth > node.clientWidth")
    right = "node => getComputedStyle(node).textAlign"
    assert opened.locator("#panel-table td.number").first.evaluate(right) == "right"


def test_runs_differ_in_colour_and_quantities_in_dashes(open_page) -> None:
    one = open_page(page(with_panels(lines())))
    two = open_page(page(with_panels(*lines_of_two_runs(), runs=("first", "second"))))
    looks = (
        "nodes => nodes.map(n => [getComputedStyle(n).stroke, n.getAttribute('stroke-dasharray')])"
    )
    strokes = "#panel-lines .chart svg [data-mark=line]"
    first, held_out = one.locator(strokes).evaluate_all(looks)
    assert first[0] != held_out[0]
    assert first[1] != held_out[1]
    looks_of_two = two.locator(strokes).evaluate_all(looks)
    colours, dashes = zip(*looks_of_two, strict=True)
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert dashes[0] == dashes[2] != dashes[1] == dashes[3]
    texts = two.locator("#panel-lines .legend li").all_inner_texts()
    assert texts == ["loss", "loss of held-out rows", "first", "second"]
    assert two.locator("#runs li").all_inner_texts() == ["first", "second"]
    # Pointing at a run makes the lines of the other one pale.
    two.locator("#panel-lines .legend li", has_text="second").hover()
    pale = two.locator(strokes).evaluate_all("nodes => nodes.map(n => n.matches('.dim'))")
    assert pale == [True, True, False, False]


def lines_of_two_runs():
    """Return one panel of lines that two runs share."""
    made = lines()
    again = tuple(replace(each, run=1) for each in made.series)
    return (replace(made, series=(*made.series, *again)),)


def test_a_narrow_page_does_not_scroll_sideways(open_page, shoot) -> None:
    opened = open_page(page(report("loss of a name that is rather long")), width=360, height=740)
    shoot(opened, "panels-narrow")
    width = "document.documentElement.scrollWidth"
    assert opened.evaluate(width) == 360
    opened.evaluate("document.querySelector('.how').style.minWidth = '500px'")
    assert opened.evaluate(width) > 360


def test_paper_has_every_row_and_whole_timelines(open_page) -> None:
    opened = open_page(page(with_panels(*long_panels())), theme="dark")
    opened.get_by_role("button", name="More detail").click()
    state = """() => ({
        rows: document.querySelectorAll("#panel-table tbody tr").length,
        wide: document.querySelector(".lanes-scroll svg").clientWidth,
        nav: getComputedStyle(document.querySelector("nav")).display,
        page: getComputedStyle(document.body).backgroundColor,
    })"""
    before = opened.evaluate(state)
    opened.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = ({state})(); }})")
    assert opened.pdf(format="A4").startswith(b"%PDF")
    printed = opened.evaluate("window.printed")
    assert (before["rows"], printed["rows"]) == (12, 40)
    assert printed["wide"] < 680 < before["wide"]
    assert opened.evaluate(state) == before
    opened.emulate_media(media="print", color_scheme="dark")
    printed = opened.evaluate(state)
    assert (printed["nav"], printed["page"]) == ("none", "rgb(255, 255, 255)")


def long_panels():
    """Return a table of 40 rows and a timeline."""
    made = report().sections[1].panels
    timeline, table = made
    rows = tuple((f"row {number}", float(number), None, None) for number in range(40))
    return timeline, replace(table, rows=rows)


def test_panels_without_values_are_drawn(open_page) -> None:
    chart, heat, bars, timeline, table = panels()
    nothing = [
        replace(chart, series=()),
        replace(chart, id="none", series=(replace(chart.series[0], y=(None,) * 5),)),
        replace(chart, id="log", y=replace(chart.y, form="log"), series=(zeros(chart),)),
        replace(heat, xs=(), ys=(), values=()),
        replace(bars, bars=()),
        replace(timeline, stretches=()),
        replace(table, rows=()),
    ]
    opened = open_page(page(with_panels(*nothing)))
    assert opened.locator(".chart").count() == len(nothing)
    assert opened.locator("#panel-log .note").inner_text().startswith("5 values of 0 or less")
    empty = open_page(page(replace(report(runs=()), summary=(), sections=())))
    assert empty.locator("main").inner_text() == ""


def zeros(chart):
    """Return a series that has no place on a logarithmic axis."""
    return replace(chart.series[0], y=(0.0,) * 5)


def test_refresh_keeps_the_place_the_theme_and_the_choices(open_page) -> None:
    opened = open_page(page(with_panels(*report().sections[0].panels, *long_panels())))
    opened.get_by_role("button", name="Theme: system").click()
    opened.get_by_role("button", name="Theme: light").click()
    opened.locator("#panel-table th button").nth(1).click()
    opened.get_by_role("button", name="More detail").click()
    opened.locator("#panel-lines summary").click()
    opened.evaluate("document.getElementById('panel-heat').seen = true")
    opened.evaluate("scrollTo(0, 700)")
    changed = with_panels(lines("drift"), *report().sections[0].panels[1:], *more_rows())
    opened.evaluate("text => refresh(JSON.parse(text))", report_json(changed))
    opened.wait_for_selector("html[data-drawn=all]", state="attached")
    assert opened.locator("#panel-lines h3").inner_text() == "Lines of drift"
    assert "drift (nats)" in opened.locator("#panel-lines .chart").inner_text()
    assert opened.locator("#panel-lines details").get_attribute("open") == ""
    assert opened.evaluate("document.getElementById('panel-heat').seen")
    assert opened.evaluate("document.documentElement.dataset.theme") == "dark"
    assert opened.evaluate("scrollY") == 700
    assert opened.locator("#panel-table tbody tr td").first.inner_text() == "row 40"
    assert opened.get_by_role("button", name="Less detail").is_enabled()


def more_rows():
    """Return the long panels with one more row."""
    timeline, table = long_panels()
    stretches = (*timeline.stretches, replace(timeline.stretches[0], start=6.0, end=7.0))
    rows = (*table.rows, ("row 40", 40.0, None, None))
    return replace(timeline, stretches=stretches), replace(table, rows=rows)


def test_pages_of_a_report_differ_in_the_nonce_alone() -> None:
    made = [page(report()) for _ in range(2)]
    nonces = [re.search(r"'nonce-([\w-]{20,})'", each)[1] for each in made]
    assert nonces[0] != nonces[1]
    plain = [each.replace(nonce, "") for each, nonce in zip(made, nonces, strict=True)]
    assert plain[0] == plain[1]
    # d3 and Plot are 490 kB of it; 200 responses have the rest of 2 MB.
    assert len(made[0].encode()) < 650_000
    assert "connect-src" not in plain[0]
    assert "connect-src 'self'" in page(report(), live="/report.json")
