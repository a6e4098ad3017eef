"""Runs every check of one mode on several ranks, for test_dist_api.py, and prints `passed MODE`.  dist_api_job.py MODE"""

import atexit
import inspect
import os
import sys
import time

import dist_api_collectives
import dist_api_differences
import pytest
import torch
import torch.distributed as dist
from dist_api_collectives import close, gradient_of, same, t

import grace_ext.frameworks.torch.dist.api as hvd
from grace_ext.errors import UnsupportedError


def report(mode):
    sys.stdout.write(f"passed {mode}\n")  # in one write, because the ranks share a pipe
    sys.stdout.flush()


def check_ranks(r):
    assert hvd.is_initialized() and hvd.rank() == int(os.environ["RANK"]) and hvd.size() == 2
    assert (hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()) == (r, 2, 0, 1)
    assert hvd.global_process_set.ranks == [0, 1]
    assert (hvd.global_process_set.size(), hvd.global_process_set.rank(), hvd.global_process_set.included()) == (2, r, True)
    assert hvd.gloo_enabled() and not hvd.mpi_enabled()
    hvd.init()  # a second init changes nothing
    assert hvd.size() == 2


def check_objects(r):
    assert hvd.broadcast_object({"r": r, "t": t([r])}, root_rank=1) == {"r": 1, "t": t([1])}
    assert hvd.allgather_object("x" * (1 + 5 * r)) == ["x", "xxxxxx"]
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    for give in (model.state_dict(), list(model.named_parameters()), list(model.parameters())):
        for p in model.parameters():
            p.data.fill_(3.0 + r)
        hvd.broadcast_parameters(give, root_rank=1)
        assert all((p == 4.0).all() for p in model.parameters())
    with pytest.raises(ValueError, match="dict or a list"):
        hvd.broadcast_parameters(model.parameters(), root_rank=0)


class Keeping(torch.optim.SGD):
    """An optimizer that adds its own entry to its state_dict."""

    mine = None

    def state_dict(self):
        return {**super().state_dict(), "grace_ext": self.mine}

    def load_state_dict(self, state_dict):
        self.mine = state_dict["grace_ext"]
        super().load_state_dict(state_dict)


def check_optimizer_state(r):
    for kind, root, with_state in [(Keeping, 0, [0]), (Keeping, 0, [1]), (Keeping, 1, []), (Keeping, 1, [0, 1])]:
        p = torch.nn.Parameter(t([1.0]))
        optimizer = kind([p], lr=0.5 + r, momentum=0.9)
        optimizer.mine = f"rank {r}"
        if r in with_state:
            p.grad = t([2.0 + r])
            optimizer.step()
        before = p.item()
        hvd.broadcast_optimizer_state(optimizer, root_rank=root)
        assert p.item() == before and optimizer.mine == f"rank {r}"
        assert optimizer.param_groups[0]["lr"] == 0.5 + root and optimizer.param_groups[0]["params"][0] is p
        if root in with_state:
            same(optimizer.state[p]["momentum_buffer"], t([2.0 + root]))
        else:
            assert not optimizer.state.get(p)
    p = torch.nn.Parameter(t([1.0]))
    adam = torch.optim.Adam([p])
    if r == 0:
        p.grad = t([1.0])
        adam.step()
    hvd.broadcast_optimizer_state(adam, 0)
    assert adam.state[p]["step"] == 1
    close(adam.state[p]["exp_avg"], t([0.1]))


def check_batch_norm(r):
    """Synchronized batch normalization equals ordinary batch normalization of both ranks' joint batch, gradients included."""
    torch.manual_seed(0)
    whole, weight = torch.randn(5, 3, 4).double() * 2 + 3, torch.randn(5, 3, 4).double()
    mine = slice(0, 2) if r == 0 else slice(2, 5)
    for momentum in (0.1, None):
        expected, synced = (kind(3, momentum=momentum).double() for kind in (torch.nn.BatchNorm1d, hvd.SyncBatchNorm))
        a, b = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
        for _ in range(2):
            a.grad = b.grad = None
            y, z = expected(a), synced(b)
            (y * weight).sum().backward()
            (z * weight[mine]).sum().backward()
        close(z, y[mine])
        close(b.grad, a.grad[mine])
        close(synced.running_mean, expected.running_mean)
        close(synced.running_var, expected.running_var)
        assert synced.num_batches_tracked == 2
        close(synced.eval()(whole), expected.eval()(whole))
        for got, want in zip(synced.parameters(), expected.parameters(), strict=True):
            close(hvd.allreduce(got.grad, op=hvd.Sum), want.grad)
    with pytest.raises(ValueError, match="1-dimensional"):
        synced(torch.zeros(3))
    stateless = hvd.SyncBatchNorm(3, affine=False, track_running_stats=False).eval()
    half = whole.half()
    want = torch.nn.functional.batch_norm(half.float(), None, None, training=True)[mine].half()
    torch.testing.assert_close(stateless(half[mine]), want, atol=2e-3, rtol=2e-3)
    far = whole.float() + 1000  # here E[x^2] - E[x]^2 would be wrong by percents
    want = torch.nn.functional.batch_norm(far.double(), None, None, training=True)[mine].float()
    torch.testing.assert_close(stateless(far[mine]), want, atol=1e-3, rtol=0)


