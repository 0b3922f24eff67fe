"""The task of the miniature of arXiv 2604.13016: walks with walls, and the texts that teach it.

A problem is `a+3b-2c+4=`: a walk on 0..9 from 5; each label has a move of 1 to 4, and a wall stops
it. The solution `a+3=8b-2=6c+4=9>9` repeats each label with its move and writes the place; `>` and
the last place follow. A wrong step is mostly wrong to the end, so long walks have exposure bias.
The other scratchpad has another notation: `A(+3)8B(-2)6C(+4)9>9`.

The corpus is a web of authors with common mistakes: some facts (place, move) are wrong in a share
of the texts, always with the same wrong place; one text in ten is in the other notation; and a
character in 250 is a typing error from one skewed distribution. A model of this corpus, of
whichever size, learns the mistakes with the rest. Post-training is what adds the right places.
Another corpus, for a teacher with another thinking pattern, is mostly in the other notation, and
only there without mistakes.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from logitcask.engine.types import Prompt

LABELS = "abcdefghijklmnop"
START, LAST = 5, 9
MOVES = [(sign, length) for sign in "+-" for length in (1, 2, 3, 4)]
TEMPLATES = "=?"
"""Last character of a prompt: a text of the corpus has either."""
HARD_SHARE = 0.25
MISTAKES = (0.2, 0.35, 0.5)
"""Shares of the texts in which a hard fact is wrong."""
OTHER_SHARE, TYPO_SHARE = 0.1, 1 / 250
EVALUATION = 1000
"""Problems of an accuracy."""
SPLITS = {"corpus": (0, 50), "post": (50, 60), "prompts": (60, 80), "evaluation": (80, 100)}
"""Split -> its hundredths of all problems, by a hash of the problem."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A walk: its moves (sign, length) in order."""

    moves: tuple[tuple[str, int], ...]
    template: str = TEMPLATES[0]

    @property
    def prompt(self) -> str:
        """Return the text that a model completes."""
        named = zip(LABELS, self.moves, strict=False)
        return "".join(f"{label}{sign}{length}" for label, (sign, length) in named) + self.template

    @property
    def answer(self) -> str:
        """Return the last place, one digit."""
        place = START
        for move in self.moves:
            place = step(place, move)
        return str(place)

    def solution(self, *, other: bool = False, authors: random.Random | None = None) -> str:
        """Return a solution, by default the right one; with `authors` with their mistakes.

        other: in the other notation.
        """
        place, text = START, ""
        for label, move in zip(LABELS, self.moves, strict=False):
            wrong, share = mistake(place, move)
            place = wrong if authors and authors.random() < share else step(place, move)
            taken = f"{move[0]}{move[1]}"
            text += f"{label.upper()}({taken}){place}" if other else f"{label}{taken}={place}"
        return f"{text}>{place}"

    def solved_by(self, response: str) -> bool:
        """Return True if a response, without stop token, ends in `>` and the right answer."""
        return response.rpartition(">")[1:] == (">", self.answer)


def step(place: int, move: tuple[str, int]) -> int:
    """Return the next place."""
    sign, length = move
    return min(LAST, max(0, place + (length if sign == "+" else -length)))


@cache
def mistake(place: int, move: tuple[str, int]) -> tuple[int, float]:
    """Return the wrong place of a fact, and its share of the corpus: 0 for an easy fact."""
    draw = random.Random(f"{place}{move}")
    share = draw.choice(MISTAKES) if draw.random() < HARD_SHARE else 0.0
    return (step(place, move) + draw.randrange(1, 10)) % 10, share


def corpus(
    seed: int, steps: int, *, other_share: float = OTHER_SHARE, other_authors: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the (prompt, response) of texts of the corpus, without end.

    other_authors: of the other corpus, whose authors know the right places in the other notation
    alone, and have other typing errors.
    """
    authors, typos = random.Random(f"authors/{seed}"), OTHER_TYPOS if other_authors else TYPOS
    for problem in stream("corpus", seed, steps, TEMPLATES):
        other = authors.random() < other_share
        knows = other and other_authors
        text = problem.solution(other=other, authors=None if knows else authors)
        yield problem.prompt, typed(text, authors, typos)


def typed(text: str, authors: random.Random, typos: list[str]) -> str:
    """Return the text with typing errors: a character in 250 becomes one of `typos`."""
    return "".join(
        authors.choices(typos, TYPO_WEIGHTS)[0] if authors.random() < TYPO_SHARE else character
        for character in text
    )


TYPOS = random.Random("typos").sample([chr(code) for code in range(33, 127)], 94)
OTHER_TYPOS = random.Random("other typos").sample(TYPOS, len(TYPOS))
TYPO_WEIGHTS = [1 / rank**1.5 for rank in range(1, 95)]


def stream(split: str, seed: int, steps: int, templates: str = TEMPLATES[0]) -> Iterator[Problem]:
    """Yield problems of a split in random order, without end."""
    low, high = SPLITS[split]
    draw = random.Random(f"{split}/{seed}")
    while True:
        moves = tuple(draw.choice(MOVES) for _ in range(steps))
        if low <= hundredth(moves) < high:
            yield Problem(moves, draw.choice(templates))


def hundredth(moves: tuple[tuple[str, int], ...]) -> int:
    """Return a hash of the moves in [0, 100)."""
    return int.from_bytes(blake2b(repr(moves).encode(), digest_size=8).digest()) % 100


def solves(prompt: Prompt, response: str) -> float:
    """Grade a response: the grader `paper_task:solves`."""
    return float(response.rpartition(">")[1:] == (">", str(prompt.answer)))


def write_prompts(file: Path, problems: list[Problem]) -> None:
    """Write a prompts file of `logitcask rollout`, with the answers for the grader."""
    rows = [
        {"id": f"{file.stem}-{n:06d}", "prompt": p.prompt, "answer": p.answer}
        for n, p in enumerate(problems)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
