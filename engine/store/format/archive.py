"""The archive of a segment: an uncompressed zip file, of which every byte follows from its entries.

Entries are in the order of their names, dated 1980-01-01 and of mode 0644, one directly after the
other; then come the directory and its end, without comments, extra fields, data descriptors or
zip64. So the same files make the same bytes, and a reader that has the names compares every header
with the only one that it can be: no entry can overlap another, hide, or claim more than is there.

Source: PKWARE APPNOTE 6.3.10, 4.3.7 local file header, 4.3.12 central directory, 4.3.16 its end.
"""

import struct
import zlib
from collections.abc import Mapping

MAX_BYTES = 0xFFFF_FFFF
"""A zip file without zip64."""
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_VERSION, _UNIX = 20, 3
"""Version that extracts the file, and the system that gives its mode a meaning."""
_TIME, _DATE = 0, 0x21
_MODE = 0o644 << 16


def write(contents: Mapping[str, bytes | memoryview]) -> bytes:
    """Return the archive of these files, name -> bytes. Raises ValueError where it is too large."""
    parts, directory, start = [], [], 0
    for name, data in sorted(contents.items()):
        found = name.encode("ascii"), zlib.crc32(data), len(data)
        parts += [_local(*found), data]
        directory.append(_central(*found, start))
        start += _LOCAL.size + len(name) + len(data)
        if start > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes in one file")
    return b"".join([*parts, *directory, _end(directory, start)])


def split(data: bytes, limits: Mapping[str, int]) -> dict[str, memoryview]:
    """Return the files of an archive, name -> bytes, without a copy.

    limits: name -> most bytes, of exactly the files that it must hold. Raises ValueError for any
    other bytes than `write` makes, apart from the files and their crc32, which are not looked at.
    """
    view, names = memoryview(data), sorted(limits)
    at = end = len(view) - _END.size - sum(_CENTRAL.size + len(name) for name in names)
    if at < 0:
        raise ValueError("too short for its directory")
    found, directory, start = {}, [], 0
    for name in names:
        crc, size = struct.unpack_from("<2I", view, at + 16)
        first = start + _LOCAL.size + len(name)
        if size > min(limits[name], end - first):
            raise ValueError(f"{size} bytes of {name}, at most {min(limits[name], end - first)}")
        local = _local(name.encode("ascii"), crc, size)
        directory.append(_central(name.encode("ascii"), crc, size, start))
        if view[start:first] != local or view[at : at + len(directory[-1])] != directory[-1]:
            raise ValueError(f"another entry than {name} in its place")
        found[name] = view[first : first + size]
        start, at = first + size, at + len(directory[-1])
    if start != end or view[at:] != _end(directory, end):
        raise ValueError("the entries do not fill the file")
    return found


def offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return where each file's bytes begin in the archive of files of these sizes."""
    found, start = {}, 0
    for name, size in sorted(sizes.items()):
        found[name] = start + _LOCAL.size + len(name)
        start = found[name] + size
    return found


def _local(name: bytes, crc: int, size: int) -> bytes:
    head = _LOCAL.pack(b"PK\3\4", _VERSION, 0, 0, _TIME, _DATE, crc, size, size, len(name), 0)
    return head + name


def _central(name: bytes, crc: int, size: int, start: int) -> bytes:
    versions = _UNIX << 8 | _VERSION, _VERSION
    head = _CENTRAL.pack(
        *(b"PK\1\2", *versions, 0, 0, _TIME, _DATE, crc, size, size, len(name), 0, 0, 0, 0),
        *(_MODE, start),
    )
    return head + name


def _end(directory: list[bytes], start: int) -> bytes:
    count = len(directory)
    return _END.pack(b"PK\5\6", 0, 0, count, count, sum(map(len, directory)), start, 0)
