"""Damage of a store, accidental or forged: each is a typed error that names the file."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import logitcask.engine.store.storage.local as files
from logitcask.engine.errors import IntegrityError, StoreError
from logitcask.engine.store import open_store
from logitcask.engine.store.format import archive
from logitcask.engine.store.format import segment as segments
from logitcask.engine.store.format.entry import Segment, path_of
from logitcask.engine.store.log import record
from logitcask.engine.store.log.lines import decode_sealed, encode_sealed
from logitcask.engine.store.merge import merge
from logitcask.engine.store.verify import verify
from tests.engine.store.made import commit_rollouts, commit_scores, forged


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store of one rollout segment and one score segment."""
    store = open_store(tmp_path_factory.mktemp("sound") / "cask", create=True)
    commit_scores(store, commit_rollouts(store, 3, student=True), 3)
    return Path(store.url)


@pytest.fixture
def cask(sound: Path, tmp_path: Path) -> Path:
    """Copy `sound`, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "cask"))


def every_file(path: Path) -> list[str]:
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())


def refused(path: Path, damaged: str, *, deep: bool = False) -> None:
    """Check that reading all of it fails with the damaged file's name and a hint."""
    with pytest.raises(IntegrityError) as caught:
        verify(open_store(path), deep=deep)
    assert damaged in caught.value.cause, caught.value.cause
    assert caught.value.hint


def test_bit_flips_are_found_by_digest(cask: Path, counts: Any) -> None:
    rng = random.Random(0)
    names = every_file(cask)
    of_kind = [[n for n in names if n.startswith(kind)] for kind in ("format", "log/", "seg/")]
    for trial in range(counts(2000, 20_000)):
        name = rng.choice(of_kind[trial % 3])
        sound = (cask / name).read_bytes()
        bad = bytearray(sound)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (cask / name).write_bytes(bad)
        refused(cask, name)
        (cask / name).write_bytes(sound)
    verify(open_store(cask), deep=True)


def test_bit_flips_are_found_by_decoding(cask: Path, counts: Any) -> None:
    """Find damage of the data with matching digests by the checksum of a chunk."""
    rng = random.Random(1)
    for segment in open_store(cask).head().segments:
        files = files_of(cask, segment)
        data = [name for name in files if name.endswith("/c/0")]
        for _ in range(counts(100, 5000)):
            name = rng.choice(data)
            bad = bytearray(files[name])
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            with pytest.raises(IntegrityError, match="does not decode"):
                decode(segment, archive.write(files | {name: bytes(bad)}))
        decode(segment, archive.write(files))


def test_bit_flips_anywhere_change_no_value_silently(cask: Path, counts: Any) -> None:
    """Find damage of the whole object, its digest left out, or read the same values.

    What may differ in silence are the crc32 of the zip, which are not read, and metadata that the
    schema gives.
    """
    rng, silent, flips = random.Random(3), 0, counts(100, 5000)
    for segment in open_store(cask).head().segments:
        sound = (cask / segment.path).read_bytes()
        expected = decode(segment, sound)
        for _ in range(flips):
            bad = bytearray(sound)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            try:
                found = decode(segment, bytes(bad))
            except IntegrityError:
                continue
            silent += 1
            assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    assert 0 < silent < flips


def files_of(cask: Path, segment: Segment) -> dict[str, bytes]:
    found = segments.split("", (cask / segment.path).read_bytes(), segment)
    return {name: bytes(data) for name, data in found.items()}


def decode(segment: Segment, data: bytes, names: list[str] | None = None) -> dict[str, Any]:
    return segments.decode_object(segment.path, data, segment, names)


def test_every_file_emptied_deleted_grown_zeroed_or_swapped(cask: Path) -> None:
    names = every_file(cask)
    snapshot = open_store(cask).head()
    trials = 0
    for name, next_name in zip(names, names[1:] + names[:1], strict=True):
        file = cask / name
        sound, other = file.read_bytes(), (cask / next_name).read_bytes()
        for bad in (b"", sound + b"\n", bytes(len(sound)), other, None):
            if bad == sound:
                continue
            file.unlink()
            if bad is not None:
                file.write_bytes(bad)
            if bad is None and name == f"log/{record.file_name(snapshot.number)}":
                # The loss of the newest record is invisible, except to a reader with its snapshot.
                with pytest.raises(StoreError, match="no log record"):
                    open_store(cask).snapshot(snapshot.number, snapshot.sha256)
            else:
                refused(cask, name)
            file.write_bytes(sound)
            trials += 1
    assert trials > 4 * len(names)
    verify(open_store(cask), deep=True)


