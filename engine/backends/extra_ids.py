"""Chosen ids of a request, checked against a scorer; without torch, for servers and their tap."""

import numpy as np

from logitcask.engine.errors import ConfigError, IdentityError, ModelError
from logitcask.engine.types import IdLists, Rollouts, ScoreParams


def resolve_extra_ids(
    rollouts: Rollouts,
    request: ScoreParams,
    extra_ids: IdLists | None,
    *,
    n_vocab: int,
    context: int,
) -> IdLists | None:
    """Return extra_ids, or the ids of the student's list if the request has at_student.

    Raises IdentityError for ids outside the scorer's n_vocab, ModelError for sequences beyond its
    context, ConfigError if the request has at_student and the rollouts hold no ids of the student.
    """
    if request.at_student and extra_ids is None:
        student = rollouts.student
        if student is None:
            raise ConfigError(
                "at_student=True, and these rollouts hold no ids of the student",
                hint="let the student score its rollouts first, or set at_student=False",
            )
        extra_ids = IdLists(cnt=student.cnt, ids=student.ids)
    of_prompts = [np.array(p.token_ids) for p in rollouts.prompts]
    seen = [rollouts.tokens, *of_prompts, *([] if extra_ids is None else [extra_ids.ids])]
    highest = max((int(ids.max()) for ids in seen if len(ids)), default=0)
    if highest >= n_vocab:
        raise IdentityError(
            f"the rollouts hold the id {highest}, and the scorer has {n_vocab} ids",
            hint="score with a teacher that has the student's tokenizer",
        )
    of = rollouts.seq_prompt.astype(np.int64)
    total = np.array([len(p) for p in of_prompts])[of] + rollouts.lengths()
    if len(total) and total.max() > context:
        raise ModelError(
            f"a rollout has {total.max()} tokens, the scorer's context: {context}",
            hint="score with a model of longer context (--max-model-len of a server), or "
            "roll out shorter responses",
        )
    return extra_ids
