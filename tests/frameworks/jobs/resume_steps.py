"""Code that the resume jobs share.  <job>.py {first|second} FOLDER KIND...

For each kind, `first` trains 10 steps; then it trains a new object for 5 steps and saves it to FOLDER/<kind>. `second` loads that, saves
it at once to FOLDER/<kind>.loaded.<size>, and trains to step 10. Both write FOLDER/<what>-<rank>-of-<size>.json, with the digest of this
rank's final model by kind.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
import grace_ext  # noqa: E402

STEPS, AT = 10, 5
#: Parts with different kinds of state: a residual, a shared Q, an estimate with its mean, shards of a residual, and a policy.
SPECS = {
    "topk": "topk(ratio=0.05) + residual",
    "powersgd": "powersgd(rank=2) + residual",
    "ef21": "topk(ratio=0.1) + ef21",
    "shards": "efsignsgd(block=16) + residual @ reduce_scatter",
    "policy": "by_size(min_elements=20, small=none, large=topk(ratio=0.1) + residual)",
}


def digest(arrays: Mapping[str, Any]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hashed.hexdigest()


def run(make: Callable[[str], Any], rank: int, size: int) -> None:
    """Runs all kinds. make(kind) returns an object with `holder` (for grace_ext), `step(i)`, `arrays()`, and `save(path)` and `load(path)`
    for what users save themselves."""
    what, folder, kinds = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    warnings.simplefilter("ignore")
    said = {}
    for kind in kinds:
        here = folder / kind
        if what == "first":
            said[kind] = after(make(kind), 0, STEPS)
            job = make(kind)
            after(job, 0, AT)
            grace_ext.save(job.holder, here)
            job.save(folder / f"{kind}.rank{rank}")
        else:
            job = make(kind)
            job.load(folder / f"{kind}.rank{rank if Path(folder / f'{kind}.rank{rank}').exists() else 0}")
            if not kind.startswith("checkpoint"):  # tf.train.Checkpoint contains the memory
                assert grace_ext.load(job.holder, here) == AT
            grace_ext.save(job.holder, folder / f"{kind}.loaded.{size}")
            said[kind] = after(job, AT, STEPS)
    (folder / f"{what}-{rank}-of-{size}.json").write_text(json.dumps(said))


def after(job: Any, start: int, stop: int) -> str:
    for step in range(start, stop):
        job.step(step)
    return digest(job.arrays())
