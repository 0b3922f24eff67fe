"""SGLang as a teacher: its own bodies, scores against the model and against vLLM's form, faults.

`sglang_0_5_23.json` holds log-probs, and what SGLang 0.5.23 writes for them: its functions, which
the file lists, were run over these log-probs on a CPU. No server ran.
"""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.server import ServerScorer, sglang
from logitcask.engine.backends.server.protocol import SGLANG, RequestBody
from logitcask.engine.errors import AnswerError, ConfigError, IdentityError, ServerError
from logitcask.engine.store.format import ragged
from logitcask.engine.teachers.server_check import ServerCheck, check_server
from logitcask.engine.types import IdLists, Rollouts, ScoreParams
from tests.engine.backends.server.conftest import QUICK
from tests.engine.backends.server.fake_server import FakeServer, Fault
from tests.engine.backends.server.fake_sglang import FakeSGLang
from tests.engine.backends.server.test_faults import TRANSIENT, status
from tests.engine.tiny import make_model, make_tokenizer, save_folder

GOLDEN = json.loads((Path(__file__).parent / "sglang_0_5_23.json").read_text())
IDS, LP = GOLDEN["ids"], np.array(GOLDEN["lp"], np.float32)
PARAMS = ScoreParams(top_p=0.9, k_min=3, k_max=12)
Connect = Callable[..., ServerScorer]


def chosen_ids(rows: int, ids: list[int]) -> IdLists | None:
    """Return the same ids for every row; None without ids."""
    counts = np.full(rows, len(ids), np.uint16)
    return IdLists(cnt=counts, ids=np.tile(np.array(ids, np.uint32), rows)) if ids else None


def body_of(case: dict[str, Any]) -> RequestBody:
    rows = len(IDS) - case["start"] - 1
    return RequestBody(ids=IDS, rows=rows, k=case["k"], extra_ids=chosen_ids(rows, case["chosen"]))


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_bodies_that_sglang_wrote_are_read(case: dict[str, Any]) -> None:
    # The token 9, the last of the head, is 0 in them.
    body, lp = body_of(case), LP[case["start"] : -1]
    found = body.read(SGLANG, set(), case["body"].encode())
    np.testing.assert_array_equal(found.lp, lp[np.arange(body.rows), IDS[-body.rows :]])
    order = np.argsort(-lp, axis=1)[:, : body.k]
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_array_equal(found.top_lp, np.take_along_axis(lp, order, 1))
    if case["chosen"]:
        assert found.at is not None
        np.testing.assert_array_equal(found.at, lp[:, case["chosen"]].ravel())
    assert len(case["body"]) < body.most_bytes(SGLANG)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_the_fake_server_writes_what_sglang_writes(case: dict[str, Any]) -> None:
    fake = FakeSGLang(None)
    fake.is_flat = case["flat"]
    body = body_of(case)
    found = fake._input_logprobs(body.to_json(SGLANG, ""), IDS, LP)
    theirs = json.loads(case["body"])["meta_info"]
    assert found == {key: theirs[key] for key in theirs if key.startswith("input_")}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.integers(0, 30), max_size=8), min_size=1, max_size=30))
def test_parts_cover_all_rows_within_the_limit(rows: list[set[int]]) -> None:
    counts = np.array([len(row) for row in rows], np.uint16)
    ids = np.array([id_ for row in rows for id_ in sorted(row)], np.uint32)
    extra = IdLists(cnt=counts, ids=ids)
    body = RequestBody(ids=list(range(len(rows) + 3)), rows=len(rows), k=2, extra_ids=extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang, "PART_ENTRIES", 40)
        parts = list(body.parts(SGLANG))
    assert [row for part, _ in parts for row in range(part.start, part.stop)] == list(
        range(len(rows))
    )
    off = ragged.starts(counts)
    for part, request in parts:
        assert request.ids == body.ids[: 3 + part.stop]
        assert request.extra_ids is not None
        flat = ids[off[part.start] : off[part.stop]]
        np.testing.assert_array_equal(request.extra_ids.ids, flat)
        assert request.rows == 1 or request.rows * len(set(flat.tolist())) <= 40


