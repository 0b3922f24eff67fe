"""The file format.json, which identifies a store, and the folders of a store."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

import logitcask.engine.store.format.schema as schema
import logitcask.engine.store.log.record as record
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.log.lines import decode_sealed, encode_sealed
from logitcask.engine.store.storage.base import STAGING, Storage

NAME = "format.json"
_RESTORE = "restore it from a copy of the store"
FOLDERS = ("log", "bundles", "seg", "seg/rollout", "seg/score", STAGING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The identity of a store."""

    store_uuid: str
    sha256: str
    """Of format.json; `prev` of the first log record."""


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(storage: Storage) -> Identity | None:
    """Return the identity of the store in `storage`, None where there is none.

    Raises StoreError for another or a newer format, IntegrityError for a damaged format.json.
    """
    where = storage.where(NAME)
    data = storage.read(NAME, schema.MAX_FORMAT_BYTES)
    if data is None:
        if storage.read(f"log/{record.file_name(0)}", schema.MAX_RECORD_BYTES) is not None:
            raise IntegrityError(
                f"{where}: missing, though the store has a log",
                hint=f"{_RESTORE}; or end an interrupted `logitcask store upgrade OLD NEW`: run it "
                "again",
            )
        return None
    body, digest = decode_sealed(data, where)
    if not isinstance(body.get("format"), str):
        raise IntegrityError(f"{where}: names no format", hint=_RESTORE)
    if body["format"] != schema.FORMAT:
        raise StoreError(
            f"{where}: format {body['format']!r}, not {schema.FORMAT!r}", hint="check the path"
        )
    number = body.get("version")
    if type(number) is not int or number > schema.FORMAT_VERSION:
        raise StoreError(
            f"{where}: format version {number!r}, this program reads {schema.FORMAT_VERSION}",
            hint="upgrade logitcask: the store was made by a newer version",
        )
    if number < schema.FORMAT_VERSION:
        raise StoreError(
            f"{where}: format version {number}, this program reads {schema.FORMAT_VERSION}",
            hint="make a store of the new format from it: `logitcask store upgrade OLD NEW`",
        )
    if not isinstance(body.get("store_uuid"), str):
        raise IntegrityError(f"{where}: no store_uuid", hint=_RESTORE)
    return Identity(store_uuid=body["store_uuid"], sha256=digest)


def prepare(storage: Storage) -> None:
    """Create the folders of a new store.

    Raises StoreError where other files are in the way, or where two writers could both win.
    """
    storage.prepare(FOLDERS, NAME)
    _check_exclusive_create(storage)


def create(storage: Storage) -> Identity:
    """Create the folders, then format.json; two concurrent creators get one store.

    Raises as `prepare`, and StoreError where a copy of another store has begun.
    """
    prepare(storage)
    if storage.files("bundles") and not exists(storage):
        raise StoreError(
            f"{storage.url} holds an unfinished copy of a store",
            hint="continue it with the same `logitcask store pull`, or give another place",
        )
    return write(storage, encode(str(uuid.uuid4()), now()))


def encode(store_uuid: str, created: str) -> bytes:
    """Return the content of format.json."""
    body = {"format": schema.FORMAT, "version": schema.FORMAT_VERSION}
    return encode_sealed(body | {"store_uuid": store_uuid, "created": created})


def exists(storage: Storage) -> bool:
    """Return whether there is a format.json."""
    return storage.read(NAME, schema.MAX_FORMAT_BYTES) is not None


def read_begun(storage: Storage, data: bytes) -> Identity | None:
    """Return the identity that `data` gives a store, None where another one is in its place."""
    if storage.read(NAME, schema.MAX_FORMAT_BYTES) not in (None, data):
        return None
    body, digest = decode_sealed(data, storage.where(NAME))
    return Identity(store_uuid=body["store_uuid"], sha256=digest)


def write(storage: Storage, data: bytes) -> Identity:
    """Create format.json, by which a store begins to exist; return the one that is there."""
    storage.create(NAME, data)
    identity = read(storage)
    if identity is None:
        raise StoreError(
            f"{storage.where(NAME)} was removed after it was written",
            hint="check which process deletes files there",
        )
    return identity


def _check_exclusive_create(storage: Storage) -> None:
    """Raise StoreError where an existing name is overwritten: commits rely on its refusal."""
    name = f"{STAGING}/probe-{uuid.uuid4().hex}"
    storage.create(name, b"first")
    second = storage.create(name, b"second")
    kept = storage.read(name, 16)
    storage.remove(name)
    if second or kept != b"first":
        raise StoreError(
            f"{storage.url} lets a writer overwrite the files of another: commits would be lost",
            hint="use a disk with hard links, or an object store with conditional puts",
        )
