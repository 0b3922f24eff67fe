"""The store as the stages use it: opening and committing."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import logitcask.engine.store.commit as commit
import logitcask.engine.store.extend as extend
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.layouts as layout
import logitcask.engine.store.format.rollouts as rollouts
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.claims as claims
import logitcask.engine.store.log.format_file as format_file
import logitcask.engine.store.spans.arrays as spans
from logitcask.engine.alignment.span_scores import SpanScores
from logitcask.engine.errors import StoreError
from logitcask.engine.store.format.checks import check_rollouts, check_scores
from logitcask.engine.store.format.entry import Segment, SegmentBody, tokens_sha256
from logitcask.engine.store.format.provenance import ALIGNMENT, provenance_of
from logitcask.engine.store.format.rows import lists_at
from logitcask.engine.store.log.publish import check_name_identity
from logitcask.engine.store.log.snapshot import ScoreSegments, are_partial
from logitcask.engine.store.reader import Reader
from logitcask.engine.store.spans.checks import check_structure, check_values
from logitcask.engine.store.storage.base import Storage, open_storage
from logitcask.engine.types import Array, IdLists, Rollouts, Scores


class Store(Reader):
    """An open store. Pickling it keeps its URL only, so another process opens it again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

    def check_name(
        self, kind: str, name: str, provenance: Mapping[str, Any], *, drawn: bool
    ) -> None:
        """Raise IdentityError where a name has another identity than this provenance.

        drawn: of scores at drawn ids. With an `alignment` in the provenance they are scores of
        spans. A commit checks the same, but only after the work.
        """
        self.log.refresh()
        which = schema.SAMPLED if drawn else ""
        if ALIGNMENT in provenance:
            which = spans.LAYOUT_OF[provenance[ALIGNMENT]["rows"]]
        new = Segment(
            kind=kind,
            layout=which,
            profile="",
            name=name,
            unit_key="",
            source=SegmentBody(unit={}, provenance=provenance),
        )
        check_name_identity(self.log, new)

    def commit_rollouts(
        self,
        unit_rollouts: Rollouts,
        *,
        name: str,
        unit_key: str,
        unit: Mapping[str, Any],
        provenance: Mapping[str, Any],
        profile: str = "default",
    ) -> Segment:
        """Commit one rollout unit; return its segment, which another writer may have committed.

        `unit` has at least `version` and `first` (student version, first prompt). Raises
        IdentityError where `name` has another prompt set or student, StoreError where the arrays
        are invalid or cannot be written.
        """
        new = Segment(
            kind=schema.ROLLOUT,
            layout=rollouts.layout_of(unit_rollouts),
            profile=profile,
            name=name,
            unit_key=unit_key,
            source=SegmentBody(unit=dict(unit), provenance=dict(provenance)),
        )
        if (winner := self._find_committed(new)) is not None:
            return winner
        if not all(type(unit.get(key)) is int and unit[key] >= 0 for key in ("version", "first")):
            raise StoreError(
                f"unit {dict(unit)} lacks version or first", hint="give both as integers >= 0"
            )
        check_rollouts(unit_rollouts, provenance)
        arrays = rollouts.encode(unit_rollouts, codecs.profile(profile))
        digest = tokens_sha256(arrays["response_tokens"], arrays["response_offsets"])
        return self._commit(
            arrays,
            new,
            tokens_sha256=digest,
            version=unit["version"],
            first=unit["first"],
        )

    def commit_scores(
        self,
        scores: Scores,
        *,
        base: Segment,
        name: str,
        unit_key: str,
        unit: Mapping[str, Any],
        provenance: Mapping[str, Any],
        profile: str = "default",
        at: IdLists | None = None,
        rows: Array | None = None,
        seconds: float | None = None,
    ) -> Segment:
        """Commit one teacher's scores of one rollout segment; return the segment of the unit.

        at: where the teacher has scores of these rollouts already, `extend.request_ids` of them:
        the new scores extend these. rows: [P] bool, the positions that `scores` are of, none of
        them scored before; None = all. seconds: time of the teacher, for the record. Raises
        IdentityError where `name` has another teacher or other log-probs, StoreError where the
        scores do not fit the rollouts or cannot be written.
        """
        which = schema.SAMPLED if scores.mult is not None else schema.FULL
        new = Segment(
            kind=schema.SCORE,
            layout=which,
            profile=profile,
            name=name,
            unit_key=unit_key,
            source=SegmentBody(unit=dict(unit), provenance=dict(provenance), seconds=seconds),
        )
        if (winner := self._find_committed(new)) is not None:
            return winner
        found = self._scored(base)
        before, positions = self.log.score_segments(name, found.seg_id), found.counts["P"]
        if not before and at is not None:
            raise StoreError(
                f"teacher {name!r} has no scores of rollouts {found.seg_id} to extend",
                hint="they may have been deleted meanwhile; run the same command again",
            )
        if rows is not None:
            self._check_new(rows, positions, before)
        if not before or rows is not None:
            student = self._student_lists(found)
            if rows is not None:
                positions, student = int(rows.sum()), student and lists_at(student, rows)
            check_scores(scores, positions, student)
            arrays = layout.encode(scores, codecs.profile(profile), student)
            which = schema.DEDUP if "at_student_logprobs" in arrays else which
            which += schema.BOUNDS if "entropy_upper" in arrays else ""
            if rows is not None:
                arrays["scored"] = rows.astype(np.uint16)
                which += schema.PARTIAL
        elif are_partial(before):
            raise StoreError(
                f"teacher {name!r} has scores of some positions of rollouts {found.seg_id}, and "
                "only complete ones are extended by ids",
                hint="score the other positions first: --positions all, with the same request",
            )
        elif at is None or scores.at_lp is None or scores.mult is not None:
            raise StoreError(
                f"teacher {name!r} has scores of rollouts {found.seg_id} already",
                hint="score at the stored ids to extend them, or use another name; drawn ids "
                "cannot be extended",
            )
        else:
            check_scores(scores, positions, at)
            dtype = str(provenance.get("backend", {}).get("dtype", "float32"))
            arrays = extend.encode(
                self.read_scores(before),
                scores,
                at,
                codecs.profile(profile),
                noise=extend.NOISE.get(dtype, extend.COARSE_NOISE),
                rounding=max(codecs.profile(each.profile).rounding for each in before),
            )
            which = schema.EXTENSION
        return self._commit(
            arrays,
            new,
            layout=which,
            base=found.seg_id,
            extends=before[-1].seg_id if before else "",
            tokens_sha256=found.tokens_sha256,
            counts={"N": found.counts["N"]},
        )

    def commit_span_scores(
        self,
        scores: SpanScores,
        *,
        base: Segment,
        name: str,
        unit_key: str,
        unit: Mapping[str, Any],
        provenance: Mapping[str, Any],
        profile: str = "default",
        seconds: float | None = None,
    ) -> Segment:
        """Commit the scores of a teacher with another tokenizer, of one rollout segment.

        Arguments and return value as those of `commit_scores`. The provenance has `alignment`:
        digests of the tables of both tokenizers as `student` and `teacher`, and `rows` of the
        scores. Raises IdentityError where `name` has another teacher, other log-probs or another
        alignment, StoreError where the scores do not fit the rollouts or cannot be written.
        """
        new = Segment(
            kind=schema.SCORE,
            layout=spans.LAYOUT_OF.get(scores.rows, ""),
            profile=profile,
            name=name,
            unit_key=unit_key,
            source=SegmentBody(unit=dict(unit), provenance=dict(provenance), seconds=seconds),
        )
        alignment = provenance_of(provenance, f"teacher {name!r}: provenance")[ALIGNMENT]
        if alignment["rows"] != scores.rows or not new.layout:
            raise StoreError(
                f"best ids at rows {scores.rows!r} of spans, but the alignment records "
                f"{alignment['rows']!r}; known: {', '.join(spans.LAYOUT_OF)}",
                hint=layout.RESCORE,
            )
        if (winner := self._find_committed(new)) is not None:
            return winner
        found = self._scored(base)
        if self.log.score_segments(name, found.seg_id):
            raise StoreError(
                f"teacher {name!r} has scores of rollouts {found.seg_id} already",
                hint="use another name; scores of spans cannot be extended",
            )
        (seq_off,) = self.read_arrays(found, ("response_offsets",)).values()
        try:
            check_structure(scores, seq_off)
            check_values(scores)
        except ValueError as error:
            raise StoreError(f"scores of spans: {error}", hint=layout.RESCORE) from error
        arrays = spans.encode(scores, codecs.profile(profile))
        return self._commit(
            arrays,
            new,
            base=found.seg_id,
            tokens_sha256=found.tokens_sha256,
        )

    def _scored(self, base: Segment) -> Segment:
        """Return the rollout segment of this store with these tokens. Raises StoreError."""
        found = self.log.base(base.seg_id)
        if found is None or found.tokens_sha256 != base.tokens_sha256:
            raise StoreError(
                f"{self.url}: no rollout segment {base.seg_id} with these tokens",
                hint="score the rollouts of this store",
            )
        return found

    def _check_new(self, rows: Array, positions: int, before: ScoreSegments) -> None:
        """Raise StoreError unless rows are [P] bool of `positions`, without a score in `before`."""
        if rows.dtype != bool or rows.shape != (positions,):
            raise StoreError(
                f"rows ({rows.dtype}, {rows.shape}) are no marks of {positions} positions",
                hint=layout.RESCORE,
            )
        if before:
            scored = self.read_scores(before).scored
            if scored is None or (scored & rows).any():
                raise StoreError(
                    "some of these positions have a score of this teacher already",
                    hint="another writer was faster; run the same command again to resume",
                )

    def _find_committed(self, new: Segment) -> Segment | None:
        winner = commit.find_committed(self.log, new)
        if winner is not None:
            # Its writer may not have flushed it yet.
            self.storage.settle("log")
        return winner

    def _commit(self, arrays: Mapping[str, Array], new: Segment, **found: Any) -> Segment:
        return commit.commit_arrays(self.storage, self.log, arrays, replace(new, **found))


def open_store(url: str | Path, *, create: bool = False) -> Store:
    """Open a store by path or URL; `create` it where there is none, to write to it.

    Raises StoreError where there is no store, it can only be read though `create` is given, other
    files are in the way, or the format is newer than this program; IntegrityError where format.json
    is damaged.
    """
    return open_on(open_storage(url), create=create)


def open_on(storage: Storage, *, create: bool = False) -> Store:
    """Open a store on a storage; as `open_store`."""
    if create:
        storage.check_writable()
    identity = format_file.read(storage)
    if identity is None:
        if not create:
            raise StoreError(
                f"{storage.url} is not a logitcask store: it has no format.json",
                hint="check the path; `logitcask rollout` creates a store at a free path",
            )
        identity = format_file.create(storage)
    storage.check((*format_file.FOLDERS, *claims.FOLDERS))
    return Store(storage, identity)


def holds_store(url: str | Path) -> bool:
    """Return whether there is a store at a path or URL; raises as `open_store` otherwise."""
    return format_file.read(open_storage(url)) is not None
