"""Compares Accordion, which changes Top-k's density in critical regimes, with a single threshold."""

from __future__ import annotations

from .compared import COLUMNS, TUNED, at_least, compared, nbytes, row
from .experiment import Check, Experiment, Outcome, Progress

HIGH, LOW = "topk(ratio=0.01) + residual", "topk(ratio=0.001) + residual"
ACCORDION = f"accordion(interval=93, high={HIGH}, low={LOW})"
THRESHOLD = "threshold(like_topk=0.001) + residual"


def run(quick: bool, progress: Progress) -> Outcome:
    runs = compared("mnist", ["none", HIGH, LOW, ACCORDION, THRESHOLD], quick, progress, seeds=5)
    policy, threshold = runs[ACCORDION], runs[THRESHOLD]
    share = nbytes(threshold) / nbytes(policy)
    checks = [
        Check("bytes of the threshold over those of Accordion", share, share < 1),
        at_least("threshold and Accordion", threshold, policy),
    ]
    return Outcome(COLUMNS, [row(of) for of in runs.values()], checks)


EXPERIMENT = Experiment(
    "accordion",
    "A threshold needs no schedule: it sends less than Accordion at the same accuracy",
    "Sahu et al. 2021 (Rethinking gradient sparsification as total error minimization); Agarwal et al. 2021 (Accordion)",
    "Accordion between two densities of Top-k is beaten by a hard threshold of 1 / (2 sqrt(k)), k of the lower density, with fewer bits "
    "(section 6, appendix C.4).",
    "tables whose numbers could not be read: three networks on CIFAR-10 and CIFAR-100, six seeds",
    "Two simulated ranks, the small CNN on MNIST's digits; Accordion decides once per epoch between Top-k of 1% and 0.1%; the threshold is "
    f"`like_topk=0.001`. Five seeds. {TUNED} (The rule knows the number of elements, not the size of gradients, so what it sends depends "
    "on the task: here 8% more than Accordion, at an accuracy that is 0.3 points higher.)",
    "the threshold sends fewer bytes than Accordion, with an accuracy at least that of Accordion less the seeds' standard deviation",
    5,
    run,
    in_quick_run=False,
)
