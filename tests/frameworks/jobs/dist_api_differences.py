"""Checks of what ranks may do differently, for dist_api_job.py on two ranks; each is called with the number of this rank."""

import itertools
import time

import pytest
import torch
import torch.distributed as dist
from dist_api_collectives import same, t

import grace_ext.frameworks.torch.dist.api as hvd
from grace_ext.errors import UnsupportedError
from grace_ext.frameworks.torch.dist import groups

f64, zeros = torch.float64, torch.zeros
COO = [[0]], [1.0]


def differ():
    """Returns pairs of calls, for rank 0 and for rank 1, and what each rank must say of its own."""
    for kind in (hvd.allreduce, hvd.allgather, hvd.reducescatter, hvd.alltoall, lambda x, **k: hvd.broadcast(x, 0, **k)):
        yield lambda kind=kind: kind(zeros(2)), lambda kind=kind: kind(zeros(2, dtype=f64)), "float32", "float64"
        yield lambda kind=kind: kind(zeros(2, 2)), lambda kind=kind: kind(zeros(2, 3)), ", 2]", ", 3]"
        yield lambda kind=kind: kind(zeros(2), name="one"), lambda kind=kind: kind(zeros(2), name="two"), "'one'", "'two'"
    yield lambda: hvd.broadcast(zeros(2), 0), lambda: hvd.broadcast(zeros(2), 1), "root_rank 0", "root_rank 1"
    yield lambda: hvd.broadcast_object(1, 0), lambda: hvd.broadcast_object(1, 1), "root_rank 0", "root_rank 1"
    yield lambda: hvd.allreduce(zeros(2), op=hvd.Sum), lambda: hvd.allreduce(zeros(2), op=hvd.Max), "op Sum", "op Max"
    for change in ("prescale_factor", "postscale_factor"):
        yield lambda c=change: hvd.allreduce(zeros(2), **{c: 2.0}), lambda c=change: hvd.allreduce(zeros(2), **{c: 3.0}), "2.0", "3.0"
    yield lambda: hvd.reducescatter(zeros(2), op=hvd.Sum), lambda: hvd.reducescatter(zeros(2)), "op Sum", "op Average"
    yield lambda: hvd.allreduce(zeros(2)), lambda: hvd.allgather(zeros(2)), "allreduce", "allgather"
    yield lambda: hvd.allreduce(zeros(7)), lambda: hvd.grouped_allreduce([zeros(7)]), "allreduce", "grouped_allreduce"
    yield lambda: hvd.grouped_allreduce([zeros(2)]), lambda: hvd.grouped_allreduce([zeros(2)] * 2), "float32[2]", "2 tensors"
    for grouped in (hvd.grouped_allreduce, hvd.grouped_allgather, hvd.grouped_reducescatter):
        yield lambda g=grouped: g([zeros(2), zeros(3)]), lambda g=grouped: g([zeros(2), t([3])]), "float32", "int64"
    for start in (hvd.allreduce_async, hvd.allgather_async, hvd.reducescatter_async, hvd.alltoall_async, hvd.allreduce_async_):
        yield lambda s=start: hvd.synchronize(s(zeros(2))), lambda s=start: hvd.synchronize(s(t([3, 3]))), "float32", "int64"
    sparse = [torch.sparse_coo_tensor(*COO, (size,), check_invariants=True) for size in (5, 6)]
    yield *(lambda s=s: hvd.sparse_allreduce_async(s, "s", hvd.Sum)() for s in sparse), "(5,)", "(6,)"
    models = [torch.nn.Linear(2, width).state_dict() for width in (3, 4)]
    yield *(lambda m=m: hvd.broadcast_parameters(m, 0) for m in models), "'weight': float32[3, 2]", "'weight': float32[4, 2]"
    yield *(lambda m=m: hvd.broadcast_parameters(m, 0) for m in ({"a": t(1)}, {"b": t(1)})), "'a'", "'b'"


def check_different_calls(r):
    for *calls, mine, other in differ():
        began = time.monotonic()
        with pytest.raises(hvd.HorovodInternalError, match="The ranks have started different collectives") as caught:
            calls[r]()
        first, second = str(caught.value).split("rank 0: ")[1].split(". All ranks of")[0].split("; rank 1: ")
        assert mine in first and other in second, (first, second)
        assert len(set(hvd.allgather_object(str(caught.value)))) == 1  # and the job goes on
        assert time.monotonic() - began < 5
    same(hvd.allreduce(t([1.0 + r])), t([1.5]))


