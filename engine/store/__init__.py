"""The store: immutable segments and an add-only numbered log; README.md is its specification.

A commit encodes a segment, decodes it again and compares, puts it durably as one object of its
content address, and creates the record with the next free number. A crash at any step leaves the
log as it was: at worst an object that no record names. Nothing is changed in place. A record can
also delete units, remove unreachable segments and tag a snapshot. Disks and object stores behave
alike.
"""

from logitcask.engine.store.format.entry import Segment
from logitcask.engine.store.log.snapshot import ScoreSegments, Snapshot
from logitcask.engine.store.store import Store, holds_store, open_store

__all__ = ["ScoreSegments", "Segment", "Snapshot", "Store", "holds_store", "open_store"]
