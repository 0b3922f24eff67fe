"""Sharded trainings: the updates, the numbers and the folder of one process."""

import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError, IntegrityError, ModelError
from logitcask.engine.training.provenance.ledger import read_lines
from logitcask.engine.training.run_dir.shards import _opened, load_weights
from logitcask.engine.training.settings import training_arguments
from logitcask.engine.training.sharding.student import check_passes
from logitcask.engine.training.sharding.trainer import ShardCheck
from tests.engine.cached import make_unit
from tests.engine.fitting import make_case
from tests.engine.training.sharding_worker import (
    Stopped,
    Watch,
    eval_plan,
    stop_after,
    watched,
)
from tests.engine.training.test_train_ddp import lines, on_two_processes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on a CPU")

ALONE = {"gradient_accumulation_steps": 4, "sharding": "none"}
"""One process with as many packs in an update."""


GRADED = ("eval/accuracy", "eval/avg_at_n", "eval/mean_length", "eval/stopped_share")
"""Entries of metrics.jsonl of sampled responses."""


class Cases(NamedTuple):
    folder: Path
    alone: dict[str, Watch]
    """Of one process, by case."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    folder = tmp_path_factory.mktemp("sharding")
    units = [make_unit(i, prompts=3, vocab=99, lengths=[12, 3, 1, 9, 5, 17]) for i in range(2)]
    for name in ("tied", "untied"):
        make_case(folder / name, units, tie=name == "tied")
    for name, out, lora in (("untied", "grown", Lora()), ("tied", "grown-lora", Lora(r=2))):
        with suppress(Stopped):
            watched(folder / name, out, settings=ALONE, lora=lora, progress=stop_after(3))
    on_two_processes(folder, folder, worker="sharding_worker.py", killed=(0,))
    alone = {}
    for name in ("tied", "untied"):
        plan = eval_plan(folder / "tied") if name == "tied" else None
        alone[name] = watched(folder / name, "alone", settings=ALONE, evaluation=plan)[1]
    alone["lora"] = watched(folder / "tied", "alone-lora", settings=ALONE, lora=Lora(r=2))[1]
    return Cases(folder, alone)


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def largest_difference(ours: Path, theirs: Path) -> float:
    """Return that of any weight of two folders, which must hold the same tensors."""
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def generated(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    found: list[int] = model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    return found


@pytest.mark.parametrize(
    ("name", "out", "alone"),
    [
        ("tied", "fsdp2", "alone"),
        ("untied", "fsdp2", "alone"),
        pytest.param("tied", "lora", "alone-lora", marks=pytest.mark.needs("peft")),
    ],
)
def test_two_sharded_processes_equal_one(cases: Cases, name: str, out: str, alone: str) -> None:
    folder = cases.folder / name
    expected = cases.alone["lora" if out == "lora" else name].updates
    for rank in (0, 1):
        found: dict[str, Any] = torch.load(folder / f"{out}-{rank}.pt", weights_only=True)
        assert found["kinds"] == ["DTensor"], "every parameter is a shard"
        for ours, theirs in zip(found["gradients"][:2], expected, strict=False):
            assert ours.keys() == theirs.keys()
            gap = (flat(ours) - flat(theirs)).norm() / flat(theirs).norm()
            assert gap < 1e-5
    assert largest_difference(folder / out, folder / alone) < 1e-6
    assert generated(folder / out) == generated(folder / alone)
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / out / file).read_text() == (folder / alone / file).read_text()
    ledgers = [read_lines(folder / each / "ledger.jsonl") for each in (out, alone)]
    drifts = [[line.pop("drift", 0.0) for line in ledger] for ledger in ledgers]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-2, abs=1e-4)
    assert ledgers[0] == ledgers[1]
    both = zip(lines(folder / out), lines(folder / alone), strict=True)
    for mine, other in both:
        for key in ("train/changed_share", "progress/positions", "progress/step"):
            assert mine[key] == other[key]
        for key in ("loss", "train/grad_norm", "overlap/ratio", "entropy/student"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4)
    held_out = [lines(folder / each, "eval/loss") for each in (out, alone)]
    for mine, other in zip(*held_out, strict=True):
        assert mine["eval/rows"] == other["eval/rows"] == 2 * 47
        assert mine["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-4)
    assert [line["progress/step"] for line in held_out[0]] == [0, 3]
    graded = [lines(folder / each, "eval/accuracy") for each in (out, alone)]
    assert len(graded[0]) == (2 if (name, out) == ("tied", "fsdp2") else 0)
    for mine, other in zip(graded[0], graded[1] if graded[0] else [], strict=True):
        assert all(mine[each] == other[each] for each in GRADED)


def test_bfloat16_sums_gradients_and_losses_in_float32(cases: Cases) -> None:
    found = lines(cases.folder / "tied" / "half")
    for mine, other in zip(found, lines(cases.folder / "tied" / "alone"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=0.01)
        # A loss in bfloat16 has eight bits.
        assert torch.tensor(mine["loss"]).bfloat16().item() != mine["loss"]
    saved = load_file(cases.folder / "tied" / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_one_process_resumes_a_sharded_run_with_the_same_losses(cases: Cases) -> None:
    folder = cases.folder / "untied"
    assert (folder / "moved" / "checkpoints" / "checkpoint-2").is_dir()
    report, _ = watched(folder, "moved", settings=ALONE)
    assert report.resumed_at == 2
    for mine, other in zip(lines(folder / "moved"), lines(folder / "alone"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["train/lr"] == other["train/lr"]
    assert largest_difference(folder / "moved", folder / "alone") < 1e-6


@pytest.mark.parametrize(
    ("name", "out", "alone"),
    [
        ("untied", "grown", "alone"),
        pytest.param("tied", "grown-lora", "alone-lora", marks=pytest.mark.needs("peft")),
    ],
)
def test_two_sharded_processes_resume_a_run_of_one(
    cases: Cases, name: str, out: str, alone: str
) -> None:
    folder = cases.folder / name
    for rank in (0, 1):
        found: dict[str, Any] = torch.load(folder / f"{out}-{rank}.pt", weights_only=True)
        assert found["kinds"] == ["DTensor"]
        assert len(found["gradients"]) == 1, "update 3 alone"
    for mine, other in zip(lines(folder / out), lines(folder / alone), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["train/lr"] == other["train/lr"]
    assert largest_difference(folder / out, folder / alone) < 1e-6


def test_a_failed_save_is_finished_by_the_command_of_its_message(cases: Cases) -> None:
    for rank in (0, 1):
        cause, hint = (cases.folder / f"full-{rank}.txt").read_text().splitlines()
        assert cause.startswith("the 3 updates are done, and the student is not saved: cannot wri")
        assert "No space left on device" in cause
        assert "torchrun --nnodes 1 --nproc-per-node 2" in hint
        assert "sharding_worker.py" in hint
    folder = cases.folder / "untied"
    assert largest_difference(folder / "again", folder / "alone") < 1e-6
    assert not (folder / "again" / "checkpoints").exists()


def test_a_run_that_is_killed_before_its_save_is_finished(cases: Cases) -> None:
    folder = cases.folder / "tied"
    assert not (cases.folder / "killed-0.txt").exists()
    assert "the student is not saved" in (cases.folder / "killed-1.txt").read_text()
    assert not (folder / "killed" / "logitcask.json").exists()
    report, watch = watched(folder, "killed", settings=ALONE)
    assert (report.resumed_at, watch.updates) == (3, [])
    assert largest_difference(folder / "killed", folder / "alone") < 1e-6


# The rows of a checkpoint.


def test_any_number_of_processes_reads_the_rows_of_any_other(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 2))
    rows = {f"weight/{name}": p.detach().clone() for name, p in model.named_parameters()}
    for rank in range(3):
        parts = {key: value.chunk(3)[rank] for key, value in rows.items() if len(value) > rank}
        parts = {key: part.contiguous() for key, part in parts.items()}
        first = {key: rank * -(-len(rows[key]) // 3) for key in parts}
        file = tmp_path / f"shard-{rank:05d}.safetensors"
        save_file(parts, file, metadata={"first_row": json.dumps(first)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(tmp_path, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, rows[f"weight/{name}"])
    # ZeRO-3 divides 7 x 3 and 2 x 7 elements in three, in the middle of a row.
    for rank in range(3):
        cut = {key: torch.tensor_split(value.flatten(), 3)[rank] for key, value in rows.items()}
        first = {
            key: sum(len(p) for p in torch.tensor_split(value.flatten(), 3)[:rank])
            for key, value in rows.items()
        }
        (tmp_path / "flat").mkdir(exist_ok=True)
        file = tmp_path / "flat" / f"shard-{rank:05d}.safetensors"
        save_file(
            {key: part.clone() for key, part in cut.items()},
            file,
            metadata={"first_row": json.dumps(first)},
        )
    for folder in (tmp_path, tmp_path / "flat"):
        with _opened(folder, model) as opened:
            key = "weight/0.weight"
            flat_part = opened.read(key, 5, torch.empty(9))
            assert torch.equal(flat_part, rows[key].flatten()[5:14])
            assert torch.equal(opened.read(key, 2, torch.empty(3, 3)), rows[key][2:5])
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"it holds 4 of 7 rows of weight/0\.weight"):
        load_weights(tmp_path, model)
    (tmp_path / "shard-00002.safetensors").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"shard-00002\.safetensors"):
        load_weights(tmp_path, model)


# What is refused.


def test_students_with_unequal_passes_are_refused() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    config: Any = SimpleNamespace(rope_parameters=rope)
    config.get_text_config = lambda: config
    check_passes(config, 64)
    with pytest.raises(ConfigError, match="has 65 tokens, and beyond 64 the LongRoPE"):
        check_passes(config, 65)


def test_parameters_that_stay_whole_are_an_error() -> None:
    model = torch.nn.BatchNorm1d(3)
    saved = set(model.state_dict())
    check = ShardCheck(model)
    assert set(model.state_dict()) == {"weight", "bias"}, "accelerate would shard the buffers"
    nothing: Any = None
    with pytest.raises(ModelError, match="was not applied: 2 of 2 parameters, such as weight, are"):
        check.on_train_begin(nothing, nothing, nothing, model=model)
    assert set(model.state_dict()) == saved


def arguments(tmp_path: Path, **change: Any) -> Any:
    return training_arguments(Train(**change), Run(out=tmp_path, device="cpu"))


@pytest.mark.parametrize(
    ("variables", "change", "cause"),
    [
        ({}, {"sharding": "fsdp2"}, "one process has nothing to shard"),
        ({}, {"cpu_offload": True}, "by FSDP2 alone"),
        ({}, {"sharding": "zero3"}, "one process has nothing to shard"),
        ({"WORLD_SIZE": "2"}, {"sharding": "zero3", "cpu_offload": True}, "by FSDP2 alone"),
        ({"WORLD_SIZE": "2"}, {"sharding": "fsdp2", "cpu_offload": True}, "on a CPU"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "train.sharding = none"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"sharding": "fsdp2"}, "ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "train.sharding = none"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"sharding": "zero3"}, "zero3"),
        ({"FSDP_VERSION": "1"}, {"sharding": "fsdp2"}, "FSDP_VERSION = 1"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {"sharding": "fsdp2"}, "FSDP_OFFLOAD_PARAMS = true"),
    ],
)
def test_sharding_against_the_environment_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    change: dict[str, Any],
    cause: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=cause):
        arguments(tmp_path, **change)
