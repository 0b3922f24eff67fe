"""The probe before paying: its numbers are those of the trainer, and it refuses before it pays."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.commands.probe import run_probe
from logitcask.engine.commands.probes.compatibility import candidates_of, run_compatibility_probe
from logitcask.engine.config.probes import CompatibilityConfig, ProbeConfig
from logitcask.engine.errors import ConfigError, IdentityError, PromptError
from logitcask.engine.exchange.positions import positions
from logitcask.engine.probes.candidates.agreement import MEASURES, novelty, overlap
from logitcask.engine.probes.candidates.assessment import LITTLE_NEW, OTHER, UNKNOWN
from logitcask.engine.probes.candidates.compatibility import CompatibilityReport
from logitcask.engine.store import Store, open_store
from logitcask.engine.types import Prompt
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import CHARACTERS, make_model, make_tokenizer, save_folder

PROMPTS, N = 16, 2


def even(prompt: Prompt, response: str) -> float:
    """Grade by the first letter, so that random models are right about every second time."""
    return float(ord((response or "a")[0]) % 2 == 0)


GRADER = f"{__name__}:even"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("itself", 0), ("stranger", 1)):
        save_folder(path / name, make_model(seed=seed))
    rows = [{"id": f"p{i}", "prompt": f"{i} + {i} ="} for i in range(PROMPTS)]
    (path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, store: Path, *teachers: str, grader: str = GRADER, **k: int) -> Any:
    return CompatibilityConfig.model_validate(
        {
            "student": {"model": str(folder / "student")},
            "compatibility": {"teacher_models": [str(folder / each) for each in teachers], **k},
            "prompts": {"file": str(folder / "p.jsonl"), "chat_template": False},
            "store": {"url": str(store)},
            "rollout": {"n": N, "max_new_tokens": 6, "grader": grader},
            "run": {"device": "cpu", "dtype": "float32"},
        }
    )


def test_it_compares_the_student_with_itself_and_with_a_stranger(
    folder: Path, tmp_path: Path
) -> None:
    """Check one report in all ways: most of the time is that of the stages."""
    chosen = config(folder, tmp_path / "store", "stranger", "itself")
    found = run_compatibility_probe(chosen, tmp_path / "c.svg")
    check_assessments(found)
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    check_numbers(found, folder, tmp_path / "store")
    check_novelty(found, tmp_path / "store")
    # The same command resumes, and another k samples nothing.
    before = open_store(tmp_path / "store").head().number
    assert run_compatibility_probe(chosen) == found
    small = run_compatibility_probe(config(folder, tmp_path / "store", "stranger", k=4))
    ratios = [each.teachers[-1].measures["overlap/ratio"] for each in (small, found)]
    assert ratios[0] != ratios[1]
    assert open_store(tmp_path / "store").head().number == before


def check_assessments(found: CompatibilityReport) -> None:
    """Check that a student teaches itself nothing, and that a stranger thinks otherwise."""
    itself, stranger = found.teachers
    assert (itself.name, itself.rank, itself.assessment) == ("itself", 1, LITTLE_NEW)
    assert (stranger.name, stranger.rank, stranger.assessment) == ("stranger", 2, OTHER)
    for name, value in {"overlap/ratio": 1, "overlap/advantage": 0, "entropy/gap": 0}.items():
        assert itself.measures[name].mean == pytest.approx(value, abs=1e-3)
    assert itself.measures["kl/reverse_bound"].mean == pytest.approx(0, abs=1e-4)
    # The same weights draw the same responses from the same random numbers.
    assert itself.measures["accuracy/gain"].mean == 0
    assert itself.accuracy == found.accuracy
    shares = [each.mean for name, each in stranger.measures.items() if name.startswith("verified/")]
    assert sum(shares) == pytest.approx(1)
    json.dumps(asdict(found), allow_nan=False)


def check_numbers(found: CompatibilityReport, folder: Path, store: Path) -> None:
    """Compare with the numbers of the trainer on the same rows."""
    settings = {
        "student": {"model": str(folder / "student")},
        "store": {"url": str(store)},
        "probe": {"teacher": "stranger"},
        "run": {"device": "cpu"},
    }
    means = run_probe(ProbeConfig.model_validate(settings))[0].means
    measures = found.teachers[1].measures
    for name in MEASURES:
        if name.startswith("kl/"):
            # The store has no log p of ids that the teacher alone lists, a loaded student has.
            assert 0 < measures[name].mean < means[name] + 1e-4
        elif name in means:
            assert measures[name].mean == pytest.approx(means[name], rel=2e-3, abs=2e-4), name
    weakest = by_position(open_store(store))
    assert measures["acceptance/weakest"].mean == pytest.approx(weakest, rel=1e-5)
    assert sum(name in means for name in MEASURES) == 9


def by_position(store: Store) -> float:
    """Return the least sum of min(p, q) over positions with a row of every prompt, by hand."""
    sums: dict[int, list[float]] = {}
    for row in positions(store, rollouts="main", teacher="stranger"):
        q = dict(zip(row["teacher_ids"][:16], row["teacher_logprobs"][:16], strict=True))
        p = zip(row["student_topk_ids"], row["student_topk_logprobs"], strict=True)
        both = sum(float(np.exp(min(lp, q[each]))) for each, lp in p if each in q)
        sums.setdefault(row["position"], []).append(both)
    return min(float(np.mean(each)) for each in sums.values() if len(each) == PROMPTS * N)


def check_novelty(found: CompatibilityReport, store: Path) -> None:
    """Sum the teacher's mass outside the student's list by hand."""
    rows = positions(open_store(store), rollouts="main", teacher="stranger")
    expected = [
        1
        - sum(
            np.exp(lp)
            for each, lp in zip(row["teacher_ids"], row["teacher_logprobs"], strict=True)
            if each in row["student_topk_ids"]
        )
        for row in rows
    ]
    measures = found.teachers[1].measures
    assert measures["novelty"].mean == pytest.approx(np.mean(expected), rel=1e-5)
    assert 0 < measures["novelty/teacher_correct"].mean < 1


def test_without_a_grader_it_cannot_tell(folder: Path, tmp_path: Path) -> None:
    found = run_compatibility_probe(config(folder, tmp_path / "s", "itself", grader=""))
    assert found.teachers[0].assessment == UNKNOWN
    assert "--grader" in found.teachers[0].because
    assert found.student_accuracy is None
    assert open_store(tmp_path / "s").head().names("rollout") == ["main"]


def test_a_server_scores_and_does_not_sample(folder: Path, tmp_path: Path) -> None:
    with FakeServer(make_model(seed=0), tokenizer=make_tokenizer()) as server:
        chosen = config(folder, tmp_path / "s", "student")
        settings = chosen.model_dump()
        settings["compatibility"] |= {
            "teacher_models": [f"served={server.url}"],
            "tokenizer": str(folder / "itself"),
        }
        found = run_compatibility_probe(CompatibilityConfig.model_validate(settings))
    (teacher,) = found.teachers
    assert (teacher.name, teacher.assessment) == ("served", UNKNOWN)
    assert "can sample here" in teacher.because
    assert teacher.measures["overlap/ratio"].mean == pytest.approx(1, abs=1e-3)
    assert found.student_accuracy is not None
    assert not teacher.accuracy


def test_it_refuses_before_anything_is_sampled(folder: Path, tmp_path: Path) -> None:
    save_folder(folder / "other", make_model(seed=4), make_tokenizer(characters=CHARACTERS[::-1]))
    save_folder(folder / "short", make_model(seed=4, context=12))
    stops = make_tokenizer()
    stops.eos_token = "<unk>"
    save_folder(folder / "endless", make_model(seed=4, eos=2), stops)
    cases: list[tuple[str, type[Exception], str]] = [
        ("other", IdentityError, "tokenizer"),
        ("short", PromptError, "context of 12"),
        ("endless", IdentityError, "stops at the ids"),
    ]
    for name, error, cause in cases:
        with pytest.raises(error, match=cause):
            run_compatibility_probe(config(folder, tmp_path / "s", "stranger", name))
    with pytest.raises(PromptError, match="has no answer"):
        run_compatibility_probe(config(folder, tmp_path / "s", "stranger", grader="exact"))
    with pytest.raises(ConfigError, match="figure"):
        run_compatibility_probe(config(folder, tmp_path / "s", "stranger"), tmp_path / "a.txt")
    assert not (tmp_path / "s").exists()


def test_names_of_candidates() -> None:
    assert candidates_of(["Org/Big-7B", "b=/x/y", "./Z z/"]) == {
        "big-7b": "Org/Big-7B",
        "b": "/x/y",
        "z-z": "./Z z/",
    }
    for models in (["a/x", "b/x"], ["student"], ["a", "a=b"], ["..."]):
        with pytest.raises(ConfigError, match="name"):
            candidates_of(models)


def test_overlap_by_hand() -> None:
    """k = 3, one id disjoint: I = {0, 1}, p- = (2/3, 1/3), q- = (1/3, 2/3)."""
    p = np.array([[0, 1, 2]]), np.log([[0.5, 0.25, 0.125]])
    q = np.array([[1, 0, 7]]), np.log([[0.5, 0.25, 0.125]])
    found = overlap(p, q)
    assert found["overlap/ratio"].tolist() == pytest.approx([2 / 3])
    assert found["overlap/mass_student"].tolist() == pytest.approx([0.75])
    assert found["overlap/mass_teacher"].tolist() == pytest.approx([0.75])
    assert found["acceptance"].tolist() == pytest.approx([0.5])
    kl = 2 / 3 * np.log(2) - 1 / 3 * np.log(2)
    assert found["overlap/advantage"].tolist() == pytest.approx([-kl / 2])
    assert novelty(q, p[0]).tolist() == pytest.approx([0.25])
    disjoint = overlap(p, (np.array([[7, 8, 9]]), q[1]))
    assert [disjoint[name].tolist() for name in MEASURES[:4]] == [[0]] * 4
    assert disjoint["topk/mass_student"].tolist() == pytest.approx([0.875])
