"""The table of model families: sampled, scored and trained right, or refused with a reason.

Run: python tests/models/matrix.py [FAMILY ...]

Without names it writes the table of engine/models/README.md, which takes a quarter of an hour;
with names it prints their lines.
"""

import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "engine" / "models" / "README.md"
HEADER = (
    "| family | samples | scores | trains | trains LoRA | reason |\n|---|---|---|---|---|---|\n"
)


def line(family: str) -> str:
    """Return a family's line of the table."""
    from tests.models.build import save_family
    from tests.models.oracle import verdicts

    with tempfile.TemporaryDirectory() as folder:
        found = verdicts(save_family(family, Path(folder) / "model"))
    causes = [cause for _, _, cause in (each.partition(": ") for each in found.values()) if cause]
    folders = re.escape(tempfile.gettempdir()) + r"/\S+"
    reasons = dict.fromkeys(
        re.sub(folders, "FOLDER", cause).replace("|", "\\|") for cause in causes
    )
    words = [each.partition(":")[0] for each in found.values()]
    return f"| {family} | {' | '.join(words)} | {'; '.join(reasons)} |"


def written() -> dict[str, str]:
    """Return family -> its line in the README."""
    rows = [each for each in README.read_text().splitlines() if each.startswith("| ")]
    return {each.split(" | ")[0][2:]: each for each in rows[1:]}


def silence() -> None:
    """Turn off the progress bars and the warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main(names: list[str]) -> int:
    """Print the lines of families; without names write all of them."""
    from tests.models.families import FAMILIES

    with ProcessPoolExecutor(2, initializer=silence) as pool:
        lines = []
        for each in pool.map(line, names or FAMILIES):
            print(each, flush=True)
            lines.append(each)
    if not names:
        before = README.read_text().partition(HEADER)[0]
        README.write_text(before + HEADER + "\n".join(lines) + "\n")
    return int(any(" wrong " in each or " traceback " in each for each in lines))


if __name__ == "__main__":
    # Last, because ./kernels would look like another project's package.
    sys.path.append(str(ROOT))
    sys.exit(main(sys.argv[1:]))
