"""What a disk, a crash or a stranger does to a store: each is a typed error naming the file."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store import Segment, Store, codecs, files, open_store, record, schema
from logitcask.engine.store import segment as segments
from logitcask.engine.store.verify import verify
from tests.engine.store.made import commit_rollouts, commit_scores, key


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one rollout segment and one score segment."""
    store = open_store(tmp_path_factory.mktemp("sound") / "cask", create=True)
    commit_scores(store, commit_rollouts(store, 3), 3)
    return store.url


@pytest.fixture
def cask(sound: Path, tmp_path: Path) -> Path:
    """A copy of `sound`, free to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "cask"))


def refused(path: Path, damaged: str) -> None:
    """Opening and reading all of it fails with the damaged file's name and a way out."""
    with pytest.raises(IntegrityError) as caught:
        verify(open_store(path))
    assert damaged in caught.value.cause, caught.value.cause
    assert caught.value.remedy


def every_file(path: Path) -> list[str]:
    return files.walk(path)


def test_bit_flips(cask: Path) -> None:
    rng = random.Random(0)
    names = every_file(cask)
    kinds: list[Callable[[str], bool]] = [
        lambda name: name == "format.json",
        lambda name: name.startswith("log/"),
        lambda name: name.endswith("zarr.json"),
        lambda name: name.endswith("/c/0"),
    ]
    for trial in range(40):
        name = rng.choice([n for n in names if kinds[trial % 4](n)])
        sound = (cask / name).read_bytes()
        bad = bytearray(sound)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (cask / name).write_bytes(bad)
        refused(cask, name)
        (cask / name).write_bytes(sound)
    verify(open_store(cask))


def test_every_file_truncated_emptied_deleted_grown_or_swapped(cask: Path) -> None:
    names = every_file(cask)
    pin = open_store(cask).head()
    trials = 0
    for name, next_name in zip(names, names[1:] + names[:1], strict=True):
        file = cask / name
        sound, other = file.read_bytes(), (cask / next_name).read_bytes()
        for bad in (sound[:-1], b"", sound + b"\n", other, None):
            if bad == sound:
                continue
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            if bad is None and name == f"log/{record.file_name(pin.number)}":
                # Nobody can see that the newest record is gone, except who has pinned it.
                with pytest.raises(StoreError, match="no log record"):
                    open_store(cask).pin(pin.number, pin.sha256)
            else:
                refused(cask, name)
            file.write_bytes(sound)
            trials += 1
    assert trials > 4 * len(names)
    verify(open_store(cask))


def test_an_open_store_notices_that_its_log_shrank(cask: Path) -> None:
    store = open_store(cask)
    store.head()
    (cask / "log/0000000001.json").unlink()
    with pytest.raises(IntegrityError, match=r"0000000001\.json: this log record was published"):
        store.head()


def test_a_record_of_another_store_breaks_the_chain(cask: Path, tmp_path: Path) -> None:
    other = open_store(tmp_path / "other", create=True)
    commit_rollouts(other, 3)
    shutil.copy(Path(other.url) / "log/0000000000.json", cask / "log/0000000000.json")
    refused(cask, "0000000000.json: follows")


def test_strays_are_told_and_harmless(cask: Path) -> None:
    (cask / "staging" / "left").mkdir()
    (cask / "log" / ".tmp").touch()
    (cask / "seg/rollout" / ("0" * 32)).mkdir()
    held = open_store(cask).head().segments[0]
    (cask / held.folder / "notes").touch()
    assert set(verify(open_store(cask)).strays) == {
        "staging/left",
        "log/.tmp",
        f"seg/rollout/{'0' * 32}",
        f"{held.folder}/notes",
    }


@pytest.mark.parametrize("what", ["file", "array", "segment", "seg/rollout", "log", "record"])
def test_symbolic_links_are_refused(cask: Path, tmp_path: Path, what: str) -> None:
    held = open_store(cask).head().segments[0]
    at = {
        "file": f"{held.folder}/tokens/c/0",
        "array": f"{held.folder}/tokens",
        "segment": held.folder,
        "record": "log/0000000000.json",
    }.get(what, what)
    shutil.move(cask / at, tmp_path / "aside")
    (cask / at).symlink_to(tmp_path / "aside")
    refused(cask, at)


def test_a_pipe_in_a_files_place_does_not_hang(cask: Path) -> None:
    (cask / "log/0000000000.json").unlink()
    os.mkfifo(cask / "log/0000000000.json")
    refused(cask, "0000000000.json: not a plain file")