@pytest.mark.parametrize("is_flat", [True, False])
def test_scores_equal_those_of_the_model_and_of_vllms_form(
    is_flat: bool,
    fake: FakeServer,
    connect: Connect,
    teacher: HF,
    rolled: Rollouts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sglang, "PART_ENTRIES", 60)
    with FakeSGLang(teacher.model) as server:
        server.is_flat = is_flat
        scorer = connect(server)
        assert scorer.capabilities == {"top", "at_ids", "entropy", "tail", "bounds"}
        assert scorer.describe()["engine"] == "sglang 0.5.23"
        before = len(server.seen.requests)
        found, theirs = scorer.score(rolled, PARAMS), connect(fake).score(rolled, PARAMS)
        assert len(server.seen.requests) - before > len(rolled.finish), "sequences in parts"
    for name in ("cnt", "ids", "at_lp", "entropy", "entropy_hi", "lp", "entry_lp", "log_tail"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(theirs, name), atol=1e-5, err_msg=name
        )
    model = copy.deepcopy(teacher.model).double()
    exact = []
    for sequence, prompt in enumerate(rolled.seq_prompt):
        rows = slice(*rolled.seq_off[sequence : sequence + 2])
        ids = [*rolled.prompts[prompt].token_ids, *rolled.tokens[rows].tolist()]
        with torch.no_grad():
            lp = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        exact.append(lp[-1 - (rows.stop - rows.start) : -1])
    full = np.concatenate(exact)
    assert rolled.student is not None
    row = np.repeat(np.arange(rolled.positions), rolled.student.cnt)
    np.testing.assert_allclose(found.at_lp, full[row, rolled.student.ids], atol=1e-5)
    np.testing.assert_allclose(found.lp, full[np.arange(len(full)), rolled.tokens], atol=1e-5)


def test_parts_of_a_sequence_follow_one_another(
    connect: Connect, teacher: HF, rolled: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin each part where the one before it ended: the server's prefix cache holds that."""
    monkeypatch.setattr(sglang, "PART_ENTRIES", 1)
    with FakeSGLang(teacher.model) as server:
        connect(server, limits=replace(QUICK, requests=1)).score(rolled, PARAMS)
        bodies = [each for each in server.seen.bodies if "token_ids_logprob" in each][1:]
    assert len(bodies) == rolled.positions
    by_length = sorted(len(each["input_ids"]) for each in bodies)
    prompts = np.array([len(rolled.prompts[p].token_ids) for p in rolled.seq_prompt])
    pairs = zip(prompts, rolled.lengths(), strict=True)
    assert by_length == sorted(int(p + i) for p, n in pairs for i in range(1, n + 1))
    for body in bodies:
        assert body["logprob_start_len"] == len(body["input_ids"]) - 2
        assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}


def spoil(change: Callable[[dict[str, Any]], None]) -> Fault:
    """Return a fault that changes meta_info."""

    async def answer(server: FakeServer, request: Any, reply: dict[str, Any]) -> None:
        change(reply["meta_info"])

    return answer


def last(meta: dict[str, Any], name: str) -> list[Any]:
    found: list[Any] = meta[f"input_{name}"][-1]
    return found


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "short": (lambda m: m["input_token_logprobs"].pop(), "log-probs of .* tokens, and"),
    "long": (lambda m: m["input_token_logprobs"].append([-1.0, 3, None]), "log-probs of .* tokens"),
    "no own": (lambda m: m.pop("input_token_logprobs"), "log-probs of no tokens"),
    "null": (lambda m: last(m, "token_logprobs").__setitem__(0, None), "null, NaN or infinite"),
    "nan": (lambda m: last(m, "token_logprobs").__setitem__(0, float("nan")), "not complete JSON"),
    "text": (lambda m: last(m, "token_logprobs").__setitem__(1, "x"), "or no id"),
    "other token": (lambda m: last(m, "token_logprobs").__setitem__(1, 99), "without the token"),
    "shape": (lambda m: m.update(input_top_logprobs_shape=[1, 1]), "another shape"),
    "prefix": (lambda m: m.update(input_top_logprobs_null_prefix=0), "after one position"),
    "dtype": (lambda m: m.update(input_top_logprobs_val_flat_b64_dtype="float16"), "in float32"),
    "base64": (lambda m: m.update(input_top_logprobs_val_flat_b64="?"), "does not hold"),
    "much": (lambda m: m.update(input_top_logprobs_idx_flat_b64="A" * 9999), "9999 characters"),
    "no top": (
        lambda m: [m.pop(key) for key in list(m) if key.startswith("input_top")],
        "nothing in input_top_logprobs",
    ),
    "no chosen": (lambda m: m.pop("input_token_ids_logprobs"), "nothing in input_token_ids"),
    "fewer chosen": (lambda m: last(m, "token_ids_logprobs").pop(), "log-probs at position"),
    "other chosen": (
        lambda m: last(m, "token_ids_logprobs")[0].__setitem__(1, 63),
        "with other ids",
    ),
    "null chosen": (lambda m: last(m, "token_ids_logprobs")[0].__setitem__(0, None), "is null"),
    "shifted": (
        lambda m: [e.__setitem__(0, e[0] - 0.5) for e in last(m, "token_ids_logprobs")],
        "two log-probs of one id",
    ),
    "positive": (lambda m: last(m, "token_logprobs").__setitem__(0, 0.5), "a log-prob of 0.5"),
    "truncated": (lambda m: m.update(prompt_tokens=m["prompt_tokens"] - 1), "number of tokens"),
    "aborted": (
        lambda m: m.update(finish_reason={"type": "abort", "message": "no memory"}),
        "aborted: no memory",
    ),
}


