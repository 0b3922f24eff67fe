"""The specification is enough to read a store: 60 lines without our code read the same rows."""

import ast
from pathlib import Path

import numpy as np
import pytest

from logitcask.engine.store import open_store
from logitcask.engine.store.format.layouts import ranked
from tests.engine.store import stranger_reader
from tests.engine.store.golden import fill


@pytest.mark.filterwarnings("ignore:Numcodecs codecs")
def test_a_reader_from_the_specification_reads_the_same_rows(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    store, snapshot = open_store(tmp_path / "s"), open_store(tmp_path / "s").head()
    adds = stranger_reader.read_log(tmp_path / "s")
    assert {add[11] for add in adds} == {each.sha256 for each in snapshot.segments}
    checked = extended = 0
    for rollout in snapshot.segments:
        if rollout.kind != "rollout":
            continue
        (add,) = (each for each in adds if each[2] == rollout.unit_key)
        base, ours = stranger_reader.read_arrays(tmp_path / "s", add), store.read_rollouts(rollout)
        np.testing.assert_array_equal(base["response_tokens"], ours.tokens)
        np.testing.assert_array_equal(base["response_offsets"], ours.seq_off)
        np.testing.assert_array_equal(base["behavior_logprobs"], ours.b_lp)
        if ours.student is None:
            continue
        for name in snapshot.names("score"):
            chain = [each for each in adds if each[3:5] == [name, rollout.seg_id]]
            if not chain:
                continue
            rows = stranger_reader.read_scores(tmp_path / "s", chain, base)
            ids, log_probs = zip(*rows, strict=True)
            cnt, our_ids, our_lp = ranked(store.read_scores(snapshot.scores(name)[rollout.seg_id]))
            np.testing.assert_array_equal([*map(len, ids)], cnt)
            np.testing.assert_array_equal(np.concatenate(ids), our_ids)
            assert np.concatenate(log_probs).tobytes() == our_lp.tobytes()
            checked, extended = checked + len(our_ids), extended + (len(chain) > 1)
    assert checked > 500
    assert extended, "one teacher has an extension"


def test_it_is_short_and_imports_nothing_of_ours() -> None:
    text = Path(stranger_reader.__file__).read_text()
    tree = ast.parse(text)
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"hashlib", "json", "pathlib", "numpy", "zarr"}
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 60
