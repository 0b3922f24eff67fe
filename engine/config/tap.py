"""Sections of `logitcask tap`."""

from pathlib import Path

from pydantic import Field

from logitcask.engine.config.section import Positive, Section
from logitcask.engine.config.sections import StoreSection
from logitcask.engine.config.teacher import Teacher


class Tap(Section):
    listen: str = Field(
        "127.0.0.1",
        description="Address to listen on. Any other than the loopback lets other machines in; "
        "the teacher's own API key, if it has one, is required of them too.",
    )
    port: int = Field(8100, ge=0, le=65535, description="Port to listen on; 0 = any free one.")
    topk: Positive = Field(
        16,
        le=4096,
        description="Log-probs per position that the teacher returns at least, although a client "
        "requests fewer: what is recorded then serves larger k too. About 70 bytes each.",
    )
    answers: Path | None = Field(
        None,
        description="Folder of the recorded answers, which the tap repeats; default: the store's "
        "path and `-answers`. One tap uses it at a time.",
    )
    lenient: bool = Field(
        False,
        description="Also answer requests with echo, logprobs or any max_tokens, for clients that "
        "read only the prompt's log-probs of the answer: axolotl, AReaL. The teacher then decodes "
        "one token.",
    )
    unit_positions: Positive = Field(
        1 << 18, description="Positions after which the records go to the store as one segment."
    )
    idle_seconds: float = Field(
        900.0,
        gt=0,
        description="Seconds without a new record after which fewer positions go there too.",
    )
    check_seconds: float = Field(
        30.0,
        gt=0,
        description="Seconds for which a check of the teacher's identity holds: one short request. "
        "Records after the last check of a teacher that has changed are dropped.",
    )
    in_flight: Positive = Field(64, description="Requests to the teacher at once, at most.")


class TapConfig(Section):
    """Sections of `logitcask tap`."""

    teacher: Teacher
    store: StoreSection
    tap: Tap = Tap()
