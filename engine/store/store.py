"""Opening and committing: the store as the stages see it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import logitcask.engine.store.commit as commit
import logitcask.engine.store.extend as extend
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.layouts as layout
import logitcask.engine.store.format.rollouts as rollouts
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
import logitcask.engine.store.log.claims as claims
import logitcask.engine.store.log.root as root
from logitcask.engine.errors import StoreError
from logitcask.engine.store.format.checks import check_rollouts, check_scores, vocabulary
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.publish import check_name_identity
from logitcask.engine.store.reader import Reader
from logitcask.engine.store.storage.base import Storage, open_storage
from logitcask.engine.types import Array, IdLists, Rollouts, Scores


class Store(Reader):
    """An open store. A copy that is sent to another process opens it there by its URL."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

    def check_name(self, kind: str, name: str, lineage: Mapping[str, Any], *, drawn: bool) -> None:
        """IdentityError where a name stands for something else than a segment of this lineage.

        drawn: of ids that were drawn. A commit asks the same, but what it commits is made by then.
        """
        which = {schema.ROLLOUT: schema.STUDENT, schema.SCORE: schema.FULL}[kind]
        self.log.refresh()
        fields = {"name": name, "unit_key": "", "unit": {}, "lineage": lineage}
        new = commit.new_segment(kind, schema.SAMPLED if drawn else which, "default", **fields)
        check_name_identity(self.log, new)

    def commit_rollouts(
        self,
        unit_rollouts: Rollouts,
        *,
        name: str,
        unit_key: str,
        unit: Mapping[str, Any],
        lineage: Mapping[str, Any],
        profile: str = "default",
    ) -> Segment:
        """Publishes one rollout unit; returns the segment that holds it, which may be another's.

        `unit` has at least `version` and `first` (student version, first prompt). Raises
        IdentityError where `name` stands for another prompt set or student, StoreError where
        nothing could be written.
        """
        new = commit.new_segment(
            schema.ROLLOUT,
            rollouts.layout_of(unit_rollouts),
            profile,
            name=name,
            unit_key=unit_key,
            unit=dict(unit),
            lineage=dict(lineage),
        )
        if (winner := self._there(new)) is not None:
            return winner
        if not all(type(unit.get(key)) is int and unit[key] >= 0 for key in ("version", "first")):
            raise StoreError(
                f"unit {dict(unit)} lacks version or first", hint="give both as integers from 0"
            )
        check_rollouts(unit_rollouts, n_vocab=vocabulary(lineage))
        arrays = rollouts.encode(unit_rollouts, codecs.profile(profile))
        digest = segments.tokens_sha256(arrays["tokens"], arrays["seq_off"])
        return self._commit(arrays, new, tokens_sha256=digest)

    def commit_scores(
        self,
        scores: Scores,
        *,
        base: Segment,
        name: str,
        unit_key: str,
        unit: Mapping[str, Any],
        lineage: Mapping[str, Any],
        profile: str = "default",
        at: IdLists | None = None,
        seconds: float | None = None,
    ) -> Segment:
        """Publishes one teacher's scores of one rollout segment; returns what holds them.

        seconds: what the teacher took for them, a note beside the segment.

        Where the teacher has scores of these rollouts already, they are widened: `at` is then
        where it was asked, as `extend.ask_at` says. Raises IdentityError where `name` stands for
        another teacher or the numbers are another's, StoreError where the scores do not fit the
        rollouts or nothing could be written.
        """
        fields: dict[str, Any] = {
            "name": name,
            "unit_key": unit_key,
            "unit": dict(unit),
            "lineage": dict(lineage),
        }
        which = schema.SAMPLED if scores.mult is not None else schema.FULL
        if (
            winner := self._there(commit.new_segment(schema.SCORE, which, profile, **fields))
        ) is not None:
            return winner
        found = self.log.base(base.seg_id)
        if found is None or found.tokens_sha256 != base.tokens_sha256:
            raise StoreError(
                f"{self.url}: no rollout segment {base.seg_id} with these tokens",
                hint="score the rollouts of this store",
            )
        score_segments, positions = self.log.score_segments(name, found.seg_id), found.counts["P"]
        if not score_segments and at is not None:
            raise StoreError(
                f"teacher {name!r} has no scores of rollouts {found.seg_id} that these add to",
                hint="they may have been deleted meanwhile; run the same command again",
            )
        if not score_segments:
            student = self._student_lists(found)
            check_scores(scores, positions, student)
            arrays = layout.encode(scores, codecs.profile(profile), student)
            which = schema.DEDUP if "t_at_s" in arrays else which
            which += schema.BOUNDS if "ent_hi" in arrays else ""
        elif at is None or scores.at_lp is None or scores.mult is not None:
            raise StoreError(
                f"teacher {name!r} has scores of rollouts {found.seg_id} already",
                hint="ask it at what is known of them to widen these, or use another name; drawn "
                "ids are not added to",
            )
        else:
            check_scores(scores, positions, at)
            dtype = str(lineage.get("backend", {}).get("dtype", "float32"))
            arrays = extend.encode(
                self.read_scores(score_segments),
                scores,
                at,
                codecs.profile(profile),
                noise=extend.NOISE.get(dtype, extend.COARSE_NOISE),
                rounding=max(codecs.profile(each.profile).rounding for each in score_segments),
            )
            which = schema.EXTENSION
        new = commit.new_segment(schema.SCORE, which, profile, **fields, seconds=seconds)
        return self._commit(
            arrays,
            new,
            base=found.seg_id,
            extends=score_segments[-1].seg_id if score_segments else "",
            tokens_sha256=found.tokens_sha256,
            counts={"N": found.counts["N"]},
        )

    def _there(self, new: Segment) -> Segment | None:
        winner = commit.find_committed(self.log, new)
        if winner is not None:
            # Its writer may not have come so far; what is acknowledged here is durable.
            self.storage.settle("log")
        return winner

    def _commit(self, arrays: Mapping[str, Array], new: Segment, **found: Any) -> Segment:
        return commit.commit_arrays(self.storage, self.log, arrays, replace(new, **found))


def open_store(url: str | Path, *, create: bool = False) -> Store:
    """Opens a store by path or URL; `create` makes it where there is none.

    Raises StoreError where there is no store, where other things are in the way, or where the
    format is newer than this program; IntegrityError where format.json is damaged.
    """
    return open_on(open_storage(url), create=create)


def open_on(storage: Storage, *, create: bool = False) -> Store:
    """`open_store` on a medium that is open already."""
    identity = root.read(storage)
    if identity is None:
        if not create:
            raise StoreError(
                f"{storage.url} is not a logitcask store: it has no format.json",
                hint="check the path; `logitcask rollout` makes a store at a path that is free",
            )
        identity = root.create(storage)
    storage.check((*root.FOLDERS, *claims.FOLDERS))
    return Store(storage, identity)


def holds_store(url: str | Path) -> bool:
    """Whether there is a store at a path or URL yet; raises as `open_store` does for all else."""
    return root.read(open_storage(url)) is not None
