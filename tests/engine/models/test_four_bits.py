"""Weights in 4 bits below adapters: nearest values, exact gradients, a plain saved folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from logitcask.engine.config.sections import Run
from logitcask.engine.config.training import Lora, Train
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.adapters import (
    BLOCK,
    NF4,
    FourBitLinear,
    four_bit_layers,
    load_adapter,
    quantize,
)
from logitcask.engine.models.identity import model_ref
from logitcask.engine.models.load import load_model, load_student
from logitcask.engine.models.save import save_student
from logitcask.engine.training.train import train
from tests.engine.cached import make_unit
from tests.engine.fitting import DENSE, make_case
from tests.engine.models.test_save import METADATA, logits
from tests.engine.tiny import make_model, save_folder

CPU = torch.device("cpu")
FOUR = Lora(r=2, load_in_4bit=True)
pytestmark = pytest.mark.needs("peft")


@pytest.mark.parametrize("shape", [(48, 80), (7, 9)], ids=["blocks", "a part of one"])
def test_each_number_is_the_nearest_of_16_over_its_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(*shape)
    with torch.no_grad():
        layer.weight.flatten()[:BLOCK] = 0.0
    found = FourBitLinear(layer)
    flat, numbers = layer.weight.detach().flatten(), layer.weight.numel()
    for start in range(0, numbers, BLOCK):
        block = flat[start : start + BLOCK]
        choices = torch.tensor(NF4) * block.abs().max()
        nearest = choices[(block[:, None] - choices).abs().argmin(1)]
        assert torch.equal(found.weights().flatten()[start : start + BLOCK], nearest)
    blocks = -(-numbers // BLOCK)
    assert (found.packed.nbytes, found.scale.nbytes) == (blocks * BLOCK // 2, blocks * 4)
    assert torch.equal(FourBitLinear(found.plain()).weights(), found.weights())


def test_gradients_are_those_of_a_plain_layer_with_the_same_values() -> None:
    torch.manual_seed(0)
    layer = FourBitLinear(torch.nn.Linear(40, 24, bias=False))
    outcomes = []
    for each in (layer, layer.plain()):
        inputs = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = each(inputs)
        out.float().square().sum().backward()
        outcomes.append((out, inputs.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][0].dtype == torch.bfloat16
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("whole", [(), ("norm", "lm_head")], ids=["adapters", "modules"])
def test_the_saved_folder_and_the_adapter_give_the_trained_logits(
    tmp_path: Path, whole: tuple[str, ...]
) -> None:
    ref = model_ref(
        str(save_folder(tmp_path / "student", make_model(tie=False))), chat_template=True
    )
    lora = FOUR.model_copy(update={"modules_to_save": whole, "save_adapter": True})
    model: Any = load_student(ref, lora=lora)
    layers = four_bit_layers(model)
    assert len(layers) == 7 * model.config.num_hidden_layers
    start = logits(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.requires_grad == any(part in name for part in (".lora_", "modules_to_save"))
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) / 10)
    expected = logits(model)
    out = tmp_path / "out"
    save_student(model, out, parent=ref, updates=1, metadata=METADATA, adapter=True)
    merged = logits(load_model(out, torch.float32, CPU))
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    adapted = load_adapter(load_model(ref.path, torch.float32, CPU), out / "adapter")
    gap = (logits(adapted) - expected).abs().max() / expected.abs().max()
    quantize(adapted)
    assert (logits(adapted) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert gap > 1e-3, "the adapters belong to the parent in 4 bits"
    assert (start - logits(load_student(ref))).abs().max() > 1e-3 * start.abs().max()


def test_a_run_is_finished_again_from_its_checkpoint_to_the_bit(tmp_path: Path) -> None:
    store, ref = make_case(tmp_path, [make_unit(0, vocab=99, prompts=2)], hidden=16, layers=1)

    def run() -> bytes:
        train(
            store,
            model=ref,
            teacher="big",
            objective=DENSE,
            settings=Train(
                learning_rate=1e-2,
                pack_length=60,
                save_steps=1,
                keep_checkpoints=True,
                gradient_checkpointing=True,
            ),
            lora=FOUR,
            run=Run(out=tmp_path / "out", device="cpu"),
        )
        return (tmp_path / "out" / "model.safetensors").read_bytes()

    first = run()
    (tmp_path / "out" / "model.safetensors").unlink()
    assert run() == first
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(ref.path / "model.safetensors").keys()


def test_settings_that_are_not_proved_with_4_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DoRA reads the weights"):
        Lora(r=2, use_dora=True, load_in_4bit=True)
    with pytest.raises(ValueError, match=r"load_in_4bit is set, and lora\.r = 0"):
        Lora(load_in_4bit=True)
    store, ref = make_case(tmp_path, [make_unit(0, vocab=99, prompts=1)], hidden=16, layers=1)
    with pytest.raises(ConfigError, match=r"load_in_4bit with train\.args\.torch_compile"):
        train(
            store,
            model=ref,
            teacher="big",
            objective=DENSE,
            settings=Train(args={"torch_compile": True}),
            lora=FOUR,
            run=Run(out=tmp_path / "out", device="cpu"),
        )
