"""Rollouts of a tap's store as those of a student: losses, beginnings, refusals, resumption."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logitcask.engine.commands.adopt import run_import
from logitcask.engine.commands.score import run_score
from logitcask.engine.config.sections import Import, ImportConfig, ScoreConfig
from logitcask.engine.errors import IdentityError, ObjectiveError, PromptError, StoreError
from logitcask.engine.exchange.adopt import ImportReport
from logitcask.engine.models.identity import model_ref
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import batches
from logitcask.engine.store import Store, open_store
from logitcask.engine.tap.journal import Journal
from logitcask.engine.tap.record import Record
from logitcask.engine.tap.seal import SealJob, seal_file
from logitcask.engine.training.cache_info import check_objective
from logitcask.engine.training.pack_loss import pack_loss
from logitcask.engine.types import Scores
from tests.engine.backends.server.fake_server import FakeServer
from tests.engine.tap.scripted import open_tap
from tests.engine.tiny import EOS, N_VOCAB, make_model, make_tokenizer, save_folder

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(4, N_VOCAB, int(n)).tolist() for n in RNG.integers(8, 20, 6)]
MARKER = 3
"""Id after which the responses of the sequences 4 and 5 begin, which the tap does not know."""
for _ids, _at in zip(SEQUENCES[4:], (2, 5), strict=True):
    _ids[_at] = MARKER
STARTS = (3, 4, 5, 6, 3, 6)


class World:
    """Folders of a student and a teacher, and a store of a tap before the teacher's server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed, name in enumerate(("student", "teacher")):
            save_folder(folder / name, make_model(seed=seed))
        self.teacher = make_model(seed=1)
        asyncio.run(self._record())
        self.source = folder / "store"
        head = open_store(self.source).head()
        self.name = head.names("score")[0]
        ((scores,), *_) = head.scores(self.name).values()
        self.fingerprint = dict(scores.provenance["fingerprint"])

    def server(self) -> FakeServer:
        return FakeServer(self.teacher, root=str(self.folder / "teacher"))

    async def _record(self) -> None:
        """Record two segments; the last two sequences have an unknown beginning."""
        with self.server() as server:
            tokenizer = str(self.folder / "teacher")
            async with open_tap(server.url, self.folder, tokenizer=tokenizer) as tap:
                for part in (range(3), range(3, 6)):
                    for number in part:
                        body = {"model": "teacher", "prompt": SEQUENCES[number], "max_tokens": 1}
                        start = {"X-Logitcask-Start": str(STARTS[number])} if number < 4 else {}
                        sent = await tap.post(
                            "/v1/completions", {**body, "prompt_logprobs": 8}, **start
                        )
                        assert (sent[0], sent[2]) == (200, "new")
                    await tap.tap.recorder.seal()

    def adopt(
        self, store: Path, student: str = "student", rollouts: str = "main", **imported: Any
    ) -> tuple[ImportReport, list[str]]:
        config = {
            "student": {"model": str(self.folder / student)},
            "store": {"url": str(store), "rollouts": rollouts},
            "imported": {"files": [self.source], "format": "tap", "student_topk": 4, **imported},
            "run": {"device": "cpu"},
        }
        events: list[str] = []
        return run_import(ImportConfig.model_validate(config), on_event=events.append), events

    def score(self, store: Path, model: str, name: str, rollouts: str = "main") -> None:
        teacher = {"model": model, "name": name}
        if "://" in model:
            teacher["tokenizer"] = str(self.folder / "teacher")
        config = {
            "teacher": teacher,
            "store": {"url": str(store), "rollouts": rollouts, "profile": "raw32"},
            "score": {"selection": "top-k", "teacher_topk_min": 16, "teacher_topk_max": 16},
            "run": {"device": "cpu"},
        }
        run_score(ScoreConfig.model_validate(config))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def loss(store: Store, teacher: str, text: str = "forward_kl", rollouts: str = "main") -> Any:
    """Return the loss of the student on all rows."""
    names = {"rollouts": rollouts, "teacher": teacher}
    (pack,) = batches(store, snapshot=store.head(), pack_length=1000, **names)
    student = make_model(seed=0)
    inner = student.model(pack.input_ids, position_ids=pack.position_ids, use_cache=False)
    states = inner.last_hidden_state[0, pack.predict_at]
    objective = parse_objective(text, k=4 if text == "opd" else 8).objective
    found = pack_loss(objective, states, student.lm_head.weight, pack.targets, n_vocab=N_VOCAB)
    return found.loss.item()


