"""Identity and capabilities of a server, from its answers: it silently ignores unknown fields."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from logitcask.engine.backends.server.client import RequestRejected, ServerClient
from logitcask.engine.backends.server.protocol import (
    COMPLETIONS,
    GENERATE,
    RequestBody,
    parse,
    words_of,
)
from logitcask.engine.backends.server.sglang import SGLANG
from logitcask.engine.errors import AnswerError, IdentityError, ServerError
from logitcask.engine.types import IdLists

MODEL_INFO = ("/model_info", "/get_model_info")
"""Of SGLang, newer and older versions."""
SERVER_INFO = ("/server_info", "/get_server_info")
ABSENT = (403, 404, 405, 501)
PROBE_IDS = (2, 1, 0)
"""Any three ids that every model has."""
Engine = Literal["auto", "vllm", "sglang"]
"""auto: as the server's /v1/models says; an owner other than sglang is vLLM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """Identity and capabilities of a server; equal for all servers of one teacher."""

    served: str
    """Its name of the model."""
    root: str
    """Path or hub id of the weights; empty if unknown."""
    parent: str
    """The base model of a served adapter."""
    version: str
    """Of vLLM or SGLang; empty if unknown."""
    fingerprint: str
    """vLLM: system_fingerprint of its answers, a hash of its flags or the operator's text. SGLang:
    its weight_version, empty if it was never set.
    """
    max_model_len: int
    """Tokens; a sequence may have one less. 0 if unknown."""
    path: str
    """GENERATE, or COMPLETIONS on servers without it; SGLANG."""
    at_ids: bool
    """It returns log-probs at chosen ids."""
    why: str
    """The server's reason if it does not."""

    @property
    def engine(self) -> Literal["vllm", "sglang"]:
        return "sglang" if self.path == SGLANG else "vllm"

    @property
    def at_ids_hint(self) -> str:
        """Return what a server needs to answer at chosen ids."""
        if self.engine == "sglang":
            return "serve with a newer SGLang, whose /generate takes token_ids_logprob"
        return "serve with vLLM 0.32 or newer on a GPU with --enable-scale-out --max-logprobs 256"


async def fetch_info(client: ServerClient, served: str, engine: Engine = "auto") -> ServerInfo:
    """Query a server. Raises Transient, ServerError for a rejected request, IdentityError if it
    does not serve `served`.
    """
    await client.check_health()
    card, is_sglang = await _read_card(client, served, engine)
    name = card["served"]
    version = await _first_of(client, *(SERVER_INFO if is_sglang else ("/version",)))
    path, at_ids, why = await (_sglang_paths if is_sglang else _paths)(client, name)
    if not is_sglang:
        card["fingerprint"] = await _fingerprint(client, name)
    return ServerInfo(
        **card,
        version=client.redact(str(version.get("version", ""))),
        path=path,
        at_ids=at_ids,
        why=why,
    )


def check_same(expected: ServerInfo, found: ServerInfo, url: str) -> None:
    """Raise IdentityError with the first field that differs from the expected one."""
    for each in fields(ServerInfo):
        theirs, ours = getattr(found, each.name), getattr(expected, each.name)
        if each.name != "why" and theirs != ours:
            raise IdentityError(
                f"{url}: {each.name} is {theirs!r}, and was {ours!r}",
                hint="serve the same model with the same flags on all servers of a teacher, or run "
                "the command again for the teacher that is served now",
            )


async def check_card(client: ServerClient, known: ServerInfo) -> None:
    """Compare /v1/models, which costs nothing, with the known info; of SGLang its weights too.

    Raises IdentityError for another model, source, adapter or context, and Transient and
    ServerError as `fetch_info`.
    """
    card, _ = await _read_card(client, known.served, known.engine)
    check_same(known, replace(known, **card), client.url)


async def _read_card(
    client: ServerClient, served: str, engine: Engine
) -> tuple[dict[str, Any], bool]:
    """Return (fields of ServerInfo, the server is SGLang)."""
    cards = await _cards(client)
    card = _chosen(cards, served, client)
    # The entry of an adapter has no length.
    longest = [each for each in cards if each["id"] == card.get("parent")] or [card]
    source = _source(card)
    client.names = {card["id"]}
    if source:
        client.names |= {each["id"] for each in cards if _source(each) == source}
    found: dict[str, Any] = {
        "served": card["id"],
        "root": client.redact(str(card.get("root") or "")),
        "parent": client.redact(str(card.get("parent") or "")),
        "max_model_len": _whole(card.get("max_model_len") or longest[0].get("max_model_len")),
    }
    if engine == "vllm" or (engine == "auto" and card.get("owned_by") != "sglang"):
        return found, False
    if card.get("parent"):
        raise IdentityError(
            f"{client.url}: {card['id']!r} is an adapter, and requests to SGLang go to its base "
            "model only",
            hint="merge the adapter into the weights, or serve it with vLLM",
        )
    # The root of SGLang's /v1/models is the served name again.
    model = await _first_of(client, *MODEL_INFO)
    weights = str(model.get("weight_version") or "")
    found["root"] = client.redact(str(model.get("model_path") or ""))
    found["fingerprint"] = client.redact("" if weights == "default" else weights)
    return found, True


