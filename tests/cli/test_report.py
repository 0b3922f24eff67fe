"""`logitcask report`: the page of a run and of a store, its file, and its refusals."""

import json
import os
import re
import signal
import threading
import urllib.request
from typing import Any

import pytest

from tests.cli.conftest import CommandResult, World


def report_of(world: World, page: str) -> dict[str, Any]:
    text = world.at(page).read_text()
    found = re.search(r'<script type="application/json" id="report-json">(.*?)</script>', text)
    assert found is not None
    report: dict[str, Any] = json.loads(found[1])
    return report


def test_a_run_another_one_and_their_store(world: World, call: Any):
    runs, page = ["@report-a", "@report-b"], "@page.html"
    for run, objective in zip(runs, ("overlap", "opd"), strict=True):
        assert (
            world(
                f"train --model @student --store @st --teacher big --objective {objective} "
                f"--loss-topk 4 --pack-length 64 --lr 1e-3 --device cpu --out {run}"
            )
            == 0
        )
    made: CommandResult = call(f"report {runs[0]} --compare {runs[1]} -o {page} --format json")
    assert made.code == 0, made.err
    assert made.json["bytes"] == world.at(page).stat().st_size < 2_000_000
    report = report_of(world, page)
    assert report["runs"] == ["report-a", "report-b"]
    texts = [each["text"] for each in report["summary"]]
    assert texts[0].startswith("report-a: the student 'student' was trained by overlap on the")
    assert any(text.startswith("report-b: the student") for text in texts)
    panels = {each["id"]: each for section in report["sections"] for each in section["panels"]}
    assert {each["run"] for each in panels["loss"]["series"]} == {0, 1}
    assert ["train.objective", "overlap", "opd"] in panels["provenance-differences"]["rows"]
    assert report["viewer"]["count"] == 16
    # The same place again: a report is replaced, and a file of the user is not.
    assert call(f"report @st -o {page} --sequences 0").code == 0
    alone = report_of(world, page)
    assert (alone["runs"], alone["viewer"]) == ([], None)
    assert "The store holds 16 responses of" in alone["summary"][0]["text"]
    world.at(page).write_text("<html>mine</html>")
    call(f"report @st -o {page}").assert_error(2, "is no report of ours", "report.html")
    call(f"report @st --compare {runs[0]} -o @new.html").assert_error(2, "is a store", "--compare")
    call(f"report {runs[0]} --compare @st -o @new.html").assert_error(2, "st is a store", "a run")
    twice = f"report {runs[0]} --compare {runs[0]} -o @new.html"
    call(twice).assert_error(2, "it is there twice", "every run once")
    assert not world.at("@new.html").exists()


@pytest.mark.parametrize(("end", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_live_page_ends_with_its_signal(
    world: World, call: Any, monkeypatch: pytest.MonkeyPatch, end: signal.Signals, code: int
):
    pages: list[str] = []

    def read_and_end(line: str) -> None:
        url = line.removeprefix("live report: ")

        def read() -> None:
            try:
                with urllib.request.urlopen(url) as answer:
                    pages.append(answer.read().decode())
            finally:
                os.kill(os.getpid(), end)

        threading.Thread(target=read).start()

    monkeypatch.setattr("logitcask.cli.report.print_event", read_and_end)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.delenv("SSH_TTY", raising=False)
    before = sorted(world.at("@st").rglob("*"))
    assert call("report @st --serve --sequences 1").code == code
    (page,) = pages
    assert '"title":' in page
    assert 'data-live="report.json?token=' in page
    assert sorted(world.at("@st").rglob("*")) == before, "a store is read alone"
    assert not world.at("@report.html").exists()
