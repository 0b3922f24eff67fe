"""File of the positions to score: JSONL, one line for each response that has any.

    {"prompt": "ID", "response": 0, "positions": [0, 7, 8]}

`response` counts the responses to the prompt in their order in the rollouts, from 0, which is its
default; positions count response tokens from 0. Responses without a line get no score. The file is
identified by what it lists: the order of lines and positions does not count.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.config.parse.strict_json import parse_json
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.identity import digest
from logitcask.engine.prompts.lines import refuse
from logitcask.engine.prompts.source import no_file, read_lines
from logitcask.engine.types import Array, Rollouts

FORM = 'write {"prompt": "ID", "response": 0, "positions": [0, 7]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionsFile:
    """Positions of responses."""

    listed: Mapping[tuple[str, int], tuple[int, ...]]
    """(prompt id, number of the response) -> positions, ascending."""

    @property
    def name(self) -> str:
        """Return the name of the request in provenance: `file:` and the digest of the content."""
        rows = [[*key, list(positions)] for key, positions in sorted(self.listed.items())]
        return f"file:{digest(rows)}"

    def check_prompts(self, ids: Iterable[str]) -> None:
        """Raise ConfigError for a prompt that is none of the rollouts'."""
        if unknown := sorted({prompt for prompt, _ in self.listed} - {*ids}):
            raise ConfigError(
                f"positions = file:...: {len(unknown)} of its prompts are not in the rollouts, "
                f"such as {unknown[0]!r:.80}",
                hint="name prompts by the ids of the prompts file, as `logitcask store show` does",
            )

    def rows(self, rollouts: Rollouts) -> Array:
        """Return [P] bool, the listed rows of a unit; ConfigError for one that it lacks."""
        rows = np.zeros(rollouts.positions, bool)
        numbers = dict.fromkeys(range(len(rollouts.prompts)), 0)
        found = dict[str, int]()
        for prompt, start, length in zip(
            rollouts.seq_prompt.tolist(), rollouts.seq_off, rollouts.lengths(), strict=False
        ):
            name = rollouts.prompts[prompt].id
            positions = self.listed.get((name, numbers[prompt]), ())
            if positions and positions[-1] >= length:
                raise ConfigError(
                    f"positions = file:...: prompt {name!r:.80}, response {numbers[prompt]}: "
                    f"position {positions[-1]}, and the response has {length} tokens",
                    hint="count the response tokens from 0",
                )
            rows[start + np.array(positions, np.int64)] = True
            numbers[prompt] += 1
            found[name] = numbers[prompt]
        for name, number in self.listed:
            if name in found and number >= found[name]:
                raise ConfigError(
                    f"positions = file:...: prompt {name!r:.80}, response {number}: there are "
                    f"{found[name]} responses to it",
                    hint="count the responses to a prompt from 0",
                )
        return rows


def read_positions(file: Path) -> PositionsFile:
    """Read a file of positions. Raises PromptError at the first invalid line."""
    listed: dict[tuple[str, int], tuple[int, ...]] = {}
    try:
        with file.open("rb") as stream:
            for number, text in read_lines(file, stream):
                key, positions = _line(file, number, text)
                if key in listed:
                    refuse(file, number, f"{key} has a line already", "write one line for each")
                listed[key] = positions
    except OSError as error:
        raise no_file(file, error) from error
    if not listed:
        raise ConfigError(f"{file} lists no position", hint=FORM)
    return PositionsFile(listed=listed)


def _line(file: Path, number: int, text: str) -> tuple[tuple[str, int], tuple[int, ...]]:
    try:
        line = parse_json(text)
    except ValueError as error:
        refuse(file, number, f"not valid JSON: {error}", FORM)
    keys: dict[str, Any] = line if isinstance(line, dict) else {}
    prompt, response = keys.get("prompt"), keys.get("response", 0)
    positions = keys.get("positions")
    if (
        not isinstance(prompt, str)
        or not _is_count(response)
        or not isinstance(positions, list)
        or not (positions and all(map(_is_count, positions)))
        or len(set(positions)) < len(positions)
        or not keys.keys() <= {"prompt", "response", "positions"}
    ):
        refuse(file, number, "not a prompt, a response and distinct positions from 0", FORM)
    return (prompt, response), tuple(sorted(positions))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31
