"""`logitcask score --model http://...`: scored, trained from, and the README's refusals, one test a
row.
"""

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

from logitcask.engine.backends.base import close_backend
from logitcask.engine.commands.score import score_request
from logitcask.engine.config.sections import ScoreConfig
from logitcask.engine.config.toml import validate
from logitcask.engine.errors import IdentityError
from logitcask.engine.events import CancelToken
from logitcask.engine.score.plan import plan_scores
from logitcask.engine.score.unit import run_score_unit
from logitcask.engine.store import open_store
from tests.cli.conftest import KEPT, TRAIN, UNITS, Answer, World
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.backends.server.test_faults import WRONG
from tests.engine.tiny import CHARACTERS, N_VOCAB, make_model, make_tokenizer, save_folder

Call = Callable[[str], Answer]
SERVED = f"--tokenizer @teacher --teacher served {KEPT} --server-wait 1"


@pytest.fixture(scope="module")
def model() -> Any:
    """As in @teacher."""
    return make_model(seed=1)


@pytest.fixture
def fake(model: Any) -> Iterator[FakeServer]:
    with FakeServer(model, tokenizer=make_tokenizer()) as server:
        yield server


def command(fake: FakeServer, store: str, more: str = "") -> str:
    return f"score --model {fake.url} {SERVED} --store {store} {more}"


def altered(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(change(weight))
    return other


def int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().max() / 127
    return (weight / scale).round() * scale


def low_rank(weight: torch.Tensor) -> torch.Tensor:
    """What an adapter of rank 1 does."""
    if weight.dim() < 2:
        return weight
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 1, generator=generator) for n in weight.shape)
    return weight + 0.02 * a @ b.T


def test_a_served_teacher_scores_and_a_student_learns_from_it(
    call: Call, world: World, fake: FakeServer
) -> None:
    store = world.store(UNITS)
    first = call(command(fake, store, "--format json"))
    assert first.code == 0, first.err
    assert first.json["units_new"] == UNITS
    assert "nothing to do" in call(command(fake, store)).out
    segments = open_store(world.at(store)).head().scores("served")
    lineage = next(iter(segments.values()))[0].lineage
    assert lineage["backend"]["name"] == "server"
    assert len(lineage["behaviour"]["lp"]) == 16
    for objective in ("overlap", "opd"):
        out = world.new("run")
        trained = call(f"{TRAIN} {store} --objective {objective} --out {out}")
        assert trained.code == 0, trained.err
        assert "entropy is an interval" in trained.err


def test_a_loop_learns_from_a_served_teacher_and_goes_on(
    call: Call, world: World, model: Any, tmp_path: Path
) -> None:
    places = f"--set store.url={tmp_path / 'store'} --set run.out={tmp_path / 'out'}"
    asked = f"distill @d.toml --set teacher.tokenizer={world.at('@teacher')} {places}"
    with FakeServer(model, tokenizer=make_tokenizer()) as fake:
        done = call(f"{asked} --set teacher.model={fake.url} --format json")
        assert done.code == 0, done.err
        assert "entropy is an interval" in done.err
        assert done.json["version"] == 2
        segments = open_store(tmp_path / "store").head().scores("big")
        assert {c[0].lineage["backend"]["name"] for c in segments.values()} == {"server"}
        assert all("behaviour" in chain[0].lineage for chain in segments.values())
        asked += f" --set teacher.model={fake.url}"
        assert call(f"{asked} --format json").json["version"] == 2
        fake.model = altered(model, int8)
        shutil.rmtree(tmp_path / "out")
        call(asked).refused(1, "not the one of the first scores", "--teacher name")


def test_a_loop_with_too_old_a_server_learns_from_the_teachers_own_ids(
    call: Call, world: World, fake: FakeServer, tmp_path: Path
) -> None:
    fake.generate = False
    asked = (
        f"distill @d.toml --set teacher.tokenizer={world.at('@teacher')} "
        f"--set teacher.model={fake.url} --set store.url={tmp_path / 'store'} --set run.out="
    )
    opd = call(f"{asked}{tmp_path / 'opd'}")
    opd.refused(1, "lack the teacher's log-probs at the student's ids", "")
    assert not (tmp_path / "opd").exists()
    done = call(f"{asked}{tmp_path / 'out'} --set train.objective=overlap")
    assert done.code == 0, done.err
    assert "objectives on the student's ids will be refused" in done.err


