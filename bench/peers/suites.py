"""The suites of other projects: their files, our ops in the place of theirs, and what is left out.

Nothing here is theirs: a suite names functions of theirs, which adapters of ours replace while the
tests run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import adapters
import torch
from adapters import PER_ELEMENT

NOT_REACHED = "does not reach the loss"
HUB = "trains a model from a hub"
NO_BIAS = "a head with a bias, which our ops do not take"


def nothing(*_: Any) -> None:
    """Leave the peer as it is."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The tests of one project."""

    project: str
    repository: str
    """Folder of its checkout, and its name in the table."""
    module: str
    """Its package."""
    source: str = "."
    """Folder of the checkout that holds the package."""
    files: tuple[str, ...]
    """Tests of the checkout, or of this folder."""
    put_in: Callable[[], None] = nothing
    """Replaces functions of theirs before their tests are imported."""
    finish: Callable[[ModuleType], None] = nothing
    """Replaces names in an imported test module."""
    sizes: Mapping[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    """On a CPU: names of a parametrization -> values."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Pattern of a case, and NAME=VALUE of its parameters, -> reason."""
    for_gpu: bool = False
    """True if its tests run only where torch finds a GPU."""
    stand_ins: tuple[str, ...] = ()
    """Packages that it imports and its loss does not use: empty ones where they are missing."""


SUITES = {
    "trl": Suite(
        project="TRL",
        repository="trl",
        module="trl",
        files=(
            "tests/experimental/test_gkd_trainer.py",
            "tests/experimental/test_distillation_trainer.py",
            "tests/experimental/test_server_distillation_trainer.py",
        ),
        put_in=adapters.put_in_trl,
        left_out={
            "*test_reduction_methods*": PER_ELEMENT,
            "*::TestGKDTrainer*": HUB,
            "*::TestDistillationTrainer::*": HUB,
            "*::TestServerDistillationTrainer*": HUB,
        },
    ),
    "trl-gold": Suite(
        project="TRL, GOLD",
        repository="trl",
        module="trl",
        files=("gold_values.py",),
    ),
    "tokenkit": Suite(
        project="tokenkit",
        repository="tokenkit",
        module="tokenkit",
        files=("tokenkit_values.py",),
    ),
    "simct": Suite(
        project="SimCT, KDFlow",
        repository="SimCT-",
        module="kdflow",
        files=("kdflow_values.py",),
    ),
    "rllm": Suite(
        project="rllm",
        repository="rllm",
        module="rllm",
        files=("rllm_values.py",),
    ),
    "liger": Suite(
        project="Liger-Kernel",
        repository="Liger-Kernel",
        module="liger_kernel",
        source="src",
        files=(
            "test/transformers/test_jsd.py",
            "test/transformers/test_fused_linear_jsd.py",
            "test/transformers/test_kl_div.py",
            "test/chunked_loss/test_jsd_loss.py",
        ),
        put_in=adapters.put_in_liger,
        finish=adapters.finish_liger,
        sizes={
            "B, T, V": [(2, 32, 320), (5, 11, 127)],
            "B, T, H, V": [(2, 16, 64, 256), (3, 9, 31, 123)],
        },
        left_out={
            "*test_kl_div.py* reduction=none": PER_ELEMENT,
            "*test_kl_div.py* log_target=True": "exp of its target does not sum to 1",
            "*test_kl_div.py* reduction=sum dtype=torch.float32": "its gradient by a log-prob is "
            "-q; ours by a logit is p - q, whose rounding is more than 1e-8",
            "* bias=True": NO_BIAS,
        },
    ),
    "distillkit": Suite(
        project="DistillKit",
        repository="DistillKit",
        module="distillkit",
        files=("distillkit_values.py",),
    ),
    "verl": Suite(
        project="verl",
        repository="verl",
        module="verl",
        files=(
            "verl_values.py",
            "tests/workers/test_chunked_topk_log_probs_on_cpu.py",
            "tests/workers/test_distillation_topk_symmetry_on_cpu.py",
        ),
        put_in=adapters.put_in_verl,
        sizes={"B,T,V,K,dtype,atol": [(2, 16, 128, 4, torch.float32, 5e-6),
                                      (2, 8, 4096, 64, torch.float32, 5e-6)]},
        left_out={
            "*outputs_emitted*": "tests the engine that calls the loss, without one",
            "*overlap_metrics*": "their advantage has raw probabilities and the weight q; ours is "
            "Eq. 7 of the paper, renormalised and of weight p",
            "*aggregation*": "sums metrics of a finished batch, without a loss",
        },
    ),
    "nemo-rl": Suite(
        project="NeMo-RL",
        repository="RL",
        module="nemo_rl",
        files=(
            "nemo_values.py",
            "nemo_spans_values.py",
            *(
                f"tests/unit/algorithms/test_loss_functions.py::test_distillation_loss_{name}"
                for name in (
                    *("different_settings", "topk_filtering", "invalid_k_zero", "gradient_flow"),
                    *("edge_cases", "fn_initialization", "fn_call"),
                )
            ),
        ),
        left_out={
            "*invalid_k_zero*": NOT_REACHED,
            "*fn_initialization*": NOT_REACHED,
            "*test_distillation_loss_[!i]*": "lists ids of a row more than once (draws of 8 ids), "
            "which no top-k does and ours refuses",
        },
        stand_ins=("matplotlib", "mlflow", "prometheus_client", "swanlab", "tensorboard"),
    ),
    "cce": Suite(
        project="Cut Cross-Entropy",
        repository="ml-cross-entropy",
        module="cut_cross_entropy",
        files=("tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py"),
        finish=adapters.finish_cce,
        sizes={"impl": ["cce"]},
        left_out={
            "* has_bias=True": NO_BIAS,
            "*test_loss_partials*": NO_BIAS,
            "* z_loss=True": "a log-sum-exp with a gradient of its own",
            "*test_loss_backward* reduction=none": "a gradient of each row's loss; weights of "
            "our rows are set beforehand",
        },
        for_gpu=True,
    ),
}  # fmt: skip