def responses(store: Store, rollouts: str = "main") -> Iterator[tuple[list[int], list[int]]]:
    """Yield the ids of prompt and response of each sequence."""
    for segment in store.head().rollouts(rollouts):
        data = store.read_rollouts(segment)
        for number, prompt in enumerate(data.prompts):
            rows = slice(*data.seq_off[number : number + 2].tolist())
            yield list(prompt.token_ids), data.tokens[rows].tolist()


def test_the_loss_is_that_of_scores_of_the_same_teacher(world: World, tmp_path: Path) -> None:
    report, events = world.adopt(tmp_path / "s", after=(MARKER,))
    assert (report.units_new, report.sequences, report.left_out, events) == (2, 6, 0, [])
    store = open_store(tmp_path / "s")
    expected = [(ids[:at], ids[at:]) for ids, at in zip(SEQUENCES, STARTS, strict=True)]
    assert list(responses(store)) == expected
    adopted = loss(store, world.name)
    # The teacher in this process, then its server: the same log-probs, as float32 and as JSON.
    world.score(tmp_path / "s", str(world.folder / "teacher"), "hf")
    assert loss(store, "hf") == pytest.approx(adopted, rel=1e-5)
    world.adopt(tmp_path / "other", after=(MARKER,))
    with world.server() as server:
        world.score(tmp_path / "other", server.url, "served")
        assert loss(open_store(tmp_path / "other"), "served") == adopted
        # The ids of the student, which a tap cannot have: then the default of the paper runs.
        with pytest.raises(ObjectiveError):
            check(store, world.name, "opd")
        world.score(tmp_path / "s", server.url, world.name)
    check(store, world.name, "opd")
    assert loss(store, world.name) == adopted
    assert loss(store, world.name, "opd") == pytest.approx(loss(store, "hf", "opd"), rel=1e-4)


def check(store: Store, teacher: str, text: str) -> list[str]:
    objective = parse_objective(text, k=4 if text == "opd" else None)
    names = {"rollouts": "main", "teacher": teacher}
    return check_objective(objective, store, snapshot=store.head(), **names).lines()


def test_an_unknown_beginning_is_left_out_and_draws_are_refused(
    world: World, tmp_path: Path
) -> None:
    report, events = world.adopt(tmp_path / "s")
    assert (report.sequences, report.left_out) == (4, 2)
    assert report.positions == sum(map(len, SEQUENCES[:4])) - sum(STARTS[:4])
    assert len(events) == 1
    assert "2 sequences" in events[0]
    store = open_store(tmp_path / "s")
    for segment in store.head().rollouts("main"):
        data, imported = store.read_rollouts(segment), segment.provenance["imported"]
        assert np.isnan(data.b_lp).all()
        assert data.loss_mask.all()
        assert (imported["behavior"], imported["boundaries"]) == (False, "recorded")
        (scores,) = store.head().scores(world.name)[segment.seg_id]
        (before, *_) = open_store(world.source).head().scores(world.name).values()
        for key in ("teacher", "fingerprint", "backend", "request"):
            assert scores.provenance[key] == before[0].provenance[key]
    assert any("did not sample them" in line for line in check(store, world.name, "forward_kl"))
    for text in ("sampled_token", "sampled_token + importance"):
        with pytest.raises(ObjectiveError, match="without their log-probs"):
            check(store, world.name, text)


def test_an_import_resumes_and_repeats_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, calls = Store.commit_scores, list[Any]()

    def dying(store: Store, *args: Any, **fields: Any) -> Any:
        calls.append(fields)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return commit(store, *args, **fields)

    monkeypatch.setattr(Store, "commit_scores", dying)
    with pytest.raises(KeyboardInterrupt):
        world.adopt(tmp_path / "s")
    report, _ = world.adopt(tmp_path / "s")
    assert (report.units_done_before, report.units_new) == (1, 1)
    before = open_store(tmp_path / "s").head()
    assert len(before.segments) == 4
    report, _ = world.adopt(tmp_path / "s")
    assert (report.units_done_before, report.units_new) == (2, 0)
    assert open_store(tmp_path / "s").head().number == before.number
    with pytest.raises(IdentityError, match="as rollouts 'main'"):
        world.adopt(tmp_path / "s", rollouts="other")


