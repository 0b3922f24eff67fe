"""The page of a report: one HTML text that holds data, style and scripts, and fetches nothing."""

import html
import json
import math
import re
import secrets
from pathlib import Path
from typing import Any

from logitcask.engine.report.panels import Report

ASSETS = Path(__file__).parent / "assets"
MARK = b'<meta name="generator" content="logitcask report">'
"""In the first 500 bytes of every page, so that no other file is replaced by one."""

STYLES = ("page.css", "viewer/viewer.css")

SCRIPTS = (
    *("vendor/d3.min.js", "vendor/plot.min.js"),
    *("format.js", "charts.js", "maps.js", "tables.js", "panels.js"),
    *(f"viewer/{name}.js" for name in ("data", "text", "detail", "list", "controls", "viewer")),
    "page.js",
)
"""In the order in which they run; they share globals, the last one draws the page."""

LIVE_STYLES, LIVE_SCRIPTS = ("live.css",), ("live.js",)
"""Of a page with `live` alone; the scripts run after the page is drawn."""


def page(report: Report, *, live: str = "") -> str:
    """Return the page as HTML that needs no other file and no network.

    `live` is a URL of the page's own server that answers with `report_json`; '' = a page that
    stays as it is. Two pages of one report differ in nothing but the nonce of their scripts.
    """
    nonce = secrets.token_urlsafe(16)
    names = (*SCRIPTS, *(LIVE_SCRIPTS if live else ()))
    styles = (*STYLES, *(LIVE_STYLES if live else ()))
    policy = [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'nonce-{nonce}'",
        "img-src data:",
        *(["connect-src 'self'"] if live else []),
        *("base-uri 'none'", "form-action 'none'"),
    ]
    parts = {
        "policy": "; ".join(policy),
        "live": html.escape(live),
        "style": "\n".join(_asset(name, "</style") for name in styles),
        "data": report_json(report),
        "scripts": "\n".join(
            f'<script nonce="{nonce}">\n{_asset(name, "</script")}\n</script>' for name in names
        ),
    }
    # In one pass: what a part holds is never read as a place for another one.
    template = (ASSETS / "page.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def report_json(report: Report) -> str:
    """Return the report as JSON that stays data inside a script element.

    The three characters that HTML reads are escaped, and so are halves of surrogate pairs, which
    UTF-8 cannot write. Numbers that JSON lacks become the texts NaN, Infinity and -Infinity.
    """
    text = json.dumps(
        _finite(report.as_json()), allow_nan=False, ensure_ascii=False, separators=(",", ":")
    )
    return re.sub("[<>&\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    """Replace the numbers that JSON lacks by their names."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def _asset(name: str, end: str) -> str:
    text = (ASSETS / name).read_text()
    assert end not in text.lower(), f"{name} would end its own element"
    return text
