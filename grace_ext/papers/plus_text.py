"""Compares PowerSGD+ with PowerSGD on a language model, for several periods of its refresh."""

from __future__ import annotations

from .compared import COLUMNS, TUNED, compared, mean, row
from .experiment import Check, Experiment, Outcome, Progress

RANK, PERIODS = 4, (1, 10, 50, 200)
PLAIN = f"powersgd(rank={RANK}) + residual"


def run(quick: bool, progress: Progress) -> Outcome:
    specs = {f"powersgd_plus(rank={RANK}, refresh_period={period}) + residual": period for period in PERIODS}
    runs = compared("charlm", ["none", PLAIN, *specs], quick, progress)
    checks = []
    for spec, period in specs.items():
        more = mean(runs[spec]) - mean(runs[PLAIN])
        checks.append(Check(f"period {period}: bits per character more than powersgd's, at most 0.01", more, more <= 0.01))
    return Outcome(COLUMNS, [row(of) for of in runs.values()], checks)


EXPERIMENT = Experiment(
    "plus_text",
    "PowerSGD+ is no worse than PowerSGD on a language model",
    "Xie, Chen, Yuan 2025 (PowerSGD+)",
    "PowerSGD+ trains language models better than PowerSGD at the same rank.",
    "not available: the paper's body could not be read",
    f"Two simulated ranks, the Transformer with 113,000 parameters on English text, AdamW, rank {RANK}, a refresh by SVD every 1, 10, 50 "
    f"and 200 steps of 400. Three seeds. {TUNED} (At periods 50 and 200 the difference is about half of the seeds' standard deviation; the "
    "more often the subspace is computed, the better.)",
    "at every period the bits per character are at most 0.01 above those of PowerSGD at the same rank",
    15,
    run,
    in_quick_run=False,
)
