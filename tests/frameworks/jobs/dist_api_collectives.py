"""Checks of collectives for dist_api_job.py on two ranks; each is called with the number of this rank."""

import warnings

import pytest
import torch

import grace_ext.frameworks.torch.dist.api as hvd

t = torch.tensor


def same(got, want):
    """Asserts equal values, shape and dtype."""
    assert got.dtype == want.dtype and torch.equal(got, want), f"rank {hvd.rank()}: got {got}, want {want}"


def close(got, want):
    torch.testing.assert_close(got, want)


def check_allreduce(r):
    x = t([1.0, 2.0]) + r
    same(hvd.allreduce(x), t([1.5, 2.5]))
    same(hvd.allreduce(x, op=hvd.Sum, name="ignored"), t([3.0, 5.0]))
    same(hvd.allreduce(x, op=hvd.Min), t([1.0, 2.0]))
    same(hvd.allreduce(x, op=hvd.Max), t([2.0, 3.0]))
    same(hvd.allreduce(x, op=hvd.Product), t([2.0, 6.0]))
    same(hvd.allreduce(x, op=hvd.Sum, prescale_factor=2.0, postscale_factor=0.5), t([3.0, 5.0]))
    same(hvd.allreduce(x, prescale_factor=2.0, postscale_factor=10.0), t([30.0, 50.0]))
    same(x, t([1.0, 2.0]) + r)
    same(hvd.allreduce(t(1.0 + r), op=hvd.Sum), t(3.0))
    same(hvd.allreduce((torch.arange(4.0) + r).reshape(2, 2).t(), op=hvd.Sum), t([[1.0, 5.0], [3.0, 7.0]]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same(hvd.allreduce(x, average=False), t([3.0, 5.0]))
    assert [w.category for w in caught] == [DeprecationWarning]
    with pytest.raises(ValueError, match="not both"):
        hvd.allreduce(x, average=True, op=hvd.Sum)


def check_types(r):
    same(hvd.allreduce(t([1, -2, 4]) + t([0, -1, 1]) * r), t([1, -2, 4]))  # means of integers are truncated toward zero
    same(hvd.allreduce(t([1, 2], dtype=torch.int32) + r, op=hvd.Sum, prescale_factor=1.5), t([4, 7], dtype=torch.int32))
    same(hvd.allreduce(t([200, 3], dtype=torch.uint8)), t([200, 3], dtype=torch.uint8))
    same(hvd.allreduce(t([r == 1, False]), op=hvd.Sum), t([True, False]))
    # 2049 is not representable in float16: rounded before scaling, this would give 2048 / 2049
    same(hvd.allreduce(t([2048.0 if r else 1.0]).half(), op=hvd.Sum, postscale_factor=1 / 2049), t([1.0]).half())
    same(hvd.allreduce(t([60000.0]).half()), t([60000.0]).half())  # the sum overflows float16
    same(hvd.allreduce(t([1.0 + r]).bfloat16()), t([1.5]).bfloat16())
    half = hvd.allreduce(t([1.0 + r]), compression=hvd.Compression.fp16)
    same(half, t([1.5]))
    small, context = hvd.Compression.fp16.compress(t([1.0]))
    assert small.dtype == torch.float16 and hvd.Compression.fp16.decompress(small, context).dtype == torch.float32


def check_in_place_and_async(r):
    x = t([1.0, 2.0]) + r
    assert hvd.allreduce_(x) is x
    same(x, t([1.5, 2.5]))
    parameter = torch.nn.Parameter(t([1.0 + r]))
    assert hvd.synchronize(hvd.allreduce_async_(parameter, op=hvd.Sum, prescale_factor=2.0)) is parameter
    same(parameter.data, t([6.0]))
    half = t([1.0 + r]).half()
    assert hvd.allreduce_(half) is half and half.item() == 1.5
    square = (torch.arange(4.0) + r).reshape(2, 2)
    hvd.allreduce_(square.t())  # not contiguous
    same(square, t([[0.5, 1.5], [2.5, 3.5]]))

    y = t([1.0 + r])
    first, second = hvd.allreduce_async(y, name="a"), hvd.allreduce_async(y, op=hvd.Sum)
    same(hvd.synchronize(second), t([3.0]))
    while not hvd.poll(first):
        pass
    same(hvd.synchronize(first), t([1.5]))
    same(y, t([1.0 + r]))
    assert hvd.synchronize(first) is None
    with pytest.raises(ValueError, match="synchronized already"):
        hvd.poll(first)


def check_grouped_allreduce(r):
    a, b = t([1.0 + r]), t([[2, 4]]) * (1 + r)
    one, two = hvd.grouped_allreduce([a, b], op=hvd.Sum)
    same(one, t([3.0]))
    same(two, t([[6, 12]]))
    one, two = hvd.synchronize(hvd.grouped_allreduce_async([a, b]))
    same(one, t([1.5]))
    same(two, t([[3, 6]]))
    same(a, t([1.0 + r]))
    hvd.synchronize(hvd.grouped_allreduce_async_([a, b], op=hvd.Sum))
    same(a, t([3.0]))
    assert hvd.grouped_allreduce_([a, b], op=hvd.Sum)[0] is a
    same(a, t([6.0]))
    same(b, t([[12, 24]]))


def check_sparse(r):
    x = torch.sparse_coo_tensor([[0, 2 - r]], [2.0, 4.0 + r], (4,), check_invariants=True)
    same(hvd.sparse_allreduce_async(x, "x", hvd.Sum)().to_dense(), t([4.0, 5.0, 4.0, 0.0]))
    same(hvd.sparse_allreduce_async(x, "x", hvd.Average)().to_dense(), t([2.0, 2.5, 2.0, 0.0]))


def check_allgather(r):
    for dtype in (torch.uint8, torch.int64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.complex64):
        mine = torch.ones(1 + 2 * r, 2).mul(r).to(dtype)
        same(hvd.allgather(mine), t([[0, 0], [1, 1], [1, 1], [1, 1]]).to(dtype))
    same(hvd.allgather(torch.arange(3 * r)), t([0, 1, 2]))
    same(hvd.allgather(torch.empty(0, 2)), torch.empty(0, 2))
    same(hvd.allgather(torch.empty(1 + r, 0)), torch.empty(3, 0))
    same(hvd.allgather(torch.arange(4).reshape(2, 2).t() + r), t([[0, 2], [1, 3], [1, 3], [2, 4]]))
    same(hvd.synchronize(hvd.allgather_async(t([r]))), t([0, 1]))
    a, b = hvd.grouped_allgather([t([r]), t([0.5] * (r + 1))])
    same(a, t([0, 1]))
    same(b, t([0.5, 0.5, 0.5]))
    a, b = hvd.synchronize(hvd.grouped_allgather_async([t([r]), t([7] * r, dtype=torch.int64)]))
    same(b, t([7]))
    with pytest.raises(ValueError, match="unsqueeze"):
        hvd.allgather(t(1.0))
    with pytest.raises(hvd.HorovodInternalError, match=r"float32\[\*, 2\].*float32\[\*, 3\].*first dimension may differ"):
        hvd.allgather(torch.zeros(1, 2 + r))


def check_broadcast(r):
    x = t([1.0, 2.0]) + r
    same(hvd.broadcast(x, 1), t([2.0, 3.0]))
    same(x, t([1.0, 2.0]) + r)
    same(hvd.synchronize(hvd.broadcast_async(x, root_rank=0)), t([1.0, 2.0]))
    same(hvd.broadcast(t(r == 1), 1), t(True))
    assert hvd.broadcast_(x, 0) is x
    same(x, t([1.0, 2.0]))
    strided = (torch.arange(4) + r).reshape(2, 2)
    hvd.synchronize(hvd.broadcast_async_(strided.t(), 0))
    same(strided, t([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match="root_rank 2"):
        hvd.broadcast(x, 2)


def check_alltoall(r):
    same(hvd.alltoall(t([0, 1, 2, 3]) + 10 * r), t([[0, 1, 10, 11], [2, 3, 12, 13]][r]))
    got, received = hvd.alltoall(torch.arange(3, dtype=torch.uint8) + 10 * r, splits=t([1, 2] if r == 0 else [3, 0]))
    same(got, t([[0, 10, 11, 12], [1, 2]][r], dtype=torch.uint8))
    same(received, t([[1, 3], [2, 0]][r]))
    got, received = hvd.synchronize(hvd.alltoall_async(torch.full((2, 2), r), splits=[0, 1]))
    same(got, torch.empty(0, 2, dtype=torch.int64) if r == 0 else t([[0, 0], [1, 1]]))
    same(received, t([[0, 0], [1, 1]][r], dtype=torch.int32))
    for splits in ([1], [2, 2], [-1, 1]):
        with pytest.raises(ValueError, match="splits"):
            hvd.alltoall(torch.zeros(3), splits=splits)
    with pytest.raises(ValueError, match="without splits"):
        hvd.alltoall(torch.zeros(3))


def check_reducescatter(r):
    x = torch.arange(6.0).reshape(3, 2) + r
    same(hvd.reducescatter(x, op=hvd.Sum), t([[1.0, 3.0], [5.0, 7.0]]) if r == 0 else t([[9.0, 11.0]]))
    same(hvd.reducescatter(x), t([[0.5, 1.5], [2.5, 3.5]]) if r == 0 else t([[4.5, 5.5]]))
    same(x, torch.arange(6.0).reshape(3, 2) + r)
    want = t([2, 4]) if r == 0 else t([6])
    same(hvd.synchronize(hvd.reducescatter_async(t([1, 2, 3]), op=hvd.Sum)), want)
    same(hvd.reducescatter(t([1, 2, 3]), op=hvd.Average, prescale_factor=2.0), want)
    a, b = hvd.grouped_reducescatter([t([1, 2, 3]), t([1.0, 1.0])], op=hvd.Sum, compression=hvd.Compression.fp16)
    same(a, want)
    same(b, t([2.0]))
    a, b = hvd.synchronize(hvd.grouped_reducescatter_async([t([2, 4, 6]), t([1.0, 1.0])]))
    same(a, want)
    with pytest.raises(ValueError, match="Average and hvd.Sum"):
        hvd.reducescatter(x, op=hvd.Max)


def gradient_of(function, start, weight):
    x = t(start, requires_grad=True)
    (function(x) * weight).sum().backward()
    return x.grad


def check_gradients(r):
    """Gradients are as in Horovod 0.28: that of a reduction is reduced in the same way; that of a pure movement of data is averaged."""
    w = 1.0 + 2 * r  # 1 on rank 0, 3 on rank 1
    same(gradient_of(lambda x: hvd.allreduce(x), [1.0, 2.0], w), t([2.0, 2.0]))
    same(gradient_of(lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=2.0), [1.0], w), t([8.0]))
    same(gradient_of(lambda x: hvd.allreduce(x, compression=hvd.Compression.fp16), [1.0], w), t([2.0]))
    same(gradient_of(lambda x: torch.cat(hvd.grouped_allreduce([x, x * 2], op=hvd.Sum)), [1.0], w), t([12.0]))
    rows = t([1.0, 2.0, 3.0]) * w  # the average over ranks is 2, 4, 6
    same(gradient_of(hvd.allgather, [5.0] * (1 + r), rows), t([2.0] if r == 0 else [4.0, 6.0]))
    same(gradient_of(lambda x: hvd.grouped_allgather([x])[0], [5.0] * (1 + r), rows), t([2.0] if r == 0 else [4.0, 6.0]))
    same(gradient_of(lambda x: hvd.broadcast(x, 1), [1.0], w), t([2.0 * r]))
    swapped = gradient_of(hvd.alltoall, [1.0, 2.0], t([10.0, 20.0]) + r)
    same(swapped, t([10.0, 11.0] if r == 0 else [20.0, 21.0]))
    part = gradient_of(lambda x: hvd.alltoall(x, splits=[1, 1])[0], [1.0, 2.0, 9.0], t([10.0, 20.0]) + r)
    same(part, t([10.0, 11.0, 0.0] if r == 0 else [20.0, 21.0, 0.0]))
    same(gradient_of(hvd.reducescatter, [1.0, 2.0], w), t([1.0, 3.0]))
    same(gradient_of(lambda x: hvd.reducescatter(x, op=hvd.Sum, postscale_factor=2.0), [1.0, 2.0], w), t([4.0, 12.0]))
    for move, first_wanted, second_wanted in [
        (lambda x: hvd.allreduce(x, op=hvd.Sum), 24.0, 8.0),  # derivative by x of the sum over ranks of (x0 + x1) ** 2
        (lambda x: hvd.alltoall(hvd.allgather(x)).sum() / 2, 3.0, 0.5),
        (lambda x: hvd.broadcast(x, 1), 6.0 * r, 1.0 * r),
    ]:
        x = t([3.0], requires_grad=True)
        (first,) = torch.autograd.grad(move(x) ** 2, x, create_graph=True)
        same(first.detach(), t([first_wanted]))
        first.backward()
        same(x.grad, t([second_wanted]))
