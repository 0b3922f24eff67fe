"""The estimate of a training's memory against what the training takes: `train --estimate`.

Run: .venv/bin/python bench/bench_estimate.py [--case NAME]

Each case is a random student with made-up rollouts and scores, trained for two updates on a CPU in
a process of its own. Measured is the largest resident size of the process during the run, minus
that after a run of a tiny student, which has loaded every library. The estimate is of the same
configuration. A row is appended to bench/results/estimate.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from score_rows import kept_mask, rollouts_of, scores_of, student_of, synthetic
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from logitcask.engine.commands.train import estimate_train, run_train
from logitcask.engine.config.sections import Run, StoreSection, Student, TrainConfig
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.models.identity import digest, model_ref
from logitcask.engine.store import open_store
from logitcask.engine.types import Prompt, SamplingParams

LENGTH, SEQUENCES, PROMPT_TOKENS = 192, 6, 32
"""Response tokens of a sequence, sequences of a pack, tokens of a prompt."""
TINY = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2}
QWEN = {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
LLAMA = {"model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
CASES: dict[str, dict[str, Any]] = {
    "large vocabulary, tied, full": {
        "model": QWEN
        | {"vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 1536}
        | {"num_hidden_layers": 6, "tie_word_embeddings": True},
        "train": {"objective": "forward_kl"},
    },
    "small vocabulary, untied, full": {
        "model": LLAMA
        | {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048}
        | {"num_hidden_layers": 8, "tie_word_embeddings": False},
        "train": {"objective": "overlap"},
    },
    "LoRA, deep and tied": {
        "model": QWEN
        | {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536}
        | {"num_hidden_layers": 20, "tie_word_embeddings": True},
        "train": {"objective": "overlap"},
        "lora": {"r": 16},
    },
    "Adafactor, checkpointing, accumulation": {
        "model": LLAMA
        | {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048}
        | {"num_hidden_layers": 8, "tie_word_embeddings": True},
        "train": {
            "objective": "opd",
            "optim": "adafactor",
            "gradient_checkpointing": True,
            "gradient_accumulation_steps": 2,
        },
    },
}


def save_student(folder: Path, fields: dict[str, Any]) -> None:
    """Save a random student, and a tokenizer of words with all its ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    size = fields["vocab_size"]
    special = {"bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.05}
    rest = {k: v for k, v in fields.items() if k != "model_type"}
    config = AutoConfig.for_model(
        fields["model_type"], max_position_embeddings=4096, **special, **rest
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)


def fill(url: Path, student: Path, vocab: int, packs: int) -> None:
    """Commit made-up rollouts and scores of so many packs."""
    rng = np.random.default_rng(0)
    count = packs * SEQUENCES
    rows = replace(synthetic(count * LENGTH), lengths=np.full(count, LENGTH))
    first = rng.integers(0, vocab, (len(rows.ids), 1))
    rows = replace(rows, ids=((first + 37 * np.arange(256)) % vocab).astype(np.uint32))
    own = student_of(rows, 0.1)
    rollouts = rollouts_of(rows, own)
    prompts = tuple(
        Prompt(id=f"p{i}", token_ids=tuple(rng.integers(0, vocab, PROMPT_TOKENS).tolist()))
        for i in range(count)
    )
    ref = model_ref(str(student), chat_template=False)
    store = open_store(url, create=True)
    known = {"student_topk": 16, "units": 1, "digest": digest("set")}
    sampling = {**SamplingParams().record(), **known}
    segment = store.commit_rollouts(
        replace(rollouts, prompts=prompts),
        name="main",
        unit_key=digest("rollouts"),
        unit={"version": 0, "first": 0},
        provenance={"set": sampling, "student": ref.provenance()},
    )
    request = {
        "teacher_top_p": 0.999,
        "teacher_topk_min": 16,
        "teacher_topk_max": 64,
        "at_student": True,
    }
    store.commit_scores(
        scores_of(rows, kept_mask(rows, 0.999, 16, 64), own[0]),
        base=segment,
        name="teacher",
        unit_key=digest("scores"),
        unit=dict(segment.unit),
        provenance={
            "teacher": {"weights": digest("teacher")},
            "teacher_kind": "teacher",
            "context": "",
            "request": request,
        },
    )


def config_of(folder: Path, case: dict[str, Any]) -> TrainConfig:
    """Return the configuration of a case in `folder`."""
    return TrainConfig(
        student=Student(model=str(folder / "student")),
        store=StoreSection(url=str(folder / "store")),
        train=Train(
            pack_length=SEQUENCES * (LENGTH + PROMPT_TOKENS), max_steps=2, **case.get("train", {})
        ),
        lora=Lora(**case.get("lora", {})),
        run=Run(out=folder / "out", device="cpu"),
    )


def prepare(folder: Path, case: dict[str, Any]) -> None:
    save_student(folder / "student", case["model"])
    packs = 2 * case.get("train", {}).get("gradient_accumulation_steps", 1)
    fill(folder / "store", folder / "student", case["model"]["vocab_size"], packs)


def resident(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {field} here")


def measure(folder: Path) -> None:
    """Print the bytes that a run takes beyond those of the process; in a process of its own."""
    case = json.loads((folder / "case.json").read_text())
    run_train(config_of(folder / "tiny", {**case, "lora": {}}))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    run_train(config_of(folder, case))
    print(json.dumps({"bytes": resident("VmHWM") - before, "before": before}))


def row_of(name: str, case: dict[str, Any], work: Path) -> dict[str, Any]:
    """Estimate and measure a case."""
    prepare(work, case)
    prepare(work / "tiny", {**case, "model": case["model"] | TINY | {"vocab_size": 1000}})
    (work / "case.json").write_text(json.dumps(case))
    estimate = estimate_train(config_of(work, case), 1)
    out = subprocess.run(
        [sys.executable, __file__, "--measure", str(work)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    measured = json.loads(out.splitlines()[-1])["bytes"]
    return {
        "case": name,
        "model": case["model"],
        "train": case.get("train", {}),
        "lora": case.get("lora", {}),
        "pack": [SEQUENCES * (LENGTH + PROMPT_TOKENS), SEQUENCES * LENGTH],
        "estimate": estimate.peak,
        "measured": measured,
        "ratio": round(estimate.peak / measured, 3),
        "parts": asdict(estimate),
    }


def main() -> None:
    parser = results.option_parser(__doc__, "estimate")
    parser.add_argument("--case", choices=list(CASES), help="Only this one.")
    parser.add_argument("--measure", type=Path, help="For the child process.")
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure)
        return
    for name, case in CASES.items():
        if options.case not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(name, case, Path(folder))
        row |= results.environment("torch", "transformers", "peft")
        print(json.dumps(row))
        results.append(options.out, row)


if __name__ == "__main__":
    main()
