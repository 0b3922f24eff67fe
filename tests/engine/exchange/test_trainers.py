"""Data sets for other trainers: every entry against the distributions of a store."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcask.engine.errors import ConfigError, IncompleteError
from logitcask.engine.exchange.files import Files
from logitcask.engine.exchange.scored import distillkit
from logitcask.engine.exchange.scored.trainers import LOST, Trainer, export_trainer
from logitcask.engine.store import Store
from logitcask.engine.types import ModelRef
from tests.engine.cached import Unit, make_store, make_unit

parquet = pytest.importorskip("pyarrow.parquet")
VOCAB, K = 40, 4
ZERO = "sha256:" + "0" * 64
STUDENT = ModelRef(
    name="s",
    path=Path("s"),
    revision="",
    digest=ZERO,
    tokenizer_digest=ZERO,
    template_digest=ZERO,
    n_vocab=VOCAB,
    stop_ids=(2,),
    version=0,
    base_weights=ZERO,
)
ROUNDING = 2e-3
"""Nats: the store keeps float16."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[tuple[int, ...], Any]]:
    """Return a store with masked tokens, and (prompt tokens, mask, log q) of each sequence."""
    units, known = list[Unit](), {}
    for seed in (3, 4):
        unit = make_unit(seed, vocab=VOCAB, lengths=[9, 0, 7, 8, 1, 9])
        mask = np.random.default_rng(seed).random(unit.rollouts.positions) < 0.7
        unit = replace(unit, rollouts=replace(unit.rollouts, loss_mask=mask.astype(np.uint16)))
        units.append(unit)
        off = unit.rollouts.seq_off
        for i, prompt in enumerate(unit.rollouts.seq_prompt.tolist()):
            part = slice(int(off[i]), int(off[i + 1]))
            ids = unit.rollouts.prompts[prompt].token_ids
            if mask[part].any():
                key = (*ids, *unit.rollouts.tokens[part].tolist())
                known[key] = (len(ids), mask[part], unit.log_q[part])
    path = tmp_path_factory.mktemp("trainers") / "store"
    return make_store(path, units, student=STUDENT), known


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        row for file in folder.glob("*.parquet") for row in parquet.read_table(file).to_pylist()
    ]


@pytest.mark.parametrize("kind", ["axolotl", "distillkit", "trl"])
def test_every_entry_predicts_its_token(made: Any, tmp_path: Path, kind: Trainer) -> None:
    store, known = made
    said: list[str] = []
    out = tmp_path / "out"
    report = export_trainer(store, out, kind, on_event=said.append)
    assert (report.files, report.there, tuple(said)) == (2, 0, LOST[kind])
    assert export_trainer(store, out, kind).there == 2, "the same call resumes"
    rows = rows_of(out)
    assert {tuple(row["input_ids"]) for row in rows} == set(known)
    for row in rows:
        first, mask, log_q = known[tuple(row["input_ids"])]
        tokens = np.array(row["input_ids"])
        counted = first + np.flatnonzero(mask)
        best = np.argsort(-log_q[mask], 1)[:, :K]
        lp = np.take_along_axis(log_q[mask], best, 1)
        before = counted - 1
        if kind == "axolotl":
            labels = np.full(len(tokens), -100)
            labels[counted] = tokens[counted]
            assert row["labels"] == labels.tolist()
            lp -= np.logaddexp.reduce(lp, axis=1, keepdims=True)
            found = [np.array(row[name]) for name in ("target_token_ids", "target_logprobs")]
            on = np.array(row["target_mask"])
            assert on[before].all()
            assert on.sum() == mask.sum() * K
            ids, values = (each[before] for each in found)
        elif kind == "distillkit":
            assert [at for at, label in enumerate(row["labels"]) if label >= 0] == before.tolist()
            data = [np.array(row[n], np.uint8) for n in (distillkit.LOGPROBS, distillkit.IDS)]
            whole = distillkit.decode(data[0], data[1], distillkit.read_config(out))
            assert np.isfinite(whole[1]).all(), "fillers must not make a loss NaN"
            ids, values = (each[before] for each in whole)
        else:
            assert np.flatnonzero(row["completion_mask"]).tolist() == counted.tolist()
            wide, wide_lp = (
                np.array(row[f"teacher_topk_{name}"])[counted] for name in ("ids", "logprobs")
            )
            own = (wide == tokens[counted][:, None]).argmax(1)
            at = np.arange(len(counted))
            assert (wide[at, own] == tokens[counted]).all(), "the token is an entry"
            exact = log_q[mask][at, tokens[counted]]
            assert wide_lp[at, own] == pytest.approx(exact, abs=ROUNDING)
            assert ((wide[:, K] == -1) == np.isneginf(wide_lp[:, K])).all()
            ids, values = wide[:, :K], wide_lp[:, :K]
        assert ids.tolist() == best.tolist()
        assert values == pytest.approx(lp, abs=ROUNDING)


def test_what_is_exported_is_read_again(made: Any, tmp_path: Path) -> None:
    store, known = made
    export_trainer(store, tmp_path / "out", "distillkit", k=3)
    read = list(Files([tmp_path / "out"], "distillkit", None, [])())
    assert len(read) == len(known)
    for found in read:
        ids = found.prompt + found.response
        (whole,) = [each for each in known if each[: len(ids)] == ids]
        first, mask, log_q = known[whole]
        on = np.array(found.mask) == 1
        counted = first + np.flatnonzero(mask)
        assert (len(found.prompt) + np.flatnonzero(on)).tolist() == counted.tolist()
        assert found.teacher is not None
        best = np.argsort(-log_q[mask], 1)[:, :3]
        assert found.teacher.ids.reshape(-1, 3)[on].tolist() == best.tolist()
        assert found.teacher.entry_lp.reshape(-1, 3)[on] == pytest.approx(
            np.take_along_axis(log_q[mask], best, 1), abs=ROUNDING
        )


def test_what_cannot_be_right_is_refused(made: Any, tmp_path: Path) -> None:
    store, _ = made
    with pytest.raises(ConfigError, match="every position has 4"):
        export_trainer(store, tmp_path / "a", "trl", k=5)
    with pytest.raises(ConfigError, match="belongs next to it"):
        export_trainer(store, tmp_path / "a.parquet", "distillkit")
    export_trainer(store, tmp_path / "b", "distillkit", k=2)
    with pytest.raises(ConfigError, match="another export"):
        export_trainer(store, tmp_path / "b", "distillkit", k=3)
    unscored = make_store(tmp_path / "s", [make_unit(1)], scored=0)
    with pytest.raises(IncompleteError, match="no scores"):
        export_trainer(unscored, tmp_path / "c", "axolotl")
    assert not (tmp_path / "c").exists()
