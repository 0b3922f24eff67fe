"""What a person wants to know of a store: totals, segments, one sequence row by row."""

from collections.abc import Iterable
from typing import Any

import numpy as np

import logitcask.engine.store.format.schema as schema
from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.store.format.layouts import kept_lists
from logitcask.engine.store.format.ragged import starts
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.claims import failed_units
from logitcask.engine.store.log.snapshot import Snapshot
from logitcask.engine.store.store import Store
from logitcask.engine.types import LENGTH, STOP, Array


def summary(store: Store) -> dict[str, Any]:
    """Totals of the newest state; bytes are those of committed segments and the log."""
    snapshot = store.head()
    rollouts = [s for s in snapshot.segments if s.kind == "rollout"]
    scores = [s for s in snapshot.segments if s.kind == "score"]
    positions = sum(s.counts["P"] for s in rollouts)
    scored = len({s.base for s in scores})
    return {
        "store": store.uuid,
        "log_number": snapshot.number,
        "segments": len(snapshot.segments),
        "rollouts": {
            name: _positions(snapshot, "rollout", name) for name in snapshot.names("rollout")
        },
        "teachers": {name: _positions(snapshot, "score", name) for name in snapshot.names("score")},
        "tags": store.log.tags(),
        "unscored_segments": len(rollouts) - scored,
        "failed_units": len(failed_units(store.storage).keys() - snapshot.unit_keys()),
        "sequences": sum(s.counts["N"] for s in rollouts),
        "mean_reward": _mean_rewards(store, rollouts),
        "positions": positions,
        "bytes": committed_bytes(snapshot.segments),
        "bytes_per_position": bytes_per_position(snapshot),
    }


def _mean_rewards(store: Store, rollouts: Iterable[Segment]) -> dict[str, float]:
    """Mean over sequences for each name whose rollouts carry rewards."""
    found: dict[str, list[Array]] = {}
    for segment in rollouts:
        if (reward := rewards_of(store, segment)) is not None and len(reward):
            found.setdefault(segment.name, []).append(reward)
    return {name: float(np.concatenate(each).mean(dtype=float)) for name, each in found.items()}


def rewards_of(store: Store, segment: Segment) -> Array | None:
    """[N] float32, of whose files only theirs is read; None where the segment holds none."""
    if "reward" not in schema.specs(segment.layout):
        return None
    return store.read_arrays(segment, ("reward",))["reward"]


def committed_bytes(segments: Iterable[Segment]) -> int:
    """Bytes of all files of these segments."""
    return sum(s.size for s in segments)


def bytes_per_position(snapshot: Snapshot) -> dict[str, float]:
    """All committed files over response positions, in all and split by kind; scores over what each
    teacher scored, once however often it was widened.
    """
    rollouts = [s for s in snapshot.segments if s.kind == "rollout"]
    scores = [s for s in snapshot.segments if s.kind == "score"]
    rolled = max(1, sum(s.counts["P"] for s in rollouts))
    scored = max(1, sum(s.counts["P"] for s in scores if not s.extends))
    rollout, score = committed_bytes(rollouts) / rolled, committed_bytes(scores) / scored
    return {"total": rollout + score, "rollout": rollout, "score": score}


def listing(store: Store) -> list[dict[str, Any]]:
    """One mapping per visible segment of the newest state, in the order of commits."""
    segments = store.head().segments
    rewards = [rewards_of(store, segment) for segment in segments]
    return [
        {**row, "mean_reward": None if found is None or not len(found) else float(found.mean())}
        for row, found in zip(listing_of(segments), rewards, strict=True)
    ]


