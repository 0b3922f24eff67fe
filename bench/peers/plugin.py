"""Plugin of pytest for the suites of other projects: our ops in the place of theirs, and outcomes.

run.py starts pytest with it; PEER names the suite, PEER_OUT the file of the outcomes, PEER_DEVICE
the device. On a CPU, sizes made for a GPU are replaced by the suite's own, and calls for the device
"cuda" make tensors of the CPU.
"""

import fnmatch
import json
import os
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import ours
import pytest
import suites
import torch
from torch.overrides import TorchFunctionMode

SUITE = suites.SUITES[os.environ["PEER"]]
OUT = Path(os.environ["PEER_OUT"])
ROOT = Path(__file__).resolve().parent
ON_CPU = os.environ["PEER_DEVICE"] == "cpu"


class StandIns(MetaPathFinder, Loader):
    """Finds empty modules for the missing packages of SUITE.stand_ins; last on sys.meta_path."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        absent = name.partition(".")[0] in SUITE.stand_ins
        return ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __name__=spec.name)

    def exec_module(self, module: Any) -> None:
        """Leave the module empty."""


class OnCpu(TorchFunctionMode):
    """Makes tensors of the CPU where the code names a GPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    if ON_CPU and SUITE.for_gpu:
        torch.cuda.is_available = lambda: True
        OnCpu().__enter__()
    sys.meta_path.append(StandIns())
    SUITE.put_in()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the sizes of a parametrization."""
    if not ON_CPU:
        return
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize" and mark.args[0] in SUITE.sizes:
            smaller = SUITE.sizes[mark.args[0]]
            marks[i] = pytest.mark.parametrize(mark.args[0], smaller, **mark.kwargs).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Finish the test modules, and leave out the cases without a meaning for us."""
    for module in {item.module.__name__: item.module for item in items}.values():
        SUITE.finish(module)
    kept = []
    for item in items:
        reasons = [why for pattern, why in SUITE.left_out.items() if _matches(item, pattern)]
        if reasons:
            _write(item.nodeid, "left out", reasons[0])
        else:
            kept.append(item)
    items[:] = kept


def _matches(item: pytest.Item, pattern: str) -> bool:
    name, *values = pattern.split(" ")
    found = getattr(item, "callspec", None)
    own = {f"{key}={value}" for key, value in found.params.items()} if found else set()
    return fnmatch.fnmatch(item.nodeid, name) and own.issuperset(values)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = ours.CALLS.total()
    yield
    item.user_properties.append(("ours", ours.CALLS.total() - before))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown" or (report.when == "setup" and report.outcome == "passed"):
        return
    file = Path(report.location[0])
    case = report.nodeid if report.nodeid.partition("::")[0] else file.name + report.nodeid
    if report.outcome == "passed":
        calls = dict(report.user_properties)["ours"]
        _write(case, *(("holds", "") if calls else ("left out", suites.NOT_REACHED)))
    elif report.outcome == "skipped":
        whose = "" if (ROOT / file.name).exists() else "skips itself: "
        _write(case, "left out", whose + _reason(report))
    else:
        _write(case, "fails", _reason(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(report.nodeid, "fails", f"cannot be imported: {str(report.longrepr).strip()[-300:]}")


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # file, line, reason of a skip
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().splitlines()[0][:300]


def _write(case: str, outcome: str, reason: str) -> None:
    with OUT.open("a") as file:
        file.write(json.dumps({"case": case, "outcome": outcome, "reason": reason}) + "\n")
