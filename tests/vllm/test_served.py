"""A real server against the model that it serves, and the whole way: rollouts from vLLM in this
environment, scores from the server and training in the other one, meeting only in the store.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.server import Limits, Server
from logitcask.engine.store import open_store
from logitcask.engine.teachers.doctor import Examination, examine
from logitcask.engine.types import ModelRef, Prompt, SamplingParams, ScoreRequest
from tests.engine.tiny import make_model, save_folder

OWN = ScoreRequest(entry_kind="topk", top_p=1.0, k_min=6, k_max=6, at_student=False)
PROMPTS = [Prompt(id=str(i), token_ids=tuple(range(3, 3 + n))) for i, n in enumerate((1, 12, 5))]
OTHER = os.environ.get("LOGITCASK", str(Path(sys.executable).with_name("logitcask")))
"""The command in the environment without vLLM, which `make test-vllm` names."""


@pytest.fixture(scope="module")
def server(vllm_server: str, ref: ModelRef) -> Iterator[Server]:
    with Server([vllm_server], limits=Limits(read_s=120)) as server:
        server.n_vocab = ref.n_vocab
        yield server


@pytest.mark.parametrize("k", [12, 64])
def test_scores_of_a_real_server_are_those_of_the_model(server: Server, hf: HF, k: int) -> None:
    assert "at_ids" in server.capabilities
    rolled = hf.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=8), seed=0, version=0)
    rolled = replace(rolled, student=hf.score(rolled, OWN))
    asked = ScoreRequest(entry_kind="topk", top_p=1.0, k_min=k, k_max=k)
    found, exact = server.score(rolled, asked), hf.score(rolled, asked)
    np.testing.assert_allclose(found.lp, exact.lp, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.at_lp, exact.at_lp, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found.entry_lp, exact.entry_lp, atol=1e-5, rtol=1e-5)
    # Ids whose log-probs are equal to rounding may have changed places.
    assert (found.ids == exact.ids).mean() > 0.99
    assert found.entropy_hi is not None
    assert (found.entropy <= exact.entropy + 1e-5).all()
    assert (exact.entropy <= found.entropy_hi + 1e-5).all()


def test_the_doctor_finds_nothing(vllm_server: str, ref: ModelRef) -> None:
    found = list(examine(Examination(url=vllm_server, against=str(ref.path))))
    assert {each.check: (each.state, each.said) for each in found if each.state != "ok"} == {}
    assert [each.check for each in found][-1] == "parity"


def test_three_environments_meet_in_a_store(
    vllm_server: str, ref: ModelRef, tmp_path: Path
) -> None:
    student = save_folder(tmp_path / "student", make_model(hidden=64, seed=5))
    lines = [json.dumps({"id": str(i), "prompt": f"{i} + {i} ="}) for i in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    store = tmp_path / "store"
    ours = str(Path(sys.executable).with_name("logitcask"))
    quiet = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def call(command: str, line: str) -> None:
        done = subprocess.run(
            [command, *line.split()], env=quiet, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    call(
        ours,
        f"rollout --model {student} --prompts p.jsonl --no-chat-template --store store --n 2 "
        "--max-new-tokens 8 --student-k 4 --unit-prompts 2 --backend vllm --device cpu",
    )
    call(
        OTHER,
        f"score --model {vllm_server} --tokenizer {ref.path} --store store --teacher served "
        "--k-min 4 --k-max 12",
    )
    pin = open_store(store).head()
    segment = pin.rollouts("main")[0]
    assert segment.lineage["backend"]["name"] == "vllm"
    (score,) = pin.scores("served")[segment.seg_id]
    assert score.lineage["backend"]["name"] == "server"
    assert score.lineage["request"]["at_student"]
    call(
        OTHER,
        f"train --model {student} --store store --objective opd --k 4 --lr 1e-3 --out run "
        "--tokens-per-batch 64 --device cpu",
    )
    card = json.loads((tmp_path / "run" / "logitcask.json").read_text())
    assert card["version"] >= 1
