"""The teacher's mean reward of responses, and the area that tells correct from incorrect."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcask.engine.commands.probe import run_reward_probe
from logitcask.engine.config.probes import RewardProbeConfig
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.exchange.positions import positions
from logitcask.engine.probes.reward import auroc, sequence_rewards
from logitcask.engine.store import Store
from tests.engine.cached import GRADED_LENGTHS, REWARDS, make_graded_unit, make_store, make_unit

CASES = st.lists(
    st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 4)), min_size=2, max_size=30
).filter(lambda rows: len({kind for _, kind, _ in rows}) == 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    units = [make_graded_unit(seed) for seed in range(3)]
    return make_store(tmp_path_factory.mktemp("store") / "s", units)


def config(store: Store, **reward: object) -> RewardProbeConfig:
    return RewardProbeConfig.model_validate({"store": {"url": str(store.url)}, "reward": reward})


def test_a_reward_is_the_mean_over_tokens_that_count(store: Store) -> None:
    gaps, of_prompt = defaultdict[int, list[float]](list), {}
    for row in positions(store, rollouts="main", teacher="big"):
        if row["loss_mask"]:
            gaps[row["sequence"]].append(row["teacher_logprob"] - row["student_logprob"])
            of_prompt[row["sequence"]] = (row["prompt"], row["reward"])
    found = sequence_rewards(store, store.head())
    assert found.mean == pytest.approx([np.mean(each) for each in gaps.values()], rel=1e-6)
    assert found.reward.tolist() == [reward for _, reward in of_prompt.values()]
    names = [prompt for prompt, _ in of_prompt.values()]
    same = found.prompt[:, None] == found.prompt
    assert (same == (np.array(names)[:, None] == np.array(names))).all()
    assert found.left_out == 3, "one response of each unit has no token"


@given(CASES)
def test_the_area_is_the_share_of_pairs_in_order(rows: list[tuple[int, bool, int]]) -> None:
    values, positive, cluster = (np.array(each) for each in zip(*rows, strict=True))
    pairs = values[positive][:, None] - values[~positive]
    area, error = auroc(values, positive, cluster)
    assert area == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    flipped, same_error = auroc(-values, positive, cluster)
    assert flipped == pytest.approx(1 - area)
    np.testing.assert_allclose(error, same_error, atol=1e-12)
    # More copies of a response in its own prompt say nothing new.
    copies = [np.repeat(each, 3) for each in (values, positive, cluster)]
    np.testing.assert_allclose(auroc(*copies), (area, error), atol=1e-12)


def test_the_error_is_that_of_independent_prompts() -> None:
    """Compare with the spread of the area over 2,000 draws of 60 prompts of 4 alike responses."""
    rng = np.random.default_rng(0)
    areas, errors = [], []
    for _ in range(2000):
        correct = rng.random(60) < 0.5
        values = np.repeat(correct + rng.normal(size=60), 4) + 0.1 * rng.normal(size=240)
        area, error = auroc(values, np.repeat(correct, 4), np.repeat(np.arange(60), 4))
        areas.append(area)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.06)


def test_the_report_compares_both_groups(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "reward.svg"
    report = run_reward_probe(config(store, correct_from=1.0), file)
    found = sequence_rewards(store, store.head())
    correct = found.reward == 1
    assert (report.correct, report.incorrect) == (correct.sum(), (~correct).sum())
    assert report.mean_correct == pytest.approx(found.mean[correct].mean())
    assert report.auroc == auroc(found.mean, correct, found.prompt)[0]
    assert report.reading.startswith(f"AUROC {report.auroc:.2f}")
    text = file.read_text()
    assert text.startswith("<?xml")
    assert [each.name for each in tmp_path.iterdir()] == ["reward.svg"], "no part of it is left"
    half = run_reward_probe(config(store, correct_from=0.5))
    assert half.correct == (found.reward >= 0.5).sum() > report.correct


def test_what_cannot_be_compared_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written as"):
        run_reward_probe(config(store), tmp_path / "reward.jpg")
    with pytest.raises(ConfigError, match="no folder"):
        run_reward_probe(config(store), tmp_path / "none" / "reward.svg")
    plain = make_store(tmp_path / "plain", [make_unit(0)])
    with pytest.raises(IncompleteError, match="no rewards"):
        run_reward_probe(config(plain))
    unit = make_unit(1, lengths=GRADED_LENGTHS)
    alike = replace(unit, rollouts=replace(unit.rollouts, reward=np.ones(6, np.float32)))
    with pytest.raises(ConfigError, match="5 of 5 responses"):
        run_reward_probe(config(make_store(tmp_path / "alike", [alike])))
    other = make_unit(2, lengths=GRADED_LENGTHS)
    other = replace(other, rollouts=replace(other.rollouts, reward=REWARDS))
    unscored = make_store(tmp_path / "unscored", [alike, other], scored=1)
    with pytest.raises(IncompleteError, match="no scores of 'big'"):
        run_reward_probe(config(unscored))
