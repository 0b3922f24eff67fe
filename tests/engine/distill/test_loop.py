"""The loop: the student of each rollout, the rows of each update, and resuming after kills."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import logitcask.engine.distill.on_policy_rows as loop
from logitcask.engine.commands.train import run_train
from logitcask.engine.config.parse.toml import read_toml
from logitcask.engine.config.sections import RunConfig, Student, TrainConfig
from logitcask.engine.distill.loop import distill
from logitcask.engine.distill.on_policy_rows import OnPolicyRows, deal
from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import live_digest, load_student
from logitcask.engine.packing.plan import Lengths
from logitcask.engine.packing.source import PackSource
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.verify import verify
from logitcask.engine.training.run import TrainReport
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

WORKER = Path(__file__).with_name("kill_worker.py")
PROMPTS, PER_ROUND, ROUNDS, UPDATES = 8, 3, 5, 2
ROUND_PROMPTS = [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3], [4, 5, 6]]
TOML = f"""
[student]
model = "student"
[teacher]
model = "teacher"
name = "big"
[prompts]
file = "p.jsonl"
[store]
url = "store"
[rollout]
n = 2
max_new_tokens = 12
student_topk = 4
unit_prompts = 3
[score]
teacher_topk_min = 8
teacher_topk_max = 16
[train]
objective = "forward_kl"
loss_topk = 8
learning_rate = 5e-3
pack_length = 48
save_steps = 3
[loop]
rounds = {ROUNDS}
prompts_per_round = {PER_ROUND}
updates_per_round = {UPDATES}
[run]
out = "out"
device = "cpu"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with student, teacher, prompts and d.toml; stores and runs are elsewhere."""
    path = tmp_path_factory.mktemp("models")
    save_folder(path / "student", make_model(hidden=16, seed=1, spread=0.1))
    save_folder(path / "teacher", make_model(seed=2, spread=0.3))
    rows = [{"id": f"p{i}", "prompt": "abcdefgh"[: i + 1]} for i in range(PROMPTS)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "p.jsonl").write_text(text)
    (path / "d.toml").write_text(TOML)
    return path


def configure(models: Path, into: Path, *changes: str) -> RunConfig:
    places = (f"store.url={into / 'store'}", f"run.out={into / 'out'}")
    return read_toml(models / "d.toml", [*places, "prompts.chat_template=false", *changes])


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        assert line.pop("progress/seconds") > 0
        assert 0 <= line.pop("train/data_wait") <= 1
    return found


def keys(store: Store) -> Counter[str]:
    return Counter(segment.unit_key for segment in store.head().segments)


class Whole:
    """An uninterrupted run, with the packs that its trainer read."""

    def __init__(self, models: Path, into: Path) -> None:
        self.config = configure(models, into)
        self.digests: list[str] = []
        self.packs: list[tuple[int, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            prepare, pack = OnPolicyRows.prepare, OnPolicyRows.pack

            def spy_prepare(rounds: Any, step: int) -> Any:
                self.digests.append(live_digest(rounds.student))
                return prepare(rounds, step)

            def spy_pack(rounds: Any, index: int) -> Any:
                self.packs.append((index // rounds.width, pack(rounds, index)))
                return self.packs[-1][1]

            patch.setattr(OnPolicyRows, "prepare", spy_prepare)
            patch.setattr(OnPolicyRows, "pack", spy_pack)
            self.calls: list[tuple[Any, ...]] = []
            self.lines: list[str] = []
            self.report: TrainReport = distill(
                self.config,
                progress=lambda *call: self.calls.append(call[:3]),
                on_event=self.lines.append,
            )
        self.out, self.store = into / "out", open_store(into / "store")
        self.weights = (self.out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(models, tmp_path_factory.mktemp("whole"))


def test_every_round_is_sampled_by_the_student_of_its_start(whole: Whole) -> None:
    segments = whole.store.head().rollouts("main")
    seen = [[] for _ in range(ROUNDS)]
    for segment in segments:
        number, rest = divmod(segment.unit["version"], UPDATES)
        assert rest == 0
        student = segment.provenance["student"]
        assert student["version"] == segment.unit["version"]
        assert student["weights"] == whole.digests[segment.unit["version"]]
        rollouts = whole.store.read_rollouts(segment)
        assert set(rollouts.version_start) == set(rollouts.version_end) == {student["version"]}
        ids = [int(p.id[1:]) for p in rollouts.prompts]
        first, count = segment.unit["first"], segment.unit["count"]
        assert ids == list(range(first, first + count))
        seen[number] += ids
    assert len(set(whole.digests)) == ROUNDS * UPDATES, "every update moves the weights"
    assert [sorted(ids) for ids in seen] == [sorted(ids) for ids in ROUND_PROMPTS]
    roots = {
        (s.provenance["student"]["base_weights"], s.provenance["chat_template"]) for s in segments
    }
    assert roots == {(model_ref(whole.config.student.model, chat_template=False).digest, False)}
    assert keys(whole.store).most_common(1)[0][1] == 1


def test_an_update_trains_on_its_share_of_its_own_round(whole: Whole) -> None:
    snapshot = whole.store.head()
    for number in range(ROUNDS):
        expected: Counter[tuple[int, ...]] = Counter()
        for segment in snapshot.rollouts("main"):
            if segment.unit["version"] == number * UPDATES:
                rolled = whole.store.read_rollouts(segment)
                ends = rolled.seq_off
                expected.update(
                    tuple(rolled.prompts[p].token_ids) + tuple(rolled.tokens[a:b].tolist())
                    for p, a, b in zip(rolled.seq_prompt, ends[:-1], ends[1:], strict=True)
                )
        trained: Counter[tuple[int, ...]] = Counter()
        for update in range(number * UPDATES, (number + 1) * UPDATES):
            share: Counter[tuple[int, ...]] = Counter()
            for at, row in whole.packs:
                if at == update and len(row.targets):
                    assert set(row.targets.version.tolist()) == {number * UPDATES}
                    starts = np.flatnonzero(row.position_ids[0].numpy() == 0)
                    parts = np.split(row.input_ids[0].numpy(), starts[1:])
                    share.update(tuple(part.tolist()) for part in parts)
            assert share.total() == PER_ROUND * 2 / UPDATES
            trained += share
        assert trained == expected


def test_metrics_count_updates_and_ages(whole: Whole) -> None:
    n = ROUNDS * UPDATES
    found = lines(whole.out)
    assert [line["progress/step"] for line in found] == list(range(1, n + 1))
    assert [line["cache/age"] for line in found] == [i % UPDATES for i in range(n)]
    drift = [line["cache/approx_kl"] for line in found]
    assert max(drift[::UPDATES]) < 1e-9 < 1e-6 < min(drift[1::UPDATES]), "on policy only at first"
    assert found[-1]["progress/positions"] == whole.report.positions
    assert (whole.report.updates, whole.report.version, whole.report.resumed_at) == (n, n, 0)
    calls = dict.fromkeys(call for call in whole.calls if call[0] == "train")
    assert list(calls) == [("train", i, n) for i in range(n + 1)]
    metadata = json.loads((whole.out / "logitcask.json").read_text())
    assert metadata["version"] == n


@pytest.mark.parametrize("stage", ["rollout", "score"])
def test_progress_counts_the_prompts_of_all_rounds(whole: Whole, stage: str) -> None:
    calls = dict.fromkeys(call for call in whole.calls if call[0] == stage)
    # The third round has two units, because it starts again at the first prompt.
    done = [0, 3, 6, 7, 9, 12, 15]
    assert list(calls) == [(stage, prompts, ROUNDS * PER_ROUND) for prompts in done]


def test_notes_of_scorings_are_reported_once(models: Path, tmp_path: Path) -> None:
    config = configure(models, tmp_path, "loop.rounds=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.OnPolicyRows, "_packed", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            distill(config)
    messages: list[str] = []
    other = configure(models, tmp_path, "loop.rounds=3", "store.profile=raw32")
    distill(other, on_event=messages.append)
    (note,) = [line for line in messages if "profile" in line]
    assert note == "scores of 'big' are stored in profile default; raw32 is used for new ones"


def test_the_student_comes_nearer_to_the_teacher(models: Path, tmp_path: Path) -> None:
    """Compare KL(teacher | student) over the whole vocabulary on the first student's responses."""
    config = configure(
        models,
        tmp_path,
        "loop.rounds=6",
        "loop.prompts_per_round=8",
        "loop.updates_per_round=4",
        "rollout.unit_prompts=8",
        "rollout.n=8",
        "train.learning_rate=1e-2",
        "train.loss_topk=64",
        "score.teacher_topk_min=64",
        "score.teacher_topk_max=99",
        "train.pack_length=512",
    )
    distill(config)
    store = open_store(tmp_path / "store")
    rolled = store.read_rollouts(store.head().rollouts("main")[0])
    last = rolled.seq_off[:-1][(rolled.seq_prompt == PROMPTS - 1) & (rolled.lengths() == 12)]
    prompt = torch.tensor(rolled.prompts[-1].token_ids).expand(len(last), -1)
    answers = torch.from_numpy(rolled.tokens[last[:, None] + np.arange(12)].astype(np.int64))
    texts = torch.cat([prompt, answers], 1)

    def log_p(path: Path | str) -> torch.Tensor:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path)(texts).logits
        return logits[:, prompt.shape[1] - 1 : -1, :99].log_softmax(-1)

    teacher = log_p(config.teacher.model)
    before, after = (
        float((teacher.exp() * (teacher - log_p(path))).sum(-1).mean())
        for path in (config.student.model, tmp_path / "out")
    )
    losses = [line["loss"] for line in lines(tmp_path / "out")]
    assert max(after / before, np.mean(losses[-4:]) / np.mean(losses[:4])) < 0.9


