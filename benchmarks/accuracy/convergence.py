"""Measures what each compressor costs in accuracy: trains the network of examples/torch_mnist.py with its natural memory and communicator.

    python benchmarks/accuracy/convergence.py [SPEC ...] [--seeds 0 1 2] [--epochs 8] [--out convergence.json] [--table docs/accuracy.md]

Two ranks are simulated in this process (LocalCluster), which gives the results of real ranks. Without SPECs, every registered compressor
is trained. Prints each row when it is known, and writes all as JSON. Exits with 1 if a compressor loses more than 2 points against dense
in the mean over the seeds, except those that are documented to work without error feedback (EXEMPT).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import cross_entropy

import grace_ext

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import torch_mnist  # noqa: E402

RANKS, BATCH, LR = 2, 16, 0.01
MOST_LOST = 2.0  # percentage points
#: Compressors without error feedback, or whose result does not suit SGD's learning rate: their documentation states the loss instead.
EXEMPT = ("signsgd", "signum", "vqsgd", "strom")
#: Entries of a vote have magnitude 1, whatever the gradient's magnitudes are, so votes need a smaller learning rate.
RATE_OF_VOTES = 0.0005

#: Random elements need more than 1% within the 744 steps of this training; the largest 1% is enough.
KNOBS = {"randomk": {"ratio": 0.05}, "wangni": {"ratio": 0.05}, "randblock": {"ratio": 0.1}}


def natural(name: str) -> str:
    """Returns the spec of a compressor with its natural memory."""
    part = grace_ext.compressors.get(name).create((), KNOBS.get(name, {}))
    return str(grace_ext.grace(f"{part} + {part.natural_memory}")) if part.natural_memory != "none" else f"{part} + none"


def train(spec: str, seed: int, epochs: int, data: tuple[torch.Tensor, ...], tick: Any) -> dict[str, float]:
    """Trains once. Returns the accuracy in percent, and the bytes per rank and step."""
    images, labels, test_images, test_labels = data
    g = grace_ext.grace(spec)
    torch.manual_seed(seed)
    model = torch_mnist.make_model()
    cluster = grace_ext.LocalCluster(g, RANKS, framework="torch")
    votes = any(leaf.compressor.result == "vote" for leaf in g.leaves)
    rate = RATE_OF_VOTES if votes else LR
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.0 if votes or any(m.is_momentum for m in g.memories) else 0.9)
    steps = torch_mnist.TRAIN // (BATCH * RANKS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps * epochs, pct_start=0.2, cycle_momentum=False)
    sent = []
    for _ in range(epochs):
        model.train()
        order = torch.randperm(torch_mnist.TRAIN)
        shares = [order[rank::RANKS].split(BATCH)[:steps] for rank in range(RANKS)]
        for batches in zip(*shares, strict=True):
            gradients = []
            for batch in batches:
                optimizer.zero_grad()
                cross_entropy(model(images[batch]), labels[batch]).backward()
                gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            mean = cluster.step(gradients, lr=optimizer.param_groups[0]["lr"])
            for name, p in model.named_parameters():
                p.grad = mean[name]
            optimizer.step()
            schedule.step()
            sent.append(cluster.wire_bytes[0])
            tick()
    return {"accuracy": torch_mnist.test(model, test_images, test_labels), "bytes": statistics.mean(sent)}


def page(results: dict[str, Any], options: argparse.Namespace) -> str:
    """Returns docs/accuracy.md in Markdown."""
    dense = results["none"]
    seeds = ", ".join(map(str, options.seeds))
    lines = [
        "# What compression costs in accuracy", "",
        "`python benchmarks/accuracy/convergence.py --table docs/accuracy.md` writes this page. It trains the network of",
        f"`examples/torch_mnist.py` on 3,000 images and tests it on 2,000 others: {options.epochs} epochs, {RANKS} simulated ranks, mean",
        f"of the seeds {seeds}. All rows use the recipe of dense training (learning rate, schedule, momentum), except that votes use a",
        "twentieth of the rate and no momentum. `points lost` is the accuracy of dense training (`none`) less that of the row;",
        "`times smaller` is the bytes of dense gradients divided by the bytes sent.", "",
        "| parts | accuracy | points lost | times smaller |", "|---|---|---|---|",
    ]  # fmt: skip
    rows = sorted(results.items(), key=lambda item: item[1]["lost"])
    lines += [f"| `{s}` | {r['accuracy']:.2f} % | {r['lost']:.2f} | {dense['bytes'] / r['bytes']:.1f} |" for s, r in rows]
    lines += [
        "", f"The limit of {MOST_LOST:g} points does not apply to {', '.join(EXEMPT)}, which have no error feedback. Compressors",
        "that choose positions at random send 5% of the elements (blocks: 10%), because 1% is too few for so short a training; of the",
        "largest elements, 1% is enough.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the output file's results for the same seeds and epochs, so that an interrupted run can continue."""
    if not options.out or not options.out.exists():
        return {}
    found = json.loads(options.out.read_text())
    return found["results"] if (found["seeds"], found["epochs"]) == (options.seeds, options.epochs) else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results to this file; specs already in it are not run again")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the results as a Markdown page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    specs = options.specs or [natural(name) for name in grace_ext.compressors.names() if name != "none"]
    data, results = torch_mnist.load(), earlier(options)
    console = Console(width=140)
    total = len(options.seeds) * options.epochs * (torch_mnist.TRAIN // (BATCH * RANKS))
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for spec in [s for s in ["none", *specs] if s not in results]:
            task = progress.add_task(spec, total=total)
            runs = [train(spec, seed, options.epochs, data, lambda task=task: progress.advance(task)) for seed in options.seeds]
            progress.remove_task(task)
            accuracies = [run["accuracy"] for run in runs]
            results[spec] = {"accuracies": accuracies, "accuracy": statistics.mean(accuracies), "bytes": runs[0]["bytes"]}
            dense = results["none"]
            results[spec]["lost"] = dense["accuracy"] - results[spec]["accuracy"]
            accuracy, lost, ratio = results[spec]["accuracy"], results[spec]["lost"], dense["bytes"] / results[spec]["bytes"]
            console.print(f"{spec:<72} {accuracy:6.2f} %  lost {lost:5.2f}  {ratio:7.1f}x smaller", highlight=False)
            if options.out:
                summary = {"seeds": options.seeds, "epochs": options.epochs, "torch": torch.__version__, "results": results}
                options.out.write_text(json.dumps(summary, indent=1) + "\n")
    if options.table:
        options.table.write_text(page(results, options))
    failed = [s for s, r in results.items() if r["lost"] > MOST_LOST and not s.startswith(EXEMPT)]
    if failed:
        console.print(f"more than {MOST_LOST} points lost: {', '.join(failed)}", style="red")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
