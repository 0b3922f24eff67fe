"""Storage in a dataset repository of the Hugging Face Hub, for reading.

The revision of the URL is resolved to one commit when the storage is opened, so that a reader sees
one state of the store whatever is pushed meanwhile. The token is that of HF_TOKEN or of
`hf auth login`, the server that of HF_ENDPOINT; neither is part of a URL.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store.storage.base import Found, map_concurrently

SCHEME = "hf://"
DATASET = "dataset"
_TIMEOUT_S = 30.0
"""Without a byte from the server; requests are tried again after it."""
_PARTIAL, _BEYOND_END = 206, 416
"""HTTP statuses: the part of the request, and a request that starts at the end or after it."""
_MAX_MESSAGE = 200
"""Characters of the Hub's message in an error."""
_URL = re.compile(
    r"hf://datasets/(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w%.-]+))?(?P<path>(/[\w.-]+)*)/?",
    re.ASCII,
)
_FORM = "hf://datasets/ORG/NAME[@REVISION][/PATH]"


@dataclass(frozen=True, kw_only=True, slots=True)
class HubAddress:
    """The place of a store on the Hub."""

    repo: str
    """ORG/NAME of the dataset."""
    revision: str
    """Branch, tag or commit; '' = the main branch."""
    path: str
    """Folder of the store in the repository; '' = its root."""

    def url(self, commit: str = "") -> str:
        """Return the URL, of a commit in place of the revision if given."""
        revision = quote(commit or self.revision, safe="")
        at, path = f"@{revision}" if revision else "", f"/{self.path}" if self.path else ""
        return f"{SCHEME}datasets/{self.repo}{at}{path}"

    def file(self, name: str) -> str:
        """Return the path in the repository of a name of the store."""
        return "/".join(filter(None, (self.path, name)))


def is_hub(url: str) -> bool:
    """Return whether a URL is one of hf://."""
    return url.lower().startswith(SCHEME)


def parse_address(url: str) -> HubAddress:
    """Parse a URL of hf://. Raises StoreError for another form."""
    found = _URL.fullmatch(url)
    path = found["path"].strip("/") if found else ""
    if found is None or {".", ".."} & set(path.split("/")):
        # Not repeated, for it may hold a secret.
        raise StoreError(
            "a URL of hf:// that is not a dataset",
            hint=f"give {_FORM}; the token comes from HF_TOKEN or `hf auth login`",
        )
    return HubAddress(repo=found["repo"], revision=unquote(found["revision"] or ""), path=path)


