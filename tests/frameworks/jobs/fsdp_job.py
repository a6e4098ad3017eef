"""Cases of training a sharded model with `fsdp_hook`, 2 replicas x 2 shards under torchrun; results are compared with those of clusters."""

from __future__ import annotations

import functools

from fsdp_setup import REPLICA, SHARD, assert_equal, hooked, hvd, in_clusters, run_cases, train, training


def check_spec(g):
    """20 steps give the same bits and send the same bytes as a LocalCluster of the replicas for each shard."""
    model, optimizer, state = hooked(g)
    train(model, optimizer, range(20))
    expected, wire_bytes = in_clusters(g, range(20))
    assert_equal(model, expected)
    bytes_of = wire_bytes[SHARD]
    if "threshold" in g:  # payloads differ in length, and torch.distributed gathers equal lengths, which it first has to know
        bytes_of = [max(bytes_of) + 8] * 2
    assert state.wire_bytes == bytes_of[REPLICA] > 0, (state.wire_bytes, wire_bytes)


for number, spec in enumerate(training.SHARDED_SPECS):
    globals()[f"case_spec_{number}"] = functools.partial(check_spec, spec)

if __name__ == "__main__":
    run_cases(hvd, dict(globals()))
    hvd.shutdown()
