"""A tap before a real server, with TRL's way to request and read log-probs."""

import json
import math
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcask.engine.backends.hf import HF
from logitcask.engine.store import open_store
from logitcask.engine.types import ModelRef
from tests.vllm.test_served import CLEAN_ENVIRONMENT, OTHER_COMMAND, TIMEOUT_S

K, PROMPT = 8, 4


@contextmanager
def tap(url: str, ref: ModelRef, folder: Path, end: signal.Signals) -> Iterator[str]:
    """Start a tap in the environment without vLLM, and end it with a signal."""
    command = [
        *(OTHER_COMMAND, "tap", "--model", url, "--teacher", "tiny", "--port", "0"),
        *("--store", str(folder / "store"), "--rollouts", "tap", "--profile", "raw32"),
        *("--tokenizer", str(ref.path), "--topk", str(K)),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=CLEAN_ENVIRONMENT, start_new_session=True
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("listening on "):
            break
    else:
        raise AssertionError("".join(lines))
    yield line.split()[2].rstrip(",")
    process.send_signal(end)
    _, rest = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == (0 if end == signal.SIGTERM else -end), rest


def request(url: str, sequences: list[list[int]]) -> tuple[dict[str, list[Any]], str]:
    """Request log-probs and read them as TRL 1.16 does (VLLMClient, Apache-2.0)."""
    body = {
        **{"model": "teacher", "prompt": sequences, "max_tokens": 1, "temperature": 1.0},
        "prompt_logprobs": K,
    }
    sent = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent, timeout=TIMEOUT_S) as response:
        choices, source = json.load(response)["choices"], response.headers.get("X-Logitcask", "")
    found: dict[str, list[Any]] = {"logprobs": [], "ids": [], "actual": []}
    for choice, sequence in zip(choices, sequences, strict=True):
        for position in range(PROMPT, len(choice["prompt_logprobs"])):
            entries = choice["prompt_logprobs"][position] or {}
            items = sorted(entries.items(), key=lambda item: item[1]["rank"])[:K]
            found["logprobs"].append([item["logprob"] for _, item in items])
            found["ids"].append([int(token) for token, _ in items])
            actual = entries.get(str(sequence[position]))
            found["actual"].append(-math.inf if actual is None else actual["logprob"])
    return found, source


def test_the_second_epoch_is_the_first_without_the_teacher(
    vllm_server: str, ref: ModelRef, hf: HF, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, hf.n_vocab, int(n)).tolist() for n in rng.integers(10, 40, 12)]
    direct, _ = request(vllm_server, sequences)
    with tap(vllm_server, ref, tmp_path, signal.SIGKILL) as url:
        first, source = request(url, sequences)
        assert source == "new"
        assert first["ids"] == direct["ids"]
        for name in ("logprobs", "actual"):
            np.testing.assert_allclose(first[name], direct[name], atol=1e-5, rtol=1e-5)
        assert request(url, sequences) == (first, "hit")
    with tap(vllm_server, ref, tmp_path, signal.SIGTERM) as url:
        assert request(url, sequences) == (first, "hit")
    with tap("http://127.0.0.1:9", ref, tmp_path, signal.SIGTERM) as url:
        assert request(url, sequences) == (first, "hit")
    store = open_store(tmp_path / "store")
    snapshot = store.head()
    (teacher,) = snapshot.names("score")
    (base,) = snapshot.rollouts("tap")
    rollouts = store.read_rollouts(base)
    scores = store.read_scores(snapshot.scores(teacher)[base.seg_id], base=rollouts)
    for number, prompt in enumerate(rollouts.prompts):
        rows = slice(*(int(each) for each in rollouts.seq_off[number : number + 2]))
        ids = torch.tensor([[*prompt.token_ids, *rollouts.tokens[rows].tolist()]])
        with torch.no_grad():
            exact = hf.model(ids).logits[0].log_softmax(-1)
        lp = exact[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(scores.lp[rows], lp, atol=1e-5, rtol=1e-5)
