"""Check of the server of these tests: it scores extra ids of each row."""

import base64
import io
import json
import urllib.request
from typing import Any

import numpy as np
import torch

from logitcask.engine.backends.hf import HF
from tests.vllm.real_server import ids_of_each_row


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


@ids_of_each_row
def test_a_real_server_scores_extra_ids_of_each_row(vllm_server: str, hf: HF) -> None:
    rng = np.random.default_rng(0)
    tokens, start = rng.integers(3, hf.n_vocab, 40), 24
    ids = rng.integers(0, hf.n_vocab, (len(tokens) - 1 - start, 8))
    params = {
        "max_tokens": 1,
        "temperature": 0.0,
        "detokenize": False,
        "prompt_logprob_token_ids": ids.tolist(),
        "prompt_logprob_start": start,
    }
    body = {"token_ids": tokens.tolist(), "sampling_params": params}
    reply = post(f"{vllm_server}/inference/v1/generate", body)
    packed = base64.b64decode(reply["prompt_token_id_logprobs"])
    found = np.load(io.BytesIO(packed), allow_pickle=False)
    with torch.no_grad():
        exact = hf.model(torch.from_numpy(tokens)[None]).logits[0].log_softmax(-1).numpy()
    expected = np.take_along_axis(exact[start:-1], ids, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
