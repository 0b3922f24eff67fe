"""Markdown tables, and the marked blocks of the READMEs that hold them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from results import ROOT

FOLDERS = ("bench", "cli", "engine", "kernels", "tests")


def markdown(head: list[str], rows: Iterable[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def filled(text: str, made: dict[str, str]) -> str:
    """Replace the text between `<!-- NAME -->` and `<!-- end -->` for every NAME of `made`."""

    def replaced(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    names = "|".join(map(re.escape, made))
    return re.sub(rf"<!-- ({names}) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def pages() -> list[Path]:
    """Return every README."""
    return [ROOT / "README.md", *(p for f in FOLDERS for p in (ROOT / f).rglob("README.md"))]


def fill_pages(made: dict[str, str]) -> None:
    """Rewrite the marked blocks of every README."""
    for page in pages():
        text = page.read_text()
        if (new := filled(text, made)) != text:
            page.write_text(new)
