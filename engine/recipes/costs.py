"""Costs of a whole configuration, such as a pair of the paper, without its models."""

from typing import Any

from logitcask.engine.config.cost import Cost
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.estimate.cost import Work, costs, describe, model_hours
from logitcask.engine.estimate.requests import store_requests
from logitcask.engine.estimate.sizes import find_size
from logitcask.engine.rollout.unit import default_unit


def recipe_costs(config: RunConfig, cost: Cost) -> dict[str, Any]:
    """Return the costs of all rounds of a loop, as `store estimate --response-tokens` has them.

    Without cost.response_tokens every response has rollout.max_new_tokens: an upper bound. The
    store keeps the rollouts of all rounds, so `cost.runs` trainings after the loop's own read them.
    Raises ModelError for a model whose size is not known.
    """
    rollout, loop = config.rollout, config.loop
    student = find_size(
        config.student.model,
        "student",
        parameters=cost.student_parameters,
        kv_bytes=cost.student_kv_bytes,
    )
    teacher = find_size(config.teacher.model, "teacher", parameters=cost.teacher_parameters)
    at_once = loop.prompts_per_round * rollout.n
    work = Work(
        sequences=loop.rounds * at_once,
        prompt_tokens=cost.prompt_tokens,
        response_tokens=float(cost.response_tokens or rollout.max_new_tokens),
        at_once=at_once,
        checkpointing=config.train.gradient_checkpointing,
    )
    hours = model_hours(work, student, teacher.parameters, cost)
    unit = config.rollout.unit_prompts or default_unit(rollout)
    found = costs(
        hours,
        cost,
        store_bytes=work.positions * cost.bytes_per_position,
        requests=store_requests(loop.rounds * -(-loop.prompts_per_round // unit)),
    )
    note = "runs share these rollouts; one more loop on policy samples and scores again"
    return {**describe(work, hours, student, teacher, cost), **found, "note": note}