def forge(cask: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites record 0 with a right sha256 of its own: a stranger's store, not an accident."""
    path = cask / "log/0000000000.json"
    body = json.loads(path.read_bytes())
    del body["sha256"]
    change(body["adds"][0])
    path.write_bytes(record.seal(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {"../../../etc/passwd": [1, "sha256:" + "0" * 64]}}, "files"),
        ({"files": {}}, "files"),
        ({"seg_id": "../../../../tmp"}, "seg_id"),
        ({"seg_id": "0" * 32}, "seg_id is not the digest"),
        ({"kind": "../.."}, "kind"),
        ({"layout": "once"}, "layout"),
        ({"name": "../x"}, "name"),
        ({"base": "0" * 32}, "base"),
        ({"profile": "zip"}, "profile"),
        ({"unit": {}}, "version"),
        ({"unit_key": 3}, "expected string"),
        ({"counts": {"M": 3, "N": 6, "P": 1 << 40, "T": 6, "J": 9}}, "P 1099511627776"),
        ({"counts": {"M": 3, "N": 6, "P": -1, "T": 6, "J": 9}}, "P -1"),
        ({"counts": {"M": 3, "N": True, "P": 1, "T": 6, "J": 9}}, "N True"),
        ({"counts": {}}, "counts"),
    ],
)
def test_a_forged_record_cannot_name_paths_or_sizes(
    cask: Path, change: dict[str, Any], words: str
) -> None:
    forge(cask, lambda add: add.update(change))
    with pytest.raises(IntegrityError, match=words) as caught:
        open_store(cask).head()
    assert "0000000000.json: not a valid record" in caught.value.cause


def test_a_huge_record_is_not_read(cask: Path) -> None:
    with (cask / "log/0000000000.json").open("r+b") as file:
        file.truncate(1 << 40)
    refused(cask, "0000000000.json: 1099511627776 bytes where at most")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [1 << 40]}, "shape is"),
        ({"data_type": "uint8"}, "data_type is"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}}, "chunk_grid"),
        ({"codecs": [{"name": "bytes"}]}, "not the metadata of a sharded array"),
        ({"node_type": "group"}, "node_type is"),
    ],
)
def test_metadata_is_checked_before_anything_is_decoded(
    cask: Path, change: dict[str, Any], words: str
) -> None:
    held = open_store(cask).head().segments[0]
    contents = segments.read_files(cask, held.folder, held.files, held.files)
    meta = json.loads(contents["tokens/zarr.json"]) | change
    contents["tokens/zarr.json"] = json.dumps(meta).encode()
    with pytest.raises(IntegrityError, match=words):
        segments.decode(
            cask / held.folder,
            contents,
            layout=held.layout,
            profile=held.profile,
            counts=held.counts,
            names=["tokens"],
        )


def test_the_codec_has_a_checksum_of_its_own(cask: Path) -> None:
    held = open_store(cask).head().segments[0]
    contents = segments.read_files(cask, held.folder, held.files, held.files)
    for name in ("tokens", "prompt_json"):
        data = contents[f"{name}/c/0"]
        for at in range(len(data)):
            bad = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
            with pytest.raises(IntegrityError, match="does not decode"):
                segments.decode(
                    cask / held.folder,
                    contents | {f"{name}/c/0": bad},
                    layout=held.layout,
                    profile=held.profile,
                    counts=held.counts,
                    names=[name],
                )


class Crash(BaseException):
    """The process is gone: nothing catches it, and no clean-up runs after it."""


class Faulty:
    """Stands in for `os` inside files.py; effect number `at` fails and is not done."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.count, self.dead = at, error, 0, False

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("mkdir", "open", "write", "fsync", "link", "rename"):
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            if self.dead:
                raise self.error
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self.count += 1
            if self.count == self.at:
                self.dead = isinstance(self.error, Crash)
                raise self.error
            return real(*arguments, **options)

        return call


@pytest.fixture
def encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs are not under test here: a unit is encoded once and its read-back is taken as good."""
    real, memo = segments.encode, {}

    def encode(arrays: Any, *, layout: str, profile: str, attributes: Any) -> dict[str, bytes]:
        if layout not in memo:
            memo[layout] = real(arrays, layout=layout, profile=profile, attributes=attributes)
        return memo[layout]

    monkeypatch.setattr(segments, "encode", encode)
    monkeypatch.setattr(segments, "decode", lambda *_, **__: pytest.fail("decoded without a need"))
    monkeypatch.setattr(
        segments,
        "check_decodes",
        lambda root, folder, manifest, *_, **__: segments.read_files(
            root, folder, manifest, manifest
        ),
    )


