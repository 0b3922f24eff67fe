"""Commands that show scores of spans, and those that refuse them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from logitcask.engine.alignment.coverage import coverage_of
from logitcask.engine.alignment.span_scores import ENDS, NONE, STARTS
from logitcask.engine.errors import ConfigError
from logitcask.engine.exchange.positions import positions
from logitcask.engine.integrations.stored import open_stored
from logitcask.engine.probes.candidates.agreement import agreement
from logitcask.engine.probes.correctness import correctness_report
from logitcask.engine.probes.positions import position_report
from logitcask.engine.probes.reward import sequence_rewards
from logitcask.engine.report.panels import Bars, Table
from logitcask.engine.report.sections.sizes import store_section
from logitcask.engine.store import Store, open_store
from logitcask.engine.store.inspect import show_sequence, summary
from tests.engine.report.made import facts_of
from tests.engine.store.made import commit_rollouts
from tests.engine.store.made_spans import commit_span_scores, make_span_scores, slow_rows

SEED = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = open_store(str(tmp_path_factory.mktemp("store") / "s"), create=True)
    base = commit_rollouts(made, SEED, student=True, reward=True)
    for rows in (NONE, STARTS, ENDS):
        commit_span_scores(made, base, SEED, rows)
    return made


@pytest.mark.parametrize("rows", [NONE, STARTS, ENDS])
def test_a_shown_sequence_has_the_spans_of_a_plain_join(store: Store, rows: str) -> None:
    (base,) = store.head().rollouts("main")
    rollouts = store.read_rollouts(base)
    found = store.head().scores(f"spans-{rows}")[base.seg_id]
    plain = slow_rows(rollouts, store.read_span_scores(found))
    name = f"spans-{rows}"
    for sequence in range(len(rollouts.seq_prompt)):
        shown = show_sequence(store, rollouts=None, teacher=name, sequence=sequence, top=64)["rows"]
        expected = plain[slice(*rollouts.seq_off[sequence : sequence + 2].tolist())]
        assert len({tuple(row) for row in shown}) <= 1, "a table has the same keys in every row"
        before = -1
        for row, other in zip(shown, expected, strict=True):
            assert row["span"] == (None if other["span"] < 0 else other["span"])
            if other["span"] > before:  # its first row
                before = other["span"]
                assert row["teacher_lp"] == pytest.approx(other["span_q"], rel=1e-6)
                assert len(row["teacher_tokens"]) == other["span_tokens"]
            else:
                assert row["teacher_lp"] is None
            assert len(row["teacher_top"]) == other["kept"]
    assert any(row["kept"] for row in plain) == (rows != NONE)


def test_totals_and_the_report_have_the_coverage_of_each_teacher(store: Store) -> None:
    snapshot = store.head()
    (base,) = snapshot.rollouts("main")
    sums = coverage_of([make_span_scores(SEED, store.read_rollouts(base))])
    words = summary(store)["spans"]
    assert list(words) == ["spans-ends", "spans-none", "spans-starts"]
    assert words["spans-starts"]["spans"].startswith(f"{sums.spans:,}, of {sums.student_tokens:,}")
    assert "truncated" not in words["spans-none"]
    section = store_section([facts_of(store)])
    assert not section.absent
    panels = {panel.id: panel for panel in section.panels}
    bars, table = panels["store-span-kinds"], panels["store-spans"]
    assert isinstance(bars, Bars)
    assert isinstance(table, Table)
    shares = [bar.value for bar in bars.bars if bar.name == "spans-starts"]
    assert shares == pytest.approx([kind / sums.spans for kind in sums.kinds])
    assert {row[0] for row in table.rows} >= {"aligned", "span-exact", "truncated"}


def test_a_reward_is_the_mean_of_the_log_ratios_of_spans(store: Store) -> None:
    (base,) = store.head().rollouts("main")
    data = store.read_rollouts(base)
    assert data.student is not None
    found = sequence_rewards(store, store.head(), teacher="spans-none")
    plain = slow_rows(data, make_span_scores(SEED, data, NONE))
    means = []
    for a, b in zip(data.seq_off[:-1].tolist(), data.seq_off[1:].tolist(), strict=True):
        counts = data.loss_mask[a:b] != 0
        spans = np.array([row["span"] for row in plain[a:b]])
        total, whole = 0.0, bool(counts.any())
        for span in {*spans[counts].tolist()}:
            inside = spans == span
            whole &= span >= 0 and bool(counts[inside].all())
            first = a + int(np.flatnonzero(inside)[0])
            total += plain[first]["span_q"] - float(data.student.lp[a:b][inside].sum())
        means += [total / counts.sum()] if whole else []
    assert means
    assert found.mean == pytest.approx(means, rel=1e-5)
    assert found.left_out == len(data.seq_prompt) - len(means)


REFUSED: dict[str, Callable[[Store], Any]] = {
    "export": lambda store: next(positions(store, teacher="spans-starts")),
    "positions": lambda store: position_report(store, store.head(), teacher="spans-starts", bins=2),
    "correctness": lambda store: correctness_report(
        store, store.head(), teacher="spans-starts", correct_from=1
    ),
    "agreement": lambda store: agreement(
        store, store.head(), rollouts="main", teacher="spans-starts", k=2
    ),
    "integrations": lambda store: open_stored(str(store.url), "main", "spans-starts", None),
}


@pytest.mark.parametrize("command", REFUSED)
def test_commands_that_read_tokens_refuse_spans_with_a_way_out(store: Store, command: str) -> None:
    with pytest.raises(ConfigError, match="has another tokenizer") as caught:
        REFUSED[command](store)
    assert "objective over spans" in (caught.value.hint or "")
