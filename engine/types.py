"""Data classes that pass between stages, and the position convention.

Shape letters, everywhere: `M` prompts, `N` sequences, `P` packed positions (rows), `E` entries,
`K` cached or live top-k entries, `C` columns of a padded row, `S` support, `V` vocabulary,
`D` hidden, `L` tokens of a pack (prompts and responses).

Position convention: row r of a sequence predicts response token r from
prompt + response[:r], so it reads the hidden state at prompt_len + r - 1. There is one row per
response token, the end-of-sequence token included; prompts have none. Log-probs are natural,
normalised at temperature 1 over the ids [0, n_vocab), in nats. `p` is the student, `q` the teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from pydantic import Field

from logitcask.engine.config.section import Positive, Section, Share

if TYPE_CHECKING:  # `--help` reads this file, and would wait for numpy
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]
else:
    Array = Any

STOP, LENGTH = 0, 1
"""Finish reasons of a sequence: a stop token was sampled (and kept), or the length was reached."""

MC_IDS = "mc"
"""Name of the student's Monte Carlo ids in a request for extra ids."""


ALL_POSITIONS = "all"
"""Request for the scores of every position."""

BATCH_TOKENS = 16384
"""Default tokens of one batch when sampling or scoring."""
PACK_LENGTH = 16384
"""Default tokens of one pack in training, prompts included."""


@dataclass(frozen=True, slots=True)
class Detail:
    """State inside a stage, from which its rate and its remaining time follow."""

    positions: int = 0
    """Response positions since the stage began."""
    part: str = ""
    """Text on the running work unit, such as `120/512 sequences`."""
    share: float = 0.0
    """Work on the next of `total` that is done, about: 0.5 is half a unit."""
    unit: str = ""
    """Noun of `done` and `total`, such as `bytes`, where the stage has no noun of its own."""
    brief: bool = False
    """True for a step of preparation, which is shown only while it takes long. Its total is 0
    where it is not known."""
    ended: bool = False
    """True for the last report of such a step."""


NO_DETAIL = Detail()


class Progress(Protocol):
    """Callback for the state of a stage; the engine itself never prints."""

    def __call__(self, stage: str, done: int, total: int, detail: Detail = NO_DETAIL, /) -> None:
        """Take the state of a stage: `done` of `total` units, packs, updates or sequences."""


