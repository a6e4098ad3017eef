"""Defines `Exchange`: it compresses and exchanges the gradients of any array code over mpi4py, without Horovod.

    mpirun -np 4 python -m mpi4py train.py

Start it with `-m mpi4py` as above: an error that one rank does not catch then aborts the whole job. Without it that rank waits in
MPI_Finalize for the others, and they wait for it. If a rank dies by a signal, or leaves by os._exit, mpirun notices either way and aborts
all ranks. MPI has no timeouts: `step` waits GRACE_EXT_TIMEOUT seconds for a rank that is alive but takes no part, and then raises
CollectiveError.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...arrays.compiled import host_ops
from ...arrays.numpy import NumpyOps, native
from ...checkpoints.saveable import Saveable, saveable_by
from ...composition.grace import Grace
from ...composition.making import grace
from ...driver.agreement import digest_of
from ...driver.driver import Driver
from ...driver.layout import check_names
from ...errors import Afterwards, DisagreementError, GraceError, NamesError, ParameterError, UnsupportedError, shown
from ...exchange.effects import Collective
from ...exchange.perform import perform
from ...exchange.transport import Carried, Transport, arriving, cut, exchange_lengths
from ...metrics.metrics import Measured
from ...parts.tensor import TensorSpec
from ...privacy.settings import Privacy, check_protects_ranks
from ..launchers import check_alone
from ..timeouts import timeout

# MPI-3 counts and offsets are C ints.
LIMIT = 2**31 - 1
# What failed steps left under way. MPI may still write into these buffers, so they live as long as the process; to wait for them instead
# could take for ever, if the peers failed too.
_abandoned: list[Any] = []


def load_mpi() -> Any:
    """Imports mpi4py.MPI, which initialises MPI, and returns it. Raises UnsupportedError if mpi4py or an MPI library is missing."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no libmpi
        raise UnsupportedError(f"Exchange needs mpi4py and an MPI library: pip install 'grace_ext[mpi]' ({error})") from error
    return MPI


class MpiTransport(Transport):
    """Runs the non-blocking collectives of one communicator, on numpy arrays.

    MPI matches collectives by the order in which they start, which the driver keeps the same on all ranks; so the communicator must
    carry nothing else. They progress inside MPI calls: while the next bucket is being encoded and started, and in `wait`.
    MPI forms the sums: the same bits on all ranks, in an order that MPI chooses (with two ranks there is only one).
    """

    ops: NumpyOps
    # Iallgatherv takes different lengths as they are, but every rank must know all of them: see `carry`.
    gathers_uneven = True
    splits = True

    def __init__(self, ops: NumpyOps, comm: Any):
        self.ops, self.comm, self._mpi = ops, comm, load_mpi()
        self.rank, self.size, self._timeout = comm.Get_rank(), comm.Get_size(), timeout()

    def group(self, ranks: Sequence[int]) -> MpiTransport | None:
        mine = self.rank in ranks
        made = self.comm.Split(0 if mine else self._mpi.UNDEFINED, self.rank)
        return MpiTransport(self.ops, made) if mine else None

    def carry(self, collective: Collective) -> Carried:
        """Carries a collective as every transport does, but a gather of unknown lengths first gathers these, 8 bytes per rank, and pads
        nothing."""
        if collective.kind == "allgather" and collective.sizes is None:
            sizes = yield from exchange_lengths(self, collective)
            collective = collective._replace(sizes=sizes)
        return (yield from super().carry(collective))

    def start(self, collective: Collective, name: str) -> Any:
        # The handle holds every buffer: mpi4py's requests do not, for some collectives (4.1.2: Iallreduce, Iallgatherv).
        data, comm, sizes = collective.array, self.comm, list(collective.sizes or ())
        if max([len(data), *sizes]) > LIMIT or (collective.kind == "alltoall" and sum(sizes) > LIMIT):
            raise UnsupportedError(f"{name}: MPI counts to {LIMIT} elements, but this tensor needs more; split it into several parameters")
        if collective.kind == "allreduce":
            # Not in place: for that Open MPI has only a slower algorithm (25 MB, 2 ranks: 136 ms against 92 ms).
            total = np.empty_like(data)
            return collective, total, [comm.Iallreduce(data, total, self._mpi.SUM)]
        if collective.kind == "alltoall":
            mine = arriving(collective, self.rank)
            out = np.empty(sum(mine), np.uint8)
            return collective, cut(out, mine), [comm.Ialltoallv([data, sizes], [out, mine])]
        if collective.kind == "allgather" and sum(sizes) <= LIMIT:
            out = np.empty(sum(sizes), np.uint8)
            return collective, cut(out, sizes), [comm.Iallgatherv(data, [out, sizes])]
        # A broadcast, or a gather whose offsets would not fit: every rank knows all sizes, so all decide alike.
        outs = [data if rank == self.rank else np.empty(size, np.uint8) for rank, size in enumerate(sizes)]
        return collective, outs, [comm.Ibcast(out, root=rank) for rank, out in enumerate(outs) if len(out)]

    def wait(self, handle: Any) -> Any:
        collective, result, requests = handle
        deadline = time.monotonic() + self._timeout
        while not self._mpi.Request.Testall(requests):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the other ranks took no part within {self._timeout:g} s")
            os.sched_yield()
        return np.divide(result, collective.divisor, out=result) if collective.kind == "allreduce" else result


