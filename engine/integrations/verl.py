"""verl 0.9.1 on the sequences of a store: the teacher's log-probs, and the responses themselves.

    +data.logitcask.store=./store
    +actor_rollout_ref.rollout.agent.agent_loop_manager_class=
        logitcask.engine.integrations.verl.StoreAgentLoopManager

verl's worker (AgentLoopWorker in verl/experimental/agent_loop/agent_loop.py) runs an agent loop for
each row of the data, and asks the teacher about prompt and response in `_compute_teacher_logprobs`.
Ours looks these ids up. On-policy responses never repeat, so the other half is StoreDataset: rows
that carry a stored response, which StoreAgentLoop returns in place of a sample.
"""

import asyncio
from typing import Any

import ray
import torch
from torch.utils.data import Dataset
from verl.experimental.agent_loop.agent_loop import (  # pyright: ignore[reportMissingImports]
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    register,
)
from verl.trainer.ppo.v1.agent_loop_tq import (  # pyright: ignore[reportMissingImports]
    AgentLoopManagerTQ,
    AgentLoopWorkerTQ,
)
from verl.utils.config import omega_conf_to_dataclass  # pyright: ignore[reportMissingImports]

from logitcask.engine.errors import ConfigError, IncompleteError, LogitcaskError
from logitcask.engine.integrations.verl_answers import (
    KEY,
    StoreSettings,
    check_same_teacher,
    teacher_rows,
)

LOOP = "logitcask"
"""Name of StoreAgentLoop in verl's registry, and column of the data that it reads."""


class StoreDataset(Dataset[dict[str, Any]]):
    """The sequences of a store as verl's training data, for `data.custom_cls`.

    data.custom_cls.path=pkg://logitcask.engine.integrations.verl
    data.custom_cls.name=StoreDataset
    """

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, **_: Any) -> None:
        """Open the store of `config.logitcask`; verl gives the rest, which is not read."""
        self._stored = StoreSettings.of(config).open(0)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row in the form of verl's RLHFDataset, and the stored response."""
        found = self._stored[int(index)]
        behavior = found.behavior_logprobs
        return {
            # verl's rewards and traces read a conversation; ids are all that is stored.
            "raw_prompt": [{"role": "user", "content": ""}],
            "data_source": LOOP,
            "agent_name": LOOP,
            "index": int(index),
            "extra_info": {"index": int(index)},
            "reward_model": {"ground_truth": ""},
            "dummy_tensor": torch.zeros(1, dtype=torch.uint8),
            LOOP: {
                "prompt_ids": found.ids[: found.prompt].tolist(),
                "response_ids": found.ids[found.prompt :].tolist(),
                "response_mask": found.mask.astype(int).tolist(),
                "response_logprobs": None if behavior[0] != behavior[0] else behavior.tolist(),
                "reward": found.reward,
            },
        }


@register(LOOP)
class StoreAgentLoop(AgentLoopBase):  # type: ignore[misc]
    """An agent loop that returns the response that its row carries, and asks no server."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Return the stored prompt, response and loss mask.

        Raises ConfigError for a row without a response, for one longer than verl's limits, and for
        task rewards or sampling log-probs that the store does not have.
        """
        row = kwargs.get(LOOP)
        if row is None:
            raise ConfigError(
                "the data has no stored responses", hint="set data.custom_cls to StoreDataset"
            )
        for name in ("prompt", "response"):
            length, most = len(row[f"{name}_ids"]), getattr(self.rollout_config, f"{name}_length")
            if length > most:
                raise ConfigError(
                    f"a stored {name} has {length} tokens, and rollout.{name}_length is {most}",
                    hint=f"raise data.max_{name}_length",
                )
        logprobs = row["response_logprobs"] if sampling_params.get("logprobs") else None
        if sampling_params.get("logprobs") and logprobs is None:
            raise ConfigError(
                "these rollouts have no log-probs of their sampler",
                hint="set actor_rollout_ref.rollout.calculate_log_probs=False",
            )
        if row["reward"] is None and self.config.distillation.distillation_loss.use_task_rewards:
            raise ConfigError(
                "these rollouts have no rewards, and verl is to train on them",
                hint="set distillation.distillation_loss.use_task_rewards=False, or sample with "
                "--grader",
            )
        return AgentLoopOutput(
            prompt_ids=row["prompt_ids"],
            response_ids=row["response_ids"],
            response_mask=row["response_mask"],
            response_logprobs=logprobs,
            # Without task rewards none is read, but verl asks a reward function where it is None.
            reward_score=row["reward"] or 0.0,
            num_turns=2,
            metrics=AgentLoopMetrics(),
            extra_fields={"turn_scores": [], "tool_rewards": [], "reward_extra_info": {}},
        )


