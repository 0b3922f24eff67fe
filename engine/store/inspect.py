"""Views of a store: totals, segments, snapshots, one sequence row by row."""

from collections.abc import Iterable
from typing import Any

import numpy as np

import logitcask.engine.store.format.schema as schema
from logitcask.engine.alignment.by_sequence import spans_of
from logitcask.engine.alignment.coverage import describe
from logitcask.engine.alignment.span_scores import NONE
from logitcask.engine.errors import ConfigError, IncompleteError, StoreError
from logitcask.engine.events import counted
from logitcask.engine.store.decoded_unit import has_spans
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.format.layouts import kept_lists
from logitcask.engine.store.format.provenance import ALIGNMENT
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.log.claims import failed_units
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.spans.views import add_spans, span_coverage
from logitcask.engine.store.store import Store
from logitcask.engine.types import LENGTH, STOP, Array


def summary(store: Store) -> dict[str, Any]:
    """Return the totals of the newest snapshot; bytes are those of committed segments."""
    snapshot = store.head()
    rollouts = [s for s in snapshot.segments if s.kind == "rollout"]
    scores = [s for s in snapshot.segments if s.kind == "score"]
    positions = sum(s.counts["P"] for s in rollouts)
    return {
        "store": store.uuid,
        "log_number": snapshot.number,
        "segments": len(snapshot.segments),
        "rollouts": _positions(snapshot, "rollout"),
        "teachers": _positions(snapshot, "score"),
        "tags": store.log.tags(),
        "unscored_segments": len(rollouts) - len({s.base for s in scores}),
        "failed_units": len(failed_units(store.storage).keys() - snapshot.unit_keys()),
        "sequences": sum(s.counts["N"] for s in rollouts),
        "mean_reward": _mean_rewards(store, rollouts),
        **_span_words(store, snapshot),
        "positions": positions,
        "bytes": committed_bytes(snapshot.segments),
        "bytes_per_position": bytes_per_position(snapshot),
    }


def _mean_rewards(store: Store, rollouts: Iterable[Segment]) -> dict[str, float]:
    """Return the mean over sequences for each name of rollouts with rewards."""
    found: dict[str, list[Array]] = {}
    read = [*rollouts]
    for segment in counted("read rewards", read, len(read), "segments"):
        if (reward := rewards_of(store, segment)) is not None and len(reward):
            found.setdefault(segment.name, []).append(reward)
    return {name: float(np.concatenate(each).mean(dtype=float)) for name, each in found.items()}


def _span_words(store: Store, snapshot: Snapshot) -> dict[str, Any]:
    words = {}
    for name, (sums, whole) in span_coverage(store, snapshot).items():
        some = "" if whole else " (of some evenly chosen segments)"
        words[name] = {each: text + some for each, text in describe(sums).items()}
    return {"spans": words} if words else {}


def rewards_of(store: Store, segment: Segment) -> Array | None:
    """Read the rewards [N] float32 of a segment, and nothing else of it; None where it has none."""
    if "reward" not in schema.specs(segment.layout):
        return None
    return store.read_arrays(segment, ("reward",))["reward"]


def committed_bytes(segments: Iterable[Segment]) -> int:
    """Return the bytes of these segments."""
    return sum(s.size for s in segments)


def bytes_per_position(snapshot: Snapshot) -> dict[str, float]:
    """Return committed bytes over response positions, in total and by kind.

    Scores count over the positions of each teacher, extensions not counted again.
    """
    rollouts = [s for s in snapshot.segments if s.kind == "rollout"]
    scores = [s for s in snapshot.segments if s.kind == "score"]
    n_rollout = max(1, sum(s.counts["P"] for s in rollouts))
    n_score = max(1, sum(s.rows for s in scores))
    rollout, score = committed_bytes(rollouts) / n_rollout, committed_bytes(scores) / n_score
    return {"total": rollout + score, "rollout": rollout, "score": score}


def list_segments(store: Store) -> list[dict[str, Any]]:
    """Return one mapping per segment of the newest snapshot, in the order of commits."""
    segments = store.head().segments
    read = counted("read rewards", segments, len(segments), "segments")
    rewards = [rewards_of(store, segment) for segment in read]
    return [
        {**row, "mean_reward": None if found is None or not len(found) else float(found.mean())}
        for row, found in zip(segment_rows(segments), rewards, strict=True)
    ]


