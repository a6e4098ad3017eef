"""Tests Horovod's API over torch.distributed, in jobs of several ranks (checks: jobs/dist_api_*.py), and on one rank in this process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grace_ext.frameworks.torch.dist.api as hvd
from grace_ext.errors import GraceError, UnsupportedError

JOB = Path(__file__).parent / "jobs" / "dist_api_job.py"
ROOT = Path(__file__).parents[2]
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "GROUP_RANK", "HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE")
# the names that horovod/torch/__init__.py of Horovod 0.28.1 imports, except DistributedOptimizer
HOROVOD_NAMES = """
    elastic Compression allgather_object broadcast_object broadcast_optimizer_state broadcast_parameters
    allreduce allreduce_async allreduce_ allreduce_async_
    grouped_allreduce grouped_allreduce_async grouped_allreduce_ grouped_allreduce_async_ sparse_allreduce_async
    allgather allgather_async grouped_allgather grouped_allgather_async broadcast broadcast_async broadcast_ broadcast_async_
    alltoall alltoall_async reducescatter reducescatter_async grouped_reducescatter grouped_reducescatter_async
    join barrier poll synchronize init shutdown is_initialized start_timeline stop_timeline
    size local_size cross_size rank local_rank cross_rank mpi_threads_supported mpi_enabled mpi_built gloo_enabled gloo_built
    nccl_built ddl_built ccl_built cuda_built rocm_built ProcessSet global_process_set add_process_set remove_process_set
    Average Sum Adasum Min Max Product HorovodInternalError SyncBatchNorm
""".split()


def environment(**more):
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **more}


def torchrun(ranks, mode):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*command, JOB, mode], env=environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def by_hand(ranks, mode):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    run = [
        subprocess.Popen(
            [sys.executable, JOB, mode],
            env=environment(**job, RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120) for process in run]
    return max(abs(process.returncode) for process in run), "".join(o for o, _ in outputs), "".join(e for _, e in outputs)


@pytest.mark.parametrize(
    ("launch", "ranks", "mode"), [(torchrun, 2, "two"), (torchrun, 2, "differences"), (by_hand, 3, "three"), (by_hand, 2, "existing")]
)
def test_job(launch, ranks, mode):
    code, out, err = launch(ranks, mode)
    assert code == 0, err[-4000:]
    assert out.count(f"passed {mode}") == ranks
    assert "arning" not in err, err


@pytest.fixture
def alone(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    hvd.init()
    yield
    hvd.shutdown()


def test_every_name_of_horovod_is_there():
    assert len(HOROVOD_NAMES) == len(set(HOROVOD_NAMES)) == 66
    assert set(hvd.__all__) == set(HOROVOD_NAMES)
    assert all(hasattr(hvd, name) for name in HOROVOD_NAMES)


def test_ranks_need_init():
    for name in ("size", "rank", "local_size", "local_rank", "cross_size", "cross_rank"):
        with pytest.raises(ValueError, match=r"hvd\.init\(\)"):
            getattr(hvd, name)()
    with pytest.raises(ValueError, match=r"hvd\.init\(\)"):
        hvd.allreduce(torch.ones(1))
    assert not hvd.is_initialized()
    hvd.shutdown()  # has nothing to do


def test_one_rank(alone):
    assert hvd.is_initialized() and not torch.distributed.is_initialized()
    assert (hvd.size(), hvd.rank(), hvd.local_size(), hvd.local_rank(), hvd.cross_size(), hvd.cross_rank()) == (1, 0, 1, 0, 1, 0)
    hvd.barrier()
    assert hvd.broadcast_object([1]) == [1] and hvd.allgather_object({"a": 1}) == [{"a": 1}]


def test_one_rank_collectives_give_copies(alone):
    x = torch.tensor([[1.0], [2.0]])
    everything = [
        hvd.allreduce(x),
        *hvd.grouped_allreduce([x, x], op=hvd.Sum),
        hvd.allreduce(x, op=hvd.Max),
        hvd.allgather(x),
        hvd.broadcast(x, 0),
        hvd.alltoall(x),
        hvd.reducescatter(x),
        hvd.synchronize(hvd.allgather_async(x)),
        hvd.sparse_allreduce_async(x.to_sparse(), "x", hvd.Average)().to_dense(),
    ]
    for got in everything:
        assert torch.equal(got, x) and got.data_ptr() != x.data_ptr()
    got, received = hvd.alltoall(x, splits=[1])
    assert got.tolist() == [[1.0]] and received.tolist() == [1]
    handle = hvd.allreduce_async(x, prescale_factor=3.0, postscale_factor=2.0)
    assert hvd.poll(handle) and hvd.synchronize(handle).tolist() == [[6.0], [12.0]]
    assert hvd.allreduce_(x) is x and hvd.broadcast_(x, 0) is x and x.tolist() == [[1.0], [2.0]]


def test_one_rank_gradients(alone):
    for f in (hvd.allreduce, hvd.allgather, lambda x: hvd.broadcast(x, 0), hvd.alltoall, hvd.reducescatter):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        (f(x) * torch.tensor([3.0, 4.0])).sum().backward()
        assert x.grad.tolist() == [3.0, 4.0]


def test_one_rank_training(alone):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), hvd.SyncBatchNorm(3))
    optimizer = torch.optim.Adam(model.parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert model[1].num_batches_tracked == 1


def test_one_rank_process_sets(alone):
    with pytest.raises(ValueError, match="already"):
        hvd.add_process_set([0])  # this is the global process set
    with pytest.raises(ValueError, match="list of ranks"):
        hvd.ProcessSet(["0"])
    with pytest.raises(UnsupportedError, match="MPI communicator"):
        hvd.ProcessSet(object())
    loose = hvd.ProcessSet([0])
    assert loose.size() is None and loose.rank() is None and loose.included()
    with pytest.raises(ValueError, match="not registered"):
        hvd.allreduce(torch.ones(1), process_set=loose)


def test_libraries():
    assert not any((hvd.mpi_enabled(), hvd.mpi_built(), hvd.ddl_built(), hvd.ccl_built()))
    assert hvd.gloo_built() and hvd.gloo_enabled()
    assert hvd.cuda_built() == (torch.version.cuda is not None) and not (hvd.cuda_built() and hvd.rocm_built())
    assert isinstance(hvd.nccl_built(), int)
    with pytest.raises(ValueError, match="MPI"):
        hvd.mpi_threads_supported()


def test_refusals_name_a_way_out(alone):
    for use in (hvd.join, hvd.stop_timeline, lambda: hvd.elastic.TorchState, lambda: hvd.start_timeline("x", mark_cycles=True)):
        with pytest.raises(UnsupportedError, match="horovodrun"):
            use()
    with pytest.raises(UnsupportedError, match="Adasum.*horovodrun"):
        hvd.allreduce(torch.ones(1), op=hvd.Adasum)
    assert issubclass(hvd.HorovodInternalError, RuntimeError) and issubclass(hvd.HorovodInternalError, GraceError)


@pytest.mark.parametrize(
    ("env", "error", "match"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, ValueError, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"HOROVOD_SIZE": "2"}, UnsupportedError, "torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, UnsupportedError, "torchrun"),
    ],
)
def test_half_a_job_is_refused(monkeypatch, env, error, match):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=match):
        hvd.init()
    assert not hvd.is_initialized()


def test_some_ranks_only_is_refused(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UnsupportedError, match="ProcessSet"):
        hvd.init(comm=[0, 1])
    assert not hvd.is_initialized()
    hvd.init(comm=[0], process_sets="dynamic")
    hvd.shutdown()
