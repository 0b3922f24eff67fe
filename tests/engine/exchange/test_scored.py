"""Texts with a teacher's log-probs: DistillKit's and axolotl's, read, refused and trained on."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from logitcask.engine.commands.adopt import run_import
from logitcask.engine.config.parse.toml import validate
from logitcask.engine.config.sections import ImportConfig
from logitcask.engine.errors import ConfigError, ObjectiveError, PromptError
from logitcask.engine.exchange.chat import TextReader
from logitcask.engine.exchange.files import Files
from logitcask.engine.exchange.imported import Imported
from logitcask.engine.exchange.scored import distillkit
from logitcask.engine.exchange.scored.files import read_axolotl
from logitcask.engine.exchange.scored.rows import TeacherCounts
from logitcask.engine.objectives import parse_objective
from logitcask.engine.packing.batches import batches
from logitcask.engine.prompts.lines import Line
from logitcask.engine.store import open_store
from logitcask.engine.training.cache_info import check_objective
from logitcask.engine.types import Array
from tests.engine.tiny import EOS, N_VOCAB, make_model, make_tokenizer, save_folder

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "distillkit.json").read_text())["cases"]
ULP = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 1e-6, "float64": 1e-12}
K = 4


@pytest.mark.parametrize("case", GOLDEN)
def test_bytes_are_read_as_distillkit_reads_them(case: dict[str, Any]) -> None:
    config = distillkit.Compression.model_validate(case["config"])
    data = [
        np.array([list(bytes.fromhex(row)) for row in case[name]], np.uint8)
        for name in (distillkit.LOGPROBS, distillkit.IDS)
    ]
    assert [each.shape[1] for each in data] == [config.logprob_bytes, config.id_bytes]
    ids, lp = distillkit.decode(data[0], data[1], config)
    theirs = np.array([[float.fromhex(value) for value in row] for row in case["logprobs"]])
    assert ids.tolist() == case["ids"]
    # The sum of a fit may be rounded otherwise, by its order.
    assert np.allclose(lp, theirs, rtol=ULP[config.exact_dtype], atol=1e-6)
    if config.is_exact and config.exact_dtype == "float32":
        ours = distillkit.encode(ids, lp, config)
        assert [each.tolist() for each in ours] == [each.tolist() for each in data]


def teacher(tokens: list[int], seed: int = 0) -> tuple[Array, Array, Array]:
    """Return (log-probs [n - 1, V] of tokens 1.., ids [n - 1, K], their log-probs)."""
    logits = np.random.default_rng(seed).normal(size=(len(tokens) - 1, N_VOCAB))
    logits[np.arange(len(tokens) - 1), tokens[1:]] += 6
    full = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-full, 1)[:, :K]
    return full, ids, np.take_along_axis(full, ids, 1)


TOKENS = [5, 6, 7, 8, 9, 10]


def row(tokens: list[int] = TOKENS, **changed: Any) -> dict[str, Any]:
    _, ids, lp = teacher(tokens)
    logprobs, packed = distillkit.encode(ids, lp, distillkit.exact(K, N_VOCAB))
    found = {
        "input_ids": tokens,
        distillkit.LOGPROBS: logprobs.tolist(),
        distillkit.IDS: packed.tolist(),
    }
    return {key: value for key, value in (found | changed).items() if value is not None}


TYPES = {
    "input_ids": pa.list_(pa.uint64()),
    distillkit.LOGPROBS: pa.list_(pa.list_(pa.uint8())),
    distillkit.IDS: pa.list_(pa.list_(pa.uint8())),
}


def write(folder: Path, *rows: dict[str, Any], config: Any = None, **types: Any) -> Path:
    """Write rows as DistillKit's StreamingParquetWriter does, with its types."""
    folder.mkdir(exist_ok=True)
    names = list(rows[0]) if rows else list(TYPES)
    kinds = {name: (TYPES | types).get(name) for name in names}
    arrays = [pa.array([each[name] for each in rows], kinds[name]) for name in names]
    parquet.write_table(pa.Table.from_arrays(arrays, names=names), folder / "data_0.parquet")
    settings = distillkit.exact(K, N_VOCAB).model_dump(mode="json") if config is None else config
    if settings != "none":
        text = settings if isinstance(settings, str) else yaml.safe_dump(settings)
        (folder / distillkit.CONFIG).write_text(text)
    return folder


