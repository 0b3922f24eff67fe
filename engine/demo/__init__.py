"""The demo: a task of our own, tiny models made from nothing, and the real stages on them.

task.py      the problems, their splits, who verifies an answer
models.py    tokenizer, models with random weights, accuracy
pretrain.py  supervised learning until an examination says enough
record.py    what a folder has made; the result
run.py       run_demo
"""

from logitcask.engine.demo.record import DemoResult
from logitcask.engine.demo.run import run_demo

__all__ = ["DemoResult", "run_demo"]
