"""Layouts of a trained pair: each entry once or both lists, and the list that is read back."""

from pathlib import Path
from typing import Any

import numpy as np
from store_common import WORK, bar

from logitcask.engine.store import Store
from logitcask.engine.store.format import codecs, schema
from logitcask.engine.store.format.layouts import kept_lists
from logitcask.engine.store.format.segment import split
from logitcask.engine.types import Array, Scores

LISTS = (
    *("topk_ids", "topk_logprobs", "topk_counts", "n_kept"),
    *("at_student_logprobs", "at_student_rank_fix"),
)
"""Arrays of the teacher's list and of its log-probs at the student's ids."""


def pair() -> dict[str, Any]:
    """Measure the bytes of both layouts, and whether the teacher's own list is read back."""
    from trained_pair import make_pair

    from logitcask.engine.store.inspect import bytes_per_position

    store = make_pair(WORK / "pair")
    snapshot = store.head()
    scored = [(base, snapshot.scores("teacher")[base.seg_id]) for base in snapshot.rollouts("main")]
    once = entries = both = both_whole = positions = common = entropy = 0.0
    for base, segments in scored:
        rollouts = store.read_rollouts(base)
        own = rollouts.student
        assert own is not None, "a committed unit has the student's scores"
        known = store.read_scores(segments, base=rollouts)
        ids, lp = kept_lists(known)
        files = split(segments[0].path, store.read_object(segments[0]), segments[0])
        ours = sum(len(files.get(f"{name}/c/0", b"")) for name in LISTS)
        # Both lists with the same codec: the whole top list, and the student's ids.
        profile = codecs.profile("default")
        whole = {
            "cnt": known.kept,
            "ids": ids,
            "lp": codecs.to_entry(lp, profile),
            "t_at_s": codecs.to_entry(known.s_lp, profile),
        }
        theirs = sum(packed_bytes(array) for array in whole.values())
        entries += ours
        both += theirs
        once += segments[0].size
        both_whole += segments[0].size - ours + theirs
        positions += base.counts["P"]
        entropy += float(known.entropy.sum())
        common += overlap(known, own)
    exact = exactness(WORK / "pair", store)
    total = bytes_per_position(snapshot)
    return {
        "positions": int(positions),
        "entropy_nats": entropy / positions,
        "overlap": common / positions,
        "entries_once": entries / positions,
        "entries_both": both / positions,
        "segment_once": once / positions,
        "segment_both": both_whole / positions,
        "bytes": total,
        "rows_compared": exact["rows"],
        "rows_with_ties": exact["ties"],
        "bars": [
            bar("overlap at 16 of the pair >= 0.65", common / positions,
                common >= 0.65 * positions),
            bar("entries once over both <= 0.72", entries / both, entries <= 0.72 * both),
            bar("score segment once over both <= 0.78", once / both_whole,
                once <= 0.78 * both_whole),
            bar("rollout and score, bytes a position <= 140", total["total"],
                total["total"] <= 140),
            bar("rows whose TopK(q, k) is the teacher's own for every k kept, of all",
                exact["exact"] / exact["rows"], exact["exact"] == exact["rows"]),
        ],
    }  # fmt: skip


def packed_bytes(array: Array) -> int:
    """Return the bytes of an array in a segment: its chunks, their checksums and the index."""
    from pcodec import ChunkConfig, standalone

    config = ChunkConfig(compression_level=codecs.PCODEC_LEVEL)
    chunk = schema.ENTRY_CHUNK
    parts = [array[i : i + chunk] for i in range(0, len(array), chunk)]
    return sum(len(standalone.simple_compress(part, config)) + 20 for part in parts) + 4


def overlap(known: Any, own: Scores) -> float:
    """Return the sum over rows of |S(p) & S(q)| / 16."""
    rank = known.s_rank.reshape(-1, 16)
    return float((rank < 16).sum() / 16)


def exactness(folder: Path, store: Store) -> dict[str, int]:
    """Score a unit again, and count the rows with exactly the list that was read."""
    from logitcask.engine.backends.hf import HF
    from logitcask.engine.models.identity import model_ref
    from logitcask.engine.store.format.ragged import starts
    from logitcask.engine.types import ScoreParams

    teacher = HF(model_ref(str(folder / "teacher"), chat_template=False), device="cpu")
    snapshot = store.head()
    base = snapshot.rollouts("main")[0]
    rollouts = store.read_rollouts(base)
    rescored = teacher.score(rollouts, ScoreParams())
    known = store.read_scores(snapshot.scores("teacher")[base.seg_id], base=rollouts)
    ids, lp = kept_lists(known)
    off = starts(known.kept)
    wrong = np.zeros(rollouts.positions, bool)
    same = np.array_equal(known.kept, rescored.cnt)
    row = np.repeat(np.arange(rollouts.positions), known.kept)
    if same:
        np.logical_or.at(wrong, row, ids != rescored.ids)
    ties = np.zeros(rollouts.positions, bool)
    equal = (np.diff(lp) == 0) & (np.diff(row) == 0)
    ties[row[1:][equal]] = True
    assert off[-1] == len(ids), "every kept entry belongs to a row"
    exact = int((~wrong).sum()) if same else 0
    return {"rows": rollouts.positions, "exact": exact, "ties": int(ties.sum())}
