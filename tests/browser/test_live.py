"""The live page and the page in a notebook, in a browser."""

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from logitcask.engine.report.build import build_report
from logitcask.engine.report.notebook import show
from logitcask.engine.report.panels import Report
from logitcask.engine.report.serve import Served, serve

WAIT_MS = 60_000
"""More than any page takes on a loaded machine."""

pytestmark = pytest.mark.needs("chromium")


def line(step: int) -> str:
    return json.dumps(
        {
            "progress/step": step,
            "loss": 1 / step,
            "progress/positions": 100 * step,
            "progress/seconds": 2.0 * step,
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text('{"rollouts": "main"}')
    (out / "metrics.jsonl").write_text("".join(line(step) + "\n" for step in range(1, 4)))
    (out / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    return out


class Server:
    """A server of a run, in a thread."""

    def __init__(self, run: Path) -> None:
        self._run, self._stop, begun = run, threading.Event(), threading.Event()

        def started(served: Served) -> None:
            self.url = served.url
            begun.set()

        self._thread = threading.Thread(
            target=serve,
            args=(self._report, [run]),
            kwargs={"stop": self._stop, "every_s": 0.0, "on_start": started},
        )
        self._thread.start()
        assert begun.wait(60)

    def _report(self) -> Report:
        return build_report(self._run, sequences=0)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def server(run: Path) -> Iterator[Server]:
    found = Server(run)
    yield found
    found.end()


def test_a_new_update_comes_to_the_open_page(open_page, shoot, server: Server, run: Path) -> None:
    opened = open_page(server.url, origin=server.url.split("?")[0])
    rows = opened.locator("#panel-loss details tbody tr")
    state = opened.locator("#freshness [role=status]")
    assert state.inner_text() == "Live"
    opened.locator("#panel-loss details").first.evaluate("each => each.open = true")
    assert rows.count() == 3
    opened.locator("#theme").click()
    theme = opened.locator("html").get_attribute("data-theme")
    opened.evaluate("scrollTo(0, 120)")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line(4) + "\n" + line(5)[:20])  # the last line is not whole yet
    expect(rows).to_have_count(4, timeout=WAIT_MS)
    assert "0.25" in rows.last.inner_text()
    assert "4" in opened.locator("#panel-live-now tbody").inner_text()
    assert opened.locator("html").get_attribute("data-theme") == theme
    assert opened.evaluate("scrollY") == 120
    assert re.fullmatch(r"Live\s*, news [0-9]+ s ago", opened.locator("#freshness").inner_text())
    shoot(opened, "live")
    found = Axe().run(opened).response["violations"]
    assert [each for each in found if each["impact"] in ("serious", "critical")] == []
    (run / ".lock").unlink()
    expect(state).to_have_text("Run has stopped before its end", timeout=WAIT_MS)


def test_a_lost_server_is_said(open_page, server: Server) -> None:
    opened = open_page(server.url, origin=server.url.split("?")[0], expect_faults=True)
    server.end()
    expect(opened.locator("#freshness [role=status]")).to_have_text(
        "Connection lost", timeout=WAIT_MS
    )
    assert "last answer" in opened.locator("#freshness").inner_text()


def test_a_page_without_the_token_holds_nothing(browser, server: Server) -> None:
    context = browser.new_context()
    page = context.new_page()
    answer = page.goto(server.url[:-1])
    assert answer is not None
    assert answer.status == 403
    assert "wrong or no token" in page.locator("body").inner_text()
    context.close()


def test_the_frame_of_a_notebook_draws_the_page(browser, run: Path) -> None:
    """Draw in the frame: of an origin of its own, and below a page that names no policy."""
    shown = show(run, sequences=0, height=700)
    hostile = shown.html.replace("<h1", "<!-- ' \" & &amp; &#x27; --><h1")
    frame_html = type(shown)(title="t", html=hostile, height=700)._repr_html_()
    context = browser.new_context()
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda each: faults.append(each.text) if each.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda each: faults.append(each.url))
    page.set_content(f"<!DOCTYPE html><p>cell</p>{frame_html}<p id='after'>next cell</p>")
    frame = page.frame_locator("iframe")
    frame.locator("#panel-loss .chart svg").first.wait_for(state="attached", timeout=WAIT_MS)
    assert frame.locator("h1").inner_text() == "run"
    assert page.locator("#after").inner_text() == "next cell"
    assert page.locator("iframe").evaluate("each => each.contentDocument") is None
    assert [each for each in faults if not each.startswith(("about:", "data:"))] == []
    context.close()
    saved = shown.save(run / "report.html")
    assert saved.read_text(encoding="utf-8") == shown.html
    assert repr(shown).startswith("<logitcask report of 'run'")
