"""A teacher that follows the student: its refreshes, their ages, and what it teaches."""

import itertools
import json
import random
import re
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file

from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import EstimateConfig, RunConfig, ScoreConfig
from logitcask.engine.distill.loop import distill
from logitcask.engine.distill.roles import Role, train_role
from logitcask.engine.distill.teacher import refreshes
from logitcask.engine.errors import ConfigError, IdentityError, IntegrityError, PromptError
from logitcask.engine.store import open_store
from logitcask.engine.training.provenance.chain import trace
from logitcask.engine.workers.worker import Worker
from tests.engine.distill.small_loop import ROUNDS, UPDATES, configure
from tests.engine.distill.test_roles import Killed, follow, metrics, one_each
from tests.engine.tiny import make_model, save_folder

CONTEXT = """teacher_kind = "context"
prompt_template = "t.txt"
"""
NEEDED = {"student": {"model": "s"}, "store": {"url": "s"}, "prompts": {"file": "p"}}
TOML = f"""
[student]
model = "student"
[teacher]
name = "self"
follow = "student"
[prompts]
file = "p.jsonl"
chat_template = false
[store]
url = "store"
[rollout]
n = 2
max_new_tokens = 6
student_topk = 4
unit_prompts = 2
[score]
{CONTEXT}teacher_topk_min = 8
teacher_topk_max = 16
[train]
objective = "overlap"
loss_topk = 4
learning_rate = 5e-3
pack_length = 48
save_steps = 4
[loop]
rounds = {ROUNDS}
prompts_per_round = 3
updates_per_round = {UPDATES}
[work]
poll = 0.001
[run]
out = "out"
device = "cpu"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with student, prompts, template and d.toml; stores and runs are elsewhere."""
    path = tmp_path_factory.mktemp("models")
    save_folder(path / "student", make_model(hidden=16, layers=1, seed=1, spread=0.3))
    rows = [{"id": f"p{i}", "prompt": "abcdefgh"[: i + 1], "answer": "zyxwv"[i]} for i in range(5)]
    (path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "t.txt").write_text("{answer}{answer}{answer}{prompt}\n")
    (path / "d.toml").write_text(TOML)
    fixed = TOML.replace(CONTEXT, "").replace('follow = "student"', 'model = "student"')
    (path / "fixed.toml").write_text(fixed)
    return path


