"""Find words that the house does not use: `python tests/check_words.py [PATH ...]`.

It reads identifiers, docstrings, comments and messages of Python files, and the text of Markdown
files. It prints one line for each finding, then their count, and exits with 1 if there is one.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ("tests/check_words.py", "tests/test_check_words.py")
"""These have the words on purpose."""

IDENTIFIERS = {
    *("anew", "apart", "asked", "asking", "behaviour", "brought", "course", "desk"),
    *("examined", "examiner", "exams", "fleet", "foreign", "heal", "law", "laws", "learner"),
    *("leftovers", "look", "looked", "medium", "miss", "notice", "notices", "privileged"),
    *("pupil", "remedy", "retire", "rolling", "strays", "swept", "told", "unseal"),
    *("verdict", "waits", "wanted", "weigh", "whoever"),
}
"""Parts of a name between underscores or capitals."""

KEYS = {"foreign_eos"}
"""Configuration keys that contain one of these."""

ON_DISK = {"told log-probs"}
"""Values that stores hold."""

PHRASES = [
    *(r"\b(who|whom|whoever|nobody|somebody|anybody)\b", r"\blaws?\b"),
    *(r"\b(told|anew|beside)\b", r"\ball the same\b", r"\basked (at|of|for)\b", r"\bremedy\b"),
    *(r"\bis asked\b", r"\bwas asked\b", r"\bare asked\b", r"\bis away\b", r"\bare away\b"),
    *(r"\bpupils?\b", r"\bnotices?\b", r"\b(retire|retires|retired|heals?)\b", r"\bstrays\b"),
    *(r"\bmiss_mass\b", r"\bdrift_k3\b", r"\bforeign student\b", r"\bprivileged\b"),
    *(r"\b(said|says) (that|so|what|it|of|which)\b", r"\bof one's own\b", r"\bare both of\b"),
]
"""In docstrings, comments, messages and Markdown."""

NO_FIRST_WORD = {
    *("a", "after", "all", "also", "an", "and", "are", "as", "at", "before", "both"),
    *("but", "by", "each", "every", "false", "for", "from", "here", "how", "ids", "if"),
    *("in", "is", "its", "no", "none", "not", "of", "on", "one", "only", "rows", "same"),
    *("so", "that", "the", "their", "there", "these", "this", "those", "to", "true"),
    *("two", "unless", "until", "what", "whatever", "when", "where", "whether", "which"),
    *("who", "whose", "with"),
}
"""A docstring of a function begins with an imperative verb, so with none of these."""

RELATIVE = re.compile(r"(what|who|whether|whose|how)\b", re.IGNORECASE)
"""A text about a thing begins with none of these."""

VERBS_IN_S = {"pass", "process", "compress", "decompress", "express", "address", "access", "press"}


def python(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, finding) of a Python file."""
    text = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", token.string)
            if token.string in KEYS:
                continue
            for part in {each.lower() for each in parts} & IDENTIFIERS:
                yield token.start[0], f"identifier {token.string}: {part}"
        elif token.type == tokenize.COMMENT:
            yield from phrases(token.start[0], token.string)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        # A string of one word is a key or a value, which may lie on a disk already.
        text_of = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text_of, str) and " " in text_of and text_of not in ON_DISK:
            yield from phrases(node.lineno, text_of)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            word = re.match(r"[A-Za-z_]+", doc or "")
            if doc and word is None:
                yield node.lineno, f"docstring of {node.name} begins with no verb: {doc[:40]}"
            elif word:
                first = word.group().lower()
                if first in NO_FIRST_WORD or (first.endswith("s") and first not in VERBS_IN_S):
                    yield (
                        node.lineno,
                        f"docstring of {node.name}: no imperative: {first}",
                    )
        if isinstance(node, ast.ClassDef | ast.Module):
            # The docstring, and the text below a field or a constant.
            for line in node.body:
                value = line.value if isinstance(line, ast.Expr) else None
                doc = value.value if isinstance(value, ast.Constant) else None
                if isinstance(doc, str) and RELATIVE.match(doc):
                    yield line.lineno, f"docstring is a relative clause: {doc[:40]}"


def phrases(line: int, text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, finding) of a text that begins at `line`."""
    # One word in backticks is a key or a name, which may lie on a disk already.
    for number, part in enumerate(re.sub(r"`\w+`", "", text).splitlines()):
        for phrase in PHRASES:
            if found := re.search(phrase, part, re.IGNORECASE):
                yield line + number, f"words: {found.group()!r} in {part.strip()[:70]!r}"


def findings(paths: list[str], root: Path = ROOT) -> Iterator[str]:
    """Yield one line for each finding in the tracked files of `root` below `paths`."""
    listed = subprocess.run(
        ["git", "ls-files", *paths], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        path = root / name
        if not path.is_file() or path.is_symlink() or name in OWN:
            continue
        if name.endswith(".py"):
            found = python(path)
        elif name.endswith(".md"):
            found = phrases(1, path.read_text())
        else:
            continue
        yield from (f"{name}:{line}: {what}" for line, what in found)


def main() -> int:
    """Print the findings and their count."""
    lines = list(findings(sys.argv[1:] or ["engine", "kernels", "cli", "tests", "bench", "*.md"]))
    print(*lines, len(lines), sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
