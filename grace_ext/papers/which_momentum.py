"""Compares momentum after the exchange (gradient compression) with momentum before compression (update compression)."""

from __future__ import annotations

from .compared import COLUMNS, compared, mean, row, tuned
from .experiment import Check, Experiment, Outcome, Progress

KEPT, RATES = (0.01, 0.001), (0.125, 0.25, 0.5, 1.0)
CHOSEN = tuned("1/8, 1/4, 1/2 and 1")


def run(quick: bool, progress: Progress) -> Outcome:
    memories = ("gradient_compression", "update_compression")
    specs = [f"topk(ratio={ratio:g}) + {memory}" for ratio in KEPT for memory in memories]
    runs = compared("mnist", specs, quick, progress, seeds=5, rates=RATES)
    checks = []
    for ratio in KEPT:
        first, second = (mean(runs[f"topk(ratio={ratio:g}) + {memory}"]) for memory in memories)
        better = first - second
        checks.append(Check(f"topk {ratio:.1%}: accuracy of gradient less that of update compression", better, better >= 0))
    return Outcome(COLUMNS, [row(of) for of in runs.values()], checks)


EXPERIMENT = Experiment(
    "which_momentum",
    "Compressing gradients is better than compressing updates",
    "Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization)",
    "For Top-k, algorithm 2 (compress the gradient, add momentum after the exchange) is better than algorithm 3 (compress the update, "
    "which contains the momentum).",
    "a curve only (figure 13): ResNet-18 on CIFAR-10",
    f"Two simulated ranks, the small CNN on MNIST's digits, Top-k of 1% and 0.1%. Five seeds. Both memories scale the steps by "
    f"1 + 1 / (1 - 0.9), so lower rates are tried: {CHOSEN[0].lower()}{CHOSEN[1:]} (Tried, "
    "too: 200 steps at 1/2 to 4 times the rate, four seeds, where update compression was equal or better, by up to 1.3 points. With two "
    "ranks each rank's momentum is close to that of the mean; the paper has 8 workers.)",
    "the mean accuracy of gradient compression is at least that of update compression, at both densities",
    6,
    run,
    in_quick_run=False,
)
