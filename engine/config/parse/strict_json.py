"""JSON from files and flags that are not trusted: every value is one that can be stored again."""

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 100
"""Lists and objects inside each other, at most: encoding and comparing them is recursive."""
MAX_DIGITS = 300
"""Digits of an integer, at most: reading and writing one takes quadratic time."""


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError with one line for text that is none or is beyond the bounds.

    Refused too: NaN and infinite numbers, also as 1e400; half a surrogate pair; and a key that
    occurs twice in an object.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_distinct,
        )
    except RecursionError:
        raise ValueError(f"nested too deeply, at most {MAX_DEPTH} levels may be") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for each in level for inner in _containers(each)]
    if level:
        raise ValueError(f"nested too deeply, at most {MAX_DEPTH} levels may be")
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half a surrogate pair, which is no text") from None
    return value


def count_values(text: bytes) -> int:
    """Return an upper bound of the number of values in JSON text: each costs about 100 bytes."""
    return sum(text.count(mark) for mark in (b",", b"[", b"{")) + 1


def _containers(value: Any) -> list[Any]:
    """Return the lists and objects directly inside a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, dict | list)]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text:.20} is beyond 64-bit floats")
    return number


def _short(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits, and at most {MAX_DIGITS} may be")
    return int(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in keys if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} occurs twice in an object")
    return keys
