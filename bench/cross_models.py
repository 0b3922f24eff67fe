"""Models of one seed of bench_cross_tokenizer.py, each made once and kept in a folder.

    student     a character-level model that solves about 60 % of the demo's problems
    merged      a teacher whose tokenizer has merges: tokens of one to five characters, other ids,
                other special tokens
    characters  a teacher of the size of `merged` with the student's tokenizer, for comparison
    sums        an expert: the student, post-trained on solutions of sums alone
    differences the same of differences

Shapes: B rows of a batch, L tokens of a padded row.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from logitcask.engine.demo.models import Size, make_model, make_tokenizer, save
from logitcask.engine.demo.pretrain import (
    TaskPretrainer,
    pretrain_between,
    pretrain_to_at_least,
)
from logitcask.engine.demo.task import Problem, Task
from logitcask.engine.types import no_progress

TASK = Task(2)
KINDS = {"sums": "+", "differences": "-"}
MERGES, MERGED_FROM = 64, 4000
"""Merges of the teacher's tokenizer, and problems that they are learned from."""
SPECIAL = ["<end>", "<filler>"]
TRIAL_STEPS = 20
"""Enough that a student seldom draws a control token inside a response, which has no spans."""
TEACHER_AT_LEAST, STUDENT_BETWEEN = 0.95, (0.55, 0.7)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and counts of a bench, chosen together."""

    teacher: Size
    student: Size
    trained: bool = True
    """Up to their accuracies; else TRIAL_STEPS, for a trial of the code."""
    exam: int
    """Validation problems in pretraining."""
    evaluation: int
    """Problems of an accuracy."""
    prompts: int
    n: int
    pack_length: int
    """Tokens of an update."""


FULL = Scale(
    teacher=Size(128, 2, 384, 4),
    student=Size(96, 2, 288, 3),
    exam=300,
    evaluation=1000,
    prompts=1500,
    n=3,
    pack_length=1600,
)

SMOKE = Scale(
    teacher=Size(16, 1, 32, 2),
    student=Size(16, 1, 32, 2),
    trained=False,
    exam=8,
    evaluation=8,
    prompts=8,
    n=1,
    pack_length=200,
)


@cache
def merged_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of the task's texts; its merges cross every sign."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + len(alphabet) + MERGES,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = islice(TASK.stream("teacher", 0), MERGED_FROM)
    made.train_from_iterator((t for p in texts for t in (p.prompt, p.solution)), trainer)
    factory: Any = PreTrainedTokenizerFast
    end, filler = SPECIAL
    return factory(
        tokenizer_object=made,
        eos_token=end,
        pad_token=filler,
        clean_up_tokenization_spaces=False,
    )


def model_of(size: Size, tokenizer: Any, seed: int) -> Any:
    """Return the demo's model with random weights, with the vocabulary of a tokenizer."""
    from transformers import Qwen3ForCausalLM

    config = make_model(size, seed).config
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


class Pretrainer(TaskPretrainer):
    """Pretrainer of a model with any tokenizer: prompts need not have one length in tokens."""

    def loss(self, problems: list[Problem]) -> torch.Tensor:
        """Return the mean negative log-likelihood of the solutions, stop included, in nats."""
        end, filler = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        prompts = self.tokenizer([p.prompt for p in problems])["input_ids"]
        solutions = self.tokenizer([p.solution for p in problems])["input_ids"]
        rows = [torch.tensor([*p, *s, end]) for p, s in zip(prompts, solutions, strict=True)]
        tokens_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
        at_BL = torch.arange(1, tokens_BL.shape[1])[None]
        target_BL = (at_BL >= torch.tensor([len(p) for p in prompts])[:, None]) & (
            at_BL < torch.tensor([len(row) for row in rows])[:, None]
        )
        # Rows are padded at their ends, which causal attention never reads: no mask is needed.
        hidden = self.model.model(input_ids=tokens_BL, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1][target_BL])
        return F.cross_entropy(logits, tokens_BL[:, 1:][target_BL])

    def accuracy(self) -> float:
        return accuracy(self.model, self.tokenizer, self.validation)


def accuracy(model: Any, tokenizer: Any, problems: list[Problem]) -> float:
    """Return the share of problems solved by greedy decoding."""
    texts = respond(model, tokenizer, problems)
    return sum(p.solved_by(texts[p]) for p in problems) / len(problems)


