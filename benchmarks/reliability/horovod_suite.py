"""Runs Horovod's own tests of horovod.torch against grace_ext over torch.distributed, and prints how many passed.

    python benchmarks/reliability/horovod_suite.py PATH            PATH is a checkout of github.com/horovod/horovod
    python benchmarks/reliability/horovod_suite.py PATH -k join    only tests with "join" in their names

Every rank runs PATH/test/parallel/test_torch.py, unchanged, under torchrun; `import horovod.torch` gives it grace_ext.frameworks.torch. A
test that fails on one rank has failed. The exit status is 1 if a test fails for which docs/porting-from-horovod.md gives no reason.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import torch

CHECKOUT = Path(__file__).parents[2]
PAGE = CHECKOUT / "docs" / "porting-from-horovod.md"
#: Seconds after which a collective that waits for another rank fails.
PATIENCE = 20


def exceptions() -> set[str]:
    """Returns the names of the tests that the page lists as expected to fail."""
    return set(re.findall(r"^\| `(test_\w+)`", PAGE.read_text(), re.MULTILINE))


def run(horovod: Path, ranks: int, only: str, limit: float) -> list[dict[str, str]]:
    """Runs the tests on this many ranks. Returns, for each rank, the outcome of each test: 'passed', 'skipped', or why it failed."""
    environment = {**os.environ, "GRACE_EXT_ENGINE": "torch", "GRACE_EXT_TIMEOUT": f"{PATIENCE}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*launch, __file__, horovod, "-k", only, "--write-to", folder], env=environment, timeout=limit, check=False)
        return [outcomes(Path(folder) / f"{rank}") for rank in range(ranks)]


def outcomes(file: Path) -> dict[str, str]:
    """Reads what one rank has written. A test that has no end has failed."""
    lines = file.read_text().splitlines() if file.exists() else []
    return dict(json.loads(line) for line in lines)


def work(horovod: Path, only: str, folder: Path) -> None:
    """Runs the tests on this rank; writes a line when a test starts and a line when it ends."""
    import pytest

    import grace_ext.frameworks.torch as hvd

    rank = os.environ["RANK"]
    # By these variables Horovod's tests find out which rank they are, and that init() can follow shutdown().
    os.environ.update(HOROVOD_RANK=rank, HOROVOD_SIZE=os.environ["WORLD_SIZE"])
    stand_in_for_horovod(hvd)
    with (folder / rank).open("w", buffering=1) as file:

        class Recorder:
            failed: set[str] = set()

            def pytest_runtest_logstart(self, nodeid: str) -> None:
                self.note(nodeid, "did not end")

            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.nodeid not in self.failed:  # else the end of a test that failed: it may have left the ranks apart
                    if report.failed:
                        self.failed.add(report.nodeid)
                        crash = getattr(report.longrepr, "reprcrash", None)
                        self.note(report.nodeid, f"failed: {crash.message if crash else report.longrepr}")
                    elif report.skipped or report.when == "call":
                        self.note(report.nodeid, report.outcome)
                if report.when == "teardown":
                    hvd.shutdown()

            def note(self, nodeid: str, outcome: str) -> None:
                file.write(json.dumps([nodeid.rpartition("::")[2], outcome]) + "\n")

        suite = str(horovod / "test" / "parallel" / "test_torch.py")
        plain = ["--noconftest", "--disable-plugin-autoload", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        pytest.main([*plain, "-q", "--tb=short", "-k", only, suite], plugins=[Recorder()])


def stand_in_for_horovod(hvd: types.ModuleType) -> None:
    """Makes `import horovod.torch` give grace_ext, and `from common import ...` the three helpers that the tests use of test/utils, which
    imports the rest of Horovod.

    Two things are out of the tests' reach: some train before they broadcast parameters, so the check of equal starts is off; and some give
    vectors to every optimizer of torch, so they must not find Muon, which takes only matrices and is newer than they are."""
    if hasattr(torch.optim, "Muon"):
        torch.optim.Muon.__module__ = "hidden"
    package, module, common = (types.ModuleType(name) for name in ("horovod", "horovod.torch", "common"))
    module.__dict__.update(vars(hvd), DistributedOptimizer=functools.partial(hvd.DistributedOptimizer, check_start=False))
    package.torch = module  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def temppath() -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            yield os.path.join(folder, "file")

    def skip_or_fail_gpu_test(test, message: str) -> None:
        test.skipTest(message)

    def mpi_env_rank_and_size() -> tuple[int, int]:
        return 0, 1  # what Horovod's helper returns without MPI

    for helper in (temppath, skip_or_fail_gpu_test, mpi_env_rank_and_size):
        setattr(common, helper.__name__, helper)
    sys.modules.update({"horovod": package, "horovod.torch": module, "common": common})


def report(by_rank: list[dict[str, str]], allowed: set[str]) -> int:
    """Prints the outcomes. Returns the exit status."""
    tests = list(dict.fromkeys(test for outcomes in by_rank for test in outcomes))
    passed, skipped, expected, failed = [], [], [], []
    for test in tests:
        said = [outcomes.get(test, "did not start") for outcomes in by_rank]
        wrong = {rank: text for rank, text in enumerate(said) if text not in ("passed", "skipped")}
        (skipped if set(said) == {"skipped"} else passed if not wrong else expected if test in allowed else failed).append(test)
        if wrong:
            print(f"{'expected exception' if test in allowed else 'FAILED'}: {test}")
            for rank, text in wrong.items():
                print(f"    rank {rank}: {text.splitlines()[0]}")
    for test in sorted(allowed & set(passed)):
        print(f"passed, although the page lists it: {test}")
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped, {len(expected)} expected exceptions, of {len(tests)} tests")
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkout of Horovod")
    parser.add_argument("-k", dest="only", default="", metavar="EXPRESSION", help="runs only some tests, as pytest's -k")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for the whole run")
    parser.add_argument("--write-to", type=Path, help=argparse.SUPPRESS)  # on each rank
    given = parser.parse_args()
    if given.write_to:
        work(given.path, given.only, given.write_to)
        sys.exit(0)  # also if tests failed: torchrun would end the other ranks
    sys.exit(report(run(given.path.resolve(), given.ranks, given.only, given.limit), exceptions()))
