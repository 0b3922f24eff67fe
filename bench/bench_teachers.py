"""A served teacher: our scoring path and TRL's, bytes of a log-prob, and concurrent requests.

Run: .venv/bin/python bench/bench_teachers.py [PYTHON]      (default: .venv-vllm/bin/python)

PYTHON has vLLM (`make test-vllm` installs it) and serves a small random model on this machine's
CPU. Positions per second are medians of interleaved rounds. A row is appended to
bench/results/teachers.jsonl.
"""

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import results
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from logitcask.engine.backends.logprob_diff import probe_rollouts
from logitcask.engine.backends.server import Limits, ServerScorer
from logitcask.engine.types import Rollouts, ScoreParams, Scores

sys.path.insert(0, str(results.ROOT))
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import N_VOCAB, make_model
from tests.vllm.shim import ENVIRONMENT, with_shim

VOCAB, K, ROUNDS = 4096, 64, 5
SEQUENCES, TOKENS = 32, 256
TRL_THREADS, TRL_BATCH = 4, 8
"""Settings of TRL 1.16's client: id lists in batches, four threads."""
DELAY_S, AT_ONCE, ANSWERS = 0.2, 32, 96
PACKAGES = ("torch", "transformers", "aiohttp")


def save_model(folder: Path) -> None:
    """Save a small Qwen3 and a tokenizer of as many words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"word{i}": i for i in range(VOCAB)}, unk_token="word2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word1")
    tokenizer.save_pretrained(folder)


@contextmanager
def serving(python: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Yield the URL of a vLLM server of the model in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "teacher", "--dtype", "float32", "--max-model-len", "512"),
        *("--enforce-eager", "--max-logprobs", "128", "--enable-scale-out"),
        *("--generation-config", "vllm", "--host", "127.0.0.1", "--port", str(port)),
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while not healthy(url):
            if server.poll() is not None:
                sys.exit((folder / "log").read_text()[-2000:])
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def healthy(url: str) -> bool:
    """Return whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def trl_path(url: str, rollouts: Rollouts) -> int:
    """Fetch a teacher's top-k like TRL's client; return the bytes of the responses.

    It takes the dicts of /v1/completions, sorted by rank and cut to K.
    """
    tokens = rollouts.tokens.reshape(len(rollouts.finish), -1).tolist()
    ids = [[*p.token_ids, *t] for p, t in zip(rollouts.prompts, tokens, strict=True)]

    def batch(start: int) -> int:
        part = ids[start : start + TRL_BATCH]
        body = {"model": "teacher", "prompt": part, "max_tokens": 1, "temperature": 1.0}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"prompt_logprobs": K}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            data = answer.read()
        for choice in json.loads(data)["choices"]:
            for entries in choice["prompt_logprobs"][1:]:
                best = sorted(entries.items(), key=lambda item: item[1]["rank"])[:K]
                assert len([(int(i), entry["logprob"]) for i, entry in best]) == K
        return len(data)

    with ThreadPoolExecutor(TRL_THREADS) as pool:
        return sum(pool.map(batch, range(0, len(ids), TRL_BATCH)))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds and the result of a call."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def rates(python: str, folder: Path) -> dict[str, Any]:
    """Measure positions per second and bytes a candidate of both paths, on one server in turns."""
    rollouts = probe_rollouts(VOCAB, SEQUENCES, TOKENS - 1)
    request = ScoreParams(entry_kind="topk", top_p=1.0, k_min=K, k_max=K, at_student=False)
    took: dict[str, list[float]] = {"ours": [], "trl": []}
    size: dict[str, int] = {}
    with serving(python, folder, ENVIRONMENT) as url, ServerScorer([url]) as server:
        server.n_vocab = VOCAB
        for _ in range(ROUNDS + 1):  # the first warms up
            before = server.received
            spent, _ = seconds(lambda: server.score(rollouts, request))
            took["ours"].append(spent)
            size["ours"] = server.received - before
            spent, size["trl"] = seconds(lambda: trl_path(url, rollouts))
            took["trl"].append(spent)
    rate = {k: rollouts.positions / statistics.median(v[1:]) for k, v in took.items()}
    candidates = rollouts.positions * K
    return {
        "positions_per_second": {k: round(v) for k, v in rate.items()},
        "ours_over_trl": round(rate["ours"] / rate["trl"], 2),
        "bytes_per_candidate": {k: round(v / candidates, 1) for k, v in size.items()},
        "sequences": SEQUENCES,
        "tokens": TOKENS,
        "k": K,
    }


def extra_ids(python: str, folder: Path) -> dict[str, Any]:
    """Measure the bytes of a log-prob at extra ids, by vLLM's second runner in the interpreter."""
    rollouts = probe_rollouts(VOCAB, 2, 32)
    own = ScoreParams(entry_kind="topk", top_p=1.0, k_min=1, k_max=1, at_student=False)
    with serving(python, folder, with_shim(folder)) as url, ServerScorer([url]) as server:
        server.n_vocab = VOCAB
        alone = received(server, rollouts, own)
        lists = Scores(
            **dict.fromkeys(("lp", "entropy", "log_tail", "entry_lp")),
            cnt=torch.full((rollouts.positions,), K).numpy().astype("uint16"),
            ids=torch.arange(K).repeat(rollouts.positions).numpy().astype("uint32"),
        )
        with_ids = received(server, replace(rollouts, student=lists), replace(own, at_student=True))
    return {"bytes_per_chosen_id": round((with_ids - alone) / (rollouts.positions * K), 2)}


def received(server: ServerScorer, rollouts: Rollouts, request: ScoreParams) -> int:
    """Return the bytes of the responses to a request."""
    before = server.received
    server.score(rollouts, request)
    return server.received - before


def overlap() -> dict[str, Any]:
    """Measure a server that answers in 200 ms: one request at a time, and 32 at once."""
    rollouts = probe_rollouts(N_VOCAB, ANSWERS, 4)
    request = ScoreParams(entry_kind="topk", top_p=1.0, k_min=8, k_max=8, at_student=False)
    took = {}
    with FakeServer(make_model()) as fake:
        for count in (1, AT_ONCE):
            with ServerScorer([fake.url], limits=Limits(requests=count)) as server:
                server.n_vocab = N_VOCAB
                server.score(probe_rollouts(N_VOCAB, 1, 4), request)
                fake.delay_s = DELAY_S
                took[count], _ = seconds(lambda s=server: s.score(rollouts, request))
                fake.delay_s = 0.0
    return {
        "delay_s": DELAY_S,
        "seconds": {k: round(v, 2) for k, v in took.items()},
        "at_once_over_one": round(took[1] / took[AT_ONCE], 1),
    }


def main(arguments: list[str]) -> None:
    """Measure everything and append the row."""
    parser = results.option_parser(__doc__, "teachers")
    parser.add_argument("python", nargs="?", default=str(results.ROOT / ".venv-vllm/bin/python"))
    options = parser.parse_args(arguments)
    python = options.python
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        row = {
            "bench": "teachers",
            "overlap": overlap(),
            "served": rates(python, folder),
            "chosen": extra_ids(python, folder),
            **results.environment(*PACKAGES),
        }
    results.append(options.out, row)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
