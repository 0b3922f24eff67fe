"""Two processes make the same update as one process with the same rows."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logitcask.engine.config.sections import Run
from logitcask.engine.errors import IdentityError
from logitcask.engine.packing.source import PackSource
from logitcask.engine.training.provenance.ledger import read_lines
from logitcask.engine.training.train import train
from tests.engine.cached import make_unit
from tests.engine.fitting import REVERSE, ListPacks, flat, make_case, make_trainer, relative
from tests.engine.tiny import make_model
from tests.engine.training.ddp_worker import OBJECTIVES, SEQUENCES, SETTINGS, eval_plan, held_out

TESTS = Path(__file__).resolve().parents[2]


def on_two_processes(
    folder: Path,
    case: Path,
    worker: str = "ddp_worker.py",
    killed: tuple[int, ...] = (),
    packages: str = "",
) -> None:
    """Run a worker as torchrun would, without its agent.

    killed: ranks that a signal ends; packages: a folder of more packages.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Only the tests: with the whole tree on the path transformers would find a package `kernels`.
    (folder / "path").mkdir()
    (folder / "path" / "tests").symlink_to(TESTS)
    env = {
        **os.environ,
        "PYTHONPATH": f"{folder / 'path'}:{packages}:{os.environ.get('PYTHONPATH', '')}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        str(TESTS / "engine" / "training" / worker),
        str(case),
        str(folder),
    ]
    workers = [
        subprocess.Popen(
            command,
            env={**env, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for rank, process in enumerate(workers):
            output, _ = process.communicate(timeout=600)
            assert process.returncode == (-9 if rank in killed else 0), output
    finally:
        for process in workers:
            process.kill()


def lines(out: Path, key: str = "loss") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    units = [make_unit(i, prompts=3, vocab=99, lengths=[12, 3, 1, 9, 5, 17]) for i in range(2)]
    store, model = make_case(tmp_path / "case", units)
    out = tmp_path / "out"
    out.mkdir()
    on_two_processes(out, tmp_path / "case")

    source = PackSource(store, store.head(), "main", "big")
    rows = [source.pack(np.array([[0, s] for s in row])) for row in SEQUENCES]
    for which, objective in OBJECTIVES.items():
        trainer, gradients = make_trainer(
            make_model().double(),
            ListPacks(rows, source),
            tmp_path / which,
            objective=objective,
            accumulation=4,
        )
        trainer.train()
        expected, log = flat(gradients.updates[0]), trainer.state.log_history[0]
        found = [torch.load(out / f"{which}{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert torch.equal(found[0]["grad"], found[1]["grad"]), "gradients are averaged"
        assert relative(found[0]["grad"], expected) < 1e-6, "and are those of the whole batch"
        for name in ("loss", "overlap/ratio", "cache/coverage", "progress/positions"):
            assert found[0]["log"][name] == pytest.approx(log[name], rel=1e-6), name

    # A whole run: 2 processes x accumulation 2 is the run of one process with accumulation 4.
    run = partial(train, store, model=model, teacher="big", objective=REVERSE, settings=SETTINGS)
    run = partial(run, evaluation=eval_plan(model), held_out=held_out(store))
    alone = SETTINGS.model_copy(update={"gradient_accumulation_steps": 4})
    report = run(run=Run(out=tmp_path / "alone", device="cpu"), settings=alone)
    ours, theirs = (load_file(p / "model.safetensors") for p in (out / "run", tmp_path / "alone"))
    assert all(torch.allclose(ours[n], theirs[n], rtol=0, atol=1e-5) for n in theirs)
    both = zip(lines(out / "run"), lines(tmp_path / "alone"), strict=True)
    for mine, other in both:
        assert mine["progress/positions"] == other["progress/positions"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert report.updates == len(lines(out / "run")) == 2
    ledgers = [read_lines(p / "ledger.jsonl") for p in (out / "run", tmp_path / "alone")]
    for mine, other in zip(*ledgers, strict=True):
        assert mine.pop("drift", 0.0) == pytest.approx(other.pop("drift", 0.0), abs=1e-4)
        assert mine == other, "segments, rows and ages of both processes"
    evaluated = [lines(p, "eval/n") for p in (out / "run", tmp_path / "alone")]
    for mine, other in zip(*evaluated, strict=True):
        for name in ("progress/step", "eval/avg_at_n", "eval/accuracy", "eval/mean_length"):
            assert mine[name] == pytest.approx(other[name]), name
        assert mine["eval/rows"] == other["eval/rows"] == 2 * 47
        for name in ("eval/loss", "eval/overlap/ratio", "eval/cache/coverage"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), name
    assert len(evaluated[0]) == 2
    with pytest.raises(IdentityError, match="rows_per_update = 4, not 2"):
        run(run=Run(out=out / "run", device="cpu"))
