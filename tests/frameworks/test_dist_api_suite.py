"""benchmarks/reliability/horovod_suite.py counts tests on two ranks, and its exit status tells unexpected failures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.reliability import horovod_suite

ROOT = Path(__file__).parents[2]
SUITE = """
import os, sys, unittest
import torch
import horovod.torch as hvd
sys.path.append(os.path.join(os.path.dirname(__file__), os.pardir, 'utils'))
from common import mpi_env_rank_and_size, skip_or_fail_gpu_test, temppath

class TorchTests(unittest.TestCase):
    def tearDown(self):
        if hvd.is_initialized():
            hvd.barrier()
            hvd.shutdown()
    def test_mean(self):
        hvd.init()
        assert hvd.rank() == int(os.environ["HOROVOD_RANK"]) and hvd.allreduce(torch.tensor(4.0 * hvd.rank())) == 2
        assert hvd.DistributedOptimizer.keywords == {"check_start": False}
        with temppath() as path:
            open(path, "w").close()
    def test_gpu(self):
        skip_or_fail_gpu_test(self, "No GPUs available")
    def test_one_rank_fails(self):
        hvd.init()
        assert hvd.rank() == 0
    def test_after_it(self):
        hvd.init()
        hvd.barrier()
    def LISTED(self):
        hvd.init()
        hvd.join()
"""


def suite(folder, *more):
    command = [sys.executable, ROOT / "benchmarks" / "reliability" / "horovod_suite.py", folder, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "test" / "parallel").mkdir(parents=True)
    (tmp_path / "test" / "parallel" / "test_torch.py").write_text(SUITE.replace("LISTED", "test_horovod_join_allreduce"))
    return tmp_path


def test_an_unexpected_failure_is_told(checkout):
    code, said = suite(checkout)
    assert code == 1
    assert "2 passed, 1 failed, 1 skipped, 1 expected exceptions, of 5 tests" in said
    assert re.search(r"FAILED: test_one_rank_fails\n    rank 1: failed: assert 1 == 0\n(?!    rank)", said)
    assert re.search(r"expected exception: test_horovod_join_allreduce\n    rank 0: failed: .*hvd.join\(\) is not available", said)


def test_expected_exceptions_alone_are_no_failure(checkout):
    code, said = suite(checkout, "-k", "join or gpu")
    assert code == 0 and "0 passed, 0 failed, 1 skipped, 1 expected exceptions, of 2 tests" in said


def test_no_tests_are_a_failure(checkout):
    code, said = suite(checkout, "-k", "no_such_test")
    assert code == 1 and "of 0 tests" in said


def test_a_rank_that_ends_early_is_a_failure(capsys):
    by_rank = [{"test_a": "passed"}, {"test_a": "did not end"}]
    assert horovod_suite.report(by_rank, set()) == 1
    assert horovod_suite.report([{"test_a": "passed"}, {}], set()) == 1
    assert horovod_suite.report([{"test_a": "passed"}] * 2, {"test_a"}) == 0
    assert "passed, although the page lists it: test_a" in capsys.readouterr().out


def test_the_page_lists_five_tests():
    assert len(horovod_suite.exceptions()) == 5
