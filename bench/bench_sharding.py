"""Peak memory of a sharded training: each of two processes against one process alone.

Run: .venv/bin/python bench/bench_sharding.py [--layers N] [--sharding zero3]

A random Qwen3 of about 200 million parameters is trained for a few updates of short packs on a CPU,
in one process, and in two with `--sharding fsdp2` or `zero3` over gloo; zero3 after `make test`,
with PYTHONPATH=.venv-deepspeed. Each process notes its peak resident memory, without that of
the imported libraries, in four phases:

    load         until the student is loaded, and sharded where it is
    train        forward and backward passes and updates, without the first, which makes the moments
    checkpoint   the last update and its checkpoint
    save         of the student, which the first process writes alone

Bars: the phase train of a process is at most 0.65 of that of one process alone, and loading takes
at most one copy of the weights in a process that is not the first. A row is appended to
bench/results/sharding.jsonl.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import results

VOCAB, WIDTH, TINY = 32_000, 1024, 32
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, PACK_LENGTH = 32, 8, 8, 32
PACKAGES = ("torch", "transformers", "accelerate")
BARS = {"train": 0.65, "load": 1.0}
GIB = 1 << 30


def save_model(folder: Path, width: int, layers: int) -> int:
    """Save a random Qwen3 with a tokenizer of numbered words; return its parameters."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        # So that some ids have a probability that is worth a comparison.
        initializer_range=2.5 * width**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_store(folder: Path, url: Path) -> None:
    """Sample and score a few short responses with a small model of the same vocabulary."""
    from logitcask.engine.backends.hf import HF
    from logitcask.engine.models.identity import model_ref
    from logitcask.engine.rollout.plan import rollout
    from logitcask.engine.rollout.unit import RolloutRequest
    from logitcask.engine.score.plan import score
    from logitcask.engine.score.unit import ScoreRequest
    from logitcask.engine.store import open_store
    from logitcask.engine.types import Prompt, SamplingParams, ScoreParams

    save_model(folder, TINY, 1)
    ref, store = model_ref(str(folder), chat_template=False), open_store(str(url), create=True)
    prompts = [
        Prompt(id=str(i), token_ids=tuple(range(10 + i, 10 + i + PROMPT_TOKENS)))
        for i in range(PROMPTS)
    ]
    sampling = SamplingParams(n=1, max_new_tokens=NEW_TOKENS)
    rollout(
        RolloutRequest(
            store=store,
            model=ref,
            sampler=HF(ref, dtype="float32"),
            prompts=prompts,
            sampling=sampling,
            name="main",
            seed=0,
            student_k=16,
        )
    )
    score(
        ScoreRequest(
            store=store,
            model=ref,
            scorer=HF(ref, dtype="float32"),
            teacher_name="big",
            rollouts_name="main",
            params=ScoreParams(top_p=0.999, k_min=16, k_max=64),
        )
    )


def status(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, name
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def worker(folder: Path, out: Path, sharding: str) -> None:
    """Train in this process, one of WORLD_SIZE, and write its peaks."""
    import torch
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    from accelerate import Accelerator  # noqa: F401

    if find_spec("deepspeed"):
        import_module("deepspeed")
    from transformers import TrainerCallback

    from logitcask.engine.config.sections import Run
    from logitcask.engine.config.training import Train
    from logitcask.engine.models.identity import model_ref
    from logitcask.engine.objectives import parse_objective
    from logitcask.engine.store import open_store
    from logitcask.engine.training.train import train
    from logitcask.engine.training.trainer import DistillTrainer

    torch.set_num_threads(1)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
    student = model_ref(str(folder / "student"), chat_template=False)
    store = open_store(str(folder / "store"))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    libraries, peaks = status("VmRSS"), dict[str, int]()

    def note(phase: str) -> None:
        peaks[phase] = status("VmHWM") - libraries
        reset_peak()

    class Peaks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            note("load")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                reset_peak()
            elif state.global_step == state.max_steps:
                note("train")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            note("checkpoint")

    build = DistillTrainer.__init__

    def with_peaks(self: DistillTrainer, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        self.add_callback(Peaks())

    DistillTrainer.__init__ = with_peaks  # type: ignore[method-assign]
    reset_peak()
    train(
        store,
        model=student,
        teacher="big",
        objective=parse_objective("overlap"),
        settings=Train(
            pack_length=PACK_LENGTH,
            gradient_accumulation_steps=4 // processes,
            allow_off_lineage=True,
            sharding="none" if processes == 1 else sharding,
            max_steps=3,
        ),
        run=Run(out=out, device="cpu"),
    )
    note("save")
    rank = os.environ.get("RANK", "0")
    out.with_name(f"{out.name}-{rank}.json").write_text(json.dumps(peaks))


def measured(folder: Path, processes: int, sharding: str) -> list[dict[str, int]]:
    """Return the peaks of each process."""
    out = folder / f"run{processes}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A tensor that is freed goes back to the system at once: resident memory is that of live ones.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if processes > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, __file__, "--sharding", sharding, "--worker", str(folder), str(out)]
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(subprocess.Popen(command, env={**env, **own}))
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"exit codes {codes}")
    files = [out.with_name(f"{out.name}-{rank}.json") for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


def main() -> None:
    parser = results.option_parser(__doc__ or "", "sharding")
    parser.add_argument("--layers", type=int, default=14, help="Layers of the student.")
    parser.add_argument("--sharding", choices=("fsdp2", "zero3"), default="fsdp2")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, options.sharding)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "sampler", folder / "store")
        parameters = save_model(folder / "student", WIDTH, options.layers)
        (alone,), two = (measured(folder, n, options.sharding) for n in (1, 2))
    copy = 4 * parameters
    ratios = {
        f"{phase} of process {rank}": round(peaks[phase] / alone[phase], 3)
        for rank, peaks in enumerate(two)
        for phase in alone
    }
    copies = [round(peaks["load"] / copy, 3) for peaks in two]
    for phase in alone:
        figures = "  ".join(f"{each[phase] / GIB:6.2f}" for each in (alone, *two))
        print(f"{phase:12} {figures} GiB: one process, then two")
    met = max(peaks["train"] / alone["train"] for peaks in two) <= BARS["train"]
    met &= max(copies[1:]) <= BARS["load"]
    print(f"copies of the weights at the load: {copies}; bars {BARS}: {'met' if met else 'missed'}")
    results.append(
        options.out,
        {
            **results.environment(*PACKAGES),
            "sharding": options.sharding,
            "parameters": parameters,
            "alone_bytes": alone,
            "two_bytes": two,
            "ratios": ratios,
            "copies_at_load": copies,
            "met": met,
        },
    )


if __name__ == "__main__":
    main()