def test_log_truncated_at_every_byte(cask: Path, counts: Callable[[int, int], int]) -> None:
    """Cut each file at every third byte, and in `make soak` at every byte."""
    stride = counts(3, 1)
    for number, name in enumerate(every_file(cask)):
        if name.startswith("seg/"):
            continue
        file = cask / name
        sound = file.read_bytes()
        for cut in range(number % stride, len(sound), stride):
            os.truncate(file, cut)
            with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
                open_store(cask).head()
            file.write_bytes(sound)
    verify(open_store(cask), deep=True)


def test_segments_truncated_at_many_places(cask: Path, counts: Any) -> None:
    """Refuse an object that is cut, read whole or in part, also one with a matching digest."""
    rng = random.Random(2)
    store = open_store(cask)
    for segment in store.head().segments:
        file = cask / segment.path
        sound = file.read_bytes()
        alone = sorted(segment.entries)
        ends = [0, *(start + size for start, size, _ in segment.entries.values()), len(sound) - 22]
        cuts = [*ends, *(rng.randrange(len(sound)) for _ in range(counts(300, 5000)))]
        for cut in cuts:
            os.truncate(file, cut)
            with pytest.raises(IntegrityError, match=f"{cut} bytes where {len(sound)} were"):
                store.read_arrays(segment)
            with pytest.raises(IntegrityError, match="not the zip of a segment"):
                decode(segment, sound[:cut])
            for name in rng.sample(alone, min(2, len(alone))):
                start, size, _ = segment.entries[name]
                if cut < start + size:
                    there = max(cut - start, 0)
                    with pytest.raises(IntegrityError, match=f"{there} bytes where {size} were"):
                        store.read_arrays(segment, [name])
                else:
                    store.read_arrays(segment, [name])
            file.write_bytes(sound)


