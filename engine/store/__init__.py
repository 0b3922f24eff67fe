"""The store: immutable segments and an add-only numbered log.

  STORE/
    format.json               made once: what this is, and which store
    log/0000000000.json ...   made once each, each with the digest of the one before it; the only
                              source of truth: what no record names does not exist
    bundles/0000000000.jsonl  256 records in one file, for a quick start; free to delete
    seg/rollout/<32 hex>/     a plain Zarr v3 group: prompts, tokens, the student's own scores
    seg/score/<32 hex>/       a plain Zarr v3 group: one teacher over one rollout segment
    staging/                  work in progress on a disk; never read
    claims/, failed/          what workers tell each other, where there were any; never data

A commit encodes a group, decodes it again and compares, puts it durably where its content says, and
makes the record with the next free number. A crash at any step leaves the log as it was: at worst a
folder that no record names. Nothing is changed in place. A record can also delete units, sweep what
nobody reaches (gc removes it then), and tag a number. The same on a disk and in an object store.

medium -> files, objects (every effect outside) -> schema -> claims, codecs -> shards, ragged (bytes
and rows) -> layout, widen, rollouts (data <-> arrays) -> segment (arrays <-> Zarr group) -> record,
snapshot -> log, root -> publish -> commit -> store -> verify, keep, transfer, view, cache.
"""

from logitcask.engine.store.format.rollouts import Extent
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log.snapshot import ScoreSegments, Snapshot
from logitcask.engine.store.store import Store, holds_store, open_store

__all__ = ["Extent", "ScoreSegments", "Segment", "Snapshot", "Store", "holds_store", "open_store"]