def test_a_teacher_with_more_tokens_is_asked_over_those_of_the_student(
    call: Call, world: World, model: Any, tmp_path: Path
) -> None:
    """As one of a family that thinks and one that does not: the teacher knows an id more."""
    wider = copy.deepcopy(model)
    wider.lm_head = torch.nn.Linear(model.config.hidden_size, N_VOCAB + 1)
    bias = wider.lm_head.bias.data.zero_()
    bias[N_VOCAB] = -60.0
    wider.lm_head.weight.data[:N_VOCAB] = model.lm_head.weight
    more = make_tokenizer(characters=CHARACTERS + "é")
    folder = save_folder(tmp_path / "wider", make_model(vocab_size=N_VOCAB + 1), more)
    plain, store = world.store(UNITS), world.store(UNITS)
    with FakeServer(model, tokenizer=make_tokenizer()) as fake:
        assert call(command(fake, plain)).code == 0
    with FakeServer(wider, tokenizer=more) as fake:
        asked = command(fake, store).replace("@teacher", str(folder))
        call(asked).refused(1, "the student's tokenizer is", "--student-tokenizer")
        done = call(f"{asked} --student-tokenizer @student")
        assert done.code == 0, done.err
        assert f"{N_VOCAB} (none to the student, 'é' to the teacher)" in done.err
        bias[N_VOCAB] = 5.0
        likely = command(fake, world.store(UNITS)).replace("@teacher", str(folder))
        likely = f"{likely} --student-tokenizer @student"
        call(likely).refused(1, f"ids from {N_VOCAB} on, which not both tokenizers have", "")
    for one, other in zip(*(scored(world, each) for each in (plain, store)), strict=True):
        np.testing.assert_allclose(one.lp, other.lp, atol=1e-5)
        np.testing.assert_allclose(one.s_lp, other.s_lp, atol=2e-3)


def scored(world: World, name: str) -> list[Any]:
    store = open_store(world.at(name))
    snapshot = store.head()
    return [
        store.read_scores(snapshot.scores("served")[s.seg_id]) for s in snapshot.rollouts("main")
    ]


def test_an_estimate_of_a_served_teacher_is_that_of_its_weights(
    call: Call, fake: FakeServer, model: Any, world: World
) -> None:
    """All but what is missed, which is a share of what the server shows."""
    asked = (
        "@p.jsonl --student @student --no-chat-template --n 2 --max-new-tokens 6 "
        "--teacher-topk-min 4 "
        "--student-topk 4 --device cpu --sample 40 --format json --teacher-topk-max"
    )
    url = f"store estimate {fake.url} --tokenizer @teacher {asked}"
    there, here = (call(f"{each} 99") for each in (url, f"store estimate @teacher {asked}"))
    assert there.code == 0, there.err
    told, known = there.json, here.json
    assert known["kl_over"] == "the whole vocabulary"
    assert told["kl_over"] == "the teacher's 99 best ids and a tail: it shows no more"
    for key in ("forward_kl", "reverse_kl", "overlap_ratio", "mean_length"):
        assert told[key] == pytest.approx(known[key], rel=1e-4)
    for one, other in zip(told["rows"], known["rows"], strict=True):
        assert one["entries"] == pytest.approx(other["entries"], abs=0.1)
        for key in ("forward_kl_missed", "reverse_kl_missed"):
            assert one[key] == pytest.approx(other[key], abs=2e-3)
        # Two ends of an entropy, where the other has one value.
        assert one["bytes_score"] > other["bytes_score"]
    # With fewer ids less is known of the KL, and less is missed of that.
    few = call(f"{url} 12").json
    assert few["forward_kl"] < told["forward_kl"]
    assert [row["k_max"] for row in few["rows"]] == [12] * len(few["rows"])
    fake.max_logprobs = 20
    call(f"{url} 21").refused(
        2, "21 log-probs per position (k_max = 21", "smaller --teacher-topk-max"
    )
    fake.generate = False
    old = call(f"{url} 20").json
    assert 0 < old["forward_kl"] < told["forward_kl"]