async def _cards(client: ServerClient) -> list[dict[str, Any]]:
    answer = await client.get("/v1/models")
    listed = answer.get("data") if isinstance(answer, dict) else None
    cards = listed if isinstance(listed, list) else []
    if isinstance(answer, dict) and not cards and (words := words_of(answer)):
        raise ServerError(
            f"{client.url}/v1/models answers with an error: {client.one_line(words)}",
            hint="check the URL: it must be that of an OpenAI-compatible server",
        )
    return [c for c in cards if isinstance(c, dict) and isinstance(c.get("id"), str)]


def _chosen(cards: list[dict[str, Any]], served: str, client: ServerClient) -> dict[str, Any]:
    """Return the entry of /v1/models named `served`, or of the only model that is not an adapter.

    A model may have several names. An adapter must be named.
    """
    matching = [c for c in cards if (c["id"] == served if served else not c.get("parent"))]
    models = {_source(card) or card["id"] for card in matching}
    if len(models) != 1:
        what = f"no model {served!r}" if served else f"{len(models)} models"
        names = client.redact(", ".join(card["id"] for card in cards))
        raise IdentityError(
            f"{client.url} serves {what}; its models: {names or 'none'}",
            hint="give one of these with --served",
        )
    return matching[0]


def _source(card: dict[str, Any]) -> str:
    """Return the source of a model's weights; empty for an adapter, or if unknown."""
    return "" if card.get("parent") else str(card.get("root") or "")


async def _paths(client: ServerClient, served: str) -> tuple[str, bool, str]:
    """Return (path, at_ids, reason why not)."""
    ids = list(PROBE_IDS)
    extra_ids = IdLists(cnt=np.array([1, 1], np.uint16), ids=np.array([0, 1], np.uint32))
    chosen = RequestBody(ids=ids, rows=2, k=1, extra_ids=extra_ids)
    plain = RequestBody(ids=ids, rows=2, k=1)
    try:
        await _put(client, chosen, GENERATE, served)
    except RequestRejected as rejection:
        if rejection.status in ABSENT:
            await _put(client, plain, COMPLETIONS, served)
            return COMPLETIONS, False, rejection.cause
        why = rejection.cause
    except AnswerError as error:
        why = client.one_line(error.cause)
    else:
        return GENERATE, True, ""
    await _put(client, plain, GENERATE, served)
    return GENERATE, False, why


async def _sglang_paths(client: ServerClient, served: str) -> tuple[str, bool, str]:
    """Return what `_paths` does, of an SGLang server."""
    ids = list(PROBE_IDS)
    extra_ids = IdLists(cnt=np.array([1, 1], np.uint16), ids=np.array([0, 1], np.uint32))
    plain = RequestBody(ids=ids, rows=2, k=1)
    await _put(client, plain, SGLANG, served)
    try:
        await _put(client, replace(plain, extra_ids=extra_ids), SGLANG, served)
    except (RequestRejected, AnswerError) as error:
        return SGLANG, False, client.one_line(error.cause)
    return SGLANG, True, ""


async def _put(client: ServerClient, request: RequestBody, path: str, served: str) -> None:
    body = request.to_json(path, served)
    data = await client.post(
        path, body, most=request.most_bytes(path), expected=request.expected_bytes(path), tokens=3
    )
    request.read(path, client.names, data)


async def _fingerprint(client: ServerClient, served: str) -> str:
    body = {"model": served, "prompt": list(PROBE_IDS), "max_tokens": 1, "temperature": 0.0}
    try:
        data = await client.post(COMPLETIONS, body, most=1 << 20, expected=1024, tokens=3)
    except ServerError:
        return ""
    return client.redact(str(parse(data).get("system_fingerprint") or ""))


async def tokenize(client: ServerClient, text: str, served: str) -> list[int] | None:
    """Return the token ids of a text; None if the server cannot tokenize. Raises Transient."""
    body = {"model": served, "prompt": text, "add_special_tokens": False}
    try:
        data = await client.post("/tokenize", body, most=1 << 20, expected=1024, tokens=100)
        found = parse(data).get("tokens")
    except (ServerError, AnswerError):
        return None
    return found if isinstance(found, list) and all(type(id_) is int for id_ in found) else None


async def _first_of(client: ServerClient, *paths: str) -> dict[str, Any]:
    """Return the object of the first path that a server has; an empty one if it has none."""
    for path in paths:
        try:
            found = await client.get(path)
        except ServerError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


def hosts(urls: Sequence[str]) -> str:
    """Return the hosts of a teacher for the provenance, without schemes."""
    return ",".join(url.partition("://")[2] for url in urls)
