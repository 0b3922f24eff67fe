"""A reader of a store on a disk, written from engine/store/README.md alone."""

import hashlib
import json
from pathlib import Path

import numpy as np
import zarr


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def read_log(store: Path):
    """Verify the chain of the log, and return the adds of the visible segments."""
    prev, visible = sha256((store / "format.json").read_bytes().split(b"\n")[0]), {}
    for number, file in enumerate(sorted(store.glob("log/[0-9]*.json"))):
        head, body, end, _ = file.read_bytes().split(b"\n")
        record, link = json.loads(head), [number, prev, [len(body), sha256(body)]]
        prev = sha256(head)
        assert [record["n"], record["prev"], record["body"]] == link
        assert json.loads(end) == {"sha256": prev}
        for key in record["deletes"]:
            del visible[key]
        for add in record["adds"]:
            visible.setdefault(add[2], add)
    return list(visible.values())


def read_arrays(store: Path, add):
    name = add[11][7:39] + (f".{add[1]}" if add[1] else "") + ".zip"
    path = store / "seg" / add[0] / name[:2] / name
    assert sha256(path.read_bytes()) == add[11]
    group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")
    return {key: array[:] for key, array in group.arrays()}


def read_scores(store: Path, adds, base):
    """Return (ids, log-probs) of each row, best first; adds: in layout dedup, then extensions."""
    rows = []
    for add in adds:
        new = read_arrays(store, add)
        x = [split(new[f"topk_{key}"], new["topk_counts"]) for key in ("ids", "logprobs")]
        if rows:
            rows = [*map(extended, rows, *x, split(new["rank_fix"], new["topk_counts"]))]
        else:
            new |= base
            keys = ("student_topk_ids", "at_student_logprobs", "at_student_rank_fix")
            rows = [*map(joined, *(split(new[k], new["student_topk_counts"]) for k in keys), *x)]
    return rows


def joined(ids, lp, fix, x_ids, x_lp):
    rank = less(lp, np.append(lp, x_lp)) + fix
    return placed(rank, ids, x_ids), placed(rank, widened(lp), widened(x_lp))


def extended(row, ids, lp, fix):
    rank = less(widened(lp), row[1]) + np.arange(len(ids)) + fix
    return placed(rank, ids, row[0]), placed(rank, widened(lp), row[1])


def split(flat, counts):
    return np.split(flat, np.cumsum(counts)[:-1])


def less(values, among):
    a, b = (each.view(f"u{each.itemsize}") for each in (values, among))
    return (b < a[:, None]).sum(1)


def widened(lp):  # bfloat16 is stored as its bits
    return (lp.astype("u4") << 16).view("f4") if lp.dtype == "u2" else lp.astype("f4")


def placed(rank, first, others):
    out, rank = np.append(first, others), rank % 65536
    out[rank], out[np.delete(np.arange(len(out)), rank)] = first, others
    return out
