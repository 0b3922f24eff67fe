"""Versions of packages, against the bounds in the metadata of this installation."""

import platform
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement

from logitcask.engine.findings import Finding

PROGRAM = "logitcask"
FOR_DEVELOPERS = ("dev", "bench")
SHOWN = ("torch", "transformers", "accelerate")

NEEDED_FOR = {
    "lora": "adapters: keys of [lora]",
    "s3": "stores in object stores: s3://, gs://, az://",
    "server": "teachers at a URL, and `tap`",
    "data": "prompts from Parquet, folders of `datasets` and the Hub; `store export`",
    "trl": "trainers of TRL",
    "trackers": "TensorBoard and W&B, train.args.report_to",
    "deepspeed": "train.sharding = zero3",
    "ray": "--runner ray",
    "vllm": "run.backend = vllm",
    "dedup": "`recipe prompts --embedding-model`",
    "figures": "figures of probes",
}
"""Extra -> the features that need it."""

OWN_ENVIRONMENT = {"vllm": ".venv-vllm"}
"""Extra -> folder of an environment of its own: it pins torch and transformers."""
FLAGS = {"deepspeed": "--no-build-isolation "}
"""Extra -> flags of pip: its build reads the installed torch."""


def install(extra: str) -> str:
    """Return the command that installs an extra."""
    pip, before = "pip", ""
    if folder := OWN_ENVIRONMENT.get(extra):
        pip, before = f"{folder}/bin/pip", f"python -m venv {folder} && "
    return f'{before}{pip} install {FLAGS.get(extra, "")}-e ".[{extra}]"'


def check_packages() -> Iterator[Finding]:
    """Check the version of Python and of each package that every run needs."""
    try:
        of_all, python = requires(PROGRAM) or [], metadata(PROGRAM)["Requires-Python"]
    except PackageNotFoundError:
        yield Finding(
            check="packages",
            state="fault",
            message=f"{PROGRAM} is not installed, so the versions that it needs are not known",
            hint="pip install -e . in its folder",
        )
        return
    here = platform.python_version()
    fits = Requirement(f"python{python or ''}").specifier.contains(here, prereleases=True)
    yield Finding(
        check="python",
        state="ok" if fits else "fault",
        message=f"{here}; {python} is needed",
        hint="" if fits else "make a virtual environment with a newer Python",
    )
    needed = [each for each in map(Requirement, of_all) if _applies(each, "")]
    faults = [found for each in needed if (found := _fault(each))]
    yield from faults
    bad = {each.check for each in faults}
    right = [each.name for each in needed if each.name not in bad]
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN if name in right)
    good = len(needed) - len(faults)
    message = f"{good} of {len(needed)} within their bounds: {shown}"
    yield Finding(check="packages", state="ok", message=message)


def check_extras(needed: Mapping[str, str]) -> Iterator[Finding]:
    """Check the extras. needed: extra -> the key that needs it; without it that is a fault."""
    try:
        of_all = [*map(Requirement, requires(PROGRAM) or [])]
        extras: Collection[str] = metadata(PROGRAM).get_all("Provides-Extra") or ()
    except PackageNotFoundError:  # check_packages reports it
        return
    for extra in [*NEEDED_FOR, *(each for each in extras if each not in NEEDED_FOR)]:
        if extra in FOR_DEVELOPERS or extra not in extras:
            continue
        purpose = NEEDED_FOR.get(extra, "")
        packages = [e for e in of_all if _applies(e, extra) and not _applies(e, "")]
        faults = [found for each in packages if (found := _fault(each))]
        there = [f"{e.name} {version(e.name)}" for e in packages if not _fault(e)]
        lacks = "; ".join(each.message for each in faults)
        by = f", which {needed[extra]} needs" if extra in needed else ""
        yield Finding(
            check=f"[{extra}]",
            state="ok" if not faults else "fault" if extra in needed else "note",
            message=f"{lacks}{by}: for {purpose}" if faults else f"{', '.join(there)}: {purpose}",
            hint=install(extra) if faults else "",
        )


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _fault(requirement: Requirement) -> Finding | None:
    """Return the fault of a package that is missing or out of its bounds, or None."""
    name, bounds = requirement.name, requirement.specifier
    try:
        found = version(name)
    except PackageNotFoundError:
        found = ""
    if found and bounds.contains(found, prereleases=True):
        return None
    return Finding(
        check=name,
        state="fault",
        message=f"{name} {found}, not {bounds}" if found else f"no {name}",
        hint=f'pip install "{name}{bounds}"',
    )
