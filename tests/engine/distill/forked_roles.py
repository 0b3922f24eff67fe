"""Loops by `--runner processes`, without imports for each process: `python forked_roles.py`.

Each line on stdin is a list of words of `logitcask`. It runs in a process forked directly after the
imports, and so does each process that its supervisor starts. The exit code goes to stdout, and what
the command prints to the file that is the last word of the line.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch

from logitcask.cli.main import run
from logitcask.engine.workers import processes

MODULE = "logitcask.cli.main"


class Forked(subprocess.Popen[bytes]):
    """A `logitcask` in place of its `python -m logitcask.cli.main`."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdout: Any, stderr: Any, **_: Any
    ) -> None:
        self.returncode = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.environ.update(env)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        carry_out(list(argv[argv.index(MODULE) + 1 :]))

    def __del__(self, *_: Any) -> None:
        """Leave out what `Popen` does for its own pipes."""

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        while self.poll() is None:
            time.sleep(0.001)
        assert self.returncode is not None
        return int(self.returncode)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def carry_out(words: list[str]) -> None:
    """Run `logitcask WORDS` as the whole of this process."""
    code = 1
    try:
        code = run(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    # Before any fork: the imports of a process are those of this one.
    importlib.import_module("logitcask.engine.distill.roles")
    gc.freeze()  # accelerate collects twice a training, which would copy all pages of this process
    mock.patch.object(subprocess, "Popen", Forked).start()
    processes.BACKOFF_S = 0.02
    for line in sys.stdin:
        *words, output = json.loads(line)
        child = os.fork()
        if not child:
            for number in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            carry_out(words)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
