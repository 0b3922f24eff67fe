"""Work units of rollouts: planned once, resumed exactly, never of two plans or identities."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import ConfigError, GraderError, IdentityError, ModelError
from logitcask.engine.models import identity
from logitcask.engine.prompts.graders import Grader
from logitcask.engine.rollout.plan import RolloutReport, rollout
from logitcask.engine.rollout.unit import (
    UNIT_POSITIONS,
    RolloutRequest,
    check_same_distribution,
    draw,
    mc_params,
    prompt_set_digest,
    unit_key,
)
from logitcask.engine.store import open_store
from logitcask.engine.types import (
    STOP,
    ModelRef,
    Progress,
    Prompt,
    Rollouts,
    SamplingParams,
    ScoreParams,
    Scores,
    no_progress,
)
from tests.engine.tiny import save_folder

SAMPLING = SamplingParams(n=2, max_new_tokens=6)
PROMPTS = [Prompt(id=f"p{i}", token_ids=tuple(range(3, 5 + i)), answer=str(i)) for i in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        folder = save_folder(tmp_path_factory.mktemp("student"))
        return identity.model_ref(str(folder), chat_template=False)


@pytest.fixture(scope="module")
def hf(model: ModelRef) -> HF:
    return HF(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, hf: HF, model: ModelRef) -> Path:
    """Make a store with all three units: commits take most of a test's time."""
    path = tmp_path_factory.mktemp("stores") / "whole"
    report = run(path, hf, model, provenance_extra={"chat_template": False})
    assert (report.units_total, report.units_done_before, report.units_new) == (3, 0, 3)
    return path


class FailingSampler:
    """A sampler that fails in unit `at`, and counts the units that it starts."""

    def __init__(self, hf: HF, at: int = 1 << 30) -> None:
        self.hf, self.at, self.started = hf, at, 0
        self.describe = hf.describe

    def generate(self, prompts: Sequence[Prompt], *args: Any, **keys: Any) -> Rollouts:
        self.started += 1
        if self.started > self.at:
            raise KeyboardInterrupt
        return self.hf.generate(prompts, *args, **keys)


def run(
    store: Path, hf: HF, model: ModelRef, progress: Progress = no_progress, **keys: Any
) -> RolloutReport:
    fields = {"sampler": hf, "unit_prompts": 2, "student_k": 5, "sampling": SAMPLING} | keys
    request = RolloutRequest(
        store=open_store(store, create=True), model=model, **({"prompts": PROMPTS} | fields)
    )
    return rollout(request, progress=progress)


def contents(store: Path, name: str = "main") -> list[tuple[str, str, dict[str, Any]]]:
    snapshot = open_store(store).head()
    return [(s.unit_key, s.seg_id, dict(s.unit)) for s in snapshot.rollouts(name)]


def later(model: ModelRef, version: int) -> ModelRef:
    """Return a student with the same base weights, trained for some updates."""
    return dataclasses.replace(model, digest=identity.digest(version), version=version)


def test_units_are_fixed_ranges_and_hold_the_samples(whole: Path, hf: HF, model: ModelRef) -> None:
    store = open_store(whole)
    segments = store.head().rollouts("main")
    ranges = [(s.unit["first"], s.unit["count"]) for s in segments]
    assert ranges == [(0, 2), (2, 2), (4, 1)]
    direct = hf.generate(PROMPTS, SAMPLING, seed=0, version=0)
    units = [store.read_rollouts(s) for s in segments]
    np.testing.assert_array_equal(np.concatenate([u.tokens for u in units]), direct.tokens)
    np.testing.assert_allclose(np.concatenate([u.b_lp for u in units]), direct.b_lp, atol=2e-5)
    assert [p.answer for u in units for p in u.prompts] == [p.answer for p in PROMPTS]
    for unit in units:
        assert unit.student is not None
        assert (unit.student.cnt == 5).all()
        np.testing.assert_allclose(unit.student.lp, unit.b_lp, atol=1e-5)


def test_provenance_records_the_inputs_and_no_path(whole: Path, model: ModelRef) -> None:
    provenance = open_store(whole).head().segments[0].provenance
    assert provenance["set"]["units"] == 3
    assert provenance["set"]["prompts"] == 5
    assert (provenance["set"]["n"], provenance["set"]["student_topk"]) == (2, 5)
    assert provenance["student"] == model.provenance() | {"stop_ids": [1]}
    assert provenance["backend"]["name"] == "hf"
    assert provenance["chat_template"] is False
    assert provenance["logprob"] == "natural, temperature 1, ids [0, n_vocab)"