class HubStorage:
    """The storage of an hf:// URL. Calls that write raise StoreError."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi()
        self._address = parse_address(url)
        with hub_request("open", url):
            info = self._api.dataset_info(
                self._address.repo, revision=self._address.revision or None, timeout=_TIMEOUT_S
            )
        self.commit = str(info.sha)
        """Of the repository, 40 hex digits."""
        self.url = self._address.url(self.commit)
        self._listed: dict[tuple[str, bool], list[Any]] = {}
        """(folder, whether with all below it) -> its entries, which a commit fixes."""

    def where(self, name: str) -> str:
        return f"{self.url}/{name}"

    def check(self, folders: Iterable[str]) -> None:
        """Do nothing: a repository has no empty folders."""

    def read(self, name: str, limit: int) -> bytes | None:
        # No more than the limit and one byte is requested.
        if (found := self._get(name, 0, limit + 1)) is None:
            return None
        data, total = found
        if total > limit:
            raise IntegrityError(
                f"{self.where(name)}: {total} bytes where at most {limit} are allowed",
                hint="restore it from a copy of the store",
            )
        return data

    def read_part(self, name: str, start: int, size: int) -> bytes | None:
        if not size:
            return b""
        found = self._get(name, start, size)
        return None if found is None else found[0]

    def read_all(self, limits: Mapping[str, int]) -> dict[str, bytes | None]:
        return dict(zip(limits, map_concurrently(self.read, limits.items()), strict=True))

    def names(self, folder: str, after: str = "") -> list[str]:
        found = (each.path.rpartition("/")[2] for each in self._list(folder, recursive=False))
        return sorted(name for name in found if name > after)

    def files(self, folder: str) -> list[Found]:
        root = f"{self._address.path}/" if self._address.path else ""
        listed = self._list(folder, recursive=True)
        found = [
            Found(name=each.path.removeprefix(root), size=each.size)
            for each in listed
            if hasattr(each, "size")  # a file
        ]
        return sorted(found, key=lambda each: each.name)

    def settle(self, folder: str) -> None:
        """Do nothing: a commit is durable."""

    def check_writable(self) -> NoReturn:
        raise self._read_only()

    def prepare(self, folders: Iterable[str], file: str) -> NoReturn:
        raise self._read_only()

    def create(self, name: str, data: bytes) -> NoReturn:
        raise self._read_only()

    def leave(self, name: str, data: bytes) -> NoReturn:
        raise self._read_only()

    def put(self, name: str, data: bytes) -> NoReturn:
        raise self._read_only()

    def touched_s(self, name: str) -> NoReturn:
        raise self._read_only()

    def remove(self, name: str) -> NoReturn:
        raise self._read_only()

    def _read_only(self) -> StoreError:
        return StoreError(
            f"{self.url}: a store on the Hub is only read",
            hint=f"copy it with `logitcask store pull {self._address.url()} FOLDER`, write there, "
            "and `logitcask store push` the copy",
        )

    def _get(self, name: str, start: int, size: int) -> tuple[bytes, int] | None:
        """Return (at most `size` bytes from `start` on, bytes of the file); None = no such file."""
        from huggingface_hub.errors import EntryNotFoundError

        utils: Any = import_module("huggingface_hub.utils")  # it loads its names lazily
        place = f"{self._address.repo}/resolve/{self.commit}/{quote(self._address.file(name))}"
        url = f"{self._api.endpoint}/datasets/{place}"
        headers = {
            **utils.build_hf_headers(),
            "Range": f"bytes={start}-{start + size - 1}",
            # A compressed answer has other ranges.
            "Accept-Encoding": "identity",
        }
        with hub_request("read", self.where(name)):
            response = utils.http_backoff("GET", url, headers=headers, timeout=_TIMEOUT_S)
            if response.status_code == _BEYOND_END:
                return b"", start
            try:
                utils.hf_raise_for_status(response)
            except EntryNotFoundError:
                return None
        data = bytes(response.content)
        if response.status_code != _PARTIAL:
            # A server may answer with the whole.
            return data[start : start + size], len(data)
        total = response.headers.get("content-range", "").rpartition("/")[2]
        return data, int(total) if total.isdecimal() else start + len(data)

    def _list(self, folder: str, *, recursive: bool) -> list[Any]:
        """List the entries of a folder, of all folders below it too if recursive; [] if absent."""
        from huggingface_hub.errors import EntryNotFoundError

        key = folder, recursive
        if key not in self._listed:
            with hub_request("list", self.where(folder)):
                try:
                    self._listed[key] = list(
                        self._api.list_repo_tree(
                            self._address.repo,
                            self._address.file(folder) or None,
                            recursive=recursive,
                            revision=self.commit,
                            repo_type=DATASET,
                        )
                    )
                except EntryNotFoundError:
                    self._listed[key] = []
        return self._listed[key]


@contextmanager
def hub_request(action: str, where: str) -> Iterator[None]:
    """Raise a StoreError that names the action and the place in place of the Hub's errors."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (StoreError, MemoryError):
        raise
    except GatedRepoError as error:
        raise StoreError(
            f"cannot {action} {where}: the access to this dataset has conditions",
            hint="accept them on its page, with the account of your token",
        ) from error
    except RepositoryNotFoundError as error:
        raise StoreError(
            f"cannot {action} {where}: there is no such dataset for this account",
            hint="check the name; for a private dataset set HF_TOKEN or run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise StoreError(
            f"cannot {action} {where}: there is no such revision",
            hint="give a branch, a tag or a commit of this dataset, or none for the main branch",
        ) from error
    # Its errors share no base class: HTTP, validation, token, network and offline errors.
    except Exception as error:
        # An upload wraps its cause.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        raise StoreError(
            f"cannot {action} {where}: {type(cause).__name__}: {_short(cause)}", hint=_hint(cause)
        ) from error


def _hint(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        return "set HF_TOKEN or run `hf auth login`, with a token that has the right to do this"
    if isinstance(error, ValueError):
        return "give values that the Hub accepts; its message names the one that it does not"
    return "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then run the same command again"


def _short(error: BaseException) -> str:
    """Return the beginning of a message, without the queries of signed addresses."""
    return re.sub(r"\?\S+", "", " ".join(str(error).split()))[:_MAX_MESSAGE]
