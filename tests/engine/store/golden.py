"""Generator of the golden stores: golden_v2.tar.xz with every layout and profile of its time, and a
file for the layouts of later ones. An existing file stays.

    python -m tests.engine.store.golden        (in the repository's root)

They are committed, and never made again for a released format version, because later versions must
read the stores of users. Next to each store NAME is NAME.json, the digests of its decoded segments.
Those of format 1, golden_v1*.tar.xz, are what `store upgrade` is tested with.
"""

import hashlib
import json
import tarfile
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from logitcask.engine.alignment.span_scores import ENDS, NONE, STARTS
from logitcask.engine.store import Store, extend, open_store
from logitcask.engine.store.decoded_unit import has_spans
from logitcask.engine.store.format.codecs import PROFILES
from logitcask.engine.store.format.layouts import ranked
from logitcask.engine.store.format.rows import scores_at
from logitcask.engine.store.retention import delete, gc, tag
from logitcask.engine.types import IdLists, Scores
from tests.engine.store.made import (
    bounded,
    commit_rollouts,
    commit_scores,
    make_rollouts,
    make_scores,
)
from tests.engine.store.made_spans import commit_span_scores
from tests.engine.store.test_extend import teacher_of

FOLDER = Path(__file__).parent


def digests(store: Store) -> dict[str, str]:
    """Return the digests of all visible segments, decoded with the segments that they build on."""

    def sha(*parts: object) -> str:
        found = hashlib.sha256()
        for part in parts:
            found.update(part if isinstance(part, bytes) else repr(part).encode())
        return found.hexdigest()

    snapshot, found = store.head(), {}
    for segment in snapshot.segments:
        if segment.kind == "rollout":
            r = store.read_rollouts(segment)
            own = [] if r.student is None else [r.student.ids, r.student.entry_lp, r.student.lp]
            arrays = [r.tokens, r.seq_off, r.b_lp, r.loss_mask, r.version_start, r.finish, *own]
            if (d := r.draws) is not None:
                arrays += [d.cnt, d.ids, d.mult, d.lp]
            arrays += [] if r.reward is None else [r.reward]
            prompts = [(p.id, p.token_ids, p.answer, dict(p.extra)) for p in r.prompts]
            found[segment.seg_id] = sha(prompts, *(a.tobytes() for a in arrays))
    for name in snapshot.names("score"):
        for score_segments in snapshot.scores(name).values():
            for end in range(1, len(score_segments) + 1):
                if has_spans(score_segments):
                    of = store.read_span_scores(score_segments)
                    values = [getattr(of, each.name) for each in fields(of)]
                    parts = [x.tobytes() if isinstance(x, np.ndarray) else x for x in values]
                    found[score_segments[0].seg_id] = sha(*parts)
                    continue
                s = store.read_scores(score_segments[:end])
                u = ranked(s)
                arrays = [s.lp, s.entropy, s.log_tail, s.kept, s.s_ids, u.cnt, u.ids, u.lp]
                arrays += [] if s.mult is None else [s.mult]
                arrays += [] if s.entropy_hi is None else [s.entropy_hi]
                arrays += [] if s.scored is None else [s.scored]
                found[score_segments[end - 1].seg_id] = sha(*(a.tobytes() for a in arrays))
    return found


def fill(path: Path) -> Store:
    store = open_store(path, create=True)
    for seed, profile in enumerate(PROFILES, 1):
        base = commit_rollouts(store, seed, student=True, profile=profile)
        commit_scores(store, base, seed, profile=profile)
    plain = commit_rollouts(store, 11)
    commit_scores(store, plain, 11, name="whole")
    scores = make_scores(12, make_rollouts(11, student=False))
    drawn = [i % 7 + 1 for i in range(len(scores.ids))]
    commit_scores(store, plain, 12, name="drawn", scores=with_mult(scores, drawn))
    teacher, base, student = teacher_of(store, 13)
    first = commit_scores(store, base, 13, name="wide", scores=teacher.score(4, student))
    at = extend.request_ids(store.read_scores((first,)), teacher.lists(5))
    commit_scores(store, base, 14, name="wide", scores=teacher.score(20, at), at=at)
    commit_rollouts(store, 15, name="old")
    tag(store, "golden")
    delete(store, rollouts="old")
    commit_rollouts(store, 16, name="older")
    delete(store, rollouts="older")
    gc(store, keep_days=0, lease_hours=0)
    commit_rollouts(store, 16, name="older")
    return store


