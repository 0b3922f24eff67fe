"""A teacher with another tokenizer, and two experts at once, on the demo's sums and differences.

Run: .venv/bin/python bench/bench_cross_tokenizer.py [--parts spans experts] [--only VARIANT ...]

spans: a character-level student learns from a teacher whose tokens are up to five characters, by
each objective over spans, from one store that the teacher scored once. Two variants learn from a
teacher of the same size that has the student's tokenizer: what the same would give without spans.
experts: two copies of the student, each post-trained on half of the task (sums, differences), teach
the student: one alone, both at once, or each on its own kind of problems.

A variant takes the learning rate that is best on validation problems of seed 3, which has models
and samples of its own: the largest of RATES, or the next one while that is better, or while none is
better than no training. A variant without a better one is not trained further. The others train
with seeds 0, 1 and 2: other models, other samples, another order. Accuracies are greedy on 1,000
problems that no model has seen. Gap recovery is (after - before) / (teacher - before).

A row for each variant is appended to bench/results/cross_tokenizer.jsonl; a row of the same code is
not made again. Models, stores and trainings are in build/bench_cross_tokenizer, so a stopped run
continues. --smoke tries the code with models that learn nothing and appends nothing.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
import torch
from cross_models import FULL, SMOKE, Family, Scale
from cross_runs import DRAWN, Runs

RATES = (1e-3, 3e-4, 3e-5)
SEEDS, CHOICE = (0, 1, 2), 3
"""Seeds of the figures, and of the choice of a learning rate."""
PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Variant:
    """A training: value of --teacher, or `routed` by kind; the objective; weights of teachers."""

    teacher: str
    objective: str
    weighting: str = "fixed"

    def __str__(self) -> str:
        weighting = "" if self.weighting == "fixed" else f" {self.weighting}"
        return f"{self.teacher} {self.objective}{weighting}"


OVER_SPANS = (
    *("alm(parameter=1)", "x_token", "simct", "gold", "uld", "span_advantage", "alm"),
    *("uld+ce(weight=1)", "span_advantage(parameter=1)", "span_advantage+importance(cap=5)"),
)
PARTS = {
    "spans": (
        *(Variant("merged", each) for each in OVER_SPANS),
        Variant("merged-ends", "gold_bayesian"),
        *(Variant("characters", each) for each in ("opd", "span_advantage", "alm")),
    ),
    "experts": (
        *(Variant(each, "opd") for each in ("sums", "differences", "sums+differences", "routed")),
        Variant("sums+differences", "opd", "entropy"),
    ),
}


def main(arguments: list[str]) -> None:
    """Make the missing rows, and print them."""
    parser = results.option_parser(__doc__, "cross_tokenizer")
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="[default: all]")
    add("--only", nargs="+", metavar="VARIANT", help="e.g. 'merged alm' [default: all]")
    add("--smoke", action="store_true", help="Try the code.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices so small gain nothing from more
    chosen = {
        part: [v for v in PARTS[part] if options.only is None or str(v) in options.only]
        for part in options.parts
    }
    if options.smoke:
        with tempfile.TemporaryDirectory() as name:
            for part, variants in chosen.items():
                lab = Lab(Path(name), part, "smoke", SMOKE, seeds=(0,), choice=0, rates=(1e-3,))
                for variant in variants:
                    print(json.dumps(lab.row(variant)), flush=True)
        return
    commit = results.code_commit()
    folder = results.ROOT / "build" / "bench_cross_tokenizer"
    for part, variants in chosen.items():
        lab = Lab(folder, part, commit, FULL)
        for variant in variants:
            done = [(r["part"], r["variant"], r["commit"]) for r in results.read(options.out)]
            if (part, str(variant), commit) not in done:
                row = lab.row(variant) | results.environment(*PACKAGES)
                results.append(options.out, row)
                print(json.dumps(row), flush=True)


class Lab:
    """The families and trainings of one part, of all seeds."""

    def __init__(
        self,
        folder: Path,
        part: str,
        commit: str,
        scale: Scale,
        *,
        seeds: tuple[int, ...] = SEEDS,
        choice: int = CHOICE,
        rates: tuple[float, ...] = RATES,
    ) -> None:
        self.part, self.seeds, self.choice, self.rates = part, seeds, choice, rates
        self.runs = {
            seed: Runs(
                Family(folder / str(seed), seed, scale),
                f"{commit}-{part}",
                top_k=DRAWN if part == "spans" else 0,
            )
            for seed in (*seeds, choice)
        }

    def row(self, variant: Variant) -> dict[str, Any]:
        """Choose the rate of a variant, train with each seed, and return the figures."""
        of = variant.teacher, variant.objective, variant.weighting
        tried: dict[float, dict[str, float]] = {}
        for rate in self.rates:
            tried[rate] = self.runs[self.choice].after(*of, rate, validation=True)
            best = max(each["all"] for each in tried.values())
            start = self.runs[self.choice].family.accuracies["student"]["all"]
            if best > max(start, tried[rate]["all"]):
                break
        seeds = self.seeds if best >= start else ()
        rate = max(tried, key=lambda each: tried[each]["all"])
        after, before, teachers = [], [], []
        for seed in seeds:
            runs = self.runs[seed]
            after.append(runs.after(*of, rate))
            before.append(runs.family.accuracies["student"])
            teachers.append(runs.teachers(variant.teacher))
        return {
            "bench": "cross_tokenizer",
            "command": f"python bench/bench_cross_tokenizer.py --parts {self.part}",
            "part": self.part,
            "variant": str(variant),
            "teacher": variant.teacher,
            "objective": variant.objective,
            "weighting": variant.weighting,
            "rate": rate,
            "validation": {f"{each:g}": tried[each]["all"] for each in tried},
            "choice": {
                "seed": self.choice,
                "before": start,
                "teachers": self.runs[self.choice].teachers(variant.teacher),
            },
            "seeds": seeds,
            "before": before,
            "teachers": teachers,
            "after": after,
        }


if __name__ == "__main__":
    main(sys.argv[1:])
