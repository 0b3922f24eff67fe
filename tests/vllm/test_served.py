"""A real server against its model, and a pipeline across environments.

The pipeline samples with vLLM in this environment; scores from the server and training run in the
other one. They share only the store.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.server import Limits, ServerScorer
from logitcask.engine.models.identity import model_ref
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import open_store
from logitcask.engine.teachers.server_check import ServerCheck, check_server
from logitcask.engine.types import ModelRef, Prompt, SamplingParams, ScoreParams
from tests.engine.tiny import make_model, save_folder
from tests.vllm.real_server import RealServer, ids_of_each_row, takes_ids_of_each_row

STUDENT_TOP_6 = ScoreParams(entry_kind="topk", top_p=1.0, k_min=6, k_max=6, at_student=False)
PROMPTS = [Prompt(id=str(i), token_ids=tuple(range(3, 3 + n))) for i, n in enumerate((1, 12, 5))]
OTHER_COMMAND = os.environ.get("LOGITCASK", str(Path(sys.executable).with_name("logitcask")))
"""The command in the environment without vLLM, which `make test-vllm` sets."""
CLEAN_ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")
}
UNITS, TIMEOUT_S = 5, 600


@pytest.fixture(scope="module")
def server(vllm_server: str, ref: ModelRef) -> Iterator[ServerScorer]:
    with ServerScorer([vllm_server], limits=Limits(read_s=TIMEOUT_S)) as server:
        server.n_vocab = ref.n_vocab
        yield server


@pytest.mark.parametrize("k", [12, 64])
def test_scores_of_a_real_server_equal_those_of_the_model(
    server: ServerScorer, hf: HF, k: int
) -> None:
    at_ids = takes_ids_of_each_row()
    assert ("at_ids" in server.capabilities) == at_ids
    rolled = hf.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=8), seed=0, version=0)
    rolled = replace(rolled, student=hf.score(rolled, STUDENT_TOP_6))
    params = ScoreParams(entry_kind="topk", top_p=1.0, k_min=k, k_max=k, at_student=at_ids)
    found, exact = server.score(rolled, params), hf.score(rolled, params)
    np.testing.assert_allclose(found.lp, exact.lp, atol=1e-5, rtol=1e-5)
    if at_ids:
        np.testing.assert_allclose(found.at_lp, exact.at_lp, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5, rtol=1e-5)
    # Ids with log-probs that are equal up to rounding may be swapped.
    assert (found.ids == exact.ids).mean() > 0.99
    assert found.entropy_hi is not None
    assert (found.entropy <= exact.entropy + 1e-5).all()
    assert (exact.entropy <= found.entropy_hi + 1e-5).all()


@ids_of_each_row
def test_the_doctor_finds_no_fault(vllm_server: str, ref: ModelRef) -> None:
    found = list(check_server(ServerCheck(url=vllm_server, against=str(ref.path))))
    assert {each.check: (each.state, each.message) for each in found if each.state != "ok"} == {}
    assert [each.check for each in found][-1] == "parity"


@ids_of_each_row
def test_environments_share_a_store(vllm_server: str, ref: ModelRef, tmp_path: Path) -> None:
    student = save_folder(tmp_path / "student", make_model(hidden=64, seed=5))
    lines = [json.dumps({"id": str(i), "prompt": f"{i} + {i} ="}) for i in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    store = tmp_path / "store"
    this_command = str(Path(sys.executable).with_name("logitcask"))

    def call(command: str, line: str) -> None:
        result = subprocess.run(
            [command, *line.split()],
            env=CLEAN_ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr

    call(
        this_command,
        f"rollout --model {student} --prompts p.jsonl --no-chat-template --store store --n 2 "
        "--max-new-tokens 8 --student-topk 4 --unit-prompts 2 --backend vllm --device cpu",
    )
    call(
        OTHER_COMMAND,
        f"score --model {vllm_server} --tokenizer {ref.path} --store store --teacher served "
        "--teacher-topk-min 4 --teacher-topk-max 12",
    )
    snapshot = open_store(store).head()
    segment = snapshot.rollouts("main")[0]
    assert segment.provenance["backend"]["name"] == "vllm"
    (score,) = snapshot.scores("served")[segment.seg_id]
    assert score.provenance["backend"]["name"] == "server"
    assert score.provenance["request"]["at_student"]
    call(
        OTHER_COMMAND,
        f"train --model {student} --store store --objective opd --loss-topk 4 --lr 1e-3 --out run "
        "--pack-length 64 --device cpu",
    )
    metadata = json.loads((tmp_path / "run" / "logitcask.json").read_text())
    assert metadata["version"] >= 1


@ids_of_each_row
def test_scoring_resumes_after_a_restart_of_a_killed_server(
    real_server: RealServer, ref: ModelRef, hf: HF, tmp_path: Path
) -> None:
    folder = save_folder(tmp_path / "student", make_model(hidden=64, seed=5))
    student = model_ref(str(folder), chat_template=True)
    store = open_store(tmp_path / "store", create=True)
    prompts = [Prompt(id=str(i), token_ids=tuple(range(3, 9 + i))) for i in range(UNITS)]
    sampling = SamplingParams(n=4, max_new_tokens=32)
    settings = {"prompts": prompts, "sampling": sampling, "student_k": 4, "unit_prompts": 1}
    rollout(RolloutRequest(store=store, model=student, sampler=HF(student), **settings))

    words = f"score --model {real_server.url} --tokenizer {ref.path} --store {store.url}"
    options = (
        "--teacher served --selection top-k --teacher-topk-min 12 "
        "--teacher-topk-max 12 --profile raw32 --format json"
    )
    command = subprocess.Popen(
        [OTHER_COMMAND, *words.split(), *options.split()],
        env=CLEAN_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + TIMEOUT_S
        while not store.head().scores("served"):
            assert command.poll() is None, command.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.01)
        real_server.kill()
        before = len(store.head().scores("served"))
        assert 1 <= before < UNITS, "the server must be killed before the last unit"
        real_server.start()
        out, err = command.communicate(timeout=TIMEOUT_S)
    finally:
        command.kill()
    assert command.returncode == 0, err
    assert json.loads(out)["units_new"] == UNITS

    request = ScoreParams(entry_kind="topk", top_p=1.0, k_min=12, k_max=12)
    local = {"model": ref, "scorer": hf, "teacher_name": "near", "profile": "raw32"}
    score(ScoreRequest(store=store, params=request, **local))
    snapshot = store.head()
    assert len(snapshot.segments) == snapshot.number + 1 == 3 * UNITS
    for segment in snapshot.rollouts("main"):
        base = store.read_rollouts(segment)
        found, exact = (
            store.read_scores(snapshot.scores(name)[segment.seg_id], base=base)
            for name in ("served", "near")
        )
        for name in ("lp", "s_lp", "entry_lp"):
            values = getattr(found, name), getattr(exact, name)
            np.testing.assert_allclose(*values, atol=1e-5, rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(found.s_ids, exact.s_ids)
        assert (found.ids == exact.ids).mean() > 0.99
