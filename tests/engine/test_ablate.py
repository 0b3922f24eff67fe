"""Ablations: plan, refusals, resuming after a kill, and the table."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import logitcask.engine.ablate as ablations
import logitcask.engine.backends.hf as hf
from logitcask.engine.ablate import ablate, combinations, full_key
from logitcask.engine.ablate_table import (
    AblateReport,
    Passes,
    gap_recovery,
    markdown,
    saved_seconds,
    table_row,
)
from logitcask.engine.config.sections import Run, StoreSection, Student, TrainConfig
from logitcask.engine.config.training import Ablate, Eval, Train
from logitcask.engine.errors import ConfigError, IdentityError, IntegrityError, ObjectiveError
from logitcask.engine.store import Store
from logitcask.engine.training.run_dir.files import MetricsFile, locked
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_unit
from tests.engine.fitting import make_case

VARY = ["objective=teacher_topk,forward_kl", "train.loss_topk=2,4"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelRef]:
    units = [make_unit(i, prompts=2, vocab=99, lengths=[30, 24, 17, 36]) for i in range(2)]
    return make_case(tmp_path_factory.mktemp("case"), units)


def config_of(case: tuple[Store, ModelRef], **change: Any) -> TrainConfig:
    store, model = case
    return TrainConfig(
        student=Student(model=str(model.path)),
        store=StoreSection(url=str(store.url)),
        train=Train(
            **({"loss_topk": 4, "learning_rate": 1e-3, "pack_length": 96, "save_steps": 2} | change)
        ),
        run=Run(device="cpu"),
    )


def run(
    case: tuple[Store, ModelRef],
    out: Path,
    vary: list[str],
    *,
    config: TrainConfig | None = None,
    **change: Any,
) -> AblateReport:
    progress = change.pop("progress", lambda *_: None)
    return ablate(config or config_of(case), vary, Ablate(out=out, **change), progress=progress)


def test_every_combination_has_a_folder_and_its_own_config(
    case: tuple[Store, ModelRef],
) -> None:
    found = combinations(config_of(case), VARY)
    assert [each.name for each in found] == [
        f"objective={objective},loss_topk={k}"
        for objective in ("teacher_topk", "forward_kl")
        for k in (2, 4)
    ]
    second = found[1].config.train
    assert (second.objective, second.loss_topk) == ("teacher_topk", 4)
    assert {each.config.train.learning_rate for each in found} == {1e-3}
    teachers = combinations(config_of(case), ["teacher=a,b,a+b"])
    assert [each.config.train.teacher for each in teachers] == ["a", "b", "a+b"]


@pytest.mark.parametrize(
    ("vary", "cause", "hint"),
    [
        ([], "nothing is varied", "--vary"),
        (["k"], "not key=value", "--vary loss_topk=1,4,16"),
        (["objectiv=opd"], "objectiv: names no key", "the nearest is train.objective"),
        (
            ["train.learning_rat=1"],
            "train.learning_rat: names no key",
            "the nearest is train.learning_rate",
        ),
        (["model=a,b", "seed=1,2"], "run.seed is the same in all runs", "--seeds"),
        (["eval.n=1,2"], "eval.n is the same in all runs", "another key"),
        (["loss_topk=2", "train.loss_topk=4"], "train.loss_topk is varied twice", "once"),
        (["loss_topk=2,2"], "loss_topk=2 comes twice", "once"),
        (["learning_rate=1e-3,-1"], "train.learning_rate = -1", "learning rate"),
    ],
)
def test_invalid_vary_options_are_refused(
    case: tuple[Store, ModelRef], vary: list[str], cause: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        combinations(config_of(case), vary)
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_commas_in_brackets_separate_no_values(case: tuple[Store, ModelRef]) -> None:
    vary = ["objective=gkd(parameter=0.1,k=4),opd+prune(k=2,drop=0.5)"]
    found = combinations(config_of(case), vary)
    assert [each.config.train.objective for each in found] == [
        "gkd(parameter=0.1,k=4)",
        "opd+prune(k=2,drop=0.5)",
    ]


def test_a_key_without_a_section_belongs_to_train() -> None:
    assert (full_key("loss_topk"), full_key("learning_rate"), full_key("run.dtype")) == (
        "train.loss_topk",
        "train.learning_rate",
        "run.dtype",
    )


def test_every_event_names_its_run(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    lines: list[str] = []
    settings = Ablate(out=tmp_path / "out", seeds=2)
    ablate(config_of(case), ["objective=teacher_topk,overlap"], settings, on_event=lines.append)
    runs = {f"objective={name}/seed-{i}" for name in ("teacher_topk", "overlap") for i in (0, 1)}
    assert {line.partition(": ")[0] for line in lines} == runs
    assert all((tmp_path / "out" / each / "logitcask.json").exists() for each in runs)
    assert "objective=teacher_topk/seed-1: support: fixed: the teacher's top-4" in lines


def test_a_kill_loses_nothing_and_nothing_is_sampled_or_scored(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = case
    trained: list[str] = []
    train = ablations.run_train

    def counted(config: TrainConfig, **rest: Any) -> Any:
        report = train(config, **rest)
        if report.resumed_at < report.updates:
            trained.append(config.run.out.parent.name)
        return report

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a sampler or a scorer was made")

    monkeypatch.setattr(ablations, "run_train", counted)
    monkeypatch.setattr(hf.HF, "__init__", never)
    before = store.head()

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int, *_: Any) -> None:
        assert total == 4
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        run(case, tmp_path / "a", VARY[:1], seeds=2, progress=kill)
    resumed = run(case, tmp_path / "a", VARY[:1], seeds=2)
    assert trained == ["objective=teacher_topk"] * 2 + ["objective=forward_kl"] * 2
    assert resumed.runs_trained == 1
    straight = run(case, tmp_path / "b", VARY[:1], seeds=2)
    assert straight.runs_trained == 4
    for ours, theirs in zip(resumed.rows, straight.rows, strict=True):
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {
            k: v for k, v in theirs.items() if "seconds" not in k
        }
    assert store.head().number == before.number
    runs = list((tmp_path / "a").glob("*/seed-*/run.json"))
    assert len(runs) == 4
    assert {json.loads(file.read_text())["pin"]["sha256"] for file in runs} == {before.sha256}
    again = run(case, tmp_path / "a", VARY[:1], seeds=2)
    assert (again.runs_trained, again.rows) == (0, resumed.rows)
    assert json.loads((tmp_path / "a" / "ablate.json").read_text())["pin"] == before.number
    assert 0 < straight.trainings_seconds <= straight.seconds


def test_a_stopped_training_resumes_from_its_checkpoint(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(case, tmp_path / "a", ["loss_topk=2"]).rows[0]["loss"]
    append, written = MetricsFile.append, []

    def stopping(self: MetricsFile, line: dict[str, float | None]) -> None:
        append(self, line)
        written.append(line["progress/step"])
        if written == [1, 2, 3]:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsFile, "append", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path / "b", ["loss_topk=2"])
    resumed = run(case, tmp_path / "b", ["loss_topk=2"])
    assert written == [1, 2, 3, 3], "update 2 had a checkpoint"
    assert (resumed.runs_trained, resumed.rows[0]["loss"]) == (1, straight)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 100_000, '{"pin": 1}', '{"pin": "1", "sha256": 2, "common": {}}'],
)
def test_a_damaged_plan_is_refused(case: tuple[Store, ModelRef], tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"plan\.json is") as caught:
        run(case, tmp_path, ["loss_topk=2"])
    assert "another --out" in caught.value.hint


def test_a_plan_carries_its_own_digest(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablations, "run_train", stop)
    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path, ["loss_topk=2"])
    plan = tmp_path / "plan.json"
    plan.write_text(
        plan.read_text().replace('"train.learning_rate": 0.001', '"train.learning_rate": 0.002')
    )
    with pytest.raises(IntegrityError, match="its own sha256"):
        run(case, tmp_path, ["loss_topk=2"])


def test_two_ablations_do_not_share_a_folder(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    with locked(tmp_path, pytest.fail), pytest.raises(ConfigError, match="is in use by process"):
        run(case, tmp_path, ["loss_topk=2"])


def test_units_are_decoded_for_the_first_run_only(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logitcask.engine.store.cache as cache

    read: list[str] = []
    decode = cache.read_unit

    def counted(store: Any, rollout: Any, *chains: Any) -> Any:
        read.append(rollout.seg_id)
        return decode(store, rollout, *chains)

    monkeypatch.setattr(cache, "read_unit", counted)
    run(case, tmp_path, VARY[:1])
    assert len(read) == len(set(read)) == 2


def test_another_configuration_is_refused_by_the_name_of_its_key(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    run(case, tmp_path, ["loss_topk=2"])
    with pytest.raises(IdentityError, match=r"train\.learning_rate = 0.001, not 0.002"):
        run(case, tmp_path, ["loss_topk=2"], config=config_of(case, learning_rate=2e-3))
    # More values of the same key are allowed.
    more = run(case, tmp_path, ["loss_topk=2,4"])
    assert (more.runs_trained, len(more.rows)) == (1, 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no plan.json"):
        run(case, tmp_path / "other", ["loss_topk=2"])


def test_an_invalid_combination_is_refused_before_the_first_training(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    with pytest.raises(ObjectiveError, match="loss_topk=99: "):
        run(case, tmp_path / "a", ["loss_topk=2,99"])
    assert not (tmp_path / "a").exists()
    skipped = run(case, tmp_path / "a", ["loss_topk=2,99"], skip_refused=True)
    good, bad = skipped.rows
    assert (good["n"], good["refused"], bad["n"], bad["loss"]) == (1, "", 0, None)
    assert "99" in bad["refused"]
    assert f"| {bad['refused']} |" in (tmp_path / "a" / "ablate.md").read_text()


@pytest.mark.parametrize("recorded", [True, False])
def test_the_teachers_seconds_saved_are_those_of_its_scores_in_every_pass(
    tmp_path: Path, recorded: bool
) -> None:
    """Expect 20 s for units of 2 and 3 s and two runs of two epochs; unknown for an old store."""
    units = [make_unit(i, prompts=2, vocab=99, lengths=[30, 24, 17, 36]) for i in range(2)]
    store, model = make_case(tmp_path / "case", units, seconds=[2.0, 3.0] if recorded else None)
    config = config_of((store, model), num_train_epochs=2)
    report = run((store, model), tmp_path / "out", ["loss_topk=2"], config=config, seeds=2)
    assert report.teacher_seconds_saved == (20.0 if recorded else None)
    written = json.loads((tmp_path / "out" / "ablate.json").read_text())
    assert written["teacher_seconds_saved"] == report.teacher_seconds_saved
    expected = "added 20 s (5 s a pass x 2 runs x 2 epochs)" if recorded else "saved: unknown"
    assert expected in markdown(report)


def a_run(loss: float, before: float, after: float) -> Any:
    last = {"loss": loss, "overlap/ratio": 0.5, "overlap/mass_student": None}
    evaluations = [
        {"eval/accuracy": 0.0, "eval/avg_at_n": before, "eval/seconds": 1.0},
        {"eval/accuracy": 1.0, "eval/avg_at_n": after, "eval/seconds": 3.0},
    ]
    return SimpleNamespace(last={**last, "progress/seconds": 10.0}, evaluations=evaluations)


def test_mean_spread_and_gap_recovery_worked_by_hand() -> None:
    """Check losses 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2; recoveries 0.5, 1, 0."""
    values = {"train.loss_topk": 2}
    runs = [a_run(1.0, 0.2, 0.4), a_run(2.0, 0.2, 0.6), a_run(6.0, 0.2, 0.2)]
    found = table_row(values, runs, teacher=0.6)
    assert (found["loss_topk"], found["n"], found["loss"]) == (2, 3, 3.0)
    assert found["loss_sd"] == pytest.approx(7**0.5)
    assert found["gap_recovery"] == pytest.approx(0.5)
    assert found["gap_recovery_sd"] == pytest.approx(0.5)
    assert (found["seconds"], found["seconds_sd"]) == (13.0, 0.0)
    assert (found["overlap_ratio"], found["overlap_mass"]) == (0.5, None)
    assert table_row(values, runs)["gap_recovery"] is None
    assert table_row(values, runs[:1])["loss_sd"] is None
    assert gap_recovery(0.6, 0.7, 0.6) is None
    passes = (Passes(seconds=1.5, runs=3, epochs=2), Passes(seconds=4.0, runs=1, epochs=1))
    report = AblateReport(
        out=Path("x"),
        snapshot=3,
        rows=(found,),
        runs_trained=3,
        seconds=1.0,
        trainings_seconds=1.0,
        teacher_seconds_spent=0.0,
        teacher_passes=passes,
        teacher_seconds_saved=13.0,
    )
    assert saved_seconds(passes) == 13.0
    assert saved_seconds([Passes(seconds=None, runs=3, epochs=2), *passes]) is None
    assert "13 s (1.5 s a pass x 3 runs x 2 epochs + 4 s a pass x 1 runs" in markdown(report)
    assert "| 2 | 3 | 3 ± 2.6 | 1 ± 0 | 0.4 ± 0.2 | 0.5 ± 0.5 | 0.5 ± 0 | 13 ± 0 |" in markdown(
        report
    )


def test_combinations_are_evaluated_if_prompts_are_configured(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    file = tmp_path / "e.jsonl"
    rows = [{"id": f"e{i}", "prompt": "ab"[: i + 1], "answer": "a"} for i in range(2)]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    evaluation = Eval(prompts=file, n=2, max_new_tokens=4)
    config = config_of(case).model_copy(update={"eval": evaluation})
    (found,) = run(case, tmp_path / "a", ["loss_topk=2"], config=config, teacher_accuracy=1.0).rows
    (noted,) = (tmp_path / "a").glob("loss_topk=2/seed-0/run.json")
    first, last = json.loads(noted.read_text())["evaluations"]
    assert found["avg_at_n"] == last["eval/avg_at_n"]
    gap = 1.0 - first["eval/avg_at_n"]
    assert found["gap_recovery"] * gap == last["eval/avg_at_n"] - first["eval/avg_at_n"]
