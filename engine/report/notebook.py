"""A report in a notebook: Jupyter, VS Code, Colab, and whatever else calls `_repr_html_`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcask.engine.report.build import build_report
from logitcask.engine.report.page import page

HEIGHT = 900
"""Pixels of the frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotebookReport:
    """A page that a notebook shows as the value of a cell."""

    title: str
    html: str
    """The page, as `logitcask report` writes it."""
    height: int
    """Pixels of the frame in the notebook."""

    def _repr_html_(self) -> str:
        """Return a frame that holds the page.

        The sandbox gives it an origin of its own: its scripts draw, and reach neither the notebook
        nor a network, which the page's own policy forbids too.
        """
        # Within single quotes only these two end the text or change it.
        text = self.html.replace("&", "&amp;").replace("'", "&#x27;")
        return (
            f'<iframe title="logitcask report" sandbox="allow-scripts" width="100%" '
            f'height="{self.height}" style="border:0" srcdoc=\'{text}\'></iframe>'
        )

    def __repr__(self) -> str:
        return f"<logitcask report of {self.title!r}: {len(self.html):,} characters of HTML>"

    def save(self, path: str | Path) -> Path:
        """Write the page to a file and return its path; an earlier file is replaced."""
        path = Path(path)
        path.write_text(self.html, encoding="utf-8")
        return path


def show(
    target: str | Path,
    compare: Sequence[str | Path] = (),
    *,
    height: int = HEIGHT,
    **options: Any,
) -> NotebookReport:
    """Return the report of a run or a store for a notebook.

    target, compare, options: as of `build_report`. height: pixels. Raises as `build_report`.
    """
    report = build_report(target, compare, **options)
    return NotebookReport(title=report.title, html=page(report), height=height)
