"""What a demo folder has made so far, and what a demo says at its end."""

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError
from logitcask.engine.training.run_dir import write_json

RECORD = "demo.json"
STAGES = ("teacher", "student", "rollout", "score")
"""What a folder makes once, in this order. Training and measuring come after, in every call."""


class Record:
    """demo.json: the settings of a folder, the accuracies of its models, and its finished stages.

    A stage is finished once its seconds are written down; `seconds` are those of this call alone.
    """

    def __init__(self, out: Path, content: dict[str, Any]) -> None:
        self._file, self._content = out / RECORD, content
        self.reused = tuple(stage for stage in STAGES if stage in content["seconds"])
        """Stages that an earlier call finished."""
        self.seconds: dict[str, float] = dict.fromkeys(self.reused, 0.0)
        self.accuracy: dict[str, float] = content["accuracy"]

    @classmethod
    def open(cls, out: Path, settings: Mapping[str, Any]) -> "Record":
        """That of `out`, or one for a new folder.

        Raises ConfigError if `out` holds something else or was made with other settings.
        """
        if (out / RECORD).exists():
            content = json.loads((out / RECORD).read_text())
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
                f"{out} is there and holds no {RECORD}: it is not the folder of a demo",
                hint="give a new or an empty folder with --out",
            )
        out.mkdir(parents=True, exist_ok=True)
        record = cls(out, {"settings": dict(settings), "accuracy": {}, "seconds": {}})
        record._write()
        return record

    def lacks(self, stage: str) -> bool:
        return stage not in self._content["seconds"]

    @contextmanager
    def making(self, stage: str) -> Iterator[None]:
        """Times a stage that is made once; it counts as finished if the block ends well."""
        with self.timing(stage):
            yield
        self._content["seconds"][stage] = round(self.seconds[stage], 3)
        self._write()

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Times a stage that every call does."""
        start = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - start

    def _write(self) -> None:
        write_json(self._file, self._content)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What a demo measured. Accuracies are greedy, on problems that neither model has seen."""

    student_before: float
    student_after: float
    teacher: float
    gap_recovery: float
    """Share of the gap between student and teacher that the training closed."""
    overlap_ratio_before: float
    """Mean share of ids that student's and teacher's top-k have in common, on held-out rollouts."""
    overlap_ratio_after: float
    overlap_mass_before: float
    """Mean mass that the student puts on these ids."""
    overlap_mass_after: float
    positions: int
    """Response positions of the rollouts that are trained on."""
    bytes_per_position: float
    """Of all committed files."""
    seconds: Mapping[str, float]
    """Stage -> wall time in this call, 0 for what an earlier one had made."""
    objective: str
    segments: int
    reused: tuple[str, ...]
    """Stages that an earlier call had made."""
    out: Path
    fast: bool
    seed: int

    def as_json(self) -> dict[str, Any]:
        """The measurements alone, seconds rounded to milliseconds."""
        inner = ("objective", "segments", "reused", "out", "fast", "seed")
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in inner}
        content["seconds"] = {stage: round(s, 3) for stage, s in self.seconds.items()}
        return content

    def as_text(self) -> str:
        """A table for a person, and what was not done again."""
        rows = [
            ("", "before", "after", "teacher"),
            (
                "accuracy",
                f"{self.student_before:.1%}",
                f"{self.student_after:.1%}",
                f"{self.teacher:.1%}",
            ),
            (
                "overlap ratio",
                f"{self.overlap_ratio_before:.3f}",
                f"{self.overlap_ratio_after:.3f}",
                "",
            ),
            (
                "overlap mass",
                f"{self.overlap_mass_before:.4f}",
                f"{self.overlap_mass_after:.4f}",
                "",
            ),
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
        return "\n".join(lines)

    def _next(self) -> list[str]:
        """The command of another objective: a folder takes no demo of another size or seed."""
        other = "forward_kl" if self.objective != "forward_kl" else "overlap"
        words = ["logitcask", "demo", "--out", str(self.out), "--objective", other]
        words += ["--fast"] if self.fast else []
        return words + (["--seed", str(self.seed)] if self.seed else [])
