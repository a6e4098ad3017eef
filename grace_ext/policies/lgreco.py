from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..errors import IncompatiblePartsError, ParameterError
from ..parts.part import knob
from . import register
from .allocation import allocate
from .base import Policy, composition_knob
from .knobs import allowed, knob_of, with_value
from .losses import losses, of_adam

#: The knobs that it can set: for each the default of `low` and `high`.
KNOBS = {"ratio": (0.3, 100.0), "rank": (0.5, 4.0), "bits": (0.5, 2.0)}


@register("lgreco")
@dataclass(frozen=True)
class LGreCo(Policy):
    """Chooses how much each layer sends, so that all layers together send the least without more error than a uniform choice.

        minimize  sum_l bytes(l, c_l)   subject to   sum_l err(l, c_l) <= alpha sum_l err(l, base)

    over c_l in a grid of at most `choices` values of the base's ratio, rank or bits (the first of these that its compressor has), from
    `low` to `high` times the base's value (which is among them), at least one element, rank 1 or 2 bits. err is the 2-norm of what
    compression loses of the sum of a rank's last `window` gradients, averaged over the ranks. Every `every` steps each rank measures
    its errors, and one small gather (4 bytes per tensor and choice) brings all errors to every rank. Each rank then solves the same
    problem exactly, by dynamic programming over errors in 1/10,000 of the budget, rounded up, so all use the same choices from the next
    step on. Residuals are kept, and so are the columns of powersgd's Q that old and new rank share; new ones come from the shared seed.
    Before the first solution, and if no choice keeps the budget (which is logged), every layer uses `base`. Aggregates would need no
    gather, but contain only what was sent, so they would hide the errors that are to be measured.
    Errors are computed from sorted magnitudes for top-k, from singular values for low rank, and by compressing for anything else.
    Tensors that are sent dense have none. Inside a policy that switches by what it learns (accordion), only the tensors that will go
    through this one share the budget; the others begin at `base` when they come back.
    measure='gradient' takes the gradients before error feedback. 'compensated' takes what the memory makes of them, gradient plus
    residual, which is what is compressed at these steps: what a layer has not sent yet then counts, once per step of the window. It
    needs a memory with error feedback, and no 'hierarchical'.
    State: `setting`, float32[1], the number of the choice, and `sum`, float[d] within a window, else empty.
    A lower `low` saves more bytes at the same error of one step; what large layers do not send then waits longer in their residuals.
    The 2-norm is the paper's error, and suits SGD. With error='adam', err is sqrt(d) (||x|| - <x, C(x)> / ||C(x)||), where x is that
    sum and C(x) what is sent of it: the descent that is lost, because Adam's steps are as long for small gradients as for large ones.
    Use it with Adam, AdamW and similar optimizers, where the 2-norm sends too little of layers with small gradients, which costs
    accuracy.
    alpha below 1 asks for less error, above 1 for more savings. A longer window measures less noise. Solving more often costs time.
    Source: Markov, Alimohammadi, Frantar, Alistarh 2022, whose ranks are 0.5 to 2 times the base's; the authors' code measures rank 0's
    compensated gradients, has different random columns on every rank, can choose rank 0, and leaves NaN in its tables.
    """

    varies: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    whole_model: ClassVar[bool] = True
    only_in_use: ClassVar[bool] = True
    base: Any = composition_knob("topk(ratio=0.01) + residual", "the uniform choice; its ratio, rank or bits is set for each layer")
    every: int = knob(100, "steps from one solution to the next", low=1, headline=True)
    window: int = knob(10, "number of gradients whose sum errors are measured on", low=1, headline=True)
    alpha: float = knob(1.0, "budget of errors, as a multiple of the uniform choice's errors", above=0, high=1e6)
    error: str = knob("norm", "error measure: 2-norm of what is lost, or the lost descent of an Adam step", choices=("norm", "adam"))
    measure: str = knob(
        "gradient", "what errors are measured on: gradients, or gradients plus residuals", choices=("gradient", "compensated")
    )
    low: float | None = knob(
        None, "smallest value, as a multiple of the base's; None: 0.3 for ratios, 0.5 for ranks and bits", above=0, high=1, kind=float
    )
    high: float | None = knob(
        None, "largest value, as a multiple of the base's; None: 100 for ratios, 4 for ranks, 2 for bits", low=1, high=1e6, kind=float
    )
    choices: int = knob(10, "number of values to choose from", low=2, high=256)

    def __post_init__(self):
        super().__post_init__()
        if self.window > self.every:
            raise ParameterError(
                f"lgreco: window={self.window} is more than every={self.every}, but a window must fit between two solutions; lower window "
                "or raise every"
            )
        self.leaves  # raises if the compressor has no knob to set  # noqa: B018
        memory = self.base.memory
        if self.measure == "compensated" and not memory.feeds_back:
            raise IncompatiblePartsError(
                f"lgreco: measure='compensated' adds what was not sent to the gradient, and memory {memory.name!r} adds nothing of that "
                "kind; use a memory with error feedback, such as 'residual', or measure='gradient'"
            )
        if self.measure == "compensated" and memory.whole_model:
            raise IncompatiblePartsError(
                f"lgreco: measure='compensated' needs each tensor's compensated gradient by itself, and memory {memory} clips it by the "
                "norm of the whole model; leave out clipping, or use measure='gradient'"
            )

    def check_two_level(self):
        if self.measure == "compensated":
            raise IncompatiblePartsError(
                f"{self}: with 'hierarchical' a residual belongs to the gradients of a whole node, and each rank measures its own, "
                "so they cannot be added; use measure='gradient', or a flat communicator"
            )

    def check_drifts(self):
        super().check_drifts()
        if self.error == "adam":
            raise IncompatiblePartsError(
                "lgreco: error='adam' measures what an Adam step loses that is made of the result, but LocalSGD's ranks make such steps "
                "before they send how far they moved; use error='norm'"
            )

    @cached_property
    def _knob(self) -> tuple[str, Any]:
        return knob_of(self.base, tuple(KNOBS), self.name)

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """The values that the knob may take, ascending; the base's value is among them."""
        name, base = self._knob
        ends = [base * (own or default) for own, default in zip((self.low, self.high), KNOBS[name], strict=True)]
        low, high = (allowed(self.base, name, end) for end in ends)
        grid = {float(value) for value in np.geomspace(low, max(low, high), self.choices)}
        if name != "ratio":
            grid = {allowed(self.base, name, round(value)) for value in grid}
        nearest = min(grid, key=lambda value: abs(math.log(value / base)))
        return tuple(sorted((grid - {nearest}) | {base}))

    @cached_property
    def leaves(self):
        return tuple(with_value(self.base, self._knob[0], value) for value in self.values)

    @cached_property
    def uniform(self) -> int:
        """The index of the base among the choices."""
        return self.values.index(self._knob[1])

    def choose(self, query):
        setting = query.own("setting")
        return self.leaves[self.uniform if setting is None else int(setting[0])]

    def variants(self, spec):
        return self.leaves

    def notices(self, specs):
        name, value = self._knob
        if self.uniform == 0 and self.alpha >= 1:
            why, instead = "smallest of its choices, so no layer can send less", "alpha below 1, which spends bytes on less error"
        elif self.uniform == len(self.values) - 1 and self.alpha <= 1:
            why, instead = "largest of its choices, so no layer can make up for another's error", "alpha above 1, which accepts more error"
        else:
            return []
        return [f"lgreco: {name}={value} of {self.base} is the {why}; give its base another {name}, or use {instead}"]

    def init(self, ops, spec):
        return {"setting": self._setting(ops, self.uniform), "sum": ops.zeros(0)}

    @staticmethod
    def _setting(ops, number: int):
        return ops.upload(np.array([number], np.float32))

    def inspects_compensated(self, step):
        return self.measure == "compensated" and self._place(step) >= 0

    def _place(self, step: int) -> int:
        """Returns the number of this step in its window; below 0 before the window begins."""
        return step % self.every - (self.every - self.window)

    def inspect(self, ops, grad, spec, info, state):
        place = self._place(info.step)
        if place < 0:
            return {}
        fresh = place == 0 or not len(state["sum"])  # a window begins, or a step of it was not committed
        total = ops.cast(ops.copy(grad) if fresh else state["sum"] + grad, "float32")
        return {"sum": total if ops.all_finite(total) else ops.zeros(0)}  # out of float32's range: the sum begins anew

    def due(self, query):
        return (query.step + 1) % self.every == 0

    def report(self, ops, states, found):
        rows = [self.errors(ops, spec, state["sum"]) for spec, state in states.items()]
        return np.array(rows, np.float32).reshape(-1)

    def errors(self, ops, spec, x):
        """Returns the error of each choice on x, float[d]; NaN if x is empty or not finite."""
        if not len(x) or not ops.all_finite(x):
            return [math.nan] * len(self.leaves)
        lost = losses(ops, x, spec, list(self.leaves), self._knob[0])
        return lost if self.error == "norm" else of_adam(lost, ops.host(x), unbiased=self.base.compressor.unbiased)

    def settle(self, ops, reports, states, found):
        errors = np.mean([np.asarray(report, np.float64).reshape(len(states), -1) for report in reports], axis=0)
        errors[~((errors >= 0) & (errors < np.inf))] = np.nan  # not measured on every rank
        solved = self.solve({spec: row.tolist() for spec, row in zip(states, errors, strict=True)})
        if solved is None:
            told = [f"lgreco: no choice keeps the errors within alpha={self.alpha:g} times those of {self.base}; all layers use that"]
            return [{"setting": self._setting(ops, self.uniform), "sum": ops.zeros(0)} for _ in states], told
        settings = [solved.get(spec, int(state["setting"][0])) for spec, state in states.items()]
        return [{"setting": self._setting(ops, number), "sum": ops.zeros(0)} for number in settings], []

    def solve(self, errors):
        """Returns the index of the choice for each tensor, given the errors of its choices by TensorSpec. None if nothing keeps the budget.
        Tensors that are always sent dense, or have an unknown error (NaN), are left out of the budget and of the result."""
        known = [spec for spec, row in errors.items() if self._compresses(spec) and not np.isnan(row).any()]
        table = [errors[spec] for spec in known]
        sizes = [[leaf.mean_nbytes(spec) for leaf in self.leaves] for spec in known]
        at_uniform = [math.fsum(row[self.uniform] for row in rows) for rows in (table, sizes)]
        found = allocate(table, sizes, self.alpha * at_uniform[0])
        if found is None:
            return None if self.alpha < 1 else dict.fromkeys(known, self.uniform)  # only rounding up puts `base` over its own errors
        # Rounded up, the uniform choice itself may be over its own errors on the grid.
        if self.alpha >= 1 and at_uniform[1] <= math.fsum(row[c] for row, c in zip(sizes, found, strict=True)):
            found = [self.uniform] * len(known)
        return dict(zip(known, found, strict=True))

    def _compresses(self, spec):
        return any(leaf.parts_for(spec)[0].name != "none" for leaf in self.leaves)