@pytest.fixture
def server(teacher: HF) -> Any:
    with FakeSGLang(teacher.model) as server:
        yield server


@pytest.mark.parametrize("kind", WRONG)
def test_a_lasting_wrong_answer_is_an_error(
    kind: str, server: FakeSGLang, connect: Connect, rolled: Rollouts
) -> None:
    change, words = WRONG[kind]
    scorer = connect(server)
    server.faults = [spoil(change)] * 100
    with pytest.raises(AnswerError, match=words):
        scorer.score(rolled, PARAMS)


def test_scores_after_single_faults_are_exact(
    server: FakeSGLang, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    scorer, exact = connect(server), teacher.score(rolled, PARAMS)
    # No check sees a shift of ids that are neither sampled nor among the best, as in one response.
    faults = [spoil(change) for kind, (change, _) in WRONG.items() if kind != "shifted"]
    faults += [TRANSIENT[kind] for kind in ("500", "503", "reset", "truncated")]
    rng = random.Random(0)
    for fault in faults:
        server.faults = [spoil(lambda _: None)] * rng.randrange(len(rolled.finish)) + [fault]
        found = scorer.score(rolled, PARAMS)
        np.testing.assert_array_equal(found.ids, exact.ids)
        np.testing.assert_allclose(found.at_lp, exact.at_lp, atol=1e-5)
        assert not server.faults
    server.faults = [status(400)] * 100
    with pytest.raises(ServerError, match="answers 400: fault 400"):
        scorer.score(rolled, PARAMS)


def test_other_weights_are_another_teacher(
    server: FakeSGLang, connect: Connect, rolled: Rollouts
) -> None:
    scorer = connect(server)
    server.weight_version = "step-2"
    with pytest.raises(IdentityError, match="fingerprint is 'step-2', and was ''"):
        scorer.score(rolled, PARAMS)
    server.weight_version, server.root = "default", "/other/weights"
    with pytest.raises(IdentityError, match="root is '/other/weights'"):
        scorer.score(rolled, PARAMS)


def test_the_kind_of_a_server_is_found_or_forced(
    server: FakeSGLang, fake: FakeServer, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    assert connect(fake).info.engine == connect(fake, engine="vllm").info.engine == "vllm"
    assert connect(server).info.root == "org/teacher"
    with pytest.raises(ServerError, match="/v1/completions answers 404"):
        connect(server, engine="vllm")
    server.cards = [{"id": "teacher", "owned_by": "a gateway", "max_model_len": 99}]
    assert connect(server, engine="sglang").info.max_model_len == 99
    server.cards = [{"id": "lora", "parent": "teacher", "owned_by": "sglang"}]
    with pytest.raises(IdentityError, match="'lora' is an adapter") as caught:
        connect(server, served="lora")
    assert "merge the adapter" in caught.value.hint


def test_a_version_without_chosen_ids_is_rejected_without_a_request(
    server: FakeSGLang, connect: Connect, teacher: HF, rolled: Rollouts
) -> None:
    server.at_ids = False
    scorer = connect(server)
    sent = len(server.seen.requests)
    with pytest.raises(ConfigError, match="cannot answer at chosen ids") as caught:
        scorer.score(rolled, PARAMS)
    assert "newer SGLang" in caught.value.hint
    assert "backend hf" in caught.value.hint
    with pytest.raises(ConfigError, match="whole distribution"):
        scorer.score(rolled, replace(PARAMS, entry_kind="sampled", at_student=False))
    assert len(server.seen.requests) == sent
    params = replace(PARAMS, at_student=False)
    found, exact = scorer.score(rolled, params), teacher.score(rolled, params)
    np.testing.assert_array_equal(found.ids, exact.ids)


def test_the_doctor_knows_sglang_and_a_temperature(tmp_path: Path) -> None:
    model = make_model(seed=1)
    folder = save_folder(tmp_path / "teacher", model)
    with FakeSGLang(model, tokenizer=make_tokenizer()) as server:
        request = ServerCheck(url=server.url, against=str(folder), k_max=16)
        found = {each.check: each for each in check_server(request)}
        assert {each.state for each in found.values()} == {"ok"}
        assert "SGLang 0.5.23" in found["server"].message
        server.temperature = 2.0
        states = {each.check: each.state for each in check_server(request)}
        assert [check for check, state in states.items() if state == "fault"] == ["parity"]
