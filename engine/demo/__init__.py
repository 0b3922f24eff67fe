"""The demo: an arithmetic task, tiny models trained from scratch, and all stages on them."""

from logitcask.engine.demo.record import DemoResult
from logitcask.engine.demo.run import run_demo

__all__ = ["DemoResult", "run_demo"]
