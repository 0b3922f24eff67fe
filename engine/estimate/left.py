"""Work that a command has still to do and its cost, before it begins: no model is loaded for it.

Lengths, bytes per position and seconds are those of the newest segments of the same name in the
store, so they were measured with the same settings. Without such segments responses count with
max_new_tokens, bytes are assumed, and seconds are not known. A store records the seconds of
scoring, and not those of sampling.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from logitcask.engine.config.cost import Cost
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import StoreError
from logitcask.engine.store import ScoreSegments, Segment, Snapshot, open_store
from logitcask.engine.store.storage.base import open_storage
from logitcask.engine.store.storage.local import LocalStorage
from logitcask.engine.store.store import holds_store
from logitcask.engine.teachers.refreshes import refresh_version
from logitcask.engine.teachers.remote import is_remote

NEWEST = 32
"""Segments that are measured."""
ROLLOUT_SHARE = 0.47
"""Share of rollouts in the bytes of a position and its scores, as measured for the demo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkLeft:
    """Work that is left, and its cost."""

    stage: str
    done: int
    total: int
    noun: str = "responses"
    positions: float
    at_most: bool
    """True where responses count with max_new_tokens."""
    bytes: float
    measured: bool
    """False where the bytes per position are assumed."""
    seconds: float | None
    """None = not known."""
    timed: str
    """Work of the seconds."""
    requests: int = 0
    """To a server that scores."""
    where: str = ""
    """Path that the bytes go to; '' in an object store."""
    free_bytes: int | None = None
    """Of that disk."""

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.bytes <= self.free_bytes

    def check_disk(self) -> None:
        """Raise StoreError where the disk cannot hold what was measured; a guess does not count."""
        if not self.fits and self.measured and not self.at_most:
            raise StoreError(
                f"{self.stage} needs about {self.bytes / 1e9:.3g} GB more, and the disk of "
                f"{self.where} has {(self.free_bytes or 0) / 1e9:.3g} GB free",
                hint="free some of it, choose another place, or begin nevertheless with --yes",
            )


Approve = Callable[[WorkLeft], None]
"""Called with the work that is left, before it begins; may raise."""


def refuse_full_disk(left: WorkLeft) -> None:
    """Refuse work that the disk cannot hold, and nothing else."""
    left.check_disk()


@dataclass(frozen=True, slots=True)
class Measured:
    """Means of segments; None = there are none, or they do not record it."""

    length: float | None = None
    """Response tokens of a sequence."""
    bytes: float | None = None
    """Of a position."""
    seconds: float | None = None
    """Of a position."""


def measure(segments: Sequence[Segment]) -> Measured:
    """Return the means of the newest segments."""
    newest = [each for each in segments[-NEWEST:] if each.rows]
    rows = sum(each.rows for each in newest)
    if not rows:
        return Measured()
    timed = [(each.seconds, each.rows) for each in newest if each.seconds]
    seconds = sum(took for took, _ in timed if took)
    return Measured(
        length=rows / max(1, sum(each.counts["N"] for each in newest)),
        bytes=sum(each.size for each in newest) / rows,
        seconds=seconds / sum(count for _, count in timed) if timed else None,
    )


def sampling_left(
    url: str, rollouts: str, *, sequences: int, max_new_tokens: int, stage: str = "rollout"
) -> WorkLeft:
    """Return what is left of `sequences` rollouts of a name."""
    snapshot = _head(url)
    stored = () if snapshot is None else snapshot.rollouts(rollouts)
    done, found = sum(each.counts["N"] for each in stored), measure(stored)
    positions = max(0, sequences - done) * (found.length or max_new_tokens)
    return _work(stage, url, (done, sequences), positions, found, guess=found.length is None)


def scoring_left(
    url: str,
    rollouts: str,
    teacher: str,
    *,
    sequences: int,
    max_new_tokens: int,
    remote: bool = False,
    stage: str = "score",
) -> WorkLeft:
    """Return what is left of the scores of `sequences` rollouts, those that are not sampled too."""
    snapshot = _head(url)
    stored = () if snapshot is None else snapshot.rollouts(rollouts)
    scores = _scores(snapshot, teacher)
    length = measure(stored).length
    unscored = [each for each in stored if each.seg_id not in scores]
    there = sum(each.counts["N"] for each in stored)
    positions = float(sum(each.counts["P"] for each in unscored))
    positions += max(0, sequences - there) * (length or max_new_tokens)
    left = max(0, sequences - there) + sum(each.counts["N"] for each in unscored)
    found = measure([each for of in scores.values() for each in of])
    counts = max(sequences, there) - left, max(sequences, there)
    guess = length is None or (sequences > there and not there)
    return _work(stage, url, counts, positions, found, guess=guess, requests=left * remote)


