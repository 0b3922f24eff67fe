"""Trainings with DeepSpeed's ZeRO-3: the updates, the numbers and the folder of one process."""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError
from tests.conftest import DEEPSPEED
from tests.engine.cached import make_unit
from tests.engine.fitting import make_case
from tests.engine.training.sharding_worker import (
    Stopped,
    Watch,
    eval_plan,
    stop_after,
    watched,
)
from tests.engine.training.test_sharding import (
    ALONE,
    GRADED,
    arguments,
    flat,
    generated,
    largest_difference,
)
from tests.engine.training.test_train_ddp import lines, on_two_processes
from tests.engine.training.zero3_worker import CLIPPED, STILL

WEIGHTS = "model.safetensors"
PROJECTIONS = [f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")]
"""Layers with adapters."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on a CPU")


class Cases(NamedTuple):
    folder: Path
    alone: dict[str, Watch]
    """Of one process, by case."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("zero3")
    units = [make_unit(i, prompts=3, vocab=99, lengths=[12, 3, 1, 9, 5, 17]) for i in range(2)]
    for name in ("tied", "untied"):
        make_case(folder / name, units, tie=name == "tied")
    with suppress(Stopped):
        watched(folder / "untied", "grown", settings=ALONE | CLIPPED, progress=stop_after(3))
    on_two_processes(folder, folder, worker="zero3_worker.py", killed=(0,), packages=str(DEEPSPEED))
    plan = eval_plan(folder / "tied")
    alone = {
        name: watched(folder / name, "alone", settings=ALONE | change, evaluation=evaluation)[1]
        for name, change, evaluation in (("tied", {}, plan), ("untied", CLIPPED, None))
    }
    alone["lora"] = watched(folder / "tied", "alone-lora", settings=ALONE, lora=Lora(r=2))[1]
    return Cases(folder, alone)


def gaps(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    """Return the relative difference of the gradients of each update."""
    assert all(a.keys() == b.keys() for a, b in zip(ours, theirs, strict=True))
    pairs = [(flat(a), flat(b)) for a, b in zip(ours, theirs, strict=True)]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def saved(folder: Path, out: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{out}-{rank}.pt", weights_only=True)
    return found


@pytest.mark.needs("deepspeed")
def test_two_processes_equal_one(cases: Cases) -> None:
    folder = cases.folder / "tied"
    for rank in (0, 1):
        found = saved(folder, "zero3", rank)
        # A weight that is tied, and the norms, are whole until a step frees them.
        assert set(found["kinds"]) == {
            "AVAILABLE True",
            "NOT_AVAILABLE False",
            "NOT_AVAILABLE True",
        }
        assert max(gaps(found["gradients"], cases.alone["tied"].updates)) < 1e-5
    assert largest_difference(folder / "zero3", folder / "alone") < 1e-6
    assert generated(folder / "zero3") == generated(folder / "alone")
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / "zero3" / file).read_text() == (folder / "alone" / file).read_text()
    for mine, other in zip(lines(folder / "zero3"), lines(folder / "alone"), strict=True):
        for key in ("train/changed_share", "progress/positions", "progress/step"):
            assert mine[key] == other[key]
        for key in ("loss", "train/grad_norm", "overlap/ratio", "entropy/student"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4)
    held_out = [lines(folder / each, "eval/loss") for each in ("zero3", "alone")]
    for mine, other in zip(*held_out, strict=True):
        assert mine["eval/rows"] == other["eval/rows"] == 2 * 47
        assert mine["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-4)
        assert all(mine[each] == other[each] for each in GRADED)


@pytest.mark.needs("deepspeed", "peft")
def test_adapters_in_bfloat16_are_saved_on_the_weights_of_the_folder(cases: Cases) -> None:
    folder = cases.folder / "tied"
    for rank in (0, 1):
        found = saved(folder, "lora", rank)
        assert max(gaps(found["gradients"], cases.alone["lora"].updates)) < 0.05
    ours, theirs = (load_file(folder / out / WEIGHTS) for out in ("lora", "student"))
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert {name.split(".")[-2] for name in changed} == set(PROJECTIONS), "others are not rounded"
    assert len(lines(folder / "lora", "eval/accuracy")) == 2
    for mine, other in zip(lines(folder / "lora"), lines(folder / "alone-lora"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.01)
        # A loss in bfloat16 has eight bits.
        assert torch.tensor(mine["loss"]).bfloat16().item() != mine["loss"]


@pytest.mark.needs("deepspeed")
def test_one_process_resumes_with_the_same_losses(cases: Cases) -> None:
    folder = cases.folder / "untied"
    assert (folder / "moved" / "checkpoints" / "checkpoint-2").is_dir()
    assert not list((folder / "moved" / "checkpoints").rglob("*.bin"))
    for rank in (0, 1):
        # Of one process they are clipped already.
        for ours, theirs in zip(
            saved(folder, "moved", rank)["gradients"], cases.alone["untied"].updates, strict=True
        ):
            factor = CLIPPED["max_grad_norm"] / flat(ours).norm()
            assert gaps([{"": flat(ours) * factor}], [{"": flat(theirs)}])[0] < 1e-5
    report, _ = watched(folder, "moved", settings=ALONE | CLIPPED)
    assert report.resumed_at == 2
    for mine, other in zip(lines(folder / "moved"), lines(folder / "alone"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["train/lr"] == other["train/lr"]
    assert largest_difference(folder / "moved", folder / "alone") < 1e-6


@pytest.mark.needs("deepspeed")
def test_two_processes_resume_a_run_of_one(cases: Cases) -> None:
    folder = cases.folder / "untied"
    assert len(saved(folder, "grown", 0)["gradients"]) == 1, "update 3 alone"
    for mine, other in zip(lines(folder / "grown"), lines(folder / "alone"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["train/lr"] == other["train/lr"]
    assert largest_difference(folder / "grown", folder / "alone") < 1e-6


@pytest.mark.needs("deepspeed")
def test_a_run_that_is_killed_before_its_save_is_finished(cases: Cases) -> None:
    folder = cases.folder / "tied"
    assert "the student is not saved" in (cases.folder / "killed-1.txt").read_text()
    assert not (folder / "killed" / "logitcask.json").exists()
    settings = ALONE | STILL["settings"]
    report, watch = watched(folder, "killed", settings=settings, dtype=STILL["dtype"])
    assert (report.resumed_at, watch.updates) == (1, [])
    # The update in bfloat16 began with the float32 weights.
    assert largest_difference(folder / "killed", folder / "student") < 1e-8


@pytest.mark.needs("deepspeed")
def test_an_update_that_is_skipped_ends_the_run(cases: Cases) -> None:
    for rank in (0, 1):
        text = (cases.folder / f"broken-{rank}.txt").read_text()
        assert text.startswith("update 2: the gradients are not finite")


# What is refused.


def test_a_missing_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed\npip install .*deepspeed"):
        arguments(tmp_path, sharding="zero3")
