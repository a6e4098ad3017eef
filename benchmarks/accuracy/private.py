"""Measures what differential privacy costs in accuracy, by spec and epsilon, and in which order clip, noise and compression cost least.

    python benchmarks/accuracy/private.py [SPEC ...] [--seeds 0 1 2] [--epsilons inf 8 1] [--out FILE] [--page docs/privacy.md]

Trains the network of examples/private_mnist.py on two simulated ranks (LocalCluster), with per-example gradients and Poisson sampling.
epsilon inf: examples are clipped, and there is no noise. A SPEC may begin with 'gaussian(support=0.1) |': the other settings of privacy
are filled in. Writes each row as soon as it is known, and goes on with those that the file lacks. Draws the heat map beside --page.
Exits with 1 if error feedback loses more than 3 points against dense at any epsilon.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.functional import cross_entropy

import grace_ext
from grace_ext.frameworks.torch.private import gradients_of_examples
from grace_ext.privacy import Privacy

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import mnist  # noqa: E402

from benchmarks.accuracy.private_page import draw, write  # noqa: E402
from benchmarks.common import record  # noqa: E402

RANKS, STEPS, BATCH, LR, CLIP, DELTA = 2, 300, 256, 0.5, 1.0, 1e-5
EPSILONS, RESULTS = (math.inf, 8.0, 1.0), Path(__file__).parents[1] / "results" / "private.json"
MOST_LOST = 3.0  # percentage points, with error feedback
SPECS = (
    "none",
    "topk(ratio=0.1) + residual",
    "topk(ratio=0.01) + residual",
    "powersgd(rank=4) + residual",
    "powersgd(rank=1) + residual",
    "lqsgd(rank=1) + residual",
    "efsignsgd + residual",
    "topk(ratio=0.1) + none",
    "topk(ratio=0.01) + none",
    "powersgd(rank=4) + none",
    "randomk(ratio=0.1) + none",
    "gaussian(support=0.1) | none",
)


def train(spec: str, epsilon: float, seed: int, data: tuple[torch.Tensor, ...], tick: Callable[[], None]) -> dict[str, float]:
    """Trains once. Returns the accuracy in percent, the bytes per rank and step, and the noise multiplier."""
    images, labels, test_images, test_labels = data
    rate, g = BATCH / len(images), grace_ext.grace(spec, seed=seed)
    asked = g.privacy or Privacy()
    settings = {"clip": CLIP, "unit": "example", "sample_rate": rate, "batch": BATCH / RANKS}
    noise = 0.0 if math.isinf(epsilon) else Privacy(**settings).noise_for(epsilon, DELTA, STEPS)
    privacy = replace(asked, noise_multiplier=noise, **settings)
    cluster = grace_ext.LocalCluster(grace_ext.Grace(g.route, g.seed, privacy), RANKS, framework="torch")
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    sampling = torch.Generator().manual_seed(seed)  # repeatable, for this measurement
    for _ in range(STEPS):
        gradients = []
        for rank in range(RANKS):
            mine = torch.arange(rank, len(images), RANKS)
            mine = mine[torch.rand(len(mine), generator=sampling) < rate]
            gradients.append(gradients_of_examples(model, cross_entropy, images[mine], labels[mine])[0])
        mean = cluster.step(gradients, lr=LR)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= LR * mean[name]
        tick()
    return {"accuracy": 100 * mnist.accuracy(model, test_images, test_labels), "bytes": cluster.wire_bytes[0], "noise": noise}


def cell(spec: str, epsilon: float, seeds: Sequence[int], data: tuple[torch.Tensor, ...], tick: Callable[[], None]) -> dict[str, Any]:
    """Trains once per seed. Returns the accuracies, their mean, the bytes and the noise multiplier."""
    runs = [train(spec, epsilon, seed, data, tick) for seed in seeds]
    accuracies = [one["accuracy"] for one in runs]
    return {"accuracies": accuracies, "accuracy": statistics.mean(accuracies), "bytes": runs[0]["bytes"], "noise": runs[0]["noise"]}


def complete(
    specs: Sequence[str], epsilons: Sequence[float], seeds: Sequence[int], out: Path, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Trains what the file lacks of these settings, and returns what it then holds: by spec and epsilon the cells. progress: is told the
    share that is done."""
    head = {"seeds": [*seeds], "steps": STEPS, "batch": BATCH, "rate": LR, "clip": CLIP, "delta": DELTA, "ranks": RANKS}
    found = json.loads(out.read_text()) if out.exists() else {}
    results = found.get("results", {}) if all(found.get(key) == value for key, value in head.items()) else {}
    missing, data, done = [(spec, e) for spec in specs for e in epsilons if f"{e:g}" not in results.get(spec, {})], mnist.load(), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done / (len(missing) * len(seeds) * STEPS))

    for spec, epsilon in missing:
        results.setdefault(spec, {})[f"{epsilon:g}"] = row = cell(spec, epsilon, seeds, data, tick)
        print(f"{spec:<40} epsilon {epsilon:<5g} {row['accuracy']:6.2f} %  {row['bytes']:>8} bytes", flush=True)
        out.write_text(json.dumps({**record.stamp(), **head, "results": results}, indent=1) + "\n")
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC", default=SPECS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table into this page, and the picture beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("training", total=1.0)
        found = complete(options.specs, options.epsilons, options.seeds, options.out, lambda share: bars.update(task, completed=share))
    if options.page:
        draw(found, options.page.parent / "pictures" / "private.png")
        write(found, options.page)
    results, failed = found["results"], []
    for spec in options.specs:
        for epsilon, row in results[spec].items():
            lost = results["none"][epsilon]["accuracy"] - row["accuracy"]
            if "residual" in spec and lost > MOST_LOST:
                failed.append(f"{spec} loses {lost:.1f} points at epsilon {epsilon}")
    print("\n".join(failed) or f"with error feedback no spec loses more than {MOST_LOST:g} points")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
