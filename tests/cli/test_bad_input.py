"""Bad input: exit code, cause with the value, and hint."""

import json
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.cli.conftest import KEPT, PLAIN, ROLL, SAMPLING, SCORE, TRAIN, TRAINING, UNITS, World

ALL = 2 * UNITS


@dataclass(frozen=True)
class Case:
    """One command: STORE in it is a store with `commits` commits, OUT an unused path."""

    name: str
    command: str
    code: int
    cause: str
    hint: str
    commits: int = ALL


USAGE = [
    Case("verb", "rolout", 2, "no verb 'rolout'; the nearest is rollout", "logitcask --help"),
    Case("verb of store", "store inf", 2, "inf", "logitcask store --help"),
    Case("flag", "score --modle x", 2, "No such option '--modle'", "logitcask score --help"),
    Case("a similar flag", "score --modle x", 2, "--modle", "nearest is --model; logitcask score"),
    Case("flag of TRL", "train --output-dir x", 2, "--output-dir", "--output-dir is --out here"),
    Case("with _", "rollout --max_new_tokens 3", 2, "--max_new", "is --max-new-tokens here"),
    Case("flag of vLLM", "rollout --max-tokens 3", 2, "-tokens", "is --max-new-tokens here"),
    Case("flag of verl", "train --kl x", 2, "--kl", "--kl is --objective here"),
    Case("verb of others", "generate", 2, "generate is rollout here", "logitcask --help"),
    Case("no verb at all", "xyz", 2, "known: init, rollout, import", "logitcask --help"),
    Case("flag of all", "--nothing", 2, "--nothing", "logitcask --help"),
    Case("missing", "score --store x --teacher t", 2, "--model", "logitcask score --help"),
    Case("not a number", f"{ROLL} OUT --n x", 2, "'x' is not a valid integer", "rollout --help"),
    Case("not a choice", f"{ROLL} OUT --dtype float16", 2, "'float16'", "rollout --help"),
    Case("answer", "init --student x", 2, "--teacher, --prompts is missing", "init --help"),
    Case("checked file", "doctor @no.toml", 2, "no.toml: No such file", "path of a TOML file"),
    Case("shell", "completion tcsh", 2, "'tcsh' is not one of", "completion --help"),
    Case("no run", "report @p.jsonl", 2, "p.jsonl is no folder", "it holds run.json"),
    Case("a page's place", "report STORE -o @student", 2, "student is a folder", "report.html"),
    Case("another file", "report STORE -o @p.jsonl", 2, "is no report of ours", "report.html"),
    Case("sent store", "report STORE --to tensorboard", 2, "not the folder of one run", "run.json"),
    Case("sent page", "report STORE --serve --to wandb", 2, "a live page is never sent", "--help"),
    Case("store and runs", "report STORE --compare OUT", 2, "out", "it holds run.json"),
    Case("stop ids", f"{ROLL} OUT --stop-token-ids 1,x", 2, "--stop-token-ids = 'x'", "More ids"),
    Case("variables", f"{ROLL} OUT --chat-template-kwargs [1]", 2, "= '[1]': must be", "JSON obj"),
    Case("range", f"{ROLL} OUT --top-p 1.5", 2, "--top-p = 1.5", "Nucleus"),
    Case("name", f"{ROLL} OUT --rollouts Main", 2, "--rollouts = 'Main'", "Name of the set"),
    Case("too small", f"{ROLL} OUT --batch-tokens 0", 2, "--batch-tokens = 0", "Bounds memory"),
    Case("backend", f"{ROLL} OUT --backend tgi", 2, "no backend 'tgi'", "hf, server, vllm"),
    Case("backend of a folder", f"{ROLL} OUT --backend server", 2, "not at a URL", "http://"),
    Case(
        "backend of a URL",
        "score --model http://a:1 --teacher t --backend hf --store STORE",
        2,
        "teacher is at a URL",
        "leave --backend out",
    ),
    Case(
        "teacher's name",
        f"{SCORE} STORE --teacher ../x",
        2,
        "--teacher = '../x': names have",
        "Name",
    ),
]

