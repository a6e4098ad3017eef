"""Comparing ranks between steps, errors of a failed engine, timeouts, and the residuals when the number of ranks changes."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from grace_ext.checkpoints.elastic import carried_over
from grace_ext.checkpoints.resize import resized
from grace_ext.driver.agreement import digest_of
from grace_ext.errors import CollectiveError, DisagreementError, GraceError, ParameterError
from grace_ext.exchange.perform import perform
from grace_ext.frameworks.horovod import limit_waits
from grace_ext.frameworks.timeouts import timeout
from grace_ext.testing import inputs
from grace_ext.testing.worlds import same_bits

from .hub import Concatenating, Hub, Native, Poor
from .test_driver import SHAPES, drivers, run, shuffled

SPEC = "topk(ratio=0.2) + residual"
DIGESTS = {"a": "1", "b": "2", "c": "3"}


def compared(made, digests):
    """Runs `compare` on all ranks. Returns each rank's result or exception."""
    return Hub([d.transport for d in made]).run([d.compare(x) for d, x in zip(made, digests, strict=True)])


@pytest.mark.parametrize("transport", [Native, Poor, Concatenating], ids=lambda t: t.__name__)
def test_parameters_that_differ_are_named_on_every_rank(transport):
    made = drivers(SPEC, 3, transport)
    for step in range(2):
        run(made, inputs.ranks(3, step, shapes=SHAPES), shuffled(3, step))
        assert compared(made, [DIGESTS] * 3) == [None] * 3
    for odd in range(3):  # the two that agree are taken as right, whether or not rank 0 is one of them
        said = compared(made, [{**DIGESTS, "b": "9"} if rank == odd else DIGESTS for rank in range(3)])
        assert all(isinstance(error, DisagreementError) for error in said)
        assert f"rank {odd}: 1 of 3 parameters differ: b" in str(said[0]) and len({str(error) for error in said}) == 1
    missing = compared(made, [DIGESTS, DIGESTS, {"a": "1", "b": "2"}])
    assert "rank 2: 1 of 3 parameters differ: c" in str(missing[0])
    run(made, inputs.ranks(3, 2, shapes=SHAPES), shuffled(3, 2))  # training can continue


def test_ranks_at_other_steps_are_told():
    made = drivers("randomk(ratio=0.2) + residual", 3, Native)  # sums have no header with the step
    run(made, inputs.ranks(3, 0, shapes=SHAPES), shuffled(3, 0))
    made[2].step += 1
    assert all("rank 2 is at step 2, rank 0 at step 1" in str(error) for error in compared(made, [DIGESTS] * 3))
    fresh = drivers("randomk(ratio=0.2) + residual", 3, Native)
    fresh[1].step = 5
    with pytest.raises(DisagreementError, match="rank 1 is at step 5, rank 0 at step 0"):
        run(fresh, inputs.ranks(3, 0, shapes=SHAPES), shuffled(3, 0))


def test_not_in_the_middle_of_a_step():
    (driver,) = drivers(SPEC, 1, Native)
    next(driver.put("a", inputs.ranks(1, 0, shapes=SHAPES)[0]["a"]), None)
    with pytest.raises(GraceError, match="between steps"):
        next(driver.compare(DIGESTS))


def test_a_digest_is_of_type_shape_and_bits():
    x = np.arange(6, dtype=np.float32)
    same = [x, x.copy(), np.arange(12, dtype=np.float32)[::2] / 2]
    assert len({digest_of(a) for a in same}) == 1
    minus, plus = np.zeros(1, np.float32), -np.zeros(1, np.float32)
    assert len({digest_of(a) for a in (x, x.reshape(2, 3), x.astype(np.float64), x.view(np.int32), x[:5], minus, plus, x[:0])}) == 8


class Broken(Native):
    """An engine that loses its peers in every wait."""

    def start(self, collective, name):
        return name

    def wait(self, handle):
        raise RuntimeError("connection closed by peer")


