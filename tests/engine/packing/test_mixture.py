"""Mixtures of several teachers from truncated scores, against their full rows in float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcask.engine.packing.mixture import arithmetic, geometric, join, mix
from logitcask.engine.types import Array

SEED = st.integers(0, 2**32 - 1)


def part_of(
    q: Array, kept: list[int], student: Array, p: Array, token: Array, *, at_student: bool = True
) -> dict[str, Array]:
    """Return the scores of full rows q [R, V]: the `kept` best ids, and the student's ids [R, k].

    p: [R, V], the student's.
    """
    rows = len(q)
    log_q = np.log(q)
    lists: dict[str, list[Any]] = {name: [] for name in ("s", "t", "s_rank", "t_rank")}
    tail = np.zeros(rows)
    for r in range(rows):
        order = np.argsort(-q[r], kind="stable").tolist()
        best = order[: kept[r]]
        own = [v for v in student[r].tolist() if at_student or v in best]
        others = [v for v in best if v not in own]
        lists["s"].append(own)
        lists["t"].append(others)
        lists["s_rank"].append([order.index(v) for v in own])
        lists["t_rank"].append([order.index(v) for v in others])
        scored = own + others
        tail[r] = q[r, [v for v in range(q.shape[1]) if v not in scored]].sum()
    flat = {
        name: np.concatenate([*map(np.asarray, each)]).astype(int) for name, each in lists.items()
    }
    row = {name: np.repeat(np.arange(rows), [len(x) for x in lists[name]]) for name in ("s", "t")}
    every = np.arange(rows)
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail)
    return {
        "token": token.astype(np.uint32),
        "weight": np.ones(rows, np.uint16),
        "q_token_lp": log_q[every, token],
        "q_entropy": -(q * log_q).sum(1),
        "q_log_tail": log_tail,
        "kept": np.asarray(kept, np.uint16),
        "s_cnt": np.asarray([len(x) for x in lists["s"]], np.uint16),
        "t_cnt": np.asarray([len(x) for x in lists["t"]], np.uint16),
        **{f"{name}_ids": flat[name].astype(np.uint32) for name in ("s", "t")},
        **{f"{name}_q": log_q[row[name], flat[name]] for name in ("s", "t")},
        **{f"{name}_rank": flat[f"{name}_rank"].astype(np.uint16) for name in ("s", "t")},
        "s_p": np.log(p[row["s"], flat["s"]]).astype(np.float32),
    }


def means_of(q: Array, w: Array) -> tuple[Array, Array, Array]:
    """Return the full arithmetic and geometric means of q [T, R, V], and Z of the second [R]."""
    product = np.exp((w[:, :, None] * np.log(q)).sum(0))
    z = product.sum(1)
    return (w[:, :, None] * q).sum(0), product / z[:, None], z


def draw(seed: int, *, whole: bool = False) -> tuple[Array, list[dict[str, Array]], Array, Array]:
    """Return q [T, R, V], the parts of T teachers, their weights [T, R] and the student's p."""
    rng = np.random.default_rng(seed)
    teachers, rows, vocab, k = rng.integers(2, 4), 6, int(rng.integers(5, 12)), 3
    sharp = rng.uniform(0.3, 3)
    q = rng.dirichlet(np.full(vocab, sharp), (teachers, rows)).clip(1e-9)
    q /= q.sum(-1, keepdims=True)
    p = rng.dirichlet(np.ones(vocab), rows)
    student, token = np.argsort(-p, 1)[:, :k], rng.integers(0, vocab, rows)
    w = rng.dirichlet(np.ones(teachers), rows).T.clip(1e-3)
    w /= w.sum(0)
    parts = [
        part_of(
            each,
            [vocab if whole else int(n) for n in rng.integers(1, vocab, rows)],
            student,
            p,
            token,
            at_student=whole or bool(rng.integers(0, 2)),
        )
        for each in q
    ]
    return q, parts, w, p


@settings(max_examples=60, deadline=None)
@given(SEED)
def test_the_true_mixtures_are_within_the_bounds(seed: int) -> None:
    q, parts, w, _ = draw(seed)
    mean, geo, z = means_of(q, w)
    x = join(parts)
    rows, vocab = mean.shape
    at = x.row, x.ids.astype(int)
    absent = np.ones((rows, vocab), bool)
    absent[at] = False
    close = 1e-12

    with np.errstate(divide="ignore", invalid="ignore"):
        found, other = arithmetic(x, parts, w), geometric(x, parts, w)
    assert (found.lower <= mean[at] + close).all()
    assert (mean[at] <= found.upper + close).all()
    assert (np.where(absent, mean, 0).max(1) <= found.others + close).all()
    lower = np.zeros_like(mean)
    lower[at] = found.lower
    np.testing.assert_allclose(found.tail, 1 - lower.sum(1), atol=1e-9)
    # Against the mixture of the same ids and one bucket of all others.
    gap = np.where(absent, 0, mean - lower).sum(1)
    assert (gap <= found.missing + close).all(), "total variation"
    h = -(mean * np.log(mean)).sum(1)
    assert ((found.entropy[0] <= h + 1e-9) & (h <= found.entropy[1] + 1e-9)).all()

    least, most = np.exp(other.log_z - other.width), np.exp(other.log_z)
    scored = other.used
    some = np.bincount(x.row, scored, minlength=rows) > 0
    assert ((least <= z + close) & (z <= most + close))[some].all()
    true = geo[at] * z[x.row]
    np.testing.assert_allclose(other.lower[scored], true[scored], rtol=1e-9)
    assert (true <= other.upper + close).all()
    assert (np.where(absent, geo * z[:, None], 0).max(1) <= other.others + close).all()
    outside = 1 - np.bincount(x.row[scored], geo[at][scored], minlength=rows)
    assert (outside <= other.missing + 1e-9).all()
    h = -(geo * np.log(geo)).sum(1)
    assert ((other.entropy[0] <= h + 1e-9) & (h <= other.entropy[1] + 1e-9)).all()

    for kind, true in (("arithmetic", mean), ("geometric", geo)):
        part = mix(parts, w, kind)
        for r in range(rows):
            ranked = [
                (int(rank), int(v))
                for name in ("s", "t")
                for row, rank, v in zip(
                    np.repeat(np.arange(rows), part[f"{name}_cnt"]),
                    part[f"{name}_rank"],
                    part[f"{name}_ids"],
                    strict=True,
                )
                if row == r and rank < part["kept"][r]
            ]
            best = np.argsort(-true[r], kind="stable")[: part["kept"][r]].tolist()
            assert [v for _, v in sorted(ranked)] == best, (kind, r)


