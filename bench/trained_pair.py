"""A trained student and teacher, and a store of their rollouts and scores: a few minutes.

Both are small Qwen3 models with a vocabulary of 8,192, trained on the Python sources of installed
packages: the teacher on the text, the student, like many small models of a family, on the teacher's
distribution. So small a model is less sure than a large one, and the number of kept ids depends on
that: the last norm of each is scaled until the mean entropy on unseen text is half a nat, that of a
large model on its own text.
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.commands.score import run_score
from logitcask.engine.config.sections import (
    Prompts,
    Rollout,
    RolloutConfig,
    Run,
    ScoreConfig,
    StoreSection,
    Student,
)
from logitcask.engine.config.teacher import Score as ScoreSection
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.store import Store, open_store

V, CONTEXT, BATCH = 8192, 128, 16
CORPUS_BYTES, HELD_OUT = 24_000_000, 1_000_000
ENTROPY_NATS = 0.5
PROMPT_TOKENS, NEW_TOKENS, PROMPTS = 64, 64, 1500
SIZES = {"teacher": (256, 4, 1000), "student": (192, 3, 1000)}
"""Hidden size, layers, training steps; each has a folder, and one in RAW before the scaling."""
RAW = "raw"


def make_pair(folder: Path) -> Store:
    """Return the pair's store; models and store that exist are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _corpus()
    tokenizer = _tokenizer(folder, text)
    if not (folder / "prompts.jsonl").exists():
        ids = np.asarray(tokenizer(text)["input_ids"], np.int64)
        split = int(len(ids) * (1 - HELD_OUT / CORPUS_BYTES))
        for name in SIZES:
            if not (folder / RAW / name).exists():
                _train(folder / RAW, name, ids[:split])
            model = _load(folder / RAW / name)
            _sharpen(model, _windows(ids[split:], np.arange(32) * 4 * CONTEXT)[:, :-1])
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        _write_prompts(folder / "prompts.jsonl", tokenizer, ids[split:])
    return _fill(folder)


def _corpus() -> str:
    found, size = [], 0
    for file in sorted(Path(sysconfig.get_paths()["purelib"]).glob("t*/**/*.py")):
        data = file.read_text(encoding="utf-8", errors="ignore")
        found.append(data)
        size += len(data)
        if size > CORPUS_BYTES:
            break
    return "".join(found)[:CORPUS_BYTES]


def _tokenizer(folder: Path, text: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.exists():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=V,
            special_tokens=["<pad>", "<stop>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator([text[:8_000_000]], trainer)
        made.save(str(file))
    factory: Any = PreTrainedTokenizerFast
    return factory(tokenizer_file=str(file), pad_token="<pad>", eos_token="<stop>")


def _load(folder: Path) -> Any:
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(folder)


def _train(folder: Path, name: str, ids: np.ndarray) -> None:
    """Train the teacher on the ids, or the student on the teacher's distributions there."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    teacher = None if name == "teacher" else _load(folder / "teacher").eval()
    hidden, layers, steps = SIZES[name]
    torch.manual_seed(list(SIZES).index(name))
    model: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=V,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=hidden // 4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    rng = np.random.default_rng(0)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        tokens = _windows(ids, rng.integers(0, len(ids) - CONTEXT - 1, BATCH))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            targets = tokens[:, 1:].flatten()
            if teacher is not None:
                with torch.no_grad():
                    logits_q = teacher(input_ids=tokens[:, :-1], use_cache=False).logits
                targets = logits_q.float().flatten(0, 1).softmax(-1)  # distributions
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{name}: step {step} of {steps}, loss {loss.item():.2f} nats", flush=True)
    model.save_pretrained(folder / name)


@torch.no_grad()
def _sharpen(model: Any, tokens: torch.Tensor) -> None:
    """Scale the last norm until the model's mean entropy is ENTROPY_NATS."""
    logits = model.eval()(input_ids=tokens, use_cache=False).logits.flatten(0, 1).double()
    low, high = 1.0, 8.0
    for _ in range(30):
        middle = (low + high) / 2
        log_p = (logits * middle).log_softmax(-1)
        entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
        low, high = (middle, high) if entropy > ENTROPY_NATS else (low, middle)
    model.model.norm.weight *= low
    print(f"sharpened by {low:.2f}", flush=True)


def _windows(ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([ids[i : i + CONTEXT + 1] for i in starts]))


def _write_prompts(file: Path, tokenizer: Any, unseen: np.ndarray) -> None:
    starts = np.linspace(0, len(unseen) - PROMPT_TOKENS, PROMPTS).astype(int)
    rows = [
        {"id": str(i), "prompt": tokenizer.decode(unseen[at : at + PROMPT_TOKENS])}
        for i, at in enumerate(starts)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _fill(folder: Path) -> Store:
    """Roll out and score with the default settings, except for the length of responses."""
    store, run = StoreSection(url=str(folder / "store")), Run(device="cpu")
    run_rollout(
        RolloutConfig(
            student=Student(model=str(folder / "student")),
            prompts=Prompts(file=folder / "prompts.jsonl", chat_template=False),
            store=store,
            rollout=Rollout(n=1, max_new_tokens=NEW_TOKENS),
            run=run,
        )
    )
    run_score(
        ScoreConfig(
            teacher=Teacher(model=str(folder / "teacher"), name="teacher"),
            store=store,
            score=ScoreSection(),
            run=run,
        )
    )
    return open_store(store.url)
