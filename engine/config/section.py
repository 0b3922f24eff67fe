"""Base class of the sections of the configuration, and the types of their values."""

import tomllib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[a-z0-9][a-z0-9._-]{0,127}$"
Name = Annotated[str, Field(pattern=NAME)]
_EACH = NAME.strip("^$")
NAMES = rf"^{_EACH}([+]{_EACH})*$|^[^,=]+=[^,=]+(,[^,=]+=[^,=]+)*$"
Names = Annotated[str, Field(pattern=NAMES)]
"""A name, NAME+NAME, VALUE=NAME,VALUE=NAME, or NAME=WEIGHT,NAME=WEIGHT."""
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """Frozen, every key is known, and every number is finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


def parse_value(text: str) -> Any:
    """Parse a value as TOML does; a bare word, a path and all that is no TOML are text."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text.strip()
