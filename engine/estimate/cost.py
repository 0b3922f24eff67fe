"""Costs of a distillation: GPU-hours of its stages, bytes and requests of its store, money.

The model, per sequence of L = Lp + Lr tokens (prompt and response), N parameters that a token uses:

    scoring    2 N L FLOP, a forward pass
    training   6 N L FLOP, forward and backward; 8 N L with gradient checkpointing
    sampling   2 N L FLOP for the prompt and the student's own log-probs, then Lr steps: each reads
               the weights, shared by B sequences, and keys and values of Lp + Lr / 2 tokens

FLOP counts: arXiv 2001.08361, section 2.1. The products of attention with its cache are left out:
they grow with the length. A step of sampling costs its reads of memory or its FLOP, whichever takes
longer. B is the number of whole sequences that fit in memory with the weights. All of it is divided
by an assumed share of the peaks of the GPU's data sheet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Any

from logitcask.engine.config.cost import Cost
from logitcask.engine.errors import ConfigError
from logitcask.engine.estimate.sizes import ModelSize

HOUR = 3600.0
FREE_SHARE = 0.9
"""Share of a GPU's memory for weights and cache, as vLLM's default."""
FORWARD, TRAIN, RECOMPUTE = 2, 6, 8
"""FLOP per parameter and token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Peaks of a data sheet."""

    flops: float
    """FLOP/s in bfloat16, dense."""
    bandwidth: float
    """Bytes/s of its memory."""
    memory: float
    """Bytes."""


GPUS = {
    "a800-80gb": Gpu(flops=312e12, bandwidth=2.039e12, memory=80e9),
    "a100-80gb": Gpu(flops=312e12, bandwidth=2.039e12, memory=80e9),
    "h100-80gb": Gpu(flops=989e12, bandwidth=3.35e12, memory=80e9),
    "h200-141gb": Gpu(flops=989e12, bandwidth=4.8e12, memory=141e9),
}
"""The SXM variants, by NVIDIA's data sheets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The sequences of one pass, all rounds of a loop together."""

    sequences: float
    prompt_tokens: float
    response_tokens: float
    at_once: float
    """Sequences that may be sampled at once: those of a round."""
    checkpointing: bool = False

    @property
    def tokens(self) -> float:
        return self.sequences * (self.prompt_tokens + self.response_tokens)

    @property
    def positions(self) -> float:
        return self.sequences * self.response_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Hours:
    """GPU-hours of each stage, for one pass."""

    sample: float
    score: float
    train: float


def model_hours(work: Work, student: ModelSize, teacher_parameters: float, cost: Cost) -> Hours:
    """Return the GPU-hours of the stages by the model above.

    Raises ConfigError for a student that does not fit on the GPU with one sequence.
    """
    gpu = GPUS[cost.gpu]
    rate, reads = gpu.flops * cost.utilisation, gpu.bandwidth * cost.bandwidth_utilisation
    length = work.prompt_tokens + work.response_tokens
    room = FREE_SHARE * gpu.memory - student.weight_bytes
    together = min(work.at_once, floor(room / (student.kv_bytes * length)))
    if together < 1:
        raise ConfigError(
            f"a student of {student.parameters:.3g} parameters with a sequence of {length:,.0f} "
            f"tokens does not fit on one {cost.gpu}",
            hint="choose a larger --gpu, or give fewer --response-tokens",
        )
    step = student.weight_bytes / together + student.kv_bytes * (
        work.prompt_tokens + work.response_tokens / 2
    )
    per_token = max(step / reads, FORWARD * student.parameters / rate)
    passes = RECOMPUTE if work.checkpointing else TRAIN
    forward = FORWARD * student.parameters * work.tokens / rate
    return Hours(
        sample=(work.positions * per_token + forward) / HOUR,
        score=FORWARD * teacher_parameters * work.tokens / rate / HOUR,
        train=passes * student.parameters * work.tokens / rate / HOUR,
    )


def describe(
    work: Work, hours: Hours, student: ModelSize, teacher: ModelSize, cost: Cost
) -> dict[str, Any]:
    """Return what an estimate without models rests on, and the GPU-hours of its stages."""
    return {
        "measured": "nothing: no model was loaded",
        "assumed": f"{cost.utilisation:g} of the FLOP/s and {cost.bandwidth_utilisation:g} of the "
        f"memory bandwidth of one {cost.gpu}; {work.prompt_tokens:g} tokens of a prompt, "
        f"{work.response_tokens:g} of a response, {cost.bytes_per_position:g} bytes per position",
        "student_parameters": student.parameters,
        "teacher_parameters": teacher.parameters,
        "teacher_weight_bytes": teacher.weight_bytes,
        "sequences": work.sequences,
        "positions": work.positions,
        "sample_hours": hours.sample,
        "score_hours": hours.score,
        "train_hours": hours.train,
    }


def costs(
    hours: Hours, cost: Cost, *, store_bytes: float, requests: Mapping[str, float]
) -> dict[str, Any]:
    """Return the costs of `cost.runs` trainings, with the teacher in the trainer and stored once.

    requests: as of store_requests. Both sample once; the trainer with the teacher scores in every
    pass, the other once. Amounts without a price are None.
    """
    runs, price = cost.runs, cost.price_gpu_hour
    inside = hours.sample + runs * (hours.score + hours.train)
    stored = hours.sample + hours.score + runs * hours.train
    storage = _times(cost.price_gb_month, store_bytes / 1e9 * cost.months)
    once = requests["put_requests"] + requests["list_requests"] + requests["get_requests"]
    each = requests["get_requests_per_epoch"]
    writing = _times(cost.price_per_1k_requests, once / 1000)
    reading = _times(cost.price_per_1k_requests, each / 1000)
    parts = (_times(price, stored), storage, writing, reading)
    money = None
    if None not in parts:
        gpu, kept, wrote, read = (part or 0.0 for part in parts)
        money = gpu + kept + wrote + runs * read
    return {
        "runs": runs,
        "gpu_hours_teacher_in_trainer": inside,
        "gpu_hours_stored_once": stored,
        "store_bytes": round(store_bytes),
        "storage_cost": storage,
        "request_cost": None if writing is None or reading is None else writing + runs * reading,
        "cost_teacher_in_trainer": _times(price, inside),
        "cost_stored_once": money,
        "store_pays_from_run": _pays_from(hours, price, storage, writing, reading),
        "prices": {
            name: getattr(cost, name)
            for name in ("price_gpu_hour", "price_gb_month", "price_per_1k_requests")
        },
    }


def _times(price: float | None, amount: float) -> float | None:
    return None if price is None else price * amount


def _pays_from(
    hours: Hours,
    price: float | None,
    storage: float | None,
    writing: float | None,
    reading: float | None,
) -> int | None:
    """Return the first number of runs for which the store costs less; by GPU-hours without prices.

    (M - 1) score > storage + writing + M reading, all in money. None if no number does.
    """
    if price is None or storage is None or writing is None or reading is None:
        return 2 if hours.score > 0 else None
    score = price * hours.score
    if score <= reading:
        return None
    return floor((score + storage + writing) / (score - reading)) + 1
