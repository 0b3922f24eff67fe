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
from logitcask.engine.store.format import codecs, schema
from logitcask.engine.store.format import segment as segments
from logitcask.engine.store.format.segment import Segment
from logitcask.engine.store.log import record
from logitcask.engine.store.verify import verify
from tests.engine.store.made import commit_rollouts, commit_scores


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
    kinds: list[Callable[[str], bool]] = [
        lambda name: name == "format.json",
        lambda name: name.startswith("log/"),
        lambda name: name.endswith("zarr.json"),
        lambda name: name.endswith("/c/0"),
    ]
    of_kind = [[n for n in names if kind(n)] for kind in kinds]
    for trial in range(counts(2000, 20_000)):
        name = rng.choice(of_kind[trial % 4])
        sound = (cask / name).read_bytes()
        bad = bytearray(sound)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (cask / name).write_bytes(bad)
        refused(cask, name)
        (cask / name).write_bytes(sound)
    verify(open_store(cask), deep=True)


def test_bit_flips_are_found_by_decoding(cask: Path, counts: Any) -> None:
    """Find damage with matching digests by the checksum of a chunk."""
    rng = random.Random(1)
    for segment in open_store(cask).head().segments:
        contents = read_all(cask, segment)
        data = [name for name in contents if name.endswith("/c/0")]
        for _ in range(counts(100, 5000)):
            name = rng.choice(data)
            bad = bytearray(contents[name])
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            with pytest.raises(IntegrityError, match="does not decode"):
                decode(segment, contents | {name: bytes(bad)})
        decode(segment, contents)


def read_all(cask: Path, segment: Segment) -> dict[str, bytes]:
    return segments.read_files(
        files.LocalStorage(str(cask)), segment.folder, segment.files, segment.files
    )


def decode(segment: Segment, contents: dict[str, bytes], names: list[str] | None = None) -> None:
    segments.decode(
        segment.folder,
        contents,
        layout=segment.layout,
        profile=codecs.profile(segment.profile),
        counts=segment.counts,
        names=names or list(schema.specs(segment.layout)),
    )


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


def test_log_and_manifests_truncated_at_every_byte(
    cask: Path, counts: Callable[[int, int], int]
) -> None:
    """Cut each file at every third byte, and in `make soak` at every byte."""
    stride = counts(3, 1)
    store = open_store(cask)
    by_folder = {each.folder: each for each in store.head().segments}

    def read(name: str) -> None:
        if not name.startswith("seg/"):
            open_store(cask).head()
            return
        segment = next(each for folder, each in by_folder.items() if name.startswith(folder))
        segments.read_files(
            store.storage, segment.folder, segment.files, [name[len(segment.folder) + 1 :]]
        )

    for number, name in enumerate(every_file(cask)):
        if name.endswith("/c/0"):
            continue
        file = cask / name
        sound = file.read_bytes()
        for cut in range(number % stride, len(sound), stride):
            os.truncate(file, cut)
            with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
                read(name)
            file.write_bytes(sound)
    verify(open_store(cask), deep=True)


def test_data_truncated_at_many_places(cask: Path, counts: Any) -> None:
    rng = random.Random(2)
    store = open_store(cask)
    data = [
        (each, name)
        for each in store.head().segments
        for name in each.files
        if name.endswith("/c/0")
    ]
    for _ in range(counts(300, 5000)):
        each, name = rng.choice(data)
        file = cask / each.folder / name
        sound = file.read_bytes()
        os.truncate(file, rng.randrange(len(sound)))
        with pytest.raises(IntegrityError, match=rf"{name}: \d+ bytes where {len(sound)} were"):
            segments.read_files(store.storage, each.folder, each.files, [name])
        # Nor does it decode, even with a matching digest.
        with pytest.raises(IntegrityError, match="does not decode"):
            decode(each, contents_with(cask, each, name), [name.split("/")[0]])
        file.write_bytes(sound)


def contents_with(cask: Path, segment: Segment, damaged: str) -> dict[str, bytes]:
    array = damaged.split("/")[0]
    names = [f"{array}/zarr.json", damaged]
    return {name: (cask / segment.folder / name).read_bytes() for name in names}


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
    (cask / "staging" / "left").mkdir()
    (cask / "log" / ".tmp").touch()
    (cask / "seg/rollout" / ("0" * 32)).mkdir()
    segment = open_store(cask).head().segments[0]
    (cask / segment.folder / "notes").touch()
    assert set(verify(open_store(cask)).orphans) == {
        "staging/left",
        "log/.tmp",
        f"seg/rollout/{'0' * 32}",
        f"{segment.folder}/notes",
    }


