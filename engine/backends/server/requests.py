"""The requests of one work unit: one for each sequence, many in flight."""

import asyncio
from functools import partial

from logitcask.engine.backends.extra_ids import resolve_extra_ids
from logitcask.engine.backends.returned import ResponseAssembler
from logitcask.engine.backends.server.capabilities import ServerInfo
from logitcask.engine.backends.server.client import RequestRejected, ServerClient
from logitcask.engine.backends.server.pool import ServerPool
from logitcask.engine.backends.server.protocol import RequestBody
from logitcask.engine.errors import ConfigError, LogitcaskError
from logitcask.engine.types import IdLists, Rollouts, ScoreParams


def new_assembler(
    info: ServerInfo,
    url: str,
    n_vocab: int,
    rollouts: Rollouts,
    request: ScoreParams,
    extra_ids: IdLists | None,
) -> ResponseAssembler:
    """Return an empty assembler for the rollouts.

    Raises as `resolve_extra_ids`, and ConfigError for a request that the server at `url` cannot
    answer.
    """
    if n_vocab < 1:
        raise ConfigError(
            "n_vocab of a remote teacher is not set", hint="set it from its tokenizer"
        )
    # A server samples one token more than it is sent.
    context = info.max_model_len - 1 if info.max_model_len else 1 << 62
    extra_ids = resolve_extra_ids(rollouts, request, extra_ids, n_vocab=n_vocab, context=context)
    if request.entry_kind == "sampled":
        raise ConfigError(
            "a server cannot give ids drawn from the teacher's whole distribution",
            hint="use the backend hf, or --selection top-p",
        )
    if extra_ids is not None and not info.at_ids:
        raise ConfigError(
            f"{url} cannot answer at chosen ids: {info.why}",
            hint=f"{info.at_ids_hint}, use the backend hf, or score without (at_student=False)",
        )
    return ResponseAssembler(rollouts, request, extra_ids, n_vocab=n_vocab)


async def score_sequences(
    pool: ServerPool, info: ServerInfo, rollouts: Rollouts, assembler: ResponseAssembler
) -> None:
    """Request the scores of every sequence and write them to the assembler.

    Sequences of a server that is unavailable at the end are requested again: its fingerprint can
    no longer be checked. The parts of a sequence are requested one after another, so that each
    finds the one before it in the server's prefix cache. Raises ServerError and AnswerError as
    `ServerPool.send`, ConfigError for more log-probs than the servers allow.
    """
    lengths = rollouts.lengths()
    k = min(assembler.request.k_max, assembler.n_vocab)
    widest = 0 if assembler.extra is None else int(assembler.extra.cnt.max(initial=0))
    answered_by: dict[int, set[ServerClient]] = {}

    async def score_one(sequence: int) -> None:
        prompt = rollouts.prompts[int(rollouts.seq_prompt[sequence])]
        response = assembler.tokens[assembler.rows(sequence)].tolist()
        body = RequestBody(
            ids=[*prompt.token_ids, *response],
            rows=len(response),
            k=k,
            extra_ids=assembler.extra_ids(sequence),
        )
        answered_by[sequence] = set()
        try:
            for rows, part in body.parts(info.path):
                write = partial(assembler.write, sequence, part=rows)
                client = await pool.send(part, info.path, info.served, check=write)
                answered_by[sequence].add(client)
        except RequestRejected as rejection:
            raise explain_cap(rejection, k, widest) from rejection
        except LogitcaskError as error:
            raise type(error)(
                f"prompt {prompt.id!r}, sequence {sequence}: {error.cause}", hint=error.hint
            ) from error

    left = [sequence for sequence in range(len(lengths)) if lengths[sequence] > 0]
    while left:
        async with asyncio.TaskGroup() as group:
            for sequence in left:
                group.create_task(score_one(sequence))
        if len(pool.clients) == 1:
            break
        await asyncio.gather(*map(pool.recheck, set().union(*answered_by.values())))
        left = [
            sequence
            for sequence, clients in answered_by.items()
            if not all(client.healthy for client in clients)
        ]
    pool.answered |= {client.url for client in set().union(*answered_by.values())}


def explain_cap(rejection: RequestRejected, k: int, widest: int) -> LogitcaskError:
    """Return a ConfigError for a rejection by --max-logprobs, or the rejection itself.

    vLLM caps log-probs a position, at 20 by default. It counts best ids and chosen ids separately.
    """
    text = rejection.cause.lower()
    if rejection.status != 400 or "logprob" not in text or "max" not in text:
        return rejection
    needed = max(k, widest)
    lists = f" and {widest} chosen ids" if widest else ""
    less = "give a smaller --teacher-topk-max (and --teacher-topk-min); a server's default is 20"
    if widest > k:
        less = "give fewer ids (--extra-ids, the --teacher-topk-max of the scores that it names)"
    return ConfigError(
        f"{needed} log-probs per position (k_max = {k}{lists}) are more than the server allows: "
        f"{rejection.cause}",
        hint=f"start it with --max-logprobs {needed} or more, or {less}",
    )
