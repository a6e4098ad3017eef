"""Whether an example was trained on can be inferred from its loss, compressed gradients or not; noise on each example hides it."""

from __future__ import annotations

import statistics

from .experiment import Check, Experiment, Outcome, Progress, in_units, with_torch

MOST = 2.0  # points of the AUC
SPECS = (
    "topk(ratio=0.1) + residual",
    "topk(ratio=0.01) + residual",
    "powersgd(rank=4) + residual",
    "powersgd(rank=1) + residual",
    "lqsgd(rank=1) + residual",
)


def run(quick: bool, progress: Progress) -> Outcome:
    with_torch()
    from ..attacks.membership import PRIVATE, infer
    from ..attacks.victim import victim

    specs, seeds = SPECS[1:4:2] if quick else SPECS, (0,) if quick else (0, 1, 2)
    tick, rows, auc = in_units(progress, (len(specs) + 2) * len(seeds)), [], {}
    for spec in ("none", *specs, PRIVATE):
        found = [infer(spec, lambda seed: victim("mlp", seed), tick, seeds=(seed,)) for seed in seeds]
        values = [100 * one.auc for one in found]
        auc[spec] = statistics.mean(values)
        members, others = (100 * statistics.mean(column) for column in zip(*((one.train, one.test) for one in found), strict=True))
        rows.append([spec, f"{auc[spec]:.1f} ± {statistics.pstdev(values):.1f}", f"{members:.1f}%", f"{others:.1f}%"])
    checks = [
        Check(f"{spec}: its AUC is within {MOST:g} points of dense", auc[spec] - auc["none"], abs(auc[spec] - auc["none"]) < MOST)
        for spec in specs
    ]
    lower = auc["none"] - auc[PRIVATE]
    checks.append(Check("noise on each example: points of the AUC below dense, above 0", lower, lower > 0))
    return Outcome(["trained with", "AUC (50 is a guess)", "accuracy on members", "on others"], rows, checks)


EXPERIMENT = Experiment(
    "membership",
    "Compression hardly changes membership inference; noise does",
    "Li, Wu, Chadli, Mammar, Bouvry 2024 (Trustworthiness of stochastic gradient descent in distributed learning)",
    "Whether gradients are compressed hardly changes how well membership inference works.",
    "not available: the paper's body could not be read",
    "An MLP 784-128-10 learns 500 digits of MNIST by heart (60 epochs, batch 50, rate 0.2 for all rows, one rank), and calls an example a "
    "member if its loss is low (Yeom et al. 2018); 500 other digits are not members. Three seeds, mean and standard deviation of the AUC. "
    "The last row clips each example to 1 and adds noise of deviation 1.",
    "the AUC of every compressed training is within 2 points of the dense one's, and that with noise is lower",
    2,
    run,
)
