"""Measures what each compressor costs in accuracy, at two or three settings each: trainings of `grace-ext compare` on MNIST.

    python benchmarks/accuracy/convergence.py [SPEC ...] [--seeds 3] [--rates 0.5 1 2] [--out convergence.json] [--page docs/accuracy.md]

Two ranks are simulated in each process (LocalCluster), which gives the results of real ranks; as many trainings run at a time as there are
cores. Each spec gets the best of the learning rates, found with another seed. Without SPECs, all settings of benchmarks/common/settings.py
are trained. Prints each row when it is known, and writes all as JSON; specs that are already in --out are not trained again. Exits with 1
if no setting of a compressor comes within 2 points of dense training, except those that have no error feedback (EXEMPT).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from grace_ext.planning.candidates import completed
from grace_ext.studies.comparison import Row, rows
from grace_ext.studies.picture import draw, name_of
from grace_ext.studies.task import task
from grace_ext.studies.training import Run, Trainings, amount

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record, settings

DENSE, DATA = str(completed("none")), "mnist"
RESULTS = Path(__file__).parents[1] / "results"
MOST_LOST = 2.0  # percentage points
#: Compressors without error feedback, whose documentation states the loss instead.
EXEMPT = ("signsgd", "signum", "vqsgd", "random_projection")


def as_rows(found: dict[str, Any]) -> list[Row]:
    """Returns the stored results as rows of a comparison, without times."""
    runs = {
        spec: [Run(spec, seed, of["rate"], score, of["nbytes"], []) for seed, score in enumerate(of["scores"])]
        for spec, of in found.items()
    }
    return rows(task(DATA), runs, {}, {})


def page(document: dict[str, Any], bench: dict[str, Any]) -> str:
    """Returns docs/accuracy.md in Markdown. bench: the rows of bench.json by spec."""
    all_rows = as_rows(document["results"])
    dense = next(row for row in all_rows if row.spec == DENSE)
    rates = ", ".join(f"{rate:g}" for rate in document["rates"])
    lines = [
        "# What compression costs in accuracy", "",
        "`python benchmarks/accuracy/convergence.py --page docs/accuracy.md` writes this page, by the trainings of `grace-ext compare`: a",
        "small CNN (29,762 parameters) on 3,000 of MNIST's digits, tested on 2,000 others; 744 steps, 2 simulated ranks. Mean and standard",
        f"deviation of {document['seeds']} seeds. Each row has the best of {rates} times dense training's learning rate, found",
        "with another seed; votes start from a twentieth of it, without momentum. `points lost`: accuracy of dense training less that of",
        "the row; differences below the standard deviations are noise. `times smaller`: bytes of dense gradients divided by those sent.",
        "`encode` and `decode` are those of [performance.md](performance.md) for the same spec: multiples of a copy of a gradient of 25",
        "million elements; empty cells were not timed at that setting. A star marks the Pareto front.",
        f"{document['date']}, commit {document['commit']}.", "",
        "![accuracy against bytes](pictures/accuracy.png)", "",
        "| parts | accuracy, % | points lost | times smaller | learning rate | encode | decode |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(all_rows, key=lambda row: -row.score):
        timing = bench.get(row.spec)
        speed = [f"{timing['encode']:.1f}", f"{timing['decode']:.1f}" if timing["decode"] else "-"] if timing else ["", ""]
        cells = [
            f"`{row.spec}`{' *' if row.front else ''}", f"{row.score:.2f} ± {row.sd:.2f}", f"{dense.score - row.score:.2f}",
            f"{row.smaller:.1f}", f"{row.rate:g}", *speed,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "", f"{', '.join(EXEMPT)} have no error feedback in these specs. Compressors that choose positions at random need more of them",
        "than those that send the largest elements: 5% (blocks: 10%).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def bench_rows() -> dict[str, Any]:
    file = RESULTS / "bench.json"
    return {row["spec"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--out", type=Path, metavar="FILE", default=RESULTS / "convergence.json")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the results as a Markdown page, with a picture")
    options = parser.parse_args()
    specs = list(dict.fromkeys([DENSE, *(str(completed(text)) for text in options.specs)])) if options.specs else settings.specs()
    document: dict[str, Any] = {**record.stamp(), "seeds": options.seeds, "rates": options.rates, "results": {}}
    if options.out.exists():
        known = json.loads(options.out.read_text())
        if (known["seeds"], known.get("rates")) == (options.seeds, options.rates):
            document["results"] = known["results"]
    console, results = Console(width=140), document["results"]
    lacking = [spec for spec in specs if spec not in results]
    with Progress(console=console, disable=not console.is_terminal) as progress, Trainings(DATA) as trainings:
        bar = progress.add_task("training", total=amount(lacking, range(options.seeds), options.rates))
        for spec in lacking:
            runs = trainings.runs([spec], range(options.seeds), options.rates, lambda done: progress.advance(bar, done))[spec]
            scores = [run.score for run in runs]
            results[spec] = {"scores": scores, "nbytes": statistics.mean(run.nbytes for run in runs), "rate": runs[0].rate}
            console.print(f"{spec:<80} {statistics.mean(scores):6.2f} %  {results[spec]['nbytes']:9,.0f} bytes", highlight=False)
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(document, bench_rows()))
        draw(task(DATA), as_rows(results), f"{DATA}, 2 ranks, {options.seeds} seeds", options.page.parent / "pictures" / "accuracy.png")
    best: dict[str, float] = {}
    for spec, of in results.items():
        best[name_of(spec)] = max(best.get(name_of(spec), 0.0), statistics.mean(of["scores"]))
    failed = [name for name, score in best.items() if score < statistics.mean(results[DENSE]["scores"]) - MOST_LOST and name not in EXEMPT]
    if failed:
        console.print(f"more than {MOST_LOST} points lost: {', '.join(failed)}", style="red")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
