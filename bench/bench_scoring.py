"""Scores of rows from their logits against a plain loop: CPU seconds of one thread.

Run: .venv/bin/python bench/bench_scoring.py [--rounds N] [--logits N]

    ours    `score_rows`: log-probs at the sampled token, the best K ids and 16 more, entropy, and
            the exact log mass of all other ids
    plain   log_softmax, topk, entropy and gather of the same, without the mass of the others, as
            float32 does not have it from a difference; in batches of all rows, of 256, and of those
            that fit a core's cache. The fastest of these counts.

Each figure is the median of the CPU seconds of interleaved rounds, on the same made-up logits, of
which 12 of the 16 ids are among the best of noisy ones. One row is appended to
bench/results/scoring.jsonl.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import results
import torch
from torch import Tensor

from logitcask.engine.backends.row_scores import score_rows
from logitcask.engine.types import ScoreParams

VOCABS = (8_192, 32_000, 49_152, 151_936)
TOPK = (16, 64)
EXTRA = 16
CACHE = (1 << 17, 1 << 19)
"""Logits of a plain batch that stays in a cache."""


def plain_scores(logits: Tensor, token: Tensor, extra: Tensor, k: int, rows: int) -> None:
    """Score the rows [R, V] in batches of `rows`; extra: [R, EXTRA] ids."""
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        lp = logits[part].log_softmax(-1)
        lp.gather(1, token[part, None])
        lp.topk(k)
        (lp.exp() * lp).sum(-1)
        lp.gather(1, extra[part])


def measure(n_vocab: int, k: int, rounds: int, size: int) -> results.Row:
    """Return nanoseconds a logit of each way, for `size` logits."""
    torch.manual_seed(0)
    n_rows = max(32, size // n_vocab)
    made = 3 * torch.randn(n_rows, n_vocab)
    token = torch.randint(n_vocab, (n_rows,))
    extra = torch.stack([torch.randperm(n_vocab)[:EXTRA] for _ in range(n_rows)])
    extra[:, :12] = (made + torch.randn(made.shape)).topk(12).indices
    row, ids = torch.arange(n_rows).repeat_interleave(EXTRA), extra.flatten()
    request = ScoreParams(entry_kind="topk", top_p=1.0, k_min=k, k_max=k)
    runs: dict[str, Callable[[Tensor], object]] = {
        "ours": lambda z: score_rows(z, token, row, ids, request)
    }
    for rows in (n_rows, 256, *(max(1, logits // n_vocab) for logits in CACHE)):
        runs[f"plain, {rows} rows"] = partial(
            plain_scores, token=token, extra=extra, k=k, rows=rows
        )
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            logits = made.clone()  # `score_rows` overwrites them
            begun = time.process_time()
            run(logits)
            if number:
                took[name].append(time.process_time() - begun)
    cost = {name: 1e9 * statistics.median(values) / made.numel() for name, values in took.items()}
    best = min(value for name, value in cost.items() if name != "ours")
    return {
        "n_vocab": n_vocab,
        "k": k,
        "plain over ours": round(best / cost["ours"], 2),
        "ns_a_logit": {name: round(value, 2) for name, value in cost.items()},
    }


def main() -> None:
    """Measure each vocabulary and K, and append a row of them."""
    parser = results.option_parser(__doc__ or "", "scoring")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds after the warm-up.")
    parser.add_argument("--logits", type=int, default=1 << 24, help="Logits of a measurement.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for n_vocab in VOCABS:
        for k in TOPK:
            found.append(measure(n_vocab, k, options.rounds, options.logits))
            print(found[-1], flush=True)
    results.append(options.out, {**results.environment("torch"), "cases": found})


if __name__ == "__main__":
    main()
