"""One rendering of prompts and one list of stop ids, from rollout to score and train."""

import json
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from logitcask.engine.store import open_store
from logitcask.engine.types import STOP
from tests.cli.conftest import KEPT, PLAIN, ROLL, SAMPLING, SCORE, TRAINING, World
from tests.engine.tiny import CHAT_TEMPLATE, make_model, make_tokenizer, save_folder

CHAT = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]


@pytest.fixture(scope="module")
def moody(world: World) -> World:
    """Write a model whose template has a variable, and a dataset for fine-tuning."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE + "{{ mood }}"
    save_folder(world.at("@moody"), make_model(seed=0), tokenizer)
    lines = [{"messages": CHAT, "answer": "2"}, {"prompt": CHAT, "answer": "2"}]
    world.at("@sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    world.at("@t.txt").write_text("{prompt} {answer}?")
    return world


def test_contexts_and_evaluation_are_rendered_as_the_rollouts(moody: World, call: Any) -> None:
    store, sampled = moody.new("store"), f"--model @moody --prompts @sft.jsonl {SAMPLING}"
    rules = '--drop-last-assistant --chat-template-kwargs {"mood":"!"}'
    refused = call(f"rollout {sampled} --store {store}")
    refused.assert_error(1, "may not end with 'assistant'", "--drop-last-assistant")
    assert call(f"rollout {sampled} {rules} --store {store}").code == 0
    segments = open_store(str(moody.at(store))).head().rollouts("main")
    recorded = {"chat_template": True, "chat_template_kwargs": {"mood": "!"}}
    assert recorded.items() <= segments[0].provenance.items()
    assert segments[0].provenance["drop_last_assistant"] is True
    prompts = open_store(str(moody.at(store))).read_prompts(segments[0])
    shown = [make_tokenizer().decode(prompt.token_ids) for prompt in prompts]
    assert shown == ["user: 1 + 1 =\nassistant: !"] * 2
    assert [prompt.id for prompt in prompts] == ["line-1", "line-2"]
    context = "--teacher-kind context --prompt-template @t.txt --prompts @sft.jsonl"
    scored = f"score --model @moody --teacher big --store {store} {KEPT}"
    assert call(f"{scored} {context}").code == 0
    trained = f"train --model @moody --store {store} --out {moody.new('out')} {TRAINING}"
    evaluated = "--eval-prompts @sft.jsonl --eval-n 1 --eval-max-new-tokens 2"
    assert call(f"{trained} {evaluated} --objective overlap").code == 0


def test_stop_ids_of_generation_config_and_of_a_flag(world: World, call: Any) -> None:
    model, store, rest = world.new("model"), world.new("store"), f"--prompts @p.jsonl {PLAIN}"
    shutil.copytree(world.at("@student"), world.at(model))
    config = world.at(model) / "generation_config.json"
    config.write_text("{}")
    roll = f"rollout --model {model} {rest} --store {store}"
    assert call(roll).code == 0
    config.write_text(json.dumps({"eos_token_id": [1, *range(40, 60)]}))
    other = call(f"{roll} --rollouts other --seed 7")
    assert f"{world.at(model)}: stop ids of generation_config.json: 40 (" in other.err
    assert "stop ids" not in call(f"{ROLL} {store} --rollouts third --seed 8").err
    # What was sampled before is scored and trained on, and goes on under its own stop ids only.
    call(roll).assert_error(1, "'main' end at the stop ids [1], those of", "another name")
    assert call(f"{SCORE} {store}").code == 0
    assert (
        call(f"train --model {model} --store {store} --out {world.new('o')} {TRAINING}").code == 0
    )
    more = f"{roll} --rollouts more --seed 9 --stop-token-ids"
    assert call(f"{more} 60,61").code == 0
    call(f"{more} 60").assert_error(1, "stop_token_ids = [60, 61], not [60]", "another name")
    opened = open_store(str(world.at(store)))
    for name, ids in (("other", {1, *range(40, 60)}), ("more", {1, *range(40, 62)})):
        for segment in opened.head().rollouts(name):
            assert segment.provenance["student"]["stop_ids"] == sorted(ids)
            rollouts = opened.read_rollouts(segment)
            stops = np.isin(rollouts.tokens, [*ids])
            ends = rollouts.seq_off[1:] - 1
            assert stops[ends].tolist() == (rollouts.finish == STOP).tolist()
            assert stops.sum() == stops[ends].sum() > 0


def test_prompts_of_parquet_in_every_stage(moody: World, call: Any) -> None:
    """Sample, score with a context and evaluate by columns, and repeat the same from JSONL."""
    turns = [{"role": "user", "content": "1 + 1 ="}]
    rows = [{"chat": turns, "gold": "2", "key": key} for key in ("a", "b")]
    pq.write_table(pa.Table.from_pylist(rows), moody.at("@p.parquet"))
    lines = [{"id": row["key"], "messages": turns, "answer": "2"} for row in rows]
    moody.at("@same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store, names = moody.new("store"), {"prompt": "chat", "answer": "gold", "id": "key"}
    flags = " ".join(f"--{key}-column {name}" for key, name in names.items())
    rules = [f"--store {store}", SAMPLING, "--grader exact", "--system-prompt kind"]
    roll = f"rollout --model @moody {' '.join(rules)}"
    assert call(f"{roll} --prompts @p.parquet {flags}").code == 0
    again = call(f"{roll} --prompts @same.jsonl --format json")
    assert json.loads(again.out)["units_new"] == 0
    opened = open_store(str(moody.at(store)))
    (segment, *_) = opened.head().rollouts("main")
    columns = {f"{key}_column": name for key, name in names.items()}
    assert segment.provenance["source"] == {"file": "p.parquet", **columns}
    decode = make_tokenizer().decode
    shown = [decode(prompt.token_ids) for prompt in opened.read_prompts(segment)]
    assert shown == ["system: kind\nuser: 1 + 1 =\nassistant: "] * 2
    context = "--teacher-kind context --prompt-template @t.txt --prompts @p.parquet"
    assert call(f"score --model @moody --teacher big --store {store} {KEPT} {context}").code == 0
    evaluated = "--eval-prompts @p.parquet --eval-n 1 --eval-max-new-tokens 2"
    flags = flags.replace("--", "--eval-")
    trained = f"train --model @moody --store {store} --out {moody.new('out')} {TRAINING}"
    call(f"{trained} {evaluated}").assert_error(1, "row 0: fields", "--prompt-column")
    assert call(f"{trained} {evaluated} {flags} --objective overlap").code == 0
