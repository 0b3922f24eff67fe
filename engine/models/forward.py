"""The forward pass of a model, for sampling, scoring and training.

States, not logits: the head is applied to the rows that are needed. Sequences are batched in one of
three ways: padded on the right, padded on the left with a cache, or packed into one row without a
mask, where position ids that restart at 0 separate them. Each way is right for some models only,
see `check`.

LongRoPE (arXiv 2402.13753) has two sets of rotary factors, and transformers takes one for the whole
batch by its longest sequence. A row here always has the factors of its own prefix: the first
`rope_switch` rows of a longer sequence are computed from a cut copy of the sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from inspect import signature
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from logitcask.engine.models.attention import cuts_packs, pack_lengths

T = TypeVar("T")

NEVER = 1 << 62
"""Length that no sequence reaches."""


def inner_model(model: nn.Module) -> Any:
    """Return the transformers model, without LoRA's wrapper; adapters stay in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def backbone(model: nn.Module) -> Any:
    """Return the part of a model that maps ids to hidden states."""
    inner = inner_model(model)
    # Not get_decoder(): on multimodal models it would skip the embedding step. A text model that
    # is cut out of one may name a base model that it does not have (Llama 4).
    return inner.base_model if inner.base_model is not inner else inner.model


def inside_forward(
    module: nn.Module,
    run: Callable[..., T],
    *inputs: Tensor,
    wrapper: nn.Module | None = None,
) -> T:
    """Return run(*inputs), called as the forward of `module`, through `wrapper` if there is one.

    The hooks of both see an ordinary call: those that shard parameters gather them before it, and
    reduce their gradients after the backward pass. They may cast the inputs.
    """
    own = vars(module).get("forward")
    called: Any = module
    called.forward = run
    try:
        result: T = (wrapper or module)(*inputs)
    finally:
        if own is None:
            del called.forward
        else:
            called.forward = own
    return result


def states(
    model: nn.Module,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Any = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return the last hidden states [B, L, D].

    ids, positions: [B, L]; mask: [B, past + L]; None = without. A model without position ids does
    not get them. lengths: of the sequences of a pack, for an attention that cuts at them.
    """
    network = backbone(model)
    names = _names(network.__class__)
    inputs = {
        "attention_mask": mask,
        "position_ids": positions if "position_ids" in names else None,
        cache_name(network): cache,
    }
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if lengths is not None and "kwargs" in names and cuts_packs(inner_model(model)):
        inputs |= pack_lengths(lengths, ids.device)
    hidden: Tensor = network(input_ids=ids, use_cache=cache is not None, **inputs).last_hidden_state
    return hidden


def cache_name(network: Any) -> str:
    """Return the parameter of a network's forward for a cache; Mamba has its own."""
    names = _names(network.__class__)
    return "cache_params" if "cache_params" in names else "past_key_values"


@lru_cache
def _names(kind: Any) -> frozenset[str]:
    """Return the names of the parameters of a class's forward."""
    return frozenset(signature(kind.forward).parameters)


def new_cache(model: nn.Module) -> Any:
    """Return an empty cache of the layers of a model."""
    return DynamicCache(config=inner_model(model).config)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep the sequences `rows` [R] of a cache, in place."""
    # Not batch_select_indices: the layers of linear attention lack it.
    cache.reorder_cache(rows)


def rope_switch(config: Any) -> int:
    """Return the longest length with LongRoPE's short factors; NEVER for other models."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = parameters.values() if "rope_type" not in parameters else [parameters]
    lengths = [
        int(rope["original_max_position_embeddings"])
        for rope in each
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    return min(lengths, default=NEVER)


def cuts(length: int, switch: int) -> list[tuple[int, int, int]]:
    """Return (first row, end row, length of the input) of the passes that a sequence needs."""
    if length <= switch:
        return [(0, length, length)]
    return [(0, switch, switch), (switch, length, length)]


def sequence_states(model: nn.Module, sequences: Sequence[Tensor], *, packed: bool) -> list[Tensor]:
    """Return the states [L, D] of each sequence of ids [L], computed packed or padded."""
    switch = rope_switch(inner_model(model).config)
    pieces = [(i, *cut) for i, ids in enumerate(sequences) for cut in cuts(len(ids), switch)]
    found: dict[tuple[int, int], Tensor] = {}
    for long in (False, True):
        side = [piece for piece in pieces if (piece[3] > switch) is long]
        parts = [sequences[i][:length] for i, _, _, length in side]
        run = _packed if packed else _padded
        for (i, start, end, _), part in zip(side, run(model, parts) if parts else (), strict=True):
            found[i, start] = part[start:end]
    return [
        torch.cat([found[i, start] for start, _, _ in cuts(len(ids), switch)])
        for i, ids in enumerate(sequences)
    ]


def pack_states(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Sequence[int] = (),
    *,
    packed: bool,
) -> Tensor:
    """Return the states [L, D] of a pack, input_ids and position_ids [1, L].

    lengths: of its sequences; without them, those between the positions 0, which waits for a GPU.
    packed: in one row; else each sequence in a row of its own.
    """
    if not lengths:
        edges = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), input_ids.shape[1]]
        lengths = [end - start for start, end in pairwise(edges)]
    if packed and input_ids.shape[1] <= rope_switch(inner_model(model).config):
        return states(model, input_ids, positions=position_ids, lengths=lengths)[0]
    sequences = torch.split(input_ids[0], list(lengths))
    return torch.cat(sequence_states(model, sequences, packed=packed))


def _packed(model: nn.Module, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    lengths = [len(ids) for ids in sequences]
    positions = torch.cat([torch.arange(n, device=sequences[0].device) for n in lengths])
    ids = torch.cat(list(sequences))[None]
    packed = states(model, ids, positions=positions[None], lengths=lengths)[0]
    yield from torch.split(packed, lengths)


def _padded(model: nn.Module, sequences: Sequence[Tensor]) -> Iterator[Tensor]:
    ids, mask = right_padded(sequences)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    padded = states(model, ids, mask=mask, positions=positions)
    for row, sequence in zip(padded, sequences, strict=True):
        yield row[: len(sequence)]


def right_padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both [B, L] int64."""
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(each) for each in sequences], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return ids, mask.long()


def folded_head(model: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return (hidden [P, D], weight [V, D]) whose product is the output of the head.

    V may be padded beyond n_vocab. A bias becomes one more column of both.
    """
    head = inner_model(model).get_output_embeddings()
    weight: Tensor = head.weight
    bias = getattr(head, "bias", None)
    if bias is None:
        return hidden, weight
    ones = hidden.new_ones(len(hidden), 1)
    return torch.cat([hidden, ones], 1), torch.cat([weight, bias[:, None].to(weight)], 1)