class Worker:
    """Distillations in separate processes, which can be killed."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # The script's folder must not come first: the files next to it would shadow packages.
        root = str(WORKER.parent.parent.parent)
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
        env["PYTHONSAFEPATH"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, config: RunConfig, at: str = "", count: int = 0) -> int:
        """Run a distillation and return its exit code."""
        job = {"config": config.model_dump(mode="json"), "at": at, "count": count}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    with worker.process:
        yield worker
        assert worker.process.stdin is not None
        worker.process.stdin.close()


@pytest.mark.parametrize(
    "kills",
    [
        # Every list is one run, killed at each of these points in turn.
        [("rollout", 1), ("score", 3), ("micro_batch", 2), ("mark", 1), ("moving", 2)],
        [
            ("publish", 2),
            ("rollout", 2),
            ("weights", 1),
            ("marked", 1),
            ("update", 1),
            ("saving", 1),
        ],
    ],
    ids=lambda kills: "-".join(at for at, _ in kills),
)
def test_killed_at_any_point_it_ends_with_the_same_student(
    models: Path, whole: Whole, worker: Worker, tmp_path: Path, kills: list[tuple[str, int]]
) -> None:
    config = configure(models, tmp_path)
    for at, count in kills:
        assert worker.run(config, at, count) == -9, (at, count)
        assert not (tmp_path / "out" / "logitcask.json").exists()
    assert worker.run(config) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole.weights
    assert lines(tmp_path / "out") == lines(whole.out)
    store = open_store(tmp_path / "store")
    assert keys(store) == keys(whole.store)
    assert verify(store).segments == verify(whole.store).segments
    assert load_student(model_ref(str(tmp_path / "out"), chat_template=False)) is not None


def test_a_loop_resumes_at_the_start_of_a_round(
    models: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expect checkpoints at 4, 8 and 10: save_steps = 3 is rounded up to rounds of 2 updates."""

    class Cancelled(Exception):
        pass

    def progress(stage: str, done: int, *_: Any) -> None:
        if (stage, done) == ("train", 7):
            raise Cancelled

    shutil.copytree(whole.store.url, tmp_path / "store")
    config = configure(models, tmp_path)
    with pytest.raises(Cancelled):
        distill(config, progress=progress)
    folders = [f.name for f in (tmp_path / "out" / "checkpoints").iterdir()]
    assert folders == ["checkpoint-4"]
    steps: list[int] = []
    prepare = OnPolicyRows.prepare
    monkeypatch.setattr(
        OnPolicyRows, "prepare", lambda r, step: (steps.append(step), prepare(r, step))[1]
    )
    report = distill(config)
    assert (report.resumed_at, steps) == (4, [4, 5, 6, 7, 8, 9])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole.weights
    assert keys(open_store(tmp_path / "store")) == keys(whole.store)


