"""These policies choose by the number of the step alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ..parts.part import knob
from . import register
from .base import Policy, composition_knob, route_knob
from .knobs import knob_of, with_value


@register("warmup")
@dataclass(frozen=True)
class Warmup(Policy):
    """Sends everything dense for the first steps, and then switches to another spec.

    Steps 0 to `steps` - 1 are dense and use the memory of `then`. So a memory that is the training's momentum has it from the start, and
    the residual is empty when compression begins. The first gradients are large and change fast, and low-rank subspaces and thresholds are
    estimated from them. Too few dense steps make a slow start; each costs the bytes of a dense step. State: none of its own.
    Source: PyTorch's PowerSGD hook starts after 1,000 steps, epfml's after 100; Lin et al. 2018 warm up by the ratio (`ratio_warmup`).
    """

    varies: ClassVar[bool] = True
    steps: int = knob(100, "number of dense steps at the start", low=0, headline=True)
    then: Any = route_knob("topk(ratio=0.01) + residual", "spec for the steps after the dense ones")

    def choose(self, query):
        leaf = self.then.choose(query.under("then"))
        return leaf.dense_step if query.step < self.steps else leaf

    def branches(self, spec):
        return {"then": self.then}

    def variants(self, spec):
        return [leaf.dense_step for _, leaf in self.then.reached(spec, "") if not isinstance(leaf, Policy)]

    @property
    def leaves(self):
        leaves = self.then.leaves
        return tuple(dict.fromkeys((*leaves, *(leaf.dense_step for leaf in leaves))))


@register("ratio_warmup")
@dataclass(frozen=True)
class RatioWarmup(Policy):
    """Lowers the ratio in stages, by a constant factor, from a large fraction to the target ratio.

    With target ratio rho, W = `stages` and a = rho^(1 / (W + 1)): stage t = 0, 1, ... W - 1, each of steps / W steps, keeps a^(t + 1), at
    least rho; after `steps` steps it keeps rho itself. rho = 0.001 with 5 stages: 0.316, 0.1, 0.0316, 0.01, 0.00316, then 0.001; with 4
    stages 0.251, 0.063, 0.016, 0.004. All other knobs of `then` stay, and so do residual and momentum. `then` needs a compressor with a
    `ratio`. More steps or fewer stages cost bytes; too few steps leave the first, large gradients in the residual. State: none of its own.
    Source: Lin et al. 2018 (DGC), whose stages are epochs, by the formula of the authors' code; warming up the learning rate is left to the
    optimizer.
    """

    varies: ClassVar[bool] = True
    steps: int = knob(500, "steps of the warm-up, all stages together", low=1, headline=True)
    stages: int = knob(5, "number of ratios before the last one", low=1, high=100)
    then: Any = composition_knob("dgc(ratio=0.001) + dgc", "spec for the steps after the warm-up; its ratio is the target")

    def __post_init__(self):
        super().__post_init__()
        self.leaves  # raises if the compressor has no ratio  # noqa: B018

    @cached_property
    def leaves(self):
        target = knob_of(self.then, ("ratio",), self.name)[1]
        factor = target ** (1 / (self.stages + 1))
        return (*(with_value(self.then, "ratio", max(factor ** (t + 1), target)) for t in range(self.stages)), self.then)

    def choose(self, query):
        return self.leaves[min(query.step * self.stages // self.steps, self.stages)]

    def variants(self, spec):
        return self.leaves


@register("every")
@dataclass(frozen=True)
class Every(Policy):
    """Sends every n-th step through one spec, and all other steps through another.

    Steps 0, n, 2 n, ... go through `then`, all others through `otherwise`. By default every 100th step is exact: `then` is 'none', which
    keeps the memory of `otherwise` and sends what that held back, so that errors do not outlive n steps. This costs 1/n of dense
    training's bytes. State: none of its own; state that one spec does not use is kept for the other.
    Source: periodic dense steps, as in PowerSGD+ and in local SGD's averaging.
    """

    varies: ClassVar[bool] = True
    n: int = knob(100, "`then` is used every n steps", low=1, headline=True)
    then: Any = route_knob("none", "spec for every n-th step")
    otherwise: Any = route_knob("topk(ratio=0.01) + residual", "spec for all other steps")

    def choose(self, query):
        which = "otherwise" if query.step % self.n else "then"
        return getattr(self, which).choose(query.under(which))

    def branches(self, spec):
        return {"then": self.then, "otherwise": self.otherwise}

    @property
    def leaves(self):
        return (*self.then.leaves, *self.otherwise.leaves)
