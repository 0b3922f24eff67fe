"""Task of the demo: sums and differences of two numbers, computed digit by digit.

The solution of `361-220=` is `1-0=1;6-2=4;3-2=1;>141`: one step per digit, the least significant
first, then `>` and the answer. `c` marks a carry or borrow: before `=` from the digit before, after
it to the next digit. A negative difference begins with `~` and is computed with the numbers
exchanged. All prompts of a task have one length, and answers are verified without a model.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from logitcask.engine.errors import ConfigError
from logitcask.engine.types import Prompt

SPLITS = {
    "teacher": (0, 40),
    "student": (40, 60),
    "prompts": (60, 80),
    "validation": (80, 90),
    "evaluation": (90, 100),
}
"""Split -> its hundredths of all problems. The hundredth of a problem is a hash of the problem
alone, so splits are disjoint for every seed and number of problems."""


@dataclass(frozen=True, slots=True)
class Problem:
    """The problem a op b, with both numbers of `digits` digits."""

    a: int
    op: str
    b: int
    digits: int

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.op}{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b if self.op == "+" else self.a - self.b)

    @property
    def solution(self) -> str:
        """Return the target text: the steps, `>`, the answer."""
        exchanged = self.op == "-" and self.a < self.b
        x, y = (self.b, self.a) if exchanged else (self.a, self.b)
        steps, carry = "~" if exchanged else "", 0
        for place in range(self.digits):
            p, q = x // 10**place % 10, y // 10**place % 10
            value = p + q + carry if self.op == "+" else p - q - carry
            carried, carry = carry, int(not 0 <= value <= 9)
            steps += f"{p}{self.op}{q}{'c' * carried}={value % 10}{'c' * carry};"
        return f"{steps}>{self.answer}"

    def solved_by(self, response: str) -> bool:
        """Return True if a response, without stop token, ends in `>` and the right answer."""
        return ends_in(response, self.answer)


@dataclass(frozen=True, slots=True)
class Task:
    """All problems with `digits` digits, cut into the five splits."""

    digits: int

    @property
    def max_new_tokens(self) -> int:
        """Return the tokens of the longest solution with its stop token, with some margin."""
        return 8 * self.digits + 16

    def stream(self, split: str, seed: int) -> Iterator[Problem]:
        """Yield problems of a split in random order, without end and with replacement."""
        low, high = SPLITS[split]
        draw = random.Random(f"{split}/{seed}")
        smallest, size = 10 ** (self.digits - 1), 9 * 10 ** (self.digits - 1)
        while True:
            a, b = smallest + draw.randrange(size), smallest + draw.randrange(size)
            problem = Problem(a, draw.choice("+-"), b, self.digits)
            if low <= hundredth(problem) < high:
                yield problem

    def draw(self, split: str, count: int, seed: int) -> list[Problem]:
        """Return `count` distinct problems; raises ConfigError for more than half of the split."""
        low, high = SPLITS[split]
        expected = 2 * (9 * 10 ** (self.digits - 1)) ** 2 * (high - low) // 100
        # The last problems of a split are rarely drawn; half of it is drawn quickly.
        if count > expected // 2:
            raise ConfigError(
                f"{count} problems of the split {split}: it has about {expected}, of which half "
                "can be drawn",
                hint="draw fewer, or take a task with more digits",
            )
        found: dict[Problem, None] = {}
        problems = self.stream(split, seed)
        while len(found) < count:
            found[next(problems)] = None
        return list(found)


def ends_in(response: str, answer: str) -> bool:
    return response.rpartition(">")[1:] == (">", answer)


def solves(prompt: Prompt, response: str) -> float:
    """Grade a response: `--grader logitcask.engine.demo.task:solves`."""
    return float(ends_in(response, str(prompt.answer)))


def hundredth(problem: Problem) -> int:
    """Return a hash of the problem in [0, 100)."""
    digest = blake2b(problem.prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 100


def write_prompts(file: Path, problems: list[Problem]) -> None:
    """Write a prompts file of `logitcask rollout`, with the answers for a grader."""
    with file.open("w", encoding="ascii") as lines:
        for number, problem in enumerate(problems):
            # The id seeds the sampling of responses, so two files must not share one.
            row = {
                "id": f"{file.stem}-{number:06d}",
                "prompt": problem.prompt,
                "answer": problem.answer,
            }
            lines.write(json.dumps(row) + "\n")