def units_left(
    url: str, teacher: str, units: Iterable[Segment], *, done: int, remote: bool
) -> WorkLeft:
    """Return what is left of a scoring whose rollout segments are known; done: responses."""
    segments = [*units]
    left = sum(each.counts["N"] for each in segments)
    scores = _scores(_head(url), teacher)
    return _work(
        "score",
        url,
        (done, done + left),
        sum(each.counts["P"] for each in segments),
        measure([each for of in scores.values() for each in of]),
        guess=False,
        requests=left * remote,
    )


def loop_left(config: RunConfig) -> WorkLeft:
    """Return what is left of the rollouts and scores of a loop."""
    loop, rollout = config.loop, config.rollout
    planned = loop.rounds * loop.updates_per_round
    rounds = -(-min(planned, config.train.max_steps or planned) // loop.updates_per_round)
    url, name = config.store.url, config.store.rollouts
    sequences, most = rounds * loop.prompts_per_round * rollout.n, rollout.max_new_tokens
    scoring = scoring_left(
        url,
        name,
        config.teacher.name,
        sequences=sequences,
        max_new_tokens=most,
        remote=is_remote(config.teacher.model),
    )
    sampling = sampling_left(url, name, sequences=sequences, max_new_tokens=most)
    return combined("distill", [sampling, scoring])


def trainings_left(
    out: Path, *, done: Sequence[float], total: int, positions: float, weight_bytes: int
) -> WorkLeft:
    """Return what is left of `total` trainings below a folder.

    done: seconds of those that are finished; positions, weight_bytes: of one training.
    """
    left = total - len(done)
    where, free = _disk(str(out))
    return WorkLeft(
        stage="ablate",
        done=len(done),
        total=total,
        noun="trainings",
        positions=left * positions,
        at_most=False,
        bytes=left * weight_bytes,
        measured=True,
        seconds=left * sum(done) / len(done) if done else None,
        timed="training",
        where=where,
        free_bytes=free,
    )


def combined(stage: str, parts: Sequence[WorkLeft]) -> WorkLeft:
    """Return the work of several stages, with the counts of the first."""
    work = [each for each in parts if each.positions]
    known = [each for each in work if each.seconds is not None]
    return replace(
        parts[0],
        stage=stage,
        positions=sum(each.positions for each in parts),
        at_most=any(each.at_most for each in parts),
        bytes=sum(each.bytes for each in parts),
        measured=all(each.measured for each in parts),
        seconds=sum(each.seconds or 0.0 for each in known) if known else None,
        timed=" and ".join(dict.fromkeys(each.timed for each in known or work)),
        requests=sum(each.requests for each in parts),
    )


def _work(
    stage: str,
    url: str,
    counts: tuple[int, int],
    positions: float,
    found: Measured,
    *,
    guess: bool,
    requests: int = 0,
) -> WorkLeft:
    share = ROLLOUT_SHARE if stage == "rollout" else 1 - ROLLOUT_SHARE
    assumed = share * float(Cost().bytes_per_position)
    where, free = _disk(url)
    return WorkLeft(
        stage=stage,
        done=counts[0],
        total=counts[1],
        positions=positions,
        at_most=guess and positions > 0,
        bytes=positions * (assumed if found.bytes is None else found.bytes),
        measured=found.bytes is not None or not positions,
        seconds=None if found.seconds is None else positions * found.seconds,
        timed="sampling" if stage == "rollout" else "scoring",
        requests=requests,
        where=where,
        free_bytes=free,
    )


def _scores(snapshot: Snapshot | None, teacher: str) -> Mapping[str, ScoreSegments]:
    """Return seg_id of rollouts -> scores of a teacher, those of its refreshes too."""
    found: dict[str, ScoreSegments] = {}
    if snapshot is None:
        return found
    for name in snapshot.names("score"):
        if name == teacher or refresh_version(teacher, name) is not None:
            found |= snapshot.scores(name)
    return found


def _head(url: str) -> Snapshot | None:
    """Return the newest snapshot; None where there is no store yet."""
    return open_store(url).head() if holds_store(url) else None


def _disk(url: str) -> tuple[str, int | None]:
    """Return (path, free bytes of its disk) of a store; ('', None) for an object store."""
    storage = open_storage(url)
    if not isinstance(storage, LocalStorage):
        return "", None
    path = Path(storage.url)
    there = next(each for each in (path, *path.parents) if each.exists())
    return str(path), shutil.disk_usage(there).free
