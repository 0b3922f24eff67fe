"""Times and sizes as text."""

import pytest

from logitcask.engine.quantities import data_size, duration, memory_size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (240, "4 min"), (720, "12 min"), (9000, "2.5 h")],
)
def test_durations_have_one_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "data", "memory"),
    [
        (0, "0 bytes", "0 B"),
        (60, "60 bytes", "60 B"),
        (999, "999 bytes", "999 B"),
        (1500, "1.5 kB", "1.46 KiB"),
        (1023 * 1024, "1.05 MB", "1023 KiB"),
        (60 * 10**6, "60 MB", "57.2 MiB"),
        (3 << 30, "3.22 GB", "3 GiB"),
        (5 * 10**15, "5000 TB", "4547 TiB"),
    ],
)
def test_sizes_have_three_digits(count: float, data: str, memory: str) -> None:
    assert (data_size(count), memory_size(count)) == (data, memory)
