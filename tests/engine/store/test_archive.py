"""The archive of a segment: what any zip reader reads, and nothing but what its writer writes."""

import io
import struct
import warnings
import zipfile
from collections.abc import Iterable
from typing import Any

import pytest

from logitcask.engine.store.format import archive

FILES = {"zarr.json": b"{}", "a/zarr.json": b'{"x": 1}', "a/c/0": bytes(range(200)), "b/c/0": b""}
LIMITS = dict.fromkeys(FILES, 300)
SOUND = archive.write(FILES)


def test_it_is_the_file_that_zipfile_writes() -> None:
    """Write the same bytes as the standard library with fixed dates and modes, sorted."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for name, data in sorted(FILES.items()):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            packed.writestr(entry, data)
    assert file.getvalue() == SOUND
    assert archive.write(dict(reversed(FILES.items()))) == SOUND
    with zipfile.ZipFile(io.BytesIO(SOUND)) as packed:
        assert {name: packed.read(name) for name in packed.namelist()} == FILES


def test_it_is_split_without_a_copy_at_its_offsets() -> None:
    found = archive.split(SOUND, LIMITS)
    assert {name: bytes(data) for name, data in found.items()} == FILES
    assert all(data.obj is SOUND for data in found.values())
    offsets = archive.offsets({name: len(data) for name, data in FILES.items()})
    for name, data in FILES.items():
        assert SOUND[offsets[name] :][: len(data)] == data
    assert archive.split(archive.write({}), {}) == {}


def test_a_flipped_bit_anywhere_is_refused_or_in_data() -> None:
    """Flip every bit: only those of the data and of equal crc32 pass, and lead to no other file."""
    data = set()
    for name, start in archive.offsets({n: len(d) for n, d in FILES.items()}).items():
        data |= set(range(start, start + len(FILES[name])))
    for at in range(len(SOUND)):
        for bit in range(8):
            bad = bytearray(SOUND)
            bad[at] ^= 1 << bit
            if at in data:
                archive.split(bytes(bad), LIMITS)
                continue
            with pytest.raises(ValueError, match=r"\w"):
                archive.split(bytes(bad), LIMITS)


def test_a_cut_or_longer_file_is_refused() -> None:
    for cut in range(len(SOUND)):
        without, longer = SOUND[:cut] + SOUND[cut + 1 :], SOUND[:cut] + b"\0" + SOUND[cut:]
        for bad in (SOUND[:cut], SOUND[cut + 1 :], without, longer):
            with pytest.raises(ValueError, match=r"\w"):
                archive.split(bad, LIMITS)


def written(names: Iterable[str], **fields: Any) -> bytes:
    """Let zipfile write an archive whose entries have other fields than ours."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name in names:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            for field, value in fields.items():
                setattr(entry, field, value)
            packed.writestr(entry, FILES.get(name, b"x"))
    return file.getvalue()


def overlapping() -> bytes:
    """Let the directory give the second entry the place of the first."""
    bad = bytearray(SOUND)
    second = SOUND.index(b"PK\1\2", SOUND.index(b"PK\1\2") + 1)
    struct.pack_into("<I", bad, second + 42, 0)
    return bytes(bad)


def huge() -> bytes:
    """Let an entry claim 4 GiB, in both of its headers."""
    bad = bytearray(SOUND)
    for at, offset in ((0, 18), (SOUND.index(b"PK\1\2"), 20)):
        struct.pack_into("<2I", bad, at + offset, 0xFFFFFFFF, 0xFFFFFFFF)
    return bytes(bad)


NAMES = sorted(FILES)
STRANGERS = {
    "another order": written(NAMES[::-1]),
    "a file more": written(sorted([*NAMES, "c"])),
    "a file less": written(NAMES[:-1]),
    "another name": written(["../c/0", *NAMES[1:]]),
    "a name twice": written([NAMES[0], *NAMES[:-1]]),
    "compressed": written(NAMES, compress_type=zipfile.ZIP_DEFLATED),
    "a date": written(NAMES, date_time=(2026, 1, 1, 0, 0, 0)),
    "a mode": written(NAMES, external_attr=0o777 << 16),
    "an extra field": written(NAMES, extra=b"\x35\xd9\x00\x00"),
    "a comment": written(NAMES, comment=b"x"),
    "a prefix": b"x" + SOUND,
    "a comment of the file": SOUND[:-2] + b"\1\0x",
    "another end inside": SOUND + SOUND[-22:],
    "overlapping": overlapping(),
    "huge": huge(),
    "nothing": b"",
}


@pytest.mark.parametrize("name", STRANGERS)
def test_any_other_zip_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"entry|entries|directory|bytes of"):
        archive.split(STRANGERS[name], LIMITS)


def test_a_file_beyond_its_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="200 bytes of a/c/0, at most 199"):
        archive.split(SOUND, LIMITS | {"a/c/0": 199})


def test_an_archive_that_needs_zip64_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 200)
    with pytest.raises(ValueError, match=r"more than \d+ bytes in one file"):
        archive.write(FILES)