def check_known_and_new(r):
    """Rank 0 launches a collective that the ranks have compared before; rank 1 compares another one."""
    for known, new in [(hvd.allreduce, hvd.reducescatter), (lambda x, name: hvd.broadcast(x, 0, name), hvd.allgather)]:
        hvd.allreduce(zeros(1))
        known(zeros(4), name="known")
        began = time.monotonic()
        with pytest.raises(hvd.HorovodInternalError, match="wait in different collectives.* rank .*'known'.*'new'|'new'.*'known'"):
            known(zeros(4), name="known") if r == 0 else new(zeros(4), name="new")
        assert time.monotonic() - began < 10
        same(hvd.allreduce(t([1.0 + r])), t([1.5]))  # over new process groups
        hvd.barrier()


def check_known_in_another_order(r):
    for name in "ab":
        hvd.allreduce(zeros(3), name=name)
    with pytest.raises(hvd.HorovodInternalError, match="rank 0: allreduce 'a'.*rank 1: allreduce 'b'"):
        for name in "ab" * groups.EVERY if r == 0 else "ba" * groups.EVERY:
            hvd.allreduce(zeros(3), name=name)
    same(hvd.allreduce(t([1.0 + r])), t([1.5]))


def check_one_name_twice(r):
    for kind in (hvd.allreduce_async, hvd.allgather_async, hvd.reducescatter_async, hvd.alltoall_async, hvd.allreduce_async_):
        handle = kind(t([1.0, 2.0]), name="twice")
        with pytest.raises(ValueError, match="'twice' was started before and is not synchronized yet"):
            kind(t([1.0, 2.0]), name="twice")
        hvd.synchronize(handle)
        hvd.synchronize(kind(t([1.0, 2.0]), name="twice"))
    handles = [hvd.allreduce_async(t([1.0]), name="many"), hvd.allgather_async(t([1.0]), name="many")]  # of different kinds
    assert [hvd.synchronize(handle).numel() for handle in handles] == [1, 2]


def check_one_comparison(r, monkeypatch):
    """New collectives cost one exchange, and known ones none; allgather and alltoall exchange sizes every time."""
    compared = []
    exchange = groups.Groups._gathered
    monkeypatch.setattr(groups.Groups, "_gathered", lambda self, *a: compared.append(a) or exchange(self, *a))
    monkeypatch.setattr(groups, "EVERY", 10**9)
    for count, call in [
        (1, lambda: hvd.allreduce(zeros(11))),
        (0, lambda: hvd.allreduce(zeros(11))),
        (0, lambda: hvd.synchronize(hvd.allreduce_async(zeros(11)))),
        (1, lambda: hvd.allreduce(zeros(11, 1))),
        (1, lambda: hvd.grouped_allreduce([zeros(11), zeros(1)])),
        (0, lambda: hvd.grouped_allreduce([zeros(11), zeros(1)])),
        (1, lambda: hvd.broadcast(zeros(11), 0)),
        (0, lambda: hvd.broadcast(zeros(11), 0)),
        (1, lambda: hvd.broadcast(zeros(11), 1)),
        (1, lambda: hvd.reducescatter(zeros(11))),
        (0, lambda: hvd.reducescatter(zeros(11))),
        (1, lambda: hvd.allgather(zeros(11))),
        (1, lambda: hvd.allgather(zeros(11))),
        (1, lambda: hvd.alltoall(zeros(12))),
        (0, lambda: hvd.alltoall(zeros(12))),
    ]:
        compared.clear()
        call()
        assert len(compared) == count, (count, compared)


def check_starting_never_waits(r):
    hvd.barrier()
    if r == 1:
        time.sleep(0.6)
    began = time.monotonic()
    handles = [kind(zeros(2, 2), name="early") for kind in (hvd.allreduce_async, hvd.allgather_async, hvd.alltoall_async)]
    assert time.monotonic() - began < 0.3
    assert r == 1 or not hvd.poll(handles[0])
    for handle in handles if r == 0 else handles[::-1]:  # waiting in another order is no harm
        hvd.synchronize(handle)
    for _ in range(20):
        handles = [hvd.allgather_async(t([r, i]), name=f"{i}") for i in range(5)]
        order = list(itertools.permutations(range(5)))[17 + 31 * r]
        for i in order:
            while r == 0 and not hvd.poll(handles[i]):
                time.sleep(0)
            same(hvd.synchronize(handles[i]), t([0, i, 1, i]))


