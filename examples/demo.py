"""Trains examples/torch_mnist.py densely and with three compressors on 2 ranks, and checks that compression costs no accuracy.

    python examples/demo.py [--launcher torchrun|horovodrun] [--seeds 0 1 2] [--out demo]

Shows progress, prints a table at the end, and writes results.json and curves.png. Exits with 1, and says why, if a job fails, if dense
training does not exceed 95% accuracy, or if the mean of a compressor is more than one point below that of dense training.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import rich.box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt  # noqa: E402

EXAMPLE = Path(__file__).with_name("torch_mnist.py")
RANKS = 2
DENSE = "dense"
# Name of a result -> value of the example's --compression.
SPECS = {
    DENSE: DENSE,
    "topk": "topk(ratio=0.01) + residual @ allgather",
    "efsignsgd": "efsignsgd + residual @ allgather",
    "powersgd": "powersgd(rank=2) + residual @ allreduce",
}
LEAST_DENSE = 95.0  # percent
MOST_LOST = 1.0  # percentage points
# The example prints this line once per epoch. horovodrun puts a prefix before every line.
EPOCH = re.compile(r"seed (\d+)  epoch (\d+)/(\d+)  loss \S+  accuracy (\S+)%")


class JobFailed(Exception):
    """Raised if a training job fails; the message has the last lines of its output."""


def command(launcher: str) -> list[str]:
    """Returns the command that starts a Python file on RANKS ranks, in this Python's environment."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    horovodrun = Path(sys.executable).with_name("horovodrun")
    if not horovodrun.exists():
        raise JobFailed(f"there is no {horovodrun}: `make horovod` installs it")
    # With Gloo, no mpirun needs to be on the PATH.
    return [str(horovodrun), "--gloo", "-np", str(RANKS), sys.executable]


def run_job(arguments: list[str], on_epoch: Callable[[re.Match[str]], None], timeout: float) -> list[dict[str, Any]]:
    """Runs one job, calls `on_epoch` for each epoch that it reports, and returns the example's results."""
    # One thread per rank, because the ranks share the cores. horovodrun imports TensorFlow, which logs a lot.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    last: deque[str] = deque(maxlen=60)  # enough for torchrun's own report, which follows that of the rank
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        arguments = [*arguments, "--json", str(result)]
        with subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
            assert job.stdout is not None
            # A launcher that gets SIGTERM stops its ranks.
            watchdog = threading.Timer(timeout, job.terminate)
            watchdog.start()
            try:
                for line in job.stdout:
                    last.append(line.rstrip())
                    if match := EPOCH.search(line):
                        on_epoch(match)
                job.wait()
            finally:
                late = not watchdog.is_alive()
                watchdog.cancel()
                if job.poll() is None:  # this process was interrupted
                    job.terminate()
        if late:
            last.append(f"(stopped after {timeout:.0f} s)")
        if late or job.returncode or not result.exists():
            raise JobFailed("\n".join([f"exit code {job.returncode}: {shlex.join(arguments)}", *last]))
        return json.loads(result.read_text())


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one row of the table: the summary of a spec's runs over all seeds."""
    accuracies = [run["accuracy"] for run in runs]
    dense_bytes = 4 * runs[0]["parameters"]
    payload = statistics.mean(run["bytes_per_step"] for run in runs)
    return {
        "spec": SPECS[name],
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_min": min(accuracies),
        "accuracy_max": max(accuracies),
        "payload_bytes_per_step": payload,
        "ratio_to_dense": dense_bytes / payload,
        "step_ms": 1000 * statistics.median(run["step_seconds"] for run in runs),
        "runs": runs,
    }