def listing_of(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    return [
        {
            "log": s.number,
            "kind": s.kind,
            "name": s.name,
            "segment": s.seg_id,
            "base": s.base or "-",
            "sequences": s.counts["N"],
            "positions": s.counts["P"],
            "layout": s.layout,
            "asked": asked(s),
            "profile": s.profile,
            "bytes_per_position": committed_bytes([s]) / max(1, s.counts["P"]),
        }
        for s in segments
    ]


def asked(segment: Segment) -> str:
    """What a segment was made for, short: how responses were sampled, or what a teacher was asked.
    Empty where its maker has not told.
    """
    lineage = segment.lineage
    if segment.kind == "rollout":
        of = lineage.get("set", {})
        fields = [f"version {segment.unit['version']}"]
        fields += [f"{key} {of[key]:g}" for key in ("temperature", "top_p") if key in of]
        fields += [f"grader {of['grader']}"] if "grader" in of else []
        return ", ".join(fields)
    request = lineage.get("request", {})
    if not request:
        return ""
    k = f"k {request['k_min']}-{request['k_max']}"
    fields = {
        "topp": [f"p {request['top_p']:g}", k],
        "topk": [k],
        "sampled": [f"{request['draws']} draws, seed {request['seed']}"],
    }[request["entry_kind"]]
    return ", ".join([*fields, *([f"at {at}"] if (at := lineage.get("at")) else [])])


def snapshot_summary(store: Store, snapshot: Snapshot) -> dict[str, Any]:
    """Summarize a snapshot and the segments that it reaches."""
    return {
        "log_number": snapshot.number,
        "sha256": snapshot.sha256,
        "time": store.log.time(snapshot.number) if snapshot.number >= 0 else "",
        "tags": [name for name, number in store.log.tags().items() if number == snapshot.number],
        "rollouts": {
            name: _positions(snapshot, "rollout", name) for name in snapshot.names("rollout")
        },
        "teachers": {name: _positions(snapshot, "score", name) for name in snapshot.names("score")},
        "bytes": committed_bytes(snapshot.segments),
    }


def tags(store: Store) -> list[dict[str, Any]]:
    """One mapping per tag, by number."""
    store.log.refresh()
    return [
        {"tag": name, "log_number": number, "time": store.log.time(number)}
        for name, number in sorted(store.log.tags().items(), key=lambda each: (each[1], each[0]))
    ]


def shown(
    store: Store, *, rollouts: str | None, teacher: str | None, sequence: int, top: int
) -> dict[str, Any]:
    """Sequence number `sequence` of a set, its `rows` one mapping each; log-probs and entropies in
    nats. Where a teacher's entropy is an interval, `teacher_entropy` is its least and
    `teacher_entropy_hi` its most.

    Raises ConfigError if a name is unknown or ambiguous, or the set has no such sequence, and
    IncompleteError if there are no rollouts.
    """
    snapshot = store.head()
    name = choose(snapshot.names("rollout"), rollouts, what="rollouts")
    segment, index = _locate(snapshot, name, sequence)
    data = store.read_rollouts(segment)
    student = data.student
    scored = None
    if snapshot.names("score"):
        found = snapshot.scores(choose_teacher(snapshot, teacher)).get(segment.seg_id)
        if found is not None:
            scored = store.read_scores(found, base=data)
            ids, lp = kept_lists(scored)
            first, most = starts(scored.kept), scored.entropy_hi
    start, end = int(data.seq_off[index]), int(data.seq_off[index + 1])
    table = []
    for r in range(start, end):
        row: dict[str, Any] = {"row": r - start, "token": int(data.tokens[r])}
        if student is not None:
            row |= {
                "student_lp": float(student.lp[r]),
                "student_entropy": float(student.entropy[r]),
            }
        if scored is not None:
            entries = range(first[r], min(first[r] + top, first[r + 1]))
            row |= {
                "teacher_lp": float(scored.lp[r]),
                "teacher_entropy": float(scored.entropy[r]),
                **({} if most is None else {"teacher_entropy_hi": float(most[r])}),
                "kept": int(scored.kept[r]),
                "teacher_top": [{"id": int(ids[e]), "lp": float(lp[e])} for e in entries],
            }
        table.append(row)
    prompt, finish = data.prompts[int(data.seq_prompt[index])], int(data.finish[index])
    return {
        "rollouts": name,
        "segment": segment.seg_id,
        "prompt": prompt.id,
        "prompt_tokens": list(prompt.token_ids),
        "version": int(data.version_start[index]),
        **({} if data.reward is None else {"reward": float(data.reward[index])}),
        "finish": {STOP: "stop", LENGTH: "length"}.get(finish, str(finish)),
        "rows": table,
    }


def choose(cached: list[str], wanted: str | None, *, what: str, where: str = "the store") -> str:
    """The wanted name, or the only one there is.

    Raises ConfigError with the list if the choice is not clear, IncompleteError if there is none.
    """
    if wanted is None and len(cached) == 1:
        return cached[0]
    if wanted in cached:
        return str(wanted)
    if not cached:
        made, verb = {
            "rollouts": ("rollouts", "rollout"),
            "base": ("scores of a base model", "score --teacher-kind base"),
        }.get(what.removeprefix("eval-"), ("scores", "score"))
        raise IncompleteError(
            f"{where} holds no {made}",
            hint=f"Run `logitcask {verb}` first; a snapshot taken earlier cannot see later {made}.",
        )
    listed = ", ".join(cached)
    if wanted is None:
        raise ConfigError(
            f"--{what} is not given and {where} has {len(cached)}: {listed}",
            hint=f"name one with --{what}",
        )
    raise ConfigError(f"--{what} {wanted}: {where} has {listed}", hint="give one of these")


def choose_teacher(
    snapshot: Snapshot, wanted: str | None, *, what: str = "teacher", where: str = "the store"
) -> str:
    """The same of scores. Those of a base model are meant only by who names them."""
    cached = [n for n in snapshot.names("score") if snapshot.role(n) != "base" or n == wanted]
    return choose(cached, wanted, what=what, where=where)


def _positions(snapshot: Snapshot, kind: str, name: str) -> int:
    mine = [s for s in snapshot.segments if s.kind == kind and s.name == name]
    return sum(s.counts["P"] for s in mine if not s.extends)


def _locate(snapshot: Snapshot, name: str, sequence: int) -> tuple[Segment, int]:
    left = sequence
    for segment in snapshot.rollouts(name):
        if left < segment.counts["N"]:
            return segment, left
        left -= segment.counts["N"]
    raise ConfigError(
        f"--sequence {sequence}: {name} has {sequence - left} sequences",
        hint="they count from 0",
    )
