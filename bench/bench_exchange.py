"""Rates of the exchange: files of other programs read and checked, positions written as Parquet.

Run: .venv/bin/python bench/bench_exchange.py [--sequences N] [--runs R]

    read      the first pass of `import`, from a file to checked sequences and their digest, for
              each format, in response positions for a CPU second of this process. What follows
              is the student's forward pass and the commit, which bench_store.py measures
    export    `store export` of one segment with its scores into a Parquet file

A sequence has 256 ids of a prompt and 1024 of a response, in four calls with output of tools
between them where the format has turns; log-probs have 16 digits, as programs write them. Each
figure is the median of R runs. The bar is a million positions a minute of one core. A row is
appended to bench/results/exchange.jsonl.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import results
from score_rows import kept_mask, rollouts_of, scores_of, student_of
from store_common import POSITIONS, bar, fresh, rows, seal_rollouts, seal_scores

from logitcask.engine.exchange.adopt import survey
from logitcask.engine.exchange.files import Files
from logitcask.engine.exchange.parquet import export_parquet
from logitcask.engine.store import open_store

VOCAB, PROMPT, RESPONSE, CALLS, TOOL = 151_936, 256, 1024, 4, 32
"""Ids; tokens of a prompt and a response, calls of a response, tokens of a tool's output."""
A_MINUTE = 1e6 / 60
PACKAGES = ("numpy", "pyarrow")

Turn = tuple[list[int], list[float] | None]
"""Ids, and log-probs of a turn that was sampled."""


def turns(seed: int) -> list[Turn]:
    """Return the prompt, and calls with output of tools between them: RESPONSE ids together."""
    rng = np.random.default_rng(seed)
    size = (RESPONSE - (CALLS - 1) * TOOL) // CALLS
    made: list[Turn] = [(rng.integers(0, VOCAB, PROMPT).tolist(), None)]
    for call in range(CALLS):
        if call:
            made.append((rng.integers(0, VOCAB, TOOL).tolist(), None))
        made.append((rng.integers(0, VOCAB, size).tolist(), (-rng.exponential(0.5, size)).tolist()))
    return made


def flat(made: list[Turn]) -> tuple[list[int], list[bool], list[float]]:
    """Return ids, mask and log-probs, 0 where a turn was not sampled."""
    ids = [each for turn, _ in made for each in turn]
    mask = [lps is not None for turn, lps in made for _ in turn]
    return ids, mask, [lp for turn, lps in made for lp in lps or [0.0] * len(turn)]


def neutral(number: int, made: list[Turn]) -> Iterator[Any]:
    ids, mask, logprobs = flat(made)
    yield {
        "id": f"p{number}",
        "prompt_ids": ids[:PROMPT],
        "response_ids": ids[PROMPT:],
        "loss_mask": [int(each) for each in mask[PROMPT:]],
        "logprobs": logprobs[PROMPT:],
    }


def nemo_rl(number: int, made: list[Turn]) -> Iterator[Any]:
    ids, mask, logprobs = flat(made)
    yield {
        "input_lengths": [len(ids)],
        "token_ids": [ids],
        "token_loss_mask": [[float(each) for each in mask]],
        "sample_loss_mask": [1.0],
        "advantages": [[0.5] * len(ids)],
        "generation_logprobs": [logprobs],
        "prev_logprobs": [logprobs],
        "idx": number,
    }


def token_export(number: int, made: list[Turn]) -> Iterator[Any]:
    ids, mask, logprobs = flat(made)
    others = ("trainer_logprobs", "entropy", "mismatch_kl", "importance_ratio", "prob_delta")
    yield {
        "schema_version": 1,
        "export_sequence_idx": number,
        "token_ids": ids,
        "position_ids": list(range(len(ids))),
        "loss_mask": mask,
        "inference_logprobs": logprobs,
        **dict.fromkeys(others, logprobs),
    }


def trace(number: int, made: list[Turn]) -> Iterator[Any]:
    nodes = [
        {
            **({"parent": place - 1} if place else {}),
            "message": {"role": "assistant" if lps else "tool", "content": "text"},
            "sampled": lps is not None,
            "token_ids": ids,
            "mask": [lps is not None] * len(ids),
            "logprobs": [round(lp, 4) for lp in lps or []],
        }
        for place, (ids, lps) in enumerate(made)
    ]
    yield {"id": str(number), "traces": [{"ok": True, "rewards": {}, "nodes": nodes}]}