def test_a_killed_run_resumes_to_the_same_store(
    tmp_path: Path, whole: Path, hf: HF, model: ModelRef
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", hf, model, sampler=FailingSampler(hf, 1), scorer=hf)
    assert len(contents(tmp_path / "killed")) == 1
    seen: list[tuple[str, int, int]] = []
    report = run(tmp_path / "killed", hf, model, progress=lambda *x: seen.append(x[:3]))
    assert (report.units_done_before, report.units_new) == (1, 2)
    assert list(dict.fromkeys(seen)) == [("rollout", i, 3) for i in (1, 2, 3)]
    assert contents(tmp_path / "killed") == contents(whole)


def test_a_finished_run_samples_nothing(whole: Path, hf: HF, model: ModelRef) -> None:
    before, idle = contents(whole), FailingSampler(hf)
    report = run(whole, hf, model, sampler=idle, scorer=hf)
    assert (report.units_done_before, report.units_new, idle.started) == (3, 0, 0)
    assert (report.positions, report.mean_length) == (0, 0.0)
    assert contents(whole) == before


def test_the_report_counts_the_new_units(tmp_path: Path, hf: HF, model: ModelRef) -> None:
    report = run(tmp_path / "s", hf, model, first=1, count=3, unit_prompts=3)
    direct = hf.generate(PROMPTS[1:4], SAMPLING, seed=0, version=0)
    assert (report.sequences, report.positions) == (6, len(direct.tokens))
    assert report.mean_length == pytest.approx(len(direct.tokens) / 6)
    assert report.stopped_share == pytest.approx(float((direct.finish == STOP).mean()))


def test_the_content_of_a_unit_does_not_depend_on_the_unit_size(
    tmp_path: Path, whole: Path, hf: HF, model: ModelRef
) -> None:
    """Use the default unit, which may have UNIT_POSITIONS, so it holds all of these prompts."""
    assert UNIT_POSITIONS // (SAMPLING.n * SAMPLING.max_new_tokens) > len(PROMPTS)
    assert run(tmp_path / "one", hf, model, unit_prompts=None).units_total == 1
    tokens = []
    for path in (tmp_path / "one", whole):
        store = open_store(path)
        units = [store.read_rollouts(s) for s in store.head().rollouts("main")]
        tokens.append(np.concatenate([u.tokens for u in units]).tolist())
    assert tokens[0] == tokens[1]


def test_keys_depend_on_every_input_of_the_data(model: ModelRef) -> None:
    def key(prompts: Any = PROMPTS, sampling: Any = SAMPLING, model: Any = model, **k: Any) -> str:
        keys = {"seed": 0, "student_k": 5} | k
        return unit_key(prompt_set_digest(prompts, model, sampling, **keys), model, 0, 2)

    base = key()
    assert base == key()
    assert base == key(model=dataclasses.replace(model, name="elsewhere", path=Path("/else")))
    others = [
        key(PROMPTS[:-1]),
        key([dataclasses.replace(PROMPTS[0], answer="x"), *PROMPTS[1:]]),
        key(sampling=SAMPLING.model_copy(update={"top_p": 0.9})),
        key(model=later(model, 1)),
        key(model=dataclasses.replace(model, template_digest="t")),
        key(seed=1),
        key(student_k=6),
        key(mc_draws=8),
        key(grader="exact"),
        unit_key("s", model, 0, 2),
    ]
    assert len({base, *others}) == 11
    assert key(mc_draws=0, grader="") == base, "older sets without them keep their digest"


def test_draws_follow_the_students_distribution_and_have_its_log_probs(
    tmp_path: Path, hf: HF, model: ModelRef
) -> None:
    """Draw 4096 ids for each of 12 rows: every share is within 5 standard errors."""
    draws, seed = 4096, 3
    run(tmp_path / "s", hf, model, prompts=PROMPTS[:1], mc_draws=draws, seed=seed)
    store = open_store(tmp_path / "s")
    (segment,) = store.head().rollouts("main")
    found = store.read_rollouts(segment)
    vocab = model.n_vocab
    all_ids = ScoreParams(entry_kind="topk", k_min=vocab, k_max=vocab, at_student=False)
    scores = hf.score(found, all_ids)
    exact = np.zeros((found.positions, vocab))
    exact[np.repeat(np.arange(found.positions), scores.cnt), scores.ids] = scores.entry_lp
    assert found.draws is not None
    row = np.repeat(np.arange(found.positions), found.draws.cnt)
    # With all ids listed they are summed in another order.
    np.testing.assert_allclose(found.draws.lp, exact[row, found.draws.ids], rtol=5e-7)
    assert np.bincount(row, found.draws.mult).tolist() == [draws] * found.positions
    counts = np.zeros_like(exact)
    counts[row, found.draws.ids] = found.draws.mult
    p = np.exp(exact)
    assert (np.abs(counts / draws - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1 / draws).all()
    # The same seed draws the same, and a teacher of that seed draws others.
    again = draw(hf, found, mc_params(draws, seed))
    assert np.array_equal(again.mult, found.draws.mult)
    of_teacher = dataclasses.replace(mc_params(draws, seed), seed=seed)
    assert not np.array_equal(hf.score(found, of_teacher).mult, found.draws.mult)


class Thirds:
    """A grader: the share of ids divisible by three; it fails at `bad` and counts its calls."""

    def __init__(self, bad: str = "") -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, prompt: Prompt, text: str) -> float:
        self.calls += 1
        if prompt.id == self.bad:
            raise GraderError(f"grader thirds on prompt {prompt.id!r}", hint="mend it")
        return thirds([int(word) for word in text.split()])

    def grader(self) -> Grader:
        return Grader(
            name="thirds", grader=self, decode=lambda ids: " ".join(str(each) for each in ids)
        )


def thirds(ids: list[int]) -> float:
    return sum(each % 3 == 0 for each in ids) / max(1, len(ids))


def test_every_response_is_graded_once(tmp_path: Path, hf: HF, model: ModelRef) -> None:
    grader = Thirds()
    report = run(tmp_path / "s", hf, model, grader=grader.grader())
    store = open_store(tmp_path / "s")
    expected, got = [], []
    for segment in store.head().rollouts("main"):
        unit = store.read_rollouts(segment)
        assert segment.layout == "student+reward"
        assert segment.provenance["set"]["grader"] == "thirds"
        assert unit.reward is not None
        got += unit.reward.tolist()
        cuts = np.split(unit.tokens, unit.seq_off[1:-1])
        expected += [np.float32(thirds(ids.tolist())) for ids in cuts]
    assert got == expected
    assert len(set(got)) > 1
    assert grader.calls == len(got) == 2 * len(PROMPTS)
    assert report.mean_reward == pytest.approx(np.mean(expected))
    again = run(tmp_path / "s", hf, model, grader=grader.grader())
    assert (again.units_new, again.mean_reward, grader.calls) == (0, None, len(got))


def test_a_unit_whose_grader_fails_is_not_committed(
    tmp_path: Path, hf: HF, model: ModelRef
) -> None:
    with pytest.raises(GraderError, match="on prompt 'p3'"):
        run(tmp_path / "s", hf, model, grader=Thirds("p3").grader())
    assert [unit["first"] for _, _, unit in contents(tmp_path / "s")] == [0]
    assert run(tmp_path / "s", hf, model, grader=Thirds().grader()).units_new == 2


def test_rollouts_with_and_without_rewards_do_not_mix(whole: Path, hf: HF, model: ModelRef) -> None:
    grader = Thirds()
    with pytest.raises(IdentityError, match="grader = None, not 'thirds'"):
        run(whole, hf, model, grader=grader.grader())
    assert grader.calls == 0


def test_unsupported_draws_are_refused_before_the_first_sample(
    tmp_path: Path, hf: HF, model: ModelRef
) -> None:
    scorer, sampler = FailingSampler(hf), FailingSampler(hf)
    scorer.capabilities = hf.capabilities - {"drawn"}  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="the backend hf cannot give drawn"):
        run(tmp_path / "s", sampler, model, scorer=scorer, mc_draws=2)
    assert sampler.started == 0


