"""LoRA adapters of peft: made before a training, saved with the student, proved on its parent.

The weights without adapters can be in 4 bits: NF4 in blocks of 64 numbers, the format of QLoRA
(arXiv 2305.14314) and bitsandbytes, without a second quantization of the scales.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from logitcask.engine.config.training import Lora
from logitcask.engine.errors import ConfigError
from logitcask.engine.models.forward import folded_head, pack_states
from logitcask.engine.types import ModelRef

ADAPTER = "adapter"
"""Folder of the adapters below that of the student."""
BLOCK = 64
"""Numbers that share a scale, the largest magnitude among them."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
"""The 16 values of a number in 4 bits: quantiles of a normal distribution, over the scale."""
OF_ADAPTERS = ("lora_", "modules_to_save", "original_module")
"""First parts of the names that peft's own modules have in a model."""


def with_adapters(
    model: Any, lora: Lora, seed: int, *, packed: bool, check: bool = True
) -> nn.Module:
    """Return the model with float32 adapters in place of all its weights to train.

    seed: initialises them; packed: see pack_states; check: run the model. Raises ConfigError for
    layers that cannot have adapters, or that would be saved as something else than what was
    trained.
    """
    ids = torch.arange(8)[None]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        try:
            adapted = wrap(model, lora)
            if check:
                folded_head(model, pack_states(adapted.eval(), ids, ids, packed=packed))
        except ConfigError:
            raise
        # peft wraps any linear layer, and some models read more of a layer than its output.
        except Exception as error:
            raise _refused(model, lora, error) from error
    return adapted


def wrap(model: Any, lora: Lora) -> nn.Module:
    """Return the model with adapters that no forward pass has tried; see with_adapters."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(
            f"lora r = {lora.r} needs the package peft", hint='pip install -e ".[lora]"'
        ) from error
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    tied = ends["embeddings"] is not None and ends["embeddings"].weight is ends["head"].weight
    targets = lora.target_modules
    with warnings.catch_warnings():
        # They concern peft's own settings; a forward pass and the check at the save decide.
        warnings.simplefilter("ignore")
        try:
            adapted: nn.Module = get_peft_model(
                model,
                LoraConfig(
                    r=lora.r,
                    lora_alpha=lora.alpha or 2 * lora.r,
                    lora_dropout=lora.dropout,
                    target_modules=targets if isinstance(targets, str) else list(targets),
                    modules_to_save=list(lora.modules_to_save) or None,
                    use_rslora=lora.use_rslora,
                    use_dora=lora.use_dora,
                    bias=lora.bias,
                ),
            )
            _check(adapted, lora, ends, tied=tied)
        except Exception as error:  # of any kind, see above
            raise _refused(model, lora, error) from error
    if lora.load_in_4bit:
        quantize(adapted)
    return adapted


def _refused(model: Any, lora: Lora, error: Exception) -> ConfigError:
    targets = lora.target_modules
    shown = targets if isinstance(targets, str) else ",".join(targets)
    return ConfigError(
        f"lora target_modules = {shown}: {type(model).__name__} does not run with these adapters: "
        f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        hint="leave load_in_4bit out"
        if lora.load_in_4bit
        else 'name other layers, such as --lora-target-modules ".*(q|k|v|o)_proj"',
    )


def _check(adapted: Any, lora: Lora, ends: dict[str, Any], *, tied: bool) -> None:
    """Raise ValueError for adapters that would not train, or would be saved as something else."""
    from peft.utils import ModulesToSaveWrapper

    modules = list(adapted.modules())
    bases = [each.base_layer for each in modules if hasattr(each, "base_layer")]
    weights = [id(base.weight) for base in bases if isinstance(base, nn.Linear)]
    if len(set(weights)) < len(weights):
        raise ValueError("layers with the same weights would get several adapters")
    if any(base is ends["head"] for base in bases):
        # The loss multiplies by the head's own weight, past an adapter.
        raise ValueError("the head cannot have an adapter; name it in modules_to_save")
    whole = [each.original_module for each in modules if isinstance(each, ModulesToSaveWrapper)]
    names = {name.rpartition(".")[2] for name, _ in adapted.named_modules()}
    if missing := sorted(set(lora.modules_to_save) - names):
        raise ValueError(f"modules_to_save names {missing[0]}, which the model does not have")
    for name, end in ends.items():
        if tied and any(each is end for each in [*bases, *whole]):
            raise ValueError(f"the {name} cannot train alone: embeddings and head are one matrix")
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    if lora.bias != "none" and not any(name.endswith("bias") for name in trained):
        raise ValueError(f"bias = {lora.bias}, and these layers have no bias")


def save_adapter(adapted: Any, folder: Path, parent: ModelRef) -> None:
    """Save the adapters to `folder`, in peft's format, for the model `parent`."""
    for config in adapted.peft_config.values():
        # A local folder has no revision.
        config.base_model_name_or_path = parent.name if parent.revision else str(parent.path)
        config.revision = parent.revision or None
    # Its default asks the hub whether the vocabulary has grown.
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template of a model card