def test_a_failed_collective_says_which_and_whose():
    (driver,) = drivers(SPEC, 1, lambda rank, size: Broken(0, 2))
    driver.agreed, driver.prefix = True, "grace/0"
    gradients = inputs.ranks(1, 0, shapes=SHAPES)[0]
    handles = {}
    for name in driver.specs:
        perform(driver.put(name, gradients[name]), driver.transport, handles)
    with pytest.raises(CollectiveError, match=r"rank 0: collective 'grace/0/0/1/gather.0' of .* connection closed by peer") as told:
        perform(driver.finish(), driver.transport, handles)
    assert set(told.value.parameters) == {spec.name for spec in driver.buckets[0].specs}
    assert not driver.state and driver.step == 0


def test_timeouts():
    assert timeout({}) == 1800 and timeout({"GRACE_EXT_TIMEOUT": "7.5"}) == 7.5
    for bad in ("0", "-1", "soon", "nan", "inf"):
        with pytest.raises(ParameterError, match="GRACE_EXT_TIMEOUT"):
            timeout({"GRACE_EXT_TIMEOUT": bad})
    told = {"GRACE_EXT_TIMEOUT": "20", "HOROVOD_GLOO_TIMEOUT_SECONDS": "30"}
    limit_waits(told)
    assert {k: v for k, v in told.items() if k.startswith("HOROVOD")} == {
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "20", "HOROVOD_STALL_CHECK_TIME_SECONDS": "10", "HOROVOD_GLOO_TIMEOUT_SECONDS": "20",
    }  # fmt: skip
    own = {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "99"}
    limit_waits(own)
    assert own == {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "99"}


def in_threads(states, size, how):
    """Runs carried_over on `size` ranks, each a thread. Returns their results."""
    barrier, said, made = threading.Barrier(size), [None] * size, [None] * size

    def rank_of(rank):
        def gather(mine):
            said[rank] = mine
            barrier.wait(10)
            everyone = list(said)
            barrier.wait(10)
            return everyone

        made[rank] = carried_over(gather, states[rank], rank, size, how)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return made


@pytest.mark.parametrize("how", ["mean", "keep", "reset"])
@pytest.mark.parametrize("spec", [SPEC, "powersgd(rank=2) + residual", "efsignsgd + residual @ reduce_scatter", "topk(ratio=0.2) + ef21"])
def test_the_memory_follows_the_ranks(spec, how):
    """Carried over one parameter at a time, states equal those of `resized`; a rank that died counts as zero; new ranks may be anywhere."""
    made = drivers(spec, 3, Native)
    for step in range(2):
        run(made, inputs.ranks(3, step, shapes=SHAPES), shuffled(3, step))
    sizes = {spec.name: spec.size for spec in made[0].specs.values()}
    old = [{**driver.state_dict(), "sizes": sizes} for driver in made]
    for unchanged, before in zip(in_threads(old, 3, how), old, strict=True):
        assert unchanged["rank"] == before["rank"] and same_bits(unchanged["state"], before["state"])
    for alive, size in (([0, 2], 2), ([None, 0, None, 1, 2], 5)):
        there = [{**driver.state_dict(), "rank": rank} for rank, driver in enumerate(made) if rank in alive]
        own = [None if rank is None else old[rank] for rank in alive]
        got = in_threads(own, size, how)
        assert [(x["rank"], x["size"], x["step"]) for x in got] == [(rank, size, 2) for rank in range(size)]
        if "reduce_scatter" in spec and len(there) < 3:
            for x in there:
                x["state"] = {key: array for key, array in x["state"].items() if not key.startswith("shard")}
            for name in sizes:
                key = f"shard_residual/{name}"
                if key in old[0]["state"]:  # a tensor of one element has no shard residual
                    lost = np.zeros_like(old[1]["state"][key])
                    whole = np.concatenate([old[0]["state"][key], lost, old[2]["state"][key]])
                    found = np.concatenate([x["state"].pop(key) for x in got])
                    assert found.tobytes() == (np.zeros_like(whole) if how == "reset" else whole).tobytes()
        for mine, expected in zip(got, resized(there, size, how), strict=True):
            assert same_bits(mine["state"], expected["state"])
    assert in_threads([None] * 2, 2, how) == [None] * 2
