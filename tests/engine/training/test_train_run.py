"""The folder of a run: resumed bit-exactly, never mixed with another run; nothing is printed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError, ObjectiveError
from logitcask.engine.metrics.metrics import COMMON_METRICS
from logitcask.engine.models.digests import read_json, sha256_of, write_json
from logitcask.engine.models.forward import inner_model
from logitcask.engine.models.identity import model_ref, read_metadata
from logitcask.engine.models.load import load_student
from logitcask.engine.models.save import dtype_of_result
from logitcask.engine.objectives import parse_objective
from logitcask.engine.store import Store
from logitcask.engine.training import metric_sampling
from logitcask.engine.training.cache_info import check_objective
from logitcask.engine.training.run import TrainReport
from logitcask.engine.training.train import train
from logitcask.engine.types import ModelRef
from tests.engine.cached import make_unit
from tests.engine.fitting import DENSE, FORWARD, REVERSE, make_case

SETTINGS = Train(
    learning_rate=1e-3,
    num_train_epochs=2,
    pack_length=96,
    gradient_accumulation_steps=2,
    save_steps=2,
    lr_scheduler_type="cosine",
)
"""Six updates on the case below."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, ModelRef]:
    units = [make_unit(i, prompts=2, vocab=99, lengths=[30, 24, 17, 36]) for i in range(4)]
    return make_case(tmp_path_factory.mktemp("case"), units)


def run(case: tuple[Store, ModelRef], out: Path, **change: Any) -> TrainReport:
    store, model = case
    run = {"device": "cpu"} | {k: change.pop(k) for k in tuple(change) if k in Run.model_fields}
    fields: dict[str, Any] = {
        "model": model,
        "run": Run(out=out, **run),
        "teacher": "big",
        "objective": REVERSE,
        "settings": SETTINGS,
    }
    return train(store, **(fields | change))


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        assert line.pop("progress/seconds") > 0
        assert 0 <= line.pop("train/data_wait") <= 1
    return found


@pytest.mark.parametrize("name", ["opd(k=64)", "rs_kd", "async_mc", "exopd", "full_vocab"])
def test_check_objective_refuses_the_same_objectives_as_train(
    case: tuple[Store, ModelRef], tmp_path: Path, name: str
) -> None:
    preset, store = parse_objective(name), case[0]
    with pytest.raises(ObjectiveError) as caught:
        run(case, tmp_path / "out", objective=preset)
    with pytest.raises(ObjectiveError) as ours:
        check_objective(preset, store, snapshot=store.head(), rollouts="main", teacher="big")
    assert str(ours.value) == str(caught.value)


def test_check_objective_reports_the_exactness(case: tuple[Store, ModelRef]) -> None:
    store = case[0]
    which = {"snapshot": store.head(), "rollouts": "main", "teacher": "big"}
    report = check_objective(parse_objective("opd", k=4), store, **which)
    assert report.support.startswith("frozen: the top-4 of the behaviour policy (version 0)")
    drawn = check_objective(parse_objective("sampled_token").objective, store, **which)
    assert "off policy (age unknown" in drawn.estimator


def settings_of(out: Path) -> Any:
    return read_json(out / "run.json", hint="")["settings"]


def test_a_run_of_another_default_pack_length_resumes(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    default = SETTINGS.model_copy(update={"pack_length": None, "max_steps": 1})
    own = run(case, tmp_path / "own", settings=default)
    recorded = settings_of(tmp_path / "own")["tokens_per_batch"]
    assert (own.updates, recorded) == (1, 39), "the longest sequence"
    run(case, tmp_path / "out", settings=default.model_copy(update={"pack_length": 4096}))
    again = run(case, tmp_path / "out", settings=default)
    assert (again.resumed_at, again.updates) == (1, 1)


def test_gradient_checkpointing_changes_no_update(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"max_steps": 2})
    run(case, tmp_path / "a", settings=settings)
    with pytest.raises(Cancelled):
        run(case, tmp_path / "b", settings=settings, progress=stop_at(1))
    again = settings.model_copy(update={"gradient_checkpointing": True})
    run(case, tmp_path / "b", settings=again)
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in "ab"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert settings_of(tmp_path / "a") == settings_of(tmp_path / "b"), "one identity"


