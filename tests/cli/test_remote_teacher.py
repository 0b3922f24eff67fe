"""`logitcask score --model http://...`: scores, training, and the errors of the README."""

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.alignment.span_scores import END
from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.score import score_request
from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import ScoreConfig
from logitcask.engine.errors import IdentityError
from logitcask.engine.events import CancelToken
from logitcask.engine.score.planner import plan_scores
from logitcask.engine.score.unit import run_score_unit
from logitcask.engine.store import open_store
from tests.cli.conftest import KEPT, TRAIN, UNITS, CommandResult, World
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.backends.server.fake_sglang import FakeSGLang
from tests.engine.backends.server.test_faults import WRONG
from tests.engine.tiny import CHARACTERS, N_VOCAB, make_model, make_tokenizer, save_folder

Call = Callable[[str], CommandResult]
SERVED = f"--tokenizer @teacher --teacher served {KEPT} --server-wait 1"


@pytest.fixture(scope="module")
def model() -> Any:
    """Return the model of @teacher."""
    return make_model(seed=1)


@pytest.fixture
def fake(model: Any) -> Iterator[FakeServer]:
    with FakeServer(model, tokenizer=make_tokenizer()) as server:
        yield server


def score_command(fake: FakeServer, store: str, flags: str = "") -> str:
    return f"score --model {fake.url} {SERVED} --store {store} {flags}"


def with_weights(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(change(weight))
    return other


def int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().max() / 127
    return (weight / scale).round() * scale


def add_low_rank(weight: torch.Tensor) -> torch.Tensor:
    """Add an adapter of rank 1."""
    if weight.dim() < 2:
        return weight
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 1, generator=generator) for n in weight.shape)
    return weight + 0.02 * a @ b.T


def test_a_student_trains_from_the_scores_of_a_served_teacher(
    call: Call, world: World, fake: FakeServer
) -> None:
    store = world.store(UNITS)
    first = call(score_command(fake, store, "--format json"))
    assert first.code == 0, first.err
    assert first.json["units_new"] == UNITS
    assert "nothing to do" in call(score_command(fake, store)).out
    segments = open_store(world.at(store)).head().scores("served")
    provenance = next(iter(segments.values()))[0].provenance
    assert provenance["backend"]["name"] == "server"
    assert len(provenance["fingerprint"]["lp"]) == 16
    for objective in ("overlap", "opd"):
        out = world.new("run")
        trained = call(f"{TRAIN} {store} --objective {objective} --out {out}")
        assert trained.code == 0, trained.err
        assert "entropy is an interval" in trained.err


