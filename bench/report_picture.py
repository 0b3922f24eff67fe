"""The picture of a report for the README: summary, some charts and the token viewer.

Run: .venv/bin/python bench/report_picture.py [--run demo-out/runs/overlap] [--out FILE]

Needs Playwright, Pillow and a Chromium; --chromium names it. The page is light and 1200 pixels
wide. The picture has 256 colours, for its file to be small.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

from bench_report import WORK, browser
from results import RESULTS, ROOT

from logitcask.engine.report.build import build_report
from logitcask.engine.report.write import write_page

WIDTH, HEIGHT = 1200, 1420
SENTENCES = 4
"""Of the summary."""
COLOURS = 256
MOST_BYTES = 300_000
SHOWN = ("summary", "dynamics", "tokens")
"""Sections of the page in the picture, in this order; of the dynamics the first row."""
STYLE = f"""
nav, .panel details, .absent, footer, #theme {{ display: none !important; }}
#dynamics .grid > :nth-child(n + 3) {{ display: none !important; }}
.summary > :nth-child(n + {SENTENCES + 1}) {{ display: none !important; }}
"""


def main(arguments: list[str]) -> None:
    """Write the picture and print its size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=ROOT / "demo-out" / "runs" / "overlap")
    parser.add_argument("--out", type=Path, default=RESULTS / "report.png")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="Path of the browser.")
    options = parser.parse_args(arguments)
    WORK.mkdir(parents=True, exist_ok=True)
    page = WORK / "picture.html"
    write_page(page, build_report(options.run))
    with browser(options.chromium) as started:
        data = smaller(shot(started, page))
    options.out.write_bytes(data)
    print(f"{options.out}: {len(data):,} bytes, at most {MOST_BYTES:,}: {len(data) <= MOST_BYTES}")


def shot(started: Any, page: Path) -> bytes:
    """Return the screenshot of a page whose viewer shows a token."""
    context = started.new_context(
        viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light", reduced_motion="reduce"
    )
    tab = context.new_page()
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector(".viewer[data-ready] .tokens")
    tab.add_style_tag(content=STYLE)
    hidden = f"{[f'#{name}' for name in SHOWN]}"
    tab.evaluate(
        f"() => {{ const shown = {hidden}; "
        "for (const each of document.querySelectorAll('main section[id], #content > section')) "
        "if (!shown.includes('#' + each.id)) each.remove(); "
        "const content = document.getElementById('content'); "
        "for (const name of shown) content.append(document.querySelector(name)); }"
    )
    tab.locator(".tokens").first.focus()
    tab.keyboard.press("n")  # to the first bad token, with both top lists
    tab.wait_for_timeout(500)
    found: bytes = tab.screenshot()
    context.close()
    return found


def smaller(data: bytes) -> bytes:
    """Return a PNG with fewer colours."""
    from PIL import Image

    out = io.BytesIO()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
