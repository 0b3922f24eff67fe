"""Times and sizes as text, for messages and pages."""


def duration(seconds: float) -> str:
    """Return seconds as `40 s`, `4 min` or `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def data_size(count: float) -> str:
    """Return bytes in powers of 1000, as prices and disks have them: `60 MB`."""
    return _scaled(count, 1000, ("bytes", "kB", "MB", "GB", "TB"))


def memory_size(count: float) -> str:
    """Return bytes in powers of 1024, as memory and files have them: `1.5 GiB`."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = max(p for p in range(len(units)) if not p or count >= base**p)
    # Three digits, and no exponent for the last numbers before the next unit.
    value = count / base**power
    return f"{value:.0f} {units[power]}" if value >= 100 else f"{value:.3g} {units[power]}"