def test_scores_from_sglang_are_those_from_vllm(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    """Serve the same weights from both: they are one teacher."""
    found = []
    with FakeSGLang(model, tokenizer=make_tokenizer()) as sglang:
        for server in (fake, sglang):
            store = world.store(UNITS)
            result = call(score_command(server, store))
            assert result.code == 0, result.err
            opened = open_store(world.at(store))
            snapshot = opened.head()
            for base in snapshot.rollouts("main"):
                segments = snapshot.scores("served")[base.seg_id]
                scores = opened.read_scores(segments, base=opened.read_rollouts(base))
                found.append((segments[0].provenance["teacher"], scores))
        assert "nothing to do" in call(score_command(fake, store)).out
        wrong = call(f"score --model @teacher --server sglang --store {store} --teacher other")
        wrong.assert_error(2, "server = sglang, and the teacher is not at a URL", "--server out")
    assert len(found) == 2 * UNITS
    for (theirs, expected), (ours, scores) in zip(found[:UNITS], found[UNITS:], strict=True):
        assert ours == theirs
        assert scores.s_cnt.all()
        keys = ("lp", "entropy", "entropy_hi", "log_tail", "kept", "s_cnt", "s_ids", "s_lp")
        for key in (*keys, "s_rank", "cnt", "ids", "entry_lp", "rank"):
            np.testing.assert_allclose(
                getattr(scores, key), getattr(expected, key), atol=1e-3, err_msg=key
            )


def test_distill_with_a_served_teacher_resumes(
    call: Call, world: World, model: Any, tmp_path: Path
) -> None:
    paths = f"--set store.url={tmp_path / 'store'} --set run.out={tmp_path / 'out'}"
    command = f"distill @d.toml --set teacher.tokenizer={world.at('@teacher')} {paths}"
    with FakeServer(model, tokenizer=make_tokenizer()) as fake:
        result = call(f"{command} --set teacher.model={fake.url} --format json")
        assert result.code == 0, result.err
        assert "entropy is an interval" in result.err
        assert result.json["version"] == 2
        segments = open_store(tmp_path / "store").head().scores("big")
        assert {c[0].provenance["backend"]["name"] for c in segments.values()} == {"server"}
        assert all("fingerprint" in chain[0].provenance for chain in segments.values())
        command += f" --set teacher.model={fake.url}"
        assert call(f"{command} --format json").json["version"] == 2
        fake.model = with_weights(model, int8)
        shutil.rmtree(tmp_path / "out")
        call(command).assert_error(1, "not the one of the first scores", "--teacher name")


def test_distill_with_an_old_server_trains_on_the_teachers_topk(
    call: Call, world: World, fake: FakeServer, tmp_path: Path
) -> None:
    fake.generate = False
    command = (
        f"distill @d.toml --set teacher.tokenizer={world.at('@teacher')} "
        f"--set teacher.model={fake.url} --set store.url={tmp_path / 'store'} --set run.out="
    )
    opd = call(f"{command}{tmp_path / 'opd'}")
    opd.assert_error(1, "lack the teacher's log-probs at the student's ids", "")
    assert not (tmp_path / "opd").exists()
    result = call(f"{command}{tmp_path / 'out'} --set train.objective=overlap")
    assert result.code == 0, result.err
    assert "objectives on the student's ids will be refused" in result.err


def test_a_teacher_with_more_tokens_is_renormalized_over_those_of_the_student(
    call: Call, world: World, model: Any, tmp_path: Path
) -> None:
    """Give the teacher one more id, as a thinking model has compared to its base model."""
    wider = copy.deepcopy(model)
    wider.lm_head = torch.nn.Linear(model.config.hidden_size, N_VOCAB + 1)
    bias = wider.lm_head.bias.data.zero_()
    bias[N_VOCAB] = -60.0
    wider.lm_head.weight.data[:N_VOCAB] = model.lm_head.weight
    larger = make_tokenizer(characters=CHARACTERS + "é")
    folder = save_folder(tmp_path / "wider", make_model(vocab_size=N_VOCAB + 1), larger)
    plain, store, in_spans = world.store(UNITS), world.store(UNITS), world.store(UNITS)
    with FakeServer(model, tokenizer=make_tokenizer()) as fake:
        assert call(score_command(fake, plain)).code == 0
    with FakeServer(wider, tokenizer=larger) as fake:
        command = score_command(fake, store).replace("@teacher", str(folder))
        call(command).assert_error(1, "nearly the same tokenizer", "--by-spans")
        # Spans of one token each here.
        spans = command.replace(store, in_spans)
        result = call(f"{spans} --span-topk none --by-spans")
        assert result.code == 0, result.err
        assert "scores the same bytes in its own tokens" in result.err
        result = call(f"{command} --student-tokenizer @student")
        assert result.code == 0, result.err
        assert f"{N_VOCAB} (none to the student, 'é' to the teacher)" in result.err
        bias[N_VOCAB] = 5.0
        likely = score_command(fake, world.store(UNITS)).replace("@teacher", str(folder))
        likely = f"{likely} --student-tokenizer @student"
        call(likely).assert_error(1, f"ids from {N_VOCAB} on, which not both tokenizers have", "")
    for one, other in zip(*(scored(world, each) for each in (plain, store)), strict=True):
        np.testing.assert_allclose(one.lp, other.lp, atol=1e-5)
        np.testing.assert_allclose(one.s_lp, other.s_lp, atol=2e-3)
    opened = open_store(world.at(in_spans))
    by_base = opened.head().scores("served")
    for segment, one in zip(opened.head().rollouts("main"), scored(world, plain), strict=True):
        found = opened.read_span_scores(by_base[segment.seg_id])
        np.testing.assert_allclose(found.log_probs, one.lp, atol=1e-5)
        assert (found.marks == END).all()


def scored(world: World, name: str) -> list[Any]:
    store = open_store(world.at(name))
    snapshot = store.head()
    return [
        store.read_scores(snapshot.scores("served")[s.seg_id]) for s in snapshot.rollouts("main")
    ]


def test_an_estimate_of_a_served_teacher_equals_the_local_one(
    call: Call, fake: FakeServer, model: Any, world: World
) -> None:
    """Compare with the local estimate; only the missed KL refers to the returned log-probs."""
    command = (
        "@p.jsonl --student @student --no-chat-template --n 2 --max-new-tokens 6 "
        "--teacher-topk-min 4 "
        "--student-topk 4 --device cpu --sample 40 --format json --teacher-topk-max"
    )
    url = f"store estimate {fake.url} --tokenizer @teacher {command}"
    remote_result, local_result = (
        call(f"{each} 99") for each in (url, f"store estimate @teacher {command}")
    )
    assert remote_result.code == 0, remote_result.err
    remote, local = remote_result.json, local_result.json
    assert local["kl_over"] == "the whole vocabulary"
    assert remote["kl_over"] == "the teacher's 99 best ids and a tail: it shows no more"
    for key in ("forward_kl", "reverse_kl", "overlap_ratio", "mean_length"):
        assert remote[key] == pytest.approx(local[key], rel=1e-4)
    for one, other in zip(remote["rows"], local["rows"], strict=True):
        assert one["entries"] == pytest.approx(other["entries"], abs=0.1)
        for key in ("forward_kl_missed", "reverse_kl_missed"):
            assert one[key] == pytest.approx(other[key], abs=2e-3)
        # The remote scores hold both bounds of an entropy, the local ones a single value.
        assert one["bytes_score"] > other["bytes_score"]
    # Fewer ids give a smaller lower bound of the KL.
    few = call(f"{url} 12").json
    assert few["forward_kl"] < remote["forward_kl"]
    assert [row["k_max"] for row in few["rows"]] == [12] * len(few["rows"])
    fake.max_logprobs = 20
    call(f"{url} 21").assert_error(
        2, "21 log-probs per position (k_max = 21", "smaller --teacher-topk-max"
    )
    fake.generate = False
    old = call(f"{url} 20").json
    assert 0 < old["forward_kl"] < remote["forward_kl"]


class Restart(threading.Thread):
    """Stop a server in the middle of its work and start it again on the same port."""

    def __init__(self, first: FakeServer) -> None:
        super().__init__()
        self.first = first
        self.second = FakeServer(first.model, tokenizer=first.tokenizer, port=first.port)

    def run(self) -> None:
        while not any(len(body.get("token_ids", ())) > 3 for body in self.first.seen.bodies[12:]):
            time.sleep(0.01)
        self.first.__exit__()
        time.sleep(0.3)
        self.second.__enter__()


def test_a_worker_resumes_after_a_restart_of_its_server(
    call: Call, world: World, model: Any
) -> None:
    store = world.store(UNITS)
    restart = Restart(FakeServer(model, tokenizer=make_tokenizer()).__enter__())
    restart.second.port = restart.first.port
    restart.first.delay_s = 0.1
    restart.start()
    watch = "--worker --idle-exit 0.5 --poll 0.1 --format json --server-wait 30"
    result = call(score_command(restart.first, store, watch))
    restart.join()
    restart.second.__exit__()
    assert result.code == 0, result.err
    assert (result.json["units"], result.json["failed"]) == (UNITS, 0)
    assert restart.second.seen.requests
    verify = call(f"store verify {store} --deep")
    assert verify.code == 0, verify.err


def test_a_key_from_the_environment_reaches_the_server_and_nothing_else(
    call: Call, world: World, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, store = "sk-canary-77", world.store(UNITS)
    with FakeServer(model, key=key, tokenizer=make_tokenizer()) as guarded:
        unauthorized = call(score_command(guarded, store))
        unauthorized.assert_error(1, "401: Unauthorized", "LOGITCASK_API_KEY")
        monkeypatch.setenv("LOGITCASK_API_KEY", key)
        result = call(score_command(guarded, store))
        assert result.code == 0, result.err
        assert key not in unauthorized.err + result.err + result.out
    for file in world.at(store).rglob("*"):
        assert file.is_dir() or key.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    "change",
    [lambda w: w + 0.01 * torch.sign(w), int8, add_low_rank],
    ids=["other weights", "quantised", "LoRA on"],
)
def test_a_teacher_with_another_fingerprint_needs_another_name(
    change: Callable[[torch.Tensor], torch.Tensor], call: Call, world: World, fake: FakeServer
) -> None:
    store = world.store(UNITS)
    assert call(score_command(fake, store)).code == 0
    fake.model = with_weights(fake.model, change)
    call(score_command(fake, store)).assert_error(
        1, "not the one of the first scores", "--teacher name"
    )


def test_other_weights_of_one_path_need_a_revision(
    call: Call, world: World, fake: FakeServer
) -> None:
    store = world.store(UNITS)
    assert call(score_command(fake, store)).code == 0
    fake.model = with_weights(fake.model, int8)
    other = score_command(fake, store).replace("--teacher served", "--teacher newer")
    call(other).assert_error(1, "already, under the name 'served'", "--revision")
    assert call(f"{other} --revision second").code == 0


def test_servers_of_two_teachers_are_an_error(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    with FakeServer(model, tokenizer=make_tokenizer()) as second:
        both = score_command(fake, world.store(UNITS)).replace(fake.url, f"{fake.url},{second.url}")
        assert call(both).code == 0
        assert second.seen.requests
        second.model = with_weights(model, int8)
        two = score_command(fake, world.store(UNITS)).replace(fake.url, f"{fake.url},{second.url}")
        call(two).assert_error(
            1, f"{second.url} is not the teacher that {fake.url} is", "--revision"
        )


def test_a_wait_for_a_missing_server_is_reported(call: Call, world: World) -> None:
    command = f"score --model http://127.0.0.1:9 {SERVED} --store {world.store(UNITS)}"
    gone = call(command.replace("--server-wait 1", "--server-wait 0.3"))
    gone.assert_error(1, "does not answer", "--server-wait")
    assert "waiting for http://127.0.0.1:9" in gone.err


def test_one_of_two_servers_is_enough(call: Call, world: World, fake: FakeServer) -> None:
    store = world.store(UNITS)
    both = score_command(fake, store).replace(fake.url, f"http://127.0.0.1:9,{fake.url}")
    result = call(f"{both} --format json")
    assert result.code == 0, result.err
    assert result.json["units_new"] == UNITS


def test_concurrent_workers_of_two_teachers_under_one_name_are_an_error(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    """Open two workers on an unused name; after one commits, the other with other weights fails."""
    store = world.store(UNITS)
    opened = open_store(world.at(store))
    with FakeServer(with_weights(model, int8), tokenizer=make_tokenizer()) as other:
        configs = [config_of(world, each, store) for each in (fake, other)]
        first, second = (
            score_request(config, opened, opened.head(), CancelToken()) for config in configs
        )
        try:
            planned = plan_scores(second, opened.head())
            (key, unit), (second_key, second_unit), *_ = planned.missing.items()
            run_score_unit(first, key, unit, first.provenance())
            with pytest.raises(IdentityError, match="of the first scores named 'served'"):
                run_score_unit(second, second_key, second_unit, planned.provenance)
            with pytest.raises(IdentityError, match="of the first scores named 'served'"):
                plan_scores(second, opened.head())
            assert second_key not in opened.head().unit_keys()
        finally:
            for each in (first, second):
                close_backend(each.scorer)


def test_stores_of_two_teachers_under_one_name_are_not_merged(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    """Serve both from one path, so that no digest differs."""
    store, other = world.store(UNITS), world.store(UNITS - 1)
    assert call(score_command(fake, other)).code == 0
    same_teacher = world.store(UNITS)
    fake.model = with_weights(model, int8)
    assert call(score_command(fake, store)).code == 0
    merged = call(f"store merge {other} {store}")
    merged.assert_error(1, "not the one of the first scores", "--revision")
    fake.model = model
    assert call(score_command(fake, same_teacher)).code == 0
    assert call(f"store merge {other} {same_teacher}").code == 0


def config_of(world: World, fake: FakeServer, store: str) -> ScoreConfig:
    return validate(
        ScoreConfig,
        {
            "teacher": {
                "model": fake.url,
                "name": "served",
                "tokenizer": str(world.at("@teacher")),
            },
            "store": {"url": str(world.at(store))},
            "score": {"teacher_topk_min": 4, "teacher_topk_max": 8},
        },
        source="test",
    )


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ("--served x", "served = x, and the teacher is not at a URL"),
        ("--tokenizer @teacher", "and the teacher is not at a URL"),
        ("--api-key-file @key", "and the teacher is not at a URL"),
    ],
)
def test_server_flags_with_a_model_folder_are_an_error(
    flags: str, cause: str, call: Call, world: World
) -> None:
    command = f"score --model @teacher --teacher big {KEPT} --store {world.store(UNITS)} {flags}"
    call(command).assert_error(2, cause, "--model http://HOST:PORT")


def test_flags_beyond_the_capabilities_of_a_server_are_an_error(
    call: Call, world: World, fake: FakeServer
) -> None:
    command = score_command(fake, world.store(UNITS))
    call(f"{command} --exact").assert_error(2, "does not show its hidden states", "--backend vllm")
    drawn = f"{command} --selection sampled --draws 3"
    call(drawn).assert_error(2, "the backend server cannot give drawn", "backend hf")
    store = world.new("store")
    roll = f"rollout --model @student --prompts @p.jsonl --store {store} --backend server"
    call(f"{roll} --no-chat-template --max-new-tokens 4").assert_error(
        2, "not at a URL", "hf or vllm"
    )
    assert not world.at(store).exists()


def test_teacher_topk_max_within_the_limit_of_a_server_scores(
    call: Call, world: World, fake: FakeServer
) -> None:
    fake.max_logprobs = 8
    assert call(score_command(fake, world.store(UNITS), "--teacher-topk-max 8")).code == 0


def test_another_temperature_is_an_error(call: Call, world: World, fake: FakeServer) -> None:
    store = world.store(UNITS)
    assert call(score_command(fake, store)).code == 0
    fake.temperature = 1.1
    call(score_command(fake, store)).assert_error(
        1, "not the one of the first scores", "temperature"
    )


def test_an_adapter_needs_its_served_name(call: Call, world: World, fake: FakeServer) -> None:
    fake.parent = "org/teacher"
    store = world.store(UNITS)
    call(score_command(fake, store)).assert_error(1, "serves 0 models", "--served")
    assert call(score_command(fake, store, "--served teacher")).code == 0


def test_another_revision_is_an_error(call: Call, world: World, fake: FakeServer) -> None:
    fake.fingerprint = "rev=abc;tok=1"
    store = world.store(UNITS)
    wrong = call(score_command(fake, store, "--revision abe"))
    wrong.assert_error(1, "declares revision 'abc', and 'abe' is expected", "--revision")
    assert call(score_command(fake, store, "--revision abc")).code == 0
    fake.fingerprint = "rev=abe;tok=1"
    other = call(score_command(fake, store, "--revision abe"))
    other.assert_error(1, "stands for teacher.weights", "another name")


def test_another_tokenizer_map_is_an_error(call: Call, world: World, fake: FakeServer) -> None:
    fake.tokenizer = make_tokenizer(characters=CHARACTERS[::-1])
    store = world.store(UNITS)
    call(score_command(fake, store)).assert_error(1, "gives other ids for a text", "--tokenizer")
    both = score_command(fake, store).replace("@teacher", "@other-tokenizer")
    # The server's own tokenizer: it reads the same bytes.
    result = call(both)
    assert result.code == 0, result.err
    assert "scores the same bytes in its own tokens" in result.err


def test_another_template_is_a_note(call: Call, world: World, fake: FakeServer) -> None:
    """Score the stored ids; the template of the teacher is not used."""
    store = world.new("templated")
    roll = f"rollout --model @student --prompts @p.jsonl --chat-template --n 1 {SMALL} --store"
    assert call(f"{roll} {store}").code == 0
    result = call(score_command(fake, store).replace("@teacher", "@other-template"))
    assert result.code == 0, result.err
    assert "renders prompts differently" in result.err


SMALL = "--max-new-tokens 3 --student-topk 4 --unit-prompts 4 --device cpu"


def test_shifted_rows_are_an_error(call: Call, world: World, fake: FakeServer) -> None:
    store = world.store(UNITS)
    assert call(score_command(fake, store, "--teacher-topk-max 9")).code == 0
    fake.faults = [WRONG["shifted"]] * 1000
    call(score_command(fake, world.store(UNITS))).assert_error(
        1, "without the token", "doctor teacher"
    )


def test_another_tokenization_by_the_server_is_an_error(
    call: Call, world: World, fake: FakeServer
) -> None:
    fake.faults = [WRONG["shorter"]] * 1000
    call(score_command(fake, world.store(UNITS))).assert_error(
        1, "tokens were sent", "doctor teacher"
    )


def test_too_short_a_context_is_an_error(call: Call, world: World, fake: FakeServer) -> None:
    fake.max_model_len = 10
    long = call(score_command(fake, world.store(UNITS)))
    long.assert_error(1, "the scorer's context: 9", "--max-model-len")


def test_too_few_log_probs_are_an_error(call: Call, world: World, fake: FakeServer) -> None:
    fake.max_logprobs = 16
    few = call(score_command(fake, world.store(UNITS), "--teacher-topk-max 20"))
    few.assert_error(2, "20 log-probs per position (k_max = 20 and 4 chosen", "--max-logprobs 20")


def test_an_old_server_scores_its_own_topk_with_a_note(
    call: Call, world: World, fake: FakeServer
) -> None:
    fake.generate = False
    store = world.store(UNITS)
    result = call(score_command(fake, store))
    assert result.code == 0, result.err
    assert "objectives on the student's ids will be refused" in result.err
    opd = call(f"{TRAIN} {store} --objective opd --out {world.new('run')}")
    assert opd.code == 1
    assert "lack the teacher's log-probs at the student's ids" in opd.err
    assert call(f"{TRAIN} {store} --objective overlap --out {world.new('run')}").code == 0
    mc = call(score_command(fake, store, "--extra-ids mc"))
    mc.assert_error(2, "extra_ids = mc, and teacher cannot score chosen ids", "--enable-scale-out")


def test_one_missing_server_of_two_does_not_block(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    with FakeServer(model) as gone:
        pass
    store = world.store(UNITS)
    urls = f"{gone.url},{fake.url}"
    result = call(f"score --model {urls} {SERVED} --store {store} --server-wait 600 --format json")
    assert result.code == 0, result.err
    assert result.json["units_new"] == UNITS
