"""Rules by which a teacher's response is no text to learn from.

    truncated       its length was reached before a stop token
    missing         it lacks a text that an answer has, by default \\boxed
    repeated_line   a line of 20 characters or more, 5 times
    repeated_ngram  100 characters, 3 times without overlap
    repeated_block  50 characters 3 times in a row, in texts of more than 5,000

The first that applies is the reason. Source: arXiv 2604.13016, appendix on the data of the cold
start (truncated and degenerate responses are dropped), and the rules of the released
scripts/infer/vllm_rollout.py (github.com/thunlp/OPD). Deviation: that script looks for
repeated_ngram at every tenth character and counts places that overlap, so that it misses most
periods and rejects a rule of 120 dashes; here every place counts, and overlaps do not.

The time is linear in the length of the text.
"""

from collections import Counter

import numpy as np

from logitcask.engine.types import Array

TRUNCATED, MISSING = "truncated", "missing"
REPEATED_LINE, REPEATED_NGRAM, REPEATED_BLOCK = "repeated_line", "repeated_ngram", "repeated_block"
REASONS = (TRUNCATED, MISSING, REPEATED_LINE, REPEATED_NGRAM, REPEATED_BLOCK)

LINE, LINES = 20, 5
"""Characters of a line that counts, without blanks at its ends; occurrences."""
NGRAM, NGRAMS = 100, 3
BLOCK, BLOCKS = 50, 3
LONG = 5000
"""Characters; texts of no more are not searched for repeated blocks."""
_BASE = 0x9E3779B97F4A7C15
"""An odd number: its powers have inverses modulo 2^64."""


def rejection(text: str, *, truncated: bool, require: str) -> str:
    """Return the reason to reject a response, one of REASONS; "" for none.

    truncated: it ended by its length. require: a text that must occur; "" = none.
    """
    if truncated:
        return TRUNCATED
    if require and require not in text:
        return MISSING
    if repeats_line(text):
        return REPEATED_LINE
    if repeats_ngram(text):
        return REPEATED_NGRAM
    return REPEATED_BLOCK if len(text) > LONG and repeats_block(text) else ""


def repeats_line(text: str) -> bool:
    """Return whether one line of LINE characters or more occurs LINES times."""
    lines = Counter(line.strip() for line in text.split("\n"))
    return any(count >= LINES and len(line) >= LINE for line, count in lines.items())


def repeats_ngram(text: str) -> bool:
    """Return whether NGRAM characters occur NGRAMS times without overlap."""
    if len(text) < NGRAM * NGRAMS:
        return False
    order = np.argsort(keys := _window_keys(_codes(text)), kind="stable")
    first = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]] + np.uint64(1)))
    ends = np.append(first[1:], len(order))
    # Only windows with room for all occurrences are compared.
    wide = order[ends - 1] - order[first] >= NGRAM * (NGRAMS - 1)
    return any(
        _without_overlap(text, order[a:b])
        for a, b in zip(first[wide], ends[wide], strict=True)
        if b - a > 2
    )


def _codes(text: str) -> Array:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


def _window_keys(codes: Array) -> Array:
    """Return [n - NGRAM + 1] uint64, one polynomial of the codes of each window, modulo 2^64.

    Equal windows have equal keys; the reverse is likely, and the caller compares the texts.
    """
    inverse = np.uint64(pow(_BASE, -1, 1 << 64))
    powers = np.cumprod(np.full(len(codes), np.uint64(_BASE)), dtype=np.uint64)
    back = np.cumprod(np.full(len(codes), inverse), dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers, dtype=np.uint64)])
    keys: Array = (sums[NGRAM:] - sums[:-NGRAM]) * back[: len(sums) - NGRAM]
    return keys


def _without_overlap(text: str, places: Array) -> bool:
    """Return whether one text occurs NGRAMS times without overlap at some of these places."""
    found: dict[str, tuple[int, int]] = {}
    for place in places.tolist():
        window = text[place : place + NGRAM]
        count, free = found.get(window, (0, 0))
        if place < free:
            continue
        if count + 1 == NGRAMS:
            return True
        found[window] = count + 1, place + NGRAM
    return False


def repeats_block(text: str) -> bool:
    """Return whether BLOCK characters occur BLOCKS times in a row."""
    codes = _codes(text)
    # A run of so many characters that equal those BLOCK places later.
    run = BLOCK * (BLOCKS - 1)
    same = np.concatenate([[0], np.cumsum(codes[:-BLOCK] == codes[BLOCK:])])
    return bool((same[run:] - same[:-run] == run).any()) if len(same) > run else False
