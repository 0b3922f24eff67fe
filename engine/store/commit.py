"""Commits: from arrays to a published segment.

A segment is encoded, decoded again, put as one object under its content address and named by a
record. A crash at any step leaves the log as it was: at worst an object that no record names.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import logitcask.engine.store.format.archive as archive
import logitcask.engine.store.format.codecs as codecs
import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.format.segment as segments
from logitcask.engine.errors import StoreError
from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.log import Log
from logitcask.engine.store.log.pending import publish_add
from logitcask.engine.store.log.publish import check_base, check_name_identity
from logitcask.engine.store.storage.base import Storage
from logitcask.engine.types import Array

_TOO_LARGE = "lower --unit-prompts: a unit is a segment"


def find_committed(log: Log, new: Segment) -> Segment | None:
    """Return the committed segment of the same unit, if there is one.

    Raises StoreError or IdentityError where `new` cannot be committed, before any work on it.
    """
    if not schema.NAME.fullmatch(new.name):
        raise StoreError(
            f"name {new.name!r} is not allowed",
            hint="use 1 to 128 of a-z 0-9 . _ -, beginning with a letter or digit",
        )
    if not schema.DIGEST.fullmatch(new.unit_key):
        raise StoreError(f"unit_key {new.unit_key!r} is not a digest", hint="use identity.digest")
    log.refresh()
    check_name_identity(log, new)
    return log.winner(new.unit_key)


def commit_arrays(storage: Storage, log: Log, arrays: Mapping[str, Array], new: Segment) -> Segment:
    """Publish a new segment with these arrays; return the committed segment of its unit."""
    profile = codecs.profile(new.profile)
    counts = {**segments.counts_of(new.layout, arrays), **new.counts}
    for key, most in schema.MAX_COUNT.items():
        if counts.get(key, 0) > most:
            raise StoreError(f"{counts[key]} {key} in one unit, at most {most}", hint=_TOO_LARGE)
    size = segments.decoded_bytes(new.layout, profile, counts)
    if size > schema.MAX_SEGMENT_BYTES:
        raise StoreError(
            f"a unit of {size} bytes decoded, at most {schema.MAX_SEGMENT_BYTES}",
            hint=_TOO_LARGE,
        )
    shape: Any = {"layout": new.layout, "profile": profile}
    attributes = segments.attributes_of(replace(new, counts=counts))
    contents = segments.encode(arrays, attributes=attributes, **shape)
    try:
        data = archive.write(contents)
    except ValueError as error:
        raise StoreError(f"a unit of {error}", hint=_TOO_LARGE) from error
    segments.check_decodes(data, arrays, counts=counts, **shape)
    encoded = segments.with_object(replace(new, counts=counts), data, contents)
    return publish_segment(storage, log, data, encoded)


def publish_segment(storage: Storage, log: Log, data: bytes, new: Segment) -> Segment:
    """Put the object of a segment and publish it in the log; the first commit of a unit wins."""
    placed: set[str] = set()

    def decide() -> Segment | None:
        if log.winner(new.unit_key) is not None:
            return None
        check_name_identity(log, new)
        check_base(log, new)
        # Where gc has removed this content, it may still be removing the object of that generation.
        here = replace(
            new, generation=log.generation(new.kind, new.seg_id), number=-1, source=new.body
        )
        if here.path not in placed:
            storage.put(here.path, data)
            placed.add(here.path)
        return here

    return publish_add(storage, log, new.unit_key, decide)
