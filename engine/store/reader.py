"""Pinning and reading: what a pin holds, as rollouts and as scores."""

from collections.abc import Collection

import logitcask.engine.store.codecs as codecs
import logitcask.engine.store.layout as layout
import logitcask.engine.store.rollouts as rollouts
import logitcask.engine.store.root as root
import logitcask.engine.store.schema as schema
import logitcask.engine.store.segment as segments
import logitcask.engine.store.widen as widen
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.log import Log
from logitcask.engine.store.medium import Medium
from logitcask.engine.store.pin import Chain, Pin
from logitcask.engine.store.segment import Segment
from logitcask.engine.types import Array, CachedScores, IdLists, Rollouts


class Reader:
    """A store as those see it who only read. Cheap to ask again: the log is read once and then only
    its new records.
    """

    def __init__(self, medium: Medium, identity: root.Identity) -> None:
        self.medium = medium
        self.uuid = identity.store_uuid
        self.log = Log(medium, identity.sha256)

    @property
    def url(self) -> str:
        """What opens this store: a path, or a URL."""
        return self.medium.url

    def head(self) -> Pin:
        """The store as of its last record. Raises IntegrityError for a damaged log."""
        self.log.refresh()
        return self.log.pin(len(self.log) - 1)

    def pin(self, at: int | str, sha256: str | None = None) -> Pin:
        """The store as of a record: its number, or a tag.

        Raises StoreError where there is no such record, IntegrityError where its sha256 is another.
        """
        self.log.refresh()
        if isinstance(at, str):
            tags = self.log.tags()
            if at not in tags:
                raise StoreError(
                    f"{self.url} has no tag {at!r}; it has: {', '.join(sorted(tags)) or 'none'}",
                    remedy="give one of these or a log number, or make one with `logitcask store "
                    "tag`",
                )
            at = tags[at]
        pin = self.log.pin(at)
        if sha256 is not None and pin.sha256 != sha256:
            raise IntegrityError(
                f"{self.url}: log record {at} is {pin.sha256}, the pin says {sha256}",
                remedy="open the store that the pin was taken from, or take a new pin",
            )
        return pin

    def read_rollouts(self, which: Segment) -> Rollouts:
        """A whole rollout segment. Raises IntegrityError naming what is not as committed."""
        arrays = self._arrays(which)
        try:
            found = rollouts.decode(arrays, codecs.profile(which.profile))
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error
        if segments.token_digest(found.tokens, found.seq_off) != which.token_digest:
            raise self._contradiction(which, ValueError("tokens are not those of the record"))
        return found

    def check_arrays(self, which: Segment, arrays: dict[str, Array]) -> None:
        """IntegrityError where the decoded arrays of a segment that is not committed yet contradict
        each other, their tokens, or what they add to.
        """
        profile = codecs.profile(which.profile)
        try:
            if which.kind == schema.ROLLOUT:
                found = rollouts.decode(arrays, profile)
                if segments.token_digest(found.tokens, found.seq_off) != which.token_digest:
                    raise ValueError("tokens are not those of the record")
            elif which.widens:
                widen.decode(
                    self.read_scores(self.log.chain(which.name, which.base)), arrays, profile
                )
            else:
                layout.decode(arrays, profile, self._lists_of(which, None))
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error

    def read_extent(self, which: Segment) -> rollouts.Extent:
        """The lengths of a rollout segment, of whose files only those few are read and checked."""
        arrays = self._arrays(which, rollouts.EXTENT)
        try:
            return rollouts.extent(arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error

    def read_scores(self, chain: Chain, *, base: Rollouts | None = None) -> CachedScores:
        """All that a teacher's score segments say of one rollout segment, merged.

        Most need the student's lists of their base: they are read from the store, or taken from
        `base`, the rollouts of that segment, where the caller has them. Raises IntegrityError.
        """
        first = chain[0]
        student = self._lists_of(first, base)
        which = first
        try:
            known = layout.decode(self._arrays(first), codecs.profile(first.profile), student)
            for which in chain[1:]:
                known = widen.decode(known, self._arrays(which), codecs.profile(which.profile))
        except ValueError as error:
            raise self._contradiction(which, error) from error
        if first.layout == schema.WHOLE and student is not None:
            known = layout.by_student(known, student)
        return known

    def _lists_of(self, which: Segment, base: Rollouts | None) -> IdLists | None:
        """The student's lists that scores are of."""
        if base is not None:
            if segments.token_digest(base.tokens, base.seq_off) != which.token_digest:
                raise IntegrityError(
                    f"{self.medium.where(which.folder)}: scores of other tokens than those of "
                    f"{which.base}",
                    remedy=f"give the rollouts of segment {which.base}",
                )
            student = base.student
            return None if student is None else IdLists(cnt=student.cnt, ids=student.ids)
        if self.log.rollouts(which.base) is None:
            self.log.refresh()
        found = self.log.rollouts(which.base)
        if found is None:
            raise StoreError(
                f"{self.url}: no rollout segment {which.base}",
                remedy="read scores with the store that they were pinned from",
            )
        return self._student_lists(found)

    def _student_lists(self, base: Segment) -> IdLists | None:
        if base.layout != schema.STUDENT:
            return None
        lists = self._arrays(base, ("s_cnt", "s_ids"))
        return IdLists(cnt=lists["s_cnt"], ids=lists["s_ids"])

    def _arrays(self, which: Segment, names: Collection[str] | None = None) -> dict[str, Array]:
        try:
            return segments.read(self.medium, which, names)
        except IntegrityError as error:
            self.log.refresh()
            if self.log.generation(which.kind, which.seg_id) == which.generation:
                raise
            raise StoreError(
                f"{self.medium.where(which.folder)} was retired, and gc has removed it",
                remedy="take a newer pin; a tag keeps what an old one reaches",
            ) from error

    def _contradiction(self, which: Segment, error: Exception) -> IntegrityError:
        return IntegrityError(
            f"{self.medium.where(which.folder)}: its arrays contradict each other ({error})",
            remedy=segments.RESTORE,
        )
