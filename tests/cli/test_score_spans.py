"""Scores of a teacher with another tokenizer, from the command line."""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from logitcask.engine.alignment.span_scores import SpanScores
from logitcask.engine.backends.hf import HF
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.store import open_store
from logitcask.engine.types import Prompt, Rollouts, ScoreParams
from tests.cli.conftest import KEPT, ROLL, UNITS, World

CHAT = ROLL.replace("--no-chat-template", "--chat-template")


def score_command(store: str, flags: str = "", teacher: str = "new") -> str:
    return f"score --model @other-tokenizer --teacher {teacher} {KEPT} --store {store} {flags}"


def scored(world: World, store: str, name: str) -> list[tuple[Rollouts, SpanScores]]:
    opened = open_store(world.at(store))
    of = opened.head().scores(name)
    return [
        (opened.read_rollouts(each), opened.read_span_scores(of[each.seg_id]))
        for each in opened.head().rollouts("main")
    ]


def expected(world: World, rollouts: Rollouts, text_of: dict[str, str]) -> Any:
    """Return the log-probs of the teacher itself, after these prompts.

    Its tokenizer has the characters of the student's in another order, so each token is one.
    """
    ours, theirs = (load_tokenizer(world.at(f"@{n}")) for n in ("student", "other-tokenizer"))
    tokens = theirs.convert_tokens_to_ids(ours.convert_ids_to_tokens(rollouts.tokens.tolist()))
    prompts = tuple(
        Prompt(id=p.id, token_ids=tuple(theirs(text_of[p.id], add_special_tokens=False).input_ids))
        for p in rollouts.prompts
    )
    read = replace(rollouts, prompts=prompts, tokens=np.array(tokens, np.uint32), student=None)
    scorer = HF(world.at("@other-tokenizer"), n_vocab=99, stop_ids=(1,))
    return scorer.score(read, ScoreParams(at_student=False)).lp


def test_a_teacher_renders_the_prompts_by_its_own_chat_template(world: World, call: Any) -> None:
    store, hint = world.new("chat"), world.new("hint.txt")
    world.at(hint).write_text("Hint. {prompt}")
    assert call(f"{CHAT} {store}").code == 0
    call(score_command(store)).assert_error(2, "needs a rendering by its own", "--prompts FILE")
    call(score_command(store, "--no-chat-template --prompts @p.jsonl")).assert_error(
        2, "reads the bytes", "leave --prompts out"
    )
    assert call(score_command(store, "--no-chat-template", "bytes")).code == 0
    again = "--no-chat-template --same-texts bytes"
    call(score_command(store, again, "again")).assert_error(2, "span_topk = none", "--same-texts")
    assert call(score_command(store, f"{again} --span-topk none", "again")).code == 0
    plain = score_command(store, "--prompts @p.jsonl --format json")
    assert call(plain).json["units_new"] == UNITS
    assert call(plain).json["units_new"] == 0
    hinted = f"--teacher-kind context --prompt-template {hint} --prompts @p.jsonl"
    assert call(score_command(store, hinted, "hinted")).code == 0
    lines = [json.loads(line) for line in world.at("@p.jsonl").read_text().splitlines()]
    # The template of these students writes no control token, so its text can be read as bytes.
    for name, begin in (("new", ""), ("bytes", ""), ("again", ""), ("hinted", "Hint. ")):
        text_of = {e["id"]: f"user: {begin}{e['prompt']}\nassistant: " for e in lines}
        for rollouts, found in scored(world, store, name):
            lp = expected(world, rollouts, text_of)
            np.testing.assert_allclose(found.log_probs, lp, atol=1e-5)
    other = world.new("other.jsonl")
    changed = [{**line, "prompt": f"{line['prompt']} ?"} for line in lines]
    world.at(other).write_text("".join(json.dumps(line) + "\n" for line in changed))
    call(score_command(store, f"--prompts {other}", "third")).assert_error(
        1, "rendered for the student it has other tokens", "`logitcask rollout` read"
    )


def test_the_students_tokenizer_is_the_recorded_one(world: World, call: Any) -> None:
    folder, store = world.new("recorded"), world.new("recorded-store")
    world.at(folder).symlink_to(world.at("@student"))
    assert call(f"{ROLL} {store}".replace("@student", folder)).code == 0
    world.at(folder).unlink()
    call(score_command(store)).assert_error(2, "that of the student", "--student-tokenizer")
    world.at(folder).symlink_to(world.at("@no-template"))
    result = call(score_command(store))
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in world.at("@p.jsonl").read_text().splitlines()]
    for rollouts, found in scored(world, store, "new"):
        lp = expected(world, rollouts, {line["id"]: line["prompt"] for line in lines})
        np.testing.assert_allclose(found.log_probs, lp, atol=1e-5)
    world.at(folder).unlink()
    world.at(folder).symlink_to(world.at("@other-tokenizer"))
    call(score_command(store)).assert_error(2, "that of the student is", "--student-tokenizer")
    call(score_command(store, f"--student-tokenizer {folder}")).assert_error(
        1, "that of the student is", "of the student that sampled"
    )


def test_a_loop_scores_spans_in_every_round(world: World, call: Any) -> None:
    config, store = world.new("spans.toml"), world.new("loop")
    text = world.at("@d.toml").read_text().replace("loss_topk = 4\n", "")
    world.at(config).write_text(text)
    keys = (
        f"--set teacher.model=other-tokenizer --set run.out={world.at(store)}-out "
        f"--set store.url={world.at(store)}"
    )
    call(f"distill @d.toml {keys}").assert_error(
        1, "the student's tokenizer is", "an objective over spans"
    )
    call(f"distill @d.toml {keys} --set score.span_topk=ends").assert_error(
        2, "the objective is not over spans", "leave --span-topk out"
    )
    keys += " --set score.control_tokens=cut --set train.objective=span_advantage"
    result = call(f"distill {config} {keys}")
    assert result.code == 0, result.err
    assert "scores: span-exact" in result.err
    opened = open_store(world.at(store)).head()
    assert len(opened.scores("big")) == len(opened.rollouts("main")) > 0
    assert {each.layout for of in opened.scores("big").values() for each in of} == {"spans+starts"}
