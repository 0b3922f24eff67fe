"""Options of `logitcask score`, and the targets that they give to a batch."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.packing.source import PackSource
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.store import open_store
from logitcask.engine.types import ScoreParams
from tests.cli.conftest import KEPT, ROLL, SCORE, TRAIN, UNITS, N, World
from tests.engine.tiny import make_model, save_folder


def score_command(store: str, flags: str, teacher: str = "big") -> str:
    return f"score --model @teacher --teacher {teacher} {KEPT} --store {store} {flags}"


def test_mc_draws_base_and_context_reach_a_batch(world: World, call: Any) -> None:
    store = world.new("mc")
    assert call(f"{ROLL} {store} --mc-draws 5").code == 0
    assert call(score_command(store, "--extra-ids mc --format json")).json["units_new"] == UNITS
    assert call(score_command(store, "--extra-ids mc --format json")).json["units_new"] == 0
    assert call(score_command(store, "--teacher-kind base --extra-ids mc", "root")).code == 0
    assert call(score_command(store, "--selection sampled --draws 7", "draws")).code == 0
    assert (
        call(score_command(store, "--teacher-kind context --context @p.jsonl", "hinted")).code == 0
    )
    assert call(f"store verify {store} --deep").code == 0
    opened = open_store(world.at(store))
    snapshot = opened.head()
    members = np.stack([np.zeros(2 * N, int), np.arange(2 * N)], 1)
    targets = PackSource(opened, snapshot, "main", "big", base="root").pack(members).targets
    assert targets.mc_count is not None
    assert (targets.mc_count.sum(1) == 5).all()
    drawn = targets.mc_count > 0
    assert targets.cached[drawn].all()
    # The base model is the teacher here, so the log-probs are equal where both were scored.
    assert targets.base_log_p is not None
    np.testing.assert_allclose(targets.base_log_p[drawn], targets.q_log_p[drawn], rtol=2e-3)
    own = PackSource(opened, snapshot, "main", "draws").pack(members).targets
    assert own.q_draws is not None
    assert (own.q_draws.sum(1) == 7).all()
    # The same prompts as context give the same scores under another name and kind.
    plain, hinted = (
        opened.read_scores(next(iter(snapshot.scores(n).values()))) for n in ("big", "hinted")
    )
    # Listed ids are summed apart from all others, and the lists differ: the last digit may too.
    np.testing.assert_allclose(plain.lp, hinted.lp, rtol=5e-7)
    assert [snapshot.role(n) for n in ("big", "root", "hinted")] == ["teacher", "base", "context"]


def test_train_takes_a_base_by_name(world: World, call: Any) -> None:
    store, out = world.store(), world.new("out")
    assert call(score_command(store, "--teacher-kind base", "root")).code == 0
    train = f"{TRAIN} {store} --out {out}"
    call(f"{train} --base big").assert_error(
        2, "--base big: the store has root", "give one of these"
    )
    # With one teacher and one base the teacher needs no flag.
    assert call(f"{train} --base root").code == 0
    assert json.loads((world.at(out) / "run.json").read_text())["base"] == "root"
    call(train).assert_error(1, "base = 'root', not None", "--overwrite")


def test_train_without_base_scores_is_an_error(world: World, call: Any) -> None:
    train = f"{TRAIN} {world.store()} --out {world.new('out')} --base root"
    call(train).assert_error(3, "no scores of a base model", "score --teacher-kind base")


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ("--draws 4", "--draws"),
        ("--selection sampled", "--draws"),
        ("--selection sampled --draws 4 --extra-ids mc", "--extra-ids"),
        ("--teacher-kind context", "--context"),
        ("--context @p.jsonl", "--context"),
        ("--prompt-template @t --prompts @p.jsonl", "--prompt-template"),
        ("--teacher-kind context --prompt-template @t", "--prompts"),
        ("--teacher-kind context --context @p.jsonl --prompts @p.jsonl", "--prompts"),
        ("--teacher-kind context --context @p.jsonl --prompt-template @t", "--prompt-template"),
    ],
)
def test_contradictory_flags_are_an_error(world: World, call: Any, flags: str, cause: str) -> None:
    call(f"{SCORE} @st {flags}").assert_error(2, cause, "")


def test_a_context_file_needs_every_prompt(world: World, call: Any) -> None:
    store, file = world.store(UNITS), world.at("@short.jsonl")
    file.write_text(json.dumps({"id": "p0", "prompt": "1 + 1 ="}) + "\n")
    flags = "--teacher-kind context --context @short.jsonl"
    call(f"{SCORE} {store} {flags}").assert_error(1, "no prompt 'p1'", "for every id")


def test_a_prompt_template_equals_a_context_file(world: World, call: Any) -> None:
    """Compare with the same prompts written out; the second command finds all units scored."""
    store, template, out = world.store(UNITS), world.new("t.txt"), world.new("shown.jsonl")
    world.at(template).write_text("Hint. {prompt}\n")
    lines = [json.loads(line) for line in world.at("@p.jsonl").read_text().splitlines()]
    shown = [{**line, "prompt": f"Hint. {line['prompt']}"} for line in lines]
    world.at(out).write_text("".join(json.dumps(line) + "\n" for line in shown))
    by_template = f"--teacher-kind context --prompt-template {template} --prompts @p.jsonl"
    hinted = score_command(store, f"{by_template} --format json", "hinted")
    assert call(hinted).json["units_new"] == UNITS
    written = score_command(
        store, f"--teacher-kind context --context {out} --format json", "hinted"
    )
    assert call(written).json["units_new"] == 0
    opened = open_store(world.at(store))
    assert opened.head().role("hinted") == "context"
    scorer = HF(world.at("@teacher"), n_vocab=99, stop_ids=(1,))
    for each in opened.head().rollouts("main"):
        rollouts = opened.read_rollouts(each)
        ids = load_tokenizer(world.at("@teacher"))("Hint. ", add_special_tokens=False)["input_ids"]
        prompts = tuple(replace(p, token_ids=(*ids, *p.token_ids)) for p in rollouts.prompts)
        exact = scorer.score(replace(rollouts, prompts=prompts), ScoreParams())
        found = opened.read_scores(opened.head().scores("hinted")[each.seg_id], base=rollouts)
        np.testing.assert_allclose(found.lp, exact.lp, atol=1e-5)
    # The template would apply to other prompts.
    call(hinted.replace("@p.jsonl", out)).assert_error(
        1, "differs from the prompt of the rollouts", "--context"
    )


def test_extra_ids_mc_needs_draws(world: World, call: Any) -> None:
    call(f"{SCORE} {world.store(UNITS)} --extra-ids mc").assert_error(
        3, "hold no ids", "--mc-draws"
    )


def test_distill_draws_and_scores_extra_ids(world: World, call: Any) -> None:
    store, out = world.new("store"), world.new("out")
    paths = f"--set store.url={world.at(store)} --set run.out={world.at(out)}"
    loop = f"distill @d.toml {paths} --set rollout.mc_draws=3"
    assert call(f"{loop} --set score.extra_ids=mc").code == 0
    opened = open_store(world.at(store))
    source = PackSource(opened, opened.head(), "main", "big")
    for ordinal, (segment, segments) in enumerate(source.pairs):
        assert [each.layout for each in (segment, *segments)] == ["mc", "dedup", "extension"]
        targets = source.pack(np.asarray([[ordinal, 0]])).targets
        assert targets.mc_count is not None
        assert (targets.mc_count.sum(1) == 3).all()
        assert targets.cached[targets.mc_count > 0].all()
    call(loop).assert_error(1, "at = 'mc', not None", "set store.rollouts and run.out to new names")


@pytest.mark.parametrize(
    "key", ["score.teacher_kind=base", "score.extra_ids=self", "train.base=root"]
)
def test_keys_that_distill_does_not_take(world: World, call: Any, key: str) -> None:
    call(f"distill @d.toml --set {key}").assert_error(2, "distill does not take it", "leave it out")


def test_an_estimate_counts_the_bytes_of_draws(call: Any) -> None:
    estimate = "store estimate @teacher @p.jsonl --student @student --no-chat-template --n 2 "
    sizes = [
        call(f"{estimate} --max-new-tokens 6 --device cpu --format json --mc-draws {m}").json
        for m in (0, 8)
    ]
    plain, drawn = (found["rows"][0]["bytes_rollout"] for found in sizes)
    assert plain + 8 < drawn < plain + 8 * 12, "each draw needs at least 4 bytes, for its log-prob"


@pytest.mark.parametrize(
    ("objective", "cause", "hint"),
    [
        ("overlap(k=0)", "k = 0 with tail", "--loss-topk 2 or more"),
        ("overlap(k=x)", "k = 'x' is not of type int", "give k"),
        ("kl", "kl", "overlap"),
    ],
)
def test_probe_rejects_a_wrong_objective(
    world: World, call: Any, objective: str, cause: str, hint: str
) -> None:
    probe = f"probe metrics --model @student --store @st --objective {objective}"
    result = call(probe)
    assert result.code in (1, 2)
    result.assert_error(result.code, cause, hint)


def test_responses_that_end_in_another_stop_id_need_a_flag(world: World, call: Any) -> None:
    """Use a student with half of all ids as stop ids; its teacher has one of them."""
    save_folder(world.at("@other-eos"), make_model(eos=list(range(1, 50))))
    store = world.new("other-eos-store")
    assert call(f"{ROLL} {store}".replace("@student", "@other-eos")).code == 0
    call(score_command(store, "")).assert_error(1, "and", "--foreign-eos keep")
    assert call(score_command(store, "--foreign-eos keep --format json")).json["units_new"] == UNITS


def test_some_positions_are_scored_shown_trained_on_and_completed(world: World, call: Any) -> None:
    store = world.new("part")
    assert call(f"{ROLL} {store}").code == 0
    for wrong in ("last:3", "first:0", "entropy-top:2"):
        refused = call(score_command(store, f"--positions {wrong}"))
        refused.assert_error(2, f"--positions = '{wrong}': must be all, first:N, every:N,", "")
    refused = call(score_command(store, "--positions first:2 --extra-ids mc"))
    refused.assert_error(2, "must be all with extra_ids", "")
    first = call(score_command(store, "--positions first:2 --format json")).json
    opened = open_store(world.at(store))
    rollouts = opened.read_rollouts(opened.head().rollouts("main")[0])
    total, scored = opened.head().rollouts("main")[0].counts["P"], first["positions"]
    assert 0 < scored < total * UNITS
    assert call(f"store info {store} --format json").json["teachers"] == {"big": scored}
    assert "positions first:2" in call(f"store ls {store}").out
    assert call(f"store verify {store} --deep").code == 0
    longest = int(rollouts.lengths().argmax())
    shown = call(f"store show {store} --sequence {longest}")
    assert f"2 of {rollouts.lengths().max()}" in shown.out
    trained = f"{store} --out {world.new('o')}"
    note = call(f"{TRAIN} {trained} --objective overlap")
    assert "% of the positions: the others have no loss" in note.err
    stepwise = call(f"{TRAIN} {trained}2 --objective overlap+stepwise")
    stepwise.assert_error(1, "looks at all positions of a response", "--positions all")
    second = call(score_command(store, "--format json")).json
    assert second["units_new"] == UNITS
    assert call(f"store info {store} --format json").json["teachers"]["big"] == (
        scored + second["positions"]
    )
    assert call(f"{TRAIN} {trained}3 --objective overlap+stepwise").code == 0
    lines = [{"prompt": rollouts.prompts[0].id, "response": 1, "positions": [0]}]
    world.at("listed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    listed = score_command(store, "--positions file:LIST --format json", "listed")
    assert call(listed.replace("LIST", str(world.at("listed.jsonl")))).json["positions"] == 1
