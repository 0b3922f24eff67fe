"""Run a tap as `logitcask tap` does until it listens, and print its peak memory and its modules.

python idle_tap.py URL FOLDER
"""

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

from logitcask.engine.backends.base import open_backend
from logitcask.engine.config.sections import StoreSection
from logitcask.engine.config.tap import Tap, TapConfig
from logitcask.engine.config.teacher import Teacher
from logitcask.engine.tap.serve import serve
from logitcask.engine.types import ModelRef


def known(*_: Any) -> ModelRef:
    """Return the identity for which a tap starts a process of its own."""
    mark = "sha256:" + "1" * 64
    return ModelRef(
        **{"name": "teacher", "path": Path(), "revision": "", "digest": mark, "version": 0},
        **{"tokenizer_digest": mark, "template_digest": mark, "base_weights": mark},
        **{"n_vocab": 40, "stop_ids": (1,)},
    )


def main(url: str, folder: str) -> None:
    """Start and end the tap."""
    open_backend("server")
    stop = threading.Event()

    def on_event(line: str) -> None:
        if line.startswith("listening on "):
            status = Path("/proc/self/status").read_text()
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)
            assert peak is not None
            found = {"peak_mb": int(peak[1]) / 1024, "modules": sorted(sys.modules)}
            print(json.dumps(found))
            stop.set()

    config = TapConfig(
        teacher=Teacher(model=url, name="teacher"),
        store=StoreSection(url=f"{folder}/store", rollouts="tap"),
        tap=Tap(port=0),
    )
    serve(config, stop=stop, on_event=on_event, call=known)


if __name__ == "__main__":
    main(*sys.argv[1:])
