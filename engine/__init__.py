"""What happens, in the data's order:

    prompts -> rollout -> store -> score -> store -> rows -> objective -> student -> next version

Read the files in that order. `rollout`, `score` and `training` never import each other: they meet
in the store. The names below are for a training loop of one's own; each is imported when it is
first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcask.engine.errors import LogitcaskError
    from logitcask.engine.heads import head_map
    from logitcask.engine.objectives import find_preset
    from logitcask.engine.rows.batches import batches, planned
    from logitcask.engine.store import open_store
    from logitcask.engine.training.facts import check_objective
    from logitcask.engine.training.row_loss import row_loss

__all__ = [
    "LogitcaskError",
    "batches",
    "check_objective",
    "find_preset",
    "head_map",
    "open_store",
    "planned",
    "row_loss",
]

_HOME = {
    "LogitcaskError": "errors",
    "head_map": "heads",
    "find_preset": "objectives",
    "batches": "rows.batches",
    "check_objective": "training.facts",
    "planned": "rows.batches",
    "open_store": "store",
    "row_loss": "training.row_loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