def token_entries(number: int, made: list[Turn]) -> Iterator[Any]:
    prompt: list[int] = []
    for place, (ids, logprobs) in enumerate(made):
        if logprobs is not None:
            yield {
                "schema_version": 1,
                "rollout_id": f"r{number}",
                "model_call_id": f"c{place}",
                "prompt_token_ids": prompt,
                "generation_token_ids": ids,
                "generation_log_probs": logprobs,
            }
        prompt = prompt + ids


def vllm(number: int, made: list[Turn]) -> Iterator[Any]:
    ids, _, logprobs = flat(made)
    content = [
        {"token": f"token_id:{i}", "logprob": lp, "bytes": None, "top_logprobs": []}
        for i, lp in zip(ids[PROMPT:], logprobs[PROMPT:], strict=True)
    ]
    choice = {"index": 0, "token_ids": ids[PROMPT:], "logprobs": {"content": content}}
    body = {"prompt_token_ids": ids[:PROMPT], "choices": [choice]}
    yield {"custom_id": f"p{number}", "response": {"status_code": 200, "body": body}}


WRITERS: dict[str, tuple[str, Callable[[int, list[Turn]], Iterator[Any]]]] = {
    "neutral": ("neutral", neutral),
    "NeMo-RL": ("nemo-rl", nemo_rl),
    "prime-rl, token exports": ("prime-rl", token_export),
    "prime-rl, traces": ("prime-rl", trace),
    "NeMo Gym": ("nemo-gym", token_entries),
    "vLLM": ("vllm", vllm),
}
"""Name -> format, and the lines of a sequence."""


def median_cpu(runs: int, work: Callable[[], Any]) -> float:
    """Return the median of the CPU seconds of this process."""
    found = []
    for _ in range(runs):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def reading(sequences: int, runs: int) -> list[dict[str, Any]]:
    """Measure the first pass of an import, for each format."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (format, write) in WRITERS.items():
            file = Path(folder) / "a.jsonl"
            with file.open("w") as out:
                for number in range(sequences):
                    for line in write(number, turns(number)):
                        out.write(json.dumps(line) + "\n")
            found: list[Any] = []

            def work(format: str = format, file: Path = file, found: list[Any] = found) -> None:
                files = Files([file], format, None, [])
                sizes = {"n_vocab": VOCAB, "context": PROMPT + RESPONSE, "unit_positions": 65_536}
                found.append(survey(files, **sizes, rewards=True))

            seconds = median_cpu(runs, work)
            assert found[0].sequences == sequences, name
            positions = found[0].positions
            rate, size = positions / seconds, file.stat().st_size / positions
            print(f"{name:<24} {rate:>10,.0f} positions a CPU second, {size:.0f} bytes each")
            measured.append({"name": name, "positions_per_cpu_s": rate, "bytes": size})
    return measured


def exporting(runs: int) -> dict[str, Any]:
    """Measure the export of one segment with scores."""
    made = rows()
    student = student_of(made, 1.0)
    scores = scores_of(made, kept_mask(made, 0.999, 16, 64), student[0])
    with fresh("exchange") as folder:
        store = open_store(folder / "store", create=True)
        base = seal_rollouts(store, rollouts_of(made, student), "default")
        seal_scores(store, scores, base, "default")
        target = folder / "positions.parquet"
        seconds = median_cpu(runs, lambda: export_parquet(store, target, force=True))
        size = target.stat().st_size / POSITIONS
    rate = POSITIONS / seconds
    print(f"{'export':<24} {rate:>10,.0f} positions a CPU second, {size:.0f} bytes each")
    return {"name": "export", "positions_per_cpu_s": rate, "bytes": size}


def main(arguments: list[str]) -> None:
    """Measure everything and append the row."""
    parser = results.option_parser(__doc__, "exchange")
    parser.add_argument("--sequences", type=int, default=256, metavar="N")
    parser.add_argument("--runs", type=int, default=3, metavar="R")
    options = parser.parse_args(arguments)
    measured = [*reading(options.sequences, options.runs), exporting(options.runs)]
    row = {
        "bench": "exchange",
        "positions": options.sequences * RESPONSE,
        "runs": options.runs,
        "rates": measured,
        "bars": [
            bar(f"{each['name']}: a million positions in 60 CPU seconds",
                each["positions_per_cpu_s"], each["positions_per_cpu_s"] >= A_MINUTE)
            for each in measured
        ],
        **results.environment(*PACKAGES),
    }  # fmt: skip
    results.append(options.out, row)


if __name__ == "__main__":
    main(sys.argv[1:])
