"""A store below a prefix of an object store (S3, Google Cloud Storage, Azure), through obstore.

An object appears with all of its bytes or not at all, and a conditional put lets one writer of
several have a name, so nothing is staged. Credentials, endpoint and region come from the
environment, as the provider's own tools read them; a URL that holds any is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.storage.base import Found

AT_ONCE = 16
"""Requests under way of one call that concerns many objects."""
_WORDS = 300
"""Characters of a provider's message that are passed on."""


class ObjectStorage:
    """The medium of an s3://, gs:// or az:// URL."""

    def __init__(self, url: str, objects: Any = None) -> None:
        """`objects`: an obstore store to use as it is; left out, the one that the URL names."""
        self.url = url.rstrip("/")
        self._objects = open_objects(self.url) if objects is None else objects

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def prepare(self, folders: Iterable[str], file: str) -> None:
        wanted = {*folders, file}
        strangers = [name for name in self.names("") if name not in wanted]
        if strangers:
            raise StoreError(
                f"{self.url} is not a logitcask store and not empty: it holds {strangers[0]!r}",
                hint="give a new prefix",
            )

    def check(self, folders: Iterable[str]) -> None:
        """There are no folders here that could be wrong."""

    def read(self, name: str, limit: int) -> bytes | None:
        import obstore

        with self._asked("read", name):
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

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes | None]:
        return dict(zip(limits, _at_once(self.read, limits.items()), strict=True))

    def create(self, name: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._asked("write", name):
            try:
                # In parts it would not be conditional.
                obstore.put(self._objects, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def place(self, folder: str, contents: Mapping[str, bytes]) -> None:
        """Requests are signed over their bytes, so what was put is not read back."""
        named = {f"{folder}/{name}": data for name, data in contents.items()}
        _at_once(self._place_one, sorted(named.items()))

    def _place_one(self, name: str, data: bytes) -> None:
        import obstore

        if self.create(name, data):
            return
        try:
            there = self.read(name, len(data))
        except IntegrityError:
            there = None
        if there != data:
            with self._asked("repair", name):
                obstore.put(self._objects, name, data, mode="overwrite", use_multipart=False)

    def settle(self, folder: str) -> None:
        """What can be seen in an object store is durable."""

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
        import obstore

        listed = self._list(f"{name}/", None)
        with self._asked("look at", name), suppress(FileNotFoundError):
            listed.append(obstore.head(self._objects, name))
        return max((each["last_modified"].timestamp() for each in listed), default=0.0)

    def remove(self, name: str) -> None:
        import obstore

        below = [each["path"] for each in self._list(f"{name}/", None)]
        with self._asked("remove", name), suppress(FileNotFoundError):
            # Some providers say that a name was not there, and some do not.
            obstore.delete(self._objects, below or [name])

    def _list(self, prefix: str, offset: str | None) -> list[Any]:
        """What obstore says of every object below a prefix that sorts behind `offset`."""
        import obstore

        with self._asked("list", prefix):
            listed = obstore.list(self._objects, prefix or None, offset=offset, chunk_size=1000)
            return [each for part in listed for each in part]

    @contextmanager
    def _asked(self, action: str, name: str) -> Iterator[None]:
        """Turns what obstore raises into a StoreError that says what was being done."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreError(
                f"cannot {action} {self.where(name)}: {_short(error)}",
                hint="check the credentials in the environment, and what they may do there",
            ) from error
        except (BaseError, OSError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"cannot {action} {self.where(name)}: {_short(error)}", hint=_hint(error)
            ) from error


def open_objects(url: str) -> Any:
    """The obstore store of a URL. Raises StoreError: obstore is not installed, or a bad URL."""
    parts = urlsplit(url)
    plain = parts.netloc and not set(parts.netloc) & {"@", ":"}
    if not plain or parts.query or parts.fragment:
        # Not repeated, for it may hold a secret.
        raise StoreError(
            f"a URL of {parts.scheme}:// with more or less than a bucket and a prefix",
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


def _at_once(call: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
    """call(*each) of all, several at a time, in order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda each: call(*each), arguments))


def _hint(error: Exception) -> str:
    text = str(error)
    if "169.254.169.254" in text:
        # The address at which a cloud machine would ask who it is.
        return "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say"
    if "builder error" in text:
        return "check the endpoint; one of http:// needs AWS_ALLOW_HTTP=true"
    return (
        "check credentials, endpoint, region and network, then run the same command again; what "
        "was committed is safe"
    )


def _short(error: Exception) -> str:
    """One line of a provider's message, without the debugger's view of it."""
    return " ".join(str(error).partition("Debug source")[0].split())[:_WORDS]
