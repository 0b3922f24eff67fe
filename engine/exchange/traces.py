"""Episodes of prime-rl -> sequences: one for each path of a graph of messages.

prime-rl writes what `Episode.to_record` of verifiers returns (verifiers/v1/episode.py, graph.py):
a line has traces, and a trace has nodes, each one message with its parent and the ids that it adds.
The ids of the nodes from a root to a leaf are the ids that the model saw and drew.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from logitcask.engine.exchange.imported import (
    Imported,
    ids_in,
    logprobs_in,
    mask_in,
    number_in,
    sequence,
)
from logitcask.engine.prompts.lines import Line, kind

AS_WRITTEN = "give the file as prime-rl wrote it"
ATTEMPT = "compaction_attempt"
"""Type of the link to a leaf that is of use only if a link "compaction" leads from it."""


def read_episode(line: Line, seen: set[str]) -> Iterator[Imported | None]:
    """Yield the sequences of an episode; None for each path and trace without an id that counts.

    As in prime-rl's own training, a message on several paths counts on the first one alone, and
    traces that failed, or whose agent is not trained, do not count.
    seen: ids of the episodes before; this one is added. Raises PromptError.
    """
    episode = line.keys.get("id")
    if episode is not None:
        if line.string("id", episode) in seen:
            line.refuse(
                f"the episode {episode!r:.80} comes twice: `all` and `effective` hold the same",
                "give one of them: rollouts/step_*/train/effective",
            )
        seen.add(episode)
    version = _version(line)
    for place, trace in enumerate(_objects(line, "traces", line.keys["traces"])):
        at = f"traces[{place}]"
        agent = trace.get("agent")
        if trace.get("ok") is False or (
            isinstance(agent, dict) and agent.get("trainable") is False
        ):
            yield None
            continue
        yield from _paths(line, at, trace, version=version, reward=_reward(line, at, trace))


def _paths(
    line: Line, at: str, trace: Mapping[str, Any], **fields: Any
) -> Iterator[Imported | None]:
    nodes = _objects(line, f"{at}.nodes", trace.get("nodes"))
    parents = [_parent(line, f"{at}.nodes[{i}]", node, i) for i, node in enumerate(nodes)]
    tokens = [_tokens(line, f"{at}.nodes[{i}]", node) for i, node in enumerate(nodes)]
    links = [
        _objects(line, f"{at}.nodes[{i}].semantic_parents", node.get("semantic_parents") or [])
        for i, node in enumerate(nodes)
    ]
    resumed = {
        link.get("node") for each in links for link in each if link.get("type") == "compaction"
    }
    counted = set[int]()
    for leaf in sorted(set(range(len(nodes))) - set(parents)):
        if leaf not in resumed and any(link.get("type") == ATTEMPT for link in links[leaf]):
            yield None
            continue
        ids, mask, logprobs = list[int](), list[int](), list[float | None]()
        for i in _path(parents, leaf):
            of_ids, of_mask, of_logprobs = tokens[i]
            ids += of_ids
            mask += [0] * len(of_ids) if i in counted else of_mask
            logprobs += of_logprobs
            counted.add(i)
        yield sequence(line, ids=ids, mask=mask, logprobs=logprobs, **fields)


def _path(parents: Sequence[int | None], leaf: int) -> list[int]:
    """Return the nodes from the root to a leaf."""
    path, node = list[int](), parents[leaf]
    path.append(leaf)
    while node is not None:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _tokens(
    line: Line, at: str, node: Mapping[str, Any]
) -> tuple[list[int], list[int], list[float | None]]:
    """Return ids, mask and log-probs of a node; the file has log-probs of sampled ids alone."""
    found = node.get("token_ids")
    ids = [] if found in (None, []) else ids_in(line, f"{at}.token_ids", found)
    mask = mask_in(line, f"{at}.mask", node.get("mask", []), len(ids))
    given = node.get("logprobs")
    logprobs: list[float | None] = [None] * len(ids)
    if given not in (None, []):
        own = iter(logprobs_in(line, f"{at}.logprobs", given, sum(mask)))
        logprobs = [next(own) if on else None for on in mask]
    return ids, mask, logprobs


def _parent(line: Line, at: str, node: Mapping[str, Any], place: int) -> int | None:
    parent = node.get("parent")
    if parent is not None and (type(parent) is not int or not 0 <= parent < place):
        line.refuse(f'field "{at}.parent": {parent!r:.80} is no node before this one', AS_WRITTEN)
    return parent


def _reward(line: Line, at: str, trace: Mapping[str, Any]) -> float | None:
    """Return the sum of score times weight, as `Trace.reward` of verifiers; None without any."""
    rewards = trace.get("rewards") or {}
    if not isinstance(rewards, dict) or not all(isinstance(e, dict) for e in rewards.values()):
        line.refuse(f'field "{at}.rewards": no object of {{"score", "weight"}}', AS_WRITTEN)
    parts = [
        number_in(line, f"{at}.rewards.{name}.score", each.get("score"))
        * number_in(line, f"{at}.rewards.{name}.weight", each.get("weight", 1.0))
        for name, each in rewards.items()
    ]
    return sum(parts) if parts else None


def _version(line: Line) -> int | None:
    """Return the version of the policy of the whole episode; None where it changed inside."""
    value: Any = line.keys
    for key in ("run", "work", "policy"):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.get("start") != value.get("end"):
        return None
    version = value.get("start")
    if type(version) is not int or not 0 <= version < 1 << 63:
        line.refuse(f'field "run.work.policy.start": {version!r:.80} is no count', AS_WRITTEN)
    return version


def _objects(line: Line, field: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        found = kind(value) if not isinstance(value, list) else "a list of other values"
        line.refuse(f'field "{field}": {found}, not a list of objects', AS_WRITTEN)
    return value