CONFIGURATION = [
    Case("no file", "distill @no.toml", 2, "no.toml: No such file", "path of a TOML file"),
    Case("not TOML", "distill @p.jsonl", 2, "p.jsonl: not TOML", "repair"),
    Case(
        "unknown key",
        "distill @d.toml --set train.num_train_epoch=1",
        2,
        "num_train_epoch",
        "num_train_epochs",
    ),
    Case(
        "key of TRL",
        "distill @d.toml --set train.output_dir=x",
        2,
        "unknown key train.output_dir",
        "train.output_dir is run.out here",
    ),
    Case(
        "no similar key",
        "distill @d.toml --set train.zzz=1",
        2,
        "unknown key train.zzz",
        "train.teacher, train.teacher_field",
    ),
    Case("recipe", "distill --recipe opdd", 2, "there is no recipe 'opdd'", "nearest is opd"),
    Case(
        "keys of a recipe", "distill --recipe opd", 2, "student.model is missing", "teacher.model"
    ),
    Case("neither file nor recipe", "distill", 2, "--recipe NAME", "logitcask distill --help"),
    Case("shown recipe", "recipe show opd2", 2, "there is no recipe 'opd2'", "recipe list"),
    Case("section", "distill @d.toml --set trian.lr=1", 2, "unknown key trian", "train"),
    Case("rule", "distill @d.toml --set loop.rounds=0", 2, "loop.rounds = 0", "Rounds"),
    Case("no key", "distill @d.toml --set lr=1", 2, "--set lr=1", "--set train.learning_rate=1e-5"),
    Case(
        "prompts of a round",
        "distill @d.toml --set loop.prompts_per_round=99",
        2,
        "loop.prompts_per_round = 99: the file has 8",
        "8 or less",
    ),
    Case(
        "row of a round",
        "distill @d.toml --set train.pack_length=9",
        2,
        "train.pack_length = 9",
        "or more",
    ),
    Case(
        "teacher of a loop",
        "distill @d.toml --set teacher.model=other-tokenizer",
        1,
        "tokenizer",
        "--student-tokenizer",
    ),
]

PROBE = (
    "probe compatibility --model @student --prompts @p.jsonl --no-chat-template --device cpu "
    "--max-new-tokens 6 --store OUT"
)
MODELS = [
    Case(
        "no folder",
        f"rollout --model @nowhere --prompts @p.jsonl --store OUT {PLAIN}",
        1,
        "there is no folder",
        "save_pretrained",
    ),
    Case(
        "only a pickle",
        f"rollout --model @pickled --prompts @p.jsonl --store OUT {PLAIN}",
        1,
        "pytorch_model.bin, a pickle",
        "convert it",
    ),
    Case(
        "a teacher's pickle",
        f"score --model @pickled --teacher new --store STORE {KEPT}",
        1,
        "pytorch_model.bin, a pickle",
        "convert it",
    ),
    Case("no GPU", f"{ROLL} OUT --device cuda", 2, "'cuda', and this machine has no", "cpu"),
    Case("no GPU to train", f"{TRAIN} STORE --out OUT --device cuda", 2, "no GPU", "cpu"),
    Case("no device", f"{TRAIN} STORE --out OUT --device tpu", 2, "--device tpu", "CUDA_VISIBLE"),
    Case("beyond the context", f"{ROLL} OUT --max-new-tokens 256", 2, "256 tokens", "less than"),
    Case("stop id", f"{ROLL} OUT --stop-token-ids 99", 2, "in [0, 99)", "--stop-token-ids"),
    Case("no room", f"{ROLL} OUT --max-new-tokens 252", 1, "at most 4 may be", "max_new_tokens"),
]

CANDIDATES = [
    Case("no candidate", PROBE, 2, "--teacher-model", "probe compatibility --help"),
    Case(
        "one name twice",
        f"{PROBE} --teacher-model @teacher --teacher-model @teacher",
        2,
        "the name 'teacher' is taken",
        "--teacher-model NAME=MODEL",
    ),
    Case(
        "another tokenizer",
        f"{PROBE} --teacher-model @other-tokenizer",
        1,
        "has another tokenizer than the student",
        "`score` takes such a teacher",
    ),
    Case("k", f"{PROBE} --teacher-model @teacher --k 65", 2, "--k = 65", "16 is that of the"),
    Case("a grader", f"{PROBE} --teacher-model @teacher --grader exact", 1, "answer", "answer"),
]

CONTINUE = "probe continuation --model @student --teacher-model @teacher --store STORE"
CONTINUATIONS = [
    Case("no room behind", f"{CONTINUE} --at 0,6", 2, "at = 6", "below 6"),
    Case("not graded", f"{CONTINUE} --at 0,2", 2, "were not graded", "--grader exact"),
    Case("not a length", f"{CONTINUE} --at 0,x", 2, "--at = 'x'", "Tokens of the student"),
]