def teachers_of(into: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Return (round, first prompt) -> provenance of the scores, with their name."""
    segments = open_store(into / "store").head().segments
    rollouts = {s.seg_id: s for s in segments if s.kind == "rollout"}
    scores = [s for s in segments if s.kind == "score"]
    found = {
        (rollouts[s.base].provenance["round"], s.unit["first"]): {"name": s.name, **s.provenance}
        for s in scores
    }
    assert len(found) == len(scores) == len(rollouts), "each unit is scored once"
    return found


def weights(into: Path) -> bytes:
    return (into / "out" / "model.safetensors").read_bytes()


def damaged(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


FORMS = {
    "student": ["teacher.follow_every=4"],
    "ema": ["teacher.follow=ema", "teacher.ema_decay=0.5"],
}


class Whole:
    """An uninterrupted loop in one process."""

    def __init__(self, models: Path, into: Path, form: str) -> None:
        self.into, self.form = into, form
        self.config = configure(models, into, *FORMS[form])
        distill(self.config)


@pytest.fixture(scope="module", params=FORMS)
def whole(request: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(models, tmp_path_factory.mktemp("whole"), request.param)


def test_each_round_is_scored_by_its_refresh(whole: Whole) -> None:
    config, out = whole.config, whole.into / "out"
    every = config.teacher.follow_every or UPDATES
    found = teachers_of(whole.into)
    digests: dict[int, str] = {}
    for (number, _), scores in found.items():
        version = number * UPDATES // every * every
        teacher = scores["teacher"]
        assert scores["name"] == f"self.v{version}-{teacher['weights'][7:15]}"
        assert (teacher["version"], scores["teacher_kind"]) == (version, "context")
        assert scores["follow"]["kind"] == whole.form
        assert digests.setdefault(version, teacher["weights"]) == teacher["weights"]
    assert len({*digests.values()}) == len(digests) == -(-ROUNDS * UPDATES // every)
    ages = [update % every for update in range(ROUNDS * UPDATES)]
    assert [line["cache/teacher_age"] for line in metrics(out)] == ages
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [line["teacher_age"] for line in ledger] == [[age, age, age] for age in ages]
    chain = trace(str(out))
    assert chain["ledger"]["teacher_age"][::2] == [0, every - 1]
    models = {model["weights"] for group in chain["teachers"] for model in group["models"]}
    assert models == {*digests.values()}
    assert f"{len(digests)} refreshes, `self.v0-" in (out / "README.md").read_text()
    run = json.loads((out / "run.json").read_text())
    assert run["follow"]["every"] == every


def test_an_average_is_that_of_the_students(whole: Whole) -> None:
    """Follow the averages of all refreshes in float64, from the rounds that a copy of it makes."""
    if whole.form != "ema":
        return
    versions = whole.into / "out" / "versions"
    kept = sorted(int(path.name[5:]) for path in versions.glob("ema-v*"))
    for before, now in itertools.pairwise(kept):
        assert now == before + UPDATES
        old, student, new = (
            load_file(versions / name / "model.safetensors")
            for name in (f"ema-v{before}", f"v{now}", f"ema-v{now}")
        )
        for name, tensor in new.items():
            expected = 0.5 * old[name].double() + 0.5 * student[name].double()
            assert (tensor - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert len(kept) >= 2


def test_without_age_the_roles_give_the_student_of_one_process(
    whole: Whole, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(configure(models, tmp_path, *FORMS[whole.form]), monkeypatch, one_each)
    assert weights(tmp_path) == weights(whole.into)
    assert metrics(tmp_path / "out") == metrics(whole.into / "out")
    keys = [
        sorted(s.unit_key for s in open_store(into / "store").head().segments)
        for into in (tmp_path, whole.into)
    ]
    assert keys[0] == keys[1]


def test_killed_it_ends_with_the_same_student(
    whole: Whole, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume at 4, which needs an earlier refresh, and die in the making of an average too."""
    config = configure(models, tmp_path, *FORMS[whole.form])

    def killed(stage: str, done: int, *_: Any) -> None:
        if (stage, done) == ("train", 7):
            raise Killed

    with pytest.raises(Killed):
        distill(config, progress=killed)
    if whole.form == "ema":
        (before,) = (tmp_path / "out" / "versions").glob("ema-v2")
        for change, message in ((damaged, "model.safetensors"), (shutil.rmtree, "it is missing")):
            shutil.copytree(before, tmp_path / "copy")
            change(before)
            with pytest.raises(IntegrityError, match=f"ema-v2: .*{message}"):
                distill(config)
            shutil.rmtree(before, ignore_errors=True)
            shutil.move(tmp_path / "copy", before)
        for name in ("write_metadata", "remove_others"):
            with monkeypatch.context() as patch:
                patch.setattr(refreshes, name, Mock(side_effect=Killed))
                with pytest.raises(Killed):
                    distill(config)
    assert distill(config).resumed_at == 4
    assert weights(tmp_path) == weights(whole.into)
    assert metrics(tmp_path / "out") == metrics(whole.into / "out")
    ours, theirs = (teachers_of(into) for into in (tmp_path, whole.into))
    assert {unit: scores["name"] for unit, scores in ours.items()} == {
        unit: scores["name"] for unit, scores in theirs.items()
    }


def test_roles_in_any_order_keep_the_bounds_of_both_ages(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let samplers run 4 updates ahead, kill the trainer, and train from the same store again."""
    changes = ("loop.max_age=4", *FORMS["ema"], "teacher.follow_every=4")
    config = configure(models, tmp_path / "a", *changes)
    order = random.Random(0)

    def in_any_order(workers: list[Worker[Any]]) -> None:
        for worker in order.choices(workers, k=3):
            worker.do_one()

    def killed(stage: str, done: int, *_: Any) -> None:
        if done == 7:
            raise Killed

    roles: Sequence[Role] = ("score", "score", "rollout")
    with pytest.raises(Killed):
        follow(config, monkeypatch, in_any_order, roles, progress=killed)
    follow(config, monkeypatch, in_any_order, roles)
    for (number, _), scores in teachers_of(tmp_path / "a").items():
        assert scores["teacher"]["version"] == max(0, number - 2) * UPDATES // 4 * 4
    lines = metrics(tmp_path / "a" / "out")
    students, teachers = (
        [line[f"cache/{name}"] for line in lines] for name in ("age", "teacher_age")
    )
    assert max(students) > 1, "the samplers ran ahead"
    assert max(students[::UPDATES]) <= 4
    assert max(teachers[::UPDATES]) == 6 <= 4 + 4 - UPDATES
    shutil.copytree(tmp_path / "a" / "store", tmp_path / "b" / "store")
    (tmp_path / "b" / "out").mkdir()
    shutil.copy(tmp_path / "a" / "out" / "teacher.json", tmp_path / "b" / "out")
    train_role(configure(models, tmp_path / "b", *changes))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_context_teaches_and_without_it_there_is_nothing_to_learn(
    models: Path, tmp_path: Path
) -> None:
    """Train on all ids, so that the loss is the whole divergence: 0 from oneself."""
    every_id = (
        *("score.teacher_topk_min=99", "score.teacher_topk_max=99", "train.loss_topk=99"),
        *("train.objective=forward_kl", "train.pack_length=512", "loop.updates_per_round=1"),
        *("rollout.n=4", "loop.prompts_per_round=5", "loop.rounds=8", "train.learning_rate=1e-2"),
        *("train.save_steps=100", "rollout.unit_prompts=5"),
    )
    said: list[str] = []
    alone = configure(
        models,
        tmp_path / "alone",
        *every_id,
        *("loop.rounds=2", "teacher.model=", "teacher.follow=student"),
        file="fixed.toml",
    )
    distill(alone, on_event=said.append)
    taught = configure(
        models, tmp_path / "taught", *every_id, "teacher.follow=ema", "teacher.ema_decay=0.99"
    )
    distill(taught, on_event=said.append)
    nothing, something = (metrics(tmp_path / name / "out") for name in ("alone", "taught"))
    assert [line for line in said if line.startswith("warning: teacher.follow")] == [
        "warning: teacher.follow = student without score.teacher_kind = context: the teacher is "
        "the student and reads the same prompts, so the divergence from it is about 0"
    ]
    assert max(line["loss"] for line in nothing) < 1e-5
    losses = [line["loss"] for line in something]
    gradient = min(line["train/grad_norm"] for line in something)
    assert gradient > 100 * max(line["train/grad_norm"] for line in nothing)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["teacher.model=other"], "the teacher is the student, .*student, and teacher.model is"),
        (["teacher.follow_every=3"], r"follow_every = 3: a version is published every 2 updates"),
        (["teacher.ema_decay=0.5"], "ema_decay is set with teacher.follow = student"),
        (
            ["teacher.served=x"],
            "teacher.served is set with teacher.follow = student: the teacher is",
        ),
        (["teacher.follow="], "teacher.model is missing"),
        (["teacher.follow=", "teacher.model=x", "teacher.follow_every=2"], "follow is empty"),
        ([f"teacher.name={'a' * 101}"], "has 101 characters"),
        (["run.backend=server"], "a server does not load versions of the student"),
        (["run.backend=vllm"], "in one process the model in training scores too"),
        (["lora.r=2", "lora.load_in_4bit=true", "teacher.follow=ema"], "4 bits are not published"),
        (["score.prompts=p.jsonl"], "must be left out: a loop fills the template in"),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_a_teacher_that_cannot_follow_is_refused_at_once(
    models: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(configure(models, tmp_path, *changes))
    assert list(tmp_path.iterdir()) == []


def test_a_base_model_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher_kind = base: distill does not take it"):
        distill(configure(models, tmp_path, "score.teacher_kind=base", file="fixed.toml"))


def test_the_example_of_the_readme_is_a_loop() -> None:
    text = (Path(__file__).resolve().parents[4] / "engine" / "README.md").read_text()
    (block,) = re.findall(r"```toml follow\n(.*?)```", text, re.S)
    config = validate(
        RunConfig, {**NEEDED, "loop": {"rounds": 1}, **tomllib.loads(block)}, source="README"
    )
    assert (config.teacher.follow, config.score.teacher_kind) == ("student", "context")


def test_follow_is_a_key_of_loops_alone() -> None:
    for kind in (ScoreConfig, EstimateConfig):
        values = {"teacher": {"model": "m", "name": "t", "follow": "student"}}
        with pytest.raises(ConfigError, match=r"unknown key teacher\.follow"):
            validate(kind, {**NEEDED, **values}, source="flags")


def test_a_fixed_teacher_may_have_a_context_too(models: Path, tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "prompt": "abc"} for i in range(4)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = (f"score.context={tmp_path / 'c.jsonl'}", "loop.rounds=1", "score.teacher_kind=context")
    with pytest.raises(PromptError, match="has no prompt 'p4', and 0 others"):
        distill(configure(models, tmp_path / "a", *few, file="fixed.toml"))
    few = (*few, "prompts.limit=4")
    distill(configure(models, tmp_path / "b", *few, file="fixed.toml"))
    ((_, scores), *_) = teachers_of(tmp_path / "b").items()
    assert (scores["name"], scores["teacher_kind"]) == ("self", "context")
    assert scores["context"] != ""
    other = configure(models, tmp_path / "b", *few, "score.context=p.jsonl", file="fixed.toml")
    with pytest.raises(IdentityError, match="holds a run with context"):
        distill(other)
