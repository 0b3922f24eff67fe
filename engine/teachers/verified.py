"""A remote scorer that checks its teacher's fingerprint after every unit.

The fingerprint, log-probs of a fixed probe, is stored with the scores. The store compares it with
the fingerprint of the first scores under the same teacher name.
"""

from collections.abc import Callable
from typing import Any

from logitcask.engine.backends.base import RemoteScorer
from logitcask.engine.backends.logprob_diff import (
    LogprobDiff,
    fingerprint,
    probe_request,
    probe_rollouts,
    self_consistency,
    take_rows,
    tolerance,
)
from logitcask.engine.errors import IdentityError, ServerError
from logitcask.engine.models.fingerprint import ModelFingerprint, fingerprint_distance
from logitcask.engine.types import (
    IdLists,
    Progress,
    Rollouts,
    ScoreParams,
    Scores,
    no_progress,
)

CONTROL_SEQUENCES = 8
CONTROL_K = 16
CONTROL_ROWS = 2048
"""Rows of a run's first unit that measure self-consistency; at least one sequence."""
TRIES = 3
"""Attempts at a unit with servers that are lost before the check of their fingerprint."""


class VerifiedTeacher:
    """A scorer of a remote teacher that compares the fingerprint of every server that answered,
    after every unit and before its scores are used: one short sequence for thousands.
    """

    def __init__(
        self, server: RemoteScorer, n_vocab: int, close: Callable[[], None], k_max: int = CONTROL_K
    ) -> None:
        """Measure self-consistency and fingerprint; IdentityError for servers of two teachers.

        close: closes the scorer; k_max: maximum number of best ids of a unit.
        """
        self._server, self._n_vocab, self.close = server, n_vocab, close
        self.capabilities = server.capabilities
        self._request = probe_request(n_vocab, min(CONTROL_K, k_max))
        unavailable, replicas = server.unavailable(), server.replicas()
        # Unavailable servers are checked after their first scores. If all are, they are awaited.
        healthy = {k: v for k, v in replicas.items() if k not in unavailable} or replicas
        (first, one), *others = healthy.items()
        # Of one server: the difference between two servers measures neither.
        self.self_diff: LogprobDiff = self_consistency(
            one, probe_rollouts(n_vocab, CONTROL_SEQUENCES), self._request
        )
        self.tolerance = tolerance(self.self_diff.largest)
        self.workload_diff: LogprobDiff | None = None
        """Self-consistency on the first rows of the first unit."""
        self.fingerprint: ModelFingerprint = fingerprint(one, n_vocab)
        for name, other in others:
            self._check(fingerprint(other, n_vocab), f"{name} is not the teacher that {first} is")

    def score(
        self,
        rollouts: Rollouts,
        request: ScoreParams,
        extra_ids: IdLists | None = None,
        *,
        progress: Progress = no_progress,
    ) -> Scores:
        """Score the rollouts, then check the servers that answered.

        Raises IdentityError for a teacher that has changed, or that differs from itself on the
        first rollouts so much that another teacher could not be detected.
        """
        for left in reversed(range(TRIES)):
            self._server.take_answered()
            scores = self._server.score(rollouts, request, extra_ids, progress=progress)
            try:
                for name in sorted(self._server.take_answered()):
                    self._check_replica(name, rollouts)
            except ServerError as error:
                # A server lost before its check: its scores are discarded. A rejected request
                # would be rejected again.
                if not left or error.status:
                    raise
                continue
            break
        return scores

    def _check_replica(self, name: str, rollouts: Rollouts) -> None:
        """Check the fingerprint of a server that answered these rollouts."""
        replica = self._server.replicas()[name]
        if self.workload_diff is None:
            part = take_rows(rollouts, CONTROL_ROWS)
            self.workload_diff = self_consistency(replica, part, self._request)
            self.tolerance = max(self.tolerance, tolerance(self.workload_diff.largest))
        found = fingerprint(replica, self._n_vocab)
        self._check(found, f"{name} is not the teacher that began this run")

    def describe(self) -> dict[str, str]:
        """Return the description of the remote scorer."""
        return self._server.describe()

    def provenance(self) -> dict[str, Any]:
        """Return the record of the fingerprint for the provenance of a segment."""
        record = {**self.fingerprint.record(), "control_nats": self.self_diff.largest}
        return {"fingerprint": record}

    def _check(self, other: ModelFingerprint, what: str) -> None:
        found = fingerprint_distance(self.fingerprint, other)
        if found > self.tolerance:
            raise IdentityError(
                f"{what}: log-probs of a fixed probe differ by {found:.3g} nats, and "
                f"{self.tolerance:.3g} is allowed (it differs from itself by "
                f"{self.self_diff.largest:.2g})",
                hint="serve the first teacher again: now other weights, another revision, an "
                "adapter, quantisation or a temperature is served; or score under another "
                "--teacher name with another --revision",
            )