class Restart(threading.Thread):
    """Ends a server in the middle of its work and starts it again, on the same port."""

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


def test_a_watching_teacher_goes_on_when_its_server_comes_back(
    call: Call, world: World, model: Any
) -> None:
    store = world.store(UNITS)
    restart = Restart(FakeServer(model, tokenizer=make_tokenizer()).__enter__())
    restart.second.port = restart.first.port
    restart.first.delay_s = 0.1
    restart.start()
    watch = "--worker --idle-exit 0.5 --poll 0.1 --format json --server-wait 30"
    done = call(command(restart.first, store, watch))
    restart.join()
    restart.second.__exit__()
    assert done.code == 0, done.err
    assert (done.json["units"], done.json["failed"]) == (UNITS, 0)
    assert restart.second.seen.requests
    verify = call(f"store verify {store} --deep")
    assert verify.code == 0, verify.err


def test_a_key_from_the_environment_reaches_the_server_and_nothing_else(
    call: Call, world: World, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, store = "sk-canary-77", world.store(UNITS)
    with FakeServer(model, key=key, tokenizer=make_tokenizer()) as guarded:
        refused = call(command(guarded, store))
        refused.refused(1, "401: Unauthorized", "LOGITCASK_API_KEY")
        monkeypatch.setenv("LOGITCASK_API_KEY", key)
        done = call(command(guarded, store))
        assert done.code == 0, done.err
        assert key not in refused.err + done.err + done.out
    for file in world.at(store).rglob("*"):
        assert file.is_dir() or key.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    "change",
    [lambda w: w + 0.01 * torch.sign(w), int8, low_rank],
    ids=["other weights", "quantised", "LoRA on"],
)
def test_a_name_is_refused_to_a_teacher_that_behaves_otherwise(
    change: Callable[[torch.Tensor], torch.Tensor], call: Call, world: World, fake: FakeServer
) -> None:
    store = world.store(UNITS)
    assert call(command(fake, store)).code == 0
    fake.model = altered(fake.model, change)
    call(command(fake, store)).refused(1, "not the one of the first scores", "--teacher name")


def test_other_weights_of_one_path_are_told_apart_by_a_revision(
    call: Call, world: World, fake: FakeServer
) -> None:
    store = world.store(UNITS)
    assert call(command(fake, store)).code == 0
    fake.model = altered(fake.model, int8)
    other = command(fake, store).replace("--teacher served", "--teacher newer")
    call(other).refused(1, "already, under the name 'served'", "--revision")
    assert call(f"{other} --revision second").code == 0


