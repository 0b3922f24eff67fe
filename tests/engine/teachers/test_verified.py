"""A served teacher is the same in every unit, on every server, and under every name."""

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

ASK = ScoreParams(entry_kind="topk", top_p=1.0, k_min=8, k_max=8, at_student=False)


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
    """Scorers in the places of servers; a unit is scored by all that `busy` names."""

    capabilities = frozenset({"top", "at_ids", "entropy", "tail"})

    def __init__(self, *scorers: Any) -> None:
        self.scorers = list(scorers)
        self.n_vocab = N_VOCAB
        self.busy: Sequence[int] = range(len(scorers))
        self.requests: list[ScoreParams] = []
        self.rows = 0

    def replicas(self) -> dict[str, Any]:
        return {f"server {i}": Counted(self, each) for i, each in enumerate(self.scorers)}

    def unavailable(self) -> set[str]:
        return {f"server {i}" for i, each in enumerate(self.scorers) if each is None}

    def take_answered(self) -> set[str]:
        return {f"server {i}" for i in self.busy}

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None) -> Scores:
        return Counted(self, self.scorers[self.busy[-1]]).score(rollouts, request, at)

    def describe(self) -> dict[str, str]:
        return {"name": "servers"}


class Counted:
    capabilities = Servers.capabilities

    def __init__(self, told: Servers, inner: Any) -> None:
        self.told, self.inner = told, inner

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None) -> Scores:
        self.told.rows += rollouts.positions
        self.told.requests.append(request)
        scores: Scores = self.inner.score(rollouts, request, at)
        return scores

    def describe(self) -> dict[str, str]:
        return {"name": "one"}


class Off:
    """A model whose log-probs are lower by so much where `when` says so."""

    def __init__(self, inner: HF, by: float, when: Any) -> None:
        self.inner, self.by, self.when = inner, by, when

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None) -> Scores:
        scores = self.inner.score(rollouts, request, at)
        off = np.float32(self.by if self.when(rollouts, request) else 0.0)
        return replace(scores, lp=scores.lp - off, entry_lp=scores.entry_lp - off)


