"""Jobs: the work of one stage on a store, divided into units that any worker can do."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from logitcask.engine.events import peak_memory
from logitcask.engine.store import Store
from logitcask.engine.types import Report

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkPlan(Generic[T]):
    """The units that are missing now."""

    units: Mapping[str, T]
    """unit_key -> input of the work; without units that may not begin yet."""
    done: int
    total: int
    """Units committed, and units planned so far."""
    first: Collection[str] = ()
    """Keys of units to take before the others."""
    may_shrink: bool = False
    """True where units that are done may be deleted, to be done again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Generic[T]):
    """A stage of the work on a store, as units that any worker can do."""

    stage: str
    store: Store
    plan: Callable[[Collection[str]], WorkPlan[T]]
    """plan(left_out) -> the missing units that may begin now. left_out: unit keys that no worker
    tries; the plan may hold them."""
    work: Callable[[str, T, Report], int]
    """work(key, unit, report) commits a unit and returns its positions; it raises Cancelled where
    it waited for others when the worker was stopped."""
    close: Callable[[], None] = lambda: None
    """Frees the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """Result of one look for a unit."""

    claimed: bool
    """False: no unit was free."""
    units: int
    """1, or 0 where the unit failed or another worker has committed it."""
    positions: int
    seconds: float
    """At work on the unit."""
    missing: int
    """Units of the plan without those left out: this one, and those of other workers."""
    left_out: int
    first_error: str
    """Error of one unit that is left out; empty if there is none."""
    done: int
    total: int
    may_shrink: bool
    """As in the plan."""

    @property
    def over(self) -> bool:
        """Return True where nothing is left to do but units that are left out."""
        done = self.done >= self.total and not self.may_shrink
        return not self.missing and (done or self.left_out > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkReport:
    """Counts and times of one worker."""

    units: int
    positions: int
    seconds: float
    """From the start of the worker to its end, waiting included."""
    positions_per_second: float
    """Per second at work, without waiting."""
    failed: int
    """Planned units that are left out, over all workers."""
    first_error: str
    """Error of one of them."""
    peak_memory_bytes: Mapping[str, int] = field(default_factory=peak_memory)
    """As of `events.peak_memory`."""
