"""Does a served teacher stay the same? Asked by its behaviour: log-probs of a fixed probe, compared
after every unit, and kept with the scores: the store compares them with what a name was begun by.
"""

from collections.abc import Callable
from typing import Any

from logitcask.engine.backends.base import Served
from logitcask.engine.backends.logprob_diff import (
    LogprobDiff,
    behaviour,
    control,
    first_rows,
    probe_request,
    probe_rollouts,
    tolerance,
)
from logitcask.engine.errors import IdentityError, ServerError
from logitcask.engine.models.fingerprint import ModelFingerprint, fingerprint_distance
from logitcask.engine.types import IdLists, Rollouts, ScoreParams, Scores

CONTROL_SEQUENCES = 8
CONTROL_K = 16
CONTROL_ROWS = 2048
"""Of a run's first unit that the control is of; at least one sequence."""
TRIES = 3
"""Of a unit whose servers are lost before what they said can be checked."""


class VerifiedTeacher:
    """A scorer of a served teacher, which is asked for its behaviour again after every unit, before
    what it said is believed: one short sequence beside thousands, of every server that answered.
    """

    def __init__(
        self, server: Served, n_vocab: int, close: Callable[[], None], k_max: int = CONTROL_K
    ) -> None:
        """close: ends the scorer; k_max: what units will ask for at most. Scores the control and
        the probe; raises IdentityError where servers are not one teacher.
        """
        self._server, self._n_vocab, self.close = server, n_vocab, close
        self.capabilities = server.capabilities
        self._control = probe_request(n_vocab, min(CONTROL_K, k_max))
        away, all_ = server.away(), server.members()
        # Who is away is looked at when it has answered something; all are waited for.
        up = {name: member for name, member in all_.items() if name not in away} or all_
        (first, one), *others = up.items()
        # Of one server: what two differ by is no measure of either.
        self.parity: LogprobDiff = control(
            one, probe_rollouts(n_vocab, CONTROL_SEQUENCES), self._control
        )
        self.tolerance = tolerance(self.parity.largest)
        self.at_work: LogprobDiff | None = None
        """The control on the first rows of the first unit."""
        self.behaviour: ModelFingerprint = behaviour(one, n_vocab)
        for name, other in others:
            self._check(behaviour(other, n_vocab), f"{name} is not the teacher that {first} is")

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists | None = None) -> Scores:
        """Raises IdentityError, in place of scores, from a teacher that has changed, or one so
        unsteady on the first of these that it could not be told from another.
        """
        for left in reversed(range(TRIES)):
            self._server.answered()
            scores = self._server.score(rollouts, request, at)
            try:
                for name in sorted(self._server.answered()):
                    self._check_member(name, rollouts)
            except ServerError as error:
                # Lost before it could be looked at: what it said cannot be believed. A refusal
                # would come again.
                if not left or error.status:
                    raise
                continue
            break
        return scores

    def _check_member(self, name: str, rollouts: Rollouts) -> None:
        """rollouts: what it answered about."""
        member = self._server.members()[name]
        if self.at_work is None:
            self.at_work = control(member, first_rows(rollouts, CONTROL_ROWS), self._control)
            self.tolerance = max(self.tolerance, tolerance(self.at_work.largest))
        found = behaviour(member, self._n_vocab)
        self._check(found, f"{name} is not the teacher that began this run")

    def describe(self) -> dict[str, str]:
        return self._server.describe()

    def lineage(self) -> dict[str, Any]:
        """What a segment records of how its teacher behaved."""
        return {"behaviour": {**self.behaviour.record(), "control_nats": self.parity.largest}}

    def _check(self, other: ModelFingerprint, what: str) -> None:
        found = fingerprint_distance(self.behaviour, other)
        if found > self.tolerance:
            raise IdentityError(
                f"{what}: log-probs of a fixed probe differ by {found:.3g} nats, and "
                f"{self.tolerance:.3g} is what one model may differ by (its own spread is "
                f"{self.parity.largest:.2g})",
                hint="Other weights, another revision, an adapter, quantisation or a temperature "
                "is served: serve what was served; or score it under another --teacher name, with "
                "a --revision that tells it from the first.",
            )