def test_the_same_call_after_the_end_does_nothing(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    for name in ("rollout", "score"):
        monkeypatch.setattr(loop, name, never)
    before = whole.store.head().number
    report = distill(whole.config)
    assert (report.resumed_at, report.last) == (report.updates, whole.report.last)
    assert whole.store.head().number == before
    assert (whole.out / "model.safetensors").read_bytes() == whole.weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.pack_length=19", r"pack_length = 19 is less .* 20 tokens"),
        ("train.gradient_accumulation_steps=2", "train.gradient_accumulation_steps = 2"),
        ("train.num_train_epochs=3", "train.num_train_epochs = 3"),
        ("train.teacher=other", "train.teacher = other"),
        ("loop.prompts_per_round=9", r"prompts_per_round = 9: the file has 8 prompts"),
        ("loop.updates_per_round=7", r"updates_per_round = 7: a round has 6 responses"),
        ("train.objective=overlop", "the nearest is overlap"),
    ],
    ids=lambda text: text.split("=")[0] if "=" in text and "." in text else "",
)
def test_a_loop_that_could_not_run_is_refused_at_once(
    models: Path, tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(configure(models, tmp_path, change))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_tokenizer_is_refused_before_sampling(
    models: Path, tmp_path: Path
) -> None:
    other = make_tokenizer(characters=CHARACTERS[::-1])
    save_folder(tmp_path / "teacher", make_model(seed=2), other)
    with pytest.raises(IdentityError, match="tokenizer"):
        distill(configure(models, tmp_path, f"teacher.model={tmp_path / 'teacher'}"))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_several_processes_are_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2"):
        distill(configure(models, tmp_path))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.learning_rate=1e-4", r"settings\.lr = 0.005, not 0.0001"),
        ("run.seed=1", r"settings\.seed = 0, not 1"),
        ("loop.rounds=6", r"loop\.rounds = 5, not 6"),
        ("score.teacher_topk_max=17", r"request\.k_max = 16, not 17"),
        ("train.objective=overlap", r"objective\.support = 'teacher', not 'overlap'"),
    ],
    ids=["lr", "seed", "rounds", "k_max", "objective"],
)
def test_another_configuration_is_refused_by_key(
    models: Path, whole: Whole, tmp_path: Path, change: str, key: str
) -> None:
    """Refuse it in the folder of a run and on its rollouts, even with overwrite."""
    home = whole.out.parent
    rollouts = r"rollouts 'main' in .* holds a run with "
    with pytest.raises(IdentityError, match=rollouts + key):
        distill(configure(models, home, change))
    with pytest.raises(IdentityError, match=rollouts + key):
        distill(configure(models, home, change, "run.overwrite=true"))
    with pytest.raises(IdentityError, match=rollouts + key + r"[\s\S]*store\.rollouts"):
        distill(configure(models, home, change, f"run.out={tmp_path / 'out'}"))
    with pytest.raises(IdentityError, match="out holds a run with " + key):
        distill(
            configure(models, tmp_path, change, f"run.out={home / 'out'}", "store.rollouts=main")
        )
    assert (whole.out / "model.safetensors").read_bytes() == whole.weights
    assert not (tmp_path / "out").exists()


