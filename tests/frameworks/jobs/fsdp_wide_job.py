"""Cases of 8 ranks under torchrun: a checkpoint for more replicas, and for fewer; tensor parallelism of sharded layers."""

from __future__ import annotations

import numpy as np
import torch
from fsdp_dcp_job import checkpoint_of, load, on_mesh
from fsdp_setup import POWERSGD, TOPK, assert_equal, hvd, in_clusters, local_of, loss_of, make_model, run_cases, sgd, sharded, train, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

#: The ranks whose data each replica has, by the number of replicas.
DATA = {2: ((0, 1), (2, 3)), 4: ((0, 1), (2, 3), (4, 5), (6, 7))}


# --- checkpoints ----------------------------------------------------------------------------------------------------------
def states_of(state, replicas):
    """Returns the states of the replicas of the first job by shard, as those of a LocalCluster per shard."""
    saved = {key: value for key, value in state.state_dict().items() if key != "shard"}
    every = hvd.allgather_object({**saved, "state": {key: array.numpy() for key, array in saved["state"].items()}})
    return [{"version": 1, "ranks": [every[2 * replica + shard] for replica in range(replicas)]} for shard in range(2)]


def owed(cluster, average):
    """Returns what these replicas still owe to the model, in float64: the mean of their residuals, or of a sum their sum."""
    states = [state["state"] for state in cluster["ranks"]]
    keys = [key for key in states[0] if key.startswith("residual/")]
    return {key: sum(state[key].astype("float64") for state in states) / (len(states) if average else 1) for key in keys}


def moved(g, first, replicas, average, **saved_by):
    """Saves, loads the checkpoint on meshes of this many replicas, and returns what is there now. Asserts that nothing unsent is lost."""
    with checkpoint_of(*first) as folder:
        model, optimizer, state, _ = on_mesh(g, 4 // replicas, replicas, 2, average=average)
        load(folder, model, optimizer, state, **saved_by)
    before, after = states_of(first[2], saved_by["ranks"]), states_of(state, replicas)
    for old, new in zip(before, after, strict=True):
        due, now = owed(old, average), owed(new, average)
        assert set(due) == set(now) and any(value.any() for value in due.values())
        for key, value in due.items():
            assert np.allclose(now[key], value, rtol=1e-6, atol=0), key
            own = (value if average else value / replicas).astype("float32")  # rounded once
            assert all(np.array_equal(rank["state"][key], own) for rank in new["ranks"]), key
        for key in set(old["ranks"][0]["state"]) - set(due):  # PowerSGD's Q
            assert all(np.array_equal(rank["state"][key], old["ranks"][0]["state"][key]) for rank in new["ranks"]), key
    assert_equal(model, whole(first[0]))
    return model, optimizer, state


def check_replicas(g, average=True, **shards):
    """2 x 2 ranks save, 4 x 2 load and train on, and save; then 2 x 2 load again. Two jobs of four ranks do the same, side by side."""
    now = on_mesh(g, 2, 2, 2, average=average)[:3]
    train(*now[:2], range(4), rank=hvd.rank() % 4)
    for step, replicas, old in ((4, 4, 2), (7, 2, 4)):
        now = moved(g, now, replicas, average, ranks=old, **shards)
        weights, start = whole(now[0]), states_of(now[2], replicas)
        train(*now[:2], range(step, step + 3), rank=hvd.rank() % (2 * replicas))
        assert now[2].state_dict()["step"] == step + 3
        if average:

            def loaded(weights=weights):
                model = make_model()
                model.load_state_dict(weights)
                return model

            expected, wire_bytes = in_clusters(g, range(step, step + 3), make=loaded, data=DATA[replicas], start=start)
            assert_equal(now[0], expected, 0 if "topk" in g or replicas == 2 else 1e-5)  # Gloo sums four ranks in another order
            assert now[2].wire_bytes == wire_bytes[hvd.rank() % 2][hvd.rank() // 2 % replicas]


def case_topk_on_other_replicas():
    check_replicas(TOPK, shards=2)


def case_powersgd_on_other_replicas():
    check_replicas(POWERSGD)


def case_a_sum_on_other_replicas():
    check_replicas(TOPK, average=False)


# --- tensor parallelism -----------------------------------------------------------------------------------------------------
CUBE = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))
PLACE = tuple(CUBE[name].get_local_rank() for name in ("replicate", "shard", "tp"))
TP_DIMS = {"0.weight": 0, "0.bias": 0, "2.weight": 1}


def in_parallel(g):
    """Returns a model that is cut over 'tp' and then over 'shard', its optimizer, and the state of its hook."""
    model = parallelize_module(make_model(), CUBE["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model = sharded(model, CUBE["shard"])
    optimizer = sgd(model, foreach=False)
    return model, optimizer, hvd.fsdp_hook(g, model, CUBE["replicate"], optimizer)


def train_in_parallel(model, optimizer, steps):
    train(model, optimizer, steps, rank=2 * PLACE[0] + PLACE[1])  # ranks of 'tp' have the same data


def case_tensor_parallelism():
    """The largest difference allowed is that of another order of additions, which tensor parallelism makes in each forward pass."""
    for g in ("none", TOPK, POWERSGD):
        model, optimizer, state = in_parallel(g)
        train_in_parallel(model, optimizer, range(6))
        expected, wire_bytes = in_clusters(g, data=DATA[2], tp=2, tp_dims=TP_DIMS)
        assert_equal(model, expected, 1e-5)
        assert state.wire_bytes == wire_bytes[2 * PLACE[1] + PLACE[2]][PLACE[0]] > 0


def case_tensor_parallelism_resumes():
    first = in_parallel(TOPK)
    train_in_parallel(*first[:2], range(3))
    with checkpoint_of(*first) as folder:
        again = in_parallel(TOPK)
        load(folder, *again)
    for one in (first, again):
        train_in_parallel(*one[:2], range(3, 6))
    assert_equal(again[0], whole(first[0]))


def case_one_of_a_replicas_ranks_is_not_finite():
    """Of the four ranks of a replica, whose memory is cut along two dimensions, none commits."""
    model, optimizer, state = in_parallel(TOPK)
    train_in_parallel(model, optimizer, range(2))
    give = state._give

    def broken(name, parameter):
        if PLACE == (0, 1, 0) and name == "0.weight":
            local_of(parameter.grad)[0, 0] = torch.nan
        give(name, parameter)

    state._give = broken
    loss_of(model, 2 * PLACE[0] + PLACE[1], 2).backward()
    state._give = give
    assert not state._made.driver.committed
    optimizer.zero_grad()
    train_in_parallel(model, optimizer, range(3, 4))
    assert state._made.driver.committed


if __name__ == "__main__":
    run_cases(hvd, dict(globals()))
    hvd.shutdown()
