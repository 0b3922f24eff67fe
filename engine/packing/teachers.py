"""Teachers of a run: one, or one for each value of a field of the prompts.

    NAME                   the scores of one teacher
    VALUE=NAME,VALUE=NAME  of the teacher that is named for the prompt's value of a field

With several teachers a row has the scores of the teacher of its prompt and of no other, so a unit
needs the scores of those teachers alone that its prompts name (MOPD, as in arXiv 2601.02780). All
of them must have the tokenizer of the student, as any teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logitcask.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Teachers:
    """The names of scores, and the values of the prompt field that each is for."""

    names: tuple[str, ...]
    """Distinct, in order."""
    field: str = ""
    """Key of the prompts file; empty for one teacher."""
    routes: Mapping[str, str]
    """Value of the field -> name; empty for one teacher."""

    @classmethod
    def parse(cls, text: str | None, field: str | None = None) -> "Teachers":
        """Parse the text of `--teacher` and `--teacher-field`. Raises ConfigError."""
        if not text:
            raise ConfigError(
                f"--teacher-field {field} without --teacher",
                hint="give --teacher VALUE=NAME,VALUE=NAME with the values of that key",
            )
        if "=" not in text:
            if field is not None:
                raise ConfigError(
                    f"--teacher-field {field} with --teacher {text}: one teacher is for all values",
                    hint=f"give --teacher VALUE=NAME,VALUE=NAME with the values of {field!r}, or "
                    "leave --teacher-field out",
                )
            return cls(names=(text,), routes={})
        routes: dict[str, str] = {}
        for part in text.split(","):
            value, equals, name = (each.strip() for each in part.partition("="))
            if not (value and equals and name):
                raise ConfigError(
                    f"--teacher {text}: {part!r} is not VALUE=NAME",
                    hint="e.g. --teacher code=qwen-coder,math=qwen-math --teacher-field domain",
                )
            if value in routes:
                raise ConfigError(
                    f"--teacher {text}: {value!r} has two teachers", hint="give each value once"
                )
            routes[value] = name
        if field is None:
            raise ConfigError(
                f"--teacher {text} without --teacher-field",
                hint="name the key of the prompts file that holds these values, e.g. "
                "--teacher-field domain",
            )
        return cls(names=tuple(dict.fromkeys(routes.values())), field=field, routes=routes)

    def of_prompts(self, ids: Sequence[str], extras: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the teacher of each prompt, from its id and its other keys.

        Raises ConfigError for a prompt without the field, or with a value that has no teacher.
        """
        if not self.routes:
            return [self.names[0]] * len(ids)
        found = []
        for name, extra in zip(ids, extras, strict=True):
            if self.field not in extra:
                raise ConfigError(
                    f"prompt {name!r} has no key {self.field!r}, and --teacher-field names it",
                    hint=f"its keys are: {', '.join(extra) or 'none'}; sample from prompts that "
                    "have it, or name another",
                )
            value = extra[self.field]
            if not isinstance(value, str) or value not in self.routes:
                raise ConfigError(
                    f"prompt {name!r} has {self.field} = {value!r}, and no teacher is for it",
                    hint=f"--teacher has one for {', '.join(self.routes)}; add VALUE=NAME, or "
                    "sample these prompts under another name",
                )
            found.append(self.routes[value])
        return found

    def __str__(self) -> str:
        """Return the text that a plan and run.json record."""
        if not self.routes:
            return self.names[0]
        return ",".join(f"{value}={name}" for value, name in self.routes.items())

    def record(self) -> dict[str, str]:
        """Return the entries of run.json; those of one teacher are as in earlier runs."""
        return {"teacher": str(self), **({"teacher_field": self.field} if self.field else {})}
