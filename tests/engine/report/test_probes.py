"""Panels of the probes show the numbers that the probes printed; other files are refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from logitcask.cli.probe import probe_command
from logitcask.engine.errors import ConfigError
from logitcask.engine.probes.candidates.agreement import Estimate
from logitcask.engine.probes.candidates.compatibility import CompatibilityReport, TeacherReport
from logitcask.engine.probes.continuation import ContinuationReport, Cut
from logitcask.engine.probes.correctness import correctness_report
from logitcask.engine.probes.positions import position_report
from logitcask.engine.probes.reward import reward_report, sequence_rewards
from logitcask.engine.probes.topk.estimators import Estimator, EstimatorReport
from logitcask.engine.probes.topk.mass import TopKReport
from logitcask.engine.report.build import build_report
from logitcask.engine.report.panels import Lines, Panel, Table
from logitcask.engine.report.sections.probes.output import number
from logitcask.engine.report.sections.probes.section import BUILDERS, file_panels, probes_section
from logitcask.engine.store import Store
from tests.engine.cached import make_graded_unit, make_store, make_unit
from tests.engine.report.made import facts_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    units = [make_graded_unit(seed) for seed in range(2)]
    return make_store(tmp_path_factory.mktemp("store") / "s", units)


def panels_of(folder: Path, name: str, report: Any) -> list[Panel]:
    """Return the panels of a report as its command prints it."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"probe": name, **asdict(report)}))
    return file_panels(file, "p")


def test_each_probe_has_a_builder() -> None:
    assert BUILDERS.keys() == probe_command.commands.keys()


def test_the_store_answers_reward_and_correctness(store: Store, tmp_path: Path) -> None:
    section = probes_section([facts_of(store)])
    rewards, groups = section.panels
    found = reward_report(sequence_rewards(store, store.head()), correct_from=1.0)
    assert isinstance(rewards, Table)
    assert rewards.rows == (
        ("correct", found.correct, found.mean_correct, found.mean_correct_se),
        ("incorrect", found.incorrect, found.mean_incorrect, found.mean_incorrect_se),
    )
    assert f"AUROC {found.auroc:.3f} ± {found.auroc_se:.3f}" in rewards.title
    assert found.reading in rewards.how
    split = correctness_report(store, store.head(), correct_from=1.0)
    assert isinstance(groups, Table)
    of = {row[0]: row[1:] for row in groups.rows}
    gap = split.measures["entropy/gap"]
    assert of["entropy/gap"][0] == f"{gap.correct:.4g} ± {gap.correct_se:.2g}"
    assert [each.title for each in section.absent] == ["Probes that were run"]
    # A file of the same probe is the same panel.
    assert panels_of(tmp_path, "reward", found)[0].how == rewards.how + " From reward.json."


def test_a_store_without_rewards_says_so(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [make_unit(0)])
    section = probes_section([facts_of(store)], [tmp_path / "r.json"][:0])
    assert not section.panels
    assert "have no rewards; sample with --grader" in section.absent[0].why


def test_positions_of_a_file_are_lines(store: Store, tmp_path: Path) -> None:
    report = position_report(store, store.head(), bins=1)
    entropy, kl, overlap = panels_of(tmp_path, "positions", report)
    assert isinstance(overlap, Lines)
    (every,) = report.ranges
    assert {each.of: each.y[0] for each in overlap.series} == {
        name: every.means[name]
        for name in ("overlap/ratio", "overlap/mass_student", "overlap/mass_teacher")
    }
    assert (entropy.id, kl.id) == ("p-positions-entropy", "p-positions-kl")


