"""Costs by hand, and sizes of models against transformers."""

from typing import Any

import pytest
import torch
import transformers

from logitcask.engine.config.cost import Cost
from logitcask.engine.errors import ConfigError, ModelError
from logitcask.engine.estimate.cost import Hours, Work, costs, model_hours
from logitcask.engine.estimate.sizes import KNOWN, ModelSize, find_size, size_of

REQUESTS = {"put_requests": 300, "list_requests": 200, "get_requests": 500}
REQUESTS |= {"get_requests_per_epoch": 100}


def test_hours_worked_by_hand() -> None:
    """Compute by hand for an a800: 312e12 FLOP/s at 0.5, 2.039e12 B/s at 0.5."""
    student = ModelSize(parameters=1e9, kv_bytes=1e5)
    work = Work(sequences=1000, prompt_tokens=200, response_tokens=800, at_once=100)
    cost = Cost(utilisation=0.5, bandwidth_utilisation=0.5)
    hours = model_hours(work, student, 4e9, cost)
    # 1e6 tokens: scoring 2 * 4e9 * 1e6 = 8e15 FLOP at 156e12 FLOP/s.
    assert hours.score == pytest.approx(8e15 / 156e12 / 3600, rel=1e-12)
    assert hours.train == pytest.approx(6e15 / 156e12 / 3600, rel=1e-12)
    # Room for 70e9 / (1e5 * 1000) = 700 sequences, so all 100 of a round share the weights:
    # 2e9 / 100 + 1e5 * 600 = 8e7 bytes a token, 800,000 tokens, at 1.0195e12 B/s; and 2e15 FLOP.
    expected = 800_000 * 8e7 / 1.0195e12 + 2e15 / 156e12
    assert hours.sample == pytest.approx(expected / 3600, rel=1e-12)
    again = Work(
        sequences=1000, prompt_tokens=200, response_tokens=800, at_once=100, checkpointing=True
    )
    assert model_hours(again, student, 4e9, cost).train == pytest.approx(hours.train * 8 / 6)
    # A cache so small that a token costs its FLOP: 2e9 / 156e12 s, and not its 2e7 bytes.
    small = model_hours(work, ModelSize(parameters=1e9, kv_bytes=1), 4e9, Cost(utilisation=1e-4))
    assert small.sample == pytest.approx((800_000 + 1e6) * 2e9 / 312e8 / 3600, rel=1e-12)
    with pytest.raises(ConfigError, match="does not fit on one a800-80gb"):
        model_hours(work, ModelSize(parameters=36e9, kv_bytes=1e5), 4e9, cost)


def test_money_worked_by_hand() -> None:
    hours = Hours(sample=10.0, score=4.0, train=6.0)
    cost = Cost(
        runs=5, months=2, price_gpu_hour=2.0, price_gb_month=0.5, price_per_1k_requests=10.0
    )
    found = costs(hours, cost, store_bytes=3e9, requests=REQUESTS)
    assert found["gpu_hours_teacher_in_trainer"] == 10 + 5 * (4 + 6)
    assert found["gpu_hours_stored_once"] == 10 + 4 + 5 * 6
    assert found["storage_cost"] == 3.0
    assert found["request_cost"] == 10 + 5 * 1.0
    assert found["cost_teacher_in_trainer"] == 120
    assert found["cost_stored_once"] == 88 + 3 + 15
    # M runs: 20 + 20 M against 28 + 12 M + 13 + M, so from 21 < 7 M on: M = 4.
    assert found["store_pays_from_run"] == 4
    for runs, cheaper in ((3, False), (4, True)):
        each = costs(
            hours, cost.model_copy(update={"runs": runs}), store_bytes=3e9, requests=REQUESTS
        )
        assert (each["cost_stored_once"] < each["cost_teacher_in_trainer"]) == cheaper, runs


def test_amounts_without_a_price_are_left_out() -> None:
    hours = Hours(sample=10.0, score=4.0, train=6.0)
    found = costs(hours, Cost(price_gpu_hour=2.0), store_bytes=3e9, requests=REQUESTS)
    assert found["cost_teacher_in_trainer"] == 2 * 20
    assert found["cost_stored_once"] is None
    assert found["storage_cost"] is None
    assert found["store_pays_from_run"] == 2, "by GPU-hours alone"
    dear = Cost(price_gpu_hour=0.1, price_gb_month=0.0, price_per_1k_requests=100.0)
    never = costs(hours, dear, store_bytes=3e9, requests=REQUESTS)
    assert never["store_pays_from_run"] is None, "a pass reads for more than it saves"


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_those_of_transformers(tied: bool) -> None:
    """Count the matrices of a real architecture; norms and biases are under a thousandth."""
    keys: dict[str, Any] = {**KNOWN["Qwen/Qwen3-4B"], "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**keys))
    counted = sum(p.numel() for p in model.parameters())
    if not tied:  # the rows of the embedding are looked up
        counted -= model.get_input_embeddings().weight.numel()
    found = size_of(keys, "it")
    assert found.parameters == pytest.approx(counted, rel=1e-3)
    assert found.kv_bytes == 2 * 2 * 36 * 8 * 128


def test_a_size_that_is_not_known_is_an_error() -> None:
    assert find_size("a/b", "teacher", parameters=7e9).parameters == 7e9
    assert find_size("Qwen/Qwen3-1.7B", "student", parameters=None).kv_bytes == 114_688
    for parameters in (None, 7e9):
        with pytest.raises(ModelError, match="nothing is downloaded") as error:
            find_size("a/b", "student", parameters=parameters)
        assert "--student-parameters and --student-kv-bytes" in (error.value.hint or "")
    with pytest.raises(ModelError, match="num_experts"):
        size_of({**KNOWN["Qwen/Qwen3-4B"], "num_experts": 8}, "a mixture")
