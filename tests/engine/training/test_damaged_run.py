"""A damaged folder of a run: repaired with an event, refused, or without effect; never silent."""

import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError, IntegrityError, LogitcaskError, StoreError
from logitcask.engine.models.digests import difference, read_json, write_json
from logitcask.engine.store import Store
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.run_dir.checkpoints import resume_point
from logitcask.engine.training.run_dir.files import locked
from logitcask.engine.training.train import train
from logitcask.engine.types import NO_DETAIL, Detail, ModelRef, Progress
from tests.engine.cached import make_unit
from tests.engine.fitting import REVERSE, make_case

SETTINGS = Train(
    learning_rate=1e-3, num_train_epochs=2, pack_length=96, save_steps=2, keep_checkpoints=True
)
"""Five updates or more, with checkpoints at 2 and 4."""


class Case(NamedTuple):
    store: Store
    model: ModelRef
    stopped: Path
    """A run stopped after update 5."""
    finished: Path
    report: TrainReport


class Stopped(Exception):
    pass


def run(store: Store, model: ModelRef, out: Path, **change: Any) -> TrainReport:
    fields: dict[str, Any] = {"settings": SETTINGS, "objective": REVERSE, "teacher": "big"}
    place = Run(out=out, device="cpu", overwrite=change.pop("overwrite", False))
    return train(store, model=model, run=place, **(fields | change))


def stop_after(step: int) -> Progress:
    def progress(stage: str, done: int, total: int, detail: Detail = NO_DETAIL) -> None:
        if done == step:
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    units = [make_unit(i, prompts=2, vocab=99, lengths=[30, 24, 17, 36]) for i in range(2)]
    store, model = make_case(folder, units, hidden=16, layers=1)
    with pytest.raises(Stopped):
        run(store, model, folder / "stopped", progress=stop_after(5))
    report = run(store, model, folder / "finished")
    return Case(store, model, folder / "stopped", folder / "finished", report)


class Outcome(NamedTuple):
    report: TrainReport | None
    events: list[str]
    error: LogitcaskError | None


def again(case: Case, out: Path, **change: Any) -> Outcome:
    events: list[str] = []
    try:
        report = run(case.store, case.model, out, on_event=events.append, **change)
    except LogitcaskError as error:
        return Outcome(None, [], error)
    return Outcome(report, [e for e in events if str(out) in e or "damaged" in e], None)


def assert_as_whole(case: Case, out: Path, report: TrainReport | None) -> None:
    """Check that the folder holds the bits of the run that was never damaged."""
    assert report is not None
    assert not difference(out, read_json(case.finished / "logitcask.json", hint="")["files"])
    assert lines(out) == lines(case.finished)
    assert (report.version, report.positions) == (case.report.version, case.report.positions)
    assert report.last["loss"] == case.report.last["loss"]


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("progress/seconds", "train/data_wait")
    return [{k: v for k, v in line.items() if k not in timed} for line in found]


def files_of(out: Path) -> list[str]:
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["stopped", "finished"])
def test_a_flipped_bit_is_never_silent(
    case: Case, tmp_path: Path, counts: Callable[[int, int], int], kind: str
) -> None:
    """Flip a bit of every kind of file in turn, then run the same command again."""
    whole, rng, said = getattr(case, kind), random.Random(kind), 0
    by_kind: dict[str, list[str]] = {}
    for name in files_of(whole):
        # What a finished run no longer reads can have no effect.
        if kind == "stopped" or not name.startswith("checkpoints/"):
            by_kind.setdefault(Path(name).name, []).append(name)
    kinds = sorted(by_kind)
    for number in range(counts(len(kinds), 150)):
        out = tmp_path / str(number)
        shutil.copytree(whole, out)
        name = rng.choice(by_kind[kinds[number % len(kinds)]])
        flip(out / name, rng)
        report, events, error = again(case, out)
        if error is None:
            assert_as_whole(case, out, report)
        said += bool(error or events)
        if error is not None:
            assert isinstance(error, IntegrityError), (name, error)
            assert str(out) in error.cause
        shutil.rmtree(out)
    # A flip in the older of two sound checkpoints has no effect.
    assert said > number // 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", '{"global_step": 9999}'),
        ("logitcask_checkpoint.json", "[" * 100_000),
        ("logitcask_checkpoint.json", '{"plan": "x", "step": 4}'),
        ("optimizer.pt", None),
        ("model.safetensors", ""),
        ("pytorch_model.bin", "x"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(
    case: Case, tmp_path: Path, name: str, content: str | None
) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.stopped, out)
    newest = out / "checkpoints" / "checkpoint-4"
    if content is None:
        (newest / name).unlink()
    else:
        (newest / name).write_text(content)
    assert resumed_at(out, events := []) == 2
    assert any("checkpoint-4" in line and "not resuming" in line for line in events), events
    assert (out / "checkpoints" / "damaged-checkpoint-4").is_dir()


