"""`logitcask tap`: a proxy before a teacher's server that records its answers."""

from typing import Any

import rich_click as click

from logitcask.cli.options import config_from_flags, config_options
from logitcask.cli.output import print_event
from logitcask.cli.worker import stop_at_sigterm
from logitcask.engine.config.tap import Tap, TapConfig


@click.command("tap")
@config_options(
    TapConfig,
    {
        "teacher": ["model", "name", "served", "server", "tokenizer", "revision", "api_key_file"],
        "store": ["url", "rollouts", "profile"],
        "tap": list(Tap.model_fields),
    },
)
def tap_command(**flags: Any) -> None:
    """Stand before a teacher's server, record its log-probs of given ids, and repeat them.

    Trainers use the tap's URL in place of the server's. Scoring requests (prompt log-probs of
    token ids, as TRL, axolotl, AReaL, slime and prime-rl send them) are answered from records; all
    others pass unchanged. The records go to the store as rollouts of an unknown sampler with the
    teacher's scores, under the name of the teacher and a part of its fingerprint. SIGTERM and
    Ctrl-C end it after the records are in the store.

    An on-policy run never repeats a sequence, so for it the tap is a recorder; runs over fixed
    data are answered without the teacher from the second epoch on. engine/tap/README.md lists the
    clients.

    Example: logitcask tap --model http://gpu1:8000 --teacher qwen3-32b --store ./store
    """
    config = config_from_flags(TapConfig, flags)
    from logitcask.engine.backends.base import open_backend

    open_backend("server")  # raises if its package is missing
    from logitcask.engine.tap.serve import serve

    with stop_at_sigterm() as stop:
        serve(config, stop=stop, on_event=print_event)