TEMPLATES = [
    Case(
        "ambiguous",
        f"rollout --model @student --prompts @p.jsonl --store OUT {SAMPLING}",
        1,
        "either could be meant",
        "--no-chat-template",
    ),
    Case(
        "conversation, and no template",
        f"rollout --model @no-template --prompts @m.jsonl --store OUT {SAMPLING}",
        1,
        'm.jsonl, line 1: field "messages"',
        '"prompt"',
    ),
    Case(
        "conversation, template off",
        f"rollout --model @student --prompts @m.jsonl --store OUT {PLAIN}",
        1,
        'm.jsonl, line 1: field "messages"',
        "turn the chat template on",
    ),
    Case(
        "variables, template off",
        f'{ROLL} OUT --chat-template-kwargs {{"a":1}}',
        2,
        "chat_template_kwargs = {'a': 1}: no chat template is used",
        "--chat-template-kwargs",
    ),
    Case(
        "flag without a template",
        f"rollout --model @no-template --prompts @p.jsonl --store OUT --chat-template {SAMPLING}",
        1,
        "has no chat template",
        "turn the chat template off",
    ),
]

IDENTITY = [
    Case("seed", f"{ROLL} STORE --seed 4", 1, "seed = 3, not 4", "another name"),
    Case("sampling", f"{ROLL} STORE --n 3", 1, "n = 2, not 3", "another name"),
    Case("units", f"{ROLL} STORE --unit-prompts 3", 1, "prompts 0..1 as one unit", "unit_prompts"),
    Case("twice", f"{ROLL} STORE --rollouts two", 1, "under the name 'main'", "another seed"),
    Case(
        "student",
        f"rollout --model @stranger --prompts @p.jsonl --store STORE {PLAIN}",
        1,
        "are of student sha256:",
        "another name",
    ),
    Case(
        "prompts",
        f"rollout --model @student --prompts @q.jsonl --store STORE {PLAIN}",
        1,
        "were made with 8 prompts, not 1",
        "another name",
    ),
    Case(
        "positions of spans",
        f"score --model @other-tokenizer --teacher new --store STORE {KEPT} --positions first:3",
        2,
        "other-tokenizer has another tokenizer than the student",
        "leave --positions out",
    ),
    Case(
        "spans of tokens",
        f"{SCORE} STORE --span-topk ends",
        2,
        "teacher has the student's tokenizer",
        "leave --span-topk out",
    ),
    Case(
        "prompts of bytes",
        f"score --model @other-tokenizer --teacher new --store STORE {KEPT} --prompts @p.jsonl",
        2,
        "reads the bytes of the stored prompts",
        "leave --prompts out",
    ),
    Case(
        "weights of a teacher",
        f"score --model @other-teacher --teacher big --store STORE {KEPT}",
        1,
        "'big' stands for teacher.weights = \"sha256:",
        "another name",
    ),
    Case(
        "name of a teacher",
        f"{SCORE.replace('big', 'bigger')} STORE",
        1,
        "under the name 'big'",
        "instead of 'bigger'",
    ),
    Case(
        "tokenizer of a student",
        f"train --model @other-tokenizer --store STORE --out OUT {TRAINING}",
        1,
        "sampled with tokenizer sha256:",
        "tokenizer of the rollouts",
    ),
]

OBJECTIVES = [
    Case("unknown", f"{TRAIN} STORE --objective overlapp", 2, "overlapp", "nearest is overlap"),
    Case(
        "k",
        f"{TRAIN} STORE --out OUT --loss-topk 5",
        1,
        "k = 5 is more than k_min = 4",
        "--teacher-topk-min 5",
    ),
    Case(
        "k beyond both",
        f"{TRAIN} STORE --out OUT --loss-topk 9",
        1,
        "k = 9 is more than k_min = 4",
        "--teacher-topk-min 9 --teacher-topk-max 9",
    ),
    Case(
        "k of the student",
        f"{TRAIN} STORE --out OUT --objective opd --loss-topk 5",
        1,
        "k = 5 is more than student_k = 4",
        "--student-topk 5",
    ),
    Case(
        "k of the preset",
        "train --model @student --store STORE --out OUT --device cpu",
        1,
        "k = 16 is more than k_min = 4",
        "--loss-topk 4",
    ),
    Case(
        "off-lineage",
        f"train --model @stranger --store STORE --out OUT --objective opd {TRAINING}",
        1,
        "off-lineage student",
        "--allow-off-lineage",
    ),
    Case("row", f"{TRAIN} STORE --out OUT --pack-length 4", 2, "= 4", "--pack-length 1"),
]

