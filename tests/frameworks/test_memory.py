"""What compression adds to a rank's resident memory, in a real job: about 2.3 times the gradients with one memory array (the old one, the
next one, buffers), 4.3 with two, and no more at the end than at the beginning. benchmarks/memory/memory.py measures it in full."""

from __future__ import annotations

import json
import sys

import pytest

from .support.launch import ROOT, launcher, run

#: 102 MB: with less, the engine's own buffers and those of one bucket (25 MB each) would be the larger part.
MODEL, BYTES, STEPS = "resnet50", 102_228_128, 40
#: Of the gradients, over 30 steps: a leak of one percent a step exceeds it.
FLAT = 0.2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


@pytest.mark.parametrize(
    ("engine", "spec", "most"),
    [
        ("horovodrun", "topk(ratio=0.01) + residual", 2.3),
        ("horovodrun", "topk(ratio=0.01) + dgc", 4.3),
        ("torchrun", "topk(ratio=0.01) + residual", 2.3),
    ],
)
def test_memory_is_bounded_and_flat(engine, spec, most, tmp_path):
    out = tmp_path / "ranks.json"
    job = [*launcher(engine, 2), str(ROOT / "benchmarks" / "memory" / "rank.py"), spec, MODEL, str(STEPS), str(out)]
    run(job, timeout=600)
    ranks = json.loads(out.read_text())
    assert len(ranks) == 2
    for seen in ranks:
        size = seen["gradients"]
        assert size == BYTES
        # It would not be error feedback if it kept less than one array more than before, and the rest would be measured wrongly.
        assert size <= seen["steady"] <= seen["peak"]
        assert seen["peak"] / size <= most, seen
        assert (seen["late"] - seen["early"]) / size <= FLAT, seen
