from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..errors import ParameterError
from ..parts.part import knob
from . import register
from .allocation import allocate
from .base import Policy, composition_knob
from .knobs import knob_of, with_value
from .losses import losses, of_adam

#: The knobs that it can set: the range of each around the base's value where none is said, and what no choice is below or above.
KNOBS = {"ratio": (0.3, 100.0, 0.0, 1.0), "rank": (0.5, 4.0, 1, 4096), "bits": (0.5, 2.0, 2, 8)}


@register("lgreco")
@dataclass(frozen=True)
class LGreCo(Policy):
    """Chooses for each layer how much is sent, so that all layers together send the least at no more error than a uniform choice.

        minimize  sum_l bytes(l, c_l)   subject to   sum_l err(l, c_l) <= alpha sum_l err(l, base)

    over c_l in a grid of `choices` values of the base's ratio, rank or bits, from `low` to `high` times its own (which is among them),
    never less than one element, rank 1 or 2 bits. err is the 2-norm of what is lost of the sum of the last `window` gradients of a rank,
    before error feedback, averaged over the ranks: every `every` steps each rank measures its errors, and one small gather (4 bytes a
    tensor and choice) brings all to every rank. Each then solves the same problem, exactly, by dynamic programming over errors in 1/10,000
    of the budget, rounded up; so all go on with the same choices at the next step. Residuals stay, and so do the columns of powersgd's Q
    that old and new rank have; new ones come from the shared seed. Before the first solution, and where no choice keeps the budget (which
    is told), all is as `base`. Aggregates would need no gather, but hold what was sent, and so hide the errors that are to be measured.
    Errors: of top-k from sorted magnitudes, of low rank from singular values, of anything else by compressing. Tensors that are sent dense
    have none.
    State: `setting`, float32[1], the number of the choice, and `sum`, float[d] within a window, else empty.
    A lower `low` saves more bytes at the same error of one step, and lets what large layers do not send wait longer in their residuals.
    The 2-norm is the paper's error, and fits SGD. With error='adam' err is sqrt(d) (||x|| - ||C(x)||), x being that sum and C(x) what is
    sent of it: the descent that is lost, as Adam's steps are as long for small gradients as for large ones. For Adam, AdamW and their
    like, where layers of small gradients, starved by the 2-norm, cost accuracy.
    alpha under 1 asks for less error, above for more savings.
    A longer window measures less noise. Re-solving more often costs time.
    Source: Markov, Alimohammadi, Frantar, Alistarh 2022, whose ranks are 0.5 to 2 times the base's; the authors' code keeps its random
    columns different on every rank, can choose rank 0, and leaves NaN in its tables.
    """

    varies: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    whole_model: ClassVar[bool] = True
    base: Any = composition_knob("topk(ratio=0.01) + residual", "the uniform choice; its ratio, rank or bits is what is set for each layer")
    every: int = knob(100, "steps from one solution to the next", low=1, headline=True)
    window: int = knob(10, "gradients that errors are measured on", low=1, headline=True)
    alpha: float = knob(1.0, "budget of errors, in those of the uniform choice", above=0, high=1e6)
    error: str = knob("norm", "what is lost: of the gradient's 2-norm, or of the descent of a step of Adam's", choices=("norm", "adam"))
    low: float | None = knob(
        None, "smallest value, in the base's; None: 0.3 for ratios, 0.5 for ranks and bits", above=0, high=1, kind=float
    )
    high: float | None = knob(
        None, "largest value, in the base's; None: 100 for ratios, 4 for ranks, 2 for bits", low=1, high=1e6, kind=float
    )
    choices: int = knob(10, "how many values there are to choose from", low=2, high=256)

    def __post_init__(self):
        super().__post_init__()
        if self.window > self.every:
            raise ParameterError(f"lgreco: window={self.window} is more than every={self.every}: a window ends at each solution")
        self.leaves  # refuses a compressor that has nothing to be set  # noqa: B018

    @cached_property
    def _knob(self) -> tuple[str, Any]:
        return knob_of(self.base, tuple(KNOBS), self.name)

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """What the knob may be set to, ascending; the base's value is among them."""
        name, base = self._knob
        low, high, least, most = KNOBS[name]
        low, high = max(base * (self.low or low), least), min(base * (self.high or high), most)
        if name == "bits":
            return tuple(sorted({*range(math.ceil(low), math.floor(high) + 1), base}))
        grid = {float(value) for value in np.geomspace(low, max(low, high), self.choices)}
        if name == "rank":
            grid = {max(1, round(value)) for value in grid}  # type: ignore[misc]
        nearest = min(grid, key=lambda value: abs(math.log(value / base)))
        return tuple(sorted((grid - {nearest}) | {base}))

    @cached_property
    def leaves(self):
        return tuple(with_value(self.base, self._knob[0], value) for value in self.values)

    @cached_property
    def uniform(self) -> int:
        """The number of the base among the choices."""
        return self.values.index(self._knob[1])

    def choose(self, query):
        setting = query.own("setting")
        return self.leaves[self.uniform if setting is None else int(setting[0])]

    def variants(self, spec):
        return self.leaves

    def init(self, ops, spec):
        return {"setting": self._setting(ops, self.uniform), "sum": ops.zeros(0)}

    @staticmethod
    def _setting(ops, number: int):
        return ops.upload(np.array([number], np.float32))

    def measure(self, ops, grad, spec, info, state):
        place = info.step % self.every - (self.every - self.window)
        if place < 0:
            return {}
        fresh = place == 0 or not len(state["sum"])  # a window begins, or a step of it was not committed
        return {"sum": ops.cast(ops.copy(grad) if fresh else state["sum"] + grad, "float32")}

    def due(self, query):
        return (query.step + 1) % self.every == 0

    def report(self, ops, states, found):
        rows = [self.errors(ops, spec, state["sum"]) for spec, state in states.items()]
        return np.array(rows, np.float32).reshape(-1)

    def errors(self, ops, spec, x):
        """The error of each choice on x: float[d]; NaN where x is empty or not finite."""
        if not len(x) or not ops.all_finite(x):
            return [math.nan] * len(self.leaves)
        lost = losses(ops, x, spec, list(self.leaves), self._knob[0])
        return lost if self.error == "norm" else of_adam(lost, ops.host(x))

    def settle(self, ops, reports, states, found):
        errors = np.mean([np.asarray(report, np.float64).reshape(len(states), -1) for report in reports], axis=0)
        errors[~((errors >= 0) & (errors < np.inf))] = np.nan  # what no rank measures
        solved = self.solve({spec: row.tolist() for spec, row in zip(states, errors, strict=True)})
        if solved is None:
            told = [f"lgreco: no choice keeps the errors within alpha={self.alpha:g} of those of {self.base}; all layers are sent as that"]
            return [{"setting": self._setting(ops, self.uniform), "sum": ops.zeros(0)} for _ in states], told
        settings = [solved.get(spec, int(state["setting"][0])) for spec, state in states.items()]
        return [{"setting": self._setting(ops, number), "sum": ops.zeros(0)} for number in settings], []

    def solve(self, errors):
        """The number of the choice for each tensor, given the error of every choice by TensorSpec. None where nothing keeps the budget.
        Tensors that are always sent dense, or have an error that is not known (NaN), are left out, of the budget and of the result."""
        known = [spec for spec, row in errors.items() if self._compresses(spec) and not np.isnan(row).any()]
        table = [errors[spec] for spec in known]
        sizes = [[leaf.mean_nbytes(spec) for leaf in self.leaves] for spec in known]
        at_uniform = [math.fsum(row[self.uniform] for row in rows) for rows in (table, sizes)]
        found = allocate(table, sizes, self.alpha * at_uniform[0])
        if found is None:
            return None if self.alpha < 1 else dict.fromkeys(known, self.uniform)  # only rounding up puts that over its own errors
        # Rounded up, the uniform choice itself may be over its own errors on the grid.
        if self.alpha >= 1 and at_uniform[1] <= math.fsum(row[c] for row, c in zip(sizes, found, strict=True)):
            found = [self.uniform] * len(known)
        return dict(zip(known, found, strict=True))

    def _compresses(self, spec):
        return any(leaf.parts_for(spec)[0].name != "none" for leaf in self.leaves)
