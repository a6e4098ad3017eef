"""Runs one rank of soak.py.  soak_rank.py STEPS FILE: rank 0 writes the results of all ranks to FILE."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np

import grace_ext
import grace_ext.frameworks.numpy as gnp
from grace_ext.metrics.advice import allowed_residual

from mpi4py import MPI  # isort: skip

PARTS = {
    "topk": "topk(ratio=0.05) + residual", "signs": "efsignsgd + residual", "onebit": "onebit + residual",
    "lowrank": "powersgd(rank=2) + residual", "threshold": "threshold(threshold=0.05) + residual",
    "shared": "randomk(ratio=0.1) + residual", "levels": "qsgd(bits=4)", "half": "fp16 + residual", "estimate": "topk(ratio=0.1) + ef21",
    "plain": "none",
}  # fmt: skip
SHAPE, LR, EVERY = (48, 40), 0.05, 50


def resident() -> int:
    """Returns the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    steps, file, comm = int(sys.argv[1]), Path(sys.argv[2]), MPI.COMM_WORLD
    warnings.simplefilter("ignore")
    g = grace_ext.grace(policy={"id": "by_name", "patterns": PARTS, "default": "none"})
    # Least squares: each rank has its own optimum, and noise at every step.
    weights = {name: np.zeros(SHAPE, np.float32) for name in PARTS}
    optimum = {name: np.random.default_rng([comm.rank, i]).standard_normal(SHAPE).astype("f") for i, name in enumerate(PARTS)}
    noise = np.random.default_rng([comm.rank, 99])
    largest, worst, memory = dict.fromkeys(PARTS, 0.0), (0.0, ""), []
    with gnp.Exchange(g) as exchange:
        exchange.measure(every=EVERY)
        begin = time.perf_counter()
        for step in range(steps):
            gradients = {n: w - optimum[n] + noise.standard_normal(SHAPE, np.float32) for n, w in weights.items()}
            for name, gradient in gradients.items():
                largest[name] = max(largest[name], float(np.linalg.norm(gradient)))
            for name, mean in exchange.step(gradients, lr=LR).items():
                weights[name] = weights[name] - np.float32(LR) * mean
            if step % EVERY == 0:
                memory.append((step, resident()))
                worst = max([worst, *ratios(exchange, largest)])
        seconds = time.perf_counter() - begin
    warm = [(step, size) for step, size in memory if step >= steps // 10]
    digest = hashlib.blake2b(b"".join(w.tobytes() for w in weights.values())).hexdigest()
    seen = {
        "rank": comm.rank, "steps": steps, "specs": list(PARTS.values()), "first": warm[0][1], "last": memory[-1][1],
        "slope": float(np.polyfit(*zip(*warm, strict=True), 1)[0]), "digest": digest, "worst_ratio": worst[0], "worst": worst[1],
        "finite": all(np.isfinite(w).all() for w in weights.values()), "ms": 1e3 * seconds / steps,
    }  # fmt: skip
    ranks = comm.gather(seen)
    if comm.rank == 0:
        file.write_text(json.dumps(ranks))


def ratios(exchange: gnp.Exchange, largest: dict[str, float]) -> list[tuple[float, str]]:
    """Returns (residual norm / bound, parameter) for each parameter whose compressor is a contraction."""
    found = []
    for name, values in exchange.metrics()["parameters"].items():
        compressor, memory, _ = exchange._driver.parts[name]
        if values["residual_norm"] is not None and compressor.delta(values["dense_bytes"] // 4) not in (None, 1.0):
            allowed = allowed_residual(compressor, memory, values["dense_bytes"] // 4, largest[name], LR)
            found.append((values["residual_norm"] / allowed, name))
    return found


if __name__ == "__main__":
    main()