def test_scores_of_a_teacher_that_stays_are_its_own(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    same = VerifiedTeacher(Servers(pair[0]), N_VOCAB, print)
    for _ in range(3):
        np.testing.assert_array_equal(
            same.score(rolled, ASK).entry_lp, pair[0].score(rolled, ASK).entry_lp
        )


def test_what_a_teacher_says_is_believed_only_if_it_is_still_the_same(
    pair: tuple[HF, HF], rolled: Rollouts
) -> None:
    servers = Servers(pair[0])
    same = VerifiedTeacher(servers, N_VOCAB, print)
    same.score(rolled, ASK)
    servers.scorers = [pair[1]]
    with pytest.raises(IdentityError, match="server 0 is not the teacher that began this run"):
        same.score(rolled, ASK)


def test_servers_beside_each_other_are_one_teacher(pair: tuple[HF, HF]) -> None:
    with pytest.raises(IdentityError, match="server 1 is not the teacher that server 0 is"):
        VerifiedTeacher(Servers(*pair), N_VOCAB, print)
    # A temperature of one of two is no spread of both.
    hot = Off(pair[0], 0.05, lambda rollouts, request: True)
    with pytest.raises(IdentityError, match=r"server 1 is not .* 0\.05"):
        VerifiedTeacher(Servers(pair[0], hot), N_VOCAB, print)
    assert VerifiedTeacher(Servers(pair[0], pair[0]), N_VOCAB, print).tolerance == MIN_TOLERANCE


def test_every_server_that_answered_is_looked_at(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    servers = Servers(pair[0], pair[0])
    same = VerifiedTeacher(servers, N_VOCAB, print)
    same.score(rolled, ASK)
    servers.scorers[1], servers.busy = pair[1], [0]
    same.score(rolled, ASK)  # it had no part in this
    servers.busy = [0, 1]
    with pytest.raises(IdentityError, match="server 1 is not the teacher that began this run"):
        same.score(rolled, ASK)


class Lost:
    """A server that is gone when it is asked alone, so many times."""

    def __init__(self, inner: HF, times: int) -> None:
        self.inner, self.times = inner, times

    def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None) -> Scores:
        if rollouts.positions == PROBE_ROWS and self.times > 0:
            self.times -= 1
            raise ServerError("it is gone", hint="wait")
        return self.inner.score(rollouts, request, at)


def test_what_a_server_said_that_is_gone_before_it_is_looked_at_is_not_believed(
    pair: tuple[HF, HF], rolled: Rollouts
) -> None:
    lost = Lost(pair[0], 0)
    servers = Servers(pair[0], lost)
    same = VerifiedTeacher(servers, N_VOCAB, print)
    servers.busy, lost.times, servers.requests = [1], 2, []
    same.score(rolled, ASK)
    assert servers.requests.count(ASK) == 3
    lost.times = 3
    with pytest.raises(ServerError, match="gone"):
        same.score(rolled, ASK)


def test_a_refusal_is_not_asked_for_again(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    class Refusal(ServerError):
        status = 401

    class Closed(Lost):
        def score(self, rollouts: Rollouts, request: ScoreParams, at: Any = None) -> Scores:
            if rollouts.positions == PROBE_ROWS and self.times > 0:
                raise Refusal("no key", hint="give one")
            return self.inner.score(rollouts, request, at)

    servers = Servers(Closed(pair[0], 0))
    same = VerifiedTeacher(servers, N_VOCAB, print)
    servers.scorers[0].times, servers.requests = 1, []
    with pytest.raises(ServerError, match="no key"):
        same.score(rolled, ASK)
    assert servers.requests.count(ASK) == 1


def test_when_all_are_away_all_are_waited_for(pair: tuple[HF, HF]) -> None:
    class Gone(Servers):
        def unavailable(self) -> set[str]:
            return set(self.replicas())

    assert VerifiedTeacher(Gone(pair[0], pair[0]), N_VOCAB, print).tolerance == MIN_TOLERANCE
    with pytest.raises(ServerError, match="it is gone"):
        VerifiedTeacher(Gone(Lost(pair[0], 9)), N_VOCAB, print)


def test_who_is_away_is_looked_at_when_it_has_answered(
    pair: tuple[HF, HF], rolled: Rollouts
) -> None:
    servers = Servers(pair[0], None)
    same = VerifiedTeacher(servers, N_VOCAB, print)
    servers.busy = [0]
    same.score(rolled, ASK)
    servers.scorers[1], servers.busy = pair[1], [0, 1]
    with pytest.raises(IdentityError, match="server 1 is not the teacher"):
        same.score(rolled, ASK)


def test_the_first_unit_is_scored_twice_and_the_tolerance_is_three_times_what_differs(
    pair: tuple[HF, HF], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcask.engine.teachers.verified.CONTROL_ROWS", 12)
    rolled = roll(pair[0], 3)
    # Alone it says otherwise than beside another, where prompts are long.
    crowd = Off(pair[0], 0.02, lambda r, _: len(r.finish) == 2 and len(r.prompts[0].token_ids) > 1)
    servers = Servers(crowd)
    same = VerifiedTeacher(servers, N_VOCAB, print)
    assert same.tolerance == MIN_TOLERANCE
    servers.rows = 0
    same.score(rolled, ASK)
    assert same.workload_diff is not None
    assert same.workload_diff.largest == pytest.approx(0.02, rel=1e-3)
    assert same.tolerance == pytest.approx(SPREAD_FACTOR * 0.02, rel=1e-3)
    # At most so many rows twice again, and the probe.
    assert 0 < servers.rows - rolled.positions - PROBE_ROWS <= 24
    servers.rows = 0
    same.score(rolled, ASK)
    assert servers.rows == rolled.positions + PROBE_ROWS


def test_a_teacher_that_is_unsteady_at_work_is_refused(pair: tuple[HF, HF]) -> None:
    uneven = Off(pair[0], 0.5, lambda r, _: len(r.finish) == 6 and len(r.prompts[0].token_ids) > 1)
    odd = VerifiedTeacher(Servers(uneven), N_VOCAB, print)
    with pytest.raises(IdentityError, match=r"differs from itself by 0\.5"):
        odd.score(roll(pair[0], 3), ASK)


def test_no_more_is_asked_for_than_units_will_be(pair: tuple[HF, HF], rolled: Rollouts) -> None:
    """Else a server that tells 8 log-probs could never be asked for 8."""
    servers = Servers(pair[0])
    VerifiedTeacher(servers, N_VOCAB, print, 8).score(rolled, ASK)
    assert max(each.k_max for each in servers.requests) == 8


def test_a_fingerprint_does_not_depend_on_the_student(pair: tuple[HF, HF], tmp_path: Path) -> None:
    """Who has fewer ids is scored by the same teacher, over those that both know."""
    model = make_model(seed=1, vocab_size=N_VOCAB + 1, tie=False)
    model.lm_head.weight.data[N_VOCAB] = 0
    told = Servers(HF(save_folder(tmp_path / "wider", model), n_vocab=100, stop_ids=(EOS,)))
    wide, narrow = (VerifiedTeacher(told, n, print).lineage()["behaviour"] for n in (100, 99))
    other = VerifiedTeacher(Servers(pair[0]), N_VOCAB, print).lineage()["behaviour"]
    assert compare_records(wide, narrow)[0] <= MIN_TOLERANCE == compare_records(wide, narrow)[1]
    assert compare_records(wide, other)[0] > compare_records(wide, other)[1]


class Padded:
    """A server of a model whose head has more ids than its tokenizer."""

    capabilities = frozenset({"top", "at_ids"})

    def __init__(self, log_p: Any, n_vocab: int) -> None:
        self.log_p, self.n_vocab, self.asked = log_p, n_vocab, [0]

    def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists) -> Scores:
        assert self.n_vocab == len(self.log_p)
        self.asked = sorted({*self.asked, *at.ids.tolist()})
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
def test_mass_of_a_padded_head_is_seen_wherever_it_is(pads: int) -> None:
    logits = torch.zeros(99 + pads, dtype=torch.float64)
    logits[99:] = -40.0
    fine: Any = Padded(logits.log_softmax(0).numpy(), 99)
    assert check_padding(fine, 99, 99 + pads) == ""
    assert fine.n_vocab == 99
    assert len(fine.asked) - 1 == min(pads, 16 * PROBE_ROWS)
    logits[99:] = -2.0
    untrained: Any = Padded(logits.log_softmax(0).numpy(), 99)
    with pytest.raises(IdentityError, match=f"the {pads} ids of its padded head hold a mass"):
        check_padding(untrained, 99, 99 + pads)
    assert untrained.n_vocab == 99


@pytest.mark.parametrize("status", [0, 400, 500])
def test_only_a_refusal_leaves_the_padding_unseen(status: int) -> None:
    class Failing(Padded):
        def score(self, rollouts: Rollouts, request: ScoreParams, at: IdLists) -> Scores:
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


def test_a_padded_head_that_cannot_be_looked_at_is_a_note() -> None:
    blind: Any = Padded(np.zeros(101), 99)
    blind.capabilities = frozenset({"top"})
    assert "2 ids of its padded head cannot be checked" in check_padding(blind, 99, 101)
    assert check_padding(blind, 99, 99) == ""