class Cancelled(Exception):
    pass


def stop_at(step: int) -> Any:
    def progress(stage: str, done: int, *_: Any) -> None:
        if done == step:
            raise Cancelled

    return progress


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.needs("peft"))])
def test_resume_is_bit_exact(case: tuple[Store, ModelRef], tmp_path: Path, rank: int) -> None:
    lora = Lora(r=rank)
    straight = run(case, tmp_path / "a", lora=lora)
    out = tmp_path / "b"
    with pytest.raises(Cancelled):
        run(case, out, lora=lora, progress=stop_at(3))
    assert len(lines(out)) == 3, "one line after the checkpoint"
    # A kill leaves a partial line, and a partial checkpoint.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"progress/step": 4, "lo')
    (out / "checkpoints" / "checkpoint-3").mkdir()
    resumed = run(case, out, lora=lora)
    assert (straight.resumed_at, resumed.resumed_at, resumed.updates) == (0, 2, straight.updates)
    assert lines(out) == lines(tmp_path / "a")
    assert [line["progress/step"] for line in lines(out)] == list(range(1, straight.updates + 1))
    ledgers = [(tmp_path / x / "ledger.jsonl").read_text() for x in "ab"]
    assert ledgers[0] == ledgers[1]
    assert len(ledgers[0].splitlines()) == straight.updates
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_result_is_a_model_with_metadata(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    store, model = case
    calls: list[tuple[Any, ...]] = []
    report = run(case, tmp_path, config={"x": 1}, progress=lambda *call: calls.append(call))
    n = report.updates
    assert list(dict.fromkeys(call[:3] for call in calls)) == [
        ("train", i, n) for i in range(n + 1)
    ]
    assert calls[-1][3].positions == report.positions
    assert report.positions == 2 * 4 * (30 + 24 + 17 + 36)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert next(student.parameters()).dtype == torch.float32
    assert student.config.use_cache, "training without a cache is not a property of the student"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    metadata = read_metadata(tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    assert metadata is not None
    assert metadata["version"] == report.version == n
    assert (metadata["root"], metadata["parent"]) == (model.digest, model.digest)
    assert metadata["plan"] == found["plan"]
    assert metadata["store"] == found["store"] == store.uuid
    assert metadata["ledger"] == found["ledger_sha256"] == sha256_of(tmp_path / "ledger.jsonl")
    assert found["pin"] == metadata["pin"] == {"number": 7, "sha256": store.head().sha256}
    assert found["config"] == {"x": 1}
    assert found["exactness"]["estimator"] == "deterministic"
    ref = model_ref(str(tmp_path), chat_template=True)
    assert (ref.version, ref.base_weights) == (n, model.digest)
    again = run(case, tmp_path)
    assert (again.resumed_at, again.last) == (n, report.last)
    # No unused pickle, and weights as safetensors only.
    files = [path.name for path in tmp_path.rglob("*")]
    assert "training_args.bin" not in files
    assert not any(name.endswith(".bin") for name in files)


def test_the_second_generation_counts_on(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    first = run(case, tmp_path / "one")
    child = model_ref(str(tmp_path / "one"), chat_template=True)
    second = run(case, tmp_path / "two", model=child)
    assert second.version == first.updates + second.updates
    ages = [line["cache/age"] for line in lines(tmp_path / "two")]
    assert ages == [first.updates + i for i in range(second.updates)]


def test_the_loss_falls_and_the_metrics_are_logged(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"num_train_epochs": 8, "learning_rate": 3e-3})
    report = run(case, tmp_path, settings=settings, objective=parse_objective("forward_kl"))
    found = lines(tmp_path)
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    for name in ("overlap/ratio", "cache/coverage", "cache/approx_kl", "train/grad_norm"):
        assert all(isinstance(line[name], float) for line in found), name
    assert found[0]["train/lr"] == 3e-3
    assert all(line["train/changed_share"] > 0.9 for line in found[:-1])
    assert found[-1]["progress/positions"] == report.positions


def test_metrics_of_a_share_estimate_those_of_all_and_change_no_update(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    found = {}
    for share in (0.5, 1.0):
        run(
            case,
            tmp_path / str(share),
            settings=SETTINGS.model_copy(update={"metrics_fraction": share}),
        )
        found[share] = lines(tmp_path / str(share))
    for some, every in zip(found[0.5], found[1.0], strict=True):
        assert some["loss"] == every["loss"]
        assert some["train/grad_norm"] == every["train/grad_norm"]
        assert not any(name.endswith("_se") for name in every)
        for name in ("overlap/ratio", "entropy/student", "cache/coverage"):
            error = some[f"{name}_se"]
            assert error > 0
            assert abs(some[name] - every[name]) < 5 * error
    first = [line["overlap/ratio"] for line in found[0.5]]
    assert first != [line["overlap/ratio"] for line in found[1.0]], "a different set of rows"


def test_by_default_some_updates_have_metrics_and_none_is_changed_by_them(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_sampling, "POINTS", 2)
    every = SETTINGS.model_copy(update={"metrics_fraction": 1.0})
    run(case, tmp_path / "every", settings=every)
    run(case, tmp_path / "some")
    full, found = lines(tmp_path / "every"), lines(tmp_path / "some")
    due = [number for number, line in enumerate(found) if line["overlap/ratio"] is not None]
    assert (len(found), due) == (6, [0, 3, 5]), "every third, and the last"
    for some, all_rows in zip(found, full, strict=True):
        assert some.keys() >= {*COMMON_METRICS, "cache/age"}
        for name in ("loss", "train/grad_norm", "cache/age"):
            assert some[name] == all_rows[name]
    for number in due:
        some, all_rows = found[number], full[number]
        assert abs(some["overlap/ratio"] - all_rows["overlap/ratio"]) < 5 * some["overlap/ratio_se"]
    assert {found[1][name] for name in COMMON_METRICS} == {None}
    ledger = [json.loads(x) for x in (tmp_path / "some" / "ledger.jsonl").read_text().splitlines()]
    drifts = {number: line["drift"] for number, line in enumerate(ledger) if "drift" in line}
    assert drifts.keys() <= {*due}
    assert 5 in drifts


def test_an_update_without_a_measured_row_still_names_its_metrics(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"metrics_fraction": 1e-9})
    run(case, tmp_path, settings=settings)
    for line in lines(tmp_path):
        assert {name: line[name] for name in COMMON_METRICS} == dict.fromkeys(COMMON_METRICS)
        assert line["cache/age"] is not None
        assert line["loss"] > 0


def test_both_divergences_reach_the_loss_by_value(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    losses = {}
    for objective in (REVERSE, FORWARD):
        out = tmp_path / objective.divergence
        run(
            case,
            out,
            objective=objective,
            settings=SETTINGS.model_copy(update={"num_train_epochs": 1}),
        )
        losses[objective.divergence] = lines(out)[0]["loss"]
    assert abs(losses["reverse_kl"] / losses["forward_kl"] - 1) > 0.05, losses


def test_a_sibling_of_the_same_version_is_off_policy(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    """Use equal versions: a version counts updates since the base weights, in every run."""
    sibling = replace(case[1], digest="sha256:" + "2" * 64)
    reports = [
        run(
            case, tmp_path / name, model=model, objective=parse_objective("sampled_token")
        ).exactness
        for name, model in (("self", case[1]), ("sibling", sibling))
    ]
    assert "unbiased for KL(p || q) at age 0" in reports[0].estimator
    assert "biased: off policy (age 0, but of another run)" in reports[1].estimator


def test_checkpoints_of_a_finished_run_go_unless_they_are_kept(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    keep = SETTINGS.model_copy(update={"keep_checkpoints": True})
    first = run(case, tmp_path, settings=keep)
    assert first.checkpoints_bytes > 0
    text = (tmp_path / "metrics.jsonl").read_text()
    # It is no part of the run's identity: a kill before their removal leaves them too.
    again = run(case, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert again.checkpoints_bytes == 0
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert (again.resumed_at, again.positions, again.last) == (
        first.updates,
        first.positions,
        first.last,
    )


def test_a_student_of_bfloat16_is_saved_in_bfloat16(tmp_path: Path) -> None:
    units = [make_unit(0, prompts=2, vocab=99, lengths=[30, 24, 17, 36])]
    store, parent = make_case(tmp_path, units, hidden=16, layers=1)
    half = in_bfloat16(parent, tmp_path / "half")
    settings = Train(learning_rate=1e-3, pack_length=256)
    whole = settings.model_copy(update={"save_dtype": "float32"})
    report = run((store, half), tmp_path / "auto", settings=settings, objective=DENSE)
    run((store, half), tmp_path / "whole", settings=whole, objective=DENSE)
    saved, exact = (load_file(tmp_path / p / "model.safetensors") for p in ("auto", "whole"))
    assert saved.keys() == exact.keys()
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert all(saved[name].dtype == torch.bfloat16 for name in saved)
    assert all(torch.equal(saved[name], exact[name].bfloat16()) for name in saved)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "auto").dtype == torch.bfloat16
    assert not read_json(tmp_path / "auto" / "run.json", hint="")["settings"].get("save_dtype")
    # A version is the folder: the next generation begins at the rounded weights, and counts on.
    child = model_ref(str(tmp_path / "auto"), chat_template=True)
    assert (child.version, child.base_weights) == (report.version, half.base_weights)
    assert dtype_of_result("auto", child) == torch.bfloat16
    assert dtype_of_result("auto", parent) == torch.float32
    assert dtype_of_result("bfloat16", parent) == torch.bfloat16
    with pytest.raises(IdentityError, match=r"settings.save_dtype = 'float32', not None"):
        run((store, half), tmp_path / "whole", settings=settings, objective=DENSE)


def test_the_folder_of_a_loop_is_refused(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    """Refuse a run.json without a snapshot: a loop samples its rounds during the run."""
    run(case, tmp_path)
    file = tmp_path / "run.json"
    found = read_json(file, hint="")
    del found["pin"]
    write_json(file, {**found, "loop": {"rounds": 2}})
    with pytest.raises(IdentityError, match=r"holds a run with pin\.number = None, not 7"):
        run(case, tmp_path)


def test_later_commits_change_nothing(tmp_path: Path) -> None:
    units = [make_unit(i, prompts=2, vocab=99, lengths=[30, 24, 17, 36]) for i in range(3)]
    store, model = make_case(tmp_path, units[:2])
    out = tmp_path / "out"
    with pytest.raises(Cancelled):
        run((store, model), out, progress=stop_at(1))
    base = store.head().rollouts("main")[0]
    store.commit_rollouts(
        units[2].rollouts,
        name="main",
        unit_key="sha256:" + "7" * 64,
        unit={"version": 0, "first": 90},
        provenance=base.provenance,
    )
    report = run((store, model), out)
    assert (
        json.loads((report.out / "run.json").read_text())["pin"]["number"]
        == 3
        < store.head().number
    )
    with pytest.raises(IncompleteError):
        run((store, model), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            {"settings": SETTINGS.model_copy(update={"learning_rate": 2e-3})},
            r"settings.lr = 0.001, not 0.002",
        ),
        ({"objective": FORWARD}, r"objective.divergence = 'reverse_kl', not 'forward_kl'"),
        ({"seed": 1}, r"settings.seed = 0, not 1"),
    ],
    ids=["lr", "objective", "seed"],
)
def test_another_configuration_is_refused_by_key(
    case: tuple[Store, ModelRef], tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    with pytest.raises(Cancelled):
        run(case, tmp_path, progress=stop_at(1))
    with pytest.raises(IdentityError, match=key + r"[\s\S]*--overwrite"):
        run(case, tmp_path, **change)


def test_overwrite_restarts_and_keeps_other_files(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    run(case, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    short = SETTINGS.model_copy(update={"num_train_epochs": 1})
    report = run(case, tmp_path, settings=short, overwrite=True)
    assert report.resumed_at == 0
    assert len(lines(tmp_path)) == report.updates
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_checkpoint_of_another_plan_is_refused(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    with pytest.raises(Cancelled):
        run(case, tmp_path, progress=stop_at(3))
    metadata = tmp_path / "checkpoints" / "checkpoint-2" / "logitcask_checkpoint.json"
    write_json(metadata, {**read_json(metadata, hint=""), "plan": "sha256:0"})
    with pytest.raises(IdentityError, match=r"checkpoint-2 holds a run with plan"):
        run(case, tmp_path)


def test_folders_without_a_run_stay_untouched(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            run(case, tmp_path, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is the student itself"):
        run(case, case[1].path)


def test_a_store_of_another_tokenizer_is_refused(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    other = replace(case[1], tokenizer_digest="sha256:" + "1" * 64)
    with pytest.raises(IdentityError, match="tokenizer"):
        run(case, tmp_path / "out", model=other)


def test_an_off_lineage_student_has_no_age_and_no_frozen_support(
    case: tuple[Store, ModelRef], tmp_path: Path
) -> None:
    off_lineage = replace(case[1], base_weights="sha256:" + "1" * 64)
    frozen = replace(REVERSE, support="student")
    allowed = SETTINGS.model_copy(update={"allow_off_lineage": True})
    with pytest.raises(ObjectiveError, match="off-lineage"):
        run(case, tmp_path / "a", model=off_lineage, objective=frozen)
    run(case, tmp_path / "b", model=off_lineage, objective=frozen, settings=allowed)
    assert {line["cache/age"] for line in lines(tmp_path / "b")} == {None}


def test_nothing_is_printed(
    case: tuple[Store, ModelRef], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(case, tmp_path)
    assert capfd.readouterr() == ("", "")


def in_bfloat16(model: ModelRef, folder: Path) -> ModelRef:
    """Save a model in bfloat16, as a version of the same base weights."""
    AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16).save_pretrained(folder)
    for file in [*model.path.glob("token*"), model.path / "chat_template.jinja"]:
        (folder / file.name).write_bytes(file.read_bytes())
    return replace(model_ref(str(folder), chat_template=True), base_weights=model.base_weights)


def test_float32_weights_move_where_bfloat16_would_not(tmp_path: Path) -> None:
    units = [make_unit(0, prompts=2, vocab=99, lengths=[30, 24, 17, 36])]
    store, model = make_case(tmp_path, units, spread=0.02)
    ref = in_bfloat16(model, tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(ref.path)
    settings = Train(learning_rate=1e-6, pack_length=256, save_dtype="float32")
    report = run((store, ref), tmp_path / "out", settings=settings, objective=DENSE)
    assert report.updates == 1
    assert report.last["train/changed_share"] > 0.9
    before, after = half.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    moved = sum(int((after[n] != before[n].float()).sum()) for n in after)
    total = sum(after[n].numel() for n in after)
    assert moved / total == pytest.approx(report.last["train/changed_share"], abs=1e-3)
    # The same updates on weights kept in bfloat16: most are rounded away.
    pure = sum(int((after[n].bfloat16() != before[n]).sum()) for n in after)
    assert pure / total < 0.1


def test_bfloat16_computes_and_never_holds_weights(
    case: tuple[Store, ModelRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = set()

    def spy(ref: ModelRef, **options: Any) -> Any:
        student = load_student(ref, **options)
        layer = inner_model(student).model.layers[0].mlp.up_proj
        layer.register_forward_hook(
            # Not the forward passes of checks and of the save, which have no gradient.
            lambda module, inputs, out: computed.update({out.dtype} if out.requires_grad else ())
        )
        return student

    monkeypatch.setattr("logitcask.engine.training.student.load_student", spy)
    run(case, tmp_path, dtype="bfloat16")
    assert computed == {torch.bfloat16}
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(line["train/changed_share"] > 0.9 for line in lines(tmp_path)[:-1])


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": 0.0}, {"num_train_epochs": 0}, {"lr_scheduler_type": "exponential"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_are_checked_when_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Train(**wrong)


def test_missing_devices_are_refused(case: tuple[Store, ModelRef], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        run(case, tmp_path / "out", device="cuda:3")
