"""Actors of a real Ray cluster of two nodes: nodes join and are lost, processes are killed.

One test, for one cluster: it costs some 20 seconds of a CPU before any work is done.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from logitcask.engine.commands.on_ray import rollout_on_ray, score_on_ray
from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.config.runner import StageRunner, Work
from logitcask.engine.distill.loop import distill
from logitcask.engine.distill.on_ray import distill_on_ray
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.store import open_store
from logitcask.engine.store.verify import verify
from logitcask.engine.training.run import TrainReport
from logitcask.engine.workers.ray import pool
from logitcask.engine.workers.ray.cluster import connected, options_of, resources_of
from logitcask.engine.workers.ray.drive import check_room, run_roles
from logitcask.engine.workers.ray.pool import Role
from tests.engine.commands.test_worker import here, rolls, scores
from tests.engine.distill.small_loop import configure
from tests.engine.distill.test_roles import models, units_of
from tests.engine.store.made import key
from tests.engine.workers.ray.toy import UNITS, begun, open_toy

ROOT = Path(__file__).resolve().parents[4]
NODE = {"num_cpus": 2, "num_gpus": 1, "resources": {"big": 1}, "object_store_memory": 80 << 20}
__all__ = ["here", "models"]


class TwoNodes:
    """A cluster on this machine, whose second node comes and goes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={**NODE, "include_dashboard": False}
        )
        self.address = str(self._cluster.address)
        self._second: Any = None

    def join(self) -> None:
        self._second = self._cluster.add_node(**NODE)

    def lose(self) -> None:
        """Kill all processes of the second node."""
        self._cluster.remove_node(self._second, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    # Not below tmp_path: the path of a socket has 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="lr"))
    (folder / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # The actors import the job of the test.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    cluster = TwoNodes()
    try:
        yield cluster
    finally:
        cluster.close()
        until(lambda: not processes_of(folder))
        shutil.rmtree(folder)


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of living processes that name the folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = each.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def until(is_true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 600
    while not is_true():
        assert time.monotonic() < end_s, "a wait of ten minutes"
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.needs("ray")
@pytest.mark.filterwarnings("ignore")
def test_actors_do_every_unit_once_while_nodes_come_and_go(
    two_nodes: TwoNodes,
    here: Path,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: Callable[[int, int], int],
) -> None:
    nodes_and_kills(two_nodes, tmp_path, monkeypatch)
    two_nodes.join()
    commands(two_nodes, here)
    loops(two_nodes, models, tmp_path, counts(0, 1))


def nodes_and_kills(two_nodes: TwoNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do toy units by one actor and a second; lose its node at half time, then kill the first."""
    monkeypatch.setattr(pool, "GROW_S", 0.2)
    url, log = str(tmp_path / "toy"), tmp_path / "begun"
    store = open_store(url, create=True)
    events: list[str] = []
    acts = {
        2: two_nodes.join,
        UNITS // 2: two_nodes.lose,
        3 * UNITS // 4: lambda: os.kill(begun(log)[0][1], signal.SIGKILL),
    }
    counts: list[int] = []

    def progress(stage: str, done: int, total: int, detail: object = None) -> None:
        counts.append(done)
        for at in [at for at in acts if done >= at]:
            acts.pop(at)()

    role = Role(
        name="toy",
        open_job=partial(open_toy, url, log),
        store=url,
        work=Work(poll=0.2),
        resources={"CPU": 2.0, "GPU": 0.5, "big": 1.0},
        actors=1,
        most=2,
        restarts=2,
    )
    with connected(two_nodes.address) as ray:
        (done,) = run_roles(
            ray, [role], stop=threading.Event(), progress=progress, on_event=events.append
        )
    assert not acts
    assert done.over
    assert (done.done, done.total, done.left_out) == (UNITS - 1, UNITS, 1)
    assert done.first_error == "UnitError: unit 0 cannot be done"
    segments = store.head().segments
    assert {s.unit_key for s in segments} == {key("toy", n) for n in range(1, UNITS)}
    assert len(segments) == UNITS - 1, "no unit twice"
    started = begun(log)
    assert len({process for _, process in started}) == 3, "two nodes, and the first started again"
    assert len(started) < 1.6 * UNITS
    assert counts == sorted(counts)
    # A lost node is noticed after some seconds, so perhaps after the death of the first actor.
    lost = ["is lost: 1 are left", "is lost: Ray starts it again where it has room"]
    orders = [[f"toy-{a} {lost[0]}", f"toy-{b} {lost[1]}"] for a, b in ((1, 0), (0, 1))]
    assert events[0] == "toy-0: a toy is open"
    assert events[1:] in orders
    assert store.storage.files("claims") == []
    verify(store, deep=True)  # a kill may leave files that nothing names
    until(lambda: not any(is_alive(process) for _, process in started))


def commands(two_nodes: TwoNodes, here: Path) -> None:
    """Do rollouts on Ray and inline: the units and the reports are the same."""
    ray = {"kind": "ray", "ray_address": two_nodes.address}
    inline = run_rollout(rolls(here, "inline"))
    stop = threading.Event()
    config = rolls(here, worker=False, poll=0.2)
    report = rollout_on_ray(config.model_copy(update={"runner": StageRunner(**ray)}), stop=stop)
    for name in (
        *("units_total", "units_new", "units_done_before", "positions", "sequences"),
        *("mean_length", "stopped_share", "mean_reward"),
    ):
        assert getattr(report, name) == getattr(inline, name), name
    store, other = (open_store(here / name) for name in ("s", "inline"))
    assert store.head().unit_keys() == other.head().unit_keys()

    changes = {"work": Work(poll=0.2), "runner": StageRunner(**ray)}
    teacher = scores(here).model_copy(update=changes)

    def interrupt(*counts: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_on_ray(teacher, stop=stop, progress=interrupt)
    assert store.storage.files("claims") == []
    # An actor may end its next unit before the kill reaches it.
    before = set(store.head().scores("teacher"))
    assert 1 <= len(before) <= 2
    done = score_on_ray(teacher, stop=stop)
    found = (done.units_total, done.units_done_before, done.units_new)
    assert found == (2, len(before), 2 - len(before))
    left = [s for s in store.head().rollouts("main") if s.seg_id not in before]
    assert done.positions == sum(s.counts["P"] for s in left)
    with pytest.raises(ConfigError, match="worker with runner = ray"):
        score_on_ray(scores(here), stop=stop)

    other = scores(here, model="student").model_copy(update=changes)
    with pytest.raises(IncompleteError, match="SIGTERM came before the end"):
        score_on_ray(other, stop=stop, progress=lambda *counts: stop.set())
    assert store.storage.files("claims") == [], "the unit in hand was done"
    assert store.head().scores("student")


def loop(two_nodes: TwoNodes, models: Path, into: Path, train: str) -> tuple[TrainReport, bytes]:
    """Run a loop on Ray; kill the last process that trains, and all of them start again."""
    processes: list[int] = []
    events: list[str] = []
    ranks = int(train[-1])

    def on_event(line: str) -> None:
        events.append(line)
        if re.match(r"train(-\d)? runs on ", line):
            processes.append(int(line.rpartition(" ")[2]))

    def kill(stage: str, done: int, *counts: object) -> None:
        if stage == "score" and done > 2 and not killed and len(processes) == ranks:
            killed.append(processes[-1])
            os.kill(processes[-1], signal.SIGKILL)

    killed: list[int] = []
    runner = ("runner.kind=ray", f"runner.ray_address={two_nodes.address}")
    config = configure(models, into, *runner, f"runner.train={train}", "work.poll=0.1")
    report = distill_on_ray(config, stop=threading.Event(), progress=kill, on_event=on_event)
    assert len(killed) == 1
    assert len(processes) == 2 * ranks, events
    assert sum("restart 1 of 5, from the newest checkpoint" in line for line in events) == 1
    segments = open_store(into / "store").head().segments
    assert len({s.unit_key for s in segments}) == len(segments)
    return report, (into / "out" / "model.safetensors").read_bytes()


def loops(two_nodes: TwoNodes, models: Path, tmp_path: Path, soak: int) -> None:
    """Train in one actor: it gives the student of one process bit for bit."""
    inline = distill(configure(models, tmp_path / "inline"))
    report, student = loop(two_nodes, models, tmp_path / "one", "1")
    assert student == (tmp_path / "inline/out/model.safetensors").read_bytes()
    assert report.last["loss"] == inline.last["loss"]
    assert units_of(tmp_path / "one") == units_of(tmp_path / "inline")
    if soak:
        two_actors(two_nodes, models, tmp_path, inline)


def two_actors(two_nodes: TwoNodes, models: Path, tmp_path: Path, inline: TrainReport) -> None:
    """Train in two actors: as two processes under torchrun, and as one up to rounding."""
    report, student = loop(two_nodes, models, tmp_path / "two", "torchrun:2")
    assert report.last["loss"] == pytest.approx(inline.last["loss"], rel=1e-3)
    assert units_of(tmp_path / "two") == units_of(tmp_path / "inline")
    files = [tmp_path / "two/out/model.safetensors", tmp_path / "inline/out/model.safetensors"]
    two, one, start = map(load_file, (*files, models / "student/model.safetensors"))
    distance, moved = (
        max(float((a[name] - b[name]).abs().max()) for name in a)
        for a, b in ((two, one), (one, start))
    )
    assert distance < 0.05 * moved
    into = tmp_path / "processes"
    sets = [f"store.url={into / 'store'}", f"run.out={into / 'out'}", "runner.train=torchrun:2"]
    words = [word for each in sets for word in ("--set", each)]
    command = [sys.executable, "-P", "-m", "logitcask.cli.main", "distill", str(models / "d.toml")]
    subprocess.run([*command, "--runner", "processes", *words], check=True)
    assert (into / "out" / "model.safetensors").read_bytes() == student


class Calls:
    """A stand-in for a dataset of Ray Data: it calls the class for each row, in this process."""

    def __init__(self, rows: int) -> None:
        self._rows, self._found = rows, list[dict[str, list[int]]]()

    def map_batches(self, kind: Any, **options: object) -> "Calls":
        assert options == {"batch_size": 1, "concurrency": 4, "num_gpus": 1}
        worker = kind()
        self._found = [worker({"id": [row]}) for row in range(self._rows)]
        return self

    def sum(self, column: str) -> int:
        return sum(value for each in self._found for value in each[column])


def test_a_stage_of_ray_data_does_the_missing_units(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_rollout(rolls(here))
    text = (ROOT / "engine/workers/README.md").read_text()
    (code,) = re.findall(r"```python map_batches\n(.*?)```", text, re.S)
    for name, place in (("Qwen/Qwen3-4B", here / "teacher"), ("/shared/store", here / "s")):
        assert name in code
        code = code.replace(name, str(place))
    data = SimpleNamespace(range=lambda rows: Calls(rows // 200))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=data))
    exec(code, {"__name__": "example"})
    snapshot = open_store(here / "s").head()
    assert len(snapshot.scores("qwen3-4b")) == 2
    assert capsys.readouterr().out.split()[-1] == str(
        sum(s.counts["P"] for s in snapshot.rollouts("main"))
    )


class Machine:
    """The part of the module ray on the resources of a cluster."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self.resources


def test_a_command_tells_what_the_cluster_lacks() -> None:
    events: list[str] = []
    one = {"CPU": 1.0, "GPU": 0.5}
    check_room(Machine(CPU=4.0, GPU=1.0), [one, one], events.append)
    assert events == []
    check_room(Machine(CPU=4.0, GPU=1.0), [one] * 3, events.append)
    assert events[0].startswith("the actors need GPU = 1.5 of 1 in the cluster: some wait")


def test_an_actor_gets_a_gpu_where_it_may_compute_on_one() -> None:
    cpus, gpus = Machine(CPU=8.0), Machine(CPU=8.0, GPU=2.0)
    assert resources_of(cpus, {}, "auto") == {"CPU": 1.0, "GPU": 0.0}
    assert resources_of(gpus, {}, "auto") == {"CPU": 1.0, "GPU": 1.0}
    assert resources_of(gpus, {}, "cpu") == {"CPU": 1.0, "GPU": 0.0}
    half = resources_of(gpus, {"GPU": 0.5, "big": 1.0}, "cuda")
    assert options_of(half) == {"num_cpus": 1.0, "num_gpus": 0.5, "resources": {"big": 1.0}}
    with pytest.raises(ConfigError, match="GPU = 0 with device = cuda"):
        resources_of(gpus, {"GPU": 0.0}, "cuda")
    with pytest.raises(ConfigError, match="cuda:1 with runner = ray, which chooses the GPU"):
        resources_of(gpus, {}, "cuda:1")
