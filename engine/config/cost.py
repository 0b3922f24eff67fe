"""Section of the costs of a run: the machine, the prices, and sizes that stand in for models."""

from typing import Literal

from pydantic import Field

from logitcask.engine.config.section import Positive, Section, Share


class Cost(Section):
    """Prices have no default: an estimate without one leaves its amount out."""

    gpu: Literal["a800-80gb", "a100-80gb", "h100-80gb", "h200-141gb"] = Field(
        "a800-80gb",
        description="Without models: the GPU whose hours are estimated, from the peaks of its "
        "data sheet.",
    )
    utilisation: Share = Field(
        0.4,
        description="Assumed share of the GPU's peak FLOP/s that scoring and training reach.",
    )
    bandwidth_utilisation: Share = Field(
        0.5, description="Assumed share of the peak of the GPU's memory that sampling reaches."
    )
    response_tokens: Positive | None = Field(
        None,
        description="Estimate without models, from responses of so many tokens on average. Sizes "
        "of the models are then those of a table, of a folder's config.json, or as given.",
    )
    prompt_tokens: Positive = Field(
        256, description="Without models: assumed tokens of a prompt, on average."
    )
    prompt_count: Positive | None = Field(
        None, description="Without models: number of prompts; default: the lines of PROMPTS."
    )
    student_parameters: float | None = Field(
        None,
        gt=0,
        description="Parameters of the student that a token uses; default: of its config.json, or "
        "of a table of known hub ids.",
    )
    teacher_parameters: float | None = Field(
        None, gt=0, description="Parameters of the teacher that a token uses, likewise."
    )
    student_kv_bytes: Positive | None = Field(
        None,
        description="Without models: bytes of the student's keys and values of one token, 4 times "
        "layers, key-value heads and their size in bfloat16.",
    )
    bytes_per_position: float = Field(
        97.0,
        gt=0,
        description="Without models: assumed bytes of rollouts and scores per position, as "
        "measured for a pair in bench/README.md; a sample measures those of your models.",
    )
    runs: Positive = Field(
        1, description="Passes of training over the same rollouts: runs times epochs."
    )
    months: float = Field(1.0, gt=0, description="Months for which the store is kept.")
    price_gpu_hour: float | None = Field(None, ge=0, description="Your price of a GPU-hour.")
    price_gb_month: float | None = Field(
        None, ge=0, description="Your price of 1e9 bytes in the object store for a month; 0 = disk."
    )
    price_per_1k_requests: float | None = Field(
        None,
        ge=0,
        description="Your price of 1,000 requests to the object store, the dearer class for all.",
    )

    @property
    def has_price(self) -> bool:
        prices = (self.price_gpu_hour, self.price_gb_month, self.price_per_1k_requests)
        return any(price is not None for price in prices)
