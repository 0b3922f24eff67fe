"""Lines of JSON with their sha256, and small checks of the values in them."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import logitcask.engine.store.format.schema as schema
from logitcask.engine.config.parse.strict_json import count_values
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.identity import canonical
from logitcask.engine.store.format.entry import sha256

BROKEN = "restore it from a copy of the store; the records after it build on it"


def trailer(digest: str) -> bytes:
    """Return the last line of a file of lines: the sha256 of its first."""
    return b'{"sha256":"' + digest.encode() + b'"}\n'


def encode_sealed(content: Mapping[str, Any]) -> bytes:
    """Encode an object as one line of canonical JSON, and its digest as another."""
    line = canonical(content)
    return line + b"\n" + trailer(sha256(line))


def decode_sealed(data: bytes, where: str) -> tuple[dict[str, Any], str]:
    """Decode such lines to (object, its sha256). Raises IntegrityError for any other bytes."""
    line = data.partition(b"\n")[0]
    digest = sha256(line)
    if data[len(line) :] != b"\n" + trailer(digest):
        raise IntegrityError(f"{where}: does not match its own sha256", hint=BROKEN)
    return decode_line(line, where), digest


_FEW = 1 << 14
"""Bytes of a line that cannot hold too many values."""


def decode_line(line: bytes, where: str) -> dict[str, Any]:
    """Decode a line to an object, within bounds. Raises IntegrityError."""
    if len(line) > _FEW and (values := count_values(line)) > schema.MAX_RECORD_VALUES:
        most = schema.MAX_RECORD_VALUES
        raise IntegrityError(f"{where}: {values} JSON values, at most {most}", hint=BROKEN)
    try:
        content = json.loads(str(line, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: not JSON ({error})", hint=BROKEN) from error
    if type(content) is not dict:
        raise IntegrityError(f"{where}: not a JSON object", hint=BROKEN)
    return content


T = TypeVar("T")


def validated(make: Callable[[], T], what: str) -> T:
    """Return make(). Raises IntegrityError in place of the errors of invalid data."""
    try:
        return make()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{what} ({error})", hint=BROKEN) from error


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def matching(pattern: re.Pattern[str], text: Any) -> str:
    require(bool(pattern.fullmatch(text)), f"{text!r} is not allowed")
    return str(text)
