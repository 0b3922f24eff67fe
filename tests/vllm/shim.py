"""The environment of vLLM on a CPU, and the shim that gives it there the runner of GPUs.

The second model runner, the only one that answers at ids of every row's own, needs Triton. Told
that Triton has a backend "cpu", and with its kernels interpreted, it works without a GPU: right,
and slow. Only ever for tests and benchmarks.
"""

import os
from pathlib import Path

VLLM_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""A GiB is all the cache that a tiny model can fill; without a compiler there is nothing to
compile."""
ENVIRONMENT = {**os.environ, **VLLM_ON_CPU}

SHIM = '''
import importlib.util, os, sys

if os.environ.get("TRITON_INTERPRET") == "1":

    class Finder:
        """Adds a backend "cpu" to Triton's, which vLLM looks for before it uses Triton."""

        def find_spec(self, name, path=None, target=None):
            if name != "triton.backends":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
                module.backends["cpu"] = type("Cpu", (), {"driver": driver, "compiler": None})

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
'''


def with_shim(folder: Path) -> dict[str, str]:
    """An environment whose Python processes have the second runner."""
    (folder / "sitecustomize.py").write_text(SHIM)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": path}
    return {**os.environ, **VLLM_ON_CPU, **told}