def no_progress(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
    """Ignore progress."""


def stage_named(progress: Progress, name: str) -> Progress:
    """Return a progress that reports every stage under another name."""

    def named(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        progress(name, done, total, detail)

    return named


Report = Callable[[Detail], None]
"""Callback for the state of one work unit."""


def no_report(detail: Detail) -> None:
    """Ignore the state of a work unit."""


def unit_report(
    progress: Progress, stage: str, done: int, total: int, positions: int = 0
) -> Report:
    """Return the report of a work unit after `done` units with these positions."""

    def report(detail: Detail) -> None:
        part = detail.part and f"unit {done + 1}: {detail.part}"
        progress(
            stage, done, total, replace(detail, positions=positions + detail.positions, part=part)
        )

    return report


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt, already rendered and tokenised."""

    id: str
    token_ids: tuple[int, ...]
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the JSONL line."""


class SamplingParams(Section):
    """Sampling parameters: every field is explicit, and none is of generation_config.json."""

    n: Positive = Field(4, description="Responses per prompt.")
    temperature: float = Field(
        1.0, ge=0, description="Sampling temperature; 0 = greedy, for evaluation."
    )
    top_p: Share = Field(
        1.0, description="Nucleus that is sampled from. Below 1 the student sees fewer states."
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Sample from so many most likely ids; 0 = all. Not --student-topk.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Drop ids under this share of the most likely id's probability.",
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Divides the logits of ids already seen; 1 = off."
    )
    max_new_tokens: Positive = Field(
        512, description="Response tokens at most, stop token included."
    )

    def record(self) -> dict[str, Any]:
        """Return the fields of SamplingParams alone, for a store and a digest."""
        return {name: getattr(self, name) for name in SamplingParams.model_fields}

    def is_plain(self) -> bool:
        """Return True if samples come from the full distribution at temperature 1."""
        plain = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        return all(getattr(self, name) == value for name, value in plain.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """Identity of a model: weights, tokenizer and chat template."""

    name: str
    """Folder or hub id, as in the configuration."""
    path: Path
    """Local folder."""
    revision: str
    """Commit of a hub id; empty for a folder."""
    digest: str
    """sha256 of the weights; re-sharding the same weights does not change it."""
    tokenizer_digest: str
    template_digest: str
    n_vocab: int
    """Highest id of the tokenizer + 1; the head may be padded beyond it."""
    stop_ids: tuple[int, ...]
    version: int
    """Optimizer updates since the base weights; 0 for a plain model folder."""
    base_weights: str
    """Digest of the base weights, those of version 0."""

    def provenance(self) -> dict[str, Any]:
        """Return the record of this model in a segment, without local paths."""
        return {
            "name": self.name,
            "revision": self.revision,
            "weights": self.digest,
            "tokenizer": self.tokenizer_digest,
            "template": self.template_digest,
            "n_vocab": self.n_vocab,
            "stop_ids": list(self.stop_ids),
            "version": self.version,
            "base_weights": self.base_weights,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreParams:
    """Request for the entries of one position."""

    entry_kind: Literal["topp", "topk", "sampled"] = "topp"
    """Kept ids: the best ones up to a mass, the best k_max, or `draws` sampled ones."""
    top_p: float = 0.999
    """topp: the best ids are kept until their cumulative mass reaches this."""
    k_min: int = 16
    """Minimum number of ids, which makes TopK(q, k) exact for every k <= k_min."""
    k_max: int = 64
    """Maximum number of ids."""
    at_student: bool = True
    """Also return the log-probs at the ids of the student's stored top-k."""
    draws: int = 0
    """sampled: ids drawn per position, with replacement, from the scorer's distribution at
    temperature 1 (RS-KD, arXiv 2503.16870)."""
    seed: int = 0
    """sampled: the draws are a function of this seed and the rollouts alone."""

    def record(self) -> dict[str, Any]:
        """Return the fields under the names of the flags, for the provenance of a segment."""
        return {
            **{key: getattr(self, name) for key, name in _RECORDED.items()},
            "selection": _SELECTIONS[self.entry_kind],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ScoreParams":
        """Invert `record`; a key that is missing has its default. Raises ValueError for others."""
        fields = {_RECORDED.get(key, ""): value for key, value in record.items()}
        kinds: dict[Any, Any] = {recorded: kind for kind, recorded in _SELECTIONS.items()}
        if "" in fields or fields.get("entry_kind", "top-p") not in kinds:
            raise ValueError(f"keys {sorted(record)}, selection {fields.get('entry_kind')!r}")
        return cls(**fields | {"entry_kind": kinds[fields.get("entry_kind", "top-p")]})


_RECORDED = {
    "selection": "entry_kind",
    "teacher_top_p": "top_p",
    "teacher_topk_min": "k_min",
    "teacher_topk_max": "k_max",
    **{name: name for name in ("at_student", "draws", "seed")},
}
"""Key of the record -> field."""
_SELECTIONS = {"topp": "top-p", "topk": "top-k", "sampled": "sampled"}


@dataclass(frozen=True, kw_only=True, slots=True)
class IdLists:
    """Requested ids of every row, distinct within a row."""

    cnt: Array
    """[P] uint16."""
    ids: Array
    """[A] uint32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Scores of one model at the P rows of some rollouts; arrays are flat, rows ragged."""

    lp: Array
    """[P] float32, log-prob of the sampled token."""
    entropy: Array
    """[P] float32, full vocabulary, nats; a lower bound where `entropy_hi` is not None."""
    log_tail: Array
    """[P] float32, log of the mass outside the kept entries and the requested ids, from logits;
    -inf for no mass. With `entropy_hi`, log(1 - mass of all returned ids), an upper bound where
    that difference is below the resolution of the returned log-probs."""
    cnt: Array
    """[P] uint16, kept entries of each row."""
    ids: Array
    """[E] uint32, kept entries, best first, the lower id first among equals."""
    entry_lp: Array
    """[E] float32, their log-probs."""
    at_lp: Array | None = None
    """[A] float32, log-probs at the requested ids; None without such ids."""
    mult: Array | None = None
    """[E] uint16, draws of each entry; None for top-k or top-p entries."""
    entropy_hi: Array | None = None
    """[P] float32, upper bound of the entropy, nats, for a server that returns top-k ids only;
    None where `entropy` is exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedScores:
    """Stored scores of a model at the P rows of some rollouts. Each id of a row occurs once: either
    among the ids of the student's stored list, in the order of that list, or among the other ids,
    best first.

    The rank of an id is its index among all stored ids of its row, best first. The first `kept` ids
    are the model's own top ids: TopK(q, k) is exact for every k <= kept.
    """

    lp: Array
    """[P] float32, log-prob of the sampled token."""
    entropy: Array
    """[P] float32, full vocabulary, nats; a lower bound where `entropy_hi` is not None."""
    log_tail: Array
    """[P] float32, log of the mass outside all stored ids of the row."""
    kept: Array
    """[P] uint16."""
    s_cnt: Array
    """[P] uint16, ids of the student's list with a stored log-prob: all, if requested."""
    s_ids: Array
    """[S] uint32."""
    s_lp: Array
    """[S] float32, the model's log-probs at them."""
    s_rank: Array
    """[S] uint16."""
    cnt: Array
    """[P] uint16, the other ids."""
    ids: Array
    """[E] uint32."""
    entry_lp: Array
    """[E] float32."""
    rank: Array
    """[E] uint16."""
    mult: Array | None = None
    """[E] uint16, draws of each id; `kept` is then 0 everywhere."""
    entropy_hi: Array | None = None
    """[P] float32, upper bound of the entropy, nats, for a server that returns top-k ids only;
    None where `entropy` is exact."""
    scored: Array | None = None
    """[P] bool, rows with a score; the others have no id, and 0 for every value. None = all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Monte Carlo ids of P rows, drawn by the student with replacement from its full softmax at
    temperature 1: flat, rows ragged, distinct within a row, best first.
    """

    cnt: Array
    """[P] uint16, distinct ids of each row."""
    ids: Array
    """[E] uint32."""
    mult: Array
    """[E] uint16, draws of each id: the same sum in every row."""
    lp: Array
    """[E] float32, the student's log-probs at them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """One rollout unit: M prompts, N sequences, P positions, and the student's scores."""

    prompts: tuple[Prompt, ...]
    seq_prompt: Array
    """[N] uint32, index into prompts."""
    seq_off: Array
    """[N + 1] int64, sequence i has positions seq_off[i] : seq_off[i + 1]."""
    tokens: Array
    """[P] uint32, ids as sampled, never re-encoded text."""
    loss_mask: Array
    """[P] uint16, 1 = sampled by the student and trained on."""
    b_lp: Array
    """[P] float32, log-prob under the sampling distribution (tempered, truncated)."""
    finish: Array
    """[N] uint16, STOP or LENGTH."""
    version_start: Array
    """[N] int64, student version at the first token."""
    version_end: Array
    """[N] int64, student version at the last token."""
    student: Scores | None = None
    """The student's scores of its own rollouts (temperature 1, unfiltered); None before scoring."""
    draws: Draws | None = None
    """Monte Carlo ids of every row; None without them."""
    reward: Array | None = None
    """[N] float32 in [0, 1], reward of each response; None without a grader."""
    segment: str = ""
    """seg_id of the source segment; empty for new rollouts."""

    @property
    def positions(self) -> int:
        return len(self.tokens)

    def lengths(self) -> Array:
        """Return [N], the response tokens of each sequence."""
        return self.seq_off[1:] - self.seq_off[:-1]