def check_collectives_of_the_user(r):
    """The script's own collectives over torch.distributed, in whatever order, do not pair with those of hvd.*"""
    for kind in (hvd.allreduce_async, hvd.allgather_async):
        handle = kind(t([1.0 + r])) if r == 0 else None
        own = t([10.0 + r])
        dist.all_reduce(own)
        handle = handle or kind(t([1.0 + r]))
        same(own, t([21.0]))
        same(hvd.synchronize(handle), t([1.5]) if kind is hvd.allreduce_async else t([1.0, 2.0]))


class Extra(torch.nn.Module):
    """A module with an extra state, and with a buffer of every kind."""

    def __init__(self, r, extra):
        super().__init__()
        self.extra = extra
        self.register_buffer("expanded", t([[1.0 + r]]).expand(3, 4))
        self.register_buffer("strided", (torch.arange(8.0) + r)[::2])
        self.register_buffer("transposed", (torch.arange(6.0) + r).reshape(2, 3).t())
        self.register_buffer("sparse", torch.sparse_coo_tensor([[r, 2]], [3.0 + r, 9.0], (4,), check_invariants=True))

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def check_buffers_of_every_kind(r):
    for extra in ({"step": 3}, t([1, 2]), None):
        for root in (0, 1):
            model, want = Extra(r, extra), Extra(root, extra)
            hvd.broadcast_parameters(model.state_dict(), root_rank=root)
            for got, wanted in zip(model.buffers(), want.buffers(), strict=True):
                same(got.to_dense(), wanted.to_dense())
    for extra in ({"step": r}, t([1 + r])):
        model = Extra(r, extra)
        with pytest.raises(ValueError, match="'_extra_state' is an object.*broadcast_object"):
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        same(model.strided, (torch.arange(8.0) + r)[::2])
    sparse = torch.sparse_coo_tensor([list(range(1 + r))], [1.0] * (1 + r), (4,), check_invariants=True)
    with pytest.raises(hvd.HorovodInternalError, match=r"indices.* int64\[1, 1\].* int64\[1, 2\]"):
        hvd.broadcast_parameters([("sparse", sparse)], root_rank=0)
    with pytest.raises(ValueError, match="'lazy' is a lazy parameter"):
        hvd.broadcast_parameters([("lazy", torch.nn.LazyLinear(3).weight)], root_rank=0)
    with pytest.raises(ValueError, match=["cannot be pickled here", "not equal on all ranks"][r]):
        hvd.broadcast_parameters([("x", Unpicklable(r))], root_rank=0)


class Unpicklable:
    """An object that rank 0 cannot pickle."""

    def __init__(self, r):
        self.r = r

    def __reduce__(self):
        if self.r == 0:
            raise ValueError("cannot be pickled here")
        return Unpicklable, (1,)


def check_scheduler_stays_attached(r):
    p = torch.nn.Parameter(t([1.0]))
    optimizer = torch.optim.SGD([p], lr=0.1 * (1 + r))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    groups_before, group, state = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups is groups_before and optimizer.param_groups[0] is group and optimizer.state is state
    optimizer.step()
    scheduler.step()
    assert hvd.allgather_object((group["lr"], optimizer.param_groups[0]["lr"])) == [(0.05, 0.05)] * 2


def check_join(r):
    """The rank that calls join() and those that wait for it get the reason; if all call it, all can go on."""
    for both in (False, True, False):
        began = time.monotonic()
        if r == 0 or both:
            with pytest.raises(UnsupportedError, match="hvd.join.* cannot take part with zeros; give every rank equally many batches"):
                hvd.join()
        else:
            with pytest.raises(hvd.HorovodInternalError, match="Rank 0 has called hvd.join.*give every rank equally many batches"):
                hvd.allreduce(t([1.0]))
        same(hvd.allreduce(t([1.0 + r])), t([1.5]))
        hvd.barrier()
        assert time.monotonic() - began < 10


def check_process_sets_differ(r):
    with pytest.raises(hvd.HorovodInternalError, match=r"rank 0: add_process_set .*\(0,\).*rank 1: add_process_set .*\(1,\)"):
        hvd.add_process_set([r])
    same(hvd.allreduce(t([1.0 + r])), t([1.5]))
