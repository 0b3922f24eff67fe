"""Sums by id: long segments in pieces, in few steps, with the same bits each time."""

import pytest
import torch
from torch import Tensor

from logitcask.kernels import segment_sums
from logitcask.kernels.indexed_rows import compact_by_id, sorted_terms, summed_by_id

D = 20


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch, triton_device: str) -> str:
    """Cut segments after 8 terms, 4 at a time, with 3 programs; return the device."""
    for name, value in {"BLOCK_N": 8, "TILE_N": 4, "TILE_D": 32, "PROGRAMS": 3}.items():
        monkeypatch.setattr(segment_sums, name, value)
    return triton_device


def expected_sums(hidden: Tensor, c: Tensor, ids: Tensor, n_vocab: int) -> Tensor:
    """Return the sums [V, D] in float64."""
    terms = c.double()[:, :, None] * hidden.double()[:, None]  # [P, S, D]
    out = torch.zeros(n_vocab, hidden.shape[1], dtype=torch.float64)
    listed = ids >= 0
    return out.index_add_(0, ids[listed], terms[listed])


LENGTHS = {
    "one id alone": [67],
    "ends at a border": [8, 16, 8],
    "starts at a border": [8, 9, 1, 14],
    "many short ones": [1] * 20,
    "each length": [1, 7, 8, 9, 15, 17],
}
"""Terms of each id."""


@pytest.mark.parametrize("n_padding", [0, 5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segments_of_any_length_equal_float64(
    lengths: list[int], n_padding: int, small_blocks: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((n,), 2 * v) for v, n in enumerate(lengths)])
    ids = torch.cat([torch.full((n_padding,), -1), ids])
    ids = ids[torch.randperm(len(ids), generator=generator)][:, None]  # one id a row
    hidden = torch.randn(len(ids), D, generator=generator)
    c = torch.randn(ids.shape, generator=generator)
    n_vocab = 2 * len(lengths) + 3
    expected = expected_sums(hidden, c, ids, n_vocab)
    hidden, c, ids = (each.to(small_blocks) for each in (hidden, c, ids))
    terms = sorted_terms(c, ids)
    sums = summed_by_id(terms, hidden, n_vocab, torch.float32)
    assert torch.allclose(sums.cpu().double(), expected, atol=1e-5)
    at, rows = compact_by_id(terms, hidden, torch.float32)
    assert at.tolist() == [2 * v for v in range(len(lengths))]
    assert torch.equal(rows, sums[at])
    assert torch.equal(sums, summed_by_id(terms, hidden, n_vocab, torch.float32))


def test_a_row_of_nan_reaches_its_own_ids_alone(small_blocks: str) -> None:
    ids = (torch.arange(60) // 20).to(small_blocks)[:, None]  # 3 ids of 20 terms, none at a border
    hidden = torch.ones(60, D, device=small_blocks)
    hidden[25] = torch.nan
    terms = sorted_terms(torch.ones_like(ids, dtype=torch.float32), ids)
    sums = summed_by_id(terms, hidden, 3, torch.float32)
    assert sums.isnan().all(1).tolist() == [False, True, False]
    assert (sums[0] == 20).all()


@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_terms_make_no_sums(n_rows: int, triton_device: str) -> None:
    hidden = torch.ones(n_rows, D, device=triton_device)
    ids = torch.full((n_rows, 2), -1, device=triton_device)
    terms = sorted_terms(torch.ones(n_rows, 2, device=triton_device), ids)
    assert (summed_by_id(terms, hidden, 4, torch.float32) == 0).all()
    at, rows = compact_by_id(terms, hidden, torch.float32)
    assert at.shape == (0,)
    assert rows.shape == (0, D)


def test_a_common_id_takes_few_steps() -> None:
    """Count the steps of 16 terms or pieces that follow each other, for an id in 28 % of rows."""
    n, per_block = int(0.28 * 16384), segment_sums.BLOCK_N // segment_sums.TILE_N
    pieces = -(-n // segment_sums.BLOCK_N)
    assert -(-n // segment_sums.TILE_N) == 287
    assert 2 * per_block + -(-pieces // segment_sums.TILE_N) == 13
