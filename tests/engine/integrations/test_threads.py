"""THREADS.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_answer_is_a_test_of_ours() -> None:
    page = (ROOT / "engine/integrations/THREADS.md").read_text()
    named = re.findall(r"`(\S+\.py)::(\w+)`", page)
    assert len(named) >= 35
    gone = [
        f"{file}::{name}"
        for file, name in named
        if f"\ndef {name}(" not in (ROOT / "tests" / file).read_text()
    ]
    assert not gone
    # Each row has an answer, or "none" in bold.
    rows = [line for line in page.splitlines() if re.match(r"\| \S+#\d", line)]
    silent = [row for row in rows if not re.search(r"::|\]\(|\*\*none\*\*|as \S+#", row)]
    assert len(rows) >= 35
    assert not silent