def test_runs_share_a_store_under_separate_names(
    models: Path, whole: Whole, tmp_path: Path
) -> None:
    shutil.copytree(whole.store.url, tmp_path / "store")
    distill(
        configure(
            models, tmp_path, "train.learning_rate=1e-4", "loop.rounds=2", "store.rollouts=other"
        )
    )
    store = open_store(tmp_path / "store")
    verify(store)
    ours, theirs = (store.head().rollouts(name) for name in ("other", "main"))
    first = [s.seg_id for s in ours if s.unit["version"] == 0]
    assert first == [s.seg_id for s in theirs if s.unit["version"] == 0], "one student, one seed"
    assert {s.seg_id for s in ours[1:]}.isdisjoint(s.seg_id for s in theirs)


def test_rollouts_of_no_loop_are_refused(models: Path, whole: Whole, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store", create=True)
    source = whole.store.head().rollouts("main")[0]
    provenance = {k: v for k, v in source.provenance.items() if k != "run"}
    store.commit_rollouts(
        whole.store.read_rollouts(source),
        name="main",
        unit_key=source.unit_key,
        unit=source.unit,
        provenance=provenance,
    )
    with pytest.raises(IdentityError, match="'main' .* were not made by distill"):
        distill(configure(models, tmp_path))


def test_a_rate_of_zero_keeps_rounds_separate(models: Path, tmp_path: Path) -> None:
    """Sample two rounds with the same student: the first update of a warm-up changes nothing."""
    config = configure(
        models,
        tmp_path,
        "train.warmup_steps=2",
        "rollout.unit_prompts=8",
        "loop.prompts_per_round=8",
        "loop.updates_per_round=1",
        "loop.rounds=3",
    )
    report = distill(config)
    store = open_store(tmp_path / "store")
    found = store.head().rollouts("main")
    weights = {s.unit["version"]: s.provenance["student"]["weights"] for s in found}
    assert weights[0] == weights[1] != weights[2]
    assert [line["cache/age"] for line in lines(tmp_path / "out")] == [0, 0, 0]
    assert report.positions == sum(s.counts["P"] for s in found)


def test_many_small_units_and_long_rows_lose_nothing(models: Path, tmp_path: Path) -> None:
    """Use windows that fill a part of a row only, and rounds that fill one row."""
    config = configure(
        models,
        tmp_path,
        "rollout.unit_prompts=1",
        "rollout.n=1",
        "train.pack_length=2048",
        "loop.prompts_per_round=8",
        "loop.rounds=1",
    )
    report = distill(config)
    found = open_store(tmp_path / "store").head().rollouts("main")
    assert report.positions == sum(s.counts["P"] for s in found)
    assert all(line["train/grad_norm"] > 0 for line in lines(tmp_path / "out"))


@pytest.mark.parametrize(("sizes", "updates"), [([5, 1, 4], 3), ([2], 2), ([7, 7], 1), ([1, 1], 2)])
def test_shares_are_a_partition_of_equal_parts(sizes: list[int], updates: int) -> None:
    made = [
        Lengths(
            seg_id=str(i),
            prompt_ids=("p",),
            seq_prompt=np.zeros(n, np.int64),
            prompt=np.ones(n, np.int64),
            response=np.arange(1, n + 1),
        )
        for i, n in enumerate(sizes)
    ]
    shares = deal(made, updates, np.random.default_rng(0))
    kept = np.array([np.concatenate([part.response > 0 for part in share]) for share in shares])
    assert (kept.sum(0) == 1).all()
    assert set(kept.sum(1)) <= {sum(sizes) // updates, -(-sum(sizes) // updates)}


def test_train_takes_the_store_of_a_loop(models: Path, whole: Whole, tmp_path: Path) -> None:
    """Plan the two ranges of the third round, which wraps around, without missing units."""
    config = whole.config
    job = TrainConfig(
        student=Student(model=config.student.model),
        store=config.store,
        train=config.train.model_copy(update={"partial": False}),
        run=config.run.model_copy(update={"out": tmp_path / "out"}),
    )
    lines: list[str] = []
    report = run_train(job, on_event=lines.append)
    assert report.positions == whole.report.positions
    assert any("versions 0 to 8" in line for line in lines), lines


def test_train_misses_the_unit_that_a_kill_left_out(whole: Whole) -> None:
    """Read the log between the two units of the round that wraps around."""
    kinds = [segment.kind for segment in whole.store.head().segments]
    assert kinds[:8] == ["rollout", "score"] * 2 + ["rollout"] * 2 + ["score"] * 2
    with pytest.raises(IncompleteError, match="1 of 4 units"):
        PackSource(whole.store, whole.store.snapshot(4), "main", "big")
