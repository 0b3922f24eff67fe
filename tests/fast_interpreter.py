"""A faster Triton interpreter, with the same results.

The interpreter replaces the functions of triton.language at each call of a jit function, also in a
kernel, where they are replaced already. That takes half of the time of interpreted kernels.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """Replace the functions of triton.language once per kernel, and not at the calls inside it."""
    patch = interpreter._patch_lang

    @cache
    def modules(function: Callable[..., Any]) -> list[ModuleType]:
        """Return the modules of the language that the function can see."""
        return [module for module in (tl, tl.core) if module in function.__globals__.values()]

    def patch_missing(function: Callable[..., Any]) -> Any:
        if all(module.static_print is print for module in modules(function)):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_missing