# `ray.remote` has made an actor of verl's class, from which none can inherit.
_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class StoreAgentLoopWorker(_Worker):  # type: ignore[misc]
    """A worker of verl whose teacher's log-probs come from a store."""

    def __init__(
        self, config: Any, llm_client: Any, teacher_client: Any = None, *rest: Any, **more: Any
    ) -> None:
        """Open the store.

        Raises ConfigError without distillation or for several teachers, and as StoredSequences.
        """
        distillation = omega_conf_to_dataclass(config.distillation)
        if not distillation.enabled or len(distillation.teacher_models) != 1:
            raise ConfigError(
                f"distillation.enabled is {distillation.enabled}, with "
                f"{len(distillation.teacher_models)} teachers",
                hint="set distillation.enabled=True, and one teacher: a store answers as one",
            )
        self._settings = StoreSettings.of(config.data)
        loss = distillation.distillation_loss
        self._k = int(loss.topk) if loss.loss_settings.use_topk else 0
        self._stored = self._settings.open(self._k)
        self._same_teacher = False
        self._failure: LogitcaskError | None = None
        if teacher_client is None:
            if self._settings.on_missing == "teacher":
                raise ConfigError(
                    "verl has no teacher to ask", hint=f'set data.{KEY}.on_missing="error"'
                )
            teacher_client = dict.fromkeys(distillation.teacher_models)
        super().__init__(config, llm_client, teacher_client, *rest, **more)

    async def generate_sequences(self, batch: Any) -> None:
        """Start the agent loops of a batch.

        Raises the error of an earlier batch: verl logs the error of a sample, pads the batch and
        trains on, so without this a wrong store would be a line in a log.
        """
        if self._failure is not None:
            raise self._failure
        await super().generate_sequences(batch)

    async def _run_agent_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._run_agent_loop(*args, **kwargs)
        except LogitcaskError as error:
            self._failure = error
            raise

    async def _compute_teacher_logprobs(
        self,
        output: AgentLoopOutput,
        prompt_ids: list[int],
        response_ids: list[int],
        validate: bool,
        sample_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Put the stored log-probs into output.extra_fields; see verl's method of this name.

        Raises IncompleteError for a sequence that is not in the store, unless `on_missing` is
        "teacher"; ConfigError for images and the like, which token ids do not name; IdentityError
        where the live teacher is not the stored one.
        """
        if validate:
            return
        if output.multi_modal_data:
            raise ConfigError(
                "a sequence has images, video or sound, which its token ids do not name",
                hint="use verl's own agent loop manager",
            )
        ids = [*prompt_ids, *response_ids]
        found = await asyncio.to_thread(self._stored.find, ids)
        if found is None:
            if self._settings.on_missing == "error":
                raise IncompleteError(
                    f"no sequence of {self._settings.store} has these {len(ids)} token ids",
                    hint="sampled responses are new ones: train on those of the store, "
                    f'StoreDataset, or ask the teacher too, data.{KEY}.on_missing="teacher"',
                )
            await super()._compute_teacher_logprobs(
                output, prompt_ids, response_ids, validate, sample_kwargs
            )
            return
        teacher_ids, logprobs = teacher_rows(found, len(prompt_ids), self._k)
        if self._settings.on_missing == "teacher" and not self._same_teacher:
            live = await self.teacher_server_manager.compute_teacher_logprobs_single(ids)
            check_same_teacher(logprobs, live[1].numpy(), found)
            self._same_teacher = True
        output.extra_fields["teacher_ids"] = torch.from_numpy(teacher_ids)
        output.extra_fields["teacher_logprobs"] = torch.from_numpy(logprobs)


class StoreAgentLoopManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager of agent loops, with workers that read a store."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(StoreAgentLoopWorker)