def judge(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the demo's criteria, each with the measured value, the requirement, and whether it is met."""
    dense = rows[DENSE]["accuracy_mean"]
    criteria = [{"name": "dense accuracy, percent", "measured": dense, "required": f"above {LEAST_DENSE}", "met": dense > LEAST_DENSE}]
    for name, row in rows.items():
        if name != DENSE:
            lost = round(dense - row["accuracy_mean"], 6)
            criteria.append(
                {"name": f"{name}: points below dense", "measured": lost, "required": f"at most {MOST_LOST}", "met": lost <= MOST_LOST}
            )
    return criteria


def make_table(rows: dict[str, dict[str, Any]], seeds: list[int]) -> Table:
    title = f"{RANKS} ranks; accuracy is the mean over seed {', '.join(map(str, seeds))} ± half the range"
    table = Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("compression", no_wrap=True)
    for header in ("test\naccuracy", "bytes/\nstep", "to\ndense", "step\ntime"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows.values():
        table.add_row(
            row["spec"].replace(" ", ""),
            f"{row['accuracy_mean']:.2f} ± {(row['accuracy_max'] - row['accuracy_min']) / 2:.2f}%",
            f"{row['payload_bytes_per_step']:,.0f}",
            f"1/{row['ratio_to_dense']:.1f}",
            f"{row['step_ms']:.1f} ms",
        )
    return table


def draw(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Draws the test accuracy over the epochs, and over the bytes that a rank has sent."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for row in rows.values():
        curves = [run["test_accuracy"] for run in row["runs"]]
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        epochs = range(1, len(mean) + 1)
        (line,) = left.plot(epochs, mean, marker="o", markersize=3, label=row["spec"])
        left.fill_between(epochs, [min(v) for v in zip(*curves, strict=True)], [max(v) for v in zip(*curves, strict=True)],
                          color=line.get_color(), alpha=0.15)  # fmt: skip
        sent = [epoch * row["runs"][0]["steps_per_epoch"] * row["payload_bytes_per_step"] for epoch in epochs]
        right.plot(sent, mean, marker="o", markersize=3, color=line.get_color())
    left.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(80, 100))
    left.legend(loc="lower right", fontsize="small")
    right.set(xlabel="bytes sent by a rank so far", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle("Mean over seeds; the band is the smallest and largest")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def versions(launcher: str) -> dict[str, str]:
    packages = ["grace_ext", "torch", "numpy", "mlxtend"] + (["horovod"] if launcher == "horovodrun" else [])
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def train_all(options: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Trains all specs with all seeds, one job per spec, under one progress bar."""
    results: dict[str, list[dict[str, Any]]] = {}
    counts = (MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *counts, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(SPECS) * len(options.seeds) * options.epochs)
        for name, spec in SPECS.items():
            progress.update(bar, description=f"{name}: starting {RANKS} ranks")

            def on_epoch(match: re.Match[str], name: str = name) -> None:
                seed, epoch, epochs, accuracy = match.groups()
                progress.update(bar, advance=1, description=f"{name}, seed {seed}: {accuracy}%")
                if epoch == epochs:
                    progress.console.print(f"{name:10s} seed {seed}: test accuracy {accuracy}%", highlight=False)

            settings = ["--compression", spec, "--epochs", str(options.epochs), "--seed", *map(str, options.seeds)]
            results[name] = run_job([*command(options.launcher), str(EXAMPLE), *settings], on_epoch, options.timeout)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=["torchrun", "horovodrun"], default="torchrun")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: shows that everything runs; accuracy is not judged")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="the folder for results.json and curves.png")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which a job is stopped")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = options.seeds[:1], 2
    console, started = Console(), time.monotonic()
    try:
        results = train_all(options, console)
    except JobFailed as failure:
        sentence = f"[bold red]The demo failed:[/] a training job failed. {escape(str(failure))}"
        console.print(sentence, highlight=False, soft_wrap=True)
        return 1
    rows = {name: summarise(name, runs) for name, runs in results.items()}
    criteria = judge(rows)
    missed = [] if options.quick else [c for c in criteria if not c["met"]]
    document = {
        "passed": not missed, "judged": not options.quick, "criteria": criteria, "launcher": options.launcher, "ranks": RANKS,
        "seeds": options.seeds, "epochs": options.epochs, "total_seconds": round(time.monotonic() - started, 1),
        "versions": versions(options.launcher), "results": rows,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(rows, options.out / "curves.png")
    console.print(make_table(rows, options.seeds))
    console.print(f"{document['total_seconds']:.0f} s. Written: {options.out / 'results.json'}, {options.out / 'curves.png'}")
    for c in missed:
        console.print(f"[bold red]The demo failed:[/] {c['name']}: {c['measured']:.2f}, required: {c['required']}.", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    # Unwinds the stack, as Ctrl-C does, so that the job is stopped, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
