"""Pages in Debian's Chromium: a page that logs an error or leaves its file fails the test."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

SHOTS = os.environ.get("LOGITCASK_SCREENSHOTS")
"""A folder that keeps screenshots; none are made without it."""

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start one browser for a file of tests: its event loop may not outlive them."""
    with sync_playwright() as play:
        found = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield found
        found.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[OpenPage]:
    """Return a function that opens HTML text, or a URL, and waits until all panels are drawn.

    Afterwards the test fails if the page logged an error, raised one, or requested
    anything but itself and what begins with `origin`.
    """
    contexts = []
    faults: list[str] = []

    def open_one(
        content: str,
        *,
        theme: str = "light",
        width: int = 1280,
        height: int = 900,
        origin: str = "",
        expect_faults: bool = False,
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if theme == "dark" else "light",
            reduced_motion="reduce",
        )
        contexts.append(context)
        page = context.new_page()
        if "://" in content.split("\n")[0]:
            url = content
        else:
            file = tmp_path / f"page{len(contexts)}.html"
            file.write_text(content, encoding="utf-8")
            url = file.as_uri()
        own = faults if not expect_faults else []

        def requested(address: str) -> None:
            if not (address == url or address.startswith("data:")) and not (
                origin and address.startswith(origin)
            ):
                own.append(f"request: {address[:200]}")

        page.on("console", lambda m: own.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: own.append(f"error: {error}"))
        page.on("request", lambda request: requested(request.url))
        page.goto(url)
        page.wait_for_selector("html[data-drawn=all]", state="attached")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not faults, faults


@pytest.fixture
def shoot() -> Callable[[Page, str], None]:
    """Return a function that keeps a screenshot of a page in LOGITCASK_SCREENSHOTS."""

    def keep(page: Page, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)

    return keep
