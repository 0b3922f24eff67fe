"""Who samples and who scores: what a backend must offer, and the table of those there are.

A student is a scorer like any other: its own top-k, entropy and temperature-1 log-probs come from
scoring its own rollouts, so a sampler never keeps [T, V].
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from logitcask.engine.errors import ConfigError
from logitcask.engine.types import (
    IdLists,
    Progress,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
    Scores,
)


class Sampler(Protocol):
    """Answers prompts."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        version: int,
        progress: Progress,
    ) -> Rollouts:
        """`sampling.n` responses to each prompt, in the order of the prompts; `student` is None.

        Sequence s of a prompt depends on (seed, prompt id, s, version) and on the weights, not on
        its neighbours. Raises PromptError for a prompt that leaves no room for the response.
        """

    def describe(self) -> dict[str, str]:
        """What lineage records: name, dtype, device and the versions of the packages at work."""


class Scorer(Protocol):
    """Says what a model thinks of given responses."""

    @property
    def capabilities(self) -> frozenset[str]:
        """Of "top" (its own best ids), "at_ids" (log-probs at given ids), "drawn" (ids drawn from
        its law), "entropy" and "tail", or in their place "bounds" (of the entropy, and a tail that
        is what the ids it tells leave). "logits": all of a row can be seen (`scoring.row_logits`).
        """

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None) -> Scores:
        """Row r of a sequence is the law of response token r given prompt + response[:r].

        at: ids of every row whose log-probs are wanted too; left out, those of the student's list
        if the request says so.
        """

    def describe(self) -> dict[str, str]:
        """As of a Sampler."""


class Served(Scorer, Protocol):
    """A scorer of servers that each answer for one and the same teacher, so it is said."""

    n_vocab: int
    """Ids that it is asked over."""

    def members(self) -> Mapping[str, Scorer]:
        """By name; each asks one server alone."""

    def away(self) -> set[str]:
        """Names of those that did not answer when they were last asked."""

    def answered(self) -> set[str]:
        """Names of those whose answers were taken since this was last called."""


BACKENDS = {
    "hf": "logitcask.engine.backends.hf:HF",
    "vllm": "logitcask.engine.backends.vllm.backend:VLLM",
    "server": "logitcask.engine.backends.server:Server",
}
"""Name -> module:class. A class takes (ModelRef, *, device, dtype, batch_tokens), a Server URLs."""


def open_backend(name: str) -> Any:
    """The class of a backend; its libraries are imported here and not before.

    Raises ConfigError for a name that is not in the table.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no backend {name!r}", hint=f"Use one of: {', '.join(sorted(BACKENDS))}."
        )
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the backend {name!r} needs the package {error.name}",
            hint=f'Install it: pip install -e ".[{name}]".',
        ) from error


def close_backend(backend: Any) -> None:
    """Ends what a backend keeps open: engines, connections. The embedded one keeps nothing."""
    if hasattr(backend, "close"):
        backend.close()