def segment_rows(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    return [
        {
            "log": s.number,
            "kind": s.kind,
            "name": s.name,
            "segment": s.seg_id,
            "base": s.base or "-",
            "sequences": s.counts["N"],
            "positions": rows_of(s),
            "layout": s.layout,
            "request": describe_request(s),
            "profile": s.profile,
            "bytes_per_position": committed_bytes([s]) / max(1, rows_of(s)),
        }
        for s in segments
    ]


def rows_of(segment: Segment) -> int:
    """Return the positions of a segment; an extension has entries at all of its base."""
    return segment.rows if not segment.extends or segment.is_partial else segment.counts["P"]


def describe_request(segment: Segment) -> str:
    """Describe the request of a segment: of sampling or of scoring.

    '' where it is not recorded, ? where another writer recorded it otherwise than ours.
    """
    try:
        return _rollout_request(segment) if segment.kind == "rollout" else _score_request(segment)
    except StoreError:
        return "?"


def _rollout_request(segment: Segment) -> str:
    of = segment.provenance.get("set", {})
    fields = [f"version {segment.version}"]
    fields += [f"{key} {of[key]:g}" for key in ("temperature", "top_p") if key in of]
    fields += [f"grader {of['grader']}"] if "grader" in of else []
    return ", ".join(fields)


def _score_request(segment: Segment) -> str:
    request, at = segment.provenance.get("request", {}), segment.provenance.get("at")
    if not request:
        return ""
    kind = request.get("selection", "top-p")
    if kind == "sampled":
        fields = [f"{request['draws']} draws, seed {request['seed']}"]
    else:
        fields = [f"p {request['teacher_top_p']:g}"] if kind == "top-p" else []
        fields += [f"k {request['teacher_topk_min']}-{request['teacher_topk_max']}"]
    if alignment := segment.provenance.get(ALIGNMENT):
        rows = alignment["rows"]
        fields = ["spans"] if rows == NONE else [f"spans, ids at {rows}", *fields]
    if positions := segment.provenance.get("positions"):
        fields.append(f"positions {positions}")
    return ", ".join([*fields, *([f"at {at}"] if at else [])])


def snapshot_summary(store: Store, snapshot: Snapshot) -> dict[str, Any]:
    """Summarize a snapshot and the segments that it reaches."""
    return {
        "log_number": snapshot.number,
        "sha256": snapshot.sha256,
        "time": store.log.time(snapshot.number) if snapshot.number >= 0 else "",
        "tags": [name for name, number in store.log.tags().items() if number == snapshot.number],
        "rollouts": _positions(snapshot, "rollout"),
        "teachers": _positions(snapshot, "score"),
        "bytes": committed_bytes(snapshot.segments),
    }


def list_tags(store: Store) -> list[dict[str, Any]]:
    """Return one mapping per tag, by number."""
    store.log.refresh()
    return [
        {"tag": name, "log_number": number, "time": store.log.time(number)}
        for name, number in sorted(store.log.tags().items(), key=lambda each: (each[1], each[0]))
    ]


def show_sequence(
    store: Store, *, rollouts: str | None, teacher: str | None, sequence: int, top: int
) -> dict[str, Any]:
    """Return one sequence of the rollouts of a name, with one mapping per response position.

    Log-probs and entropies are in nats. Where a teacher's entropy is an interval, `teacher_entropy`
    is its lower and `teacher_entropy_hi` its upper bound. Positions that the teacher has not scored
    have no values of it, and `scored_positions` counts the others. Of a teacher with another
    tokenizer the values are those of a span, at its first row: the log-prob of all its tokens,
    and `teacher_tokens`; entropy and ids are at the row that has them.

    Raises ConfigError if a name is unknown or ambiguous or there is no such sequence, and
    IncompleteError if there are no rollouts.
    """
    snapshot = store.head()
    name = choose(snapshot.names("rollout"), rollouts, what="rollouts")
    segment, index = _locate(snapshot, name, sequence)
    data = store.read_rollouts(segment)
    student = data.student
    scores, spans = None, None
    start, end = int(data.seq_off[index]), int(data.seq_off[index + 1])
    if snapshot.names("score"):
        found = snapshot.scores(choose_teacher(snapshot, teacher)).get(segment.seg_id)
        if found is not None and has_spans(found):
            spans = spans_of(store.read_span_scores(found), index, slice(start, end))
        elif found is not None:
            scores = store.read_scores(found, base=data)
            ids, lp = kept_lists(scores)
            first, most = starts(scores.kept), scores.entropy_hi
    masked = not data.loss_mask[start:end].all()
    table = []
    for r in range(start, end):
        row: dict[str, Any] = {"row": r - start, "token": int(data.tokens[r])}
        if masked:
            row["loss_mask"] = int(data.loss_mask[r])
        if student is not None:
            row["student_lp"] = float(student.lp[r])
            row["student_entropy"] = float(student.entropy[r])
        if scores is not None and scores.scored is not None and not scores.scored[r]:
            # A table has the same keys in every row.
            row |= {"teacher_lp": None, "teacher_entropy": None, "kept": 0, "teacher_top": []}
        elif scores is not None:
            entries = range(first[r], min(first[r] + top, first[r + 1]))
            row |= {
                "teacher_lp": float(scores.lp[r]),
                "teacher_entropy": float(scores.entropy[r]),
                **({} if most is None else {"teacher_entropy_hi": float(most[r])}),
                "kept": int(scores.kept[r]),
                "teacher_top": [{"id": int(ids[e]), "lp": float(lp[e])} for e in entries],
            }
        table.append(row)
    if spans is not None:
        add_spans(table, spans, top)
    prompt, finish = data.prompts[int(data.seq_prompt[index])], int(data.finish[index])
    of = dict(segment.provenance).get("student")
    of = of if isinstance(of, dict) else {}
    return {
        "rollouts": name,
        "segment": segment.seg_id,
        "student": {key: str(of.get(key, "")) for key in ("name", "revision", "tokenizer")},
        "prompt": prompt.id,
        "prompt_tokens": list(prompt.token_ids),
        "version": int(data.version_start[index]),
        **({} if data.reward is None else {"reward": float(data.reward[index])}),
        "finish": {STOP: "stop", LENGTH: "length"}.get(finish, str(finish)),
        **({} if scores is None or scores.scored is None else _coverage(scores.scored[start:end])),
        "rows": table,
    }


def _coverage(scored: Array) -> dict[str, str]:
    return {"scored_positions": f"{int(scored.sum())} of {len(scored)}"}


def choose(names: list[str], name: str | None, *, what: str, where: str = "the store") -> str:
    """Return the name if it exists, or by default the only one.

    Raises ConfigError with the list for an unknown or ambiguous name, IncompleteError for none.
    """
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return str(name)
    if not names:
        missing, verb = {
            "rollouts": ("rollouts", "rollout"),
            "base": ("scores of a base model", "score --teacher-kind base"),
        }.get(what.removeprefix("eval-"), ("scores", "score"))
        raise IncompleteError(
            f"{where} holds no {missing}",
            hint=f"run `logitcask {verb}` first; an earlier snapshot does not have later {missing}",
        )
    listed = ", ".join(names)
    if name is None:
        raise ConfigError(
            f"--{what} is missing and {where} has {len(names)}: {listed}",
            hint=f"name one with --{what}",
        )
    raise ConfigError(f"--{what} {name}: {where} has {listed}", hint="give one of these")


def choose_teacher(
    snapshot: Snapshot, name: str | None, *, what: str = "teacher", where: str = "the store"
) -> str:
    """Choose a name of scores as `choose` does; those of a base model only by their name."""
    names = [n for n in snapshot.names("score") if snapshot.role(n) != "base" or n == name]
    return choose(names, name, what=what, where=where)


def _positions(snapshot: Snapshot, kind: str) -> dict[str, int]:
    """Return name -> response positions, extensions not counted again."""
    found = dict.fromkeys(snapshot.names(kind), 0)
    for segment in snapshot.segments:
        if segment.kind == kind:
            found[segment.name] += segment.rows
    return found


def _locate(snapshot: Snapshot, name: str, sequence: int) -> tuple[Segment, int]:
    left = sequence
    for segment in snapshot.rollouts(name):
        if left < segment.counts["N"]:
            return segment, left
        left -= segment.counts["N"]
    raise ConfigError(
        f"--sequence {sequence}: {name} has {sequence - left} sequences", hint="count from 0"
    )