@pytest.mark.parametrize("what", ["file", "array", "segment", "seg/rollout", "log", "record"])
def test_symbolic_links_are_refused(cask: Path, tmp_path: Path, what: str) -> None:
    segment = open_store(cask).head().segments[0]
    at = {
        "file": f"{segment.folder}/tokens/c/0",
        "array": f"{segment.folder}/tokens",
        "segment": segment.folder,
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
    body, _ = record.decode_record(path.read_bytes(), str(path))
    change(body)
    path.write_bytes(record.encode_record(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": {"../../../etc/passwd": [1, "sha256:" + "0" * 64]}}, "files"),
        ({"files": {}}, "files"),
        ({"seg_id": "../../../../tmp"}, "not allowed"),
        ({"seg_id": "0" * 32}, "seg_id is not the digest"),
        ({"kind": "../.."}, "kind"),
        ({"generation": -1}, "generation"),
        ({"generation": 1}, "has another generation"),
        ({"generation": "/../.."}, "generation"),
        ({"layout": "once"}, "layout"),
        ({"name": "../x"}, "name"),
        ({"base": "0" * 32}, "base"),
        ({"widens": "0" * 32}, "widens"),
        ({"profile": "zip"}, "profile"),
        ({"profile": ["raw32"]}, "unhashable"),
        ({"unit": {}}, "version"),
        ({"unit_key": 3}, "expected string"),
        ({"counts": {"M": 3, "N": 6, "P": 1 << 40, "T": 6, "J": 9, "E": 1}}, "P 1099511627776"),
        ({"counts": {"M": 3, "N": 6, "P": -1, "T": 6, "J": 9, "E": 1}}, "P -1"),
        ({"counts": {"M": 3, "N": True, "P": 1, "T": 6, "J": 9, "E": 1}}, "N True"),
        ({"counts": {"M": 3, "N": 6, "P": 1, "T": 6, "J": 9, "E": 1 << 20}}, "E 1048576 on 1"),
        ({"counts": {}}, "counts"),
    ],
)
def test_a_forged_record_cannot_name_paths_or_sizes(
    cask: Path, change: dict[str, Any], words: str
) -> None:
    forge(cask, 0, lambda body: body["adds"][0].update(change))
    with pytest.raises(IntegrityError, match=words) as caught:
        open_store(cask).head()
    assert "0000000000.json: " in caught.value.cause


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adds": 3}, "not a valid record"),
        ({"adds": [[]]}, "not a valid record"),
        ({"time": 1}, "time is not text"),
        ({"retires": ["sha256:" + "0" * 64]}, "contradicts the records before it"),
        ({"retires": ["../x"]}, "not a valid record"),
        ({"sweeps": [["rollout", "../../x", 0]]}, "not a valid record"),
        ({"sweeps": [["rollout", "0" * 32, 1]]}, "removes 0+ of generation 1"),
        ({"sweeps": [["home", "0" * 32, 0]]}, "kind 'home'"),
        ({"tags": {"../x": 0}}, "not a valid record"),
        ({"tags": {"x": 1}}, "tag x of 1"),
        ({"tags": {"x": None}}, "contradicts the records before it"),
        ({"tags": 3}, "not a valid record"),
    ],
)
def test_a_forged_record_is_validated(cask: Path, change: dict[str, Any], words: str) -> None:
    forge(cask, 1, lambda body: body.update(change))
    with pytest.raises(IntegrityError, match=words) as caught:
        open_store(cask).head()
    assert "0000000001.json: " in caught.value.cause


@pytest.mark.parametrize(
    "data",
    [b"[1]", b'"x"', b"{", b"[" * 100_000, b"1" * 10_000, b"\xff\xfe", b'{"n": NaN}', b""],
)
def test_a_line_with_its_digest_that_is_no_record(cask: Path, data: bytes) -> None:
    sealed = data + b"\n" + json.dumps({"sha256": segments.sha256(data)}).replace(" ", "").encode()
    (cask / "log/0000000000.json").write_bytes(sealed + b"\n")
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
    contents = read_all(cask, segment)
    meta = json.loads(contents["tokens/zarr.json"]) | change
    contents["tokens/zarr.json"] = json.dumps(meta).encode()
    with pytest.raises(IntegrityError, match=words):
        decode(segment, contents, ["tokens"])


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
        ({"version": 2}, "format version 2, this program reads up to 1", StoreError),
        ({"format": "other"}, "format 'other'", StoreError),
        ({"format": 3}, "names no format", IntegrityError),
        ({"store_uuid": 7}, "no store_uuid", IntegrityError),
    ],
)
def test_other_formats_are_refused(
    cask: Path, change: dict[str, Any], words: str, error: type[Exception]
) -> None:
    body, _ = record.decode_record((cask / "format.json").read_bytes(), "")
    (cask / "format.json").write_bytes(record.encode_record(body | change))
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


@pytest.mark.parametrize("how", ["changed", "grown", "linked", "gone"])
def test_a_damaged_segment_of_the_same_name_is_repaired(tmp_path: Path, how: str) -> None:
    """Repair a folder that a crash left behind and that was damaged before its commit."""
    donor = open_store(tmp_path / "donor", create=True)
    segment = commit_rollouts(donor, 1)
    store = open_store(tmp_path / "cask", create=True)
    shutil.copytree(Path(donor.url) / segment.folder, Path(store.url) / segment.folder)
    damage(Path(store.url) / segment.folder / "tokens/c/0", how, tmp_path / "elsewhere")
    assert commit_rollouts(store, 1).seg_id == segment.seg_id
    assert verify(store, deep=True).orphans == ()


def test_every_damaged_segment_is_reported(cask: Path) -> None:
    names = [name for name in every_file(cask) if name.endswith(("/tokens/c/0", "/ent/c/0"))]
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
    assert store.storage.names("seg/rollout") == []
