"""The store: immutable segments and an add-only numbered log.

  STORE/
    format.json               create-only: {format, version, store_uuid, created, sha256}
    log/0000000000.json ...   create-only records, each with the digest of the one before it;
                              the only source of truth: what no record names does not exist
    seg/rollout/<32 hex>/     a plain Zarr v3 group: prompts, tokens, the student's own scores
    seg/score/<32 hex>/       a plain Zarr v3 group: one teacher over one rollout segment
    staging/<32 hex>/         work in progress; never read, free to delete when nobody writes

A commit stages a group, decodes it again and compares, flushes every file and directory, renames
the group to its content address, and links a record to the next free number. A crash at any step
leaves the log as it was: at worst a folder that no record names. Nothing is changed in place.

files (every file effect), schema -> codecs -> layout, rollouts (data <-> arrays), segment (arrays
<-> Zarr group) -> record, log, root -> publish -> store -> verify.
"""

from logitcask.engine.store.log import Pin
from logitcask.engine.store.rollouts import Extent
from logitcask.engine.store.segment import Segment
from logitcask.engine.store.store import Store, open_store

__all__ = ["Extent", "Pin", "Segment", "Store", "open_store"]
