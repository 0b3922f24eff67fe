"""Graders: a prompt and the text of a response -> a reward in [0, 1].

GRADERS compare with the prompt's "answer". MODULE:FUNCTION names installed code of the user, which
is as trusted as the configuration that names it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from numbers import Real
from typing import Any

import numpy as np

from logitcask.engine.config.prompts import GRADER_NAMES, LISTED_GRADERS
from logitcask.engine.errors import ConfigError, GraderError, PromptError
from logitcask.engine.prompts.answers import contains_words, final_answer, normal_form, words
from logitcask.engine.types import Array, Prompt, Rollouts

RewardFn = Callable[[Prompt, str], float]
"""(prompt, response text without special tokens) -> reward in [0, 1]."""

Decode = Callable[[list[int]], str]
"""Token ids -> text without special tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grader:
    """A reward function, and the decoding of responses for it."""

    name: str
    grader: RewardFn
    decode: Decode

    def rewards(self, rollouts: Rollouts) -> Array:
        """Return [N] float64 rewards in [0, 1]. Raises GraderError with the prompt's id."""
        off = rollouts.seq_off
        rewards = [
            self.grader(rollouts.prompts[of], self.decode(rollouts.tokens[start:end].tolist()))
            for of, start, end in zip(rollouts.seq_prompt, off[:-1], off[1:], strict=True)
        ]
        return np.asarray(rewards, np.float64)


def open_grader(name: str, prompts: Sequence[Prompt]) -> RewardFn:
    """Return the reward function of that name for these prompts; its rewards are checked.

    Raises ConfigError for code that is missing or takes other arguments, PromptError where one of
    GRADERS has no answer to compare with. The function itself raises GraderError.
    """
    if name not in GRADERS:
        return _checked(name, _imported(name))
    for prompt in prompts:
        if prompt.answer is None:
            raise PromptError(
                f"prompt {prompt.id!r} has no answer, and grader {name!r} compares with it",
                hint='give every line an "answer", or name a MODULE:FUNCTION as grader',
            )
        if name == "contains" and not words(prompt.answer):
            raise PromptError(
                f"the answer {prompt.answer!r} of prompt {prompt.id!r} has no word, and grader "
                f"{name!r} compares words",
                hint="grade with exact or normalised, or with a MODULE:FUNCTION",
            )
        if name == "normalised" and not final_answer(prompt.answer):
            raise PromptError(
                f"the answer {prompt.answer!r} of prompt {prompt.id!r} is empty, so that every "
                f"empty response were right for grader {name!r}",
                hint='give every line an "answer", or name a MODULE:FUNCTION as grader',
            )
    return GRADERS[name]


def exact(prompt: Prompt, response: str) -> float:
    """Return 1 if the final answers of response and prompt are equal, else 0."""
    return float(final_answer(response) == final_answer(_answer(prompt)))


def normalised(prompt: Prompt, response: str) -> float:
    """Return 1 if the normal forms of both final answers are equal, else 0; at least `exact`."""
    ours, right = (normal_form(final_answer(text)) for text in (response, _answer(prompt)))
    return float(ours == right)


def contains(prompt: Prompt, response: str) -> float:
    """Return 1 if the words of the prompt's answer follow one another in the response, else 0.

    A response that names several answers has all of them.
    """
    return float(contains_words(response, _answer(prompt)))


GRADERS: dict[str, RewardFn] = {"exact": exact, "contains": contains, "normalised": normalised}
"""Name -> grader that compares with the prompt's answer; GRADER_NAMES in config describes them."""


def _answer(prompt: Prompt) -> str:
    assert prompt.answer is not None, "open_grader"
    return prompt.answer


def _imported(name: str) -> Callable[..., Any]:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(
            f"grader {name!r} is neither {LISTED_GRADERS} nor MODULE:FUNCTION",
            hint=f"give --grader {next(iter(GRADER_NAMES))}, or a function such as "
            "mypackage.grading:grade",
        )
    try:
        function = getattr(import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"grader {name!r}: module {module} cannot be imported: {error}",
            hint="install it where logitcask runs, or put its folder on PYTHONPATH",
        ) from error
    except AttributeError as error:
        raise ConfigError(
            f"grader {name!r}: module {module} has no {attribute}",
            hint="name a function of that module, as MODULE:FUNCTION",
        ) from error
    try:
        signature(function).bind(None, "")
    except TypeError as error:
        raise ConfigError(
            f"grader {name!r} cannot be called with (prompt, response): {error}",
            hint="write it as def grade(prompt: Prompt, response: str) -> float",
        ) from error
    except ValueError:
        pass  # some built-in functions have no signature; the first call checks it
    return function  # type: ignore[no-any-return]


def _checked(name: str, function: Callable[..., Any]) -> RewardFn:
    """Return the function with its errors and rewards checked."""

    def grade(prompt: Prompt, response: str) -> float:
        try:
            reward = function(prompt, response)
        # The user's code may raise any exception; it is kept as the cause.
        except Exception as error:
            raise GraderError(
                f"grader {name} on prompt {prompt.id!r}: {type(error).__name__}: {error}",
                hint="repair the grader; `logitcask --debug` shows the traceback",
            ) from error
        # NaN fails the comparison.
        if not isinstance(reward, Real) or not 0 <= float(reward) <= 1:
            raise GraderError(
                f"grader {name} on prompt {prompt.id!r}: {reward!r} is no number in [0, 1]",
                hint="return a reward from 0 to 1",
            )
        return float(reward)

    return grade
