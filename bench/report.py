"""Write the measured tables of all READMEs, and the pictures, from bench/results.

Run: .venv/bin/python bench/report.py [--no-frontier]

The newest row of each section counts. Only the text between `<!-- NAME -->` and `<!-- end -->` is
replaced. The picture frontier.svg needs matplotlib; --no-frontier leaves it out. The tables of the
store are made here, the others in report_NAME.py.
"""

import argparse
import sys
from collections.abc import Callable

import report_ablate
import report_alignment
import report_cross_tokenizer
import report_exchange
import report_kernels
import report_page
import report_paper
import report_peers
import report_pipeline
import report_real
import report_real_probes
import report_scale
import report_scoring
import report_tap
import results
from report_pages import fill_pages, markdown
from results import RESULTS, Row

PICTURE = RESULTS / "frontier.svg"


def main(arguments: list[str]) -> None:
    """Write every table and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-frontier", action="store_true", help="Leave frontier.svg out.")
    options = parser.parse_args(arguments)
    fill_pages(tables())
    if ablations := results.read(RESULTS / "ablate.jsonl"):
        report_ablate.draw(ablations[-1])
    if scale := report_scale.newest():
        report_scale.draw(scale)
    if pipeline := report_pipeline.newest():
        report_pipeline.draw(pipeline)
    gpu = RESULTS / "gpu.jsonl"
    if gpu.exists():
        print(report_kernels.drawn(gpu))
    if not options.no_frontier:
        draw(newest_rows()["frontier"])


def newest_rows() -> dict[str, Row]:
    """Return the newest row of each section of the store."""
    return {row["section"]: row for row in results.read(RESULTS / "store.jsonl")}


def tables() -> dict[str, str]:
    """Return the text of each marked block."""
    newest = newest_rows()
    made = {name: table(newest) for name, table in TABLES.items()}
    others = (
        *(report_kernels, report_ablate, report_real, report_scale, report_pipeline),
        *(
            report_peers,
            report_exchange,
            report_scoring,
            report_alignment,
            report_cross_tokenizer,
            report_tap,
            report_page,
            report_paper,
            report_real_probes,
        ),
    )
    for each in others:
        made |= each.tables()
    return made


def source(row: Row) -> str:
    """Return command, machine, versions and commit of a row."""
    return (
        f"`{row['command']}`, {row['machine']}, Python {row['python']}, zarr {row['zarr']}, "
        f"numcodecs {row['numcodecs']}, pcodec {row['pcodec']}, commit {row['commit']}."
    )


def sizes(newest: dict[str, Row]) -> str:
    """Return the table of bytes and errors per profile."""
    row = newest["sizes"]
    table = markdown(
        ["profile", "top-p, k", "entries", "bytes", "largest error of a log-prob", "KL, mean",
         "KL, max", "loss error", "gradient error"],
        [
            [f"`{r['profile']}`", f"{r['top_p']}, {r['k_min']}-{r['k_max']}",
             f"{r['entries']:.1f}", f"{r['bytes']:.1f}", f"{r['lp_error_max']:.1e}",
             f"{r['kl_mean']:.1e}", f"{r['kl_max']:.1e}", f"{r['loss_error']:.1e}",
             f"{r['gradient_error']:.1e}"]
            for r in row["table"]
        ],
    )  # fmt: skip
    return f"{table}\n\n{row_statistics(row)} {source(row)}"


def row_statistics(row: Row) -> str:
    """Return the statistics of the made-up rows."""
    r = row["rows"]
    return (
        f"{row['positions']:,} made-up rows, V = 151,936: mean entropy {r['entropy_nats']:.2f} "
        f"nats, {r['sure_share']:.0%} with a first id above 0.95, mass of the best 16, 64 and 256 "
        f"{r['mass_16']:.3f}, {r['mass_64']:.3f}, {r['mass_256']:.3f}."
    )


def pair(newest: dict[str, Row]) -> str:
    """Return the table of the trained pair."""
    row = newest["pair"]
    table = markdown(
        ["bytes a position", "no entry twice", "both lists whole", "ratio"],
        [
            ["entries", f"{row['entries_once']:.1f}", f"{row['entries_both']:.1f}",
             f"{row['entries_once'] / row['entries_both']:.2f}"],
            ["score segment", f"{row['segment_once']:.1f}", f"{row['segment_both']:.1f}",
             f"{row['segment_once'] / row['segment_both']:.2f}"],
            ["rollout and score", f"{row['bytes']['total']:.1f}", "", ""],
        ],
    )  # fmt: skip
    ties = row["rows_with_ties"] / row["rows_compared"]
    return (
        f"{table}\n\n{row['positions']:,} positions of a pair trained for this, V = 8,192, the "
        f"product's defaults; overlap at 16: {row['overlap']:.2f}, mean teacher entropy "
        f"{row['entropy_nats']:.2f} nats. Scored again, all {row['rows_compared']:,} rows read as "
        f"the teacher's own list, though float16 makes ties in {ties:.0%} of them. {source(row)}"
    )


def frontier(newest: dict[str, Row]) -> str:
    """Return the tables of bytes against missed KL."""
    row = newest["frontier"]
    ours = [r for r in row["table"] if r["who"].startswith("logitcask")]
    names = list(dict.fromkeys(r["who"].split()[1] for r in ours))
    settings = dict.fromkeys((r["k_min"], r["k_max"], r["top_p"]) for r in ours)
    by = {(r["who"].split()[1], r["k_min"], r["k_max"], r["top_p"]): r for r in ours}
    first = markdown(
        ["top-p", "k", "entries", "forward KL missed", "reverse KL missed",
         *(f"bytes, `{name}`" for name in names)],
        [
            [p, f"{lo}-{hi}", f"{by['default', lo, hi, p]['entries']:.1f}",
             share(by["default", lo, hi, p]["forward_kl_missed"]),
             share(by["default", lo, hi, p]["reverse_kl_missed"]),
             *(f"{by[name, lo, hi, p]['bytes']:.1f}" for name in names)]
            for lo, hi, p in settings
        ],
    )  # fmt: skip
    second = markdown(
        ["peer", "entries", "bytes", "forward KL missed", "reverse KL missed", "values", ""],
        [
            [r["who"], f"{r['entries']:.0f}", f"{r['bytes']:.0f}", share(r["forward_kl_missed"]),
             share(r["reverse_kl_missed"]), r["values"], r.get("note", "")]
            for r in row["table"]
            if not r["who"].startswith("logitcask")
        ],
    )  # fmt: skip
    return f"{first}\n\n{second}\n\n{row_statistics(row)} {source(row)}"


def share(value: float) -> str:
    return f"{value:.2%}"


def rates(newest: dict[str, Row]) -> str:
    """Return the table of commits and reads."""
    row = newest["rates"]
    cpu, wall = row["cpu_seconds"], row["wall_seconds"]
    names = {
        "seal rollout once": "seal rollouts with the student's lists",
        "seal score once": "seal scores, layout `once`",
        "seal rollout whole": "seal rollouts without lists",
        "seal score whole": "seal scores, layout `whole`",
        "write parquet": "write parquet, same columns",
        "write raw npy": "write raw npy, same columns",
        "read score once": "read scores, layout `once`",
        "read score whole": "read scores, layout `whole`",
        "read rollout once": "read rollouts with the student's lists",
        "read zarr": "read the same files by Zarr, no digests compared",
        "read zarrs": "read them by Zarr's zarrs pipeline, no digests compared",
        "read parquet": "read parquet",
        "read raw npy": "read raw npy",
    }
    million = row["positions"] / 1e6
    table = markdown(
        ["", "CPU seconds", "wall seconds", "million positions a core-second"],
        [
            [text, f"{cpu[name]:.3f}", f"{wall[name]:.3f}", f"{million / cpu[name]:.2f}"]
            for name, text in names.items()
            if name in cpu
        ],
    )
    rate = row["million_entries_per_core_second"]
    return (
        f"{table}\n\n{row['positions']:,} positions, medians of {row['runs']} interleaved runs; "
        f"{rate['whole']:.0f} million entries a core-second in layout `whole` (top-p 0.999, "
        f"k 1-64), {rate['once']:.0f} million in `once` (k 16-64 and the student's 16). Ours and "
        f"parquet flush to the disk, compare checksums and were read from memory. {source(row)}"
    )


def latency(newest: dict[str, Row]) -> str:
    """Return the table of commits, and the figures of single sequences and of a long log."""
    row, single = newest["commits"], newest["random"]
    old = newest["before"]
    wall, cpu = old["p50_ms"], old["cpu_ms"]
    table = markdown(
        ["small units", "processes", "units present", "doubled", "records", "commits a second",
         "p50", "p99"],
        [
            [name.partition(",")[0], r["processes"], r["present"], r["segments"] - r["present"],
             r["records"], f"{r['commits_per_second']:.1f}", f"{r['p50_ms']:.0f} ms",
             f"{r['p99_ms']:.0f} ms"]
            for name, r in row["media"].items()
        ],
    )  # fmt: skip
    found = single["sequences_per_core_second"]
    race, log = newest["race"], newest["log"]
    theirs, ours = race["found"]["earlier"], race["found"]["now"]
    parts = [f"`{what}` {r['seconds']:.2g} s" for what, r in log["commands"].items()]
    return (
        f"{table}\n\nSmall units, 256 positions each: a commit flushes an object and a record. "
        f"{source(row)}\n\n"
        f"One writer, by turns with the code of {old['earlier']}: p50 {wall['now']:.0f} ms against "
        f"{wall['earlier']:.0f} ms, CPU {cpu['now']:.0f} ms against {cpu['earlier']:.0f} ms. "
        f"{source(old)}\n\n"
        f"{race['writers']} writers on a disk, after a first commit of each: "
        f"{ours['commits_per_second']:.0f} commits a second, p50 {ours['p50_s']:.2f} s, p99 "
        f"{ours['p99_s']:.2f} s, in {ours['records']} records; with the code of "
        f"{race['earlier']} {theirs['commits_per_second']:.0f}, {theirs['p50_s']:.2f} s, "
        f"{theirs['p99_s']:.2f} s. {source(race)}\n\n"
        f"A log of {log['segments']:,} segments, CPU seconds: {', '.join(parts)}; opening takes "
        f"{log['commands']['open']['memory_mb']:.0f} MB in all. {source(log)}\n\n"
        "Single sequences a core-second: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in found.items())
        + f". The cache takes {single['cache_bytes']:.0f} bytes a position. {source(single)}"
    )


def bars(newest: dict[str, Row]) -> str:
    """Return the table of all bars."""
    return markdown(
        ["bar", "measured", ""],
        [
            [bar["bar"], f"{bar['value']:.4g}", "met" if bar["met"] else "**missed**"]
            for row in newest.values()
            for bar in row.get("bars", [])
        ],
    )


def numbers(newest: dict[str, Row]) -> str:
    """Return a short table of the store's figures."""
    size = {(r["profile"], r["k_max"]): r for r in newest["sizes"]["table"]}
    rate, wait = newest["rates"], newest["wait"]
    old, wall = newest["before"]["earlier"], newest["before"]["p50_ms"]
    seal = rate["wall_seconds"]
    ours = rate["positions"] / rate["cpu_seconds"]["read score whole"] / 1e6
    parquet = rate["cpu_seconds"]["read parquet"] / rate["cpu_seconds"]["read score whole"]
    worst = max(each["share"] for each in wait["shares"].values())
    pair = newest["pair"]
    return markdown(
        ["", ""],
        [
            ["bytes a position, top-p 0.999, 1 to 64 ids, tokens and all",
             f"{size['default', 64]['bytes']:.1f} (`compact` {size['compact', 64]['bytes']:.1f})"],
            ["top-p 0.99, 1 to 256 ids; DistillKit's K=128 row is 344",
             f"{size['default', 256]['bytes']:.1f}"],
            ["trained pair, the product's defaults, rollouts and scores",
             f"{pair['bytes']['total']:.1f}"],
            ["KL that float16 costs, mean", f"{size['default', 64]['kl_mean']:.0e} nats"],
            ["sealing 262,144 positions: rollouts, scores",
             f"{seal['seal rollout once']:.1f} s, {seal['seal score once']:.1f} s"],
            ["reading whole segments, digests compared",
             f"{ours:.1f} million positions a core-second, {parquet:.1f}x parquet"],
            [f"a commit of a small unit, p50, by turns with the code of {old}",
             f"{wall['now']:.0f} ms, {wall['earlier']:.0f} ms"],
            ["waiting for rows, share of the demo's training", f"{worst:.1%}"],
        ],
    )  # fmt: skip


