"""Findings of checks, for `logitcask doctor`."""

from dataclasses import dataclass
from typing import Literal

from logitcask.engine.errors import LogitcaskError


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check."""

    check: str
    state: Literal["ok", "note", "fault"]
    """note: a run works with a limitation; fault: it should not begin."""
    message: str
    hint: str = ""


def fault(check: str, error: LogitcaskError) -> Finding:
    """Return the finding of an error."""
    return Finding(check=check, state="fault", message=error.cause, hint=error.hint)