def test_the_same_store_takes_them_under_another_name(world: World) -> None:
    world.adopt(world.source, rollouts="adopted")
    store = open_store(world.source)
    assert loss(store, world.name, rollouts="adopted") > 0
    # The adopted ones are no source: the only rollouts of a tap are still the first.
    assert world.adopt(world.source, rollouts="adopted")[0].units_new == 0
    with pytest.raises(IdentityError, match="tap"):
        world.adopt(world.source, rollouts="tap")


def seal(
    world: World, store: Path, teacher: str, sequences: list[list[int]], *, k: int = 8, **model: Any
) -> None:
    """Commit records of sequences as a tap does; the first three tokens are the prompt."""
    journal = Journal(store.parent / f"{teacher}-{len(list(store.parent.iterdir()))}")
    for ids in sequences:
        with torch.no_grad():
            lp = world.teacher(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        best, top = lp.topk(k)
        own = lp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        journal.put(
            Record(
                ids=np.array(ids, np.uint32),
                boundary=3,
                lp=own.numpy(),
                rank=np.zeros(len(own), np.uint32),
                top=top.numpy().astype(np.uint32),
                top_lp=best.numpy(),
            )
        )
    journal.mark_verified()
    reference = model_ref(str(world.folder / "teacher"), chat_template=False).provenance()
    (path,) = journal.close_files()
    fields: dict[str, Any] = {
        "store": str(store),
        "rollouts": "tap",
        "profile": "raw32",
        "teacher": teacher,
    }
    fields |= {"model": {**reference, **model}, "backend": {}, "fingerprint": world.fingerprint}
    seal_file(SealJob(path=path, **fields))


def from_source(world: World, source: Path, store: Path, **imported: Any) -> ImportReport:
    return world.adopt(store, files=[source], **imported)[0]


def test_several_teachers_keep_their_scores_and_no_sequence_comes_twice(
    world: World, tmp_path: Path
) -> None:
    source = tmp_path / "taps"
    for teacher, part in (("a", [0, 1]), ("b", [0, 1]), ("a", [1, 2]), ("b", [2, 1])):
        seal(world, source, teacher, [SEQUENCES[each] for each in part])
    assert len(open_store(source).head().rollouts("tap")) == 4
    report = from_source(world, source, tmp_path / "s")
    # 0 and 1 of both teachers, 2 of a, 2 of b: the last two are one segment with both scores.
    assert (report.units_new, report.sequences, report.left_out) == (3, 4, 2)
    store = open_store(tmp_path / "s")
    found = {name: store.head().scores(name) for name in ("a", "b")}
    assert [len(found[name]) for name in "ab"] == [2, 2]
    assert len(store.head().rollouts("main")) == 2
    names: dict[str, Any] = {"rollouts": "main", "pack_length": 1000}
    for name, theirs in found.items():
        (pack,) = batches(store, snapshot=store.head(), teacher=name, **names)
        assert len(pack.lengths) == 3
        for each in theirs.values():
            assert [s.layout for s in each] == ["full+bounds"]
    assert from_source(world, source, tmp_path / "s").units_new == 0


def test_what_does_not_fit_the_student_is_refused_before_a_store_is_made(
    world: World, tmp_path: Path
) -> None:
    ended = [*SEQUENCES[0], EOS]
    long = RNG.integers(4, N_VOCAB, 300).tolist()
    save_folder(tmp_path / "short", make_model(context=16))
    save_folder(tmp_path / "other", tokenizer=make_tokenizer(characters="abc"))
    cases: list[tuple[Any, type[Exception], str, dict[str, Any], dict[str, Any]]] = [
        ([long], PromptError, "300 tokens, and the student's context has 256", {}, {}),
        ([ended], IdentityError, r"stop ids \[1\]", {"stop_ids": [7]}, {}),
        ([ended], IdentityError, "tokenizer", {"tokenizer": "sha256:" + "0" * 64}, {}),
        ([ended], IdentityError, "n_vocab", {"n_vocab": N_VOCAB + 1}, {}),
        ([ended], StoreError, "no rollouts 'main' of a tap", {}, {"tap_rollouts": "main"}),
    ]
    for number, (sequences, kind, cause, model, imported) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        seal(world, folder / "tap", "a", sequences, **model)
        with pytest.raises(kind, match=cause):
            from_source(world, folder / "tap", folder / "s", **imported)
        assert not (folder / "s").exists()
    kept = from_source(world, tmp_path / "1" / "tap", tmp_path / "1" / "s", foreign_eos="keep")
    assert kept.sequences == 1
    with pytest.raises(StoreError, match="no rollouts of a tap"):
        from_source(world, tmp_path / "1" / "s", tmp_path / "2" / "s")
    assert not (tmp_path / "2" / "s").exists()


def test_without_any_beginning_the_way_out_is_named(world: World, tmp_path: Path) -> None:
    source, copy = open_store(world.source), open_store(tmp_path / "tap", create=True)
    segment = source.head().rollouts("tap")[1]
    data = source.read_rollouts(segment)
    (scores,) = source.head().scores(world.name)[segment.seg_id]
    cached = source.read_scores((scores,), base=data)
    unknown = replace(data, loss_mask=np.zeros_like(data.loss_mask), segment="")
    fields = {"unit_key": segment.unit_key, "unit": segment.unit}
    base = copy.commit_rollouts(unknown, name="tap", provenance=segment.provenance, **fields)
    copy.commit_scores(
        Scores(
            **{key: getattr(cached, key) for key in ("lp", "entropy", "entropy_hi", "log_tail")},
            **{key: getattr(cached, key) for key in ("cnt", "ids", "entry_lp")},
        ),
        base=base,
        name=world.name,
        unit_key=scores.unit_key,
        unit=scores.unit,
        provenance=scores.provenance,
    )
    with pytest.raises(PromptError, match="of none of 3 sequences") as caught:
        from_source(world, tmp_path / "tap", tmp_path / "s")
    assert "--after" in caught.value.hint
    with pytest.raises(PromptError, match=r"\[2\] do not occur"):
        from_source(world, tmp_path / "tap", tmp_path / "s", after=(2,))
    assert not (tmp_path / "s").exists()
    assert from_source(world, tmp_path / "tap", tmp_path / "s", after=(MARKER,)).sequences == 2
    (segment,) = open_store(tmp_path / "s").head().rollouts("main")
    assert segment.provenance["imported"]["boundaries"] == "after"


def test_records_without_log_probs_of_other_ids_are_sealed(world: World, tmp_path: Path) -> None:
    """Seal k = 0: the log-probs of the tokens alone, and bounds that hold for any distribution."""
    seal(world, tmp_path / "tap", "a", SEQUENCES[:1], k=0)
    store = open_store(tmp_path / "tap")
    (segment,) = store.head().rollouts("tap")
    found = store.read_scores(store.head().scores("a")[segment.seg_id])
    ids = torch.tensor([SEQUENCES[0]])
    with torch.no_grad():
        lp = world.teacher(ids).logits[0, 2:-1].log_softmax(-1)
    own = lp.gather(1, ids[0, 3:, None])[:, 0].numpy()
    np.testing.assert_array_equal(found.lp, own)
    assert not found.cnt.any()
    entropy = -(lp.exp() * lp).sum(1).numpy()
    assert found.entropy_hi is not None
    assert (found.entropy <= entropy + 1e-5).all()
    assert (entropy <= found.entropy_hi + 1e-5).all()
    np.testing.assert_allclose(np.exp(found.log_tail), 1, atol=1e-6)


def test_settings_of_another_format_are_refused() -> None:
    for imported, cause in (
        ({"files": ["a"], "format": "neutral", "after": "1,2"}, "left out with files"),
        ({"files": ["a"], "format": "text", "tap_rollouts": "tap"}, "left out with files"),
        ({"files": ["a", "b"], "format": "tap"}, "one store"),
        ({"files": ["a"], "format": "tap", "after": "1,x"}, "integer"),
        ({"files": ["a"], "format": "tap", "turns": "last"}, "left out with ids"),
    ):
        with pytest.raises(ValueError, match=cause):
            Import.model_validate(imported)
    assert Import.model_validate({"files": ["a"], "format": "tap", "after": "1,2"}).after == (1, 2)