def test_rollouts_with_and_without_draws_do_not_mix(whole: Path, hf: HF, model: ModelRef) -> None:
    with pytest.raises(IdentityError, match="mc_draws = None, not 2"):
        run(whole, hf, model, mc_draws=2)


def test_rounds_of_a_loop_share_a_name(tmp_path: Path, hf: HF, model: ModelRef) -> None:
    """Call it as distill does: another version and another range of the prompts each round."""
    for version in range(3):
        student = model if version == 0 else later(model, version)
        report = run(
            tmp_path / "s", hf, student, first=version, count=1, unit_prompts=2, versions=True
        )
        assert report.units_new == 1
    units = [unit for _, _, unit in contents(tmp_path / "s")]
    assert units == [{"version": i, "first": i, "count": 1} for i in range(3)]


def test_a_name_never_mixes_two_plans_or_students(
    tmp_path: Path, whole: Path, hf: HF, model: ModelRef
) -> None:
    store = shutil.copytree(whole, tmp_path / "s")
    before = contents(store)
    unused = {"sampler": FailingSampler(hf, 0), "scorer": hf}
    with pytest.raises(IdentityError, match=r"are of student .*, version 0; this one is .* 3"):
        run(store, hf, later(model, 3), **unused)
    with pytest.raises(IdentityError, match="were made with"):
        run(store, hf, model, seed=1, **unused)
    with pytest.raises(IdentityError, match="were made with"):
        run(store, hf, model, sampling=SAMPLING.model_copy(update={"top_k": 3}), **unused)
    with pytest.raises(IdentityError, match=r"prompts 0\.\.1 as one unit, and the plan has 0\.\.2"):
        run(store, hf, model, unit_prompts=3, **unused)
    with pytest.raises(IdentityError, match="already, under the name 'main'"):
        run(store, hf, model, name="other", **unused)
    other_root = dataclasses.replace(
        model, digest=identity.digest(1), base_weights=identity.digest(1)
    )
    with pytest.raises(IdentityError, match=r"stands for student\.base_weights"):
        run(store, hf, other_root, versions=True)
    assert contents(store) == before
    assert run(store, hf, model, name="other", seed=1, unit_prompts=5).units_new == 1


