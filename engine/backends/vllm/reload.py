"""Weights of another version in an open engine, and the proof that it computes with them.

vLLM can load weights in place and keep copies of old ones: on a CPU a packed copy of a tied head.
So its answers to a probe are compared, and only with those of the same program. Another program is
too far away: transformers in bfloat16 from float32 by up to 0.75 nats on this probe of
SmolLM2-135M, where an update at a learning rate of 1e-6 moves 0.0005 nats. The same program gives
the same answers to the last bits, and in bfloat16 any other weights move them by tenths.

1. After each load the probe has other answers than before.
2. After the loads 1, 2, 4, 8, ... of a backend a new engine of the same folder gives the same
   answers, to 1 % of that change, and takes the place of the other. Thus single loads are compared
   and ever longer chains of loads in one engine, at the cost of a few starts.

If the second fails, this and all later versions are opened in new engines.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.engine.backends.vllm.engine import Engine
from logitcask.engine.errors import ModelError
from logitcask.engine.types import Array

SHARE = 0.01
"""Largest difference from a new engine, in changes of the answers from version to version."""
FREE_KEYS = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}
"""Keys of config.json that an engine with a dtype of its own does not depend on."""


def load_in_place(engine: Engine, folder: Path, ids: list[int]) -> tuple[Array, float]:
    """Load the folder's weights; return (answers to the probe, their largest change).

    Raises ModelError for a load that fails or changes no answer.
    """
    before = engine.probe(ids)
    engine.reload(folder)
    after = engine.probe(ids)
    change = float(np.abs(after - before).max())
    if not change > 0:
        raise ModelError(
            f"vLLM {engine.version} gives the same answers to a probe after a load in place",
            hint="open a new engine",
        )
    return after, change


def is_compared(load: int) -> bool:
    """Return True for the loads, from 1, after which a new engine is compared: powers of two."""
    return load & (load - 1) == 0


def differs(engine: Engine, ids: list[int], answers: Array, change: float) -> str:
    """Return how far a new engine's answers are from those after a load in place, or ""."""
    share = float(np.abs(engine.probe(ids) - answers).max()) / change
    if share <= SHARE:
        return ""
    return (
        f"vLLM {engine.version} differs after a load in place from a new engine, on a probe by "
        f"{share:.0%} of the change"
    )


def config_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return which keys of config.json differ, or ""."""
    keys = (old.keys() | new.keys()) - FREE_KEYS
    other = sorted(key for key in keys if old.get(key) != new.get(key))
    return f"config.json has another {', '.join(other)}" if other else ""
