"""Bytes of a position, error of stored values, and the KL that a loss on them misses."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import store_peers as peers
from score_rows import WideRows, first, kept_mask, rollouts_of, scores_of, student_of
from store_common import POSITIONS, bar, fresh, rows, seal_rollouts, seal_scores

from logitcask.engine.store import open_store
from logitcask.engine.store.format import codecs, layouts, schema, segment
from logitcask.engine.types import Array


def sizes() -> dict[str, Any]:
    """Measure bytes and errors of every profile."""
    made = rows()
    print({name: round(value, 4) for name, value in made.summary().items()})
    settings = [(0.999, 1, 64), (0.99, 1, 256)]
    table = []
    with fresh("sizes") as folder:
        for profile in codecs.PROFILES:
            for top_p, k_min, k_max in settings:
                mask = kept_mask(made, top_p, k_min, k_max)
                store = open_store(folder / f"{profile}-{k_max}", create=True)
                base = seal_rollouts(store, rollouts_of(made), profile)
                scored = seal_scores(store, scores_of(made, mask), base, profile)
                table.append(
                    {
                        "profile": profile,
                        "top_p": top_p,
                        "k_min": k_min,
                        "k_max": k_max,
                        "entries": float(mask.sum(1).mean()),
                        "bytes_rollout": base.size / POSITIONS,
                        "bytes_score": scored.size / POSITIONS,
                        "bytes": (base.size + scored.size) / POSITIONS,
                        **value_errors(made, mask, codecs.profile(profile)),
                    }
                )
                print(json.dumps(table[-1]), flush=True)
    missed = missed_kl(made, kept_mask(made, 0.99, 1, 256))[0]
    fixed = missed_kl(made, kept_mask(made, 1.1, 64, 64))[0]
    default = {r["k_max"]: r for r in table if r["profile"] == "default"}
    distillkit = peers.FIXED[0].bytes
    return {
        "rows": made.summary(),
        "positions": POSITIONS,
        "table": table,
        "bars": [
            bar("p 0.999, k 1-64, default: bytes a position <= 75", default[64]["bytes"],
                default[64]["bytes"] <= 75),
            bar("p 0.99, k 1-256: bytes over DistillKit's K=128 row <= 1/3",
                default[256]["bytes"] / distillkit, default[256]["bytes"] <= distillkit / 3),
            bar("p 0.99, k 1-256: forward KL missed over that of a fixed K=64 < 1",
                missed / fixed, missed < fixed),
            bar("default: mean KL error of stored values < 1e-6 nats", default[64]["kl_mean"],
                default[64]["kl_mean"] < 1e-6),
            bar("default: loss error < 2e-4 nats", default[64]["loss_error"],
                default[64]["loss_error"] < 2e-4),
            bar("default: relative gradient error < 2e-3", default[64]["gradient_error"],
                default[64]["gradient_error"] < 2e-3),
        ],
    }  # fmt: skip


def value_errors(made: WideRows, mask: Array, profile: codecs.Profile) -> dict[str, float]:
    """Return the errors of stored log-probs, and of KL, forward-KL loss and gradient from them."""
    part = slice(0, 65_536)
    mask, lp = mask[part], made.lp[part].astype(np.float64)
    stored = codecs.from_entry(codecs.to_entry(made.lp[part], profile), profile).astype(np.float64)
    on = mask & (lp > -20)
    q, off = (renormalize(x, mask) for x in (lp, stored))
    p = renormalize(student_of(made, 0.8)[1][part].astype(np.float64), mask)
    kl = kl_nats(q, off)
    gap = np.exp(p) - np.exp(q)
    moved = np.exp(q) - np.exp(off)
    return {
        "lp_error_max": float(np.abs(stored - lp)[on].max()),
        "lp_error_mean": float(np.abs(stored - lp)[on].mean()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "loss_error": float(np.abs(kl_nats(off, p) - kl_nats(q, p)).mean()),
        "gradient_error": float(np.linalg.norm(moved, axis=1).mean()
                                / np.linalg.norm(gap, axis=1).mean()),
    }  # fmt: skip


def renormalize(lp: Array, mask: Array) -> Array:
    """Return log-probs [P, W] renormalized on the mask; -inf elsewhere."""
    on: Array = np.where(mask, lp, -np.inf)
    return on - np.logaddexp.reduce(on, axis=1, keepdims=True)


def kl_nats(log_a: Array, log_b: Array) -> Array:
    """Return KL(a || b) of each row [P], nats."""
    there = np.isfinite(log_a)
    gap = np.where(there, log_a, 0) - np.where(there, log_b, 0)
    terms: Array = np.where(there, np.exp(log_a) * gap, 0)
    return terms.sum(1)


def missed_kl(made: WideRows, mask: Array, values: Array | None = None) -> tuple[float, float]:
    """Return the shares of forward and reverse KL that are missed with the mask and one bucket.

    The student is the teacher with noise. values: log-probs as stored, [P, K].
    """
    _, log_p = student_of(made, 0.8)
    wide = np.ones_like(mask)

    def share(side: int) -> float:
        full = coarse(made, log_p, wide, None, side).mean()
        return float(1 - coarse(made, log_p, mask, values, side).mean() / full)

    return share(0), share(1)


def coarse(made: WideRows, log_p: Array, mask: Array, values: Array | None, side: int) -> Array:
    """Return the KL [P] of teacher and student on the mask and one bucket, 0 forward, 1 reverse."""
    lq = made.lp.astype(np.float64)
    if values is not None:
        lq = np.where(mask, np.pad(values, ((0, 0), (0, lq.shape[1] - values.shape[1]))), lq)
    q_out = outside(made.lp, mask, made.log_tail)
    if values is not None:
        # The peer's reader has no tail: it is the rest to 1, with a floor.
        known = np.where(mask, np.exp(lq), 0).sum(1)
        q_out = np.log(np.maximum(1 - known, 1e-6))
    with np.errstate(divide="ignore"):
        log_p_tail = np.log(np.maximum(1 - np.exp(log_p, dtype=np.float64).sum(1), 1e-12))
    p_out = outside(log_p, mask, log_p_tail)
    q = np.concatenate([np.where(mask, lq, -np.inf), q_out[:, None]], 1)
    p = np.concatenate([np.where(mask, log_p.astype(np.float64), -np.inf), p_out[:, None]], 1)
    q -= np.logaddexp.reduce(q, axis=1, keepdims=True)
    return kl_nats(q, p) if side == 0 else kl_nats(p, q)


def outside(lp: Array, mask: Array, tail: Array) -> Array:
    """Return the log mass outside the mask [P]."""
    left = np.logaddexp.reduce(np.where(mask, -np.inf, lp.astype(np.float64)), axis=1)
    whole: Array = np.logaddexp(left, tail)
    return whole


def frontier() -> dict[str, Any]:
    """Measure bytes against missed KL, of our profiles and of peers."""
    made = first(rows(), 65_536)
    positions = len(made.lp)
    table = []
    for name, profile in codecs.PROFILES.items():
        for k_min in (1, 16):
            for k_max in (64, 256):
                for top_p in (0.98, 0.99, 0.999, 0.9999):
                    mask = kept_mask(made, top_p, k_min, k_max)
                    arrays = layouts.encode(scores_of(made, mask), profile, None)
                    contents = segment.encode(
                        arrays, layout=schema.FULL, profile=profile, attributes={}
                    )
                    size = sum(len(d) for n, d in contents.items() if n.endswith("/c/0"))
                    values = codecs.from_entry(codecs.to_entry(made.lp, profile), profile)
                    forward, reverse = missed_stored(made, mask, values)
                    table.append(
                        {
                            "who": f"logitcask {name}",
                            "top_p": top_p,
                            "k_min": k_min,
                            "k_max": k_max,
                            "entries": float(mask.sum(1).mean()),
                            "bytes": size / positions,
                            "forward_kl_missed": forward,
                            "reverse_kl_missed": reverse,
                        }
                    )
    for fixed in peers.FIXED:
        mask = kept_mask(made, 1.1, fixed.k, fixed.k)
        forward, reverse = missed_kl(made, mask)
        common = {"who": fixed.name, "k_max": fixed.k, "entries": float(fixed.k)}
        cut = {**common, "bytes": fixed.bytes, "forward_kl_missed": forward,
               "reverse_kl_missed": reverse, "values": "exact", "note": fixed.note}  # fmt: skip
        table.append(cut)
        if (theirs := peers.distillkit_values(fixed.name, made.ids, made.lp)) is not None:
            values, size = theirs
            forward, reverse = missed_kl(made, mask, values)
            table.append(
                {
                    **common,
                    "bytes": size,
                    "forward_kl_missed": forward,
                    "reverse_kl_missed": reverse,
                    "values": "its own writer and reader",
                    "lp_error_mean": float(np.abs(values - made.lp[:, : fixed.k]).mean()),
                }
            )
    for each in table:
        print(json.dumps(each), flush=True)
    return {"rows": made.summary(), "positions": positions, "table": table}


def missed_stored(made: WideRows, mask: Array, values: Array) -> tuple[float, float]:
    """Return `missed_kl` with log-probs as a profile stores them; the tail is exact."""
    return missed_kl(replace(made, lp=values.astype(np.float32)), mask)