def duplicated(comm: Any) -> Any:
    """Returns a duplicate of the communicator, by default of COMM_WORLD. Raises ParameterError if `comm` is none, UnsupportedError if it is
    no intra-communicator that this rank belongs to, or if a launcher started several ranks that MPI does not connect."""
    mpi = load_mpi()
    if comm is None:
        comm = mpi.COMM_WORLD
        if comm.Get_size() == 1:
            check_alone("MPI", "Start with mpirun -np N python -m mpi4py train.py")
    if not isinstance(comm, mpi.Comm):
        raise ParameterError(f"comm must be an mpi4py communicator such as MPI.COMM_WORLD, got {shown(comm)}")
    if comm == mpi.COMM_NULL or not isinstance(comm, mpi.Intracomm):
        raise UnsupportedError("comm must be an intra-communicator that this rank belongs to; ranks outside of it make no Exchange")
    return comm.Dup()


def check_by_name(arrays: Any, call: str) -> None:
    """Raises ParameterError if a call got something else than arrays by name, NamesError if a name is none."""
    if not isinstance(arrays, Mapping):
        raise ParameterError(f"{call} takes a dictionary of arrays, such as {{'w': array}}; got {type(arrays).__name__}")
    check_names(arrays)


class Exchange(Measured):
    """Exchanges compressed gradients over the ranks of an MPI communicator: `step` returns their mean (or sum).

        import grace_ext.frameworks.numpy as gnp          # before mpi4py, if it is to run without mpirun too
        with gnp.Exchange(grace_ext.grace("topk(ratio=0.01) + residual")) as exchange:
            mean = exchange.step({"w": gradient_w, "b": gradient_b})

    g: a Grace, or what `grace_ext.grace` takes.
    comm: an mpi4py intra-communicator, by default COMM_WORLD. It is duplicated, so that nothing here mixes with the caller's messages:
      making an Exchange, and `close`, are collective; every rank of comm takes part.
    op: 'mean' or 'sum'.
    simulate: compress at world size 1 too; otherwise a single rank gets copies of its gradients, or what a momentum or a vote makes of
      them.
    privacy: a grace_ext.privacy.Privacy of unit 'rank', which makes this rank's gradient private before it is compressed; or `g` has it in
      front. `epsilon(delta)` says what was spent.
    Raises ParameterError, UnsupportedError (no mpi4py, no usable communicator, a launcher whose ranks MPI does not connect), and
    DisagreementError if ranks pass different `op`.
    """

    def __init__(
        self,
        g: Grace | str | Mapping[str, Any],
        comm: Any = None,
        *,
        op: str = "mean",
        simulate: bool = False,
        privacy: Privacy | None = None,
    ):
        if op not in ("mean", "sum"):
            raise ParameterError(f"op must be 'mean' or 'sum', got {shown(op)}")
        self.grace, self._mpi = grace(g).with_privacy(privacy), load_mpi()
        check_protects_ranks(self.grace.privacy, "Exchange")
        self._lr: float | None = None
        self._transport = MpiTransport(host_ops(NumpyOps), duplicated(comm))
        compressing = simulate or self._transport.size > 1
        self._dense = not compressing and not self.grace.acts_alone
        self._over = ""  # why there can be no more steps
        said = self._transport.comm.allgather({"op": op})
        if any(other != said[0] for other in said):
            ops = [other["op"] for other in said]
            with Afterwards(self.close):
                raise DisagreementError(f"ranks combine gradients differently: op by rank is {ops}; pass the same on every rank", said)
        divisor = None if op == "mean" else 1
        self._driver = Driver(
            self.grace,
            self._transport.ops,
            self._transport,
            divisor=divisor,
            read_lr=lambda: self._lr,
            compressing=compressing,
        )

    @property
    def wire_bytes(self) -> int:
        """Returns the bytes of this rank's own input buffers to all collectives of the last step, including headers, exchanged lengths and
        every round. 0 if nothing is exchanged. A 16-bit sum is an all-to-all of the whole buffer and a gather of this rank's share of the
        result."""
        return self._driver.wire_bytes

    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> dict[str, np.ndarray]:
        """Makes one exchange: takes this rank's gradients by name, and returns the aggregates by name, the same bits on all ranks, in the
        gradients' shapes and dtypes. Arrays are numpy's or what numpy.asarray takes; new numpy arrays are returned, in this machine's byte
        order whatever that of the gradients ('>f8') is. `lr` is for memories that use it.

        Every rank passes the same names, at the first step in the same order, and the same shapes and dtypes at every step. If a
        gradient is NaN or Inf on any rank, all ranks get NaN for its bucket, and none changes its memory; with privacy it counts as 0.

        Before anything is sent, it raises NamesError, TensorChangedError, UnsupportedDtypeError or LearningRateError on the ranks at fault
        (the others wait for them, see the module's text), and DisagreementError on all ranks alike. It raises PayloadError, on all ranks
        alike, for a message that cannot be decoded. After an error in the middle of a step ranks may be out of step with each other, which
        MPI could not tell from the right order; so later calls raise GraceError. `state_dict` then returns that of the last whole step."""
        if self._over:
            raise GraceError(f"this Exchange {self._over}; make a new one on every rank")
        check_by_name(gradients, "step")
        self._check(gradients)
        if self._dense:
            given = {name: np.asarray(gradients[name]) for name in self._driver.specs}
            return {name: np.array(array, native(array.dtype)) for name, array in given.items()}
        self._driver.check_rate(lr)
        self._lr = lr
        handles: dict[str, Any] = {}
        try:
            return perform(self._driver.exchange(gradients), self._transport, handles)
        except DisagreementError:  # raised by all ranks, with nothing under way
            self._driver.register(())
            raise
        except BaseException:
            _abandoned.append(handles)
            self._over = "was stopped by an error in the middle of a step"
            raise

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound of epsilon for the steps so far, as Driver.epsilon does."""
        return self._driver.epsilon(delta)

    def _drivers(self) -> list[Driver]:
        return [] if self._dense else [self._driver]

    def _check(self, gradients: Mapping[str, Any]) -> None:
        """Registers the parameters at the first step. Raises NamesError or TensorChangedError if those of a later step differ."""
        driver = self._driver
        if not driver.specs:
            driver.register([TensorSpec(name, *driver.ops.describe(tensor)) for name, tensor in gradients.items()])
        missing, extra = sorted(set(driver.specs) - set(gradients)), sorted(set(gradients) - set(driver.specs))
        if missing or extra:
            raise NamesError(f"rank {self._transport.rank}: missing parameters {shown(missing)}, unknown parameters {shown(extra)}")
        for name, tensor in gradients.items():
            driver.check(name, tensor)

    def check_agreement(self, parameters: Mapping[str, Any] | None = None) -> None:
        """Raises DisagreementError on every rank alike, naming ranks and parameters, if the ranks' specs, names, shapes, versions or
        steps differ, or the bits of these `parameters` (arrays by name). Collective: every rank calls it, between steps."""
        if self._over:
            raise GraceError(f"this Exchange {self._over}; make a new one on every rank")
        check_by_name({} if parameters is None else parameters, "check_agreement")
        if self._transport.size > 1:
            digests = {name: digest_of(np.asarray(array)) for name, array in (parameters or {}).items()}
            perform(self._driver.compare(digests), self._transport, {})

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of this rank's state, as Driver.state_dict does. Those of every rank are needed to resume."""
        return self._driver.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resumes bit for bit from what `state_dict` gave on the same rank of as many ranks; from rank 0's state alone, as
        Driver.load_state_dict does. Raises GraceError, and changes nothing, if it does not fit."""
        self._driver.load_state_dict(saved)

    def _saveable(self) -> Saveable:
        if self._over:
            raise GraceError(f"this Exchange {self._over}; its state_dict() is that of the last whole step")
        return saveable_by(self._transport, self.state_dict, self._driver.read_state, self._driver.load_state_dict)

    def close(self) -> None:
        """Frees the duplicated communicator. Collective: every rank calls it, or none does (MPI then frees it when the process ends)."""
        if not self._over and not self._mpi.Is_finalized():
            self._transport.comm.Free()
        self._over = self._over or "is closed"

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # If an error is on its way, the other ranks may never get here, and `close` would wait for them.
        if kind is None:
            self.close()
        self._over = self._over or "was left by an error"
