"""Cases of a sharded model and the memory of `fsdp_hook` in torch.distributed.checkpoint, on 4 ranks under torchrun."""

from __future__ import annotations

import contextlib
import shutil
import tempfile

import torch
import torch.distributed.checkpoint as dcp
from fsdp_setup import (
    POWERSGD,
    REPLICA,
    SHARD,
    TOPK,
    assert_equal,
    assert_memory,
    hooked,
    hvd,
    in_clusters,
    make_model,
    memory_of,
    raises,
    run_cases,
    sgd,
    shard_of,
    sharded,
    train,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from grace_ext.errors import ParameterError, UnsupportedError


@contextlib.contextmanager
def shared_folder():
    """Yields a folder that is the same on all ranks."""
    folder = hvd.broadcast_object(tempfile.mkdtemp() if hvd.rank() == 0 else None)
    try:
        yield folder
    finally:
        hvd.barrier()
        if hvd.rank() == 0:
            shutil.rmtree(folder)


def everything(model, optimizer, state, **options):
    """Returns what a script saves: the model, the optimizer, and the memory of compression."""
    weights, momentum = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": momentum, "grace_ext": hvd.DistributedState(state, **options)}


@contextlib.contextmanager
def checkpoint_of(model, optimizer, state):
    """Yields a folder to which all ranks have saved everything."""
    with shared_folder() as folder:
        dcp.save(everything(model, optimizer, state), checkpoint_id=folder)
        yield folder


def load(folder, model, optimizer, state, **options):
    found = everything(model, optimizer, state, **options)
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])


def case_resume_bit_for_bit():
    for g in (TOPK, POWERSGD, "lgreco(base=powersgd(rank=2) + residual, every=3, window=2)"):
        first = hooked(g)
        train(*first[:2], range(4))
        with checkpoint_of(*first) as folder:
            again = hooked(g)
            load(folder, *again)
            assert_memory(again[2], memory_of(first[2]))
            train(*again[:2], range(4, 8))
            assert_equal(again[0], in_clusters(g, range(8))[0])


def whole_residuals(state) -> list[dict[str, torch.Tensor]]:
    """Returns each replica's residual of the whole parameters, flat, by name."""
    every = hvd.allgather_object((REPLICA, SHARD, memory_of(state)))
    found: list[dict[str, torch.Tensor]] = [{}, {}]
    for name in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"):
        for replica in range(2):
            pieces = [memory.get(f"residual/{name}") for r, _, memory in sorted(every, key=lambda one: one[:2]) if r == replica]
            found[replica][name] = torch.cat([piece for piece in pieces if piece is not None])
    return found


def on_mesh(g, jobs, replicas, shards, **options):
    """Returns a new model, its optimizer, the state of its hook and its replicate mesh, in one of several jobs side by side."""
    mesh = init_device_mesh("cpu", (jobs, replicas, shards), mesh_dim_names=("job", "replicate", "shard"))
    model = sharded(make_model(), mesh["shard"])
    optimizer = sgd(model)
    return model, optimizer, hvd.fsdp_hook(g, model, mesh["replicate"], optimizer, simulate=True, **options), mesh["replicate"]


def case_other_meshes():
    """Saved by 2 replicas x 2 shards, loaded on other meshes: each element's memory is where the element is now. If the number of replicas
    is the same it has the same bits, and else it is the mean."""
    for g, meshes in ((TOPK, ((1, 1, 4), (1, 4, 1), (2, 2, 1), (2, 1, 2))), (POWERSGD, ((1, 1, 4), (2, 2, 1)))):
        first = hooked(g)
        train(*first[:2], range(4))
        with checkpoint_of(*first) as folder:
            by_replica = whole_residuals(first[2])
            for jobs, replicas, shards in meshes:
                model, optimizer, state, mesh = on_mesh(g, jobs, replicas, shards)
                load(folder, model, optimizer, state, ranks=2, shards=2)
                now, shard = memory_of(state), hvd.rank() % shards
                for name, parameter in model.named_parameters():
                    own = [shard_of(residuals[name].view(parameter.shape), shard, shards, 0).flatten() for residuals in by_replica]
                    if not own[0].numel():
                        continue
                    got = now[f"residual/{name}"]
                    if replicas == 2:
                        assert torch.equal(got, own[mesh.get_local_rank()]), (g, jobs, replicas, shards, name)
                    else:
                        assert torch.allclose(got, (own[0] + own[1]) / 2, atol=1e-7), (g, jobs, replicas, shards, name)
                assert state._made.driver.step == 4
                train(model, optimizer, range(4, 6))
                assert state._made.driver.committed


def case_meshes_that_are_not_told():
    first = hooked()
    train(*first[:2], range(2))
    with checkpoint_of(*first) as folder:
        model, optimizer, state, _ = on_mesh(TOPK, 1, 1, 4)
        text = "pass them to DistributedState as shards= and ranks="
        raises(dcp.api.CheckpointException, text, lambda: load(folder, model, optimizer, state, ranks=2))
        raises(ParameterError, "shards must be", lambda: hvd.DistributedState(state, shards=0))
        raises(ParameterError, "state of fsdp_hook", lambda: hvd.DistributedState(hvd.LocalSGD(sgd(make_model()), every=2), shards=2))
        by_size = "by_size(min_elements=100, large=topk(ratio=0.1) + residual)"
        raises(UnsupportedError, "as many shards as saved it", lambda: hvd.DistributedState(hooked(by_size)[2], shards=4))
        scattered = "topk(ratio=0.1) + residual @ reduce_scatter"
        raises(UnsupportedError, "as many shards as saved it", lambda: hvd.DistributedState(hooked(scattered)[2], shards=4))


def case_the_state_itself_is_refused():
    model, optimizer, state = hooked()
    train(model, optimizer, range(2))
    with shared_folder() as folder:
        raises(Exception, "hvd.DistributedState(state)", lambda: dcp.save({"memory": state}, checkpoint_id=folder))


if __name__ == "__main__":
    run_cases(hvd, dict(globals()))
    hvd.shutdown()