@torch.no_grad()
def respond(model: Any, tokenizer: Any, problems: list[Problem]) -> dict[Problem, str]:
    """Return the greedy response to each problem; `...` ends one without a stop token."""
    training = model.training
    model.eval()
    ids = {p: tokenizer(p.prompt)["input_ids"] for p in problems}
    found = {}
    for _, group in groupby(sorted(problems, key=lambda p: len(ids[p])), lambda p: len(ids[p])):
        batch = list(group)
        written = _decode(model, tokenizer, torch.tensor([ids[p] for p in batch]))
        for problem, row in zip(batch, written.tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            text = tokenizer.decode(row, skip_special_tokens=True)
            found[problem] = text if ended else f"{text}..."
    model.train(training)
    return found


def _decode(model: Any, tokenizer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return [B, at most max_new_tokens] ids; padding after the stop token."""
    finished = torch.zeros(len(tokens), dtype=torch.bool)
    written: list[torch.Tensor] = []
    cache = None
    while len(written) < TASK.max_new_tokens and not finished.all():
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1).masked_fill(finished, tokenizer.pad_token_id)
        finished |= chosen == tokenizer.eos_token_id
        written.append(chosen)
        tokens = chosen[:, None]
    return torch.stack(written, 1)


def of_kind(kind: str, split: str, seed: int) -> Iterator[Problem]:
    """Yield the problems of a kind, without end."""
    return (p for p in TASK.stream(split, seed) if p.op == KINDS[kind])


class Family:
    """The models of a seed and their accuracies; a model that the folder holds is not made."""

    def __init__(self, folder: Path, seed: int, scale: Scale) -> None:
        self.folder, self.seed, self.scale = folder, seed, scale
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "accuracies.json"
        self.accuracies: dict[str, dict[str, float]] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )
        """Model -> `all` or a kind -> share of the held-out problems that it solves."""

    def problems(self, split: str, count: int) -> list[Problem]:
        """Return the first distinct problems of a split."""
        drawn = dict.fromkeys(islice(TASK.stream(split, self.seed), 20 * count))
        return list(drawn)[:count]

    def path(self, name: str) -> Path:
        """Return the folder of a model, which is made if it is not there."""
        folder = self.folder / name
        if name not in self.accuracies:
            tokenizer = merged_tokenizer() if name == "merged" else make_tokenizer()
            model = self._expert(name) if name in KINDS else self._pretrained(name, tokenizer)
            save(model, tokenizer, folder)
            self.accuracies[name] = self.measured(model, tokenizer)
            self._file.write_text(json.dumps(self.accuracies))
            print(f"seed {self.seed}: {name} {self.accuracies[name]}", flush=True)
        return folder

    def measured(self, model: Any, tokenizer: Any, split: str = "evaluation") -> dict[str, float]:
        """Return the accuracies of a model on held-out problems: of all, and of each kind."""
        problems = self.problems(split, self.scale.evaluation)
        texts = respond(model, tokenizer, problems)
        groups = {"all": problems} | {
            kind: [p for p in problems if p.op == op] for kind, op in KINDS.items()
        }
        return {
            name: sum(p.solved_by(texts[p]) for p in each) / max(1, len(each))
            for name, each in groups.items()
        }

    def _pretrained(self, name: str, tokenizer: Any) -> Any:
        """Return the student or a teacher, of random weights trained to its accuracy."""
        student, scale = name == "student", self.scale
        made = Pretrainer(
            model_of(scale.student if student else scale.teacher, tokenizer, self.seed),
            tokenizer,
            TASK.stream("student" if student else "teacher", self.seed),
            self.problems("validation", scale.exam),
            batch=48,
            lr=4e-3 if student else 3e-3,
            max_new_tokens=TASK.max_new_tokens,
        )
        if not scale.trained:
            made.train(TRIAL_STEPS)
        elif student:
            limits = {"stride": 20, "limit": 2000}
            pretrain_between(made, *STUDENT_BETWEEN, **limits, stage=name, progress=no_progress)
        else:
            self._to_at_least(made, name, slide=75)
        return made.model

    def _expert(self, kind: str) -> Any:
        """Return the student, trained on problems of a kind until it solves these."""
        model = load(self.path("student"))
        problems = self.problems("validation", self.scale.exam)
        made = Pretrainer(
            model,
            make_tokenizer(),
            of_kind(kind, "teacher", self.seed),
            [p for p in problems if p.op == KINDS[kind]],
            batch=48,
            lr=1e-3,
            max_new_tokens=TASK.max_new_tokens,
        )
        if self.scale.trained:
            self._to_at_least(made, kind, slide=25)
        else:
            made.train(TRIAL_STEPS)
        return model

    def _to_at_least(self, made: Pretrainer, stage: str, slide: int) -> None:
        pretrain_to_at_least(
            made,
            TEACHER_AT_LEAST,
            ready=0.8,
            stride=25,
            slide=slide,
            limit=2000,
            stage=stage,
            progress=no_progress,
        )


def load(folder: Path) -> Any:
    """Load a model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
