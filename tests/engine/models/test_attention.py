"""Attention of packs: equal to the sequences alone, never a tensor over the whole pack squared."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils as flash_utils

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Train
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.models import attention
from logitcask.engine.models.attention import PACKED, attention_of, use_ordinary, use_packed
from logitcask.engine.models.check import check_paths, lengths_of_change
from logitcask.engine.models.forward import new_cache, right_padded, states
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import (
    checkpoint_layers,
    load_student,
    paths_of,
    set_mode,
    use_on_gpu,
)
from logitcask.engine.training.settings import choose_attention, training_arguments
from tests.engine.tiny import make_model, save_folder

VOCAB = 61
SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    **{"bos_token_id": None, "eos_token_id": 1, "max_position_embeddings": 2048},
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3": {},
    "Mistral": {"sliding_window": 24},
    "Gemma2": {"sliding_window": 24, "attn_logit_softcapping": 5.0},
    "GptOss": {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    "Llama4Text": {"attention_chunk_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 2},
}
"""GQA; a window; a soft cap; sinks; a window in some layers; chunks, whose mask is left alone."""
LENGTHS = [300, 90, 40, 40, 33, 25, 24, 23, 7, 1]
"""Longer than a block, than the window, one more and one less than the window, twice the same."""


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS.get(name, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def outcome(model: Any, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (log-probs of one id of each row, gradients of a weighted sum of them)."""
    logits = hidden @ model.get_output_embeddings().weight.T
    found = logits.log_softmax(-1)[torch.arange(len(hidden)), torch.arange(len(hidden)) % VOCAB]
    model.zero_grad()
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found.detach(), grads


