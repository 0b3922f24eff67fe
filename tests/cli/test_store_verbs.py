"""`logitcask store`: snapshots, deletion, copies, repair, extension and estimates."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.estimate.sizes import find_size
from logitcask.engine.score.plan import score
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import open_store
from logitcask.engine.store.format.entry import path_of
from logitcask.engine.types import ScoreParams
from tests.cli.conftest import KEPT, NEW, ROLL, SCORE, TRAIN, UNITS, N, World
from tests.engine.score.scored import ref
from tests.engine.tiny import CHARACTERS, N_VOCAB, make_model, make_tokenizer, save_folder
from tests.engine.training.returned_topk import TopKTeacher

ALL = 2 * UNITS
GOLDEN_1 = Path(__file__).parents[1] / "engine/store/golden_v1.tar.xz"


def test_train_takes_a_snapshot_by_tag_or_number(world: World, call: Any) -> None:
    store = world.store(ALL)
    snapshot = call(f"store snapshot {store} --format json").json
    assert snapshot["log_number"] == ALL - 1
    assert snapshot["rollouts"].keys() == {"main"}
    assert call(f"store tag {store} paper --at {ALL - 2}").code == 0
    assert call(f"store snapshot {store} --at paper --format json").json["tags"] == ["paper"]
    assert call(f"store tag {store} --format json").json[0]["tag"] == "paper"
    assert call(f"store info {store} --format json").json["tags"] == {"paper": ALL - 2}
    # At the tag one unit has no scores.
    call(f"{TRAIN} {store} --out {world.new('out')} --snapshot paper").assert_error(
        3, "1 of 4 units", "--partial"
    )
    out = world.new("out")
    result = call(f"{TRAIN} {store} --out {out} --snapshot paper --partial --format json")
    assert result.code == 0, result.err
    run = json.loads((world.at(out) / "run.json").read_text())
    assert run["pin"]["number"] == ALL - 2
    by_number = call(f"{TRAIN} {store} --out {out} --snapshot {ALL - 2} --partial --format json")
    assert by_number.json["resumed_at"] == result.json["updates"], "the same snapshot by its number"
    call(f"{TRAIN} {store} --out {out} --snapshot {ALL - 1} --partial").assert_error(
        1, "pin", "--overwrite"
    )
    call(f"{TRAIN} {store} --out {out} --snapshot nothing").assert_error(
        1, "no tag 'nothing'", "store tag"
    )
    call(f"store snapshot {store} --at 99").assert_error(
        1, "no log record 99", "give an existing number"
    )
    call(f"store tag {store} --remove").assert_error(2, "need the NAME", "--help")
    assert call(f"store tag {store} paper --remove").code == 0
    call(f"store snapshot {store} --at paper").assert_error(
        1, "no tag 'paper'; it has: none", "store tag"
    )


def test_deleted_scores_are_collected_and_scored_again(world: World, call: Any) -> None:
    store = world.store(ALL)
    deleted = call(f"store delete {store} --teacher big --format json").json
    assert len(deleted) == UNITS
    call(f"store delete {store} --teacher big").assert_error(
        2, "no 'big' to delete", "rollouts: main"
    )
    call(f"{TRAIN} {store} --out {world.new('out')}").assert_error(
        3,
        "no scores",
        "run `logitcask score` first; an earlier snapshot does not have later scores",
    )
    assert call(f"store gc {store} --format json").json["segments"] == 0, (
        "a recent snapshot reads them"
    )
    preview = call(f"store gc {store} --keep-days 0 --dry-run --format json").json
    assert (preview["segments"], preview["kept"]) == (UNITS, UNITS)
    report = call(f"store gc {store} --keep-days 0 --format json").json
    assert report == preview | {"dry_run": False}
    assert call(f"{SCORE} {store} --format json").json["units_new"] == UNITS
    report = call(f"store verify {store} --deep --format json").json
    assert (report["segments"], report["orphans"], report["decoded"]) == (ALL, [], True)
    call(f"store gc {store} --keep-days -1").assert_error(2, "--keep-days = -1", "readable")


def test_pack_and_unpack_copy_a_store(world: World, call: Any) -> None:
    store, packed, other = world.store(ALL), world.new("packed"), world.new("other")
    assert call(f"store pack {store} {packed} --format json").json["files"] == ALL
    files = " ".join(f"@{packed[1:]}/{f.name}" for f in world.at(packed).iterdir())
    assert call(f"store unpack {other} {files} --format json").json["added"] == ALL
    assert call(f"store merge {store} {other} --format json").json["there"] == ALL
    rows = [call(f"store show {name} --format json").json for name in (store, other)]
    assert rows[0] == rows[1]
    call(f"store unpack {other} @p.jsonl").assert_error(4, "p.jsonl: not a packed segment", "pack")
    scores_only = " ".join(name for name in files.split() if "/score-" in name)
    call(f"store unpack {world.new('lonely')} {scores_only}").assert_error(
        3, f"{UNITS} segments were left out", "bring these in too"
    )
    call(f"store merge {other} @nowhere").assert_error(1, "not a logitcask store", "check the path")
    assert not world.at("@nowhere").exists()


def test_damage_is_repaired_from_a_copy_or_scored_again(world: World, call: Any) -> None:
    store, copy = world.store(ALL), world.new("copy")
    assert call(f"store merge {copy} {store}").code == 0
    scores = [r for r in call(f"store ls {store} --format json").json if r["kind"] == "score"]
    file = world.at(store) / path_of("score", scores[0]["segment"], 0)
    sound = file.read_bytes()
    file.write_bytes(sound[:-1])
    broken = call(f"store verify {store}")
    broken.assert_error(4, scores[0]["segment"], "merge STORE COPY --repair")
    assert "damaged: " in broken.err
    assert call(f"store merge {store} {copy} --format json").json["repaired"] == 0
    assert call(f"store merge {store} {copy} --repair --format json").json["repaired"] == 1
    assert file.read_bytes() == sound
    # Without a copy: delete the unit and score it again.
    file.write_bytes(sound[:-1])
    segment = scores[0]["segment"]
    assert len(call(f"store delete {store} --segment {segment} --dry-run --format json").json) == 1
    assert call(f"store delete {store} --segment {segment}").code == 0
    assert call(f"{SCORE} {store} --format json").json["units_new"] == 1
    assert call(f"store verify {store} --deep").code == 0


def test_a_larger_request_extends_stored_scores(world: World, call: Any) -> None:
    store = world.store(ALL)
    extended = call(
        f"{SCORE} {store} --teacher-topk-min 6 --teacher-topk-max 20 --teacher-top-p "
        f"0.9999 --format json"
    ).json
    assert extended["units_new"] == UNITS
    layouts = [row["layout"] for row in call(f"store ls {store} --format json").json]
    assert layouts.count("extension") == UNITS
    (first, *_) = call(f"store show {store} --top 20 --format json").json["rows"]
    assert len(first["teacher_top"]) >= 6
    again = call(f"{SCORE} {store} --teacher-topk-min 5 --format json").json
    assert (again["units_new"], again["units_done_before"]) == (0, UNITS)
    result = call(
        f"{TRAIN} {store} --objective teacher_topk --loss-topk 6 --out {world.new('out')}"
    )
    assert result.code == 0, result.err
    own = (
        f"score --model @student --teacher self --teacher-topk-min 4 "
        f"--teacher-topk-max 4 --device cpu --store {store}"
    )
    assert call(own).code == 0
    assert call(f"{SCORE} {store} --extra-ids self --format json").json["units_new"] == UNITS
    call(f"{SCORE} {store} --extra-ids missing").assert_error(
        3, "no scores of 'missing'", "score with that"
    )


@pytest.mark.parametrize("profile", ["compact", "interop", "raw32"])
def test_profiles_are_stored_and_trained_from(world: World, call: Any, profile: str) -> None:
    from tests.cli.conftest import ROLL

    store = world.new("store")
    assert call(f"{ROLL} {store} --profile {profile}").code == 0
    assert call(f"{SCORE} {store} --profile {profile}").code == 0
    assert {row["profile"] for row in call(f"store ls {store} --format json").json} == {profile}
    assert call(f"store verify {store} --deep").code == 0
    assert call(f"{TRAIN} {store} --out {world.new('out')}").code == 0


def found_ratio(world: World) -> float:
    """Return the parameters of the student over those of the teacher."""
    sizes = [
        find_size(str(world.at(name)), "teacher", parameters=None).parameters
        for name in ("@student", "@teacher")
    ]
    return sizes[0] / sizes[1]


def test_an_estimate_without_models(world: World, call: Any) -> None:
    """Take the sizes of the command line, and 16 sequences of the 8 prompts of the file."""
    command = (
        "store estimate no/teacher @p.jsonl --student no/student --n 2 --response-tokens 500 "
        "--student-parameters 1e9 --student-kv-bytes 100000 --teacher-parameters 4e9 "
    )
    found = call(f"{command} --utilisation 0.5 --format json").json
    assert found["positions"] == 16 * 500
    assert found["store_bytes"] == 16 * 500 * 97
    assert found["score_hours"] == pytest.approx(2 * 4e9 * 16 * 756 / 156e12 / 3600)
    assert found["cost_stored_once"] is None
    assert "0.5 of the FLOP/s" in found["assumed"]
    hub = command.replace("@p.jsonl", "hub:a/b")
    call(hub).assert_error(2, "is not downloaded to count its prompts", "--prompt-count")
    assert call(f"{hub} --prompt-count 8 --format json").json["positions"] == 16 * 500
    call(command.replace("--student-kv-bytes 100000", "")).assert_error(
        1, "the size of the student no/student is not known", "--student-kv-bytes"
    )


def test_estimate_predicts_bytes_and_missed_kl(world: World, call: Any) -> None:
    command = (
        "store estimate @teacher @p.jsonl --student @student --no-chat-template "
        f"--max-new-tokens {NEW} --n {N} --teacher-topk-min 4 --student-topk 4 "
        f"--device cpu --sample 40"
    )
    prices = "--price-gpu-hour 2 --price-gb-month 0 --price-per-1k-requests 0 --runs 3"
    found = call(f"{command} {prices} --format json").json
    assert found["positions"] >= 40
    money, hours = found["costs"], found["all_prompts"]["scoring_seconds"] / 3600
    assert money["score_hours"] == pytest.approx(hours)
    # Training is 6 N of the student to scoring's 2 N of the teacher, by their config.json.
    assert money["train_hours"] / hours == pytest.approx(3 * found_ratio(world), rel=0.01)
    assert money["cost_teacher_in_trainer"] - money["cost_stored_once"] == pytest.approx(
        2 * 2 * hours
    ), "two runs of three score again"
    assert 0 < found["overlap_ratio"] < 1
    rows = {(r["profile"], r["top_p"], r["k_max"]): r for r in found["rows"]}
    assert len(rows) == 4 * 3 * 2
    for profile in ("default", "raw32"):
        # A larger top-p stores more entries and misses less of the KL.
        few, more = rows[profile, 0.99, 64], rows[profile, 0.9999, 64]
        assert few["entries"] <= more["entries"]
        assert few["forward_kl_missed"] >= more["forward_kl_missed"] - 1e-6
    exact = rows["raw32", 0.9999, 256]
    assert exact["forward_kl_missed"] == pytest.approx(0, abs=1e-4), (
        "nearly all of the 99 ids are stored"
    )
    assert rows["compact", 0.99, 64]["bytes"] < exact["bytes"]
    all_prompts = found["all_prompts"]
    assert all_prompts["positions"] == round(found["mean_length"] * 16)
    assert all_prompts["bytes"] == pytest.approx(
        all_prompts["positions"] * rows["default", 0.999, 64]["bytes"], rel=0.01
    )
    text = call(command).out
    assert "scoring_s_per_million" in text
    assert "forward_kl_missed" in text
    call(command.replace("--student @student ", "")).assert_error(2, "--student", "--help")
    call(command.replace("@teacher", "@other-tokenizer")).assert_error(
        1, "tokenizer", "--student-tokenizer"
    )


def test_estimate_needs_a_teacher_with_every_token(world: World, call: Any) -> None:
    """Reject a student with a token that the teacher lacks."""
    more = make_tokenizer(characters=CHARACTERS + "é")
    model = make_model(seed=0, vocab_size=N_VOCAB + 1, eos=[1, N_VOCAB])
    save_folder(world.at("@wider"), model, more)
    command = (
        "store estimate @teacher @p.jsonl --student @wider --student-tokenizer @wider "
        f"--no-chat-template --max-new-tokens {NEW} --n {N} --teacher-topk-min 4 "
        f"--student-topk 4 --device cpu"
    )
    call(command).assert_error(
        1, f"only one of student and teacher has, from {N_VOCAB} on", "template"
    )


def test_show_prints_a_base_model_only_by_name(world: World, call: Any) -> None:
    store = world.store()
    base = f"score --model @student --teacher-kind base --teacher root {KEPT} --store {store}"
    assert call(base).code == 0
    shown = call(f"store show {store} --format json").json
    per_name = [
        call(f"store show {store} --teacher {t} --format json").json for t in ("big", "root")
    ]
    assert shown == per_name[0] != per_name[1]


def test_show_prints_an_entropy_interval(world: World, call: Any) -> None:
    store = world.new("store")
    assert call(f"{ROLL} {store}").code == 0
    opened = open_store(world.at(store))
    teacher = ref(world.at("@teacher"))
    score(
        ScoreRequest(
            store=opened,
            model=teacher,
            scorer=TopKTeacher(HF(teacher), at_ids=False),
            teacher_name="big",
            params=ScoreParams(entry_kind="topk", k_min=4, k_max=4, at_student=False),
        )
    )
    rows = call(f"store show {store} --format json").json["rows"]
    text = call(f"store show {store}").out
    for row in rows:
        low, high = row["teacher_entropy"], row["teacher_entropy_hi"]
        assert low < high
        assert f"{low:.4g}-{high:.4g}" in text
    assert "teacher_entropy_hi" not in text
    listed = call(f"store ls {store} --format json").json
    assert {row["layout"] for row in listed if row["kind"] == "score"} == {"full+bounds"}
    assert "full+bounds" in call(f"store ls {store}").out
    assert "teacher_entropy_hi" not in call("store show @st --format json").json["rows"][0]


def test_upgrade_makes_a_store_of_format_1_readable(
    world: World, call: Any, tmp_path: Path
) -> None:
    with tarfile.open(GOLDEN_1) as packed:
        packed.extractall(tmp_path, filter="data")
    old, new = tmp_path / "cask", tmp_path / "new"
    call(f"store info {old}").assert_error(1, "format version 1", "store upgrade OLD NEW")
    report = call(f"store upgrade {old} {new} --format json").json
    newest = call(f"store snapshot {new} --format json").json["log_number"]
    assert (report["records"], report["there"]) == (newest + 1, 0)
    assert call(f"store verify {new} --deep").code == 0
    assert call(f"store upgrade {old} {new} --format json").json["there"] == report["records"]
