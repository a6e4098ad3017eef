"""With tensors of a pretended device, every way of exchanging gradients in torch makes what it makes on the host. No rank commits a step
that is not finite, or whose messages are damaged."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest

import grace_ext
from grace_ext.errors import PayloadError
from grace_ext.frameworks.torch import ddp, ddp_comm_hook
from grace_ext.testing import inputs
from grace_ext.testing.pretended_device import COUNTS

from .support.device_ways import (
    HOST,
    ON_DEVICE,
    SHAPES,
    WAYS,
    Made,
    Parameters,
    by_ddp,
    by_fsdp,
    by_local_sgd,
    by_optimizer,
    damaged,
    stand_ins,
)
from .support.threads import on_threads

TOPK = "topk(ratio=0.1) + residual"
SPECS = ("none", "fp16", TOPK, "threshold(threshold=0.5) + residual", "randomk(ratio=0.1) + residual",
         "efsignsgd + residual", "signsgd + residual", "qsgd(bits=4)", "terngrad", "natural", "powersgd(rank=2) + residual")  # fmt: skip
STEPS = 6
BAD = 3  # LocalSGD synchronizes at the end of every second step: this step's gradients are not finite, or its messages are damaged


def outcomes(
    way, world, spec: str, dtype: str = "float32", *, value: float | None = None, damage: bool = False, size: int = 2
) -> list[list[Made]]:
    """Runs a way on all ranks; returns what its steps have made, by rank. In step BAD rank 1 has this value in a gradient, or its messages
    are damaged."""
    now, g = threading.local(), grace_ext.grace(spec)

    def gradients(rank: int):
        for step in range(STEPS):
            now.step = step
            found = inputs.normal(rank, step, dtype, SHAPES)
            if value is not None and (rank, step) == (1, BAD):
                found["matrix"][3, 4] = value
            yield found

    with stand_ins(), damaged(lambda rank: damage and (rank, now.step) == (1, BAD)), np.errstate(all="ignore"):
        found = on_threads(size, lambda rank: list(way(world, g, gradients(rank))))
    errors = [outcome for outcome in found if isinstance(outcome, Exception)]
    if errors:
        raise errors[0]
    return found


def same(one: Made, other: Made, spec: str) -> bool:
    assert one.arrays.keys() == other.arrays.keys() and (one.committed, one.error) == (other.committed, other.error), (one, other)
    if "powersgd" in spec:  # products of matrices differ in the last bits
        return all(np.allclose(one.arrays[n].astype("f8"), other.arrays[n].astype("f8"), rtol=1e-3, atol=1e-4) for n in one.arrays)
    return all(one.arrays[n].dtype == x.dtype and one.arrays[n].tobytes() == x.tobytes() for n, x in other.arrays.items())


@functools.lru_cache
def on_the_host(way, *what, **how) -> list[list[Made]]:
    return outcomes(by_local_sgd if way is by_local_sgd else by_optimizer, HOST, *what, **how)


@pytest.mark.parametrize(
    ("way", "spec"),
    [
        pytest.param(way, spec, id=f"{name}-{spec}")
        for name, way in WAYS.items()
        for spec in SPECS
        if not (way is by_local_sgd and "signsgd + residual" == spec)  # a vote has no size
    ],
)
def test_makes_what_it_makes_on_the_host(way, spec):
    for rank, (ours, theirs) in enumerate(zip(outcomes(way, ON_DEVICE, spec), on_the_host(way, spec), strict=True)):
        assert len(ours) == STEPS
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert same(one, other, spec), (rank, step)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("spec", ["none", TOPK, "efsignsgd + residual"])
def test_other_dtypes(way, dtype, spec):
    for ours, theirs in zip(outcomes(way, ON_DEVICE, spec, dtype), on_the_host(way, spec, dtype), strict=True):
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert same(one, other, spec), step


@pytest.mark.parametrize("way", [way for way in WAYS.values() if way is not by_local_sgd], ids=lambda way: way.__name__)
@pytest.mark.parametrize("spec", ["none", TOPK, "efsignsgd + residual", "qsgd(bits=4)", "powersgd(rank=2) + residual"])
def test_one_rank_is_not_finite(way, spec):
    """All ranks get NaN for the tensors of the bucket, none commits, and the next step is as on the host."""
    for ours, theirs in zip(outcomes(way, ON_DEVICE, spec, value=np.nan), on_the_host(way, spec, value=np.nan), strict=True):
        assert [made.committed for made in ours] == [step != BAD for step in range(STEPS)]
        assert np.isnan(ours[BAD].arrays["matrix"]).all()
        for step in set(range(STEPS)) - {BAD}:
            assert same(ours[step], theirs[step], spec), step


@pytest.mark.filterwarnings("ignore:a rank's model was not finite")
def test_a_model_that_is_not_finite():
    """LocalSGD commits no drift that is not finite on one rank: all ranks go back to their last common model."""
    for ours, theirs in zip(
        outcomes(by_local_sgd, ON_DEVICE, TOPK, value=np.inf), on_the_host(by_local_sgd, TOPK, value=np.inf), strict=True
    ):
        assert not ours[BAD].committed and same(ours[BAD], ours[1]._replace(committed=False), TOPK)
        assert all(same(*pair, TOPK) for pair in zip(ours[BAD:], theirs[BAD:], strict=True))


def test_shards_commit_together():
    """If one shard of one replica is not finite, no shard of any replica commits. The shards that are finite get their mean."""
    way = functools.partial(by_fsdp, shards=2)
    runs = outcomes(way, ON_DEVICE, TOPK, value=np.nan, size=4)
    for rank, ours in enumerate(runs):
        assert [made.committed for made in ours] == [step != BAD for step in range(STEPS)], rank
        bad = np.isnan(ours[BAD].arrays["matrix"])
        assert bad.all() if rank % 2 else not bad.any(), rank


def test_what_no_rank_used():
    """DDP gives zeros for a parameter that no rank has used, and the hook what its memory kept; the host waits once for all of them."""
    for ours, theirs in zip(*(outcomes(functools.partial(by_ddp, used=used), world, TOPK) for world in (ON_DEVICE, HOST)), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert same(one, other, TOPK)
        assert ours[BAD].arrays["bias"].any() and not np.array_equal(ours[BAD].arrays["bias"], ours[BAD - 1].arrays["bias"])
    model = Parameters({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, ON_DEVICE.tensor)
    state, _ = ddp_comm_hook("none", model)
    results = {name: ON_DEVICE.tensor(np.full(shape, name != "bias", np.float32)) for name, shape in SHAPES.items()}
    state._taken = [ddp._Taken(results, [], results["bias"], None)]
    COUNTS.clear()
    state._keep_unused()
    assert COUNTS.waits == 1 and [name for name, p in model.named_parameters() if p.grad is None] == ["bias"]


def used(name: str, step: int) -> bool:
    return (name, step) != ("bias", BAD)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("spec", [TOPK, "efsignsgd + residual", "qsgd(bits=4)"])
def test_a_damaged_message(way, spec):
    """The step raises a PayloadError on every rank, that of the sender included, and the next one is as on the host."""
    for ours, theirs in zip(outcomes(way, ON_DEVICE, spec, damage=True), on_the_host(way, spec, damage=True), strict=True):
        assert [made.error is not None for made in ours] == [step == BAD for step in range(STEPS)]
        assert ours[BAD].error[:2] == (PayloadError, 1)
        for step in set(range(STEPS)) - {BAD}:
            assert same(ours[step], theirs[step], spec), step
