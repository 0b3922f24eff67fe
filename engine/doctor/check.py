"""The checks of `logitcask doctor` in their order."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from logitcask.engine.config.parse.toml import read_toml
from logitcask.engine.doctor.configured import check_configuration, check_store, extras_of
from logitcask.engine.doctor.devices import check_devices
from logitcask.engine.doctor.folder import check_folder
from logitcask.engine.doctor.machine import check_machine
from logitcask.engine.doctor.packages import check_extras, check_packages
from logitcask.engine.errors import ConfigError
from logitcask.engine.findings import Finding


def check_all(target: str = "", overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """Check this machine; with a TOML file for `distill` also what that file needs, and with the
    path or URL of a store that store.

    overrides: texts section.key=value for the file. Nothing is downloaded. Raises ConfigError for
    a file that is no configuration, and for overrides without one.
    """
    config = None
    if target.endswith(".toml") or Path(target).is_file():
        config = read_toml(Path(target), overrides)
    elif overrides:
        raise ConfigError("--set is given without a TOML file", hint="give the file of `distill`")
    yield from check_packages()
    yield from check_devices()
    yield from check_machine()
    if config is not None:
        yield from check_configuration(config)
    elif target:
        yield from check_store(target)
    else:
        yield from check_folder(Path())
    yield from check_extras({} if config is None else extras_of(config))
