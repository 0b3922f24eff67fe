"""Providers of the kernel benchmark: ours and plain torch; kernel_peers has the others.

Inputs that a peer needs in another form, a dense [T, V] target for example, are made before the
timing. `computes` names the results, which shows an unfair comparison. `loss` names the equal loss
of kernel_losses; only then is the gradient compared with float64.
"""

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from kernel_bars import STEPS
from kernel_best import closed_hidden, closed_live, closed_logits, gathered
from kernel_calls import (
    Make,
    dense_head,
    eager_logits,
    head_products,
    our_hidden,
    our_indexed,
    our_logits,
    our_topk,
    plain_topk,
)
from kernel_losses import Teacher
from kernel_shapes import Case
from kernel_train import trained

MANY_ROWS = 1 << 30
SOME_ROWS = 2048
"""Limit on a CPU of providers with a dense head, except the one that ours is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One implementation of a task."""

    name: str
    section: str
    task: str
    """One of kernel_limits.TASKS."""
    computes: str
    make: Make
    loss: str | None = None
    student_ids: bool = False
    """True if the support is the student's ids of sampling time."""
    ours: bool = False
    best: bool = False
    """True for the best plain torch of the task."""
    needs: str | None = None
    """Module that must be importable."""
    gpu_only: bool = False
    cpu_rows: int = MANY_ROWS
    """With more rows it runs on a CPU only if --providers names it, because it is slow."""

    def missing(self, device: torch.device, rows: int, is_named: bool) -> str | None:
        """Return the reason why it cannot run here; None if it can."""
        on_cpu = device.type == "cpu"
        if self.needs is not None and not _importable(self.needs):
            return f"not installed: {self.needs}"
        if self.gpu_only and on_cpu:
            return "needs a GPU"
        if on_cpu and rows > self.cpu_rows and not is_named:
            return f"slow on a CPU: --providers {self.name} runs it"
        return None

    def teacher(self, case: Case) -> Teacher:
        """Return the teacher's rows at the ids of its support."""
        return case.at_student if self.student_ids else case.teacher


def _importable(module: str) -> bool:
    module, _, attribute = module.partition(":")
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        return False
    return not attribute or hasattr(import_module(module), attribute)


ALL = "loss, gradients; entropy, live top-k, overlap ratio, masses"
BARE = "loss, gradients; no metrics"
UPDATE = "loss, gradients, as `train` runs them in an update without metrics"
MEASURED = f"the same with all metrics of 32 positions, one update in {STEPS}"
INDEXED = "logitcask.kernels.indexed_linear"


