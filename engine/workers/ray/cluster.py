"""The connection to a Ray cluster, and what its actors may use of it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from logitcask.engine.errors import ConfigError, ServerError


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module ray, connected to a cluster.

    address: of the cluster; empty = RAY_ADDRESS, else the cluster of this machine, else one that
    lives as long as the connection. A connection of the caller is used and stays.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "runner = ray needs the package ray", hint='pip install "logitcask[ray]"'
        ) from error
    if ray.is_initialized():
        yield ray
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or None, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS", "this machine")
        raise ServerError(
            f"no Ray cluster at {where}: {reason(error)}",
            hint="give --ray-address HOST:6379, or leave it out for a cluster on this machine",
        ) from error
    # Ray takes SIGTERM for itself.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
    try:
        # Ray prints news of its nodes; standard output is for the result of a command.
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


def resources_of(ray: Any, declared: Mapping[str, float], device: str) -> dict[str, float]:
    """Return the resources of one actor: one CPU, and one GPU if it may compute on one.

    declared: those of the configuration, which come first. device: of [run]. Raises ConfigError
    for a device that Ray would not give to the actor.
    """
    if device.startswith("cuda:"):
        raise ConfigError(
            f"device = {device} with runner = ray, which chooses the GPU of each actor",
            hint="give device = cuda, and resources such as GPU = 1",
        )
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    gpus = float(device == "cuda" or (device == "auto" and has_gpus))
    found = {"CPU": 1.0, "GPU": gpus, **declared}
    if device == "cuda" and not found["GPU"]:
        raise ConfigError(
            f"resources GPU = 0 with device = {device}", hint="give GPU = 1, or a part of one"
        )
    return found


def options_of(resources: Mapping[str, float]) -> dict[str, Any]:
    """Return resources as the options of an actor."""
    own = {name: value for name, value in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"], "resources": own}


def are_free(ray: Any, resources: Mapping[str, float]) -> bool:
    """Return True where the cluster has these resources free, on all nodes together."""
    free = ray.available_resources()
    return all(free.get(name, 0.0) >= value for name, value in resources.items() if value)


def reason(error: BaseException) -> str:
    """Return the line of an error of Ray that says why: a task's traceback has it at its end."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback" in str(error) else 0]
