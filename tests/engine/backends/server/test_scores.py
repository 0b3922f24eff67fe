"""Scores over HTTP equal those of the model, and requests beyond a server are an error."""

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
from logitcask.engine.score.positions import chosen_rows, score_positions
from logitcask.engine.types import IdLists, Rollouts, ScoreParams, no_progress
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import N_VOCAB, make_tokenizer

PARAMS = ScoreParams(top_p=0.9, k_min=3, k_max=12)
Connect = Callable[..., ServerScorer]


def test_scores_over_http_equal_those_of_the_model(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    server = connect(fake)
    assert server.capabilities == {"top", "at_ids", "entropy", "tail", "bounds"}
    found, exact = server.score(rolled, PARAMS), teacher.score(rolled, PARAMS)
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


@pytest.mark.parametrize("positions", ["first:2", "every:3"])
def test_some_positions_over_http_equal_those_of_the_model(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts, positions: str
) -> None:
    rows = chosen_rows(rolled, positions)
    found, exact = (
        score_positions(each, rolled, PARAMS, rows, no_progress)
        for each in (connect(fake), teacher)
    )
    assert len(found.lp) == rows.sum() < rolled.positions
    np.testing.assert_array_equal(found.ids, exact.ids)
    for name in ("lp", "entry_lp", "at_lp"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-5)


@pytest.mark.parametrize("generate", [True, False])
def test_a_server_without_extra_ids_returns_its_topk(
    generate: bool, fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    fake.generate, fake.at_ids = generate, False
    server = connect(fake)
    assert "at_ids" not in server.capabilities
    assert server.info.path == ("/inference/v1/generate" if generate else "/v1/completions")
    params = replace(PARAMS, at_student=False)
    found, exact = server.score(rolled, params), teacher.score(rolled, params)
    np.testing.assert_array_equal(found.ids, exact.ids)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5)
    assert found.at_lp is None
    with pytest.raises(ConfigError, match="cannot answer at chosen ids") as caught:
        server.score(rolled, PARAMS)
    assert "--enable-scale-out" in caught.value.hint


def test_ragged_extra_ids_keep_their_rows(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    rng = np.random.default_rng(0)
    cnt = rng.integers(0, 6, rolled.positions).astype(np.uint16)
    ids = np.concatenate([rng.permutation(N_VOCAB)[:n] for n in cnt]).astype(np.uint32)
    at = IdLists(cnt=cnt, ids=ids)
    found, exact = connect(fake).score(rolled, PARAMS, at), teacher.score(rolled, PARAMS, at)
    assert found.at_lp is not None
    np.testing.assert_allclose(found.at_lp, exact.at_lp, atol=1e-5)


def test_full_scores_have_an_exact_entropy(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    params = ScoreParams(top_p=1.0, k_min=N_VOCAB, k_max=128, at_student=False)
    found, exact = connect(fake).score(rolled, params), teacher.score(rolled, params)
    assert found.entropy_hi is not None
    np.testing.assert_allclose(found.entropy, found.entropy_hi, atol=1e-6)
    np.testing.assert_allclose(found.entropy, exact.entropy, atol=1e-5)
    assert np.isneginf(found.log_tail).all()


def test_requests_are_concurrent(fake: FakeServer, connect: Connect, rolled: Rollouts) -> None:
    fake.delay_s = 0.3
    connect(fake).score(rolled, PARAMS)
    assert fake.seen.most_in_flight == len(rolled.finish)


def test_bytes_in_flight_stay_below_their_cap(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.delay_s = 0.02
    cap = 3 * 42 * 13 * 70  # three times the longest sequence
    server = connect(fake, limits=replace(QUICK, bytes=cap))
    server.score(rolled, PARAMS)
    requests, most = server.most_in_flight
    assert 0 < most <= cap
    assert fake.seen.most_in_flight == requests < len(rolled.finish)


def test_a_request_larger_than_a_cap_is_sent_alone(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake, limits=replace(QUICK, bytes=10, tokens=1))
    server.score(rolled, PARAMS)
    assert fake.seen.most_in_flight == 1


def test_too_many_log_probs_are_an_error_with_both_options(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.max_logprobs = 8
    with pytest.raises(
        ConfigError, match=r"12 log-probs per position \(k_max = 12 and 7"
    ) as caught:
        connect(fake).score(rolled, PARAMS)
    hint = (
        "--max-logprobs 12 or more, or give a smaller --teacher-topk-max (and --teacher-topk-min);"
    )
    assert hint in caught.value.hint


def test_too_many_extra_ids_are_an_error_with_their_number(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.max_logprobs = 12
    many_ids = np.arange(20, dtype=np.uint32)
    cnt = np.full(rolled.positions, 1, np.uint16)
    cnt[-1] = 20
    at = IdLists(cnt=cnt, ids=np.concatenate([np.zeros(rolled.positions - 1, np.uint32), many_ids]))
    with pytest.raises(
        ConfigError, match=r"20 log-probs per position \(k_max = 12 and 20"
    ) as caught:
        connect(fake).score(rolled, PARAMS, at)
    assert "--max-logprobs 20 or more, or give fewer ids (--extra-ids" in caught.value.hint


def test_a_sequence_beyond_the_context_is_an_error_before_any_request(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.max_model_len = 40
    server = connect(fake)
    before = len(fake.seen.requests)
    with pytest.raises(ModelError, match="the scorer's context: 39") as caught:
        server.score(rolled, PARAMS)
    assert "--max-model-len" in caught.value.hint
    assert len(fake.seen.requests) == before


def test_ids_of_another_vocabulary_are_an_error(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    server = connect(fake)
    server.n_vocab = 40
    with pytest.raises(IdentityError, match="the scorer has 40 ids"):
        server.score(rolled, PARAMS)


def test_served_selects_one_of_several_models(fake: FakeServer, connect: Connect) -> None:
    assert connect(fake, served="teacher").info.root == "org/teacher"
    with pytest.raises(IdentityError, match="serves no model 'big'; its models: teacher"):
        connect(fake, served="big")
    fake.parent = "base"
    with pytest.raises(IdentityError, match="serves 0 models"):
        connect(fake)
    assert connect(fake, served="teacher").info.parent == "base"


def card(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "root": "org/teacher", "parent": None, "max_model_len": 256} | more


def test_a_reply_with_the_first_of_several_names_is_accepted(
    fake: FakeServer, connect: Connect, rolled: Rollouts
) -> None:
    fake.cards = [card("first"), card("second"), card("tuned", root="/lora", parent="first")]
    fake.called = "first"
    assert connect(fake).info.served == "first"
    server = connect(fake, served="second")
    assert server.info.served == "second"
    assert server.score(rolled, PARAMS).at_lp is not None
    assert fake.seen.bodies[-1]["model"] == "second"
    fake.called = "tuned"
    with pytest.raises(AnswerError, match="as model 'tuned', and 'first' or 'second' was req"):
        server.score(rolled, PARAMS)
    fake.called, fake.cards = "first", [card("first", root=""), card("second", root="")]
    with pytest.raises(IdentityError, match="serves 2 models"):
        connect(fake)
    with pytest.raises(ServerError, match="as model 'first', and 'second' was requested"):
        connect(fake, served="second")


def test_an_adapter_has_the_context_of_its_parent(fake: FakeServer, connect: Connect) -> None:
    fake.cards = [card("base", root="org/base"), {"id": "tuned", "root": "/l", "parent": "base"}]
    assert connect(fake, served="tuned").info.max_model_len == 256


@pytest.mark.parametrize("cards", [5, "teacher", {"id": "teacher"}, [5, {"id": 5}], [[]]])
def test_a_malformed_list_of_models_is_empty(
    cards: Any, fake: FakeServer, connect: Connect
) -> None:
    fake.cards = cards
    with pytest.raises(IdentityError, match="serves 0 models; its models: none"):
        connect(fake)


class ReplacesPrompt(FakeServer):
    """A server that replaces tokens of the longest prompt, which has 30 tokens."""

    def _reply(self, body: dict[str, Any], ids: list[int], sampling: dict[str, Any]) -> Any:
        replaced = ids[:1] if len(ids) <= 30 else [ids[0], *([60] * 5)]
        return super()._reply(body, [*replaced, *ids[len(replaced) :]], sampling)


def test_a_replaced_prompt_is_an_error(teacher: HF, connect: Connect, rolled: Rollouts) -> None:
    for generate in (True, False):
        with ReplacesPrompt(teacher.model, generate=generate) as fake:
            server = connect(fake)
            with pytest.raises(AnswerError, match="prompt '1'.*position 1 without the token 4"):
                server.score(rolled, replace(PARAMS, at_student=False))


def test_servers_of_another_model_are_an_error(
    fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    with FakeServer(teacher.model) as second:
        server = connect(fake, second)
        fake.delay_s = second.delay_s = 0.05
        server.score(rolled, PARAMS)
        assert fake.seen.most_in_flight > 1
        assert second.seen.most_in_flight > 1
        second.root = "org/other"
        with pytest.raises(IdentityError, match="root is 'org/other', and was 'org/teacher'"):
            connect(fake, second)


def test_tokenize_needs_the_endpoint(fake: FakeServer, connect: Connect) -> None:
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
    with FakeServer(teacher.model, key=key) as with_key:
        server = connect(with_key, key=key)
        assert f"Bearer {key}" in with_key.seen.auth
        assert key not in str(server.describe()) + repr(server) + repr(vars(server))
        for wrong in ("sk-other", None):
            with pytest.raises(LogitcaskError, match="401: Unauthorized") as caught:
                connect(with_key, key=wrong)
            assert "LOGITCASK_API_KEY" in caught.value.hint
            assert "sk-other" not in str(caught.value)
    with pytest.raises(ConfigError, match="holds more than scheme") as caught_url:
        ServerScorer([f"http://user:{key}@host:1"])
    assert key not in str(caught_url.value)
    file.write_text(f"{key} {key}")
    with pytest.raises(ConfigError, match="holds 2 words") as caught_file:
        read_key(file)
    assert key not in str(caught_file.value)


def test_urls_of_other_schemes_are_an_error() -> None:
    for url in ("ftp://host", "file:///etc/passwd", "http://"):
        with pytest.raises(ConfigError, match="not a server's URL"):
            ServerScorer([url])
