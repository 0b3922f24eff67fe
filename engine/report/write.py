"""The file of a page: where it may be written, and its replacement in one step."""

from pathlib import Path

from logitcask.engine.errors import ConfigError
from logitcask.engine.report.page import MARK, page
from logitcask.engine.report.panels import Report


def check_place(out: Path) -> None:
    """Raise ConfigError where no page can be written, and for a file that is no page of ours."""
    hint = "give a file with -o, such as report.html"
    if out.is_dir():
        raise ConfigError(f"-o {out} is a folder", hint=hint)
    if not out.parent.is_dir():
        raise ConfigError(f"-o {out}: there is no folder {out.parent}", hint="make it first")
    if out.exists():
        with out.open("rb") as file:
            if MARK not in file.read(500):
                raise ConfigError(f"-o {out} is there, and is no report of ours", hint=hint)


def write_page(out: Path, report: Report) -> int:
    """Write the page of a report, and return its bytes. A page that is open stays whole."""
    check_place(out)
    data = page(report).encode()
    staged = out.with_name(f".{out.name}.new")
    staged.write_bytes(data)
    staged.replace(out)
    return len(data)
