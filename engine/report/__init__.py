"""The report of runs and stores: one page that holds everything, and the same page live."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcask.engine.report.build import build_report
    from logitcask.engine.report.notebook import show

__all__ = ["build_report", "show"]

_HOME = {"build_report": "build", "show": "notebook"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