def test_a_part_is_compared_with_its_own_digest(cask: Path) -> None:
    store = open_store(cask)
    segment = store.head().segments[0]
    file, sound = cask / segment.path, (cask / segment.path).read_bytes()
    assert len(segment.entries) == 7
    for name, (start, size, _) in segment.entries.items():
        for at in (start, start + size // 2, start + size - 1):
            bad = bytearray(sound)
            bad[at] ^= 1
            file.write_bytes(bad)
            with pytest.raises(IntegrityError, match="other bytes than were committed"):
                store.read_arrays(segment, [name])
        others = [each for each in segment.entries if each != name]
        assert store.read_arrays(segment, others).keys() == set(others)
    file.unlink()
    with pytest.raises(IntegrityError, match="a committed file is missing"):
        store.read_extent(segment)


def test_an_open_store_finds_that_its_log_shrank(cask: Path) -> None:
    store = open_store(cask)
    store.head()
    (cask / "log/0000000001.json").unlink()
    with pytest.raises(IntegrityError, match=r"0000000001\.json: this published log record"):
        store.head()


def test_copies_that_lose_empty_folders_are_whole(cask: Path) -> None:
    """Create folders again that object stores and archives lose."""
    for name in ("staging", "bundles"):
        (cask / name).rmdir()
    store = open_store(cask)
    verify(store, deep=True)
    commit_rollouts(store, 9)
    assert verify(open_store(cask)).orphans == ()
    shutil.rmtree(cask / "log")
    with pytest.raises(IntegrityError, match="log: absent, expected a directory"):
        open_store(cask)


def test_a_record_of_another_store_breaks_the_chain(cask: Path, tmp_path: Path) -> None:
    other = open_store(tmp_path / "other", create=True)
    commit_rollouts(other, 3)
    shutil.copy(Path(other.url) / "log/0000000000.json", cask / "log/0000000000.json")
    refused(cask, "0000000000.json: follows")


def test_orphans_are_listed_and_harmless(cask: Path) -> None:
    segment = open_store(cask).head().segments[0]
    other = path_of("rollout", "0" * 32, 0)
    left = {"staging/left", "log/.tmp", other, "seg/notes", f"{segment.path}.old"}
    for name in left:
        (cask / name).parent.mkdir(exist_ok=True)
        (cask / name).touch()
    assert set(verify(open_store(cask)).orphans) == left


@pytest.mark.parametrize("what", ["object", "folder", "seg/rollout", "log", "record"])
def test_symbolic_links_are_refused(cask: Path, tmp_path: Path, what: str) -> None:
    segment = open_store(cask).head().segments[0]
    at = {
        "object": segment.path,
        "folder": str(Path(segment.path).parent),
        "record": "log/0000000000.json",
    }.get(what, what)
    shutil.move(cask / at, tmp_path / "aside")
    (cask / at).symlink_to(tmp_path / "aside")
    refused(cask, at)


def test_a_pipe_in_a_files_place_does_not_hang(cask: Path) -> None:
    (cask / "log/0000000000.json").unlink()
    os.mkfifo(cask / "log/0000000000.json")
    refused(cask, "0000000000.json: not a plain file")


def forge(cask: Path, number: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a record with its correct sha256: a forgery, not an accident."""
    path = cask / "log" / record.file_name(number)
    path.write_bytes(forged(path.read_bytes(), lambda head, body: change(head)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "../x"}, "sha256 '../x'"),
        ({"size": -1}, "-1 bytes of an object"),
        ({"size": True}, "True bytes of an object"),
        ({"size": 1 << 40}, "1099511627776 bytes of an object"),
        ({"provenance_sha256": "sha256:"}, "provenance_sha256 'sha256:'"),
        ({"kind": "../.."}, "kind"),
        ({"generation": -1}, "generation"),
        ({"generation": 1}, "has another generation"),
        ({"generation": "/../.."}, "generation"),
        ({"layout": "dedup"}, "layout"),
        ({"name": "../x"}, "name"),
        ({"base": "0" * 32}, "base"),
        ({"extends": "0" * 32}, "extends"),
        ({"profile": "zip"}, "profile"),
        ({"profile": ["raw32"]}, "unhashable"),
        ({"version": -1}, "version -1"),
        ({"first": True}, "first True"),
        ({"unit_key": 3}, "expected string"),
        ({"counts": {"M": 3, "N": 6, "P": 1 << 40, "T": 6, "J": 9, "E": 1}}, "P 1099511627776"),
        ({"counts": {"M": 3, "N": 6, "P": -1, "T": 6, "J": 9, "E": 1}}, "P -1"),
        ({"counts": {"M": 3, "N": True, "P": 1, "T": 6, "J": 9, "E": 1}}, "N True"),
        ({"counts": {"M": 3, "N": 6, "P": 1, "T": 6, "J": 9, "E": 1 << 20}}, "E 1048576, at most"),
        ({"counts": {}}, "counts"),
    ],
)
def test_a_forged_record_cannot_name_paths_or_sizes(
    cask: Path, change: dict[str, Any], words: str
) -> None:
    forge(cask, 0, lambda head: head["adds"][0].update(change))
    with pytest.raises(IntegrityError, match=words) as caught:
        open_store(cask).head()
    assert "0000000000.json: " in caught.value.cause


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entries": {"../../../etc/passwd": [0, 1, "sha256:" + "0" * 64]}}, "entries"),
        ({"entries": {}}, "entries"),
        ({"unit": {}}, "version"),
        ({"unit": []}, "not an object"),
        ({"unit": {"version": 1, "first": 3}}, "another version or first than in the head"),
        ({"provenance": 3}, "not an object"),
        ({"provenance": {}}, "another provenance than that of the head"),
        ({"seconds": -1}, "seconds -1"),
    ],
)
def test_a_forged_body_is_refused_when_it_is_used(
    cask: Path, change: dict[str, Any], words: str
) -> None:
    path = cask / "log/0000000000.json"
    path.write_bytes(forged(path.read_bytes(), lambda head, body: body["adds"][0].update(change)))
    cut = open_store(cask).storage
    cut.remove("log/0000000001.json")
    segment = open_store(cask).head().segments[0]
    for use in (lambda: segment.unit, lambda: verify(open_store(cask))):
        with pytest.raises(IntegrityError, match=words) as caught:
            use()
        assert segment.seg_id in caught.value.cause


def test_a_forged_body_of_other_adds_is_refused(cask: Path) -> None:
    path = cask / "log/0000000000.json"
    sound = path.read_bytes()
    open_store(cask).storage.remove("log/0000000001.json")
    for change, words in (
        ({"adds": []}, "another count of adds"),
        ({"adds": 3}, "another count of adds"),
        ({"commit_id": 3}, "commit_id is not text"),
    ):
        path.write_bytes(forged(sound, lambda head, body, change=change: body.update(change)))
        with pytest.raises(IntegrityError, match=words) as caught:
            _ = open_store(cask).head().segments[0].unit
        assert "0000000000.json: " in caught.value.cause


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adds": 3}, "not a valid record"),
        ({"adds": [[]]}, "not a valid record"),
        ({"time": 1}, "time is not text"),
        ({"deletes": ["sha256:" + "0" * 64]}, "contradicts the records before it"),
        ({"deletes": ["../x"]}, "not a valid record"),
        ({"removes": [["rollout", "../../x", 0]]}, "not a valid record"),
        ({"removes": [["rollout", "0" * 32, 1]]}, "removes 0+ of generation 1"),
        ({"removes": [["home", "0" * 32, 0]]}, "kind 'home'"),
        ({"tags": {"../x": 0}}, "not a valid record"),
        ({"tags": {"x": 1}}, "tag x of 1"),
        ({"tags": {"x": None}}, "contradicts the records before it"),
        ({"tags": 3}, "not a valid record"),
    ],
)
def test_a_forged_record_is_validated(cask: Path, change: dict[str, Any], words: str) -> None:
    forge(cask, 1, lambda head: head.update(change))
    with pytest.raises(IntegrityError, match=words) as caught:
        open_store(cask).head()
    assert "0000000001.json: " in caught.value.cause


def test_entries_that_name_another_part_are_found(cask: Path, tmp_path: Path) -> None:
    """Find it before it is read alone: in `verify`, and in a merge."""

    def change(_: Any, body: dict[str, Any]) -> None:
        entries = body["adds"][0]["entries"]
        entries["student_topk_counts"] = entries["prompt_offsets"]

    path = cask / "log" / record.file_name(0)
    path.write_bytes(forged(path.read_bytes(), change))
    (cask / "log" / record.file_name(1)).unlink()
    for deep in (False, True):
        refused(cask, "its record has other entries", deep=deep)
    other = open_store(tmp_path / "other", create=True)
    with pytest.raises(IntegrityError, match="its record has other entries"):
        merge(other, open_store(cask))
    assert other.head().segments == ()


@pytest.mark.parametrize(
    "data",
    [b"[1]", b'"x"', b"{", b"[" * 100_000, b"1" * 10_000, b"\xff\xfe", b'{"n": NaN}', b""],
)
def test_a_line_with_its_digest_that_is_no_record(cask: Path, data: bytes) -> None:
    (cask / "log/0000000000.json").write_bytes(record.join(data, b"{}"))
    refused(cask, "0000000000.json: ")


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
        ({"codecs": 3}, "not the metadata of a sharded array"),
        ({"node_type": "group"}, "node_type is"),
    ],
)
def test_metadata_is_checked_before_anything_is_decoded(
    cask: Path, change: dict[str, Any], words: str
) -> None:
    segment = open_store(cask).head().segments[0]
    found, name = files_of(cask, segment), "response_tokens"
    meta = json.loads(found[f"{name}/zarr.json"]) | change
    found[f"{name}/zarr.json"] = json.dumps(meta).encode()
    with pytest.raises(IntegrityError, match=words):
        decode(segment, archive.write(found), [name])


def test_other_folders_are_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a logitcask store: it has no") as caught:
        open_store(tmp_path / "absent")
    assert str(tmp_path / "absent") in caught.value.cause
    assert "logitcask rollout" in caught.value.hint
    (tmp_path / "notes.txt").touch()
    for create in (False, True):
        with pytest.raises(StoreError, match="is not a logitcask store"):
            open_store(tmp_path, create=create)
    with pytest.raises(StoreError, match="is not a logitcask store"):
        open_store(tmp_path / "notes.txt")
    with pytest.raises(StoreError, match=r"notes\.txt is a file, not a store's folder"):
        open_store(tmp_path / "notes.txt", create=True)
    for odd in (Path("s3://bucket/x"), "file://elsewhere/x"):
        with pytest.raises(StoreError, match="as a Path|on the host 'elsewhere'"):
            open_store(odd, create=True)
    with pytest.raises(StoreError, match="unknown scheme ftp:") as caught:
        open_store("ftp://bucket/cask", create=True)
    assert "s3" in caught.value.hint
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
    assert open_store(f"file://localhost{tmp_path}/a%20b", create=True).url == f"{tmp_path}/a b"


@pytest.mark.parametrize(
    ("change", "words", "error"),
    [
        ({"version": 3}, "format version 3, this program reads 2", StoreError),
        ({"version": 1}, "format version 1, this program reads 2", StoreError),
        ({"format": "other"}, "format 'other'", StoreError),
        ({"format": 3}, "names no format", IntegrityError),
        ({"store_uuid": 7}, "no store_uuid", IntegrityError),
    ],
)
def test_other_formats_are_refused(
    cask: Path, change: dict[str, Any], words: str, error: type[Exception]
) -> None:
    body, _ = decode_sealed((cask / "format.json").read_bytes(), "")
    (cask / "format.json").write_bytes(encode_sealed(body | change))
    with pytest.raises(error, match=words):
        open_store(cask)


def test_a_disk_that_refuses_to_read_is_an_error_with_its_words(
    cask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "open": refuse}))
    with pytest.raises(
        StoreError, match=r"cannot read .*format\.json: Permission denied"
    ) as caught:
        open_store(cask)
    assert not isinstance(caught.value, IntegrityError)
    assert "give this user the right" in caught.value.hint


def damage(path: Path, how: str, elsewhere: Path) -> None:
    if how == "changed":
        path.write_bytes(b"x" + path.read_bytes()[1:])
    elif how == "grown":
        path.write_bytes(path.read_bytes() + b"x")
    elif how == "linked":
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    elif how == "gone":
        shutil.rmtree(path.parent)
    elif how == "emptied":
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["changed", "grown", "linked", "gone", "emptied"])
def test_a_damaged_segment_of_the_same_name_is_repaired(tmp_path: Path, how: str) -> None:
    """Repair an object that a crash left behind and that was damaged before its commit."""
    donor = open_store(tmp_path / "donor", create=True)
    segment = commit_rollouts(donor, 1)
    store = open_store(tmp_path / "cask", create=True)
    path = Path(store.url) / segment.path
    path.parent.mkdir()
    shutil.copy(Path(donor.url) / segment.path, path)
    damage(path, how, tmp_path / "elsewhere")
    assert commit_rollouts(store, 1).seg_id == segment.seg_id
    assert verify(store, deep=True).orphans == ()


def test_every_damaged_segment_is_reported(cask: Path) -> None:
    names = [name for name in every_file(cask) if name.startswith("seg/")]
    assert len(names) == 2
    for name in names:
        damage(cask / name, "changed", cask)
    fields: list[str] = []
    with pytest.raises(IntegrityError):
        verify(open_store(cask), on_damage=lambda error: fields.append(error.cause))
    assert all(name in text for name, text in zip(sorted(names), sorted(fields), strict=True))


def test_a_codec_that_changes_values_is_caught_before_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, name = segments.encode, "response_tokens"

    def wrong(arrays: Any, **options: Any) -> dict[str, bytes]:
        return real({**arrays, name: arrays[name] + arrays[name].dtype.type(1)}, **options)

    monkeypatch.setattr(segments, "encode", wrong)
    store = open_store(tmp_path / "cask", create=True)
    with pytest.raises(StoreError, match="response_tokens: does not decode to what was encoded"):
        commit_rollouts(store, 1)
    assert store.head().segments == ()
    assert store.storage.names("seg/rollout") == []
