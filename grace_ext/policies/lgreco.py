from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..errors import ParameterError
from ..parts import knob
from . import register
from .allocation import allocate
from .base import Policy, composition_knob
from .knobs import knob_of, with_value
from .losses import losses

#: The knobs that it can set, and the range of each around the base's value where none is said.
KNOBS = {"ratio": (0.1, 100.0), "rank": (0.25, 4.0), "bits": (0.5, 2.0)}


@register("lgreco")
@dataclass(frozen=True)
class LGreCo(Policy):
    """Chooses for each layer how much is sent, so that all layers together send the least at no more error than a uniform choice.

        minimize  sum_l bytes(l, c_l)   subject to   sum_l err(l, c_l) <= alpha sum_l err(l, base)

    over c_l in a grid of `choices` values of the base's ratio, rank or bits, from `low` to `high` times its own (which is among them), never
    less than one element, rank 1 or 2 bits. err is the 2-norm of what is lost of the sum of the last `window` aggregates, which all ranks
    know alike; with error feedback that is what was sent of the residuals, too. Every `every` steps the problem is solved exactly by
    dynamic programming over errors in 1/10,000 of the budget, rounded up, on rank 0, whose choices reach the others in one small gather;
    they hold from the next step on, on all ranks. Residuals stay, and so do the columns of powersgd's Q that old and new rank have;
    new ones come from the shared seed. Before the first solution, and where no choice keeps the budget (which is told), all is as `base`.
    Errors: of top-k from sorted magnitudes, of low rank from singular values, of anything else by compressing. Tensors that are sent dense
    have none.
    State: `setting`, float32[1], the number of the choice, and `sum`, float[d] within a window, else empty.
    alpha under 1 asks for less error, above for more savings; a longer window measures less noise. Re-solving more often costs time.
    Source: Markov, Alimohammadi, Frantar, Alistarh 2022, whose ranks are 0.5 to 2 times the base's; the authors' code keeps its random
    columns different on every rank, can choose rank 0, and leaves NaN in its tables.
    """

    varies: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    whole_model: ClassVar[bool] = True
    base: Any = composition_knob("topk(ratio=0.01) + residual", "the uniform choice; its ratio, rank or bits is what is set for each layer")
    every: int = knob(100, "steps from one solution to the next", low=1, headline=True)
    window: int = knob(10, "aggregates that errors are measured on", low=1, headline=True)
    alpha: float = knob(1.0, "budget of errors, in those of the uniform choice", above=0, high=1e6)
    low: float | None = knob(None, "smallest value, in the base's; None: 0.1 for ratios, 0.25 for ranks, 0.5 for bits", above=0, high=1, kind=float)
    high: float | None = knob(None, "largest value, in the base's; None: 100 for ratios, 4 for ranks, 2 for bits", low=1, high=1e6, kind=float)
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
        low, high = KNOBS[name]
        low, high = base * (self.low or low), base * (self.high or high)
        low, high = (low, min(high, 1.0)) if name == "ratio" else (max(low, 1 if name == "rank" else 2), high if name == "rank" else min(high, 8))
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

    def choose(self, asked):
        setting = asked.own("setting")
        return self.leaves[self.uniform if setting is None else int(setting[0])]

    def variants(self, spec):
        return self.leaves

    def init(self, ops, spec):
        return {"setting": self._setting(ops, self.uniform), "sum": ops.zeros(0)}

    @staticmethod
    def _setting(ops, number: int):
        return ops.upload(np.array([number], np.float32))

    def observe(self, ops, aggregate, spec, info, state):
        place = info.step % self.every - (self.every - self.window)
        if place < 0:
            return {}
        fresh = place == 0 or not len(state["sum"])  # a window begins, or a step of it was not committed
        return {"sum": ops.cast(ops.copy(aggregate) if fresh else state["sum"] + aggregate, "float32")}

    def due(self, step):
        return (step + 1) % self.every == 0

    def settle(self, ops, states, found=None):
        solved = self.solve(ops, {spec: state["sum"] for spec, state in states.items() if len(state["sum"])})
        if solved is None:
            return b"", [f"lgreco: no choice keeps the errors within alpha={self.alpha:g} of those of {self.base}; all layers are sent as that"]
        settings = [solved.get(spec, int(state["setting"][0])) for spec, state in states.items()]
        return np.array(settings, np.uint8).tobytes(), []

    def settled(self, ops, decision, states):
        settings = np.frombuffer(decision, np.uint8).tolist() or [self.uniform] * len(states)
        return [{"setting": self._setting(ops, number), "sum": ops.zeros(0)} for number in settings]

    def tables(self, ops, gradients):
        """(errors, bytes a rank) of each choice, by tensor: {spec: (list, list)}, given float[d] arrays by spec. A tensor for which all choices
        are sent dense is not in it."""
        made = {}
        for spec, x in gradients.items():
            if any(leaf.parts_for(spec)[0].name != "none" for leaf in self.leaves):
                finite = ops.all_finite(x)
                errors = losses(ops, x, spec, list(self.leaves), self._knob[0]) if finite else [math.nan] * len(self.leaves)
                made[spec] = errors, [leaf.nbytes(spec) for leaf in self.leaves]
        return made

    def solve(self, ops, gradients):
        """The number of the choice for each tensor, given gradients by TensorSpec: float[d] arrays. None where nothing keeps the budget."""
        tables = self.tables(ops, gradients)
        if not tables:
            return {}
        errors, sizes = ([table[part] for table in tables.values()] for part in (0, 1))
        at_uniform = [math.fsum(row[self.uniform] for row in rows) for rows in (errors, sizes)]
        found = allocate(errors, sizes, self.alpha * at_uniform[0])
        if found is None:
            return None
        # Rounded up, the uniform choice itself may be over its own errors on the grid.
        if self.alpha >= 1 and at_uniform[1] <= math.fsum(row[c] for row, c in zip(sizes, found, strict=True)):
            found = [self.uniform] * len(tables)
        return dict(zip(tables, found, strict=True))
