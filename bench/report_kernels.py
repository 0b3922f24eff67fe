"""The kernels' tables of the READMEs.

Run: .venv/bin/python bench/report_kernels.py [FILE.jsonl]

Without a file: fills the pages from bench/results/kernels.jsonl and gpu.jsonl, as bench/report.py
does. With a file: prints a summary of it. The rows of the newest run of each section and shape
count.
"""

import argparse
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import report_ratios
import report_roofline
import results
from kernel_bars import bars, newest
from kernel_machine import short
from report_pages import fill_pages, markdown
from results import Row

FILES = ("kernels", "gpu")
NONE = {
    "cpu": "No row yet: `python bench/bench_kernels.py --device cpu` makes them.",
    "cuda": "No GPU has run this yet, and nothing is claimed of one: `bash bench/gpu.sh` makes the "
    "rows.",
}


def main(arguments: list[str]) -> None:
    """Fill the pages, or print a summary of a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--roofline", action="store_true", help="Draw the rows over the machine's limits, to *.svg."
    )
    options = parser.parse_args(arguments)
    file = options.file
    if file is None:
        fill_pages(tables())
    else:
        print(in_short(results.read(file)))
    if options.roofline:
        print(drawn(*([file] if file else [results.RESULTS / f"{name}.jsonl" for name in FILES])))


def drawn(*files: Path) -> str:
    """Draw the rows of each device; return a line about each picture."""
    if find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed"
    lines = []
    for file in files:
        rows = [row for row in results.read(file) if row["bench"] == "kernels"]
        for device in dict.fromkeys(row["device"] for row in rows):
            mine = newest([row for row in rows if row["device"] == device])
            if report_roofline.points(mine):
                picture = file.with_name(f"roofline_{device}.svg")
                report_roofline.draw(mine, picture)
                lines.append(f"drawn: {picture}")
    return "\n".join(lines) or "no picture: no row has a time"


def tables() -> dict[str, str]:
    """Return the text of each marked block."""
    files = [results.RESULTS / f"{name}.jsonl" for name in FILES]
    rows = [row for file in files for row in results.read(file) if row["bench"] == "kernels"]
    return {
        "kernels cpu": device_tables(rows, "cpu"),
        "kernels gpu": device_tables(rows, "cuda"),
        "kernel numbers": numbers(rows),
        "kernel summary": summary(rows),
    }


def device_tables(rows: list[Row], device: str) -> str:
    """Return all tables of a device for bench/README.md."""
    mine = newest([row for row in rows if row["device"] == device])
    if not mine:
        return NONE[device]
    parts = [report_ratios.ratio_table(mine), _bars(mine, device)]
    for _, run in groupby(mine, key=lambda row: (row["started"], row["section"] == "sweep")):
        of_run = list(run)
        measured = [row for row in of_run if "provider" in row]
        for _, group in groupby(measured, key=lambda r: (r["section"], r["shape"], r["dtype"])):
            parts.append(shape_table(list(group)))
        parts.append(sweep_table([row for row in of_run if row["section"] == "sweep"]))
        parts.append(_checked([row for row in of_run if row["section"] == "check"]))
        parts.append(source(of_run[-1]))
    return "\n\n".join(part for part in parts if part)


def numbers(rows: list[Row]) -> str:
    """Return the table of ratios for kernels/README.md, of each device."""
    parts = []
    for device in ("cpu", "cuda"):
        mine = newest([r for r in rows if r["device"] == device and r["section"] != "check"])
        parts += [report_ratios.ratio_table(mine), source(mine[-1])] if mine else [NONE[device]]
    return "\n\n".join(part for part in parts if part)


def summary(rows: list[Row]) -> str:
    """Return the few ratios of the front page, of a CPU until a GPU has rows."""
    mine = newest([row for row in rows if row["device"] == "cuda" and row["section"] != "check"])
    mine = mine or newest([row for row in rows if row["device"] == "cpu"])
    return f"{report_ratios.short_table(mine)}\n\n{source(mine[-1])}" if mine else NONE["cpu"]


def in_short(rows: list[Row]) -> str:
    """Return a summary for a terminal: a line a section and shape, the best settings, the bars."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = newest([row for row in rows if row["device"] == device])
        lines += [_checked([row for row in mine if row["section"] == "check"])]
        for _, group in groupby(mine, key=lambda r: (r["section"], r.get("what"), r.get("shape"))):
            ran = [row for row in group if row["status"] == "ok" and "ms" in row]
            if ran:
                lines.append(_sweep_line(ran) if "what" in ran[0] else _shape_line(ran))
        lines += [
            f"{'met ' if bar['met'] else 'MISSED'}  {bar['bar']}: {bar['value']:.4g}"
            for bar in bars(mine, device)
        ]
        lines.append(source(mine[-1]))
    return "\n".join(line for line in lines if line)


def _sweep_line(ran: list[Row]) -> str:
    """Return a part of the sweep: the shipped settings and the best other one."""
    other = [row for row in ran if row["setting"].startswith("warps=")]
    shown = [row for row in ran if row not in other]
    shown += sorted(other, key=lambda row: row["ms"])[:1]
    return f"{ran[0]['what']}, ms: " + ", ".join(f"{r['setting']} {short(r['ms'])}" for r in shown)


