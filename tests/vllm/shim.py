"""The environment of vLLM on a CPU, and a shim that enables its GPU model runner there.

The second model runner, the only one that supports extra ids of each row, needs Triton. With a
backend "cpu" registered in Triton and with interpreted kernels it works without a GPU: exact, but
slow. Use it only for tests and benchmarks.
"""

import os
import shutil
from importlib.metadata import distributions, version
from pathlib import Path

VLLM_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""A tiny model fills at most 1 GiB of cache; compilation is off."""
ENVIRONMENT = {**os.environ, **VLLM_ON_CPU}

SHIM = """
import importlib.util, os, sys


def add_cpu(module):
    "Add a backend cpu to those of Triton, which vLLM checks."
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    module.backends["cpu"] = type("Cpu", (), {"driver": driver, "compiler": None})


def patch_once(module):
    import fast_interpreter

    fast_interpreter.patch_language_once()


CHANGES = {"triton.backends": add_cpu, "triton.runtime.interpreter": patch_once}


class Finder:
    "A finder that changes modules directly after their import."

    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("TRITON_INTERPRET") == "1":
    sys.meta_path.insert(0, Finder())
"""


def with_shim(folder: Path) -> dict[str, str]:
    """Return an environment whose Python processes use the second runner."""
    (folder / "sitecustomize.py").write_text(SHIM)
    shutil.copy(Path(__file__).parents[1] / "fast_interpreter.py", folder)
    # vLLM 0.31 asks for the distribution "vllm", and disables Triton if it is called vllm-cpu.
    if not list(distributions(name="vllm")):
        info = folder / "vllm.dist-info"
        info.mkdir(exist_ok=True)
        lines = ("Metadata-Version: 2.1", "Name: vllm", f"Version: {version('vllm-cpu')}+cpu", "")
        (info / "METADATA").write_text("\n".join(lines))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": path}
    return {**os.environ, **VLLM_ON_CPU, **variables}
