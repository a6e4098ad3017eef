from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import ParameterError
from ..parts.field import FLOAT32_MAX
from ..parts.part import knob
from ..parts.tensor import TensorSpec
from . import register
from .base import Policy, route_knob

SAMPLE = TensorSpec("", (512, 512))


@register("accordion")
@dataclass(frozen=True)
class Accordion(Policy):
    """Sends more of a tensor while its gradient changes fast (a critical regime), and less otherwise.

    Every `interval` steps, for each tensor: D = ||sum of the aggregates of these steps||_2. The next `interval` steps are critical if
    |D_before - D| / D_before >= `threshold`, where D_before is the D of the last interval; or if D_before is zero; or if the learning rate
    has fallen by that fraction or more since the last interval (if an optimizer is bound). Critical steps, and the first interval, go
    through `high`, all others through `low`. These may differ in ratio, rank or bits, or be any two specs. The residual is kept when the
    spec changes, and so is powersgd's subspace: columns that both specs have are kept, new ones come from the shared seed.
    A shorter interval sees more noise and reacts sooner; a higher threshold sends less. D is computed from aggregates, which are the same
    on all ranks.
    State: `sum`, float[d], and `regime`, float32[3]: D_before, whether critical, learning rate (0: unknown).
    Source: Agarwal et al. 2021, where the interval is 10 epochs and any fall of the rate counts; here a schedule that falls a little at
    every step is not critical throughout. In the authors' code the threshold is fixed, and norms come from rank 0.
    """

    varies: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    high: Any = route_knob("topk(ratio=0.01) + residual", "spec for critical steps: sends more")
    low: Any = route_knob("topk(ratio=0.001) + residual", "spec for all other steps: sends less")
    threshold: float = knob(0.5, "relative change of the norm that counts as critical", above=0, high=1e6, headline=True)
    interval: int = knob(100, "steps from one decision to the next", low=1, headline=True)

    def __post_init__(self):
        super().__post_init__()
        high = max(leaf.mean_nbytes(SAMPLE) for leaf in self.high.leaves)
        # A policy's leaves send more or less: only what surely sends less than `low` is an error.
        low = min((leaf.mean_nbytes(SAMPLE) for leaf in self.low.leaves if _predictable(leaf)), default=0.0)
        if high < low:
            raise ParameterError(
                f"accordion: high must send at least as much as low, but for a 512 x 512 gradient {self.high} is expected to send "
                f"{high:,.0f} bytes and {self.low} {low:,.0f}. Swap them"
            )

    @staticmethod
    def _knob(query) -> str:
        regime = query.own("regime")
        return "high" if regime is None or float(regime[1]) else "low"

    def choose(self, query):
        which = self._knob(query)
        return getattr(self, which).choose(query.under(which))

    def branches(self, spec):
        return {"high": self.high, "low": self.low}

    def open_branches(self, query):
        which = self._knob(query)
        return {which: getattr(self, which)}

    @property
    def leaves(self):
        return (*self.high.leaves, *self.low.leaves)

    def init(self, ops, spec):
        return {"sum": ops.zeros(spec.size), "regime": ops.upload(np.array([0, 1, 0], np.float32))}

    def observe(self, ops, aggregate, spec, info, state):
        total = ops.cast(state["sum"] + aggregate, "float32")
        if not ops.all_finite(total):  # out of float32's range
            total = state["sum"]
        if (info.step + 1) % self.interval:
            return {"sum": total}
        before, _, rate = (float(v) for v in ops.host(state["regime"]))
        # Rounded to float32, so that the decision does not depend on the order in which a library sums.
        now = float(np.float32(min(float(ops.block_norms(total, spec.size, 2)[0]), FLOAT32_MAX)))
        lr = float(np.float32(info.lr or 0))
        changed = not before or abs(before - now) >= self.threshold * before
        fallen = 0 < rate and lr <= rate * (1 - self.threshold)
        return {"sum": ops.zeros(spec.size), "regime": ops.upload(np.array([now, changed or fallen, lr], np.float32))}


def _predictable(leaf) -> bool:
    """Whether it is known how many bytes to expect. How many a fixed threshold or adaptive bits send, only the gradients decide."""
    compressor = leaf.compressor
    return compressor.fixed_size or compressor.mean_nbytes(SAMPLE) < compressor.nbytes(SAMPLE)
