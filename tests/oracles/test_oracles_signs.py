"""Sign methods leave rows without a gradient (of an embedding) as they are, if their `block` divides the row."""

from __future__ import annotations

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import PayloadError
from grace_ext.parts.tensor import StepInfo, TensorSpec
from grace_ext.testing import inputs
from grace_ext.testing.worlds import NUMPY, states

from . import oracles
from .test_oracles import RUNS, compare, composed
from .test_oracles_quantizers import onebit, per_block

#: An embedding: rows 0 to 3 never have a gradient, rows 4 to 7 on rank 0 only, 8 to 11 at every second step, the others always.
SHAPE = (24, 16)
BLOCK = 8
RANKS = 2


def embedding(size: int, step: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    gradients = inputs.grid(size, step, shape)
    for rank, gradient in enumerate(gradients):
        gradient[:4] = 0
        gradient[4:8] *= rank == 0
        gradient[8:12] *= step % 2
    return gradients


@RUNS
@pytest.mark.parametrize(
    ("communicator", "block"),
    [("allgather", 5), ("allreduce", 5), *((c, block) for c in ("allgather", "allreduce", "reduce_scatter") for block in (1, BLOCK))],
)
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("ties", ["zero", "plus"])
def test_votes_of_blocks(world, block, ties, memory, communicator, size):
    """A block of zeros casts no vote: the other ranks decide, and if there are none the result is 0, whatever `ties` says. Blocks of 5 do
    not divide the rows, and the last one is shorter. (Shards begin at multiples of BLOCK here, so their blocks are those of the tensor.)"""
    g = composed(f"signsgd(block={block}, ties={ties!r}) @ {communicator}", memory)
    compare(world, g, oracles.signsgd(ties, block), size, SHAPE, relative=0.0, exact=True, gradients=embedding)


def test_a_rank_without_the_row_has_no_say(world=NUMPY):
    """Without blocks the zeros of two ranks outvote the gradient of the third; with blocks the third decides alone."""
    gradients = [{"w": np.zeros(SHAPE, np.float32)} for _ in range(3)]
    for gradient in gradients:
        gradient["w"][0] = 1  # so that every rank votes
    gradients[0]["w"][4] = -1
    whole, rows = (world.step(world.cluster(grace_ext.grace(f"signsgd{knobs} + none"), 3), gradients)["w"] for knobs in ("", "(block=16)"))
    assert (whole[4] == 1).all() and (whole[5:] == 1).all()
    assert (rows[4] == -1).all() and not rows[5:].any() and (rows[0] == 1).all()


@RUNS
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_signum_votes_from_the_first_gradient_on(world, momentum, size):
    """The running mean decides, so a row that had a gradient once goes on voting."""
    g = composed(f"signum(momentum={momentum}, block={BLOCK})", "none")
    cluster, oracle, means = world.cluster(g, size), oracles.signsgd("zero", BLOCK), [np.zeros(SHAPE)] * size
    for step in range(4):
        given = embedding(size, step, SHAPE)
        means = [momentum * m + (1 - momentum) * x for m, x in zip(means, given, strict=True)]
        assert np.array_equal(world.step(cluster, [{"w": x} for x in given])["w"], oracle(means)[0]), step


@RUNS
@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize(
    ("text", "oracle"),
    [(f"efsignsgd(block={BLOCK})", oracles.efsignsgd(BLOCK)), (f"onebit(block={BLOCK})", oracles.averaged(per_block(BLOCK, onebit)))],
    ids=["efsignsgd", "onebit"],
)
def test_scaled_signs_of_blocks(world, text, oracle, memory, size):
    """A rank without a row sends zeros for it, so the mean is what the others sent, divided by all."""
    compare(world, composed(text, memory), oracle, size, SHAPE, relative=3e-6, gradients=embedding)


VOTES = [f"{vote} @ {by}" for vote in ("signsgd(block={})", "signum(block={})") for by in ("allgather", "allreduce", "reduce_scatter")]
SCALED = [f"{scaled} @ {by}" for scaled in ("efsignsgd(block={})", "onebit(block={})") for by in ("allgather", "reduce_scatter")]


@pytest.mark.parametrize("memory", ["none", "residual"])
@pytest.mark.parametrize("text", [*VOTES, *SCALED])
def test_rows_without_a_gradient_stay(text, memory):
    """A row that never had a gradient on any rank gets exact zeros at every step, and has no residual; without blocks it moves."""
    moved = {}
    for block in (BLOCK, None):
        cluster, sums = NUMPY.cluster(composed(text.format(block), memory), RANKS), np.zeros(SHAPE)
        for step in range(5):
            sums += np.abs(NUMPY.step(cluster, [{"w": x} for x in embedding(RANKS, step, SHAPE)])["w"])
        moved[block] = sums
        if block:
            residuals = [held["residual/w"].reshape(SHAPE)[:4] for held in states(cluster, NUMPY) if "residual/w" in held]
            assert not any(x.any() for x in residuals)
    assert not moved[BLOCK][:4].any() and moved[BLOCK][4:].any(axis=1).all()
    assert moved[None][:4].all()


def test_the_flags_cost_one_bit_per_block():
    """The payload has one bit per block beside the signs; flags after the last block are an error."""
    spec, info = TensorSpec("w", (100, 30)), StepInfo(0, 0, 2, 2)
    for knobs, flags in (("", 1), ("(block=30)", 13), ("(block=3000)", 1), ("(block=1)", 375)):
        compressor = grace_ext.grace(f"signsgd{knobs} + none").compressor
        assert compressor.nbytes(spec) == 375 + flags
    compressor = grace_ext.grace("signsgd(block=30) + none").compressor
    payload, _ = compressor.compress(NUMPY.ops, np.ones(3000, np.float32), spec, info, {})
    assert payload[0].tolist() == [255] * 12 + [15]
    bad = (payload[0] | np.uint8(16), payload[1])
    with pytest.raises(PayloadError, match="end in 31, expected at most 15 for 100 blocks"):
        compressor.decompress(NUMPY.ops, bad, spec, info)
