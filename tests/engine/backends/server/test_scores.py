"""What comes over the wire is what the model says; what a server cannot answer is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.returned import RESOLVED
from logitcask.engine.backends.server import ServerScorer, read_key
from logitcask.engine.errors import (
    AnswerError,
    ConfigError,
    IdentityError,
    LogitcaskError,
    ModelError,
    ServerError,
)
from logitcask.engine.types import IdLists, Rollouts, ScoreParams
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import N_VOCAB, make_tokenizer

ASK = ScoreParams(top_p=0.9, k_min=3, k_max=12)
Connect = Callable[..., ServerScorer]


def test_scores_over_http_are_those_of_the_model(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    server = connect(fake)
    assert server.capabilities == {"top", "at_ids", "entropy", "tail", "bounds"}
    found, exact = server.score(rolled, ASK), teacher.score(rolled, ASK)
    np.testing.assert_array_equal(found.cnt, exact.cnt)
    np.testing.assert_array_equal(found.ids, exact.ids)
    for name in ("lp", "entry_lp", "at_lp"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-5)
    assert found.entropy_hi is not None
    assert (found.entropy <= exact.entropy + 1e-5).all()
    assert (exact.entropy <= found.entropy_hi + 1e-5).all()
    resolved = exact.log_tail > np.log(10 * RESOLVED)
    np.testing.assert_allclose(found.log_tail[resolved], exact.log_tail[resolved], atol=0.1)
    assert (found.log_tail >= exact.log_tail - 0.1).all()


@pytest.mark.parametrize("generate", [True, False])
def test_a_server_without_chosen_ids_gives_its_own_best(
    generate: bool, fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    fake.generate, fake.at_ids = generate, False
    server = connect(fake)
    assert "at_ids" not in server.capabilities
    assert server.info.path == ("/inference/v1/generate" if generate else "/v1/completions")
    asked = replace(ASK, at_student=False)
    found, exact = server.score(rolled, asked), teacher.score(rolled, asked)
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
    assert found.at_lp is None
    with pytest.raises(ConfigError, match="cannot answer at chosen ids") as caught:
        server.score(rolled, ASK)
    assert "--enable-scale-out" in caught.value.hint


def test_ragged_lists_and_rows_without_any_come_back_in_their_places(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    rng = np.random.default_rng(0)
    cnt = rng.integers(0, 6, rolled.positions).astype(np.uint16)
    ids = np.concatenate([rng.permutation(N_VOCAB)[:n] for n in cnt]).astype(np.uint32)
    at = IdLists(cnt=cnt, ids=ids)
    found, exact = connect(fake).score(rolled, ASK, at), teacher.score(rolled, ASK, at)
    assert found.at_lp is not None
    np.testing.assert_allclose(found.at_lp, exact.at_lp, atol=1e-5)


def test_all_of_a_small_vocabulary_leaves_nothing_open(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    asked = ScoreParams(top_p=1.0, k_min=N_VOCAB, k_max=128, at_student=False)
    found, exact = connect(fake).score(rolled, asked), teacher.score(rolled, asked)
    assert found.entropy_hi is not None
    np.testing.assert_allclose(found.entropy, found.entropy_hi, atol=1e-6)
    np.testing.assert_allclose(found.entropy, exact.entropy, atol=1e-5)
    assert np.isneginf(found.log_tail).all()


def test_requests_are_in_flight_together(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.delay_s = 0.3
    connect(fake).score(rolled, ASK)
    assert fake.seen.most_in_flight == len(rolled.finish)


def test_bytes_in_flight_stay_below_their_cap(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.delay_s = 0.02
    cap = 3 * 42 * 13 * 70  # the longest sequence thrice
    server = connect(fake, limits=replace(QUICK, bytes=cap))
    server.score(rolled, ASK)
    requests, most = server.most_in_flight
    assert 0 < most <= cap
    assert fake.seen.most_in_flight == requests < len(rolled.finish)


def test_what_is_larger_than_a_cap_goes_alone(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, bytes=10, tokens=1))
    server.score(rolled, ASK)
    assert fake.seen.most_in_flight == 1


def test_too_many_log_probs_name_both_ways_out(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.max_logprobs = 8
    with pytest.raises(
        ConfigError, match=r"12 log-probs per position \(k_max = 12 and 7"
    ) as caught:
        connect(fake).score(rolled, ASK)
    assert "--max-logprobs 12 or more, or give a smaller --teacher-topk-max" in caught.value.hint


def test_too_many_chosen_ids_name_their_own_number(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.max_logprobs = 12
    wide = np.arange(20, dtype=np.uint32)
    cnt = np.full(rolled.positions, 1, np.uint16)
    cnt[-1] = 20
    at = IdLists(cnt=cnt, ids=np.concatenate([np.zeros(rolled.positions - 1, np.uint32), wide]))
    with pytest.raises(
        ConfigError, match=r"20 log-probs per position \(k_max = 12 and 20"
    ) as caught:
        connect(fake).score(rolled, ASK, at)
    assert "--max-logprobs 20 or more, or give fewer ids (--extra-ids" in caught.value.hint


def test_a_sequence_beyond_the_context_is_refused_before_anything_is_sent(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.max_model_len = 40
    server = connect(fake)
    before = len(fake.seen.requests)
    with pytest.raises(ModelError, match="the scorer's context: 39") as caught:
        server.score(rolled, ASK)
    assert "--max-model-len" in caught.value.hint
    assert len(fake.seen.requests) == before


def test_ids_of_another_vocabulary_are_refused(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake)
    server.n_vocab = 40
    with pytest.raises(IdentityError, match="the scorer has 40 ids"):
        server.score(rolled, ASK)


def test_the_model_is_chosen_by_name_where_there_are_several(
    fake: FakeServer, connect: Connect
) -> None:
    assert connect(fake, served="teacher").info.root == "org/teacher"
    with pytest.raises(IdentityError, match="serves no model 'big'; its models: teacher"):
        connect(fake, served="big")
    fake.parent = "base"
    with pytest.raises(IdentityError, match="serves 0 models"):
        connect(fake)
    assert connect(fake, served="teacher").info.parent == "base"


def card(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "root": "org/teacher", "parent": None, "max_model_len": 256} | more


def test_a_model_may_have_several_names_and_answers_with_its_first(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.cards = [card("first"), card("second"), card("tuned", root="/lora", parent="first")]
    fake.called = "first"
    assert connect(fake).info.served == "first"
    server = connect(fake, served="second")
    assert server.info.served == "second"
    assert server.score(rolled, ASK).at_lp is not None
    assert fake.seen.bodies[-1]["model"] == "second"
    fake.called = "tuned"
    with pytest.raises(AnswerError, match="as model 'tuned', and 'first' or 'second' was req"):
        server.score(rolled, ASK)
    fake.called, fake.cards = "first", [card("first", root=""), card("second", root="")]
    with pytest.raises(IdentityError, match="serves 2 models"):
        connect(fake)
    with pytest.raises(ServerError, match="as model 'first', and 'second' was requested"):
        connect(fake, served="second")


def test_an_adapter_has_the_context_of_its_parent(fake: FakeServer, connect: Connect) -> None:
    fake.cards = [card("base", root="org/base"), {"id": "tuned", "root": "/l", "parent": "base"}]
    assert connect(fake, served="tuned").info.max_model_len == 256


@pytest.mark.parametrize("cards", [5, "teacher", {"id": "teacher"}, [5, {"id": 5}], [[]]])
def test_what_lists_no_models_serves_none(cards: Any, fake: FakeServer, connect: Connect) -> None:
    fake.cards = cards
    with pytest.raises(IdentityError, match="serves 0 models; its models: none"):
        connect(fake)


class Elsewhere(FakeServer):
    """Puts words of its own into the longest prompt, of 30 tokens, and takes as many away."""

    def _said(self, body: dict[str, Any], ids: list[int], sampling: dict[str, Any]) -> Any:
        kept = ids[:1] if len(ids) <= 30 else [ids[0], *([60] * 5)]
        return super()._said(body, [*kept, *ids[len(kept) :]], sampling)


def test_a_prompt_that_was_replaced_on_the_way_is_noticed(
    teacher: HF, connect: Connect, rolled: Rollouts
) -> None:
    for generate in (True, False):
        with Elsewhere(teacher.model, generate=generate) as fake:
            server = connect(fake)
            with pytest.raises(AnswerError, match="prompt '1'.*position 1 without the token 4"):
                server.score(rolled, replace(ASK, at_student=False))


def test_servers_of_one_teacher_agree_or_are_refused(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as second:
        server = connect(fake, second)
        fake.delay_s = second.delay_s = 0.05
        server.score(rolled, ASK)
        assert fake.seen.most_in_flight > 1
        assert second.seen.most_in_flight > 1
        second.root = "org/other"
        with pytest.raises(IdentityError, match="root is 'org/other', and was 'org/teacher'"):
            connect(fake, second)


def test_text_is_tokenised_where_the_server_does_it(fake: FakeServer, connect: Connect) -> None:
    assert connect(fake).tokenize("ab") is None
    fake.tokenizer = make_tokenizer()
    assert connect(fake).tokenize("ab") == make_tokenizer()("ab")["input_ids"]


def test_a_key_is_sent_and_never_shown(
    teacher: HF, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-canary-5f3a"
    file = tmp_path / "key"
    file.write_text(key + "\n")
    monkeypatch.setenv("LOGITCASK_API_KEY", key)
    assert read_key() == read_key(file) == key
    with FakeServer(teacher.model, key=key) as guarded:
        server = connect(guarded, key=key)
        assert f"Bearer {key}" in guarded.seen.auth
        assert key not in str(server.describe()) + repr(server) + repr(vars(server))
        for wrong in ("sk-other", None):
            with pytest.raises(LogitcaskError, match="401: Unauthorized") as caught:
                connect(guarded, key=wrong)
            assert "LOGITCASK_API_KEY" in caught.value.hint
            assert "sk-other" not in str(caught.value)
    with pytest.raises(ConfigError, match="holds more than scheme") as caught_url:
        ServerScorer([f"http://user:{key}@host:1"])
    assert key not in str(caught_url.value)
    file.write_text(f"{key} {key}")
    with pytest.raises(ConfigError, match="holds 2 words") as caught_file:
        read_key(file)
    assert key not in str(caught_file.value)


def test_addresses_that_are_no_servers() -> None:
    for url in ("ftp://host", "file:///etc/passwd", "http://"):
        with pytest.raises(ConfigError, match="not a server's URL"):
            ServerScorer([url])
