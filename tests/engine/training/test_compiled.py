"""Compiled layers: the gradients and the saved student of a run without them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_pre_hook

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models.load import load_student
from logitcask.engine.store import Store
from logitcask.engine.training import compiled
from logitcask.engine.training.arguments.passed import passed_fields
from logitcask.engine.training.compiled import compile_layers
from logitcask.engine.training.train import train
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_unit
from tests.engine.fitting import DENSE, make_case, relative

COMPILE = {"torch_compile": True}


def make(folder: Path) -> tuple[Store, ModelRef]:
    units = [make_unit(0, prompts=4, vocab=99, lengths=[30, 24, 17, 36, 9, 21, 5, 12])]
    return make_case(folder, units, hidden=16, layers=1)


def updates(
    case: tuple[Store, ModelRef], out: Path, lora: Lora, **args: Any
) -> tuple[list[torch.Tensor], list[int]]:
    """Train packs of unlike lengths; return the gradient and the compiled graphs of each update."""
    found: list[torch.Tensor] = []
    graphs: list[int] = []

    def step(optimizer: Any, *_: Any) -> None:
        every = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if len(every) > 1:  # not the trial of the optimizer
            found.append(torch.cat([g.flatten() for g in every]))
            graphs.append(counters["stats"]["unique_graphs"])

    counters.clear()
    hook = register_optimizer_step_pre_hook(step)
    try:
        train(
            case[0],
            model=case[1],
            teacher="big",
            objective=DENSE,
            settings=Train(
                learning_rate=1e-3, pack_length=90, gradient_checkpointing=True, args=args
            ),
            lora=lora,
            run=Run(out=out, device="cpu"),
        )
    finally:
        hook.remove()
    return found, graphs


@pytest.mark.parametrize(
    ("lora", "backend"),
    [(Lora(), "aot_eager"), (Lora(r=2), "eager")],
    ids=["whole", "adapters"],
)
def test_compiled_layers_have_the_gradients_of_others(
    tmp_path: Path, lora: Lora, backend: str
) -> None:
    """Without the code of inductor, whose compilation takes a minute."""
    case = make(tmp_path)
    args = COMPILE | {"torch_compile_backend": backend}
    expected, none = updates(case, tmp_path / "eager", lora)
    found, graphs = updates(case, tmp_path / "compiled", lora, **args)
    assert len(found) == len(expected) >= 2
    assert max(map(relative, found, expected)) < 1e-5
    assert set(none) == {0}
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, "a pack was compiled again"
    keys = [
        set(safe_open(tmp_path / name / "model.safetensors", "pt").keys())
        for name in ("eager", "compiled")
    ]
    assert keys[0] == keys[1]
    record = json.loads((tmp_path / "compiled" / "run.json").read_text())["settings"]
    assert record["args"] == args


def test_layers_that_do_not_compile_or_differ_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ref = make(tmp_path)
    with pytest.raises(ConfigError, match="Linear has no layer of transformers"):
        compile_layers(torch.nn.Linear(1, 1), {}, n_vocab=99, bf16=False)

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "TOLERANCE", {torch.float32: -1.0})
    for backend, message in ((failing, "does not run here.*no compiler"), ("eager", "nats off")):
        fields = {"torch_compile_backend": backend}
        with pytest.raises(ModelError, match=message):
            compile_layers(load_student(ref), fields, n_vocab=99, bf16=False)
    with pytest.raises(ConfigError, match="not proved with shards"):
        passed_fields(Train(args=COMPILE, sharding="fsdp2"), "run")