def test_servers_beside_each_other_are_one_teacher_from_the_first_unit_to_the_last(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    with FakeServer(model, tokenizer=make_tokenizer()) as second:
        both = command(fake, world.store(UNITS)).replace(fake.url, f"{fake.url},{second.url}")
        assert call(both).code == 0
        assert second.seen.requests
        second.model = altered(model, int8)
        two = command(fake, world.store(UNITS)).replace(fake.url, f"{fake.url},{second.url}")
        refused = call(two)
        refused.refused(1, f"{second.url} is not the teacher that {fake.url} is", "--revision")


def test_a_server_that_is_not_there_is_waited_for_aloud(call: Call, world: World) -> None:
    asked = f"score --model http://127.0.0.1:9 {SERVED} --store {world.store(UNITS)}"
    gone = call(asked.replace("--server-wait 1", "--server-wait 0.3"))
    gone.refused(1, "does not answer", "--server-wait")
    assert "waiting for http://127.0.0.1:9" in gone.err


def test_one_of_two_servers_is_enough(call: Call, world: World, fake: FakeServer) -> None:
    store = world.store(UNITS)
    both = command(fake, store).replace(fake.url, f"http://127.0.0.1:9,{fake.url}")
    done = call(f"{both} --format json")
    assert done.code == 0, done.err
    assert done.json["units_new"] == UNITS


def test_workers_that_begin_a_name_together_find_each_other(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    """Both see an empty name when they open; one commits, and the other says something else."""
    store = world.store(UNITS)
    opened = open_store(world.at(store))
    with FakeServer(altered(model, int8), tokenizer=make_tokenizer()) as other:
        jobs = [job_of(world, each, store) for each in (fake, other)]
        first, second = (score_request(job, opened, opened.head(), CancelToken()) for job in jobs)
        try:
            planned = plan_scores(second, opened.head())
            (key, unit), (later, more), *_ = planned.missing.items()
            run_score_unit(first, key, unit, first.lineage())
            with pytest.raises(IdentityError, match="of the first scores named 'served'"):
                run_score_unit(second, later, more, planned.lineage)
            with pytest.raises(IdentityError, match="of the first scores named 'served'"):
                plan_scores(second, opened.head())
            assert later not in opened.head().unit_keys()
        finally:
            for each in (first, second):
                close_backend(each.scorer)


def test_stores_of_two_teachers_under_one_name_are_not_merged(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    """Which no digest tells apart: both are served from one path."""
    store, other = world.store(UNITS), world.store(UNITS - 1)
    assert call(command(fake, other)).code == 0
    more = world.store(UNITS)
    fake.model = altered(model, int8)
    assert call(command(fake, store)).code == 0
    merged = call(f"store merge {other} {store}")
    merged.refused(1, "not the one of the first scores", "--revision")
    fake.model = model
    assert call(command(fake, more)).code == 0
    assert call(f"store merge {other} {more}").code == 0


def job_of(world: World, fake: FakeServer, store: str) -> ScoreConfig:
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
        source="a test",
    )


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ("--served x", "served = x, and the teacher is not at a URL"),
        ("--tokenizer @teacher", "and the teacher is not at a URL"),
        ("--api-key-file @key", "and the teacher is not at a URL"),
    ],
)
def test_what_is_about_servers_is_refused_to_a_folder(
    more: str, cause: str, call: Call, world: World
) -> None:
    asked = f"score --model @teacher --teacher big {KEPT} --store {world.store(UNITS)} {more}"
    call(asked).refused(2, cause, "--model http://HOST:PORT")


def test_what_a_server_cannot_show_is_refused(call: Call, world: World, fake: FakeServer) -> None:
    asked = command(fake, world.store(UNITS))
    call(f"{asked} --exact").refused(2, "does not show its hidden states", "--backend vllm")
    drawn = f"{asked} --selection sampled --draws 3"
    call(drawn).refused(2, "the backend server cannot give drawn", "backend hf")
    store = world.new("store")
    roll = f"rollout --model @student --prompts @p.jsonl --store {store} --backend server"
    call(f"{roll} --no-chat-template --max-new-tokens 4").refused(2, "not at a URL", "hf or vllm")
    assert not world.at(store).exists()


def test_a_server_that_tells_few_log_probs_is_asked_for_few(
    call: Call, world: World, fake: FakeServer
) -> None:
    fake.max_logprobs = 8
    assert call(command(fake, world.store(UNITS), "--teacher-topk-max 8")).code == 0


def test_other_temperature_processing_is_refused(
    call: Call, world: World, fake: FakeServer
) -> None:
    store = world.store(UNITS)
    assert call(command(fake, store)).code == 0
    fake.temperature = 1.1
    call(command(fake, store)).refused(1, "not the one of the first scores", "temperature")


def test_an_adapter_is_only_scored_with_by_its_name(
    call: Call, world: World, fake: FakeServer
) -> None:
    fake.parent = "org/teacher"
    store = world.store(UNITS)
    call(command(fake, store)).refused(1, "serves 0 models", "--served")
    assert call(command(fake, store, "--served teacher")).code == 0


