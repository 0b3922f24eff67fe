"""Run a tap until it is stopped."""

import asyncio
import threading

from aiohttp import web

from logitcask.engine.config.tap import TapConfig
from logitcask.engine.errors import ConfigError
from logitcask.engine.events import EventHandler
from logitcask.engine.tap.proxy import Tap
from logitcask.engine.tap.recorder import Call, in_process

STOP_S = 0.2


def serve(
    config: TapConfig,
    *,
    stop: threading.Event,
    on_event: EventHandler,
    call: Call = in_process,
) -> None:
    """Answer until `stop` is set, then seal the records.

    Raises ConfigError for an address that cannot be used, and as `Tap.start`.
    """
    asyncio.run(_serve(config, stop, on_event, call))


async def _serve(
    config: TapConfig, stop: threading.Event, on_event: EventHandler, call: Call
) -> None:
    tap = Tap(config, on_event, call)
    try:
        await tap.start()
        runner = web.AppRunner(
            tap.application(), handler_cancellation=True, access_log=None, shutdown_timeout=5.0
        )
        await runner.setup()
        host, port = config.tap.listen, config.tap.port
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}", hint="give another --port"
            ) from error
        on_event(f"listening on http://{host}:{runner.addresses[0][1]}, counts at /_tap")
        while not stop.is_set():
            await asyncio.sleep(STOP_S)
        await runner.cleanup()
    finally:
        await tap.close()
    if tap.recorder.faults:
        raise next(iter(tap.recorder.faults.values()))