INCOMPLETE = [
    Case("scores", f"{TRAIN} STORE --out OUT", 3, "2 of 4 units", "--partial", ALL - 2),
    Case("no scores", f"{TRAIN} STORE --out OUT", 3, "no scores", "logitcask score", UNITS),
    Case("no rollouts", f"{SCORE} STORE", 3, "no rollouts", "logitcask rollout", 0),
    Case("nothing to show", "store show STORE", 3, "no rollouts", "logitcask rollout", 0),
    Case("unknown set", f"{SCORE} STORE --rollouts two", 3, "it has: main", "--rollouts"),
    Case("unknown teacher", f"{TRAIN} STORE --teacher small", 2, "the store has big", "of these"),
    Case("sequence", "store show STORE --sequence 99", 2, "16 sequences", "from 0"),
]

NO_STORE = [
    Case(f"{verb} {what}", command.replace("@x", place), 1, cause, hint)
    for verb, command, cause, hint in (
        ("info", "store info @x", "is not a logitcask store", "check the path"),
        ("verify", "store verify @x", "is not a logitcask store", "check the path"),
        ("score", f"{SCORE} @x", "is not a logitcask store", "check the path"),
        ("train", f"{TRAIN} @x --out OUT", "is not a logitcask store", "check the path"),
    )
    for what, place in (
        ("missing", "OUT"),
        ("empty", "@empty"),
        ("a file", "@p.jsonl"),
        ("a model", "@student"),
    )
] + [
    Case("into a file", f"{ROLL} @p.jsonl", 1, "p.jsonl is a file", "new folder"),
    Case("into a model", f"{ROLL} @student", 1, "not empty", "new or an empty folder"),
    Case("far away", f"{SCORE} ftp://bucket/x", 1, "unknown scheme ftp:", "file, s3, gs, az"),
    Case("secret", f"{SCORE} s3://key:secret/x", 1, "other parts than a bucket", "environment"),
]

OUTS = [
    Case("student itself", f"{TRAIN} STORE --out @student", 2, "the student itself", "--out"),
    Case("a store", f"{TRAIN} STORE --out @st", 2, "not the folder of a run", "empty folder"),
]

METRICS = "probe metrics --model @student --device cpu --store STORE"
PROBES = [
    Case("not graded", "probe correctness --store STORE", 3, "have no rewards", "--grader"),
    Case("too large a k", "probe regions --store STORE --k 9", 1, "top 4 ids of both", "--k 4"),
    Case("one model", "probe k --store STORE --model x", 2, "one of them is given", "neither"),
    Case("no run", "probe drift --store STORE --run @none", 2, "holds no student", "--model"),
    Case("no sums", "probe compare @p.jsonl @none", 2, "p.jsonl, line 1: it has no", "--per-seq"),
    Case("no file", "probe compare @none @none", 2, "none cannot be read: No such", "--per-seq"),
    Case("folder", f"{METRICS} --per-sequence @no/x.jsonl", 2, "there is no folder", "make it"),
    Case("revision", f"{METRICS} --teacher-revision x", 2, "without a teacher_model", "leave it"),
    Case(
        "tokenizer",
        f"{METRICS} --teacher-model @other-tokenizer",
        1,
        "has another tokenizer than the student: 99 ids",
        "leave --teacher-model out",
    ),
]

