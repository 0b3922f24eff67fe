"""Scores of a tiny teacher with another tokenizer, against its own forward pass by hand."""

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitcask.engine.alignment.alignment import Alignment, align_tokenizers
from logitcask.engine.alignment.span_scores import ENDS, NO_TWIN, NONE, STARTS, SpanScores
from logitcask.engine.backends.hf import HF
from logitcask.engine.errors import ConfigError, IdentityError, ObjectiveError
from logitcask.engine.objectives import PRESETS
from logitcask.engine.objectives.bounds import SKIPPED
from logitcask.engine.objectives.spans.metrics import span_metric_names
from logitcask.engine.packing.source import PackSource
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.score.unit import ScoreRequest
from logitcask.engine.store import open_store
from logitcask.engine.training.cache_info import check_objective
from logitcask.engine.training.pack_loss import OF_STUDENT, pack_loss
from logitcask.engine.types import ModelRef, Rollouts, ScoreParams
from tests.engine.score.scored import PROMPTS, REQUEST, FailingScorer, ref, run
from tests.engine.tiny import CHARACTERS, make_model, save_folder

PAIRS = [*itertools.product(CHARACTERS[:48], CHARACTERS[:48])]


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of characters and of pairs of them; its ids are not those of the student."""
    tokens = ["<bos>", *CHARACTERS[::-1], *("".join(pair) for pair in PAIRS), "<end>"]
    bpe = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, PAIRS))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([])
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<end>")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """Make a teacher of pairs of characters."""
    tokenizer = pair_tokenizer()
    model = make_model(vocab_size=len(tokenizer), seed=2, eos=tokenizer.eos_token_id)
    return ref(save_folder(tmp_path_factory.mktemp("pairs") / "teacher", model, tokenizer))


def alignment_of(student: ModelRef, teacher: ModelRef, rows: str = STARTS) -> Alignment:
    return align_tokenizers(
        load_tokenizer(student.path),
        load_tokenizer(teacher.path),
        student_stops=student.stop_ids,
        teacher_stops=teacher.stop_ids,
        chat_template=False,
        rows=rows,
    )


def stored(path: Path, name: str = "pairs") -> list[tuple[Rollouts, SpanScores]]:
    store = open_store(path)
    scores = store.head().scores(name)
    return [
        (store.read_rollouts(each), store.read_span_scores(scores[each.seg_id]))
        for each in store.head().rollouts("main")
    ]


def direct(teacher: ModelRef, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Return log-probs [len(response), V] float64 of the network itself."""
    network = HF(teacher).model.double()
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *response]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(
    ("rows", "at_student"), [(STARTS, True), (ENDS, True), (ENDS, False), (NONE, False)]
)
def test_scores_are_those_of_the_teachers_own_forward_pass(
    store: Path, student: ModelRef, pairs: ModelRef, rows: str, at_student: bool
) -> None:
    tokenizer, ours = load_tokenizer(pairs.path), load_tokenizer(student.path)
    params = replace(REQUEST, at_student=at_student)
    keys: Any = {"teacher_name": "pairs", "params": params}
    run(store, pairs, HF(pairs), alignment=alignment_of(student, pairs, rows), **keys)
    widths = set()
    for rollouts, found in stored(store):
        start, entry, row = 0, 0, 0
        for i, of in enumerate(rollouts.seq_prompt.tolist()):
            student_ids = rollouts.tokens[rollouts.seq_off[i] : rollouts.seq_off[i + 1]].tolist()
            text = ours.decode(rollouts.prompts[of].token_ids)
            # By hand: the text of the prompt, then each response of its own.
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = found.tokens[found.offsets[i] : found.offsets[i + 1]].tolist()
            expected = ours.decode(student_ids, skip_special_tokens=True)
            assert tokenizer.decode(ids, skip_special_tokens=True) == expected
            q = direct(pairs, prompt, ids)
            lp = q.gather(1, torch.tensor(ids)[:, None])[:, 0]
            span = slice(start, start + len(ids))
            np.testing.assert_allclose(found.log_probs[span], lp, atol=2e-5)
            ends = np.flatnonzero(found.marks[span] & 1)
            begins = np.concatenate([[0], ends[:-1] + 1])
            theirs = np.flatnonzero(found.student_marks[rollouts.seq_off[i] :][: len(student_ids)])
            their_begins = np.concatenate([[0], theirs[:-1] + 1])
            widths |= {*zip(theirs - their_begins + 1, ends - begins + 1, strict=True)}
            their_rows = theirs if rows == ENDS else their_begins
            start += len(ids)
            for at, own in zip(ends if rows == ENDS else begins, their_rows, strict=True):
                if rows == NONE:
                    continue
                kept, count = int(found.kept[row]), int(found.cnt[row])
                listed = found.ids[entry : entry + count].tolist()
                np.testing.assert_allclose(
                    found.entry_lp[entry : entry + count], q[at][listed], atol=5e-3
                )
                assert listed[:kept] == q[at].topk(kept).indices.tolist()
                # The rest: the student's stored ids of the row, in the teacher's ids.
                assert rollouts.student is not None
                cnt = rollouts.student.cnt.astype(int)
                first = int(cnt[: rollouts.seq_off[i] + own].sum())
                ids_there = rollouts.student.ids[first : first + cnt[rollouts.seq_off[i] + own]]
                twins = {
                    tokenizer.convert_tokens_to_ids("<end>" if t == "<eos>" else t)
                    for t in ours.convert_ids_to_tokens(ids_there.tolist())
                    if t not in ("<pad>", "<unk>")
                }
                assert set(listed[kept:]) == (twins - set(listed[:kept]) if at_student else set())
                outside = 1 - q[at][listed].exp().sum().item()
                assert np.exp(found.log_tail[row]) == pytest.approx(outside, abs=1e-4)
                entropy = -(q[at].exp() * q[at]).sum().item()
                assert found.entropy[row] == pytest.approx(entropy, abs=1e-4)
                row, entry = row + 1, entry + count
        assert row == len(found.kept)
        for index, twin, size in zip(
            found.piece_ids, found.piece_twins, found.piece_lengths, strict=True
        ):
            token = tokenizer.convert_ids_to_tokens(int(index))
            control = token in ("<bos>", "<end>")
            assert size == (0 if control else len(token))
            known = {"<end>": "<eos>"}.get(token, token)
            if twin != NO_TWIN:
                assert ours.convert_ids_to_tokens(int(twin)) == known
            else:
                assert known not in ours.get_vocab()
    assert {(1, 1), (2, 1)} <= widths


