"""A teacher in the training loop: TRL's DistillationTrainer, or a plain loop without TRL.

Both sample from the student in training, run the teacher on the responses, and make an update of
the reverse KL over the whole vocabulary: the stages of a loop, in turn, and the teacher is loaded
for as long as the student is trained.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pipeline_stages import Seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from logitcask.engine.workers.timeline import span, timeline_file


@dataclass(frozen=True, kw_only=True)
class LiveLoop:
    """One training with a live teacher."""

    student: Path
    teacher: Path
    prompts: list[str]
    """In the order of the rounds; they have one length in tokens."""
    samples: int
    """Responses to a prompt."""
    per_round: int
    """Prompts of a round."""
    rounds: int
    max_new_tokens: int
    learning_rate: float
    added: Seconds
    """For a round of sampling, a round of the teacher, and an update."""
    folder: Path
    """The timeline goes to it."""
    seed: int


def trl_version() -> str:
    """Return the version of TRL; empty if it is not installed."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return ""


def train_live(loop: LiveLoop) -> Any:
    """Train with a teacher in the loop, and return the student; by TRL where it is installed."""
    torch.manual_seed(loop.seed)
    student = AutoModelForCausalLM.from_pretrained(loop.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(loop.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(loop.student, padding_side="left")
    (by_trl if trl_version() else plainly)(loop, student, teacher.eval(), tokenizer)
    return student


def noted(loop: LiveLoop, role: str, kind: str, work: Callable[..., Any], seconds: float) -> Any:
    """Return a function that does the work, takes `seconds` longer, and writes its span."""
    number = 0

    def slowly(*rest: Any, **more: Any) -> Any:
        nonlocal number
        with span(timeline_file(loop.folder, role, "0"), kind, round=number):
            time.sleep(seconds)
            found = work(*rest, **more)
        number += 1
        return found

    return slowly


def by_trl(loop: LiveLoop, student: Any, teacher: Any, tokenizer: Any) -> None:
    """Train by trl.DistillationTrainer, whose defaults stay where they cost no time."""
    import datasets
    from trl import DistillationConfig, DistillationTrainer

    rows = [{"prompt": each} for each in loop.prompts for _ in range(loop.samples)]
    arguments = DistillationConfig(
        output_dir=str(loop.folder / "trl"),
        per_device_train_batch_size=loop.per_round * loop.samples,
        max_steps=loop.rounds,
        max_completion_length=loop.max_new_tokens,
        learning_rate=loop.learning_rate,
        lr_scheduler_type="constant",
        beta=1.0,
        temperature=1.0,
        shuffle_dataset=False,
        seed=loop.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    student.generate = noted(loop, "rollout", "unit", student.generate, loop.added.rollout)
    body = teacher.get_decoder()
    body.forward = noted(loop, "score", "unit", body.forward, loop.added.score)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[_Update(loop)],
    )
    trainer.train()


class _Update(TrainerCallback):
    """Notes and stretches the part of an update that neither samples nor runs the teacher."""

    def __init__(self, loop: LiveLoop) -> None:
        self._update = noted(loop, "train", "update", lambda: None, loop.added.train)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._update()


def plainly(loop: LiveLoop, student: Any, teacher: Any, tokenizer: Any) -> None:
    """Train by a plain loop: generate, both forward passes, reverse KL, AdamW."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=loop.learning_rate, weight_decay=0.0)
    stop = tokenizer.eos_token_id
    sample = noted(loop, "rollout", "unit", student.generate, loop.added.rollout)
    score = noted(loop, "score", "unit", teacher.forward, loop.added.score)
    update = noted(loop, "train", "update", _plain_update, loop.added.train)
    for number in range(loop.rounds):
        start = number * loop.per_round % len(loop.prompts)
        texts = [loop.prompts[(start + i) % len(loop.prompts)] for i in range(loop.per_round)]
        ids = torch.tensor(tokenizer(texts)["input_ids"]).repeat_interleave(loop.samples, 0)
        with torch.no_grad():
            full = sample(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=loop.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            written = full[:, ids.shape[1] :]
            # A token counts up to the first stop id, that one included.
            mask = ((written == stop).cumsum(1) - (written == stop).long()) == 0
            attention = torch.cat([torch.ones_like(ids), mask.long()], 1)
            q = score(input_ids=full, attention_mask=attention).logits
        update(student, optimizer, full, attention, q, mask)


def _plain_update(
    student: Any, optimizer: Any, full: Any, attention: Any, q: Any, mask: Any
) -> None:
    rows = slice(full.shape[1] - mask.shape[1] - 1, full.shape[1] - 1)
    p = student(input_ids=full, attention_mask=attention).logits[:, rows].log_softmax(-1)
    loss = (p.exp() * (p - q[:, rows].log_softmax(-1))).sum(-1)[mask].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