COLD = "recipe cold-start @d.toml --out OUT"
RECIPES = [
    Case("no folder for the student", "recipe cold-start @d.toml", 2, "--out", "cold-start --help"),
    Case("no room for the text", COLD, 2, "max_new_tokens = 12288", "less than 256"),
    Case(
        "a teacher that only answers",
        f"{COLD} --set teacher.model=http://a:1",
        2,
        "(a server): this recipe samples",
        "the teacher's folder",
    ),
    Case(
        "a teacher's other tokenizer",
        f"{COLD} --max-new-tokens 8 --set teacher.model=other-tokenizer",
        1,
        "the student's tokenizer is sha256:",
        "take an objective over spans",
    ),
    Case(
        "one of one",
        "recipe best-of-n @d.toml --n 1",
        2,
        "--n = 1",
        "Responses per prompt",
    ),
    Case(
        "no answers",
        "recipe best-of-n @d.toml --max-new-tokens 8",
        1,
        "'p0' has no answer",
        "MODULE:FUNCTION",
    ),
    Case("no recipe for prompts", "recipe prompts @p.jsonl --out OUT", 2, "none of", "at least"),
    Case(
        "embeddings without their packages",
        "recipe prompts @p.jsonl --out OUT --against @p.jsonl --embedding-model x",
        2,
        "embedding_model = x",
        "logitcask[dedup]",
    ),
    Case(
        "a server learns",
        "recipe reverse @d.toml --out OUT --set teacher.model=http://a:1",
        2,
        "http://a:1: the weights behind a server",
        "teacher.model=FOLDER",
    ),
    Case(
        "a second student that only answers",
        "recipe co-evolve @d.toml --set teacher.model=http://a:1",
        2,
        "both students are trained here",
        "teacher.model=FOLDER",
    ),
    Case(
        "more prompts than there are",
        "recipe co-evolve @d.toml --set loop.prompts_per_round=99",
        2,
        "loop.prompts_per_round = 99: the file has 8",
        "8 or less",
    ),
    Case("a file of others", "recipe reverse @d.toml --out @p.jsonl", 2, "other cont", "remove"),
]

CASES = {
    f"{kind}-{case.name}".replace(" ", "-"): case
    for kind, cases in {
        "usage": USAGE,
        "configuration": CONFIGURATION,
        "model": MODELS,
        "candidate": CANDIDATES,
        "continuation": CONTINUATIONS,
        "template": TEMPLATES,
        "identity": IDENTITY,
        "objective": OBJECTIVES,
        "incomplete": INCOMPLETE,
        "no-store": NO_STORE,
        "out": OUTS,
        "probe": PROBES,
        "recipe": RECIPES,
    }.items()
    for case in cases
}


@pytest.fixture(scope="module")
def files(world: World) -> World:
    """Write more prompt files, and an empty folder."""
    turns = [{"role": "user", "content": "1 + 2 ="}]
    world.at("@m.jsonl").write_text(json.dumps({"id": "m", "messages": turns}) + "\n")
    world.at("@q.jsonl").write_text('{"id": "q", "prompt": "3 + 4 ="}\n')
    # A worker that takes tests of other modules in between comes here twice.
    world.at("@empty").mkdir(exist_ok=True)
    return world


@pytest.mark.parametrize("name", CASES)
def test_an_error_has_its_cause_and_hint(files: World, call: Any, name: str) -> None:
    case = CASES[name]
    if "--device cuda" in case.command and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    command = case.command.replace("OUT", files.new("out"))
    if "STORE" in command:
        command = command.replace("STORE", files.store(case.commits))
    call(command).assert_error(case.code, case.cause, case.hint)


@pytest.mark.parametrize(
    ("line", "causes"),
    [
        ("{", ["not valid JSON"]),
        ("[1]", ["a list, not an object"]),
        ('{"prompt": "1", "score": 1e400}', ["the number 1e400 is beyond 64-bit floats"]),
        ('{"prompt": "1", "tools": [{"name": "f"}]}', ['field "tools"', "is turned off"]),
        ('{"question": "1"}', ['"prompt" and "messages"', "--prompt-column question"]),
        ('{"id": "p0", "prompt": "1"}', ['field "id"', "'p0' is already the id of line 1"]),
        ('{"id": "x", "prompt": 3}', ['field "prompt"', "3 is a number, not a string"]),
        ('{"id": "x"}', ['"prompt" and "messages"', "both are missing"]),
        ('{"id": "x", "prompt": "1", "answer": 2.5}', ['field "answer"', "2.5 is a number"]),
        (f'{{"id": "x", "prompt": "{"1" * 300}"}}', ['field "prompt"', "300 tokens, at most 250"]),
    ],
)
def test_a_broken_line_is_reported_with_file_line_and_field(
    world: World, call: Any, line: str, causes: list[str]
) -> None:
    file = world.new("broken")
    world.at(file).write_text(f'{{"id": "p0", "prompt": "1 ="}}\n{line}\n')
    result = call(f"rollout --model @student --prompts {file} --store {world.new('none')} {PLAIN}")
    result.assert_error(1, f"{world.at(file)}, line 2: ", "")
    assert all(word in result.err for word in causes), result.err