def assert_equal(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert (found[0] - expected[0]).abs().max() < tolerance
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max() < tolerance * grad.abs().max().clamp(min=1), name


@pytest.mark.parametrize("cells", [attention.CELLS, 1 << 12])
@pytest.mark.parametrize("name", MODELS)
def test_a_pack_gives_what_its_sequences_give_alone(
    name: str, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CELLS", cells)
    model, ids = make(name), tokens(sum(LENGTHS))
    alone = [states(model, part[None])[0] for part in torch.split(ids, LENGTHS)]
    expected = outcome(model, torch.cat(alone))
    assert use_packed(model)
    for lengths in (LENGTHS, None):  # by themselves, and by the restarts of the positions
        hidden = states(model, ids[None], positions=positions(LENGTHS), lengths=lengths)[0]
        assert_equal(outcome(model, hidden), expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_anything_but_a_pack_is_bit_equal_to_the_ordinary_attention(name: str) -> None:
    model = make(name)
    prompts = [tokens(n, n) for n in (40, 12)]

    def outcomes() -> Iterator[Tensor]:
        yield states(model, tokens(70)[None])
        ids, mask = right_padded(prompts)
        yield states(model, ids, mask=mask, positions=torch.arange(40).expand(2, -1))
        cache, ids, mask = new_cache(model), ids.flip(1), mask.flip(1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        yield states(model, ids, mask=mask, positions=places, cache=cache)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        yield states(model, ids[:, :1], mask=mask, positions=places[:, -1:] + 1, cache=cache)
        cache = new_cache(model)
        yield states(model, tokens(30)[None], cache=cache)
        yield states(model, tokens(1)[None], positions=torch.tensor([[30]]), cache=cache)

    expected = [*outcomes()]
    assert use_packed(model)
    assert all(map(torch.equal, outcomes(), expected))
    use_ordinary(model)
    assert attention_of(model) in PACKED


class Widest(TorchDispatchMode):
    """The most elements of a tensor, and the largest second dimension of one."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.second = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.ndim > 1:
                self.numel = max(self.numel, each.numel())
                self.second = max(self.second, sorted(each.shape)[-2])
        return result


@pytest.mark.parametrize("name", ["Qwen3", "Mistral", "Gemma2", "GptOss"])
def test_no_tensor_has_the_length_of_a_pack_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CELLS", 1 << 16)
    model = make(name)
    use_packed(model)
    for lengths in ([40] * 15 + [200] * 2, [1000]):
        with Widest() as widest:
            ids, places = tokens(1000)[None], positions(lengths)
            hidden = states(model, ids, positions=places, lengths=lengths)
            hidden.square().sum().backward()
        assert widest.second <= 256
        assert widest.numel < 1000 * 1000 / 4


def test_a_model_whose_packs_are_not_proved_keeps_its_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(tmp_path / "student", make_model())
    ref = model_ref(str(tmp_path / "student"), chat_template=True)
    student = load_student(ref)
    assert attention_of(student) == "packed_sdpa"
    assert paths_of(student).packed
    monkeypatch.setattr(attention, "_lengths", lambda edges, places: [int(edges[-1])])
    monkeypatch.setattr("logitcask.engine.models.check.cache_folder", lambda: tmp_path / "cache")
    student = load_student(ref)
    assert attention_of(student) == "sdpa"
    assert paths_of(student).packed
    assert attention_of(load_student(ref, attention="eager")) == "eager"


def test_an_attention_of_a_gpu_is_compared_with_ours(tmp_path: Path) -> None:
    save_folder(tmp_path / "student", make_model())
    ref = model_ref(str(tmp_path / "student"), chat_template=True)
    student = load_student(ref)
    with pytest.raises(ModelError, match="attn_implementation = flash_attention_2: Imp"):
        use_on_gpu(student, ref, "flash_attention_2", explicit=True)
    use_on_gpu(student, ref, "flash_attention_2", explicit=False)
    assert attention_of(student) == "packed_sdpa", "ours stays"
    use_on_gpu(student, ref, "sdpa", explicit=True)
    assert attention_of(student) == "sdpa"


def test_sinks_are_packed_only_by_the_attention_of_packs() -> None:
    model = make("GptOss")
    assert "a pack of sequences" in check_paths(model, VOCAB).packing
    use_packed(model)
    assert check_paths(model, VOCAB, (24,)).packed


def test_keys_that_are_appended_to_a_row_are_never_attended_to_without_a_mask() -> None:
    changes = {"num_key_value_heads": 1, "num_hidden_layers": 2, "q_lora_rank": 8}
    config = transformers.DeepseekV4Config(**{**SIZES, **changes})
    assert lengths_of_change(config)[:1] == [128]
    layer, row = torch.nn.Linear(1, 1), torch.zeros(1, 4, 40, 8)
    edges = attention.pack_lengths([30, 10], row.device)
    with pytest.raises(ModelError, match="Linear reads 42 keys for a pack of 40 tokens"):
        attention._attention("sdpa", layer, row, *[torch.zeros(1, 4, 42, 8)] * 2, **edges)


@pytest.mark.parametrize("ordinary", PACKED)
def test_the_lengths_of_a_pack_are_read_on_the_host(ordinary: str) -> None:
    # A tensor on this device has no values to wait for, as one that a GPU still computes.
    layer = make("Qwen3").model.layers[0].self_attn
    heads = [torch.zeros(1, n, 80, 8, device="meta") for n in (4, 2, 2)]
    given = attention.pack_lengths([40, 7, 33], heads[0].device)
    options = {"sliding_window": 24, "scaling": 1.0, "position_ids": positions([80]).to("meta")}
    out, _ = attention._attention(ordinary, layer, *heads, **options, **given)
    assert out.shape == (1, 80, 4, 8)


def test_the_same_call_reaches_flash_attention_with_the_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run transformers' own code, but for the kernel, which needs a GPU."""
    seen = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, max_seqlen_q: Any = None, **_: Any
    ) -> Tensor:
        seen.append((cu_seqlens_q, max_seqlen_q))
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(torch.split(x.transpose(0, 1), lengths, 1) for x in (q, k, v)), strict=True)
        outs = [
            scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts
        ]
        return torch.cat(outs, 1).transpose(0, 1)

    pads = (flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: (None, varlen, None, *pads))
    model, lengths = make("Qwen3"), [40, 7, 33]
    ids, places = tokens(80)[None], positions(lengths)
    expected = states(model, ids, positions=places)
    model.config._attn_implementation = "flash_attention_2"
    found = states(model, ids, positions=places, lengths=lengths)
    assert torch.allclose(found, expected, atol=1e-5)
    assert [(edges.tolist(), longest) for edges, longest in seen] == [([0, 40, 47, 80], 40)] * 2
    assert seen[0][0].dtype == torch.int32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "does not train on a CPU"),
        ("flex_attention", "does not train on a CPU"),
    ],
)
def test_an_attention_that_cannot_run_is_refused_before_loading(
    name: Any, message: str, tmp_path: Path
) -> None:
    settings = Train(attn_implementation=name)
    args = training_arguments(settings, Run(out=tmp_path, device="cpu"))
    with pytest.raises(ConfigError, match=f"attn_implementation = {name} {message}"):
        choose_attention(settings, args)
    args.use_cpu, args.bf16 = False, True
    if name.startswith("flash"):
        with pytest.raises(ConfigError, match="needs the package flash_attn"):
            choose_attention(settings, args)
    assert choose_attention(Train(), args) is None, "flash attention is not installed here"
    assert choose_attention(Train(attn_implementation="eager"), args) == "eager"


@pytest.mark.parametrize("packed", [True, False])
def test_gradient_checkpointing_changes_no_gradient(packed: bool) -> None:
    """OPT has its dropout in the layer itself; a layer is in training mode, its forward is not."""
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5}
    model, ids = make("OPT", **changes), tokens(sum(LENGTHS))
    if packed:
        assert use_packed(model)
    set_mode(model, dropout=False)

    def found() -> Any:
        calls.clear()
        return outcome(
            model, states(model, ids[None], positions=positions(LENGTHS), lengths=LENGTHS)[0]
        )

    calls: list[bool] = []
    for layer in model.model.decoder.layers:
        layer.fc1.register_forward_hook(lambda module, *_: calls.append(module.training))
    expected, plain = found(), list(calls)
    checkpoint_layers(model, dropout=False)
    set_mode(model, dropout=False)
    assert_equal(found(), expected, 1e-6)
    assert (len(plain), calls) == (2, [False] * 4), "each layer once more, in the backward pass"
    model.eval()
    cache = new_cache(model)
    states(model, ids[None, :9], cache=cache)
    assert cache.get_seq_length() == 9, "sampling keeps its cache"


def test_a_model_without_layers_to_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing: Linear has no layer"):
        checkpoint_layers(torch.nn.Linear(2, 2), dropout=False)
