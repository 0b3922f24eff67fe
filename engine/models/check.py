"""Proof of each way in which a model's forward pass is batched, on a few tokens, before it is used.

    scoring    sequences padded on the right, logits from our own head
    sampling   a cache: prompts padded on the left or of equal length, single steps, finished rows
               dropped
    training   sequences packed into one row, or else padded on the right

The reference is the model's own logits of each sequence alone, without mask, positions or cache,
with the attention that transformers gives it.
The lengths are short, and for runs that reach it also beyond each length at which the forward
changes: a sliding window, a chunk of attention, LongRoPE's original length. Results are cached by
the digest of the weights, so that a model is checked once.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from logitcask.engine.errors import ModelError
from logitcask.engine.events import running_step
from logitcask.engine.models.attention import attention_of, ordinary_attention
from logitcask.engine.models.forward import (
    cuts,
    inner_model,
    new_cache,
    right_padded,
    rope_switch,
    select_rows,
    sequence_states,
    states,
)
from logitcask.engine.models.identity import digest, read_config
from logitcask.engine.models.logit_transform import logit_transform_of, named_extras
from logitcask.engine.models.weights import cache_folder
from logitcask.engine.types import ModelRef

LENGTHS = (67, 9, 1)
"""Tokens of the short sequences; a prompt of one token takes another path in some models."""
STEPS = 6
"""Cached steps; a sequence is dropped after half of them."""
MIN_PROB = 1e-4
"""Less likely ids are not compared."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Nats: of the largest difference in float32, of the mean difference in half precision."""
MAX_NOISE = {torch.float32: 2.5e-4, torch.bfloat16: 0.2}
"""Nats; a larger difference between equal computations does not raise the tolerance further."""
NOISE_FACTOR = 4.0
"""Tolerance as a multiple of the difference between equal computations."""
CODE = tuple(Path(__file__).with_name(f"{name}.py") for name in ("check", "forward", "attention"))
"""A result holds for this code."""
CHANGES = ("window", "chunk_size", "index_topk", "indexer_budget", "index_block_size")
"""Parts of the names of fields with a length at which the forward changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedPaths:
    """The proved ways of one model. A reason is empty where the path is right."""

    scoring: str = ""
    """Reason why it cannot score."""
    sampling: str = ""
    """Reason why it cannot sample."""
    equal_prompts: bool = False
    """True if a batch of prompts must have one length: padding on the left changes the outputs."""
    packed: bool = True
    """True if training packs sequences into one row; else it pads them."""
    packing: str = ""
    """Reason why it does not pack."""

    def require(self, *paths: str, of: ModelRef | Path) -> None:
        """Raise ModelError if one of these paths is not right; `of` is the model, for the text."""
        name = of.name if isinstance(of, ModelRef) else of
        for path in paths:
            if reason := getattr(self, path):
                raise ModelError(
                    f"the model in {name} is not right in {path}: {reason}",
                    hint=HINTS[path],
                )


HINTS = {
    "scoring": "use a causal language model of transformers whose logits are hidden states times "
    "the output matrix, with a bias, a scale or a soft cap at most",
    "sampling": "sample with --backend vllm, or take a model with a key-value cache of "
    "transformers; as a teacher it can still score",
}


def checked_paths(
    model: nn.Module, ref: ModelRef | Path, n_vocab: int, *, length: int = 0
) -> CheckedPaths:
    """Return the proved paths of a loaded model, from the cache if it was checked before.

    ref: the identity of its weights; a plain folder is not cached. length: tokens of the longest
    sequence of the run.
    """
    inner = inner_model(model)
    changes = tuple(each for each in lengths_of_change(inner.config) if each < length)
    if not isinstance(ref, ModelRef):
        return check_paths(inner, n_vocab, changes)
    key = {
        "weights": ref.digest,
        "config": read_config(ref.path),
        "n_vocab": n_vocab,
        "changes": changes,
        "dtype": str(inner.dtype),
        "device": inner.device.type,
        "attention": attention_of(inner),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": [sha256(file.read_bytes()).hexdigest() for file in CODE],
    }
    file = cache_folder() / "checks" / f"{digest(key).removeprefix('sha256:')}.json"
    found = _read(file)
    if found is None:
        with running_step(f"check {ref.path.name}"):
            found = check_paths(inner, n_vocab, changes)
        _write(file, found)
    return found


def lengths_of_change(config: Any) -> list[int]:
    """Return the sorted lengths beyond which the forward pass of a model changes."""
    fields = vars(config.get_text_config())
    values = [v for name, v in fields.items() if any(each in name for each in CHANGES)]
    # One key for many tokens (DeepSeek V4); sparse attention by blocks (MiniMax M3).
    values += dict(fields.get("compress_rates") or {}).values()
    blocks, size = fields.get("index_topk_blocks"), fields.get("index_block_size")
    values += [blocks * size] if type(blocks) is int and type(size) is int else []
    # A window of a few tokens is passed by the short sequences already.
    lengths = {v for v in values if type(v) is int and v >= max(LENGTHS)}
    if (switch := rope_switch(config)) < 1 << 62:
        lengths.add(switch)
    return sorted(lengths)


@torch.no_grad()
def check_paths(model: Any, n_vocab: int, changes: Sequence[int] = ()) -> CheckedPaths:
    """Prove each path of a model; `changes`: lengths to go beyond, see lengths_of_change."""
    training = model.training
    model.eval()
    try:
        return _Check(model, n_vocab).run(changes)
    finally:
        model.train(training)


@torch.no_grad()
def sample_log_probs(model: Any, n_vocab: int) -> Tensor:
    """Return the log-probs [P, n_vocab] of a few packed sequences, under bfloat16 autocast."""
    check = _Check(model, n_vocab)
    sequences = [check._ids(n, seed) for seed, n in enumerate(LENGTHS)]
    with torch.autocast(model.device.type, torch.bfloat16):
        found = sequence_states(model, sequences, packed=model.checked_paths.packed)
        return torch.cat([check._ours(hidden) for hidden in found])


class _Check:
    """Comparison of one model's paths with its plain logits."""

    def __init__(self, model: Any, n_vocab: int) -> None:
        self.model, self.n_vocab = model, n_vocab
        self.head = model.get_output_embeddings()
        self.transform = logit_transform_of(model.config)
        self.switch = rope_switch(model.config)
        self.usable = _usable_ids(model.config, n_vocab)

    def run(self, changes: Sequence[int]) -> CheckedPaths:
        if reason := self._head_reason():
            return CheckedPaths(scoring=reason, sampling=reason, packed=False, packing=reason)
        short = [self._ids(n, seed) for seed, n in enumerate(LENGTHS)]
        sets = [short, *[[self._ids(change + 3, change), short[1]] for change in changes]]
        scoring = self._first(self._prefixes, sets)
        scoring = scoring or self._first(lambda each: self._whole(each, packed=False), sets)
        if scoring:
            return CheckedPaths(scoring=scoring, sampling=scoring, packed=False, packing=scoring)
        # The longest last, so that it does not begin where the row begins.
        packing = self._first(lambda each: self._whole(each[::-1], packed=True), sets)
        prompts = [short, *[[self._ids(n - STEPS // 2, n), short[1]] for n in changes]]
        # LongRoPE recomputes a batch when it becomes long, which all of its sequences must do.
        padded = "two sets of rotary factors" if self.switch in changes else ""
        sampling = padded or self._first(self._cached, prompts)
        if sampling:
            equal = [[self._ids(len(s), 7 * i) for i in range(2)] for each in prompts for s in each]
            sampling = self._first(self._cached, equal)
            return CheckedPaths(
                sampling=sampling, equal_prompts=True, packed=not packing, packing=packing
            )
        return CheckedPaths(packed=not packing, packing=packing)

    def _head_reason(self) -> str:
        head = self.head
        if not isinstance(head, nn.Linear):
            return f"its head is {type(head).__name__}, not a linear map"
        if head.weight.shape[0] < self.n_vocab:
            return f"its head has {head.weight.shape[0]} ids, its tokenizer {self.n_vocab}"
        return ""

    def _first(self, run: Callable[[list[Tensor]], str], sets: Sequence[list[Tensor]]) -> str:
        """Return the first reason of these sets of sequences, or an empty text."""
        for each in sets:
            try:
                if reason := run(each):
                    return reason
            # Models of transformers raise anything on inputs that they do not support.
            except Exception as error:
                return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return ""

    def _ids(self, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + length)
        chosen = torch.randint(len(self.usable), (length,), generator=generator)
        return self.usable[chosen].to(self.model.device)

    def _plain(self, ids: Tensor) -> Tensor:
        """Return the model's log-probs [L, n_vocab] of one sequence, each row of its own prefix."""
        rows = [
            self._logits(ids[None, :length])[0, start:end]
            for start, end, length in cuts(len(ids), self.switch)
        ]
        return self._log_probs(torch.cat(rows))

    def _logits(self, ids: Tensor) -> Tensor:
        """Return the model's own logits [B, L, V] of ids [B, L]."""
        with ordinary_attention(self.model):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _ours(self, hidden: Tensor) -> Tensor:
        product = nn.functional.linear(hidden, self.head.weight, self.head.bias)
        return self._log_probs(self.transform.apply(product.float()))

    def _log_probs(self, logits: Tensor) -> Tensor:
        return logits.float()[..., : self.n_vocab].log_softmax(-1)

    def _prefixes(self, sequences: list[Tensor]) -> str:
        """Compare rows of a sequence with those of its prefixes: no row depends on later tokens."""
        ids = sequences[0]
        whole, rows = self._plain(ids), (len(ids) // 2, len(ids) - 2)
        pairs = [(whole[row : row + 1], self._plain(ids[: row + 1])[-1:]) for row in rows]
        return self._reason("a later token", pairs, ids)

    def _whole(self, sequences: list[Tensor], *, packed: bool) -> str:
        """Compare whole sequences, padded on the right or packed."""
        found = sequence_states(self.model, sequences, packed=packed)
        pairs = [
            (self._ours(hidden), self._plain(ids))
            for hidden, ids in zip(found, sequences, strict=True)
        ]
        kind = "a pack of sequences" if packed else "a padded batch of sequences"
        return self._reason(kind, pairs, max(sequences, key=len))

    def _cached(self, prompts: list[Tensor]) -> str:
        """Compare cached steps after prompts with whole sequences."""
        equal = len({len(each) for each in prompts}) == 1
        steps = [self._ids(STEPS, 100 + i) for i in range(len(prompts))]
        whole = [torch.cat(pair) for pair in zip(prompts, steps, strict=True)]
        expected = [self._plain(ids)[len(p) - 1 :] for ids, p in zip(whole, prompts, strict=True)]
        flipped, mask = right_padded([ids.flip(0) for ids in whole])
        ids, mask = flipped.flip(1), mask.flip(1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(len(prompts), device=ids.device)
        cache, past, pairs = new_cache(self.model), 0, []
        for step in range(STEPS):
            end = ids.shape[1] - STEPS + step
            if past <= self.switch < end:
                cache, past = new_cache(self.model), 0
            new, place = ids[:, past:end], positions[:, past:end]
            seen = None if equal else mask[:, :end]
            hidden = states(self.model, new, mask=seen, positions=place, cache=cache)
            found = self._ours(hidden[:, -1])
            pairs += [(found[i : i + 1], expected[r][step : step + 1]) for i, r in enumerate(rows)]
            past = end
            if step == STEPS // 2 and len(rows) > 1:
                keep = rows[rows != 1]
                select_rows(cache, keep)
                ids, mask, positions, rows = ids[keep], mask[keep], positions[keep], keep
        return self._reason("cached sampling", pairs, whole[0])

    def _reason(self, kind: str, pairs: list[tuple[Tensor, Tensor]], ids: Tensor) -> str:
        """Return how far our log-probs are from the plain ones, or an empty text."""
        found = self._measure(pairs)
        if found <= TOLERANCE.get(self.model.dtype, TOLERANCE[torch.bfloat16]):
            return ""
        if found <= NOISE_FACTOR * self._noise(ids):
            return ""
        named = named_extras(self.model.config)
        why = f"; config.json has {', '.join(named)}" if named else ""
        return f"{kind} gives log-probs {found:.2g} nats off those of a sequence alone{why}"

    def _noise(self, ids: Tensor) -> float:
        """Return the difference of a sequence alone and twice in a batch, bounded by MAX_NOISE."""
        twice, alone = self._logits(torch.stack([ids, ids]))[1], self._logits(ids[None])[0]
        found = self._measure([(self._log_probs(twice), self._log_probs(alone))])
        return min(found, MAX_NOISE.get(self.model.dtype, MAX_NOISE[torch.bfloat16]))

    def _measure(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        """Return the largest difference of (ours, plain) in float32, else the mean one."""
        gap = torch.cat([_gaps(*pair) for pair in pairs])
        return float(gap.max() if self.model.dtype == torch.float32 else gap.mean())


def _gaps(ours: Tensor, plain: Tensor) -> Tensor:
    """Return the absolute differences at the ids that matter; NaN counts as infinite."""
    likely = ~(plain <= math.log(MIN_PROB))  # NaN too
    likely |= plain >= plain.amax(
        -1, keepdim=True
    )  # of a flat distribution over a large vocabulary
    return (ours - plain).abs()[likely].nan_to_num(nan=torch.inf)


def _usable_ids(config: Any, n_vocab: int) -> Tensor:
    """Return the ids without those with a meaning of their own, such as placeholders of images."""
    special: set[int] = set()
    for part in (config, config.get_text_config()):
        for field, value in vars(part).items():
            if "token" in field:
                values = value if isinstance(value, list) else [value]
                special |= {each for each in values if type(each) is int}
    usable = [i for i in range(n_vocab) if i not in special]
    return torch.tensor(usable or range(n_vocab))


def _read(file: Path) -> CheckedPaths | None:
    """Read a result; None where there is none, or no valid one."""
    try:
        values = json.loads(file.read_bytes())
        kinds = {field.name: field.type for field in fields(CheckedPaths)}
        if {name: type(value) for name, value in values.items()} != kinds:
            return None
        return CheckedPaths(**values)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _write(file: Path, found: CheckedPaths) -> None:
    # A home folder without write access costs the check of the next process and nothing else.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as stream:
            json.dump(asdict(found), stream)
        os.replace(staged, file)