def test_another_revision_is_refused(call: Call, world: World, fake: FakeServer) -> None:
    fake.fingerprint = "rev=abc;tok=1"
    store = world.store(UNITS)
    wrong = call(command(fake, store, "--revision abe"))
    wrong.refused(1, "declares revision 'abc', and 'abe' is expected", "--revision")
    assert call(command(fake, store, "--revision abc")).code == 0
    fake.fingerprint = "rev=abe;tok=1"
    other = call(command(fake, store, "--revision abe"))
    other.refused(1, "stands for teacher.weights", "another name")


def test_another_tokenizer_map_is_refused(call: Call, world: World, fake: FakeServer) -> None:
    fake.tokenizer = make_tokenizer(characters=CHARACTERS[::-1])
    store = world.store(UNITS)
    call(command(fake, store)).refused(1, "gives other ids for a text", "--tokenizer")
    both = command(fake, store).replace("@teacher", "@other-tokenizer")
    call(both).refused(1, "the student's tokenizer is", "student's tokenizer")


def test_another_template_is_a_note(call: Call, world: World, fake: FakeServer) -> None:
    """The rendered ids are what counts: the teacher is shown those."""
    store = world.new("templated")
    roll = f"rollout --model @student --prompts @p.jsonl --chat-template --n 1 {SMALL} --store"
    assert call(f"{roll} {store}").code == 0
    done = call(command(fake, store).replace("@teacher", "@other-template"))
    assert done.code == 0, done.err
    assert "renders prompts differently" in done.err


SMALL = "--max-new-tokens 3 --student-topk 4 --unit-prompts 4 --device cpu"


def test_shifted_rows_are_refused(call: Call, world: World, fake: FakeServer) -> None:
    store = world.store(UNITS)
    assert call(command(fake, store, "--teacher-topk-max 9")).code == 0
    fake.faults = [WRONG["shifted"]] * 1000
    call(command(fake, world.store(UNITS))).refused(1, "without the token", "doctor teacher")


def test_text_that_was_tokenised_again_is_refused(
    call: Call, world: World, fake: FakeServer
) -> None:
    fake.faults = [WRONG["shorter"]] * 1000
    call(command(fake, world.store(UNITS))).refused(1, "tokens were sent", "doctor teacher")


def test_a_context_that_is_too_short_is_refused(call: Call, world: World, fake: FakeServer) -> None:
    fake.max_model_len = 10
    long = call(command(fake, world.store(UNITS)))
    long.refused(1, "the scorer's context: 9", "--max-model-len")


def test_too_few_log_probs_are_refused(call: Call, world: World, fake: FakeServer) -> None:
    fake.max_logprobs = 16
    few = call(command(fake, world.store(UNITS), "--teacher-topk-max 20"))
    few.refused(2, "20 log-probs per position (k_max = 20 and 4 chosen", "--max-logprobs 20")


def test_too_old_a_server_gives_its_own_best_ids_and_says_what_that_costs(
    call: Call, world: World, fake: FakeServer
) -> None:
    fake.generate = False
    store = world.store(UNITS)
    done = call(command(fake, store))
    assert done.code == 0, done.err
    assert "objectives on the student's ids will be refused" in done.err
    opd = call(f"{TRAIN} {store} --objective opd --out {world.new('run')}")
    assert opd.code == 1
    assert "lack the teacher's log-probs at the student's ids" in opd.err
    assert call(f"{TRAIN} {store} --objective overlap --out {world.new('run')}").code == 0
    mc = call(command(fake, store, "--extra-ids mc"))
    mc.refused(2, "extra_ids = mc, and teacher cannot score chosen ids", "--enable-scale-out")


def test_one_of_two_servers_that_is_not_there_keeps_nobody(
    call: Call, world: World, fake: FakeServer, model: Any
) -> None:
    with FakeServer(model) as gone:
        pass
    store = world.store(UNITS)
    urls = f"{gone.url},{fake.url}"
    done = call(f"score --model {urls} {SERVED} --store {store} --server-wait 600 --format json")
    assert done.code == 0, done.err
    assert done.json["units_new"] == UNITS