def read(path: Path, format: str) -> list[Imported]:
    return list(Files([path], format, make_tokenizer(chat_template=True), [EOS])())


TURNS = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "two"}]
TWO = make_tokenizer()("two\n")["input_ids"]
"""The last turn, as the template writes it."""


def chat(**changed: Any) -> dict[str, Any]:
    _, ids, lp = teacher([0, *TWO])
    logprobs = [
        [{"token": f"token_id:{i}", "logprob": v} for i, v in zip(*pair, strict=True)]
        for pair in zip(ids.tolist(), lp.tolist(), strict=True)
    ]
    return {"messages": TURNS, "logprobs": logprobs} | changed


def lines(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def test_rows_become_log_probs_of_the_next_token(tmp_path: Path) -> None:
    _, ids, lp = teacher(TOKENS)
    labels = [-100, 6, 7, -100, 9, -100]  # as DistillKit's KL has them: row i counts
    whole, masked = read(
        write(tmp_path / "a", row(labels=TOKENS), row(labels=labels)), "distillkit"
    )
    assert (whole.prompt, whole.response) == ((5,), (6, 7, 8, 9, 10))
    assert (masked.prompt, masked.response, masked.mask) == ((5, 6), (7, 8, 9, 10), (1, 1, 0, 1))
    for found, first in ((whole, 0), (masked, 1)):
        assert found.teacher is not None
        assert found.teacher.ids.tolist() == ids[first:].reshape(-1).tolist()
        assert found.teacher.entry_lp.tolist() == lp[first:].reshape(-1).astype("f4").tolist()
        assert found.teacher.lp.tolist() == lp[first:, 0].astype("f4").tolist()
    # Two sequences in one row: the last log-probs of the first are of a token that was cut off.
    packed = row(attention_mask=[1, 1, 1, 2, 2, 0])
    first, second = read(write(tmp_path / "b", packed), "distillkit")
    assert [first.response, second.response] == [(6, 7), (9,)]
    assert second.teacher is not None
    assert second.teacher.ids.tolist() == ids[3].tolist()
    # The form without compression.
    raw = {"input_ids": TOKENS, "token_ids": ids.tolist(), "top_values": lp.tolist()}
    (plain,) = read(write(tmp_path / "c", raw, config="none"), "distillkit")
    assert plain.teacher is not None
    assert whole.teacher is not None
    assert plain.teacher.digest() == whole.teacher.digest()


def test_axolotl_rows_are_of_the_last_turn_and_hold_its_tokens(tmp_path: Path) -> None:
    both = [chat(), chat(logprobs=[[*r, {"token": "token_id:1", "logprob": -20.0}] if i else r
                                   for i, r in enumerate(chat()["logprobs"])])]  # fmt: skip
    shifted = [
        {
            "messages": chat()["messages"],
            "target_token_ids": [[int(e["token"][9:]) for e in r] for r in chat()["logprobs"]],
            "logprobs": [[e["logprob"] for e in r] for r in chat()["logprobs"]],
        }
    ]
    one, two, three = read(lines(tmp_path / "a.jsonl", *both, *shifted), "axolotl")
    _, ids, lp = teacher([0, *TWO])
    assert one.response == tuple(TWO)
    for found in (one, two, three):
        assert found.teacher is not None
        # Of rows with K and K + 1 ids, K are the best of all.
        assert found.teacher.ids.tolist() == ids.reshape(-1).tolist()
        assert found.teacher.lp.tolist() == lp[:, 0].astype("f4").tolist()


def edit(name: str, change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Return a row with one column changed."""
    return row(**{name: change([list(e) if isinstance(e, list) else e for e in row()[name]])})


def bytes_of(lp: Any, ids: Any = None) -> dict[str, Any]:
    known, _ = np.broadcast_arrays(teacher(TOKENS)[1] if ids is None else np.array(ids), lp)
    a, b = distillkit.encode(known, np.array(lp), distillkit.exact(K, N_VOCAB))
    return row(**{distillkit.LOGPROBS: a.tolist(), distillkit.IDS: b.tolist()})


LP, IDS = teacher(TOKENS)[2], teacher(TOKENS)[1]
EXACT = distillkit.exact(K, N_VOCAB).model_dump(mode="json")
UNFIT = [
    (bytes_of(np.where(np.arange(K) == 1, math.nan, LP)), "a log-prob of nan"),
    (bytes_of(np.where(np.arange(K) == 0, 0.5, LP)), "a log-prob of 0.5"),
    (bytes_of(np.where(np.arange(K) == 0, math.inf, LP)), "a log-prob of inf"),
    (bytes_of(np.full_like(LP, -math.inf)), "no id with a probability"),
    (bytes_of(np.full_like(LP, math.log(0.3))), "a mass of 1.2"),
    (bytes_of(LP, np.repeat(IDS[:, :1], K, 1)), "one id twice"),
    (edit(distillkit.LOGPROBS, lambda v: v[:3]), "log-probs of 3"),
    (edit(distillkit.LOGPROBS, lambda v: [*v, v[0], v[0]]), "log-probs of 7"),
    (edit(distillkit.LOGPROBS, lambda v: [*v[:4], v[4][:-1]]), "lists of 15 to 16"),
    (edit(distillkit.LOGPROBS, lambda v: [e[:8] for e in v]), "8 bytes of a token, and 16"),
    (edit(distillkit.IDS, lambda v: [[*e, 0] for e in v]), "bytes of a token"),
    (edit(distillkit.IDS, lambda v: v[:4]), "ids of 4 tokens"),
    (edit(distillkit.IDS, lambda v: []), "0 bytes of a token"),
    (row(input_ids=[]), "0 values"),
    (row(input_ids=[5, 6, 7, 8, 2**63, 10]), "no list of token ids"),
    (row(input_ids=[5, 6, 2**32, 8, 9, 10]), "no list of token ids"),
    (row(input_ids=[*TOKENS, 11, 12]), "log-probs of 5 tokens, and 8"),
    (row(labels=[1, 2]), "2 values for 6 tokens"),
    (row(attention_mask=[0.5] * 6), "no list of integers"),
    (row(input_ids=None), "has the columns"),
    (row(**{distillkit.IDS: None}), "has the columns"),
    ({"input_ids": TOKENS, "packed_indices": [[1]], "exact_values": [[0.1]], "coeffs": [[0.1]]},
     "log-probs are unknown"),
    ({"input_ids": TOKENS, "token_ids": [[1]] * 5, "top_values": [[1]] * 5}, "top_values of"),
    ({"input_ids": TOKENS, "token_ids": [1] * 5, "top_values": [[-1.0]] * 5}, "no list of lists"),
]  # fmt: skip
CONFIGS: list[tuple[Any, str]] = [
    ("none", "cannot be read"),
    ("k: [1", "is not YAML"),
    ("- 1", "Input should be"),
    (EXACT | {"k": 0}, "k: "),
    (EXACT | {"k": True}, "k: "),
    (EXACT | {"d": 1 << 40}, "d: "),
    (EXACT | {"exact_k": 9}, "above k"),
    (EXACT | {"exact_k": 1}, "needs polynomial_terms"),
    (EXACT | {"polynomial_terms": ["tan"]}, "polynomial_terms"),
    (EXACT | {"polynomial_terms": [-1]}, "polynomial_terms"),
    (EXACT | {"secret": 1}, "secret"),
    (EXACT | {"exact_dtype": "float8"}, "exact_dtype"),
    (
        EXACT | {"residual_bins": [{"scale_dtype": "float32", "element_bits": 4,
                                    "num_elements": 3}]},
        "more than k",
    ),
    ({"vocab_size": 9, "k": 4, "exact_k": 2, "polynomial_degree": 8}, "log-probs are unknown"),
    ("!!python/object/apply:os.getcwd []", "is not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "cause"), UNFIT)
def test_a_hostile_row_is_refused(tmp_path: Path, wrong: dict[str, Any], cause: str) -> None:
    with pytest.raises(PromptError) as caught:
        read(write(tmp_path / "a", wrong), "distillkit")
    assert cause in caught.value.cause, caught.value.cause


@pytest.mark.parametrize(("config", "cause"), CONFIGS)
def test_a_hostile_configuration_is_refused(tmp_path: Path, config: Any, cause: str) -> None:
    with pytest.raises(PromptError) as caught:
        read(write(tmp_path / "a", row(), config=config), "distillkit")
    assert cause in caught.value.cause, caught.value.cause
    cut = write(tmp_path / "b", row()) / "data_0.parquet"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(PromptError, match="cannot be read"):
        read(cut, "distillkit")


def entry(**changed: Any) -> list[list[Any]]:
    """Return log-probs whose second row has another first entry."""
    rows: list[list[Any]] = chat()["logprobs"]
    rows[1] = [rows[1][0] | changed, *rows[1][1:]]
    return rows


WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    (chat(logprobs=chat()["logprobs"][1:]), "and the last turn has"),
    (chat(logprobs=[]), "log-probs of 0 tokens"),
    (chat(logprobs=chat()["logprobs"][::-1]), "which is not among its ids"),
    (chat(logprobs=[[], *chat()["logprobs"][1:]]), "a row of 0 entries"),
    (chat(logprobs=[None, *chat()["logprobs"][1:]]), "null, not a list"),
    (chat(logprobs="abc"), "a string, not a list"),
    (chat(logprobs={"a": 1}), "not a list"),
    (chat(logprobs=entry(token="two")), "names no id"),
    (chat(logprobs=entry(token="token_id:-1")), "names no id"),
    (chat(logprobs=entry(token=12)), "names no id"),
    (chat(logprobs=entry(token="token_id:99999999999")), "names no id"),
    (chat(logprobs=entry(token="token_id:9999999999")), "id 9999999999"),
    (chat(logprobs=entry(logprob=None)), "log-prob None"),
    (chat(logprobs=entry(logprob="-1")), "log-prob '-1'"),
    (chat(logprobs=entry(logprob=True)), "log-prob True"),
    (chat(logprobs=entry(logprob=0.7)), "a log-prob of 0.7"),
    (chat(logprobs=entry(logprob=0.0)), "above 1"),
    (chat(logprobs=entry(token=chat()["logprobs"][1][1]["token"])), "one id twice"),
    (chat(logprobs=[[[1]], *chat()["logprobs"][1:]]), "names no id"),
    (chat(logprobs=[[1.5], *chat()["logprobs"][1:]]), "names no id"),
    (chat(target_token_ids=[[1]]), "not 4 ids"),
    (chat(target_token_ids="x"), "not 4 ids"),
    (chat(target_logprobs=[[-1.0]]), "prepared form"),
    (chat(messages="x", logprobs=[]), "not a list of turns"),
]


@pytest.fixture(scope="module")
def reader() -> Iterator[TextReader]:
    with closing(TextReader(make_tokenizer(chat_template=True), [EOS], last=True)) as found:
        yield found


@pytest.mark.parametrize(("wrong", "cause"), WRONG_CHATS)
def test_a_hostile_conversation_is_refused(
    reader: TextReader, wrong: dict[str, Any], cause: str
) -> None:
    assert read_axolotl(Line(Path("a"), 1, json.dumps(chat())), reader) is not None
    with pytest.raises(PromptError, match="line 2") as caught:
        read_axolotl(Line(Path("a"), 2, json.dumps(wrong)), reader)
    assert cause in caught.value.cause, caught.value.cause


def test_rounded_masses_are_rescaled_and_normalized_ones_refused(tmp_path: Path) -> None:
    lossy = EXACT | {"exact_dtype": "bfloat16"}
    lp = np.log(np.full((5, K), 0.2515))
    packed = row()[distillkit.IDS]
    wide = np.ascontiguousarray(lp, "<f4").view("<u2")[:, 1::2].copy().view(np.uint8)
    rows = row(**{distillkit.LOGPROBS: wide.tolist(), distillkit.IDS: packed})
    (found,) = read(write(tmp_path / "a", rows, config=lossy), "distillkit")
    assert found.teacher is not None
    assert found.teacher.rescaled == 5
    assert np.exp(found.teacher.entry_lp).reshape(5, K).sum(1) == pytest.approx(1.0, abs=1e-6)
    counts = TeacherCounts(N_VOCAB)
    counts.add(found)
    with pytest.raises(PromptError, match="divided by their sum"):
        counts.check()
    smaller = bytes_of(LP - 4)
    (found,) = read(write(tmp_path / "b", smaller), "distillkit")
    with pytest.raises(PromptError, match="add up to"):
        counts.add(found)
    assert found.teacher is not None
    with pytest.raises(PromptError, match="the student's are below"):
        TeacherCounts(int(found.teacher.ids.max())).add(found)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    save_folder(folder, make_model(seed=0), make_tokenizer(chat_template=True))
    return folder


def config(student: Path, file: Path, store: Path, **imported: Any) -> ImportConfig:
    return validate(
        ImportConfig,
        {
            "student": {"model": str(student)},
            "store": {"url": str(store), "profile": "raw32"},
            "imported": {"files": [file], "student_topk": 4, "unit_positions": 6, **imported},
            "run": {"device": "cpu"},
        },
        source="test",
    )


@pytest.mark.parametrize("format", ["distillkit", "axolotl"])
def test_an_import_is_a_set_of_scores_to_train_on(
    student: Path, tmp_path: Path, format: str
) -> None:
    if format == "distillkit":
        tokens = [TOKENS, [9, *TOKENS], [8, 7, 3, 4, 11]]
        rows = [row(each) for each in tokens]
        # One token is not among the teacher's ids.
        _, ids, _ = teacher(tokens[2])
        tokens[2][3] = int(next(i for i in range(3, N_VOCAB) if i not in ids[2]))
        file = write(tmp_path / "files", *rows[:2], rows[2] | {"input_ids": tokens[2]})
    else:
        file = lines(
            tmp_path / "a.jsonl",
            chat(id="a"),
            chat(id="b", messages=[{"role": "user", "content": "?"}, TURNS[1]]),
        )
    said: list[str] = []
    settings = config(student, file, tmp_path / "store", format=format, teacher="big")
    report = run_import(settings, on_event=said.append)
    assert report.units_new == report.units_total > 1
    again = run_import(settings)
    assert (again.units_done_before, again.units_new) == (report.units_total, 0)
    store = open_store(tmp_path / "store")
    head = store.head()
    scored = total = 0
    for segment in head.rollouts("main"):
        data = store.read_rollouts(segment)
        assert np.isnan(data.b_lp).all(), "the sampler is unknown"
        scores = store.read_scores(head.scores("big")[segment.seg_id], base=data)
        marks = np.ones(data.positions, bool) if scores.scored is None else scores.scored
        kept = np.exp(scores.entry_lp.astype(float)).sum() + np.exp(scores.s_lp.astype(float)).sum()
        outside = np.exp(scores.log_tail[marks].astype(float)).sum()
        assert kept + outside == pytest.approx(marks.sum(), rel=1e-5), "tail = 1 - sum"
        scored, total = scored + int(marks.sum()), total + data.positions
    assert total - scored == (format == "distillkit")
    assert any("without a score: 1 of 15" in line for line in said) == (format == "distillkit")
    provenance = head.scores("big")[segment.seg_id][0].provenance
    assert "declared by the user, imported from" in provenance["teacher"]["revision"]
    names = {"rollouts": "main", "teacher": "big"}
    objective = parse_objective("forward_kl", k=4).objective
    assert check_objective(objective, store, snapshot=head, **names)
    assert (
        sum(
            int((p.targets.weight > 0).sum())
            for p in batches(store, snapshot=head, pack_length=64, **names)
        )
        == scored
    )
    sampled = parse_objective("sampled_token").objective
    with pytest.raises(ObjectiveError):
        check_objective(sampled, store, snapshot=head, **names)


def test_a_teacher_is_named_where_files_hold_one(student: Path, tmp_path: Path) -> None:
    for wrong in ({"format": "distillkit"}, {"format": "neutral", "teacher": "big"}):
        with pytest.raises(ConfigError, match="axolotl and distillkit"):
            config(student, tmp_path / "a", tmp_path / "store", **wrong)
