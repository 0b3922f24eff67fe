"""Attention of packs: forward and backward pass of a pack over those of a padded batch.

Run: .venv/bin/python bench/bench_packs.py [--rounds N] [--tokens 1000,4000,8000]

    pack     the sequences in one row, each attended to by itself (engine/models/attention.py)
    padded   the same sequences padded on the right to one batch, by sdpa
    masked   the same row by sdpa with a mask over the whole pack, as transformers makes it

Lengths are uniform (40 tokens) or mixed (log-uniform, 50 to 1,500). Models are random Qwen3: that
of the demo's student, and one of width 512. A figure is the median of the CPU seconds of
interleaved rounds, one thread, after a warm-up. Peak memory is that of the pass over the process
before it, in a process of its own. A row per model, lengths and tokens is appended to
bench/results/packs.jsonl.
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from logitcask.engine.models.attention import use_packed
from logitcask.engine.models.forward import states

MODELS = {
    "demo student": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2}
    | {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "width 512": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
}
LENGTHS = ("uniform", "mixed")
WAYS = ("pack", "padded", "masked")
VOCAB = 997
SAME = 1e-4
"""Largest difference of the states of two ways, which proves that they do the same work."""


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCAB, max_position_embeddings=4096, **MODELS[name])
    return Qwen3ForCausalLM(config).eval()


def lengths_of(kind: str, tokens: int) -> list[int]:
    """Return lengths of sequences, `tokens` in all."""
    rng = np.random.default_rng(0)
    found: list[int] = []
    while (left := tokens - sum(found)) > 0:
        drawn = 40 if kind == "uniform" else int(np.exp(rng.uniform(np.log(50), np.log(1500))))
        found.append(min(drawn, left))
    return found


def make_pass(model: Any, way: str, lengths: list[int]) -> Callable[[], torch.Tensor]:
    """Return a forward and backward pass that returns the states [tokens, D] of all sequences."""
    ids = torch.randint(3, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    sequences = torch.split(ids, lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    mask = torch.arange(batch.shape[1]) < torch.tensor(lengths)[:, None]
    places = mask.flatten().nonzero()[:, 0]

    def run() -> torch.Tensor:
        if way == "padded":
            found = states(model, batch, mask=None if mask.all() else mask.long())
            found = found.flatten(0, 1).index_select(0, places)
        else:
            found = states(model, ids[None], positions=positions, lengths=lengths)[0]
        found.square().sum().backward()
        model.zero_grad()
        return found.detach()

    return run


def model_of(way: str, name: str) -> Any:
    model = make_model(name)
    if way == "pack":
        assert use_packed(model)
    return model


def peak_bytes(way: str, name: str, kind: str, tokens: int) -> int:
    """Return the peak memory of a pass over that of the process before it."""
    torch.set_num_threads(1)
    run = make_pass(model_of(way, name), way, lengths_of(kind, tokens))
    make_pass(model_of(way, name), way, [8, 8])()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the memory in use
    before = _peak()
    run()
    return _peak() - before


def _peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def measure(name: str, kind: str, tokens: int, rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each way."""
    lengths = lengths_of(kind, tokens)
    runs = {way: make_pass(model_of(way, name), way, lengths) for way in WAYS}
    first = {way: run() for way, run in runs.items()}
    for way, found in first.items():
        assert torch.allclose(found, first["padded"], atol=SAME, rtol=SAME), way
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, run in runs.items():
            begun = time.process_time()
            run()
            took[way].append(time.process_time() - begun)
    return {way: statistics.median(values) for way, values in took.items()}


def options() -> argparse.Namespace:
    parser = results.option_parser(__doc__ or "", "packs")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds after the warm-up.")
    parser.add_argument("--tokens", default="1000,4000,8000", help="Tokens of a pack.")
    parser.add_argument("--models", default=",".join(MODELS), help="Names of models.")
    return parser.parse_args()


def main() -> None:
    """Measure every model, kind of lengths and size, and append a row of each."""
    given = options()
    torch.set_num_threads(1)
    alone = multiprocessing.get_context("spawn")
    for name in given.models.split(","):
        for kind in LENGTHS:
            for tokens in map(int, given.tokens.split(",")):
                took = measure(name, kind, tokens, given.rounds)
                peaks = {}
                for way in WAYS:
                    with alone.Pool(1) as pool:
                        peaks[way] = pool.apply(peak_bytes, (way, name, kind, tokens))
                row = {
                    **results.environment("torch", "transformers"),
                    "model": name,
                    "lengths": kind,
                    "tokens": tokens,
                    "sequences": len(lengths_of(kind, tokens)),
                    "cpu_ms": {way: round(1e3 * took[way], 1) for way in WAYS},
                    "pack_over_padded": round(took["pack"] / took["padded"], 3),
                    "masked_over_pack": round(took["masked"] / took["pack"], 2),
                    "peak_mib": {way: round(peaks[way] / 2**20) for way in WAYS},
                }
                print({key: row[key] for key in list(row)[5:]}, flush=True)
                results.append(given.out, row)


if __name__ == "__main__":
    main()
