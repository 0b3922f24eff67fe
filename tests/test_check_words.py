"""The word check finds what it should, and nothing in plain text."""

import subprocess
from pathlib import Path

from tests.check_words import findings

OFFENDING = '''"""What a medium keeps."""

# Whoever asks gets the law anew.
told_rows = 1
"""How many rows are read."""


def load() -> str:
    """The rows of a file."""
    return "a server is away"
'''
CLEAN = '''"""Rows of a file."""

# Sorted, because ranks follow from the order.
row_count = 1


def load() -> str:
    """Return the rows of a file; process each once."""
    return "the server did not answer"
'''


def found(root: Path, **files: str) -> list[str]:
    """Return the findings in a repository of these files."""
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for name, text in files.items():
        path = root / name.replace("_", ".")
        path.write_text(text)
        subprocess.run(["git", "add", path.name], cwd=root, check=True)
    return list(findings(["."], root))


def test_offending_words_are_found_with_their_lines(tmp_path: Path) -> None:
    lines = found(tmp_path, part_py=OFFENDING, page_md="# Title\n\nThe pupil is told.\n")
    for start in (
        "part.py:1: docstring is a relative clause",
        "part.py:3: words: 'Whoever'",
        "part.py:3: words: 'law'",
        "part.py:3: words: 'anew'",
        "part.py:4: identifier told_rows: told",
        "part.py:5: docstring is a relative clause",
        "part.py:8: docstring of load: no imperative: the",
        "part.py:10: words: 'is away'",
        "page.md:3: words: 'pupil'",
        "page.md:3: words: 'told'",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_plain_words_are_not_found(tmp_path: Path) -> None:
    assert found(tmp_path, part_py=CLEAN, page_md="# Title\n\nRows are sorted.\n") == []