def fill_mc(path: Path) -> Store:
    store = open_store(path, create=True)
    for seed, profile in enumerate(PROFILES, 1):
        commit_rollouts(store, seed, draws=True, profile=profile)
    return store


def fill_reward(path: Path) -> Store:
    store = open_store(path, create=True)
    for seed, profile in enumerate(PROFILES, 1):
        commit_rollouts(store, seed, student=True, reward=True, profile=profile)
    commit_rollouts(store, 11, reward=True)
    commit_rollouts(store, 12, draws=True, reward=True)
    return store


def fill_bounds(path: Path) -> Store:
    store = open_store(path, create=True)
    for seed, profile in enumerate(PROFILES, 1):
        base = commit_rollouts(store, seed, student=True, profile=profile)
        scores = bounded(seed, make_scores(seed, make_rollouts(seed)))
        commit_scores(store, base, seed, scores=scores, profile=profile)
    plain = commit_rollouts(store, 11)
    scores = bounded(11, make_scores(11, make_rollouts(11, student=False)))
    commit_scores(store, plain, 11, scores=scores)
    teacher, base, student = teacher_of(store, 13)
    scores = bounded(13, teacher.score(4, student))
    first = commit_scores(store, base, 13, name="wide", scores=scores)
    at = extend.request_ids(store.read_scores((first,)), teacher.lists(5))
    wider = bounded(14, teacher.score(20, at))
    commit_scores(store, base, 14, name="wide", scores=wider, at=at)
    return store


def fill_rows(path: Path) -> Store:
    """Commit each third position in every layout, and of one teacher the others too."""
    store = open_store(path, create=True)
    for seed, profile in enumerate(PROFILES, 1):
        base = commit_rollouts(store, seed, student=True, profile=profile)
        rollouts = store.read_rollouts(base)
        lists = IdLists(cnt=rollouts.student.cnt, ids=rollouts.student.ids)
        scores = make_scores(seed, rollouts)
        third = np.arange(rollouts.positions) % 3 == 0
        for i, (name, each, rows) in enumerate(
            (
                ("both", scores, third),
                ("both", scores, ~third),
                ("some", scores, third),
                ("bounds", bounded(seed, scores), third),
            )
        ):
            part = scores_at(each, rows, lists)
            keys = {"name": name, "scores": part, "rows": rows, "profile": profile}
            commit_scores(store, base, seed + 10 * i, **keys)
    plain = commit_rollouts(store, 11)
    scores = make_scores(11, make_rollouts(11, student=False))
    drawn = with_mult(scores, [i % 7 + 1 for i in range(len(scores.ids))])
    third = np.arange(len(scores.cnt)) % 3 == 0
    for i, each in enumerate((scores, drawn, bounded(11, scores))):
        part = scores_at(each, third, None)
        commit_scores(store, plain, 50 + i, name=f"plain-{i}", scores=part, rows=third)
    return store


def fill_spans(path: Path) -> Store:
    store = open_store(path, create=True)
    for seed, profile in enumerate(PROFILES, 1):
        base = commit_rollouts(store, seed, student=True, profile=profile)
        for rows in (NONE, STARTS, ENDS):
            commit_span_scores(store, base, seed, rows, profile=profile)
    commit_span_scores(store, commit_rollouts(store, 11), 11)
    return store


def with_mult(scores: Scores, drawn: list[int]) -> Scores:
    return replace(scores, mult=np.asarray(drawn, np.uint16))


FILES = {
    FOLDER / "golden_v2.tar.xz": {
        "first": fill,
        "mc": fill_mc,
        "reward": fill_reward,
        "bounds": fill_bounds,
        "rows": fill_rows,
    },
    FOLDER / "golden_v2_spans.tar.xz": {"spans": fill_spans},
}


def main() -> None:
    for file, fills in FILES.items():
        if file.exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            for name, make in fills.items():
                store = make(Path(folder) / name)
                (Path(folder) / f"{name}.json").write_text(json.dumps(digests(store), indent=1))
            with tarfile.open(file, "w:xz", preset=9) as packed:
                for each in sorted(Path(folder).iterdir()):
                    packed.add(each, each.name)
        print(file, file.stat().st_size)


if __name__ == "__main__":
    main()