def _shape_line(ran: list[Row]) -> str:
    sizes = " ".join(f"{name}={n}" for name, n in ran[0]["shape"].items())
    ratios = [f" ({ratio})" if (ratio := _over(row, ran)) else "" for row in ran]
    each = [f"{r['provider']} {short(r['ms'])}{x}" for r, x in zip(ran, ratios, strict=True)]
    return f"{ran[0]['section']} {sizes}, ms: " + ", ".join(each)


def shape_table(rows: list[Row]) -> str:
    """Return the table of a section at a shape; ratios to our first provider of the same task."""
    first = rows[0]
    s, ran = first["shape"], [row for row in rows if row["status"] == "ok"]
    title = (
        f"**{first['section']}**, {s['T']:,} rows, V = {s['V']:,}, "
        + (f"H = {s['H']:,}, " if first["section"] in ("hidden", "indexed") else "")
        + f"K = {s['K']}, k = {s['k']}, {first['dtype']}"
    )
    table = markdown(
        ["", "ms", "20-80 %", "over ours", "of the limit", "MB", "error", "computes"],
        [
            [f"`{r['provider']}`", short(r["ms"]), f"{short(r['ms_p20'])}-{short(r['ms_p80'])}",
             _over(r, ran), f"{r['of_limit']:.0%}", _megabytes(r), _error(r), r["computes"]]
            for r in ran
        ],
    )  # fmt: skip
    absent = [f"`{r['provider']}` {r['status']}" for r in rows if r["status"] != "ok"]
    notes = [f"Did not run: {'; '.join(absent)}."] if absent else []
    return "\n\n".join([title, *([table] if ran else []), *notes])


def _over(row: Row, rows: list[Row]) -> str:
    ours = [r for r in rows if r["ours"] and r["task"] == row["task"]]
    return f"{row['ms'] / ours[0]['ms']:.2f}x" if ours and ours[0] is not row else ""


def _megabytes(row: Row) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"


def _error(row: Row) -> str:
    return "" if row["gradient_error"] is None else f"{row['gradient_error']:.0e}"


def _checked(rows: list[Row]) -> str:
    if not rows:
        return ""
    count, wrong = sum(row["checks"] for row in rows), sum(len(row["wrong"]) for row in rows)
    lines = [f"Against float64 on the device: {count:,} checks, {wrong} wrong."]
    late = sum(row["status"].startswith("left out") for row in rows)
    if late:
        lines.append(f"{late} of {len(rows)} steps were left out.")
    for row in rows:
        if not row["status"].startswith(("ok", "wrong", "left out")):
            lines.append(f"{row['what']}, {row['dtype']}: {row['status']}.")
    return "\n".join(lines)


def _bars(rows: list[Row], device: str) -> str:
    lines: list[list[object]] = [
        [each["bar"], f"{each['value']:.4g}", "met" if each["met"] else "**missed**"]
        for each in bars(rows, device)
    ]
    return markdown(["bar", "measured", ""], lines) if lines else ""


def _measured(each: Row) -> str:
    return f"{each['value']:.3g}" + ("" if each["met"] else ", missed")


def sweep_table(rows: list[Row]) -> str:
    """Return the shipped launch parameters of each kernel, and the three best others."""
    ran = [row for row in rows if row["status"] == "ok"]
    if not ran:
        return ""
    lines: list[list[object]] = []
    for what, group in groupby(ran, key=lambda row: row["what"]):
        trials = list(group)
        other = [row for row in trials if row["setting"].startswith("warps=")]
        shown = [row for row in trials if row not in other]
        shown += sorted(other, key=lambda row: row["ms"])[:3]
        for r in shown:
            share = f"{r['of_copy']:.0%}" if "of_copy" in r else ""
            lines.append([what, r["setting"], short(r["ms"]), share])
    title = f"**Launch parameters**, {ran[0]['rows']:,} rows unless said, the three best settings"
    failed = [r for r in rows if r["status"] != "ok"]
    note = f"{len(failed)} settings did not run or were wrong." if failed else ""
    table = markdown(["", "setting", "ms", "of the copy rate"], lines)
    return "\n\n".join(part for part in (title, table, note) if part)


def source(row: Row) -> str:
    """Return command, machine, versions and commit of a row."""
    machine = row.get("gpu")
    machine = (
        f"{machine}, driver {row['driver_version']}, clocks {row['clocks.sm']} and "
        f"{row['clocks.mem']}"
        if machine
        else f"{row['machine']}, {row['threads']} threads"
    )
    rates = (
        f"copy {row['copy_gb_s']:,.0f} GB/s, product {row['gemm_tflop_s']:.3g} TFLOP/s, "
        if "copy_gb_s" in row
        else ""
    )
    command = f"`{row['command']}`, " if "command" in row else ""
    return (
        f"{command}{machine}, {rates}Python {row['python']}, torch {row['torch']}, "
        f"triton {row['triton']}, commit {row['commit']}, kernels {row['kernels']}."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
