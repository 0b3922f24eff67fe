"""The live server: its answers, and the builds of its report."""

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.errors import ConfigError, IntegrityError
from logitcask.engine.report.panels import Report
from logitcask.engine.report.serve import LiveReport, Served, Server, serve, tunnel
from logitcask.engine.report.watch import Watch
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.log.claims import Claims
from tests.engine.cached import make_store, make_unit

TOKEN = "?token="


class Builds:
    """Reports that count themselves; `error` is raised in place of the next one."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None

    def __call__(self) -> Report:
        if self.error is not None:
            raise self.error
        self.count += 1
        return Report(
            title=f"build {self.count} </script>",
            made="2026-01-01T00:00:00+00:00",
            version="0",
            runs=(),
            summary=(),
            sections=(),
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store") / "s", [make_unit(1)])


@pytest.fixture
def run(whole: Store, tmp_path: Path) -> Path:
    """Return the folder of a run that reads the store next to it."""
    shutil.copytree(whole.url, tmp_path / "s")
    (tmp_path / "run").mkdir()
    record = {"config": {"store": {"url": str(tmp_path / "s")}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    return tmp_path / "run"


@pytest.fixture
def served(run: Path) -> Iterator[tuple[str, Builds]]:
    """Yield the URL of a server, and its builds."""
    stop, begun, builds, found = threading.Event(), threading.Event(), Builds(), []

    def started(served: Served) -> None:
        found.append(served.url)
        begun.set()

    thread = threading.Thread(
        target=serve,
        args=(builds, [run]),
        kwargs={"stop": stop, "every_s": 0.0, "on_start": started},
    )
    thread.start()
    assert begun.wait(60)
    yield found[0], builds
    stop.set()
    thread.join()


def ask(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read().decode()


def test_only_the_token_opens_the_page_and_its_data(served: tuple[str, Builds]) -> None:
    url, _ = served
    base, token = url.split(TOKEN)
    assert base.startswith("http://127.0.0.1:")
    assert len(token) == 32
    status, headers, text = ask(url)
    assert status == 200
    assert "build 1" in text
    assert "connect-src 'self'" in text
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert json.loads(ask(f"{base}report.json{TOKEN}{token}")[2])["title"] == "build 1 </script>"
    wrong = ["", TOKEN, f"{TOKEN}{token[:-1]}", f"{TOKEN}{token}x", f"{TOKEN}%F0%9F%98%80"]
    for query in wrong:
        for name in ("", "report.json", "other"):
            status, _, text = ask(f"{base}{name}{query}")
            assert (status, "wrong or no token" in text) == (403, True), query
    assert ask(f"{base}run.json{TOKEN}{token}")[0] == 404
    assert ask(f"{base}../run.json{TOKEN}{token}")[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:9999", 200), ("127.0.0.1", 200), ("evil.example:80", 403), ("127.0.0.1.x", 403)],
)
def test_another_host_is_refused(served: tuple[str, Builds], host: str, status: int) -> None:
    assert ask(served[0], Host=host)[0] == status


def test_news_are_sent_when_something_moved(served: tuple[str, Builds], run: Path) -> None:
    base, token = served[0].split(TOKEN)
    builds, url = served[1], f"{base}report.json{TOKEN}{token}"
    _, headers, _ = ask(url)
    assert headers["Logitcask-State"] == "stopped"
    status, again, text = ask(url, **{"If-None-Match": headers["ETag"]})
    assert (status, text, again["ETag"]) == (304, "", headers["ETag"])
    assert builds.count == 1
    (run / "metrics.jsonl").write_text("{}\n")
    status, later, text = ask(url, **{"If-None-Match": headers["ETag"]})
    assert (status, json.loads(text)["title"]) == (200, "build 2 </script>")
    assert later["ETag"] != headers["ETag"]
    assert builds.count == 2


def test_a_damaged_run_is_an_answer_and_the_server_goes_on(
    served: tuple[str, Builds], run: Path
) -> None:
    base, token = served[0].split(TOKEN)
    builds, url = served[1], f"{base}report.json{TOKEN}{token}"
    (run / "metrics.jsonl").write_text("damaged\n")
    builds.error = IntegrityError("line 1 is no JSON object", hint="restore it")
    status, _, text = ask(url)
    assert (status, json.loads(text)["error"]) == (503, "line 1 is no JSON object")
    builds.error = None
    assert ask(url)[0] == 200, "built at the next look, though nothing moved since"
    assert builds.count == 2


def test_a_port_in_use_is_an_error(served: tuple[str, Builds], run: Path) -> None:
    port = int(served[0].split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1"):
        serve(Builds(), [run], stop=threading.Event(), port=port)
    with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1:99999"):
        serve(Builds(), [run], stop=threading.Event(), port=99_999)


def test_a_closed_page_is_no_error_and_others_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Server(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        for error, shown in ((BrokenPipeError(), False), (ValueError("bug"), True)):
            try:
                raise error
            except type(error):
                server.handle_error(None, ("127.0.0.1", 1))
            assert ("Traceback" in capsys.readouterr().err) is shown


def test_a_check_without_news_builds_nothing(run: Path) -> None:
    now, builds = [0.0], Builds()
    live = LiveReport(builds, Watch([run]), every_s=2.0, clock=lambda: now[0])
    (run / "ledger.jsonl").write_text("{}\n")
    now[0] = 1.9
    assert live.answer().report.title.startswith("build 1")
    now[0] = 2.0
    assert live.answer().report.title.startswith("build 2")
    now[0] = 9.0
    assert live.answer() is live.answer()
    assert builds.count == 2


def test_slow_builds_leave_most_of_the_time_to_the_run(run: Path) -> None:
    now, builds = [0.0], Builds()

    def slow() -> Report:
        now[0] += 3.0
        return builds()

    live = LiveReport(slow, Watch([run]), every_s=2.0, clock=lambda: now[0])
    (run / "ledger.jsonl").write_text("{}\n")
    for later, count in ((3 + 11.9, 1), (3 + 12.0, 2)):
        now[0] = later
        live.answer()
        assert builds.count == count


def test_the_state_moves_with_runs_and_stores(run: Path) -> None:
    watch, seen = Watch([run]), []

    def moved() -> bool:
        seen.append(watch.state())
        return seen.count(seen[-1]) == 1

    assert moved()
    assert not moved()
    store = open_store(run.parent / "s")
    claim: Any = Claims(store.storage, worker="w", lease_s=60).take("sha256:" + "ab" * 32)
    assert moved(), "a claim"
    claim.release()
    assert not moved()
    make_store(run.parent / "s", [make_unit(1), make_unit(2)], planned=1)
    assert moved(), "a commit"
    (run / "timeline").mkdir()
    (run / "timeline" / "train-0.jsonl").write_text("{}\n")
    assert moved(), "the timeline"
    (run / "logitcask.json").write_text("{}")
    assert moved(), "the end"
    assert (watch.run_state(), Watch([store.url]).run_state()) == ("finished", "running")


def test_the_way_in_from_another_machine() -> None:
    assert tunnel(4321, {}) == ""
    found = tunnel(4321, {"SSH_CONNECTION": "1 2 3 4"})
    assert found.startswith("ssh -L 4321:127.0.0.1:4321 ")
