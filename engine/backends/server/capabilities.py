"""What a server can do, judged by what its answers hold: unknown fields are ignored in silence."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from logitcask.engine.backends.server.client import Refused, ServerClient
from logitcask.engine.backends.server.protocol import COMPLETIONS, GENERATE, RequestBody, parse
from logitcask.engine.errors import AnswerError, IdentityError, ServerError
from logitcask.engine.types import IdLists

ABSENT = (403, 404, 405, 501)
PROBE_IDS = (2, 1, 0)
"""Any three ids that every model has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFacts:
    """Who a server is and what it offers; servers of one teacher agree, and one that comes back."""

    served: str
    """The name that it has for the model."""
    root: str
    """What it was loaded from; empty where it does not say."""
    parent: str
    """The base model, where an adapter is served."""
    version: str
    """Of vLLM; empty where it does not say."""
    fingerprint: str
    """system_fingerprint of its answers: a hash of its flags, or what its operator declares."""
    max_model_len: int
    """Tokens; a sequence may have one less. 0 where it does not say."""
    path: str
    """Where it is asked: GENERATE, or COMPLETIONS where that is absent."""
    at_ids: bool
    """It answers at chosen ids."""
    why: str
    """Why not, in the server's words; empty where it does."""


async def facts_of(link: ServerClient, served: str) -> ServerFacts:
    """Asks a server. Raises Transient, ServerError for what it refuses, IdentityError where it does
    not serve `served`."""
    await link.look()
    card = await _of_card(link, served)
    name = card["served"]
    version = await _optional(link, "/version")
    path, at_ids, why = await _paths(link, name)
    return ServerFacts(
        **card,
        version=link.hidden(str(version.get("version", ""))) if isinstance(version, dict) else "",
        fingerprint=await _fingerprint(link, name),
        path=path,
        at_ids=at_ids,
        why=why,
    )


def check_same(expected: ServerFacts, found: ServerFacts, url: str) -> None:
    """IdentityError naming the first fact in which a server differs from what was known."""
    for each in fields(ServerFacts):
        theirs, ours = getattr(found, each.name), getattr(expected, each.name)
        if each.name != "why" and theirs != ours:
            raise IdentityError(
                f"{url}: {each.name} is {theirs!r}, and was {ours!r}",
                hint="Serve what was served, with the same flags on all servers of a teacher; or "
                "run the command again for the teacher that is there now.",
            )


async def check_card(link: ServerClient, known: ServerFacts) -> None:
    """The one question that costs nothing. Raises IdentityError for another model, source, adapter
    or context than is known, and Transient and ServerError as `facts_of`."""
    said = await _of_card(link, known.served)
    check_same(known, replace(known, **said), link.url)


async def _of_card(link: ServerClient, served: str) -> dict[str, Any]:
    cards = await _cards(link)
    card = _chosen(cards, served, link)
    # An adapter's own says nothing of its length.
    longest = [each for each in cards if each["id"] == card.get("parent")] or [card]
    source = _source(card)
    link.names = {card["id"]}
    if source:
        link.names |= {each["id"] for each in cards if _source(each) == source}
    return {
        "served": card["id"],
        "root": link.hidden(str(card.get("root") or "")),
        "parent": link.hidden(str(card.get("parent") or "")),
        "max_model_len": _whole(card.get("max_model_len") or longest[0].get("max_model_len")),
    }


async def _cards(link: ServerClient) -> list[dict[str, Any]]:
    said = await link.get("/v1/models")
    listed = said.get("data") if isinstance(said, dict) else None
    cards = listed if isinstance(listed, list) else []
    return [c for c in cards if isinstance(c, dict) and isinstance(c.get("id"), str)]


def _chosen(cards: list[dict[str, Any]], served: str, link: ServerClient) -> dict[str, Any]:
    """The entry of /v1/models that is asked for, or the only model that is no adapter: it may have
    several names."""
    # An adapter is only ever scored with by name.
    wanted = [c for c in cards if (c["id"] == served if served else not c.get("parent"))]
    models = {_source(card) or card["id"] for card in wanted}
    if len(models) != 1:
        what = f"no model {served!r}" if served else f"{len(models)} models"
        names = link.hidden(", ".join(card["id"] for card in cards))
        raise IdentityError(
            f"{link.url} serves {what}; its models: {names or 'none'}",
            hint="Give one of these with --served.",
        )
    return wanted[0]


def _source(card: dict[str, Any]) -> str:
    """What a model was loaded from, which all its names share; empty for an adapter, and where it
    is not said."""
    return "" if card.get("parent") else str(card.get("root") or "")


async def _paths(link: ServerClient, served: str) -> tuple[str, bool, str]:
    """(path, at_ids, why not)."""
    ids = list(PROBE_IDS)
    at = IdLists(cnt=np.array([1, 1], np.uint16), ids=np.array([0, 1], np.uint32))
    asked = RequestBody(ids=ids, rows=2, k=1, at=at)
    plain = RequestBody(ids=ids, rows=2, k=1)
    try:
        await _put(link, asked, GENERATE, served)
    except Refused as refusal:
        if refusal.status in ABSENT:
            await _put(link, plain, COMPLETIONS, served)
            return COMPLETIONS, False, refusal.cause
        why = refusal.cause
    except AnswerError as error:
        why = link.hidden(error.cause)
    else:
        return GENERATE, True, ""
    await _put(link, plain, GENERATE, served)
    return GENERATE, False, why


async def _put(link: ServerClient, question: RequestBody, path: str, served: str) -> None:
    body = question.body(path, served)
    data = await link.post(
        path, body, most=question.most_bytes(), expected=question.expected_bytes(), tokens=3
    )
    question.read(path, link.names, data)


async def _fingerprint(link: ServerClient, served: str) -> str:
    body = {"model": served, "prompt": list(PROBE_IDS), "max_tokens": 1, "temperature": 0.0}
    try:
        data = await link.post(COMPLETIONS, body, most=1 << 20, expected=1024, tokens=3)
    except ServerError:
        return ""
    return link.hidden(str(parse(data).get("system_fingerprint") or ""))


async def tokens_of(link: ServerClient, text: str, served: str) -> list[int] | None:
    """A text's ids; None where the server does not tell. Raises Transient."""
    body = {"model": served, "prompt": text, "add_special_tokens": False}
    try:
        data = await link.post("/tokenize", body, most=1 << 20, expected=1024, tokens=100)
        found = parse(data).get("tokens")
    except (ServerError, AnswerError):
        return None
    return found if isinstance(found, list) and all(type(id_) is int for id_ in found) else None


async def _optional(link: ServerClient, path: str) -> Any:
    try:
        return await link.get(path)
    except ServerError:
        return None


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def hosts(urls: Sequence[str]) -> str:
    """For lineage: where a teacher was, without schemes."""
    return ",".join(url.partition("://")[2] for url in urls)
