"""Cases of two-level exchanges, compared with a LocalCluster with the same nodes.  levels_job.py {wrapper|mpi} RANKS_PER_NODE

wrapper: uses the transport of the torch wrapper under this launcher, and trains with it; mpi: uses that of mpi4py. GRACE_EXT_NODE
simulates nodes. Prints 'CASE name ok' for each case that holds on all ranks.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import grace_ext
from grace_ext.driver.driver import Driver
from grace_ext.errors import DisagreementError, UnsupportedError
from grace_ext.exchange.perform import perform
from grace_ext.frameworks import launched
from grace_ext.parts.tensor import TensorSpec
from grace_ext.planning.probe import Probe

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from cases import raises  # noqa: E402

MODE, PER_NODE = sys.argv[1], int(sys.argv[2])
SHAPES = {"bias": (7,), "matrix": (40, 30), "kernel": (6, 3, 3, 3), "wide": (33, 9), "empty": (0, 3), "scalar": (), "last": (64, 20)}
WIDE = "wide"  # float64
SPECS = {
    "none @ hierarchical": 1e-6,
    "fp16 @ hierarchical": 1e-3,
    "topk(ratio=0.1) + residual @ hierarchical": 0,
    "threshold(threshold=0.5) + residual @ hierarchical": 0,
    "threshold(threshold=0.5) + residual @ hierarchical(between=broadcast)": 0,
    "topk(ratio=0.1) + residual @ hierarchical(between=sparse_allreduce)": 1e-6,
    "qsgd(bits=4) @ hierarchical": 0,
    "signsgd + residual @ hierarchical(between=allreduce)": 0,
    "powersgd(rank=2) + residual @ hierarchical": 1e-5,
    "efsignsgd + residual @ hierarchical(between=reduce_scatter(feedback=False))": 0,
}


def gradients(rank, step):
    generator = np.random.default_rng([rank, step])
    return {name: generator.standard_normal(dims).astype("f8" if name == WIDE else "f4") for name, dims in SHAPES.items()}


def driver_for(transport, spec):
    """Returns a driver with several buckets, which may have different numbers of rounds."""
    driver = Driver(grace_ext.grace(spec), transport.ops, transport, bucket_bytes=3000)
    driver.register([TensorSpec(name, dims, "float64" if name == WIDE else "float32") for name, dims in SHAPES.items()])
    return driver


def step(driver, transport, given):
    """Makes one step: gradients arrive in parameter order on odd ranks, in reverse order on even ranks."""
    handles, ops = {}, transport.ops
    order = list(SHAPES) if transport.rank % 2 else list(reversed(SHAPES))
    for name in order:
        perform(driver.put(name, ops.emit(np.array(given[name]).reshape(-1), driver.specs[name])), transport, handles)
    return {name: np.asarray(out) for name, out in perform(driver.finish(), transport, handles).items()}


def case_equals_local_cluster(transport):
    for spec, tolerance in SPECS.items():
        cluster = grace_ext.LocalCluster(grace_ext.grace(spec), transport.size, ranks_per_node=PER_NODE)
        for one in cluster.drivers:
            one.bucket_bytes = 3000
        driver = driver_for(transport, spec)
        for number in range(3):
            given = [gradients(rank, number) for rank in range(transport.size)]
            got, expected = step(driver, transport, given[transport.rank]), cluster.step(given)
            assert driver.wire_bytes > 0
            for name, want in expected.items():
                assert got[name].shape == want.shape and got[name].dtype == want.dtype, (spec, name)
                if want.size:  # engines may add more than two ranks of a node in another order
                    allowed = max(tolerance, 1e-6 if PER_NODE > 2 else 0) * np.abs(want).max()
                    assert np.abs(got[name] - want).max() <= allowed, (spec, number, name)


def case_not_finite(transport):
    """If one rank has a NaN, all ranks get NaN, and no state changes."""
    driver = driver_for(transport, "topk(ratio=0.1) + residual @ hierarchical")
    for number in range(3):
        given = gradients(transport.rank, number)
        if number == 1 and transport.rank == transport.size - 1:
            given["matrix"][3, 4] = np.nan
        before = driver.state_dict()["state"]
        got = step(driver, transport, given)
        assert driver.committed == (number != 1) and np.isnan(got["matrix"]).any() == (number == 1)
        if number == 1:
            assert all(np.array_equal(before[key], held) for key, held in driver.state_dict()["state"].items())


def case_ranks_that_differ_are_told(transport):
    spec = "topk(ratio=0.1) + residual @ " + ("hierarchical" if transport.rank else "allgather")
    driver = driver_for(transport, spec)
    raises(DisagreementError, "hierarchical", lambda: step(driver, transport, gradients(transport.rank, 0)))


def case_training(transport):
    if MODE == "mpi":
        return
    import training

    import grace_ext.frameworks.torch as hvd

    spec = "topk(ratio=0.05) + residual @ hierarchical"
    weights, _ = training.train(hvd, grace_ext.grace(spec))
    *_, (model, _) = training.steps_in_cluster(spec, hvd.size(), PER_NODE)
    for name, want in training.weights_of(model).items():
        assert np.abs(weights[name] - want).max() <= (1e-6 if PER_NODE > 2 else 0), name


def case_part_of_the_job_is_refused(transport):
    if MODE == "mpi":  # any MPI communicator can be split into nodes
        return
    import grace_ext.frameworks.torch as hvd
    from grace_ext.frameworks.torch import engine

    some = hvd.add_process_set([1, transport.size - 1])  # not a set that other cases have made
    if transport.rank in some.ranks:
        part = engine.transport(transport.ops, some)
        os.environ["GRACE_EXT_NODE"] = "same"
        driver = driver_for(part, "topk(ratio=0.1) @ hierarchical")
        raises(UnsupportedError, "all ranks of the job", lambda: step(driver, part, gradients(part.rank, 0)))


def main() -> None:
    warnings.simplefilter("ignore")
    with contextmanager(launched._mpi)() if MODE == "mpi" else launched.transport() as transport:
        os.environ["GRACE_EXT_NODE"] = f"node{transport.rank // PER_NODE}"
        for name, case in list(globals().items()):
            if name.startswith("case_"):
                case(transport)  # an error ends the job
                perform(Probe(transport).barrier(), transport, {})
                if transport.rank == 0:
                    print(f"CASE {name} ok", flush=True)


main()
