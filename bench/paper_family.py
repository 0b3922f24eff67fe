"""The models of one seed of the miniature, each made once and kept in a folder.

    base       the student: a small model of the corpus
    big, huge  larger models of the same corpus: the same pipeline, little new
    post       base after rejection sampling: the same model and a new skill
    big_post   big after rejection sampling
    other      of the size of big, of the other corpus: another thinking pattern
    cold       base after supervised training on responses of `other`: the cold start

Accuracies are shares of right answers at temperature 1, as the student samples in training.
"""

import json
import math
import re
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from paper_models import Text, load, right_share, sample, store, train
from paper_task import EVALUATION, Problem, corpus, stream

from logitcask.engine.demo.models import Size, make_model

STEPS = 8
"""Steps of a solution."""
NEW_TOKENS = 6 * STEPS + 4
SIZES = {"base": Size(64, 2, 192, 2), "big": Size(96, 2, 288, 3), "huge": Size(112, 2, 336, 4)}
PRETRAINING = {"base": (300, 4e-3), "big": (300, 3e-3), "huge": (300, 2.5e-3)}
"""Steps and peak rate, 48 texts a step."""
POST_PROMPTS, POST_ROUNDS, POST_STEPS, POST_RATE = 1000, 3, 50, 2e-3
"""Rejection sampling: prompts, rounds of sampling and training, steps and peak rate of each."""
OTHER_CORPUS_SHARE = 0.75
COLD_PROMPTS, COLD_STEPS = 3000, 150


class Family:
    """The models of one seed, with their accuracies; what a folder holds is not made again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "made.json"
        made = json.loads(self._file.read_text()) if self._file.exists() else [{}, {}]
        self.accuracies: dict[str, float] = made[0]
        self.seconds: dict[str, float] = made[1]
        """CPU seconds of each model, without those of the models that it starts from."""

    def problems(self, split: str, count: int, template: str = "=") -> list[Problem]:
        """Return the first problems of a split."""
        return list(islice(stream(split, self.seed, STEPS, template), count))

    def path(self, name: str) -> Path:
        """Return the folder of a model, which is made if it is not there."""
        folder = self.folder / name
        if name not in self.accuracies:
            start, before = time.process_time(), math.fsum(self.seconds.values())
            made = self._make(name)
            store(made, folder)
            self.accuracies[name] = self.accuracy(made)
            others = math.fsum(self.seconds.values()) - before
            self.seconds[name] = time.process_time() - start - others
            self._file.write_text(json.dumps([self.accuracies, self.seconds]))
            print(f"seed {self.seed}: {name} solves {self.accuracies[name]:.1%}", flush=True)
        return folder

    def accuracy(self, model: Any, template: str = "=") -> float:
        """Return the share of the evaluation problems that one sample each solves."""
        problems = self.problems("evaluation", EVALUATION, template)
        return right_share(model, problems, NEW_TOKENS, self.seed)

    def _make(self, name: str) -> Any:
        makers: dict[str, Callable[[], Any]] = {
            **dict.fromkeys(SIZES, lambda: self._pretrained(name)),
            "post": lambda: self._post_trained("base"),
            "big_post": lambda: self._post_trained("big"),
            "other": self._other,
            "cold": self._cold,
        }
        return makers[name]()

    def _pretrained(self, name: str) -> Any:
        model = make_model(SIZES[name], self.seed)
        steps, rate = PRETRAINING[name]
        # Models of one pipeline see one corpus, and not the same texts.
        seed = 10 * self.seed + list(SIZES).index(name)
        train(model, corpus(seed, STEPS), steps, rate, batch=48)
        return model

    def _post_trained(self, start: str) -> Any:
        """Train on the model's own right responses, sampled again in every round."""
        model = load(self.path(start))
        problems = self.problems("post", POST_PROMPTS)
        for number in range(POST_ROUNDS):
            right = self._right_responses(model, problems, number)
            train(model, cycle(right), POST_STEPS, POST_RATE)
        return model

    def _other(self) -> Any:
        model = make_model(SIZES["big"], self.seed + 1000)
        texts = corpus(
            10 * self.seed + 9, STEPS, other_share=OTHER_CORPUS_SHARE, other_authors=True
        )
        steps, rate = PRETRAINING["big"]
        train(model, texts, steps, rate, batch=48)
        return model

    def _cold(self) -> Any:
        """Train on the teacher's responses that end in an answer: the paper drops only others."""
        model, teacher = load(self.path("base")), load(self.path("other"))
        problems = self.problems("post", COLD_PROMPTS)
        whole: list[Text] = []
        for at in range(0, COLD_PROMPTS, POST_PROMPTS):
            prompts = [p.prompt for p in problems[at : at + POST_PROMPTS]]
            responses = sample(teacher, prompts, NEW_TOKENS, self.seed + at)
            pairs = zip(prompts, responses, strict=True)
            whole += [(p, text) for p, text in pairs if re.search(r">\d$", text)]
        train(model, cycle(whole), COLD_STEPS, 1e-3)
        return model

    def _right_responses(self, model: Any, problems: list[Problem], number: int) -> list[Text]:
        responses = sample(model, [p.prompt for p in problems], NEW_TOKENS, self.seed + number)
        return [
            (p.prompt, text)
            for p, text in zip(problems, responses, strict=True)
            if p.solved_by(text)
        ]
