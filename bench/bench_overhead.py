"""Rollout, score and training against plain transformers: ratios of CPU seconds of the same work.

Run: .venv/bin/python bench/bench_overhead.py [--model FOLDER] [--vocab V] [--rounds N]
         [--training-only]

    rollout   `rollout`, from prompts to a committed segment with the student's top 16, over
              generate() at temperature 1 alone, and over generate() and one forward pass over the
              responses for the same scores
    score     `score`, from stored rollouts to a committed segment, over a plain forward pass
              of the same batches with log_softmax, topk and entropy
    train     an update of DistillTrainer on the store, over one on the same pack with the
              whole log_softmax, AdamW and clipping; and over that of an expert: the same
              attention, the same loss, fused AdamW, no metrics

Each figure is the median of the CPU seconds of this process in interleaved rounds, one thread. The
three updates are interleaved one by one in a run, whose first is left out; what it takes longer
than the others is the start of a run.
Without --model the student is a random Qwen3 of 4 layers, width 896 and --vocab ids, by default
151,936, the vocabulary of the Qwen family; the teacher is the same model. Loading and the check of
the model are a figure of their own. A row is appended to bench/results/overhead.jsonl.
"""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.scoring import budget_batches, pieces_of, response_rows
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.models.attention import pack_lengths
from logitcask.engine.models.forward import NEVER
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import load_student
from logitcask.engine.objectives import parse_objective
from logitcask.engine.objectives.bounds import NO_BOUNDS
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.source import Pack, PackSource
from logitcask.engine.rollout.plan import rollout
from logitcask.engine.rollout.unit import RolloutRequest
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import open_store
from logitcask.engine.training.metric_sampling import metric_sampling
from logitcask.engine.training.provenance.ledger import Ledger
from logitcask.engine.training.run_dir.files import LEDGER, METRICS, MetricsFile
from logitcask.engine.training.settings import training_arguments
from logitcask.engine.training.trainer import DistillTrainer
from logitcask.engine.types import ModelRef, Prompt, Rollouts, SamplingParams, no_progress

VOCAB, WIDTH, LAYERS = 151_936, 896, 4
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 24, 24, 32
PACK_LENGTH, UPDATES = 512, 12
"""Tokens of a pack; updates of a run."""
SAMPLING = SamplingParams(n=1, max_new_tokens=NEW_TOKENS)
PLAIN_ROWS = 256
"""Rows of logits at once in the plain ways, as many as here."""
K_STUDENT, K_TEACHER = 16, 64
RATIOS = (
    *(("rollout", "generate"), ("rollout", "generate and forward"), ("score", "plain score")),
    *(("train", "plain train"), ("train", "expert train")),
)
PACKAGES = ("torch", "transformers")