def test_a_killed_run_resumes_and_a_second_one_finds_all_scores(
    store: Path, student: ModelRef, pairs: ModelRef
) -> None:
    scorer, alignment = HF(pairs), alignment_of(student, pairs)
    with pytest.raises(KeyboardInterrupt):
        run(store, pairs, FailingScorer(scorer, 1), alignment=alignment, teacher_name="pairs")
    report = run(store, pairs, scorer, alignment=alignment, teacher_name="pairs")
    assert (report.units_done_before, report.units_new) == (1, 1)
    assert "over spans" in report.notes[0]
    idle = FailingScorer(scorer, 0)
    for params in (REQUEST, replace(REQUEST, k_max=REQUEST.k_min)):
        again = run(store, pairs, idle, alignment=alignment, teacher_name="pairs", params=params)
        assert (again.units_new, idle.started) == (0, 0)


def test_another_alignment_needs_another_name(
    store: Path, student: ModelRef, pairs: ModelRef
) -> None:
    alignment, scorer = alignment_of(student, pairs), HF(pairs)
    run(store, pairs, scorer, alignment=alignment, teacher_name="pairs")
    before = open_store(store).head().scores("pairs")
    unknown = replace(alignment, tokenizers=("sha256:x", pairs.tokenizer_digest))
    for cause, keys in (
        ("of fewer ids", {"alignment": alignment, "params": replace(REQUEST, k_max=20)}),
        ("'spans.starts'.* not .*'spans.ends'", {"alignment": replace(alignment, rows=ENDS)}),
        ("tokenizer", {"teacher_name": "other"}),
        ("alignment with .* is of sha256:x", {"alignment": unknown, "teacher_name": "other"}),
    ):
        with pytest.raises(IdentityError, match=cause):
            run(store, pairs, scorer, **{"teacher_name": "pairs"} | keys)
    assert open_store(store).head().scores("pairs") == before


