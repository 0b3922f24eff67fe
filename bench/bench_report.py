"""The report page: seconds to make it, its bytes, its first paint, and frames while it scrolls.

Run: .venv/bin/python bench/bench_report.py [--run demo-out/runs/overlap] [--runs 5]

The page is that of a run, by default of `make demo`. Scrolling is measured on another page, of one
response of 10,000 made-up tokens (score_rows.py), as the wheel moves it from its first token to its
last. Needs Playwright and a Chromium; --chromium names it. A row is appended to
bench/results/report.jsonl; times are only fit to be stated from a machine that does nothing else.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import results
from results import ROOT
from score_rows import kept_mask, rollouts_of, scores_of, student_of, synthetic
from store_common import seal_rollouts, seal_scores

from logitcask.engine.report.build import build_report
from logitcask.engine.report.write import write_page
from logitcask.engine.store import open_store

WORK = ROOT / "build" / "bench_report"
TOKENS = 10_000
PACKAGES = ["numpy", "playwright"]
BUILD_S, PAGE_BYTES, PAINT_S, SLOW_FRAME_MS = 5.0, 2_000_000, 1.0, 50.0
"""Bars: seconds to make the page, its bytes, seconds to its first paint, and milliseconds of a
frame of which next to none is slower while it scrolls."""
SLOW_SHARE = 0.05
WHEEL_PX, WHEELS = 400, 120

FRAMES = """() => {
  window.frames_ms = [];
  let before = performance.now();
  const next = (now) => {
    window.frames_ms.push(now - before);
    before = now;
    window.handle = requestAnimationFrame(next);
  };
  window.handle = requestAnimationFrame(next);
}"""


def main(arguments: list[str]) -> None:
    """Measure, append the row, and print the bars."""
    parser = results.option_parser(__doc__, "report")
    parser.add_argument("--run", type=Path, default=ROOT / "demo-out" / "runs" / "overlap")
    parser.add_argument("--runs", type=int, default=5, help="Repetitions of each time.")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="Path of the browser.")
    options = parser.parse_args(arguments)
    row = measure(options)
    results.append(options.out, row)
    for name, value, most in bars(row):
        print(f"{name:<40} {value:,.3g} (bar: {most:,.3g}), met: {value <= most}")


def measure(options: argparse.Namespace) -> results.Row:
    """Return the row of a run."""
    WORK.mkdir(parents=True, exist_ok=True)
    page, long_page = WORK / "run.html", WORK / "long.html"
    made: dict[str, list[float]] = {"build_s": [], "write_s": []}
    for _ in range(options.runs):
        begun = time.perf_counter()
        report = build_report(options.run)
        built = time.perf_counter()
        size = write_page(page, report)
        made["build_s"].append(built - begun)
        made["write_s"].append(time.perf_counter() - built)
    long_size = write_page(long_page, build_report(long_store()))
    with browser(options.chromium) as started:
        paints = [first_paint(started, page) for _ in range(options.runs)]
        frames = [scroll(started, long_page) for _ in range(options.runs)]
        version = started.version
    every = np.concatenate(frames)
    return {
        "bench": "report",
        "command": " ".join(["python", "bench/bench_report.py", *sys.argv[1:]]),
        "run": options.run.name,
        "runs": options.runs,
        **{name: round(statistics.median(times), 3) for name, times in made.items()},
        "first_build_s": round(made["build_s"][0] + made["write_s"][0], 3),
        "bytes": size,
        "panels": sum(len(section.panels) for section in report.sections),
        "responses": 0 if report.viewer is None else report.viewer["count"],
        "first_paint_s": round(statistics.median(paints), 3),
        "long_tokens": TOKENS,
        "long_bytes": long_size,
        "frames": len(every),
        "frame_ms_median": round(float(np.median(every)), 1),
        "frame_ms_p95": round(float(np.quantile(every, 0.95)), 1),
        "slow_frame_ms": SLOW_FRAME_MS,
        "slow_frames": round(float((every > SLOW_FRAME_MS).mean()), 4),
        "chromium": version,
        **results.environment(*PACKAGES),
    }


def bars(row: results.Row) -> list[tuple[str, float, float]]:
    """Return (what, value, bar) of a row; a value up to its bar meets it."""
    return [
        ("seconds to make the page, first time", row["first_build_s"], BUILD_S),
        ("bytes of the page", row["bytes"], PAGE_BYTES),
        ("seconds to the first paint", row["first_paint_s"], PAINT_S),
        (f"share of frames over {SLOW_FRAME_MS:g} ms", row["slow_frames"], SLOW_SHARE),
    ]


def long_store() -> str:
    """Return a store with one response of TOKENS made-up tokens and a teacher's scores of it."""
    folder = WORK / "store"
    shutil.rmtree(folder, ignore_errors=True)
    rows = replace(synthetic(TOKENS), lengths=np.array([TOKENS]))
    listed, log_p = student_of(rows, 0.8)
    store = open_store(folder, create=True)
    rollouts = rollouts_of(rows, (listed, log_p))
    base = seal_rollouts(store, rollouts, "default")
    scores = scores_of(rows, kept_mask(rows, 0.999, 16, 64), listed)
    seal_scores(store, scores, base, "default")
    return str(folder)


@contextmanager
def browser(chromium: str | None) -> Iterator[Any]:
    """Yield a browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


def first_paint(started: Any, page: Path) -> float:
    """Return the seconds from the request of a page to the first text or chart on the screen."""
    tab = started.new_page(viewport={"width": 1200, "height": 800})
    tab.goto(page.resolve().as_uri())
    entry = "performance.getEntriesByName('first-contentful-paint')[0]"
    tab.wait_for_function(f"() => {entry} !== undefined")
    seconds = float(tab.evaluate(f"() => {entry}.startTime")) / 1000
    tab.close()
    return seconds


def scroll(started: Any, page: Path) -> np.ndarray[Any, Any]:
    """Return the milliseconds of the frames while the wheel moves the tokens to their end."""
    tab = started.new_page(viewport={"width": 1200, "height": 800})
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector(".viewer[data-ready] .tokens")
    tokens = tab.locator(".tokens")
    assert tokens.locator("[role=option]").count() == TOKENS, "all tokens are there"
    tokens.scroll_into_view_if_needed()
    tokens.hover()
    tab.evaluate(FRAMES)
    for _ in range(WHEELS):
        tab.mouse.wheel(0, WHEEL_PX)
    found = tab.evaluate("() => { cancelAnimationFrame(window.handle); return window.frames_ms; }")
    tab.close()
    return np.array(found[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
