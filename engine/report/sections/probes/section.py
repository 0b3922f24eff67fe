"""Section of the probes: those that the store answers at once, and those that were run."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitcask.engine.config.probes import RewardProbe
from logitcask.engine.errors import ConfigError, IncompleteError, LogitcaskError
from logitcask.engine.probes.correctness import correctness_report
from logitcask.engine.probes.reward import reward_report, sequence_rewards
from logitcask.engine.report.panels import Absent, Panel, Section
from logitcask.engine.report.runs import RunFacts
from logitcask.engine.report.sections.probes.of_models import (
    compare_panels,
    compatibility_panels,
    continuation_panels,
    drift_panels,
    k_panels,
    metric_panels,
)
from logitcask.engine.report.sections.probes.of_store import (
    correctness_panels,
    position_panels,
    region_panels,
    reward_panels,
)
from logitcask.engine.report.sections.probes.output import ProbeOutput
from logitcask.engine.report.sections.stored import MOST_ROWS, stored_rows

BUILDERS: Mapping[str, Callable[[ProbeOutput], list[Panel]]] = {
    "reward": reward_panels,
    "positions": position_panels,
    "correctness": correctness_panels,
    "regions": region_panels,
    "k": k_panels,
    "drift": drift_panels,
    "compatibility": compatibility_panels,
    "continuation": continuation_panels,
    "metrics": metric_panels,
    "compare": compare_panels,
}
"""Name of a probe -> its builder."""
MOST_BYTES = 16 * 2**20
"""Of the output of a probe; with 4,096 prompts it is a megabyte."""
_HINT = "make it again: logitcask probe NAME ... --format json > FILE"


def probes_section(
    runs: Sequence[RunFacts], files: Sequence[Path] = (), *, most: int = MOST_ROWS // 2
) -> Section:
    """Build reward and correctness of the first run from its store, and the probes in `files`.

    files: what `logitcask probe ... --format json` printed. A store alone is a run with an empty
    record. Reads `most` positions; what the store cannot answer is an Absent. Raises ConfigError
    for a file that holds no such output.
    """
    panels: list[Panel] = []
    absent: list[Absent] = []
    try:
        panels += _computed(runs[0], most)
    except LogitcaskError as error:
        absent.append(Absent(title="Reward and correctness", why=f"{error.cause}; {error.hint}"))
    for number, file in enumerate(files, 1):
        panels += file_panels(file, f"probe-{number}")
    if not files:
        absent.append(
            Absent(
                title="Probes that were run",
                why="none was given: `logitcask probe NAME --format json > FILE` measures, and "
                "`logitcask report --probe FILE` shows it here",
            )
        )
    return Section(id="probes", title="Probes", panels=tuple(panels), absent=tuple(absent))


def _computed(facts: RunFacts, most: int) -> list[Panel]:
    """Return the panels of the probes of correct and incorrect responses.

    Raises as `sequence_rewards` and `reward_report`, and IncompleteError for a large segment.
    """
    of = stored_rows(facts, most=most)
    names = {"rollouts": of.rollouts, "teacher": of.teacher}
    positions = sum(each.counts["P"] for each in of.snapshot.rollouts(of.rollouts))
    if positions > 8 * most:
        raise IncompleteError(
            f"a segment has {positions:,} positions, which is too much for a page",
            hint="`logitcask probe correctness --format json > FILE`, then --probe FILE",
        )
    correct_from = RewardProbe().correct_from
    found = sequence_rewards(of.store, of.snapshot, **names)
    reports = {
        "reward": asdict(reward_report(found, correct_from=correct_from)),
        "correctness": asdict(
            correctness_report(of.store, of.snapshot, **names, correct_from=correct_from)
        ),
    }
    return [
        panel
        for name, values in reports.items()
        for panel in BUILDERS[name](
            ProbeOutput(values=values, prefix=f"probe-{name}", source=of.note)
        )
    ]


def file_panels(file: Path, prefix: str) -> list[Panel]:
    """Return the panels of a file; prefix: of their ids. Raises ConfigError as `probes_section`."""
    name, values = read_probe(file)
    output = ProbeOutput(values=values, prefix=f"{prefix}-{name}", source=f" From {file.name}.")
    try:
        return BUILDERS[name](output)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{file}: these are not the values of `logitcask probe {name}` ({error!r:.200})",
            hint=_HINT,
        ) from error


def read_probe(file: Path) -> tuple[str, Any]:
    """Return the name of the probe that printed a file, and its values.

    Raises ConfigError for a file that cannot be read or names no probe.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"{file} has {file.stat().st_size:,} bytes, and the output of a probe at most "
                f"{MOST_BYTES:,}",
                hint=_HINT,
            )
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else f"no JSON ({error})"
        raise ConfigError(f"{file}: {cause}", hint=_HINT) from error
    if isinstance(values, list) and values and isinstance(values[0], dict):
        name: Any = "metrics" if "metric" in values[0] else ""
    else:
        name = values.get("probe", "") if isinstance(values, dict) else ""
    if not isinstance(name, str) or name not in BUILDERS:
        raise ConfigError(
            f"{file} names no probe of {', '.join(sorted(BUILDERS))}",
            hint=_HINT,
        )
    return name, values
