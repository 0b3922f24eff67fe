"""Verdicts on a model folder: each path of the engine is right or refused, by plain transformers.

The reference is `model(input_ids)` of one sequence, in eval mode, without padding, mask or cache.
Where its row r depends on later tokens (a rope that reads the length, attention both ways), it is
a forward pass of each prefix, for a row is the distribution given prompt + response[:r].
"""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

from logitcask.engine.backends.hf import HF
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import LogitcaskError
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import load_student
from logitcask.engine.packing.source import PackSource
from logitcask.engine.training import student as student_module
from logitcask.engine.training import trainer as trainer_module
from logitcask.engine.training.pack_loss import pack_loss
from logitcask.engine.training.train import train
from logitcask.engine.types import Prompt, Rollouts, SamplingParams, ScoreParams
from tests.engine.cached import Unit, make_store, make_unit
from tests.engine.fitting import FORWARD, flat, relative
from tests.engine.tiny import N_VOCAB
from tests.models.families import ORIGINAL, WINDOW

TOLERANCE = 1e-4
"""Largest difference of log-probs, losses and entropies, nats, and of gradients, relative."""
STOPS = (1, 5, 17, 33, 49, 65, 81, 97)
"""Stop ids of the samples: about half of a batch ends early."""
PROMPTS = (1, 5, WINDOW + 4, ORIGINAL - 14, ORIGINAL + 6)
SAMPLING = SamplingParams(n=2, temperature=0.9, max_new_tokens=24)
RESPONSES = (4, 24, 20, 1, 45, 8, 20, 25)
"""Response tokens of the sequences that are scored and trained on, two for each of four prompts."""
SETTINGS = Train(
    **{"learning_rate": 1e-2, "max_grad_norm": 1e9, "pack_length": 200},
    gradient_accumulation_steps=4,
)
"""One update of two or three packs, of eight sequences."""


class Wrong(AssertionError):
    """Values of the engine differ from those of transformers."""


