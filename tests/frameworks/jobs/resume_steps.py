"""Code that the resume jobs share.  <job>.py {first|second} FOLDER KIND...

For each kind, `first` trains 10 steps; then it trains a new object for 5 steps and saves it to FOLDER/<kind>. `second` loads that, saves
it at once to FOLDER/<kind>.loaded.<size>, and trains to step 10. Both write FOLDER/<what>-<rank>-of-<size>.json, with the digest of this
rank's final model by kind. In between both try to load states and files that are wrong, which must be told and change nothing. Nodes have
2 ranks each.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
import grace_ext  # noqa: E402
from grace_ext.checkpoints.statefile import driver_states, mapped  # noqa: E402
from grace_ext.errors import CheckpointError, GraceError  # noqa: E402
from tests.checkpoints import bad_states  # noqa: E402

STEPS, AT = 10, 5
#: Parts with different kinds of state: a residual, a shared Q, an estimate with its mean, shards of a residual, policies, settings of a
#: part within another, and a node's residual. 'bf16' has parameters of that dtype.
SPECS = {
    "topk": "topk(ratio=0.05) + residual",
    "powersgd": "powersgd(rank=2) + residual",
    "ef21": "topk(ratio=0.1) + ef21",
    "shards": "efsignsgd(block=16) + residual @ reduce_scatter",
    "policy": "by_size(min_elements=20, small=none, large=topk(ratio=0.1) + residual)",
    "nested": (
        "by_size(min_elements=20, small=every(n=2, then=none, otherwise=topk(ratio=0.5) + residual), large=accordion(interval=2, "
        "high=powersgd(rank=2) + residual, low=powersgd(rank=1) + residual))"
    ),
    "pipeline": "sidco(ratio=0.1) > qsgd(bits=4) + residual",
    "levels": "topk(ratio=0.1) + residual @ hierarchical",
    "bf16": "topk(ratio=0.05) + residual",
}


def digest(arrays: Mapping[str, Any]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hashed.hexdigest()


def run(make: Callable[[str], Any], rank: int, size: int) -> None:
    """Runs all kinds. make(kind) returns an object with `holder` (for grace_ext), `step(i)`, `arrays()`, `save(path)` and `load(path)` for
    what users save themselves, `memory()` and `take(state)` for this rank's state, and `knows_parameters`, before the first step."""
    what, folder, kinds = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    os.environ["GRACE_EXT_NODE"] = str(rank // 2)
    warnings.simplefilter("ignore")
    said = {}
    for kind in kinds:
        here = folder / kind
        if what == "first":
            said[kind] = after(make(kind), 0, STEPS)
            job = make(kind)
            after(job, 0, AT)
            grace_ext.save(job.holder, here)
            refuse_bad_states(job, here, f"bad.{rank}", begun=True)
            job.save(folder / f"{kind}.rank{rank}")
        else:
            job = make(kind)
            job.load(folder / f"{kind}.rank{rank if Path(folder / f'{kind}.rank{rank}').exists() else 0}")
            if not kind.startswith("checkpoint"):  # tf.train.Checkpoint contains the memory
                assert grace_ext.load(job.holder, here) == AT
            grace_ext.save(job.holder, folder / f"{kind}.loaded.{size}")
            refuse_bad_states(job, here, f"bad.{rank}.loaded.{size}", begun=False)
            said[kind] = after(job, AT, STEPS)
    (folder / f"{what}-{rank}-of-{size}.json").write_text(json.dumps(said))


def refuse_bad_states(job: Any, here: Path, name: str, *, begun: bool) -> None:
    """Asserts that bad states, given to this rank, and a checkpoint with NaN in one file, given to all, raise errors and change nothing."""
    before = mapped(job.memory(), np.array)
    good = mapped(before, np.copy)
    if any(state["state"] for state in driver_states(good)):
        known = {**bad_states.FORM, **(bad_states.FIT if begun or job.knows_parameters else {})}
        if begun and any(len(state["state"]) > 1 for state in driver_states(good)):  # no array at all is the memory of skipped steps
            known |= bad_states.WHOLE
        for wrong, bad, text in bad_states.of(good, known):
            try:
                job.take(bad)
            except GraceError as error:
                assert text in str(error), f"{wrong}: {text!r} is not in {error}"
            else:
                raise AssertionError(f"{wrong}: no error")
    for nothing in bad_states.NOTHING[1 if begun else 2 :]:  # None stands for no memory; {} is the memory before the first step
        try:
            job.take(nothing)
        except GraceError:
            continue
        raise AssertionError(f"{nothing!r}: no error")
    bad_states.damage(here, here.with_name(f"{here.name}.{name}"), 1, bad_states.FORM["NaN"][0])
    try:
        grace_ext.load(job.holder, here.with_name(f"{here.name}.{name}"))
    except CheckpointError as error:
        assert "has NaN or Inf" in str(error) and (not begun or "rank 1: " in str(error) and "rank 0: " not in str(error)), error
    else:
        raise AssertionError("no error")
    now = mapped(job.memory(), np.array)
    assert same(before, now), "a state that was refused has changed something"


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same entries, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


def after(job: Any, start: int, stop: int) -> str:
    for step in range(start, stop):
        job.step(step)
    return digest(job.arrays())
