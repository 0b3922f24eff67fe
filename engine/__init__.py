"""What happens, in the data's order:

    prompts -> rollout -> store -> score -> store -> batches -> objective -> student -> next version

Read the files in that order. `rollout`, `score` and `train` never import each other: they meet in
the store. The names below are enough for a training loop of one's own; they are imported when they
are first used, because torch is slow to load and not every caller needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcask.engine.batches import batches
    from logitcask.engine.objectives import find_preset, live_k, row_objective
    from logitcask.engine.store import open_store

_HOMES = {
    "batches": "logitcask.engine.batches",
    "find_preset": "logitcask.engine.objectives",
    "live_k": "logitcask.engine.objectives",
    "open_store": "logitcask.engine.store",
    "row_objective": "logitcask.engine.objectives",
}

__all__ = ["batches", "find_preset", "live_k", "open_store", "row_objective"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