def test_a_plan_outside_the_prompts_is_refused(tmp_path: Path, hf: HF, model: ModelRef) -> None:
    for keys in ({"first": 5}, {"count": 6}, {"first": -1}, {"count": 0}, {"unit_prompts": 0}):
        with pytest.raises(ConfigError, match="of 5 prompts"):
            run(tmp_path / "s", hf, model, **keys)


def test_a_sampler_that_cannot_score_needs_a_scorer(
    tmp_path: Path, hf: HF, model: ModelRef
) -> None:
    with pytest.raises(ConfigError, match="FailingSampler samples and cannot score"):
        run(tmp_path / "s", hf, model, sampler=FailingSampler(hf))


def test_a_failure_of_the_scorer_commits_nothing(tmp_path: Path, hf: HF, model: ModelRef) -> None:
    class FailingScorer:
        capabilities = hf.capabilities
        describe = hf.describe

        def score(self, *_: Any, **keys: Any) -> Scores:
            raise MemoryError

    with pytest.raises(MemoryError):
        run(tmp_path / "s", hf, model, sampler=FailingSampler(hf), scorer=FailingScorer())
    assert contents(tmp_path / "s") == []


class Shifted(FailingSampler):
    """A sampler whose log-probs are `shift` nats off."""

    shift = 0.0

    def generate(self, prompts: Sequence[Prompt], *args: Any, **keys: Any) -> Rollouts:
        rolled = super().generate(prompts, *args, **keys)
        return dataclasses.replace(rolled, b_lp=rolled.b_lp - np.float32(self.shift))


def test_a_sampler_of_another_distribution_commits_nothing(
    tmp_path: Path, hf: HF, model: ModelRef
) -> None:
    shifted = Shifted(hf)
    shifted.shift = 2e-3
    with pytest.raises(ModelError, match=r"difference of \d+ log-probs is 0\.002 nats"):
        run(tmp_path / "s", hf, model, sampler=shifted, scorer=hf)
    assert contents(tmp_path / "s") == []
    shifted.shift = 1e-4
    run(tmp_path / "s", hf, model, sampler=shifted, scorer=hf)
    assert len(contents(tmp_path / "s")) == 3


@pytest.mark.parametrize(
    ("count", "shift", "fits"), [(1, 0.9, True), (400, 0.1, True), (400, 0.2, False)]
)
def test_half_precision_is_compared_by_its_mean(count: int, shift: float, fits: bool) -> None:
    student = np.full(count, -2.0, np.float32)
    if fits:
        check_same_distribution(student - np.float32(shift), student, "bfloat16")
    else:
        with pytest.raises(ModelError, match="the mean difference of 400 log-probs is 0.2 nats"):
            check_same_distribution(student - np.float32(shift), student, "bfloat16")


def test_a_log_prob_that_is_no_number_is_refused() -> None:
    lp = np.array([-1.0, np.nan], np.float32)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelError):
            check_same_distribution(lp, np.zeros(2, np.float32), dtype)