def test_the_students_own_tokenizer_gives_the_ordinary_scores(
    store: Path, student: ModelRef, teacher: ModelRef, scorer: HF
) -> None:
    run(store, teacher, scorer, teacher_name="plain")
    run(store, teacher, scorer, alignment=alignment_of(student, teacher), teacher_name="pairs")
    opened = open_store(store)
    plain = opened.head().scores("plain")
    segments = opened.head().rollouts("main")
    for segment, (rollouts, found) in zip(segments, stored(store), strict=True):
        scores = scorer.score(rollouts, REQUEST)
        np.testing.assert_array_equal(found.tokens, rollouts.tokens)
        np.testing.assert_array_equal(found.marks, 1)
        np.testing.assert_array_equal(found.student_marks, 1)
        np.testing.assert_array_equal(found.log_probs, opened.read_scores(plain[segment.seg_id]).lp)
        np.testing.assert_array_equal(found.kept, scores.cnt)
        np.testing.assert_allclose(found.entropy, scores.entropy, atol=1e-6)


def test_what_scores_over_spans_cannot_serve_is_refused(
    store: Path, student: ModelRef, pairs: ModelRef
) -> None:
    keys: Any = {
        "store": open_store(store),
        "model": pairs,
        "scorer": HF(pairs),
        "teacher_name": "pairs",
        "alignment": alignment_of(student, pairs),
    }
    drawn = ScoreParams(entry_kind="sampled", draws=3, at_student=False)
    for more, cause in (
        ({"extra_ids": "mc"}, "extra_ids = mc"),
        ({"positions": "first:3"}, "positions = first:3"),
        ({"params": drawn}, "selection = sampled"),
    ):
        with pytest.raises(ConfigError, match=cause):
            ScoreRequest(**keys, **more)


def test_prompts_are_those_of_the_alignment(
    store: Path, student: ModelRef, pairs: ModelRef
) -> None:
    """Give the teacher other prompts, as its chat template does."""
    other = {prompt.id: replace(prompt, token_ids=(0, 5, 6)) for prompt in PROMPTS}
    alignment = replace(alignment_of(student, pairs), prompts=other)
    run(store, pairs, HF(pairs), alignment=alignment, teacher_name="pairs")
    for rollouts, found in stored(store):
        ids = found.tokens[: found.offsets[1]].tolist()
        lp = direct(pairs, [0, 5, 6], ids).gather(1, torch.tensor(ids)[:, None])[:, 0]
        np.testing.assert_allclose(found.log_probs[: len(ids)], lp, atol=2e-5)
        assert rollouts.positions == len(found.student_marks)


@pytest.mark.parametrize("rows", [NONE, STARTS, ENDS])
def test_what_was_stored_decides_what_trains(
    store: Path, student: ModelRef, pairs: ModelRef, rows: str
) -> None:
    params = REQUEST if rows != NONE else replace(REQUEST, at_student=False)
    aligned = alignment_of(student, pairs, rows)
    run(store, pairs, HF(pairs), alignment=aligned, teacher_name="pairs", params=params)
    opened, works = open_store(store), {}
    snapshot = opened.head()
    for name, preset in PRESETS.items():
        with contextlib.suppress(ObjectiveError):
            of = {"snapshot": snapshot, "rollouts": "main", "teacher": "pairs"}
            check_objective(preset, opened, **of)  # type: ignore[arg-type]
            works[name] = preset.objective
    of_ids = {NONE: [], STARTS: ["uld", "gold", "simct", "x_token"], ENDS: ["gold_bayesian"]}
    alone = ["span_advantage", "alm", "sft", "fixed_advantage"]
    assert sorted(works) == sorted(alone + of_ids[rows])
    source = PackSource(opened, snapshot, "main", "pairs")
    targets = source.pack(np.asarray([(0, i) for i in range(4)])).targets
    vocab = len(load_tokenizer(student.path))
    generator = torch.Generator().manual_seed(0)
    head, states = (torch.randn(n, 8, generator=generator) for n in (vocab, len(targets)))
    for name, objective in works.items():
        result = pack_loss(objective, states, head, targets, n_vocab=vocab)
        assert result.loss.isfinite(), name
        assert all(values.isfinite().all() for values in result.metrics.values()), name
        expected = span_metric_names(objective) if objective.over_spans else OF_STUDENT
        assert result.metrics.keys() - {"loss/distill", "loss/ce"} == {*expected} - {SKIPPED}
