"""Figures and bars of the repaired real student, worked by hand."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / "bench" / "real_sums.py"


@pytest.fixture
def sums() -> Any:
    spec = importlib.util.spec_from_file_location("real_sums", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(after: list[float], right: int) -> dict[str, Any]:
    def model(divergence: list[float], marks: int) -> dict[str, Any]:
        text = {"kl_qp": divergence, "kl_pq": divergence, "tokens": [10.0, 30.0]}
        marks_of = [1] * marks + [0] * (10 - marks)
        return {"sums": {"teacher": text, "student": text}, "marks": marks_of}

    seconds = {f"{name} {stage}": 60.0 for name in ("round1", "round2") for stage in STAGES}
    return {
        "models": {
            "student": model([5.0, 15.0], 2),
            "round2": model(after, right),
            "teacher": model([0.0, 0.0], 6),
        },
        "cpu_s": seconds,
    }


STAGES = ("rollout", "score", "train")
PARTS = ("paired z", "over before", "answers of 2 rounds", "the teacher >=", "minutes")


def test_means_and_paired_differences_are_ratios_of_sums(sums: Any) -> None:
    found = row([2.0, 12.0], 5)
    assert sums.mean(found, "student", "teacher", "kl_qp") == (0.5, 0.0)
    # -6 / 40 tokens; the residuals are -3 + 0.15 x 10 and -3 + 0.15 x 30.
    value, error = sums.paired(found, "round2", "student", "teacher", "kl_qp")
    assert (value, error) == pytest.approx((-0.15, 4.5**0.5 / 40))
    assert sums.z_value((value, error)) == pytest.approx(-2.828, abs=1e-3)
    assert (sums.right(found, "round2"), sums.minutes(found)) == (0.5, 6.0)


@pytest.mark.parametrize(
    ("after", "right", "missed"),
    [
        ([3.9, 11.8], 5, set()),  # 0.785 of before; z -52
        ([2.0, 12.0], 5, {"paired z"}),  # 0.7 of before, z -2.83
        ([4.1, 12.2], 5, {"over before"}),  # 0.815 of before
        ([3.9, 11.8], 4, {"answers of 2 rounds"}),
    ],
)
def test_a_bar_is_missed_by_its_own_figure(
    sums: Any, after: list[float], right: int, missed: set[str]
) -> None:
    found = [name for name, (_, met) in sums.bars(row(after, right)).items() if not met]
    assert {part for part in PARTS if any(part in name for name in found)} == missed
    assert all(any(part in name for part in missed) for name in found)
