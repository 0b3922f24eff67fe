"""verl on the sequences of a store.

verl 0.9.1 wants transformers below 5.11 and tensordict, so it is no package of `make dev`. Of it
there are stand-ins here for the five names that our classes inherit or call, with the signatures of
verl/experimental/agent_loop/agent_loop.py, trainer/ppo/v1/agent_loop_tq.py and utils/config.py.
"""

import asyncio
import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.errors import (
    ConfigError,
    IdentityError,
    IncompleteError,
    LogitcaskError,
    ObjectiveError,
    StoreError,
)
from logitcask.engine.integrations.sequences import StoredSequences
from logitcask.engine.integrations.verl_answers import (
    StoreSettings,
    check_same_teacher,
    teacher_rows,
)
from tests.engine.tiny import N_VOCAB

K = 4


class Worker:
    """AgentLoopWorker, as far as an override of its teacher's question sees it."""

    live: Any = None

    def __init__(self, config: Any, llm_client: Any, teacher_client: Any, rewards: Any = None):
        self.config, self.teacher_client = config, teacher_client
        self.teacher_server_manager = self

    async def generate_sequences(self, batch: Any) -> None:
        with suppress(LogitcaskError):  # verl logs it, and trains on
            await self._run_agent_loop(*batch)

    async def _run_agent_loop(self, *parts: Any) -> None:
        output = SimpleNamespace(extra_fields={}, multi_modal_data={})
        await self._compute_teacher_logprobs(output, *parts, False)

    async def compute_teacher_logprobs_single(self, sequence_ids: list[int]) -> Any:
        return self.live(sequence_ids)

    async def _compute_teacher_logprobs(
        self, output: Any, prompt_ids: Any, response_ids: Any, validate: Any, kwargs: Any = None
    ) -> None:
        output.extra_fields["teacher_ids"] = "of the live teacher"


class Manager:
    """AgentLoopManagerTQ."""

    def __init__(self) -> None:
        self.agent_loop_workers_class: Any = Worker


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return our module, imported with the stand-ins."""
    actor = SimpleNamespace(__ray_metadata__=SimpleNamespace(modified_class=Worker))
    names = {
        "verl.experimental.agent_loop.agent_loop": {
            "AgentLoopBase": object,
            "AgentLoopMetrics": SimpleNamespace,
            "AgentLoopOutput": SimpleNamespace,
            "register": lambda name: lambda loop: loop,
        },
        "verl.trainer.ppo.v1.agent_loop_tq": {
            "AgentLoopManagerTQ": Manager,
            "AgentLoopWorkerTQ": actor,
        },
        "verl.utils.config": {"omega_conf_to_dataclass": lambda config: config},
    }
    for path, content in names.items():
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            parent = ".".join(parts[:n])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
        vars(sys.modules[path]).update(content)
    ours = "logitcask.engine.integrations.verl"
    yield importlib.import_module(ours)
    sys.modules.pop(ours)


@pytest.fixture(scope="module")
def stored(place: Path) -> StoredSequences:
    return StoredSequences(place / "store", k=K)


def config_of(place: Path, *, k: int | None = K, **settings: Any) -> Any:
    """Return the part of verl's configuration that is read; k: None = a loss without a top-k."""
    loss = SimpleNamespace(
        topk=k,
        loss_settings=SimpleNamespace(use_topk=k is not None),
        use_task_rewards=False,
    )
    return SimpleNamespace(
        data={"logitcask": {"store": str(place / "store"), **settings}},
        distillation=SimpleNamespace(
            enabled=True, teacher_models={"default": None}, distillation_loss=loss
        ),
    )


def ask(worker: Any, prompt: Any, response: Any, **more: Any) -> dict[str, Any]:
    output = SimpleNamespace(extra_fields={}, multi_modal_data=more.pop("media", {}))
    arguments = (output, list(prompt), list(response), more.get("validate", False))
    asyncio.run(worker._compute_teacher_logprobs(*arguments))
    return output.extra_fields


def test_a_row_of_data_becomes_its_stored_response_and_scores(
    place: Path, verl: Any, stored: StoredSequences
) -> None:
    config = config_of(place)
    data = verl.StoreDataset("not read", None, config.data)
    worker = verl.StoreAgentLoopWorker(config, None)
    assert worker.teacher_client == {"default": None}
    loop = verl.StoreAgentLoop()
    loop.config = config
    loop.rollout_config = SimpleNamespace(prompt_length=64, response_length=8)
    assert len(data) == len(stored) == 8
    for number in range(len(data)):
        found = stored[number]
        output = asyncio.run(loop.run({"logprobs": True}, **data[number]))
        assert [*output.prompt_ids, *output.response_ids] == found.ids.tolist()
        assert output.response_mask == [1] * len(output.response_ids)
        assert np.allclose(output.response_logprobs, found.behavior_logprobs)
        fields = ask(worker, output.prompt_ids, output.response_ids)
        ids, logprobs = fields["teacher_ids"], fields["teacher_logprobs"]
        assert (ids.dtype, ids.shape) == (torch.int32, (len(found.ids), K))
        rows = slice(found.prompt - 1, -1)
        assert ids[rows].tolist() == found.topk_ids.tolist()
        assert torch.equal(logprobs[rows], torch.from_numpy(found.topk_logprobs))
        assert not logprobs[: found.prompt - 1].any()
        assert not logprobs[-1].any()
    assert ask(worker, [1], [2], validate=True) == {}

    loop.rollout_config.response_length = 1
    with pytest.raises(ConfigError, match="rollout.response_length is 1"):
        asyncio.run(loop.run({}, **data[0]))
    loop.rollout_config.response_length = 8
    config.distillation.distillation_loss.use_task_rewards = True
    with pytest.raises(ConfigError, match="no rewards"):
        asyncio.run(loop.run({}, **data[0]))
    with pytest.raises(ConfigError, match="no stored responses"):
        asyncio.run(loop.run({}, raw_prompt=[]))