TABLES: dict[str, Callable[[dict[str, Row]], str]] = {
    "store sizes": sizes,
    "store pair": pair,
    "store frontier": frontier,
    "store rates": rates,
    "store latency": latency,
    "store bars": bars,
    "store numbers": numbers,
}


def draw(row: Row) -> None:
    """Plot bytes against forward KL missed, both logarithmic; down and left is better."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "logitcask", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = {"default": "C0", "compact": "C2", "interop": "C4", "raw32": "C7"}
    for name, colour in colours.items():
        ours = [r for r in row["table"] if r["who"] == f"logitcask {name}"]
        best = [
            r
            for r in ours
            if not any(
                o["bytes"] <= r["bytes"] and o["forward_kl_missed"] < r["forward_kl_missed"]
                for o in ours
            )
        ]
        best.sort(key=lambda r: r["bytes"])
        axes.plot(*points(ours), ".", color=colour, alpha=0.35)
        axes.plot(*points(best), "-", color=colour, label=f"logitcask, {name}")
    # Values that a peer's own reader returns can be further off than the missed KL: the table
    # shows that, a logarithm cannot.
    peers = [
        r for r in row["table"] if not r["who"].startswith("logitcask") and r["values"] == "exact"
    ]
    for n, each in enumerate(sorted(peers, key=lambda r: r["bytes"])):
        axes.plot(*points([each]), "o", color="C3")
        axes.annotate(each["who"], (each["bytes"], 100 * each["forward_kl_missed"]),
                      xytext=(0, -14 if n % 2 else 7), textcoords="offset points", fontsize=7,
                      ha="center")  # fmt: skip
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(30, 1300),
        xlabel="bytes a position, scores with their scalars",
        ylabel="forward KL missed",
        title="What a loss on stored scores misses (made-up rows, V = 151,936)",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.set_xticks([50, 100, 200, 500, 1000], ["50", "100", "200", "500", "1000"])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None})


def points(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Return x and y of the rows: bytes, missed KL in percent."""
    return [r["bytes"] for r in rows], [100 * r["forward_kl_missed"] for r in rows]


if __name__ == "__main__":
    main(sys.argv[1:])
