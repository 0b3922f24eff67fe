"""The reading side of a store: snapshots, rollouts and scores."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

import logitcask.engine.store.extend as extend
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.layouts as layout
import logitcask.engine.store.format.ragged as ragged
import logitcask.engine.store.format.rollouts as rollouts
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
import logitcask.engine.store.log.format_file as format_file
import logitcask.engine.store.spans.arrays as spans
from logitcask.engine.alignment.span_scores import SpanScores
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.checks import check_cached, check_rollouts
from logitcask.engine.store.format.entry import Segment, tokens_sha256
from logitcask.engine.store.format.provenance import ALIGNMENT
from logitcask.engine.store.format.rows import marks_of, merged
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.snapshot import ScoreSegments, Snapshot, are_partial
from logitcask.engine.store.spans.checks import check_structure, check_values
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.types import Array, CachedScores, IdLists, Prompt, Rollouts

if TYPE_CHECKING:
    import zarr


class Reader:
    """A store for reading. Later calls read only the new log records."""

    def __init__(self, storage: Storage, identity: format_file.Identity) -> None:
        self.storage = storage
        self.uuid = identity.store_uuid
        self.log = Log(storage, identity.sha256)

    @property
    def url(self) -> str:
        """Return the path or URL of this store."""
        return self.storage.url

    def head(self) -> Snapshot:
        """Return the newest snapshot. Raises IntegrityError for a damaged log."""
        self.log.refresh()
        return self.log.snapshot(len(self.log) - 1)

    def snapshot(self, at: int | str, sha256: str | None = None) -> Snapshot:
        """Return the snapshot of a log number or a tag.

        Raises StoreError where there is no such record, IntegrityError where its sha256 differs.
        """
        self.log.refresh()
        if isinstance(at, str):
            tags = self.log.tags()
            if at not in tags:
                raise StoreError(
                    f"{self.url} has no tag {at!r}; it has: {', '.join(sorted(tags)) or 'none'}",
                    hint="give one of these or a log number, or make one with `logitcask store "
                    "tag`",
                )
            at = tags[at]
        snapshot = self.log.snapshot(at)
        if sha256 is not None and snapshot.sha256 != sha256:
            raise IntegrityError(
                f"{self.url}: log record {at} is {snapshot.sha256}, but the snapshot has {sha256}",
                hint="open the store of the snapshot, or take a new snapshot",
            )
        return snapshot

    def read_rollouts(self, which: Segment) -> Rollouts:
        """Read a rollout segment. Raises IntegrityError for damage."""
        return self._decode_rollouts(which, self.read_arrays(which))

    def check_arrays(self, which: Segment, arrays: dict[str, Array], before: ScoreSegments) -> None:
        """Check the decoded arrays of a segment as a commit does. Raises IntegrityError.

        before: the segments that an extension follows.
        """
        if which.kind == schema.ROLLOUT:
            try:
                found = self._decode_rollouts(which, arrays)
                check_rollouts(found, which.provenance)
            except IntegrityError:
                raise
            except StoreError as error:
                raise self._contradiction(which, error.cause) from error
            return
        if which.layout in schema.SPAN_LAYOUTS:
            with self._consistent(which):
                scores = self._decode_spans(which, arrays, None)
                if scores.rows != which.provenance[ALIGNMENT]["rows"]:
                    raise ValueError(f"{scores.rows!r} rows, and another alignment")
                check_values(scores)
            return
        with self._consistent(which):
            student = self._lists_of(which, None)
            cached = self.read_scores(before) if before else None
            check_cached(_joined(cached, which, arrays, student))

    def read_object(self, which: Segment) -> bytes:
        """Read the object of a segment, and check its size and its digest.

        Raises IntegrityError for damage, StoreError where gc has removed it.
        """
        with self._removed_or_damaged(which):
            return segments.read_object(self.storage, which)

    def read_arrays(self, which: Segment, names: Collection[str] | None = None) -> dict[str, Array]:
        """Read all arrays of a segment, or those of `names`; raises as `read_object`."""
        with self._removed_or_damaged(which):
            return segments.read(self.storage, which, names)

    def open_zarr(self, which: Segment) -> "zarr.Group":
        """Open a segment, wherever the store is, as a group of Zarr in memory, for reading.

        Raises as `read_object`.
        """
        from zarr import open_group
        from zarr.buffer.cpu import Buffer
        from zarr.storage import MemoryStore

        data, where = self.read_object(which), self.storage.where(which.path)
        # Zarr allocates whatever a chunk claims, so it gets only what decodes within bounds.
        segments.decode_object(where, data, which)
        files = segments.split(where, data, which)
        objects: Any = {name: Buffer.from_bytes(bytes(each)) for name, each in files.items()}
        return open_group(MemoryStore(objects, read_only=True), mode="r")

    def is_removed(self, which: Segment) -> bool:
        """Return whether gc has removed a segment, as of the last refresh."""
        return which.generation < self.log.generation(which.kind, which.seg_id)

    def _decode_rollouts(self, which: Segment, arrays: dict[str, Array]) -> Rollouts:
        with self._consistent(which):
            found = rollouts.decode(arrays, codecs.profile(which.profile), which.seg_id)
        if tokens_sha256(found.tokens, found.seq_off) != which.tokens_sha256:
            raise self._contradiction(which, "tokens are not those of the record")
        return found

    def read_extent(self, which: Segment) -> rollouts.Extent:
        """Read the lengths of a rollout segment, and only these arrays."""
        arrays = self.read_arrays(which, rollouts.EXTENT)
        with self._consistent(which):
            return rollouts.extent(arrays, which.counts)

    def read_prompts(self, which: Segment) -> tuple[Prompt, ...]:
        """Read the prompts of a rollout segment, and only these arrays."""
        arrays = self.read_arrays(which, rollouts.PROMPTS)
        with self._consistent(which):
            return rollouts.prompts_of(arrays)

    def read_scores(
        self, score_segments: ScoreSegments, *, base: Rollouts | None = None
    ) -> CachedScores:
        """Read a teacher's scores of one rollout segment, its extensions included.

        They usually need the student's lists of the rollouts, which are read from the store unless
        `base` has the rollouts of that segment. Raises IntegrityError, StoreError for scores of
        spans.
        """
        first, cached = score_segments[0], None
        if first.layout in schema.SPAN_LAYOUTS:
            raise StoreError(
                f"teacher {first.name!r} has another tokenizer than the student: its scores are of "
                "spans, not of the student's tokens",
                hint="train on them with an objective over spans, such as span_advantage; in "
                "Python read them with read_span_scores",
            )
        student = self._lists_of(first, base)
        for each in score_segments:
            with self._consistent(each):
                if each.is_partial and each.layout != first.layout:
                    raise ValueError(f"layout {each.layout} after {first.layout}")
                cached = _joined(cached, each, self.read_arrays(each), student)
        assert cached is not None, "a first segment"
        if first.layout.startswith(schema.FULL) and student is not None:
            cached = layout.split_by_student(cached, student)
        return cached

    def read_span_scores(
        self, score_segments: ScoreSegments, *, base: Rollouts | None = None
    ) -> SpanScores:
        """Read the scores of a teacher with another tokenizer, of one rollout segment.

        base: the rollouts, if they are read. Raises IntegrityError, StoreError for other scores.
        """
        (first,) = score_segments
        if first.layout not in schema.SPAN_LAYOUTS:
            raise StoreError(
                f"teacher {first.name!r} has the student's tokenizer: its scores are of tokens",
                hint="read them with read_scores",
            )
        with self._consistent(first):
            return self._decode_spans(first, self.read_arrays(first), base)

    def _decode_spans(
        self, which: Segment, arrays: dict[str, Array], base: Rollouts | None
    ) -> SpanScores:
        """Decode scores of spans and check their structure. Raises ValueError."""
        if base is None:
            (seq_off,) = self.read_arrays(self._base_of(which), ("response_offsets",)).values()
        else:
            _check_is_base(self.storage.where(which.path), which, base)
            seq_off = base.seq_off
        scores = spans.decode(arrays, which.layout, codecs.profile(which.profile))
        check_structure(scores, seq_off)
        return scores

    def read_marks(self, score_segments: ScoreSegments) -> Array | None:
        """Read the marks [P] bool of the scored positions, and only these; None = all."""
        if not are_partial(score_segments):
            return None
        found = np.zeros(score_segments[0].counts["P"], bool)
        for each in score_segments:
            with self._consistent(each):
                (scored,) = self.read_arrays(each, ("scored",)).values()
                found |= marks_of(scored, each.rows)
        return found

    def _lists_of(self, which: Segment, base: Rollouts | None) -> IdLists | None:
        """Return the student's lists of the rollouts of a score segment."""
        if base is not None:
            _check_is_base(self.storage.where(which.path), which, base)
            student = base.student
            return None if student is None else IdLists(cnt=student.cnt, ids=student.ids)
        return self._student_lists(self._base_of(which))

    def _base_of(self, which: Segment) -> Segment:
        """Return the rollout segment of a score segment. Raises StoreError where there is none."""
        if self.log.rollouts(which.base) is None:
            self.log.refresh()
        found = self.log.rollouts(which.base)
        if found is None:
            raise StoreError(
                f"{self.url}: no rollout segment {which.base}",
                hint="read scores with the store of their snapshot",
            )
        return found

    def _student_lists(self, rollout: Segment) -> IdLists | None:
        if "student_topk_ids" not in schema.specs(rollout.layout):
            return None
        lists = self.read_arrays(rollout, ("student_topk_counts", "student_topk_ids"))
        cnt, ids = lists["student_topk_counts"], lists["student_topk_ids"]
        with self._consistent(rollout):
            ragged.check_counts(cnt, len(ids), schema.MAX_K)
        return IdLists(cnt=cnt, ids=ids)

    @contextmanager
    def _removed_or_damaged(self, which: Segment) -> Iterator[None]:
        """Raise StoreError in place of IntegrityError where gc has removed the segment."""
        try:
            yield
        except IntegrityError as error:
            self.log.refresh()
            if not self.is_removed(which):
                raise
            raise StoreError(
                f"{self.storage.where(which.path)} was deleted, and gc has removed it",
                hint="take a newer snapshot; a tag keeps the segments of an old one",
            ) from error

    @contextmanager
    def _consistent(self, which: Segment) -> Iterator[None]:
        """Raise IntegrityError in place of a decoder's errors."""
        try:
            yield
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error

    def _contradiction(self, which: Segment, error: object) -> IntegrityError:
        return IntegrityError(
            f"{self.storage.where(which.path)}: its arrays contradict each other ({error})",
            hint=segments.RESTORE,
        )


def _check_is_base(where: str, which: Segment, base: Rollouts) -> None:
    if base.segment != which.base:
        raise StoreError(
            f"{where}: scores of rollouts {which.base}, not of "
            f"{base.segment or 'rollouts outside a store'}",
            hint="give the scored rollouts as read from their segment",
        )


def _joined(
    before: CachedScores | None, which: Segment, arrays: dict[str, Array], student: IdLists | None
) -> CachedScores:
    """Return the scores before a segment, and those of its arrays. Raises ValueError."""
    profile = codecs.profile(which.profile)
    if before is None:
        return layout.decode(arrays, profile, student)
    if which.is_partial:
        return merged(before, layout.decode(arrays, profile, student))
    if before.scored is not None:
        raise ValueError("more ids of positions of which some have no score")
    return extend.decode(before, arrays, profile)