def check_refusals(r):
    for call in (
        lambda: hvd.allreduce(t([1.0]), op=hvd.Adasum),
        lambda: hvd.reducescatter(t([1.0]), op=hvd.Adasum),
        lambda: hvd.join(),
        lambda: hvd.elastic.run,
        lambda: hvd.start_timeline("f.json"),
        lambda: hvd.stop_timeline(),
    ):
        with pytest.raises(UnsupportedError, match="not available over torch.distributed.*launch with horovodrun"):
            call()
    with pytest.raises(ValueError, match="op is 77"):
        hvd.allreduce(t([1.0]), op=77)


def check_process_sets(r):
    alone = hvd.add_process_set([0])
    assert (alone.process_set_id, alone.ranks, alone.size(), alone.included()) == (1, [0], 1, r == 0)
    if r == 0:
        assert alone.rank() == 0
        same(hvd.allreduce(t([4.0]), process_set=alone), t([4.0]))
        hvd.barrier(alone)
    else:
        with pytest.raises(ValueError, match="rank 1 is not part"):
            hvd.allreduce(t([4.0]), process_set=alone)
    for ranks in ([0], [0, 1], [5], [1, 1]):
        with pytest.raises(ValueError, match="ProcessSet"):
            hvd.add_process_set(ranks)
    assert hvd.remove_process_set(alone) and not hvd.remove_process_set(alone)
    assert alone.size() is None and not hvd.remove_process_set(hvd.global_process_set)
    with pytest.raises(ValueError, match="not registered"):
        hvd.allreduce(t([4.0]), process_set=alone)


def check_restart_and_failure(r):
    for _ in range(3):
        hvd.shutdown()
        assert not hvd.is_initialized()
        with pytest.raises(ValueError, match="hvd.init()"):
            hvd.rank()
        hvd.init()
        same(hvd.allreduce(t([1.0 + r])), t([1.5]))
    hvd.barrier()
    if r == 1:
        time.sleep(0.3)  # so that rank 0 already waits in its allreduce
        report("two")
        os._exit(0)  # this peer dies
    with pytest.raises(hvd.HorovodInternalError):
        for _ in range(100):
            hvd.allreduce(t([1.0]))


def two():
    """Runs all checks on two ranks of torchrun."""
    hvd.init()
    r = hvd.rank()
    checks = {**vars(dist_api_collectives), **globals()}  # the last check ends rank 1
    for check in [value for name, value in checks.items() if name.startswith("check_")]:
        check(r)


def differences():
    """Runs all checks of what two ranks do differently."""
    hvd.init()
    for check in [value for name, value in vars(dist_api_differences).items() if name.startswith("check_")]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            check(hvd.rank(), *[monkeypatch] * ("monkeypatch" in inspect.signature(check).parameters))


def three():
    """Checks ranks 0 and 1 on one node and 2 on another, as the environment says, and a process set of two of them."""
    node, local = [("0", "0"), ("0", "1"), ("1", "0")][int(os.environ["RANK"])]
    os.environ.update(GROUP_RANK=node, LOCAL_RANK=local)
    pair = hvd.ProcessSet([2, 0])
    hvd.init(process_sets=[pair])
    r = hvd.rank()
    place = hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()
    assert place == [(0, 2, 0, 2), (1, 2, 0, 1), (0, 1, 1, 2)][r]
    assert hvd.size() == 3 and pair.ranks == [0, 2] and pair.size() == 2
    same(hvd.allreduce(t([3 * r + 1.0])), t([4.0]))
    same(hvd.reducescatter(torch.arange(4), op=hvd.Sum), [t([0, 3]), t([6]), t([9])][r])
    if pair.included():
        assert pair.rank() == r // 2
        same(hvd.allreduce(t([r]), process_set=pair), t([1]))
        same(hvd.allgather(t([r]), process_set=pair), t([0, 2]))
        same(hvd.broadcast(t([r]), 2, process_set=pair), t([2]))
        same(hvd.alltoall(t([r, r + 1]), process_set=pair), t([0, 2]) if r == 0 else t([1, 3]))
        same(hvd.reducescatter(t([2, 4, 6]), process_set=pair), t([2, 4]) if r == 0 else t([6]))
        same(gradient_of(lambda x: hvd.allgather(x, process_set=pair), [1.0], t([1.0, 2.0]) * (1 + r)), t([2.0 + r]))
        assert hvd.broadcast_object(r, 2, process_set=pair) == 2
        with pytest.raises(ValueError, match="root_rank 1"):
            hvd.broadcast(t([r]), 1, process_set=pair)
        for problem in ("wait in different collectives", "remove it and add it again"):  # rank 2 waits for a comparison, rank 0 for data
            with pytest.raises(hvd.HorovodInternalError, match=problem):
                hvd.allreduce(t([r]) if r == 0 else t([1.0]), process_set=pair)
    assert hvd.remove_process_set(pair)
    again = hvd.add_process_set([0, 2])
    if again.included():
        same(hvd.allreduce(t([r]), process_set=again), t([1]))
    hvd.barrier()


def existing():
    """Checks that a process group that the script made, without torchrun, is used and survives shutdown()."""
    dist.init_process_group("gloo")
    hvd.init()
    assert (hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_size()) == (2, hvd.rank(), 2, 1)
    same(hvd.allreduce(t([hvd.rank()]), op=hvd.Sum), t([1]))
    hvd.shutdown()
    assert dist.is_initialized()
    dist.barrier()
    dist.destroy_process_group()


def finish(mode):
    assert not dist.is_initialized(), "the process group that hvd.init() made is still there"
    report(mode)


if __name__ == "__main__":
    atexit.register(finish, sys.argv[1])  # registered before hvd.init() registers its handler, so that it runs after that
    globals()[sys.argv[1]]()
