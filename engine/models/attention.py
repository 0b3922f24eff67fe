"""Attention of packs: each sequence by itself, without a mask over the whole pack.

transformers separates the sequences of a pack by a mask [L, L], of which a pack of n sequences
needs one part in n. Two functions are registered with its attention interface instead, one on top
of each ordinary implementation:

    packed_sdpa     a pack: one call of sdpa a sequence; anything else: as sdpa
    packed_eager    a pack: the model's own eager function, which knows its soft cap and its sinks,
                    in blocks of queries; anything else: as eager

A sliding window is computed in blocks of queries against the keys that they see. So time and
memory are linear in the length of a pack, and those of a window in the length of a sequence. The
lengths come with the pack and are on the host, so that no layer waits for a GPU; without them, the
cuts are the restarts of the position ids. A mask that is more than causal, windowed and packed
(chunks of Llama 4, prefixes) is left to the ordinary implementation.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import accumulate, groupby, pairwise
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from logitcask.engine.errors import ModelError

PACKED = {"sdpa": "packed_sdpa", "eager": "packed_eager"}
"""Ordinary implementation -> ours on top of it."""
BLOCK = 256
"""Queries at once where attention needs a mask."""
LEAST = 16
"""Queries at once at least."""
HOST_EDGES = "host_edges"
"""Argument of a forward pass: the edges of a pack's sequences, where they can be read at once."""
CELLS = 1 << 24
"""Maximum number of scores of all heads that eager maths computes at once."""


@cache
def _register() -> None:
    from transformers import AttentionInterface  # it loads the trainer's packages

    for ordinary, name in PACKED.items():
        AttentionInterface.register(name, partial(_attention, ordinary))
        masking_utils.AttentionMaskInterface.register(name, partial(_mask, ordinary))


def leave_uncompiled() -> None:
    """Run our attention between the compiled parts of a layer: it reads numbers on the host."""
    from transformers import AttentionInterface

    for ordinary, name in PACKED.items():
        run = torch.compiler.disable(partial(_attention, ordinary))  # type: ignore[no-untyped-call]
        AttentionInterface.register(name, run)


def use_packed(model: Any) -> bool:
    """Switch a transformers model to our attention; False if it cannot be switched."""
    if getattr(model.config.get_text_config(), "compress_rates", None):
        return False  # keys that stand for many tokens are appended to a row after its mask is made
    _register()
    before = attention_of(model)
    _switch(model, PACKED)
    return attention_of(model) != before


def use_ordinary(model: Any) -> None:
    """Switch a model back to the attention that it was loaded with."""
    _switch(model, {name: ordinary for ordinary, name in PACKED.items()})


@contextmanager
def ordinary_attention(model: Any) -> Iterator[None]:
    """Run a block with the attention that the model was loaded with."""
    ours = attention_of(model) in PACKED.values()
    if ours:
        use_ordinary(model)
    try:
        yield
    finally:
        if ours:
            use_packed(model)


def attention_of(model: Any) -> str:
    """Return the name of the attention implementation of a transformers model's text part."""
    return str(model.config.get_text_config()._attn_implementation)


def cuts_packs(model: Any) -> bool:
    """Return True if the attention of a model reads the lengths of a pack's sequences."""
    name = attention_of(model)
    return name in PACKED.values() or name.startswith("flash_attention")


def _switch(model: Any, names: dict[str, str]) -> None:
    def of(config: Any) -> dict[str, Any]:
        parts = {key: getattr(config, key, None) for key in config.sub_configs}
        own = config._attn_implementation
        return {"": names.get(own, own), **{k: of(v) for k, v in parts.items() if v is not None}}

    model.set_attn_implementation(of(model.config))


