"""demo.json: the finished stages of a demo folder; and the result of a demo."""

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError
from logitcask.engine.models.digests import read_json, write_json

RECORD = "demo.json"
STAGES = ("teacher", "student", "rollout", "score")
"""Stages that run once per folder, in this order. Training and evaluation run in every call."""


class Record:
    """demo.json: settings of a folder, accuracies of its models, seconds of its finished stages.

    `seconds` are those of this call alone.
    """

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self._file, self._content = out / RECORD, content
        self.reused = tuple(stage for stage in STAGES if stage in content["seconds"])
        """Stages finished by an earlier call."""
        self.seconds: dict[str, float] = dict.fromkeys(self.reused, 0.0)
        self.accuracy: dict[str, float] = content["accuracy"]

    @classmethod
    def open(cls, out: Path, settings: Mapping[str, Any]) -> "Record":
        """Open the record of `out`, a demo folder or a new one.

        Raises ConfigError if `out` holds something else or has other settings.
        """
        if (out / RECORD).exists():
            content = read_json(out / RECORD, hint="give another --out, or remove that folder")
            for key, value in settings.items():
                if content["settings"].get(key) != json.loads(json.dumps(value)):
                    raise ConfigError(
                        f"{out} holds a demo with {key} = {content['settings'].get(key)}, "
                        f"not {value}",
                        hint="give another --out, or remove that folder",
                    )
            return cls(out, content)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(
                f"{out} exists and holds no {RECORD}: it is not the folder of a demo",
                hint="give a new or an empty folder with --out",
            )
        out.mkdir(parents=True, exist_ok=True)
        record = cls(out, {"settings": dict(settings), "accuracy": {}, "seconds": {}})
        record._write()
        return record

    def once(self, stage: str, run: Callable[[], None]) -> None:
        """Run a stage unless an earlier call finished it."""
        if stage in self._content["seconds"]:
            return
        with self.timing(stage):
            run()
        self._content["seconds"][stage] = round(self.seconds[stage], 3)
        self._write()

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Time the body as a stage."""
        start = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - start

    def _write(self) -> None:
        write_json(self._file, self._content)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Measurements of a demo. Accuracies are greedy, on problems that neither model has seen."""

    student_before: float
    student_after: float
    teacher: float
    gap_recovery: float
    """Share of the gap between student and teacher that training closed."""
    overlap_ratio_before: float
    """Mean |S(p) & S(q)| / k of the top-k ids S of student and teacher, on held-out rollouts."""
    overlap_ratio_after: float
    overlap_mass_before: float
    """Mean mass of the student on S(p) & S(q)."""
    overlap_mass_after: float
    positions: int
    """Response positions of the training rollouts."""
    bytes_per_position: float
    """Bytes of all committed files."""
    seconds: Mapping[str, float]
    """Stage -> wall time in this call, 0 for stages of an earlier one."""
    objective: str
    segments: int
    reused: tuple[str, ...]
    """Stages finished by an earlier call."""
    out: Path
    fast: bool
    seed: int
    report: Path
    """HTML file."""
    report_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the measurements, seconds rounded to milliseconds."""
        hidden = ("objective", "segments", "reused", "out", "fast", "seed", "report")
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        content["seconds"] = {stage: round(s, 3) for stage, s in self.seconds.items()}
        return content

    def as_text(self) -> str:
        """Return a table, the command of another objective, and the path of the report."""
        accuracies = [f"{x:.1%}" for x in (self.student_before, self.student_after, self.teacher)]
        ratios = [f"{x:.3f}" for x in (self.overlap_ratio_before, self.overlap_ratio_after)]
        masses = [f"{x:.4f}" for x in (self.overlap_mass_before, self.overlap_mass_after)]
        rows = [
            ("", "before", "after", "teacher"),
            ("accuracy", *accuracies),
            ("overlap ratio", *ratios),
            ("overlap mass", *masses),
        ]
        lines = [f"student trained by {self.objective}", ""]
        lines += ["".join(f"{cell:<15}" for cell in row).rstrip() for row in rows]
        lines += [
            "",
            f"gap recovery   {self.gap_recovery:.1%} of the way from the student to the teacher",
            f"positions      {self.positions:,} in a store of {self.segments} segments",
            f"bytes          {self.bytes_per_position:.1f} per position",
            "seconds        " + ", ".join(f"{s} {t:.1f}" for s, t in self.seconds.items()),
        ]
        if self.reused:
            lines += ["", f"from an earlier call: {', '.join(self.reused)}"]
        if {"rollout", "score"} <= set(self.reused):
            lines += ["nothing was sampled and nothing was scored in this call"]
        else:
            lines += [
                "",
                "another objective from the same store, without sampling or scoring: "
                f"{shlex.join(self._next())}",
            ]
        size = self.report_bytes / 1024
        lines += ["", f"report: {self.report} ({size:,.0f} KiB); open it in a browser"]
        return "\n".join(lines)

    def _next(self) -> list[str]:
        """Return the command of another objective in the same folder, of the same size and seed."""
        other = "forward_kl" if self.objective != "forward_kl" else "overlap"
        words = ["logitcask", "demo", "--out", str(self.out), "--objective", other]
        words += ["--fast"] if self.fast else []
        return words + (["--seed", str(self.seed)] if self.seed else [])
