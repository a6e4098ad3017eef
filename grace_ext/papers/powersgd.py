"""Repeats PowerSGD's ablations: ranks, warm start, error feedback, the unbiased variant, and other compressors of about its volume."""

from __future__ import annotations

from .compared import COLUMNS, compared, mean, row, tuned
from .experiment import Check, Experiment, Outcome, Progress

RATES = (0.05, 0.25, 0.5, 1.0, 2.0)
DENSE, RANK_2, UNFED = "none", "powersgd(rank=2) + residual", "powersgd(rank=2) + none"
#: With what each is of the paper. Ratios are such that they send about as much as rank 2.
SPECS = {
    DENSE: "SGD",
    "powersgd(rank=1) + residual": "rank 1",
    RANK_2: "rank 2",
    "powersgd(rank=4) + residual": "rank 4",
    "powersgd(rank=2, warm_start=False) + residual": "rank 2, no warm start",
    "powersgd_plus(rank=2, refresh_period=1) + residual": "rank 2, the best approximation at every step",
    UNFED: "rank 2, no error feedback",
    "random_projection(rank=2) + none": "rank 2, unbiased",
    "randblock(ratio=0.057) + residual": "random block",
    "randomk(ratio=0.057) + residual": "random k",
    "topk(ratio=0.04) + residual": "top k",
    "efsignsgd + residual": "sign and norm",
    "signum(momentum=0.9) + none": "Signum",
    "atomo(rank=2) + none": "Spectral ATOMO",
}


def run(quick: bool, progress: Progress) -> Outcome:
    runs = compared("mnist", list(SPECS), quick, progress, rates=RATES)
    lost, unfed = mean(runs[DENSE]) - mean(runs[RANK_2]), mean(runs[RANK_2]) - mean(runs[UNFED])
    checks = [
        Check("accuracy of SGD less that of rank 2, in points, is at most 0.5", lost, lost <= 0.5),
        Check("accuracy of rank 2 less that of rank 2 without error feedback is at least 2 points", unfed, unfed >= 2),
    ]
    return Outcome(["of the paper", *COLUMNS], [[SPECS[spec], *row(of)] for spec, of in runs.items()], checks)


EXPERIMENT = Experiment(
    "powersgd",
    "Rank 2 is as good as SGD, and needs error feedback",
    "Vogels, Karimireddy, Jaggi 2019 (PowerSGD)",
    "Rank 2 is as good as SGD, and needs error feedback; warm start makes one step of power iteration enough.",
    "not available: the paper's tables could not be read",
    f"Two simulated ranks, the small CNN on MNIST's digits. Three seeds. {tuned('0.05, 0.25, 0.5, 1 and 2')} "
    "randblock, randomk and topk send about as much as rank 2. (The matrices here are small, at most 64 x 400, so that rank 2 with a warm "
    "start leaves little behind: on this network error feedback is worth less than a point.)",
    "rank 2 loses at most 0.5 points against SGD; rank 2 without error feedback is at least 2 points worse than with it",
    8,
    run,
    in_quick_run=False,
)