TAIL, KL, LIVE = "forward_kl_tail", "reverse_kl", "overlap"
from_logits = partial(Provider, section="logits", task="logits")
from_hidden = partial(Provider, section="hidden", task="hidden")
on_ids = partial(Provider, section="indexed", loss=KL)
indexed = partial(on_ids, ours=True, needs=INDEXED)
training = partial(on_ids, ours=True, needs="zarr")
with_head = partial(on_ids, cpu_rows=SOME_ROWS)
with_whole_head = partial(Provider, section="indexed", task="teacher", cpu_rows=SOME_ROWS)
top = partial(Provider, section="topk", task="topk")
PROVIDERS = [
    from_logits(name="ours", computes=ALL, make=our_logits(TAIL), loss=TAIL, ours=True),
    from_logits(
        name="closed",
        computes=f"{ALL}; closed form, rows that fit in a cache",
        make=closed_logits,
        loss=TAIL,
        best=True,
    ),
    from_logits(name="eager", computes=ALL, make=eager_logits(TAIL), loss=TAIL),
    from_logits(  # its gradient is not checked: the check's rows would be compiled again
        name="compile",
        computes=ALL,
        make=eager_logits(TAIL, compiled=True),
        cpu_rows=0,
    ),
    from_hidden(name="ours", computes=ALL, make=our_hidden(TAIL), loss=TAIL, ours=True),
    from_hidden(
        name="closed",
        computes=f"{ALL}; three products and the closed form",
        make=closed_hidden,
        loss=TAIL,
        best=True,
    ),
    from_hidden(name="eager", computes=ALL, make=dense_head(TAIL), loss=TAIL),
    from_hidden(name="products", computes="three products, no loss", make=head_products),
    indexed(name="ours-teacher", task="teacher", computes=BARE, make=our_indexed(KL)),
    indexed(
        name="ours-teacher-rows",
        task="teacher rows",
        computes=f"{BARE}; the head's gradient as rows",
        make=our_indexed(KL, rows=True),
    ),
    indexed(
        name="ours-teacher-frozen",
        task="teacher frozen",
        computes=f"{BARE}, none by the head",
        make=our_indexed(KL, frozen=True),
    ),
    indexed(
        name="ours-student",
        task="teacher",
        computes=f"{BARE}; support: the student's stored ids",
        make=our_indexed(KL, student_ids=True),
        student_ids=True,
    ),
    indexed(
        name="ours-live", task="live", computes=ALL, make=our_indexed(LIVE, live=True), loss=LIVE
    ),
    indexed(
        name="ours-live-frozen",
        task="live frozen",
        computes=f"{ALL}; none by the head",
        make=our_indexed(LIVE, live=True, frozen=True),
        loss=LIVE,
        cpu_rows=SOME_ROWS,
    ),
    with_head(
        name="ours-dense",
        task="teacher",
        computes=f"{ALL}; by linear_sparse_kl",
        make=our_hidden(KL),
        ours=True,
    ),
    with_head(
        name="dense",
        task="teacher",
        computes=f"{BARE}; log_softmax of whole rows",
        make=dense_head(KL, with_metrics=False),
    ),
    on_ids(
        name="dense-plain",
        task="teacher",
        computes=f"{BARE}; no log_softmax",
        make=dense_head(KL, with_metrics=False, softmax=False),
        cpu_rows=0,
    ),
    with_head(
        name="dense-frozen",
        task="teacher frozen",
        computes=f"{BARE}, none by the head; log_softmax of whole rows",
        make=dense_head(KL, with_metrics=False, frozen=True),
    ),
    with_head(name="dense-live", task="live", computes=ALL, make=dense_head(LIVE), loss=LIVE),
    on_ids(
        name="dense-live-frozen",
        task="live frozen",
        computes=f"{ALL}; none by the head",
        make=dense_head(LIVE, frozen=True),
        loss=LIVE,
        cpu_rows=0,
    ),
    on_ids(
        name="closed-live",
        task="live",
        computes=f"{ALL}; one product, then rows of the head gathered",
        make=closed_live(),
        loss=LIVE,
        best=True,
        cpu_rows=SOME_ROWS,
    ),
    on_ids(
        name="closed-live-frozen",
        task="live frozen",
        computes=f"{ALL}; none by the head",
        make=closed_live(frozen=True),
        loss=LIVE,
        best=True,
        cpu_rows=SOME_ROWS,
    ),
    on_ids(
        name="gathered",
        task="teacher",
        computes=f"{BARE}; rows of the head gathered, autograd",
        make=gathered(),
        best=True,
    ),
    on_ids(
        name="gathered-rows",
        task="teacher rows",
        computes=f"{BARE}; the head's gradient as rows, not summed by id",
        make=gathered(sparse=True),
        best=True,
    ),
    on_ids(
        name="gathered-frozen",
        task="teacher frozen",
        computes=f"{BARE}, none by the head",
        make=gathered(frozen=True),
        best=True,
    ),
    training(name="train", task="teacher", computes=UPDATE, make=trained()),
    training(name="train-metrics", task="teacher", computes=MEASURED, make=trained(measured=True)),
    training(
        name="train-frozen",
        task="teacher frozen",
        computes=f"{UPDATE}; none by the head",
        make=trained(frozen=True),
    ),
    training(
        name="train-frozen-metrics",
        task="teacher frozen",
        computes=f"{MEASURED}; none by the head",
        make=trained(frozen=True, measured=True),
    ),
    top(name="ours", computes="lowest id first among equals", make=our_topk, ours=True),
    top(name="torch", computes="any of equals", make=plain_topk, best=True),
]
