"""A store's own directory: format.json, which says what it is, and the folders beside it."""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import logitcask.engine.store.files as files
import logitcask.engine.store.record as record
import logitcask.engine.store.schema as schema
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.segment import RESTORE

_NAME = "format.json"
_FOLDERS = ("log", "seg", "seg/rollout", "seg/score", "staging")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Which store this is."""

    store_uuid: str
    sha256: str
    """Of format.json; what the first log record follows."""


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(path: Path) -> Identity | None:
    """The store at a path, None where there is none.

    Raises StoreError for another or a newer format, IntegrityError for a damaged format.json.
    """
    where = path / _NAME
    data = files.read(path, _NAME, schema.MAX_FORMAT_BYTES)
    if data is None:
        if files.kind(path / "log") == "dir" and files.list_dir(path / "log"):
            raise IntegrityError(f"{where}: missing, though the store has a log", remedy=RESTORE)
        return None
    body = record.unseal(data, where)
    if not isinstance(body.get("format"), str):
        raise IntegrityError(f"{where}: names no format", remedy=RESTORE)
    if body["format"] != schema.FORMAT:
        raise StoreError(
            f"{where}: format {body['format']!r}, not {schema.FORMAT!r}",
            remedy="check the path",
        )
    number = body.get("version")
    if type(number) is not int or number > schema.FORMAT_VERSION:
        raise StoreError(
            f"{where}: format version {number!r}, newest known here: {schema.FORMAT_VERSION}",
            remedy="upgrade logitcask: the store was made by a newer one",
        )
    if not isinstance(body.get("store_uuid"), str):
        raise IntegrityError(f"{where}: no store_uuid", remedy=RESTORE)
    return Identity(store_uuid=body["store_uuid"], sha256=body["sha256"])


def create(path: Path) -> Identity:
    """Makes the folders, then publishes format.json; two creators at once get one store.

    Raises StoreError where a file or other files are in the way.
    """
    if files.kind(path) == "file":
        raise StoreError(f"{path} is a file, not a store's folder", remedy="give a new folder")
    strangers = [n for n in files.list_dir(path) if n not in _FOLDERS and not n.startswith(".")]
    if strangers:
        raise StoreError(
            f"{path} is not a logitcask store and not empty: it holds {strangers[0]!r}",
            remedy="give a new or an empty folder",
        )
    files.make_root(path)
    for folder in _FOLDERS:
        files.make_dir(path / folder)
    body = {
        "format": schema.FORMAT,
        "version": schema.FORMAT_VERSION,
        "store_uuid": str(uuid.uuid4()),
        "created": now(),
    }
    stage = path / "staging" / uuid.uuid4().hex
    files.make_dir(stage)
    files.write_new(stage / _NAME, record.seal(body))
    for made_in in (path / "seg", path, path.parent):
        files.fsync_dir(made_in)
    files.link(stage / _NAME, path / _NAME)
    files.fsync_dir(path)
    files.remove_tree(stage)
    identity = read(path)
    if identity is None:
        raise StoreError(
            f"{path / _NAME}: gone as soon as written", remedy="check who deletes there"
        )
    return identity


def check_folders(path: Path) -> None:
    """Raises IntegrityError where one of the store's folders is absent, a file or a link."""
    for folder in _FOLDERS:
        found = files.kind(path / folder)
        if found != "dir":
            raise IntegrityError(
                f"{path / folder}: {found}, where a store has a directory", remedy=RESTORE
            )
