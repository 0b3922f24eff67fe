"""Continuations begin at the exact ids of stored responses, and are graded with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.commands.probes.continuation import run_continuation_probe
from logitcask.engine.commands.rollout import run_rollout
from logitcask.engine.config.probes import ContinuationConfig
from logitcask.engine.config.sections import RolloutConfig
from logitcask.engine.errors import ConfigError, IncompleteError, PromptError
from logitcask.engine.probes.continuation import continuation_report, grade, prefixes
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.store import open_store
from logitcask.engine.types import Prompt
from tests.engine.cached import make_store, make_unit
from tests.engine.tiny import make_model, save_folder

PROMPTS, N, NEW = 8, 2, 6


def even(prompt: Prompt, response: str) -> float:
    """Grade by the first letter, so that random models are right about every second time."""
    return float(ord((response or "a")[0]) % 2 == 0)


def config(path: Path, *, store: str = "store", **settings: Any) -> ContinuationConfig:
    chosen = {"teacher_model": str(path / "teacher"), "at": [0, 3], "n": N, **settings}
    return ContinuationConfig.model_validate(
        {
            "student": {"model": str(path / "student")},
            "continuation": chosen,
            "store": {"url": str(path / store)},
            "run": {"device": "cpu", "seed": 5},
        }
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two models, and graded rollouts of the student."""
    made = tmp_path_factory.mktemp("continuation")
    save_folder(made / "student", make_model(seed=0))
    save_folder(made / "teacher", make_model(seed=1))
    rows = [{"id": f"p{i}", "prompt": f"{i} + {i} ="} for i in range(PROMPTS)]
    (made / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "student": {"model": str(made / "student")},
        "prompts": {"file": str(made / "p.jsonl"), "chat_template": False},
        "store": {"url": str(made / "store")},
        "rollout": {"n": N, "max_new_tokens": NEW, "grader": f"{__name__}:even"},
        "run": {"device": "cpu", "seed": 5},
    }
    run_rollout(RolloutConfig.model_validate(settings))
    return made


def test_without_a_prefix_it_is_the_plain_evaluation(path: Path, tmp_path: Path) -> None:
    report = run_continuation_probe(config(path), tmp_path / "c.svg")
    start, later = report.cuts
    store = open_store(path / "store")
    rewards = [store.read_rollouts(each).reward for each in store.head().rollouts("main")]
    stored = np.concatenate([each for each in rewards if each is not None])
    assert (start.at, start.prompts, later.at) == (0, PROMPTS, 3)
    assert start.student is not None
    assert start.student.mean == pytest.approx(stored.mean())
    # The first letter decides, and after a prefix it is the same for both models.
    assert later.advantage is not None
    assert (later.advantage.mean, later.advantage.se) == (0, 0)
    assert start.advantage is not None
    assert start.advantage.mean != 0
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")


def test_it_refuses_what_cannot_be_continued(path: Path) -> None:
    for settings, cause in (
        ({"teacher_model": "http://localhost:1"}, "does not sample"),
        ({"at": [0, NEW]}, f"at = {NEW}"),
    ):
        with pytest.raises(ConfigError, match=cause):
            run_continuation_probe(config(path, **settings))
    with pytest.raises(PromptError, match="no answer"):
        run_continuation_probe(config(path, grader="exact"))
    save_folder(path / "short", make_model(seed=1, context=12))
    with pytest.raises(PromptError, match="context of 12"):
        run_continuation_probe(config(path, teacher_model=str(path / "short")))
    with pytest.raises(IncompleteError, match="no rollouts named"):
        run_continuation_probe(
            ContinuationConfig.model_validate(
                {
                    **config(path).model_dump(),
                    "store": {"url": str(path / "store"), "rollouts": "x"},
                }
            )
        )


def test_a_prefix_has_the_stored_ids(tmp_path: Path) -> None:
    unit = make_unit(0, prompts=4, n=2, lengths=[2, 5, 6, 7, 1, 1, 0, 4])
    store = make_store(tmp_path / "s", [unit])
    data = [store.read_rollouts(each) for each in store.head().rollouts("main")]
    for at, first in ((0, [0, 2, 4, 7]), (3, [1, 2, 7]), (6, [3]), (7, [])):
        found = prefixes(data, at, limit=9)
        assert [each.prompt.id for each in found] == [f"p0-{i // 2}" for i in first]
        for each, sequence in zip(found, first, strict=True):
            start = unit.rollouts.seq_off[sequence]
            tokens = unit.rollouts.tokens[start : start + at].tolist()
            assert list(each.as_prompt().token_ids) == [*each.prompt.token_ids, *tokens]
            assert (each.as_prompt() is each.prompt) == (at == 0)
    assert len(prefixes(data, 0, limit=2)) == 2
    # Graded with its prefix, by the prompt as it is stored.
    texts: list[tuple[str, list[int]]] = []

    def record(prompt: Prompt, text: str) -> float:
        texts.append((prompt.id, json.loads(text)))
        return 1.0

    grader = Grader(name="none", grader=record, decode=json.dumps)
    chosen = prefixes(data, 3, limit=9)[:2]
    right = grade(chosen, make_unit(1, prompts=2, n=1, lengths=[2, 0]).rollouts, grader, 1.0)
    assert right.tolist() == [1, 1]
    assert [each[0] for each in texts] == ["p0-0", "p0-1"]
    assert [len(each[1]) for each in texts] == [5, 3]
    assert texts[1][1] == list(chosen[1].response)


def test_the_reading_follows_the_advantage() -> None:
    half, noise = np.full(40, 0.5), np.tile([0.1, -0.1], 20)

    def reading(*advantages: float) -> str:
        at = dict.fromkeys(range(len(advantages)), half)
        better = {i: half + each + noise for i, each in enumerate(advantages)}
        return continuation_report(4, at, better).reading

    assert "it shrinks" in reading(0.3, 0.1)
    assert "cannot repair" in reading(0.3, 0.01)
    assert "continues no better" in reading(0.0, 0.3)
    assert "nothing shows that it shrinks" in reading(0.3, 0.3)
    assert "more lengths" in reading(0.3)
    none = continuation_report(4, {5: np.zeros(0)}, {5: np.zeros(0)})
    assert (none.cuts[0].student, none.cuts[0].prompts) == (None, 0)
    assert "no response is longer" in none.reading
