"""Writes docs/performance.md from the benchmarks' JSON in benchmarks/results, and the pictures of exchange.json and cost.json.

    python tools/performance.py             writes the page and docs/pictures
    python tools/performance.py --check     exits with 1 if the page differs from the results (pictures must only exist)

A benchmark without JSON has no section; without any JSON there is no page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import targets  # noqa: E402

PAGE, PICTURES, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "pictures", ROOT / "benchmarks" / "results"


def table(heading: list[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Returns a Markdown table; all columns but the first are aligned to the right."""
    rows = [[str(x).replace("|", chr(92) + "|") for x in row] for row in rows]
    return [_line(heading), _line(["---", *["--:"] * (len(heading) - 1)]), *map(_line, rows), ""]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def origin(found: dict[str, Any], command: str) -> list[str]:
    """Returns the paragraph that says which command measured a section's numbers, where and when."""
    packages = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    commit = f"commit {found['commit']}" if "commit" in found else None
    where = "; ".join(x for x in (found.get("machine"), found.get("date"), commit, packages) if x)
    return [f"By `{command}`: {where}.", ""]


def number(value: float | None) -> str:
    """Formats a number with three significant digits; from 100 on, as a whole number."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- targets ---------------------------------------------------------------------------------------------------------
def targets_section(found: dict[str, Any]) -> list[str]:
    """Returns the section that compares the targets with all results. found: results by the name of their file."""
    rows = targets.of_local(found["bench"]["rows"]) if "bench" in found else []
    rows += targets.of_exchange(found["exchange"]) if "exchange" in found else []
    rows += targets.of_accuracy(found["time_to_accuracy"]["rows"]) if "time_to_accuracy" in found else []
    if not rows:
        return []
    met = sum(row.met for row in rows)
    lines = ["## Targets", "", f"The targets were set before the code was written. {met} of {len(rows)} are met.", ""]
    bounds = [f"{'at most' if row.most else 'at least'} {row.target:g}" for row in rows]
    outcomes = [(number(row.measured), "yes" if row.met else "**no**") for row in rows]
    shown = [(row.what, row.where, bound, *outcome) for row, bound, outcome in zip(rows, bounds, outcomes, strict=True)]
    return lines + table(["ratio", "where", "target", "measured", "met"], shown)


# --- exchange --------------------------------------------------------------------------------------------------------
def exchange_section(found: dict[str, Any]) -> list[str]:
    lines = [
        "## A full exchange", "",
        "Ranks exchange one step's gradients of a whole model, one thread per rank, on hosts that netlab makes (all share this machine's",
        "cores). `ms` is the time until the mean has replaced every gradient: the median over the steps of the slowest rank's time.",
        "`x dense` is relative to dense Horovod in the same run. For DDP, the time of a step with a hook that does nothing is subtracted.",
        "`MB sent` is what a host's network interface sent, headers included. `x memory` is the peak of resident memory beyond the",
        "gradients themselves, in multiples of them.", "",
    ]  # fmt: skip
    for key, cell in found["cells"].items():
        if cell["complete"] and cell["dense_ms"]:
            lines += exchange_cell(key, cell)
    for file in _plots().exchange_files(found):
        lines += [f"![{file.removesuffix('.png')}](pictures/{file})", ""]
    return lines


def exchange_cell(key: str, cell: dict[str, Any]) -> list[str]:
    dense = statistics.mean(cell["dense_ms"])
    rows = []
    for name, seen in cell["systems"].items():
        if seen["outcome"] == "completes":
            sent = seen["sent_bytes"] or seen["wire_bytes"]
            memory = seen["extra_memory"] / (4 * cell["elements"]) if seen["extra_memory"] is not None else None
            wrong = "" if seen["ranks_agree"] and seen["finite"] else " (ranks differ)" if seen["finite"] else " (not finite)"
            megabytes = number(sent / 1e6) if sent else "-"
            rows.append((name + wrong, number(seen["ms"]), number(seen["ms"] / dense), megabytes, number(memory), seen["steps"]))
        else:
            rows.append((name, f"{seen['outcome']}: {seen['reason']}", "-", "-", "-", "-"))
    runs = ", ".join(number(ms) for ms in cell["dense_ms"])
    lines = [f"### {cell['model']}, {cell['rate']}, {cell['hosts']} hosts", ""]
    lines += origin(cell, f"python benchmarks/exchange/exchange.py --model {cell['model']} --rate {cell['rate']} --hosts {cell['hosts']}")
    lines += [f"{cell['elements']:,} elements in {cell['tensors']} tensors. Dense Horovod in this run: {runs} ms.", ""]
    return lines + table(["system", "ms", "x dense", "MB sent", "x memory", "steps timed"], rows)


# --- others ----------------------------------------------------------------------------------------------------------
def cost_section(found: dict[str, Any]) -> list[str]:
    lines = ["## More workers", "", *origin(found, "python benchmarks/exchange/cost_model.py")]
    off = statistics.median(abs(row["predicted"] / row["measured"] - 1) for row in found["compared"])
    lines += [
        f"The cost model of `grace_ext/planning/cost.py` predicts exchanges of {found['model']}'s gradients. Latency and rate come from",
        "plain collectives, the times of encoding and decoding from simulated ranks. The median error over the",
        f"{len(found['compared'])} measured exchanges is {100 * off:.0f}%. An all-gather brings every worker's payload to all workers, so",
        "dense all-reduce is faster from some number of workers on.", "",
    ]  # fmt: skip
    rates = found["extrapolated"]
    rows = []
    for name, work in found["work"].items():
        limits = [rates[rate]["slower_from"][name] or "over 1,024" for rate in rates]
        rows.append((name, number(1000 * work["encode"]), number(1000 * work["decode"]), number(work["payload"] / 1e6), *limits))
    lines += table(["system", "encode ms", "decode ms", "MB", *(f"dense is faster from, at {rate}" for rate in rates)], rows)
    lines += ["![times faster than dense Horovod, over the number of workers](pictures/cost.png)", "", "Predicted and measured, ms:", ""]
    predictions = [(r["system"], r["rate"], r["hosts"], number(r["predicted"]), number(r["measured"])) for r in found["compared"]]
    return lines + table(["system", "rate", "hosts", "predicted", "measured"], predictions)


def accuracy_section(found: dict[str, Any]) -> list[str]:
    lines = ["## Time to the same accuracy", "", *origin(found, "python benchmarks/time_to_accuracy/time_to_accuracy.py")]
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        of_task = [row for row in found["rows"] if row["task"] == task]
        faster, rows = targets.speedups(of_task), []
        for spec in dict.fromkeys(row["spec"] for row in of_task):
            runs = [row for row in of_task if row["spec"] == spec]
            seconds = number(statistics.mean(r["seconds"] for r in runs)) if all(r["reached"] for r in runs) else "not reached"
            means = [number(statistics.mean(r[key] for r in runs)) for key in ("steps", "step_ms")]
            megabytes = number(statistics.mean(r["bytes_per_step"] for r in runs) / 1e6)
            times = "1" if spec == "dense" else number(faster[spec])
            rows.append((f"`{spec}`", seconds, times, *means, megabytes, len(runs)))
        lines += [f"### {task}, {found['rate']}, {found['ranks']} ranks", ""]
        lines += table(["parts", "seconds", "times faster than dense", "steps", "ms per step", "MB per step", "seeds"], rows)
    return lines


def local_section(found: dict[str, Any]) -> list[str]:
    copy = statistics.median(row["copy_ms"] * 25e6 / row["elements"] for row in found["rows"])
    lines = [
        "## One gradient on one rank", "", *origin(found, "python benchmarks/exchange/local.py"),
        "Each compressor is timed with its natural memory, in multiples of a copy of the same gradient that is timed beside it. Encoding",
        "includes error feedback. Decoding is per rank's payload, or once if the network adds payloads up. For compressors with their own",
        "rounds, all work is under encode. Error is ||result - mean|| / ||mean|| at the first step, of Gaussian numbers. A copy of 100 MB",
        f"took {number(copy)} ms here; where memory is slower, multiples of it are smaller. `grace-ext bench` measures your machine.", "",
    ]  # fmt: skip
    rows = [
        (f"`{row['spec']}`", f"{row['elements']:,}", f"{row['encode']:.1f}", f"{row['decode']:.1f}" if row["decode"] else "-",
         number(row["bytes_per_element"]), number(row["error"]))
        for row in found["rows"]
    ]  # fmt: skip
    return lines + table(["parts", "elements", "encode", "decode per rank", "bytes per element", "error"], rows)


def plain_section(title: str, command: str) -> Callable[[dict[str, Any]], list[str]]:
    """Returns a function that makes the section of results with a head and a list of flat rows."""

    def section(found: dict[str, Any]) -> list[str]:
        rows = next((x for x in found.values() if isinstance(x, list) and x and all(isinstance(row, dict) for row in x)), [])
        keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list))))
        shown = [[number(x) if isinstance(x, float) else x for x in (row.get(key, "-") for key in keys)] for row in rows]
        return [f"## {title}", "", *origin(found, command), *(table([k.replace("_", " ") for k in keys], shown) if rows else [])]

    return section


SECTIONS = {
    "bench": local_section,
    "exchange": exchange_section,
    "time_to_accuracy": accuracy_section,
    "memory": plain_section("Memory", "python benchmarks/memory/memory.py"),
    "cost": cost_section,
}


def page(found: dict[str, Any]) -> str:
    """Returns the page in Markdown. found: results by the name of their file."""
    head = "Generated by `python tools/performance.py` from `benchmarks/results`. Each section says where and when it was measured."
    lines = ["# Performance", "", head]
    lines += ["", *targets_section(found)]
    for name, section in SECTIONS.items():
        if name in found:
            lines += section(found[name])
    return "\n".join(lines)


def _plots() -> Any:
    from benchmarks.common import plots

    return plots


def draw(found: dict[str, Any], folder: Path) -> list[str]:
    """Draws the pictures. Returns their names."""
    drawn = _plots().draw_exchange(found["exchange"], folder) if "exchange" in found else []
    return drawn + ([_plots().draw_cost(found["cost"], folder)] if "cost" in found else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page; pictures go to `pictures` beside it")
    options = parser.parse_args()
    files = [options.results / f"{name}.json" for name in SECTIONS]
    found = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    text, pictures = page(found), options.page.parent / "pictures"
    if not options.check and not found:
        print(f"there are no results in {options.results.name}: run the benchmarks first", file=sys.stderr)
        return 1
    if not options.check:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(text)
        print(f"{options.page.name}, {len(draw(found, pictures))} pictures")
        return 0
    there = options.page.read_text() if options.page.exists() else None
    wrong = [] if there == (text if found else None) else [options.page.name]
    wanted = [*(_plots().exchange_files(found["exchange"]) if "exchange" in found else ()), *(["cost.png"] if "cost" in found else [])]
    wrong += [name for name in wanted if not (pictures / name).exists()]
    print(f"not up to date, run python tools/performance.py: {', '.join(wrong)}" if wrong else "up to date", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