def judge(check: Callable[[], None]) -> str:
    """Return right, `refused: CAUSE`, `wrong: WHAT` or `traceback: ERROR` of a check."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()
    except Wrong as error:
        return f"wrong: {error}"
    except LogitcaskError as error:
        return f"refused: {error.cause}"
    # The matrix is for exactly those that are no LogitcaskError.
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "right"


def verdicts(folder: Path) -> dict[str, str]:
    """Return the verdicts on the model in `folder`, which has a tokenizer of tests.engine.tiny."""
    model = plain_model(folder)
    return {
        "samples": judge(lambda: check_samples(folder, model)),
        "scores": judge(lambda: check_scores(folder, model)),
        "trains": judge(lambda: check_trains(folder, model, Lora())),
        "trains LoRA": judge(lambda: check_trains(folder, model, Lora(r=4))),
    }


# --- the reference ---


def plain_model(folder: Path) -> Any:
    """Load a folder as transformers does."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_logits(model: Any, ids: list[int], start: int, n_vocab: int = N_VOCAB) -> Tensor:
    """Return logits [len(ids) - start, n_vocab] of the tokens from `start` on."""
    inputs = torch.tensor([ids[:-1]])
    whole = _logits(model, inputs, n_vocab)[start - 1 :]
    ends = range(start, len(ids))
    some = {ends[0], ends[len(ends) // 2], ends[-1]}
    alone = {end: _logits(model, inputs[:, :end], n_vocab)[-1] for end in some}
    if all(_gap(alone[end], whole[end - start]) < TOLERANCE for end in some):
        return whole
    return torch.stack([_logits(model, inputs[:, :end], n_vocab)[-1] for end in ends])


def _logits(model: Any, inputs: Tensor, n_vocab: int = N_VOCAB) -> Tensor:
    logits: Tensor = model(input_ids=inputs, use_cache=False).logits[0, :, :n_vocab].float()
    return logits


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two distributions, nats."""
    return float((ours.log_softmax(-1) - theirs.log_softmax(-1)).detach().abs().max())


def compare(what: str, ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
    """Raise Wrong where two arrays differ by more than the tolerance."""
    gap = float(np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))))
    if not gap <= tolerance:
        raise Wrong(f"{what} by {gap:.2g}")


# --- the paths ---


@torch.no_grad()
def check_samples(folder: Path, model: Any) -> None:
    """Compare the log-probs of sampled tokens with those of a plain forward pass."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(id=f"p{n}", token_ids=tuple(rng.integers(3, N_VOCAB, n).tolist())) for n in PROMPTS
    ]
    ref = model_ref(str(folder), chat_template=True)
    net = HF(ref, device="cpu", stop_ids=STOPS)
    rollouts = net.generate(prompts, SAMPLING, seed=0, version=0)
    lengths = rollouts.lengths()
    assert lengths.min() < lengths.max(), "no sequence ended before the others"
    for ids, start, rows in sequences(rollouts):
        plain = (plain_logits(model, ids, start) / SAMPLING.temperature).log_softmax(-1)
        compare("log-probs", rollouts.b_lp[rows], plain.gather(1, _tokens(ids, start))[:, 0])


@torch.no_grad()
def check_scores(folder: Path, model: Any) -> None:
    """Compare log-probs, entropies, the top 8 and the tail with those of a plain forward pass."""
    ref = model_ref(str(folder), chat_template=True)
    request = ScoreParams(entry_kind="topk", k_min=8, k_max=8, at_student=False)
    rollouts = unit().rollouts
    scores = HF(ref, device="cpu").score(rollouts, request)
    for ids, start, rows in sequences(rollouts):
        plain = plain_logits(model, ids, start).log_softmax(-1)
        compare("log-probs", scores.lp[rows], plain.gather(1, _tokens(ids, start))[:, 0])
        top_ids = torch.from_numpy(scores.ids.reshape(-1, 8)[rows].astype(np.int64))
        top = scores.entry_lp.reshape(-1, 8)[rows]
        compare("top log-probs", top, plain.gather(1, top_ids))
        compare("top-k", top, plain.topk(8).values)
        compare("entropies", scores.entropy[rows], -(plain.exp() * plain).sum(1))
        tail = plain.scatter(1, top_ids, -torch.inf).logsumexp(1)
        compare("tails", scores.log_tail[rows], tail)


def check_trains(folder: Path, model: Any, lora: Lora) -> None:
    """Compare one update of `train`, and the model that it saves, with plain transformers.

    Of the update: the packed rows' log-probs, the loss, and without LoRA the gradient. Of the
    saved model: logits, equal to the bit without LoRA.
    """
    ref = model_ref(str(folder), chat_template=True)
    with tempfile.TemporaryDirectory() as place:
        store = make_store(Path(place) / "store", [unit()], student=ref)
        out = Path(place) / "out"
        with watched() as seen:
            train(
                store,
                model=ref,
                teacher="big",
                objective=FORWARD,
                settings=SETTINGS,
                lora=lora,
                run=Run(out=out, device="cpu"),
            )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 1
        assert len(seen.log_probs) == len(unit().rollouts.tokens)
        source = PackSource(store, store.head(), "main", "big")
        loss, log_probs = plain_loss(model, source)
        ours = [seen.log_probs[key] for key in log_probs]
        compare("log-probs of packs", ours, list(log_probs.values()))
        compare("loss", lines[0]["loss"], loss.item())
        if not lora.r:
            model.zero_grad()
            loss.backward()
            # An expert without a token has no gradient, or zeros.
            zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            gap = relative(flat(zeros | seen.gradients), flat(zeros | theirs))
            compare("gradient", gap, 0.0)
        check_saved(seen.student, out, exact=not lora.r, base=model)


@torch.no_grad()
def check_saved(student: Any, out: Path, *, exact: bool, base: Any) -> None:
    """Compare the logits of a trained student with those of its saved folder.

    exact: with the saved weights the student itself gives the same logits, to the bit.
    """
    student.eval()
    again = plain_model(out)
    ids = torch.arange(3, 43)[None]
    ours, theirs = _logits(student, ids), _logits(again, ids)
    compare("log-probs of the saved model", ours.log_softmax(-1), theirs.log_softmax(-1))
    if exact:
        student.load_state_dict(again.state_dict())
        if not torch.equal(ours, _logits(student, ids)):
            raise Wrong("weights of the saved model")
    if _gap(ours, _logits(base, ids)) < 10 * TOLERANCE:
        raise Wrong("the update changed nothing")


# --- what the paths are tried on ---


@cache
def unit() -> Unit:
    """Return random sequences of eight lengths, scored by a random teacher."""
    made = make_unit(0, prompts=4, vocab=N_VOCAB, lengths=list(RESPONSES))
    rng = np.random.default_rng(1)
    prompts = tuple(
        replace(prompt, token_ids=tuple(rng.integers(3, N_VOCAB, n).tolist()))
        for prompt, n in zip(made.rollouts.prompts, (1, 9, 2 * WINDOW, ORIGINAL + 11), strict=True)
    )
    return replace(made, rollouts=replace(made.rollouts, prompts=prompts))


def sequences(rollouts: Rollouts) -> Iterator[tuple[list[int], int, slice]]:
    """Yield (token ids, tokens of the prompt, rows) of each sequence."""
    for of, start, end in zip(
        rollouts.seq_prompt, rollouts.seq_off[:-1], rollouts.seq_off[1:], strict=True
    ):
        prompt = list(rollouts.prompts[int(of)].token_ids)
        yield prompt + rollouts.tokens[start:end].tolist(), len(prompt), slice(int(start), int(end))


def _tokens(ids: list[int], start: int) -> Tensor:
    return torch.tensor(ids[start:])[:, None]


def plain_loss(model: Any, source: PackSource) -> tuple[Tensor, dict[float, float]]:
    """Return the token mean of FORWARD, and the log-prob of each row's token by the teacher's."""
    total, log_probs = torch.zeros(()), {}
    for index, (ids, start, _) in enumerate(sequences(unit().rollouts)):
        rows = source.pack(np.array([[0, index]])).targets
        log_p = plain_logits(model, ids, start).log_softmax(-1)
        of_token = log_p.gather(1, _tokens(ids, start))[:, 0].tolist()
        log_probs |= dict(zip(rows.teacher_logprobs.tolist(), of_token, strict=True))
        mask = rows.q_rank < FORWARD.k
        log_p, log_q = (
            torch.where(mask, x, -1e9).log_softmax(-1)
            for x in (log_p.gather(1, rows.ids.clamp(min=0)), rows.q_log_p)
        )
        total = total + torch.where(mask, log_q.exp() * (log_q - log_p), 0.0).sum()
    return total / sum(RESPONSES), log_probs


@dataclass
class Seen:
    """One update, as it happened."""

    student: Any = None
    log_probs: dict[float, float] = field(default_factory=dict)
    """The student's first log-prob of each row's token, by the teacher's, which is never the same
    in two rows."""
    gradients: dict[str, Tensor | None] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Seen]:
    """Record the student, the packed rows and the gradients of a training in a with block."""
    seen = Seen()

    def load(*args: Any, **options: Any) -> Any:
        seen.student = load_student(*args, **options)
        return seen.student

    def loss(objective: Any, states: Tensor, head: Tensor, targets: Any, **options: Any) -> Any:
        logits = options["logit_transform"].apply(states.detach() @ head.detach().T)
        log_p = logits[:, : options["n_vocab"]].log_softmax(-1)
        rows = log_p.gather(1, targets.token[:, None])[:, 0].tolist()
        for key, log_prob in zip(targets.teacher_logprobs.tolist(), rows, strict=True):
            seen.log_probs.setdefault(key, log_prob)
        return pack_loss(objective, states, head, targets, **options)

    def step(*_: Any) -> None:
        if seen.student is None:
            return  # the trial of the optimizer before anything is loaded
        for name, parameter in seen.student.named_parameters():
            if parameter.grad is not None:
                seen.gradients[name] = parameter.grad.clone()

    hook = register_optimizer_step_pre_hook(step)
    try:
        with (
            mock.patch.object(student_module, "load_student", load),
            mock.patch.object(trainer_module, "pack_loss", loss),
        ):
            yield seen
    finally:
        hook.remove()
