"""Opening, committing, pinning, reading: the store as the stages see it."""

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import logitcask.engine.store.codecs as codecs
import logitcask.engine.store.files as files
import logitcask.engine.store.layout as layout
import logitcask.engine.store.publish as publish
import logitcask.engine.store.rollouts as rollouts
import logitcask.engine.store.root as root
import logitcask.engine.store.schema as schema
import logitcask.engine.store.segment as segment
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.log import Log, Pin
from logitcask.engine.store.segment import Segment
from logitcask.engine.types import Array, Rollouts, Scores


class Store:
    """An open store. Cheap to ask again: the log is read once and then only its new records."""

    def __init__(self, path: Path, store_uuid: str, log: Log) -> None:
        self.path = path
        self.uuid = store_uuid
        self._log = log

    def head(self) -> Pin:
        """The store as of its last record. Raises IntegrityError for a damaged log."""
        self._log.refresh()
        return self._log.pin(len(self._log) - 1)

    def pin(self, number: int, sha256: str | None = None) -> Pin:
        """The store as of record `number`.

        Raises StoreError where there is no such record, IntegrityError where its sha256 is another.
        """
        self._log.refresh()
        pin = self._log.pin(number)
        if sha256 is not None and pin.sha256 != sha256:
            raise IntegrityError(
                f"{self.path}: log record {number} is {pin.sha256}, the pin says {sha256}",
                remedy="open the store that the pin was taken from, or take a new pin",
            )
        return pin

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
        winner = self._before(schema.ROLLOUT, name, unit_key, lineage)
        if winner is not None:
            return winner
        if not all(type(unit.get(key)) is int and unit[key] >= 0 for key in ("version", "first")):
            raise StoreError(
                f"unit {dict(unit)} lacks version or first", remedy="give both as integers from 0"
            )
        rollouts.check(unit_rollouts)
        arrays = rollouts.encode(unit_rollouts, codecs.profile(profile))
        which = schema.PLAIN if unit_rollouts.student is None else schema.STUDENT
        return self._commit(
            arrays,
            kind=schema.ROLLOUT,
            layout=which,
            profile=profile,
            counts=_counts(which, arrays),
            base="",
            token_digest=segment.token_digest(arrays["tokens"], arrays["seq_off"]),
            name=name,
            unit_key=unit_key,
            unit=dict(unit),
            lineage=dict(lineage),
        )

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
    ) -> Segment:
        """Publishes one teacher's scores of one rollout segment; returns what holds them.

        Raises IdentityError where `name` stands for another teacher or request, StoreError where
        the scores do not fit the rollouts or nothing could be written.
        """
        winner = self._before(schema.SCORE, name, unit_key, lineage)
        if winner is not None:
            return winner
        found = self._log.base(base.seg_id)
        if found is None or found.token_digest != base.token_digest:
            raise StoreError(
                f"{self.path}: no rollout segment {base.seg_id} with these tokens",
                remedy="score the rollouts of this store",
            )
        listed = found.layout == schema.STUDENT
        layout.check(scores, found.counts["P"], found.counts["E"] if listed else None)
        lists = segment.read(self.path, found, ("s_cnt", "s_ids")) if listed else {}
        arrays = layout.encode(
            scores, codecs.profile(profile), lists.get("s_cnt"), lists.get("s_ids")
        )
        which = schema.ONCE if "t_at_s" in arrays else schema.WHOLE
        extra = {
            "N": found.counts["N"],
            "K": int(arrays["kept"].sum(dtype="int64")),
        }
        return self._commit(
            arrays,
            kind=schema.SCORE,
            layout=which,
            profile=profile,
            counts=_counts(which, arrays) | extra,
            base=found.seg_id,
            token_digest=found.token_digest,
            name=name,
            unit_key=unit_key,
            unit=dict(unit),
            lineage=dict(lineage),
        )

    def read_rollouts(self, which: Segment) -> Rollouts:
        """A whole rollout segment. Raises IntegrityError naming what is not as committed."""
        arrays = segment.read(self.path, which)
        try:
            found = rollouts.decode(arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error
        if segment.token_digest(found.tokens, found.seq_off) != which.token_digest:
            raise self._contradiction(which, ValueError("tokens are not those of the record"))
        return found

    def read_extent(self, which: Segment) -> rollouts.Extent:
        """The lengths of a rollout segment, of whose files only those few are read and checked."""
        arrays = segment.read(self.path, which, rollouts.EXTENT)
        try:
            return rollouts.extent(arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise self._contradiction(which, error) from error

    def read_scores(self, which: Segment, *, base: Rollouts | None = None) -> Scores:
        """A whole score segment: full kept lists in the teacher's exact order.

        Layout `once` needs the student's lists of its base: they are read from the store, or taken
        from `base`, the rollouts of that segment, where the caller has them. Raises IntegrityError.
        """
        arrays = segment.read(self.path, which)
        s_cnt = s_ids = None
        if which.layout == schema.ONCE:
            s_cnt, s_ids = self._student_lists(which, base)
        try:
            return layout.decode(arrays, s_cnt, s_ids)
        except ValueError as error:
            raise self._contradiction(which, error) from error

    def _student_lists(self, which: Segment, base: Rollouts | None) -> tuple[Array, Array]:
        if base is None:
            if self._log.base(which.base) is None:
                self._log.refresh()
            found = self._log.base(which.base)
            if found is None:
                raise StoreError(
                    f"{self.path}: no rollout segment {which.base}",
                    remedy="read scores with the store that they were pinned from",
                )
            lists = segment.read(self.path, found, ("s_cnt", "s_ids", "tokens", "seq_off"))
            tokens, seq_off = lists["tokens"], lists["seq_off"]
            s_cnt, s_ids = lists["s_cnt"], lists["s_ids"]
        else:
            if base.student is None:
                raise StoreError(
                    "the rollouts given as base hold no student's list",
                    remedy=f"give the rollouts of segment {which.base}",
                )
            tokens, seq_off = base.tokens, base.seq_off
            s_cnt, s_ids = base.student.cnt, base.student.ids
        if segment.token_digest(tokens, seq_off) != which.token_digest:
            raise IntegrityError(
                f"{self.path / which.folder}: scores of other tokens than those of {which.base}",
                remedy=segment.RESTORE,
            )
        return s_cnt, s_ids

    def _contradiction(self, which: Segment, error: Exception) -> IntegrityError:
        return IntegrityError(
            f"{self.path / which.folder}: its arrays contradict each other ({error})",
            remedy=segment.RESTORE,
        )

    def _before(
        self, kind: str, name: str, unit_key: str, lineage: Mapping[str, Any]
    ) -> Segment | None:
        """Refuses a name or its binding, and answers for a unit that is there, before any work."""
        if not schema.NAME.fullmatch(name):
            raise StoreError(
                f"name {name!r} is not allowed",
                remedy="use 1 to 128 of a-z 0-9 . _ -, beginning with a letter or digit",
            )
        if not schema.DIGEST.fullmatch(unit_key):
            raise StoreError(f"unit_key {unit_key!r} is not a digest", remedy="use identity.digest")
        self._log.refresh()
        publish.check_binding(self._log, kind, name, lineage)
        winner = self._log.winner(unit_key)
        if winner is not None:
            # Its writer may not have come so far; what is acknowledged here is durable.
            files.fsync_dir(self.path / "log")
        return winner

    def _commit(
        self,
        arrays: Mapping[str, Array],
        *,
        kind: str,
        layout: str,
        profile: str,
        counts: Mapping[str, int],
        base: str,
        token_digest: str,
        name: str,
        unit_key: str,
        unit: Mapping[str, Any],
        lineage: Mapping[str, Any],
    ) -> Segment:
        for key, most in schema.MAX_COUNT.items():
            if counts.get(key, 0) > most:
                raise StoreError(
                    f"{counts[key]} {key} in one unit, at most {most}",
                    remedy="lower --unit-prompts",
                )
        attributes = {
            "format": schema.FORMAT,
            "version": schema.FORMAT_VERSION,
            "kind": kind,
            "layout": layout,
            "profile": profile,
            "counts": dict(counts),
            "base": base,
            "token_digest": token_digest,
        }
        contents = segment.encode(arrays, layout=layout, profile=profile, attributes=attributes)
        ticket = uuid.uuid4().hex
        stage = self.path / "staging" / ticket
        files.make_dir(stage)
        try:
            manifest = segment.stage(stage / "seg", contents)
            segment.check_decodes(
                self.path,
                f"staging/{ticket}/seg",
                manifest,
                arrays,
                layout=layout,
                profile=profile,
                counts=counts,
            )
            new = Segment(
                kind=kind,
                seg_id=segment.content_address(manifest),
                unit_key=unit_key,
                name=name,
                base=base,
                unit=unit,
                counts=counts,
                profile=profile,
                layout=layout,
                files=manifest,
                lineage=lineage,
                token_digest=token_digest,
                number=-1,
            )
            if not files.rename(stage / "seg", self.path / new.folder):
                # The same bytes are there, from a race or a crash; damaged ones are not adopted.
                segment.read_files(self.path, new.folder, manifest, manifest)
            files.fsync_dir((self.path / new.folder).parent)
            winner = publish.publish(self.path, self._log, stage, ticket, new)
        except BaseException:
            # What failed first is what the caller has to know; staging may stay behind.
            with suppress(StoreError):
                files.remove_tree(stage)
            raise
        files.remove_tree(stage)
        return winner


def open_store(url: str | Path, *, create: bool = False) -> Store:
    """Opens a store by path or file:// URL; `create` makes it where there is none.

    Raises StoreError where there is no store, where other files are in the way, or where the format
    is newer than this program; IntegrityError where format.json is damaged.
    """
    text = str(url).removeprefix("file://")
    if "://" in text:
        raise StoreError(
            f"{text}: only local stores are supported", remedy="give a folder, or a file:// URL"
        )
    path = Path(os.path.abspath(text))
    identity = root.read(path)
    if identity is None:
        if not create:
            raise StoreError(
                f"{path} is not a logitcask store: it has no format.json",
                remedy="check the path; `logitcask rollout` makes a store at a path that is free",
            )
        identity = root.create(path)
    root.check_folders(path)
    return Store(path, identity.store_uuid, Log(path, identity.sha256))


def _counts(which: str, arrays: Mapping[str, Array]) -> dict[str, int]:
    """The counts that follow from the lengths of the arrays."""
    return {spec.count: len(arrays[name]) - spec.plus for name, spec in schema.specs(which).items()}
