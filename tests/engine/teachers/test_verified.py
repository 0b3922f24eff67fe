"""Checks that a served teacher is the same in every unit, on every server, and under every name."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.logprob_diff import (
    PROBE_ROWS,
)
from logitcask.engine.errors import IdentityError, ServerError
from logitcask.engine.models.fingerprint import (
    MIN_TOLERANCE,
    SPREAD_FACTOR,
    compare_records,
)
from logitcask.engine.teachers.remote import (
    check_padding,
)
from logitcask.engine.teachers.verified import VerifiedTeacher
from logitcask.engine.types import IdLists, Prompt, Rollouts, SamplingParams, ScoreParams, Scores
from tests.engine.tiny import EOS, N_VOCAB, make_model, save_folder

TOP_8 = ScoreParams(entry_kind="topk", top_p=1.0, k_min=8, k_max=8, at_student=False)


def hf(folder: Path, seed: int) -> HF:
    return HF(save_folder(folder, make_model(seed=seed)), n_vocab=N_VOCAB, stop_ids=(EOS,))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[HF, HF]:
    return hf(tmp_path_factory.mktemp("a"), 0), hf(tmp_path_factory.mktemp("b"), 1)


def roll(scorer: HF, count: int = 1) -> Rollouts:
    prompts = [Prompt(id=str(i), token_ids=(5, 6, 7 + i)) for i in range(count)]
    return scorer.generate(prompts, SamplingParams(n=2, max_new_tokens=6), seed=0, version=0)


@pytest.fixture(scope="module")
def rolled(pair: tuple[HF, HF]) -> Rollouts:
    return roll(pair[0])


class Servers:
    """A pool of scorers in place of servers; the indices in `busy` score a unit."""

    capabilities = frozenset({"top", "at_ids", "entropy", "tail"})

    def __init__(self, *scorers: Any) -> None:
        self.scorers = list(scorers)
        self.n_vocab = N_VOCAB
        self.busy: Sequence[int] = range(len(scorers))
        self.requests: list[ScoreParams] = []
        self.rows = 0

    def replicas(self) -> dict[str, Any]:
        return {f"server {i}": CountingReplica(self, each) for i, each in enumerate(self.scorers)}

    def unavailable(self) -> set[str]:
        return {f"server {i}" for i, each in enumerate(self.scorers) if each is None}

    def take_answered(self) -> set[str]:
        return {f"server {i}" for i in self.busy}

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None, **_: Any) -> Scores:
        return CountingReplica(self, self.scorers[self.busy[-1]]).score(rollouts, request, at)

    def describe(self) -> dict[str, str]:
        return {"name": "servers"}


class CountingReplica:
    capabilities = Servers.capabilities

    def __init__(self, pool: Servers, inner: Any) -> None:
        self.pool, self.inner = pool, inner

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None, **_: Any) -> Scores:
        self.pool.rows += rollouts.positions
        self.pool.requests.append(request)
        scores: Scores = self.inner.score(rollouts, request, at)
        return scores

    def describe(self) -> dict[str, str]:
        return {"name": "one"}


class Shifted:
    """A model whose log-probs are lower by `by` where `when` is true."""

    def __init__(self, inner: HF, by: float, when: Any) -> None:
        self.inner, self.by, self.when = inner, by, when

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None, **_: Any) -> Scores:
        scores = self.inner.score(rollouts, request, at)
        off = np.float32(self.by if self.when(rollouts, request) else 0.0)
        return replace(scores, lp=scores.lp - off, entry_lp=scores.entry_lp - off)


def test_scores_of_an_unchanged_teacher_are_returned(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    verified = VerifiedTeacher(Servers(pair[0]), N_VOCAB, print)
    for _ in range(3):
        np.testing.assert_array_equal(
            verified.score(rolled, TOP_8).entry_lp, pair[0].score(rolled, TOP_8).entry_lp
        )


def test_a_changed_teacher_is_an_error_after_the_unit(
    pair: tuple[HF, HF], rolled: Rollouts
) -> None:
    servers = Servers(pair[0])
    verified = VerifiedTeacher(servers, N_VOCAB, print)
    verified.score(rolled, TOP_8)
    servers.scorers = [pair[1]]
    with pytest.raises(IdentityError, match="server 0 is not the teacher that began this run"):
        verified.score(rolled, TOP_8)


def test_servers_of_two_teachers_are_an_error(pair: tuple[HF, HF]) -> None:
    with pytest.raises(IdentityError, match="server 1 is not the teacher that server 0 is"):
        VerifiedTeacher(Servers(*pair), N_VOCAB, print)
    # A different temperature of one server is not within the tolerance.
    at_temperature = Shifted(pair[0], 0.05, lambda rollouts, request: True)
    with pytest.raises(IdentityError, match=r"server 1 is not .* 0\.05"):
        VerifiedTeacher(Servers(pair[0], at_temperature), N_VOCAB, print)
    assert VerifiedTeacher(Servers(pair[0], pair[0]), N_VOCAB, print).tolerance == MIN_TOLERANCE


def test_every_server_that_answered_is_checked(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    servers = Servers(pair[0], pair[0])
    verified = VerifiedTeacher(servers, N_VOCAB, print)
    verified.score(rolled, TOP_8)
    servers.scorers[1], servers.busy = pair[1], [0]
    verified.score(rolled, TOP_8)  # server 1 did not score this unit
    servers.busy = [0, 1]
    with pytest.raises(IdentityError, match="server 1 is not the teacher that began this run"):
        verified.score(rolled, TOP_8)


class FailsProbe:
    """A server that fails the next `times` requests of the probe."""

    def __init__(self, inner: HF, times: int) -> None:
        self.inner, self.times = inner, times

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None, **_: Any) -> Scores:
        if rollouts.positions == PROBE_ROWS and self.times > 0:
            self.times -= 1
            raise ServerError("it is gone", hint="wait")
        return self.inner.score(rollouts, request, at)


def test_a_unit_of_a_server_that_fails_its_check_is_scored_again(
    pair: tuple[HF, HF], rolled: Rollouts
) -> None:
    failing = FailsProbe(pair[0], 0)
    servers = Servers(pair[0], failing)
    verified = VerifiedTeacher(servers, N_VOCAB, print)
    servers.busy, failing.times, servers.requests = [1], 2, []
    verified.score(rolled, TOP_8)
    assert servers.requests.count(TOP_8) == 3
    failing.times = 3
    with pytest.raises(ServerError, match="gone"):
        verified.score(rolled, TOP_8)


def test_a_client_error_is_not_retried(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    class Refusal(ServerError):
        status = 401

    class Closed(FailsProbe):
        def score(
            self, rollouts: Rollouts, request: ScoreParams, at: Any = None, **_: Any
        ) -> Scores:
            if rollouts.positions == PROBE_ROWS and self.times > 0:
                raise Refusal("no key", hint="give one")
            return self.inner.score(rollouts, request, at)

    servers = Servers(Closed(pair[0], 0))
    verified = VerifiedTeacher(servers, N_VOCAB, print)
    servers.scorers[0].times, servers.requests = 1, []
    with pytest.raises(ServerError, match="no key"):
        verified.score(rolled, TOP_8)
    assert servers.requests.count(TOP_8) == 1


def test_unavailable_servers_are_checked_if_there_is_no_other(pair: tuple[HF, HF]) -> None:
    class Gone(Servers):
        def unavailable(self) -> set[str]:
            return set(self.replicas())

    assert VerifiedTeacher(Gone(pair[0], pair[0]), N_VOCAB, print).tolerance == MIN_TOLERANCE
    with pytest.raises(ServerError, match="it is gone"):
        VerifiedTeacher(Gone(FailsProbe(pair[0], 9)), N_VOCAB, print)


def test_an_unavailable_server_is_checked_after_its_first_answer(
    pair: tuple[HF, HF], rolled: Rollouts
) -> None:
    servers = Servers(pair[0], None)
    verified = VerifiedTeacher(servers, N_VOCAB, print)
    servers.busy = [0]
    verified.score(rolled, TOP_8)
    servers.scorers[1], servers.busy = pair[1], [0, 1]
    with pytest.raises(IdentityError, match="server 1 is not the teacher"):
        verified.score(rolled, TOP_8)


def test_the_tolerance_is_three_times_the_difference_of_the_first_unit(
    pair: tuple[HF, HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcask.engine.teachers.verified.CONTROL_ROWS", 12)
    rolled = roll(pair[0], 3)
    # Log-probs differ with the batch size, for long prompts only.
    batch_dependent = Shifted(
        pair[0], 0.02, lambda r, _: len(r.finish) == 2 and len(r.prompts[0].token_ids) > 1
    )
    servers = Servers(batch_dependent)
    verified = VerifiedTeacher(servers, N_VOCAB, print)
    assert verified.tolerance == MIN_TOLERANCE
    servers.rows = 0
    verified.score(rolled, TOP_8)
    assert verified.workload_diff is not None
    assert verified.workload_diff.largest == pytest.approx(0.02, rel=1e-3)
    assert verified.tolerance == pytest.approx(SPREAD_FACTOR * 0.02, rel=1e-3)
    # At most 12 rows are scored two more times, and the probe once.
    assert 0 < servers.rows - rolled.positions - PROBE_ROWS <= 24
    servers.rows = 0
    verified.score(rolled, TOP_8)
    assert servers.rows == rolled.positions + PROBE_ROWS


def test_a_teacher_that_differs_from_itself_is_an_error(pair: tuple[HF, HF]) -> None:
    uneven = Shifted(
        pair[0], 0.5, lambda r, _: len(r.finish) == 6 and len(r.prompts[0].token_ids) > 1
    )
    verified = VerifiedTeacher(Servers(uneven), N_VOCAB, print)
    with pytest.raises(IdentityError, match=r"differs from itself by 0\.5"):
        verified.score(roll(pair[0], 3), TOP_8)


def test_requests_do_not_exceed_k_max(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    """Limit the probe to k_max, because the server may return no more log-probs."""
    servers = Servers(pair[0])
    VerifiedTeacher(servers, N_VOCAB, print, 8).score(rolled, TOP_8)
    assert max(each.k_max for each in servers.requests) == 8


def test_a_fingerprint_does_not_depend_on_the_student(pair: tuple[HF, HF], tmp_path: Path) -> None:
    """Compare fingerprints over all ids and over the ids of a student with one id less."""
    model = make_model(seed=1, vocab_size=N_VOCAB + 1, tie=False)
    model.lm_head.weight.data[N_VOCAB] = 0
    pool = Servers(HF(save_folder(tmp_path / "wider", model), n_vocab=100, stop_ids=(EOS,)))
    over_all, over_shared = (
        VerifiedTeacher(pool, n, print).provenance()["fingerprint"] for n in (100, 99)
    )
    other = VerifiedTeacher(Servers(pair[0]), N_VOCAB, print).provenance()["fingerprint"]
    assert (
        compare_records(over_all, over_shared)[0]
        <= MIN_TOLERANCE
        == compare_records(over_all, over_shared)[1]
    )
    assert compare_records(over_all, other)[0] > compare_records(over_all, other)[1]


class Padded:
    """A server of a model whose head has more ids than its tokenizer."""

    capabilities = frozenset({"top", "at_ids"})

    def __init__(self, log_p: Any, n_vocab: int) -> None:
        self.log_p, self.n_vocab, self.requested_ids = log_p, n_vocab, [0]

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists, **_: Any) -> Scores:
        assert self.n_vocab == len(self.log_p)
        self.requested_ids = sorted({*self.requested_ids, *at.ids.tolist()})
        none = np.zeros(0, np.float32)
        return Scores(
            lp=none,
            entropy=none,
            log_tail=none,
            cnt=none,
            ids=none,
            entry_lp=none,
            at_lp=self.log_p[at.ids.astype(int)],
        )


@pytest.mark.parametrize("pads", [1, 3, 16, 267, 3000])
def test_mass_on_any_padding_id_is_an_error(pads: int) -> None:
    logits = torch.zeros(99 + pads, dtype=torch.float64)
    logits[99:] = -40.0
    sound: Any = Padded(logits.log_softmax(0).numpy(), 99)
    assert check_padding(sound, 99, 99 + pads) == ""
    assert sound.n_vocab == 99
    assert len(sound.requested_ids) - 1 == min(pads, 16 * PROBE_ROWS)
    logits[99:] = -2.0
    untrained: Any = Padded(logits.log_softmax(0).numpy(), 99)
    with pytest.raises(IdentityError, match=f"the {pads} ids of its padded head hold a mass"):
        check_padding(untrained, 99, 99 + pads)
    assert untrained.n_vocab == 99


@pytest.mark.parametrize("status", [0, 400, 500])
def test_only_a_client_error_skips_the_padding_check(status: int) -> None:
    class Failing(Padded):
        def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists, **_: Any) -> Scores:
            error = ServerError("out of the vocabulary", hint="none")
            error.status = status
            raise error

    failing: Any = Failing(np.zeros(101), 99)
    if status == 400:
        assert "could not be checked: out of the voc" in check_padding(failing, 99, 101)
    else:
        with pytest.raises(ServerError):
            check_padding(failing, 99, 101)
    assert failing.n_vocab == 99


def test_a_padded_head_that_cannot_be_checked_is_a_note() -> None:
    without_at_ids: Any = Padded(np.zeros(101), 99)
    without_at_ids.capabilities = frozenset({"top"})
    assert "2 ids of its padded head cannot be checked" in check_padding(without_at_ids, 99, 101)
    assert check_padding(without_at_ids, 99, 99) == ""
