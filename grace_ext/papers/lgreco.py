"""Compares L-GreCo with the uniform choice over three families of compressors, and within Accordion with Accordion alone."""

from __future__ import annotations

from .compared import COLUMNS, TUNED, at_least, compared, nbytes, row
from .experiment import Check, Experiment, Outcome, Progress

#: The measures of each family. Quantizers without bias have no residual that could be measured, too: error feedback of them explodes.
MEASURES = {
    "topk(ratio=0.01) + residual": ("gradient", "compensated"),
    "powersgd(rank=4) + residual": ("gradient", "compensated"),
    "qsgd(bits=4) + none": ("gradient",),
}
SEEDS = 6
SPARSE, SPARSER = "topk(ratio=0.01) + residual", "topk(ratio=0.001) + residual"
ACCORDION = f"accordion(interval=93, high={SPARSE}, low={SPARSER})"
MIXED = f"accordion(interval=93, high=lgreco(every=31, base={SPARSE}), low=lgreco(every=31, base={SPARSER}))"


def less(what: str, mine, other) -> Check:
    share = nbytes(mine) / nbytes(other)
    return Check(f"{what}: bytes over those of the uniform choice", share, share < 1)


def run(quick: bool, progress: Progress) -> Outcome:
    specs = {
        (base, measure): f"lgreco(every=31, measure={measure}, base={base})" for base, measures in MEASURES.items() for measure in measures
    }
    runs = compared("mnist", ["none", *MEASURES, *specs.values()], quick, progress, seeds=SEEDS)
    checks = []
    for (base, measure), spec in specs.items():
        checks.append(less(f"{base}, {measure}", runs[spec], runs[base]))
        checks.append(at_least(f"{base}, {measure}", runs[spec], runs[base]))
    return Outcome(COLUMNS, [row(of) for of in runs.values()], checks)


def run_mixed(quick: bool, progress: Progress) -> Outcome:
    runs = compared("mnist", [SPARSE, SPARSER, ACCORDION, MIXED], quick, progress, seeds=SEEDS)
    checks = [
        less("L-GreCo in both regimes of Accordion", runs[MIXED], runs[ACCORDION]),
        at_least("L-GreCo in Accordion, and Accordion", runs[MIXED], runs[ACCORDION]),
    ]
    return Outcome(COLUMNS, [row(of) for of in runs.values()], checks)


PAPER = "Markov, Alimohammadi, Frantar, Alistarh 2022 (L-GreCo)"
FAMILIES = Experiment(
    "lgreco",
    "A choice per layer sends less than a uniform one at the same accuracy",
    PAPER,
    "Choosing rank, density or bits per layer improves compression up to 5 times, without loss of accuracy.",
    "up to 5 times the compression, and 2.5 times the speed, on ResNets and Transformers",
    "Two simulated ranks, the small CNN on MNIST's digits, solved three times per epoch, errors measured on the ranks' gradients (the "
    f"default) or on gradient and residual (as the authors' hook does). {SEEDS} seeds. {TUNED}",
    "fewer bytes than the uniform choice, with an accuracy at least the uniform one less the seeds' standard deviation, pooled over both, "
    "for each family and measure",
    20,
    run,
    in_quick_run=False,
)
WITH_ACCORDION = Experiment(
    "lgreco_accordion",
    "L-GreCo within Accordion's regimes sends less than Accordion alone",
    PAPER,
    "L-GreCo can be combined with Accordion, and improves its compression by half again.",
    "+50% compression",
    f"Two simulated ranks, the small CNN on MNIST's digits; Accordion decides once per epoch between Top-k of 1% and 0.1%, uniform or by "
    f"L-GreCo. {SEEDS} seeds. {TUNED}",
    "fewer bytes than Accordion alone, with an accuracy at least that of Accordion less the seeds' standard deviation",
    6,
    run_mixed,
    in_quick_run=False,
)
