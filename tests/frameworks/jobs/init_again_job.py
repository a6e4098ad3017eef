"""Trains, drops the optimizer, shuts hvd down, and does so again in the same processes."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import grace_ext.frameworks.torch as hvd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import training  # noqa: E402

for turn in range(3):
    hvd.init()
    for _ in range(2):
        weights, _ = training.train(hvd, "topk(ratio=0.1) + residual")
        gc.collect()
    everyone = hvd.allgather_object({name: w.tobytes() for name, w in weights.items()})
    assert all(other == everyone[0] for other in everyone)
    if hvd.rank() == 0:
        print(f"TURN {turn} ok", flush=True)
    hvd.shutdown()
