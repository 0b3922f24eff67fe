"""The viewer shows the spans of a teacher with another tokenizer as a plain join has them."""

import math
from pathlib import Path

import numpy as np
import pytest

from logitcask.engine.alignment.span_scores import ENDS, NONE, STARTS
from logitcask.engine.report.viewer.data import viewer_data
from logitcask.engine.report.viewer.rows import IS_FIRST, IS_SCORED
from logitcask.engine.report.viewer.sources import Source
from logitcask.engine.store import open_store
from logitcask.engine.store.decoded_unit import UNMAPPED
from tests.engine.report.viewer.unpack import positions_of, unpack
from tests.engine.store.made import commit_rollouts, commit_scores
from tests.engine.store.made_spans import commit_span_scores, slow_rows


@pytest.mark.parametrize("rows", [NONE, STARTS, ENDS])
def test_spans_and_lists_are_those_of_the_store(tmp_path: Path, rows: str) -> None:
    store = open_store(str(tmp_path / "s"), create=True)
    base = commit_rollouts(store, 2, student=True)
    commit_scores(store, base, 2, name="tokens")
    found = commit_span_scores(store, base, 2, rows)
    data, scores = store.read_rollouts(base), store.read_span_scores((found,))
    source = Source(
        name="run", store=store, snapshot=store.head(), rollouts="main", teachers=(found.name,)
    )
    header, columns = unpack(viewer_data([source]))
    assert [each["name"] for each in header["teachers"]] == [f"spans-{rows} (spans)"]
    assert data.student is not None
    shown = {(each["sequence"], each["position"]): each for each in positions_of(header, columns)}
    plain = slow_rows(data, scores)
    pieces = np.cumsum([0, *scores.piece_lengths.tolist()])
    text = {
        i: scores.piece_bytes.tobytes()[pieces[at] : pieces[at + 1]]
        for at, i in enumerate(scores.piece_ids.tolist())
    }
    listed = ids = 0
    for sequence, (start, end) in enumerate(zip(data.seq_off[:-1], data.seq_off[1:], strict=True)):
        before = -1
        for r in range(start, end):
            each, row = shown[sequence, r - start], plain[r]
            flags = (row["span"] >= 0) * IS_SCORED + (row["span"] > before) * IS_FIRST
            assert each["teacher_flags"] & (IS_SCORED | IS_FIRST) == flags
            assert each["span_count"] == (row["span_tokens"] if row["span"] > before else 0)
            ids += int(each["span_count"])
            before = max(before, row["span"])
            assert each["span_teacher"] == pytest.approx(-row["span_q"], abs=6e-4, nan_ok=True)
            inside = [x for x in range(start, end) if plain[x]["span"] == row["span"] >= 0]
            log_p = float(data.student.lp[inside].sum()) if inside else math.nan
            assert each["span_student"] == pytest.approx(-log_p, abs=6e-4, nan_ok=True)
            mapped = {v: lp for v, lp, rank, _ in row["s"] if math.isfinite(lp)}
            mapped |= {v: lp for v, lp, _ in row["t"] if v != UNMAPPED}
            for v, q in zip(each["student"], each["at_student"], strict=True):
                assert q == pytest.approx(mapped.get(v, math.nan), abs=3e-3, nan_ok=True)
            of_row = [(lp, rank) for _, lp, rank, *_ in (*row["s"], *row["t"])]
            kept = [lp for lp, rank in of_row if rank < row["kept"]]
            assert all(min(abs(lp - q) for lp in kept) < 3e-3 for q in each["own"].values())
            listed += len(each["own"])
    assert (listed > 0) == (rows != NONE)
    assert ids == len(columns["0.span_id"])
    texts = {
        int(columns["text_id"][at]): (header["texts"][at], header["bytes"].get(str(at), ""))
        for at in columns["0.span_id"].tolist()
    }
    for token, (shown_text, digits) in texts.items():
        assert (bytes.fromhex(digits) or (shown_text or "").encode()) == text[token]
