"""With tensors of a pretended device, every way of exchanging gradients in torch makes what it makes on the host. No rank commits a step
that is not finite, or whose messages are damaged."""

from __future__ import annotations

import contextlib
import functools
import threading

import numpy as np
import pytest
import torch

import grace_ext
from grace_ext.errors import PayloadError
from grace_ext.frameworks import torch as hvd
from grace_ext.frameworks.torch import ddp, ddp_comm_hook
from grace_ext.frameworks.torch.transports import DistTransport
from grace_ext.testing import inputs
from grace_ext.testing.pretended_device import COUNTS, pretended

from .support.device_ways import (
    HOST,
    ON_DEVICE,
    SHAPES,
    WAYS,
    Made,
    Parameters,
    Ranks,
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
         "efsignsgd + residual", "signsgd + residual", "qsgd(bits=4)", "terngrad", "natural", "powersgd(rank=2) + residual",
         "lgreco(every=2, window=1)", "accordion(high=fp16, low=topk(ratio=0.1) + residual, interval=2)")  # fmt: skip
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

    def program(rank: int) -> list[Made]:
        with pretended() if world is ON_DEVICE else contextlib.nullcontext():
            return list(way(world, g, gradients(rank)))

    with stand_ins(), damaged(lambda rank: damage and (rank, now.step) == (1, BAD)), np.errstate(all="ignore"):
        found = on_threads(size, program)
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


@pytest.mark.parametrize("way", [by_optimizer, by_ddp, by_local_sgd], ids=lambda way: way.__name__)
@pytest.mark.parametrize("spec", [TOPK, "lgreco(every=2, window=1)"])
def test_resumes(way, spec):
    """A new exchange that loads the state from the host goes on as on the host, where nothing was loaded."""
    for ours, theirs in zip(outcomes(functools.partial(way, restart=BAD), ON_DEVICE, spec), on_the_host(way, spec), strict=True):
        assert all(same(one, other, spec) for one, other in zip(ours, theirs, strict=True))


class Scaler(torch.amp.GradScaler):
    """Scales by 1024."""

    def __init__(self):
        super().__init__("cpu", enabled=False)

    def get_scale(self):
        return 1024.0


USES = {
    "two passes": functools.partial(by_optimizer, passes=2),
    "a sum": functools.partial(by_optimizer, op=hvd.Sum),
    "clipped before": functools.partial(by_optimizer, clip_before=1.0),
    "clipped after": functools.partial(by_optimizer, clip_after=1.0),
    "without overlap": functools.partial(by_optimizer, overlap=False),
    "scaled": functools.partial(by_optimizer, scaler=Scaler()),
    "scaled in DDP": functools.partial(by_ddp, scaler=Scaler()),
    "an outer optimizer": functools.partial(by_local_sgd, outer_lr=0.7, outer_momentum=0.9),
    "gradients at first": functools.partial(by_local_sgd, every=None, schedule=hvd.post_local(3, 2)),
}


@pytest.mark.parametrize("way", USES.values(), ids=USES)
def test_other_uses(way):
    for ours, theirs in zip(*(outcomes(way, world, TOPK) for world in (ON_DEVICE, HOST)), strict=True):
        assert len(ours) == STEPS
        for one, other in zip(ours, theirs, strict=True):
            assert one.committed == other.committed
            assert all(np.allclose(one.arrays[name], x, rtol=1e-6, atol=1e-7) for name, x in other.arrays.items())


def test_cser():
    """The ranks exchange gradients at every step, and models at every second one."""
    way = functools.partial(by_local_sgd, every=None)
    runs = [outcomes(way, world, "topk(ratio=0.1) + cser(reset_period=2)") for world in (ON_DEVICE, HOST)]
    for ours, theirs in zip(*runs, strict=True):
        assert all(same(one, other, TOPK) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("way", [by_optimizer, by_ddp], ids=lambda way: way.__name__)
@pytest.mark.parametrize("spec", [f"{TOPK} @ hierarchical", "qsgd(bits=4) + none @ hierarchical(between=reduce_scatter)"])
def test_two_nodes(way, spec, monkeypatch):
    """Four ranks on two nodes, over torch's own groups."""
    monkeypatch.setattr(Ranks, "size", lambda self: 4)
    monkeypatch.setattr(Ranks, "ranks", [0, 1, 2, 3])
    monkeypatch.setattr(DistTransport, "node", property(lambda self: str(self.rank // 2)))
    runs = [outcomes(way, world, spec, size=4) for world in (ON_DEVICE, HOST)]
    for ours, theirs in zip(*runs, strict=True):
        assert all(same(one, other, spec) for one, other in zip(ours, theirs, strict=True))


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
