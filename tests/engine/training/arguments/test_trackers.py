"""Trackers get each line of metrics.jsonl, under its names."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.forward import inner_model
from logitcask.engine.store import Store
from logitcask.engine.training.arguments.trackers import check_trackers, ended_runs
from logitcask.engine.training.evaluation.responses import EvalPlan
from logitcask.engine.training.train import train
from logitcask.engine.types import ModelRef, Prompt, SamplingParams, no_progress
from tests.engine.cached import make_unit
from tests.engine.fitting import REVERSE, make_case

PROMPTS = [Prompt(id=f"e{i}", token_ids=(5 + i, 6, 7)) for i in range(2)]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelRef]:
    units = [make_unit(0, prompts=2, vocab=99, lengths=[30, 24, 17, 36])]
    return make_case(tmp_path_factory.mktemp("case"), units, hidden=16, layers=1)


def run(case: tuple[Store, ModelRef], out: Path, tracker: str, progress: Any = no_progress) -> None:
    """Run four updates, evaluated before the first and after the second and last."""
    evaluation = EvalPlan(
        prompts=PROMPTS,
        sampling=SamplingParams(n=1, max_new_tokens=4),
        grader=lambda prompt, text: 0.5,
        grader_name="half",
        decode=str,
        sampler=lambda s: HF(case[1], dtype="float32", network=inner_model(s)),
        every=2,
    )
    train(
        case[0],
        model=case[1],
        teacher="big",
        objective=REVERSE,
        settings=Train(
            learning_rate=1e-3,
            pack_length=64,
            num_train_epochs=2,
            save_steps=2,
            args={"report_to": tracker},
        ),
        run=Run(out=out, device="cpu"),
        evaluation=evaluation,
        progress=progress,
    )


def lines(out: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl without values that are None."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if v is not None} for line in found]


def test_tensorboard_events_are_the_lines_of_the_metrics(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)

    def stop(stage: str, done: int, *_: Any) -> None:
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path, "tensorboard", stop)
    run(case, tmp_path, "tensorboard")  # resumes after update 2, and logs the third again
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected: dict[str, list[tuple[float, float]]] = {}
    for line in lines(tmp_path):
        for name, value in line.items():
            expected.setdefault(name, []).append((line["progress/step"], value))
    assert {"overlap/ratio", "cache/coverage", "loss", "eval/avg_at_n"} <= expected.keys()
    found = events.Tags()["scalars"]
    assert set(found) == set(expected)
    for name, points in expected.items():
        if name != "progress/step":
            assert len(events.Scalars(name)) == len(points), name
        for event, (step, value) in zip(events.Scalars(name), points, strict=False):
            assert event.step == step
            assert event.value == pytest.approx(value, rel=1e-6)


def history(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the logged lines of a .wandb file: a LevelDB log of W&B's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, message = file.read_bytes(), 7, b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:  # a block ends in padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        message += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(message)
            message = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            elif record.WhichOneof("record_type") == "run":
                assert record.run.display_name == "student-a"


def test_wandb_offline_holds_the_lines_of_the_metrics(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(case, tmp_path / "student-a", "wandb")
    assert wandb.run is None, "the next training of this process has a run of its own"
    (file,) = tmp_path.rglob("*.wandb")
    own = json.loads((tmp_path / "student-a" / "trackers.json").read_text())["wandb"]
    assert file.name == f"run-{own['id']}.wandb", "a report is added to this run"
    found = [line for line in history(file) if "progress/step" in line]
    expected = lines(tmp_path / "student-a")
    assert len(found) == len(expected) == 7
    for theirs, ours in zip(found, expected, strict=True):
        assert {name: theirs[name] for name in ours} == ours
        assert theirs["train/global_step"] == ours["progress/step"]


def test_the_run_of_mlflow_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read what its package says; CI does not have it."""
    last: list[Any] = [None, SimpleNamespace(info=SimpleNamespace(run_id="r1"))]
    package: Any = SimpleNamespace(last_active_run=lambda: last.pop(0))
    monkeypatch.setitem(sys.modules, "mlflow", package)
    with ended_runs(["mlflow"], tmp_path):
        pass
    assert not (tmp_path / "trackers.json").exists(), "of a process that does not report"
    with ended_runs(["mlflow"], tmp_path):
        pass
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": {"id": "r1"}}


def test_wandb_logs_no_model_that_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_LOG_MODEL", "checkpoint")
    with pytest.raises(ConfigError, match="a model that is not proved"):
        check_trackers("wandb")


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_wandb_is_not_imported_for_others(monkeypatch: pytest.MonkeyPatch, report_to: str) -> None:
    imported: list[str] = []
    module = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{module}.is_tensorboard_available", lambda: True)
    monkeypatch.setattr(f"{module}.is_wandb_available", lambda: imported.append("wandb"))
    assert check_trackers(report_to) == [name for name in [report_to] if name != "none"]
    assert not imported
