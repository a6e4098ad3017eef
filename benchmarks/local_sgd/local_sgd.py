"""Measures local-update training: what it saves, what it costs in accuracy, and what asynchronous ranks gain if one of them is slow.

    python benchmarks/local_sgd/local_sgd.py accuracy  [SPEC ...] [--seeds 0 1 2] [--epochs 8] [--every 8]       about 5 minutes
    python benchmarks/local_sgd/local_sgd.py straggler [--ranks 3] [--slower 3]                                   about 4 minutes

`accuracy` trains examples/torch_mnist.py's network on two simulated ranks, densely at every step and by LocalSGD, both with the recipe of
dense training. It exits with 1 if LocalSGD sends more than 1/500 of the dense bytes per step, or loses more than 1.5 points.
`straggler` trains it in real processes (torchrun), where the last rank's steps take --slower times as long, synchronously and
asynchronously, and compares the time to the same training loss. It exits with 1 if asynchronous training is not faster.
Both add their results to benchmarks/results/local_sgd.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from grace_ext.local import LocalSGDCluster

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout
from benchmarks.common import record

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "examples"))
import torch_mnist  # noqa: E402

RESULTS = FOLDER.parent / "results" / "local_sgd.json"
RANKS, BATCH, LR = 2, 16, 0.01
SPEC = "topk(ratio=0.01) > qsgd(bits=4) + residual"
MOST_LOST, FEWEST_TIMES = 1.5, 500.0


class Simulated:
    """Simulates ranks, each with its own model and optimizer, and the cluster that connects them."""

    def __init__(self, seed: int, total_steps: int, spec: str, **options: Any):
        self.models, self.optimizers, self.schedules = [], [], []
        for _ in range(RANKS):
            torch.manual_seed(seed)
            model = torch_mnist.make_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
            self.models.append(model)
            self.optimizers.append(optimizer)
            self.schedules.append(
                torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=total_steps, pct_start=0.2, cycle_momentum=False)
            )
        self.cluster = LocalSGDCluster(spec, RANKS, framework="torch", **options)
        self.cluster.start(self._values())

    def _values(self) -> list[dict[str, torch.Tensor]]:
        return [{name: p.detach() for name, p in model.named_parameters()} for model in self.models]

    def step(self, batches: Any) -> int:
        """Makes one step on all ranks. Returns the bytes that a rank sends."""
        for model, (images, labels) in zip(self.models, batches, strict=True):
            model.zero_grad()
            cross_entropy(model(images), labels).backward()
        own = [{name: p.grad for name, p in model.named_parameters()} for model in self.models]
        for model, gradients in zip(self.models, self.cluster.gradients(own), strict=True):
            for name, p in model.named_parameters():
                p.grad = gradients[name].clone()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self._take(self.cluster.step(self._values()))
        return self.cluster.wire_bytes[0]

    @torch.no_grad()
    def _take(self, values: Any) -> None:
        for model, new in zip(self.models, values, strict=True):
            for name, p in model.named_parameters():
                p.copy_(new[name])

    def finish(self) -> None:
        self._take(self.cluster.sync(self._values()))


def train(spec: str, seed: int, epochs: int, data: tuple[torch.Tensor, ...], **options: Any) -> dict[str, float]:
    """Trains once. Returns the accuracy of rank 0's model (with its own BatchNorm statistics) in percent, and bytes per rank and step."""
    images, labels, test_images, test_labels = data
    steps = torch_mnist.TRAIN // (BATCH * RANKS)
    ranks = Simulated(seed, steps * epochs, spec, **options)
    sent = []
    for _ in range(epochs):
        for model in ranks.models:
            model.train()
        order = torch.randperm(torch_mnist.TRAIN)
        shares = [order[rank::RANKS].split(BATCH)[:steps] for rank in range(RANKS)]
        for batches in zip(*shares, strict=True):
            sent.append(ranks.step([(images[batch], labels[batch]) for batch in batches]))
    ranks.finish()
    return {"accuracy": torch_mnist.test(ranks.models[0], test_images, test_labels), "bytes": statistics.mean(sent)}


def accuracy(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Trains densely at every step, and by LocalSGD with each spec. Returns the results, and whether the limits hold."""
    torch.set_num_threads(1)
    data = torch_mnist.load()
    runs = [("none", 1), *((spec, options.every) for spec in options.specs or [SPEC])]
    rows: list[dict[str, Any]] = []
    for spec, every in runs:
        trained = [train(spec, seed, options.epochs, data, every=every) for seed in options.seeds]
        row: dict[str, Any] = {"spec": spec, "every": every, "accuracies": [run["accuracy"] for run in trained]}
        row |= {"accuracy": statistics.mean(row["accuracies"]), "bytes_per_step": statistics.mean(run["bytes"] for run in trained)}
        row |= {"lost": (rows or [row])[0]["accuracy"] - row["accuracy"]}
        row |= {"times_smaller": (rows or [row])[0]["bytes_per_step"] / row["bytes_per_step"]}
        rows.append(row)
        print(
            f"{spec:<50} H={every}  {row['accuracy']:6.2f} %  lost {row['lost']:5.2f}  {row['bytes_per_step']:9.1f} bytes per step  "
            f"{row['times_smaller']:7.1f}x smaller",
            flush=True,
        )
    held = all(row["lost"] <= MOST_LOST and row["times_smaller"] >= FEWEST_TIMES for row in rows[1:])
    return {"ranks": RANKS, "epochs": options.epochs, "seeds": options.seeds, "rows": rows}, held


def straggler(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Trains in real processes, first synchronously, then asynchronously. Returns the results, and whether asynchronous is faster."""
    rows = []
    for asynchronous in (False, True):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        command += [str(FOLDER / "rank.py"), "--every", str(options.every), "--slower", str(options.slower)]
        command += ["--steps", str(options.steps), "--pause", str(options.pause), "--compression", (options.specs or [SPEC])[0]]
        done = subprocess.run(command + ["--asynchronous"] * asynchronous, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        row["seconds_to_target"] = seconds_to(row["curve"], options.target)
        rows.append(row)
        kind = "asynchronous" if asynchronous else "synchronous"
        print(f"{kind:<13} loss {options.target:g} after {row['seconds_to_target']} s; steps by rank {row['steps']}", flush=True)
    slow, fast = (row["seconds_to_target"] for row in rows)
    faster = slow / fast if slow and fast else None
    print(f"asynchronous is {faster:.2f} times as fast" if faster else "the target was not reached: more --steps, or a higher --target")
    settings = {key: getattr(options, key) for key in ("ranks", "slower", "pause", "every", "steps", "target")}
    return {**settings, "spec": (options.specs or [SPEC])[0], "faster": faster, "rows": rows}, bool(faster and faster > 1)


def seconds_to(curve: list[list[float]], target: float) -> float | None:
    """Returns the first time at which both the loss and its mean over three values from there are at or below the target; or None."""
    for at, (seconds, loss) in enumerate(curve):
        if loss <= target and statistics.mean(loss for _, loss in curve[at : at + 3]) <= target:
            return seconds
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "straggler"])
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--slower", type=float, default=3.0, help="how many times as long the last rank takes for a step")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds per step of the other ranks, to stand for a larger model")
    parser.add_argument("--steps", type=int, default=240, help="number of steps of a rank that is not slow")
    parser.add_argument("--target", type=float, default=0.3, help="the training loss to reach")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured, held = {"accuracy": accuracy, "straggler": straggler}[options.what](options)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**known, options.what: {**record.stamp(), **measured, "held": held}}, indent=1) + "\n")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
