"""Output of `logitcask probe`: tables, JSON without NaN, and the sentence on how to read it."""

import json
from typing import Any

from logitcask.engine.report.sections.probes.section import file_panels
from tests.cli.conftest import World


def test_probes_of_a_store_print_tables_and_json(world: World, call: Any) -> None:
    regions = call("probe regions --store @st --format json").json
    assert (regions["probe"], regions["k"]) == ("regions", 4)
    assert regions["regions"]["union"]["ids"] >= regions["regions"]["overlap"]["ids"]
    text = call("probe regions --store @st").out.splitlines()
    assert text[0].split()[:3] == ["region", "ids", "student_mass"]
    assert regions["reading"] in text[-1]
    topk = call("probe k --store @st --format json").json
    assert [each["k"] for each in topk["table"]] == [1, 2, 4]
    assert topk["estimators"] is None
    assert topk["reading"] in call("probe k --store @st").out
    models = "--model @student --teacher-model @teacher --positions 8 --device cpu"
    both = call(f"probe k --store @st {models}")
    assert "student_topk_bucket" in both.out, both.err
    drift = call("probe drift --store @st --model @student --device cpu --format json").json
    assert [each["lag"] for each in drift["lines"]] == [0, 0]
    sampler, student = (each["means"] for each in drift["lines"])
    # The student has not moved, so its draws are those of the store.
    assert student["cache/approx_kl"] < 1e-6
    assert student["cache/coverage"] >= sampler["cache/coverage"] - 1e-3
    assert "--max-drift" in call("probe drift --store @st --model @student --device cpu").out
    # The page of a report shows what was printed.
    bars, *_ = panels_of(world, regions)
    shares = {bar.group: bar.value for bar in bars.bars if bar.name == "gradient of opd"}
    assert shares["overlap"] == regions["regions"]["overlap"]["share"]["opd"]
    mass, *errors = panels_of(world, topk)
    assert {each.of: each.y for each in mass.series}["coverage"] == tuple(
        each["coverage"] for each in topk["table"]
    )
    assert not errors
    *_, students = panels_of(world, drift)
    assert [row[-1] for row in students.rows] == [
        each["means"]["overlap/ratio"] for each in drift["lines"]
    ]


def panels_of(world: World, values: Any) -> list[Any]:
    """Return the panels of a report for the JSON that a probe printed."""
    file = world.at(world.new("probe"))
    file.write_text(json.dumps(values))
    return file_panels(file, "p")
