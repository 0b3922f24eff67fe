"""Packs of teachers with another tokenizer: spans, ids without a twin, several teachers."""

import numpy as np
import pytest
import torch

from logitcask.engine.alignment.span_scores import ENDS, NONE, STARTS
from logitcask.engine.errors import ConfigError
from logitcask.engine.packing.source import PackSource
from logitcask.engine.packing.targets import Targets
from logitcask.engine.store import Store, open_store
from logitcask.engine.types import Rollouts
from tests.engine.store.made import SCORE_PROVENANCE, commit_rollouts, commit_scores
from tests.engine.store.made_spans import commit_span_scores, slow_rows

EACH = (NONE, STARTS, ENDS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return rollouts in two units, with scores of one ordinary teacher and of three of spans."""
    store = open_store(tmp_path_factory.mktemp("packs") / "s", create=True)
    for seed in (1, 2):
        base = commit_rollouts(store, seed, student=True, reward=True)
        commit_scores(store, base, seed, name="own")
        commit_scores(
            store, base, seed + 10, name="base", provenance=SCORE_PROVENANCE | {"teacher_kind": "b"}
        )
        for rows in EACH:
            commit_span_scores(store, base, seed, rows)
    return store


def packed(store: Store, teacher: str) -> Targets:
    """Return the targets of all sequences, in their order."""
    source = PackSource(store, store.head(), "main", teacher, partial=True)
    return source.pack(np.array([(o, s) for o in range(2) for s in range(6)], np.int64)).targets


def rows_of(store: Store, teacher: str) -> tuple[Targets, list[tuple[Rollouts, list[dict]]]]:
    """Return the targets of all sequences, and the plain joins of the units."""
    found = []
    for segment in store.head().rollouts("main"):
        rollouts = store.read_rollouts(segment)
        chain = store.head().scores(teacher)[segment.seg_id]
        found.append((rollouts, slow_rows(rollouts, store.read_span_scores(chain))))
    return packed(store, teacher), found


@pytest.mark.parametrize("rows", EACH)
def test_targets_have_the_values_of_a_plain_join(store: Store, rows: str) -> None:
    targets, units = rows_of(store, f"spans-{rows}")
    r = several = unmapped = 0
    number = -1
    for rollouts, found in units:
        starts = set(rollouts.seq_off.tolist())
        last = None
        for i, row in enumerate(found):
            if i in starts:
                last = None
            if row["span"] >= 0:
                number += row["span"] != last
                last = row["span"]
            assert targets.span[r] == (number if row["span"] >= 0 else -1)
            assert targets.span_tokens[r] == row["span_tokens"]
            own = [targets.span_log_q[r], targets.span_row_log_q[r], targets.teacher_logprobs[r]]
            expected = [row["span_q"], row["span_row_q"], row["q_token_lp"]]
            np.testing.assert_allclose(own, expected, rtol=1e-6)
            listed = {v: lp for v, lp, *_ in row["s"]} | {
                v: lp for v, lp, _ in row["t"] if v != 0xFFFFFFFF
            }
            token = int(rollouts.tokens[i])
            value = float(targets.q_log_p[r, targets.token_col[r]])
            if np.isnan(row["q_token_lp"]):
                several += token in listed
                assert value == pytest.approx(listed.get(token, -np.inf))
            else:
                assert value == pytest.approx(row["q_token_lp"])
            none = sorted(lp for v, lp, _ in row["t"] if v == 0xFFFFFFFF)
            at = (targets.ids[r] == -1) & (targets.q_log_p[r] > -torch.inf)
            assert sorted(targets.q_log_p[r, at].tolist()) == pytest.approx(none)
            cached = {
                int(targets.ids[r, c]): float(targets.q_log_p[r, c])
                for c in range(targets.ids.shape[1])
                if targets.cached[r, c]
            }
            scored = {v: lp for v, lp in listed.items() if lp > -np.inf}
            assert cached.keys() - {token} == scored.keys() - {token}
            unmapped += len(none)
            r += 1
    assert r == len(targets)
    assert (targets.ids.shape[1] == 1) == (rows == NONE)
    assert rows == NONE or min(several, unmapped) > 0


def test_several_teachers_keep_their_own_spans(store: Store) -> None:
    names = ["own", "spans-starts", "spans-none"]
    both = packed(store, "+".join(names))
    alone = {name: packed(store, name).spanned() for name in names}
    assert len(both) == sum(map(len, alone.values()))
    assert both.span is not None
    total = torch.cat([each.span_log_q for each in alone.values()])  # type: ignore[misc]
    np.testing.assert_array_equal(both.span_log_q.sort().values, total.sort().values)
    # Rows of a span are of one part, and each part of a sequence has its own.
    spans = sum(int(each.span.max()) + 1 for each in alone.values())  # type: ignore[union-attr]
    assert both.span.max() + 1 == spans
    for span in range(spans):
        assert len(both.sequence[both.span == span].unique()) == 1


def test_a_base_model_and_spans_are_refused(store: Store) -> None:
    for teacher, base in (("spans-starts", "base"), ("own", "spans-starts")):
        with pytest.raises(ConfigError, match="another tokenizer"):
            PackSource(store, store.head(), "main", teacher, base=base, partial=True)