def test_sampled_token_losses_get_the_log_prob_of_the_next_token(
    place: Path, verl: Any, stored: StoredSequences
) -> None:
    worker = verl.StoreAgentLoopWorker(config_of(place, k=None), None)
    found = stored[2]
    fields = ask(worker, found.ids[: found.prompt], found.ids[found.prompt :])
    rows = slice(found.prompt - 1, -1)
    assert fields["teacher_ids"][rows, 0].tolist() == found.ids[found.prompt :].tolist()
    assert fields["teacher_logprobs"][rows, 0].tolist() == found.teacher_logprobs.tolist()


def test_a_new_sequence_is_refused_or_goes_to_the_same_teacher(
    place: Path, verl: Any, stored: StoredSequences
) -> None:
    strict = verl.StoreAgentLoopWorker(config_of(place), None)
    with pytest.raises(IncompleteError, match="these 3 token ids"):
        ask(strict, [1, 2], [3])
    with pytest.raises(ConfigError, match="images"):
        ask(strict, [1, 2], [3], media={"images": [0]})

    asyncio.run(strict.generate_sequences(([1, 2], [3])))
    with pytest.raises(IncompleteError, match="these 3 token ids"):
        asyncio.run(strict.generate_sequences(None))

    config = config_of(place, on_missing="teacher")
    with pytest.raises(ConfigError, match="no teacher to ask"):
        verl.StoreAgentLoopWorker(config, None)
    worker = verl.StoreAgentLoopWorker(config, None, {"default": "client"})
    assert ask(worker, [1, 2], [3]) == {"teacher_ids": "of the live teacher"}
    found = stored[0]
    parts = found.ids[: found.prompt], found.ids[found.prompt :]
    requests = []

    def live(ids: list[int], shift: float = 0.0) -> Any:
        requests.append(ids)
        rows = teacher_rows(found, found.prompt, K)
        return torch.from_numpy(rows[0]), torch.from_numpy(rows[1]) + shift

    worker.live = live
    for _ in range(2):
        assert ask(worker, *parts)["teacher_ids"].shape == (len(found.ids), K)
    assert requests == [found.ids.tolist()], "one check a worker"
    other = verl.StoreAgentLoopWorker(config, None, {"default": "client"})
    other.live = lambda ids: live(ids, 1.0)
    with pytest.raises(IdentityError, match="by 1 nats"):
        ask(other, *parts)
    nan = np.full((len(found.ids), K), np.nan, np.float32)
    with pytest.raises(IdentityError):
        check_same_teacher(teacher_rows(found, found.prompt, K)[1], nan, found)


def test_what_a_store_cannot_answer_is_refused(
    place: Path, verl: Any, stored: StoredSequences
) -> None:
    with pytest.raises(StoreError, match="begins at token 1,"):
        teacher_rows(stored[0], 1, K)
    with pytest.raises(ObjectiveError, match=f"at least {N_VOCAB}"):
        verl.StoreAgentLoopWorker(config_of(place, k=N_VOCAB + 1), None)
    config = config_of(place)
    config.distillation.teacher_models = {"a": None, "b": None}
    with pytest.raises(ConfigError, match="2 teachers"):
        verl.StoreAgentLoopWorker(config, None)
    for wrong, message in (
        ({}, "has the keys"),
        ({"store": "s", "teachers": "t"}, "teachers"),
        ({"store": "s", "on_missing": "zeros"}, "on_missing is 'zeros'"),
    ):
        with pytest.raises(ConfigError, match=message):
            StoreSettings.of({"logitcask": wrong})


def test_ids_of_equal_hash_are_compared_whole(
    stored: StoredSequences, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setattr(
        "logitcask.engine.integrations.sequences._hash", lambda ids: np.uint64(len(ids) % 2)
    )
    crowded = StoredSequences(place / "store", k=K)
    for number in range(len(stored)):
        found = crowded.find(stored[number].ids)
        assert found is not None
        assert found.ids.tolist() == stored[number].ids.tolist()
        assert number in crowded.of_prompt(found.ids[: found.prompt])
    assert crowded.find(stored[0].ids[:-1]) is None
    assert crowded.of_prompt(stored[0].ids) == []
