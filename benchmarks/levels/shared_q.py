"""Counts what a replica of a sharded Transformer sends with powersgd, each shard a matrix of its own, and with share_low_rank=True.

    python benchmarks/levels/shared_q.py [--shards 2 4 8] [--spec "powersgd(rank=4) + residual"] [--steps 6]

Runs 2 replicas of so many ranks each under torchrun on this machine, and prints the bytes of a replica and step (wire_bytes of all its
shards), what r (a + b) floats per matrix and the dense vectors are, and the median milliseconds of a step of the slowest rank. There is no
network between the ranks, and more ranks than cores, so the milliseconds say only what the sums inside a replica cost. Under 3 minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the checkout
MODEL = {"width": 512, "heads": 8, "layers": 4, "vocabulary": 256, "length": 32}


def run_rank(options: argparse.Namespace) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import grace_ext
    import grace_ext.frameworks.torch as hvd
    from benchmarks.levels.hsdp_rank import Transformer
    from grace_ext.parts.tensor import TensorSpec

    torch.set_num_threads(1)
    hvd.init()
    mesh = init_device_mesh("cpu", (2, hvd.size() // 2), mesh_dim_names=("replicate", "shard"))
    rows = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = Transformer(**MODEL)
        whole = [TensorSpec(name, tuple(p.shape)) for name, p in model.named_parameters()]
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh["shard"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        state = hvd.fsdp_hook(options.spec, model, mesh["replicate"], optimizer, share_low_rank=shared)
        generator, lasted = torch.Generator().manual_seed(hvd.rank()), []
        for _ in range(options.steps):
            tokens = torch.randint(MODEL["vocabulary"], (1, MODEL["length"] + 1), generator=generator)
            begin = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hvd.barrier()
            lasted.append(1000 * (time.perf_counter() - begin))
        every = hvd.allgather_object((mesh["replicate"].get_local_rank(), state.wire_bytes, lasted))
        sent = sum(nbytes for replica, nbytes, _ in every if replica == 0)
        slowest = [max(times) for times in zip(*(ms for *_, ms in every), strict=True)]
        rows.append((sent, statistics.median(slowest[1:])))
    g = grace_ext.grace(options.spec)
    promised = sum(g.nbytes(spec) for spec in whole)
    if hvd.rank() == 0:
        (apart, ms), (together, shared_ms) = rows
        ratio = f"{apart / together:5.2f}"
        print(f"{hvd.size() // 2:6} {apart:14,} {together:14,} {ratio} {promised:14,} {ms:10.0f} {shared_ms:10.0f}", flush=True)
    hvd.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--spec", default="powersgd(rank=4) + residual")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(options)
        return 0
    titles = ("own Q, bytes", "shared, bytes", "ratio", "whole, bytes", "own Q, ms", "shared, ms")
    print("shards " + " ".join(f"{title:>{width}}" for title, width in zip(titles, (14, 14, 5, 14, 10, 10), strict=True)), flush=True)
    for shards in options.shards:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(2 * shards), __file__]
        done = subprocess.run([*command, *sys.argv[1:]], env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