def resumed_at(out: Path, events: list[str]) -> int:
    metadata = read_json(out / "run.json", hint="")
    ours = {key: metadata[key] for key in ("plan", "rows_per_update")}
    return resume_point(out, 6, ours, metadata, events.append)[1]


def test_a_step_that_contradicts_the_state_is_damage(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.stopped, out)
    file = out / "checkpoints" / "checkpoint-4" / "logitcask_checkpoint.json"
    write_json(file, {**read_json(file, hint=""), "step": 3})
    assert resumed_at(out, events := []) == 2
    assert "of update 3, and its trainer_state.json of update 4" in events[0]


def test_without_a_sound_checkpoint_training_begins_again(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.stopped, out)
    (out / "checkpoints" / "checkpoint-2" / "scheduler.pt").unlink()
    (out / "checkpoints" / "checkpoint-4" / "logitcask_checkpoint.json").unlink()
    report, events, _ = again(case, out)
    assert report is not None
    assert report.resumed_at == 0
    assert any("starts from the beginning" in line for line in events)
    assert any("incomplete" in line for line in events)
    assert_as_whole(case, out, report)


@pytest.mark.parametrize("name", ["ledger.jsonl", "model.safetensors", "tokenizer.json"])
def test_a_finished_run_without_one_of_its_files(case: Case, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.finished, out)
    (out / name).unlink()
    report, events, _ = again(case, out)
    assert any(f"{name} is missing" in line for line in events), events
    assert_as_whole(case, out, report)
    assert again(case, out).events == []
    shutil.rmtree(out / "checkpoints")
    (out / name).unlink()
    _, _, error = again(case, out)
    assert isinstance(error, IntegrityError)
    assert f"{name} is missing" in error.cause
    assert "--overwrite" in error.hint


def test_lost_lines_come_back_from_the_checkpoint(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.stopped, out)
    (out / "metrics.jsonl").unlink()
    report, events, _ = again(case, out)
    assert any("metrics.jsonl is missing or damaged" in line for line in events)
    assert_as_whole(case, out, report)


def test_a_damaged_run_json_is_refused_unless_overwritten(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.stopped, out)
    for text in ("", "[]", "{" * 100_000, '{"pin": 1, "self_sha256": "sha256:0"}', "\udcff"):
        (out / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        _, _, error = again(case, out)
        assert isinstance(error, IntegrityError), text[:20]
        assert str(out / "run.json") in error.cause
    report = again(case, out, overwrite=True).report
    assert_as_whole(case, out, report)


# One process writes.


def test_two_runs_do_not_share_a_folder(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out, pytest.fail):
        _, _, error = again(case, out)
        assert isinstance(error, ConfigError)
        assert f"in use by process {os.getpid()} on {os.uname().nodename}" in error.cause
    assert not out.exists(), "a lock leaves nothing"
    # The lock of a killed process is free: its file is no obstacle.
    out.mkdir()
    (out / ".lock").write_text("process 1 on elsewhere")
    with locked(out, pytest.fail):
        pass


def test_a_refused_run_leaves_no_folder(case: Case, tmp_path: Path) -> None:
    _, _, error = again(case, tmp_path / "out", teacher="other")
    assert error is not None
    assert not (tmp_path / "out").exists()


# A disk that is full.


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("most", [1_000, 8_000, 20_000])
def test_a_full_disk_is_reported_and_the_run_resumes(case: Case, tmp_path: Path, most: int) -> None:
    out = tmp_path / "out"
    with file_size_limit(most):
        _, _, error = again(case, out)
    assert isinstance(error, StoreError), error
    assert "cannot write" in error.cause
    assert str(out) in error.cause
    assert "resumes" in error.hint
    assert_as_whole(case, out, again(case, out).report)
