"""Storage below a prefix of an object store (S3, Google Cloud Storage, Azure), through obstore.

An object appears with all of its bytes or not at all, and a conditional put lets exactly one writer
create a name, so nothing is staged. Credentials, endpoint and region come from the environment, as
for the provider's own tools; a URL that contains any is refused.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.storage.base import Found, check_empty, holds, map_concurrently

_MAX_MESSAGE = 300
"""Characters of a provider's message in an error."""


class ObjectStorage:
    """The storage of an s3://, gs:// or az:// URL."""

    def __init__(self, url: str, objects: Any = None) -> None:
        """Open the obstore store of the URL, or use `objects`, which is one."""
        self.url = url.rstrip("/")
        self._objects = open_objects(self.url) if objects is None else objects

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def check_writable(self) -> None:
        """Do nothing: an object store may be written to."""

    def prepare(self, folders: Iterable[str], file: str) -> None:
        check_empty(self, [*folders, file])

    def check(self, folders: Iterable[str]) -> None:
        """Do nothing: an object store has no folders."""

    def read(self, name: str, limit: int) -> bytes | None:
        import obstore

        with self._request("read", name):
            try:
                found = obstore.get(self._objects, name)
            except FileNotFoundError:
                return None
            if found.meta["size"] > limit:
                raise IntegrityError(
                    f"{self.where(name)}: {found.meta['size']} bytes where at most {limit} are "
                    "allowed",
                    hint="restore it from a copy of the store",
                )
            return bytes(found.bytes())

    def read_part(self, name: str, start: int, size: int) -> bytes | None:
        import obstore
        from obstore.exceptions import BaseError

        with self._request("read", name):
            try:
                options: Any = {"range": (start, start + size)}
                return bytes(obstore.get(self._objects, name, options=options).bytes())
            except FileNotFoundError:
                return None
            except BaseError:
                # Providers refuse a range that is empty or begins at the end.
                found = self._head(name)
                if found is not None and size and found["size"] > start:
                    raise
                return None if found is None else b""

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes | None]:
        return dict(zip(limits, map_concurrently(self.read, limits.items()), strict=True))

    def leave(self, name: str, data: bytes) -> bool:
        return self.create(name, data)

    def create(self, name: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._request("write", name):
            try:
                # A multipart upload is not conditional.
                obstore.put(self._objects, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def put(self, name: str, data: bytes) -> None:
        import obstore

        # Requests are signed over their bytes, so nothing is read back.
        if not self.create(name, data) and not holds(self, name, data):
            with self._request("repair", name):
                obstore.put(self._objects, name, data, mode="overwrite", use_multipart=False)

    def settle(self, folder: str) -> None:
        """Do nothing: a visible object is durable."""

    def names(self, folder: str, after: str = "") -> list[str]:
        inside = f"{folder}/" if folder else ""
        offset = f"{inside}{after}" if after else None
        listed = self._list(inside, offset)
        firsts = {each["path"][len(inside) :].split("/")[0] for each in listed}
        return sorted(name for name in firsts if name > after)

    def files(self, folder: str) -> list[Found]:
        listed = self._list(f"{folder}/" if folder else "", None)
        found = [Found(name=each["path"], size=each["size"]) for each in listed]
        return sorted(found, key=lambda each: each.name)

    def touched_s(self, name: str) -> float:
        with self._request("look at", name):
            found = self._head(name)
        return 0.0 if found is None else float(found["last_modified"].timestamp())

    def remove(self, name: str) -> None:
        import obstore

        with self._request("remove", name), suppress(FileNotFoundError):
            # Only some providers report an absent name.
            obstore.delete(self._objects, name)

    def _head(self, name: str) -> Any:
        """Return obstore's record of an object, None where it is absent."""
        import obstore

        try:
            return obstore.head(self._objects, name)
        except FileNotFoundError:
            return None

    def _list(self, prefix: str, offset: str | None) -> list[Any]:
        """List obstore's records of the objects below a prefix that sort after `offset`."""
        import obstore

        with self._request("list", prefix):
            listed = obstore.list(self._objects, prefix or None, offset=offset, chunk_size=1000)
            return [each for part in listed for each in part]

    @contextmanager
    def _request(self, action: str, name: str) -> Iterator[None]:
        """Raise a StoreError that names the action and the object in place of obstore's errors."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreError(
                f"cannot {action} {self.where(name)}: {_short(error)}",
                hint="check the credentials in the environment, and their permissions there",
            ) from error
        except (BaseError, OSError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"cannot {action} {self.where(name)}: {_short(error)}", hint=_hint(error)
            ) from error


def open_objects(url: str) -> Any:
    """Open the obstore store of a URL. Raises StoreError without obstore, or for a bad URL."""
    parts = urlsplit(url)
    plain = parts.netloc and not set(parts.netloc) & {"@", ":"}
    if not plain or parts.query or parts.fragment:
        # Not repeated, for it may hold a secret.
        raise StoreError(
            f"a URL of {parts.scheme}:// with other parts than a bucket and a prefix",
            hint=f"give {parts.scheme}://BUCKET/PREFIX; credentials come from the environment",
        )
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ModuleNotFoundError as error:
        raise StoreError(
            f"{url}: object stores need the package obstore",
            hint='pip install -e ".[s3]"',
        ) from error
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"cannot open {url}: {_short(error)}", hint="check the URL and the environment"
        ) from error


def _hint(error: Exception) -> str:
    text = str(error)
    if "169.254.169.254" in text:
        # The address at which a cloud machine requests its identity.
        return "set the credentials, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "builder error" in text:
        return "check the endpoint; one of http:// needs AWS_ALLOW_HTTP=true"
    return (
        "check credentials, endpoint, region and network, then run the same command again; "
        "committed data is safe"
    )


def _short(error: Exception) -> str:
    """Return one line of a provider's message, without its debug output."""
    return " ".join(str(error).partition("Debug source")[0].split())[:_MAX_MESSAGE]
