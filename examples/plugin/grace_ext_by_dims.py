"""A policy in a package of its own: `grace_ext.grace("by_dims(matrices=powersgd(rank=4) + powersgd)")`."""

from dataclasses import dataclass
from typing import Any

from grace_ext.policies.base import Policy, route_knob


@dataclass(frozen=True)
class ByDims(Policy):
    """Chooses by the number of dimensions: one spec for matrices and kernels, another one for vectors and scalars."""

    matrices: Any = route_knob("topk + residual", "spec of tensors with two dimensions or more")
    others: Any = route_knob("none", "spec of all other tensors")

    def choose(self, query):
        which = self.which(query.spec)
        return getattr(self, which).choose(query.under(which))

    def branches(self, spec):
        which = self.which(spec)
        return {which: getattr(self, which)}

    @property
    def leaves(self):
        return (*self.matrices.leaves, *self.others.leaves)

    def which(self, spec):
        return "matrices" if len(spec.shape) > 1 else "others"
