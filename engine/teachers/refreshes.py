"""Names of the refreshes of a teacher that follows a student.

A store binds a name of scores to weights at first use, so each refresh has a name of its own:

    NAME.v<version>-<first 8 hex digits of the digest of its weights>

version: updates of the student when the teacher was refreshed. Where a student is trained again
after a kill and rounds otherwise, as on a GPU, the version comes back with other weights, and so
with another name.
"""

import re

_SUFFIX = re.compile(r"\.v(0|[1-9][0-9]*)-[0-9a-f]{8}")
FOLLOW = "follow"
"""Key of the provenance of such scores: how the teacher follows."""
LONGEST_NAME = 100
"""Characters of a NAME, so that those of its refreshes are names too."""


def refresh_name(name: str, version: int, digest: str) -> str:
    """Return the name of the scores of a refresh; digest: of its weights, sha256:HEX."""
    return f"{name}.v{version}-{digest.removeprefix('sha256:')[:8]}"


def refresh_version(name: str, refresh: str) -> int | None:
    """Return the version of a refresh of the teacher `name`; None for other names."""
    found = _SUFFIX.fullmatch(refresh.removeprefix(name)) if refresh.startswith(name) else None
    return int(found[1]) if found else None
