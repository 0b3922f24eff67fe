"""Opening, committing, pinning, reading: the store as the stages see it."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import logitcask.engine.store.codecs as codecs
import logitcask.engine.store.commit as commit
import logitcask.engine.store.layout as layout
import logitcask.engine.store.rollouts as rollouts
import logitcask.engine.store.root as root
import logitcask.engine.store.schema as schema
import logitcask.engine.store.segment as segments
import logitcask.engine.store.widen as widen
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.log import Log
from logitcask.engine.store.medium import Medium, open_medium
from logitcask.engine.store.pin import Chain, Pin
from logitcask.engine.store.publish import check_binding
from logitcask.engine.store.segment import Segment
from logitcask.engine.types import Array, CachedScores, IdLists, Rollouts, Scores


class Store:
    """An open store. Cheap to ask again: the log is read once and then only its new records.

    Another process opens its own by the URL; that is also what a copy sent there does.
    """

    def __init__(self, medium: Medium, identity: root.Identity) -> None:
        self.medium = medium
        self.uuid = identity.store_uuid
        self.log = Log(medium, identity.sha256)

    @property
    def url(self) -> str:
        """What opens this store: a path, or a URL."""
        return self.medium.url

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

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

    def check_name(self, kind: str, name: str, lineage: Mapping[str, Any], *, drawn: bool) -> None:
        """IdentityError where a name stands for something else than a segment of this lineage.

        drawn: of ids that were drawn. A commit asks the same, but what it commits is made by then.
        """
        which = {schema.ROLLOUT: schema.STUDENT, schema.SCORE: schema.WHOLE}[kind]
        self.log.refresh()
        told = {"name": name, "unit_key": "", "unit": {}, "lineage": lineage}
        new = commit.draft(kind, schema.SAMPLED if drawn else which, "default", **told)
        check_binding(self.log, new)

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
        new = commit.draft(
            schema.ROLLOUT,
            schema.PLAIN if unit_rollouts.student is None else schema.STUDENT,
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
                f"unit {dict(unit)} lacks version or first", remedy="give both as integers from 0"
            )
        rollouts.check(unit_rollouts)
        arrays = rollouts.encode(unit_rollouts, codecs.profile(profile))
        digest = segments.token_digest(arrays["tokens"], arrays["seq_off"])
        return self._commit(arrays, new, token_digest=digest)

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
    ) -> Segment:
        """Publishes one teacher's scores of one rollout segment; returns what holds them.

        Where the teacher has scores of these rollouts already, they are widened: `at` is then
        where it was asked, as `widen.ask_at` says. Raises IdentityError where `name` stands for
        another teacher or the numbers are another's, StoreError where the scores do not fit the
        rollouts or nothing could be written.
        """
        told: dict[str, Any] = {
            "name": name,
            "unit_key": unit_key,
            "unit": dict(unit),
            "lineage": dict(lineage),
        }
        which = schema.SAMPLED if scores.mult is not None else schema.WHOLE
        if (winner := self._there(commit.draft(schema.SCORE, which, profile, **told))) is not None:
            return winner
        found = self.log.base(base.seg_id)
        if found is None or found.token_digest != base.token_digest:
            raise StoreError(
                f"{self.url}: no rollout segment {base.seg_id} with these tokens",
                remedy="score the rollouts of this store",
            )
        chain, positions = self.log.chain(name, found.seg_id), found.counts["P"]
        if not chain:
            student = self._student_lists(found)
            layout.check(scores, positions, student)
            arrays = layout.encode(scores, codecs.profile(profile), student)
            which = schema.ONCE if "t_at_s" in arrays else which
        elif at is None or scores.at_lp is None:
            raise StoreError(
                f"teacher {name!r} has scores of rollouts {found.seg_id} already",
                remedy="ask it at what is known of them to widen these, or use another name",
            )
        else:
            layout.check(scores, positions, at)
            dtype = str(lineage.get("backend", {}).get("dtype", "float32"))
            arrays = widen.encode(
                self.read_scores(chain),
                scores,
                at,
                codecs.profile(profile),
                noise=widen.NOISE.get(dtype, widen.COARSE_NOISE),
                rounding=max(codecs.profile(each.profile).rounding for each in chain),
            )
            which = schema.WIDER
        new = commit.draft(schema.SCORE, which, profile, **told)
        return self._commit(
            arrays,
            new,
            base=found.seg_id,
            widens=chain[-1].seg_id if chain else "",
            token_digest=found.token_digest,
            counts={"N": found.counts["N"]},
        )

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

    def _there(self, new: Segment) -> Segment | None:
        winner = commit.check_asked(self.log, new)
        if winner is not None:
            # Its writer may not have come so far; what is acknowledged here is durable.
            self.medium.settle("log")
        return winner

    def _commit(self, arrays: Mapping[str, Array], new: Segment, **found: Any) -> Segment:
        return commit.commit_arrays(self.medium, self.log, arrays, replace(new, **found))


def open_store(url: str | Path, *, create: bool = False) -> Store:
    """Opens a store by path or URL; `create` makes it where there is none.

    Raises StoreError where there is no store, where other things are in the way, or where the
    format is newer than this program; IntegrityError where format.json is damaged.
    """
    return open_on(open_medium(url), create=create)


def open_on(medium: Medium, *, create: bool = False) -> Store:
    """`open_store` on a medium that is open already."""
    identity = root.read(medium)
    if identity is None:
        if not create:
            raise StoreError(
                f"{medium.url} is not a logitcask store: it has no format.json",
                remedy="check the path; `logitcask rollout` makes a store at a path that is free",
            )
        identity = root.create(medium)
    medium.check(root.FOLDERS)
    return Store(medium, identity)
