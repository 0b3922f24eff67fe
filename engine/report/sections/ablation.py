"""Section of an ablation: its table of means over seeds."""

from pathlib import Path

from logitcask.engine.ablate_table import FIGURES, table
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.digests import read_json
from logitcask.engine.report.panels import Absent, Axis, Section, Table

RESULT = "ablate.json"


def ablation_section(folder: Path) -> Section:
    """Return the table that `logitcask ablate` has written. Raises IntegrityError for damage."""
    panels, absent = [], []
    if (folder / RESULT).is_file():
        panels.append(_table(folder / RESULT))
    else:
        absent.append(
            Absent(title="Table", why="the ablation goes on; `logitcask ablate` writes its table")
        )
    return Section(id="ablation", title="Ablation", panels=tuple(panels), absent=tuple(absent))


def _table(file: Path) -> Table:
    hint = "run the same `logitcask ablate` again: it trains nothing that is there"
    try:
        rows = read_json(file, hint=hint)["rows"]
        known = {*FIGURES, "n", "refused"}
        # ablate.json has its keys by name: what was varied comes first here.
        ordered = [sorted(row.items(), key=lambda cell: cell[0] in known) for row in rows]
        cells = table([dict(each) for each in ordered])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise IntegrityError(f"{file} is no table of an ablation: {error!r}", hint=hint) from error
    return Table(
        id="ablation-table",
        title="Combinations",
        how="Mean ± sample standard deviation over the seeds of each combination. Losses of "
        "different objectives do not compare.",
        columns=tuple(Axis(name=name.replace("_", " ")) for name in cells[0]),
        rows=tuple(tuple(row.values()) for row in cells),
    )
