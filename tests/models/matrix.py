"""The table of model families: sampled, scored and trained right, or refused with a reason.

Run: python tests/models/matrix.py [FAMILY ...]

It writes the lines of these families, by default of all, to engine/models/README.md. All take
about ten minutes of a CPU.
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
    words, _, causes = zip(*(each.partition(": ") for each in found.values()), strict=True)
    reasons = dict.fromkeys(reason(cause) for cause in causes if cause)
    return f"| {family} | {' | '.join(words)} | {'; '.join(reasons)} |"


def reason(cause: str) -> str:
    """Return a cause without folders, and without messages of libraries, whose order varies."""
    folders = re.escape(tempfile.gettempdir()) + r"/\S+"
    short = re.sub(r"(: \w+Error): .*", r"\1", re.sub(folders, "FOLDER", cause), flags=re.DOTALL)
    return short.replace("|", "\\|")


def written() -> dict[str, str]:
    """Return family -> its line in the README."""
    lines = README.read_text().partition(HEADER)[2].splitlines()
    return {each.split(" | ")[0].removeprefix("| "): each for each in lines}


def silence() -> None:
    """Turn off the progress bars and the warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main(names: list[str]) -> int:
    """Write the lines of families; return 1 if one of them is wrong or ends in a traceback."""
    from tests.models.families import FAMILIES

    text, found, rows = README.read_text().partition(HEADER)[0], [], written()
    with ProcessPoolExecutor(2, initializer=silence) as pool:
        for name, each in zip(names or FAMILIES, pool.map(line, names or FAMILIES), strict=True):
            print(each, flush=True)
            rows[name] = each
            found.append(each)
    table = "".join(f"{rows[name]}\n" for name in FAMILIES if name in rows)
    README.write_text(text + HEADER + table)
    return int(any(" wrong " in each or " traceback " in each for each in found))


if __name__ == "__main__":
    # Last, because ./kernels would look like another project's package.
    sys.path.append(str(ROOT))
    sys.exit(main(sys.argv[1:]))
