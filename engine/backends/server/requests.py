"""A unit as questions to a fleet: every sequence is one request, many at once."""

import asyncio

from logitcask.engine.backends.returned import ResponseAssembler
from logitcask.engine.backends.scoring import asked_ids
from logitcask.engine.backends.server.capabilities import ServerFacts
from logitcask.engine.backends.server.client import Refused, ServerClient
from logitcask.engine.backends.server.pool import ServerPool
from logitcask.engine.backends.server.protocol import RequestBody
from logitcask.engine.errors import ConfigError, LogitcaskError
from logitcask.engine.types import IdLists, Rollouts, ScoreParams


def sheet_of(
    facts: ServerFacts,
    url: str,
    n_vocab: int,
    rollouts: Rollouts,
    request: ScoreParams,
    at: IdLists | None,
) -> ResponseAssembler:
    """What is to be filled. Raises as `asked_ids`, and ConfigError where more is asked than the
    server at `url` can answer."""
    if n_vocab < 1:
        raise ConfigError(
            "n_vocab of a served teacher is not set", hint="Set it from its tokenizer."
        )
    # A server samples one token more than it is asked about.
    context = facts.max_model_len - 1 if facts.max_model_len else 1 << 62
    at = asked_ids(rollouts, request, at, n_vocab=n_vocab, context=context)
    if request.entry_kind == "sampled":
        raise ConfigError(
            "a server cannot give ids drawn from the teacher's whole law",
            hint="Use the backend hf, or --selection top-p.",
        )
    if at is not None and not facts.at_ids:
        raise ConfigError(
            f"{url} cannot answer at chosen ids: {facts.why}",
            hint="Serve with vLLM 0.31 or newer on a GPU with --enable-scale-out, use the "
            "backend hf, or score without (at_student=False).",
        )
    return ResponseAssembler(rollouts, request, at, n_vocab=n_vocab)


async def fill(
    fleet: ServerPool, facts: ServerFacts, rollouts: Rollouts, sheet: ResponseAssembler
) -> None:
    """Asks about every sequence, and again about those that a server answered which is away when
    all are told: nobody can find out any more whether it was the teacher still. Raises ServerError
    and AnswerError as `ServerPool.ask`, ConfigError for more log-probs than the servers allow."""
    lengths = rollouts.lengths()
    k = min(sheet.request.k_max, sheet.n_vocab)
    widest = 0 if sheet.at_cnt is None else int(sheet.at_cnt.max(initial=0))

    told: dict[int, ServerClient] = {}

    async def one(sequence: int) -> None:
        prompt = rollouts.prompts[int(rollouts.seq_prompt[sequence])]
        response = sheet.tokens[sheet.rows(sequence)].tolist()
        question = RequestBody(
            ids=[*prompt.token_ids, *response],
            rows=len(response),
            k=k,
            at=sheet.asked(sequence),
        )
        try:
            told[sequence] = await fleet.ask(
                question,
                facts.path,
                facts.served,
                check=lambda answer: sheet.write(sequence, answer),
            )
        except Refused as refusal:
            raise too_much(refusal, k, widest) from refusal
        except LogitcaskError as error:
            raise type(error)(
                f"prompt {prompt.id!r}, sequence {sequence}: {error.cause}", hint=error.hint
            ) from error

    left = [sequence for sequence in range(len(lengths)) if lengths[sequence] > 0]
    while left:
        async with asyncio.TaskGroup() as group:
            for sequence in left:
                group.create_task(one(sequence))
        if len(fleet.links) == 1:
            break
        await asyncio.gather(*map(fleet.check, set(told.values())))
        left = [sequence for sequence, link in told.items() if not link.up]
    fleet.answered |= {link.url for link in told.values()}


def too_much(refusal: Refused, k: int, widest: int) -> LogitcaskError:
    """vLLM caps log-probs a position, at 20 unless told otherwise, and says so in words. It counts
    the best ids and those that are asked at each for themselves."""
    said = refusal.cause.lower()
    if refusal.status != 400 or "logprob" not in said or "max" not in said:
        return refusal
    needed = max(k, widest)
    lists = f" and {widest} chosen ids" if widest else ""
    less = (
        "ask with a smaller --teacher-topk-max (and --teacher-topk-min): 20 is "
        "the cap of a server that was told none"
    )
    if widest > k:
        less = "ask at fewer ids (--extra-ids, the --teacher-topk-max of the scores it names)"
    return ConfigError(
        f"{needed} log-probs per position (k_max = {k}{lists}) are more than the server allows: "
        f"{refusal.cause}",
        hint=f"Start it with --max-logprobs {needed} or more, or {less}.",
    )
