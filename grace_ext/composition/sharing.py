"""Which matrices are exchanged together with the rows that other ranks of a replica hold (TensorSpec.rows).

These ranks must do the same in the same order, although each has gradients of its own and exchanges them with other replicas. So what such
a matrix goes through must follow from its name, its whole shape and the step; and it must take one round where the others take one."""

from __future__ import annotations

from ..errors import ParameterError, UnsupportedError, few
from ..parts.field import HALVES
from ..parts.tensor import TensorSpec
from .composition import Composition, Parts
from .grace import Grace

OUT = "or leave share_low_rank out: then each shard is a matrix of its own"


def check_sharing(g: Grace) -> None:
    """Raises an error if no matrix can be shared, or if parts look at the whole model, which no rank has."""
    if not any(leaf.compressor.shares_rows for leaf in g.leaves):
        raise ParameterError(f"share_low_rank=True is for powersgd and powersgd_plus, and {g} has neither: use one of them, {OUT}")
    whole = [part for leaf in g.leaves for part in (leaf.compressor, leaf.memory) if part.whole_model]
    if whole:
        raise UnsupportedError(
            f"{whole[0]} looks at all gradients of a rank at once, and matrices whose shards share Q are exchanged apart from the others: "
            f"use parts that work tensor by tensor, {OUT}"
        )


def shares_rows(g: Grace, spec: TensorSpec) -> bool:
    """Whether this matrix, of which this rank has some rows, is exchanged as a whole. Raises UnsupportedError if it would be at some steps
    only, or in a way that ranks with other rows might not choose."""
    parts = list(dict.fromkeys(g.parts_of(leaf, spec) for leaf in g.leaves_for(spec)))
    by_shard = [compressor for compressor, _, _ in parts if compressor.rounds and not compressor.shares_rows]
    if by_shard:
        raise UnsupportedError(
            f"{by_shard[0]} codes the factors of each shard by itself, so the shards of {spec.name!r} cannot share them: use powersgd or "
            f"powersgd_plus, {OUT}"
        )
    if not any(compressor.shares_rows for compressor, _, _ in parts):
        return False
    learns = [p for _, p in g.route.reached(spec, "policy") if not isinstance(p, Composition) and getattr(p, "learns", False)]
    if learns:
        raise UnsupportedError(
            f"{learns[0]} decides by gradients, and the shards of {spec.name!r} have different ones, so they might not choose alike: use a "
            f"policy that goes by name, size or step, {OUT}"
        )
    others = [str(Composition(*each)) for each in parts if not each[0].shares_rows and not _one_sum(each, spec)]
    if others:
        raise UnsupportedError(
            f"{spec.name!r} ({spec.dtype}) would go through {few(others)} at some steps and share its rows at others, which only float32 "
            f"sums ('none') can take turns with: use one of them at all steps, {OUT}"
        )
    return True


def _one_sum(parts: Parts, spec: TensorSpec) -> bool:
    """Whether an exchange is one round of the kind that shared matrices begin with."""
    compressor, memory, communicator = parts
    return compressor.name == "none" and communicator.name == "allreduce" and memory.carried(spec).dtype not in HALVES
