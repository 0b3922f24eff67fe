"""Public names of the engine, in the order of the data:

    prompts -> rollout -> store -> score -> store -> packs -> objective -> student -> next version

`rollout`, `score` and `training` never import each other: they exchange data through the store.
Each name below is imported at its first use.
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
