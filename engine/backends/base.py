"""Protocols of samplers and scorers, and the table of the backends.

A student is a scorer like any other: its own top-k, entropy and temperature-1 log-probs come from
scoring its own rollouts, so a sampler never keeps [T, V].
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from logitcask.engine.errors import ConfigError
from logitcask.engine.events import EventHandler
from logitcask.engine.types import (
    Array,
    IdLists,
    ModelRef,
    Progress,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
    Scores,
    no_progress,
)


class Sampler(Protocol):
    """A model that responds to prompts."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        version: int,
        progress: Progress,
    ) -> Rollouts:
        """Sample `sampling.n` responses to each prompt, in the order of the prompts.

        `student` of the rollouts is None. Sequence s of a prompt depends on (seed, prompt id, s,
        version) and on the weights, not on its batch. progress: called with the number of
        finished sequences. Raises PromptError for a prompt that leaves no room for the response.
        """

    def describe(self) -> dict[str, str]:
        """Return name, dtype, device and package versions, for the provenance of a segment."""


class Scorer(Protocol):
    """A model that returns log-probs of existing responses."""

    @property
    def capabilities(self) -> frozenset[str]:
        """Return the set of the scorer's capabilities.

        "top": its best ids; "at_ids": log-probs at chosen ids; "drawn": ids drawn from its
        distribution; "entropy" and "tail": exact; "bounds": bounds of the entropy, and a tail that
        is 1 - the returned mass, in place of both; "logits": all logits of a row
        (`scoring.row_logits`); "rows": some rows alone (RowScorer).
        """

    def score(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None = None,
        *,
        progress: Progress = no_progress,
    ) -> Scores:
        """Score the rollouts: row r is the distribution of response token r given prompt +
        response[:r].

        extra_ids: chosen ids of every row; None = the ids of the student's list, if the request
        has at_student. progress: called as progress("score", rows done, all rows).
        """

    def describe(self) -> dict[str, str]:
        """Return the same as `Sampler.describe`."""


class RowScorer(Scorer, Protocol):
    """A scorer that scores some rows alone."""

    def score(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None = None,
        *,
        rows: Array | None = None,
        progress: Progress = no_progress,
    ) -> Scores:
        """Score the rollouts as a Scorer, at the marked rows [P] bool; None = all.

        The other rows have no kept id, and undefined values.
        """


class RemoteScorer(Scorer, Protocol):
    """A scorer over one or more servers of one teacher."""

    n_vocab: int
    """Scores are over the ids [0, n_vocab)."""

    def replicas(self) -> Mapping[str, Scorer]:
        """Return a scorer for each single server, by its name."""

    def unavailable(self) -> set[str]:
        """Return the names of the servers that did not respond to the last request."""

    def take_answered(self) -> set[str]:
        """Return the names of the servers that gave scores since the last call of this method."""


BACKENDS = {
    "hf": "logitcask.engine.backends.hf:HF",
    "vllm": "logitcask.engine.backends.vllm.backend:VLLM",
    "server": "logitcask.engine.backends.server:ServerScorer",
}
"""Name -> module:class. A class takes (ModelRef, *, device, dtype, batch_tokens), a ServerScorer
URLs."""


def open_backend(name: str) -> Any:
    """Import and return the class of a backend, with its libraries.

    Raises ConfigError for a name that is not in the table, or a package that is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"there is no backend {name!r}", hint=f"use one of: {', '.join(sorted(BACKENDS))}"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the backend {name!r} needs the package {error.name}",
            hint=f'install it: pip install -e ".[{name}]"',
        ) from error


def close_backend(backend: Any) -> None:
    """Close engines and connections of a backend; hf has nothing to close."""
    if hasattr(backend, "close"):
        backend.close()


def reload_backend(backend: Any, model: ModelRef, on_event: EventHandler) -> bool:
    """Load another version of a backend's model into it; return False if it has to be opened again.

    on_event: called by a backend that opens new engines for it.
    """
    if not hasattr(backend, "reload"):
        return False
    backend.reload(model, on_event)
    return True
