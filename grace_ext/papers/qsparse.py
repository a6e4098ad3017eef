"""Combines local steps and compression: bytes to a target loss, by the number of local steps, and accuracy of asynchronous ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..local import LocalSGDCluster
from .experiment import Check, Curve, Experiment, Outcome, Progress, in_units
from .problems import digits

RANKS, BATCH, STEPS, TRAIN = 4, 8, 600, 3000
GAPS = (1, 4, 8, 16)
SPECS = {
    "dense": "none",
    "topk": "topk(ratio=0.01) + residual",
    "topk > qsgd": "topk(ratio=0.01) > qsgd(bits=4) + residual",
    "topk > signs": "topk(ratio=0.01) > sign + residual",
}
#: The first rates, which fall to zero linearly. Each spec and gap has the one that gets a seed of its own to the target soonest.
RATES, TUNING = (0.1, 0.2, 0.4, 0.8, 1.6), 100
TARGET, MOST_LOST = 0.4, 0.5
APART = 4  # steps at least from one evaluation to the next
Model = Mapping[str, Any]


class Digits:
    """Softmax regression on MNIST: pixels from 0 to 1, 7,850 parameters."""

    def __init__(self) -> None:
        images, labels = digits()
        order = np.random.default_rng(0).permutation(len(labels))
        self.images, self.labels = images[order].astype(np.float32), labels[order]

    def scores(self, model: Model, which: slice | np.ndarray) -> np.ndarray:
        scores = self.images[which] @ model["weight"] + model["bias"]
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

    def gradient(self, model: Model, which: np.ndarray) -> dict[str, np.ndarray]:
        off = np.exp(self.scores(model, which))
        off[np.arange(len(which)), self.labels[which]] -= 1
        return {"weight": self.images[which].T @ off / len(which), "bias": off.mean(0)}

    def loss(self, model: Model) -> float:
        return -float(self.scores(model, slice(TRAIN))[np.arange(TRAIN), self.labels[:TRAIN]].mean())

    def accuracy(self, model: Model) -> float:
        return 100 * float((self.scores(model, slice(TRAIN, None)).argmax(1) == self.labels[TRAIN:]).mean())


@dataclass
class Training:
    """Holds a training's accuracy in percent, its last loss, and its (bytes of all ranks so far, loss) after rank 0's synchronizations."""

    accuracy: float
    loss: float
    curve: list[tuple[int, float]]

    @property
    def to_target(self) -> float:
        """The bytes after which the loss is at the target; infinite if it does not get there."""
        return next((float(sent) for sent, loss in self.curve if loss <= TARGET), math.inf)


def train(digits: Digits, spec: str, gap: int, rate: float, seed: int, asynchronous: bool = False) -> Training:
    """Trains once. Asynchronous ranks send as often as others, each after steps of its own."""
    own_steps = [[step for step in range(1, STEPS + 1) if (step + rank * gap // RANKS) % gap == 0] for rank in range(RANKS)]
    options: dict[str, Any] = {"schedule": own_steps, "asynchronous": True} if asynchronous else {"every": gap}
    cluster, generator = LocalSGDCluster(spec, RANKS, **options), np.random.default_rng(seed)
    models: list[Any] = [{"weight": np.zeros((784, 10), np.float32), "bias": np.zeros(10, np.float32)} for _ in range(RANKS)]
    cluster.start(models)
    sent, last, curve = 0, -APART, []
    for step in range(STEPS):
        batches = RANKS * generator.integers(TRAIN // RANKS, size=(RANKS, BATCH)) + np.arange(RANKS)[:, None]
        gradients = cluster.gradients([digits.gradient(model, batch) for model, batch in zip(models, batches, strict=True)])
        now = np.float32(rate * (1 - step / STEPS))
        models = cluster.step(
            [{name: value - now * by[name] for name, value in model.items()} for model, by in zip(models, gradients, strict=True)]
        )
        sent += sum(cluster.wire_bytes)
        if cluster.wire_bytes[0] and step - last >= APART:
            last = step
            curve.append((sent, digits.loss(models[0])))
    (model, *_) = cluster.sync(models)
    return Training(digits.accuracy(model), digits.loss(model), curve)


def tuned(digits: Digits, spec: str, gap: int, rates: Sequence[float], tick: Callable[[], None]) -> float:
    """Returns the rate with which a seed that is not used otherwise reaches the target with the fewest bytes."""

    def judged(rate: float) -> tuple[float, float]:
        found = train(digits, spec, gap, rate, TUNING)
        tick()
        return found.to_target, found.loss

    return min(rates, key=judged)


def spread(values: Sequence[float]) -> str:
    missed = sum(math.isinf(value) for value in values)
    return f"not reached by {missed} of {len(values)}" if missed else f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def run(quick: bool, progress: Progress) -> Outcome:
    digits, seeds = Digits(), (0,) if quick else (0, 1, 2)
    specs = [name for name in SPECS if not quick or name != "dense"]
    gaps, rates = ((1, 8), (0.4, 0.8)) if quick else (GAPS, RATES)
    tick = in_units(progress, len(specs) * len(gaps) * (len(rates) + 2 * len(seeds)))
    rows, curves, fewer, apart, base = [], [], {}, {}, math.nan
    for name, gap in ((name, gap) for name in ("topk", *(other for other in specs if other != "topk")) for gap in gaps):
        rate, found = tuned(digits, SPECS[name], gap, rates, tick), {}
        for kind in (False, True):
            found[kind] = [train(digits, SPECS[name], gap, rate, seed, kind) for seed in seeds]
            tick(len(seeds))
        size, later = ([one.to_target / 1000 for one in found[kind]] for kind in found)
        right, late = ([one.accuracy for one in found[kind]] for kind in found)
        base = statistics.mean(size) if (name, gap) == ("topk", 1) else base
        fewer[name, gap] = base / statistics.mean(size)
        apart[name, gap] = abs(statistics.mean(right) - statistics.mean(late))
        rows.append([SPECS[name], gap, rate, spread(size), fewer[name, gap], spread(later), spread(right), spread(late)])
        if gap in (1, 8):
            shown = [(sent / 1000, loss) for sent, loss in found[False][0].curve]
            curves.append(Curve(f"{name}, H = {gap}", *map(list, zip(*shown, strict=True))))
    checks, most = [], 2 * MOST_LOST if quick else MOST_LOST
    for name in specs:
        least = min(times for (spec, gap), times in fewer.items() if spec == name and (spec, gap) != ("topk", 1))
        if name != "dense":
            checks.append(Check(f"{name}: kB of topk at H = 1 over its own, at least over all H, above 1", least, least > 1))
        largest = max(points for (spec, _), points in apart.items() if spec == name)
        text = f"{name}: points between synchronous and asynchronous accuracy, at most over all H, below {most:g}"
        checks.append(Check(text, largest, largest < most))
    head = ["spec", "H", "rate", f"kB to loss {TARGET}", "times fewer than topk, H = 1", "kB, asynchronous", "accuracy, %", "asynchronous"]
    return Outcome(head, rows, checks, curves, ("kB of all ranks", "training loss"), ("log", "log"))


EXPERIMENT = Experiment(
    "qsparse",
    "Local steps and compression together need far fewer bytes to a target than top-k at every step",
    "Basu, Data, Karakus, Diggavi 2019 (Qsparse-local-SGD)",
    "Quantization, sparsification and local steps together save significantly in the bits that reach a target, also if workers do not "
    "synchronize at the same steps.",
    "not available: the paper's body could not be read",
    f"Softmax regression on {TRAIN:,} digits of MNIST, 7,850 parameters, {RANKS} ranks of one LocalSGDCluster, batch {BATCH} each, {STEPS} "
    f"steps; accuracy on 2,000 other digits. The rate falls linearly to zero, from the one of {', '.join(map(str, RATES))} with which a "
    "seed of its own reaches the target with the fewest bytes, tuned for each row alike; asynchronous ranks have the same. They send as "
    "often as synchronous ones, but each after steps of its own. (In a first run the gaps were drawn from 1 to H: with twice the messages "
    "asynchronous ranks were up to 0.9 points better.) kB: all ranks together, until the training loss of rank 0's model after a "
    f"synchronization is at most {TARGET}. Three seeds, mean and standard deviation.",
    "each compressed row needs fewer bytes to the target than topk at every step; asynchronous accuracy is within 0.5 points of "
    "synchronous",
    4,
    run,
    in_quick_run=False,
)
