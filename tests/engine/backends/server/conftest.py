"""A tiny teacher in the hf backend, rollouts to score, and short limits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.server import Limits, ServerScorer
from logitcask.engine.types import Prompt, Rollouts, SamplingParams, ScoreParams
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tiny import EOS, N_VOCAB, make_model, save_folder

QUICK = Limits(
    read_s=5.0, backoff_s=0.01, most_backoff_s=0.05, wait_s=5.0, poll_s=0.02, connect_s=2.0
)
STUDENT_TOP_7 = ScoreParams(top_p=1.0, k_min=7, k_max=7, at_student=False)
PROMPTS = [Prompt(id=str(i), token_ids=tuple(range(3, 3 + n))) for i, n in enumerate((1, 30, 8))]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HF:
    folder = save_folder(tmp_path_factory.mktemp("served"), make_model(seed=1, hidden=48))
    return HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,))


@pytest.fixture(scope="session")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> Rollouts:
    """Return nine responses of 1 to 12 tokens, with the student's top 7."""
    folder: Path = save_folder(tmp_path_factory.mktemp("student"))
    hf = HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS, 20, 30, 40))
    rolled = hf.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=12), seed=0, version=0)
    return replace(rolled, student=hf.score(rolled, STUDENT_TOP_7))


@pytest.fixture
def fake(teacher: HF) -> Iterator[FakeServer]:
    with FakeServer(teacher.model) as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[..., ServerScorer]]:
    """Return a function that makes a ServerScorer of the fakes; close all at the end."""
    opened: list[ServerScorer] = []

    def connect_to(*fakes: FakeServer, limits: Limits = QUICK, **kwargs: Any) -> ServerScorer:
        server = ServerScorer([each.url for each in fakes], limits=limits, **kwargs)
        server.n_vocab = N_VOCAB
        opened.append(server)
        return server

    yield connect_to
    for each in opened:
        each.close()