def effects(store: Store, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many effects the commit of a unit has."""
    counter = Faulty(0, Crash())
    monkeypatch.setattr(files, "os", counter)
    commit_rollouts(store, 1, key("counted"))
    monkeypatch.setattr(files, "os", os)
    return counter.count


def commit_with_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> Iterator[tuple[Store, BaseException]]:
    """For every effect of a commit: the store after that effect failed, and what the caller saw."""
    total = effects(open_store(tmp_path / "count", create=True), monkeypatch)
    assert total > 80
    for at in range(1, total + 1):
        path = tmp_path / str(at)
        store = open_store(path, create=True)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Faulty(at, error()))
            with pytest.raises((Crash, StoreError)) as caught:
                commit_rollouts(store, 1)
        yield open_store(path), caught.value
        shutil.rmtree(path)


def retried(store: Store, monkeypatch: pytest.MonkeyPatch) -> Segment:
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", Faulty(0, Crash()))
        return commit_rollouts(store, 1)


@pytest.mark.usefixtures("encoded_once")
def test_a_crash_at_any_effect_leaves_the_store_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = 0
    for store, error in commit_with_faults(tmp_path, monkeypatch, Crash):
        assert isinstance(error, Crash)
        before = store.head().segments
        published += len(before)
        for each in before:
            segments.read_files(store.url, each.folder, each.files, each.files)
        held = retried(store, monkeypatch)
        assert open_store(store.url).head().segments == (held,)
        segments.read_files(store.url, held.folder, held.files, held.files)
    # Only the flush after the link stands between a published record and its acknowledgement.
    assert published == 1


@pytest.mark.usefixtures("encoded_once")
def test_a_full_disk_at_any_effect_is_told_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.strerror(errno.ENOSPC)
    for store, error in commit_with_faults(
        tmp_path, monkeypatch, lambda: OSError(errno.ENOSPC, full)
    ):
        assert isinstance(error, StoreError)
        assert full in error.cause
        assert str(store.url) in error.cause
        assert "make room" in error.remedy
        assert files.list_dir(Path(store.url) / "staging") == []
        held = retried(store, monkeypatch)
        assert open_store(store.url).head().segments == (held,)


def test_creation_can_fail_anywhere_and_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 40):
        path = tmp_path / str(at)
        fault = Faulty(at, Crash())
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", fault)
            try:
                open_store(path, create=True)
                break
            except Crash:
                pass
        store = open_store(path, create=True)
        assert open_store(path).uuid == store.uuid
    assert fault.count >= 12


def test_a_damaged_segment_of_the_same_name_is_not_adopted(tmp_path: Path) -> None:
    """A group that a crash left behind, and that rotted since, must not become a commit."""
    donor = open_store(tmp_path / "donor", create=True)
    held = commit_rollouts(donor, 1)
    store = open_store(tmp_path / "cask", create=True)
    shutil.copytree(Path(donor.url) / held.folder, Path(store.url) / held.folder)
    file = Path(store.url) / held.folder / "tokens/c/0"
    sound = file.read_bytes()
    file.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    with pytest.raises(IntegrityError, match="tokens/c/0"):
        commit_rollouts(store, 1)
    assert store.head().segments == ()
    file.write_bytes(sound)
    assert commit_rollouts(store, 1).seg_id == held.seg_id


def test_a_codec_that_changes_values_is_caught_before_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = segments.encode

    def wrong(arrays: Any, **options: Any) -> dict[str, bytes]:
        return real(
            {**arrays, "tokens": arrays["tokens"] + arrays["tokens"].dtype.type(1)}, **options
        )

    monkeypatch.setattr(segments, "encode", wrong)
    store = open_store(tmp_path / "cask", create=True)
    with pytest.raises(StoreError, match="tokens: does not decode to what was encoded"):
        commit_rollouts(store, 1)
    assert store.head().segments == ()
    assert files.list_dir(Path(store.url) / "seg/rollout") == []


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a logitcask store: it has no") as caught:
        open_store(tmp_path / "absent")
    assert str(tmp_path / "absent") in caught.value.cause
    assert "logitcask rollout" in caught.value.remedy
    (tmp_path / "notes.txt").touch()
    for create in (False, True):
        with pytest.raises(StoreError, match="is not a logitcask store"):
            open_store(tmp_path, create=create)
    with pytest.raises(StoreError, match="is not a logitcask store"):
        open_store(tmp_path / "notes.txt")
    with pytest.raises(StoreError, match=r"notes\.txt is a file, not a store's folder"):
        open_store(tmp_path / "notes.txt", create=True)
    with pytest.raises(StoreError, match="only local stores"):
        open_store("s3://bucket/cask", create=True)
    assert files.list_dir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "words", "error"),
    [
        ({"version": 2}, "format version 2, newest known here: 1", StoreError),
        ({"format": "other"}, "format 'other'", StoreError),
        ({"store_uuid": 7}, "no store_uuid", IntegrityError),
    ],
)
def test_other_formats_are_refused(
    cask: Path, change: dict[str, Any], words: str, error: type[Exception]
) -> None:
    body = json.loads((cask / "format.json").read_bytes())
    del body["sha256"]
    (cask / "format.json").write_bytes(record.seal(body | change))
    with pytest.raises(error, match=words):
        open_store(cask)


def test_a_disk_that_refuses_to_read_is_an_error_with_its_words(
    cask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "open": refuse}))
    with pytest.raises(
        StoreError, match=r"cannot read .*format\.json: Permission denied"
    ) as caught:
        open_store(cask)
    assert not isinstance(caught.value, IntegrityError)
    assert "give this user the right" in caught.value.remedy


def test_every_profile_has_entry_arrays_of_its_dtype() -> None:
    for layout in ("student", "once", "whole"):
        kinds = {
            name: {segments.dtype_of(spec, profile) for profile in codecs.PROFILES}
            for name, spec in schema.specs(layout).items()
        }
        varies = {name for name, found in kinds.items() if len(found) > 1}
        assert varies == {"s_topk_lp", "lp", "t_at_s"} & set(kinds)
