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
    from logitcask.engine.models.logit_transform import logit_transform_of
    from logitcask.engine.objectives import parse_objective
    from logitcask.engine.packing.batches import batches, planned
    from logitcask.engine.store import open_store
    from logitcask.engine.training.cache_info import check_objective
    from logitcask.engine.training.pack_loss import pack_loss

__all__ = [
    "LogitcaskError",
    "batches",
    "check_objective",
    "logit_transform_of",
    "open_store",
    "pack_loss",
    "parse_objective",
    "planned",
]

_HOME = {
    "LogitcaskError": "errors",
    "logit_transform_of": "models.logit_transform",
    "parse_objective": "objectives",
    "batches": "packing.batches",
    "check_objective": "training.cache_info",
    "planned": "packing.batches",
    "open_store": "store",
    "pack_loss": "training.pack_loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
