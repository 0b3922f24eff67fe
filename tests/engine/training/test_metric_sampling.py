"""The updates and positions with metrics: few, often enough, the same after a resume."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.training.metric_sampling import POINTS, ROWS, SHARE, STEPS, metric_sampling
from logitcask.engine.training.settings import settings_record


@pytest.mark.parametrize("updates", [1, 2, 19, 64, 320, 10_000])
def test_a_run_has_enough_points_and_no_more_updates_than_it_needs(updates: int) -> None:
    sampling = metric_sampling(Train(), updates)
    due = [update for update in range(updates) if sampling.is_due(update)]
    assert (due[0], due[-1]) == (0, updates - 1)
    assert min(updates, POINTS) <= len(due) <= max(2 * POINTS, updates // STEPS + 2)


def test_the_share_holds_a_number_of_positions_and_the_ends_of_a_run_have_more() -> None:
    sampling = metric_sampling(Train(), 1000)
    for rows in (8, 500, 16_384):
        few = min(1.0, ROWS / rows)
        assert sampling.share(STEPS, rows) == few
        assert sampling.share(0, rows) == sampling.share(999, rows) == max(SHARE, few)
        assert sampling.share(STEPS + 1, rows) == 0.0
    assert sampling.share(STEPS, 0.0) == 1.0, "an update without positions"


def test_settings_replace_the_share_and_the_steps() -> None:
    share = metric_sampling(Train(metrics_fraction=0.25), 1000)
    assert [share.share(update, 1e6) for update in (0, 1, 999)] == [0.25] * 3
    both = metric_sampling(Train(metrics_fraction=0.25, metrics_steps=10), 1000)
    assert [both.share(update, 1e6) for update in (0, 1, 10, 999)] == [0.25, 0, 0.25, 0.25]


def test_a_bound_that_ends_a_run_sees_every_update() -> None:
    stop = metric_sampling(Train(staleness_action="stop"), 1000)
    assert [stop.share(update, 1e6) for update in (0, 1, 2)] == [SHARE] * 3
    with pytest.raises(ValidationError, match="stop needs the metrics of every update"):
        Train(staleness_action="stop", metrics_steps=2)


def test_a_run_of_an_earlier_version_has_the_same_record() -> None:
    run = Run(out=Path("out"))
    record = settings_record(Train(), Lora(), run)
    assert record["metric_share"] == 0.0625
    assert "metrics_steps" not in record
    assert settings_record(Train(metrics_steps=4), Lora(), run)["metrics_steps"] == 4
