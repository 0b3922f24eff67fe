"""A report in trackers: real W&B and TensorBoard, and the calls that the two others get."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from logitcask.cli.report import report_command
from logitcask.engine.errors import ConfigError, ServerError
from logitcask.engine.report.panels import Report, Sentence
from logitcask.engine.report.trackers import (
    SENDERS,
    check_tracker,
    send_report,
    summary_markdown,
)

REPORT = Report(
    title="a_run",
    made="2026-01-01T00:00:00+00:00",
    version="0",
    runs=("a_run",),
    summary=(
        Sentence(text="The gap closed by 97 %.", state="good"),
        Sentence(text="<script>alert(1)</script> [a](b)", state="warning"),
    ),
    sections=(),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    out = tmp_path / "my run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"config": {"train": {"args": {"project": "p"}}}}))
    return out


@pytest.fixture
def wandb() -> Iterator[Any]:
    """Yield the package, which reads its environment once for all runs until it is torn down."""
    package = pytest.importorskip("wandb")
    package.teardown()
    yield package
    package.teardown()


def test_wandb_gets_the_page_in_the_run_of_the_training(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    # Its own process needs more than its default of 30 s to start on a loaded machine.
    settings = {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "X_SERVICE_WAIT": "600"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    own = {"wandb": {"entity": "", "project": "distill", "id": "run12345"}}
    (run / "trackers.json").write_text(json.dumps(own))
    assert "W&B run run12345" in send_report(REPORT, run, "wandb")
    assert wandb.run is None
    (log,) = tmp_path.rglob("*.wandb")
    assert log.name == "run-run12345.wandb"
    (page,) = tmp_path.rglob("*.html")
    assert '"title":"a_run"' in page.read_text(encoding="utf-8")
    assert b"report-my-run" in log.read_bytes(), "the artefact"


def test_tensorboard_gets_the_summary_as_text(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    where = send_report(REPORT, run, "tensorboard")
    assert str(run / "tensorboard") in where
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    (event,) = events.Tensors("report/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == summary_markdown(REPORT)
    assert "✓ The gap closed by 97 %." in text
    assert r"! &lt;script&gt;alert\(1\)&lt;/script&gt; \[a\]\(b\)" in text
    assert text.startswith(r"## a\_run")


def test_mlflow_and_trackio_get_the_file_in_the_run_of_that_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record the calls; neither package is installed in CI."""
    calls: list[Any] = []
    pages = []

    def started(**given: Any) -> Any:
        calls.append(given)
        info = SimpleNamespace(run_id="r1", artifact_uri="file:/mlruns/r1")
        return _Closing(SimpleNamespace(info=info))

    def logged(path: str, **given: Any) -> None:
        pages.append(Path(path).read_text(encoding="utf-8"))
        calls.append({"file": Path(path).name, **given})

    monkeypatch.setattr("logitcask.engine.report.trackers.find_spec", lambda name: True)
    mlflow: Any = SimpleNamespace(start_run=started, log_artifact=logged)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setenv("MLFLOW_RUN_ID", "r1")
    assert send_report(REPORT, run, "mlflow") == "MLflow run r1: file:/mlruns/r1/report.html"
    monkeypatch.delenv("MLFLOW_RUN_ID")
    send_report(REPORT, run, "mlflow")
    file = {"file": "report.html"}
    own, new = {"run_id": "r1", "run_name": None}, {"run_id": None, "run_name": "my run"}
    assert calls == [own, file, new, file]

    calls.clear()
    trackio: Any = SimpleNamespace(
        init=lambda **given: calls.append(given), log_artifact=logged, finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    send_report(REPORT, run, "trackio")
    init, artefact = calls
    assert (init["project"], init["name"], init["resume"]) == ("p", "my run", "allow")
    assert artefact == {"file": "report.html", "name": "report-my-run", "type": "report"}
    assert len(pages) == 3
    assert all('"title":"a_run"' in text for text in pages)
    trackio.init = lambda **given: 1 / 0
    with pytest.raises(ServerError, match="trackio did not take the report: ZeroDivisionError"):
        send_report(REPORT, run, "trackio")


class _Closing:
    """A context that yields a value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *error: object) -> None:
        pass


def test_the_flag_names_all_trackers() -> None:
    (option,) = [each for each in report_command.params if each.name == "tracker"]
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(SENDERS)


def test_what_cannot_be_sent_is_an_error_before_anything(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--to comet: no such tracker"):
        check_tracker("comet", run)
    with pytest.raises(ConfigError, match="is not the folder of one run"):
        check_tracker("tensorboard", run.parent)
    monkeypatch.setattr("logitcask.engine.report.trackers.find_spec", lambda name: None)
    for name, hint in {"trackio": "pip install trackio", "wandb": "[trackers]"}.items():
        with pytest.raises(ConfigError, match=f"the package {name} is not installed") as caught:
            check_tracker(name, run)
        assert hint in caught.value.hint