@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_a_mixture_of_whole_rows_is_exact(kind: str) -> None:
    q, parts, w, p = draw(7, whole=True)
    true = dict(zip(("arithmetic", "geometric"), means_of(q, w), strict=False))[kind]
    part = mix(parts, w, kind)
    rows, vocab = true.shape
    for name in ("s", "t"):
        row = np.repeat(np.arange(rows), part[f"{name}_cnt"])
        expected = np.log(true[row, part[f"{name}_ids"].astype(int)])
        np.testing.assert_allclose(part[f"{name}_q"], expected, atol=1e-6)
    np.testing.assert_allclose(
        part["q_token_lp"], np.log(true[np.arange(rows), part["token"].astype(int)]), atol=1e-6
    )
    assert part["kept"].tolist() == [vocab] * rows, "every rank is certain"
    assert np.abs(part["mixture_width"]).max() < 1e-6
    assert np.abs(part["mixture_missing"]).max() < 1e-6
    # The student's ids come first, in its order.
    np.testing.assert_array_equal(part["s_ids"].reshape(rows, -1), np.argsort(-p, 1)[:, :3])


def rows_of(q: list[list[float]], kept: list[int]) -> list[dict[str, Array]]:
    """Return the parts of one row of each teacher, whose sampled token is the last id."""
    none, vocab = np.zeros((1, 0), int), len(q[0])
    p, token = np.full((1, vocab), 1 / vocab), np.array([vocab - 1])
    return [part_of(np.array([each]), [n], none, p, token) for each, n in zip(q, kept, strict=True)]


def test_two_caches_by_hand() -> None:
    """Check oracle O12: q1 keeps ids 0 and 1, q2 ids 1 and 2, weights 1/2."""
    parts = rows_of([[0.6, 0.2, 0.15, 0.05], [0.1, 0.5, 0.3, 0.1]], [2, 2])
    w = np.full((2, 1), 0.5)
    x = join(parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        found, other = arithmetic(x, parts, w), geometric(x, parts, w)
    np.testing.assert_allclose(x.most, [[0.2], [0.2]])
    np.testing.assert_allclose(found.lower, [0.30, 0.35, 0.15])
    np.testing.assert_allclose(found.upper, [0.40, 0.35, 0.25])
    np.testing.assert_allclose([found.others, found.missing, found.tail], [[0.2]] * 3)
    assert other.used.tolist() == [False, True, False]
    z = np.exp(other.log_z[0]), np.exp(other.log_z[0] - other.width[0])
    np.testing.assert_allclose(z, (1, 0.316228), atol=1e-6)
    part = mix(parts, w, "geometric")
    assert part["t_ids"].tolist() == [1]
    np.testing.assert_allclose(part["t_q"], [-1.151293], atol=1e-6)
    assert mix(parts, w, "arithmetic")["kept"].tolist() == [0], "0.40 may be above 0.35"


def test_one_missing_by_hand() -> None:
    """Check oracle O11: q1 of the id is 0.2; of q2 the smallest kept is 0.01, the tail 0.05."""
    # The second keeps ids 1 to 5, of which the smallest has 0.01.
    parts = rows_of(
        [[0.2, 0.16, 0.16, 0.16, 0.16, 0.16, 0.0 + 1e-9], [0.02, 0.4, 0.3, 0.2, 0.04, 0.01, 0.03]],
        [7, 7],
    )
    first, second = parts
    keep = second["t_ids"] != 0
    keep &= second["t_ids"] != 6
    second = {
        **second,
        **{name: second[name][keep] for name in ("t_ids", "t_q", "t_rank")},
        "t_cnt": np.array([5], np.uint16),
        "t_rank": np.arange(5, dtype=np.uint16),
        "kept": np.array([5], np.uint16),
        "q_log_tail": np.log([0.05]),
    }
    w = np.full((2, 1), 0.5)
    x = join([first, second])
    with np.errstate(divide="ignore", invalid="ignore"):
        found, other = (f(x, [first, second], w) for f in (arithmetic, geometric))
    at = int(np.flatnonzero(x.ids == 0)[0])
    assert x.most[1] == pytest.approx(0.01)
    assert np.log(found.lower[at]) == pytest.approx(-2.302585, abs=1e-6)
    assert np.log(found.upper[at]) == pytest.approx(-2.253795, abs=1e-6)
    assert not other.used[at]
    assert np.log(other.upper[at]) == pytest.approx(-3.107304, abs=1e-6)
