"""Pinning and reading: what a snapshot holds, as rollouts and as scores."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import logitcask.engine.store.extend as extend
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.layouts as layout
import logitcask.engine.store.format.ragged as ragged
import logitcask.engine.store.format.rollouts as rollouts
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
import logitcask.engine.store.log.root as root
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.format.checks import check_cached, check_rollouts, vocabulary
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.snapshot import ScoreSegments, Snapshot
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.types import Array, CachedScores, IdLists, Prompt, Rollouts


class Reader:
    """A store as those see it who only read. Cheap to ask again: the log is read once and then only
    its new records.
    """

    def __init__(self, storage: Storage, identity: root.Identity) -> None:
        self.storage = storage
        self.uuid = identity.store_uuid
        self.log = Log(storage, identity.sha256)

    @property
    def url(self) -> str:
        """What opens this store: a path, or a URL."""
        return self.storage.url

    def head(self) -> Snapshot:
        """The store as of its last record. Raises IntegrityError for a damaged log."""
        self.log.refresh()
        return self.log.snapshot(len(self.log) - 1)

    def snapshot(self, at: int | str, sha256: str | None = None) -> Snapshot:
        """The store as of a record: its number, or a tag.

        Raises StoreError where there is no such record, IntegrityError where its sha256 is another.
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
                f"{self.url}: log record {at} is {snapshot.sha256}, the snapshot says {sha256}",
                hint="open the store that the snapshot was taken from, or take a new one",
            )
        return snapshot

    def read_rollouts(self, which: Segment) -> Rollouts:
        """A whole rollout segment. Raises IntegrityError naming what is not as committed."""
        return self._rollouts_of(which, self.read_arrays(which))

    def check_arrays(self, which: Segment, arrays: dict[str, Array], before: ScoreSegments) -> None:
        """Looks at the decoded arrays of a segment as a commit does. Raises IntegrityError where
        they contradict each other, their tokens or what they add to, which is `before`, or say what
        no model can have said.
        """
        if which.kind == schema.ROLLOUT:
            try:
                found = self._rollouts_of(which, arrays)
                check_rollouts(found, n_vocab=vocabulary(which.lineage))
            except IntegrityError:
                raise
            except StoreError as error:
                raise self._contradiction(which, error.cause) from error
            return
        profile = codecs.profile(which.profile)
        try:
            if which.extends:
                cached = extend.decode(self.read_scores(before), arrays, profile)
            else:
                cached = layout.decode(arrays, profile, self._lists_of(which, None))
            check_cached(cached)
        except ValueError as error:
            raise self._contradiction(which, error) from error

    def read_files(self, which: Segment) -> dict[str, bytes]:
        """The files of a segment, relative name -> bytes, as committed. Raises IntegrityError,
        StoreError where gc has removed it.
        """
        with self._removed_or_damaged(which):
            return segments.read_files(self.storage, which.folder, which.files, which.files)

    def read_arrays(self, which: Segment, names: Collection[str] | None = None) -> dict[str, Array]:
        """All arrays of a segment, or those named; raises as `read_files` does."""
        with self._removed_or_damaged(which):
            return segments.read(self.storage, which, names)

    def is_removed(self, which: Segment) -> bool:
        """Whether gc has removed a segment, as far as the log has been read."""
        return which.generation < self.log.generation(which.kind, which.seg_id)

    def _rollouts_of(self, which: Segment, arrays: dict[str, Array]) -> Rollouts:
        try:
            found = rollouts.decode(arrays, codecs.profile(which.profile), which.seg_id)
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error
        if segments.tokens_sha256(found.tokens, found.seq_off) != which.tokens_sha256:
            raise self._contradiction(which, "tokens are not those of the record")
        return found

    def read_extent(self, which: Segment) -> rollouts.Extent:
        """The lengths of a rollout segment, of whose files only those few are read and checked."""
        arrays = self.read_arrays(which, rollouts.EXTENT)
        try:
            return rollouts.extent(arrays, which.counts)
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error

    def read_prompts(self, which: Segment) -> tuple[Prompt, ...]:
        """The prompts of a rollout segment, of whose files only those few are read and checked."""
        arrays = self.read_arrays(which, rollouts.PROMPTS)
        try:
            return rollouts.prompts_of(arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error

    def read_scores(
        self, score_segments: ScoreSegments, *, base: Rollouts | None = None
    ) -> CachedScores:
        """All that a teacher's score segments say of one rollout segment, merged.

        Most need the student's lists of their base: they are read from the store, or taken from
        `base`, the rollouts of that segment, where the caller has them. Raises IntegrityError.
        """
        first = score_segments[0]
        student = self._lists_of(first, base)
        which = first
        try:
            cached = layout.decode(self.read_arrays(first), codecs.profile(first.profile), student)
            for which in score_segments[1:]:
                cached = extend.decode(
                    cached, self.read_arrays(which), codecs.profile(which.profile)
                )
        except ValueError as error:
            raise self._contradiction(which, error) from error
        if first.layout in (schema.FULL, schema.FULL + schema.BOUNDS) and student is not None:
            cached = layout.by_student(cached, student)
        return cached

    def _lists_of(self, which: Segment, base: Rollouts | None) -> IdLists | None:
        """The student's lists that scores are of."""
        if base is not None:
            if base.segment != which.base:
                raise StoreError(
                    f"{self.storage.where(which.folder)}: scores of rollouts {which.base}, not of "
                    f"{base.segment or 'rollouts that are in no store'}",
                    hint="give the rollouts that were scored, as read from their segment",
                )
            student = base.student
            return None if student is None else IdLists(cnt=student.cnt, ids=student.ids)
        if self.log.rollouts(which.base) is None:
            self.log.refresh()
        found = self.log.rollouts(which.base)
        if found is None:
            raise StoreError(
                f"{self.url}: no rollout segment {which.base}",
                hint="read scores with the store that they were pinned from",
            )
        return self._student_lists(found)

    def _student_lists(self, base: Segment) -> IdLists | None:
        if "s_ids" not in schema.specs(base.layout):
            return None
        lists = self.read_arrays(base, ("s_cnt", "s_ids"))
        try:
            ragged.check_counts(lists["s_cnt"], len(lists["s_ids"]), schema.MAX_K)
        except ValueError as error:
            raise self._contradiction(base, error) from error
        return IdLists(cnt=lists["s_cnt"], ids=lists["s_ids"])

    @contextmanager
    def _removed_or_damaged(self, which: Segment) -> Iterator[None]:
        """Tells damage from what gc has removed meanwhile."""
        try:
            yield
        except IntegrityError as error:
            self.log.refresh()
            if not self.is_removed(which):
                raise
            raise StoreError(
                f"{self.storage.where(which.folder)} was deleted, and gc has removed it",
                hint="take a newer snapshot; a tag keeps what an old one reaches",
            ) from error

    def _contradiction(self, which: Segment, error: object) -> IntegrityError:
        return IntegrityError(
            f"{self.storage.where(which.folder)}: its arrays contradict each other ({error})",
            hint=segments.RESTORE,
        )
