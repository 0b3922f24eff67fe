"""A real vLLM server in a separate process group, which can be killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.vllm.shim import with_shim

START_S = 600
"""Limit of a start: 26 to 59 s, and many times that on a busy machine."""
STOP_S = 120


def takes_ids_of_each_row() -> bool:
    """Return True from vLLM 0.32 on; 0.31 takes one list of ids for all rows."""
    from vllm import SamplingParams

    return "ndarray" in str(SamplingParams.__annotations__["prompt_logprob_token_ids"])


ids_of_each_row = pytest.mark.skipif(
    not takes_ids_of_each_row(), reason="this vLLM takes one list of ids for all rows"
)


class RealServer:
    """A server of a model folder as `teacher`, always on the same port, with extra ids of each row.

    Use sequences of at most 64 tokens, because its kernels are interpreted.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        """Prepare the start; `folder` gets the shim and the log."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "log"
        self._environment = with_shim(folder)
        self._environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model), "--served-model-name", "teacher"),
            *("--dtype", "float32", "--max-model-len", "256", "--max-logprobs", "128"),
            *("--enforce-eager", "--enable-scale-out", "--generation-config", "vllm"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it is healthy."""
        with self._log.open("a") as out:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        end = time.monotonic() + START_S
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > end:
                pytest.fail(self._log.read_text()[-4000:])
            time.sleep(0.5)

    def kill(self) -> None:
        """Kill the server and its engine process at once."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_S)

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False
