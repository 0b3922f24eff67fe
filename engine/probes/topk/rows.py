"""The student that sampled, as a current student: its stored log-probs as input of the objectives.

So losses, gradients and metrics of a probe that reads the store alone are those of training, by the
same functions. The store has the student's log-probs at its own top ids and at the sampled token,
not at the other ids of the teacher: their probability is between 0 and a bound.

Shapes: C rows, S columns of Targets, K ids of the student's top-k.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from logitcask.engine.metrics.metrics import MetricInput, metric_input
from logitcask.engine.packing.batches import PlannedPacks
from logitcask.engine.packing.targets import Targets
from logitcask.engine.types import Detail, Progress, no_progress
from logitcask.kernels.objective_input import ObjectiveInput

REGIONS = (
    *("overlap", "student_only", "teacher_only", "non_overlap"),
    *("student", "teacher", "union"),
)
"""Sets of ids of the top-k S(p) of the student and S(q) of the teacher: both, one of them alone,
either alone, S(p), S(q), one or both."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """C rows that count in a loss, float64."""

    rows: Targets
    view: ObjectiveInput
    """Of the student that sampled; log_p is -inf where it is not stored."""
    unseen: Tensor
    """[C, S] bool, ids whose log p is not stored."""
    bound: Tensor
    """[C] the largest probability that such an id can have."""
    rest: Tensor
    """[C] the student's mass at all ids whose log p is not stored."""

    def at_k(self, k: int) -> MetricInput:
        """Return the input of the metrics at k, at most the top ids of the view."""
        return metric_input(self.view, self.rows, k)


def sampled_rows(
    packs: PlannedPacks, k: int, *, stage: str, progress: Progress = no_progress
) -> Iterator[SampledRows]:
    """Yield the rows of each pack that count in a loss; packs without one are left out.

    k: top ids of the view, stored for every row.
    """
    seen = 0
    for index in range(len(packs)):
        progress(stage, index, len(packs), Detail(seen))
        targets = packs.pack(index).targets
        packs.prefetch(range(index + 1, min(index + 2, len(packs))))
        counted = targets.at(torch.nonzero(targets.weight > 0)[:, 0])
        seen += len(counted)
        if len(counted):
            yield _sampled(counted, k)
    progress(stage, len(packs), len(packs), Detail(seen))


def region_masks(x: MetricInput) -> dict[str, Tensor]:
    """Return name of REGIONS -> [C, S] bool, both top-k at the k of each row."""
    student, teacher = x.topk_index < x.k[:, None], x.rows.q_rank < x.k[:, None]
    of = (
        *(student & teacher, student & ~teacher, teacher & ~student, student ^ teacher),
        *(student, teacher, student | teacher),
    )
    return dict(zip(REGIONS, of, strict=True))


def student_mass(each: SampledRows, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's mass on the ids in `mask` [C, S]: at least, and at most, each [C].

    Both are equal where every id has a stored log p.
    """
    least = torch.where(mask, each.view.log_p.exp(), 0.0).sum(-1)
    unseen = (mask & each.unseen).sum(-1)
    return least, least + torch.minimum(unseen * each.bound, torch.where(unseen > 0, each.rest, 0))


def teacher_mass(each: SampledRows, mask: Tensor) -> Tensor:
    """Return [C] the teacher's mass on the ids in `mask`."""
    return torch.where(mask, each.rows.q_log_p.double().exp(), 0.0).sum(-1)


def _sampled(rows: Targets, k: int) -> SampledRows:
    index = torch.arange(len(rows))
    log_p = rows.student_topk_logprobs.double()
    # Entries may be rounded; the sampled token's own value is stored in full precision.
    log_p[index, rows.token_col] = rows.student_logprobs.double()
    listed = log_p.masked_fill(~rows.in_student, torch.inf).amin(1).exp()
    rest = (1 - log_p.exp().sum(1)).clamp(min=0)
    view = ObjectiveInput(
        index=index,
        log_p=log_p,
        top_ids=rows.ids[:, :k],
        top_log_p=log_p[:, :k],
        entropy=rows.student_entropy.double(),
    )
    unseen = (rows.ids >= 0) & (log_p == -torch.inf) & ~rows.in_student
    return SampledRows(rows, view, unseen, torch.minimum(listed, rest), rest)
