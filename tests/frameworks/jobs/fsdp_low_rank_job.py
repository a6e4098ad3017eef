"""Cases of `fsdp_hook(..., share_low_rank=True)`: the shards of a matrix share PowerSGD's Q. On 4 ranks under torchrun."""

from __future__ import annotations

import fsdp_setup
import torch
from fsdp_dcp_job import checkpoint_of, load, on_mesh, whole_residuals
from fsdp_setup import (
    MESH,
    POWERSGD,
    REPLICA,
    SHARD,
    TOPK,
    assert_equal,
    assert_memory,
    assert_replicas_equal,
    hooked,
    hvd,
    in_clusters,
    local_of,
    make_model,
    memory_of,
    raises,
    run_cases,
    sgd,
    shard_of,
    sharded,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from grace_ext.errors import CheckpointError, DisagreementError, GraceError, ParameterError, UnsupportedError

PLUS = "powersgd_plus(rank=2, refresh_period=4) + residual"
BY_SIZE = f"by_size(min_elements=600, small=none, large={POWERSGD})"
WARMUP = f"warmup(steps=3, then={POWERSGD})"


def loss_of(model, rank, step):
    """Returns the loss of this rank on the same data at every step. (On other data at each step roundings grow faster.)"""
    return fsdp_setup.loss_of(model, rank, 0)


def shared(g=POWERSGD, **options):
    return hooked(g, share_low_rank=True, **options)


def train(model, optimizer, steps, **options):
    fsdp_setup.train(model, optimizer, steps, loss=loss_of, **options)


def in_whole(g, steps, **options):
    """Trains with a LocalCluster of the replicas' whole matrices. Returns the weights, and the bytes of each replica."""
    weights, wire_bytes = in_clusters(g, steps, shards=1, loss=loss_of, **options)
    return weights, wire_bytes[0]


def case_equals_whole_matrices():
    """20 steps give the weights of whole matrices, and a replica sends their bytes: r (a + b) floats per matrix, and not r (a + S b)."""
    for g in (POWERSGD, "powersgd(rank=3, feedback='mean') + residual", PLUS, BY_SIZE, WARMUP):
        model, optimizer, state = shared(g)
        train(model, optimizer, range(20))
        expected, wire_bytes = in_whole(g, range(20))
        assert_equal(model, expected, 1e-5)
        assert_replicas_equal(model)
        driver = state._made.driver
        rows = {name for name, spec in driver.specs.items() if spec.rows}
        assert rows == ({"2.weight"} if g == BY_SIZE else {"0.weight", "2.weight"}), rows
        # Each sum of a bucket has one float more, which says whether all gradients are finite. LocalCluster has one bucket.
        marks = sum(4 * (2 if bucket.specs[0].rows else 1) for bucket in driver.buckets)
        sent = hvd.allgather_object((REPLICA, state.wire_bytes - marks))
        assert sum(nbytes for replica, nbytes in sent if replica == REPLICA) == wire_bytes[REPLICA] - 8, (g, sent, wire_bytes)


def case_less_than_without():
    """Without the option each shard sends a Q of its own, and small vectors go as before."""
    sent, vectors = [], []
    for options in ({}, {"share_low_rank": True}):
        model, optimizer, state = hooked(POWERSGD, **options)
        train(model, optimizer, range(1))
        sent.append(sum(hvd.allgather_object(state.wire_bytes)) / 2)
        vectors.append([local_of(p.grad).tolist() for name, p in model.named_parameters() if p.ndim == 1 or name == "4.weight"])
    assert vectors[0] == vectors[1]
    # Q of 0.weight has 2 x 16 floats, of 2.weight 2 x 32. With the option there are two buckets, so three sums per shard and not two.
    assert sent[0] - sent[1] == 4 * (2 * 16 + 2 * 32) - 2 * 4, sent


def case_other_leaves_of_a_policy():
    """What goes through topk is not shared, and goes as it does without the option."""
    g = f"by_name(default='{POWERSGD}', patterns={{'2.*': '{TOPK}'}})"
    grads = []
    for options in ({}, {"share_low_rank": True}):
        model, optimizer, state = hooked(g, **options)
        train(model, optimizer, range(1))
        grads.append(local_of(model[2].weight.grad).clone())
        assert {name for name, spec in state._made.driver.specs.items() if spec.rows} == ({"0.weight"} if options else set())
    assert torch.equal(*grads)


def case_fewer_rows_than_shards():
    """Of 5 rows four shards have 2, 2, 1 and 0. The last one sends its share of Q, too."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))

    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
    for g in (POWERSGD, PLUS):
        model = sharded(make(), mesh["shard"])
        optimizer = sgd(model)
        state = hvd.fsdp_hook(g, model, mesh["replicate"], optimizer, simulate=True, share_low_rank=True)
        train(model, optimizer, range(20))
        assert state._made.driver.specs["2.weight"].rows.counts == (2, 2, 1, 0)
        assert_equal(model, in_whole(g, range(20), make=make, data=((0, 1, 2, 3),))[0], 1e-5)
        state.load_state_dict(state.state_dict())
        train(model, optimizer, range(1))
        assert len(memory_of(state)["powersgd_q_of_whole/2.weight"]) == 2 * 32


def case_one_shard_is_not_finite():
    """What is not finite on shard 0 of replica 0 alone: no rank commits, and all get NaN for the shared matrices."""
    model, optimizer, state = shared()
    train(model, optimizer, range(2))
    memory, give = memory_of(state), state._give

    def broken(name, parameter):
        if hvd.rank() == 0 and name == "0.weight":
            local_of(parameter.grad)[0, 0] = torch.nan
        give(name, parameter)

    state._give = broken
    loss_of(model, hvd.rank(), 2).backward()
    state._give = give
    assert_memory(state, memory)
    assert not state._made.driver.committed
    assert all(bool(torch.isnan(local_of(model[i].weight.grad)).all()) for i in (0, 2))
    train(model, optimizer, range(2, 20))  # the ranks still agree
    assert state._made.driver.committed
    assert_equal(model, in_whole(POWERSGD, range(20))[0], 1e-5)


def case_loss_scaling():
    """If the gradient of one rank is not finite, all ranks skip the step."""
    model = sharded(make_model())
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    state = hvd.fsdp_hook(POWERSGD, model, MESH["replicate"], optimizer, scaler, share_low_rank=True)
    for step in range(7):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, hvd.rank(), step) * (torch.inf if step == 3 and hvd.rank() == 3 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0 and state._made.driver.committed
    assert_equal(model, in_whole(POWERSGD, range(6))[0], 1e-5)


def case_metrics():
    """Metrics count what goes between replicas, as wire_bytes does, and ranks can be compared."""
    model, optimizer, state = shared()
    state.measure(every=1)
    train(model, optimizer, range(3))
    report = state.metrics()
    assert report["total"]["bytes"] == state.wire_bytes and report["total"]["residual_norm"] > 0
    assert report["parameters"]["2.weight"]["bytes"] == 4 * 2 * ((17 if SHARD == 0 else 16) + 32 // 2)
    hvd.check_agreement(state, model)


def case_resume():
    """A state resumes bit for bit, and only with the same setting."""
    first = shared(revocable=True)
    train(*first[:2], range(3))
    saved, weights = first[2].state_dict(), {key: value.clone() for key, value in first[0].state_dict().items()}
    train(*first[:2], range(3, 6))
    again = shared()
    again[0].load_state_dict(weights)
    again[2].load_state_dict(saved)
    train(*again[:2], range(3, 6))
    assert_equal(again[0], whole(first[0]))
    first[2].undo()
    raises(GraceError, "saved with share_low_rank=True", lambda: hooked(POWERSGD)[2].load_state_dict(saved))
    apart = hooked(POWERSGD)
    train(*apart[:2], range(2))
    raises(GraceError, "saved without share_low_rank=True", lambda: shared()[2].load_state_dict(apart[2].state_dict()))


def case_checkpoints_of_other_meshes():
    """Q of whole matrices goes on on every mesh; what was not sent is where its element is now."""
    first = shared()
    train(*first[:2], range(4))
    with checkpoint_of(*first) as folder:
        by_replica, saved = whole_residuals(first[2]), memory_of(first[2])
        for jobs, replicas, shards in ((1, 1, 4), (1, 4, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2)):
            model, optimizer, state, mesh = on_mesh(POWERSGD, jobs, replicas, shards, share_low_rank=True)
            load(folder, model, optimizer, state, ranks=2, shards=2)
            now = memory_of(state)
            for name, parameter in model.named_parameters():
                own = [shard_of(residuals[name].view(parameter.shape), hvd.rank() % shards, shards, 0) for residuals in by_replica]
                expected = own[mesh.get_local_rank()] if replicas == 2 else (own[0] + own[1]) / 2
                got = now.get(f"residual/{name}", torch.zeros(0))
                assert torch.allclose(got, expected.flatten(), rtol=0, atol=0 if replicas == 2 else 1e-7), (replicas, shards, name)
            for name in ("0.weight", "2.weight"):
                assert torch.equal(now[f"powersgd_q_of_whole/{name}"], saved[f"powersgd_q_of_whole/{name}"])
            train(model, optimizer, range(4, 6))
            assert state._made.driver.committed
            if replicas == 2 and jobs == 1:
                assert_equal(model, in_whole(POWERSGD, range(6))[0], 1e-5)


def case_checkpoints_of_the_other_setting():
    """What was not sent is kept, and Q starts anew; without saying `shards` it is an error."""
    for before, after in ((False, True), (True, False)):
        first = hooked(POWERSGD, share_low_rank=before)
        train(*first[:2], range(4))
        with checkpoint_of(*first) as folder:
            memory = memory_of(first[2])
            model, optimizer, state = hooked(POWERSGD, share_low_rank=after)
            text = "hvd.DistributedState(state, shards=...)"
            raises(CheckpointError, text, lambda: load(folder, model, optimizer, state))  # noqa: B023
            load(folder, model, optimizer, state, ranks=2, shards=2)
            now = memory_of(state)
            assert all(torch.equal(now[key], memory[key]) for key in memory if key.startswith("residual"))
            train(model, optimizer, range(4, 6))
            assert state._made.driver.committed


# --- errors -------------------------------------------------------------------------------------------------------------
def case_what_cannot_share_low_rank():
    model, mesh = sharded(make_model()), MESH["replicate"]
    for g, kind, text in (
        ("lqsgd(rank=2) + residual", ParameterError, "powersgd and powersgd_plus"),
        (TOPK, ParameterError, "leave share_low_rank out"),
        (f"by_size(min_elements=600, small=lqsgd(rank=2) + residual, large={POWERSGD})", UnsupportedError, "'0.weight'"),
        ("lgreco(base=powersgd(rank=2) + residual, every=3, window=2)", UnsupportedError, "goes by name, size or step"),
    ):
        raises(kind, text, lambda: hvd.fsdp_hook(g, model, mesh, share_low_rank=True))  # noqa: B023
    columns = sharded(make_model(), shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % 2 == 0 else Shard(0))
    raises(UnsupportedError, "no shard_placement_fn", lambda: hvd.fsdp_hook(POWERSGD, columns, mesh, share_low_rank=True))
    wide = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    cut = sharded(parallelize_module(make_model(), wide["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()}), wide["shard"])
    raises(UnsupportedError, "no tensor parallelism", lambda: hvd.fsdp_hook(POWERSGD, cut, wide["replicate"], share_low_rank=True))


def case_ranks_that_do_not_all_share():
    """Ranks whose settings differ get an error, whether they are replicas of a shard or shards of a replica."""
    model, optimizer, _ = hooked(POWERSGD, share_low_rank=REPLICA == 0)
    raises(DisagreementError, "rank 1 has other parameters than rank 0", lambda: train(model, optimizer, range(1)))
    model, optimizer, _ = hooked(POWERSGD, share_low_rank=SHARD == 0)
    raises(GraceError, "same model, spec and share_low_rank", lambda: train(model, optimizer, range(1)))


if __name__ == "__main__":
    run_cases(hvd, dict(globals()))
    hvd.shutdown()
