"""Cold start and best of n on tiny models: which responses are kept, and what is learned."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.config.recipes import BestOfN, ColdStart
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import ConfigError, IdentityError, IncompleteError
from logitcask.engine.models.identity import model_ref, read_metadata
from logitcask.engine.packing.source import PackSource
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.recipes.best_of_n import run_best_of_n
from logitcask.engine.recipes.cold_start import ColdStartReport, run_cold_start
from logitcask.engine.recipes.rejection import rejection
from logitcask.engine.store import Store, open_store
from logitcask.engine.training.provenance.chain import trace
from logitcask.engine.types import LENGTH, Rollouts, ScoreParams
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

REQUIRED = "e"
PROMPTS, N = 8, 2
OWN = ScoreParams(top_p=1.0, k_min=4, k_max=4, at_student=False)


@dataclass(frozen=True)
class World:
    config: RunConfig
    settings: ColdStart
    report: ColdStartReport

    @property
    def store(self) -> Store:
        return open_store(self.config.store.url)

    def read(self, name: str) -> Iterator[Rollouts]:
        for segment in self.store.head().rollouts(name):
            yield self.store.read_rollouts(segment)

    def sequences(self, name: str) -> list[tuple[str, tuple[int, ...], int]]:
        """Return (prompt id, response, finish reason) of each sequence."""
        return [
            (
                each.prompts[of].id,
                tuple(each.tokens[each.seq_off[i] : each.seq_off[i + 1]].tolist()),
                int(each.finish[i]),
            )
            for each in self.read(name)
            for i, of in enumerate(each.seq_prompt.tolist())
        ]


def half_e(prompt: Any, response: str) -> float:
    """Grade: 1 for a response with an e, else 0."""
    return float("e" in response)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("recipes")
    save_folder(path / "student", make_model(seed=0, eos=[1, 40, 41, 42]))
    save_folder(path / "teacher", make_model(seed=1, spread=0.2, eos=[1, 40, 41, 42, 43]))
    lines = [{"id": f"p{i}", "prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(8)]
    (path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = RunConfig.model_validate(
        {
            "student": {"model": str(path / "student")},
            "teacher": {"model": str(path / "teacher"), "name": "big"},
            "prompts": {"file": str(path / "p.jsonl"), "chat_template": False},
            "store": {"url": str(path / "store")},
            "rollout": {"student_topk": 4, "unit_prompts": 3},
            "score": {"teacher_topk_min": 4, "teacher_topk_max": 8},
            "loop": {"rounds": 1, "prompts_per_round": 4},
            "run": {"out": str(path / "run"), "device": "cpu", "seed": 3},
        }
    )
    settings = ColdStart(
        out=path / "cold",
        n=N,
        max_new_tokens=40,
        require=REQUIRED,
        temperature=1.0,
        top_p=1.0,
        attempts=2,
        learning_rate=1e-2,
        num_train_epochs=3,
        pack_length=128,
    )
    return World(config, settings, run_cold_start(config, settings))


def test_exactly_the_accepted_responses_become_rollouts_of_the_student(world: World) -> None:
    tokenizer = load_tokenizer(Path(world.config.teacher.model))
    accepted, rejected = list[Any](), list[Any]()
    had, surplus = Counter[str](), 0
    for number in (1, 2):
        for each in world.sequences(f"cold-start-sampled-{number}"):
            text = tokenizer.decode(each[1], skip_special_tokens=True)
            reason = rejection(text, truncated=each[2] == LENGTH, require=REQUIRED)
            beyond = not reason and had[each[0]] == N
            surplus += beyond
            had[each[0]] += not reason and not beyond
            (rejected if reason or beyond else accepted).append(each)
    assert sorted(world.sequences("cold-start")) == sorted(accepted)
    assert rejected
    assert not {each[:2] for each in rejected} & {each[:2] for each in accepted}
    first, second = world.report.attempts
    again = {each[0] for each in world.sequences("cold-start-sampled-2")}
    assert (first["sampled"], second["sampled"]) == (N * PROMPTS, N * len(again))
    assert first["accepted"] + second["accepted"] == world.report.accepted == len(accepted)
    assert first["truncated"] + first["missing"] == N * PROMPTS - first["accepted"]
    assert second.get("surplus", 0) == surplus
    assert world.report.prompts_without == PROMPTS - len({each[0] for each in accepted})


def test_the_scores_are_those_that_the_teacher_gave_itself(world: World) -> None:
    snapshot = world.store.head()
    teacher = HF(model_ref(world.config.teacher.model, chat_template=False), device="cpu")
    scores = snapshot.scores("big")
    for segment in snapshot.rollouts("cold-start"):
        rollouts = world.store.read_rollouts(segment)
        assert (segment.provenance["student"]["name"], segment.version) == (
            world.config.student.model,
            0,
        )
        stored = world.store.read_scores(scores[segment.seg_id], base=rollouts)
        exact = teacher.score(rollouts, OWN)
        np.testing.assert_allclose(stored.lp, exact.lp, atol=2e-3)
        np.testing.assert_allclose(stored.entropy, exact.entropy, atol=2e-3)
        assert (stored.kept == 8).all()


def test_the_student_learns_the_accepted_responses_alone(world: World) -> None:
    trained = HF(model_ref(str(world.settings.out), chat_template=False), device="cpu")
    before, after = list[float](), list[float]()
    for rollouts in world.read("cold-start"):
        assert rollouts.student is not None
        before += (-rollouts.student.lp).tolist()
        after += (-trained.score(rollouts, OWN).lp).tolist()
    assert len(before) == world.report.positions
    assert np.mean(after) < np.mean(before) - 0.2
    (found,) = trace(str(world.settings.out))["teachers"]
    assert [each["name"] for each in found["sampled_by"]] == [world.config.teacher.model]
    metadata = read_metadata(world.settings.out)
    assert metadata is not None
    assert metadata["version"] == world.report.updates
    source = PackSource(world.store, world.store.head(), "cold-start", "big")
    assert sum(int(unit.response.sum()) for unit in source.lengths()) == len(before)


def test_the_loss_shown_is_the_cross_entropy_and_warms_up(world: World) -> None:
    lines = [
        json.loads(line) for line in (world.settings.out / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(line["loss"] == pytest.approx(line["loss/ce"]) for line in lines)
    assert lines[0]["loss"] > lines[-1]["loss"] == world.report.loss
    run = json.loads((world.settings.out / "run.json").read_text())
    assert run["settings"]["warmup_steps"] == 1 + (world.report.updates - 1) // 20
    assert run["settings"]["schedule"] == "cosine"


def test_the_next_command_distils_the_new_student(world: World) -> None:
    assert f"--set student.model={world.settings.out}" in world.report.next
    assert "'rollout.stop_token_ids=[43]'" in world.report.next


def test_a_second_call_samples_keeps_and_trains_nothing(world: World) -> None:
    number = world.store.head().number
    again = run_cold_start(world.config, world.settings)
    assert world.store.head().number == number
    assert again == world.report


def test_only_rejected_responses_are_an_error(world: World) -> None:
    settings = world.settings.model_copy(
        update={"name": "none", "require": "\u2603", "attempts": 1, "out": Path("/no")}
    )
    with pytest.raises(IncompleteError, match="all 16 responses were rejected: .*missing"):
        run_cold_start(world.config, settings)
    assert "none" not in world.store.head().names("rollout")


def test_a_teacher_that_cannot_teach_this_student_is_refused_before_it_samples(
    world: World, tmp_path: Path
) -> None:
    served = world.config.teacher.model_copy(update={"model": "http://a:1"})
    with pytest.raises(ConfigError, match="samples responses of the teacher"):
        run_cold_start(world.config.model_copy(update={"teacher": served}), world.settings)
    save_folder(tmp_path / "other", make_model(), make_tokenizer(characters=CHARACTERS[::-1]))
    curt = make_tokenizer()
    curt.chat_template = curt.chat_template.replace("assistant: ", "bot: ")
    save_folder(tmp_path / "curt", make_model(), curt)
    chat = world.config.prompts.model_copy(update={"chat_template": True})
    for name, cause in (("other", "tokenizer"), ("curt", "different chat templates")):
        teacher = world.config.teacher.model_copy(update={"model": str(tmp_path / name)})
        with pytest.raises(IdentityError, match=cause):
            run_cold_start(
                world.config.model_copy(update={"teacher": teacher, "prompts": chat}),
                world.settings,
            )


@pytest.mark.parametrize(("ties", "incorrect"), [("overlap", "keep"), ("logprob", "drop")])
def test_best_of_n_keeps_the_response_that_a_search_by_hand_finds(
    world: World, ties: Any, incorrect: Any
) -> None:
    settings = BestOfN(
        name=f"best-{ties}",
        n=3,
        max_new_tokens=8,
        grader=f"{__name__}:half_e",
        ties=ties,
        incorrect=incorrect,
        temperature=1.0,
    )
    report = run_best_of_n(world.config, settings)
    student = HF(model_ref(world.config.student.model, chat_template=False), device="cpu")
    k8 = ScoreParams(top_p=1.0, k_min=8, k_max=8, at_student=False)
    best, without = list[Any](), 0
    for rollouts in world.read("best-of-n-sampled"):
        assert rollouts.reward is not None
        assert rollouts.student is not None
        own = student.score(rollouts, k8).ids.reshape(-1, 8)
        theirs = rollouts.student.ids.reshape(-1, 8)
        shared = [len({*p} & {*q}) for p, q in zip(own.tolist(), theirs.tolist(), strict=True)]
        of = shared if ties == "overlap" else rollouts.student.lp.astype(np.float64)
        for prompt in range(len(rollouts.prompts)):
            places = [i for i, each in enumerate(rollouts.seq_prompt) if each == prompt]
            rank = [
                (rollouts.reward[i], np.mean(of[rollouts.seq_off[i] : rollouts.seq_off[i + 1]]), -i)
                for i in places
            ]
            reward, _, place = max(rank)
            without += reward < 1
            if reward == 1 or incorrect == "keep":
                rows = slice(rollouts.seq_off[-place], rollouts.seq_off[-place + 1])
                best.append((rollouts.prompts[prompt].id, tuple(rollouts.tokens[rows].tolist())))
    assert 0 < without < PROMPTS
    kept = world.sequences(f"best-{ties}")
    assert sorted((name, ids) for name, ids, _ in kept) == sorted(best)
    assert (report.prompts, report.with_correct) == (PROMPTS, PROMPTS - without)
    assert report.dropped == (without if incorrect == "drop" else 0)
    assert report.kept == len(best) == PROMPTS - report.dropped