def load_adapter(base: Any, folder: Path) -> Any:
    """Return a loaded base model with the adapters of `folder`."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names of peft's that transformers deprecates
        return PeftModel.from_pretrained(base, str(folder)).eval()


# --- weights in 4 bits ---


@torch.no_grad()
def quantize(adapted: Any) -> None:
    """Replace each linear layer below the adapters, but the head, by one with weights in 4 bits."""
    head = adapted.get_base_model().get_output_embeddings()
    made: dict[nn.Module, FourBitLinear] = {}
    for name, module in list(adapted.named_modules()):
        for key, child in list(module.named_children()):
            own = any(part.startswith(OF_ADAPTERS) for part in (*name.split("."), key))
            if type(child) is nn.Linear and child is not head and not own:
                module.add_module(key, made.setdefault(child, FourBitLinear(child)))
    if not made:
        raise ConfigError(
            f"load_in_4bit: {type(adapted.get_base_model()).__name__} has no linear layer of torch",
            hint="leave load_in_4bit out",
        )


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Replace each layer with weights in 4 bits by a linear layer with the same values."""
    made: dict[nn.Module, nn.Linear] = {}
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, FourBitLinear):
                module.add_module(key, made.setdefault(child, child.plain()))


def four_bit_layers(model: nn.Module) -> list["FourBitLinear"]:
    """Return the layers of a model with weights in 4 bits."""
    return [each for each in model.modules() if isinstance(each, FourBitLinear)]


class FourBitLinear(nn.Module):
    """A linear layer whose weights [out, in] are frozen, in 4 bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        packed, scale = to_nf4(layer.weight.detach())
        # They follow from the parent, so they are in no checkpoint and no saved folder.
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("values", torch.tensor(NF4, device=scale.device), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def weights(self) -> Tensor:
        """Return the weights [out, in] in float32."""
        packed, scale, values = map(self.get_buffer, ("packed", "scale", "values"))
        index = torch.stack([packed >> 4, packed & 15], -1).view(-1, BLOCK).int()
        flat = (values[index] * scale[:, None]).flatten()
        return flat[: self.in_features * self.out_features].view(self.out_features, -1)

    def plain(self) -> nn.Linear:
        """Return the linear layer with the same weights in float32, frozen."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weights(), requires_grad=False)
        layer.bias = self.bias
        return layer


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (two numbers a byte, uint8; scale of each block, float32), the last block filled up.

    The first number of a pair has the high bits.
    """
    blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    unit = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    values = torch.tensor(NF4, device=weight.device)
    index = torch.bucketize(unit, (values[1:] + values[:-1]) / 2, out_int32=True)
    high, low = index.to(torch.uint8).view(-1, 2).unbind(1)
    return high << 4 | low, scale


class _Product(torch.autograd.Function):
    """inputs W^T; the weights are made again in the backward pass, so that no layer's are kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(inputs, layer.weights())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weights().to(grad.dtype), None
