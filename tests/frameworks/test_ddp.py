"""Tests `ddp_comm_hook` in real DDP jobs: each case of jobs/ddp_job.py and jobs/ddp_use_job.py is a test, and must hold on every rank."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import grace_ext
from grace_ext.arrays.numpy import NumpyOps
from grace_ext.driver.driver import Driver
from grace_ext.errors import GraceError, NamesError
from grace_ext.exchange.perform import perform
from grace_ext.frameworks.torch.dist.world import LET_GO
from grace_ext.frameworks.torch.ops import HostOps
from grace_ext.frameworks.torch.transports import SingleTransport
from grace_ext.parts.tensor import TensorSpec

from .support import training
from .support.launch import ROOT, job, run
from .test_jobs import cases_of, held

SPECS = [f"case_spec_{number}" for number in range(len(training.SPECS))]


@pytest.mark.parametrize("case", [*(pytest.param(c, id=g) for c, g in zip(SPECS, training.SPECS, strict=True)), *cases_of("ddp_job.py")])
def test_equals_local_cluster(case):
    assert case in held("torchrun", 2, "ddp_job.py")


@pytest.mark.parametrize("case", cases_of("ddp_use_job.py"))
def test_use(case):
    assert case in held("torchrun", 2, "ddp_use_job.py")


@pytest.mark.parametrize("case", cases_of("compile_job.py"))
def test_torch_compile(case):
    assert case in held("torchrun", 2, "compile_job.py")


def test_alone():
    assert "ALONE ok" in job("torchrun", 1, "ddp_use_job.py")


def test_powersgd_with_many_buckets_beside_torchs_hook(tmp_path, record_property):
    """Our hook completes. Torch's hook aborted when this was written (2.13); its outcome is recorded, not asserted."""
    out = tmp_path / "rows.json"
    options = ["--steps", "8", "--buckets", "many", "--timeout", "60", "--json", str(out)]
    run([sys.executable, str(ROOT / "benchmarks/exchange/ddp_powersgd.py"), *options], 300)
    torchs, ours = json.loads(out.read_text())["rows"]
    assert (ours["outcome"], ours["buckets"], ours["ranks_agree"]) == ("completes", 16, True), ours
    record_property("torch powerSGD_hook", f"{torchs['outcome']}: {torchs.get('reason', '')}")


def test_a_process_does_not_end_before_gloos_threads_have_let_go(tmp_path):
    """The exit waits LET_GO seconds, because a Gloo thread could abort the process. The handler that is registered first runs last."""
    program = f"""
import atexit, time
import torch.distributed as dist
from grace_ext.frameworks.torch.ops import HostOps
from grace_ext.frameworks.torch.transports import DistTransport
atexit.register(lambda: print(time.monotonic() - ended))
dist.init_process_group("gloo", init_method="file://{tmp_path / "meeting"}", rank=0, world_size=1)
DistTransport(HostOps())
dist.destroy_process_group()
ended = time.monotonic()
"""
    assert float(run([sys.executable, "-c", program])) >= LET_GO


def test_regroup():
    """The driver takes over a framework's buckets if they have each parameter once, and change no bucket that has started."""
    driver = Driver(grace_ext.grace("none"), NumpyOps(), SingleTransport(HostOps()))
    driver.register(TensorSpec(name, (2,), "float32") for name in "abc")
    driver.regroup([["b"], ["a", "c"]])
    assert [[spec.name for spec in bucket.specs] for bucket in driver.buckets] == [["b"], ["a", "c"]]
    for groups in ([["a"], ["b"]], [["a", "b"], ["b", "c"]], [["a", "b", "c", "d"]]):
        with pytest.raises(NamesError, match="every registered parameter once"):
            driver.regroup(groups)
    driver.agreed = True
    perform(driver.put("b", np.ones(2, np.float32)), driver.transport, {})
    with pytest.raises(GraceError, match="has started"):
        driver.regroup([["a"], ["b", "c"]])
    driver.regroup([["b"], ["c"], ["a"]])
    assert [[spec.name for spec in bucket.specs] for bucket in driver.buckets] == [["b"], ["c"], ["a"]]
