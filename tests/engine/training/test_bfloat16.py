"""Training that computes in bfloat16 on a CPU."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.training.train import train
from tests.engine.cached import make_unit
from tests.engine.fitting import REVERSE, make_case
from tests.engine.training.test_damaged_run import Stopped, stop_after


def test_a_run_in_bfloat16_resumes_bit_for_bit(tmp_path: Path) -> None:
    units = [make_unit(i, prompts=2, vocab=99, lengths=[30, 24, 17, 36]) for i in range(2)]
    store, model = make_case(tmp_path, units, hidden=64, layers=1)
    settings = Train(learning_rate=1e-3, pack_length=96, save_steps=1)

    def saved(name: str, stop: int = 0) -> bytes:
        run = Run(out=tmp_path / name, device="cpu", dtype="bfloat16")
        fields = {"model": model, "run": run, "teacher": "big", "objective": REVERSE}
        if stop:
            with pytest.raises(Stopped):
                train(store, settings=settings, progress=stop_after(stop), **fields)
        report = train(store, settings=settings, **fields)
        assert (report.resumed_at > 0) == bool(stop)
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert saved("stopped", stop=2) == saved("whole")
    exact = Run(out=tmp_path / "exact", device="cpu", dtype="float32")
    train(store, settings=settings, model=model, run=exact, teacher="big", objective=REVERSE)
    half, full = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "exact"))
    assert any((half[name] != full[name]).any() for name in half), "it computed in bfloat16"