def test_candidates_and_continuations(tmp_path: Path) -> None:
    teacher = TeacherReport(
        name="good",
        model="m",
        assessment="cannot tell",
        because="few prompts",
        rank=1,
        measures={"overlap/ratio": Estimate(mean=0.75, se=0.01), "accuracy/gain": None},
        accuracy={"p0": 1.0},
    )
    report = CompatibilityReport(
        k=16,
        prompts=1,
        rows=9,
        store="s",
        rollouts="r",
        student_accuracy=Estimate(mean=0.5, se=None),
        accuracy={"p0": 0.5},
        teachers=(teacher,),
        references=(("JustRL", "72 %"),),
        reading="the assessment rests on thresholds",
    )
    ranks, measures, paper = panels_of(tmp_path, "compatibility", report)
    assert isinstance(ranks, Table)
    assert ranks.rows == ((1, "good", "m", "cannot tell", "few prompts"),)
    assert "right in 0.5 of its responses. The assessment rests on thresholds." in ranks.how
    assert isinstance(measures, Table)
    assert measures.rows == (("overlap/ratio", "0.75 ± 0.01"),)
    assert isinstance(paper, Table)
    assert paper.rows == (("JustRL", "72 %"),)
    half, whole = Estimate(mean=0.5, se=0.125), Estimate(mean=1.0, se=None)
    cuts = (
        Cut(at=0, prompts=4, student=half, teacher=whole, advantage=half),
        Cut(at=8, prompts=0, student=None, teacher=None, advantage=None),
    )
    (drawn,) = panels_of(tmp_path, "continuation", ContinuationReport(n=2, cuts=cuts, reading="no"))
    assert isinstance(drawn, Lines)
    student, right = drawn.series
    assert (student.x, student.y, student.low, student.high) == ((0,), (0.5,), (0.375,), (0.625,))
    assert right.low == right.high == (1.0,)


def test_estimators_are_lines_of_their_errors(tmp_path: Path) -> None:
    bias = {"bias": 0.1, "bias_se": None, "variance": 0.2, "variance_se": None}
    table = tuple(
        Estimator(estimator=name, k=k, rms_error=error, **bias)
        for name, k, error in (("mc", 2, 1.5), ("mc", 4, 1.0), ("overlap", 2, 0.25))
    )
    found = EstimatorReport(rows=8, left_out=0, reverse_kl=0.5, table=table, reading="all err")
    file = tmp_path / "k.json"
    values = {**asdict(TopKReport(rows=8, table=(), reading="few")), "estimators": asdict(found)}
    file.write_text(json.dumps({"probe": "k", **values}))
    _, errors = file_panels(file, "p")
    assert isinstance(errors, Lines)
    assert "All err." in errors.how
    assert {each.of: (each.x, each.y) for each in errors.series} == {
        "mc": ((2, 4), (1.5, 1.0)),
        "overlap": ((2,), (0.25,)),
    }


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "names no probe"),
        ('[{"a": 1}]', "names no probe"),
        ('{"auroc": 0.7}', "names no probe"),
        ('{"probe": ["reward"]}', "names no probe"),
        ('{"probe": "other"}', "names no probe"),
        ('{"probe": "reward"}', "not the values of `logitcask probe reward` (KeyError('auroc'))"),
        ('{"probe": "drift", "lines": 3}', "not the values of `logitcask probe drift`"),
        ('{"probe": "metrics"}', "not the values of `logitcask probe metrics`"),
        ('[{"metric": "rows", "all": "<b>"}]', "'<b>' is no number"),
        ('[{"metric": 5, "all": 1}]', "5 is no text"),
        ('{"probe": "positions", "versions": [], "ranges": []}', "logitcask probe positions"),
    ],
)
def test_other_files_are_refused(text: str, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        probes_section([facts_of(None)], [file])
    assert cause in error.value.cause
    assert str(file) in error.value.cause
    assert "--format json" in error.value.hint


def test_a_missing_file_is_named_and_numbers_are_finite(tmp_path: Path) -> None:
    # Before the target is read, which is not there either.
    with pytest.raises(ConfigError, match="No such file"):
        build_report(tmp_path / "run", probes=[tmp_path / "none.json"])
    with pytest.raises(ConfigError, match="No such file"):
        file_panels(tmp_path / "none.json", "p")
    assert number(float("nan")) is None
    assert number(2) == 2
    with pytest.raises(TypeError):
        number(True)