def pack_lengths(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments of a forward pass that name the lengths of a pack's sequences.

    They are transformers' FlashAttentionKwargs, int32 [n + 1]; and for ours the same on the host.
    """
    on_host = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    edges, longest = on_host.to(device), max(lengths)
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
        HOST_EDGES: on_host,
    }


# --- the mask ---


def _mask(ordinary: str, **options: Any) -> Any:
    """Return the ordinary mask; None for one row without padding that `_attention` cuts itself."""
    alone = options["batch_size"] == 1 and options["q_length"] == options["kv_length"]
    if alone and options.get("attention_mask") is None and _is_plain(options["mask_function"]):
        return None
    return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[ordinary](**options)


def _is_plain(mask_function: Callable[..., Any]) -> bool:
    """Return True for a mask that is causal, with a window and packs at most."""
    return _codes(mask_function) <= _plain_codes()


@cache
def _plain_codes() -> set[CodeType]:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    window = masking_utils.sliding_window_causal_mask_function(1)
    return _codes(masking_utils.packed_sequence_compatibility_function(window, ids, ids))


def _codes(function: Any) -> set[CodeType]:
    """Return the code of a function and of the functions that it holds."""
    found = {function.__code__}
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        for each in content if isinstance(content, tuple) else (content,):
            if callable(each):
                found |= _codes(each)
    return found


# --- the function ---


def _attention(
    ordinary: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs [B, L, H, D] of query [B, H, L, D], key and value [B, H_kv, L, D]."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    row = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if not row and attention_mask is None and options.get(HOST_EDGES) is not None:
        raise ModelError(
            f"{type(module).__name__} reads {key.shape[2]} keys for a pack of {query.shape[2]} "
            "tokens",
            hint="set train.attn_implementation to sdpa or eager",
        )
    run = _function(type(module), ordinary)
    if not (causal and row and attention_mask is None):
        return run(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    window = options.get("sliding_window")
    lengths = _lengths(options.get(HOST_EDGES), options.get("position_ids"))
    if lengths is None:
        mask = _ordinary_mask(ordinary, query, window)
        return run(module, query, key, value, mask, **options)  # type: ignore[no-any-return]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = run(module, query, key, value, mask, **options)[0]
        return out

    # A pack begins with its longest sequences, so those of one length are neighbours: one batch.
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes = [length * n for length, n in runs]
    parts = zip(*(torch.split(x, sizes, 2) for x in (query, key, value)), strict=True)
    outs = []
    for (length, n), part in zip(runs, parts, strict=True):
        q, k, v = (x.unflatten(2, (n, length)).squeeze(0).transpose(0, 1) for x in part)
        seen = min(window or length, length)
        if ordinary == "sdpa" and seen == length:
            out = attend(q, k, v, None)
        else:
            out = torch.cat([*_blocks(attend, q, k, v, seen, added=ordinary == "eager")], 1)
        outs.append(out.flatten(0, 1))
    return torch.cat(outs)[None], None


def _ordinary_mask(ordinary: str, query: Tensor, window: int | None) -> Tensor | None:
    """Return the mask of one row that is not a pack, which `_mask` left out."""
    causal = masking_utils.causal_mask_function
    if window:
        causal = masking_utils.sliding_window_causal_mask_function(window)
    mask: Tensor | None = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[ordinary](
        batch_size=1,
        q_length=query.shape[2],
        kv_length=query.shape[2],
        mask_function=causal,
        local_size=window,
        dtype=query.dtype,
        device=query.device,
    )
    return mask


def _function(layer: Any, name: str) -> Callable[..., Any]:
    """Return the function that a class of attention layers calls by the name sdpa or eager."""
    names = inspect.unwrap(layer.forward).__globals__
    found: Callable[..., Any] = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
        name, names["eager_attention_forward"]
    )
    return found


def _lengths(host_edges: Any, position_ids: Tensor | None) -> list[int] | None:
    """Return the lengths of a pack's sequences; None for one row that is not known to be a pack."""
    if host_edges is not None:
        return [end - start for start, end in pairwise(host_edges.tolist())]
    if position_ids is None or position_ids.ndim != 2:
        return None
    starts = (position_ids[0].diff() != 1).nonzero()[:, 0].add(1).tolist()
    edges = [0, *starts, position_ids.shape[1]]
    return [end - start for start, end in pairwise(edges)] if starts else None


def _blocks(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    added: bool,
) -> Iterator[Tensor]:
    """Yield the outputs [n, block, H, D] of n sequences of one length, by blocks of queries.

    window: keys that a query sees, itself included. added: the mask of a block is added to the
    scores, which then are in memory; the block is computed again in the backward pass, so that one
    at most is. Else the mask is True and False.
    """
    length = query.shape[2]
    size = BLOCK if window < length else length
    if added:
        cells = query.shape[:2].numel() * min(length, window + BLOCK)
        size = min(size, max(LEAST, CELLS // cells))
    again = added and length > size and torch.is_grad_enabled()
    keys, values = torch.split(key, size, 2), torch.split(value, size, 2)
    for i, part in enumerate(torch.split(query, size, 2)):
        # Blocks are joined, not sliced out of the whole: a slice's gradient has the whole's size.
        low = max(0, i * size - window + 1)
        first, cut = divmod(low, size)
        k, v = (torch.cat(x[first : i + 1], 2)[:, :, cut:] for x in (keys, values))
        row = torch.arange(i * size, i * size + part.shape[2], device=query.device)[:, None]
        column = torch.arange(low, low + k.shape[2], device=query.device)
        mask = ((column <= row) & (column > row - window))[None, None]
        if added:
            least = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least)
        if again:
            yield checkpoint(attend, part, k, v, mask, use_reentrant=False)
        else:
            yield attend(part, k, v, mask)