@pytest.mark.parametrize(
    ("first", "model", "second"),
    [
        ("--no-chat-template", "@student", "--chat-template"),
        ("--chat-template", "@student", "--no-chat-template"),
        ("--chat-template", "@other-template", "--chat-template"),
    ],
)
def test_rollouts_resume_only_with_the_same_template(
    world: World, call: Any, first: str, model: str, second: str
) -> None:
    store, rest = world.new("store"), "--prompts @p.jsonl --n 1 --max-new-tokens 2 --student-topk 2"
    assert call(f"rollout --model @student --store {store} {first} {rest}").code == 0
    result = call(f"rollout --model {model} --store {store} {second} {rest}")
    result.assert_error(1, "template = 'sha256:", "another name")
    recorded, requested = result.err.partition("template = ")[2].split("', not '")
    assert recorded != requested
    assert recorded.startswith("'sha256:")
    assert requested.startswith("sha256:")


def test_an_off_lineage_student_needs_a_flag_or_current_support(world: World, call: Any) -> None:
    command = f"train --model @stranger {TRAINING} --store @st"
    allowed = call(f"{command} --out {world.new('out')} --objective opd --allow-off-lineage")
    current = call(f"{command} --out {world.new('out')} --objective overlap")
    for result in (allowed, current):
        assert result.code == 0
        assert "note: Off-lineage student" in result.err
    assert "support: frozen" in allowed.err
    assert "support: current" in current.err


def test_partial_trains_on_the_scored_units(world: World, call: Any) -> None:
    store, out = world.store(ALL - 2), world.new("out")
    call(f"{TRAIN} {store} --out {out}").assert_error(3, "2 of 4 units", "--partial")
    result = call(f"{TRAIN} {store} --out {out} --partial --format json")
    assert result.code == 0
    all_positions = call(f"store info {store} --format json").json["positions"]
    assert 0 < result.json["positions"] < all_positions


def test_incomplete_rollouts_need_partial(world: World, call: Any) -> None:
    store, out = world.store(1), world.new("out")
    assert call(f"{SCORE} {store}").code == 0
    call(f"{TRAIN} {store} --out {out}").assert_error(3, "3 of 4 units of rollouts", "--partial")
    assert call(f"{TRAIN} {store} --out {out} --partial").code == 0


def test_two_teachers_need_the_teacher_flag(world: World, call: Any) -> None:
    store = world.store()
    assert call(f"score --model @other-teacher --teacher other --store {store} {KEPT}").code == 0
    for command in (f"{TRAIN} {store} --out {world.new('out')}", f"store show {store}"):
        call(command).assert_error(2, "2: big, other", "--teacher")
        assert call(f"{command} --teacher other").code == 0


def test_another_run_in_the_folder_needs_overwrite(world: World, call: Any) -> None:
    out = world.new("out")
    assert call(f"{TRAIN} @st --out {out}").code == 0
    other = f"{TRAIN} @st --out {out} --weight-decay 0.5"
    call(other).assert_error(1, "settings.weight_decay = 0.0, not 0.5", "--overwrite")
    result = call(f"{other} --overwrite --format json")
    assert (result.code, result.json["resumed_at"]) == (0, 0)


def test_a_model_folder_needs_tokenizer_and_config(world: World, call: Any) -> None:
    for missing, cause in (("tokenizer.json", "no tokenizer"), ("config.json", "config.json")):
        model = world.new("model")
        shutil.copytree(world.at("@student"), world.at(model))
        (world.at(model) / missing).unlink()
        call(f"{ROLL} {world.new('none')} --model {model}").assert_error(
            1, cause, "save_pretrained"
        )


def test_debug_shows_the_traceback_and_then_the_message(call: Any) -> None:
    call("store info @nothing").assert_error(1, "not a logitcask store", "check the path")
    plain, debug = call("store info @nothing"), call("--debug store info @nothing")
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback (most recent call last):")
    assert "StoreError" in debug.err
    debug.assert_error(1, "not a logitcask store", "check the path")


def test_a_message_with_quoted_control_characters_is_two_lines(world: World, call: Any) -> None:
    result = call("distill @p.jsonl\n\x1b[31m")
    assert len(result.err.splitlines()) == 2
    assert "\x1b" not in result.err