def save_model(folder: Path, vocab: int) -> None:
    """Save a random Qwen3 whose distributions are neither flat nor certain."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=4864,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)


def plain_generate(model: Any, prompts: list[Prompt]) -> None:
    ids = torch.tensor([p.token_ids for p in prompts])
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )


@torch.no_grad()
def plain_scores(model: Any, rollouts: Rollouts, k: int, at: Any = None) -> None:
    """Compute log-prob of each token, top k, entropy, tail, and log-probs at other ids."""
    pieces = pieces_of(rollouts, NEVER)
    for batch in budget_batches([piece.length for piece in pieces], 16384):
        ids, mask, places, rows = response_rows(rollouts, [pieces[i] for i in batch])
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[torch.from_numpy(places)]
        for start in range(0, len(rows), PLAIN_ROWS):
            part = slice(start, start + PLAIN_ROWS)
            lp = model.lm_head(hidden[part]).float().log_softmax(-1)
            token = torch.from_numpy(rollouts.tokens[rows[part]].astype(np.int64))
            lp.gather(1, token[:, None])
            mass = lp.topk(k).values.exp().cumsum(1)
            torch.log1p(-mass[:, -1].clamp(max=1 - 1e-7))
            (lp.exp() * lp).sum(-1)
            if at is not None:
                lp.gather(1, torch.from_numpy(at[rows[part]]))


def plain_update(model: Any, optimizer: torch.optim.Optimizer, pack: Pack, _: str) -> None:
    """Train on one pack: reverse KL on the first stored ids of a row, renormalised."""
    states = model.model(
        input_ids=pack.input_ids, position_ids=pack.position_ids, use_cache=False
    ).last_hidden_state[0, pack.predict_at]
    lp = model.lm_head(states).float().log_softmax(-1)
    p = lp.gather(1, pack.targets.ids[:, :K_STUDENT].clamp(min=0)).log_softmax(-1)
    q = pack.targets.q_log_p[:, :K_STUDENT].log_softmax(-1)
    loss = (p.exp() * (p - q)).sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def support_of(objective: str, targets: Any, states: torch.Tensor, head: torch.Tensor) -> Any:
    """Return (ids, teacher's log-probs, mask), all [P, K], of the positions of a loss.

    opd: the student's stored ids. overlap: the teacher's first ids that are in the top k of the
    student in training, which needs one product with the head.
    """
    if objective == "opd":
        columns = torch.arange(K_STUDENT).expand(len(states), -1)
    else:
        listed = (targets.q_rank >= 0) & (targets.q_rank < K_STUDENT)
        order = torch.where(listed, targets.q_rank, targets.q_rank.shape[1])
        columns = order.topk(K_STUDENT, largest=False).indices
    ids = targets.ids.gather(1, columns)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if objective == "overlap":
        with torch.no_grad():
            for part in torch.arange(len(states)).split(PLAIN_ROWS):
                logits = states[part] @ head.T
                least = logits.topk(K_STUDENT).values[:, -1:]
                mask[part] = logits.gather(1, ids[part]) >= least
    return ids, targets.q_log_p.gather(1, columns), mask


def expert_update(model: Any, optimizer: torch.optim.Optimizer, pack: Pack, objective: str) -> None:
    """Train on one pack: the same loss, from the rows of the head that it reads."""
    states = model.model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        use_cache=False,
        **pack_lengths(pack.lengths, pack.input_ids.device),
    ).last_hidden_state[0, pack.predict_at]
    ids, q, mask = support_of(objective, pack.targets, states, model.lm_head.weight)
    rows = torch.nn.functional.embedding(ids, model.lm_head.weight)
    z = torch.einsum("pd,pkd->pk", states, rows)
    p, q = (torch.where(mask, x, -1e9).log_softmax(-1) for x in (z, q))
    loss = torch.where(mask, p.exp() * (p - q), 0.0).sum(-1).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def cpu_seconds(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each run, one warm-up round left out."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            seconds = cpu_seconds(run)
            if number:
                took[name].append(seconds)
    return {name: statistics.median(values) for name, values in took.items()}


def measure(
    folder: Path, work: Path, rounds: int, objective: str, *, training_only: bool
) -> results.Row:
    """Return the row of one model."""
    ref = model_ref(str(folder), chat_template=False)
    begun = time.process_time()
    hf = HF(ref, device="cpu", dtype="float32", stop_ids=())
    load_s = time.process_time() - begun
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, ref.n_vocab, (PROMPTS, PROMPT_TOKENS), generator=generator)
    prompts = [Prompt(id=str(i), token_ids=tuple(r.tolist())) for i, r in enumerate(rows)]
    places = (work / f"store-{number}" for number in itertools.count())

    def rolled() -> Any:
        store = open_store(str(next(places)), create=True)
        rollout(
            RolloutRequest(store=store, model=ref, sampler=hf, prompts=prompts, sampling=SAMPLING)
        )
        return store

    first = rolled()
    rollouts = first.read_rollouts(first.head().rollouts("main")[0])
    at = rollouts.student.ids.reshape(-1, K_STUDENT).astype(np.int64)

    def scored() -> Any:
        place = next(places)
        shutil.copytree(work / "store-0", place)
        store = open_store(str(place))
        score(ScoreRequest(store=store, model=ref, scorer=hf, teacher_name="t"))
        return store

    def both() -> None:
        plain_generate(hf.model, prompts)
        plain_scores(hf.model, rollouts, K_STUDENT)

    stages: dict[str, Callable[[], Any]] = {
        "rollout": rolled,
        "generate": lambda: plain_generate(hf.model, prompts),
        "generate and forward": both,
        "score": scored,
        "plain score": lambda: plain_scores(hf.model, rollouts, K_TEACHER, at),
    }
    found = interleaved({} if training_only else stages, rounds)
    store = scored()
    found |= training(store, ref, work, objective)
    ratios = {
        f"{ours} over {theirs}": found[ours] / found[theirs]
        for ours, theirs in RATIOS
        if ours in found
    }
    return {
        **results.environment(*PACKAGES),
        "n_vocab": ref.n_vocab,
        "objective": objective,
        "positions": rollouts.positions,
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "cpu_seconds": {name: round(value, 2) for name, value in found.items()},
        "load_and_check_s": round(load_s, 2),
    }


class Peers(TrainerCallback):
    """Updates of the peers after each of ours, on the same pack and student."""

    def __init__(self, student: Any, packs: PlannedPacks, objective: str) -> None:
        adamw = partial(torch.optim.AdamW, list(student.parameters()), lr=1e-6, weight_decay=0.0)
        self._runs = {
            "plain train": partial(plain_update, student, adamw()),
            "expert train": partial(expert_update, student, adamw(fused=True)),
        }
        self._packs, self._objective = packs, objective
        self.took: dict[str, list[float]] = {name: [] for name in ("train", *self._runs)}
        self._since = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.took["train"].append(time.process_time() - self._since)
        pack = self._packs.pack(state.global_step - 1)
        for name, update in self._runs.items():
            self.took[name].append(cpu_seconds(partial(update, pack, self._objective)))
        self._since = time.process_time()


def training(store: Any, ref: ModelRef, work: Path, objective: str) -> dict[str, float]:
    """Return the median CPU seconds of an update each way, and those of the start of a run."""
    source = PackSource(store, store.head(), "main", "t")
    plan = source.plan(seed=0, epochs=UPDATES, pack_length=PACK_LENGTH)
    settings = Train(learning_rate=1e-6, save_steps=10**6, pack_length=PACK_LENGTH)
    student = load_student(ref)
    out = work / "run"
    out.mkdir()
    peers = Peers(student, PlannedPacks(plan, source), objective)
    args = training_arguments(settings, Run(out=out, device="cpu"))
    args.save_strategy = "no"
    DistillTrainer(
        student,
        args,
        packs=PlannedPacks(plan, source),
        updates=UPDATES,
        objective=parse_objective(objective).objective,
        n_vocab=ref.n_vocab,
        sampling=metric_sampling(settings, UPDATES),
        aggregation=settings.aggregation,
        dropout=settings.dropout,
        bounds=NO_BOUNDS,
        version=0,
        known_ages=True,
        metrics=MetricsFile(out / METRICS, ""),
        ledger=Ledger(out / LEDGER),
        resume_metadata={},
        progress=no_progress,
        tracker=peers,
    ).train()
    found = {name: statistics.median(took[1:]) for name, took in peers.took.items()}
    return {**found, "start of a run": peers.took["train"][0] - found["train"]}


def main() -> None:
    """Measure the three stages and append their row."""
    parser = results.option_parser(__doc__ or "", "overhead")
    parser.add_argument("--model", type=Path, help="Folder of a model to use instead.")
    parser.add_argument("--objective", choices=("overlap", "opd"), default="overlap")
    parser.add_argument("--vocab", type=int, default=VOCAB, help="Ids of the random model.")
    parser.add_argument("--training-only", action="store_true", help="Leave the other stages out.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds after the warm-up.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        if options.model is None:
            save_model(work / "model", options.vocab)
        folder = options.model or work / "model"
        row = measure(
            folder, work, options.rounds, options.objective, training_only=options.training_only
        )
    print(row)
    results.append(options.out, row)


if __name__ == "__main__":
    main()
